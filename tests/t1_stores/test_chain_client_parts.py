"""Parts of the chunk client that decide without I/O: whom to ask, when to ask twice, how long to
wait."""

from __future__ import annotations

import pytest

from kvfs_base import threads
from kvfs_base.cluster import Chain, ClusterMap, Target, TargetState
from kvfs_base.errors import ConnectionLost, NoTarget, StaleChain, TargetFailed
from kvfs_base.limits import MIB
from kvfs_base.testing import ManualClock, memory_env
from kvfs_base.types import Address, ChunkId
from kvfs_datapath.client.health import Health
from kvfs_datapath.client.patience import Patience
from kvfs_datapath.client.routes import Router
from kvfs_datapath.client.segments import segments
from kvfs_datapath.client.workers import cut
from kvfs_datapath.connections import Attempt
from kvfs_datapath.limits import (
    AVOID_SECONDS,
    AVOID_SECONDS_MAX,
    HEDGE_FACTOR,
    HEDGE_SECONDS_FIRST,
    HEDGE_SECONDS_MAX,
    HEDGE_SECONDS_MIN,
    HEDGE_UNIT_BYTES,
    LATENCIES_NEEDED,
)

# --- health


def test_a_target_that_failed_is_avoided_for_longer_and_longer() -> None:
    clock = ManualClock()
    health = Health(clock)
    assert health.avoided([1, 2]) == set()
    for pause in (AVOID_SECONDS, 2 * AVOID_SECONDS, 4 * AVOID_SECONDS):
        health.failed(1)
        assert health.avoided([1, 2]) == {1}
        clock.advance(pause - 0.01)
        assert health.avoided([1, 2]) == {1}
        clock.advance(0.02)
        # The one who asks now tries it; the others wait for what he finds.
        assert health.avoided([1, 2]) == set()
        assert health.avoided([1, 2]) == {1}
    for _ in range(20):
        health.failed(1)
    clock.advance(AVOID_SECONDS_MAX)
    assert health.avoided([1]) == set()
    health.worked(1, 1000, 0.001)
    assert health.avoided([1]) == set()
    health.failed(1)
    clock.advance(AVOID_SECONDS)
    assert health.avoided([1]) == set()


def test_the_bound_is_learned_by_target_and_bytes() -> None:
    health = Health(ManualClock())
    assert health.bound(1, 0) == HEDGE_SECONDS_FIRST
    for _ in range(LATENCIES_NEEDED - 1):
        health.worked(1, MIB, 0.020)
    assert health.bound(1, 0) == HEDGE_SECONDS_FIRST
    health.worked(1, MIB, 0.020)
    assert health.bound(1, MIB) == pytest.approx(HEDGE_FACTOR * 0.020)
    assert health.bound(1, 8 * MIB) == pytest.approx(HEDGE_FACTOR * 0.160)
    assert health.bound(1, 1) == health.bound(1, HEDGE_UNIT_BYTES)
    assert health.bound(2, 0) == HEDGE_SECONDS_FIRST


def test_bounds_have_bounds() -> None:
    health = Health(ManualClock())
    for _ in range(LATENCIES_NEEDED):
        health.worked(1, MIB, 1e-6)
        health.lagged(2, MIB, 100.0)
    assert health.bound(1, MIB) == HEDGE_SECONDS_MIN
    assert health.bound(2, 0) == HEDGE_SECONDS_MAX


def test_one_slow_read_does_not_move_the_bound() -> None:
    health = Health(ManualClock())
    for number in range(8 * LATENCIES_NEEDED):
        health.worked(1, MIB, 5.0 if number == 30 else 0.020)
    assert health.bound(1, MIB) == pytest.approx(HEDGE_FACTOR * 0.020)


# --- patience


def test_pauses_grow_and_end() -> None:
    env, _ = memory_env()
    waited: list[float] = []

    class Closed:
        """Notes how long it was waited for."""

        def is_set(self) -> bool:
            return False

        def set(self) -> None: ...

        def clear(self) -> None: ...

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited.append(timeout)
            return False

    patience = Patience(env, Closed(), 10.0)
    while patience.wait():
        pass
    assert sum(waited) == pytest.approx(10.0)
    assert waited[0] < 0.1 < max(waited) <= 0.5
    assert len(set(waited)) > 10  # drawn, so that not all come at once
    assert not Patience(env, Closed(), 0).wait()


