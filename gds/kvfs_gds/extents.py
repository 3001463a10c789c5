"""Who owns which bytes of a fixed range: page-aligned extents, best fit, neighbours coalesced.

Best fit, because blocks of a namespace have one size: a hole left by a block is exactly right for
the next one. Free extents are found by size: a sorted list of the distinct free sizes and, for each
size, the offsets that have it. ``k`` distinct sizes need at least ``k * (k + 1) / 2`` free pages,
so even an arena of 1 TiB has at most 23,000 of them: the binary search takes O(log n) steps, and
keeping the list sorted moves at most 186 KB, once a size appears or goes.
"""

from __future__ import annotations

import bisect

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import PAGE_BYTES


def pages_of(size_bytes: int) -> int:
    """``size_bytes`` rounded up to whole pages, in bytes."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class ExtentAllocator:
    """Hands out extents of ``[0, total_bytes)``. Not thread-safe: its owner has a lock anyway."""

    def __init__(self, total_bytes: int) -> None:
        """Raises InvalidRequest unless ``total_bytes`` is a positive number of whole pages."""
        if total_bytes <= 0 or total_bytes % PAGE_BYTES:
            raise InvalidRequest(detail=f"{total_bytes} bytes are not whole pages")
        self.total_bytes = total_bytes
        self.free_bytes = 0
        self._used: dict[int, int] = {}
        self._size_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._sizes: list[int] = []
        # A dict is an ordered set: the extent freed last goes first, its pages are warm.
        self._offsets: dict[int, dict[int, None]] = {}
        self._add(0, total_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of all extents handed out, whole pages."""
        return self.total_bytes - self.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest request that would succeed now."""
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, size_bytes: int) -> int | None:
        """Offset of an extent of ``size_bytes`` rounded up to pages, or None if no hole fits.
        Raises InvalidRequest unless ``size_bytes`` is positive."""
        if size_bytes <= 0:
            raise InvalidRequest(detail=f"an extent of {size_bytes} bytes")
        size = pages_of(size_bytes)
        place = bisect.bisect_left(self._sizes, size)
        if place == len(self._sizes):
            return None
        hole = self._sizes[place]
        offset, _ = self._offsets[hole].popitem()
        self._forget(offset, hole)
        if hole > size:
            self._add(offset + size, hole - size)
        self._used[offset] = size
        return offset

    def free(self, offset: int) -> int:
        """Takes back the extent at ``offset``; returns its bytes. Raises InvalidRequest if there is
        none (freed twice, or never handed out)."""
        size = self._used.pop(offset, None)
        if size is None:
            raise InvalidRequest(detail=f"no extent at {offset}")
        start, end = offset, offset + size
        before = self._start_of_end.get(start)
        if before is not None:
            self._take(before, start - before)
            start = before
        after = self._size_at.get(end)
        if after is not None:
            self._take(end, after)
            end += after
        self._add(start, end - start)
        return size

    def _add(self, offset: int, size: int) -> None:
        self.free_bytes += size
        self._size_at[offset] = size
        self._start_of_end[offset + size] = offset
        same = self._offsets.get(size)
        if same is None:
            same = self._offsets[size] = {}
            bisect.insort(self._sizes, size)
        same[offset] = None

    def _take(self, offset: int, size: int) -> None:
        del self._offsets[size][offset]
        self._forget(offset, size)

    def _forget(self, offset: int, size: int) -> None:
        self.free_bytes -= size
        del self._size_at[offset], self._start_of_end[offset + size]
        if not self._offsets[size]:
            del self._offsets[size]
            del self._sizes[bisect.bisect_left(self._sizes, size)]
