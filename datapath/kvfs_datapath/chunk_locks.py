"""A lock a chunk, for as long as an update takes to go down its chain and come back.

Not the store's locks, which are shared by many chunks and held for one disk operation: what waits
for another server with a shared lock could wait for itself, by way of two chains in opposite order.
A chunk's locks are taken in the order of its chain, so nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvfs_base import threads
from kvfs_base.errors import Conflict
from kvfs_base.limits import CHUNK_LOCK_SECONDS
from kvfs_base.types import ChunkId
from kvfs_datapath.store import ChunkStore


class _Entry:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threads.lock()
        self.users = 0


class ChunkLocks:
    """Locks exist while somebody has or wants them."""

    def __init__(self) -> None:
        self._entries: dict[tuple[ChunkStore, ChunkId], _Entry] = {}
        self._guard = threads.lock()

    @contextlib.contextmanager
    def hold(
        self, store: ChunkStore, chunk: ChunkId, timeout: float = CHUNK_LOCK_SECONDS
    ) -> Iterator[None]:
        """Raises Conflict after ``timeout`` seconds."""
        key = (store, chunk)
        with self._guard:
            entry = self._entries.setdefault(key, _Entry())
            entry.users += 1
        try:
            if not entry.lock.acquire(timeout=timeout):
                raise Conflict(detail=f"chunk {tuple(chunk)} is being updated")
            try:
                yield
            finally:
                entry.lock.release()
        finally:
            with self._guard:
                entry.users -= 1
                if not entry.users:
                    del self._entries[key]
