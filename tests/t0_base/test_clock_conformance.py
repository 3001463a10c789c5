"""One suite that every Clock passes, and chance that repeats under a seed."""

from __future__ import annotations

import pytest

from kvfs_base.os_env import SystemClock, os_env
from kvfs_base.seams import Clock
from kvfs_base.testing import ManualClock, memory_env


@pytest.fixture(params=[SystemClock, ManualClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    made: Clock = request.param()
    return made


def test_wall_time_is_nanoseconds_since_1970(clock: Clock) -> None:
    assert 1_600_000_000 < clock.time_ns() / 1e9 < 4_000_000_000
    assert isinstance(clock.time_ns(), int)


def test_monotonic_seconds_never_go_back(clock: Clock) -> None:
    seen = [clock.monotonic() for _ in range(1000)]
    assert seen == sorted(seen)


def test_a_manual_clock_moves_when_told_and_both_times_move_together() -> None:
    clock = ManualClock()
    wall, mono = clock.time_ns(), clock.monotonic()
    assert (clock.time_ns(), clock.monotonic()) == (wall, mono)
    clock.advance(1.5)
    assert clock.time_ns() - wall == 1_500_000_000
    assert clock.monotonic() - mono == pytest.approx(1.5)


@pytest.mark.parametrize("make", [os_env, lambda seed: memory_env(seed)[0]])
def test_chance_repeats_under_a_seed(make: object) -> None:
    first, again, other = (make(seed).rng.random() for seed in (7, 7, 8))  # type: ignore[operator]
    assert first == again != other
