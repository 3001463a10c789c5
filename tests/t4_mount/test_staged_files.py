"""Which files the kernel writes by itself, and what others see and do meanwhile."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.mount.adoptions import Adoptions
from kvfs.mount.passed_writes import PassedWrites
from kvfs_base.errors import Conflict, InvalidRequest, KvfsError
from kvfs_base.limits import (
    FILE_CHUNK_BYTES,
    KIB,
    PAGE_BYTES,
)
from kvfs_base.os_env import os_env
from t4_mount.file_checker import KEEP_SIZE, PUNCH_HOLE, fallocate
from t4_mount.harness import COLLECTED_SECONDS, Cluster, as_user, wait_until
from t4_mount.test_passed_writes import (
    SEED,
    is_passed,
    new_file,
    other,
    staged,
    staged_ahead,
)

__all__ = ["other"]
PLAIN = os.O_CREAT | os.O_RDWR
LATE = bytes(range(256)) * 16


def laid_out(path: Path) -> int:
    """As programs do that make their files first and open them for writing then."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    return os.open(path, os.O_CREAT | os.O_RDWR)


def replaced(path: Path) -> int:
    path.write_bytes(b"what was there before" * 1000)
    return os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR)


WAYS = {
    "exclusively": lambda path: os.open(path, PLAIN | os.O_EXCL),
    "plainly": lambda path: os.open(path, PLAIN),
    "write-only": lambda path: os.open(path, os.O_CREAT | os.O_WRONLY),
    "by a shell": lambda path: os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY),
    "laid out": laid_out,
    "replaced": replaced,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_staged(work: Path, cluster: Cluster, other: Path, way: str) -> None:
    path = work / "file"
    with new_file(cluster, path, WAYS[way]) as descriptor:
        os.pwrite(descriptor, LATE, len(SEED))
        assert path.read_bytes() == SEED + LATE
    wait_until(lambda: (other / "file").read_bytes() == SEED + LATE)
    inode = path.stat().st_ino
    assert [p.stat().st_size for p in cluster.chunk_files(inode)] == [len(SEED + LATE)]
    assert path.read_bytes() == SEED + LATE


@pytest.mark.parametrize("flags", [os.O_APPEND, os.O_SYNC, os.O_DSYNC])
def test_what_is_not(work: Path, cluster: Cluster, flags: int) -> None:
    """Logs, and what is synced write by write."""
    with new_file(cluster, work / "warm"):
        pass
    for number in range(10):
        ahead = staged_ahead(cluster)
        descriptor = os.open(work / str(number), PLAIN | flags)
        os.write(descriptor, SEED)
        assert not is_passed(cluster, ahead, descriptor)
        os.close(descriptor)
    (work / "old").write_bytes(SEED)
    ahead = staged_ahead(cluster)
    with (work / "old").open("r+b", buffering=0) as old:
        old.write(LATE)
        assert not is_passed(cluster, ahead, old.fileno())


def test_openers_of_one_mount_share_the_file(work: Path, cluster: Cluster, other: Path) -> None:
    path = work / "file"
    with new_file(cluster, path, WAYS["plainly"]) as descriptor:
        with path.open("rb", buffering=0) as reader, path.open("r+b", buffering=0) as writer:
            assert reader.read() == SEED
            writer.write(b"FIRST and more")
            assert reader.read() == b" and more"
            with path.open("ab", buffering=0) as appender:
                appender.write(b", appended")
            assert path.read_bytes() == b"FIRST and more, appended"
            with path.open("wb", buffering=0) as truncating:
                assert os.fstat(descriptor).st_size == path.stat().st_size == 0
                truncating.write(b"anew")
            assert os.pread(descriptor, 100, 0) == b"anew"
            reader.seek(0)
            assert reader.read() == b"anew"
        path.chmod(0o640)
        assert path.stat().st_mode & 0o777 == 0o640 and path.stat().st_size == 4
    wait_until(lambda: (other / "file").read_bytes() == b"anew")


