"""What is asked for is in memory afterwards, in large pages where there are such."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvfs_base import page_cache
from kvfs_base.limits import KIB, MIB, PAGE_BYTES

SIZE = 4 * MIB + 5


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Nothing of it is in memory."""
    (tmp_path / "a").write_bytes(os.urandom(SIZE))
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_of(descriptor).any():
        pytest.skip("this file system keeps everything in memory")
    yield descriptor
    os.close(descriptor)


def pages_of(descriptor: int) -> npt.NDArray[np.bool_]:
    """Of each page whether it is in memory, and nothing is brought there by the question."""
    with mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
        count = -(-SIZE // PAGE_BYTES)
        view = np.frombuffer(mapped, dtype=np.uint8)
        found = (ctypes.c_ubyte * count)()
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(SIZE)
        assert not ctypes.CDLL(None).mincore(address, size, found)
        del view
    return np.frombuffer(found, dtype=np.uint8) & 1 == 1


def largest_page(descriptor: int, offset: int) -> int:
    """Bytes of the page that holds this byte; 0 if the kernel does not say."""
    with mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        view.sum()
        first, tail = view.ctypes.data // PAGE_BYTES, 0
        try:
            with open("/proc/self/pagemap", "rb") as table, open("/proc/kpageflags", "rb") as flags:
                table.seek(8 * (first + offset // PAGE_BYTES))
                frame = struct.unpack("<Q", table.read(8))[0] & ((1 << 55) - 1)
                if not frame:
                    return 0
                flags.seek(8 * frame)
                kinds = struct.unpack("<1025Q", flags.read(8 * 1025))
        except OSError:
            return 0
        finally:
            del view
    while kinds[tail + 1] >> 16 & 1:  # KPF_COMPOUND_TAIL
        tail += 1
    return (tail + 1) * PAGE_BYTES


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (0, 300 * KIB), (MIB + 1, 2 * MIB), (8 * KIB, 8 * KIB), (3 * MIB, MIB + 5)],
)
def test_what_is_asked_for_comes_into_memory(file: int, offset: int, length: int) -> None:
    page_cache.will_need(file, offset, length)
    os.pread(file, length, offset)  # small ones come in the background
    first, end = offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)
    assert pages_of(file)[first:end].all()


def test_many_bytes_have_come_when_it_returns(file: int) -> None:
    page_cache.will_need(file, 0, SIZE)
    assert pages_of(file).all()


def test_many_bytes_come_in_large_pages(file: int, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(SIZE))  # a large write gets them everywhere
    other = os.open(tmp_path / "b", os.O_RDONLY)
    have_large = largest_page(other, 0) > PAGE_BYTES
    os.close(other)
    if not have_large:
        pytest.skip("no large pages here, or nobody says")
    page_cache.will_need(file, 0, SIZE)
    assert largest_page(file, 0) == page_cache.LARGE_PAGE_BYTES


def test_what_is_in_memory_is_not_brought_again(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    populate = page_cache._populate

    def counted(descriptor: int, offset: int, length: int) -> bool:
        asked.append(length)
        return populate(descriptor, offset, length)

    monkeypatch.setattr(page_cache, "_populate", counted)
    for _ in range(3):
        page_cache.will_need(file, 0, SIZE)
    assert asked == [SIZE]


def test_without_large_pages_it_is_a_hint(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_populate", lambda *_: False)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, what: asked.append((at, size)))
    page_cache.will_need(file, 0, SIZE)
    assert asked == [(0, SIZE)]


@pytest.mark.parametrize("length", [8 * KIB, 8 * MIB])
def test_a_hint_raises_nothing(file: int, length: int, tmp_path: Path) -> None:
    page_cache.will_need(file, 2 * SIZE, length)
    page_cache.will_need(file, 0, 2 * SIZE)  # no SIGBUS for what is not there
    only_writes = os.open(tmp_path / "a", os.O_WRONLY)
    page_cache.will_need(only_writes, 0, length)
    os.close(only_writes)
    page_cache.will_need(only_writes, 0, length)
    assert os.fstat(file).st_size == SIZE
