"""Sealed files that the kernel reads by itself: the same bytes, whatever happens to the server, the
name or the mount."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvfs.mount.frontend import PASSTHROUGH_KERNEL
from kvfs.mount.limits import MOUNT_IDLE_SECONDS
from kvfs.mount.passthrough import NO_BACKING, Backings
from kvfs_base.limits import (
    FILE_CHUNK_BYTES,
    KIB,
    MIB,
    PAGE_BYTES,
)
from kvfs_metadata.messages import RemoveBlocks, Resolve
from t4_mount.harness import COLLECTED_SECONDS, Cluster, wait_until
from t4_mount.test_mount_blocks import make_blocks

KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])


def require_passthrough(cluster: Cluster) -> None:
    """Skips the test where the kernel cannot read by itself: too old, or the chunks lie on a
    stacked file system. To be called after something was opened."""
    if KERNEL < PASSTHROUGH_KERNEL:
        pytest.skip("needs Linux 6.9")
    if any("no passthrough" in role.log.read_text() for role in cluster.roles):
        pytest.skip("the chunks lie on a file system that cannot be passed through")


def read_direct(path: Path, size: int) -> bytes:
    """With O_DIRECT, whole pages."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, -(-size // PAGE_BYTES) * PAGE_BYTES) as room:
            count = os.preadv(descriptor, [room], 0)
            return room[:count]
    finally:
        os.close(descriptor)


def close(descriptor: int) -> None:
    """Also where the mount is gone: it is closed all the same, and nobody is told."""
    try:
        os.close(descriptor)
    except OSError as exc:
        assert exc.errno == errno.ENOTCONN


def mapped(descriptor: int) -> bytes:
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as view:
        return view[:]


def sent(descriptor: int, size: int) -> bytes:
    target = os.memfd_create("sent")
    try:
        assert os.sendfile(target, descriptor, 0, size) == size
        return os.pread(target, size, 0)
    finally:
        os.close(target)


