"""KV blocks as read-only files: right bytes or an error."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import stat
from pathlib import Path

import pytest

from kvfs_base.limits import MIB
from kvfs_metadata.messages import RemoveBlocks, Resolve
from t4_mount.harness import COLLECTED_SECONDS, Cluster, detach, wait_until

pytestmark = pytest.mark.both_frontends


@pytest.fixture
def tenant(frontend: str) -> str:
    """Each front end's run stores the same blocks anew."""
    return f"tenant-{frontend}"


def make_blocks(seed: int, sizes: list[int]) -> dict[bytes, bytes]:
    rng = random.Random(seed)
    return {
        hashlib.sha256(b"%d-%d" % (seed, n)).digest(): rng.randbytes(s) for n, s in enumerate(sizes)
    }


def flip(path: Path, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 0x40]), offset)


def test_blocks_are_files_named_by_their_key(mounted: Path, cluster: Cluster, tenant: str) -> None:
    blocks = make_blocks(1, [1, 4096, 100_000, 2 * MIB, 2 * MIB + 1])
    cluster.put_blocks(f"{tenant}/model", blocks)
    directory = mounted / f"kv/{tenant}/model"
    assert sorted(os.listdir(directory)) == sorted(key.hex() for key in blocks)
    for key, data in blocks.items():
        path = directory / key.hex()
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o444
        assert found.st_size == len(data)
        assert path.read_bytes() == data
        with path.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 1000, len(data) // 2) == data[len(data) // 2 :][:1000]
            assert os.pread(file.fileno(), 10, len(data)) == b""


