"""The chunk store over a directory, over tmpfs and in memory: one suite."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    Conflict,
    DiskFull,
    KvfsError,
    NotPermitted,
    ServerBusy,
    TargetFailed,
    VersionMismatch,
)
from kvfs_base.os_disk import OsDisk
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks import store as store_module
from kvfs_datapath.chunks import tree as tree_module
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.format import (
    ATTRIBUTE,
    ChunkInfo,
    ChunkState,
    directory_of,
    pack,
    path_of,
)
from kvfs_datapath.limits import REMOVE_BY_NAME_MAX, STAGED_CHUNKS_MAX

KEY = bytes(range(32))
CHUNK = ChunkId(77, 0)
UUID = str(uuid.UUID(int=5, version=4))


def open_store(disk: Disk, *, strict: bool = False) -> ChunkStore:
    # Pieces of 8 KiB, so that a checksum of a small chunk takes several.
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


def info_of(data: bytes, chunk: ChunkId = CHUNK, key: bytes = KEY) -> ChunkInfo:
    return ChunkInfo(*chunk, ChunkState.SEALED, len(data), crc32c(data), key)


def put(store: ChunkStore, data: bytes, chunk: ChunkId = CHUNK, key: bytes = KEY) -> ChunkInfo:
    pages = memoryview(mmap.mmap(-1, max(4096, round_up(len(data)))))
    pages[: len(data)] = data
    staged = store.stage()
    try:
        store.fill(staged, pages[: round_up(len(data))], 0)
    except BaseException:
        store.discard(staged)
        raise
    info = info_of(data, chunk, key)
    store.publish(staged, info)
    return info


def read(store: ChunkStore, chunk: ChunkId = CHUNK) -> bytes:
    file, info = store.open(chunk)
    view = memoryview(bytearray(info.length))
    assert file.preadv([view], 0) == info.length
    file.close()
    return bytes(view)


def verify(store: ChunkStore, chunk: ChunkId = CHUNK) -> None:
    file, info = store.open(chunk)
    try:
        store.verify(file, info)
    finally:
        file.close()


# --- whole chunks


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000])
def test_a_chunk_comes_back(store: ChunkStore, disk: Disk, size: int) -> None:
    data = os.urandom(size)
    info = put(store, data)
    assert store.stat(CHUNK) == info
    assert read(store) == data
    verify(store)
    assert drafts(disk) == []
    assert list(store.list()) == [CHUNK]


def test_publishing_again_changes_nothing_for_readers(store: ChunkStore) -> None:
    put(store, b"same" * 1000)
    reader, info = store.open(CHUNK)
    put(store, b"same" * 1000)
    store.verify(reader, info)
    reader.close()
    assert list(store.list()) == [CHUNK]


def test_fewer_bytes_than_promised_are_refused(store: ChunkStore, disk: Disk) -> None:
    staged = store.stage()
    store.fill(staged, memoryview(mmap.mmap(-1, 4096)), 0)
    with pytest.raises(ChunkMismatch):
        store.publish(staged, info_of(bytes(4097)))
    assert list(store.list()) == drafts(disk) == []


def test_what_is_staged_is_not_there(store: ChunkStore, disk: Disk) -> None:
    staged = store.stage()
    assert list(store.list()) == []
    store.discard(staged)
    assert drafts(disk) == []


def test_staged_chunks_are_bounded(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "STAGED_CHUNKS_MAX", 3)
    assert STAGED_CHUNKS_MAX > 3
    store = open_store(disk)
    staged = [store.stage() for _ in range(3)]
    with pytest.raises(ServerBusy):
        store.stage()
    store.discard(staged.pop())
    staged.append(store.stage())
    for one in staged:
        store.discard(one)
    store.close()


def test_missing_chunks(store: ChunkStore) -> None:
    with pytest.raises(ChunkNotFound) as caught:
        store.open(CHUNK)
    assert (caught.value.inode, caught.value.number, caught.value.chain) == CHUNK
    with pytest.raises(ChunkNotFound):
        store.stat(CHUNK)
    with pytest.raises(ChunkNotFound):
        store.seal(CHUNK)
    with pytest.raises(ChunkNotFound):
        store.open_for_write(CHUNK, create=False)
    assert store.healthy


# --- damage


def damage(disk: Disk, chunk: ChunkId, change: Callable[[int], None]) -> None:
    file = disk.open(path_of(chunk), write=True)
    change(file.fileno())
    file.close()


def test_every_flipped_bit_is_noticed(disk: Disk) -> None:
    data = os.urandom(20_000)
    for offset in (0, 8191, 8192, 19_999):
        store = open_store(disk)
        put(store, data)
        verify(store)
        damage(disk, CHUNK, lambda fd, o=offset: os.pwrite(fd, bytes([data[o] ^ 4]), o))  # type: ignore[misc]
        verify(store)  # once since the start: what is read later is the reader's to check
        store.close()
        store = open_store(disk)
        with pytest.raises(ChunkCorrupt) as caught:
            verify(store)
        assert caught.value.expected_crc32c == crc32c(data) != caught.value.found_crc32c
        assert store.healthy
        store.close()


def test_a_torn_chunk_is_noticed(store: ChunkStore, disk: Disk) -> None:
    put(store, os.urandom(10_000))
    for size in (9_999, 0, 10_001):
        damage(disk, CHUNK, lambda fd, n=size: os.ftruncate(fd, n))  # type: ignore[misc]
        with pytest.raises(ChunkMismatch):
            store.open(CHUNK)


def test_another_chunk_in_its_place_is_noticed(store: ChunkStore, disk: Disk) -> None:
    for other in (ChunkId(78, 0), ChunkId(77, 1)):
        put(store, b"foreign", other)
        disk.make_directory(directory_of(CHUNK.inode))
        disk.rename(path_of(other), path_of(CHUNK))
        with pytest.raises(ChunkMismatch):
            store.open(CHUNK)


def test_a_file_without_attribute_is_noticed_and_can_be_replaced(
    store: ChunkStore, disk: Disk
) -> None:
    disk.make_directory(directory_of(CHUNK.inode))
    disk.open(path_of(CHUNK), write=True, create=True).close()
    with pytest.raises(ChunkMismatch):
        store.open(CHUNK)
    put(store, b"whole")
    assert read(store) == b"whole"


def test_foreign_files_in_the_directory_are_passed_over(store: ChunkStore, disk: Disk) -> None:
    put(store, b"mine")
    disk.make_directory("chunks/00")
    disk.open("chunks/00/lost+found", write=True, create=True).close()
    assert list(store.list()) == [CHUNK]


# --- failing disks


class Faults:
    """Makes the n-th disk operation of a MemoryDisk fail."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk
        self.seen = 0

    def arm(self, fail_at: int, error: KvfsError) -> None:
        self.seen = 0

        def before(operation: str, path: str) -> None:
            self.seen += 1
            if self.seen == fail_at:
                raise error.with_traceback(None)

        self._disk.before = before

    def disarm(self) -> None:
        self._disk.before = lambda operation, path: None


