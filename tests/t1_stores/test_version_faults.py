"""Disks that fail while versions are made: each operation in turn, in every way there is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvfs_base.errors import ChunkNotFound, DiskFull, KvfsError, TargetFailed
from kvfs_base.os_disk import OsDisk, disk_error
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from t1_stores.chain_chunks import (
    CHUNK,
    Faults,
    commit,
    cut,
    open_store,
    pending,
    prepare,
    read,
    update,
    whole,
    write,
)

OLD = os.urandom(20_000)
MORE = os.urandom(9_000)
NEIGHBOUR = ChunkId(78, 0, CHUNK.chain)


def _cut(store: ChunkStore) -> None:
    with store.versions.lock(CHUNK):
        store.versions.prepare(CHUNK, cut(4_097, 2), [])


def _whole(store: ChunkStore) -> None:
    with store.versions.lock(CHUNK):
        store.versions.prepare_whole(CHUNK, whole(MORE, 2, 2), [MORE[:5_000], MORE[5_000:]])


CHANGES: dict[str, tuple[bytes, Callable[[ChunkStore], object]]] = {
    "first": (MORE, lambda store: prepare(store, 0, MORE, 2)),
    "append": (OLD + MORE, lambda store: prepare(store, 20_000, MORE, 2)),
    "overwrite": (
        OLD[:5_000] + MORE + OLD[14_000:],
        lambda store: prepare(store, 5_000, MORE, 2),
    ),
    "cut": (OLD[:4_097], _cut),
    "whole": (MORE, _whole),
}
_errors = pytest.mark.parametrize(
    "error",
    [
        DiskFull(path="x"),
        TargetFailed(detail="EIO"),
        disk_error(OSError(30, os.strerror(30)), "x"),
    ],
    ids=["full", "eio", "read-only"],
)


def content(store: ChunkStore) -> bytes | None:
    try:
        return read(store)
    except ChunkNotFound:
        return None


def fails(error: KvfsError, act: Callable[[], object]) -> bool:
    try:
        act()
    except type(error):
        return True
    return False


@pytest.mark.logs_warnings
@pytest.mark.parametrize("waits", [False, True], ids=["", "another-pending"])
@pytest.mark.parametrize("strict", [False, True], ids=["cache", "strict"])
@pytest.mark.parametrize("name", CHANGES)
@_errors
def test_what_failed_to_be_prepared_is_not_there(
    error: KvfsError, name: str, strict: bool, waits: bool
) -> None:
    """And what was pending before is not lost: the chain may have committed it behind us."""
    new, make = CHANGES[name]
    old = None if name == "first" else OLD
    at, failed = 0, True
    while failed:
        at += 1
        disk = MemoryDisk()
        store = open_store(disk, strict=strict)
        update(store, 0, b"neighbour", chunk=NEIGHBOUR)
        if old is not None:
            update(store, 0, old)
        before = prepare(store, 0, b"waits", 7) if waits else None
        faults = Faults(disk)
        faults.arm(at, error)
        failed = fails(error, lambda s=store: make(s))  # type: ignore[misc]
        failed_at_last = failed and faults.last == "sync_directory"
        faults.disarm()
        healthy = store.healthy
        assert healthy == (not failed or isinstance(error, DiskFull)), at
        for again in (False, True):
            if again or not healthy:
                store.close()
                store = open_store(disk, strict=strict)
            assert content(store) == old and read(store, NEIGHBOUR) == b"neighbour"
            waiting = pending(store)
            if not failed:
                assert waiting is not None and waiting.sequence == 2
            elif healthy and not failed_at_last:
                assert waiting == before, at
        if healthy:  # who asks again gets it
            make(store)
            commit(store)
            assert content(store) == new
        assert drafts(disk) == []
        store.close()
    assert at > 4


@pytest.mark.logs_warnings
@pytest.mark.parametrize("strict", [False, True], ids=["cache", "strict"])
@pytest.mark.parametrize("name", CHANGES)
@_errors
def test_a_version_is_committed_or_still_pending(error: KvfsError, name: str, strict: bool) -> None:
    new, make = CHANGES[name]
    old = None if name == "first" else OLD
    at, failed = 0, True
    while failed:
        at += 1
        disk = MemoryDisk()
        store = open_store(disk, strict=strict)
        if old is not None:
            update(store, 0, old)
        make(store)
        faults = Faults(disk)
        faults.arm(at, error)
        failed = fails(error, lambda s=store: commit(s))  # type: ignore[misc]
        faults.disarm()
        if not store.healthy:
            with pytest.raises(TargetFailed):
                read(store)
            store.close()
            store = open_store(disk, strict=strict)
        if pending(store) is not None:
            assert failed and content(store) == old
            commit(store)
        assert content(store) == new and pending(store) is None
        store.close()
    assert at > (2 if strict else 1)


@pytest.mark.logs_warnings
@pytest.mark.parametrize("offset", [20_000, 3], ids=["append", "copy"])
@_errors
def test_what_cannot_be_dropped_is_still_pending(error: KvfsError, offset: int) -> None:
    at, failed = 0, True
    while failed:
        at += 1
        disk = MemoryDisk()
        store = open_store(disk, strict=True)
        update(store, 0, OLD)
        made = prepare(store, offset, MORE, 2)
        faults = Faults(disk)
        faults.arm(at, error)

        def drop(store: ChunkStore = store) -> None:
            with store.versions.lock(CHUNK):
                store.versions.drop(CHUNK)

        failed = fails(error, drop)
        faults.disarm()
        if not store.healthy:
            store.close()
            store = open_store(disk)
        assert pending(store) in ((made, None) if failed else (None,))
        drop(store)
        assert pending(store) is None and read(store) == OLD
        store.close()
    assert at > 3


@pytest.mark.logs_warnings
def test_a_failed_disk_is_not_asked_again() -> None:
    disk = MemoryDisk()
    store = open_store(disk, strict=True)
    store.set_target_id(9)
    update(store, 0, OLD)
    faults = Faults(disk)
    faults.arm_operation("sync", TargetFailed(detail="lost write"))
    with pytest.raises(TargetFailed):
        prepare(store, 20_000, MORE, 2)
    versions = store.versions
    other = msgspec.structs.replace(whole(b"x", 4), inode=78, number=0)
    seen: list[str] = []
    disk.before = lambda operation, path: seen.append(operation)
    operations: list[Callable[[], object]] = [
        lambda: versions.open(CHUNK),
        lambda: versions.open_settled(NEIGHBOUR),
        lambda: versions.committed(CHUNK),
        lambda: versions.pending(NEIGHBOUR),
        lambda: versions.prepare(NEIGHBOUR, write(0, b"x"), [b"x"]),
        lambda: versions.prepare_whole(CHUNK, whole(b"x", 4), [b"x"]),
        lambda: versions.replace(NEIGHBOUR, other, [b"x"]),
        lambda: versions.commit(CHUNK),
        lambda: versions.drop(CHUNK),
        lambda: versions.sync(CHUNK),
        lambda: versions.forget_pending(5),
        lambda: versions.seen(CHUNK, 1, 1),
        lambda: store.remove(CHUNK),
        lambda: store.remove_range(77, 0, 5, 5),
        lambda: store.drop_chain(5),
        lambda: store.sync_removals([77], 5),
        lambda: list(store.list(5)),
        store.chains,
    ]
    for operation in operations:
        with pytest.raises(TargetFailed) as caught:
            operation()
        assert (caught.value.target_id, caught.value.detail) == (9, "lost write")
    assert seen == []
    store.close()


def test_a_full_disk_takes_nothing_and_keeps_everything() -> None:
    disk = MemoryDisk(capacity_bytes=60_000)
    store = open_store(disk)
    update(store, 0, OLD)
    update(store, 20_000, bytes(10_000), 2)
    for offset, count in ((30_000, 40_000), (0, 30_001), (50_000, 20_000)):
        with pytest.raises(DiskFull):
            prepare(store, offset, os.urandom(count), 3)
        assert store.healthy and read(store) == OLD + bytes(10_000)
        assert pending(store) is None and drafts(disk) == []
    assert disk.usage().free_bytes > 29_000  # what was begun takes no room
    update(store, 30_000, MORE, 4)
    assert read(store) == OLD + bytes(10_000) + MORE
    store.close()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[str]:
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    path = str(tmp_path / "small")
    os.mkdir(path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_the_kernel_says_that_the_disk_is_full(small_file_system: str) -> None:
    """In the middle of a write."""
    store = open_store(OsDisk(small_file_system))
    update(store, 0, OLD)
    for offset in (20_000, 0):
        with pytest.raises(DiskFull):
            prepare(store, offset, bytes(2 << 20), 2)
        assert store.healthy and read(store) == OLD and pending(store) is None
    update(store, 20_000, MORE, 3)
    assert read(store) == OLD + MORE
    store.close()


@pytest.mark.logs_warnings
def test_the_kernel_says_that_the_file_system_is_read_only(small_file_system: str) -> None:
    """As ext4 makes it after an error: the target is out of service, with the reason."""
    store = open_store(OsDisk(small_file_system))
    update(store, 0, OLD)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", small_file_system], check=True)
    with pytest.raises(TargetFailed) as caught:
        open_store(OsDisk(small_file_system))
    assert "Read-only file system" in caught.value.detail
    subprocess.run(["mount", "-o", "remount,rw", small_file_system], check=True)
    store = open_store(OsDisk(small_file_system))
    # A file that is open for writing keeps a file system from becoming read-only.
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", small_file_system], check=True)
    for offset in (20_000, 0):
        with pytest.raises(TargetFailed) as caught:
            prepare(store, offset, MORE, 2)
        assert "Read-only file system" in caught.value.detail
    assert not store.healthy
    subprocess.run(["mount", "-o", "remount,rw", small_file_system], check=True)
    with pytest.raises(TargetFailed):
        read(store)
    store = open_store(OsDisk(small_file_system))
    assert read(store) == OLD and pending(store) is None
    store.close()
