"""New files that the kernel writes by itself: nothing is lost, whoever looks and whatever dies."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfs_base.limits import (
    FILE_CHUNK_BYTES,
    KIB,
    MIB,
    PAGE_BYTES,
)
from t4_mount.harness import COLLECTED_SECONDS, Cluster, wait_until
from t4_mount.test_passthrough import close, require_passthrough

NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR
SEED = b"first"


def staged(cluster: Cluster) -> set[Path]:
    """Staging files that have something in them."""
    found = set()
    for path in cluster.directory.glob("targets/*/staging/**/*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_size:
                found.add(path)
    return found


def staged_ahead(cluster: Cluster) -> set[int]:
    """Inode numbers, in the file system below, of all staging files."""
    return numbers_of(cluster.directory.glob("targets/*/staging/**/*"))


def numbers_of(paths: Iterable[Path]) -> set[int]:
    """Some may have gone meanwhile."""
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def is_passed(cluster: Cluster, ahead: set[int], descriptor: int) -> bool:
    """Whether a file that was written to has one of those that were staged ``ahead``."""
    used = numbers_of(staged(cluster))  # first: they become chunks
    used |= numbers_of(cluster.chunk_files(os.fstat(descriptor).st_ino))
    return bool(used & ahead)


@contextlib.contextmanager
def new_file(
    cluster: Cluster, path: Path, make: Callable[[Path], int] = lambda path: os.open(path, NEW)
) -> Iterator[int]:
    """Its descriptor; the file holds SEED, written by the kernel. The first files of a target are
    made before it has staged any."""
    descriptor = -1

    def make_one() -> bool:
        nonlocal descriptor
        if descriptor >= 0:
            os.close(descriptor)
            path.unlink()
        ahead = staged_ahead(cluster)
        descriptor = make(path)
        os.write(descriptor, SEED)
        require_passthrough(cluster)
        return is_passed(cluster, ahead, descriptor)

    wait_until(make_one)
    try:
        yield descriptor
    finally:
        close(descriptor)


@pytest.fixture
def other(cluster: Cluster, work: Path, mounted: Path, tmp_path: Path) -> Iterator[Path]:
    """The test's directory through another mount."""
    with cluster.mounted(tmp_path / "other") as mountpoint:
        yield mountpoint / work.relative_to(mounted)


def test_others_see_a_file_once_it_was_closed(work: Path, cluster: Cluster, other: Path) -> None:
    data = os.urandom(2 * MIB + 7)
    with new_file(cluster, work / "file") as descriptor:
        assert os.pwrite(descriptor, data, 0) == len(data)
        assert os.fstat(descriptor).st_size == len(data) == (work / "file").stat().st_size
        assert (work / "file").read_bytes() == data
    wait_until(lambda: (other / "file").stat().st_size == len(data))
    assert (other / "file").read_bytes() == data
    inode = (work / "file").stat().st_ino
    assert [path.stat().st_size for path in cluster.chunk_files(inode)] == [len(data)]


