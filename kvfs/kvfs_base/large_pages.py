"""Memory in pages of 2 MiB, where the kernel has them: files in the page cache, buffers, arenas.

What goes over memory page by page costs more than what it does there: with 2 MiB in small pages
(4 KiB) a read from disk with O_DIRECT takes five times the CPU and goes in small requests, a copy
1.7 times as long, to send and receive it over TCP 1.7 times the CPU. Nothing here needs privileges
or settings of the system, and where there are no large pages everything works in small ones.

- *Files*: one that is read by one call, or asked for with ``posix_fadvise``, comes in small pages.
  What is mapped and advised to be so, the kernel reads in large ones.
- *Memory* is of memfds: by default, ``shmem_enabled`` being ``never``, the kernel gives small pages
  to who touches it, and makes large ones of them when told to (MADV_COLLAPSE, Linux 6.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref

from kvfs_base.limits import KIB, MIB, PAGE_BYTES

LARGE_PAGE_BYTES = 2 * MIB
WAITED_FOR_BYTES = 256 * KIB
"""From here on it is cheaper to look whether bytes of a file are in memory than to ask for them,
and to wait for large pages than to have small ones come in the background."""

PAUSE_MAX = 1024
"""Calls between two attempts, where there is no large page to be had."""

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_HUGEPAGE, _POPULATE_READ, _COLLAPSE = 14, 22, 25
_CACHESTAT = 451

_libc = ctypes.CDLL(None, use_errno=True)  # mmap.mmap keeps the GIL while it waits for the disk
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def _map(*arguments: int | None) -> int:
    """As mmap(2). Raises OSError."""
    found = _libc.mmap(*arguments)
    if found == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)


# --- files


def will_need(descriptor: int, offset: int, length: int) -> None:
    """Somebody is about to read these bytes, all of them. Waits for the disk where they are many
    and not in memory. A hint: nothing is raised."""
    # The kernel looks for every page: 23 us for 2 MiB that are all in memory. A byte at the end
    # tells in 1 us; what this takes for cached and is not will only be read later.
    if length >= WAITED_FOR_BYTES and (
        _is_cached(descriptor, offset + length - 1) or _populate(descriptor, offset, length)
    ):
        return
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def _is_cached(descriptor: int, offset: int) -> bool:
    """False also where the kernel (before 6.5) cannot tell. To read with RWF_NOWAIT would tell, and
    have a small page brought that is in the way of large ones."""
    where, found = (ctypes.c_uint64 * 2)(offset, 1), (ctypes.c_uint64 * 5)()
    return not _libc.syscall(_CACHESTAT, descriptor, where, found, 0) and found[0] == 1


def _populate(descriptor: int, offset: int, length: int) -> bool:
    """False where it cannot be done. Nothing is touched by this process: bytes that the disk cannot
    read are an error of the call, no SIGBUS."""
    start = offset - offset % LARGE_PAGE_BYTES
    size = offset + length - start
    try:
        address = _map(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, start)
    except OSError:
        return False
    try:
        if _libc.madvise(address, size, _HUGEPAGE):
            return False
        return not any(
            _libc.madvise(address + at, PAGE_BYTES, _POPULATE_READ)
            for at in range(0, size, LARGE_PAGE_BYTES)
        )
    finally:
        _libc.munmap(address, size)


# --- memory


def buffer(size: int) -> memoryview:
    """Zeros, in large pages from the start. Raises OSError."""
    memory = SharedMapping.create(size)
    memory.make_large(0, size)
    return memory.view


def make_large(address: int, size: int) -> None:
    """As ``SharedMapping.make_large``, of any memory, also that of a mapping that is read-only:
    before it is pinned, and its small pages stay where they are."""
    end = (address + size) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
    for at in range(-(-address // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES, end, LARGE_PAGE_BYTES):
        _collapse(at)


class SharedMapping:
    """A memfd in this process's memory, where large pages fit: at a multiple of their size. It is
    unmapped when nobody refers to ``view``, or to what was made from it, any more."""

    def __init__(self, descriptor: int, size: int, *, writable: bool) -> None:
        """The descriptor stays the caller's. Raises OSError."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.address = _map_aligned(descriptor, size, protection)
        memory = (ctypes.c_ubyte * size).from_address(self.address)
        # Not when the interpreter ends: other threads may still be at it.
        weakref.finalize(memory, _libc.munmap, self.address, size).atexit = False
        view = memoryview(memory).cast("B")
        self.view = view if writable else view.toreadonly()
        self._small = bytearray(b"\1" * (size // LARGE_PAGE_BYTES))
        """Of each large page whether it is still to be asked for."""
        self._failures = 0
        """In a row."""
        self._pause = 0
        """Calls that ask for none."""

    @classmethod
    def create(cls, size: int) -> SharedMapping:
        """Zeros, of this process and those that it forks: of private memory a fork makes a copy,
        which may be what a disk or a device goes on to fill. Raises OSError."""
        descriptor = os.memfd_create("kvfs-memory", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            return cls(descriptor, size, writable=True)
        finally:
            os.close(descriptor)

    def make_large(self, offset: int, length: int) -> None:
        """These bytes are about to be used, for the first time or again: they lie in large pages
        afterwards, if there are some to be had. What they contain stays; others may be using them.
        A large page that is new takes some 0.3 ms, one that was asked for before nothing. Where
        memory is in pieces the kernel looks for a large page for longer, and in vain: it is asked
        seldom then, and so is one that has none."""
        first, end = offset // LARGE_PAGE_BYTES, -(-(offset + length) // LARGE_PAGE_BYTES)
        while (first := self._small.find(1, first, end)) >= 0:
            if self._pause:
                self._pause -= 1
                return
            if not _collapse(self.address + first * LARGE_PAGE_BYTES):
                self._failures += 1
                self._pause = min(1 << self._failures, PAUSE_MAX)
                return
            self._failures = 0
            self._small[first] = 0


def _map_aligned(descriptor: int, size: int, protection: int) -> int:
    room = size + LARGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    start = _map(None, room, 0, flags, -1, 0)
    address = -(-start // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
    try:
        _map(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    except OSError:
        _libc.munmap(start, room)
        raise
    end = -(-(address + size) // PAGE_BYTES) * PAGE_BYTES
    for low, high in ((start, address), (end, start + room)):
        if low < high:
            _libc.munmap(low, high - low)
    return address


def _collapse(address: int) -> bool:
    """Whether there was a large page to be had. The error does not tell a kernel that cannot from
    another thread that was at the same page."""
    # Something must be there. A byte that is read is there, if only as a zero.
    return not (
        _libc.madvise(address, PAGE_BYTES, _POPULATE_READ)
        or _libc.madvise(address, LARGE_PAGE_BYTES, _COLLAPSE)
    )
