"""Quotas through a mount: EDQUOT where it is due, EXDEV between two; ``test_mount_failures`` kills
what counts."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvfs_base.limits import KIB, MIB
from kvfs_metadata.messages import GetQuota, SetQuota
from t4_mount.harness import Cluster, wait_until
from t4_mount.test_passthrough import require_passthrough

pytestmark = pytest.mark.both_frontends


def set_quota(cluster: Cluster, directory: Path, size: int, inodes: int | None = None) -> Any:
    with cluster.client() as client:
        return client.call(SetQuota(directory.stat().st_ino, size, inodes))


def used(cluster: Cluster, path: Path) -> int:
    with cluster.client() as client:
        found = client.call(GetQuota(path.stat().st_ino))
        assert found is not None
        return int(found.bytes_used)


def refused(action: Callable[[], object], code: int = errno.EDQUOT) -> None:
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == code, caught.value


def test_writes_beyond_a_quota(work: Path, cluster: Cluster) -> None:
    set_quota(cluster, work, 3 * MIB)
    data = os.urandom(2 * MIB)
    with (work / "file").open("x+b", buffering=0) as file:
        assert file.write(data) == len(data)
        assert used(cluster, work) == len(data)
        for at in (3 * MIB, 100 * MIB):  # behind a hole
            refused(lambda at=at: os.pwrite(file.fileno(), data[: 100 * KIB], at))
        os.pwrite(file.fileno(), data[:MIB], 2 * MIB)
        refused(lambda: os.pwrite(file.fileno(), data[: 100 * KIB], 3 * MIB))
        os.ftruncate(file.fileno(), len(data))
        assert os.fstat(file.fileno()).st_size == len(data) == (work / "file").stat().st_size
        assert os.pread(file.fileno(), 10, len(data)) == b""
        # What was refused does not show up where the file gets longer.
        os.ftruncate(file.fileno(), 3 * MIB)
        assert (work / "file").read_bytes() == data + bytes(MIB)
        refused(lambda: os.ftruncate(file.fileno(), 3 * MIB + 1))
        assert os.pwrite(file.fileno(), b"over", 0) == 4  # nothing grows
    refused(lambda: (work / "second").write_bytes(b"one byte too much"))
    refused(lambda: os.truncate(work / "second", 1))
    assert (work / "second").stat().st_size == 0
    os.truncate(work / "file", 10)
    (work / "second").write_bytes(data)
    assert used(cluster, work / "second") == len(data) + 10


def test_a_write_that_fits_in_part(work: Path, cluster: Cluster) -> None:
    """As on other file systems: so much of it is written, in steps of the kernel's requests."""
    set_quota(cluster, work, 5 * MIB + 100)
    descriptor = os.open(work / "file", os.O_CREAT | os.O_WRONLY)
    data = os.urandom(8 * MIB)
    written = os.write(descriptor, data)
    assert 4 * MIB <= written <= 5 * MIB + 100
    refused(lambda: os.write(descriptor, data[written:]))
    os.close(descriptor)
    assert (work / "file").read_bytes() == data[:written]
    assert used(cluster, work) == written


def test_fallocate(work: Path, cluster: Cluster, frontend: str) -> None:
    set_quota(cluster, work, MIB)
    descriptor = os.open(work / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)

    def allocate(size: int) -> int:
        ctypes.set_errno(0)
        libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size))
        return ctypes.get_errno()

    if frontend == "direct":
        assert allocate(MIB) == 0
        assert allocate(MIB + 1) == errno.EDQUOT
    else:
        refused(lambda: os.posix_fallocate(descriptor, 0, 2 * MIB))
    assert os.fstat(descriptor).st_size <= MIB
    os.close(descriptor)


def test_inodes(work: Path, cluster: Cluster) -> None:
    set_quota(cluster, work, 0, inodes=3)
    (work / "file").touch()
    (work / "directory").mkdir()
    refused(lambda: (work / "one more").touch())
    refused(lambda: (work / "directory/sub").mkdir())
    refused(lambda: (work / "link").symlink_to("file"))
    os.link(work / "file", work / "second name")
    (work / "directory").rmdir()
    (work / "one more").touch()


