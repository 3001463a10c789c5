"""Contents and attributes of ordinary files, through a real mount."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs_base.limits import FILE_CHUNK_BYTES, MIB
from kvfs_metadata.messages import GetAttr
from t4_mount.harness import COLLECTED_SECONDS, as_user, wait_until

pytestmark = pytest.mark.both_frontends


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def test_what_is_written_is_read(work: Path) -> None:
    data = noise(1, 3 * MIB + 17)
    (work / "file").write_bytes(data)
    assert (work / "file").read_bytes() == data
    assert (work / "file").stat().st_size == len(data)


def test_writes_at_any_offset(work: Path) -> None:
    rng = random.Random(2)
    expected = bytearray(noise(2, 300_000))
    path = work / "file"
    path.write_bytes(expected)
    with path.open("r+b", buffering=0) as file:
        for _ in range(100):
            offset = rng.randrange(len(expected) - 10_000)
            piece = rng.randbytes(rng.randrange(1, 10_000))
            expected[offset : offset + len(piece)] = piece
            assert os.pwrite(file.fileno(), piece, offset) == len(piece)
            assert os.pread(file.fileno(), len(piece) + 20, offset - min(offset, 10)) == bytes(
                expected[offset - min(offset, 10) :][: len(piece) + 20]
            )
    assert path.read_bytes() == expected


def test_reading_at_and_behind_the_end(work: Path) -> None:
    (work / "file").write_bytes(b"12345")
    with (work / "file").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10, 3) == b"45"
        assert os.pread(file.fileno(), 10, 5) == b""
        assert os.pread(file.fileno(), 10, 1 << 40) == b""


def test_a_file_of_several_chunks_is_striped_over_the_servers(work: Path, cluster) -> None:
    data = noise(3, 2 * FILE_CHUNK_BYTES + 12_345)
    path = work / "file"
    path.write_bytes(b"not new any more")  # what the kernel writes by itself stays in one chunk
    with path.open("r+b") as file:
        file.write(data)
    files = cluster.chunk_files(path.stat().st_ino)
    sizes = [12_345] + 2 * [FILE_CHUNK_BYTES]
    wait_until(lambda: sorted(f.stat().st_size for f in files) == sizes)
    assert len({f.parents[2] for f in files}) == 3
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        across = FILE_CHUNK_BYTES - 1000
        assert os.pread(file.fileno(), 2000, across) == data[across : across + 2000]
        assert file.read() == data


def test_a_write_across_a_chunk_border(work: Path) -> None:
    path = work / "file"
    data = noise(4, 200_000)
    with path.open("w+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, FILE_CHUNK_BYTES - 100_000)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), len(data), FILE_CHUNK_BYTES - 100_000) == data
    assert path.stat().st_size == FILE_CHUNK_BYTES + 100_000


def test_holes_read_as_zeros(work: Path, cluster) -> None:
    path = work / "file"
    far = 5 * FILE_CHUNK_BYTES + 10
    path.write_bytes(b"s")
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"start", 0)
        os.pwrite(file.fileno(), b"end", far)
        assert os.pread(file.fileno(), 10, 0) == b"start" + bytes(5)
        assert os.pread(file.fileno(), 100, 3 * FILE_CHUNK_BYTES) == bytes(100)
    assert path.stat().st_size == far + 3
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 20, far - 5) == bytes(5) + b"end"
        assert os.pread(file.fileno(), 4096, 2 * FILE_CHUNK_BYTES - 7) == bytes(4096)
    assert len(cluster.chunk_files(path.stat().st_ino)) == 2


def test_a_sparse_terabyte(work: Path) -> None:
    path = work / "file"
    with path.open("wb", buffering=0) as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"x", (1 << 40) - 1)
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10, (1 << 40) - 3) == b"\0\0x"
        assert os.pread(file.fileno(), 10, 1 << 39) == bytes(10)


def test_too_large_is_refused(work: Path) -> None:
    with (work / "file").open("wb", buffering=0) as file:
        with pytest.raises(OSError) as caught:
            os.pwrite(file.fileno(), b"x", 1 << 60)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError) as caught:
            os.ftruncate(file.fileno(), 1 << 60)
        assert caught.value.errno == errno.EFBIG


def test_truncate_while_open(work: Path) -> None:
    path = work / "file"
    data = noise(5, 100_000)
    with path.open("w+b", buffering=0) as file:
        file.write(data)
        os.ftruncate(file.fileno(), 40_000)
        assert os.fstat(file.fileno()).st_size == 40_000
        assert os.pread(file.fileno(), 100_000, 0) == data[:40_000]
        os.ftruncate(file.fileno(), 60_000)
        assert os.pread(file.fileno(), 100_000, 0) == data[:40_000] + bytes(20_000)
        os.pwrite(file.fileno(), b"tail", 80_000)
        expected = data[:40_000] + bytes(40_000) + b"tail"
        assert os.pread(file.fileno(), 100_000, 0) == expected
    assert path.read_bytes() == expected


def test_truncate_by_path_and_at_open(work: Path, cluster) -> None:
    path = work / "file"
    path.write_bytes(noise(6, FILE_CHUNK_BYTES + 5))
    inode = path.stat().st_ino
    os.truncate(path, 5)
    assert path.stat().st_size == 5
    assert [f.stat().st_size for f in cluster.chunk_files(inode)] == [5]
    with path.open("r+b") as reader:
        path.write_bytes(b"")
        assert reader.read() == b""
    assert path.stat().st_size == 0
    os.truncate(path, 3)
    assert path.read_bytes() == bytes(3)


def test_cut_bytes_do_not_come_back(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"secret" * 1000)
    os.truncate(path, 10)
    os.truncate(path, 6000)
    assert path.read_bytes() == b"secretsecr" + bytes(5990)


def test_append_from_two_processes(work: Path) -> None:
    path = work / "log"
    path.touch()
    program = (
        "import os,sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for i in range(200): os.write(fd, f'{sys.argv[2]} {i:04d} {\"x\" * 50}\\n'.encode())\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), n]) for n in "ab"]
    assert [w.wait(60) for w in writers] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 400
    for name in "ab":
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name} {i:04d} {'x' * 50}" for i in range(200)]


def test_append_goes_to_the_current_end(work: Path) -> None:
    path = work / "log"
    path.write_bytes(b"one ")
    with path.open("ab", buffering=0) as appender, path.open("r+b", buffering=0) as other:
        other.seek(0, os.SEEK_END)
        other.write(b"two ")
        appender.write(b"three")
    assert path.read_bytes() == b"one two three"


def test_several_handles_see_each_other(work: Path) -> None:
    path = work / "file"
    with path.open("w+b", buffering=0) as first, path.open("r+b", buffering=0) as second:
        first.write(b"hello")
        assert os.pread(second.fileno(), 10, 0) == b"hello"
        assert os.fstat(second.fileno()).st_size == 5
        second.truncate(2)
        assert os.fstat(first.fileno()).st_size == 2
        assert os.pread(first.fileno(), 10, 0) == b"he"


def test_shared_mapping(work: Path) -> None:
    path = work / "file"
    size = 2 * MIB
    with path.open("w+b") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as view:
            view[:5] = b"begin"
            view[size - 3 :] = b"end"
            view[MIB : MIB + 4096] = b"m" * 4096
            view.flush()
            assert os.pread(file.fileno(), 5, 0) == b"begin"
            os.pwrite(file.fileno(), b"written", 100)
            assert view[100:107] == b"written"
            view[200:203] = b"abc"
    data = path.read_bytes()
    assert len(data) == size
    assert (data[:5], data[100:107], data[200:203]) == (b"begin", b"written", b"abc")
    assert data[MIB : MIB + 4097] == b"m" * 4096 + b"\0"
    assert data[-3:] == b"end"


def test_a_mapping_written_by_another_process(work: Path) -> None:
    path = work / "file"
    path.write_bytes(bytes(8192))
    program = (
        "import mmap,sys\n"
        "with open(sys.argv[1], 'r+b') as f:\n"
        "  m = mmap.mmap(f.fileno(), 0)\n"
        "  m[4096:4101] = b'child'\n"
    )
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        assert view[4096:4101] == b"child"
    assert path.read_bytes()[4096:4101] == b"child"


def test_exclusive_create(work: Path) -> None:
    path = work / "lock"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(descriptor)
    with pytest.raises(FileExistsError):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def test_only_one_of_many_creates_exclusively(work: Path) -> None:
    program = (
        "import os,sys\n"
        "won = 0\n"
        "for i in range(50):\n"
        "  try: os.close(os.open(f'{sys.argv[1]}/{i}', os.O_CREAT | os.O_EXCL)); won += 1\n"
        "  except FileExistsError: pass\n"
        "print(won)\n"
    )
    command = [sys.executable, "-c", program, str(work)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(int(r.communicate(timeout=60)[0]) for r in racers) == 50


def test_unlink_while_open(work: Path, cluster) -> None:
    path = work / "file"
    data = noise(7, 200_000)
    with path.open("w+b", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
        inode = os.fstat(file.fileno()).st_ino
        path.unlink()
        assert not path.exists()
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.pread(file.fileno(), len(data), 0) == data
        os.pwrite(file.fileno(), b"more", len(data))
        assert os.fstat(file.fileno()).st_size == len(data) + 4
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 10, len(data)) == b"more"
        assert cluster.chunk_files(inode)
    wait_until(lambda: not cluster.chunk_files(inode), COLLECTED_SECONDS)


def test_overwritten_by_rename_while_open(work: Path) -> None:
    old, new = work / "old", work / "new"
    old.write_bytes(b"old contents")
    new.write_bytes(b"new contents")
    with old.open("rb", buffering=0) as file:
        new.rename(old)
        assert file.read() == b"old contents"
    assert old.read_bytes() == b"new contents"


def test_mode_owner_and_times(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    path.chmod(0o640)
    os.chown(path, 1234, 5678)
    os.utime(path, ns=(1_000_000_000_123_456_789, 1_100_000_000_987_654_321))
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_uid, found.st_gid) == (1234, 5678)
    assert found.st_atime_ns == 1_000_000_000_123_456_789
    assert found.st_mtime_ns == 1_100_000_000_987_654_321
    assert found.st_blksize >= 4096
    assert found.st_blocks == 1


def test_times_set_on_an_open_file_outlive_its_writes(work: Path) -> None:
    path = work / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"written before")
        os.utime(file.fileno(), ns=(7, 1_000_000_007))
    assert path.stat().st_mtime_ns == 1_000_000_007
    assert path.read_bytes() == b"written before"


def test_writing_changes_mtime_and_ctime(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 1))
    before = path.stat()
    with path.open("ab") as file:
        file.write(b"y")
    after = path.stat()
    assert after.st_mtime_ns > 10**18
    assert after.st_ctime_ns >= before.st_ctime_ns
    path.chmod(0o600)
    assert path.stat().st_ctime_ns >= after.st_ctime_ns
    assert path.stat().st_mtime_ns == after.st_mtime_ns


def test_writing_drops_set_user_id(work: Path) -> None:
    path = work / "program"
    path.write_bytes(b"x")
    os.chown(path, 1000, 1000)
    path.chmod(0o4755)
    assert path.stat().st_mode & stat.S_ISUID
    assert as_user(1000, work, lambda: Path("program").write_bytes(b"y")) == 0
    assert not path.stat().st_mode & stat.S_ISUID
    path.chmod(0o4755)
    os.chown(path, 1001, -1)
    assert not path.stat().st_mode & stat.S_ISUID


def test_permissions_of_another_user(work: Path) -> None:
    work.chmod(0o755)
    secret, mine = Path("secret"), Path("mine")  # relative to ``work``
    (work / secret).write_bytes(b"x")
    (work / secret).chmod(0o600)
    assert as_user(1002, work, secret.read_bytes) == errno.EACCES
    assert as_user(1002, work, Path("new").touch) == errno.EACCES
    assert as_user(1002, work, secret.unlink) == errno.EACCES
    assert as_user(1002, work, lambda: secret.chmod(0o777)) == errno.EPERM
    assert as_user(1002, work, lambda: os.chown(secret, 1002, 1002)) == errno.EPERM
    (work / secret).chmod(0o644)
    assert as_user(1002, work, secret.read_bytes) == 0
    assert as_user(1002, work, lambda: secret.write_bytes(b"y")) == errno.EACCES
    work.chmod(0o1777)
    assert as_user(1002, work, lambda: mine.write_bytes(b"mine")) == 0
    assert ((work / mine).stat().st_uid, (work / mine).stat().st_gid) == (1002, 1002)
    assert as_user(1003, work, mine.unlink) == errno.EPERM  # sticky directory
    assert as_user(1002, work, mine.unlink) == 0


def test_files_of_a_set_group_id_directory_belong_to_its_group(work: Path) -> None:
    os.chown(work, 0, 4321)
    work.chmod(0o2777)
    (work / "file").touch()
    (work / "directory").mkdir()
    assert (work / "file").stat().st_gid == 4321
    assert (work / "directory").stat().st_gid == 4321
    assert (work / "directory").stat().st_mode & stat.S_ISGID


def test_fsync_and_fdatasync(work: Path, cluster) -> None:
    path = work / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"durable")
        os.fsync(file.fileno())
        with cluster.client() as client:
            assert client.call(GetAttr(path.stat().st_ino)).size == 7
        file.write(b" and more")
        os.fdatasync(file.fileno())
    directory = os.open(work, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    assert path.read_bytes() == b"durable and more"


def test_sizes_of_files_that_stay_open_are_recorded(work: Path, cluster) -> None:
    path = work / "file"
    with path.open("wb", buffering=0) as file, cluster.client() as client:
        file.write(b"x" * 1000)
        inode = os.fstat(file.fileno()).st_ino
        wait_until(lambda: client.call(GetAttr(inode)).size == 1000, 15)


def test_direct_io(work: Path) -> None:
    path = work / "file"
    view = mmap.mmap(-1, MIB)
    view[:] = noise(8, MIB)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pwritev(descriptor, [view], 0) == MIB
        back = mmap.mmap(-1, MIB)
        assert os.preadv(descriptor, [back], 0) == MIB
        assert back[:] == view[:]
    finally:
        os.close(descriptor)
