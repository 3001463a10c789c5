"""Blocks: match, put in two steps, removal; and all of it against a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.types import BlockInfo, KVLayout
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from t2_services.metadata_rig import LAYOUT, Rig, all_removals, evict, key, keys


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=3)


@pytest.fixture
def namespace(rig: Rig) -> int:
    return rig.namespace()


# --- namespaces


def test_opening_a_namespace(rig: Rig) -> None:
    with pytest.raises(e.EntryNotFound):
        rig.call(m.OpenNamespace("a/b"))
    with pytest.raises(e.InvalidRequest):
        rig.call(m.OpenNamespace("a/b", create=True))
    made = rig.call(m.OpenNamespace("a/b", LAYOUT, create=True))
    for again in (
        m.OpenNamespace("a/b"),
        m.OpenNamespace("/a//b/", LAYOUT),
        m.OpenNamespace("a/b", LAYOUT, create=True),
        m.OpenNamespace("a/b", create=True),
    ):
        assert rig.call(again) == made
    other = KVLayout(block_tokens=32, model="test", dtype="bfloat16")
    for create in (False, True):
        with pytest.raises(e.LayoutMismatch) as caught:
            rig.call(m.OpenNamespace("a/b", other, create=create))
        assert "block_tokens" in caught.value.detail and "dtype" in caught.value.detail
    assert not rig.resolve(b"/kv/a").is_namespace
    rig.restart()
    assert rig.call(m.OpenNamespace("a/b", LAYOUT)) == made


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", e.InvalidRequest),
        ("/", e.InvalidRequest),
        ("a/../b", e.InvalidRequest),
        ("a/b/c", e.NotADirectory),  # below a namespace
        ("plain", e.EntryExists),
        ("file/x", e.NotADirectory),
        ("x/" + "y" * 256, e.NameTooLong),
        ("/".join("abcdefghi"), e.InvalidRequest),
    ],
)
def test_paths_that_cannot_be_namespaces(rig: Rig, path: str, error: type[e.KvfsError]) -> None:
    rig.namespace("a/b")
    kv = rig.resolve(b"/kv").inode
    rig.mkdir(kv, b"plain")
    rig.make(kv, b"file")
    before = rig.dump(records.ENTRY)
    with pytest.raises(error):
        rig.namespace(path)
    assert rig.dump(records.ENTRY) == before, "nothing is left of a path that failed half-way"


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_layout_makes_sense(rig: Rig, tokens: int) -> None:
    with pytest.raises(e.InvalidRequest):
        rig.namespace("a/b", KVLayout(block_tokens=tokens))


def test_an_empty_namespace_can_be_removed(rig: Rig) -> None:
    namespace = rig.namespace("a/b")
    batch = rig.prepare(namespace, [1])
    rig.call(m.Rmdir(rig.resolve(b"/kv/a").inode, b"b"))
    for request in (
        m.MatchBlocks(namespace, keys([1])),
        m.LookupBlocks(namespace, keys([1])),
        m.PrepareBlocks(namespace, keys([1]), (1,)),
        m.RemoveBlocks(namespace, keys([1])),
    ):
        with pytest.raises(e.InodeStale):
            rig.call(request)
    with pytest.raises(e.PrepareExpired):
        rig.commit(batch)
    assert rig.namespace("a/b") != namespace


# --- put and match


def test_blocks_appear_at_commit(rig: Rig, namespace: int) -> None:
    batch = rig.prepare(namespace, [1, 2, 3])
    assert batch.batch_id and all(batch.blocks)
    assert rig.match(namespace, [1, 2, 3]) == 0
    assert rig.dump(records.BLOCK) == {}
    rig.commit(batch)
    assert rig.match(namespace, [1, 2, 3]) == 3
    found = rig.call(m.LookupBlocks(namespace, keys([3, 9, 1])))
    prepared = [block for block in batch.blocks if block]
    assert found == (
        BlockInfo(prepared[2].inode, 1000, 2, prepared[2].chain),
        None,
        BlockInfo(prepared[0].inode, 1000, 0, prepared[0].chain),
    )
    assert sorted(block.chain for block in prepared) == [1, 2, 3]


def test_match_is_the_gapless_prefix(rig: Rig, namespace: int) -> None:
    rig.put(namespace, [1, 2, 4])
    assert rig.match(namespace, [1, 2, 3, 4]) == 2
    assert rig.match(namespace, [3, 1, 2]) == 0
    assert rig.match(namespace, []) == 0
    other = rig.namespace("other/model")
    assert rig.match(other, [1, 2]) == 0


def test_what_is_stored_is_not_prepared_again(rig: Rig, namespace: int) -> None:
    rig.put(namespace, [1, 2])
    batch = rig.prepare(namespace, [1, 3, 2, 4])
    assert [block is None for block in batch.blocks] == [True, False, True, False]
    rig.commit(batch)
    assert rig.match(namespace, [1, 2, 3, 4]) == 4
    assert rig.prepare(namespace, [1, 2, 3, 4]) == m.PreparedBatch(0, (None,) * 4)
    assert rig.statistics()["prepared_batches"] == 0


def test_a_key_named_twice_is_written_once(rig: Rig, namespace: int) -> None:
    batch = rig.prepare(namespace, [1, 2, 1])
    assert [block is None for block in batch.blocks] == [False, False, True]
    rig.commit(batch)
    assert rig.match(namespace, [1, 2, 1]) == 3


def test_the_first_commit_of_a_key_wins(rig: Rig, namespace: int) -> None:
    first, second = rig.prepare(namespace, [1, 2]), rig.prepare(namespace, [2, 3])
    rig.commit(second)
    rig.commit(first)
    winner, loser = second.blocks[0], first.blocks[1]
    assert winner and loser
    found = rig.call(m.LookupBlocks(namespace, keys([1, 2, 3])))
    assert all(found) and found[1].inode == winner.inode
    assert [i for _, i in rig.removals(f"target-{loser.chain}")] == [loser.inode]
    assert rig.statistics()["duplicate_blocks"] == 1
    assert rig.statistics()["block_bytes"] == 3000


def test_commit_can_be_repeated(rig: Rig, namespace: int) -> None:
    batch = rig.put(namespace, [1, 2])
    rig.commit(batch)
    rig.call(m.RemoveBlocks(namespace, keys([1])))
    rig.commit(batch)
    assert rig.stored(namespace, [1, 2]) == [2], "a repeated commit brings nothing back"
    rig.restart()
    rig.commit(batch)
    rig.call(m.CommitBlocks(0, ()))
    with pytest.raises(e.PrepareExpired):
        rig.call(m.CommitBlocks(999, (1,)))


def test_memory_of_commits_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.blocks.COMMITTED_BATCHES_MAX", 3)
    namespace = rig.namespace()
    batches = [rig.put(namespace, [n]) for n in range(5)]
    assert len(rig.dump(records.COMMITTED)) == 3
    for batch in batches[2:]:
        rig.commit(batch)
    with pytest.raises(e.PrepareExpired):
        rig.commit(batches[0])


def test_commit_checks_its_batch(rig: Rig, namespace: int) -> None:
    batch = rig.prepare(namespace, [1, 2])
    for wrong in ((), (1,), (1, 2, 3)):
        with pytest.raises(e.InvalidRequest):
            rig.call(m.CommitBlocks(batch.batch_id, wrong))
    rig.commit(batch)
    assert rig.match(namespace, [1, 2]) == 2


@pytest.mark.parametrize(
    ("data", "sizes", "error"),
    [
        (b"x" * 31, (1,), e.InvalidRequest),
        (b"x" * 32, (), e.InvalidRequest),
        (b"x" * 32, (1, 2), e.InvalidRequest),
        (b"x" * 32, (0,), e.LimitExceeded),
        (b"x" * 32, (limits.BLOCK_BYTES_MAX + 1,), e.LimitExceeded),
    ],
)
def test_prepare_checks_its_arguments(
    rig: Rig, namespace: int, data: bytes, sizes: tuple[int, ...], error: type[e.KvfsError]
) -> None:
    with pytest.raises(error):
        rig.call(m.PrepareBlocks(namespace, data, sizes))


def test_other_requests_check_their_keys(rig: Rig, namespace: int) -> None:
    for request in (
        m.MatchBlocks(namespace, b"x" * 33),
        m.LookupBlocks(namespace, b"x"),
        m.RemoveBlocks(namespace, b"x" * 65),
        m.RemoveBlocks(namespace, b"x" * 64, (1,)),
        m.RemoveBlocks(namespace, b"x" * 64, (1, 2, 3)),
    ):
        with pytest.raises(e.InvalidRequest):
            rig.call(request)
    assert rig.call(m.PrepareBlocks(namespace, b"", ())) == m.PreparedBatch(0, ())


def test_a_layout_bounds_its_blocks(rig: Rig) -> None:
    namespace = rig.namespace("a/b", KVLayout(block_tokens=16, block_bytes=4096))
    rig.put(namespace, [1], size=4096)
    rig.put(namespace, [2], size=10)  # the last block of a prompt may be shorter
    with pytest.raises(e.LimitExceeded):
        rig.prepare(namespace, [3], size=4097)


def test_no_target_no_block() -> None:
    rig = Rig(targets=0)
    namespace = rig.namespace()
    with pytest.raises(e.NoTarget):
        rig.prepare(namespace, [1])


def test_batches_at_work_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.blocks.PREPARED_BATCHES_MAX", 2)
    namespace = rig.namespace()
    first = rig.prepare(namespace, [1])
    rig.prepare(namespace, [2])
    with pytest.raises(e.ServerBusy):
        rig.prepare(namespace, [3])
    rig.commit(first)
    rig.prepare(namespace, [3])


# --- abort, expiry, removal


def inodes_of(batch: m.PreparedBatch) -> list[int]:
    return [block.inode for block in batch.blocks if block]


def test_abort(rig: Rig, namespace: int) -> None:
    batch = rig.prepare(namespace, [1, 2])
    for _ in range(2):  # the second finds nothing
        rig.call(m.AbortBlocks(batch.batch_id))
    assert all_removals(rig) == inodes_of(batch)
    with pytest.raises(e.PrepareExpired):
        rig.commit(batch)
    statistics = rig.statistics()
    assert statistics["prepared_bytes"] == 0 and statistics["aborted_batches"] == 1
    assert rig.dump(records.PREPARED) == {}


def test_a_dead_writers_batch_expires(rig: Rig, namespace: int) -> None:
    batch = rig.prepare(namespace, [1, 2])
    rig.work(metadata_limits.PREPARE_SECONDS_MAX - 0.001)
    assert rig.statistics()["prepared_batches"] == 1
    rig.work(0.002)
    assert rig.statistics()["prepared_batches"] == 0
    assert rig.statistics()["expired_batches"] == 1
    assert all_removals(rig) == inodes_of(batch)
    with pytest.raises(e.PrepareExpired):
        rig.commit(batch)
    assert rig.match(namespace, [1]) == 0


def test_prepared_batches_survive_a_restart(rig: Rig, namespace: int) -> None:
    first, second = rig.prepare(namespace, [1]), rig.prepare(namespace, [2, 3], size=50)
    rig.restart()
    assert rig.statistics()["prepared_bytes"] == 1100
    rig.commit(first)
    assert rig.match(namespace, [1]) == 1
    rig.work(metadata_limits.PREPARE_SECONDS_MAX + 1)
    assert rig.dump(records.PREPARED) == {}
    assert all_removals(rig) == inodes_of(second)


def test_a_clock_set_back_does_not_keep_batches(rig: Rig, namespace: int) -> None:
    rig.prepare(namespace, [1])
    rig.clock._start_ns -= 10**15
    rig.restart()
    rig.work(metadata_limits.PREPARE_SECONDS_MAX + 1)
    assert rig.statistics()["prepared_batches"] == 0


def test_many_expire_in_turns(rig: Rig, namespace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.blocks.BATCH_BLOCKS_MAX", 4)
    for n in range(5):
        rig.prepare(namespace, [10 * n + i for i in range(3)])
    rig.clock.advance(metadata_limits.PREPARE_SECONDS_MAX + 1)
    rig.core.update(rig.core.due())
    assert rig.statistics()["prepared_batches"] == 3
    rig.work()
    assert rig.statistics()["prepared_batches"] == 0


def test_removing(rig: Rig, namespace: int) -> None:
    batch = rig.put(namespace, [1, 2, 3])
    assert rig.call(m.RemoveBlocks(namespace, keys([1, 9, 3]))) == 2
    assert rig.stored(namespace, [1, 2, 3]) == [2]
    inodes = inodes_of(batch)
    assert all_removals(rig) == [inodes[0], inodes[2]]
    statistics = rig.statistics()
    assert statistics["removed_blocks"] == 2 and statistics["corrupt_blocks"] == 0
    rig.restart()
    assert rig.stored(namespace, [1, 2, 3]) == [2]


def test_a_corrupt_block_is_removed_only_in_that_generation(rig: Rig, namespace: int) -> None:
    old = inodes_of(rig.put(namespace, [1]))[0]
    assert rig.call(m.RemoveBlocks(namespace, keys([1]), (old,))) == 1
    new = inodes_of(rig.put(namespace, [1]))[0]
    assert rig.call(m.RemoveBlocks(namespace, keys([1]), (old,))) == 0
    assert rig.match(namespace, [1]) == 1 and new != old
    assert rig.statistics()["corrupt_blocks"] == 1


# --- against a model


class Cache(RuleBasedStateMachine):
    """Random puts, removals, evictions and restarts against sets of names."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(capacity_bytes=12_000, targets=2)
        self.stored: set[int] = set()
        self.batches: list[tuple[m.PreparedBatch, list[int]]] = []

    @initialize()
    def open(self) -> None:
        self.namespace = self.rig.namespace()

    @rule(names=st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True))
    def prepare(self, names: list[int]) -> None:
        try:
            batch = self.rig.prepare(self.namespace, names)
        except e.CacheFull:
            prepared = sum(len(inodes_of(b)) for b, _ in self.batches)
            assert prepared + len(names) + len(self.stored) > 12
            return
        self.sync_evictions()
        absent = [n for n, block in zip(names, batch.blocks, strict=True) if block]
        if absent:
            self.batches.append((batch, absent))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        batch, names = self.batches.pop(data.draw(st.integers(0, len(self.batches) - 1)))
        self.rig.commit(batch)
        self.stored |= set(names)
        if data.draw(st.booleans()):
            self.rig.commit(batch)

    @precondition(lambda self: self.batches)
    @rule()
    def abort(self) -> None:
        self.rig.call(m.AbortBlocks(self.batches.pop()[0].batch_id))

    @rule(names=st.lists(st.integers(0, 30), max_size=5, unique=True))
    def remove(self, names: list[int]) -> None:
        removed = self.rig.call(m.RemoveBlocks(self.namespace, keys(names)))
        assert removed == len(self.stored & set(names))
        self.stored -= set(names)

    @rule(names=st.lists(st.integers(0, 30), max_size=8, unique=True))
    def match(self, names: list[int]) -> None:
        expected = next((i for i, n in enumerate(names) if n not in self.stored), len(names))
        assert self.rig.match(self.namespace, names) == expected

    @rule()
    def evict(self) -> None:
        evict(self.rig)
        self.sync_evictions()

    @rule(limit=st.integers(1, 6))
    def list(self, limit: int) -> None:
        listed: list[bytes] = []
        more = True
        while more:
            after = listed[-1] if listed else b""
            page = self.rig.call(m.ReadDir(self.namespace, after, limit))
            listed += [name for name, _ in page.entries]
            more = page.more
        assert listed == sorted(key(name).hex().encode() for name in self.stored)

    @rule()
    def restart(self) -> None:
        self.rig.restart()
        self.rig.advance(0)

    @rule()
    def expire(self) -> None:
        self.rig.work(metadata_limits.PREPARE_SECONDS_MAX + 1)
        self.rig.advance(0)
        self.batches.clear()

    def sync_evictions(self) -> None:
        left = set(self.rig.stored(self.namespace, range(31)))
        assert left <= self.stored, "an eviction brings nothing"
        self.stored = left

    @invariant()
    def memory_store_and_model_agree(self) -> None:
        index = self.rig.core.index
        assert self.rig.stored(self.namespace, range(31)) == sorted(self.stored)
        persisted = self.rig.dump(records.BLOCK)
        assert {records.unpack_block(v).key for v in persisted.values()} == {
            key(n) for n in self.stored
        }
        assert {records.number_at(k) for k in persisted} == set(index.by_inode)
        assert index.block_bytes == 1000 * len(self.stored)
        prepared = sum(len(inodes_of(b)) for b, _ in self.batches)
        assert self.rig.core.blocks.prepared_bytes == 1000 * prepared
        assert len(self.rig.dump(records.PREPARED)) == len(self.batches)
        assert index.block_bytes + 1000 * prepared <= 12_000
        assert len(index.policy) == len(index.by_inode)

    @invariant()
    def nothing_live_is_removed(self) -> None:
        """Every removal's inode is neither a block nor part of a batch."""
        removed = {records.unpack_removal(v).inode for v in self.rig.dump(records.REMOVAL).values()}
        live = set(self.rig.core.index.by_inode)
        live.update(i for b, _ in self.batches for i in inodes_of(b))
        assert not removed & live


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_key_helpers_agree() -> None:
    names: Sequence[int] = [1, 2]
    assert keys(names) == key(1) + key(2)
