"""Chunk files that stay open between readers: bounded, and gone with whatever changes a chunk."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs_base.errors import ChunkNotFound, ChunkPending, TargetFailed
from kvfs_base.os_disk import OsDisk
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.kept import KeptFile
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo, ChunkState
from t1_stores.chain_chunks import UUID, commit, prepare

BLOCK = ChunkId(77, 0)
COPY = ChunkId(78, 0, 5)
"""A block on a chain of several copies."""
LIMIT = 3


class CountingDisk(OsDisk):
    """``opened``: how many files of chunks were opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root
        self.opened = 0

    def open(self, path: str, **how: bool) -> Any:
        self.opened += path.startswith(("chunks/", "chains/"))
        return super().open(path, **how)

    def descriptors(self) -> list[str]:
        """Of chunks, those without a name included."""
        found = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                continue  # that of the listing
        return [path for path in found if path.startswith((f"{self.root}/ch", f"{self.root}/st"))]


@pytest.fixture
def disk(tmp_path: Path) -> CountingDisk:
    return CountingDisk(tmp_path / "target")


@pytest.fixture
def store(disk: CountingDisk) -> Iterator[ChunkStore]:
    store = ChunkStore(disk, UUID, buffers=BufferPool(2, 8192), kept_files=LIMIT)
    yield store
    store.close()
    assert disk.descriptors() == []


def put(store: ChunkStore, data: bytes, chunk: ChunkId = BLOCK, key: bytes = bytes(32)) -> None:
    pages = memoryview(mmap.mmap(-1, round_up(len(data))))
    pages[: len(data)] = data
    staged = store.stage()
    store.fill(staged, pages, 0)
    store.publish(staged, ChunkInfo(*chunk, ChunkState.SEALED, len(data), crc32c(data), key))


def bytes_of(kept: KeptFile) -> bytes:
    view = memoryview(bytearray(kept.info.length))
    assert kept.file.preadv([view], 0) == len(view)
    return bytes(view)


def read(store: ChunkStore, chunk: ChunkId = BLOCK) -> bytes:
    kept = store.borrow(chunk)
    try:
        return bytes_of(kept)
    finally:
        kept.close()


@pytest.mark.parametrize("chunk", [BLOCK, COPY])
def test_a_chunk_is_opened_once(store: ChunkStore, disk: CountingDisk, chunk: ChunkId) -> None:
    put(store, b"a" * 5000, chunk)
    for _ in range(3):
        assert read(store, chunk) == b"a" * 5000
    assert disk.opened == 1
    assert (len(store.kept), store.kept.hits) == (1, 2)
    assert len(disk.descriptors()) == 1


def test_one_for_direct_reads_is_another(store: ChunkStore, disk: CountingDisk) -> None:
    put(store, b"a" * 4096)
    for _ in range(2):
        for direct in (False, True):
            store.borrow(BLOCK, direct=direct).close()
    assert len(disk.descriptors()) == len(store.kept) == 2
    store.remove(BLOCK)
    assert len(store.kept) == 0


def test_descriptors_are_bounded(store: ChunkStore, disk: CountingDisk) -> None:
    chunks = [ChunkId(100 + i, 0) for i in range(3 * LIMIT)]
    for chunk in chunks:
        put(store, bytes([chunk.inode]) * 100, chunk)
    for chunk in chunks:
        assert read(store, chunk) == bytes([chunk.inode]) * 100
        assert len(disk.descriptors()) <= LIMIT
    disk.opened = 0
    for chunk in chunks[-LIMIT:]:
        read(store, chunk)
    assert disk.opened == 0  # the ones used last
    held = [store.borrow(chunk) for chunk in chunks]
    assert len(store.kept) == LIMIT
    for chunk, kept in zip(chunks, held, strict=True):
        assert bytes_of(kept) == bytes([chunk.inode]) * 100
        kept.close()
    assert len(disk.descriptors()) == LIMIT


@pytest.mark.parametrize("chunk", [BLOCK, COPY])
def test_a_removed_chunk_is_gone_with_its_descriptor(
    store: ChunkStore, disk: CountingDisk, chunk: ChunkId
) -> None:
    put(store, b"a" * 100, chunk)
    read(store, chunk)
    assert store.remove_range(chunk.inode, 0, 1, chunk.chain) == 1
    assert disk.descriptors() == []
    with pytest.raises(ChunkNotFound):
        store.borrow(chunk)


def test_a_reader_keeps_what_is_removed_until_it_is_done(
    store: ChunkStore, disk: CountingDisk
) -> None:
    put(store, b"a" * 100)
    first, second = store.borrow(BLOCK), store.borrow(BLOCK)
    store.remove(BLOCK)
    put(store, b"b" * 100)
    assert read(store) == b"b" * 100
    first.close()
    assert bytes_of(second) == b"a" * 100
    second.close()
    assert not any(path.endswith("(deleted)") for path in disk.descriptors())


