"""Blocks from files by cuFile (kvikio, or its compatibility mode), and checksums of a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kvfs_datapath.checksum import crc32c
from kvfs_gds.direct import DirectSource, file_source
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from kvfs_gds.sources import FileExtent

cupy = pytest.importorskip("cupy")
pytest.importorskip("kvikio")
pytestmark = pytest.mark.gpu
try:
    if not cupy.cuda.runtime.getDeviceCount():
        pytest.skip("no CUDA device", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA driver", allow_module_level=True)

from kvfs_gds.cuda import CudaDevice  # noqa: E402
from kvfs_gds.cufile import DeviceChecksums  # noqa: E402

PAGE, BLOCKS, BLOCK_BYTES = 4096, 24, 64 * 4096
LAYERS = 4


@pytest.mark.parametrize("size", [1, 7, 8, 1023, 1024, 1025, 5 * 1024 + 24, 1 << 20])
def test_checksums_are_those_of_the_cpu(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, (5, size + PAGE), dtype=np.uint8)
    there = cupy.asarray(data.ravel()[: (data.size // 8) * 8])
    step = (size + 7) // 8 * 8
    offsets = [step * number for number in range(3)]
    flat = data.ravel()
    wanted = [crc32c(flat[at : at + size].tobytes()) for at in offsets]
    assert DeviceChecksums(0).of(int(there.data.ptr), offsets, size) == wanted


@pytest.mark.parametrize("setting", ["on", "auto"])
def test_blocks_reach_their_pages(tmp_path: Path, setting: str) -> None:
    """One block is damaged, one lies behind the end of the file: both are misses."""
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    path = tmp_path / "blocks.bin"
    path.write_bytes(blocks.tobytes())
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    keys = [number.to_bytes(32, "little") for number in range(BLOCKS)]
    extents = {
        key: FileExtent(fd, n * BLOCK_BYTES, BLOCK_BYTES, crc32c(blocks[n].tobytes()))
        for n, key in enumerate(keys)
    }
    extents[keys[5]] = FileExtent(fd, 5 * BLOCK_BYTES, BLOCK_BYTES, 1)
    extents[keys[6]] = FileExtent(fd, 1 << 30, BLOCK_BYTES)
    piece = BLOCK_BYTES // LAYERS // 2
    cache = [cupy.full((2, BLOCKS, piece), 0xA5, dtype=cupy.uint8) for _ in range(LAYERS)]
    order = rng.permutation(BLOCKS).astype(np.int32)
    device = CudaDevice()
    source = file_source(
        lambda names: [extents[name] for name in names],
        device=device,
        ring_bytes=16 * BLOCK_BYTES,
        setting=setting,
        sample=keys[:4],
    )
    assert setting == "auto" or isinstance(source, DirectSource)
    try:
        with Loader(source, device=device) as loader:
            hits = loader.load(keys, Pages(PagedLayout.vllm(cache), order[:, None])).result()
    finally:
        source.close()
        os.close(fd)
    assert [n for n, hit in enumerate(hits) if not hit] == [5, 6]
    for layer, tensor in enumerate(cache):
        found = tensor.get()
        for number in range(BLOCKS):
            wanted = blocks[number].reshape(LAYERS, 2, piece)[layer]
            if hits[number]:
                assert (found[:, order[number]] == wanted).all()
            else:
                assert (found[:, order[number]] == 0xA5).all()
