"""A member that is brought in step: what of a chain it has as the others have it.

One comparison a chain and version. It goes through the chunks in order; behind the place that it
has come to everything is in step but for what was asked for and has not come yet, before it only
what was updated meanwhile. A comparison that breaks off and begins again under the same version
goes on from what it knows: every update since then has passed this member.

A member that waits for its turn knows nothing of the kind, and takes whatever comes whole: its
comparison has a later version of the chain, as the one before it serves then.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from kvfs_base import threads
from kvfs_base.errors import ChunkMismatch, ChunkNotFound, ServerBusy, StaleChain, VersionMismatch
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath import rules
from kvfs_datapath.chains.views import Place, Views
from kvfs_datapath.chunks.listing import ChunkListing
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import (
    CHUNK_LOCK_SECONDS,
    PASS_SECONDS,
    SYNC_CAME_MAX,
)

_Name = tuple[int, int]
"""Inode and number of a chunk."""


@dataclasses.dataclass(slots=True)
class _Comparison:
    """``begun``: what was pending from before it is forgotten."""

    version: int
    begun: bool = False
    position: _Name = (0, 0)
    wanted: set[_Name] = dataclasses.field(default_factory=set)
    """Asked for, behind the position."""
    came: set[_Name] = dataclasses.field(default_factory=set)
    """Updated, before the position."""

    def has(self, name: _Name) -> bool:
        return name in self.came or (name < self.position and name not in self.wanted)

    def add(self, name: _Name) -> None:
        if name < self.position:
            self.wanted.discard(name)
        elif len(self.came) >= SYNC_CAME_MAX:
            raise ServerBusy(detail="too many updates during a comparison")
        else:
            self.came.add(name)

    def remove(self, name: _Name) -> None:
        self.came.discard(name)
        if name < self.position:
            self.wanted.add(name)

    def advance(self, to: _Name | None, wanted: set[_Name]) -> None:
        self.wanted |= wanted
        if to is None:
            to = (1 << 64, 0)
        if to > self.position:
            self.position = to
            self.came = {name for name in self.came if name >= to}


class SyncSinks:
    """The comparisons that targets of this server take part in as those that are brought in
    step."""

    def __init__(self, views: Views, wait_past: Callable[[], None]) -> None:
        """``wait_past`` returns once nothing is removed any more by what was known before."""
        self._views = views
        self._wait_past = wait_past
        self._comparisons: dict[tuple[int, int], _Comparison] = {}
        self._listings: dict[tuple[int, int], ChunkListing] = {}
        self._lock = threads.lock()
        views.on_change(self._forget)

    def _forget(self) -> None:
        """What was known of versions that are past."""
        with self._lock:
            for key, comparison in list(self._comparisons.items()):
                chain = self._views.chain(key[1])
                if chain is None or chain.version != comparison.version:
                    del self._comparisons[key]
                    self._listings.pop(key, None)

    # --- which chunks are in step (replication.InStep)

    def has(self, place: Place, chunk: ChunkId) -> bool:
        """Never so for a member that waits for its turn."""
        with self._lock:
            found = self._find(place)
            return found is not None and found.has(chunk[:2])

    def came(self, place: Place, chunk: ChunkId) -> None:
        """Also before the source has asked for anything. Raises ServerBusy."""
        if place.is_sink:
            with self._lock:
                self._get(place).add(chunk[:2])

    def went(self, place: Place, chunk: ChunkId) -> None:
        if place.is_sink:
            with self._lock:
                self._get(place).remove(chunk[:2])

    def _find(self, place: Place) -> _Comparison | None:
        found = self._comparisons.get((place.target_id, place.chain.chain_id))
        return found if found is not None and found.version == place.chain.version else None

    def _get(self, place: Place) -> _Comparison:
        found = self._find(place)
        if found is None:
            found = _Comparison(place.chain.version)
            self._comparisons[place.target_id, place.chain.chain_id] = found
        return found

    # --- what the source asks for

    def begin(self, store: ChunkStore, place: Place) -> None:
        """Forgets what is pending from before this version of the chain. Raises ServerBusy if a
        write of another version does not end."""
        chain_id = place.chain.chain_id
        with self._lock:
            self._listings.pop((place.target_id, chain_id), None)
            comparison = self._get(place)
        if comparison.begun:
            return
        if not self._views.wait_quiet(place, 2 * PASS_SECONDS):
            raise ServerBusy(detail=f"chain {chain_id} is being written")
        self._wait_past()
        for chunk in store.versions.pendings(chain_id, scan=True):
            with store.versions.lock(chunk, CHUNK_LOCK_SECONDS):
                if not comparison.has(chunk[:2]):
                    store.versions.drop(chunk)
        comparison.begun = True

    def compare(self, store: ChunkStore, place: Place, request: m.CompareChunks) -> Sequence[int]:
        """Indexes of the chunks that are wanted. Raises StaleChain before ``begin``."""
        chain_id = place.chain.chain_id
        comparison = self._find(place)
        if comparison is None or not comparison.begun:
            raise StaleChain(chain=chain_id, version=place.chain.version)
        held = {(h.inode, h.number): (index, h) for index, h in enumerate(request.held)}
        for name in self._names(store, place, request):
            if name not in held:
                self._remove(store, place, ChunkId(*name, chain_id))
        wanted: dict[_Name, int] = {}
        for name, (index, one) in held.items():
            chunk = ChunkId(*name, chain_id)
            own = _info(store, chunk)
            if rules.is_wanted(one, own, self.has(place, chunk)):
                wanted[name] = index
        end = None if request.end is None else (request.end.inode, request.end.number)
        with self._lock:
            comparison.advance(end, {name for name in wanted if not comparison.has(name)})
        return sorted(wanted.values())

    def arrived(self, target_id: int, chunk: ChunkId) -> None:
        """A block, which may have been asked for."""
        with self._lock:
            found = self._comparisons.get((target_id, chunk.chain))
            if found is not None:
                found.wanted.discard(chunk[:2])

    def _names(self, store: ChunkStore, place: Place, request: m.CompareChunks) -> Iterator[_Name]:
        """What this target had of a page when it began to list."""
        key = (place.target_id, place.chain.chain_id)
        start = ChunkId(request.start.inode, request.start.number, place.chain.chain_id)
        listing = self._listings.get(key)
        if listing is None:
            listing = self._listings[key] = ChunkListing(store, start)
        end = None if request.end is None else ChunkId(*request.end.chunk[:2], start.chain)
        for chunk in listing.names(start, end):
            yield chunk[:2]
        if request.end is None:
            self._listings.pop(key, None)

    def _remove(self, store: ChunkStore, place: Place, chunk: ChunkId) -> None:
        """A chunk that the source does not have, unless it is a block, or came meanwhile."""
        with store.versions.lock(chunk, CHUNK_LOCK_SECONDS):
            own = None
            with contextlib.suppress(ChunkMismatch, VersionMismatch):
                own = store.versions.committed(chunk)
                if own is None or not own.version:
                    return
            if not self.has(place, chunk):
                store.remove(chunk)


def _info(store: ChunkStore, chunk: ChunkId) -> ChunkInfo | None:
    try:
        return store.stat(chunk)
    except (ChunkNotFound, ChunkMismatch, VersionMismatch):
        return None