def test_a_mapping_of_a_file_that_grows(work: Path, cluster: Cluster, other: Path) -> None:
    with new_file(cluster, work / "file", WAYS["plainly"]) as descriptor:
        os.ftruncate(descriptor, 2 * PAGE_BYTES)
        with mmap.mmap(descriptor, 2 * PAGE_BYTES) as view:
            view[PAGE_BYTES:] = LATE
            os.pwrite(descriptor, b"written", 8)
            assert view[8:15] == b"written"
            view.flush()
    expected = bytearray(SEED.ljust(PAGE_BYTES, b"\0") + LATE)
    expected[8:15] = b"written"
    wait_until(lambda: (other / "file").read_bytes() == expected)


def test_another_mount_sees_what_was_synced_and_writes_beside(
    work: Path, cluster: Cluster, other: Path
) -> None:
    with new_file(cluster, work / "file", WAYS["plainly"]) as descriptor:
        assert (other / "file").read_bytes() in (b"", SEED)
        os.fsync(descriptor)
        assert (other / "file").read_bytes() == SEED
        with (other / "file").open("r+b", buffering=0) as beside:
            os.pwrite(beside.fileno(), LATE, PAGE_BYTES)
        os.pwrite(descriptor, b"more", len(SEED))
    expected = (SEED + b"more").ljust(PAGE_BYTES, b"\0") + LATE
    wait_until(lambda: (other / "file").read_bytes() == expected)
    assert (work / "file").read_bytes() == expected


def test_another_mount_makes_the_chunk_first(work: Path, cluster: Cluster, other: Path) -> None:
    with new_file(cluster, work / "file", WAYS["plainly"]) as descriptor:
        with (other / "file").open("r+b", buffering=0) as beside:
            os.pwrite(beside.fileno(), LATE, PAGE_BYTES)
            os.fsync(beside.fileno())
        os.pwrite(descriptor, b"more", len(SEED))
        os.fsync(descriptor)
        os.pwrite(descriptor, b"FIRST", 0)
    expected = b"FIRSTmore".ljust(PAGE_BYTES, b"\0") + LATE
    wait_until(lambda: (other / "file").read_bytes() == expected)
    assert (work / "file").read_bytes() == expected


def test_another_mount_truncates_meanwhile(work: Path, cluster: Cluster, other: Path) -> None:
    """That takes the chunk away to which the kernel goes on writing."""
    with new_file(cluster, work / "file", WAYS["plainly"]) as descriptor:
        os.fsync(descriptor)
        os.truncate(other / "file", 0)
        os.pwrite(descriptor, LATE, 0)
    wait_until(lambda: (other / "file").read_bytes() == LATE)
    assert (work / "file").read_bytes() == LATE


def test_a_rename_over_another_file(work: Path, cluster: Cluster, other: Path) -> None:
    (work / "file").write_bytes(b"old")
    with new_file(cluster, work / "file.tmp", WAYS["plainly"]) as descriptor:
        (work / "file.tmp").rename(work / "file")
        os.pwrite(descriptor, b" and last", len(SEED))
        assert (work / "file").read_bytes() == SEED + b" and last"
    wait_until(lambda: (other / "file").read_bytes() == SEED + b" and last")


@pytest.mark.parametrize("by", ["unlink", "rename", "another mount"])
def test_one_that_loses_its_name_leaves_nothing(
    work: Path, cluster: Cluster, other: Path, by: str
) -> None:
    before = staged(cluster)
    with new_file(cluster, work / "file", WAYS["plainly"]) as descriptor:
        inode = os.fstat(descriptor).st_ino
        if by == "rename":
            (work / "new").write_bytes(b"new")
            (work / "new").rename(work / "file")
        elif by == "unlink":
            (work / "file").unlink()
        else:
            (other / "file").unlink()
        os.pwrite(descriptor, LATE, 0)
        assert os.pread(descriptor, len(LATE), 0) == LATE
    wait_until(lambda: staged(cluster) <= before)
    wait_until(lambda: not cluster.chunk_files(inode), COLLECTED_SECONDS)
    assert [path.read_bytes() for path in work.iterdir()] == [b"new"] * (by == "rename")


