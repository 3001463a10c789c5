"""Two servers on one store: each follows what the other commits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvfs_base import errors as e
from kvfs_metadata import limits, records
from kvfs_metadata import messages as m
from kvfs_metadata.core import MetadataCore
from t2_services.metadata_rig import Rig, key, keys

CAPACITY = 60_000


class Pair:
    """Two cores. What one commits, the other is told after the commit."""

    def __init__(self, told: Callable[[dict[bytes, bytes | None]], Any] = dict) -> None:
        self.rig = Rig(capacity_bytes=CAPACITY, targets=2)
        self.namespace = self.rig.namespace()
        self.rig.put(self.namespace, [1000])  # so that the second gives other numbers
        self.cores = [self.rig.core, MetadataCore(self.rig.engine, self.rig.clock, self.rig.config)]
        self._told = told
        self._writes: list[dict[bytes, bytes | None]] = []
        self.rig.engine.before_commit = self._writes.append

    def on(self, server: int) -> Rig:
        """The rig with its calls going to one of the two. What was called before is told first."""
        self.tell()
        self._server = server
        self.rig.core = self.cores[server]
        return self.rig

    def tell(self) -> None:
        writes, self._writes = self._writes, []
        self.rig.engine.before_commit = self._writes.append
        for group in writes:
            self.cores[1 - self._server].blocks.apply(self._told(group))

    def record_uses(self) -> None:
        while self.rig.core.unrecorded_uses:
            self.rig.core.update([self.rig.core.persist_uses])

    def check_equal(self) -> None:
        self.tell()
        one, other = (state(core) for core in self.cores)
        assert one == other
        fresh = MetadataCore(self.rig.engine, self.rig.clock, self.rig.config)
        self._writes.clear()  # of its start
        assert state(fresh) == one


def state(core: MetadataCore) -> dict[str, Any]:
    """Everything that must be the same in every server."""
    index = core.index
    statistics = core.blocks.statistics()
    return {
        "blocks": {inode: index.by_inode[inode] for inode in sorted(index.by_inode)},
        "namespaces": {
            inode: (
                namespace.path,
                namespace.layout,
                namespace.block_bytes,
                {name: namespace.blocks[name].inode for name in sorted(namespace.blocks)},
                [block.key for block in namespace.listing.page(b"", 10_000)],
            )
            for inode, namespace in sorted(index.namespaces.items())
        },
        "paths": {path: namespace.inode for path, namespace in sorted(index.by_path.items())},
        "policy": sorted(order(core)),
        "unrecorded": index.touched_count,
        "sizes": {
            name: statistics[name]
            for name in ("blocks", "block_bytes", "prepared_batches", "prepared_bytes")
        },
        "prepared": {number: batch.record for number, batch in core.blocks._prepared.items()},
        "committed": set(core.blocks._committed),
    }


def order(core: MetadataCore) -> list[int]:
    """Inodes as they would be evicted."""
    victims = core.index.policy.victims(10**12, 10**6)
    return [core.index.table.block(row).inode for row in victims]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_batches_are_followed(pair: Pair) -> None:
    batch = pair.on(0).prepare(pair.namespace, [1, 2, 3])
    dropped = pair.rig.prepare(pair.namespace, [4])
    pair.check_equal()
    pair.on(1).commit(batch)
    pair.rig.call(m.AbortBlocks(dropped.batch_id))
    assert pair.rig.match(pair.namespace, [1, 2, 3]) == 3
    pair.record_uses()
    pair.check_equal()
    pair.on(0).commit(batch)  # repeated at the other: it is known there
    assert pair.rig.match(pair.namespace, [1, 2, 3, 4]) == 3
    with pytest.raises(e.PrepareExpired):
        pair.rig.commit(dropped)


def test_a_key_that_was_removed_and_stored_again_is_followed(pair: Pair) -> None:
    pair.on(0).put(pair.namespace, [1, 2])
    pair.on(1)
    pair.on(0).call(m.RemoveBlocks(pair.namespace, keys([2])))
    pair.rig.put(pair.namespace, [2, 3])
    one: dict[bytes, bytes | None] = {}
    for group in pair._writes:
        one |= group
    # As one change, and in the order of keys, which has the new block before the old one is gone.
    pair._writes[:] = [dict(sorted(one.items(), reverse=True))]
    pair.check_equal()


def test_namespaces_are_followed(pair: Pair) -> None:
    made = pair.on(0).namespace("other/model")
    pair.rig.put(made, [1, 2])
    assert pair.on(1).match(made, [1, 2]) == 2
    assert pair.rig.namespace("other/model") == made
    pair.record_uses()
    pair.check_equal()
    pair.rig.call(m.RemoveBlocks(made, keys([1, 2])))
    pair.rig.call(m.Rmdir(pair.rig.resolve(b"/kv/other").inode, b"model"))
    pair.check_equal()
    with pytest.raises(e.InodeStale):
        pair.on(0).match(made, [1])


def test_recency_is_followed(pair: Pair) -> None:
    for name in range(4):
        pair.on(name % 2).put(pair.namespace, [2 * name, 2 * name + 1])
        pair.rig.advance(1)
    pair.tell()
    assert order(pair.cores[0]) == order(pair.cores[1])
    pair.on(1).match(pair.namespace, [2, 3])
    pair.record_uses()
    pair.check_equal()
    assert order(pair.cores[0]) == order(pair.cores[1])
    newest = pair.cores[0].index.namespaces[pair.namespace].blocks[key(2)].inode
    assert order(pair.cores[0])[-1] == newest, "the head of the prefix goes last"


def test_a_later_use_here_is_kept(pair: Pair) -> None:
    pair.on(0).put(pair.namespace, [1])
    pair.on(1)
    pair.rig.advance(1)
    pair.on(0).match(pair.namespace, [1])
    first = pair.rig.clock.time_ns()
    pair.on(1).advance(1)
    pair.on(1).match(pair.namespace, [1])
    second = pair.rig.clock.time_ns()
    pair.on(0)
    pair.record_uses()
    pair.on(1)
    block = pair.cores[1].index.namespaces[pair.namespace].blocks[key(1)]
    assert first < second == block.last_use_ns
    assert pair.cores[1].unrecorded_uses == 1
    pair.record_uses()
    pair.check_equal()


def test_what_is_known_changes_nothing(pair: Pair) -> None:
    pair.on(0).put(pair.namespace, [1, 2])
    pair.rig.prepare(pair.namespace, [3])
    before = state(pair.rig.core)
    pair.rig.core.blocks.apply(dict(pair.rig.dump()))
    assert state(pair.rig.core) == before
    gone = {records.block_key(10**9): None, records.namespace_key(10**9): None}
    gone |= {records.prepared_key(10**9): None, records.committed_key(10**9): None}
    pair.rig.core.blocks.apply(gone)
    assert state(pair.rig.core) == before


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("told", [dict, lambda writes: dict(sorted(writes.items()))])
def test_random_changes_on_both(
    seed: int, told: Callable[[dict[bytes, bytes | None]], Any]
) -> None:
    chance = random.Random(seed)
    pair = Pair(told)
    batches: list[m.PreparedBatch] = []
    namespaces = [pair.namespace]
    for _ in range(120):
        rig = pair.on(chance.randrange(2))
        namespace = chance.choice(namespaces)
        names = chance.sample(range(40), chance.randrange(1, 8))
        step = chance.randrange(8)
        if step < 2:
            batches.append(rig.prepare(namespace, names))
        elif step < 4 and batches:
            rig.commit(batches.pop(chance.randrange(len(batches))))
        elif step == 4 and batches:
            rig.call(m.AbortBlocks(batches.pop().batch_id))
        elif step == 5:
            rig.call(m.RemoveBlocks(namespace, keys(names)))
        elif step == 6:
            rig.match(namespace, names)
        elif len(namespaces) < 4:
            namespaces.append(rig.namespace(f"more/{len(namespaces)}"))
        else:
            rig.core.update([rig.core.eviction(3000)])
        pair.record_uses()
        rig.clock.advance(chance.random())
        pair.check_equal()
        for server in range(2):
            pair.on(server).advance(0)  # the targets are still there
    pair.on(0).clock.advance(limits.PREPARE_SECONDS_MAX + 1)
    pair.rig.work()
    pair.check_equal()
