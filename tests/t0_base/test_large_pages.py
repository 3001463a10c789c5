"""What is asked for of files is in memory afterwards; large pages where there are such."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvfs_base import large_pages
from kvfs_base.large_pages import LARGE_PAGE_BYTES as LARGE
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


def page_at(address: int) -> int:
    """Bytes of the page, which must be in memory, that starts here; 0 if the kernel does not
    say."""
    try:
        with open("/proc/self/pagemap", "rb") as table, open("/proc/kpageflags", "rb") as flags:
            table.seek(address // PAGE_BYTES * 8)
            frame = struct.unpack("<Q", table.read(8))[0] & ((1 << 55) - 1)
            if not frame:
                return 0
            flags.seek(8 * frame)
            kinds = struct.unpack("<1025Q", flags.read(8 * 1025))
    except OSError:
        return 0
    tails = 0
    while kinds[tails + 1] >> 16 & 1:  # KPF_COMPOUND_TAIL
        tails += 1
    return (tails + 1) * PAGE_BYTES


def page_of(descriptor: int) -> int:
    """Of the first byte of a file."""
    with mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        view.sum()
        found = page_at(view.ctypes.data)
        del view
    return found


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (0, 300 * KIB), (MIB + 1, 2 * MIB), (8 * KIB, 8 * KIB), (3 * MIB, MIB + 5)],
)
def test_what_is_asked_for_comes_into_memory(file: int, offset: int, length: int) -> None:
    large_pages.will_need(file, offset, length)
    os.pread(file, length, offset)  # small ones come in the background
    first, end = offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)
    assert pages_of(file)[first:end].all()


def test_many_bytes_have_come_when_it_returns(file: int) -> None:
    large_pages.will_need(file, 0, SIZE)
    assert pages_of(file).all()


def test_many_bytes_come_in_large_pages(file: int, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(SIZE))  # a large write gets them everywhere
    other = os.open(tmp_path / "b", os.O_RDONLY)
    have_large = page_of(other) > PAGE_BYTES
    os.close(other)
    if not have_large:
        pytest.skip("no large pages here, or nobody says")
    large_pages.will_need(file, 0, SIZE)
    assert page_of(file) == LARGE


def test_what_is_in_memory_is_not_brought_again(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    populate = large_pages._populate

    def counted(descriptor: int, offset: int, length: int) -> bool:
        asked.append(length)
        return populate(descriptor, offset, length)

    monkeypatch.setattr(large_pages, "_populate", counted)
    for _ in range(3):
        large_pages.will_need(file, 0, SIZE)
    assert asked == [SIZE]


def test_without_large_pages_it_is_a_hint(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_populate", lambda *_: False)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, what: asked.append((at, size)))
    large_pages.will_need(file, 0, SIZE)
    assert asked == [(0, SIZE)]


@pytest.mark.parametrize("length", [8 * KIB, 8 * MIB])
def test_a_hint_raises_nothing(file: int, length: int, tmp_path: Path) -> None:
    large_pages.will_need(file, 2 * SIZE, length)
    large_pages.will_need(file, 0, 2 * SIZE)  # no SIGBUS for what is not there
    only_writes = os.open(tmp_path / "a", os.O_WRONLY)
    large_pages.will_need(only_writes, 0, length)
    os.close(only_writes)
    large_pages.will_need(only_writes, 0, length)
    assert os.fstat(file).st_size == SIZE


# --- memory


def memory_file(size: int) -> int:
    descriptor = os.memfd_create("kvfs-test", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.fixture
def shared() -> Iterator[large_pages.SharedMapping]:
    descriptor = memory_file(SIZE)
    mapping = large_pages.SharedMapping(descriptor, SIZE, writable=True)
    os.close(descriptor)
    yield mapping


def test_a_buffer_is_zeros_and_in_large_pages() -> None:
    memory = large_pages.buffer(SIZE)
    array = np.frombuffer(memory, dtype=np.uint8)
    assert len(memory) == SIZE and not memory.readonly and not array.any()
    memory[:] = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)
    found = page_at(array.ctypes.data)
    if not found or not _collapses():
        pytest.skip("no large pages here, or nobody says")
    assert found == LARGE


def test_no_fork_takes_a_buffer_away_from_who_fills_it() -> None:
    memory = large_pages.buffer(SIZE)
    child = os.fork()
    if not child:
        memory[SIZE - 1] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory[SIZE - 1] == 7


def test_shared_memory_is_made_of_large_pages_and_keeps_what_it_has(
    shared: large_pages.SharedMapping,
) -> None:
    data = os.urandom(SIZE)
    shared.view[:] = data
    shared.make_large(0, SIZE)
    assert shared.view == data
    after = page_at(shared.address)
    if not after or not _collapses():
        pytest.skip("no large pages here, or nobody says")
    assert after == LARGE


def _collapses() -> bool:
    """Linux 6.1 or newer, with large pages."""
    version = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    return version >= (6, 1) and Path("/sys/kernel/mm/transparent_hugepage").is_dir()


def test_what_nobody_touched_is_made_large_too(shared: large_pages.SharedMapping) -> None:
    shared.make_large(LARGE + 5, 10)
    assert not any(shared.view)
    if not _collapses() or not page_at(shared.address + LARGE):
        pytest.skip("no large pages here, or nobody says")
    assert page_at(shared.address + LARGE) == LARGE


def test_who_only_reads_may_ask_too() -> None:
    """And gets whole large pages of what it names."""
    descriptor = memory_file(4 * LARGE)
    writer = large_pages.SharedMapping(descriptor, 4 * LARGE, writable=True)
    reader = large_pages.SharedMapping(descriptor, 4 * LARGE, writable=False)
    os.close(descriptor)
    data = os.urandom(4 * LARGE)
    writer.view[:] = data
    large_pages.make_large(reader.address + PAGE_BYTES, 3 * LARGE)
    assert reader.view == data and writer.view == data
    if not _collapses() or not page_at(writer.address):
        pytest.skip("no large pages here, or nobody says")
    assert [page_at(writer.address + n * LARGE) == LARGE for n in (1, 2)] == [True, True]


def test_each_page_is_asked_for_once(
    shared: large_pages.SharedMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def collapse(address: int) -> bool:
        asked.append((address - shared.address) // LARGE)
        return True

    monkeypatch.setattr(large_pages, "_collapse", collapse)
    shared.make_large(LARGE - 1, 1)
    assert asked == [0]
    shared.make_large(LARGE - 1, 2)
    assert asked == [0, 1]
    shared.make_large(0, SIZE)  # what is left at the end is no whole large page
    assert asked == [0, 1]


def test_where_there_are_none_they_are_asked_for_seldom(
    shared: large_pages.SharedMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    found = False

    def collapse(address: int) -> bool:
        asked.append((address - shared.address) // LARGE)
        return found

    monkeypatch.setattr(large_pages, "_collapse", collapse)
    for _ in range(500):
        shared.make_large(0, SIZE)
    assert len(asked) == 8  # behind pauses of 2, 4, ... 256
    assert set(asked) == {0}
    for _ in range(10_000):
        shared.make_large(0, SIZE)
    assert 14 <= len(asked) <= 20  # no pause is longer than 1,024
    found = True
    for _ in range(1100):
        shared.make_large(0, SIZE)
    assert asked[-2:] == [0, 1]


@pytest.mark.parametrize("size", [1, PAGE_BYTES, LARGE, LARGE + PAGE_BYTES, SIZE])
def test_shared_memory_of_any_size(size: int) -> None:
    descriptor = memory_file(size)
    writer = large_pages.SharedMapping(descriptor, size, writable=True)
    reader = large_pages.SharedMapping(descriptor, size, writable=False)
    os.close(descriptor)
    assert writer.address % LARGE == reader.address % LARGE == 0
    assert len(writer.view) == len(reader.view) == size
    writer.make_large(0, size)
    writer.view[size - 1] = 7
    assert reader.view[size - 1] == 7
    assert reader.view.readonly


def test_memory_is_there_as_long_as_somebody_sees_it() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:kvfs-lifetime")

    descriptor = os.memfd_create("kvfs-lifetime", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    mapping = large_pages.SharedMapping(descriptor, SIZE, writable=True)
    os.close(descriptor)
    array = np.frombuffer(mapping.view[100:200], dtype=np.uint8)
    del mapping
    gc.collect()
    assert mapped() == 1
    array[0] = 1
    del array
    gc.collect()
    assert mapped() == 0


def test_memory_that_cannot_be_had_is_an_error_and_leaves_nothing() -> None:
    before = len(Path("/proc/self/maps").read_text().splitlines())
    descriptor = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(OSError):
        large_pages.SharedMapping(descriptor, SIZE, writable=True)
    os.close(descriptor)
    with pytest.raises(OSError):
        large_pages.SharedMapping(descriptor, 1 << 60, writable=True)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before + 2
