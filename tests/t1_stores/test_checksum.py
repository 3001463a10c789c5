"""CRC32C: the documented one, however it is computed."""

from __future__ import annotations

import os

import crc32c as portable
import pytest
from awscrt.checksums import crc32c as folding

from kvfs_datapath.checksum import crc32c


def test_the_check_value_of_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


@pytest.mark.parametrize("size", [1, 63, 1000, 4096, 5119, 32 << 10, (1 << 20) + 7])
def test_ways_to_compute_it_agree(size: int) -> None:
    data = memoryview(bytearray(os.urandom(size + 16)))
    for start in (0, 1, 7):  # aligned or not
        piece = data[start : start + size]
        assert crc32c(piece) == portable.crc32c(piece) == folding(piece)


def test_a_sum_goes_on() -> None:
    data = os.urandom(100_000)
    assert crc32c(data[70_000:], crc32c(data[:70_000])) == crc32c(data)
