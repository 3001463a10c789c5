"""The other roles in memory, as the node agent sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvfs_base.errors import ChunkNotFound, KvfsError, PrepareExpired, StaleChain
from kvfs_base.rpc import Request
from kvfs_base.types import Attr, BlockInfo, ChunkId, KVLayout
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkRead, ChunkWrite
from kvfs_metadata import messages as m

BLOCK_MODE = 0o100444


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + 32] for i in range(0, len(keys), 32)]


class MemoryMetadata:
    """One namespace, inode 7, shared by all connections. ``calls`` lists the requests; ``before``
    is called with each and may raise."""

    NAMESPACE = 7

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks: dict[bytes, BlockInfo] = {}
        self.batches: dict[int, list[tuple[bytes, int, int, int]]] = {}
        self.next_number = 100
        self.chains = (1,)
        """Blocks of a batch rotate over these."""
        self.chain_versions: dict[int, int] = {}
        self.calls: list[Request] = []
        self.before: Callable[[Request], None] = lambda request: None

    def dial(self) -> MemoryMetadata:
        return self

    def close(self) -> None:
        pass

    def named(self, kind: type[Request]) -> list[Any]:
        """The requests of one kind so far."""
        return [request for request in self.calls if isinstance(request, kind)]

    def call(self, request: Request) -> Any:
        self.before(request)
        with self.lock:
            self.calls.append(request)
            return getattr(self, f"_{type(request).__name__}")(request)

    def _OpenNamespace(self, request: m.OpenNamespace) -> m.NamespaceInfo:
        return m.NamespaceInfo(self.NAMESPACE, request.layout or KVLayout(block_tokens=1))

    def _MatchBlocks(self, request: m.MatchBlocks) -> int:
        keys = split(request.keys)
        return next((i for i, key in enumerate(keys) if key not in self.blocks), len(keys))

    def _LookupBlocks(self, request: m.LookupBlocks) -> tuple[BlockInfo | None, ...]:
        return tuple(self.blocks.get(key) for key in split(request.keys))

    def _PrepareBlocks(self, request: m.PrepareBlocks) -> m.PreparedBatch:
        self.next_number += 1
        batch = self.batches[self.next_number] = []
        prepared: list[m.PreparedBlock | None] = []
        batch_id = self.next_number
        for key, size in zip(split(request.keys), request.sizes, strict=True):
            if key in self.blocks:
                prepared.append(None)
                continue
            self.next_number += 1
            chain = self.chains[len(batch) % len(self.chains)]
            batch.append((key, self.next_number, size, chain))
            prepared.append(m.PreparedBlock(self.next_number, chain))
        return m.PreparedBatch(batch_id if batch else 0, tuple(prepared))

    def _CommitBlocks(self, request: m.CommitBlocks) -> m.Done:
        for chain, version in request.versions:
            if version != self.chain_versions[chain]:
                raise StaleChain(chain=chain, version=self.chain_versions[chain])
        batch = self.batches.pop(request.batch_id, None)
        if batch is None:
            raise PrepareExpired(batch_id=request.batch_id)
        for (key, inode, size, chain), checksum in zip(batch, request.crc32c, strict=True):
            self.blocks.setdefault(key, BlockInfo(inode, size, checksum, chain))
        return m.Done()

    def _AbortBlocks(self, request: m.AbortBlocks) -> m.Done:
        self.batches.pop(request.batch_id, None)
        return m.Done()

    def _RemoveBlocks(self, request: m.RemoveBlocks) -> int:
        removed = 0
        for place, key in enumerate(split(request.keys)):
            info = self.blocks.get(key)
            if info is not None and (not request.inodes or request.inodes[place] == info.inode):
                del self.blocks[key]
                removed += 1
        return removed

    def _ReadDir(self, request: m.ReadDir) -> m.DirectoryPage:
        if request.inode != self.NAMESPACE:
            return m.DirectoryPage(((b"a directory", Attr(inode=9, mode=0o040755)),), False)
        names = sorted(key.hex().encode() for key in self.blocks)
        names = [name for name in names if name > request.after]
        page = tuple((name, Attr(inode=1, mode=BLOCK_MODE)) for name in names[: request.limit])
        return m.DirectoryPage(page, len(names) > len(page))


class MemoryChunks:
    """``errors`` is what an operation on a chunk answers instead of doing it; ``before`` is called
    with each batch. ``chain_versions`` has the chains of several copies."""

    def __init__(self) -> None:
        self.stored: dict[ChunkId, bytes] = {}
        self.errors: dict[ChunkId, KvfsError] = {}
        self.chain_versions: dict[int, int] = {}
        self.before: Callable[[Sequence[Any]], None] = lambda batch: None
        self.closed = False

    def read_chunks(self, reads: Sequence[ChunkRead]) -> list[KvfsError | None]:
        self.before(reads)
        return [self.errors.get(read.chunk) or self._read(read) for read in reads]

    def _read(self, read: ChunkRead) -> KvfsError | None:
        data = self.stored.get(read.chunk)
        if data is None:
            return ChunkNotFound(inode=read.chunk.inode)
        assert crc32c(data) == read.crc32c
        read.view[: len(data)] = data
        return None

    def write_chunks(self, writes: Sequence[ChunkWrite]) -> list[KvfsError | None]:
        self.before(writes)
        results: list[KvfsError | None] = []
        for write in writes:
            assert len(write.view) % 4096 == 0 and len(write.view) >= write.size
            error = self.errors.get(write.chunk)
            if error is None:
                self.stored[write.chunk] = bytes(write.view[: write.size])
                write.version = self.chain_versions.get(write.chain, 0)
                assert crc32c(self.stored[write.chunk]) == write.crc32c
            results.append(error)
        return results

    def versions(self, chains: Iterable[int]) -> dict[int, int]:
        return {
            chain: self.chain_versions[chain] for chain in chains if chain in self.chain_versions
        }

    def statistics(self) -> dict[str, int]:
        return {"stored": len(self.stored)}

    def close(self) -> None:
        self.closed = True
