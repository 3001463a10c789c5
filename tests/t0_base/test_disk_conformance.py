"""One suite that every Disk passes: a directory on ext4, one on tmpfs, the memory one and the
simulator's."""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import DiskFull, ServerBusy, TargetFailed
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.os_disk import FS_IOC_GETFLAGS, FS_TOPDIR_FL, OsDisk, disk_error
from kvfs_base.seams import Disk, DiskFile
from kvfs_base.testing import MemoryDisk
from sim.disk import SimDisk


@pytest.fixture(params=["os-disk", "os-tmpfs", "memory", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "simulated":
        yield SimDisk()
        return
    if request.param == "memory":
        yield MemoryDisk()
        return
    if request.param == "os-disk":
        yield OsDisk(str(tmp_path))
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs")
    directory = tempfile.mkdtemp(dir="/dev/shm")
    try:
        yield OsDisk(directory)
    finally:
        shutil.rmtree(directory)


def pages(count: int) -> memoryview:
    return memoryview(mmap.mmap(-1, count * PAGE_BYTES))


def make(disk: Disk, path: str, data: bytes = b"") -> DiskFile:
    file = disk.open(path, write=True, create=True)
    if data:
        file.pwritev([data], 0)
    return file


def skip_without_descriptors(disk: Disk) -> None:
    if isinstance(disk, SimDisk):
        pytest.skip("in a simulation every client is on another host than its servers")


def contents(disk: Disk, path: str) -> bytes:
    file = disk.open(path)
    view = memoryview(bytearray(file.size() + 10))
    count = file.preadv([view], 0)
    file.close()
    return bytes(view[:count])


def test_what_is_written_is_read(disk: Disk) -> None:
    file = make(disk, "a")
    assert file.pwritev([b"hello ", bytearray(b"wide "), memoryview(b"world")], 3) == 16
    assert file.size() == 19
    first, second = memoryview(bytearray(4)), memoryview(bytearray(5))
    assert file.preadv([first, second], 1) == 9
    assert bytes(first) + bytes(second) == b"\0\0hello w"
    file.close()
    assert contents(disk, "a") == b"\0\0\0hello wide world"


def test_a_read_stops_at_the_end(disk: Disk) -> None:
    file = make(disk, "a", b"12345")
    view = memoryview(bytearray(10))
    assert file.preadv([view], 3) == 2
    assert file.preadv([view], 5) == 0
    assert file.preadv([view], 500) == 0
    file.close()


def test_more_buffers_than_one_system_call_takes(disk: Disk) -> None:
    file = make(disk, "a")
    pieces = [bytes([i % 251, i // 251]) for i in range(3000)]
    assert file.pwritev(pieces, 0) == 6000
    views = [memoryview(bytearray(3)) for _ in range(2000)]
    assert file.preadv(views, 0) == 6000
    assert b"".join(views) == b"".join(pieces)
    file.close()


def test_a_hint_changes_nothing(disk: Disk) -> None:
    data = bytes(range(256)) * 4096
    file = make(disk, "a", data)
    for offset, length in ((0, len(data)), (100, 10), (len(data), 10), (0, 9 * len(data))):
        file.will_need(offset, length)
    file.close()
    assert contents(disk, "a") == data


def test_a_write_through_a_read_only_file_fails(disk: Disk) -> None:
    make(disk, "a").close()
    file = disk.open("a")
    with pytest.raises(TargetFailed):
        file.pwritev([b"x"], 0)
    file.close()


def test_truncate_cuts_and_extends(disk: Disk) -> None:
    file = make(disk, "a", b"123456789")
    file.truncate(4)
    file.truncate(6)
    file.close()
    assert contents(disk, "a") == b"1234\0\0"


def test_direct_files_hold_what_was_written(disk: Disk) -> None:
    file = disk.open("a", write=True, create=True, exclusive=True, direct=True)
    data = pages(3)
    data[:] = os.urandom(len(data))
    file.pwritev([data], 0)
    file.truncate(2 * PAGE_BYTES + 17)
    file.close()
    assert contents(disk, "a") == data[: 2 * PAGE_BYTES + 17]
    file = disk.open("a", direct=True)
    back = pages(3)
    assert file.preadv([back], 0) == 2 * PAGE_BYTES + 17
    assert back[: 2 * PAGE_BYTES + 17] == data[: 2 * PAGE_BYTES + 17]
    file.close()


def test_attributes(disk: Disk) -> None:
    file = make(disk, "a")
    assert file.get_attribute("kvfs") is None
    file.set_attribute("kvfs", b"\0one")
    file.set_attribute("other", b"")
    file.set_attribute("kvfs", b"two\xff")
    file.close()
    disk.rename("a", "b")
    file = disk.open("b")
    assert file.get_attribute("kvfs") == b"two\xff"
    assert file.get_attribute("other") == b""
    file.sync()
    file.sync(attributes=True)
    file.close()


def test_opening(disk: Disk) -> None:
    with pytest.raises(FileNotFoundError):
        disk.open("a")
    with pytest.raises(FileNotFoundError):
        disk.open("a", write=True)
    with pytest.raises(FileNotFoundError):
        disk.open("missing/a", write=True, create=True)
    make(disk, "a", b"kept").close()
    for direct in (False, True):
        with pytest.raises(FileExistsError):
            disk.open("a", write=True, create=True, exclusive=True, direct=direct)
    disk.open("a", write=True, create=True).close()
    assert contents(disk, "a") == b"kept"


def test_rename_replaces(disk: Disk) -> None:
    make(disk, "a", b"new").close()
    make(disk, "b", b"old").close()
    reader = disk.open("b")
    disk.rename("a", "b")
    assert contents(disk, "b") == b"new"
    assert not disk.exists("a")
    view = memoryview(bytearray(3))
    assert reader.preadv([view], 0) == 3
    assert bytes(view) == b"old"
    reader.close()
    with pytest.raises(FileNotFoundError):
        disk.rename("a", "b")
    with pytest.raises(FileNotFoundError):
        disk.rename("b", "missing/b")
    assert contents(disk, "b") == b"new"


def test_unlinked_files_stay_readable(disk: Disk) -> None:
    make(disk, "a", b"bytes").close()
    file = disk.open("a")
    disk.unlink("a")
    assert not disk.exists("a")
    view = memoryview(bytearray(5))
    assert file.preadv([view], 0) == 5
    assert bytes(view) == b"bytes"
    file.close()
    with pytest.raises(FileNotFoundError):
        disk.unlink("a")


def test_only_empty_directories_are_removed(disk: Disk) -> None:
    disk.make_directory("x/y")
    assert not disk.remove_directory("x")
    make(disk, "x/y/1").close()
    assert not disk.remove_directory("x/y")
    disk.unlink("x/y/1")
    assert disk.remove_directory("x/y") and disk.remove_directory("x")
    assert not disk.remove_directory("x") and not disk.exists("x")


def test_directories(disk: Disk) -> None:
    disk.make_directory("x/y/z")
    disk.make_directory("x/y")
    disk.make_directory("")
    make(disk, "x/y/1").close()
    make(disk, "x/2").close()
    assert sorted(disk.list("x")) == ["2", "y"]
    assert sorted(disk.list("x/y")) == ["1", "z"]
    assert disk.list("x/y/z") == []
    assert "x" in disk.list("")
    assert disk.exists("x/y") and disk.exists("x/y/1") and not disk.exists("x/y/2")
    with pytest.raises(FileNotFoundError):
        disk.list("missing")
    with pytest.raises(FileNotFoundError):
        disk.sync_directory("missing")
    disk.sync_directory("x/y")
    disk.sync_directory("")


def test_usage_is_plausible(disk: Disk) -> None:
    usage = disk.usage()
    assert 0 < usage.free_bytes <= usage.capacity_bytes


def test_descriptors_are_real(disk: Disk) -> None:
    skip_without_descriptors(disk)
    file = make(disk, "a", b"bytes")
    assert os.pread(file.fileno(), 5, 0) == b"bytes"
    file.close()
    file.close()  # harmless: the number may be another file's by now
    assert file.fileno() == -1


def test_has_writer_sees_every_open_file(disk: Disk) -> None:
    writer = make(disk, "a", b"bytes")
    reader = disk.open("a")
    assert reader.has_writer()
    writer.close()
    writer.close()
    assert not reader.has_writer()
    another_reader = disk.open("a")
    assert not reader.has_writer()
    again = disk.open("a", write=True)
    assert reader.has_writer()
    for file in (again, another_reader, reader):
        file.close()


def test_has_writer_sees_every_descriptor(disk: Disk) -> None:
    skip_without_descriptors(disk)
    writer = make(disk, "a", b"bytes")
    reader = disk.open("a")
    assert reader.has_writer()
    copy = os.dup(writer.fileno())  # as if it had been passed to another process
    writer.close()
    assert reader.has_writer()
    os.close(copy)
    assert not reader.has_writer()
    reader.close()


def test_a_lock_has_one_holder(disk: Disk) -> None:
    first = disk.open("lock", write=True, create=True)
    second = disk.open("lock", write=True, create=True)
    assert first.lock()
    assert not second.lock()
    first.close()
    assert second.lock()
    second.close()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOENT, FileNotFoundError),
        (errno.EEXIST, FileExistsError),
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EIO, TargetFailed),
        (errno.EROFS, TargetFailed),
        (errno.EMFILE, ServerBusy),
        (errno.ENFILE, ServerBusy),
        (errno.ENOMEM, ServerBusy),
    ],
)
def test_system_errors_are_translated(code: int, expected: type[Exception]) -> None:
    assert type(disk_error(OSError(code, "text"), "path")) is expected


def test_a_disk_that_fails_has_not_said_that_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    disk = OsDisk(str(tmp_path))
    assert not disk.exists("missing") and not disk.exists("file/below")

    def lstat(path: str) -> None:
        raise OSError(errno.EIO, "text")

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(TargetFailed):
        disk.exists("file")


def test_a_directory_is_told_to_spread_what_is_made_in_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    OsDisk(str(tmp_path)).spread("d")
    OsDisk(str(tmp_path)).spread("missing")
    fd = os.open(tmp_path / "d", os.O_RDONLY)
    flags = array.array("l", [0])
    try:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    except OSError:
        pytest.skip("a file system without such flags")
    finally:
        os.close(fd)
    if not flags[0] & FS_TOPDIR_FL and "ext" not in file_system_of(tmp_path):
        pytest.skip("a file system that does not know this one")
    assert flags[0] & FS_TOPDIR_FL


def file_system_of(path: Path) -> str:
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True
    )
    return found.stdout


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    """The kernel's own word for it, without filling anything: /dev/full."""
    (tmp_path / "full").symlink_to("/dev/full")
    file = OsDisk(str(tmp_path)).open("full", write=True)
    with pytest.raises(DiskFull):
        file.pwritev([b"x"], 0)
    file.close()


def test_the_memory_disk_fails_when_told() -> None:
    disk = MemoryDisk(capacity_bytes=100)
    seen: list[tuple[str, str]] = []
    disk.before = lambda operation, path: seen.append((operation, path))
    file = make(disk, "a", b"1234")
    file.preadv([memoryview(bytearray(1))], 0)
    file.set_attribute("x", b"")
    file.get_attribute("x")
    file.truncate(1)
    file.sync()
    expected = ["open", "pwritev", "preadv", "set_attribute", "get_attribute", "truncate", "sync"]
    assert [operation for operation, path in seen if path == "a"] == expected
    with pytest.raises(DiskFull):
        file.pwritev([bytes(200)], 0)

    def fail(operation: str, path: str) -> None:
        raise TargetFailed(detail=f"{operation} {path}")

    disk.before = fail
    with pytest.raises(TargetFailed):
        file.sync()
    file.close()
