"""What the kernel holds of files in memory, and in how large pieces.

A file that is read at once, or asked for with ``posix_fadvise``, gets pages of 4 KiB; only readers
that go through it slowly see larger ones (folios). What touches each page costs more then: to bring
2 MiB takes 2.2 ms instead of 0.6, to send and receive them over TCP 1.1 ms of CPU instead of 0.65.
The kernel reads what is mapped, and advised to be so, in pieces of 2 MiB; kernels and file systems
that have no large ones take small ones there, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from kvfs_base.limits import KIB, MIB, PAGE_BYTES

LARGE_FROM_BYTES = 256 * KIB
"""From here on it is cheaper to look whether bytes are in memory than to ask for them, and to wait
for large pages than to have small ones come in the background."""
LARGE_PAGE_BYTES = 2 * MIB
_HUGEPAGE, _POPULATE_READ = 14, 22
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


def will_need(descriptor: int, offset: int, length: int) -> None:
    """Somebody is about to read these bytes, all of them. Waits for the disk where they are many
    and not in memory. A hint: nothing is raised."""
    # The kernel looks for every page: 23 us for 2 MiB that are all in memory. A byte at the end
    # tells in 1 us; what this takes for cached and is not will only be read later.
    if length >= LARGE_FROM_BYTES and (
        _is_cached(descriptor, offset + length - 1) or _populate(descriptor, offset, length)
    ):
        return
    try:
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass


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
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, start)
    if address == _MAP_FAILED:
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
