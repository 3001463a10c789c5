"""Sealed files that the kernel reads by itself: the same bytes, whatever happens to the server, the
name or the mount."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from kvfs.mount.passthrough import NO_BACKING, Backings
from kvfs_base.limits import MIB, PAGE_BYTES
from kvfs_metadata.messages import RemoveBlocks, Resolve
from t4_mount.harness import COLLECTED_SECONDS, Cluster, wait_until
from t4_mount.test_mount_blocks import make_blocks


def read_direct(path: Path, size: int) -> bytes:
    """With O_DIRECT, whole pages."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, -(-size // PAGE_BYTES) * PAGE_BYTES) as room:
            count = os.preadv(descriptor, [room], 0)
            return room[:count]
    finally:
        os.close(descriptor)


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
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            role.kill()
            # Not one byte was read before.
            assert view[:] == data
            assert file.read() == data
        with pytest.raises(OSError) as caught:
            os.statvfs(mountpoint)
        assert caught.value.errno == errno.ENOTCONN


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


def test_one_id_an_inode_until_the_last_release() -> None:
    table, device = backings()
    assert [table.opened(1, 50, 8), table.opened(2, 50, 9), table.opened(3, 60, 8)] == [1, 1, 2]
    table.released(1)
    table.released(4711)  # a handle that has nothing to do with it
    assert device.live == {1, 2} and len(table) == 2
    table.released(2)
    assert device.live == {2}
    assert table.opened(4, 50, 8) == 3
    table.released(3)
    table.released(4)
    assert not device.live and not len(table)


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ELOOP, errno.ENOTTY])
def test_what_was_opened_through_the_cache_stays_so(refusal: int) -> None:
    table, device = backings(refusal)
    assert table.opened(1, 50, 8) == NO_BACKING
    device.refusal = None
    assert table.opened(2, 50, 8) == NO_BACKING
    assert table.opened(3, 60, 8) != NO_BACKING
    table.released(1)
    table.released(2)
    assert table.opened(4, 50, 8) != NO_BACKING
