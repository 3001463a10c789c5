"""All chunks of a target in the order of their numbers, for those who compare.

The directories of a target are in the order of a hash. Reading all names and sorting them costs
1.2 us a chunk and 12 bytes of memory; a listing does it once, and then looks at the chunks page
by page. Chunks that come later are not in it, chunks that went are left out.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator

from kvfs_base.errors import ChunkMismatch, ChunkNotFound, VersionMismatch
from kvfs_base.limits import LIST_CHUNKS_MAX
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import directory_of


class ChunkListing:
    """A listing of one target that begins at the chunk ``start``, of its chain."""

    def __init__(self, store: ChunkStore, start: ChunkId) -> None:
        import numpy as np  # a sixth of the start of a server, which is seldom asked for this

        self.store = store
        self._chain = start.chain
        inodes, numbers = array("Q"), array("I")
        for chunk in store.list(start.chain):
            if chunk >= start:
                inodes.append(chunk.inode)
                numbers.append(chunk.number)
        found = np.frombuffer(inodes, dtype=np.uint64), np.frombuffer(numbers, dtype=np.uint32)
        order = np.lexsort((found[1], found[0]))
        self._inodes, self._numbers = found[0][order], found[1][order]
        self._place = 0
        self.next = self._next()
        """The chunk that the next page begins with, or None at the end."""

    def _next(self) -> ChunkId | None:
        if self._place >= len(self._inodes):
            return None
        return self._chunk(self._place)

    def _chunk(self, place: int) -> ChunkId:
        return ChunkId(int(self._inodes[place]), int(self._numbers[place]), self._chain)

    def names(self, start: ChunkId, end: ChunkId | None) -> Iterator[ChunkId]:
        """The chunks from ``start`` up to, not including, ``end``, or to the last one."""
        places = range(len(self._inodes))
        first = bisect.bisect_left(places, start, key=self._chunk)
        for place in places[first:]:
            chunk = self._chunk(place)
            if end is not None and chunk >= end:
                return
            yield chunk

    def page(self, limit: int) -> m.ChunkPage:
        """The next ``limit`` chunks, without those that are gone."""
        end = min(self._place + limit, len(self._inodes))
        chunks = [self._chunk(place) for place in range(self._place, end)]
        self._place = end
        self.next = self._next()
        after = None if self.next is None else m.ChunkRef(*self.next)
        return m.ChunkPage(tuple(look_at(self.store, chunks)), after)


def find_chunks(store: ChunkStore, inode: int, first: int, end: int) -> m.ChunkPage:
    """The first page of an inode's chunks from ``first`` up to ``end``."""
    names = store.list_directory(directory_of(inode))
    found = sorted(c for c in names if c.inode == inode and first <= c.number < end)
    after = m.ChunkRef(*found[LIST_CHUNKS_MAX]) if len(found) > LIST_CHUNKS_MAX else None
    return m.ChunkPage(tuple(look_at(store, found[:LIST_CHUNKS_MAX])), after)


def look_at(store: ChunkStore, chunks: list[ChunkId]) -> Iterator[m.ListedChunk]:
    """What each of the chunks is, without those that do not exist."""
    for chunk in chunks:
        try:
            info = store.stat(chunk)
            if info.is_damaged:
                problem = f"the bytes of version {info.version} are lost"
                yield m.ListedChunk(*chunk, info=None, problem=problem)
            else:
                yield m.ListedChunk(*chunk, info=info)
        except ChunkNotFound:
            pass
        except (ChunkMismatch, VersionMismatch) as exc:
            yield m.ListedChunk(*chunk, info=None, problem=exc.detail)