@pytest.mark.logs_warnings
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "error", [DiskFull(path="x"), TargetFailed(detail="EIO")], ids=["full", "eio"]
)
def test_a_failed_put_is_invisible(strict: bool, error: KvfsError) -> None:
    """Exhaustively: every disk operation of a put fails in turn."""
    fail_at = 0
    while True:
        fail_at += 1
        disk = MemoryDisk()
        store = open_store(disk, strict=strict)
        put(store, b"neighbour", ChunkId(1, 0))
        faults = Faults(disk)
        faults.arm(fail_at, error)
        try:
            put(store, bytes(5000))
        except type(error):
            failed = True
        else:
            failed = False
        operations = faults.seen
        faults.disarm()
        store.close()
        store = open_store(disk)
        assert read(store, ChunkId(1, 0)) == b"neighbour"
        assert drafts(disk) == []
        assert (CHUNK in set(store.list())) == (not failed), fail_at
        store.close()
        if operations < fail_at:
            break
    assert fail_at > (8 if strict else 6)


@pytest.mark.logs_warnings
def test_a_failed_disk_stays_out_of_service() -> None:
    """Linux reports a lost write once: a later success would mean nothing."""
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    store.set_target_id(9)
    put(store, b"before", ChunkId(1, 0))
    faults = Faults(disk)
    staged = store.stage()
    faults.arm(1, TargetFailed(detail="lost write"))
    with pytest.raises(TargetFailed):
        store.publish(staged, info_of(b""))
    faults.disarm()
    assert not store.healthy
    operations: list[Callable[[], object]] = [
        lambda: store.open(ChunkId(1, 0)),
        store.stage,
        lambda: store.seal(ChunkId(1, 0)),
        lambda: store.patch(ChunkId(2, 0), 0, [b"x"]),
        lambda: store.truncate(ChunkId(1, 0), 0),
        lambda: store.sync(ChunkId(1, 0)),
        lambda: store.remove(ChunkId(1, 0)),
        lambda: list(store.list()),
        store.usage,
    ]
    for operation in operations:
        with pytest.raises(TargetFailed) as caught:
            operation()
        assert (caught.value.target_id, caught.value.detail) == (9, "lost write")
    store.close()
    again = open_store(disk)  # somebody looked at the disk and started the server again
    assert again.healthy and read(again, ChunkId(1, 0)) == b"before"
    again.close()


