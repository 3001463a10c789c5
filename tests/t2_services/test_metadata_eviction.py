"""Which blocks make room, and how long it is remembered which were used last."""

from __future__ import annotations

import numpy as np
import pytest

from kvfs_base import errors as e
from kvfs_metadata import limits, records
from kvfs_metadata import messages as m
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.policy import CachePolicy, LruPolicy
from t2_services.metadata_rig import ROOT, Rig, all_removals, evict, key, keys


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=3)


@pytest.fixture
def namespace(rig: Rig) -> int:
    return rig.namespace()


# --- capacity and eviction


def test_eviction_goes_from_the_high_to_the_low_mark() -> None:
    rig = Rig(capacity_bytes=10_000, high_watermark=0.9, low_watermark=0.5)
    namespace = rig.namespace()
    for n in range(9):
        rig.put(namespace, [n])
    assert evict(rig) == 0
    rig.put(namespace, [9])
    assert evict(rig) == 5000
    assert rig.stored(namespace, range(10)) == [5, 6, 7, 8, 9]
    assert len(all_removals(rig, targets=1)) == 5
    statistics = rig.statistics()
    assert statistics["evicted_blocks"] == 5 and statistics["evicted_bytes"] == 5000
    assert rig.call(m.StatFs()).used_bytes == 5000


def test_used_blocks_stay(rig: Rig) -> None:
    rig = Rig(capacity_bytes=10_000)
    namespace = rig.namespace()
    for n in range(6):
        rig.put(namespace, [n])
    rig.match(namespace, [0])
    rig.call(m.LookupBlocks(namespace, keys([2])))
    rig.prepare(namespace, [3], size=1)  # somebody computed it once more
    inode = rig.call(m.Lookup(namespace, key(4).hex().encode())).inode
    rig.call(m.OpenInode(inode))
    rig.core.update([rig.core.eviction(2000)])
    assert rig.stored(namespace, range(6)) == [0, 2, 3, 4]


def test_a_prefix_is_evicted_from_its_end() -> None:
    rig = Rig(capacity_bytes=10_000)
    namespace = rig.namespace()
    rig.put(namespace, [1, 2, 3, 4])
    rig.put(namespace, [11, 12])
    rig.match(namespace, [1, 2, 3, 4])
    rig.core.update([rig.core.eviction(3500)])
    assert rig.stored(namespace, [1, 2, 3, 4, 11, 12]) == [1, 2]


def test_prepares_that_outrun_eviction_make_room_themselves() -> None:
    rig = Rig(capacity_bytes=10_000)
    namespace = rig.namespace()
    for n in range(40):
        rig.put(namespace, [n], size=900)
        assert rig.call(m.StatFs()).used_bytes <= 10_000
    assert rig.stored(namespace, range(40)) == list(range(29, 40))


def test_what_cannot_fit_is_refused() -> None:
    rig = Rig(capacity_bytes=10_000)
    namespace = rig.namespace()
    rig.put(namespace, [1], size=4000)
    held = rig.prepare(namespace, [2], size=5000)
    with pytest.raises(e.CacheFull) as caught:
        rig.prepare(namespace, [3], size=5001)
    assert caught.value.needed_bytes == 5001 and caught.value.capacity_bytes == 10_000
    assert rig.stored(namespace, [1]) == [1], "and nothing is evicted in vain"
    rig.prepare(namespace, [3], size=5000)
    assert rig.stored(namespace, [1]) == []
    rig.call(m.AbortBlocks(held.batch_id))
    rig.prepare(namespace, [4], size=5000)


def test_files_take_room_from_blocks() -> None:
    rig = Rig(capacity_bytes=10_000)
    namespace = rig.namespace()
    for n in range(9):
        rig.put(namespace, [n])
    file = rig.make(1, b"f").inode
    rig.call(m.SetAttr(file, size=5000))
    evict(rig)
    assert rig.call(m.StatFs()).used_bytes <= 9000
    assert rig.stored(namespace, range(9)) == [5, 6, 7, 8]


