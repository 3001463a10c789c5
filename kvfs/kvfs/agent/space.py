"""The arena with its cache: where reads and writes get room for blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvfs_base.errors import ArenaFull
from kvfs_base.types import BlockInfo
from kvfs_gds.arena import Arena
from kvfs_gds.block_cache import BlockCache, Entry, Grant


class Space:
    """Thread-safe."""

    def __init__(self, arena: Arena, cache: BlockCache, collect: Callable[[], None]) -> None:
        """``collect`` ends the leases that clients gave back and that nobody looked at yet."""
        self.arena = arena
        self.cache = cache
        self._collect = collect

    def acquire(
        self,
        namespace: int,
        keys: Sequence[bytes],
        infos: Sequence[BlockInfo | None],
        revocations: int | None = None,
    ) -> Grant:
        """As BlockCache.acquire."""
        try:
            return self.cache.acquire(namespace, keys, infos, revocations)
        except ArenaFull:
            self._collect()
        return self.cache.acquire(namespace, keys, infos, revocations)

    def extent(self, entry: Entry) -> memoryview:
        """The whole pages of an entry, to be filled."""
        return self.arena.view_to_fill(entry.offset, entry.extent_bytes)
