"""Settings of the node agent."""

from __future__ import annotations

import dataclasses

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import (
    AGENT_CONNECTIONS_MAX,
    GIB,
    PAGE_BYTES,
    STAGING_BYTES,
)
from kvfs_base.types import Address


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Raises InvalidRequest for values that cannot work."""

    unix: Address
    """Where clients connect."""
    metadata: tuple[Address, ...]
    """One server, or several of one store: the next is used when one fails."""
    arena_bytes: int = GIB
    """Whole pages. All clients share the arena; leased blocks must fit."""
    staging_bytes: int = STAGING_BYTES
    """Whole pages, for each client: the largest block it can put."""
    client_leased_bytes: int = 0
    """What one client may keep leased; 0 is three quarters of the arena, so that one that forgets
    its leases leaves room for others."""
    keep_puts: bool = True
    """Whether blocks that a client puts are kept in the arena, where room can be made: a copy, made
    while the disk writes (no loss of rate measured), saves the first read from disk."""
    connections_max: int = AGENT_CONNECTIONS_MAX
    secret_file: str | None = None
    """The cluster's secret; without one only addresses of this machine may be used."""

    def __post_init__(self) -> None:
        if self.unix.kind != "unix":
            raise InvalidRequest(detail="the agent passes descriptors: a unix: address is needed")
        if not self.metadata:
            raise InvalidRequest(detail="no address of a metadata service")
        for name in ("arena_bytes", "staging_bytes"):
            size = getattr(self, name)
            if size <= 0 or size % PAGE_BYTES:
                raise InvalidRequest(detail=f"{name}={size} is not a number of whole pages")
        if self.client_leased_bytes < 0 or self.connections_max < 1:
            raise InvalidRequest(detail="negative limit")

    @property
    def client_leased_bytes_max(self) -> int:
        """``client_leased_bytes``, with its default filled in."""
        return self.client_leased_bytes or self.arena_bytes // 4 * 3
