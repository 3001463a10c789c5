"""Settings of a chunk server."""

from __future__ import annotations

import dataclasses
import math

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import TARGETS_PER_SERVER_MAX
from kvfs_base.types import Address
from kvfs_datapath.limits import (
    DOMAIN_CHARS_MAX,
    GARBAGE_SECONDS,
    SCRUB_BYTES_PER_SECOND,
    SCRUB_DAYS,
)


@dataclasses.dataclass(frozen=True)
class ChunkServerConfig:
    """``directories`` are absolute paths, one target each. ``durability`` is ``cache`` (what was
    acknowledged may be lost with the power; it is recomputable) or ``strict`` (a chunk is on stable
    storage before it is acknowledged). Raises InvalidRequest."""

    server_id: str
    directories: tuple[str, ...]
    metadata: tuple[Address, ...]
    """One server, or several of one store: the next is used when one fails."""
    unix: Address | None
    tcp: Address | None
    host: str = ""
    """Failure domain: copies of a chunk are on different hosts. Empty: this machine."""
    rack: str = ""
    """Failure domain above: copies are in different racks where there are enough of them."""
    capacity_bytes: int = 0
    """Of each target; 0 is what its file system holds."""
    durability: str = "cache"
    secret_file: str | None = None
    """The cluster's secret; without one only addresses of this machine may be used."""
    sync_bytes_per_second: int = 0
    """Bounds what the server sends to bring members of its chains in step; 0 is no bound."""
    garbage_seconds: float = GARBAGE_SECONDS
    """Between two rounds of looking for chunks that nothing refers to."""
    scrub_bytes_per_second: int = SCRUB_BYTES_PER_SECOND
    """How fast each target is read again to find damage; 0: never."""
    scrub_days: float = SCRUB_DAYS
    """How often everything is read again, if the rate allows."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.directories) <= TARGETS_PER_SERVER_MAX:
            raise InvalidRequest(detail=f"{len(self.directories)} target directories")
        if len(set(self.directories)) != len(self.directories):
            raise InvalidRequest(detail="a target directory is named twice")
        if self.durability not in ("cache", "strict"):
            raise InvalidRequest(detail=f"durability {self.durability!r}: cache or strict")
        if not self.metadata:
            raise InvalidRequest(detail="no address of a metadata service")
        if self.unix is None and self.tcp is None:
            raise InvalidRequest(detail="a chunk server needs a Unix or a TCP address")
        if max(len(self.host), len(self.rack)) > DOMAIN_CHARS_MAX:
            raise InvalidRequest(detail=f"host and rack have at most {DOMAIN_CHARS_MAX} characters")
        if self.capacity_bytes < 0:
            raise InvalidRequest(detail="capacity below zero")
        if self.sync_bytes_per_second < 0:
            raise InvalidRequest(detail="a rate below zero")
        if self.scrub_bytes_per_second < 0 or not 0 <= self.scrub_days < math.inf:
            raise InvalidRequest(detail="scrubbing below zero")
