"""Files that are opened with O_SYNC or O_DSYNC: what `write` has returned outlives the mount."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path

import pytest

from kvfs_base.limits import (
    FILE_CHUNK_BYTES,
    KIB,
    MIB,
    PAGE_BYTES,
)
from t4_mount.harness import Cluster, as_user, wait_until
from t4_mount.test_mount_quotas import set_quota
from t4_mount.test_passed_writes import SEED, new_file

SYNCED = b"synced".ljust(PAGE_BYTES, b"s")
PLACES = {"first chunk": 3 * PAGE_BYTES, "behind it": FILE_CHUNK_BYTES + 100}


def after_a_kill(cluster: Cluster, name: str) -> bytes:
    """What another mount finds."""
    mountpoint = cluster.directory / "again"
    with cluster.mounted(mountpoint):
        return (mountpoint / name).read_bytes()


@pytest.fixture
def mountpoint(own_cluster: Cluster) -> Path:
    return own_cluster.directory / "mnt"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_another_opener_of_a_file_that_the_kernel_writes(
    own_cluster: Cluster, mountpoint: Path, flag: int, place: str
) -> None:
    at = PLACES[place]
    role = own_cluster.mount(mountpoint)
    with new_file(own_cluster, mountpoint / "file") as descriptor:
        synced = os.open(mountpoint / "file", os.O_RDWR | flag)
        os.pwrite(descriptor, SEED, PAGE_BYTES)
        assert os.pwrite(synced, SYNCED, at) == len(SYNCED)
        role.kill()
        with contextlib.suppress(OSError):
            os.close(synced)
    expected = (SEED.ljust(PAGE_BYTES, b"\0") + SEED).ljust(at, b"\0") + SYNCED
    assert after_a_kill(own_cluster, "file") == expected


def test_a_writer_of_a_file_that_the_kernel_reads(own_cluster: Cluster, mountpoint: Path) -> None:
    old = os.urandom(MIB)
    role = own_cluster.mount(mountpoint)
    (mountpoint / "file").write_bytes(old)
    os.utime(mountpoint / "file", (1, 1))  # it looks finished
    reading = os.open(mountpoint / "file", os.O_RDONLY)
    assert os.read(reading, 2 * MIB) == old
    synced = os.open(mountpoint / "file", os.O_WRONLY | os.O_APPEND | os.O_DSYNC)
    assert os.write(synced, SYNCED) == len(SYNCED)
    role.kill()
    for descriptor in (reading, synced):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    assert after_a_kill(own_cluster, "file") == old + SYNCED


@pytest.mark.parametrize("flags", [0, os.O_APPEND, os.O_DIRECT])
def test_a_file_with_one_opener(own_cluster: Cluster, mountpoint: Path, flags: int) -> None:
    role = own_cluster.mount(mountpoint)
    synced = os.open(mountpoint / "file", os.O_CREAT | os.O_WRONLY | os.O_DSYNC | flags)
    with mmap.mmap(-1, PAGE_BYTES) as page:
        page[:] = SYNCED
        assert os.writev(synced, [page]) == len(SYNCED)
    role.kill()
    with contextlib.suppress(OSError):
        os.close(synced)
    assert after_a_kill(own_cluster, "file") == SYNCED


def test_both_see_what_the_other_one_writes(work: Path, cluster: Cluster) -> None:
    with new_file(cluster, work / "file") as descriptor:
        synced = os.open(work / "file", os.O_RDWR | os.O_SYNC)
        appended = os.open(work / "file", os.O_RDWR | os.O_SYNC | os.O_APPEND)
        model = bytearray(SEED)
        for number in range(20):
            data = b"%d" % number * (1 + 700 * number)
            fd = (descriptor, synced, appended)[number % 3]
            at = len(model) if fd == appended else number * KIB
            assert os.pwrite(fd, data, at) == len(data)
            model.extend(bytes(max(0, at + len(data) - len(model))))
            model[at : at + len(data)] = data
            for reader in (descriptor, synced, appended):
                assert os.fstat(reader).st_size == len(model)
                assert os.pread(reader, 2 * len(model), 0) == model
        os.ftruncate(synced, 10)
        os.close(synced)
        os.close(appended)
        assert os.pread(descriptor, 100, 0) == model[:10]
        os.pwrite(descriptor, SEED, 10)
    assert (work / "file").read_bytes() == model[:10] + SEED


def test_appending_to_a_file_that_the_kernel_writes(work: Path, cluster: Cluster) -> None:
    with new_file(cluster, work / "file") as descriptor:
        appended = [os.open(work / "file", os.O_WRONLY | os.O_APPEND) for _ in range(3)]
        os.lseek(descriptor, 0, os.SEEK_END)
        for number in range(30):
            os.write(appended[number % 3], b"%02d" % number)
        os.pwrite(descriptor, b"FIRST", 0)
        for fd in appended:
            os.close(fd)
    expected = b"FIRST" + b"".join(b"%02d" % number for number in range(30))
    assert (work / "file").read_bytes() == expected


def test_set_id_bits_that_a_file_gets_while_the_kernel_writes_it(
    work: Path, cluster: Cluster
) -> None:
    """Whoever opens it then and is not root takes them away, as on any file system."""
    work.chmod(0o777)
    with new_file(cluster, work / "file") as descriptor:
        os.fchmod(descriptor, 0o6777)
        assert as_user(1000, work, lambda: os.write(os.open("file", os.O_WRONLY), b"x")) == 0
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o777
        os.pwrite(descriptor, b"y", 1)
    assert (work / "file").read_bytes() == b"xy" + SEED[2:]


def test_a_first_quota_above_a_file_that_the_kernel_writes(work: Path, cluster: Cluster) -> None:
    """The file learns of it when it is closed, or synced."""
    with new_file(cluster, work / "file") as descriptor:
        set_quota(cluster, work, 100 * KIB)
        os.pwrite(descriptor, bytes(MIB), 0)
        with pytest.raises(OSError, match="quota"):
            os.fsync(descriptor)
        os.ftruncate(descriptor, 50 * KIB)
        os.fsync(descriptor)
    wait_until(lambda: (work / "file").read_bytes() == bytes(50 * KIB))
