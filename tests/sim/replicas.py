"""Whether the copies of chunks are the same, by what lies on the disks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvfs_base.cluster import Chain
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ATTRIBUTE, chunk_of, root_of, unpack
from kvfs_metadata import records
from kvfs_metadata.engines.engine import scan
from sim import leftovers
from sim.disk import Node

if TYPE_CHECKING:
    from sim.world import World

Copy = tuple[int, int, int, bytes]
"""Version, length, checksum and bytes."""


def differences(world: World) -> list[str]:
    """One line each. Chunks that nothing refers to are not looked at."""
    chains = world.clients[0].map().chains
    found: list[str] = []
    for chain in chains:
        if chain.is_replicated:
            found += _of_chain(world, chain)
    return found


def missing_blocks(world: World) -> list[str]:
    """Committed blocks that a serving member does not have, at any moment: a reader who misses one
    has it repaired, so later is too late. One line each. Empty where a disk may lose some."""
    if world.plan.copies == 1 or "rot" in world.plan.faults or world.metadata_went_back:
        return []
    state = world.store.state
    held = {
        leftovers.uuid_on(disk): set(leftovers.chunks_on(disk))
        for host in world.chunk_hosts
        for disk in host.disks.values()
    }
    uuids = {record.target_id: uuid for uuid, record in leftovers.targets(state).items()}
    chains = dict(leftovers.chains_of(state))
    found: list[str] = []
    for key, value in scan(state, records.BLOCK):
        block = records.unpack_block(value)
        chunk = ChunkId(records.number_at(key), 0, block.chain)
        chain = chains[block.chain]
        found += [
            f"chain {block.chain} {chain}: target {target_id} lacks block {chunk.inode}"
            for target_id in chain.targets
            if target_id not in world.keeper.lost and chunk not in held[uuids[target_id]]
        ]
    return found


def _of_chain(world: World, chain: Chain) -> Iterator[str]:
    copies = {target: dict(_chunks(world, target, chain.chain_id)) for target in chain.targets}
    for target, held in copies.items():
        if any(isinstance(copy, str) for copy in held.values()):
            yield f"target {target}: {[c for c in held.values() if isinstance(c, str)]}"
    everything = sorted({chunk for held in copies.values() for chunk in held})
    for chunk in everything:
        if not _is_wanted(world, chunk):
            continue
        seen = {target: held.get(chunk) for target, held in copies.items()}
        if world.plan.ruins and world.store.state.get(records.block_key(chunk.inode)) is not None:
            # Who came back when nobody had a good copy was brought in step without the block.
            seen = {target: copy for target, copy in seen.items() if copy is not None}
        if len(set(seen.values())) > 1:
            brief = {t: c and (c[:3] if isinstance(c, tuple) else c) for t, c in seen.items()}
            yield f"chain {chain.chain_id} version {chain.version}: {chunk} is {brief}"


def _is_wanted(world: World, chunk: ChunkId) -> bool:
    state = world.store.state
    keys = (records.block_key(chunk.inode), records.inode_key(chunk.inode))
    return any(state.get(key) is not None for key in keys)


def _chunks(world: World, target_id: int, chain: int) -> Iterator[tuple[ChunkId, Copy | str]]:
    root = root_of(chain) + "/"
    for path, node in _files(world, target_id).items():
        if not path.startswith(root):
            continue
        directory, name = path[len(root) :].split("/")
        chunk = chunk_of(name, chain)
        if chunk is None:
            continue
        if directory == "pending":
            yield chunk, "pending"
            continue
        info = unpack(node.attributes.get(ATTRIBUTE), chunk)
        # What rotted and was not read since is found when it is.
        data = b"" if "rot" in world.plan.faults else bytes(node.data[: info.length])
        yield chunk, (info.version, info.length, info.crc32c, data)


def _files(world: World, target_id: int) -> dict[str, Node]:
    for host in world.chunk_hosts:
        assert host.server is not None
        stores = host.server._targets.stores
        for store, disk in zip(stores, host.disks.values(), strict=True):
            if store.target_id == target_id:
                return {path: node for path, node in disk.entries.items() if node is not None}
    raise AssertionError(f"nobody has target {target_id}")
