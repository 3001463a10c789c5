"""Chunks of files on chains of several copies: what one target does with their versions."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ChunkPending,
    Conflict,
    ConnectionLost,
    InvalidRequest,
    KvfsError,
    NotPermitted,
)
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks import numbers as numbers_module
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.format import ChunkInfo, ChunkState, path_of, pending_path_of
from t1_stores.chain_chunks import (
    CHUNK,
    commit,
    cut,
    damage,
    open_store,
    pending,
    prepare,
    read,
    update,
    whole,
    write,
)

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


@pytest.mark.parametrize("end", [0, 1, 8_192, 19_999, 20_000, 30_000])
def test_a_cut(store: ChunkStore, end: int) -> None:
    old = os.urandom(20_000)
    update(store, 0, old)
    with store.versions.lock(CHUNK):
        made = store.versions.prepare(CHUNK, cut(end, 2), [])
    assert read(store) == old
    assert commit(store).version == made.version == 2
    assert read(store) == old[:end]
    update(store, 25_000, b"more", 3)
    assert read(store) == old[:end].ljust(25_000, b"\0") + b"more"


def test_updates_that_change_no_byte_make_versions_as_well(store: ChunkStore) -> None:
    with store.versions.lock(CHUNK):
        store.versions.prepare(CHUNK, cut(100, 1), [])
    assert commit(store).version == 1 and read(store) == b""
    assert update(store, 0, b"", 2).version == 2  # of an empty one
    assert update(store, 500, b"", 3).version == 3
    assert read(store) == b""
    update(store, 0, b"bytes", 4)
    assert update(store, 9, b"", 5).version == 5
    assert read(store) == b"bytes"


def test_an_append_is_written_behind_the_end_and_nowhere_else(disk: Disk) -> None:
    store = open_store(disk)
    update(store, 0, b"a" * 10_000)
    reader, _ = store.versions.open(CHUNK)
    prepare(store, 10_000, b"b" * 5_000, 2)
    assert reader.size() == 15_000 and store.versions.open(CHUNK)[1].length == 10_000
    assert disk.list("chains/00000005/pending") == []
    commit(store)
    now, info = store.versions.open(CHUNK)
    assert os.fstat(now.fileno()).st_ino == os.fstat(reader.fileno()).st_ino
    assert info.length == 15_000
    reader.close()
    now.close()
    store.close()


def test_the_same_update_again_is_not_done_again() -> None:
    disk = MemoryDisk()
    store = open_store(disk)
    update(store, 0, b"0123456789")
    for offset, sequence in ((10, 2), (3, 3)):
        first = prepare(store, offset, b"abc", sequence)
        seen: list[str] = []
        disk.before = lambda operation, path: seen.append(operation)  # noqa: B023
        assert prepare(store, offset, b"abc", sequence) == first
        assert not {"pwritev", "set_attribute", "rename"} & set(seen)
        commit(store)
    assert read(store) == b"012abc6789abc"
    store.close()


REPLACEMENTS = [(first, second) for first in (20_000, 5) for second in (20_000, 5)]


@pytest.mark.parametrize("again", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize(("first", "second"), REPLACEMENTS)
def test_one_pending_version_replaces_another(
    disk: Disk, first: int, second: int, again: bool
) -> None:
    store = open_store(disk, strict=True)
    old = os.urandom(20_000)
    update(store, 0, old)
    prepare(store, first, b"first" * 10, 2)
    made = prepare(store, second, b"second", 3)
    assert made.version == 2 and pending(store) == made and read(store) == old
    if again:
        store.close()
        store = open_store(disk)
        assert pending(store) == made and read(store) == old
    commit(store)
    expected = bytearray(old)
    expected[second : second + 6] = b"second"
    assert read(store) == expected
    assert pending(store) is None and store.versions.committed(CHUNK).version == 2  # type: ignore[union-attr]
    store.close()


@pytest.mark.parametrize("again", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize(("first", "second"), REPLACEMENTS)
def test_what_was_dropped_does_not_come_back(
    disk: Disk, first: int, second: int, again: bool
) -> None:
    store = open_store(disk)
    old = os.urandom(20_000)
    update(store, 0, old)
    prepare(store, first, b"first" * 10, 2)
    prepare(store, second, b"second", 3)
    with store.versions.lock(CHUNK):
        store.versions.drop(CHUNK)
        store.versions.drop(CHUNK)  # nothing to drop any more
    if again:
        store.close()
        store = open_store(disk)
    assert pending(store) is None and list(store.versions.pendings(5, scan=True)) == []
    with pytest.raises(ChunkNotFound):
        commit(store)
    assert read(store) == old
    update(store, 20_010, b"x", 4)
    assert read(store) == old + bytes(10) + b"x"  # zeros, not what was dropped
    store.close()


def test_the_next_version_is_the_one_that_was_agreed(store: ChunkStore) -> None:
    versions = store.versions
    with versions.lock(CHUNK):
        for wrong in (0, 2):
            with pytest.raises(Conflict):
                versions.prepare(CHUNK, write(0, b"x"), [b"x"], wrong)
        assert versions.prepare(CHUNK, write(0, b"x"), [b"x"], 1).version == 1
        versions.commit(CHUNK)
        with pytest.raises(Conflict):
            versions.prepare(CHUNK, write(0, b"x"), [b"x"], 1)
        with pytest.raises(InvalidRequest):
            versions.prepare(CHUNK, write(0, b"xyz"), [b"xy"])
        with pytest.raises(InvalidRequest):
            versions.prepare(CHUNK, cut(0), [b"xy"])


def test_blocks_have_no_versions(store: ChunkStore) -> None:
    staged = store.stage()
    store.fill(staged, memoryview(mmap.mmap(-1, 4096)), 0)
    store.publish(
        staged, ChunkInfo(*CHUNK, ChunkState.SEALED, 9, crc32c(bytes(9)), bytes(range(32)))
    )
    with store.versions.lock(CHUNK), pytest.raises(NotPermitted):
        store.versions.prepare(CHUNK, write(0, b"x"), [b"x"])
    file, info = store.versions.open_settled(CHUNK)
    file.close()
    assert info.key and info.version == 0
    other = ChunkId(78, 0, 5)
    update(store, 0, b"file", chunk=other)
    staged = store.stage()
    with pytest.raises(Conflict):
        store.publish(staged, ChunkInfo(*other, ChunkState.SEALED, 0, 0, bytes(range(32))))
    assert read(store, other) == b"file"


def test_a_chunk_of_a_chain_is_not_written_in_place(store: ChunkStore) -> None:
    for operation in (
        lambda: store.open_for_write(CHUNK),
        lambda: store.patch(CHUNK, 0, [b"x"]),
        lambda: store.truncate(CHUNK, 1),
    ):
        with pytest.raises(NotPermitted):
            operation()
    assert list(store.list(5)) == []


# --- whole chunks from another member


@pytest.mark.parametrize("before", ["nothing", "older", "newer", "append", "copy", "damaged"])
def test_a_whole_chunk_takes_the_place_of_whatever_is_there(
    store: ChunkStore, disk: Disk, before: str
) -> None:
    if before != "nothing":
        for sequence in range(9 if before == "newer" else 2):
            update(store, 0, os.urandom(10_000), sequence)
    if before in ("append", "copy"):
        prepare(store, 10_000 if before == "append" else 0, b"pending", 3)
    if before == "damaged":
        damage(disk, lambda fd: os.ftruncate(fd, 5))
    data = os.urandom(30_000)
    with store.versions.lock(CHUNK):
        made = store.versions.prepare_whole(
            CHUNK, whole(data, 5, 44), (data[n : n + 7_000] for n in range(0, 30_000, 7_000))
        )
        assert made.state is ChunkState.PENDING and store.versions.pending(CHUNK) == made
        info = store.versions.commit(CHUNK)
    assert info == whole(data, 5, 44)
    assert read(store) == data and pending(store) is None
    assert update(store, 0, b"next", 45).version == 6


def test_a_whole_chunk_that_is_not_what_was_announced(store: ChunkStore, disk: Disk) -> None:
    update(store, 0, b"old")

    def pieces(error: type[KvfsError]) -> Iterator[bytes]:
        yield b"ne"
        if error is ConnectionLost:
            raise ConnectionLost()
        yield b"wer" if error is ChunkMismatch else b"x"

    with store.versions.lock(CHUNK):
        for error in (ChunkMismatch, ChunkCorrupt, ConnectionLost):
            for take in (store.versions.prepare_whole, store.versions.replace):
                with pytest.raises(error):
                    take(CHUNK, whole(b"new", 7), pieces(error))
        for wrong in (ChunkInfo(1, 1, 1, ChunkState.SEALED, version=1), whole(b"", 0)):
            with pytest.raises(InvalidRequest):
                store.versions.prepare_whole(CHUNK, wrong, [])
    assert read(store) == b"old" and pending(store) is None
    assert drafts(disk) == []


def test_only_a_newer_whole_chunk_outlives_the_process(disk: Disk) -> None:
    for version, stays in ((2, False), (3, False), (4, True), (9, True)):
        store = open_store(disk)
        with store.versions.lock(CHUNK):
            store.versions.prepare_whole(CHUNK, whole(b"now", 3), [b"now"])
            store.versions.commit(CHUNK)
            store.versions.prepare_whole(CHUNK, whole(b"other", version), [b"other"])
        store.close()
        store = open_store(disk)
        assert (pending(store) is not None) == stays
        assert read(store) == b"now"
        with store.versions.lock(CHUNK):
            store.versions.drop(CHUNK)
        store.close()


# --- damage


def test_damaged_bytes_never_get_a_right_checksum(store: ChunkStore, disk: Disk) -> None:
    data = os.urandom(30_000)
    update(store, 0, data)
    for bad in (0, 9_000, 12_000, 29_999):  # before, in and after what is overwritten
        damage(disk, lambda fd, at=bad: os.pwrite(fd, bytes([data[at] ^ 1]), at))  # type: ignore[misc]
        with pytest.raises(ChunkCorrupt):
            prepare(store, 11_000, bytes(5_000), 2)
        with store.versions.lock(CHUNK), pytest.raises(ChunkCorrupt):
            store.versions.prepare(CHUNK, cut(10_000), [])
        damage(disk, lambda fd, at=bad: os.pwrite(fd, data[at : at + 1], at))  # type: ignore[misc]
        assert pending(store) is None
    damage(disk, lambda fd: os.pwrite(fd, bytes([data[0] ^ 1]), 0))
    update(store, 30_000, b"an append reads nothing", 3)
    with pytest.raises(ChunkCorrupt):
        store.recheck(CHUNK)
    assert store.healthy and drafts(disk) == []


def test_a_damaged_chunk_is_replaced_by_what_another_member_has(
    store: ChunkStore, disk: Disk
) -> None:
    data = os.urandom(30_000)
    info = update(store, 0, data, 8)
    damage(disk, lambda fd: os.pwrite(fd, b"rot", 1_000))
    with pytest.raises(ChunkCorrupt):
        store.recheck(CHUNK)
    with store.versions.lock(CHUNK):
        store.versions.replace(CHUNK, info, [data[:9_000], data[9_000:]])
    assert store.recheck(CHUNK) == info and read(store) == data
    damage(disk, lambda fd: os.ftruncate(fd, 12))
    with store.versions.lock(CHUNK):
        with pytest.raises(ChunkMismatch):
            store.versions.committed(CHUNK)
        with pytest.raises(ChunkMismatch):  # whether something is pending is not known
            store.versions.pending(CHUNK)
        store.versions.replace(CHUNK, info, [data])
    assert read(store) == data
    prepare(store, 0, b"x", 9)
    with store.versions.lock(CHUNK), pytest.raises(Conflict):
        store.versions.replace(CHUNK, info, [data])
    assert drafts(disk) == []


# --- after a restart


@pytest.mark.parametrize("offset", [20_000, 25_000, 3], ids=["append", "gap", "copy"])
@pytest.mark.parametrize("harm", ["none", "torn", "cut"])
def test_what_is_pending_outlives_the_process_if_it_is_whole(
    disk: Disk, offset: int, harm: str
) -> None:
    store = open_store(disk)
    old = os.urandom(20_000)
    update(store, 0, old)
    made = prepare(store, offset, b"pending" * 100, 2)
    store.close()
    path = pending_path_of(CHUNK) if offset < 20_000 else path_of(CHUNK)
    if harm == "torn":
        damage(disk, lambda fd: os.pwrite(fd, bytes(1), offset + 300), path)
    elif harm == "cut":
        damage(disk, lambda fd: os.ftruncate(fd, made.length - 1), path)
    store = open_store(disk)
    with pytest.raises(ChunkPending):
        store.versions.open_settled(CHUNK)
    assert set(store.versions.pendings(5, scan=True)) == {CHUNK}
    assert read(store) == old
    if harm == "none":
        assert pending(store) == made
        assert set(store.versions.pendings(5)) == {CHUNK}
        assert commit(store).version == 2
    else:
        assert pending(store) is None
        assert set(store.versions.pendings(5)) == set()
        store.versions.open_settled(CHUNK)[0].close()
        assert read(store) == old
    store.close()


def test_an_append_to_damaged_bytes_is_not_simply_forgotten(disk: Disk) -> None:
    store = open_store(disk)
    update(store, 0, os.urandom(9_000))
    prepare(store, 9_000, b"pending", 2)
    store.close()
    damage(disk, lambda fd: os.pwrite(fd, b"rot", 1_000))
    store = open_store(disk)
    with pytest.raises(ChunkCorrupt):
        pending(store)
    store.close()


def test_a_copy_whose_removal_was_lost_does_not_bring_old_bytes_back(disk: Disk) -> None:
    store = open_store(disk)
    update(store, 0, b"one")
    prepare(store, 0, b"two", 2)
    path = pending_path_of(CHUNK)
    file = disk.open(path)
    attribute = file.get_attribute("kvfs")
    assert attribute is not None
    file.close()
    commit(store)
    for sequence in (3, 4):
        update(store, 0, b"new", sequence)
    store.close()
    file = disk.open(path, write=True, create=True)
    file.pwritev([b"two"], 0)
    file.set_attribute("kvfs", attribute)
    file.close()
    store = open_store(disk)
    assert list(store.versions.pendings(5)) == [CHUNK]
    assert pending(store) is None
    assert read(store) == b"new" and not disk.exists(path)
    store.close()


def test_forgetting_all_that_is_pending_on_a_chain(disk: Disk) -> None:
    store = open_store(disk)
    chunks = [ChunkId(n, n, 5) for n in range(1, 7)]
    elsewhere = ChunkId(1, 1, 6)
    for chunk in (*chunks, elsewhere):
        update(store, 0, b"committed", chunk=chunk)
    for chunk in (*chunks[:2], elsewhere):
        prepare(store, 9, b" and pending", 2, chunk)
    prepare(store, 0, b"pending", 2, chunks[2])
    store.close()
    store = open_store(disk)
    prepare(store, 9, b" and pending", 2, chunks[3])
    prepare(store, 0, b"pending", 2, chunks[4])
    assert set(store.versions.pendings(5)) == set(chunks[2:5])
    assert set(store.versions.pendings(5, scan=True)) == set(chunks[:5])
    assert store.versions.forget_pending(5) == 5
    assert store.versions.forget_pending(5) == 0
    assert [pending(store, chunk) for chunk in chunks] == [None] * 6
    assert pending(store, elsewhere) is not None
    assert disk.list("chains/00000005/pending") == []
    assert {read(store, chunk) for chunk in chunks} == {b"committed"}
    store.close()


# --- numbers of updates


def test_numbers_are_remembered(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers_module, "UPDATES_REMEMBERED_MAX", 3)
    store = open_store(disk)
    for sequence in range(1, 6):
        update(store, sequence, b"x", sequence)
        assert store.versions.seen(CHUNK, 9, sequence) == sequence
        assert store.versions.seen(CHUNK, 9, sequence + 1) is None
    prepare(store, 0, b"y", 6)
    seen = [store.versions.seen(CHUNK, 9, sequence) for sequence in range(1, 7)]
    assert seen == [None, None, 3, 4, 5, None]
    assert store.versions.seen(CHUNK, 8, 5) is None
    assert store.versions.seen(ChunkId(77, 4, 5), 9, 5) is None
    store.close()
    store = open_store(disk)  # the attribute knows the last one
    seen = [store.versions.seen(CHUNK, 9, sequence) for sequence in range(1, 7)]
    assert seen == [None, None, None, None, 5, None]
    store.close()


# --- locks


def test_locks_are_the_chunks_own(store: ChunkStore) -> None:
    versions = store.versions
    others = [ChunkId(n, 0, 5) for n in range(2_000)]  # more than any table of locks has
    with contextlib.ExitStack() as stack:
        for chunk in others:
            stack.enter_context(versions.lock(chunk, 0))
        with pytest.raises(Conflict), versions.lock(others[0], 0.01):
            pass
        with versions.lock(ChunkId(0, 0, 6), 0):
            pass
    with versions.lock(others[0], 0):
        pass
    assert len(versions.locks) == 0


def test_updates_of_many_threads_all_arrive(store: ChunkStore) -> None:
    def work(first: int) -> None:
        for place in range(first, 120, 4):
            data = place.to_bytes(16, "big")
            with store.versions.lock(CHUNK):
                store.versions.prepare(CHUNK, write(place * 16, data, place), [data])
                store.versions.commit(CHUNK)
            read(store)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(store) == b"".join(n.to_bytes(16, "big") for n in range(120))
    assert store.versions.committed(CHUNK).version == 120  # type: ignore[union-attr]


# --- durability


def operations(disk: MemoryDisk) -> list[str]:
    seen: list[str] = []
    disk.before = lambda operation, path: seen.append(f"{operation} {path.partition('/')[0]}")
    return seen


def test_strict_versions_are_synced_before_they_count() -> None:
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    update(store, 0, b"first")
    seen = operations(disk)
    prepare(store, 5, b"append", 2)
    assert seen.index("pwritev chains") < seen.index("set_attribute chains")
    assert seen[-1] == "sync chains"
    del seen[:]
    commit(store)
    assert seen[-2:] == ["set_attribute chains", "sync chains"]
    del seen[:]
    prepare(store, 0, b"copy", 3)
    assert seen.index("set_attribute staging") < seen.index("sync staging")
    assert seen.index("sync staging") < seen.index("rename staging")
    assert seen[-1] == "sync_directory chains"
    del seen[:]
    commit(store)
    assert seen[-2:] == ["rename chains", "sync_directory chains"]
    store.close()


def test_a_chunk_that_was_synced_stays_safe_without_strict() -> None:
    disk = MemoryDisk()
    store = open_store(disk)
    seen = operations(disk)
    update(store, 0, b"first")
    assert not [one for one in seen if "sync" in one]
    prepare(store, 5, b" more", 2)
    del seen[:]
    store.sync(CHUNK)
    assert seen.index("set_attribute chains") < seen.index("sync chains")
    assert seen.count("sync_directory chains") == 3 and "sync_directory " in seen
    assert store.stat(CHUNK).durable
    assert commit(store).durable and read(store) == b"first more"  # it was not forgotten
    del seen[:]
    prepare(store, 10, b"!", 3)
    assert seen.index("pwritev chains") < seen.index("sync chains")
    commit(store)
    assert seen.count("sync chains") == 1  # before, or the checksum could outrun the bytes
    update(store, 0, b"F", 4)
    assert seen.index("sync staging") < seen.index("rename staging")
    other = ChunkId(3, 0, 5)
    update(store, 0, b"old", chunk=other)
    prepare(store, 0, b"new", 2, other)
    del seen[:]
    store.sync(other)
    assert seen.count("sync chains") == 2  # the copy that waits as well
    assert commit(store, other).durable
    with store.versions.lock(CHUNK):
        store.versions.prepare_whole(CHUNK, whole(b"other", 9), [b"other"])
        assert store.versions.commit(CHUNK).durable
    store.sync(ChunkId(1, 1, 5))  # a hole
    store.close()


def test_what_was_verified_stays_so_when_it_grows(disk: Disk) -> None:
    store = open_store(disk)
    update(store, 0, b"bytes")
    info = update(store, 5, b" and more", 2)
    file, _ = store.versions.open(CHUNK)
    damage(disk, lambda fd: os.pwrite(fd, b"X", 0))
    store.verify(file, info)  # as everything that was computed here: its readers check again
    file.close()
    store.close()
    store = open_store(disk)
    file, info = store.versions.open(CHUNK)
    with pytest.raises(ChunkCorrupt):
        store.verify(file, info)
    file.close()
    store.close()


@pytest.mark.logs_warnings
def test_who_has_a_chunk_open_that_is_recorded_as_damaged_is_not_given_its_bytes(
    disk: Disk,
) -> None:
    """It was opened before that, and is verified afterwards."""
    store = open_store(disk)
    update(store, 0, b"bytes")
    store.close()
    store = open_store(disk)
    damage(disk, lambda fd: os.pwrite(fd, b"X", 0))
    file, info = store.versions.open_settled(CHUNK)
    with store.versions.lock(CHUNK):
        store.versions.damaged.mark(CHUNK)
    with pytest.raises(ChunkCorrupt):
        store.verify(file, info)
    file.close()
    store.close()
