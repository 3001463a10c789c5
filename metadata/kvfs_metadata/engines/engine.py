"""The transactional key-value engine under the metadata service.

Writers are decided first and written later. ``run`` calls each function of a group on an overlay of
the committed state: it sees what the functions before it wrote, and if it raises a KvfsError its
own writes are dropped and nobody else is disturbed. ``commit`` then writes the whole group in one
transaction of the store, from any thread. ``abandon`` gives a decided group up.

There is one writer in a process: between ``run`` and the end of ``commit`` or ``abandon`` of its
group no other ``run`` happens (the service's write queue sees to that). A function may change
memory beside the store; whoever abandons a group takes that back.

An engine is either owned by one process (memory, LMDB) or ``shared`` by many (PostgreSQL). The
memory that a process keeps beside a shared store must follow what others commit: the engine tells
the ``listener`` before it calls the functions of ``view`` and ``run``, so they always find memory
and store in one state, the newest there was when the call began.
``docs/design/0003-many-servers.md`` has the argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from kvfs_base.errors import KvfsError

T = TypeVar("T")
Item = tuple[bytes, bytes]
Writes = Mapping[bytes, bytes | None]
"""Changed keys; None deletes."""

KEY_BYTES_MAX = 511
"""LMDB's bound, which holds for every engine: stores can be copied."""

KEYS_END = b"\xff" * (KEY_BYTES_MAX + 1)
"""After every key."""


class KVRead(Protocol):
    """One consistent state."""

    def get(self, key: bytes) -> bytes | None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def range(self, start: bytes, end: bytes, limit: int, reverse: bool = False) -> list[Item]:
        """At most ``limit`` items with ``start <= key < end`` in the order of the keys' bytes, or
        from the last one down with ``reverse``."""


class KVTransaction(KVRead, Protocol):
    def put(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> None:
        """Fine if the key is absent."""

    def mark(self) -> int:
        """How far it is now, for ``roll_back``."""

    def roll_back(self, mark: int) -> None:
        """Takes back what was written since then."""


@dataclasses.dataclass
class Group(Generic[T]):
    """What a group of functions answered and what is left to write (None deletes)."""

    results: list[T | KvfsError]
    writes: dict[bytes, bytes | None]
    urgent: bool = False
    """To be on stable storage before any other process sees it, whatever the durability; only
    shared engines look. Whoever owns his store calls ``sync``."""


class Listener(Protocol):
    """Keeps memory in step with a shared store."""

    def __call__(self, read: KVRead, writes: Writes | None) -> None:
        """Another process committed ``writes``; called once a commit, in their order. None: more
        was committed than the store still tells one by one, so everything is to be loaded anew.
        ``read`` is the newest state, after all commits that are being told."""


class KVEngine(Protocol):
    shared: bool
    """Whether other processes may commit to the same store at the same time."""

    def listen(self, listener: Listener) -> None:
        """From now on ``listener`` hears of every commit of others. What was committed before is
        the caller's to load, in a ``view`` that follows with nothing in between."""

    def view(self, fn: Callable[[KVRead], T]) -> T:
        """Calls ``fn`` on a snapshot of the committed state, which it must not keep. Raises
        StoreUnavailable."""

    def run(self, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
        """Decides a group; nothing is written, and until ``commit`` or ``abandon`` no other process
        commits. A function that raises KvfsError has that as its result and leaves nothing; any
        other exception passes through and ends the group. Raises StoreUnavailable."""

    def commit(self, group: Group[T]) -> None:
        """All of the group's writes or, if this raises, none: Conflict when the group lost a race
        and may be decided anew; DiskFull when there is no room; TargetFailed when the disk failed,
        and then forever: what a failed sync lost is unknown; StoreUnavailable."""

    def abandon(self, group: Group[T]) -> None:
        """Nothing of the group will be written, and what its functions changed beside the store is
        taken back. Also to be called after a ``commit`` that raised: until then views of a shared
        store may raise StoreUnavailable."""

    def update(self, fns: Sequence[Callable[[KVTransaction], T]]) -> list[T | KvfsError]:
        """``run`` and ``commit``, which engines inherit."""
        group = self.run(fns)
        try:
            self.commit(group)
        except BaseException:
            self.abandon(group)
            raise
        return group.results

    def sync(self) -> None:
        """Returns once everything committed before is on stable storage. Any thread."""

    def copy_to(self, path: str) -> None:
        """Writes the committed state as an LMDB environment into the directory ``path``."""

    def close(self) -> None: ...


_NOTHING: Any = object()


class Overlay:
    """A KVTransaction that keeps its writes to itself, over a committed state."""

    __slots__ = ("_base", "_replaced", "writes")

    def __init__(self, base: KVRead) -> None:
        self._base = base
        self.writes: dict[bytes, bytes | None] = {}
        self._replaced: list[tuple[bytes, Any]] = []
        """What each write found in ``writes``, in order."""

    def get(self, key: bytes) -> bytes | None:
        if key in self.writes:
            return self.writes[key]
        return self._base.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not self.writes:
            return self._base.get_many(keys)
        return [self.get(key) for key in keys]

    def range(self, start: bytes, end: bytes, limit: int, reverse: bool = False) -> list[Item]:
        touched = {k: v for k, v in self.writes.items() if start <= k < end}
        if not touched:
            return self._base.range(start, end, limit, reverse)
        # Every touched key may hide one item of the base.
        below = self._base.range(start, end, limit + len(touched), reverse)
        merged = {k: v for k, v in below if k not in touched}
        merged.update((k, v) for k, v in touched.items() if v is not None)
        return sorted(merged.items(), reverse=reverse)[:limit]

    def put(self, key: bytes, value: bytes) -> None:
        self._replaced.append((key, self.writes.get(key, _NOTHING)))
        self.writes[key] = value

    def delete(self, key: bytes) -> None:
        self._replaced.append((key, self.writes.get(key, _NOTHING)))
        self.writes[key] = None

    def mark(self) -> int:
        return len(self._replaced)

    def roll_back(self, mark: int) -> None:
        while len(self._replaced) > mark:
            key, value = self._replaced.pop()
            if value is _NOTHING:
                del self.writes[key]
            else:
                self.writes[key] = value


def run_group(base: KVRead, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
    """``KVEngine.run`` over a snapshot."""
    state = Overlay(base)
    results: list[T | KvfsError] = []
    for fn in fns:
        mark = state.mark()
        try:
            results.append(fn(state))
        except KvfsError as exc:
            state.roll_back(mark)
            results.append(exc)
    return Group(results, state.writes)


def scan(read: KVRead, prefix: bytes, page: int = 1024) -> Iterator[Item]:
    """Every item whose key starts with ``prefix``, read page by page."""
    for items in scan_pages(read, prefix, prefix_end(prefix), page):
        yield from items


def scan_all(read: KVRead, page: int = 1024) -> Iterator[Item]:
    """Every item of a store."""
    for items in scan_pages(read, b"", KEYS_END, page):
        yield from items


def scan_pages(read: KVRead, start: bytes, end: bytes, page: int) -> Iterator[list[Item]]:
    """Every item with ``start <= key < end``, in lists of at most ``page``, none of them empty."""
    while items := read.range(start, end, page):
        yield items
        if len(items) < page:
            return
        start = items[-1][0] + b"\x00"


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys that start with ``prefix`` (not all 0xFF)."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1])