def test_a_full_disk_is_not_a_failed_one() -> None:
    disk = MemoryDisk(capacity_bytes=50_000)
    store = open_store(disk)
    with pytest.raises(DiskFull):
        put(store, bytes(60_000))
    with pytest.raises(DiskFull):
        store.patch(ChunkId(2, 0), 0, [bytes(60_000)])
    put(store, bytes(10_000))
    assert store.healthy
    store.close()


@pytest.mark.logs_warnings
def test_a_target_whose_directory_vanished_has_failed(tmp_path: Path) -> None:
    store = open_store(OsDisk(str(tmp_path / "target")))
    shutil.rmtree(tmp_path / "target")
    with pytest.raises(TargetFailed):
        store.stage()
    assert not store.healthy
    store.close()


# --- chunks of files


def test_a_patched_chunk_is_open_until_it_is_sealed(store: ChunkStore) -> None:
    store.patch(CHUNK, 3, [b"abc", b"def"])
    assert store.stat(CHUNK) == ChunkInfo(*CHUNK, ChunkState.OPEN, length=9)
    sealed = store.seal(CHUNK)
    assert sealed.is_sealed and sealed.crc32c == crc32c(b"\0\0\0abcdef") and sealed.length == 9
    assert store.seal(CHUNK) == store.stat(CHUNK) == sealed
    store.patch(CHUNK, 0, [b"x"])
    assert not store.stat(CHUNK).is_sealed
    assert store.seal(CHUNK).crc32c == crc32c(b"x\0\0abcdef")


def test_a_chunk_is_marked_open_before_its_first_byte_changes() -> None:
    disk = MemoryDisk()
    store = open_store(disk)
    store.patch(CHUNK, 0, [b"old"])
    store.seal(CHUNK)
    states: list[ChunkState] = []

    def before(operation: str, path: str) -> None:
        if operation in ("pwritev", "truncate"):
            disk.before = lambda operation, path: None
            states.append(store.stat(CHUNK).state)

    disk.before = before
    store.patch(CHUNK, 0, [b"new"])
    store.seal(CHUNK)
    disk.before = before
    store.truncate(CHUNK, 1)
    assert states == [ChunkState.OPEN, ChunkState.OPEN]
    store.close()


def test_a_chunk_with_a_writer_is_not_sealed(store: ChunkStore) -> None:
    file, info = store.open_for_write(CHUNK)
    assert info == ChunkInfo(*CHUNK, ChunkState.OPEN)
    passed = os.dup(file.fileno())
    file.close()
    os.pwrite(passed, b"bytes", 0)
    assert store.seal(CHUNK) == ChunkInfo(*CHUNK, ChunkState.OPEN, length=5)
    os.close(passed)
    assert store.seal(CHUNK).crc32c == crc32c(b"bytes")


def test_a_restarted_server_knows_writers_that_it_never_met(disk: Disk) -> None:
    store = open_store(disk)
    file, _ = store.open_for_write(CHUNK)
    passed = os.dup(file.fileno())
    file.close()
    store.close()
    store = open_store(disk)
    assert not store.seal(CHUNK).is_sealed
    os.close(passed)
    assert store.seal(CHUNK).is_sealed
    store.close()