def test_a_chain_that_was_left_keeps_nothing_open(store: ChunkStore, disk: CountingDisk) -> None:
    put(store, b"a" * 100, COPY)
    read(store, COPY)
    assert store.drop_chain(COPY.chain) == 1
    assert disk.descriptors() == []


@pytest.mark.parametrize("chunk", [BLOCK, COPY])
def test_a_replaced_chunk_is_the_new_file(
    store: ChunkStore, disk: CountingDisk, chunk: ChunkId
) -> None:
    put(store, b"a" * 100, chunk)
    read(store, chunk)
    put(store, b"b" * 100, chunk)
    assert read(store, chunk) == b"b" * 100
    assert not any(path.endswith("(deleted)") for path in disk.descriptors())


def test_a_repaired_copy_is_the_new_file(store: ChunkStore, disk: CountingDisk) -> None:
    put(store, b"a" * 100, COPY)
    kept = store.borrow(COPY)
    Path(os.readlink(f"/proc/self/fd/{kept.file.fileno()}")).write_bytes(b"x" * 100)
    assert bytes_of(kept) == read(store, COPY) == b"x" * 100  # the same file
    kept.close()
    put(store, b"a" * 100, COPY)
    assert read(store, COPY) == b"a" * 100


def change_in_place(store: ChunkStore) -> None:
    store.patch(BLOCK, 10, [b"new"])


def truncate(store: ChunkStore) -> None:
    store.truncate(BLOCK, 10)


@pytest.mark.parametrize("change", [change_in_place, truncate])
def test_a_file_chunk_is_kept_while_it_is_whole(
    store: ChunkStore, disk: CountingDisk, change: Callable[[ChunkStore], None]
) -> None:
    put(store, b"a" * 100, key=b"")
    read(store)
    change(store)
    for _ in range(2):
        kept = store.borrow(BLOCK)
        assert kept.info.state is ChunkState.OPEN
        kept.close()
    assert disk.descriptors() == []
    sealed = store.seal(BLOCK)
    kept = store.borrow(BLOCK)
    assert kept.info == sealed
    assert crc32c(bytes_of(kept)) == sealed.crc32c
    kept.close()
    assert len(store.kept) == 1


def test_a_chunk_that_becomes_durable_says_so(store: ChunkStore) -> None:
    put(store, b"a" * 100, key=b"")
    read(store)
    store.sync(BLOCK)
    kept = store.borrow(BLOCK)
    assert kept.info.durable
    kept.close()


def test_chunks_that_change_in_versions_are_not_kept(store: ChunkStore) -> None:
    chunk = ChunkId(79, 0, 5)
    for round_ in range(2):
        prepare(store, 5 * round_, b"hello", round_, chunk)
        with pytest.raises(ChunkPending):
            store.borrow(chunk)
        commit(store, chunk)
        assert read(store, chunk) == b"hello" * (round_ + 1)
    assert len(store.kept) == 0


@pytest.mark.parametrize("change", ["remove", "replace", "open"])
def test_who_is_overtaken_by_a_change_keeps_nothing(
    store: ChunkStore, disk: CountingDisk, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    put(store, b"a" * 100, key=b"")
    plain = store.open

    def overtaken(chunk: ChunkId, *, direct: bool = False) -> Any:
        found = plain(chunk, direct=direct)
        if change == "remove":
            store.remove(chunk)
        elif change == "replace":
            put(store, b"b" * 100, key=b"")
        else:
            store.patch(chunk, 0, [b"b"])
        return found

    with monkeypatch.context() as patched:
        patched.setattr(store, "open", overtaken)
        assert len(read(store)) == 100  # the chunk as it was, as for anybody who was that early
    assert len(store.kept) == 0
    assert disk.descriptors() == []


@pytest.mark.logs_warnings
def test_a_target_out_of_service_answers_nobody(store: ChunkStore, disk: CountingDisk) -> None:
    put(store, b"a" * 100)
    held = store.borrow(BLOCK)
    read(store)
    store.fail(TargetFailed(detail="as if"))
    with pytest.raises(TargetFailed):
        store.borrow(BLOCK)
    held.close()
    assert disk.descriptors() == []


def test_a_target_that_keeps_nothing_works(disk: CountingDisk) -> None:
    store = ChunkStore(disk, UUID, buffers=BufferPool(1, 8192))
    put(store, b"a" * 100)
    for _ in range(2):
        assert read(store) == b"a" * 100
        assert disk.descriptors() == []
    store.close()
