"""One open directory: a listing whose positions stay valid while entries come and go.

The service lists by name; the kernel asks by number. Position ``n`` stands for "after the ``n``-th
name that this handle gave out". The names given last are kept as they are: that is where the kernel
goes on, and where it steps back to when its buffer was full. Of older ones a hash is kept (8 bytes)
and every CHECKPOINT-th name: to go back there, the names after the checkpoint are read again and
those that were given out before the position are recognised by their hashes.

Every request of the kernel is answered with attributes of that moment, never with entries fetched
before: the kernel would take them for newer than its own. So they come from the service, or are
leased: a directory that was listed before, and is not too large, is fetched as a whole with leases,
and as long as it has them ``read_now`` answers.
"""

from __future__ import annotations

import array
import collections

from kvfs.mount.backend import Backend
from kvfs.mount.limits import (
    DIRECTORY_RECENT_NAMES,
    DIRECTORY_REPLY_ENTRIES,
    MOUNT_LISTING_NAMES_MAX,
)
from kvfs.mount.listings import Listing
from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import DIRECTORY_PAGE_ENTRIES
from kvfs_base.types import Attr
from kvfs_metadata.messages import DirectoryPage, ReadDir

CHECKPOINT = 256
FIRST_ENTRIES = 128


Entry = tuple[bytes, Attr]
"""Of position ``n`` for the ``n``-th one after the position that was asked for."""


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
        self._listing: Listing | None = None
        """What all positions are of, if it was leased when the first entries were given out."""

    def read_now(self, position: int) -> list[Entry] | None:
        """The next entries, none at the end; None if the service has to be asked."""
        listing = self._backend.names.listing(self.inode)
        if listing is None or (position and listing is not self._listing):
            return None
        if not position:
            self._go_through(listing)
        names = listing.names[position : position + DIRECTORY_REPLY_ENTRIES]
        attrs = self._backend.names.attrs([listing.inodes[name] for name in names])
        if attrs is None:
            return None
        return list(zip(names, attrs, strict=True))

    def _go_through(self, listing: Listing) -> None:
        """As if all of it had been given out already: should the lease end on the way, the service
        is asked for what follows the last name that the kernel has."""
        names = listing.names
        self._listing = listing
        self._hashes = array.array("q", map(hash, names))
        self._recent = collections.deque(names[-DIRECTORY_RECENT_NAMES:], DIRECTORY_RECENT_NAMES)
        self._checkpoints = [b"", *names[CHECKPOINT - 1 :: CHECKPOINT]]
        self._end = len(names)

    async def read(self, position: int) -> list[Entry]:
        """The same in any case. Raises NotADirectory, InodeStale."""
        if not 0 <= position <= len(self._hashes):
            raise InvalidRequest(detail=f"directory position {position}")
        if position and position == self._end:
            return []
        self._adapt(position)
        after, skip = self._locate(position)
        self._truncate(position)
        self._listing = None
        if not position and self._backend.names.wants_listing(self.inode):
            await self._fetch_listing()
            if (known := self.read_now(0)) is not None:
                return known
        page = await self._page(after, self._wanted)
        while skip:
            fresh = tuple(e for e in page.entries if hash(e[0]) not in skip)
            if fresh or not page.more:
                page = DirectoryPage(fresh, page.more)
                break
            page = await self._page(page.entries[-1][0], self._wanted)
        return self._give(position, page)

    async def _fetch_listing(self) -> None:
        """All of it, to be kept, if that is possible. Its first entries are not for an answer: they
        may be older than a change of which the kernel was told."""
        names, listing = self._backend.names, Listing()
        token = names.token
        page = await self._page(b"", DIRECTORY_PAGE_ENTRIES, keeps=True)
        # The times of a directory of blocks are not leased, so neither is a listing that has one.
        while not any(attr.is_block or attr.is_namespace for _, attr in page.entries):
            listing.add(page.entries)
            if not page.more:
                names.keep_listing(self.inode, listing, token)
                break
            if len(listing) > MOUNT_LISTING_NAMES_MAX or not page.entries:
                names.listings.ended(self.inode, len(listing))
                break
            page = await self._page(listing.names[-1], DIRECTORY_PAGE_ENTRIES, keeps=True)

    async def _page(self, after: bytes, limit: int, *, keeps: bool = False) -> DirectoryPage:
        request = ReadDir(self.inode, after, limit, keeps)
        page: DirectoryPage = await self._backend.call(request)
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

    def _give(self, position: int, page: DirectoryPage) -> list[Entry]:
        for name, _ in page.entries:
            position += 1
            self._hashes.append(hash(name))
            self._recent.append(name)
            if position % CHECKPOINT == 0:
                self._checkpoints.append(name)
        if not page.more:
            self._end = position
            if not any(attr.is_block for _, attr in page.entries):
                self._backend.names.listings.ended(self.inode, position)
        return list(page.entries)
