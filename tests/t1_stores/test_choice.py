"""The rule that loads or computes, against machines whose times follow the model with noise."""

from __future__ import annotations

import numpy as np
import pytest

from kvfs_gds.choice import LoadOrCompute

LAYERS = 32
TOKEN_BYTES = 131072


class Machine:
    """An H100 with an 8B model, about; ``disk`` in bytes a second."""

    def __init__(self, disk: float) -> None:
        self.disk = disk

    def compute(self, tokens: int, context: int) -> float:
        return 0.012 + tokens * 2.4e-5 + tokens * (context + tokens / 2) * 1.1e-9

    def load(self, nbytes: int, *, from_disk: bool) -> float:
        return 0.002 + nbytes / (self.disk if from_disk else 50e9)

    def first_token(self, tokens: int, stored: int, *, from_disk: bool) -> float:
        rest = self.compute(max(1, tokens - stored), stored)
        load = self.load(stored * TOKEN_BYTES, from_disk=from_disk)
        if from_disk:
            return load + rest
        return load / LAYERS + max(load * (LAYERS - 1) / LAYERS, rest)


def taught(machine: Machine) -> LoadOrCompute:
    rule = LoadOrCompute(LAYERS)
    rng = np.random.default_rng(1)
    for tokens in (1024, 4096, 16384):
        for _ in range(3):
            noise = float(rng.uniform(0.98, 1.02))
            rule.observe_compute(tokens, 0, machine.compute(tokens, 0) * noise)
            rule.observe_compute(64, tokens, machine.compute(64, tokens) * noise)
            for from_disk in (False, True):
                nbytes = tokens * TOKEN_BYTES
                taken = machine.load(nbytes, from_disk=from_disk) * noise
                rule.observe_load(nbytes, taken, from_disk=from_disk)
    return rule


@pytest.mark.parametrize("disk", [0.5e9, 2e9, 4e9, 7e9, 14e9])
def test_the_rule_never_loses_more_than_five_percent(disk: float) -> None:
    machine = Machine(disk)
    rule = taught(machine)
    decisions = set()
    for tokens in (1024, 2048, 8192, 32768):
        for share in (0.25, 0.5, 0.9, 1.0):
            for from_disk in (False, True):
                stored = int(tokens * share) // 64 * 64
                sizes = (0, stored * TOKEN_BYTES) if from_disk else (stored * TOKEN_BYTES, 0)
                load = rule.should_load(tokens, stored, *sizes)
                decisions.add((from_disk, load))
                compute = machine.compute(tokens, 0)
                loaded = machine.first_token(tokens, stored, from_disk=from_disk)
                assert (loaded if load else compute) <= 1.05 * min(loaded, compute)
    assert (False, True) in decisions  # the arena is always worth it
    assert (True, disk > 6e9) in decisions


def test_prompts_longer_than_any_seen_are_not_thought_to_be_free() -> None:
    """All that was seen took as long as the kernels take to be queued."""
    rule = LoadOrCompute(LAYERS)
    for tokens, seconds in ((1024, 0.049), (4096, 0.055), (1, 0.048)):
        for _ in range(3):
            rule.observe_compute(tokens, 0, seconds)
    for tokens in (1024, 4096):
        rule.observe_load(tokens * TOKEN_BYTES, 0.002 + tokens * 1e-6, from_disk=False)
    found = rule.estimate(8192, 4096, 4096 * TOKEN_BYTES, 0)
    assert found is not None
    assert found.compute >= 0.1
    assert rule.should_load(8192, 4096, 4096 * TOKEN_BYTES, 0)


class Bursting(Machine):
    """A disk whose first 256 MB come from a cache, at a rate that computing does not reach."""

    def load(self, nbytes: int, *, from_disk: bool) -> float:
        if not from_disk:
            return super().load(nbytes, from_disk=False)
        quick = min(nbytes, 256_000_000)
        return 0.002 + quick / 6e9 + (nbytes - quick) / self.disk


def test_a_load_that_was_seen_is_known() -> None:
    """Rates that depend on the size are learned by size: after one load of a size the rule is right
    about it, and was right before about most."""
    machine = Bursting(1.5e9)
    rule = taught(machine)
    lost = []
    for tokens in (1024, 1536, 2048, 3072, 8192, 32768):
        for share in (0.25, 0.5, 0.9, 1.0):
            stored = int(tokens * share) // 64 * 64
            size = stored * TOKEN_BYTES
            loaded = machine.first_token(tokens, stored, from_disk=True)
            compute = machine.compute(tokens, 0)
            before = rule.should_load(tokens, stored, 0, size)
            lost.append((loaded if before else compute) > 1.05 * min(loaded, compute))
            rule.observe_load(size, machine.load(size, from_disk=True), from_disk=True)
            load = rule.should_load(tokens, stored, 0, size)
            assert (loaded if load else compute) <= 1.05 * min(loaded, compute)
    assert sum(lost) <= 6


def test_without_observations_it_loads() -> None:
    rule = LoadOrCompute(LAYERS)
    assert rule.estimate(100, 50, 10, 0) is None
    assert rule.should_load(100, 50, 10, 0)
    assert not rule.should_load(100, 0, 0, 0)
    rule.observe_compute(100, 0, 1.0)
    assert rule.estimate(100, 50, 10, 10) is None
    rule.observe_load(10, 0.1, from_disk=False)
    found = rule.estimate(100, 50, 10, 0)
    assert found is not None and found.load_is_faster


