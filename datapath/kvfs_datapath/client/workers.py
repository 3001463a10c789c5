"""The threads of a chunk client, and how a batch is shared among them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from kvfs_base import threads
from kvfs_base.errors import ConnectionLost
from kvfs_base.limits import (
    CLIENT_SPLIT_BYTES,
    ITEMS_PER_REQUEST_MAX,
    TRANSFER_BYTES,
)
from kvfs_datapath.limits import CLIENT_THREADS, CLIENT_THREADS_PER_TARGET


class Workers:
    """Jobs never wait for other jobs of the same pool."""

    def __init__(self) -> None:
        self._threads = threads.pool(CLIENT_THREADS, "kvfs-chunks")

    def parallel(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Runs all jobs and returns when all have ended; the caller's thread takes one. Raises the
        first error."""
        if not jobs:
            return
        others: list[threads.Future] = []
        error: BaseException | None = None
        try:
            others.extend(self._threads.submit(job) for job in jobs[1:])
            jobs[0]()
        except RuntimeError:
            error = ConnectionLost(detail="the client is closed")
        except BaseException as exc:
            error = exc
        for future in others:
            error = future.exception() or error
        if error is not None:
            raise error

    def close(self) -> None:
        self._threads.shutdown(wait=True)


def portion_bytes(total: int) -> int:
    """How much of ``total`` bytes for one target goes into a request: large enough that its cost
    does not show, small enough that all threads get something."""
    return max(CLIENT_SPLIT_BYTES, min(total // CLIENT_THREADS_PER_TARGET, TRANSFER_BYTES))


def cut(indexes: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Portions of about ``limit`` bytes."""
    portions: list[list[int]] = []
    room = 0
    for index, size in zip(indexes, sizes, strict=True):
        if room <= 0 or len(portions[-1]) == ITEMS_PER_REQUEST_MAX:
            portions.append([])
            room = limit
        portions[-1].append(index)
        room -= max(size, 1)
    return portions


class Portions:
    """Portions of a batch for one target, and the threads that take them until there are no
    more."""

    def __init__(self, portions: Sequence[list[int]]) -> None:
        self.threads = min(len(portions), CLIENT_THREADS_PER_TARGET)
        self._left = collections.deque(portions)
        self._to_begin = collections.deque([None] * self.threads)

    def begin(self) -> None:
        """Once for each thread."""
        self._to_begin.pop()

    def take(self) -> list[int] | None:
        """The next one."""
        try:
            return self._left.popleft()
        except IndexError:
            return None

    def take_ahead(self) -> list[int] | None:
        """The same, for who has one yet: those that are about to begin are left one each."""
        return self.take() if len(self._left) > len(self._to_begin) else None


__all__ = ["Portions", "Workers", "cut", "portion_bytes"]
