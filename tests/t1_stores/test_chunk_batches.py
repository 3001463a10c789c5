"""Chunks that are published together: each by itself, and all in about one wait of the disk."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvfs_base.errors import ChunkMismatch, Conflict, DiskFull, KvfsError, TargetFailed
from kvfs_base.os_disk import OsDisk
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.format import ChunkInfo, ChunkState, directory_of
from t1_stores.chain_chunks import open_store
from t1_stores.power_disk import PowerDisk

SECONDS = 60.0
POWER_LOSSES = 6
CHUNKS = [ChunkId(77, 0), ChunkId(77, 1), ChunkId(78, 0)]
"""In two directories."""


class Killed(BaseException):
    """The process ends here."""


def bytes_of(chunk: ChunkId) -> bytes:
    return random.Random(str(tuple(chunk))).randbytes(5_000)


def put_all(store: ChunkStore, chunks: Sequence[ChunkId]) -> list[KvfsError | None]:
    """As a session does it: what cannot be staged is not published."""
    results: dict[ChunkId, KvfsError | None] = {}
    batch = []
    for chunk in chunks:
        data = bytes_of(chunk)
        pages = memoryview(mmap.mmap(-1, round_up(len(data))))
        pages[: len(data)] = data
        try:
            staged = store.stage()
        except KvfsError as exc:
            results[chunk] = exc
            continue
        try:
            store.fill(staged, pages, 0)
        except KvfsError as exc:
            store.discard(staged)
            results[chunk] = exc
            continue
        info = ChunkInfo(*chunk, ChunkState.SEALED, len(data), crc32c(data), bytes(32))
        batch.append((staged, info))
    published = store.publish_all(batch)
    results |= {info.chunk: error for (_, info), error in zip(batch, published, strict=True)}
    return [results[chunk] for chunk in chunks]


def is_whole(store: ChunkStore, chunk: ChunkId) -> bool:
    """False if it is not there. Anything else than its bytes fails the test."""
    if chunk not in set(store.list(chunk.chain)):
        return False
    file, info = store.open(chunk)
    view = memoryview(bytearray(info.length))
    file.preadv([view], 0)
    file.close()
    assert view == bytes_of(chunk)
    return True


@pytest.fixture(params=["os", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return OsDisk(str(tmp_path / "target")) if request.param == "os" else MemoryDisk()


class Nth:
    """Lets the n-th operation of a disk fail; several threads may use it."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self.seen: list[tuple[str, str]] = []

    def arm(self, number: int, error: BaseException, *, for_good: bool = False) -> None:
        def before(operation: str, path: str) -> None:
            with self._lock:
                self.seen.append((operation, path))
                count = len(self.seen)
            if count == number or (for_good and count > number):
                raise error.with_traceback(None)

        self._disk.before = before

    def disarm(self) -> None:
        self._disk.before = lambda operation, path: None


# --- failing alone


@pytest.mark.logs_warnings
@pytest.mark.parametrize("chain", [0, 5])
@pytest.mark.parametrize("strict", [False, True], ids=["cache", "strict"])
@pytest.mark.parametrize(
    "error", [DiskFull(path="x"), TargetFailed(detail="EIO")], ids=["full", "eio"]
)
def test_who_is_told_that_it_failed_finds_nothing(
    error: KvfsError, strict: bool, chain: int
) -> None:
    """Exhaustively: every disk operation of a batch fails in turn."""
    chunks = [ChunkId(inode, number, chain) for inode, number, _ in CHUNKS]
    number = 0
    while True:
        number += 1
        disk = MemoryDisk()
        store = open_store(disk, strict=strict)
        faults = Nth(disk)
        faults.arm(number, error)
        results = put_all(store, chunks)
        faults.disarm()
        failed = [isinstance(result, type(error)) for result in results]
        assert all(result is None or isinstance(result, type(error)) for result in results)
        if number > len(faults.seen):
            assert not any(failed)
            break
        operation, path = faults.seen[number - 1]
        if isinstance(error, DiskFull) and operation not in ("sync_directory", "make_directory"):
            assert sum(failed) == 1, (operation, path)
        elif isinstance(error, TargetFailed):
            assert any(failed) and not store.healthy
        store.close()
        store = open_store(disk)
        assert [is_whole(store, chunk) for chunk in chunks] == [not f for f in failed], operation
        assert drafts(disk) == []
        store.close()
    assert number > 20
    store.close()


def test_a_bad_item_costs_nobody_else() -> None:
    store = open_store(MemoryDisk(), strict=True)
    store.patch(CHUNKS[1], 0, [b"a file's"])
    staged = [store.stage() for _ in range(3)]
    infos = [ChunkInfo(*chunk, ChunkState.SEALED, 0, 0, bytes(32)) for chunk in CHUNKS]
    infos[2] = ChunkInfo(*CHUNKS[2], ChunkState.SEALED, 10, 0, bytes(32))  # nothing was filled in
    results = store.publish_all(list(zip(staged, infos, strict=True)))
    assert [type(result) for result in results] == [type(None), Conflict, ChunkMismatch]
    assert sorted(store.list()) == CHUNKS[:2]
    store.close()


# --- waiting together


