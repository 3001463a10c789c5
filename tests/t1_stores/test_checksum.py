"""CRC32C: the documented one, however it is computed."""

from __future__ import annotations

import os
import sys
import threading
import time

import crc32c as portable
import pytest
from awscrt.checksums import crc32c as folding

from kvfs_datapath.checksum import crc32c, crc32c_held


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


@pytest.mark.parametrize("size", [0, 1, 4096, 32 << 10, (32 << 10) + 1, 64 << 10, 100_000])
def test_with_the_lock_held_it_is_the_same(size: int) -> None:
    data = memoryview(os.urandom(size))
    assert crc32c_held(data) == crc32c(data)
    assert crc32c_held(data, 12345) == crc32c(data, 12345)


def test_with_the_lock_held_nobody_else_runs() -> None:
    """But for one that has waited for the lock for the switch interval."""
    data = memoryview(os.urandom(64 << 10))
    runs = 0
    stop = False

    def count() -> None:
        nonlocal runs
        while not stop:
            runs += 1
            time.sleep(0)  # gives the lock back

    thread = threading.Thread(target=count)
    before = sys.getswitchinterval()
    thread.start()
    try:
        sys.setswitchinterval(60.0)
        time.sleep(0)
        seen = runs
        for _ in range(2000):
            crc32c_held(data)
        assert runs == seen
    finally:
        stop = True
        sys.setswitchinterval(before)
        thread.join()
