"""Which block lies in which extent of the arena, and who still looks at it.

All decisions are taken here, synchronously and under one lock; reading bytes into the extents is
the caller's business and happens outside. The life of an entry:

    acquire, absent ──► LOADING ──finish──► READY ──last release──► idle (in the LRU order)
                           │                  ▲                       │        │
                           └─failed─► FAILED  └───────acquire─────────┘     evicted
                                        │
                              last release: extent freed

Invariants, all guarded by the lock:

- An extent is freed only when its entry has no reference. A reader that holds a lease (a reference)
  never sees its bytes change.
- The index maps (namespace, key) to at most one entry. An entry that left the index (stale, failed,
  removed) never returns to it; its extent is freed with its last reference.
- An entry in the index with no reference is READY and in the LRU order; no other entry is.
- A *leased* entry is in the index, and READY or LOADING. Before it tells anybody that the block is
  gone the metadata service says so; until ``_leased_until`` it is given without a question.
- The caller that acquire told to load entries calls ``finish``, whatever happens: others wait for
  it. It does so before it waits for others, so nobody waits in a circle.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import threading
from collections.abc import Collection, Iterable, Sequence

from kvfs_base.errors import ArenaFull
from kvfs_base.types import BlockInfo
from kvfs_gds.extents import ExtentAllocator, pages_of


class State(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Entry:
    """One block in the arena. ``offset`` and ``size`` never change; the rest is the cache's."""

    __slots__ = (
        "extent_bytes",
        "finished",
        "generation",
        "indexed",
        "leased",
        "name",
        "offset",
        "references",
        "size",
        "state",
    )

    def __init__(
        self,
        name: tuple[int, bytes],
        generation: int,
        offset: int,
        size: int,
        finished: threading.Event,
    ) -> None:
        self.name = name
        self.generation = generation
        self.offset = offset
        self.size = size
        self.extent_bytes = pages_of(size)
        self.references = 1
        self.state = State.LOADING
        self.indexed = True
        self.leased = False
        self.finished = finished
        """Set when the load that made this entry is over, one way or the other."""


@dataclasses.dataclass(slots=True)
class Grant:
    """What acquire gave: one reference for each entry listed, duplicates counted."""

    entries: list[Entry | None]
    """In the order of the keys; None where there is no such block."""
    load: list[int]
    """Places whose extents the caller must fill."""
    wait: list[int]
    """Places that somebody (the caller too, for a key named twice) is filling."""

    def entry_at(self, place: int) -> Entry:
        """The entry of a place in ``load`` or ``wait``: there is one."""
        entry = self.entries[place]
        assert entry is not None
        return entry


@dataclasses.dataclass(frozen=True)
class Usage:
    """Gauges of a cache, in blocks and bytes."""

    blocks: int
    used_bytes: int
    leased_bytes: int
    evictions: int
    stale: int


