"""fallocate, holes, copies of ranges: what the mount does, and what it refuses like ext4."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs_base.limits import PAGE_BYTES
from t4_mount.file_checker import CHUNK, KEEP_SIZE, PUNCH_HOLE, fallocate
from t4_mount.harness import Cluster

COLLAPSE_RANGE, INSERT_RANGE = 8, 32
MIB, TIB = 1 << 20, 1 << 40


@pytest.fixture(params=["new", "old"])
def file(work: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """An empty one. The kernel may write a new one by itself."""
    if request.param == "old":
        with (work / "file").open("ab") as old:
            old.write(b"old")
    descriptor = os.open(work / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, 0)
    yield descriptor
    os.close(descriptor)


chunked = pytest.mark.parametrize("file", ["old"], indirect=True)
"""Looks at the chunks."""


def errno_of(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as exc:
        return exc.errno or 0
    return 0


# --- fallocate


def test_allocating_makes_a_file_longer(file: int) -> None:
    os.write(file, b"abc")
    fallocate(file, KEEP_SIZE, 0, MIB)
    assert os.fstat(file).st_size == 3
    fallocate(file, 0, 2, MIB)
    assert os.fstat(file).st_size == 2 + MIB
    fallocate(file, 0, 0, 10)
    assert os.fstat(file).st_size == 2 + MIB
    assert os.pread(file, MIB, 0) == b"abc" + bytes(MIB - 3)
    os.posix_fallocate(file, 0, 2 * MIB)
    assert os.fstat(file).st_size == 2 * MIB


@chunked
def test_punching_frees_whole_chunks(file: int, cluster: Cluster) -> None:
    size = 3 * CHUNK
    for at in range(0, size, MIB):
        os.pwrite(file, b"x" * MIB, at)
    inode = os.fstat(file).st_ino
    assert len(cluster.chunk_files(inode)) == 3
    fallocate(file, PUNCH_HOLE | KEEP_SIZE, MIB, size - 2 * MIB)
    assert os.fstat(file).st_size == size
    assert len(cluster.chunk_files(inode)) == 2
    assert os.pread(file, 2, MIB - 1) == b"x\0"
    assert os.pread(file, 2, size - MIB - 1) == b"\0x"
    assert not any(os.pread(file, MIB, CHUNK + 5))


def test_a_hole_is_one_for_other_descriptors_and_after_a_reopen(file: int, work: Path) -> None:
    os.pwrite(file, b"x" * 10_000, 0)
    with (work / "file").open("rb") as other:
        assert other.read() == b"x" * 10_000
        fallocate(file, PUNCH_HOLE | KEEP_SIZE, 100, 5000)
        other.seek(0)
        assert other.read() == b"x" * 100 + bytes(5000) + b"x" * 4900
    assert (work / "file").read_bytes()[100:5100] == bytes(5000)


@pytest.mark.parametrize(
    ("mode", "offset", "length", "expected"),
    [
        (0, 0, 0, errno.EINVAL),
        (0, -1, 10, errno.EINVAL),
        (0, 0, -1, errno.EINVAL),
        (PUNCH_HOLE, 0, 10, errno.EOPNOTSUPP),
        (COLLAPSE_RANGE, 0, 4096, errno.EOPNOTSUPP),
        (INSERT_RANGE, 0, 4096, errno.EOPNOTSUPP),
        (0, 2**63 - 1, 2**63 - 1, errno.EFBIG),
        (0, 0, 2**57, errno.EFBIG),
        (0, 0, 2**50, errno.ENOSPC),
    ],
)
def test_what_fallocate_refuses(
    file: int, mode: int, offset: int, length: int, expected: int
) -> None:
    assert errno_of(lambda: fallocate(file, mode, offset, length)) == expected
    assert os.fstat(file).st_size == 0


def test_a_file_that_is_only_read_is_not_allocated(file: int, work: Path) -> None:
    reader = os.open(work / "file", os.O_RDONLY)
    assert errno_of(lambda: fallocate(reader, 0, 0, 10)) == errno.EBADF
    os.close(reader)


# --- holes


@chunked
def test_holes_are_found(file: int) -> None:
    os.pwrite(file, b"a", 10)
    os.pwrite(file, b"b", 3 * CHUNK)
    os.ftruncate(file, 5 * CHUNK)
    assert os.lseek(file, 0, os.SEEK_DATA) == 0
    assert os.lseek(file, 0, os.SEEK_HOLE) == 11
    assert os.lseek(file, 11, os.SEEK_DATA) == 3 * CHUNK
    assert os.lseek(file, CHUNK, os.SEEK_HOLE) == CHUNK
    assert os.lseek(file, 3 * CHUNK, os.SEEK_HOLE) == 3 * CHUNK + 1
    assert errno_of(lambda: os.lseek(file, 4 * CHUNK, os.SEEK_DATA)) == errno.ENXIO
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        assert errno_of(lambda whence=whence: os.lseek(file, 5 * CHUNK, whence)) == errno.ENXIO


def test_a_file_without_holes_is_one_piece(file: int) -> None:
    os.write(file, b"x" * 100)
    assert os.lseek(file, 5, os.SEEK_DATA) == 5
    assert os.lseek(file, 5, os.SEEK_HOLE) == 100


def test_a_terabyte_of_nothing(work: Path, file: int) -> None:
    """Copied as fast as a hole is."""
    os.pwrite(file, b"start", 0)
    os.pwrite(file, b"end", TIB - 3)
    assert os.fstat(file).st_size == TIB
    assert os.pread(file, 100, TIB // 2) == bytes(100)
    assert os.lseek(file, PAGE_BYTES, os.SEEK_DATA) >= TIB - CHUNK
    subprocess.run(["cp", "--sparse=auto", work / "file", work / "copy"], check=True, timeout=60)
    assert (work / "copy").stat().st_size == TIB
    with (work / "copy").open("rb") as copy:
        copy.seek(TIB - 3)
        assert copy.read() == b"end"
    fallocate(file, PUNCH_HOLE | KEEP_SIZE, 0, TIB)
    assert errno_of(lambda: os.lseek(file, 0, os.SEEK_DATA)) == errno.ENXIO


# --- other calls


def test_ranges_are_copied(file: int, work: Path) -> None:
    data = os.urandom(300_000)
    os.write(file, data)
    target = os.open(work / "target", os.O_RDWR | os.O_CREAT)
    done = 0
    while done < 200_000:
        done += os.copy_file_range(file, target, 200_000 - done, 1000 + done, done)
    assert os.pread(target, 300_000, 0) == data[1000:201_000]
    assert os.copy_file_range(file, target, 100, 300_000) == 0
    os.close(target)


def test_commands_are_refused(file: int) -> None:
    """What ext4 would know (flags, extents) and what nobody knows."""
    room = bytearray(64)
    for command in (0xDEAD, 0x5401):  # nobody's, and TCGETS of terminals
        assert errno_of(lambda command=command: fcntl.ioctl(file, command, room)) == errno.ENOTTY
    flags = 0x80086601  # FS_IOC_GETFLAGS: lsattr
    assert errno_of(lambda: fcntl.ioctl(file, flags, room)) == errno.ENOTTY
    clone = 0x40049409  # FICLONE: cp --reflink
    assert errno_of(lambda: fcntl.ioctl(file, clone, file)) in (errno.EOPNOTSUPP, errno.EINVAL)


def test_files_without_a_name_are_refused(work: Path) -> None:
    """tempfile goes on without."""
    flags = os.O_TMPFILE | os.O_RDWR
    assert errno_of(lambda: os.open(work, flags, 0o600)) == errno.EOPNOTSUPP
    program = "import tempfile, sys; f = tempfile.TemporaryFile(dir=sys.argv[1]); f.write(b'x')"
    subprocess.run([sys.executable, "-c", program, work], check=True)


def test_mappings_of_processes_are_one(file: int, work: Path) -> None:
    os.ftruncate(file, 8192)
    program = (
        "import mmap, os, sys\n"
        "with open(sys.argv[1], 'r+b') as f, mmap.mmap(f.fileno(), 0) as m:\n"
        "    while m[0] < 100:\n"
        "        if m[0] % 2: m[0] += 1\n"
        "        else: os.sched_yield()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, work / "file"])
    with mmap.mmap(file, 0) as area:
        while (turn := area[0]) < 99 and other.poll() is None:
            if turn % 2 == 0:
                area[0] = turn + 1
            else:
                os.sched_yield()
        assert other.wait(60) == 0 and area[0] == 100
    assert os.pread(file, 1, 0) == b"d"


def test_running_programs_are_not_written(work: Path) -> None:
    """Within a mount: what runs on other nodes nobody here knows."""
    program = work / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    running = subprocess.Popen([program, "30"])
    try:
        assert errno_of(lambda: os.close(os.open(program, os.O_WRONLY))) == errno.ETXTBSY
    finally:
        running.kill()
        running.wait()
