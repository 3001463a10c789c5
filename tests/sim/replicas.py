"""Whether the copies of chunks are the same, by what lies on the disks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvfs_base.cluster import Chain
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ATTRIBUTE, chunk_of, root_of, unpack
from kvfs_metadata import records
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
