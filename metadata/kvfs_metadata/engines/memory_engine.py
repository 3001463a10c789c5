"""An engine in memory, for tests and for comparing others against."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvfs_metadata.engines.engine import (
    Group,
    Item,
    KVEngine,
    KVRead,
    KVTransaction,
    Listener,
    Writes,
    run_group,
)

T = TypeVar("T")


class _State:
    """The committed state: a dict and its keys in order."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.values.get(key) for key in keys]

    def range(self, start: bytes, end: bytes, limit: int, reverse: bool = False) -> list[Item]:
        first = bisect.bisect_left(self.keys, start)
        last = max(first, bisect.bisect_left(self.keys, end))
        if reverse:
            chosen = self.keys[max(first, last - limit) : last][::-1]
        else:
            chosen = self.keys[first : min(last, first + limit)]
        return [(key, self.values[key]) for key in chosen]

    def apply(self, writes: dict[bytes, bytes | None]) -> None:
        for key, value in writes.items():
            if value is not None:
                if key not in self.values:
                    bisect.insort(self.keys, key)
                self.values[key] = value
            elif self.values.pop(key, None) is not None:
                del self.keys[bisect.bisect_left(self.keys, key)]


class MemoryStore:
    """What several engines share: the state, and every commit in order."""

    def __init__(self) -> None:
        self.state = _State()
        self.log: list[tuple[MemoryEngine, Writes]] = []
        # A commit may come from another thread than the views.
        self.lock = threading.RLock()
        self.log_max = 1000
        """An engine that lags behind by more is told to load everything."""


class MemoryEngine(KVEngine):
    """Everything is gone when the object is. ``before_commit`` is called with a group's writes and
    may raise, which is how tests make disks fail. Engines over one ``store`` are shared ones."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.shared = store is not None
        self._store = store or MemoryStore()
        self._seen = len(self._store.log)
        self._listener: Listener | None = None
        self.before_commit: Callable[[dict[bytes, bytes | None]], None] = lambda writes: None

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        self._seen = len(self._store.log)

    def _catch_up(self) -> None:
        missed = self._store.log[self._seen :]
        self._seen = len(self._store.log)
        if self._listener is None:
            return
        if len(missed) > self._store.log_max:
            self._listener(self._store.state, None)
            return
        for author, writes in missed:
            if author is not self:
                self._listener(self._store.state, writes)

    def view(self, fn: Callable[[KVRead], T]) -> T:
        with self._store.lock:
            self._catch_up()
            return fn(self._store.state)

    def run(self, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
        # Nobody else may commit until this group is: a shared engine keeps the lock.
        self._store.lock.acquire()
        try:
            self._catch_up()
            return run_group(self._store.state, fns)
        except BaseException:
            self._end_turn()
            raise
        finally:
            if not self.shared:
                self._store.lock.release()

    def _end_turn(self) -> None:
        if self.shared:
            self._store.lock.release()

    def commit(self, group: Group[T]) -> None:
        with self._store.lock:
            self.before_commit(group.writes)
            self._store.state.apply(group.writes)
            if self.shared and group.writes:
                self._store.log.append((self, group.writes))
        self._end_turn()

    def abandon(self, group: Group[T]) -> None:
        self._end_turn()

    def sync(self) -> None:
        pass

    def copy_to(self, path: str) -> None:
        # Imported here so that the memory engine works without LMDB.
        from kvfs_metadata.engines.lmdb_engine import write_environment

        with self._store.lock:
            write_environment(path, sorted(self._store.state.values.items()))

    def close(self) -> None:
        pass
