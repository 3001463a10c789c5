"""What a client has seen of each target lately: whether it answers, and how long that takes.

Two uses. A target that failed is asked last for a while; when that is over, one request tries it
before the others follow. And a read that takes longer than reads of this target usually do is asked
of another replica as well (``hedges``): the bound is learned from the last times, by bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

from kvfs_base import threads
from kvfs_base.seams import Clock
from kvfs_datapath.limits import (
    AVOID_SECONDS,
    AVOID_SECONDS_MAX,
    HEDGE_BYTES_PER_SECOND,
    HEDGE_FACTOR,
    HEDGE_QUANTILE,
    HEDGE_SECONDS_FIRST,
    HEDGE_SECONDS_MAX,
    HEDGE_SECONDS_MIN,
    HEDGE_UNIT_BYTES,
    LATENCIES_KEPT,
    LATENCIES_NEEDED,
)


class _Target:
    __slots__ = ("avoid_until", "failures", "since", "times", "typical")

    def __init__(self) -> None:
        self.failures = 0
        """In a row."""
        self.avoid_until = 0.0
        self.times: collections.deque[float] = collections.deque(maxlen=LATENCIES_KEPT)
        """Seconds a byte."""
        self.typical = 0.0
        """The quantile of ``times``; 0 while there are too few."""
        self.since = 0
        """Times that ``typical`` does not contain."""


class Health:
    """Thread-safe. Targets that nobody had trouble with cost a look into a dict."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threads.lock()
        self._targets: dict[int, _Target] = {}

    def failed(self, target_id: int) -> None:
        """It did not answer, or took so long that another one was faster."""
        with self._lock:
            target = self._targets.setdefault(target_id, _Target())
            pause = min(AVOID_SECONDS * 2.0**target.failures, AVOID_SECONDS_MAX)
            target.failures = min(target.failures + 1, 16)
            target.avoid_until = self._clock.monotonic() + pause

    def answered(self, target_id: int) -> None:
        """It need not be avoided."""
        target = self._targets.get(target_id)
        if target is not None and target.failures:
            with self._lock:
                target.failures = 0

    def worked(self, target_id: int, size: int, seconds: float) -> None:
        """A read of ``size`` bytes took so long."""
        with self._lock:
            target = self._targets.setdefault(target_id, _Target())
            target.failures = 0
            self._note(target, size, seconds)

    def lagged(self, target_id: int, size: int, seconds: float) -> None:
        """A read was given up after so long: it would have taken longer still."""
        with self._lock:
            self._note(self._targets.setdefault(target_id, _Target()), size, seconds)

    def _note(self, target: _Target, size: int, seconds: float) -> None:
        target.times.append(seconds / max(size, HEDGE_UNIT_BYTES))
        target.since += 1
        # Sorting costs some microseconds: not for every read.
        if len(target.times) >= LATENCIES_NEEDED and target.since >= LATENCIES_NEEDED:
            target.since = 0
            ordered = sorted(target.times)
            target.typical = ordered[int(HEDGE_QUANTILE * (len(ordered) - 1))]

    def avoided(self, target_ids: Iterable[int]) -> set[int]:
        """Those to be asked last. Who asks for one whose time is over tries it: the others go on
        avoiding it until that is answered."""
        if not self._targets:
            return set()
        now = self._clock.monotonic()
        found = set()
        with self._lock:
            for target_id in target_ids:
                target = self._targets.get(target_id)
                if target is None or not target.failures:
                    continue
                if now < target.avoid_until:
                    found.add(target_id)
                else:
                    target.avoid_until = now + AVOID_SECONDS
        return found

    def bound(self, target_id: int, size: int) -> float:
        """Seconds after which a read of ``size`` bytes is unusually slow."""
        most = HEDGE_SECONDS_MAX + size / HEDGE_BYTES_PER_SECOND
        target = self._targets.get(target_id)
        if target is None or not target.typical:
            return min(most, HEDGE_SECONDS_FIRST + size / HEDGE_BYTES_PER_SECOND)
        learned = HEDGE_FACTOR * target.typical * max(size, HEDGE_UNIT_BYTES)
        return min(most, max(HEDGE_SECONDS_MIN, learned))


__all__ = ["Health"]
