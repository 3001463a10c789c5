"""File chunks of chains for tests: one chunk, and what is done to it."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from kvfs_base.errors import KvfsError
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo, ChunkState, path_of

CHUNK = ChunkId(77, 3, 5)
UUID = str(uuid.UUID(int=5, version=4))


def open_store(disk: Disk, *, strict: bool = False) -> ChunkStore:
    # Pieces of 8 KiB, so that a copy of a small chunk takes several.
    return ChunkStore(disk, UUID, buffers=BufferPool(2, 8192), strict=strict)


def write(
    offset: int, data: bytes, sequence: int = 0, writer: int = 9, chunk: ChunkId = CHUNK
) -> m.Update:
    return m.Update(chunk.inode, chunk.number, offset, len(data), crc32c(data), writer, sequence)


def cut(end: int, sequence: int = 0, writer: int = 9, chunk: ChunkId = CHUNK) -> m.Update:
    return m.Update(chunk.inode, chunk.number, end, 0, 0, writer, sequence, cut=True)


def prepare(
    store: ChunkStore, offset: int, data: bytes, sequence: int = 0, chunk: ChunkId = CHUNK
) -> ChunkInfo:
    with store.versions.lock(chunk):
        # Two pieces, as they may come out of several buffers.
        pieces = [data[: len(data) // 2], memoryview(data)[len(data) // 2 :]]
        return store.versions.prepare(chunk, write(offset, data, sequence, chunk=chunk), pieces)


def commit(store: ChunkStore, chunk: ChunkId = CHUNK) -> ChunkInfo:
    with store.versions.lock(chunk):
        return store.versions.commit(chunk)


def update(
    store: ChunkStore, offset: int, data: bytes, sequence: int = 0, chunk: ChunkId = CHUNK
) -> ChunkInfo:
    prepare(store, offset, data, sequence, chunk)
    return commit(store, chunk)


def read(store: ChunkStore, chunk: ChunkId = CHUNK) -> bytes:
    """The committed bytes, which must have their checksum."""
    file, info = store.versions.open(chunk)
    view = memoryview(bytearray(info.length))
    assert file.preadv([view], 0) == info.length
    file.close()
    assert crc32c(view) == info.crc32c
    assert info.state is ChunkState.SEALED
    return bytes(view)


def pending(store: ChunkStore, chunk: ChunkId = CHUNK) -> ChunkInfo | None:
    with store.versions.lock(chunk):
        return store.versions.pending(chunk)


def whole(data: bytes, version: int, sequence: int = 0) -> ChunkInfo:
    return ChunkInfo(
        *CHUNK, ChunkState.SEALED, len(data), crc32c(data), version=version, sequence=sequence
    )


def damage(disk: Disk, change: Callable[[int], object], path: str = path_of(CHUNK)) -> None:
    file = disk.open(path, write=True)
    change(file.fileno())
    file.close()


class Faults:
    """Makes an operation of a MemoryDisk fail."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk
        self.last = ""
        """The operation that failed."""

    def arm(self, fail_at: int, error: KvfsError) -> None:
        """The ``fail_at``-th from now on."""
        seen = 0

        def before(operation: str, path: str) -> None:
            nonlocal seen
            seen += 1
            if seen == fail_at:
                self.last = operation
                raise error.with_traceback(None)

        self._disk.before = before

    def arm_operation(self, name: str, error: KvfsError) -> None:
        """All of one kind."""

        def before(operation: str, path: str) -> None:
            if operation == name:
                raise error.with_traceback(None)

        self._disk.before = before

    def disarm(self) -> None:
        self._disk.before = lambda operation, path: None