def test_a_staged_file_becomes_a_chunk_that_is_open(store: ChunkStore, disk: Disk) -> None:
    staged = store.stage()
    staged.file.pwritev([memoryview(mmap.mmap(-1, 4096))], 0)
    assert store.adopt(staged, CHUNK) == ChunkInfo(*CHUNK, ChunkState.OPEN, length=4096)
    assert drafts(disk) == []
    assert store.seal(CHUNK).crc32c == crc32c(bytes(4096))
    with pytest.raises(Conflict):
        store.adopt(store.stage(), CHUNK)
    assert drafts(disk) == []


def test_blocks_are_never_written_in_place(store: ChunkStore) -> None:
    info = put(store, b"block")
    for operation in (
        lambda: store.open_for_write(CHUNK),
        lambda: store.patch(CHUNK, 0, [b"x"]),
        lambda: store.truncate(CHUNK, 1),
    ):
        with pytest.raises(NotPermitted):
            operation()
    assert store.stat(CHUNK) == info and read(store) == b"block"


def test_a_block_does_not_replace_a_chunk_that_is_open(store: ChunkStore, disk: Disk) -> None:
    store.patch(CHUNK, 0, [b"file"])
    with pytest.raises(Conflict):
        put(store, b"block")
    assert read(store) == b"file" and drafts(disk) == []


def test_truncate(store: ChunkStore) -> None:
    store.truncate(CHUNK, 0)
    assert list(store.list()) == []
    store.patch(CHUNK, 0, [b"0123456789"])
    store.seal(CHUNK)
    store.truncate(CHUNK, 20)
    assert store.stat(CHUNK).length == 10
    store.truncate(CHUNK, 4)
    assert read(store) == b"0123"
    assert store.seal(CHUNK).crc32c == crc32c(b"0123")


def test_sync_makes_later_seals_wait_for_the_disk() -> None:
    """What was durable once must not be lost to a checksum of bytes that never reached the disk."""
    disk = MemoryDisk()
    store = open_store(disk)
    seen: list[str] = []
    disk.before = lambda operation, path: seen.append(operation)
    store.patch(CHUNK, 0, [b"a"])
    store.seal(CHUNK)
    assert "sync" not in seen
    store.sync(CHUNK)
    assert seen[-3:] == ["sync", "sync_directory", "sync_directory"]
    del seen[:]
    store.patch(CHUNK, 0, [b"b"])
    assert seen.index("set_attribute") < seen.index("sync") < seen.index("pwritev")
    del seen[:]
    store.seal(CHUNK)
    assert seen.index("sync") < seen.index("set_attribute")
    assert store.stat(CHUNK).durable
    store.sync(ChunkId(1, 1))  # a hole
    store.close()


def test_a_changed_chunk_is_verified_anew(store: ChunkStore, disk: Disk) -> None:
    store.patch(CHUNK, 0, [b"one"])
    store.seal(CHUNK)
    verify(store)
    store.patch(CHUNK, 0, [b"two"])
    verify(store)  # open: there is nothing to check
    wrong = ChunkInfo(*CHUNK, ChunkState.SEALED, 3, crc32c(b"one"))
    file = disk.open(path_of(CHUNK), write=True)
    file.set_attribute(ATTRIBUTE, pack(wrong))
    file.close()
    with pytest.raises(ChunkCorrupt):
        verify(store)


def test_patches_of_many_threads_all_arrive(store: ChunkStore) -> None:
    def work(first: int) -> None:
        for place in range(first, 400, 4):
            store.patch(CHUNK, place * 16, [place.to_bytes(16, "big")])
            if place % 40 == 0:
                store.seal(CHUNK)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = b"".join(n.to_bytes(16, "big") for n in range(400))
    assert read(store) == expected
    assert store.seal(CHUNK).crc32c == crc32c(expected)


# --- removing


def test_removing_twice_does_no_harm(store: ChunkStore) -> None:
    put(store, b"bytes")
    file, info = store.open(CHUNK)
    assert store.remove(CHUNK)
    assert not store.remove(CHUNK)
    assert list(store.list()) == []
    store.verify(file, info)  # a descriptor outlives the chunk and shows no other
    file.close()


@pytest.mark.parametrize("width", [10, REMOVE_BY_NAME_MAX + 1, 1 << 32])
def test_removing_a_range(store: ChunkStore, width: int) -> None:
    for number in (0, 2, 5, 9):
        store.patch(ChunkId(77, number), 0, [b"x"])
    store.patch(ChunkId(78, 2), 0, [b"x"])
    assert store.remove_range(77, 2, min(2 + width, 1 << 32)) == 3
    assert sorted(store.list()) == [ChunkId(77, 0), ChunkId(78, 2)]
    store.sync_removals([77, 78])


