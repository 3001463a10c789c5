"""One open directory: a listing whose positions stay valid while entries come and go.

The service lists by name; the kernel asks by number. Position ``n`` stands for "after the ``n``-th
name that this handle gave out". The names given last are kept as they are: that is where the kernel
goes on, and where it steps back to when its buffer was full. Of older ones a hash is kept (8 bytes)
and every CHECKPOINT-th name: to go back there, the names after the checkpoint are read again and
those that were given out before the position are recognised by their hashes.

Every request of the kernel is answered with fresh attributes, never with entries fetched before:
the kernel would take them for newer than its own.
"""

from __future__ import annotations

import array
import collections
from typing import NamedTuple

from kvfs.mount.backend import Backend
from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import DIRECTORY_RECENT_NAMES, DIRECTORY_REPLY_ENTRIES
from kvfs_base.types import Attr
from kvfs_metadata.messages import DirectoryPage, ReadDir

CHECKPOINT = 256
FIRST_ENTRIES = 128


class DirectoryEntry(NamedTuple):
    position: int
    """Where to go on after this entry."""
    name: bytes
    attr: Attr


class OpenDirectory:
    def __init__(self, backend: Backend, inode: int) -> None:
        self.inode = inode
        self._backend = backend
        self._wanted = FIRST_ENTRIES
        self._hashes = array.array("q")
        self._checkpoints: list[bytes] = [b""]
        self._recent: collections.deque[bytes] = collections.deque(maxlen=DIRECTORY_RECENT_NAMES)
        self._request_start = 0
        self._end: int | None = None
        """Position of the last entry, once it was given out."""

    async def read(self, position: int) -> list[DirectoryEntry]:
        """The next entries, none at the end. Raises NotADirectory, InodeStale."""
        if not 0 <= position <= len(self._hashes):
            raise InvalidRequest(detail=f"directory position {position}")
        if position and position == self._end:
            return []
        self._adapt(position)
        after, skip = self._locate(position)
        self._truncate(position)
        page = await self._page(after, self._wanted)
        while skip:
            fresh = tuple(e for e in page.entries if hash(e[0]) not in skip)
            if fresh or not page.more:
                page = DirectoryPage(fresh, page.more)
                break
            page = await self._page(page.entries[-1][0], self._wanted)
        return self._give(position, page)

    async def _page(self, after: bytes, limit: int) -> DirectoryPage:
        page: DirectoryPage = await self._backend.call(ReadDir(self.inode, after, limit))
        return page

    def _adapt(self, position: int) -> None:
        """Fetches about what one buffer of the kernel takes. A position before the last entry given
        out is where its buffer was full; anything else goes on filling the same buffer."""
        if position < len(self._hashes):
            taken = position - self._request_start
            self._wanted = min(DIRECTORY_REPLY_ENTRIES, max(16, taken + taken // 8))
            self._request_start = position

    def _locate(self, position: int) -> tuple[bytes, frozenset[int]]:
        """The name to go on after, and hashes of names to leave out."""
        if position == 0:
            return b"", frozenset()
        back = len(self._hashes) - position
        if back < len(self._recent):
            return self._recent[len(self._recent) - 1 - back], frozenset()
        checkpoint = position // CHECKPOINT
        given = self._hashes[checkpoint * CHECKPOINT : position]
        return self._checkpoints[checkpoint], frozenset(given)

    def _truncate(self, position: int) -> None:
        drop = len(self._hashes) - position
        if drop >= len(self._recent):
            self._recent.clear()
        else:
            for _ in range(drop):
                self._recent.pop()
        del self._hashes[position:]
        del self._checkpoints[position // CHECKPOINT + 1 :]
        self._end = None

    def _give(self, position: int, page: DirectoryPage) -> list[DirectoryEntry]:
        entries: list[DirectoryEntry] = []
        for name, attr in page.entries:
            position += 1
            self._hashes.append(hash(name))
            self._recent.append(name)
            if position % CHECKPOINT == 0:
                self._checkpoints.append(name)
            entries.append(DirectoryEntry(position, name, attr))
        if not page.more:
            self._end = position
        return entries
