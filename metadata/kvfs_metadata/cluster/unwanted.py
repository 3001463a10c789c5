"""Which chunks of a target nothing refers to: the other side of removals (``FindUnwanted``)."""

from __future__ import annotations

from collections.abc import Collection

from kvfs_base.cluster import FindUnwanted
from kvfs_metadata import records
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.transaction import Counters, Tx


def find_unwanted(
    cluster: ClusterState,
    blocks: Blocks,
    counters: Counters,
    tx: Tx,
    request: FindUnwanted,
) -> tuple[int, ...]:
    """Takes its turn among the changes although it changes nothing: what one of them has decided
    and may yet take back (a removal, an expiry) must not be believed. Raises TargetUnknown."""
    cluster.targets[request.target_id]
    if request.chain >= counters.chain.given(tx):
        return ()  # a store that went back in time has forgotten it
    chains: Collection[int] = {request.chain}
    if request.chain == 0:
        chains = cluster.chains.single(request.target_id)
    elif request.chain not in cluster.chains.of_target(request.target_id):
        chains = ()
    prepared = blocks.prepared_inodes(chains)
    given = counters.inode.given(tx)
    stored = tx.kv.get_many([records.block_key(inode) for inode in request.inodes])
    files = tx.kv.get_many([records.inode_key(inode) for inode in request.inodes])
    return tuple(
        place
        for place, (inode, block, file) in enumerate(
            zip(request.inodes, stored, files, strict=True)
        )
        if inode < given
        and inode not in prepared
        and not (block is not None and records.unpack_block(block).chain in chains)
        and not (file is not None and _is_on(file, chains))
        and not ((move := cluster.moves.get(inode)) is not None and move.to in chains)
    )


def _is_on(file: bytes, chains: Collection[int]) -> bool:
    layout = records.decode_inode(file).layout
    return layout is not None and any(chain in chains for chain in layout.chains)
