"""Chunks of files on chains of several copies: what one target does with their versions."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import ChunkNotFound, ChunkPending
from kvfs_base.os_env import OsDisk
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.store import ChunkStore

CHUNK = ChunkId(77, 3, 5)
UUID = str(uuid.UUID(int=5, version=4))


def open_store(disk: Disk, *, strict: bool = False) -> ChunkStore:
    # Pieces of 8 KiB, so that a copy of a small chunk takes several.
    return ChunkStore(disk, UUID, buffers=BufferPool(2, 8192), strict=strict)


@pytest.fixture(params=["os-disk", "os-tmpfs", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "memory":
        yield MemoryDisk()
    elif request.param == "os-disk":
        yield OsDisk(str(tmp_path / "target"))
    else:
        directory = tempfile.mkdtemp(dir="/dev/shm")
        yield OsDisk(directory)
        shutil.rmtree(directory)


@pytest.fixture(params=["cache", "strict"])
def store(request: pytest.FixtureRequest, disk: Disk) -> Iterator[ChunkStore]:
    store = open_store(disk, strict=request.param == "strict")
    yield store
    store.close()


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


# --- versions


def test_a_new_chunk(store: ChunkStore) -> None:
    assert store.versions.committed(CHUNK) is None and pending(store) is None
    data = os.urandom(20_000)
    made = prepare(store, 0, data, 1)
    assert made == ChunkInfo(
        *CHUNK, ChunkState.PENDING, 20_000, crc32c(data), version=1, writer=9, sequence=1
    )
    assert pending(store) == made
    assert store.versions.committed(CHUNK) is None
    with pytest.raises(ChunkNotFound):
        store.versions.open(CHUNK)
    with pytest.raises(ChunkPending):
        store.versions.open_settled(CHUNK)
    assert list(store.list(CHUNK.chain)) == []
    info = commit(store)
    assert info.state is ChunkState.SEALED and info.version == 1
    assert store.versions.committed(CHUNK) == info == store.stat(CHUNK)
    assert pending(store) is None
    assert read(store) == data
    assert list(store.list(CHUNK.chain)) == [CHUNK] and list(store.list()) == []


@pytest.mark.parametrize("offset", [0, 1, 9_000, 19_000, 20_000, 25_000])
def test_an_update_is_not_seen_before_it_is_committed(store: ChunkStore, offset: int) -> None:
    old = os.urandom(20_000)
    update(store, 0, old)
    new = os.urandom(3_000)
    expected = bytearray(old.ljust(max(len(old), offset + len(new)), b"\0"))
    expected[offset : offset + len(new)] = new
    made = prepare(store, offset, new, 2)
    assert (made.version, made.length, made.crc32c) == (2, len(expected), crc32c(expected))
    assert read(store) == old
    reader, before = store.versions.open(CHUNK)
    info = commit(store)
    assert (info.version, info.sequence) == (2, 2)
    assert read(store) == expected
    view = memoryview(bytearray(before.length))
    reader.preadv([view], 0)
    assert view == old  # whoever has it open goes on reading it
    reader.close()
    assert store.recheck(CHUNK) == info
