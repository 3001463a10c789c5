"""Reads from chains of several copies: any serving member will do, and none of them alone matters.

Whoever answers a read has everything that was acknowledged up to then (docs/design/0004-chains.md),
so a reader takes the next replica for any reason: a server that is gone, a disk that failed, a
target that was fenced, a copy that is damaged or not there. Only when all replicas of a map that is
not older than the read have failed is that the caller's trouble; when they only failed for now, not
before some rounds with pauses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvfs_base.errors import (
    ChunkNotFound,
    ChunkPending,
    ConnectionLost,
    DeadlineExceeded,
    IntegrityError,
    KvfsError,
    NoTarget,
    ServiceError,
    TargetFailed,
    TargetFenced,
    VersionMismatch,
)
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import round_up
from kvfs_datapath.client.hedges import Ask, Hedger
from kvfs_datapath.client.patience import Patience
from kvfs_datapath.client.repairs import Repairs
from kvfs_datapath.client.routes import ChainRoutes, Route
from kvfs_datapath.client.shared import Shared
from kvfs_datapath.client.transfers import ChunkRead, ReadShare, Results, read_portion
from kvfs_datapath.client.workers import Portions, cut, portion_bytes
from kvfs_datapath.connections import Attempt
from kvfs_datapath.limits import CHAIN_CONNECT_SECONDS, CHAIN_READ_SECONDS

_Result = TypeVar("_Result")

UNREACHABLE = (ConnectionLost, DeadlineExceeded, NoTarget)
_OF_TARGET = (*UNREACHABLE, TargetFailed, TargetFenced)
"""Failures that say something of the target, not of a chunk."""
_ELSEWHERE = (ServiceError, IntegrityError, VersionMismatch)
"""Another replica may do better. All others are the caller's mistakes."""
_LOST = (ChunkNotFound, IntegrityError)
"""A serving member has looked: this copy is not there, or not good."""


@dataclasses.dataclass(slots=True)
class Tries:
    """How the replicas of one chunk did in this round; those found bad since the beginning."""

    failed: dict[int, KvfsError] = dataclasses.field(default_factory=dict)
    bad: dict[int, Route] = dataclasses.field(default_factory=dict)

    def note(self, route: Route, error: KvfsError) -> None:
        self.failed[route.target_id] = error
        if isinstance(error, _LOST):
            self.bad[route.target_id] = route

    def verdict(self) -> KvfsError:
        """One that could not be asked may have had it: then nothing is lost for good."""
        errors = list(self.failed.values())
        for error in errors:
            if not isinstance(error, _LOST):
                return error
        for error in errors:
            if isinstance(error, IntegrityError):
                return error
        return errors[0] if errors else NoTarget(detail="no replica is serving")

    @property
    def may_change(self) -> bool:
        """Some only failed for now."""
        return not self.failed or any(error.temporary for error in self.failed.values())


@dataclasses.dataclass(slots=True)
class _Lane:
    """What a round wants from one target: portions of item indexes, or the failure that ended
    it."""

    portions: Portions
    failure: KvfsError | None = None


@dataclasses.dataclass(slots=True)
class _Batch:
    """What one call of ``read_chunks`` is about; lists by item index."""

    reads: Sequence[ChunkRead]
    results: Results
    tries: list[Tries]
    others: list[Route | None]
    """Who could answer instead of the target that is being asked."""


