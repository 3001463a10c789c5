"""Checksums put together from those of pieces are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from kvfs_datapath.checksum import crc32c
from kvfs_gds.crc import combine, tables


@pytest.mark.parametrize("size", [1, 63, 64, 65, 640, 64 * 7 + 3, 64 * 37])
def test_pieces_make_the_whole(size: int) -> None:
    blocks = np.random.default_rng(size).integers(0, 256, (5, size), dtype=np.uint8)
    blocks[1] = 0
    pieces = np.array(
        [[crc32c(block[i : i + 64].tobytes()) for i in range(0, size, 64)] for block in blocks],
        dtype=np.uint32,
    )
    assert combine(pieces, size, 64).tolist() == [crc32c(block.tobytes()) for block in blocks]


def test_eight_bytes_at_a_time_are_one_after_the_other() -> None:
    """What the kernel of a GPU does with the tables."""
    data = np.random.default_rng(1).integers(0, 256, 64, dtype=np.uint8).tobytes()
    t, crc = tables(), 0xFFFFFFFF
    for at in range(0, 64, 8):
        low = int.from_bytes(data[at : at + 4], "little") ^ crc
        high = int.from_bytes(data[at + 4 : at + 8], "little")
        crc = 0
        for byte in range(4):
            crc ^= int(t[7 - byte][low >> 8 * byte & 0xFF])
            crc ^= int(t[3 - byte][high >> 8 * byte & 0xFF])
    assert crc ^ 0xFFFFFFFF == crc32c(data)