def test_patience_ends_with_the_clock() -> None:
    env, clock = memory_env()
    patience = Patience(env, threads.event(), 10.0)
    assert patience.wait()
    clock.advance(10.0)
    assert not patience.wait()


def test_patience_ends_with_its_owner() -> None:
    env, _ = memory_env()
    closed = threads.event()
    closed.set()
    assert not Patience(env, closed, 1e6).wait()


# --- routes


class Source:
    def __init__(self, *chains: Chain, offline: tuple[int, ...] = ()) -> None:
        self.chains = chains
        self.offline = offline
        self.fails = False
        self.refreshes = 0

    def current(self) -> ClusterMap:
        return self.made

    def refresh(self) -> ClusterMap:
        self.refreshes += 1
        if self.fails:
            raise ConnectionLost
        return self.made

    @property
    def made(self) -> ClusterMap:
        targets = tuple(
            Target(
                target_id=n,
                server_id=f"server-{n}",
                host_id="here" if n == 4 else f"host-{n}",
                unix=Address.unix(f"/{n}"),
                tcp=Address.tcp("127.0.0.1", n),
                state=TargetState.OFFLINE if n in self.offline else TargetState.SERVING,
                capacity_bytes=0,
                free_bytes=0,
            )
            for n in range(1, 6)
        )
        return ClusterMap(1, targets, self.chains)


def test_who_is_asked() -> None:
    source = Source(Chain(7, 3, (1, 2, 4), 3, (5,), (3,)), offline=(2,))
    chain = Router(source, "here", "auto").chain(7)
    assert [route.target_id for route in chain.serving] == [1, 4]
    assert [route.target_id for route in chain.others] == [5]
    assert (chain.members, chain.head, chain.tail) == ((1, 2, 4, 5), 1, 4)
    assert [r.target_id for r in chain.in_order(ChunkId(1, 0), set())] == [4, 1]
    # Even the one of this host comes last when it is in trouble.
    assert [r.target_id for r in chain.in_order(ChunkId(1, 0), {4})] == [1, 4]
    remote = Router(source, "elsewhere", "auto").chain(7)
    firsts = [remote.in_order(ChunkId(inode, 0), set())[0].target_id for inode in range(100)]
    assert 30 < firsts.count(1) < 70
    assert chain.find(2) is None


def test_kinds_of_chains() -> None:
    source = Source(Chain(1, 1, (1,)), Chain(7, 3, (2,), 2), Chain(8, 1, (3,), 2), offline=(3,))
    router = Router(source, "here", "auto")
    assert [router.is_replicated(c) for c in (1, 7, 8, 9)] == [False, True, True, None]
    assert router.route(1).target_id == 1
    with pytest.raises(StaleChain):
        router.route(7)
    with pytest.raises(NoTarget):
        router.chain(8)
    with pytest.raises(TargetFailed):
        router.chain(9)
    source.fails = True
    with pytest.raises(NoTarget):
        router.chain(9)
    with pytest.raises(ConnectionLost):
        router.is_replicated(9)


def test_the_map_is_asked_for_when_it_is_wanted() -> None:
    source = Source(Chain(7, 3, (1, 2), 2))
    router = Router(source, "here", "auto")
    router.chain(7)
    assert source.refreshes == 0
    router.chain(7, fresh=True)
    assert source.refreshes == 1
    router.doubt()
    router.chain(7)
    router.chain(7)
    assert source.refreshes == 2
    source.chains = (next_version(source.chains[0]),)
    assert router.chain(7, fresh=True).version == 4


def next_version(chain: Chain) -> Chain:
    return Chain(chain.chain_id, chain.version + 1, chain.targets, chain.copies)


# --- attempts


def test_an_attempt_that_was_broken_off() -> None:
    attempt = Attempt()
    attempt.check()
    attempt.cancel()
    with pytest.raises(ConnectionLost):
        attempt.check()
    with pytest.raises(ConnectionLost):
        attempt.begin(None)  # type: ignore[arg-type]


# --- cutting


def test_segments_cover_a_range() -> None:
    found = segments(1000, 2500, 1700)
    assert [tuple(s) for s in found] == [(2, 500, 500, 0), (3, 0, 1000, 500), (4, 0, 200, 1500)]
    assert segments(1000, 5, 0) == []


def test_portions_keep_the_order() -> None:
    assert cut([5, 6, 7, 8], [10, 10, 30, 0], 20) == [[5, 6], [7], [8]]
    assert [len(part) for part in cut(range(600), [0] * 600, 1000)] == [250, 250, 100]