class ChainReader:
    """Thread-safe."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._router = shared.router
        self._health = shared.health
        self._counters = shared.counters
        self._hedger = Hedger(shared.env.clock, shared.health, shared.counters)
        self._repairs = Repairs(shared.env.clock, shared.pool, shared.counters)

    def close(self) -> None:
        """After the pool."""
        self._repairs.close()
        self._hedger.close()

    # --- whole chunks

    def read_chunks(self, reads: Sequence[ChunkRead]) -> Results:
        """One result a chunk, as ChunkClient.read_chunks."""
        count = len(reads)
        named = [
            dataclasses.replace(r, chunk=ChunkId(r.chunk.inode, r.chunk.number, r.chain))
            for r in reads
        ]
        batch = _Batch(named, [None] * count, [Tries() for _ in reads], [None] * count)
        left = list(range(count))
        patience: Patience | None = None
        while True:
            fresh = patience is not None
            routes = self._router.chains({reads[i].chain for i in left}, fresh=fresh)
            left = self._round(batch, left, routes)
            if fresh:
                for index in left:
                    batch.results[index] = batch.tries[index].verdict()
                left = [index for index in left if batch.tries[index].may_change]
            if not left:
                return batch.results
            if patience is None:
                # The map may be older than the read: the second round begins at once.
                patience = self._patience()
            elif not patience.wait():
                return batch.results
            for index in left:
                batch.tries[index].failed.clear()

    def _round(
        self, batch: _Batch, indexes: list[int], routes: dict[int, ChainRoutes]
    ) -> list[int]:
        """Asks the replicas of each chunk one after the other; answers with the chunks of which all
        have failed."""
        exhausted: list[int] = []
        while indexes:
            avoided = self._avoided(routes)
            lanes: dict[Route, list[int]] = {}
            for index in indexes:
                order = _untried(batch, index, routes, avoided)
                if not order:
                    exhausted.append(index)
                    continue
                batch.others[index] = _instead(order[1:], avoided)
                lanes.setdefault(order[0], []).append(index)
            jobs: list[Callable[[], None]] = []
            for route, wanted in lanes.items():
                sizes = [batch.reads[i].size for i in wanted]
                lane = _Lane(Portions(cut(wanted, sizes, portion_bytes(sum(sizes)))))
                drive = functools.partial(self._drive, lane, route, batch)
                jobs += [drive] * lane.portions.threads
            self._shared.workers.parallel(jobs)
            asked = [index for wanted in lanes.values() for index in wanted]
            indexes = [i for i in asked if isinstance(batch.results[i], _ELSEWHERE)]
            self._counters.add(replica_retries=len(indexes))
        return exhausted

    def _avoided(self, routes: dict[int, ChainRoutes]) -> set[int]:
        return self._health.avoided({r.target_id for c in routes.values() for r in c.serving})

    def _drive(self, lane: _Lane, route: Route, batch: _Batch) -> None:
        """One thread's share of a lane."""
        mine = ReadShare(self._shared.pool, route, lane.portions, batch.reads)
        try:
            self._drive_portions(lane, mine, route, batch)
        finally:
            mine.leave()

    def _drive_portions(self, lane: _Lane, mine: ReadShare, route: Route, batch: _Batch) -> None:
        while (indexes := mine.take()) is not None:
            answers: Results
            if lane.failure is not None:
                mine.leave()
                answers = [lane.failure] * len(indexes)
            else:
                try:
                    answers = self._portion(route, batch, indexes, mine)
                except KvfsError as exc:
                    answers = [exc] * len(indexes)
                    if isinstance(exc, _OF_TARGET):
                        lane.failure = exc
                        self.failed(route, exc)
            for index, answer in zip(indexes, answers, strict=True):
                batch.results[index] = answer
                tries = batch.tries[index]
                if isinstance(answer, _ELSEWHERE):
                    tries.note(route, answer)
                elif answer is None and tries.bad:
                    self._report(tries, batch.reads[index].chunk)

    def failed(self, route: Route, error: KvfsError) -> None:
        """The target could not be asked, or does not answer for what it has."""
        self._health.failed(route.target_id)
        if isinstance(error, UNREACHABLE):
            self._router.doubt()

    def _report(self, tries: Tries, chunk: ChunkId) -> None:
        for bad in tries.bad.values():
            self._repairs.ask(bad, chunk)

    def _portion(
        self, route: Route, batch: _Batch, indexes: list[int], share: ReadShare
    ) -> Results:
        portion = [batch.reads[i] for i in indexes]
        others = [batch.others[i] for i in indexes]
        size = sum(round_up(read.size) for read in portion)

        def ask(asked: Route, attempt: Attempt, buffer: memoryview | None) -> Results:
            if buffer is not None:
                return self._elsewhere(_moved(portion, buffer), others, attempt)
            answers = share.transfer(portion, attempt)
            wrong = [answer for answer in answers if answer is not None]
            if len(wrong) == len(answers) and all(isinstance(e, _OF_TARGET) for e in wrong):
                raise wrong[0]
            return answers

        def take(buffer: memoryview) -> None:
            for read, moved in zip(portion, _moved(portion, buffer), strict=True):
                read.view[: read.size] = moved.view[: read.size]

        other = None if None in others else others[0]
        return self._hedger.read(route, other, size, ask, take)

    def _elsewhere(
        self, portion: Sequence[ChunkRead], others: Sequence[Route | None], attempt: Attempt
    ) -> Results:
        """The whole portion of those who could answer instead, or raises what was wrong: the first
        request, which goes on, may do better."""
        by_route: dict[Route, list[ChunkRead]] = {}
        for read, other in zip(portion, others, strict=True):
            assert other is not None
            by_route.setdefault(other, []).append(read)
        for route, reads in by_route.items():
            for answer in read_portion(self._shared.pool, route, reads, attempt):
                if answer is not None:
                    raise answer
        return [None] * len(portion)

    def _patience(self) -> Patience:
        return Patience(self._shared.env, self._shared.closed, CHAIN_READ_SECONDS)

    # --- one question

    def ask(
        self,
        chunk: ChunkId,
        size: int,
        ask: Ask[_Result],
        take: Callable[[memoryview], None],
    ) -> _Result:
        """Asks the serving members of ``chunk``'s chain, one after the other, for ``size`` bytes
        (of a file chunk). One that has a pending version sends us to the tail."""
        tries = Tries()
        patience: Patience | None = None
        while True:
            chain = self._router.chain(chunk.chain, fresh=patience is not None)
            avoided = self._health.avoided(r.target_id for r in chain.serving)
            order = chain.in_order(chunk, avoided)
            while order:
                if order[0].target_id in avoided and self._is_hole(chunk, tries, chain):
                    raise tries.verdict()
                route = order.pop(0)
                try:
                    other = _instead(order, avoided)
                    answer = self._hedger.read(route, other, size, ask, take)
                except _ELSEWHERE as exc:
                    tries.note(route, exc)
                    self._counters.add(replica_retries=1)
                    if isinstance(exc, ChunkPending):
                        order.sort(key=lambda r: r.target_id != chain.tail)
                    elif isinstance(exc, _OF_TARGET):
                        self.failed(route, exc)
                    continue
                if tries.bad:
                    self._report(tries, chunk)
                return answer
            # A hole of a sparse file: all that serve have said so.
            known = all(isinstance(e, ChunkNotFound) for e in tries.failed.values())
            if known or (patience is not None and not tries.may_change):
                raise tries.verdict()
            if patience is None:
                patience = self._patience()
            elif not patience.wait():
                raise tries.verdict()
            tries.failed.clear()

    def _is_hole(self, chunk: ChunkId, tries: Tries, chain: ChainRoutes) -> bool:
        """All who were asked so far do not have the chunk. The others could not be reached lately:
        one who was asked looks what they have, and mends what it lacks."""
        if not tries.failed or not all(isinstance(e, ChunkNotFound) for e in tries.failed.values()):
            return False
        route = chain.find(next(iter(tries.failed)))
        if route is None:
            return False
        request = m.RepairChunks(route.target_id, (m.ChunkRef(*chunk),))
        try:
            outcomes: m.Outcomes = self._shared.pool.run(
                route.address,
                lambda c: c.call(request),
                connect_seconds=CHAIN_CONNECT_SECONDS,
                watch=True,
            )
        except KvfsError:
            return False
        return isinstance(outcomes.error(0), ChunkNotFound)


def _untried(
    batch: _Batch, index: int, routes: dict[int, ChainRoutes], avoided: set[int]
) -> list[Route]:
    read, failed = batch.reads[index], batch.tries[index].failed
    chain = routes.get(read.chain)
    if chain is None:
        return []
    order = chain.in_order(read.chunk, avoided)
    return [r for r in order if r.target_id not in failed] if failed else order


def _instead(routes: Sequence[Route], avoided: set[int]) -> Route | None:
    return next((r for r in routes if r.target_id not in avoided), None)


def _moved(portion: Sequence[ChunkRead], buffer: memoryview) -> list[ChunkRead]:
    """The same reads into ``buffer``, one after the other on whole pages."""
    moved = []
    offset = 0
    for read in portion:
        end = offset + round_up(read.size)
        moved.append(dataclasses.replace(read, view=buffer[offset:end]))
        offset = end
    return moved


__all__ = ["UNREACHABLE", "ChainReader"]
