"""The arena: one writer, readers that cannot write however they try, views that outlive it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import PAGE_BYTES
from kvfs_gds.arena import Arena, ArenaView, SharedMemory, address_of, copy

SIZE = 4 * PAGE_BYTES


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(SIZE) as arena:
        yield arena


def test_a_reader_sees_what_the_owner_writes(arena: Arena) -> None:
    with ArenaView.open(os.dup(arena.fd)) as reader:
        assert reader.size_bytes == SIZE
        arena.view(PAGE_BYTES, 5)[:] = b"hello"
        view = reader.view(PAGE_BYTES, 5)
        assert bytes(view) == b"hello"
        assert view.readonly
        assert os.pread(reader.fd, 5, PAGE_BYTES) == b"hello"


WAYS_TO_WRITE: dict[str, Callable[[int], object]] = {
    "map it writable": lambda fd: mmap.mmap(fd, SIZE),
    "write": lambda fd: os.pwrite(fd, b"x", 0),
    "truncate": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 2 * SIZE),
    "punch a hole": lambda fd: _fallocate(fd, 3),
    "zero a range": lambda fd: _fallocate(fd, 16),
}


def _fallocate(fd: int, mode: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(PAGE_BYTES)):
        raise OSError(ctypes.get_errno(), "fallocate")


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
@pytest.mark.parametrize("reopened", [False, True])
def test_a_reader_cannot_write(arena: Arena, way: str, reopened: bool) -> None:
    arena.view(0, 1)[:] = b"a"
    fd = os.dup(arena.fd)
    try:
        if reopened:  # the same user may open it for writing again; the seals still hold
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            os.close(fd)
            fd = again
        with pytest.raises(OSError):
            WAYS_TO_WRITE[way](fd)
    finally:
        os.close(fd)
    assert bytes(arena.view(0, 1)) == b"a"


def test_a_reader_cannot_make_its_mapping_writable(arena: Arena) -> None:
    with ArenaView.open(os.dup(arena.fd)) as reader:
        libc = ctypes.CDLL(None, use_errno=True)
        both = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mprotect(ctypes.c_void_p(reader.address), PAGE_BYTES, both) == -1


def test_nobody_can_add_a_seal_that_stops_the_owner(arena: Arena) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_views_outlive_the_arena() -> None:
    arena = Arena.create(SIZE)
    reader = ArenaView.open(os.dup(arena.fd))
    arena.view(0, 3)[:] = b"abc"
    view = reader.view(0, 3)
    arena.close()
    reader.close()
    reader.close()
    assert bytes(view) == b"abc"


def test_a_view_is_in_bounds(arena: Arena) -> None:
    for offset, length in ((-1, 1), (0, -1), (0, SIZE + 1), (SIZE, 1)):
        with pytest.raises(InvalidRequest):
            arena.view(offset, length)
    assert len(arena.view(SIZE, 0)) == 0


@pytest.mark.parametrize("size", [0, 1, -PAGE_BYTES])
def test_an_arena_is_whole_pages(size: int) -> None:
    with pytest.raises(InvalidRequest):
        Arena.create(size)


def test_a_reader_refuses_what_could_shrink() -> None:
    for fd in (os.memfd_create("x", os.MFD_ALLOW_SEALING), os.pipe()[0]):
        with pytest.raises(InvalidRequest):
            ArenaView.open(fd)
        with pytest.raises(OSError):
            os.fstat(fd)


def test_the_address_is_where_the_bytes_are(arena: Arena) -> None:
    arena.view(0, 4)[:] = b"here"
    with ArenaView.open(os.dup(arena.fd)) as reader:
        assert ctypes.string_at(reader.address, 4) == b"here"
        assert address_of(reader.view(2, 2)) == reader.address + 2


def test_a_huge_arena_costs_nothing_until_touched() -> None:
    with Arena.create(1 << 40) as arena:
        assert os.fstat(arena.fd).st_blocks == 0
        arena.view((1 << 40) - 1, 1)[:] = b"x"
        assert os.fstat(arena.fd).st_blocks * 512 < 4 << 20


def test_shared_memory_is_written_by_both_and_resized_by_none() -> None:
    with SharedMemory.create(SIZE, "test") as one:
        with SharedMemory.open(os.dup(one.fd)) as two:
            assert two.size_bytes == SIZE
            os.pwrite(two.fd, b"data", PAGE_BYTES)
            assert bytes(one.view(PAGE_BYTES, 4)) == b"data"
            two.view(0, 1)[:] = b"x"
            assert bytes(one.view(0, 1)) == b"x"
        for size in (0, 2 * SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(one.fd, size)


def test_another_process_reads_it(arena: Arena) -> None:
    arena.view(0, 5)[:] = b"child"
    code = "import os, sys; sys.stdout.write(os.pread(int(sys.argv[1]), 5, 0).decode())"
    argv = [sys.executable, "-c", code, str(arena.fd)]
    done = subprocess.run(argv, pass_fds=[arena.fd], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"child"


def test_bytes_are_copied_without_the_lock() -> None:
    """Also from memory that is read-only, and not more than there is room for."""
    with SharedMemory.create(4 * PAGE_BYTES, "kvfs-test") as memory:
        data = bytes(range(256)) * 16
        copy(memory.view_to_fill(100, len(data)), memoryview(data))
        assert memory.view(0, 100 + len(data)) == bytes(100) + data
        with pytest.raises(InvalidRequest):
            copy(memory.view(0, 10), memoryview(bytes(11)))
        with pytest.raises(BufferError):
            copy(memory.view(0, 8), memoryview(bytes(16))[::2])
        assert memory.view(0, 100 + len(data)) == bytes(100) + data
        with pytest.raises(InvalidRequest):
            copy(memory.view(0, 10).toreadonly(), memoryview(bytes(10)))
        copy(memory.view(0, 0), memoryview(b""))
