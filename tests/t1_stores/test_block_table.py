"""The table of blocks, its two indexes, and the order of eviction, against plain dicts."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict

import numpy as np
import pytest

from kvfs_base.types import KVLayout
from kvfs_metadata import block_table, records
from kvfs_metadata.block_index import BlockIndex, KVNamespace
from kvfs_metadata.block_table import Block, InodeRows
from kvfs_metadata.engines.engine import scan
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.policy import LruPolicy
from kvfs_metadata.records import NamespaceRecord

LAYOUT = KVLayout(block_tokens=16)
NAMESPACES = (5, 6, 2**40)


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def block(inode: int, name: int, namespace: int = 5, size: int = 1000) -> Block:
    return Block(inode, namespace, key(name), size, inode % 7, 1, inode * 10, inode * 10)


def store_of(blocks: list[Block]) -> MemoryEngine:
    engine = MemoryEngine()
    values = {records.block_key(b.inode): b.record() for b in blocks}
    for inode in NAMESPACES:
        record = NamespaceRecord(f"n/{inode}", LAYOUT)
        values[records.namespace_key(inode)] = records.encode(record)

    def write(kv: object) -> None:
        for name, value in values.items():
            kv.put(name, value)  # type: ignore[attr-defined]

    engine.update([write])
    return engine


def loaded(blocks: list[Block]) -> BlockIndex:
    index = BlockIndex(LruPolicy())
    store_of(blocks).view(index.load)
    return index


def check(index: BlockIndex, expected: dict[int, Block]) -> None:
    """Everything that an index is asked answers with these blocks and no others."""
    assert {inode: index.by_inode[inode] for inode in index.by_inode} == expected
    assert len(index.by_inode) == len(expected) == len(index.policy) == len(index.table)
    assert index.block_bytes == sum(b.size for b in expected.values())
    for namespace in index.namespaces.values():
        own = {b.key: b for b in expected.values() if b.namespace == namespace.inode}
        assert len(namespace.blocks) == len(own)
        assert namespace.block_bytes == sum(b.size for b in own.values())
        assert sorted(namespace.blocks) == sorted(own)
        names = [key(number) for number in range(60)]
        rows = namespace.find(names)
        for name, row in zip(names, rows, strict=True):
            found = None if row is None else index.table.block(row)
            assert found == own.get(name) == namespace.blocks.get(name)
            assert (name in namespace.blocks) == (name in own)
        # Last: what was asked for is found another way from then on.
        assert [b.key for b in namespace.listing.page(b"", 10**6)] == sorted(own)


def test_rows_by_inode_are_those_of_a_dict() -> None:
    chance = random.Random(1)
    rows, model = InodeRows(), dict[int, int]()
    numbers = [*range(100), 2**63 - 1, 2**40, 2**40 + 31, 2**40 + 32]
    for step in range(4000):
        inode = chance.choice(numbers)
        if inode in model:
            rows.drop(inode)
            del model[inode]
        else:
            rows.put(inode, step)
            model[inode] = step
        assert len(rows) == len(model) and (inode in rows) == (inode in model)
        asked = chance.choice(numbers)
        assert rows.get(asked) == model.get(asked)
    assert set(rows) == set(model)
    assert all(rows.get(inode) == model.get(inode) for inode in numbers)
    again = InodeRows()
    inodes = sorted(model)
    again.load(np.array(inodes, np.uint64))
    assert [again.get(inode) for inode in inodes] == list(range(len(inodes)))
    assert set(again) == set(model) and 77_777 not in again


def test_an_empty_store_is_loaded() -> None:
    check(loaded([]), {})


@pytest.mark.parametrize("collisions", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_changes_after_a_load(seed: int, collisions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are given again, keys come back, the same keys are in other namespaces; also if the
    hashes of all keys are the same, be it the highest there is."""
    if collisions:
        last = np.uint64(2**64 - 1)
        monkeypatch.setattr(
            block_table, "_hashes", lambda words, namespaces: np.full(len(words), last)
        )
    chance = random.Random(seed)
    model: dict[int, Block] = {}
    for inode in range(100, 160):
        one = block(inode, chance.randrange(60), chance.choice(NAMESPACES), chance.randrange(1, 99))
        if all((one.key, one.namespace) != (b.key, b.namespace) for b in model.values()):
            model[inode] = one
    index = loaded(list(model.values()))
    check(index, model)
    for inode in range(1000, 1060):
        for gone in chance.sample(sorted(model), min(2, len(model))):
            index.remove(model.pop(gone))
        new = block(inode, chance.randrange(60), chance.choice(NAMESPACES))
        if index.namespaces[new.namespace].blocks.get(new.key) is None:
            index.insert([new])
            model[inode] = new
        check(index, model)


def test_a_table_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_table, "ROWS_MIN", 16)
    index = loaded([block(inode, inode) for inode in range(20, 40)])
    blocks = [block(inode, inode) for inode in range(100, 5100)]
    index.insert(blocks[:3000])
    index.insert(blocks[3000:])
    assert [index.by_inode[b.inode] for b in blocks] == blocks
    assert index.by_inode[25] == block(25, 25)
    assert index.namespaces[5].find([b.key for b in blocks]) == list(range(20, 5020))


def test_blocks_are_loaded_in_the_order_of_their_use() -> None:
    uses = {10: 5, 11: 5, 12: 9, 13: 1, 14: 5}
    blocks = [Block(inode, 5, key(inode), 1, 0, 0, 0, use) for inode, use in uses.items()]
    index = loaded(blocks)
    order = [index.table.block(row).inode for row in index.policy.victims(99, 99)]
    assert order == [13, 14, 11, 10, 12]


def test_records_are_what_was_stored() -> None:
    blocks = [block(inode, inode, 2**40) for inode in range(20, 9000)]
    engine = store_of(blocks)
    index = BlockIndex(LruPolicy())
    engine.view(index.load)  # more than one page
    stored = dict(engine.view(lambda kv: list(scan(kv, records.BLOCK))))
    assert stored == {records.block_key(b.inode): b.record() for b in blocks}
    assert [index.by_inode[b.inode] for b in blocks] == blocks
    assert records.unpack_block(blocks[0].record()).key == blocks[0].key
    assert isinstance(index.namespaces[5], KVNamespace) and not index.namespaces[5].blocks


@pytest.mark.parametrize("seed", range(3))
def test_the_least_recently_used_go_first(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an OrderedDict, with so few candidates that they must be looked for again."""
    monkeypatch.setattr("kvfs_metadata.policy.CANDIDATES_MIN", 5)
    chance = random.Random(seed)
    policy, model = LruPolicy(), OrderedDict[int, int]()
    for _ in range(3000):
        free = [number for number in range(40) if number not in model]
        step = chance.randrange(4)
        if step == 0 and free:
            new = [(n, chance.randrange(1, 9)) for n in chance.sample(free, min(len(free), 4))]
            policy.inserted(new)
            model.update(reversed(new))
        elif step == 1 and model:
            used = chance.choices(list(model), k=5)
            policy.used(used)
            for number in reversed(used):
                model.move_to_end(number)
        elif step == 2 and model:
            gone = chance.choice(list(model))
            policy.removed(gone)
            del model[gone]
        needed, count = chance.randrange(60), chance.randrange(30)
        expected: list[int] = []
        freed = 0
        for number, size in model.items():
            if freed >= needed or len(expected) == count:
                break
            expected.append(number)
            freed += size
        assert policy.victims(needed, count) == expected
        assert len(policy) == len(model)
