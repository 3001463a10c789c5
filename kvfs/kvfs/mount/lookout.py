"""Waiting for the next request of who reads a file that the kernel reads by itself.

He is back in as long as it takes to read it: 0.1 ms for 2 MiB, in which this process would have
gone to sleep on its core. To wake it up takes as long as to answer (20 to 30 us), at the open and
at the close. So then, and only then, it looks again and again for a moment instead of sleeping:
requests that come faster find it awake, or share a core with it, which is faster still. If he was
not back in that moment, the next one is slept through; if he would have been, it looks out again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from kvfs_base.seams import Clock


class Waits(Protocol):
    """As Device."""

    def wait(self, seconds: float, *others: int) -> Sequence[int]: ...


class Lookout:
    def __init__(self, clock: Clock, busy_wait_seconds: float) -> None:
        self.expects = False
        """Somebody has opened such a file, or is done with it: true until the next wait."""
        self._clock = clock
        alone = len(os.sched_getaffinity(0)) < 2  # it would keep him from reading
        self._seconds = 0.0 if alone else busy_wait_seconds
        self._worth_it = True

    def wait(self, device: Waits, seconds: float, *others: int) -> Sequence[int]:
        """As Device.wait."""
        expects, self.expects = self.expects, False
        if not expects or not self._seconds:
            return device.wait(seconds, *others)
        start = self._clock.monotonic()
        while self._worth_it and self._clock.monotonic() - start < self._seconds:
            if ready := device.wait(0.0, *others):
                return ready
        ready = device.wait(seconds, *others)
        self._worth_it = bool(ready) and self._clock.monotonic() - start < self._seconds
        return ready


__all__ = ["Lookout"]