def test_every_way_to_read_a_block(mounted: Path, cluster: Cluster) -> None:
    blocks = make_blocks(101, [1, PAGE_BYTES, 100_000, 2 * MIB + 1])
    cluster.put_blocks("passed/ways", blocks)
    for key, data in blocks.items():
        path = mounted / "kv/passed/ways" / key.hex()
        with path.open("rb", buffering=0) as first, path.open("rb", buffering=0) as second:
            assert first.read() == data
            assert mapped(first.fileno()) == data
            assert sent(first.fileno(), len(data)) == data
            assert os.pread(second.fileno(), len(data), len(data) // 2) == data[len(data) // 2 :]
            assert os.pread(second.fileno(), 10, len(data)) == b""
            assert read_direct(path, len(data)) == data
            assert os.fstat(first.fileno()).st_size == len(data)
        assert path.read_bytes() == data


def test_an_open_block_keeps_its_bytes(mounted: Path, cluster: Cluster) -> None:
    """Evicted, and stored again with others under the same key."""
    [(key, old)] = make_blocks(102, [2 * MIB]).items()
    new = make_blocks(103, [MIB])
    inode = cluster.put_blocks("passed/kept", {key: old})[key].inode
    path = mounted / "kv/passed/kept" / key.hex()
    with path.open("rb", buffering=0) as file, cluster.client() as client:
        namespace = client.call(Resolve(b"kv/passed/kept")).inode
        assert client.call(RemoveBlocks(namespace, key)) == 1
        wait_until(lambda: not cluster.chunk_files(inode), COLLECTED_SECONDS)
        cluster.put_blocks("passed/kept", {key: next(iter(new.values()))})
        wait_until(lambda: path.read_bytes() == next(iter(new.values())))  # names are cached
        assert file.read() == old
        assert mapped(file.fileno()) == old


def test_reading_on_after_the_mount_was_killed(own_cluster: Cluster) -> None:
    [(key, data)] = make_blocks(104, [3 * MIB]).items()
    own_cluster.put_blocks("passed/killed", {key: data})
    mountpoint = own_cluster.directory / "mnt"
    role = own_cluster.mount(mountpoint)
    with (mountpoint / "kv/passed/killed" / key.hex()).open("rb", buffering=0) as file:
        require_passthrough(own_cluster)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            role.kill()
            # Not one byte was read before.
            assert view[:] == data
            assert file.read() == data
        with pytest.raises(OSError) as caught:
            os.statvfs(mountpoint)
        assert caught.value.errno == errno.ENOTCONN


def make_settled(path: Path, data: bytes) -> None:
    """A file that has not changed for long."""
    path.write_bytes(data)
    os.utime(path, (1, 1))


def test_an_ordinary_file_is_read_on_after_the_mount_was_killed(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    with own_cluster.mounted(mountpoint):
        data = os.urandom(3 * MIB + 5)
        make_settled(mountpoint / "file", data)
    role = own_cluster.mount(mountpoint)
    descriptor = os.open(mountpoint / "file", os.O_RDONLY)
    require_passthrough(own_cluster)
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as view:
        role.kill()
        assert view[:] == data
        assert os.pread(descriptor, len(data), 0) == data
    close(descriptor)


def removed_but_open(pid: int) -> list[str]:
    """Chunk files that a process keeps the space of."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return [link for link in links if "/chunks/" in link and link.endswith("(deleted)")]


def test_what_was_open_lately_is_opened_without_a_chunk_server(own_cluster: Cluster) -> None:
    [(key, data)] = make_blocks(105, [3 * MIB]).items()
    own_cluster.put_blocks("passed/again", {key: data})
    mountpoint = own_cluster.directory / "mnt"
    with own_cluster.mounted(mountpoint):
        block, file = mountpoint / "kv/passed/again" / key.hex(), mountpoint / "file"
        make_settled(file, data)

        def read_again() -> bool:
            """Once more if it was no longer lately: this machine was busy with something else."""
            assert block.read_bytes() == file.read_bytes() == data
            require_passthrough(own_cluster)
            os.kill(own_cluster.chunks.pid, signal.SIGSTOP)
            try:
                return block.read_bytes() == file.read_bytes() == data
            except OSError:
                return False
            finally:
                os.kill(own_cluster.chunks.pid, signal.SIGCONT)

        assert any(read_again() for _ in range(3))


def test_what_was_open_lately_shows_what_others_did(own_cluster: Cluster) -> None:
    blocks = make_blocks(106, [MIB, MIB])
    own_cluster.put_blocks("passed/others", blocks)
    here, there = (own_cluster.directory / name for name in ("here", "there"))
    role = own_cluster.mount(here)
    took = []
    with own_cluster.mounted(there):
        for key, data in blocks.items():  # the better of two, on a machine that may be busy
            begun = change_elsewhere(here, there, f"kv/passed/others/{key.hex()}", data)
            wait_until(lambda: not removed_but_open(role.pid))
            took.append(time.monotonic() - begun)
    assert min(took) < MOUNT_IDLE_SECONDS / 2
    role.stop()


def change_elsewhere(here: Path, there: Path, block: str, data: bytes) -> float:
    """What is read in one mount and then changed or removed in another one. When that was."""
    names = ("cut", "removed", "replaced", "written")
    for name in names:
        make_settled(here / name, data)
    assert {(here / name).read_bytes() for name in (*names, block)} == {data}
    new = bytes(reversed(data))
    (there / "cut").write_bytes(new)
    (there / "removed").unlink()
    (there / "new").write_bytes(new)
    (there / "new").rename(there / "replaced")
    with (there / "written").open("r+b") as file:
        file.write(new)
    (there / block).unlink()
    begun = time.monotonic()
    os.utime(there / "cut", (1, 1))
    os.utime(there / "written", (1, 1))
    assert {(here / n).read_bytes() for n in ("cut", "replaced", "written")} == {new}
    for name in ("removed", block):
        with pytest.raises(FileNotFoundError):
            (here / name).read_bytes()
    return begun


def test_every_way_to_read_an_ordinary_file(work: Path) -> None:
    data = os.urandom(2 * MIB + 7)
    path = work / "file"
    make_settled(path, data)
    with path.open("rb", buffering=0) as file:
        assert file.read() == data
        assert mapped(file.fileno()) == data
        assert sent(file.fileno(), len(data)) == data
        assert read_direct(path, len(data)) == data
        other = work / "other"
        make_settled(other, data[::-1])
        other.rename(path)  # the name is another file's now
        assert os.pread(file.fileno(), len(data), 0) == data
        path.unlink()
        assert os.pread(file.fileno(), len(data), 0) == data


@pytest.mark.parametrize("seed", range(3))
def test_who_reads_sees_what_others_write(work: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = work / "file"
    model = bytearray(rng.randbytes(300_000))
    make_settled(path, bytes(model))
    with path.open("rb", buffering=0) as reader:  # by the kernel, from here on
        for _ in range(60):
            step(rng, path, model)
            assert os.fstat(reader.fileno()).st_size == len(model)
            assert os.pread(reader.fileno(), len(model) + 1, 0) == model
            assert path.read_bytes() == model
    assert path.read_bytes() == model
    os.utime(path, (1, 1))
    with path.open("rb", buffering=0) as reader:  # its checksum is right again
        assert reader.read() == model


def step(rng: random.Random, path: Path, model: bytearray) -> None:
    """One change of the file, and of what it should hold."""
    data = rng.randbytes(rng.choice([1, 4096, 70_000]))
    choice = rng.randrange(6)
    if choice == 0:
        with path.open("ab", buffering=0) as file:
            file.write(data)
        model += data
    elif choice == 1:
        size = rng.choice([0, 1, 100_000, len(model) + 50_000])
        os.truncate(path, size)
        model[size:] = bytes(max(0, size - len(model)))
    elif choice == 2:
        path.write_bytes(data)
        model[:] = data
    elif choice == 3 and model:
        with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as view:
            at = rng.randrange(len(model))
            part = data[: len(model) - at]
            view[at : at + len(part)] = part
            model[at : at + len(part)] = part
    else:
        at = rng.randrange(len(model) + 100_000)
        with path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, at)
        model += bytes(max(0, at - len(model)))
        model[at : at + len(data)] = data


def test_opens_of_all_kinds_at_the_same_time(work: Path) -> None:
    """All opens of an inode must be alike for the kernel: a mistake is an EIO."""
    data = os.urandom(256 * KIB)
    paths = [work / str(n) for n in range(4)]
    for path in paths:
        make_settled(path, data)

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            path = rng.choice(paths)
            if rng.random() < 0.3:
                os.utime(path, (1, 1))
            flags = rng.choice([os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_RDONLY | os.O_DIRECT])
            descriptor = os.open(path, flags)
            try:
                if flags == os.O_RDWR:
                    os.pwrite(descriptor, data[:PAGE_BYTES], 0)
                elif not flags & os.O_DIRECT:
                    assert os.pread(descriptor, len(data), 0) == data
            finally:
                os.close(descriptor)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))


def test_a_file_that_grows_over_its_first_chunk(work: Path, cluster: Cluster) -> None:
    path = work / "file"
    data = os.urandom(FILE_CHUNK_BYTES - 1000)
    make_settled(path, data)
    with path.open("rb", buffering=0) as reader:
        with path.open("ab", buffering=0) as writer:
            writer.write(b"x" * 5000)
        require_passthrough(cluster)
        # As documented: to this reader the file ends with its first chunk.
        assert os.pread(reader.fileno(), 8000, len(data)) == b"x" * 1000
        assert os.fstat(reader.fileno()).st_size == len(data) + 5000
    # A close is told to the mount a moment later.
    wait_until(lambda: path.read_bytes() == data + b"x" * 5000)


class FakeDevice:
    """Gives out ids, or refuses to."""

    def __init__(self, refusal: int | None = None) -> None:
        self.refusal = refusal
        self.given = 0
        self.live: set[int] = set()

    def open_backing(self, descriptor: int) -> int:
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        self.given += 1
        self.live.add(self.given)
        return self.given

    def close_backing(self, backing_id: int) -> None:
        self.live.remove(backing_id)


def backings(refusal: int | None = None) -> tuple[Backings, FakeDevice]:
    device: Any = FakeDevice(refusal)
    return Backings(device), device


@pytest.fixture
def chunks(tmp_path: Path) -> Iterator[list[int]]:
    """Descriptors of three files."""
    found = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("a", "b", "c")]
    yield found
    for descriptor in found:
        os.close(descriptor)


def test_one_id_an_inode_until_the_last_release(chunks: list[int]) -> None:
    table, device = backings()
    first, second, third = chunks
    assert table.opened(1, 50, first) == table.opened(2, 50, second) == 1
    assert table.opened(3, 60, third) == 2
    table.released(1, is_kept=False)
    table.released(4711, is_kept=False)  # a handle that has nothing to do with it
    assert device.live == {1, 2} and len(table) == 2
    table.released(2, is_kept=False)
    assert device.live == {2}
    assert table.opened(4, 50, first) == 3
    table.released(3, is_kept=False)
    table.released(4, is_kept=False)
    assert not device.live and not len(table)


def test_an_id_is_kept_as_long_as_its_descriptor(chunks: list[int]) -> None:
    table, device = backings()
    for handle in range(5):
        assert table.opened(handle, 50, chunks[0]) == 1
        table.released(handle, is_kept=True)
    assert device.live == {1} and not len(table)
    table.let_go(50)
    table.let_go(50)
    assert not device.live
    assert table.opened(5, 50, chunks[0]) == 2
    table.let_go(50)  # of a descriptor that was at hand and is not the one in use
    assert device.live == {2}


def test_an_id_is_not_taken_for_another_file(chunks: list[int]) -> None:
    table, device = backings()
    table.opened(1, 50, chunks[0])
    table.released(1, is_kept=True)
    assert table.opened(2, 50, chunks[1]) == 2
    assert device.live == {2}


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ELOOP, errno.ENOTTY])
def test_what_was_opened_through_the_cache_stays_so(refusal: int, chunks: list[int]) -> None:
    table, device = backings(refusal)
    assert table.opened(1, 50, chunks[0]) == NO_BACKING
    device.refusal = None
    assert table.opened(2, 50, chunks[0]) == NO_BACKING
    assert table.opened(3, 60, chunks[0]) != NO_BACKING
    table.released(1, is_kept=True)
    table.released(2, is_kept=True)
    assert table.opened(4, 50, chunks[0]) != NO_BACKING
