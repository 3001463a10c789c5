"""Known mistakes, planted into the production code to see that seeds find them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from kvfs_datapath.client import ChunkClient
from kvfs_datapath.store import ChunkStore
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster_state import ClusterState


def _publish_before_the_bytes() -> Any:
    """A chunk gets its name before its attribute and length."""

    def publish(self: ChunkStore, staged: Any, info: Any) -> None:
        self._appear(staged.path, info.chunk)
        self._disk.sync_directory("")  # where others get their turn
        staged.file.truncate(info.length)
        from kvfs_datapath.format import ATTRIBUTE, pack

        staged.file.set_attribute(ATTRIBUTE, pack(info))

    return mock.patch.object(ChunkStore, "_publish", publish)


def _remove_other_generation() -> Any:
    """Dropping a block that was found bad ignores which block that was."""
    remove = Blocks.remove

    def careless(self: Blocks, tx: Any, request: Any) -> int:
        request.inodes = ()
        return remove(self, tx, request)

    return mock.patch.object(Blocks, "remove", careless)


def _commit_without_chunks() -> Any:
    """The client says that everything is written, whatever servers answered."""
    write_chunks = ChunkClient.write_chunks

    def hopeful(self: ChunkClient, writes: Any) -> Any:
        return [None for _ in write_chunks(self, writes)]

    return mock.patch.object(ChunkClient, "write_chunks", hopeful)


def _collect_early() -> Any:
    """A prepared batch that commits has its chunks removed as well."""
    insert = Blocks._insert

    def eager(self: Blocks, tx: Any, namespace: Any, record: Any, crc32c: Any) -> None:
        insert(self, tx, namespace, record, crc32c)
        if record.first_inode % 4 == 0:
            self._cluster.remove_chunks(tx, record.chains[:1], record.first_inode, 1, 0)

    return mock.patch.object(Blocks, "_insert", eager)


def _overwrite_committed() -> Any:
    """Who commits a key second wins, though the first has been read."""
    insert = Blocks._insert

    def last_wins(self: Blocks, tx: Any, namespace: Any, record: Any, crc32c: Any) -> None:
        keys = [record.keys[i : i + 32] for i in range(0, len(record.keys), 32)]
        for key in keys:
            block = namespace.blocks.get(key)
            if block is not None:
                self.remove_block(tx, block)
        insert(self, tx, namespace, record, crc32c)

    return mock.patch.object(Blocks, "_insert", last_wins)


def _forget_removals() -> Any:
    """What is removed from the namespace stays on the disks."""

    def nothing(self: ClusterState, *args: Any, **kwargs: Any) -> None:
        pass

    return mock.patch.object(ClusterState, "remove_chunks", nothing)


BUGS: dict[str, Callable[[], Any]] = {
    "publish before the bytes": _publish_before_the_bytes,
    "remove another generation": _remove_other_generation,
    "commit without chunks": _commit_without_chunks,
    "collect too early": _collect_early,
    "overwrite what is committed": _overwrite_committed,
    "forget removals": _forget_removals,
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Nothing for an empty name."""
    with contextlib.nullcontext() if not name else BUGS[name]():
        yield