def test_who_makes_a_name_at_the_same_time(work: Path, cluster: Cluster, other: Path) -> None:
    """Both get the file, and write a page each; of two that insist on making it only one."""
    with new_file(cluster, work / "warm", WAYS["plainly"]):
        pass
    pages = [bytes([letter]) * PAGE_BYTES for letter in b"AB"]

    def write(path: Path, who: int) -> None:
        descriptor = os.open(path, PLAIN)
        assert os.pwrite(descriptor, pages[who], who * PAGE_BYTES) == PAGE_BYTES
        os.close(descriptor)

    def insist(path: Path, who: int) -> bytes:
        try:
            descriptor = os.open(path, PLAIN | os.O_EXCL)
        except FileExistsError:
            return b""
        os.write(descriptor, pages[who])
        os.close(descriptor)
        return pages[who]

    with ThreadPoolExecutor(2) as pool:
        for number in range(30):
            list(pool.map(write, [work / f"{number}"] * 2, range(2)))
            assert (work / f"{number}").read_bytes() == pages[0] + pages[1]
            paths = work / f"only-{number}", other / f"only-{number}"
            (won,) = filter(None, pool.map(insist, paths, range(2)))
            assert [path.read_bytes() for path in paths] == [won] * 2


def test_set_id_bits_go_with_a_write(work: Path, cluster: Cluster) -> None:
    """Which the kernel leaves to the mount."""
    with new_file(cluster, work / "warm", WAYS["plainly"]):
        pass
    work.chmod(0o777)
    for number in range(10):
        path = work / str(number)
        os.close(os.open(path, PLAIN))
        path.chmod(0o6777)
        assert as_user(1234, work, lambda: os.write(os.open(path.name, os.O_WRONLY), b"x")) == 0  # noqa: B023
        assert path.stat().st_mode & 0o7777 == 0o777 and path.read_bytes() == b"x"


def test_holes_are_those_of_the_file_below(work: Path, cluster: Cluster, other: Path) -> None:
    size = 1 << 40
    with new_file(cluster, work / "file", WAYS["plainly"]) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == len(SEED)
        os.pwrite(descriptor, LATE, 5 * FILE_CHUNK_BYTES)
        os.pwrite(descriptor, LATE, size - len(LATE))
        os.fsync(descriptor)
        assert os.lseek(descriptor, PAGE_BYTES, os.SEEK_DATA) == 5 * FILE_CHUNK_BYTES
        # What was copied already becomes a hole there, too.
        fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 0, size - 5)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            os.ftruncate(descriptor, 1 << 50)
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(descriptor, size, os.SEEK_DATA)
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == size - len(LATE)
        assert os.pread(descriptor, 2 * PAGE_BYTES, size - 6) == b"\0" + LATE[-5:]
    wait_until(lambda: (other / "file").stat().st_size == size)
    for path in (work / "file", other / "file"):
        with path.open("rb") as file:
            for at in (0, 5 * FILE_CHUNK_BYTES, size - len(LATE)):
                file.seek(at)
                assert file.read(len(LATE) - 5) == bytes(len(LATE) - 5)
            assert file.read() == LATE[-5:]


@contextlib.contextmanager
def three_chunks(cluster: Cluster, path: Path, other: Path) -> Iterator[tuple[int, bytearray]]:
    """Since another mount may write to it: else it would stay one chunk."""
    with (
        new_file(cluster, path, WAYS["plainly"]) as descriptor,
        (other / path.name).open("r+b"),
    ):
        data = bytearray(os.urandom(2 * FILE_CHUNK_BYTES + 64 * KIB))
        assert os.pwrite(descriptor, data, 0) == len(data)
        yield descriptor, data


