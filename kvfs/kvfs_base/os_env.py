"""The real world behind the seams, put together."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable

from kvfs_base.os_disk import OsDisk
from kvfs_base.os_handshake import read_secret
from kvfs_base.os_network import OsBlockingNetwork, OsNetwork
from kvfs_base.seams import Disk, Env


class SystemClock:
    time_ns = staticmethod(time.time_ns)
    monotonic = staticmethod(time.monotonic)


# --- disk


def host_id() -> str:
    """Boot and network namespace (of the calling thread): two processes with equal ids share a
    kernel and its sockets."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}-{os.stat('/proc/thread-self/ns/net').st_ino}"


def os_env(seed: int | None = None, *, secret_file: str | None = None) -> Env:
    """The real world. ``seed`` makes chance repeatable. ``secret_file`` opens it beyond this
    machine: raises SecretUnusable."""
    secret = None if secret_file is None else read_secret(secret_file)
    disk: Callable[[str], Disk] = OsDisk
    return Env(
        clock=SystemClock(),
        rng=random.Random(seed),
        network=OsNetwork(secret),
        blocking_network=OsBlockingNetwork(secret),
        host_id=host_id(),
        open_disk=disk,
    )


def raise_open_files_limit() -> None:
    """For processes that keep chunks open, each with a descriptor: as many as this one may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


__all__ = [
    "SystemClock",
    "host_id",
    "os_env",
    "raise_open_files_limit",
]
