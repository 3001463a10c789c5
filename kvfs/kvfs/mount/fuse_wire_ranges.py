"""The words of /dev/fuse for ranges of a file: locks, allocation, holes. See ``fuse_wire``."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from fcntl import F_RDLCK, F_UNLCK, F_WRLCK
from typing import NamedTuple

from kvfs.mount.file_locks import RANGE_END
from kvfs_metadata.messages import FileLock

LOCK_FLOCK = 1 << 0

_FLUSH = struct.Struct("=QQ8s")
_LOCK = struct.Struct("=Q8sQQIIII")
_ALLOCATE = struct.Struct("=QQQII")
_SEEK = struct.Struct("=QQII")
_SEEK_OUT = struct.Struct("=Q")
_LOCK_OUT = struct.Struct("=QQII")


class Flush(NamedTuple):
    handle: int
    owner: bytes
    """Of the locks of the process that closes."""


class SetLock(NamedTuple):
    """GETLK, SETLK, SETLKW."""

    handle: int
    type: int
    """F_RDLCK, F_WRLCK or F_UNLCK."""
    lock: FileLock


class Allocate(NamedTuple):
    handle: int
    offset: int
    length: int
    mode: int


class Seek(NamedTuple):
    handle: int
    offset: int
    whence: int
    """SEEK_DATA or SEEK_HOLE: the others do not come here."""


def parse_allocate(view: memoryview) -> Allocate:
    handle, offset, length, mode, _ = _ALLOCATE.unpack_from(view)
    return Allocate(handle, offset, length, mode)


def parse_seek(view: memoryview) -> Seek:
    handle, offset, whence, _ = _SEEK.unpack_from(view)
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise ValueError(f"whence {whence}")
    return Seek(handle, offset, whence)


def seek_out(offset: int) -> bytes:
    return _SEEK_OUT.pack(offset)


def parse_flush(view: memoryview) -> Flush:
    handle, _, owner = _FLUSH.unpack_from(view)
    return Flush(handle, owner)


def parse_lock(view: memoryview) -> SetLock:
    handle, owner, start, end, kind, pid, flags, _ = _LOCK.unpack_from(view)
    if not 0 <= start <= end <= RANGE_END or kind not in (F_RDLCK, F_WRLCK, F_UNLCK):
        raise ValueError(f"a lock of type {kind} from {start} to {end}")
    flock = bool(flags & LOCK_FLOCK)
    return SetLock(handle, kind, FileLock(start, end, kind == F_WRLCK, owner, flock, pid))


def lock_out(found: FileLock | None) -> bytes:
    """What is in the way of a lock."""
    if found is None:
        return _LOCK_OUT.pack(0, 0, F_UNLCK, 0)
    kind = F_WRLCK if found.exclusive else F_RDLCK
    return _LOCK_OUT.pack(found.start, found.end, kind, found.pid)


PARSERS: dict[str, Callable[[memoryview], NamedTuple]] = {
    "FLUSH": parse_flush,
    "FALLOCATE": parse_allocate,
    "LSEEK": parse_seek,
    "GETLK": parse_lock,
    "SETLK": parse_lock,
    "SETLKW": parse_lock,
}
"""By the name of the opcode."""
