"""Random namespaces, random damage: one repair leaves a store without findings, a service that
starts, and everything that was not damaged as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import msgspec
import pytest

from fsck_world import CHUNK, World
from kvfs.fsck import State, check
from kvfs_base.errors import KvfsError
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.check.findings import Kind
from t2_services.metadata_rig import ROOT, key, keys

ROUNDS = 60
UNREPAIRABLE = {Kind.RECORD_DAMAGED, Kind.FILE_DAMAGED, Kind.CHAIN_BROKEN}


class Vandal:
    """Does things to a world: first what users do, then what nobody should."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.directories = [""]
        self.files: list[str] = []
        self.names = 0

    def live(self, steps: int) -> None:
        actions: list[Callable[[], object]] = [
            self._mkdir,
            self._file,
            self._file,
            self._link,
            self._rename,
            self._unlink,
            self._blocks,
            self._remove_blocks,
            self._xattr,
        ]
        for _ in range(steps):
            with contextlib.suppress(KvfsError, IndexError, KeyError):
                self.rng.choice(actions)()
            self.world.rig.clock.advance(0.001)
        self.world.settle()

    def _new(self) -> str:
        self.names += 1
        above = self.rng.choice(self.directories)
        return f"{above}/n{self.names}" if above else f"n{self.names}"

    def _mkdir(self) -> None:
        path = self._new()
        self.world.directory(path)
        self.directories.append(path)

    def _file(self) -> None:
        path = self._new()
        size = self.rng.choice([0, 1, 100, CHUNK, CHUNK + 1, 4 * CHUNK])
        self.world.file(path, size, sparse=self.rng.random() < 0.2)
        self.files.append(path)

    def _place(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.rpartition("/")
        return (self.world.inodes[above] if above else ROOT), name.encode()

    def _link(self) -> None:
        parent, name = self._place(self._new())
        file = self.rng.choice(self.files)
        self.world.rig.call(m.Link(self.world.inodes[file], parent, name))

    def _rename(self) -> None:
        parent, name = self._place(self.rng.choice(self.files))
        new_parent, new_name = self._place(self._new())
        self.world.rig.call(m.Rename(parent, name, new_parent, new_name))

    def _unlink(self) -> None:
        file = self.rng.choice(self.files)
        if self.rng.random() < 0.5:
            self.world.rig.call(m.OpenInode(self.world.inodes[file]))
        self.world.rig.call(m.Unlink(*self._place(file)))

    def _blocks(self) -> None:
        self.names += 10
        self.world.blocks(
            self.rng.choice(["t/m", "t/n", "u/m"]), range(self.names - 10, self.names)
        )

    def _remove_blocks(self) -> None:
        names = [self.rng.randrange(self.names + 1) for _ in range(3)]
        self.world.rig.call(m.RemoveBlocks(self.world.inodes["t/m"], keys(names)))

    def _xattr(self) -> None:
        file = self.world.inodes[self.rng.choice(self.files)]
        self.world.rig.call(m.SetXattr(file, b"user.x", b"value"))

    # --- damage

    def damage(self, steps: int) -> None:
        for _ in range(steps):
            with contextlib.suppress(IndexError):
                self.rng.choice(
                    [
                        self._delete_record,
                        self._delete_record,
                        self._wrong_inode,
                        self._redirect_entry,
                        self._delete_chunk,
                        self._change_chunk,
                        self._plant_chunk,
                        self._wrong_block,
                    ]
                )()

    def _record(self, *prefixes: bytes) -> bytes:
        return self.rng.choice([k for k in sorted(self.world.dump()) if k[:4] in prefixes])

    def _delete_record(self) -> None:
        record = self._record(
            records.INODE,
            records.ENTRY,
            records.ENTRY,
            records.ORPHAN,
            records.NAMESPACE,
            records.BLOCK,
        )
        self.world.put(record, None)

    def _wrong_inode(self) -> None:
        inode = records.number_at(self._record(records.INODE))
        field = self.rng.choice(["nlink", "parent", "is_namespace"])
        is_dir = records.decode_inode(self.world.get(records.inode_key(inode))).is_dir
        if field == "nlink" or (field == "parent" and is_dir):
            self.world.change_inode(inode, **{field: self.rng.randrange(40)})
        elif is_dir:
            self.world.change_inode(inode, is_namespace=self.rng.random() < 0.5)

    def _redirect_entry(self) -> None:
        entry, inode = self._record(records.ENTRY), records.number_at(self._record(records.INODE))
        self.world.put(entry, records.u64(inode))

    def _wrong_block(self) -> None:
        record = self._record(records.BLOCK)
        other = records.unpack_block(self.world.get(self._record(records.BLOCK)))
        block = records.unpack_block(self.world.get(record))
        changes = [{"namespace": 5}, {"chain": 99}, {"size": 7}, {"key": other.key}]
        changed = block._replace(**self.rng.choice(changes))  # type: ignore[arg-type]
        self.world.put(record, records.pack_block(changed))

    def _chunk(self) -> tuple[dict[ChunkId, ChunkInfo | str], ChunkId]:
        held = self.world.targets.chunks[self.rng.choice([1, 2, 3])]
        return held, self.rng.choice(sorted(held))

    def _delete_chunk(self) -> None:
        held, chunk = self._chunk()
        del held[chunk]

    def _change_chunk(self) -> None:
        held, chunk = self._chunk()
        info = held[chunk]
        if isinstance(info, ChunkInfo) and info.length:
            held[chunk] = msgspec.structs.replace(info, length=info.length - 1)

    def _plant_chunk(self) -> None:
        inode = self.rng.choice([3, 9000, records.number_at(self._record(records.INODE))])
        number = self.rng.choice([0, 0, 1, 500])
        info = ChunkInfo(inode, number, 0, ChunkState.SEALED, 10, 1, key(1))
        held = self.world.targets.chunks[self.rng.choice([1, 2, 3])]
        held.setdefault(info.chunk, info)


def in_use(world: World) -> set[tuple[int, ChunkId]]:
    """Chunks that the metadata speaks of, where it says, and which are as it says."""
    found = set()
    for record, value in world.dump().items():
        inode = records.number_at(record)
        if record[:4] == records.BLOCK:
            block = records.unpack_block(value)
            if block.chain in (1, 2, 3):
                found.add((world.target_of(block.chain), ChunkId(inode, 0)))
        elif record[:4] == records.INODE:
            layout = records.decode_inode(value).layout
            numbers = [*range(8), 500] if layout is not None else []
            for number in numbers:
                assert layout is not None
                found.add((world.target_of(layout.chain_of(number)), ChunkId(inode, number)))
    return {(target, chunk) for target, chunk in found if chunk in world.targets.chunks[target]}


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_one_repair_is_enough_and_touches_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    world = World("store")
    vandal = Vandal(world, rng)
    vandal.live(60)
    assert world.findings(verify=True) == []
    vandal.damage(rng.choice([1, 2, 5, 20]))

    before = world.dump()
    report = world.repair(zero_holes=True)
    touched = {one.finding.inode for one in report.outcomes}
    left = [one.finding for one in report.outcomes if one.state is not State.REPAIRED]
    assert {one.kind for one in left} <= UNREPAIRABLE
    again = [one for one in world.findings() if one.kind not in UNREPAIRABLE]
    assert again == [], f"{len(report.outcomes)} findings before"

    used = in_use(world)
    world.settle()
    assert in_use(world) == used, "a removal took what is in use"
    after = world.dump()
    for record, value in before.items():
        number = records.number_at(record)
        if record[:4] == records.BLOCK and number not in touched:
            assert after[record] == value
        if record[:4] == records.INODE:
            was, now = records.decode_inode(value), records.decode_inode(after[record])
            assert (now.size, now.mode, now.layout) == (was.size, was.mode, was.layout)
            assert was.is_dir or number in touched or now == was
    world.rig.restart()
    world.rig.advance(31)
    world.rig.work(31)
    world.settle()
    found = check(world.reader(), world.targets.listings())
    assert [one for one in found if one.kind not in UNREPAIRABLE] == []
