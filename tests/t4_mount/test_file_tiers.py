"""File tiers of engines on a mount: the system calls that each makes, in its order.

Taken from the sources of vLLM, SGLang, LMCache, Dynamo's KVBM, Mooncake and NIXL (autumn 2026;
`docs/mount.md` has the table). A block that is looked up and found is read whole, or its open says
ENOENT: a short read makes vLLM delete the file and SGLang give up the request.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import random
import tempfile
import threading
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
from kvfs_metadata.messages import RemoveBlocks, Resolve
from t4_mount.async_io import Transfer, async_io
from t4_mount.harness import Cluster

pytestmark = pytest.mark.both_frontends

BLOCK_BYTES = 260 * KIB
"""Of no power of two: two requests of the kernel where it cuts them at 256 KiB or at 1 MiB less."""
STAMP_BYTES = 32

Store = Callable[[Path, memoryview], None]
Load = Callable[[Path, memoryview], None]


class ShortRead(Exception):
    """What no tier may ever see."""


def aligned(size: int) -> memoryview:
    """Memory for O_DIRECT."""
    return memoryview(mmap.mmap(-1, -(-size // PAGE_BYTES) * PAGE_BYTES))[:size]


def fill(view: memoryview, name: str, writer: int) -> None:
    """Bytes that say which block they are of and who wrote them."""
    stamp = hashlib.sha256(name.encode()).digest()[: STAMP_BYTES - 8] + writer.to_bytes(8, "little")
    view[:] = stamp * (len(view) // STAMP_BYTES)


def check(view: memoryview, name: str) -> None:
    """All of one writer, and of this block."""
    stamp = bytes(view[:STAMP_BYTES])
    assert stamp[:-8] == hashlib.sha256(name.encode()).digest()[: STAMP_BYTES - 8], name
    assert view == stamp * (len(view) // STAMP_BYTES), name


# vLLM: vllm/v1/kv_offload/tiering/fs/io.py


def vllm_probe(directory: Path) -> bool:
    path = directory / ".o_direct_probe_1.tmp"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT, 0o644)
        try:
            os.write(descriptor, aligned(PAGE_BYTES))
        finally:
            os.close(descriptor)
        return True
    except OSError:
        return False
    finally:
        path.unlink()


def vllm_store(path: Path, view: memoryview) -> None:
    if os.path.exists(path):
        return
    temporary = f"{path}_{threading.get_ident()}.tmp"
    os.makedirs(path.parent, exist_ok=True)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT
    descriptor = os.open(temporary, flags, 0o644)
    try:
        written = os.write(descriptor, view)
    finally:
        os.close(descriptor)
    assert written == len(view)  # a short write is an error there
    os.replace(temporary, path)


def vllm_load(path: Path, view: memoryview) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        if os.readv(descriptor, [view]) != len(view):
            raise ShortRead(path)
    finally:
        os.close(descriptor)


# SGLang: python/sglang/srt/mem_cache/hicache_storage.py, HiCacheFile


def sglang_store(path: Path, view: memoryview) -> None:
    if os.path.exists(path):
        return
    temporary = f"{path}.tmp.{os.getpid()}.{threading.get_ident()}.{random.getrandbits(64):x}"
    with open(temporary, "wb") as file:  # numpy's tofile()
        file.write(view)
    os.replace(temporary, path)


def sglang_load(path: Path, view: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        if file.readinto(view) != len(view):
            raise ShortRead(path)


# LMCache: fs_l2_adapter.py; csrc/storage_backends/fs/connector.cpp (fs_native)


def lmcache_store(flags: int) -> Store:
    """Both write into the directory ``tmp``; ``fs`` does not cut what is there already."""

    def store(path: Path, view: memoryview) -> None:
        if os.path.exists(path):
            return
        temporary = path.parent / "tmp" / path.name
        descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | flags, 0o644)
        try:
            assert os.write(descriptor, view) == len(view)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)

    return store


def lmcache_load(flags: int) -> Load:
    def load(path: Path, view: memoryview) -> None:
        descriptor = os.open(path, os.O_RDONLY | flags)
        try:
            done = 0
            while count := os.readv(descriptor, [view[done:]]):
                done += count
            if done != len(view):
                raise ShortRead(path)
        finally:
            os.close(descriptor)

    return load


def lmcache_name(number: int) -> str:
    digest = hashlib.sha256(b"%d" % number).hexdigest()
    return f"meta-llama-SEP-Llama-3-8B@0x04000400@0@{digest}@salt.data"


TIERS: dict[str, tuple[Store, Load]] = {
    "vllm": (vllm_store, vllm_load),
    "sglang": (sglang_store, sglang_load),
    "lmcache-fs": (lmcache_store(0), lmcache_load(0)),
    "lmcache-fs-direct": (lmcache_store(os.O_DIRECT), lmcache_load(os.O_DIRECT)),
    "lmcache-native": (
        lmcache_store(os.O_TRUNC | os.O_DIRECT),
        lmcache_load(os.O_DIRECT),
    ),
}


def test_vllm_finds_that_direct_io_works(work: Path) -> None:
    assert vllm_probe(work)
    assert os.listdir(work) == []


@pytest.mark.parametrize("tier", TIERS)
def test_blocks_are_stored_looked_up_and_loaded(work: Path, tier: str) -> None:
    store, load = TIERS[tier]
    (work / "tmp").mkdir()
    names = [lmcache_name(n) for n in range(12)]
    if tier == "vllm":
        names = [f"model_0a1b_r0/{n:03x}/{n:02x}_g0/{n:016x}.bin" for n in range(12)]

    def worker(number: int) -> None:
        """Each block is stored by two at a time; both may rename theirs over the other's."""
        view = aligned(BLOCK_BYTES)
        for name in names[number // 2 :: 2]:
            fill(view, name, number)
            with contextlib.suppress(FileNotFoundError):  # LMCache's share one temporary name
                store(work / name, view)

    workers = 4 if tier in ("vllm", "sglang") else 1
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(worker, range(4)))
    view = aligned(BLOCK_BYTES)
    for name in names:
        # A look-up of a batch: faccessat(F_OK) each; those that are missing are the hot ones.
        assert os.access(work / name, os.F_OK)
        assert not os.access(work / f"{name}-missing", os.F_OK)
        assert (work / name).stat().st_size == BLOCK_BYTES
        load(work / name, view)
        check(view, name)
    if tier != "vllm":
        # At start: names, kinds and sizes.
        with os.scandir(work) as entries:
            found = {e.name: e.stat().st_size for e in entries if e.is_file(follow_symlinks=False)}
        assert found == dict.fromkeys(names, BLOCK_BYTES)
        assert sorted([*names, "tmp"]) == sorted(os.listdir(work))
    assert not list(work.glob("**/*.tmp*"))


