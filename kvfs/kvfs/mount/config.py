"""Settings of one mount."""

from __future__ import annotations

import dataclasses

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import MIB
from kvfs_base.types import Address


@dataclasses.dataclass(frozen=True)
class MountConfig:
    mountpoint: str
    metadata: tuple[Address, ...]
    """One server, or several of one store: the next is used when one fails."""
    allow_other: bool = False
    """Other users may enter; permissions are checked by the kernel either way."""
    allow_nonempty: bool = False
    """Mount over a directory that has files; they are hidden for as long."""
    attribute_seconds: float = 1.0
    """How long the kernel may answer ``stat`` by itself."""
    entry_seconds: float = 1.0
    """How long the kernel may take a name for existing without asking."""
    negative_seconds: float = 0.0
    """How long the kernel may take a name for missing. Above 0 a file that somebody else made
    (another mount, a ``put``) stays invisible for so long to those who asked before."""
    read_ahead_bytes: int = 4 * MIB
    """The kernel's read-ahead for this mount; needs root, else the kernel's default stays."""
    unmount_seconds: float = 2.0
    """How long an orderly unmount may wait for busy users before the mount is detached."""
    busy_wait_seconds: float = 0.00025
    """How long to look out, instead of sleeping, for the next request of who has opened or closed a
    file that the kernel reads by itself; 0 for never."""
    frontend: str = "auto"
    """Who talks to the kernel: ``auto``, ``direct`` or ``pyfuse3``."""
    locks: str = "auto"
    """Where locks (flock, fcntl) hold: ``cluster``, ``mount``, or ``auto``: in the cluster if the
    front end can."""
    transport: str = "auto"
    """How chunks are read: ``auto``, ``local`` or ``tcp`` (see ChunkClient)."""
    secret_file: str | None = None
    """The cluster's secret; without one only addresses of this machine may be used."""

    def __post_init__(self) -> None:
        if not self.mountpoint.startswith("/"):
            raise InvalidRequest(detail=f"mount point must be absolute: {self.mountpoint!r}")
        if not self.metadata:
            raise InvalidRequest(detail="no address of a metadata service")
        for name in ("attribute_seconds", "entry_seconds", "negative_seconds", "unmount_seconds"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise InvalidRequest(detail=f"{name} must be between 0 and 86400")
        if not 0 <= self.busy_wait_seconds <= 0.01:
            raise InvalidRequest(detail="busy_wait_seconds must be between 0 and 0.01")
        if not 0 <= self.read_ahead_bytes <= 256 * MIB:
            raise InvalidRequest(detail="read_ahead_bytes must be between 0 and 256 MiB")
        if self.frontend not in ("auto", "direct", "pyfuse3"):
            raise InvalidRequest(detail=f"unknown front end {self.frontend!r}")
        if self.locks not in ("auto", "cluster", "mount"):
            raise InvalidRequest(detail=f"locks must be auto, cluster or mount: {self.locks!r}")
        if self.transport not in ("auto", "local", "tcp"):
            raise InvalidRequest(detail=f"unknown transport {self.transport!r}")
