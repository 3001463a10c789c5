"""The cluster under seeds: production code, with faults, in virtual time. ``make sim SEEDS=1000``
runs more of them; a seed that fails prints the command that repeats it."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim import bugs
from sim.plan import BLOCK_LEASES, DRAINING
from sim.sweep import Outcome, describe, run_seed, summary, sweep, workers

Pool = concurrent.futures.Executor

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 200
SEEDS_AT_ONCE = 10
"""In the test's own process: others run other seeds meanwhile."""
SEEDS_FOR_A_BUG = 200
DRAIN_SEEDS = int(os.environ.get("KVFS_DRAIN_SEEDS", "6"))
LEASE_SEEDS = 10

pytestmark = [pytest.mark.logs_warnings, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """For whoever needs it: it takes some seconds until the first seed runs."""
    with workers() as made:
        yield made


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_AT_ONCE))
def test_seeds(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + SEEDS_AT_ONCE)]
    failed = [outcome for outcome in outcomes if outcome.failure]
    assert not failed, "\n\n".join(describe(outcome) for outcome in failed)
    report = summary(outcomes, 1.0)
    assert f"{SEEDS_AT_ONCE} seeds" in report and "0 failed" in report
    assert sum(outcome.operations for outcome in outcomes) > 100 * SEEDS_AT_ONCE


@pytest.mark.parametrize("kind", DRAINING)
def test_targets_are_drained(pool: Pool, kind: str) -> None:
    """Kinds of their own, so that other seeds stay what they were."""
    outcomes = list(sweep(pool, range(DRAIN_SEEDS), kind=kind))
    failed = [outcome for outcome in outcomes if outcome.failure]
    assert not failed, "\n\n".join(describe(outcome) for outcome in failed)


def test_blocks_are_leased() -> None:
    outcomes = [run_seed(seed, kind=BLOCK_LEASES) for seed in range(LEASE_SEEDS)]
    failed = [outcome for outcome in outcomes if outcome.failure]
    assert not failed, "\n\n".join(describe(outcome) for outcome in failed)
    assert sum(outcome.counts["answered by lease"] for outcome in outcomes) > 10 * LEASE_SEEDS


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_planted_bugs_are_found(pool: Pool, bug: str) -> None:
    """Seeds find what is known to be wrong; the same world is green without it."""
    first = bugs.FOUND_AT.get(bug, 0)
    seeds = range(first + 1, first + SEEDS_FOR_A_BUG)
    found: Outcome | None = run_seed(first, bug)
    if not found.failure:  # not sooner: a sweep has begun some more when it finds it
        found = next((o for o in sweep(pool, seeds, bug=bug) if o.failure), None)
    assert found is not None, f"{SEEDS_FOR_A_BUG} seeds do not notice: {bug}"
    assert not run_seed(found.seed, kind=bugs.BUGS[bug][1]).failure


def test_a_seed_repeats_exactly_in_one_process() -> None:
    """Whatever ran before: nothing is left of one run for the next."""
    first = [run_seed(seed).trace_hash for seed in (7, 8)]
    assert not run_seed(9).failure
    again = [run_seed(seed).trace_hash for seed in (8, 7)]
    assert again == first[::-1] and first[0] != first[1]


def test_a_seed_repeats_exactly_in_every_process() -> None:
    """Also where strings hash differently: the hash covers each turn that a thread took."""
    command = [sys.executable, "-m", "tests.sim", "--jobs", "1", "--seeds", "4", "--hashes"]
    answers = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        answers.add(done.stdout)
    (hashes,) = answers
    assert hashes.splitlines() == [f"{seed} {run_seed(seed).trace_hash}" for seed in range(4)]
    assert len(set(hashes.split()[1::2])) == 4


def test_a_failure_says_how_to_repeat_it() -> None:
    command = [sys.executable, "-m", "tests.sim", "--bug", "collect too early", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    seed = done.stdout.split("repeat with: python -m tests.sim --seed ")[1].split()[0]
    again = subprocess.run(
        [*command, "--seed", seed], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert f"seed {seed} failed" in again.stdout and "WrongBytes" in again.stdout
