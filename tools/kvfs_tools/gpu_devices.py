"""Rows of ``kvfs bench-gpu``: several GPUs, of one process and of one each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from kvfs_base.limits import KIB, MIB
from kvfs_gds.device import open_device
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from kvfs_tools.gpu_rig import Rig, Row, make_row, seconds
from kvfs_tools.gpu_rows import LAYERS, together

LINKS = "one pinned copy to each GPU by their copy engines, at the same time"


def devices(rig: Rig) -> list[Row]:
    """All blocks are loaded into each of the GPUs at the same time, from one arena: by one process
    that registers it once, and by one process a GPU."""
    if not rig.on_gpu:
        return []
    import cupy

    count = int(cupy.cuda.runtime.getDeviceCount())
    if count < 2:
        rig.notes.append("one GPU: no rows of several")
        return []
    fragment = min(64 * KIB, rig.block_bytes // 2)
    layers = max(1, min(LAYERS, rig.block_bytes // (2 * fragment)))
    per_block = rig.block_bytes // (2 * layers * fragment)
    pages = rig.count * per_block
    table = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(rig.count, -1)
    with ExitStack() as stack:
        loaders, caches = [], []
        for number in range(count):
            with cupy.cuda.Device(number):
                caches.append(
                    [cupy.empty((2, pages, fragment), dtype=cupy.uint8) for _ in range(layers)]
                )
            device = open_device("cuda", number)
            loaders.append(stack.enter_context(Loader.open(rig.namespace, device)))

        def load() -> None:
            jobs = [
                loader.load(rig.keys, Pages(PagedLayout.vllm(cache), table))
                for loader, cache in zip(loaders, caches, strict=True)
            ]
            if not all(all(job.result()) for job in jobs):
                raise RuntimeError("a block was missing")

        taken = rig.rounds_of(load, count * rig.total_bytes, _links(rig, count))
        where = rig.extents[0][0]
        wanted = np.frombuffer(rig.arena.owner, dtype=np.uint8)[where : where + fragment]
        for cache in caches:
            if not (cache[0][0, int(table[0, 0])].get() == wanted).all():
                raise RuntimeError("a block is not in its pages")
    one = make_row(f"arena, paged, {count} GPUs of one process", fragment, LINKS, taken)
    names = [f"cuda:{number}" for number in range(count)]
    path = f"arena, paged, {count} processes, a GPU each"
    return [one, together(rig, names, path, LINKS, _links(rig, count))]


def _links(rig: Rig, count: int) -> Callable[[], float]:
    import cupy

    targets, streams = [], []
    for number in range(count):
        with cupy.cuda.Device(number):
            targets.append(cupy.empty(rig.total_bytes, cupy.uint8))
            streams.append(cupy.cuda.Stream(non_blocking=True))

    def copy() -> None:
        for at in range(0, rig.total_bytes, 256 * MIB):
            size = min(256 * MIB, rig.total_bytes - at)
            for number, (target, stream) in enumerate(zip(targets, streams, strict=True)):
                with cupy.cuda.Device(number):
                    cupy.cuda.runtime.memcpyAsync(
                        target.data.ptr + at, rig.arena.address + at, size, 1, stream.ptr
                    )
        for stream in streams:
            stream.synchronize()

    copy()
    return lambda: count * rig.total_bytes / 1e9 / seconds(copy)


__all__ = ["devices"]