def test_a_sync_writes_only_what_differs(work: Path, cluster: Cluster, other: Path) -> None:
    """As a data base does that was made in this session."""
    with three_chunks(cluster, work / "file", other) as (descriptor, data):
        os.fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        _, second, third = sorted(cluster.chunk_files(inode), key=lambda path: path.name)
        stamps = second.stat().st_mtime_ns, third.stat().st_mtime_ns
        for page in range(3):
            at = 2 * FILE_CHUNK_BYTES + page * PAGE_BYTES
            data[at : at + len(LATE)] = LATE
            os.pwrite(descriptor, LATE, at)
            os.fsync(descriptor)
            assert (other / "file").read_bytes() == data
        assert second.stat().st_mtime_ns == stamps[0]
        assert third.stat().st_mtime_ns != stamps[1]
    assert (work / "file").read_bytes() == data


def test_the_mount_is_killed_before_the_close(own_cluster: Cluster) -> None:
    """What was closed is there, and what is not synced leaves an empty file."""
    mountpoint = own_cluster.directory / "mnt"
    role = own_cluster.mount(mountpoint)
    with new_file(own_cluster, mountpoint / "closed", WAYS["by a shell"]):
        pass
    with new_file(own_cluster, mountpoint / "open", WAYS["by a shell"]) as descriptor:
        role.kill()
        os.pwrite(descriptor, LATE, 0)  # the kernel needs nobody to go on
        with own_cluster.mounted(own_cluster.directory / "again") as again:
            assert (again / "closed").read_bytes() == SEED
            assert (again / "open").read_bytes() == b""
            (again / "open").write_bytes(LATE)
            assert (again / "open").read_bytes() == LATE


class Chunks:
    """What PassedWrites asks of the data path: notes what was copied."""

    chunk_bytes = 1000

    def __init__(self) -> None:
        self.copies: list[tuple[int, int]] = []
        self.adoption: Adoption | None = None

    def begin_adopt(self, staged: Any) -> Adoption | None:
        return self.adoption

    def adopt(self, staged: Any) -> None: ...

    def copy_from(self, fd: int, start: int, end: int, most: int, known_end: int) -> int:
        self.copies.append((start, end))
        return end


class Adoption:
    """Is answered when a test says so."""

    def __init__(self) -> None:
        self.ours, self.server = socket.socketpair()
        self.error: KvfsError | None = None
        self.given_up = False

    def fileno(self) -> int:
        return self.ours.fileno()

    def finish(self) -> None:
        self.ours.recv(1)
        if self.error is not None:
            raise self.error

    def give_up(self) -> None:
        self.given_up = True

    def close(self) -> None:
        self.ours.close()
        self.server.close()


async def record(size: int) -> None: ...


async def refuse() -> None:
    raise InvalidRequest(detail="others may write")


@contextlib.contextmanager
def passed_writes(
    directory: Path, in_thread: Callable[..., Awaitable[Any]]
) -> Iterator[tuple[PassedWrites, Chunks, int]]:
    """Of a file of chunks of 1,000 bytes, with its descriptor."""
    fd = os.open(directory / "staged", os.O_CREAT | os.O_RDWR)
    backend: Any = SimpleNamespace(in_thread=in_thread, env=os_env(), adoptions=Adoptions())
    chunks: Any = Chunks()
    staged_file: Any = SimpleNamespace(fd=fd)
    yield PassedWrites(backend, chunks, staged_file, refuse), chunks, fd
    os.close(fd)


@contextlib.contextmanager
def asked_soon(directory: Path) -> Iterator[tuple[PassedWrites, Adoptions, Adoption, int]]:
    """As ``passed_writes``, with a chunk server whose answers nobody waits for in a thread."""

    async def in_thread(function: Any, *arguments: Any) -> Any:
        raise AssertionError("a thread")

    with (
        passed_writes(directory, in_thread) as (passed, chunks, fd),
        contextlib.closing(Adoption()) as adoption,
    ):
        chunks.adoption = adoption
        yield passed, passed._backend.adoptions, adoption, fd


