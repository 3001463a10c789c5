"""Settings of `kvfs up`."""

from __future__ import annotations

import dataclasses

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import KIB, MIB

NEW_CHUNK_SERVERS = 3
CHUNK_SERVERS_MAX = 64


@dataclasses.dataclass(frozen=True)
class UpConfig:
    directory: str
    mountpoint: str | None = None
    """Where to mount; made if it is missing. None mounts nothing."""
    chunk_servers: int = 0
    """How many; each has one directory below ``targets/``. 0 means as many as the directory has, 3
    for a new one. More may be added at any start, fewer not: their blocks would be lost."""
    ready_seconds: float = 60.0
    """A role that is not serving by then has failed to start."""
    stop_seconds: float = 15.0
    """How long each role may take to stop before it is killed."""
    log_bytes: int = 8 * MIB
    """A log file over this size becomes ``.log.1``, the one before is dropped."""
    secret_file: str | None = None
    """The cluster's secret, for all of them; without one only addresses of this machine may be
    used."""

    def __post_init__(self) -> None:
        if not self.directory.startswith("/"):
            raise InvalidRequest(detail=f"directory must be absolute: {self.directory!r}")
        if self.mountpoint is not None and not self.mountpoint.startswith("/"):
            raise InvalidRequest(detail=f"mountpoint must be absolute: {self.mountpoint!r}")
        if self.secret_file is not None and not self.secret_file.startswith("/"):
            raise InvalidRequest(detail=f"secret_file must be absolute: {self.secret_file!r}")
        if not 0 <= self.chunk_servers <= CHUNK_SERVERS_MAX:
            raise InvalidRequest(detail=f"chunk_servers must be between 0 and {CHUNK_SERVERS_MAX}")
        for name in ("ready_seconds", "stop_seconds"):
            if not 0 < getattr(self, name) <= 3600:
                raise InvalidRequest(detail=f"{name} must be above 0 and at most 3600")
        if not 64 * KIB <= self.log_bytes <= 1024 * MIB:
            raise InvalidRequest(detail="log_bytes must be between 64 KiB and 1 GiB")
