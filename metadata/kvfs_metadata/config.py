"""Settings of the metadata service."""

from __future__ import annotations

import dataclasses

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import COPIES_MAX
from kvfs_base.types import Address

DURABILITIES = ("cache", "strict")


@dataclasses.dataclass(frozen=True)
class MetadataConfig:
    """``durability``: with "strict" every acknowledged request was synced to disk before; with
    "cache" it survives the death of the process at once, that of the machine a second later."""

    directory: str
    unix: Address
    tcp: Address | None = None
    capacity_bytes: int = 0
    """0: what the targets hold, less a reserve."""
    high_watermark: float = 0.95
    """Eviction starts when blocks and files fill more than this fraction of the capacity."""
    low_watermark: float = 0.90
    """Eviction stops here."""
    durability: str = "cache"
    default_copies: int = 1
    """Of what is stored in directories that do not say otherwise."""
    store: str = ""
    """A postgresql:// URL that several servers may share, or a directory; empty: ``directory``."""
    secret_file: str | None = None
    """The cluster's secret; without one only addresses of this machine may be used."""

    def __post_init__(self) -> None:
        if self.durability not in DURABILITIES:
            raise InvalidRequest(detail=f"durability is one of {', '.join(DURABILITIES)}")
        if not 0.0 < self.low_watermark <= self.high_watermark <= 1.0:
            raise InvalidRequest(detail="watermarks: 0 < low <= high <= 1")
        if not 1 <= self.default_copies <= COPIES_MAX:
            raise InvalidRequest(detail=f"default_copies is 1 to {COPIES_MAX}")
        if self.capacity_bytes < 0:
            raise InvalidRequest(detail="capacity is not negative")