@pytest.fixture
def other(
    cluster: Cluster, work: Path, mounted: Path, frontend: str, tmp_path: Path
) -> Iterator[Path]:
    """The test's directory through another mount, as another node has it."""
    with cluster.mounted(tmp_path / "other", f"--frontend={frontend}") as mountpoint:
        yield mountpoint / work.relative_to(mounted)


@pytest.mark.parametrize("tier", ["vllm", "sglang"])
def test_readers_race_with_eviction(work: Path, other: Path, tier: str) -> None:
    """Writers, readers of two mounts, and an evictor: whole and right, or ENOENT at open."""
    store, load = TIERS[tier]
    names = [f"{n:02x}.bin" for n in range(6)]
    rounds = 30
    done = threading.Event()
    reads = {"whole": 0, "gone": 0}

    def writer(number: int) -> None:
        view = aligned(BLOCK_BYTES)
        for turn in range(rounds):
            name = names[turn % len(names)]
            fill(view, name, 2 * turn + number)
            store(work / name, view)

    def evictor() -> None:
        rng = random.Random(1)
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(rng.choice([work, other]) / rng.choice(names))

    def reader(directory: Path, seed: int) -> None:
        rng = random.Random(seed)
        view = aligned(BLOCK_BYTES)
        while not done.is_set():
            name = rng.choice(names)
            if not os.access(directory / name, os.F_OK):
                continue
            view[:] = bytes(len(view))
            try:
                load(directory / name, view)
            except FileNotFoundError:
                reads["gone"] += 1
                continue
            check(view, name)
            reads["whole"] += 1

    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(evictor)]
        others += [pool.submit(reader, work, 2), pool.submit(reader, other, 3)]
        try:
            for task in [pool.submit(writer, n) for n in range(2)]:
                task.result()
        finally:
            done.set()
        for task in others:
            task.result()
    assert reads["whole"]


