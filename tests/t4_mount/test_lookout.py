"""Looking out for who reads: only then, and only as long as it is worth it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from kvfs.mount.lookout import Lookout

BUSY = 0.25
READY = (7,)


class Time:
    """A clock, and a device at which something arrives at ``next_at``; to look takes 0.01 s."""

    def __init__(self) -> None:
        self.now = 100.0
        self.next_at = 0.0
        self.looks = self.sleeps = 0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)

    def wait(self, seconds: float, *others: int) -> Sequence[int]:
        assert others == (3,)
        self.looks += not seconds
        self.sleeps += seconds > 0
        self.now = max(self.now + 0.01, min(self.next_at, self.now + seconds))
        return READY if self.now >= self.next_at else ()

    def after(self, lookout: Lookout, seconds: float, *, expects: bool) -> tuple[int, int]:
        """How often it looked, and slept, for what comes in so many seconds."""
        self.looks = self.sleeps = 0
        self.next_at = self.now + seconds
        lookout.expects = expects
        assert lookout.wait(self, 2.0, 3) == (READY if seconds < 2 else ())
        assert not lookout.expects
        return self.looks, self.sleeps


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def test_it_sleeps_unless_somebody_reads() -> None:
    time = Time()
    lookout = Lookout(time, BUSY)
    assert time.after(lookout, 0.1, expects=False) == (0, 1)
    looks, sleeps = time.after(lookout, 0.1, expects=True)
    assert looks > 5 and not sleeps


def test_it_sleeps_until_it_would_have_been_worth_it() -> None:
    time = Time()
    lookout = Lookout(time, BUSY)
    looks, sleeps = time.after(lookout, 1.0, expects=True)
    assert BUSY / 0.01 - 1 <= looks <= BUSY / 0.01 + 1 and sleeps == 1
    assert time.after(lookout, 1.0, expects=True) == (0, 1)
    assert time.after(lookout, 0.1, expects=False) == (0, 1)  # says nothing of who reads
    assert time.after(lookout, 3.0, expects=True) == (0, 1)
    assert time.after(lookout, 0.1, expects=True) == (0, 1)
    looks, sleeps = time.after(lookout, 0.1, expects=True)
    assert looks > 5 and not sleeps


def test_never_without_a_core_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    assert time.after(Lookout(time, 0.0), 0.1, expects=True) == (0, 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert time.after(Lookout(time, BUSY), 0.1, expects=True) == (0, 1)
