"""Rows of ``kvfs bench-gpu`` that move between the arena and the device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import kvfs
from kvfs_base.limits import KIB, MIB
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout, Transfer
from kvfs_gds.ring import PinnedRing
from kvfs_tools.gpu_rig import Rig, Row, make_row

LAYERS = 32
FRAGMENTS = (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, 2 * MIB)
PROCESSES = (1, 2, 4)
LINK = "one pinned copy of all bytes by the copy engine"
MEMCPY_CALLS_MAX = 140_000
"""A loop of cudaMemcpyAsync takes about 3.5 us a call: below this it is over in half a second."""


class PagedCache:
    """A vLLM-shaped cache with room for every block of a rig, in pages of ``fragment`` bytes and a
    random block table. Blocks are 32 layers, or as many as there is room for."""

    def __init__(self, rig: Rig, fragment: int, keep: Any = None) -> None:
        self.fragment = fragment
        self.layers = max(1, min(LAYERS, rig.block_bytes // (2 * fragment)))
        per_block = rig.block_bytes // (self.layers * 2 * fragment)
        pages = rig.count * per_block
        memory = rig.empty(rig.total_bytes) if keep is None else keep
        per_layer = 2 * pages * fragment
        self.memory = memory
        self.tensors = [
            memory[i * per_layer : (i + 1) * per_layer].reshape(2, pages, fragment)
            for i in range(self.layers)
        ]
        self.layout = PagedLayout.vllm(self.tensors)
        rng = np.random.default_rng(fragment)
        self.table = rng.permutation(pages).astype(np.int32).reshape(rig.count, per_block)
        self.order = rng.permutation(rig.count)
        self.pages = Pages(self.layout, self.table)

    def check(self, rig: Rig, numbers: list[int]) -> None:
        """Raises RuntimeError unless these blocks lie in their pages."""
        host = np.frombuffer(rig.arena.owner, dtype=np.uint8)
        for number in numbers:
            offset, _ = rig.extents[number]
            pieces = host[offset : offset + rig.block_bytes].reshape(
                self.layers, 2, -1, self.fragment
            )
            for layer in range(self.layers):
                found = self.tensors[layer][:, self.table[number]]
                if not (
                    np.asarray(getattr(found, "get", lambda f=found: f)()) == pieces[layer]
                ).all():
                    raise RuntimeError(f"block {number} is not in its pages")


def arena(rig: Rig) -> list[Row]:
    """All blocks lie in the arena: bulk and paged."""
    limit = rig.pinned_limit()
    memory = rig.empty(rig.total_bytes)
    rows = []
    with Loader.open(rig.namespace, rig.device) as loader:
        target = memory.reshape(rig.count, rig.block_bytes)
        table = np.arange(rig.count, dtype=np.int32).reshape(-1, 1)
        whole = Pages(PagedLayout.rows(target), table)
        rows.append(_load_row(rig, loader, "arena, bulk", whole, limit))
        for fragment in FRAGMENTS:
            if 2 * fragment > rig.block_bytes:
                continue
            cache = PagedCache(rig, fragment, memory)
            memory[:] = 0
            rig.synchronize()
            row = _load_row(rig, loader, "arena, paged", cache.pages, limit)
            cache.check(rig, [0, rig.count // 2, rig.count - 1])
            rows.append(row)
    return rows


def copies(rig: Rig) -> list[Row]:
    """The same copies without a loader around them."""
    if not rig.on_gpu:
        return []
    limit = rig.pinned_limit()
    memory = rig.empty(rig.total_bytes)
    rows = []
    for fragment in FRAGMENTS:
        if 2 * fragment <= rig.block_bytes:
            rows += _loops(rig, PagedCache(rig, fragment, memory), limit)
    return rows


def _load_row(
    rig: Rig,
    loader: Loader,
    path: str,
    pages: Pages,
    limit: Callable[[], float],
) -> Row:
    def load() -> None:
        if not all(loader.load(rig.keys, pages).result()):
            raise RuntimeError(f"{path}: a block was missing")

    taken = rig.rounds_of(load, rig.total_bytes, limit)
    return make_row(path, pages.layout.piece_bytes, LINK, taken)


def _loops(rig: Rig, cache: PagedCache, limit: Callable[[], float]) -> list[Row]:
    """What engines do without a kernel: a copy call a piece, one by one or as a batch; and the
    kernel."""
    offsets = np.array([offset for offset, _ in rig.extents], dtype=np.int64)
    near, far = Transfer(rig.arena, offsets, cache.layout, cache.table).addresses(0, cache.layers)
    if len(near) > MEMCPY_CALLS_MAX:
        return []
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    pairs = list(zip(far.tolist(), near.tolist(), strict=True))

    def loop() -> None:
        memcpy, pointer, size = cupy.cuda.runtime.memcpyAsync, stream.ptr, cache.fragment
        for to, source in pairs:
            memcpy(to, source, size, 1, pointer)
        stream.synchronize()

    bodies = {"loop of cudaMemcpyAsync": loop}
    bodies |= _batches(near, far, cache.fragment, stream)
    bodies["kernel alone"] = _kernel(rig, cache, offsets, stream)
    return [
        make_row(name, cache.fragment, LINK, rig.rounds_of(body, rig.total_bytes, limit))
        for name, body in bodies.items()
    ]


def _batches(near: Any, far: Any, size: int, stream: Any) -> dict[str, Callable[[], None]]:
    """The runtime's batches of copies, where there are any: all in one call, as engines make it
    (vLLM's swap_blocks), and as the loader does."""
    from kvfs_gds.cuda_batch import CALL_COPIES, MemcpyBatch

    found = MemcpyBatch.find()
    if found is None:
        return {}
    sizes = np.full(len(near), size, dtype=np.int64)

    def batch(call_copies: int) -> None:
        found.copy(far, near, sizes, stream.ptr, in_order=False, call_copies=call_copies)
        stream.synchronize()

    return {
        "cudaMemcpyBatchAsync": partial(batch, len(near)),
        f"cudaMemcpyBatchAsync, {CALL_COPIES} a call": partial(batch, CALL_COPIES),
    }


def _kernel(rig: Rig, cache: PagedCache, offsets: Any, stream: Any) -> Callable[[], None]:
    """The copy kernel, also where the loader would take the engine."""
    from kvfs_gds.cuda import Way

    device: Any = rig.device
    transfer = Transfer(rig.arena, offsets, cache.layout, cache.table)
    plan = device.plan(transfer, way=Way.KERNEL)

    def copy() -> None:
        device.copy(plan, 0, cache.layers, stream)
        stream.synchronize()

    return copy


def store(rig: Rig) -> list[Row]:
    """From pages to pinned memory, and all the way to the disk."""
    memory = rig.empty(rig.total_bytes)
    cache = PagedCache(
        rig, 64 * KIB if rig.block_bytes >= 128 * KIB else rig.block_bytes // 2, memory
    )
    if rig.on_gpu:
        memory[:] = 7
    limit = rig.pinned_limit(back=True)
    ring = PinnedRing(rig.device, rig.total_bytes)
    offsets = np.arange(rig.count, dtype=np.int64) * rig.block_bytes
    transfer = Transfer(ring.memory, offsets, cache.layout, cache.table)
    ring.registered.ensure(transfer)
    stream = rig.device.stream(urgent=False)
    plan = rig.device.plan(transfer, store=True)

    def gather() -> None:
        rig.device.copy(plan, 0, cache.layers, stream, store=True)
        rig.device.record(stream).wait()

    taken = rig.rounds_of(gather, rig.total_bytes, limit)
    rows = [make_row("store, pages to pinned memory", cache.fragment, LINK + ", back", taken)]
    ring.close()
    names = iter(range(10**6))
    count = max(1, min(rig.count, 512 * MIB // rig.block_bytes))
    some = Pages(cache.layout, cache.table[:count])
    previous: list[bytes] = []

    with Loader.open(rig.namespace, rig.device) as loader:

        def put() -> None:
            keys = kvfs.block_keys([next(names)] * count, 1, salt=b"bench-gpu-store")
            if loader.store(keys, some).result() != count:
                raise RuntimeError("a block was there already")
            previous.extend(keys)

        def forget() -> None:
            rig.namespace.remove(previous)
            previous.clear()

        disk = fio_write(rig, count * rig.block_bytes)
        taken = rig.rounds_of(put, count * rig.block_bytes, lambda: disk, before=forget)
        forget()
    rows.append(
        make_row("store, pages to disk (put)", cache.fragment, "fio write, O_DIRECT", taken)
    )
    return rows


def fio_write(rig: Rig, nbytes: int) -> float:
    """GB/s of fio's O_DIRECT write of a fresh file."""
    path = rig.folder / "fio-write.bin"
    argv = ["fio", "--name=limit", f"--filename={path}", f"--size={nbytes}", "--rw=write"]
    argv += ["--bs=1M", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--output-format=json"]
    argv += ["--fallocate=none"]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    path.unlink()
    return float(json.loads(out[out.index("{") :])["jobs"][0]["write"]["bw_bytes"]) / 1e9


def processes(rig: Rig) -> list[Row]:
    """Several processes load everything from one arena at the same time: what all of them move
    together, against what one copy moves alone."""
    limit = rig.pinned_limit()
    return [
        together(rig, [rig.device.name] * count, f"arena, paged, {count} processes", LINK, limit)
        for count in PROCESSES
    ]


def together(
    rig: Rig, devices: list[str], path: str, limit_is: str, limit: Callable[[], float]
) -> Row:
    """A process for each of ``devices``; all load everything at the same time."""
    workers = [Worker(rig, device) for device in devices]
    try:
        for worker in workers:
            worker.expect("ready")

        def go() -> None:
            for worker in workers:
                worker.say("go")
            for worker in workers:
                worker.expect("done")

        before = rig.client.statistics()["blocks_loaded"]
        taken = rig.rounds_of(go, len(devices) * rig.total_bytes, limit)
        read = rig.client.statistics()["blocks_loaded"] - before
        return make_row(path, 64 * KIB, limit_is, taken, f"{read} blocks read from disk")
    finally:
        for worker in workers:
            worker.end()


class Worker:
    """A process with a loader of its own (``kvfs_tools.gpu_worker``)."""

    def __init__(self, rig: Rig, device: str | None = None) -> None:
        argv = [sys.executable, "-m", "kvfs_tools.gpu_worker", str(rig.cluster.directory)]
        argv += [device or rig.device.name, str(rig.count), str(rig.block_bytes)]
        self._rig = rig
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        rig.processes.append(self._process)

    def say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, word: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        if line != word:
            raise RuntimeError(f"a worker said {line!r}, not {word!r}")

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._rig.processes.remove(self._process)


__all__ = ["PagedCache", "arena", "copies", "processes", "store", "together"]