def test_blocks_of_a_namespace_are_whole_or_gone(
    mounted: Path, cluster: Cluster, frontend: str
) -> None:
    """kvfs's own eviction, against a tier that only reads."""
    tenant = f"tier-{frontend}/model"
    keys = [hashlib.sha256(b"%d" % n).digest() for n in range(8)]
    blocks = {}
    for key in keys:
        view = aligned(BLOCK_BYTES)
        fill(view, key.hex(), 0)
        blocks[key] = bytes(view)
    done = threading.Event()
    reads = {"whole": 0, "gone": 0}

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        view = aligned(BLOCK_BYTES)
        while not done.is_set():
            name = rng.choice(keys).hex()
            path = mounted / "kv" / tenant / name
            if not os.access(path, os.F_OK):
                continue
            try:
                vllm_load(path, view)
            except FileNotFoundError:
                reads["gone"] += 1
                continue
            check(view, name)
            reads["whole"] += 1

    cluster.put_blocks(tenant, blocks)
    with ThreadPoolExecutor(2) as pool, cluster.client() as client:
        readers = [pool.submit(reader, seed) for seed in range(2)]
        try:
            namespace = client.call(Resolve(f"kv/{tenant}".encode())).inode
            for turn in range(12):
                some = keys[turn % 4 :: 4]
                assert client.call(RemoveBlocks(namespace, b"".join(some))) == len(some)
                cluster.put_blocks(tenant, {key: blocks[key] for key in some})
        finally:
            done.set()
        for task in readers:
            task.result()
    assert reads["whole"]


# KVBM: lib/llm/src/block_manager/storage/disk.rs


