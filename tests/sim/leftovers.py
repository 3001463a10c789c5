"""What lies on the disks and in the store though nothing refers to it any more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvfs_base.types import ChunkId
from kvfs_datapath.chunks.target import IDENTITY
from kvfs_datapath.format import CHAINS, CHUNKS, chain_of, chunk_of
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, scan
from sim.disk import SimDisk

if TYPE_CHECKING:
    from sim.world import World


def promised(world: World) -> list[str]:
    """What goes by itself after a while: batches of dead writers, files that somebody may still
    have open, removals that are ordered. One line each."""
    state = world.store.state
    found = [f"batch {records.number_at(key)}" for key, _ in scan(state, records.PREPARED)]
    found += [f"unlinked file {records.number_at(key)}" for key, _ in scan(state, records.ORPHAN)]
    known = {record.target_id for record in targets(state).values()}
    for key, _ in scan(state, records.REMOVAL):
        target_id = int.from_bytes(key[4:8], "big")
        if target_id in known and target_id not in world.keeper.lost:
            found.append(f"removal {records.number_at(key, 8)} of target {target_id}")
    return found


def orphans(world: World) -> list[str]:
    """Chunks that nothing refers to. One line each."""
    state = world.store.state
    chains = dict(chains_of(state))
    known = {uuid: record.target_id for uuid, record in targets(state).items()}
    found: list[str] = []
    for host in world.chunk_hosts:
        for path, disk in host.disks.items():
            target_id = known.get(uuid_on(disk), 0)
            single = {c for c, r in chains.items() if r.targets == (target_id,) and r.copies == 1}
            for chunk in chunks_on(disk):
                place = {chunk.chain} if chunk.chain else single
                if not _is_wanted(state, chunk, place):
                    found.append(f"{path}: chunk {tuple(chunk)}")
    return found


def _is_wanted(state: KVRead, chunk: ChunkId, chains: set[int]) -> bool:
    block = state.get(records.block_key(chunk.inode))
    if block is not None:
        return records.unpack_block(block).chain in chains
    file = state.get(records.inode_key(chunk.inode))
    layout = None if file is None else records.decode_inode(file).layout
    return layout is not None and not chains.isdisjoint(layout.chains)


def chunks_on(disk: SimDisk) -> Iterator[ChunkId]:
    for path, node in disk.entries.items():
        top, _, rest = path.partition("/")
        if node is None or top not in (CHAINS, CHUNKS):
            continue
        chain = 0
        if top == CHAINS:
            chain = chain_of(rest.partition("/")[0]) or 0
        chunk = chunk_of(path.rpartition("/")[2], chain)
        if chunk is not None:
            yield chunk


def uuid_on(disk: SimDisk) -> str:
    """Of the target whose directory it is; empty for a disk that is new."""
    node = disk.entries.get(IDENTITY)
    return "" if node is None else str(json.loads(node.data)["uuid"])


def targets(state: KVRead) -> dict[str, records.TargetRecord]:
    found = scan(state, records.TARGET)
    return {key[4:].decode(): records.decode_target(value) for key, value in found}


def chains_of(state: KVRead) -> Iterator[tuple[int, records.ChainRecord]]:
    for key, value in scan(state, records.CHAIN):
        yield int.from_bytes(key[4:8], "big"), records.decode_chain(value)
