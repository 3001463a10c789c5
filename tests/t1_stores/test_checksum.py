"""CRC32C: the documented one, however it is computed."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence

import crc32c as portable
import pytest
from awscrt.checksums import crc32c as folding

from kvfs_datapath import checksum
from kvfs_datapath.checksum import crc32c, crc32c_held, have_sums


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


def _cut(memory: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    ends = list(itertools.accumulate(sizes))
    return [memory[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("sizes", [[1], [65536] * 4, [1, 4095, 70_000, 3]])
def test_sums_of_neighbours(sizes: list[int]) -> None:
    memory = memoryview(bytearray(os.urandom(sum(sizes))))
    views = _cut(memory, sizes)
    sums = [crc32c(view) for view in views]
    assert have_sums(views, sums)
    for place in range(len(memory)) if len(memory) < 9 else (0, sizes[0] - 1, len(memory) - 1):
        memory[place] ^= 1
        assert not have_sums(views, sums)
        memory[place] ^= 1
    for place in range(len(sums)):
        assert not have_sums(views, [*sums[:place], sums[place] ^ 1, *sums[place + 1 :]])
    assert have_sums(views, sums)


def test_sums_of_what_does_not_lie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memoryview(bytearray(os.urandom(400)))
    one, two, three, _ = _cut(memory, [100] * 4)
    assert have_sums([one, two, three], [crc32c(one), crc32c(two), crc32c(three)])
    for views in ([one, three], [two, one], [one, one], [one, memoryview(bytearray(two))]):
        assert not have_sums(views, [crc32c(view) for view in views])
    monkeypatch.setattr(checksum, "_combine", None)
    assert not have_sums([one, two], [crc32c(one), crc32c(two)])