def test_without_a_setting_the_disks_are_the_capacity() -> None:
    rig = Rig(targets=0)
    assert rig.call(m.StatFs()).capacity_bytes == 0
    rig.heartbeat("a", capacity=1000)
    rig.heartbeat("b", capacity=3000)
    assert rig.call(m.StatFs()).capacity_bytes == 3600
    rig = Rig(capacity_bytes=5000, targets=0)
    assert rig.call(m.StatFs()).capacity_bytes == 5000
    rig.heartbeat("a", capacity=1000)
    assert rig.call(m.StatFs()).capacity_bytes == 1000


def test_a_disk_that_somebody_else_fills_makes_the_cache_evict() -> None:
    rig = Rig(targets=0)
    rig.heartbeat(capacity=1_000_000, free=900_000)
    namespace = rig.namespace()
    for n in range(100):
        rig.put(namespace, [n])
    assert rig.core.excess_bytes() <= 0
    rig.heartbeat(capacity=1_000_000, free=30_000)
    assert rig.core.excess_bytes() == 20_000
    assert evict(rig) == 20_000
    assert rig.core.excess_bytes() <= 0, "what is about to be removed counts as free"
    assert rig.stored(namespace, range(100)) == list(range(20, 100))


def test_bytes_and_blocks_of_each_namespace(rig: Rig) -> None:
    rig.put(rig.namespace("a/x"), [1, 2], size=10)
    rig.put(rig.namespace("b/y"), [1], size=5)
    statistics = rig.statistics()
    assert statistics["namespace_bytes:a/x"] == 20 and statistics["namespace_blocks:a/x"] == 2
    assert statistics["namespace_bytes:b/y"] == 5 and statistics["namespaces"] == 2


def test_hits_and_misses(rig: Rig, namespace: int) -> None:
    rig.put(namespace, [1, 2, 3])
    rig.match(namespace, [1, 2, 9, 3])
    rig.call(m.LookupBlocks(namespace, keys([1, 9, 3])))
    statistics = rig.statistics()
    assert (statistics["match_hits"], statistics["match_misses"]) == (2, 2)
    assert (statistics["lookup_hits"], statistics["lookup_misses"]) == (2, 1)
    assert (statistics["match_hit_tokens"], statistics["match_miss_tokens"]) == (32, 32)
    assert (statistics["hit_tokens"], statistics["miss_tokens"]) == (64, 48)


# --- recency


def test_a_store_that_went_back_skips_the_numbers_that_it_forgot(rig: Rig, namespace: int) -> None:
    """Their chunks may lie on the targets."""
    old = dict(rig.dump())
    forgotten = rig.put(namespace, range(4))
    file = rig.make(ROOT, b"forgotten").inode
    rig.engine._store.state.apply(dict.fromkeys(rig.dump()) | old | {records.WENT_BACK_KEY: b""})
    rig.restart()
    rig.advance(0)
    again = rig.prepare(namespace, range(4))
    assert again.batch_id > forgotten.batch_id + limits.NUMBERS_SKIPPED // 2
    assert again.blocks[0].inode > file + limits.NUMBERS_SKIPPED // 2
    assert rig.dump(records.WENT_BACK_KEY) == {}
    rig.commit(again)
    rig.restart()
    rig.advance(0)
    assert rig.make(ROOT, b"new").inode < file + 2 * limits.NUMBERS_SKIPPED


class _ForgetfulEngine(MemoryEngine):
    """Goes back to its last sync when the machine loses its power, as LMDB does."""

    def __init__(self) -> None:
        super().__init__()
        self._synced: dict[bytes, bytes] = {}

    def sync(self) -> None:
        self._synced = dict(self._store.state.values)

    def lose_power(self) -> None:
        nothing = dict.fromkeys(self._store.state.values)
        self._store.state.apply(nothing | self._synced | {records.WENT_BACK_KEY: b""})
        self.sync()


def test_no_number_is_given_out_twice_however_often_the_power_goes() -> None:
    engine = _ForgetfulEngine()
    rig = Rig(engine=engine)
    namespace = rig.namespace()
    engine.sync()
    seen: set[int] = set()
    for _ in range(4):
        batch = rig.prepare(namespace, range(4))
        inodes = {block.inode for block in batch.blocks if block is not None}
        assert len(inodes) == 4 and not inodes & seen
        seen |= inodes
        engine.lose_power()  # before anything of this was synced
        rig.restart()
        rig.advance(0)


