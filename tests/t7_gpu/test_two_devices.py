"""Two GPUs of one process load from one arena, which is registered once for both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from loader_fakes import MemoryNamespace

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
try:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one CUDA device", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA driver", allow_module_level=True)

from kvfs_gds.cuda import CudaDevice  # noqa: E402

LAYERS, PAGES = 3, 32


@pytest.mark.parametrize("page_bytes", [8192, 1 << 17], ids=["kernel", "engine"])
def test_two_devices_share_an_arena(page_bytes: int) -> None:
    """Different pages, other blocks, at the same time; then back into the store."""
    block_bytes = LAYERS * 2 * page_bytes
    rng = np.random.default_rng(1)
    namespace = MemoryNamespace(4 * PAGES * block_bytes)
    blocks = rng.integers(0, 256, (PAGES, block_bytes), dtype=np.uint8)
    keys = [number.to_bytes(32, "little") for number in range(PAGES)]
    namespace.put(keys, [block.tobytes() for block in blocks])
    caches: list[list[Any]] = []
    for number in range(2):
        with cupy.cuda.Device(number):
            cache = [cupy.full((2, PAGES, page_bytes), 7, cupy.uint8) for _ in range(LAYERS)]
            cupy.cuda.Device().synchronize()
        caches.append(cache)
    orders = [rng.permutation(PAGES).astype(np.int32) for _ in range(2)]
    with (
        Loader.open(namespace, CudaDevice(0), ring_bytes=PAGES * block_bytes) as first,
        Loader.open(namespace, CudaDevice(1), ring_bytes=PAGES * block_bytes) as second,
    ):
        pairs = list(zip((first, second), caches, orders, strict=True))
        pages = [Pages(PagedLayout.vllm(cache), order[:, None]) for _, cache, order in pairs]
        for _ in range(10):
            loads = [
                loader.load(keys, some) for (loader, _, _), some in zip(pairs, pages, strict=True)
            ]
            assert [all(load.result()) for load in loads] == [True, True]
        assert first.statistics()["registered_bytes"] == second.statistics()["registered_bytes"]
        for number, (loader, _, _) in enumerate(pairs):
            fresh = [(1000 * (number + 1) + n).to_bytes(32, "little") for n in range(PAGES)]
            assert loader.store(fresh, pages[number]).result() == PAGES
            assert [namespace.stored[key] for key in fresh] == [b.tobytes() for b in blocks]
    for cache, order in zip(caches, orders, strict=True):
        for layer, tensor in enumerate(cache):
            wanted = blocks.reshape(PAGES, LAYERS, 2, page_bytes)[:, layer]
            assert (tensor.get()[:, order] == wanted.transpose(1, 0, 2)).all()
    namespace.close()
