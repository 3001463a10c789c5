"""Two mounts that make one file longer: nothing that one has written is cut by the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfs_base.limits import (
    FILE_CHUNK_BYTES,
    KIB,
    MIB,
    PAGE_BYTES,
)
from kvfs_metadata.messages import Statistics
from t4_mount.file_checker import fallocate
from t4_mount.harness import Cluster, wait_until
from t4_mount.test_passed_writes import SEED, new_file, other

__all__ = ["other"]
FIRST = b"first".ljust(PAGE_BYTES, b"-")
LATE = b"late-" * 3000
FAR = 40 * PAGE_BYTES


def staged_file(cluster: Cluster, path: Path) -> contextlib.AbstractContextManager[int]:
    return new_file(cluster, path)


@contextlib.contextmanager
def plain_file(cluster: Cluster, path: Path) -> Iterator[int]:
    """One that the mount writes."""
    first = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, SEED)
    yield descriptor
    os.close(descriptor)
    os.close(first)


def write_far(path: Path) -> bytes:
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), FIRST, FAR)
    return FIRST


def truncate_up(path: Path) -> bytes:
    os.truncate(path, FAR)
    return b""


def allocate(path: Path) -> bytes:
    with path.open("r+b", buffering=0) as file:
        fallocate(file.fileno(), 0, 0, FAR)
    return b""


@pytest.mark.parametrize("lengthen", [write_far, truncate_up, allocate])
@pytest.mark.parametrize("make", [staged_file, plain_file])
def test_a_hole_leaves_what_another_mount_has_just_written(
    work: Path,
    cluster: Cluster,
    other: Path,
    make: Callable[..., contextlib.AbstractContextManager[int]],
    lengthen: Callable[[Path], bytes],
) -> None:
    with make(cluster, work / "file") as descriptor:
        os.fsync(descriptor)
        os.pwrite(descriptor, LATE, len(SEED))  # not recorded yet
        expected = (SEED + LATE).ljust(FAR, b"\0") + lengthen(other / "file")
        os.pwrite(descriptor, FIRST, 20 * PAGE_BYTES)
        os.fsync(descriptor)
    expected = expected[: 20 * PAGE_BYTES] + FIRST + expected[21 * PAGE_BYTES :]
    for path in (work, other):
        wait_until(lambda path=path: (path / "file").stat().st_size == len(expected))
        assert (path / "file").read_bytes() == expected


def test_allocating_less_than_another_mount_has_recorded(
    work: Path, cluster: Cluster, other: Path
) -> None:
    with plain_file(cluster, work / "file") as descriptor:
        os.fsync(descriptor)
        with (other / "file").open("r+b", buffering=0) as file:
            os.pwrite(descriptor, LATE, len(SEED))
            os.fsync(descriptor)
            fallocate(file.fileno(), 0, 0, len(SEED) + 10)
    for path in (work, other):
        wait_until(lambda path=path: (path / "file").stat().st_size == len(SEED + LATE))
        assert (path / "file").read_bytes() == SEED + LATE


@pytest.mark.parametrize("place", [FAR, FILE_CHUNK_BYTES + FAR])
def test_who_reads_the_chunk_itself_and_opens_it_for_writing(
    work: Path, other: Path, place: int
) -> None:
    old = os.urandom(MIB)
    (work / "file").write_bytes(old)
    os.utime(work / "file", (1, 1))  # it looks finished: the kernel reads it by itself
    wait_until(lambda: (other / "file").stat().st_mtime == 1)
    with (other / "file").open("rb", buffering=0) as reading:
        assert reading.read() == old
        with (work / "file").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), LATE, MIB)
            with (other / "file").open("r+b", buffering=0) as writing:
                os.pwrite(writing.fileno(), FIRST, MIB + place)
    expected = (old + LATE).ljust(MIB + place, b"\0") + FIRST
    for path in (work, other):
        wait_until(lambda path=path: (path / "file").stat().st_size == len(expected))
        assert (path / "file").read_bytes() == expected


@pytest.mark.parametrize("make", [staged_file, plain_file])
def test_two_mounts_in_turns_and_at_the_same_time(
    work: Path,
    cluster: Cluster,
    other: Path,
    make: Callable[..., contextlib.AbstractContextManager[int]],
) -> None:
    """Each writes pages of its own, never the next one: most of them leave a hole."""
    pages = 400
    with make(cluster, work / "file"):
        pass

    def write(path: Path, mine: int) -> None:
        file = os.open(path, os.O_WRONLY)
        for number in range(10 + mine, pages, 2):
            os.pwrite(file, b"%08d" % number * (PAGE_BYTES // 8), (number ^ 6) * PAGE_BYTES)
            if number % 50 == mine:
                os.close(file)
                file = os.open(path, os.O_WRONLY)
        os.close(file)

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(write, d / "file", n) for n, d in enumerate((work, other))]:
            job.result()
    data = bytearray(pages * PAGE_BYTES)
    data[: len(SEED)] = SEED
    for number in range(10, pages):
        at = (number ^ 6) * PAGE_BYTES
        data[at : at + PAGE_BYTES] = b"%08d" % number * (PAGE_BYTES // 8)
    for path in (work, other):
        wait_until(lambda path=path: (path / "file").stat().st_size == len(data))
        assert (path / "file").read_bytes() == data


def test_what_a_killed_mount_left_is_cut_when_its_session_is_over(hasty_cluster: Cluster) -> None:
    """Another mount that had the file open does not matter once it has closed it."""
    mountpoint = hasty_cluster.directory / "mnt"
    with hasty_cluster.mounted(hasty_cluster.directory / "living") as living:
        role = hasty_cluster.mount(mountpoint)
        file = (mountpoint / "file").open("ab", buffering=0)
        file.write(b"begin")
        os.fsync(file.fileno())
        file.write(b"lost" * KIB)
        with (living / "file").open("r+b", buffering=0) as also:
            also.write(b"BEGIN")
        role.kill()
        with pytest.raises(OSError):
            file.close()
        # A question may overtake the end of the connection: then its mount is taken for alive.
        with hasty_cluster.client() as client:
            wait_until(lambda: client.call(Statistics())["sessions_attached"] == 1)
        os.truncate(living / "file", MIB)
        assert (living / "file").read_bytes() == b"BEGIN" + bytes(MIB - 5)
