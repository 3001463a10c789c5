"""From paged KV on a CUDA device to the node agent and back: real services, the agent's sealed
arena, and the loader on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfs
from api_cluster import ApiCluster
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
try:
    if not cupy.cuda.runtime.getDeviceCount():
        pytest.skip("no CUDA device", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA driver", allow_module_level=True)

LAYERS, PAGES, PAGE_BYTES = 4, 64, 16384
BLOCK_BYTES = LAYERS * 2 * PAGE_BYTES
MIB = 1 << 20


def pages(layout: PagedLayout, table: Any) -> Pages:
    return Pages(layout, np.asarray(table, dtype=np.int32).reshape(-1, 1))


@pytest.mark.parametrize("arena_bytes", [64 * MIB, 4 * MIB], ids=["warm", "cold"])
def test_blocks_are_stored_and_reach_their_pages(tmp_path: Path, arena_bytes: int) -> None:
    """``cold``: the arena is smaller than what is stored, so blocks come from disk."""
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 256, (LAYERS, 2, PAGES, PAGE_BYTES), dtype=np.uint8)
    source = [cupy.asarray(layer) for layer in stored]
    cache = [cupy.full((2, PAGES, PAGE_BYTES), 0xA5, dtype=cupy.uint8) for _ in range(LAYERS)]
    keys = kvfs.block_keys(range(PAGES), 1)
    order = rng.permutation(PAGES)
    compute = cupy.cuda.Stream(non_blocking=True)
    cluster = ApiCluster(str(tmp_path), arena_bytes=arena_bytes)
    try:
        with cluster.connect() as client:
            ns = client.namespace("t/m", kvfs.KVLayout(block_tokens=1), create=True)
            with Loader.open(ns) as loader:
                assert loader.device.name == "cuda:0"
                store = loader.store(keys, pages(PagedLayout.vllm(source), range(PAGES)))
                assert store.result() == PAGES
                load = loader.load(keys, pages(PagedLayout.vllm(cache), order))
                for layer in range(LAYERS):
                    load.wait_layer(layer, compute)
                assert load.result() == [True] * PAGES
                compute.synchronize()
            loaded = client.statistics()["blocks_loaded"]
            assert loaded == 0 if arena_bytes > 2 * PAGES * BLOCK_BYTES else loaded > 0
    finally:
        cluster.stop()
    for layer, tensor in enumerate(cache):
        assert (tensor.get()[:, order] == stored[layer]).all()
