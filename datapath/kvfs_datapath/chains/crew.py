"""Threads that help a connection's own with the items of one request.

Items that wait, for a disk or for the next member of a chain, wait together: a request takes about
as long as its slowest items, not as all of them one after the other. Whoever asks does what no
helper has begun, so nobody ever waits for a thread to become free: the locks, buffers and
connections that an item takes are in the same order as without helpers, and no circle can close.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable

from kvfs_base import threads

Job = Callable[[], None]


class Crew:
    """One a server; thread-safe."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = threads.pool(count, "kvfs-crew")

    def work(self, jobs: Iterable[Job]) -> None:
        """Does all jobs, in any order and side by side, and returns when they have ended. ``jobs``
        may take its time (it receives what the next one needs): meanwhile the others are done. The
        last one is the caller's, so one alone costs nothing. If ``jobs`` raises, those before are
        done all the same, but for the last. Raises the first error."""
        shared = _Shared(self._pool, self._count)
        own: Job | None = None
        try:
            for job in jobs:
                if own is not None:
                    shared.add(own)
                own = job
            if own is not None:
                own()
        finally:
            shared.finish()
        if shared.error is not None:
            raise shared.error

    def close(self) -> None:
        """Whoever has jobs after this does them alone."""
        self._pool.shutdown(wait=True)


class _Shared:
    """The jobs of one caller."""

    def __init__(self, pool: threads.Pool, helpers_max: int) -> None:
        self._pool = pool
        self._helpers_max = helpers_max
        self._condition = threads.condition()
        self._left: collections.deque[Job] = collections.deque()
        self._helpers = 0
        """Threads that will look for a job before they go: called, or at work."""
        self._running = 0
        self.error: BaseException | None = None

    def add(self, job: Job) -> None:
        with self._condition:
            self._left.append(job)
            call = self._helpers < self._helpers_max
            self._helpers += call
        if call:
            with contextlib.suppress(RuntimeError):  # the crew has gone
                self._pool.submit(self._help)

    def finish(self) -> None:
        """Does what is left, and waits for what others have begun."""
        while self._do_one():
            pass
        with self._condition:
            self._condition.wait_for(lambda: not self._running)

    def _help(self) -> None:
        while self._do_one():
            pass
        with self._condition:
            self._helpers -= 1

    def _do_one(self) -> bool:
        with self._condition:
            if not self._left:
                return False
            job = self._left.popleft()
            self._running += 1
        try:
            job()
        except BaseException as exc:
            self.error = self.error or exc
            if not isinstance(exc, Exception):
                raise  # this thread is to end
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()
        return True