def has_writer(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def test_what_was_just_written_is_read_by_the_kernel(own_cluster: Cluster) -> None:
    """And is not kept open for writing by who waits for that: then it could not be sealed."""
    mountpoint = own_cluster.directory / "mnt"
    role = own_cluster.mount(mountpoint)
    data = os.urandom(2 * MIB + 7)
    with new_file(own_cluster, mountpoint / "new") as descriptor:
        assert os.pwrite(descriptor, data, 0) == len(data)
    (mountpoint / "new").rename(mountpoint / "file")
    (chunk,) = own_cluster.chunk_files((mountpoint / "file").stat().st_ino)
    wait_until(lambda: not has_writer(chunk))
    for _ in range(2):
        assert (mountpoint / "file").read_bytes() == data
    reader = os.open(mountpoint / "file", os.O_RDONLY)
    role.kill()
    assert os.pread(reader, len(data), 0) == data  # not through the mount
    close(reader)


def test_the_first_file_of_a_mount_is_written_by_the_kernel(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    with own_cluster.mounted(mountpoint):
        (mountpoint / "empty").touch()
        require_passthrough(own_cluster)
        descriptor = os.open(mountpoint / "empty", os.O_RDONLY)
        targets = list(own_cluster.directory.glob("targets/*/staging"))
        wait_until(lambda: all(any(t.rglob("0*")) for t in targets))
        ahead = staged_ahead(own_cluster)
        for number in range(8):
            first = os.open(mountpoint / f"file{number}", NEW)
            os.write(first, SEED)
            assert is_passed(own_cluster, ahead, first)
            close(first)
        close(descriptor)


def test_what_was_just_written_and_is_changed(work: Path, cluster: Cluster, other: Path) -> None:
    data = bytearray(os.urandom(2 * MIB))
    for place, there in enumerate((other, work, other, work)):
        path, way = work / f"file{place}", there / f"file{place}"
        with new_file(cluster, path) as descriptor:
            os.pwrite(descriptor, data, 0)
        with path.open("rb") as reader:
            assert reader.read() == data
        with way.open("r+b") as changed:
            changed.write(b"changed")
        with way.open("ab") as appended:
            appended.write(b"appended")
        assert path.read_bytes() == b"changed" + data[7:] + b"appended"
        with way.open("r+b") as cut:
            cut.truncate(MIB)
        assert path.read_bytes() == b"changed" + data[7:MIB]
        way.unlink()
        way.write_bytes(b"another")
        assert path.read_bytes() == b"another"


def test_every_way_to_write(work: Path, cluster: Cluster, other: Path) -> None:
    with new_file(cluster, work / "file") as descriptor:
        os.pwrite(descriptor, b"0123456789", 0)
        os.ftruncate(descriptor, 4)
        os.ftruncate(descriptor, 3 * PAGE_BYTES)
        with mmap.mmap(descriptor, 0) as view:
            view[PAGE_BYTES : PAGE_BYTES + 6] = b"mapped"
        with (work / "file").open("ab", buffering=0) as appended:
            appended.write(b"appended")
        source = os.memfd_create("source")
        os.write(source, b"sent")
        os.lseek(descriptor, 2 * PAGE_BYTES, os.SEEK_SET)
        assert os.sendfile(descriptor, source, 0, 4) == 4
        os.close(source)
        with mmap.mmap(-1, PAGE_BYTES) as page:
            page[:] = b"d" * PAGE_BYTES
            direct = os.open(work / "file", os.O_WRONLY | os.O_DIRECT)
            assert os.pwritev(direct, [page], 4 * PAGE_BYTES) == PAGE_BYTES
            os.close(direct)
    expected = bytearray(5 * PAGE_BYTES)
    expected[:4] = b"0123"
    expected[PAGE_BYTES : PAGE_BYTES + 6] = b"mapped"
    expected[2 * PAGE_BYTES : 2 * PAGE_BYTES + 4] = b"sent"
    expected[3 * PAGE_BYTES : 3 * PAGE_BYTES + 8] = b"appended"
    expected[4 * PAGE_BYTES :] = b"d" * PAGE_BYTES
    assert (work / "file").read_bytes() == expected
    wait_until(lambda: (other / "file").read_bytes() == expected)


@pytest.mark.parametrize("seed", range(3))
def test_random_writes_agree_with_a_model(
    work: Path, cluster: Cluster, other: Path, seed: int
) -> None:
    """Through several descriptors, with closes and syncs in between, over the end of the first
    chunk."""
    rng = random.Random(seed)
    model = bytearray(SEED)
    path = work / f"file-{seed}"
    with new_file(cluster, path) as descriptor, contextlib.ExitStack() as stack:
        open_now = [descriptor]
        for _ in range(60):
            fd = rng.choice(open_now)
            kind = rng.choice(["write", "write", "truncate", "sync", "open", "utime"])
            if kind == "write":
                at = rng.choice([0, rng.randrange(MIB), FILE_CHUNK_BYTES - 3, len(model)])
                data = rng.randbytes(rng.randrange(1, 64 * KIB))
                assert os.pwrite(fd, data, at) == len(data)
                model.extend(bytes(max(0, at + len(data) - len(model))))
                model[at : at + len(data)] = data
            elif kind == "truncate":
                size = rng.choice([0, rng.randrange(MIB), FILE_CHUNK_BYTES + rng.randrange(MIB)])
                os.ftruncate(fd, size)
                model[size:] = b""
                model.extend(bytes(size - len(model)))
            elif kind == "sync":
                os.fsync(fd)
                assert (other / path.name).read_bytes() == model
            elif kind == "open":
                file = stack.enter_context(path.open("r+b", buffering=0))
                open_now.append(file.fileno())
            else:
                os.utime(path, (1, 1))
            assert os.fstat(fd).st_size == path.stat().st_size == len(model)
    assert path.read_bytes() == model
    wait_until(lambda: (other / path.name).read_bytes() == model)


@pytest.mark.parametrize("alone", [True, False])
def test_a_file_longer_than_a_chunk(work: Path, cluster: Cluster, other: Path, alone: bool) -> None:
    """With a hole, synced once before it is whole. It stays one chunk file, unless another mount
    may write to it."""
    head, tail = os.urandom(FILE_CHUNK_BYTES + MIB), os.urandom(3 * MIB)
    hole = 2 * FILE_CHUNK_BYTES
    with new_file(cluster, work / "file") as descriptor, contextlib.ExitStack() as stack:
        os.pwrite(descriptor, head[:-5], 0)
        if not alone:
            stack.enter_context((other / "file").open("r+b"))
        os.fsync(descriptor)
        assert (other / "file").read_bytes() == head[:-5]
        os.pwrite(descriptor, head[-5:], len(head) - 5)
        os.pwrite(descriptor, tail, len(head) + hole)
        assert (work / "file").stat().st_size == len(head) + hole + len(tail)
    expected = head + bytes(hole) + tail
    wait_until(lambda: (other / "file").stat().st_size == len(expected))
    assert (other / "file").read_bytes() == expected
    inode = (work / "file").stat().st_ino
    if alone:
        (chunk,) = cluster.chunk_files(inode)
        assert chunk.stat().st_size == len(expected)
    else:
        # The kernel tells of the last close a moment later.
        wait_until(
            lambda: all(p.stat().st_size <= FILE_CHUNK_BYTES for p in cluster.chunk_files(inode))
        )
    assert (work / "file").read_bytes() == expected


def test_one_long_chunk_is_changed_as_any_file(work: Path, cluster: Cluster, other: Path) -> None:
    """After its close: by both mounts, over what would be ends of chunks elsewhere."""
    path, far = work / "file", other / "file"
    model = bytearray(os.urandom(2 * FILE_CHUNK_BYTES + MIB))
    with new_file(cluster, path) as descriptor:
        os.pwrite(descriptor, model, 0)
    wait_until(lambda: far.stat().st_size == len(model))
    for mine, theirs, at in ((path, far, FILE_CHUNK_BYTES - 2), (far, path, len(model) - 3)):
        with mine.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(b"change")
        model[at : at + 6] = b"change"
        assert theirs.read_bytes() == mine.read_bytes() == model
    for size in (FILE_CHUNK_BYTES + 7, 3 * FILE_CHUNK_BYTES):
        os.truncate(far, size)
        model[size:] = b""
        model.extend(bytes(size - len(model)))
        assert path.read_bytes() == far.read_bytes() == model
    inode = path.stat().st_ino
    assert len(cluster.chunk_files(inode)) == 1
    path.unlink()
    wait_until(lambda: not cluster.chunk_files(inode), COLLECTED_SECONDS)


def test_a_file_without_a_name_leaves_nothing(work: Path, cluster: Cluster) -> None:
    before = staged(cluster)
    with new_file(cluster, work / "file") as descriptor:
        inode = os.fstat(descriptor).st_ino
        (work / "file").unlink()
        os.pwrite(descriptor, b"nobody will know", 0)
        assert os.pread(descriptor, 100, 0) == b"nobody will know"
    wait_until(lambda: staged(cluster) <= before)
    wait_until(lambda: not cluster.chunk_files(inode), COLLECTED_SECONDS)


def test_a_chunk_has_its_name_before_the_file_is_closed(work: Path, cluster: Cluster) -> None:
    """While the kernel writes; nobody else sees a byte of it yet."""
    with new_file(cluster, work / "file") as descriptor:
        inode = os.fstat(descriptor).st_ino
        wait_until(lambda: bool(cluster.chunk_files(inode)), 3)  # earlier than it is written back
        os.pwrite(descriptor, b"more", 0)
    assert (work / "file").read_bytes() == b"more" + SEED[4:]


def test_many_at_once_are_there_when_they_are_closed(
    work: Path, cluster: Cluster, other: Path
) -> None:
    """Several on one connection, whose answers nobody waits for while they are written."""
    with new_file(cluster, work / "warm"):
        pass
    data = {f"{number}": os.urandom(40 * KIB + number) for number in range(24)}
    descriptors = {name: os.open(work / name, NEW) for name in data}
    for name, descriptor in descriptors.items():
        os.write(descriptor, data[name])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(os.close, descriptors.values()))
    for name, expected in data.items():
        wait_until(lambda name=name: (other / name).stat().st_size == len(data[name]))
        assert (other / name).read_bytes() == expected


def test_a_file_that_stays_empty_has_no_chunk(work: Path, cluster: Cluster) -> None:
    with new_file(cluster, work / "warm"):
        pass
    for number in range(100):  # more than are staged ahead: they are used again
        os.close(os.open(work / str(number), NEW))
        assert not cluster.chunk_files((work / str(number)).stat().st_ino)
    assert len(list(work.iterdir())) == 101


def test_the_chunk_server_is_killed_before_the_file_is_closed(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    data = os.urandom(3 * MIB)
    with own_cluster.mounted(mountpoint):
        with new_file(own_cluster, mountpoint / "file") as descriptor:
            os.pwrite(descriptor, data[:MIB], 0)
            own_cluster.chunks.kill()
            own_cluster.chunks.start()
            os.pwrite(descriptor, data[MIB:], MIB)
            os.fsync(descriptor)
            os.pwrite(descriptor, b"last", 0)
        data = b"last" + data[4:]
        assert (mountpoint / "file").read_bytes() == data
    with own_cluster.mounted(mountpoint):
        assert (mountpoint / "file").read_bytes() == data


def test_the_mount_is_killed_before_the_file_is_closed(own_cluster: Cluster) -> None:
    """What was synced is there; what came after it may be."""
    mountpoint = own_cluster.directory / "mnt"
    role = own_cluster.mount(mountpoint)
    with new_file(own_cluster, mountpoint / "synced") as descriptor:
        os.pwrite(descriptor, b"kept", 0)
        os.fsync(descriptor)
        with new_file(own_cluster, mountpoint / "lost") as second:
            role.kill()
            # The kernel needs nobody to go on.
            os.pwrite(second, b"goes on", 0)
            assert os.pread(second, 7, 0) == b"goes on"
            with contextlib.suppress(OSError):  # ENOTCONN: nobody is told of the close
                os.fsync(second)
            with own_cluster.mounted(own_cluster.directory / "again") as again:
                assert (again / "synced").read_bytes().startswith(b"kept")
                assert (again / "lost").read_bytes() == b""


def test_many_files_at_once(work: Path, cluster: Cluster, other: Path) -> None:
    """As cache writers do: under another name, then renamed."""

    def write(number: int) -> None:
        rng = random.Random(number)
        for turn in range(20):
            data = rng.randbytes(rng.choice([0, 10, 100_000]))
            temporary = work / f"{number}-{turn}.tmp"
            descriptor = os.open(temporary, NEW)
            assert not data or os.write(descriptor, data) == len(data)
            os.close(descriptor)
            temporary.rename(work / f"{number}")
            assert (work / f"{number}").read_bytes() == data

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert {path.name for path in work.iterdir()} == {"0", "1", "2", "3"}
    for number in range(4):
        assert (other / str(number)).read_bytes() == (work / str(number)).read_bytes()