def test_a_chunk_that_was_asked_for_while_the_kernel_wrote(tmp_path: Path) -> None:
    """What it has written until the flush is stored with it: nothing is left for the release."""
    with asked_soon(tmp_path) as (passed, adoptions, adoption, fd):
        done: list[bool] = []
        passed.write_begins()
        passed.write_begins()
        assert list(adoptions.left) == [adoption.fileno()] and not adoptions.awaited
        os.ftruncate(fd, 900)
        assert passed.look() and not passed.is_stored
        assert passed.store_soon(lambda: done.append(passed.is_stored))
        assert list(adoptions.awaited) == [adoption.fileno()] and not adoptions.left
        adoption.server.send(b"x")
        adoptions.awaited.popitem()[1](True)
        assert done == [True] and passed.has_chunks
        os.ftruncate(fd, 950)
        assert passed.look() and not passed.is_stored
        assert passed.store_soon(lambda: done.append(passed.is_stored))
        assert done == [True, True]
        os.unlink(tmp_path / "staged")  # somebody has removed the chunk: all of it is copied
        os.ftruncate(fd, 960)
        assert passed.look() and not passed.store_soon(lambda: done.append(False))
        assert not passed.is_stored and done == [True, True]


def test_an_answer_that_has_come_is_not_waited_for(tmp_path: Path) -> None:
    with asked_soon(tmp_path) as (passed, adoptions, adoption, fd):
        done: list[bool] = []
        os.ftruncate(fd, 900)
        assert passed.look()
        passed.write_begins()
        adoption.server.send(b"x")
        assert passed.store_soon(lambda: done.append(passed.is_stored))
        assert done == [True] and not (adoptions.left or adoptions.awaited)


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_a_chunk_that_is_not_given_is_left_to_a_task(tmp_path: Path, how: str) -> None:
    with asked_soon(tmp_path) as (passed, adoptions, adoption, fd):
        done: list[bool] = []
        os.ftruncate(fd, 900)
        assert passed.look()
        assert passed.store_soon(lambda: done.append(passed.has_chunks))
        assert not (passed.is_stored or passed.close_now())
        adoption.error = Conflict()
        adoption.server.send(b"x")
        adoptions.awaited.popitem()[1](how == "refused")
        assert done == [False] and passed.unstored and passed.lock.is_free
        assert adoption.given_up == (how == "silent")


def test_more_than_a_chunk_is_not_stored_soon(tmp_path: Path) -> None:
    with asked_soon(tmp_path) as (passed, adoptions, _, fd):
        os.ftruncate(fd, 1001)
        assert passed.look() and not passed.store_soon(lambda: None)
        assert not (adoptions.left or adoptions.awaited)


def test_a_rest_is_copied_unasked_when_it_has_doubled(tmp_path: Path) -> None:
    """Whoever writes for hours without a sync would have it copied every few seconds."""

    async def in_thread(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    with passed_writes(tmp_path, in_thread) as (passed, chunks, fd):
        for size, worth in [(900, True), (1100, True), (1199, False), (1200, True), (1399, False)]:
            os.ftruncate(fd, size)
            assert passed.look() and passed.is_worth_storing == worth
            if worth:
                trio.run(passed.store, record)
        assert chunks.copies == [(1000, 1100), (1000, 1200)]


def test_nobody_closes_what_is_being_stored(tmp_path: Path) -> None:
    """Who opened it during the last flush and closes it right after, for instance."""

    async def body() -> None:
        goes_on = trio.Event()

        async def in_thread(function: Any, *arguments: Any) -> Any:
            await goes_on.wait()
            return function(*arguments)

        with passed_writes(tmp_path, in_thread) as (passed, chunks, fd):
            os.ftruncate(fd, 1100)
            os.utime(fd, (1, 1))  # long ago: nothing is doubtful
            assert passed.look()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(passed.store, record)
                await trio.testing.wait_all_tasks_blocked()
                assert not passed.is_stored and not passed.close_now()
                nursery.start_soon(passed.store, record)
                await trio.testing.wait_all_tasks_blocked()
                goes_on.set()
            assert passed.is_stored and chunks.copies == [(1000, 1100)]

    trio.run(body)
