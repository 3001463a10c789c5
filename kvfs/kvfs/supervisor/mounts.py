"""The mount of a supervised kvfs, before its process starts and after it is gone."""

from __future__ import annotations

import logging
import os
import threading

from kvfs.mount import system
from kvfs.mount.frontend import choose
from kvfs_base.errors import KvfsError, MountPointBusy

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
STACKED_MAX = 16
"""Mounts at one place that are removed in one go: more are not ours."""


def _is_dead(path: str) -> bool:
    """Whether the mount's server is gone. One that hangs is not: its owner has to end it."""
    dead = threading.Event()

    def probe() -> None:
        if system.is_dead(path):
            dead.set()

    # A thread that nobody waits for: stat on a hanging mount cannot be interrupted.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return dead.is_set()


def detach(path: str) -> None:
    """Unmounts lazily what a mount process left at ``path``, if anything."""
    for _ in range(STACKED_MAX):
        found = system.mounted_at(path)
        if found is None or found.type != system.FILE_SYSTEM_TYPE:
            return
        try:
            system.unmount(path, lazy=True)
        except KvfsError as exc:
            log.error("%s", exc)
            return


def detach_dead(path: str) -> None:
    """The same, but leaves a mount alone whose server is alive: it belongs to another kvfs."""
    found = system.mounted_at(path)
    if found is not None and found.type == system.FILE_SYSTEM_TYPE and _is_dead(path):
        detach(path)


def prepare(path: str) -> None:
    """Makes an empty directory of ``path``, cleaning up after a killed mount. Raises FuseMissing,
    MountPointBusy, MountFailed, or OSError if the directory cannot be made."""
    system.check_fuse()
    choose("auto")
    detach_dead(path)
    found = system.mounted_at(path)
    if found is not None:
        detail = f"a file system of type {found.type} is mounted there"
        raise MountPointBusy(mountpoint=path, detail=detail)
    os.makedirs(path, mode=0o700, exist_ok=True)
    system.check_mountpoint(path)