def test_between_quotas(work: Path, cluster: Cluster) -> None:
    one, two = work / "one", work / "two"
    for directory in (one, two):
        directory.mkdir()
        set_quota(cluster, directory, MIB)
    (one / "file").write_bytes(b"x" * 1000)
    (one / "sub").mkdir()
    refused(lambda: (one / "file").rename(two / "file"), errno.EXDEV)
    refused(lambda: (one / "sub").rename(work / "sub"), errno.EXDEV)
    refused(lambda: os.link(one / "file", work / "file"), errno.EXDEV)
    (one / "file").rename(one / "sub/file")
    one.rename(two / "one")  # it has its own
    assert used(cluster, two / "one/sub/file") == 1000 and used(cluster, two) == 0


def test_df_shows_what_is_left(work: Path, cluster: Cluster, frontend: str) -> None:
    set_quota(cluster, work, 8 * MIB, inodes=100)
    (work / "file").write_bytes(bytes(3 * MIB))
    found = os.statvfs(work / "file")
    whole = os.statvfs(work.parent)
    if frontend == "direct":
        assert (found.f_blocks, found.f_bfree) == (2048, 1280)
        assert (found.f_files, found.f_ffree) == (100, 98)
    assert whole.f_blocks > 2048 and whole.f_ffree > 1 << 30


def test_what_lay_there_before_is_charged(work: Path, cluster: Cluster) -> None:
    """Also a file that the kernel writes by itself: its bytes are counted when it is closed."""
    (work / "old").write_bytes(bytes(MIB))
    with (work / "open").open("xb", buffering=0) as file:
        file.write(bytes(MIB))
        assert set_quota(cluster, work, 3 * MIB).inodes == 3
        file.write(bytes(MIB))
    assert used(cluster, work) == 3 * MIB
    refused(lambda: (work / "new").write_bytes(b"x"))


def test_two_mounts_and_many_writers(
    work: Path, mounted: Path, cluster: Cluster, frontend: str, tmp_path: Path
) -> None:
    """The bound holds whoever writes: what was accepted is there, and no more than it."""
    bound = 4 * MIB
    set_quota(cluster, work, bound)
    accepted: dict[Path, int] = {}

    def append(path: Path, seed: int) -> None:
        rng = random.Random(seed)
        with path.open("xb", buffering=0) as file:
            while True:
                accepted[path] = file.tell()
                try:
                    file.write(rng.randbytes(rng.randrange(1, 200 * KIB)))
                except OSError as exc:
                    assert exc.errno == errno.EDQUOT
                    return

    with cluster.mounted(tmp_path / "other", f"--frontend={frontend}") as mountpoint:
        other = mountpoint / work.relative_to(mounted)
        with ThreadPoolExecutor(4) as pool:
            paths = [(work / "0"), (work / "1"), (other / "2"), (other / "3")]
            list(pool.map(append, paths, range(4)))
        assert sum(accepted.values()) == used(cluster, work) <= bound
        for path, size in accepted.items():
            assert (work / path.name).stat().st_size == (other / path.name).stat().st_size == size


def test_the_kernel_writes_no_file_that_counts(work: Path, cluster: Cluster, frontend: str) -> None:
    """It would not ask anybody. Reading is another matter."""
    if frontend == "direct":
        require_passthrough(cluster)
    set_quota(cluster, work, MIB)
    for number in range(10):  # however many files are staged by now
        with (work / str(number)).open("xb", buffering=0) as file:
            assert 0 < file.write(bytes(2 * MIB)) <= MIB
            refused(lambda file=file: file.write(bytes(2 * MIB)))
            os.ftruncate(file.fileno(), 0)


def test_what_is_refused_does_not_cut_what_another_mount_wrote(
    work: Path, cluster: Cluster, mounted: Path, tmp_path: Path, frontend: str
) -> None:
    set_quota(cluster, work, MIB)
    with cluster.mounted(tmp_path / "other", f"--frontend={frontend}") as mountpoint:
        mine = os.open(work / "file", os.O_CREAT | os.O_WRONLY)
        theirs = os.open(mountpoint / work.relative_to(mounted) / "file", os.O_WRONLY)
        data = os.urandom(500_000)
        assert os.pwrite(theirs, data, 0) == len(data)
        refused(lambda: os.pwrite(mine, data, MIB))
        os.close(theirs)
        os.close(mine)
    wait_until(lambda: (work / "file").stat().st_size == len(data))
    assert (work / "file").read_bytes() == data
    set_quota(cluster, work, 2 * MIB)
    os.truncate(work / "file", 2 * MIB)  # and what was refused does not show
    assert (work / "file").read_bytes() == data.ljust(2 * MIB, b"\0")
