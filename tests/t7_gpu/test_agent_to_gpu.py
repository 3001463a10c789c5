"""From a put to paged KV on a CUDA device: real services, the agent's sealed arena, one copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfs
from api_cluster import ApiCluster
from kvfs_gds.paged import HostMemory, PagedLayout, Transfer

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
try:
    if not cupy.cuda.runtime.getDeviceCount():
        pytest.skip("no CUDA device", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA driver", allow_module_level=True)

from kvfs_gds.cuda import CudaCopier, Registration  # noqa: E402

LAYERS, PAGES, PAGE_BYTES = 4, 64, 16384
BLOCK_BYTES = LAYERS * 2 * PAGE_BYTES
MIB = 1 << 20


def arena_memory(blocks: kvfs.Blocks, size: int) -> HostMemory:
    return HostMemory(blocks.arena.address, size, read_only=True, owner=blocks.arena)


@pytest.mark.parametrize("arena_bytes", [64 * MIB, 4 * MIB], ids=["warm", "cold"])
def test_blocks_reach_their_pages(tmp_path: Path, arena_bytes: int) -> None:
    """``cold``: the arena is smaller than what is stored, so blocks come from disk."""
    rng = np.random.default_rng(1)
    stored = [rng.integers(0, 256, BLOCK_BYTES, dtype=np.uint8) for _ in range(PAGES)]
    keys = kvfs.block_keys(range(PAGES), 1)
    cache = [cupy.full((2, PAGES, PAGE_BYTES), 0xA5, dtype=cupy.uint8) for _ in range(LAYERS)]
    layout = PagedLayout.vllm(cache)
    copier = CudaCopier()
    stream = cupy.cuda.Stream(non_blocking=True)
    cluster = ApiCluster(str(tmp_path), arena_bytes=arena_bytes)
    registration: Any = None
    try:
        with cluster.connect() as client:
            ns = client.namespace("t/m", kvfs.KVLayout(block_tokens=1), create=True)
            ns.put(keys, stored)
            pages = rng.permutation(PAGES).astype(np.int32)
            for first in range(0, PAGES, 16):
                with ns.get(keys[first : first + 16]) as blocks:
                    assert blocks.hits == 16
                    if registration is None:
                        registration = Registration(arena_memory(blocks, arena_bytes))
                    extents = [extent for extent in blocks.extents if extent is not None]
                    offsets = np.array([offset for offset, _ in extents], dtype=np.int64)
                    table = pages[first : first + 16].reshape(-1, 1)
                    transfer = Transfer(registration.memory, offsets, layout, table)
                    copier.copy(transfer, copier.plan(transfer, stream), 0, LAYERS, stream)
                    stream.synchronize()  # the lease must outlive the copy
            loaded = client.statistics()["blocks_loaded"]
            assert loaded == 0 if arena_bytes > PAGES * BLOCK_BYTES else loaded > 0
            registration.close()
    finally:
        cluster.stop()
    for layer, tensor in enumerate(cache):
        found = tensor.get()
        for block, page in zip(stored, pages, strict=True):
            parts = block.reshape(LAYERS, 2, PAGE_BYTES)
            assert (found[:, page] == parts[layer]).all()
