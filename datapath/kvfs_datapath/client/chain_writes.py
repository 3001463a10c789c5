"""Blocks into chains of several copies: one pipelined pass to all members.

Nobody else writes these chunks, so there is nothing to order: any member may be the first to get a
block, and doing it twice is harmless. With a member on this host the block goes into its staging
file, and at the same time to the first of the others, which passes it on. A chunk is written when
every member under one version of the chain has it; when the chain changes meanwhile, it is written
again to the members that there are then.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

from kvfs_base.errors import (
    ChunkCorrupt,
    Conflict,
    KvfsError,
    NoTarget,
    ServerBusy,
    StaleChain,
    TargetFailed,
    TargetFenced,
)
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.client.chain_reads import UNREACHABLE
from kvfs_datapath.client.patience import Patience
from kvfs_datapath.client.routes import ChainRoutes, Route
from kvfs_datapath.client.shared import Shared
from kvfs_datapath.client.transfers import ChunkWrite, Results, write_portion
from kvfs_datapath.client.workers import cut, portion_bytes
from kvfs_datapath.limits import CHAIN_WRITE_SECONDS, CLIENT_THREADS_PER_TARGET

PASSING_ERRORS = (*UNREACHABLE, StaleChain, TargetFenced, TargetFailed, ServerBusy, Conflict)
"""The chain is about to change, or has: the write is worth another try."""

_Way = tuple[Route, m.Passing]


@dataclasses.dataclass(slots=True)
class _Lane:
    """What goes to one target: portions of item indexes of one chain each."""

    portions: collections.deque[tuple[m.Passing, list[int]]]
    failure: KvfsError | None = None


class ChainWriter:
    """Thread-safe."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def write_chunks(self, writes: Sequence[ChunkWrite]) -> Results:
        """One result a chunk, as ChunkClient.write_chunks; those with None know their ``version``.
        Waits for a chain that loses a member, not for one that nobody serves."""
        named = [
            dataclasses.replace(w, chunk=ChunkId(w.chunk.inode, w.chunk.number, w.chain))
            for w in writes
        ]
        results: Results = [None] * len(writes)
        left = list(range(len(writes)))
        patience: Patience | None = None
        silences = 0
        while True:
            fresh = patience is not None
            routes = self._shared.router.chains({writes[i].chain for i in left}, fresh=fresh)
            served = [i for i in left if writes[i].chain in routes]
            for index in left:
                results[index] = NoTarget(detail=f"chain {writes[index].chain}")
            self._once(named, served, routes, results, silences)
            for index in served:
                if results[index] is None:
                    writes[index].version = routes[writes[index].chain].version
            # Bytes that broke on their way are sent once more. If the caller's memory is what
            # changed, they are wrong again.
            worth = PASSING_ERRORS if fresh else (*PASSING_ERRORS, ChunkCorrupt)
            left = [i for i in served if isinstance(results[i], worth)]
            if not left:
                return results
            if patience is None:
                patience = Patience(self._shared.env, self._shared.closed, CHAIN_WRITE_SECONDS)
            if not patience.wait():
                return results
            silences += any(isinstance(results[i], UNREACHABLE) for i in left)

    def _once(
        self,
        writes: Sequence[ChunkWrite],
        indexes: list[int],
        routes: dict[int, ChainRoutes],
        results: Results,
        silences: int,
    ) -> None:
        """Each chunk to all members of its chain. Its result is None if all of them have it."""
        avoided = self._shared.health.avoided(
            {r.target_id for c in routes.values() for r in c.serving}
        )
        lanes: dict[Route, dict[m.Passing, list[int]]] = {}
        for index in indexes:
            results[index] = None
            ways = self._ways(routes[writes[index].chain], writes[index].chunk, avoided, silences)
            if not ways:
                results[index] = NoTarget(detail=f"no way to all of chain {writes[index].chain}")
            for route, passing in ways:
                lanes.setdefault(route, {}).setdefault(passing, []).append(index)
        jobs: list[Callable[[], None]] = []
        for route, groups in lanes.items():
            lane = _Lane(_portions(writes, groups))
            drive = functools.partial(self._drive, lane, route, writes, results)
            jobs += [drive] * min(len(lane.portions), CLIENT_THREADS_PER_TARGET)
        self._shared.workers.parallel(jobs)

    def _ways(
        self, chain: ChainRoutes, chunk: ChunkId, avoided: set[int], silences: int
    ) -> list[_Way]:
        """A member that some of the others cannot reach must not fail for ever: after attempts in
        which somebody did not answer every member is asked from here (not at once if one of them
        failed lately), and then, in turn, another order is drawn."""
        order = [route.target_id for route in chain.in_order(chunk, avoided)]
        order += [target_id for target_id in chain.members if target_id not in order]
        found = [route for t in order if (route := chain.find(t)) is not None]
        hopeful = silences > 2 or avoided.isdisjoint(order)
        if silences % 2 and hopeful and len(found) == len(order):
            return [(route, m.Passing(chain.chain_id, chain.version)) for route in found]
        if silences:
            self._shared.env.rng.shuffle(order)
            order.sort(key=avoided.__contains__)
        return _ways(chain, order)

    def _drive(
        self, lane: _Lane, route: Route, writes: Sequence[ChunkWrite], results: Results
    ) -> None:
        """One thread's share of a lane. Two lanes may have the same chunk: either one's failure is
        the chunk's."""
        while True:
            try:
                passing, indexes = lane.portions.popleft()
            except IndexError:
                return
            answers: Results
            if lane.failure is not None:
                answers = [lane.failure] * len(indexes)
            else:
                try:
                    portion = [writes[i] for i in indexes]
                    answers = write_portion(self._shared.pool, route, portion, passing)
                except KvfsError as exc:
                    answers = [exc] * len(indexes)
                    if isinstance(exc, UNREACHABLE):
                        lane.failure = exc
                        self._shared.health.failed(route.target_id)
            for index, answer in zip(indexes, answers, strict=True):
                if answer is not None:
                    results[index] = answer


def _ways(chain: ChainRoutes, order: list[int]) -> list[_Way]:
    """Whom to send a chunk to, and whom they pass it on to: together all members, in ``order``.
    Empty if a member that is left has no route, and nobody to pass it on."""
    ways: list[_Way] = []
    local = next((r for r in (*chain.serving, *chain.others) if r.local), None)
    if local is not None:
        order.remove(local.target_id)
        ways.append((local, m.Passing(chain.chain_id, chain.version)))
    if order:
        first = next((r for t in order if (r := chain.find(t)) is not None), None)
        if first is None:
            return []
        order.remove(first.target_id)
        ways.append((first, m.Passing(chain.chain_id, chain.version, tuple(order))))
    return ways


def _portions(
    writes: Sequence[ChunkWrite], groups: dict[m.Passing, list[int]]
) -> collections.deque[tuple[m.Passing, list[int]]]:
    limit = portion_bytes(sum(writes[i].size for group in groups.values() for i in group))
    return collections.deque(
        (passing, part)
        for passing, group in groups.items()
        for part in cut(group, [writes[i].size for i in group], limit)
    )


__all__ = ["PASSING_ERRORS", "ChainWriter"]