def test_files_are_synced_together_and_directories_once() -> None:
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    put_all(store, [ChunkId(chunk.inode, 99) for chunk in CHUNKS])  # the directories are there
    faults = Nth(disk)
    faults.arm(0, DiskFull())
    assert put_all(store, CHUNKS) == [None] * 3
    operations = [operation for operation, _ in faults.seen]
    assert operations.count("sync") == 3
    last_sync = len(operations) - operations[::-1].index("sync")
    assert last_sync <= operations.index("rename")
    last_rename = len(operations) - operations[::-1].index("rename")
    assert last_rename <= operations.index("sync_directory")
    synced = [path for operation, path in faults.seen if operation == "sync_directory"]
    assert sorted(synced) == sorted({directory_of(chunk.inode) for chunk in CHUNKS})
    store.close()


def test_syncs_of_a_batch_wait_at_the_same_time() -> None:
    """Each of two waits for the other: one after the other would never end."""
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    barriers = {name: threading.Barrier(2) for name in ("sync", "sync_directory")}
    wanted = {directory_of(chunk.inode) for chunk in CHUNKS}

    def before(operation: str, path: str) -> None:
        if operation == "sync" or (operation == "sync_directory" and path in wanted):
            barriers[operation].wait(SECONDS)

    disk.before = before
    assert put_all(store, [CHUNKS[0], CHUNKS[2]]) == [None, None]
    store.close()


# --- what lasts


def test_lost_power_takes_nothing_that_was_answered() -> None:
    """Before each operation of a batch the process ends and the power goes; what is there then is
    whole, and after the answer all of it is there."""
    number = 0
    while True:
        number += 1
        disk = PowerDisk()
        store = open_store(disk, strict=True)
        disk.settle()
        faults = Nth(disk)
        faults.arm(number, Killed(), for_good=True)
        try:
            answered = put_all(store, CHUNKS) == [None] * 3
        except Killed:
            answered = False
        store.close()
        faults.disarm()
        for seed in range(POWER_LOSSES):
            found = open_store(disk.after_power_loss(random.Random(f"{number} {seed}")))
            whole = [is_whole(found, chunk) for chunk in CHUNKS]
            assert all(whole) or not answered
            found.close()
        if answered:
            break
    assert number > 20


@pytest.mark.parametrize("chain", [0, 5])
def test_a_directory_that_a_killed_process_made_lasts(chain: int) -> None:
    """It was killed between making the directory and syncing what leads there."""
    chunk = ChunkId(77, 0, chain)
    number = 0
    while True:
        number += 1
        disk = PowerDisk()
        first = open_store(disk, strict=True)
        disk.settle()
        faults = Nth(disk)
        faults.arm(number, Killed(), for_good=True)
        try:
            put_all(first, [ChunkId(77, 1, chain)])
            killed = False
        except Killed:
            killed = True
        first.close()
        faults.disarm()
        second = open_store(disk, strict=True)
        assert put_all(second, [chunk]) == [None]
        second.close()
        for seed in range(POWER_LOSSES):
            found = open_store(disk.after_power_loss(random.Random(f"{number} {seed}")))
            assert is_whole(found, chunk), (number, seed)
            found.close()
        if not killed:
            break
    assert number > 8


# --- two who store the same block


def _failing_sync(disk: MemoryDisk, chunk: ChunkId, act: Callable[[], None]) -> None:
    """The next sync of the chunk's directory does ``act``, then fails."""

    def before(operation: str, path: str) -> None:
        if operation == "sync_directory" and path == directory_of(chunk.inode):
            disk.before = lambda operation, path: None
            act()
            raise DiskFull(path=path)

    disk.before = before


def test_a_failed_put_does_not_take_away_what_another_one_stored() -> None:
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    chunk = CHUNKS[0]
    _failing_sync(disk, chunk, lambda: put_well(store, chunk))
    (error,) = put_all(store, [chunk])
    assert isinstance(error, DiskFull)
    assert is_whole(store, chunk)
    _failing_sync(disk, chunk, lambda: None)  # and once more, when it is there already
    (error,) = put_all(store, [chunk])
    assert isinstance(error, DiskFull)
    assert is_whole(store, chunk)
    store.close()


def put_well(store: ChunkStore, chunk: ChunkId) -> None:
    assert put_all(store, [chunk]) == [None]


def test_two_puts_of_a_block_that_both_fail_leave_nothing() -> None:
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    chunk = CHUNKS[0]

    def fail_as_well() -> None:
        _failing_sync(disk, chunk, lambda: None)
        (error,) = put_all(store, [chunk])
        assert isinstance(error, DiskFull)
        assert is_whole(store, chunk)  # the other one may still do

    _failing_sync(disk, chunk, fail_as_well)
    (error,) = put_all(store, [chunk])
    assert isinstance(error, DiskFull)
    assert not is_whole(store, chunk)
    store.close()


def test_a_chain_that_is_dropped_meanwhile_costs_no_target(disk: Disk) -> None:
    """Its directories go between the rename and the sync."""
    store = open_store(disk, strict=True)
    chunk = ChunkId(77, 0, 5)
    place = store.sync_directories

    def drop_first(directories: object) -> dict[str, KvfsError]:
        store.sync_directories = place  # type: ignore[method-assign]
        assert store.drop_chain(5) == 1
        return place(list(directories))  # type: ignore[call-overload]

    store.sync_directories = drop_first  # type: ignore[method-assign, assignment]
    assert put_all(store, [chunk]) == [None]
    assert store.healthy and not is_whole(store, chunk)
    put_well(store, chunk)
    assert is_whole(store, chunk)
    store.close()
