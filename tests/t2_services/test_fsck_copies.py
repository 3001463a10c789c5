"""What a check makes of chains of several copies."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from fsck_world import World
from kvfs.fsck import State
from kvfs_base.cluster import Chain, GetClusterMap, Heartbeat, TargetReport
from kvfs_base.limits import CHAIN_CHUNK_BYTES
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.check.findings import Kind
from t2_services.metadata_rig import FILE, LAYOUT, TERABYTE, key, keys

CHUNK = CHAIN_CHUNK_BYTES


class ChainWorld(World):
    """A namespace with four blocks and a file of five chunks, of two copies each."""

    def __init__(self, mode: str = "service") -> None:
        super().__init__(mode)
        self.fill()
        for number in (1, 2, 3):
            report = TargetReport(f"target-{number}", TERABYTE, TERABYTE, True, 0)
            beat = Heartbeat("server-1", "host-1", None, None, (report,), host=f"host-{number}")
            self.rig.call(beat)
        namespace = self.rig.call(m.OpenNamespace("t/safe", LAYOUT, create=True, copies=2)).inode
        batch = self.rig.call(m.PrepareBlocks(namespace, keys(range(4)), (1000,) * 4))
        self.blocks_of = [block for block in batch.blocks if block]
        versions = {(b.chain, self.chain(b.chain).version) for b in self.blocks_of}
        self.rig.call(m.CommitBlocks(batch.batch_id, (0, 1, 2, 3), tuple(versions)))
        for place, block in enumerate(self.blocks_of):
            info = ChunkInfo(
                block.inode, 0, block.chain, ChunkState.SEALED, 1000, place, key(place)
            )
            self.put_copies(info)
        directory = self.directory("safe")
        self.rig.call(m.SetXattr(directory, b"user.kvfs.copies", b"2"))
        attr = self.rig.make(directory, b"f", FILE)
        self.rig.call(m.SetAttr(attr.inode, size=5 * CHUNK))
        assert attr.layout is not None
        self.file_inode, self.layout = attr.inode, attr.layout
        for number in range(5):
            chain = attr.layout.chain_of(number)
            info = ChunkInfo(attr.inode, number, chain, ChunkState.SEALED, CHUNK, 7, version=3)
            self.put_copies(info)

    def chain(self, chain_id: int) -> Chain:
        chains = self.rig.call(GetClusterMap()).chains
        found: Chain = next(chain for chain in chains if chain.chain_id == chain_id)
        return found

    def put_copies(self, info: ChunkInfo) -> None:
        for target_id in self.chain(info.chain).targets:
            self.targets.put(target_id, info)

    def block(self) -> tuple[Chain, ChunkId]:
        block = self.blocks_of[1]
        return self.chain(block.chain), ChunkId(block.inode, 0, block.chain)

    def file_chunk(self) -> tuple[Chain, ChunkId]:
        chain_id = self.layout.chain_of(2)
        return self.chain(chain_id), ChunkId(self.file_inode, 2, chain_id)

    def change(self, target_id: int, chunk: ChunkId, **fields: object) -> None:
        info = self.targets.chunks[target_id][chunk]
        assert isinstance(info, ChunkInfo)
        self.targets.chunks[target_id][chunk] = msgspec.structs.replace(info, **fields)

    def kinds(self, **options: bool) -> list[tuple[Kind, int]]:
        return [(one.kind, one.inode) for one in self.findings(**options)]


@pytest.fixture(params=["service", "store"])
def world(request: pytest.FixtureRequest) -> ChainWorld:
    return ChainWorld(request.param)


def test_whole_chains_have_no_findings(world: ChainWorld) -> None:
    assert world.kinds(verify=True) == []


def lose(world: ChainWorld, target_id: int, chunk: ChunkId) -> Kind:
    del world.targets.chunks[target_id][chunk]
    return Kind.COPY_LOST


def damage(world: ChainWorld, target_id: int, chunk: ChunkId) -> Kind:
    world.targets.chunks[target_id][chunk] = "no valid attribute"
    return Kind.COPY_DAMAGED


def rot(world: ChainWorld, target_id: int, chunk: ChunkId) -> Kind:
    world.targets.rotten.add(chunk)
    others = [t for t in world.targets.chunks if t != target_id]
    recheck = world.targets.recheck

    def only_here(asked: int, chunks: list[ChunkId]) -> list[object]:
        rotten = world.targets.rotten
        world.targets.rotten = set() if asked in others else rotten
        found = recheck(asked, chunks)
        world.targets.rotten = rotten
        return list(found)

    world.targets.recheck = only_here  # type: ignore[method-assign, assignment]
    return Kind.COPY_DAMAGED


@pytest.mark.parametrize("how", [lose, damage, rot])
@pytest.mark.parametrize("what", ["block", "file_chunk"])
def test_a_bad_copy_is_fetched_from_another_member(
    world: ChainWorld, what: str, how: Callable[[ChainWorld, int, ChunkId], Kind]
) -> None:
    chain, chunk = getattr(world, what)()
    kind = how(world, chain.targets[0], chunk)
    before = world.dump()
    assert world.kinds(verify=True) == [(kind, chunk.inode)]
    report = world.repair(verify=True)
    assert [one.state for one in report.outcomes] == [State.REPAIRED]
    assert world.kinds(verify=True) == []
    after = world.dump()
    changed = {k for k in before if after.get(k) != before[k]}
    assert not [k for k in changed if k[:4] in (records.BLOCK, records.INODE, records.REMOVAL)]


def test_copies_of_another_version_are_those_of_the_last_member(world: ChainWorld) -> None:
    chain, chunk = world.file_chunk()
    world.change(chain.targets[0], chunk, version=4, crc32c=9)
    (finding,) = world.findings()
    assert (finding.kind, finding.place and finding.place.source) == (
        Kind.COPY_DIFFERS,
        chain.targets[-1],
    )
    assert {one.state for one in world.repair().outcomes} == {State.REPAIRED}
    assert world.kinds() == []


def test_a_copy_that_is_being_written_is_no_finding(world: ChainWorld) -> None:
    chain, chunk = world.file_chunk()
    world.change(chain.targets[-1], chunk, version=4, crc32c=9)
    world.targets.before_look = lambda: world.change(chain.targets[0], chunk, version=5)
    assert world.kinds() == []


def test_a_block_that_no_member_has_is_a_miss(world: ChainWorld) -> None:
    chain, chunk = world.block()
    for target_id in chain.targets:
        del world.targets.chunks[target_id][chunk]
    assert world.kinds() == [(Kind.BLOCK_LOST, chunk.inode)] * 2
    world.repair()
    assert world.kinds() == []


def test_members_that_do_not_serve_need_not_have_anything() -> None:
    world = ChainWorld()
    for chain in world.rig.call(GetClusterMap()).chains:
        if chain.is_replicated:
            record = records.ChainRecord(9, chain.targets[:1], 2, (), chain.targets[1:])
            world.put(records.chain_key(chain.chain_id), records.encode(record))
            for chunk in list(world.targets.chunks[chain.targets[1]]):
                if chunk.chain == chain.chain_id and chunk.inode % 2:
                    del world.targets.chunks[chain.targets[1]][chunk]
    assert world.kinds() == []


def test_chunks_of_a_chain_that_has_nothing_to_do_with_them(world: ChainWorld) -> None:
    chain, chunk = world.block()
    (stranger,) = {1, 2, 3} - set(chain.targets)
    info = world.targets.chunks[chain.targets[0]][chunk]
    assert isinstance(info, ChunkInfo)
    world.targets.put(stranger, info)
    world.targets.put(chain.targets[0], msgspec.structs.replace(info, chain=0))
    found = world.findings()
    assert [one.kind for one in found] == [Kind.CHUNK_MISPLACED] * 2
    assert {one.place and (one.place.target_id, one.place.chain) for one in found} == {
        (stranger, chunk.chain),
        (chain.targets[0], 0),
    }
    world.repair()
    queued = [records.unpack_removal(v) for k, v in world.dump().items() if k[:4] == b"RMVL"]
    assert {r.chain for r in queued if r.inode == chunk.inode} == {0, chunk.chain}
    assert world.kinds() == []