def test_a_block_can_be_mapped(mounted: Path, cluster: Cluster, tenant: str) -> None:
    [(key, data)] = make_blocks(2, [MIB + 5]).items()
    cluster.put_blocks(f"{tenant}/mapped", {key: data})
    with (mounted / f"kv/{tenant}/mapped" / key.hex()).open("rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            assert view[:] == data


def test_what_somebody_else_stores_is_seen_at_once(
    mounted: Path, cluster: Cluster, tenant: str
) -> None:
    [(key, data)] = make_blocks(3, [5000]).items()
    cluster.put_blocks(f"{tenant}/fresh", make_blocks(4, [10]))
    path = mounted / f"kv/{tenant}/fresh" / key.hex()
    assert not path.exists()
    cluster.put_blocks(f"{tenant}/fresh", {key: data})
    assert path.read_bytes() == data


def test_blocks_are_read_only(mounted: Path, cluster: Cluster, tenant: str) -> None:
    [(key, data)] = make_blocks(5, [5000]).items()
    cluster.put_blocks(f"{tenant}/only", {key: data})
    directory = mounted / f"kv/{tenant}/only"
    path = directory / key.hex()
    for attempt in (
        lambda: path.open("r+b"),
        lambda: path.open("wb"),
        lambda: os.truncate(path, 1),
        lambda: path.rename(directory / "other"),
        lambda: path.rename(mounted / "elsewhere"),
        lambda: (directory / "file").touch(),
        lambda: (directory / "sub").mkdir(),
        lambda: os.link(path, mounted / "linked"),
        lambda: path.chmod(0o666),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno in (errno.EPERM, errno.EACCES), caught.value
    assert path.read_bytes() == data


def test_unlink_removes_a_block(mounted: Path, cluster: Cluster, tenant: str) -> None:
    blocks = make_blocks(6, [3 * MIB, 100])
    infos = cluster.put_blocks(f"{tenant}/gone", blocks)
    directory = mounted / f"kv/{tenant}/gone"
    first, second = (directory / key.hex() for key in blocks)
    with first.open("rb", buffering=0) as file:
        first.unlink()
        assert os.listdir(directory) == [second.name]
        assert file.read() == blocks[bytes.fromhex(first.name)]  # readers keep what they opened
    inode = infos[bytes.fromhex(first.name)].inode
    wait_until(lambda: not cluster.chunk_files(inode), COLLECTED_SECONDS)
    with pytest.raises(FileNotFoundError):
        first.read_bytes()


def test_a_block_that_was_removed_behind_the_mount_is_missing(
    mounted: Path, cluster: Cluster, tenant: str
) -> None:
    [(key, data)] = make_blocks(7, [5000]).items()
    cluster.put_blocks(f"{tenant}/behind", {key: data})
    path = mounted / f"kv/{tenant}/behind" / key.hex()
    assert path.read_bytes() == data
    with cluster.client() as client:
        namespace = client.call(Resolve(f"kv/{tenant}/behind".encode())).inode
        assert client.call(RemoveBlocks(namespace, key)) == 1
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


@pytest.mark.logs_warnings
@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_a_flipped_byte_is_an_error_never_wrong_bytes(cluster: Cluster, transport: str) -> None:
    blocks = make_blocks(8 if transport == "local" else 9, [2 * MIB, 70_000])
    infos = cluster.put_blocks(f"tenant/flipped-{transport}", blocks)
    (bad, good) = blocks
    [file] = cluster.chunk_files(infos[bad].inode)
    flip(file, MIB + 17)
    mountpoint = cluster.directory / f"mnt-{transport}"
    try:
        with cluster.mounted(mountpoint, f"--transport={transport}"):
            directory = mountpoint / f"kv/tenant/flipped-{transport}"
            with pytest.raises(OSError) as caught:
                (directory / bad.hex()).read_bytes()
            assert caught.value.errno in (errno.EIO, errno.ENOENT)
            assert (directory / good.hex()).read_bytes() == blocks[good]
            # Found damaged, it is no longer in the namespace.
            wait_until(lambda: not (directory / bad.hex()).exists())
    finally:
        detach(mountpoint)


@pytest.mark.logs_warnings
def test_the_kernel_is_told_of_a_damaged_block(cluster: Cluster, frontend: str) -> None:
    """It may remember names and attributes for ten minutes, and forgets these now."""
    [(key, data)] = make_blocks(13 if frontend == "direct" else 14, [100_000]).items()
    infos = cluster.put_blocks("tenant/told", {key: data})
    mountpoint = cluster.directory / f"mnt-told-{frontend}"
    try:
        options = ("--entry-seconds=600", "--attribute-seconds=600", f"--frontend={frontend}")
        with cluster.mounted(mountpoint, *options):
            path = mountpoint / "kv/tenant/told" / key.hex()
            assert path.exists()
            [file] = cluster.chunk_files(infos[key].inode)
            flip(file, 50_000)
            with pytest.raises(OSError):
                path.read_bytes()
            wait_until(lambda: not path.exists())
    finally:
        detach(mountpoint)


@pytest.mark.logs_warnings
def test_a_block_whose_file_is_lost_or_cut_is_an_error(
    mounted: Path, cluster: Cluster, tenant: str
) -> None:
    blocks = make_blocks(10, [100_000, 100_000])
    infos = cluster.put_blocks(f"{tenant}/torn", blocks)
    lost, cut = blocks
    cluster.chunk_files(infos[lost].inode)[0].unlink()
    os.truncate(cluster.chunk_files(infos[cut].inode)[0], 50_000)
    for key in blocks:
        with pytest.raises(OSError) as caught:
            (mounted / f"kv/{tenant}/torn" / key.hex()).read_bytes()
        assert caught.value.errno in (errno.EIO, errno.ENOENT)


def test_blocks_over_tcp(cluster: Cluster) -> None:
    blocks = make_blocks(11, [1, 5000, 3 * MIB + 1])
    cluster.put_blocks("tenant/tcp", blocks)
    mountpoint = cluster.directory / "mnt-remote"
    try:
        with cluster.mounted(mountpoint, "--transport=tcp"):
            for key, data in blocks.items():
                assert (mountpoint / "kv/tenant/tcp" / key.hex()).read_bytes() == data
            (mountpoint / "remote").write_bytes(b"written over TCP" * 100_000)
            assert (mountpoint / "remote").read_bytes() == b"written over TCP" * 100_000
            (mountpoint / "remote").unlink()
    finally:
        detach(mountpoint)


def test_attributes_of_a_block(mounted: Path, cluster: Cluster, tenant: str) -> None:
    [(key, data)] = make_blocks(12, [5000]).items()
    infos = cluster.put_blocks(f"{tenant}/attributes", {key: data})
    path = mounted / f"kv/{tenant}/attributes" / key.hex()
    names = os.listxattr(path)
    assert {"user.kvfs.key", "user.kvfs.generation", "user.kvfs.crc32c"} <= set(names)
    assert os.getxattr(path, "user.kvfs.key") in (key, key.hex().encode())
    assert path.stat().st_ino == infos[key].inode