def test_what_saves_next_to_nothing_is_computed() -> None:
    rule = LoadOrCompute(1)
    rule.observe_compute(1000, 0, 1.0)
    for size, seconds in ((10, 0.49), (20, 0.46)):
        rule.observe_load(size, seconds, from_disk=True)
    found = rule.estimate(1000, 500, 0, 10)
    assert found is not None
    assert (found.load, found.compute) == (pytest.approx(0.99), pytest.approx(1.0))
    assert not rule.should_load(1000, 500, 0, 10)
    assert rule.should_load(1000, 500, 0, 20)


def test_what_comes_late_is_learned() -> None:
    """Launches that the processor cannot keep up with: a small model gains nothing by a load."""
    machine = Machine(3e9)
    rule = taught(machine)
    stored = 1024
    sizes = (stored * 4096, 0)
    assert rule.should_load(2048, stored, *sizes)
    before = rule.estimate(2048, stored, *sizes)
    assert before is not None
    for _ in range(3):
        rule.observe_first_token(2048, stored, *sizes, before.load + 0.050)
    found = rule.estimate(2048, stored, *sizes)
    assert found is not None and found.load == pytest.approx(before.load + 0.050)
    assert not rule.should_load(2048, stored, *sizes)
    assert rule.should_load(32768, 16384, 16384 * TOKEN_BYTES, 0)
    LoadOrCompute(LAYERS).observe_first_token(10, 5, 5, 0, 1.0)  # knows too little to learn


class Queued(Machine):
    """An eager model whose kernels take 32 ms to queue, however short the prompt is. Loading costs
    a few milliseconds that nothing hides."""

    def compute(self, tokens: int, context: int) -> float:
        return max(0.032, tokens * 1.0e-5 + tokens * (context + tokens / 2) * 0.7e-9)

    def first_token(self, tokens: int, stored: int, *, from_disk: bool) -> float:
        return 0.002 + super().first_token(tokens, stored, from_disk=from_disk)


@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192, 16384, 32768])
def test_a_floor_under_short_prompts_is_seen(tokens: int) -> None:
    """Where half a prompt takes as long as all of it, there is nothing to be gained."""
    machine = Queued(2e9)
    rule = taught(machine)
    for length in (1024, 4096, 16384):
        for share in (2, 1):
            stored = length // share
            took = machine.first_token(length, stored, from_disk=False)
            rule.observe_first_token(length, stored, stored * 4096, 0, took)
    for share in (0.5, 0.9, 1.0):
        stored = int(tokens * share) // 64 * 64
        load = rule.should_load(tokens, stored, stored * 4096, 0)
        compute = machine.compute(tokens, 0)
        loaded = machine.first_token(tokens, stored, from_disk=False)
        assert (loaded if load else compute) <= 1.05 * min(loaded, compute)
    assert rule.should_load(tokens, tokens, tokens * 4096, 0) == (tokens > 2048)


def test_how_fast_the_machine_is_lately_counts() -> None:
    """It was taught while others slowed it down, more or less, so that what a load costs seemed
    little."""
    rule, nbytes = LoadOrCompute(27), 64 << 20
    for _ in range(3):
        for tokens, seconds in ((1024, 0.040), (2048, 0.042), (8192, 0.123), (32768, 0.87)):
            rule.observe_compute(tokens, 0, seconds)
            rule.observe_compute(1, tokens - 1, 0.034)
        rule.observe_load(nbytes, 0.0016, from_disk=False)
    taught = rule.estimate(32768, 16384, nbytes, 0)
    assert rule.should_load(2048, 2048, nbytes, 0)
    for _ in range(3):
        rule.observe_compute(2048, 0, 0.0295)
        rule.observe_first_token(2048, 2048, nbytes, 0, 0.0315)
    found = rule.estimate(2048, 2048, nbytes, 0)
    assert found is not None
    assert found.load == pytest.approx(0.0315, rel=0.02)
    assert found.compute == pytest.approx(0.0295, rel=0.02)
    assert not rule.should_load(2048, 2048, nbytes, 0)
    far = rule.estimate(32768, 16384, nbytes, 0)
    assert taught is not None and far is not None
    assert far.compute == pytest.approx(taught.compute, rel=0.05)


def test_estimates_meet_what_was_seen() -> None:
    machine = Machine(3e9)
    found = taught(machine).estimate(32768, 16384, 0, 16384 * TOKEN_BYTES)
    assert found is not None
    assert found.compute == pytest.approx(machine.compute(32768, 0), rel=0.1)
    assert found.load == pytest.approx(machine.first_token(32768, 16384, from_disk=True), rel=0.1)


def test_loads_of_one_size_and_odd_times_do_not_upset_it() -> None:
    rule = LoadOrCompute(1)
    for _ in range(3):
        rule.observe_compute(1000, 0, 0.5)
        rule.observe_load(10**9, 0.25, from_disk=True)
    found = rule.estimate(1000, 500, 0, 2 * 10**9)
    assert found is not None
    assert (found.load, found.compute) == (pytest.approx(0.75), pytest.approx(0.5))
    rule.observe_load(8 * 10**9, 0.2, from_disk=True)  # a large one that was faster
    found = rule.estimate(1000, 500, 0, 2 * 10**9)
    assert found is not None and found.load > 0
