"""What the front ends share: what the kernel is told, which one runs, and why."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import stat
from typing import NamedTuple, Protocol

from kvfs.mount.config import MountConfig
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.limits import MOUNT_STALE_OPENS
from kvfs_base.errors import FuseMissing, KvfsError
from kvfs_base.limits import KIB, PAGE_BYTES
from kvfs_base.types import Attr
from kvfs_metadata.messages import FilesystemStats

log = logging.getLogger(__name__)

BLOCK_SIZE = 128 * KIB
"""st_blksize: what programs take for a good I/O size."""
SECTOR_BYTES = 512
"""Unit of st_blocks."""
DOT_ENTRIES = 2
"""``.`` and ``..`` have the positions 1 and 2, the names of the file system follow."""
FREE_INODES = 1 << 32
"""Inode numbers do not run out; tools want to see a number."""

DIRECT_KERNEL = (5, 4)
"""The oldest kernel that the direct front end speaks to."""
PASSTHROUGH_KERNEL = (6, 9)


class Frontend(Protocol):
    """Requests of one mount in, calls of its Filesystem, answers out."""

    def mount(self) -> None:
        """Raises MountFailed."""

    async def serve(self) -> None:
        """Answers requests until the file system is unmounted or ``stop`` is called."""

    def stop(self) -> None: ...

    def close(self) -> None:
        """After ``serve`` has ended. What is still mounted is dead from then on."""


class Choice(NamedTuple):
    name: str
    """``direct`` or ``pyfuse3``"""
    reason: str


def decide(
    setting: str, kernel: tuple[int, int], *, is_root: bool, has_pyfuse3: bool
) -> Choice | None:
    """AUTO's rule; docs/mount.md has it in words. None if what is asked for cannot run here."""
    version = f"Linux {kernel[0]}.{kernel[1]}"
    if setting == "pyfuse3":
        return Choice("pyfuse3", "asked for") if has_pyfuse3 else None
    if kernel < DIRECT_KERNEL:
        asked = setting == "direct"
        return Choice("pyfuse3", f"{version} is too old") if has_pyfuse3 and not asked else None
    if setting == "direct":
        return Choice("direct", "asked for")
    if not has_pyfuse3:
        return Choice("direct", "pyfuse3 is not installed")
    if kernel < PASSTHROUGH_KERNEL:
        return Choice("pyfuse3", f"{version} has no passthrough")
    if not is_root:
        return Choice("pyfuse3", "passthrough needs root")
    return Choice("direct", f"{version}, root")


def choose(setting: str) -> Choice:
    """Raises FuseMissing."""
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    kernel = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    choice = decide(setting, kernel, is_root=os.geteuid() == 0, has_pyfuse3=_find_pyfuse3())
    if choice is not None:
        return choice
    if setting == "direct":
        raise FuseMissing(detail=f"the direct front end needs Linux 5.4, this is {release}")
    raise FuseMissing(
        detail="pyfuse3 is not installed: pip install 'kvfs[fuse]' (it builds on libfuse3-dev, "
        "pkg-config and gcc)"
    )


def _find_pyfuse3() -> bool:
    try:
        return importlib.util.find_spec("pyfuse3") is not None
    except ValueError:  # somebody has put None where a module should be
        return False


def make(choice: Choice, filesystem: Filesystem, config: MountConfig) -> Frontend:
    """Raises FuseMissing if pyfuse3 is there and cannot be loaded."""
    if choice.name == "direct":
        from kvfs.mount.direct_frontend import DirectFrontend

        return DirectFrontend(filesystem, config)
    try:
        from kvfs.mount.pyfuse3_frontend import Pyfuse3Frontend
    except ImportError as exc:
        raise FuseMissing(detail=f"pyfuse3: {exc}") from exc
    return Pyfuse3Frontend(filesystem, config)


class StaleOpens:
    """Threads whose open failed because the file went between look-up and open.

    The kernel takes ESTALE for "look the name up once more", so that who opens a file while another
    one takes its name gets one of the two. It does so once. If what it finds then has gone, too,
    the program would be told ESTALE, which those that look for files do not know: for them the
    file is missing.
    """

    def __init__(self) -> None:
        self._threads: dict[int, None] = {}

    def failed(self, thread: int, code: int) -> int:
        """``open`` ended with the errno ``code``; the one that the kernel is told."""
        again = thread in self._threads
        self.over(thread)
        if code != errno.ESTALE or again:
            return errno.ENOENT if code == errno.ESTALE else code
        if thread:
            self._threads[thread] = None
            if len(self._threads) > MOUNT_STALE_OPENS:
                del self._threads[next(iter(self._threads))]
        return code

    def may_fail(self, thread: int) -> bool:
        """The name would be looked up once more."""
        return thread != 0 and thread not in self._threads

    def over(self, thread: int) -> None:
        """It has a file open, or was told that there is none."""
        if self._threads:
            self._threads.pop(thread, None)


def errno_of(error: Exception, operation: str) -> int:
    """What the kernel is told. What a person may have to look into is logged."""
    if isinstance(error, KvfsError):
        if error.posix_errno == errno.EIO:
            log.info("%s: %s", operation, error)
        return error.posix_errno
    log.error("%s failed", operation, exc_info=error)
    return errno.EIO


def sectors(attr: Attr) -> int:
    """st_blocks. How large the holes of a file are is not known here, only that there may be some:
    one block less makes programs (cp, rsync, tar) look for them. With none all would be a hole."""
    if not stat.S_ISREG(attr.mode):
        return 0
    count = -(-attr.size // SECTOR_BYTES)
    return max(1, count - 1) if attr.sparse and count else count


class Space(NamedTuple):
    """For statfs, in blocks of PAGE_BYTES."""

    blocks: int
    blocks_free: int
    files: int
    files_free: int

    @classmethod
    def of(cls, found: FilesystemStats) -> Space:
        free = max(0, found.capacity_bytes - found.used_bytes) // PAGE_BYTES
        blocks = found.capacity_bytes // PAGE_BYTES
        if found.inodes_max:
            files_free = max(0, found.inodes_max - found.inodes)
            return cls(blocks, free, found.inodes + files_free, files_free)
        return cls(blocks, free, found.inodes + FREE_INODES, FREE_INODES)
