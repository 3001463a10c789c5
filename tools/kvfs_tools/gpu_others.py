"""Rows of ``kvfs bench-gpu``: several GPUs of one process, and the kernels that other caches load
pages with, where their packages are installed."""

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
from kvfs_tools.gpu_rows import LAYERS, LINK

LINKS = "one pinned copy to each GPU by their copy engines, at the same time"


def devices(rig: Rig) -> list[Row]:
    """One process loads all blocks into each of its GPUs at the same time, from one arena that is
    registered once."""
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
    path = f"arena, paged, {count} GPUs of one process"
    return [make_row(path, fragment, LINKS, taken)]


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


LMCACHE_CHUNK_TOKENS = 256
TOKEN_BYTES = 2048
"""K of one layer: eight heads of 128 in bf16."""

PAGE_TOKENS = 16


def others(rig: Rig) -> list[Row]:
    """What other caches bring pages from pinned memory to a GPU with."""
    if not rig.on_gpu:
        return []
    try:
        return [_lmcache(rig)]
    except Exception as exc:
        rig.notes.append(f"LMCache: {type(exc).__name__}: {exc}")
        return []


def _lmcache(rig: Rig) -> Row:
    """LMCache's kernel, a call for each chunk of 256 tokens, as its connector makes them."""
    import torch
    from lmcache import cuda_ops, lmcache_native

    chunk_bytes = 2 * LAYERS * LMCACHE_CHUNK_TOKENS * TOKEN_BYTES
    chunks = max(1, rig.total_bytes // chunk_bytes)
    tokens = chunks * LMCACHE_CHUNK_TOKENS
    width = TOKEN_BYTES // 2
    host = torch.empty(
        (chunks, 2, LAYERS, LMCACHE_CHUNK_TOKENS, width), dtype=torch.bfloat16, pin_memory=True
    )
    host.view(torch.int16).random_(-100, 100)
    pages = tokens // PAGE_TOKENS
    cache = [
        torch.zeros((2, pages, PAGE_TOKENS, 8, width // 8), dtype=torch.bfloat16, device="cuda")
        for _ in range(LAYERS)
    ]
    pointers = torch.tensor([t.data_ptr() for t in cache], dtype=torch.int64, device="cuda")
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    slots = (order[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).reshape(chunks, -1).cuda()
    device = cache[0].device

    def load() -> None:
        for number in range(chunks):
            cuda_ops.multi_layer_kv_transfer(
                host[number],
                pointers,
                slots[number],
                device,
                tokens,
                lmcache_native.TransferDirection.H2D,
                lmcache_native.EngineKVFormat.NL_X_TWO_NB_BS_NH_HS,
                block_size=PAGE_TOKENS,
                head_size=width // 8,
            )
        torch.cuda.synchronize()

    taken = rig.rounds_of(load, chunks * chunk_bytes, rig.pinned_limit())
    wanted = host[-1, 1, -1, -PAGE_TOKENS:]
    found = cache[-1][1, int(order[-1])].reshape(PAGE_TOKENS, width).cpu()
    if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
        raise RuntimeError("it copies something else than was meant")
    path = "LMCache, multi_layer_kv_transfer"
    return make_row(path, PAGE_TOKENS * TOKEN_BYTES, LINK, taken)


__all__ = ["devices", "others"]
