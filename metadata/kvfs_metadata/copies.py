"""How many copies a directory wants of what is made in it.

A directory that nobody asked says what its parent said when it was made; where nobody ever said
anything the service's setting decides. What was stored before keeps the copies that it has.
"""

from __future__ import annotations

from kvfs_base.errors import InvalidRequest, NotADirectory
from kvfs_base.limits import (
    CHAIN_CHUNK_BYTES,
    COPIES_MAX,
    FILE_CHUNK_BYTES,
)
from kvfs_base.types import Layout
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.records import InodeRecord
from kvfs_metadata.transaction import Tx


class Copies:
    def __init__(self, cluster: ClusterState, default: int) -> None:
        self._cluster = cluster
        self._default = default

    def wanted(self, directory: InodeRecord) -> int:
        return directory.copies or self._default

    def set(self, record: InodeRecord, copies: int) -> None:
        """0: as the service's setting says. Raises NotADirectory, InvalidRequest, NoTarget."""
        if not record.is_dir:
            raise NotADirectory()
        if not 0 <= copies <= COPIES_MAX:
            raise InvalidRequest(detail=f"copies are 1 to {COPIES_MAX}")
        self._cluster.require_chains(copies)
        record.copies = copies

    def layout(self, tx: Tx, directory: InodeRecord, inode: int) -> Layout:
        """Of a new file. Raises NoTarget."""
        copies = self.wanted(directory)
        chains = self._cluster.placement.place_file(tx, inode, copies)
        return Layout(CHAIN_CHUNK_BYTES if copies > 1 else FILE_CHUNK_BYTES, chains)

    def existing(self, layout: Layout) -> int:
        """How many copies the chains of a file are meant to have; 0 if none of them exists."""
        chains = map(self._cluster.chains.get, layout.chains)
        return next((chain.copies for chain in chains if chain is not None), 0)
