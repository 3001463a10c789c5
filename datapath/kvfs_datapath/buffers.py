"""Page-aligned buffers of one size, a bounded number of them.

Whatever clients do, a server's payload memory is ``count * size``: a connection borrows a buffer
for the time of one transfer, whose length in seconds is bounded too, and the others wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvfs_base import large_pages, threads
from kvfs_base.errors import ServerBusy
from kvfs_base.limits import PAGE_BYTES


def round_up(size: int) -> int:
    """To whole pages, as O_DIRECT wants it."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class BufferPool:
    """Buffers are made when first needed and then kept: page faults cost more than a copy."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        """Of each buffer."""
        self._slots = threads.semaphore(count)
        self._free: list[memoryview] = []

    @contextlib.contextmanager
    def lend(self, timeout: float) -> Iterator[memoryview]:
        """A buffer of ``size`` bytes with arbitrary contents. Raises ServerBusy after ``timeout``
        seconds without a free one."""
        if not self._slots.acquire(timeout=timeout):
            raise ServerBusy(detail="no free transfer buffer")
        try:
            try:
                buffer = self._free.pop()
            except IndexError:
                buffer = large_pages.buffer(self.size)
            view = memoryview(buffer)
            try:
                yield view
            finally:
                view.release()
                self._free.append(buffer)
        finally:
            self._slots.release()