def test_recency_survives_a_restart() -> None:
    rig = Rig(capacity_bytes=100_000)
    namespace = rig.namespace()
    for n in range(8):
        rig.put(namespace, [n])
        rig.advance(1)
    for n in (1, 3, 5):
        rig.match(namespace, [n])
        rig.advance(1)
    while rig.core.unrecorded_uses:
        rig.core.update([rig.core.persist_uses])
    rig.restart()
    rig.core.update([rig.core.eviction(5000)])
    assert rig.stored(namespace, range(8)) == [1, 3, 5]
    rig.core.update([rig.core.eviction(1000)])
    assert rig.stored(namespace, range(8)) == [3, 5]


def test_order_within_a_batch_survives_a_restart() -> None:
    rig = Rig(capacity_bytes=100_000)
    namespace = rig.namespace()
    rig.put(namespace, [1, 2, 3, 4])
    rig.restart()
    rig.core.update([rig.core.eviction(2000)])
    assert rig.stored(namespace, [1, 2, 3, 4]) == [1, 2]


def test_uses_are_recorded_in_turns(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.blocks.LAST_USE_BATCH_BLOCKS", 4)
    namespace = rig.namespace()
    rig.put(namespace, range(10))
    rig.advance(1)
    rig.match(namespace, range(10))
    now = rig.clock.time_ns()
    rig.call(m.RemoveBlocks(namespace, keys([0])))
    left = [rig.core.update([rig.core.persist_uses])[0] for _ in range(3)]
    assert left == [6, 2, 0]
    recorded = [records.unpack_block(v) for v in rig.dump(records.BLOCK).values()]
    assert len(recorded) == 9 and all(block.last_use_ns == now for block in recorded)


# --- the policy seam


@pytest.fixture(params=[LruPolicy])
def policy(request: pytest.FixtureRequest) -> CachePolicy:
    return request.param()


def test_policy_conformance(policy: CachePolicy) -> None:
    """What every policy promises, whatever its order."""
    assert policy.victims(10, 10) == [] and len(policy) == 0
    sizes = {inode: 10 + inode % 3 for inode in range(1, 21)}
    policy.inserted(list(sizes.items()))
    policy.used([3, 4, 5])
    assert len(policy) == 20
    for needed in (1, 35, 100, 10_000):
        chosen = policy.victims(needed, 100)
        assert len(set(chosen)) == len(chosen) and set(chosen) <= set(sizes)
        enough = sum(sizes[inode] for inode in chosen) >= needed
        assert enough or len(chosen) == 20
        assert policy.victims(needed, 100) == chosen, "asking changes nothing"
    assert len(policy.victims(10_000, 7)) == 7
    some = np.array([2, 3, 9, 12])
    order = [inode for inode in policy.victims(10_000, 100) if inode in some]
    for count in range(1, 5):
        needed = sum(sizes[inode] for inode in order[:count])
        assert policy.victims_among(some, needed) == order[:count]
    assert policy.victims_among(some, 10_000) == order
    for inode in policy.victims(50, 100):
        policy.removed(inode)
        del sizes[inode]
    assert len(policy) == len(sizes)
    assert set(policy.victims(10_000, 100)) == set(sizes)


def test_the_oldest_among_many() -> None:
    """More than are sorted, with a few bytes wanted and with almost all."""
    policy = LruPolicy()
    sizes = {number: 1 + number % 7 for number in range(1, 20_001)}
    policy.inserted(list(sizes.items()))
    policy.used(list(range(5000, 9000, 3)))
    some = np.array([number for number in sizes if number % 2])
    order = [number for number in policy.victims(10**9, 10**9) if number % 2]
    for needed in (1, 1000, 10_000, sum(sizes.values()) // 3, 10**9):
        chosen = policy.victims_among(some, needed)
        assert chosen == order[: len(chosen)]
        freed = sum(sizes[number] for number in chosen)
        assert len(chosen) == len(some) or freed >= needed > freed - sizes[chosen[-1]]


def test_lru_order() -> None:
    policy = LruPolicy()
    policy.inserted([(1, 1), (2, 1), (3, 1)])
    policy.inserted([(4, 1)])
    assert policy.victims(10, 10) == [3, 2, 1, 4]
    policy.used([3, 1])
    assert policy.victims(10, 10) == [2, 4, 1, 3]