class BlockCache:
    """Thread-safe."""

    def __init__(self, arena_bytes: int) -> None:
        self._lock = threading.Lock()
        self._extents = ExtentAllocator(arena_bytes)
        self._index: dict[tuple[int, bytes], Entry] = {}
        self._idle: collections.OrderedDict[Entry, None] = collections.OrderedDict()
        """Unreferenced entries, the one that was released first at the front."""
        self._idle_bytes = 0
        self._evictions = 0
        self._stale = 0
        self._leased: dict[int, Entry] = {}
        """By generation."""
        self._leased_until = 0.0
        self._watching = False
        self._revocations = 0

    def usage(self) -> Usage:
        with self._lock:
            return Usage(
                blocks=len(self._index),
                used_bytes=self._extents.used_bytes,
                leased_bytes=self._extents.used_bytes - self._idle_bytes,
                evictions=self._evictions,
                stale=self._stale,
            )

    def resident(self, namespace: int, keys: Iterable[bytes]) -> int:
        """How many of ``keys`` have a block here, of whatever generation. It may be gone, or come,
        the next moment."""
        index = self._index
        with self._lock:
            return sum((namespace, key) in index for key in keys)

    # --- leases of the metadata service (docs/design/0011-block-leases.md)

    @property
    def revocations(self) -> int | None:
        """To be asked before the metadata service is, and given to ``acquire``: what it answers may
        be kept only if nothing was revoked meanwhile. None: nothing may be kept."""
        return self._revocations if self._watching else None

    def watch(self, until: float) -> None:
        """Entries that are leased may be given until then (monotonic seconds)."""
        with self._lock:
            self._watching = True
            self._leased_until = until

    def revoke(self, generations: Iterable[int]) -> None:
        with self._lock:
            for generation in generations:
                self._revocations += 1
                entry = self._leased.pop(generation, None)
                if entry is not None:
                    entry.leased = False

    def revoke_all(self, *, watching: bool) -> None:
        with self._lock:
            self._watching = watching
            self._revocations += 1
            for entry in self._leased.values():
                entry.leased = False
            self._leased.clear()

    def acquire_leased(
        self, namespace: int, keys: Iterable[bytes], now: float
    ) -> list[Entry] | None:
        """A reference to each of ``keys``, if all of them are here and leased."""
        index = self._index
        with self._lock:
            if now >= self._leased_until or not self._leased:
                return None
            entries: list[Entry] = []
            for key in keys:
                entry = index.get((namespace, key))
                if entry is None or not entry.leased or entry.state is not State.READY:
                    return None
                entries.append(entry)
            for entry in entries:
                self._refer(entry)
        return entries

    def leased_prefix(self, namespace: int, keys: Iterable[bytes], now: float) -> int:
        """How many of ``keys``, from the first on, are here and leased."""
        index = self._index
        count = 0
        with self._lock:
            if now >= self._leased_until or not self._leased:
                return 0
            for key in keys:
                entry = index.get((namespace, key))
                if entry is None or not entry.leased:
                    break
                count += 1
        return count

    # --- references

    def acquire(
        self,
        namespace: int,
        keys: Sequence[bytes],
        infos: Sequence[BlockInfo | None],
        revocations: int | None = None,
    ) -> Grant:
        """References to all blocks of a batch, or none: raises ArenaFull when there is no room for
        one of them, even after evicting everything that nobody references.

        ``infos`` is what the metadata service says of each key. An entry of another generation
        leaves the cache. ``revocations``, as it was when the service was asked for leases: they are
        kept if it still is that.
        """
        grant = Grant([None] * len(keys), [], [])
        index = self._index
        with self._lock:
            missing: list[int] = []
            # Hits first: once referenced, they are safe from the evictions that follow.
            for place, info in enumerate(infos):
                if info is None:
                    continue
                entry = index.get((namespace, keys[place]))
                if entry is None or entry.generation != info.inode:
                    missing.append(place)
                    continue
                self._refer(entry)
                grant.entries[place] = entry
                if entry.state is not State.READY:
                    grant.wait.append(place)
            if missing:
                try:
                    self._add(namespace, keys, infos, missing, grant)
                except ArenaFull:
                    self._undo(grant)
                    raise
            if revocations is not None and revocations == self._revocations and self._watching:
                for entry in grant.entries:
                    if entry is not None and not entry.leased:
                        entry.leased = True
                        self._leased[entry.generation] = entry
        return grant

    def _refer(self, entry: Entry) -> None:
        if entry.references == 0:
            del self._idle[entry]
            self._idle_bytes -= entry.extent_bytes
        entry.references += 1

    def _add(
        self,
        namespace: int,
        keys: Sequence[bytes],
        infos: Sequence[BlockInfo | None],
        missing: Iterable[int],
        grant: Grant,
    ) -> None:
        finished = threading.Event()
        for place in missing:
            info = infos[place]
            assert info is not None
            name = (namespace, keys[place])
            old = self._index.get(name)
            if old is not None and old.generation == info.inode:
                old.references += 1
                grant.entries[place] = old
                grant.wait.append(place)
                continue
            if old is not None:
                self._stale += 1
                self._drop(old)
            entry = Entry(name, info.inode, self._allocate(info.size), info.size, finished)
            self._index[name] = entry
            grant.entries[place] = entry
            grant.load.append(place)

    def _allocate(self, size: int) -> int:
        offset = self._extents.allocate(size)
        while offset is None:
            if not self._idle:
                raise ArenaFull(needed_bytes=size, leased_bytes=self._extents.used_bytes)
            self._evictions += 1
            self._drop(next(iter(self._idle)))
            offset = self._extents.allocate(size)
        return offset

    def _undo(self, grant: Grant) -> None:
        """Gives everything back. Nobody else can have seen the new entries: the lock was held."""
        for place in grant.load:
            self._drop(grant.entry_at(place))
        self._release(e for e in grant.entries if e is not None)

    def finish(self, grant: Grant, failed: Collection[int] = ()) -> None:
        """The extents of ``grant.load`` are filled and verified, except for the places in
        ``failed``. Wakes who waits for them. To be called once for every grant with a load;
        the references are still the caller's to release."""
        if not grant.load:
            return
        with self._lock:
            for place in grant.load:
                entry = grant.entry_at(place)
                if place in failed:
                    entry.state = State.FAILED
                    self._drop(entry)
                else:
                    entry.state = State.READY
        entry.finished.set()  # one event for the whole load

    def release(self, entries: Iterable[Entry]) -> None:
        """Gives back one reference for each entry listed."""
        with self._lock:
            self._release(entries)

    def remove(self, namespace: int, keys: Iterable[bytes]) -> None:
        """Forgets blocks that were removed; leased ones keep their bytes until released."""
        with self._lock:
            for key in keys:
                entry = self._index.get((namespace, key))
                if entry is not None:
                    self._drop(entry)

    def _release(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.references -= 1
            if entry.references:
                continue
            if entry.indexed:
                self._idle[entry] = None
                self._idle_bytes += entry.extent_bytes
            else:
                self._extents.free(entry.offset)

    def _drop(self, entry: Entry) -> None:
        """Takes an entry out of the index, and frees its extent if nobody references it."""
        if not entry.indexed:
            return
        entry.indexed = False
        del self._index[entry.name]
        if entry.leased:
            entry.leased = False
            del self._leased[entry.generation]
        if entry.references == 0:
            del self._idle[entry]
            self._idle_bytes -= entry.extent_bytes
            self._extents.free(entry.offset)


__all__ = ["BlockCache", "Entry", "Grant", "State", "Usage"]
