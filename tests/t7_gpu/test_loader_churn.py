"""10,000 random loads, stores and cancels on a CUDA device: poisoned pages, poisoned memory behind
every lease that was given back."""

from __future__ import annotations

import numpy as np
import pytest

from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from loader_fakes import FREED, MemoryNamespace

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
try:
    if not cupy.cuda.runtime.getDeviceCount():
        pytest.skip("no CUDA device", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA driver", allow_module_level=True)

LAYERS, PAGES, PAGE_BYTES = 3, 64, 8192
BLOCK_BYTES = LAYERS * 2 * PAGE_BYTES
POISON = 0xA5
OPERATIONS = 10_000
AT_ONCE = 8


def test_random_loads_stores_and_cancels() -> None:
    """Eight operations at a time on disjoint pages; each page then holds its block whole, or the
    poison where the load says that it does not (or was cancelled)."""
    assert FREED != POISON
    rng = np.random.default_rng(7)
    namespace = MemoryNamespace(3 * PAGES * BLOCK_BYTES)
    blocks = rng.integers(0, 256, (PAGES, BLOCK_BYTES), dtype=np.uint8)
    keys = [number.to_bytes(32, "little") for number in range(PAGES)]
    namespace.put(keys, [block.tobytes() for block in blocks])
    expected = dict(zip(keys, blocks, strict=True))
    cache = [cupy.full((2, PAGES, PAGE_BYTES), POISON, dtype=cupy.uint8) for _ in range(LAYERS)]
    layout = PagedLayout.vllm(cache)
    stored = cancelled = hits = 0
    with Loader.open(namespace, "cuda", ring_bytes=4 << 20) as loader:
        for step in range(OPERATIONS // AT_ONCE):
            pages = rng.permutation(PAGES).reshape(AT_ONCE, -1)
            for tensor in cache:
                tensor.fill(POISON)
                for some in pages[3::4]:  # what will be stored
                    fresh = rng.integers(0, 256, (2, len(some), PAGE_BYTES), dtype=np.uint8)
                    tensor[:, some] = cupy.asarray(fresh)
            cupy.cuda.Device().synchronize()
            jobs = []
            for place, some in enumerate(pages):
                table = Pages(layout, some[:, None].astype(np.int32))
                if place % 4 == 3:
                    first = (step * AT_ONCE + place + AT_ONCE) * PAGES  # nobody else's
                    names = [(first + i).to_bytes(32, "big") for i in range(len(some))]
                    job = loader.store(names, table)
                else:
                    names = [list(expected)[i] for i in rng.integers(0, len(expected), len(some))]
                    # Half of them are brought by other threads, and can be cancelled meanwhile.
                    namespace.answers_soon = bool(rng.integers(0, 2))
                    job = loader.load(names, table)
                jobs.append((names, some, job))
            for _, _, job in jobs:
                if rng.random() < 0.3:
                    job.cancel()
            for _, _, job in jobs:
                job.wait()
            found = np.stack([tensor.get() for tensor in cache])
            for place, (names, some, job) in enumerate(jobs):
                here = [found[:, :, page].ravel() for page in some]
                if place % 4 == 3:
                    for name, data in zip(names, here, strict=True):
                        if name in namespace.stored:
                            assert namespace.stored[name] == data.tobytes()
                            stored += 1
                    continue
                cancelled += job.cancelled
                for name, data, hit in zip(names, here, job.result(), strict=True):
                    hits += hit
                    assert hit or job.cancelled
                    assert (data == (expected[name] if hit else POISON)).all()
            for names, _, _ in jobs[3::4]:
                for name in names:
                    namespace.stored.pop(name, None)
        statistics = loader.statistics()
    assert statistics["loads"] == statistics["held_bytes"] == statistics["stores"] == 0
    assert namespace.leased_bytes == 0
    assert min(stored, cancelled, hits) > 100
    namespace.close()
