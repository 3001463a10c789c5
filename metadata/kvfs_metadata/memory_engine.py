"""An engine in memory, for tests and for comparing others against."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvfs_base.errors import KvfsError
from kvfs_metadata.engine import Group, Item, KVRead, KVTransaction, Listener, run_group

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


class MemoryEngine:
    """Everything is gone when the object is. ``before_commit`` is called with a group's writes and
    may raise, which is how tests make disks fail."""

    shared = False

    def __init__(self) -> None:
        self._state = _State()
        # A commit may come from another thread than the views.
        self._lock = threading.Lock()
        self.before_commit: Callable[[dict[bytes, bytes | None]], None] = lambda writes: None

    def listen(self, listener: Listener) -> None:
        pass

    def view(self, fn: Callable[[KVRead], T]) -> T:
        with self._lock:
            return fn(self._state)

    def run(self, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
        return self.view(lambda read: run_group(read, fns))

    def commit(self, group: Group[T]) -> None:
        with self._lock:
            self.before_commit(group.writes)
            self._state.apply(group.writes)

    def abandon(self, group: Group[T]) -> None:
        pass

    def update(self, fns: Sequence[Callable[[KVTransaction], T]]) -> list[T | KvfsError]:
        group = self.run(fns)
        self.commit(group)
        return group.results

    def sync(self) -> None:
        pass

    def copy_to(self, path: str) -> None:
        # Imported here so that the memory engine works without LMDB.
        from kvfs_metadata.lmdb_engine import write_environment

        with self._lock:
            write_environment(path, self._state.values)

    def close(self) -> None:
        pass
