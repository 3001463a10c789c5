"""Branches of production code that are seldom taken, forced by chance: some of them in each run.

Each is something that production may do at any time, so nothing may go wrong because of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from kvfs_base.errors import Conflict, ServerBusy
from kvfs_datapath import rules
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains.peers import Reach
from kvfs_datapath.chains.views import Views
from kvfs_datapath.chunks.locks import ChunkLocks
from kvfs_datapath.chunks.tree import ChunkTree
from kvfs_datapath.chunks.versions import Versions
from kvfs_datapath.client.health import Health
from kvfs_datapath.client.routes import ChainRoutes
from sim.engine import SimEngine
from sim.hub import Hub

CHANCE = 0.25
"""Of each to be forced in a run."""

ALWAYS = {"replica"}
"""Forced in every run."""

Fire = Callable[[], bool]


def _ask_for_the_whole(fire: Fire) -> Any:
    """A member wants the whole chunk, though it has what the update was made for."""
    receive = rules.receive

    def forced(committed: Any, pending: Any, request: Any, in_step: bool) -> Any:
        found = receive(committed, pending, request, in_step)
        if found is rules.Receipt.PREPARE and not request.whole and fire():
            return rules.Receipt.ASK_WHOLE
        return found

    return mock.patch.object(rules, "receive", forced)


def _want_everything(fire: Fire) -> Any:
    """Who is brought in step asks for what it has."""
    is_wanted = rules.is_wanted
    return mock.patch.object(rules, "is_wanted", lambda *args: is_wanted(*args) or fire())


def _copy_appends(fire: Fire) -> Any:
    append = Versions._append

    def forced(self: Versions, *args: Any) -> Any:
        return (self._copy if fire() else append.__get__(self))(*args)

    return mock.patch.object(Versions, "_append", forced)


def _renounce(fire: Fire) -> Any:
    """A target finds that it does not know what it has, and is brought in step as a whole."""
    learn = Views.learn

    def forced(self: Views, *args: Any) -> None:
        learn(self, *args)
        if fire():
            self.renounce(next(iter(self._standings)))

    return mock.patch.object(Views, "learn", forced)


def _suspect_at_once(fire: Fire) -> Any:
    suspects = Reach.suspects

    def forced(self: Reach, now: float) -> tuple[int, ...]:
        return suspects(self, now + 1e9) if fire() else suspects(self, now)

    return mock.patch.object(Reach, "suspects", forced)


def _verify_again(fire: Fire) -> Any:
    was_verified = ChunkTree.was_verified

    def forced(self: ChunkTree, info: Any) -> bool:
        return was_verified(self, info) and not fire()

    return mock.patch.object(ChunkTree, "was_verified", forced)


def _hedge_at_once(fire: Fire) -> Any:
    bound = Health.bound

    def forced(self: Health, *args: Any) -> float:
        return 0.0 if fire() else bound(self, *args)

    return mock.patch.object(Health, "bound", forced)


def _ask_another_replica(fire: Fire) -> Any:
    """A reader begins with another one than usual. Else a chunk is always read where it was read
    before, and nobody sees what replicas do not agree about."""
    in_order = ChainRoutes.in_order

    def forced(self: ChainRoutes, *args: Any) -> Any:
        found = in_order(self, *args)
        return found[1:] + found[:1] if fire() else found

    return mock.patch.object(ChainRoutes, "in_order", forced)


def _no_buffer(fire: Fire) -> Any:
    lend = BufferPool.lend

    def forced(self: BufferPool, timeout: float) -> Any:
        if fire():
            raise ServerBusy(detail="no free transfer buffer")
        return lend(self, timeout)

    return mock.patch.object(BufferPool, "lend", forced)


def _chunk_is_locked(fire: Fire) -> Any:
    hold = ChunkLocks.hold

    def forced(self: ChunkLocks, chunk: Any, seconds: float | None = None) -> Any:
        if seconds is not None and fire():
            raise Conflict(detail=f"chunk {tuple(chunk)} is being written")
        return hold(self, chunk, seconds)

    return mock.patch.object(ChunkLocks, "hold", forced)


def _lose_a_race(fire: Fire) -> Any:
    """Another server on the store committed first."""
    commit = SimEngine.commit

    def forced(self: SimEngine, group: Any) -> None:
        if self.shared and fire():
            raise Conflict(detail="lost a race")
        commit(self, group)

    return mock.patch.object(SimEngine, "commit", forced)


POINTS: dict[str, tuple[Callable[[Fire], Any], float]] = {
    "whole": (_ask_for_the_whole, 0.25),
    "want": (_want_everything, 0.25),
    "copy": (_copy_appends, 0.25),
    "renounce": (_renounce, 0.005),
    "suspect": (_suspect_at_once, 0.25),
    "verify": (_verify_again, 0.25),
    "hedge": (_hedge_at_once, 0.25),
    "replica": (_ask_another_replica, 0.5),
    "no buffer": (_no_buffer, 0.02),
    "locked": (_chunk_is_locked, 0.02),
    "race": (_lose_a_race, 0.1),
}
"""And how often each fires where it is forced."""


@contextlib.contextmanager
def forced(hub: Hub) -> Iterator[None]:
    """Some of them, for as long as a run takes."""
    with contextlib.ExitStack() as stack:
        for name, (force, share) in POINTS.items():
            if name in ALWAYS or hub.rng.random() < CHANCE:
                stack.enter_context(force(_fire(hub, name, share)))
        yield


def _fire(hub: Hub, name: str, share: float) -> Fire:
    def fire() -> bool:
        if hub.rng.random() >= share:
            return False
        hub.counts[f"forced {name}"] += 1
        return True

    return fire
