"""Descriptors of chunk files that local servers passed, kept for the next read or write.

A descriptor may be dropped from the cache while another thread is reading from it; it is closed
when the last one is done, because its number would otherwise soon be another file's.
"""

from __future__ import annotations

import collections
import os

from kvfs_base import threads
from kvfs_base.types import ChunkId


class Descriptor:
    """``users`` counts those who hold it now; guarded by the cache's lock."""

    __slots__ = ("chunk", "dropped", "fd", "users", "writable")

    def __init__(self, chunk: ChunkId, fd: int, writable: bool) -> None:
        self.chunk = chunk
        self.fd = fd
        self.writable = writable
        self.users = 0
        self.dropped = False


class DescriptorCache:
    """Least recently used first out. One descriptor a chunk: a writable one serves readers too."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threads.lock()
        self._kept: collections.OrderedDict[ChunkId, Descriptor] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def borrow(self, chunk: ChunkId, *, writable: bool) -> Descriptor | None:
        """One that is kept and still is the chunk, for ``give_back``. A chunk that another client
        removed (truncate) is another file when it comes back: its old one has no name any more."""
        with self._lock:
            found = self._kept.get(chunk)
            if found is None or (writable and not found.writable):
                return None
            if os.fstat(found.fd).st_nlink == 0:
                self._drop(found)
                return None
            self._kept.move_to_end(chunk)
            found.users += 1
            return found

    def add(self, chunk: ChunkId, fd: int, *, writable: bool) -> Descriptor:
        """Takes over ``fd`` and lends it at once. If another thread was faster with an equal one,
        this one is used this once."""
        added = Descriptor(chunk, fd, writable)
        added.users = 1
        with self._lock:
            found = self._kept.get(chunk)
            if found is not None and found.writable and not writable:
                added.dropped = True
                return added
            if found is not None:
                self._drop(found)
            self._kept[chunk] = added
            while len(self._kept) > self._limit:
                self._drop(next(iter(self._kept.values())))
        return added

    def give_back(self, descriptor: Descriptor) -> None:
        with self._lock:
            descriptor.users -= 1
            if descriptor.dropped and not descriptor.users:
                os.close(descriptor.fd)

    def drop(self, chunk: ChunkId, *, only_writable: bool = False) -> None:
        with self._lock:
            found = self._kept.get(chunk)
            if found is not None and (found.writable or not only_writable):
                self._drop(found)

    def drop_range(self, inode: int, first: int, end: int) -> None:
        """The chunks ``first <= number < end`` of an inode."""
        with self._lock:
            for chunk in [c for c in self._kept if c.inode == inode and first <= c.number < end]:
                self._drop(self._kept[chunk])

    def drop_inode(self, inode: int) -> None:
        with self._lock:
            for chunk in [c for c in self._kept if c.inode == inode]:
                self._drop(self._kept[chunk])

    def clear(self) -> None:
        with self._lock:
            for descriptor in list(self._kept.values()):
                self._drop(descriptor)

    def _drop(self, descriptor: Descriptor) -> None:
        del self._kept[descriptor.chunk]
        descriptor.dropped = True
        if not descriptor.users:
            os.close(descriptor.fd)
