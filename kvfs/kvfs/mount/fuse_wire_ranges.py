"""The words of /dev/fuse for ranges of a file: locks. See ``fuse_wire``."""

from __future__ import annotations

import struct
from fcntl import F_RDLCK, F_UNLCK, F_WRLCK
from typing import NamedTuple

from kvfs.mount.file_locks import RANGE_END
from kvfs_metadata.messages import FileLock

LOCK_FLOCK = 1 << 0

_FLUSH = struct.Struct("=QQ8s")
_LOCK = struct.Struct("=Q8sQQIIII")
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