@pytest.mark.logs_warnings
def test_what_a_failing_disk_does_not_find_is_not_removed(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the order to remove it would be over, and the chunk there for good."""
    store.patch(ChunkId(77, 2), 0, [b"x"])
    failed = TargetFailed(detail="EIO")

    def exists(self: Disk, path: str) -> bool:
        raise failed

    with monkeypatch.context() as patch, pytest.raises(TargetFailed):
        patch.setattr(type(store.disk), "exists", exists)
        store.remove_range(77, 0, 6)


# --- whose directory it is


def test_the_identity_stays_with_the_directory(disk: Disk) -> None:
    store = open_store(disk)
    assert (store.uuid, store.target_id) == (UUID, 0)
    store.set_target_id(12)
    store.set_target_id(12)
    store.close()
    other = ChunkStore(disk, str(uuid.uuid4()), buffers=BufferPool(1, 4096))
    assert (other.uuid, other.target_id) == (UUID, 12)
    other.close()


def test_two_servers_on_one_target(disk: Disk) -> None:
    store = open_store(disk)
    staged = store.stage()
    with pytest.raises(Conflict):
        open_store(disk)
    assert drafts(disk) != []  # the second one touched nothing
    store.discard(staged)
    store.close()
    open_store(disk).close()


def test_files_are_made_in_one_directory_after_the_other(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_module, "STAGING_DIRECTORIES", 3)
    monkeypatch.setattr(tree_module, "STAGING_IN_A_ROW", 2)
    store = open_store(disk)
    seen: list[str] = []
    for _ in range(8):
        staged = store.stage()
        seen.append(staged.path.rpartition("/")[0])
        store.discard(staged)
    store.close()
    assert seen == [f"staging/{number // 2 % 3:02x}" for number in range(1, 9)]


def test_staging_is_emptied_at_start(disk: Disk) -> None:
    store = open_store(disk)
    store.stage().file.close()
    put(store, b"kept")
    store.close()
    assert len(drafts(disk)) == 1
    make = disk.open("staging/0000000000000001", write=True, create=True)  # a former version's
    make.close()
    assert len(drafts(disk)) == 2
    store = open_store(disk)
    assert drafts(disk) == []
    assert read(store) == b"kept"
    store.close()


def write_identity(disk: Disk, text: str) -> None:
    disk.make_directory("")
    file = disk.open("target.json", write=True, create=True)
    file.truncate(0)
    file.pwritev([text.encode()], 0)
    file.close()


def test_another_format_is_refused(disk: Disk) -> None:
    newer = {"format": 3, "uuid": UUID, "shards": []}
    write_identity(disk, json.dumps(newer))
    with pytest.raises(VersionMismatch) as caught:
        open_store(disk)
    assert (caught.value.found, caught.value.expected) == ("3", "2")
    with pytest.raises(VersionMismatch):
        open_store(disk)  # and the lock was given back, else this were Conflict


def test_a_directory_of_format_1_becomes_one_of_format_2(disk: Disk) -> None:
    write_identity(disk, json.dumps({"format": 1, "uuid": UUID, "target_id": 4}))
    store = open_store(disk)
    assert (store.uuid, store.target_id) == (UUID, 4)
    store.close()
    file = disk.open("target.json")
    view = memoryview(bytearray(file.size()))
    file.preadv([view], 0)
    file.close()
    assert json.loads(bytes(view)) == {"format": 2, "uuid": UUID, "target_id": 4}


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', '{"format": "x"}', "[]"])
def test_a_damaged_identity_is_refused(disk: Disk, text: str) -> None:
    write_identity(disk, text)
    with pytest.raises(TargetFailed):
        open_store(disk)


def test_the_verified_set_is_bounded(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "VERIFIED_CHUNKS_MAX", 2)
    store = open_store(disk)
    for number in range(4):
        put(store, b"%d" % number, ChunkId(1, number))
        verify(store, ChunkId(1, number))
    assert list(store._verified) == [ChunkId(1, 2), ChunkId(1, 3)]
    store.close()
