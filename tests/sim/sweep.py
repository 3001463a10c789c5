"""Many seeds, on all cores, and what they amounted to."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator

from sim import bugs
from sim.hub import SimulationFailed
from sim.plan import BLOCK_LEASES, DRAINING, KINDS
from sim.world import World

TAIL_LINES = 60
COMMAND = "python -m tests.sim --seed"


@dataclasses.dataclass
class Outcome:
    """Of one seed. ``failure`` is empty if all was well."""

    seed: int
    failure: str
    trace_hash: str
    virtual_seconds: float
    real_seconds: float
    operations: int
    counts: collections.Counter[str]
    tail: list[str]
    plan: str
    arguments: str
    """What else repeats it."""


def run_seed(seed: int, bug: str = "", kind: str = "", lines: int = TAIL_LINES) -> Outcome:
    """With the production code as it is, or with one of ``bugs`` in it."""
    if bug and not kind:
        kind = bugs.BUGS[bug][1]
    # Nothing is collected in the middle of a run, and what all runs share is not looked at.
    gc.freeze()
    gc.disable()
    try:
        return _run(World(seed, kind), bug, kind, lines)
    finally:
        gc.collect()  # frames of greenlets refer to each other
        gc.unfreeze()
        gc.enable()


def _run(world: World, bug: str, kind: str, lines: int) -> Outcome:
    begun = time.perf_counter()
    failure = ""
    try:
        with bugs.planted(bug):
            world.run()
    except SimulationFailed as exc:
        failure = _explain(exc)
    return Outcome(
        seed=world.seed,
        failure=failure,
        trace_hash=world.hub.trace_hash(),
        virtual_seconds=world.hub.now,
        real_seconds=time.perf_counter() - begun,
        operations=world.history.count,
        counts=world.hub.counts,
        tail=world.hub.trace_tail(lines),
        plan=str(world.plan),
        arguments="".join(
            f' --{name} "{value}"' for name, value in (("bug", bug), ("kind", kind)) if value
        ),
    )


def _explain(exc: SimulationFailed) -> str:
    """The message, and the stack of what caused it."""
    return "".join(traceback.format_exception(exc))


def workers(jobs: int = 0) -> concurrent.futures.ProcessPoolExecutor:
    """Processes to sweep with, one a core."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context)


def sweep(
    pool: concurrent.futures.Executor, seeds: Iterable[int], bug: str = "", kind: str = ""
) -> Iterator[Outcome]:
    """Outcomes as they come. Whoever stops in between stops those that were not begun."""
    futures = [pool.submit(run_seed, seed, bug, kind) for seed in seeds]
    try:
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _sweep(jobs: int, seeds: Iterable[int], bug: str, kind: str) -> Iterator[Outcome]:
    if jobs == 1:
        for seed in seeds:
            yield run_seed(seed, bug, kind)
        return
    with workers(jobs) as pool:
        yield from sweep(pool, seeds, bug, kind)


def describe(outcome: Outcome, lines: int = TAIL_LINES) -> str:
    """All that is known of a failure."""
    return "\n".join(
        [
            f"seed {outcome.seed} failed after {outcome.virtual_seconds:.3f} virtual seconds",
            *outcome.tail[-lines:],
            outcome.plan,
            outcome.failure.rstrip(),
            f"repeat with: {COMMAND} {outcome.seed}{outcome.arguments}",
        ]
    )


def summary(outcomes: Iterable[Outcome], seconds: float) -> str:
    done = list(outcomes)
    counts: collections.Counter[str] = collections.Counter()
    for outcome in done:
        counts.update(outcome.counts)
    virtual = sum(outcome.virtual_seconds for outcome in done)
    failed = sum(bool(outcome.failure) for outcome in done)
    lines = [
        f"{len(done)} seeds in {seconds:.1f} s ({len(done) / seconds:.1f} a second), "
        f"{virtual:.0f} virtual seconds, "
        f"{sum(outcome.operations for outcome in done)} operations, {failed} failed",
    ]
    faults = {name[7:]: n for name, n in counts.items() if name.startswith("fault: ")}
    errors = {name: n for name, n in counts.items() if ": " in name and name[7:] not in faults}
    others = {n: c for n, c in counts.items() if ": " not in n}
    for title, group in (("faults", faults), ("effects", others), ("errors clients saw", errors)):
        found = ", ".join(f"{name} {count}" for name, count in sorted(group.items()))
        lines.append(f"{title}: {found or 'none'}")
    lines += [f"repeat with: {COMMAND} {o.seed}{o.arguments}" for o in done if o.failure]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description="Run the cluster under seeds."
    )
    parser.add_argument("--seed", type=int, help="this one alone, with its trace")
    parser.add_argument("--seeds", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one a core)")
    planted = ["", *bugs.BUGS]
    parser.add_argument("--bug", default="", choices=planted, help="plant this bug")
    kinds = dict.fromkeys(("", *KINDS, *DRAINING, BLOCK_LEASES))
    parser.add_argument("--kind", default="", choices=[*kinds], help="of world")
    parser.add_argument("--lines", type=int, default=TAIL_LINES, help="of the trace to show")
    parser.add_argument("--hashes", action="store_true", help="print the hash of each trace")
    parser.add_argument("--keep-going", action="store_true", help="after a failure, too")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        outcome = run_seed(options.seed, options.bug, options.kind, options.lines)
        print(describe(outcome, options.lines) if outcome.failure else "\n".join(outcome.tail))
        print(f"trace hash {outcome.trace_hash}")
        print(summary([outcome], outcome.real_seconds))
        return bool(outcome.failure)
    begun = time.perf_counter()
    done: list[Outcome] = []
    seeds = range(options.first, options.first + options.seeds)
    for outcome in _sweep(options.jobs or os.cpu_count() or 1, seeds, options.bug, options.kind):
        done.append(outcome)
        if options.hashes:
            print(outcome.seed, outcome.trace_hash)
        if outcome.failure:
            print(describe(outcome, 20), flush=True)
            if not options.keep_going:
                break
    if not options.hashes:
        print(summary(done, time.perf_counter() - begun))
    return any(outcome.failure for outcome in done)
