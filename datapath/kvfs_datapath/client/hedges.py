"""Hedged reads: what takes unusually long is asked of another replica as well, and the first one
wins (Dean and Barroso, The Tail at Scale, 2013).

The first request stays in the thread of whoever reads, and is the only one that ever writes to his
memory: a read that is over soon costs a place in a list. One thread watches that list. The second
request fills a buffer of a bounded pool, in a thread of its own. If it is answered first it breaks
off the first one, whose thread then copies the bytes and goes on: so nothing writes to the caller's
memory after the read has returned, and nobody has to wait for the loser.

All reads together earn hedges (``HEDGE_SHARE``), so that a cluster that is slow everywhere does not
get twice the load.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import KvfsError, ServerBusy
from kvfs_base.limits import TRANSFER_BYTES
from kvfs_base.seams import Clock
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.client.health import Health
from kvfs_datapath.client.routes import Route
from kvfs_datapath.connections import Attempt
from kvfs_datapath.limits import (
    HEDGE_SHARE,
    HEDGES_AT_ONCE,
    HEDGES_SAVED_MAX,
    HELPER_IDLE_SECONDS,
)

_Result = TypeVar("_Result")
_NEVER = float("inf")

Ask = Callable[[Route, Attempt, memoryview | None], _Result]
"""Reads into the caller's own memory, or into the buffer that is given. Raises KvfsError."""


class _Race(Generic[_Result]):
    """One read, by at most two ways."""

    def __init__(self, route: Route, other: Route, ask: Ask[_Result]) -> None:
        self.route = route
        self.other = other
        self.ask = ask
        self.first = Attempt()
        self.second = Attempt()
        self.over = False
        """The reader needs nothing any more."""
        self.begun = False
        """The second request is on its way or done: ``answered`` will be set, and the reader sets
        ``settled``. Guarded, as ``over``, by the lock of all."""
        self.answered = threads.event()
        self.settled = threads.event()
        self.answer: _Result | None = None
        self.buffer: memoryview | None = None


class Hedger:
    """Thread-safe."""

    def __init__(self, clock: Clock, health: Health, counters: Counters) -> None:
        self._clock = clock
        self._health = health
        self._counters = counters
        self._buffers = BufferPool(HEDGES_AT_ONCE, TRANSFER_BYTES)
        self._condition = threads.condition()
        self._due: list[tuple[float, int, _Race[Any]]] = []
        self._count = 0
        self._wake_at = _NEVER
        self._saved = HEDGES_SAVED_MAX
        self._running = 0
        self._watcher: threads.Thread | None = None
        self._pool: threads.Pool | None = None
        self._closed = False

    def read(
        self,
        route: Route,
        other: Route | None,
        size: int,
        ask: Ask[_Result],
        take: Callable[[memoryview], None],
    ) -> _Result:
        """``ask(route, ...)``, and ``ask(other, ...)`` as well if that takes long. ``take`` copies
        ``size`` bytes from the buffer, after the second one has won. Raises what the first request
        raised if no other was faster."""
        began = self._clock.monotonic()
        if other is None or size > TRANSFER_BYTES:
            result = ask(route, Attempt(), None)
            self._health.worked(route.target_id, size, self._clock.monotonic() - began)
            return result
        race: _Race[_Result] = _Race(route, other, ask)
        self._watch(race, began + self._health.bound(route.target_id, size))
        try:
            result = ask(route, race.first, None)
        except KvfsError:
            won = self._second(race)
            if won is None:
                raise
            seconds = self._clock.monotonic() - began
            self._health.lagged(route.target_id, size, seconds)
            self._health.failed(route.target_id)
            assert race.buffer is not None
            take(race.buffer)
            self._counters.add(hedges_won=1)
            return won
        finally:
            self._settle(race)
        self._health.worked(route.target_id, size, self._clock.monotonic() - began)
        return result

    def _second(self, race: _Race[_Result]) -> _Result | None:
        """What the second request got, if there was one: it is further than a new one would be."""
        with self._condition:
            race.over = True
        if race.begun:
            # No longer than a new request would be worth.
            race.answered.wait(self._health.bound(race.other.target_id, TRANSFER_BYTES))
        return race.answer

    def _settle(self, race: _Race[_Result]) -> None:
        with self._condition:
            race.over = True
        if race.begun:
            race.second.cancel()
            race.settled.set()

    # --- the watcher

    def _watch(self, race: _Race[_Result], due: float) -> None:
        with self._condition:
            if self._closed:
                return
            self._saved = min(self._saved + HEDGE_SHARE, HEDGES_SAVED_MAX)
            self._count += 1
            heapq.heappush(self._due, (due, self._count, race))
            if self._watcher is None:
                self._pool = self._pool or threads.pool(HEDGES_AT_ONCE, "kvfs-hedge")
                self._wake_at = _NEVER
                self._watcher = threads.thread(self._run, name="kvfs-hedges")
                self._watcher.start()
            elif due < self._wake_at:
                self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                now = self._clock.monotonic()
                while self._due and (self._due[0][2].over or self._due[0][0] <= now):
                    self._begin(heapq.heappop(self._due)[2])
                self._wake_at = self._due[0][0] if self._due else _NEVER
                woken = self._condition.wait(
                    self._wake_at - now if self._due else HELPER_IDLE_SECONDS
                )
                if not woken and not self._due:
                    self._watcher = None  # nobody reads: the next one starts another
                    return

    def _begin(self, race: _Race[Any]) -> None:
        """Holds the lock."""
        if race.over or self._running >= HEDGES_AT_ONCE or self._saved < 1:
            return
        assert self._pool is not None
        self._saved -= 1
        self._running += 1
        race.begun = True
        self._counters.add(hedged_reads=1)
        self._pool.submit(self._ask, race)

    def _ask(self, race: _Race[Any]) -> None:
        """The second request, in a thread of its own. The buffer is lent until the reader is done
        with it."""
        try:
            with self._buffers.lend(0) as buffer:
                race.buffer = buffer
                try:
                    answer = race.ask(race.other, race.second, buffer)
                except KvfsError:
                    return
                race.answer = answer
                race.answered.set()
                race.first.cancel()
                race.settled.wait()
        except ServerBusy:  # no buffer: never, as there are as many as threads
            return
        finally:
            race.answered.set()
            with self._condition:
                self._running -= 1

    def close(self) -> None:
        """The readers must be done, or about to fail."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            watcher = self._watcher
        if watcher is not None:
            watcher.join()
        if self._pool is not None:
            self._pool.shutdown(wait=True)


__all__ = ["Hedger"]
