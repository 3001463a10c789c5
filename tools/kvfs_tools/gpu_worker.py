"""One of several processes that load from one arena.

``python -m kvfs_tools.gpu_worker DIRECTORY DEVICE COUNT BLOCK_BYTES`` loads everything once, says
``ready``, and loads it again for each line ``go``.
"""

from __future__ import annotations

import sys

import numpy as np

import kvfs
from kvfs_base.limits import KIB
from kvfs_gds.device import open_device
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout


def main(directory: str, device_name: str, count: int, block_bytes: int) -> None:
    kind, _, number = device_name.partition(":")
    device = open_device(kind, int(number or 0))
    fragment = min(64 * KIB, block_bytes // 2)
    layers = min(32, block_bytes // (2 * fragment))
    per_block = block_bytes // (2 * layers * fragment)
    shape = (2, count * per_block, fragment)
    if device.name == "cpu":
        tensors = [np.empty(shape, dtype=np.uint8) for _ in range(layers)]
    else:
        import cupy

        cupy.cuda.Device(int(number)).use()
        tensors = [cupy.empty(shape, dtype=cupy.uint8) for _ in range(layers)]
    table = np.random.default_rng(0).permutation(count * per_block).astype(np.int32)
    pages = Pages(PagedLayout.vllm(tensors), table.reshape(count, per_block))
    keys = kvfs.block_keys(range(count), 1, salt=b"bench-gpu")
    with kvfs.connect(directory) as client:
        namespace = client.namespace("bench/gpu")
        with Loader.open(namespace, device) as loader:

            def load(word: str) -> None:
                if not all(loader.load(keys, pages).result()):
                    raise RuntimeError("a block was missing")
                print(word, flush=True)

            load("ready")
            for _ in sys.stdin:
                load("done")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
