"""A lock for every chunk that somebody is at work on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from kvfs_base import threads
from kvfs_base.errors import Conflict
from kvfs_base.types import ChunkId


@dataclasses.dataclass(slots=True)
class _Lock:
    lock: threads.Lock
    users: int = 0


class ChunkLocks:
    """Each chunk's lock is its own, and there only while somebody has it or waits for it. Whoever
    changes a chunk of a chain keeps the lock while he waits for the next member: with a table of
    locks, two servers could wait for each other because of two chunks that share a place."""

    def __init__(self) -> None:
        self._lock = threads.lock()
        self._locks: dict[ChunkId, _Lock] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._locks)

    @contextlib.contextmanager
    def hold(self, chunk: ChunkId, seconds: float | None = None) -> Iterator[None]:
        """Raises Conflict after ``seconds`` of waiting."""
        with self._lock:
            entry = self._locks.setdefault(chunk, _Lock(threads.lock()))
            entry.users += 1
        try:
            if not entry.lock.acquire(timeout=-1 if seconds is None else seconds):
                raise Conflict(detail=f"chunk {tuple(chunk)} is being written")
            try:
                yield
            finally:
                entry.lock.release()
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users:
                    del self._locks[chunk]