def test_kvbm_keeps_its_blocks_in_one_file(work: Path, frontend: str) -> None:
    """mkostemp, O_DIRECT by fcntl, fallocate, unlinked while it is open; blocks in their places."""
    block, count = 256 * KIB, 72  # 18 MiB: the last blocks lie in a second chunk
    descriptor, name = tempfile.mkstemp(prefix="dynamo-kvbm-disk-cache-", dir=work)
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        libc = ctypes.CDLL(None, use_errno=True)
        size = block * count
        result = libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size))
        if frontend == "direct":
            assert result == 0, os.strerror(ctypes.get_errno())
        else:  # and then KVBM makes the file as long as it should be
            assert (result, ctypes.get_errno()) == (-1, errno.EOPNOTSUPP)
            os.ftruncate(descriptor, size)
        assert os.fstat(descriptor).st_size == size
        os.unlink(name)
        assert os.listdir(work) == []

        def write(number: int) -> None:
            view = aligned(block)
            for at in range(number, count, 4):
                fill(view, f"block-{at}", number)
                assert os.pwrite(descriptor, view, at * block) == block

        def read(number: int) -> None:
            view = aligned(block)
            for at in range(number, count, 4):
                assert os.preadv(descriptor, [view], at * block) == block
                check(view, f"block-{at}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
            list(pool.map(read, range(4)))
            os.fsync(descriptor)
            list(pool.map(read, range(4)))
    finally:
        os.close(descriptor)


# Mooncake: mooncake-store/src/{storage_backend,posix_file,uring_file}.cpp


def test_mooncake_puts_many_blocks_into_a_bucket(work: Path) -> None:
    """One pwritev of a bucket, fdatasync, then its metadata; read by preadv, and by a ring with a
    registered buffer, O_DIRECT, whole pages around what is wanted. Buckets are of 256 MB there;
    here one reaches just into the second chunk."""
    sizes = [FILE_CHUNK_BYTES - MIB, 300_000 // STAMP_BYTES * STAMP_BYTES, 2 * MIB, STAMP_BYTES]
    names = [f"key-{n}" for n in range(len(sizes))]
    pieces, places, at = [], [], 0
    for name, size in zip(names, sizes, strict=True):
        view = memoryview(bytearray(size))
        fill(view, name, 1)
        pieces += [name.encode(), view]
        places.append(at + len(name))
        at += len(name) + size
    bucket = work / "1.bucket"
    descriptor = os.open(bucket, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    assert os.pwritev(descriptor, pieces, 0) == at
    os.fdatasync(descriptor)
    os.close(descriptor)
    (work / "1.meta").write_bytes(b"offsets and sizes")
    assert sorted(os.listdir(work)) == ["1.bucket", "1.meta"]

    descriptor = os.open(bucket, os.O_RDONLY | os.O_CLOEXEC)
    for name, size, place in zip(names, sizes, places, strict=True):
        view = memoryview(bytearray(size))
        assert os.preadv(descriptor, [view], place) == size
        check(view, name)
    os.close(descriptor)

    with async_io("uring-fixed", 4 * MIB) as io:
        descriptor = os.open(bucket, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        transfers, room = [], 0
        for size, place in list(zip(sizes, places, strict=True))[1:]:
            start = place // PAGE_BYTES * PAGE_BYTES
            length = -(-(place + size - start) // PAGE_BYTES) * PAGE_BYTES
            transfers.append(Transfer(descriptor, room, length, start))
            room += length
        os.unlink(bucket)  # evicted while it is being read
        for wanted, got in zip(transfers, io.read(transfers), strict=True):
            assert got == min(wanted.length, at - wanted.offset)
        os.close(descriptor)
        for name, size, place, t in zip(names[1:], sizes[1:], places[1:], transfers, strict=True):
            start = t.at + place - t.offset
            check(memoryview(io.buffer)[start : start + size], name)


# NIXL: src/plugins/posix/{io_uring,linux_aio}_io_queue.cpp


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("kind", ["uring", "aio"])
def test_nixl_keeps_many_requests_in_flight(work: Path, kind: str, flags: int) -> None:
    """Files that are registered and stay open, read and written in batches at any depth."""
    block, blocks_per_file = 128 * KIB, 8
    with async_io(kind, 3 * blocks_per_file * block) as io, contextlib.ExitStack() as stack:
        transfers = []
        for number in range(3):
            path = work / f"obj_{number}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
            stack.callback(os.close, descriptor)
            for n in range(blocks_per_file):
                at = len(transfers) * block
                transfers.append(Transfer(descriptor, at, block, n * block))
                fill(memoryview(io.buffer)[at : at + block], f"{number}-{n}", 1)
        shuffled = random.Random(1).sample(transfers, len(transfers))
        assert io.write(shuffled) == [block] * len(transfers)
        for _ in range(2):
            memoryview(io.buffer)[:] = bytes(len(io.buffer))
            assert io.read(shuffled) == [block] * len(transfers)
            for index, t in enumerate(transfers):
                name = f"{index // blocks_per_file}-{index % blocks_per_file}"
                check(memoryview(io.buffer)[t.at : t.at + block], name)
            # What was evicted meanwhile is read on by who has it open.
            for path in work.iterdir():
                path.unlink()
        end = blocks_per_file * block
        assert io.read([Transfer(transfers[0].descriptor, 0, block, end)]) == [0]
        with pytest.raises(FileNotFoundError):
            os.open(work / "obj_0", os.O_RDONLY | flags)
