"""The trees of chains on a target: blocks and file chunks in them, listing, removing, dropping."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
from collections.abc import Callable

import pytest

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    ChunkPending,
    DiskFull,
    InvalidRequest,
    KvfsError,
    TargetFailed,
)
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.listing import ChunkListing
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.format import ChunkInfo, ChunkState, path_of
from kvfs_datapath.limits import REMOVE_BY_NAME_MAX
from t1_stores.chain_chunks import Faults, open_store, pending, prepare, read, update, write


def put(store: ChunkStore, chunk: ChunkId, data: bytes) -> ChunkInfo:
    """A block."""
    info = ChunkInfo(*chunk, ChunkState.SEALED, len(data), crc32c(data), bytes(range(32)))
    pages = memoryview(mmap.mmap(-1, 8192))
    pages[: len(data)] = data
    staged = store.stage()
    store.fill(staged, pages, 0)
    store.publish(staged, info)
    return info


def test_each_chain_has_its_own_copy(store: ChunkStore) -> None:
    for chain in (0, 1, 0xFFFF_FFFF):
        put(store, ChunkId(7, 0, chain), b"chain %d" % chain)
    for chain in (0, 1, 0xFFFF_FFFF):
        assert read(store, ChunkId(7, 0, chain)) == b"chain %d" % chain
        assert list(store.list(chain)) == [ChunkId(7, 0, chain)]
        assert store.recheck(ChunkId(7, 0, chain)).chain == chain
    with pytest.raises(ChunkNotFound):
        store.stat(ChunkId(7, 0, 2))
    assert store.chains() == [1, 0xFFFF_FFFF]
    assert store.remove_range(7, 0, 1, 1) == 1
    assert list(store.list(1)) == []
    assert read(store, ChunkId(7, 0, 0)) == b"chain 0"


def test_blocks_and_file_chunks_in_one_tree(store: ChunkStore) -> None:
    block = put(store, ChunkId(7, 0, 3), b"block")
    update(store, 0, b"file", 5, ChunkId(8, 1, 3))
    prepare(store, 4, b" grows", 6, ChunkId(8, 1, 3))
    prepare(store, 0, b"new", 7, ChunkId(9, 0, 3))
    page = ChunkListing(store, ChunkId(0, 0, 3)).page(10)
    assert page.next is None
    assert [listed.info for listed in page.chunks] == [
        block,
        ChunkInfo(8, 1, 3, ChunkState.SEALED, 4, crc32c(b"file"), version=1, writer=9, sequence=5),
    ]
    assert [listed.chunk for listed in page.chunks] == [ChunkId(7, 0, 3), ChunkId(8, 1, 3)]


def test_a_listing_is_of_one_chain(store: ChunkStore) -> None:
    for inode in range(1, 8):
        for chain in (0, 4, 5):
            put(store, ChunkId(inode, 0, chain), b"x")
    listing = ChunkListing(store, ChunkId(3, 0, 4))
    first, second = listing.page(2), listing.page(9)
    assert first.next == m.ChunkRef(5, 0, 4) and listing.next is None
    found = [listed.chunk for page in (first, second) for listed in page.chunks]
    assert found == [ChunkId(inode, 0, 4) for inode in range(3, 8)]


@pytest.mark.parametrize("width", [10, REMOVE_BY_NAME_MAX + 1, 1 << 32])
def test_removing_a_range(store: ChunkStore, disk: Disk, width: int) -> None:
    for number in (0, 2, 5, 9):
        update(store, 0, b"x", chunk=ChunkId(77, number, 3))
    prepare(store, 1, b"append", 2, ChunkId(77, 2, 3))
    prepare(store, 0, b"copy", 2, ChunkId(77, 5, 3))
    prepare(store, 0, b"new", 2, ChunkId(77, 6, 3))  # nothing is committed yet
    for other in (ChunkId(78, 2, 3), ChunkId(77, 2, 4)):
        update(store, 0, b"stays", chunk=other)
        prepare(store, 0, b"S", 2, other)
    assert store.remove_range(77, 2, min(2 + width, 1 << 32), 3) == 4
    assert sorted(store.list(3)) == [ChunkId(77, 0, 3), ChunkId(78, 2, 3)]
    for number in (2, 5, 6):
        assert pending(store, ChunkId(77, number, 3)) is None
        with store.versions.lock(ChunkId(77, number, 3)), pytest.raises(ChunkNotFound):
            store.versions.commit(ChunkId(77, number, 3))
    assert pending(store, ChunkId(78, 2, 3)) and pending(store, ChunkId(77, 2, 4))
    assert len(disk.list("chains/00000003/pending")) == 1
    store.sync_removals([77, 78], 3)
    store.sync_removals([], 9)


def test_what_a_former_process_left_pending_is_removed_as_well(disk: Disk) -> None:
    store = open_store(disk)
    prepare(store, 0, b"new", 2, ChunkId(77, 6, 3))
    store.close()
    store = open_store(disk)
    assert store.remove_range(77, 0, 10, 3) == 1
    assert disk.list("chains/00000003/pending") == []
    assert not list(store.versions.pendings(3))
    store.close()


def test_a_chunk_that_is_removed_while_it_is_written(store: ChunkStore) -> None:
    for offset in (4, 0):
        chunk = ChunkId(70 + offset, 0, 3)
        update(store, 0, b"file", chunk=chunk)
        file, info = store.versions.open(chunk)
        prepare(store, offset, b"late", 2, chunk)
        assert store.remove(chunk)
        with store.versions.lock(chunk):
            with pytest.raises(ChunkNotFound):
                store.versions.commit(chunk)
            store.versions.drop(chunk)
        assert list(store.list(3)) == [] and not list(store.versions.pendings(3))
        store.verify(file, info)  # who had it open reads on
        file.close()


def test_dropping_a_chain(store: ChunkStore, disk: Disk) -> None:
    for chain in (3, 4):
        for inode in range(1, 20):
            put(store, ChunkId(inode, 0, chain), b"block")
            update(store, 0, b"file", chunk=ChunkId(100 + inode, 0, chain))
        prepare(store, 4, b"append", 2, ChunkId(101, 0, chain))
        prepare(store, 0, b"copy", 2, ChunkId(102, 0, chain))
    prepare(store, 0, b"nothing before", 2, ChunkId(200, 0, 3))
    assert store.drop_chain(3) == 39
    assert store.chains() == [4] and list(store.list(3)) == []
    assert disk.list("chains") == ["00000004"]
    assert store.drop_chain(3) == 0
    assert len(list(store.list(4))) == 38 and pending(store, ChunkId(102, 0, 4))
    update(store, 0, b"it is a member again", chunk=ChunkId(1, 0, 3))
    assert read(store, ChunkId(1, 0, 3)) == b"it is a member again"
    with pytest.raises(InvalidRequest):
        store.drop_chain(0)


def test_dropping_a_chain_can_be_stopped(store: ChunkStore) -> None:
    for inode in range(1, 20):
        put(store, ChunkId(inode, 0, 3), b"block")
    answers = iter([False] * 5 + [True])
    assert store.drop_chain(3, stopping=lambda: next(answers)) == 5
    assert len(list(store.list(3))) == 14
    assert store.drop_chain(3) == 14 and store.chains() == []


def test_a_chunk_that_comes_while_its_chain_is_dropped_stays(store: ChunkStore) -> None:
    put(store, ChunkId(1, 0, 3), b"old")

    def stopping() -> bool:
        put(store, ChunkId(500, 0, 3), b"new")
        return False

    store.drop_chain(3, stopping=stopping)
    remaining = list(store.list(3))
    assert remaining in ([], [ChunkId(500, 0, 3)])  # it was seen by the listing, or not
    if remaining:
        assert store.chains() == [3] and read(store, ChunkId(500, 0, 3)) == b"new"


def test_foreign_names_are_passed_over(store: ChunkStore, disk: Disk) -> None:
    put(store, ChunkId(1, 0, 3), b"block")
    for path in ("chains/lost+found", "chains/00000000", "chains/3", "chains/00000003/pending"):
        disk.make_directory(path)
    disk.open("chains/00000003/pending/readme", write=True, create=True).close()
    assert store.chains() == [3] and list(store.list(3)) == [ChunkId(1, 0, 3)]
    assert list(store.versions.pendings(3, scan=True)) == []


def test_damage_on_a_chain_is_noticed(store: ChunkStore, disk: Disk) -> None:
    for chunk, size in ((ChunkId(1, 0, 3), 5000), (ChunkId(2, 0, 3), 5000)):
        if chunk.inode == 1:
            put(store, chunk, bytes(size))
        else:
            update(store, 0, bytes(size), chunk=chunk)
        file = disk.open(path_of(chunk), write=True)
        os.pwrite(file.fileno(), b"rot", 3)
        with pytest.raises(ChunkCorrupt) as caught:
            store.recheck(chunk)
        assert (caught.value.inode, caught.value.number, caught.value.chain) == chunk
        file.close()


@pytest.mark.logs_warnings
@pytest.mark.parametrize("strict", [False, True], ids=["cache", "strict"])
@pytest.mark.parametrize(
    "error", [DiskFull(path="x"), TargetFailed(detail="EIO")], ids=["full", "eio"]
)
def test_a_failed_put_is_invisible(strict: bool, error: KvfsError) -> None:
    """Every disk operation of the first put into a chain fails in turn, those that make its
    directories included."""
    chunk = ChunkId(7, 0, 3)
    at, failed = 0, True
    while failed:
        at += 1
        disk = MemoryDisk()
        store = open_store(disk, strict=strict)
        faults = Faults(disk)
        faults.arm(at, error)
        try:
            put(store, chunk, bytes(5000))
        except type(error):
            failed = True
        else:
            failed = False
        faults.disarm()
        store.close()
        store = open_store(disk, strict=strict)
        assert drafts(disk) == []
        assert list(store.list(3)) == ([] if failed else [chunk])
        put(store, chunk, bytes(5000))
        assert read(store, chunk) == bytes(5000)
        store.close()
    assert at > (12 if strict else 8)


def test_everything_at_once() -> None:
    """Writers, readers, a remover and somebody who looks at what is pending, on a few chunks."""
    store = open_store(MemoryDisk())
    chunks = [ChunkId(n, 0, 5) for n in range(3)]
    problems: list[BaseException] = []
    done = threading.Event()

    def work(act: Callable[[random.Random], None], seed: int, rounds: int) -> None:
        """Without end if ``rounds`` is 0: until the others are through."""
        rng = random.Random(seed)
        try:
            for _ in range(rounds) if rounds else iter(done.is_set, True):
                act(rng)
        except BaseException as exc:
            problems.append(exc)

    def change(rng: random.Random) -> None:
        chunk = rng.choice(chunks)
        data = rng.randbytes(rng.randrange(1, 9_000))
        update = write(rng.randrange(20_000), data, rng.randrange(1 << 30), chunk=chunk)
        with store.versions.lock(chunk):
            store.versions.prepare(chunk, update, [data])
            if rng.random() < 0.3:
                store.versions.drop(chunk)
                return
            with contextlib.suppress(ChunkNotFound):  # it was removed meanwhile
                store.versions.commit(chunk)

    def look(rng: random.Random) -> None:
        with contextlib.suppress(ChunkNotFound, ChunkPending):
            file, info = store.versions.open_settled(rng.choice(chunks))
            view = memoryview(bytearray(info.length))
            assert file.preadv([view], 0) == info.length
            file.close()
            assert crc32c(view) == info.crc32c
        with contextlib.suppress(ChunkNotFound):
            store.recheck(rng.choice(chunks))

    def count(rng: random.Random) -> None:
        assert set(store.versions.pendings(5, scan=True)) <= set(chunks)

    def remove(rng: random.Random) -> None:
        store.remove(rng.choice(chunks))

    writers = [threading.Thread(target=work, args=(change, n, 150)) for n in range(3)]
    writers.append(threading.Thread(target=work, args=(remove, 3, 30)))
    others = [threading.Thread(target=work, args=(act, 4, 0)) for act in (look, look, count)]
    for thread in (*writers, *others):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in others:
        thread.join()
    assert problems == []
    for chunk in chunks:
        with store.versions.lock(chunk):
            store.versions.drop(chunk)
    assert not list(store.versions.pendings(5, scan=True)) and len(store.versions.locks) == 0
    store.close()
