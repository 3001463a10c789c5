"""File locks that belong to an open file (fcntl(2), "open file description locks").

Unlike flock(2) they can be asked about without being taken, so a `kvfs status` never makes a
`kvfs up` at the same moment fail. A lock lasts until the last duplicate of its descriptor is closed
in any process: a killed process needs no clean-up.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

# struct flock: l_type, l_whence, l_start, l_len (0: to the end), l_pid (must be 0)
_FLOCK = struct.Struct("@hhqqi")


def acquire(descriptor: int) -> bool:
    """Takes the lock; False if somebody else has it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_held(descriptor: int) -> bool:
    """Whether somebody else has it."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK


def holders(path: str | os.PathLike[str]) -> list[int]:
    """Processes, other than this one, that have the file at ``path`` open."""
    wanted = os.path.realpath(path)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            links = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue  # gone meanwhile, or not ours
        if wanted in links:
            found.append(int(entry.name))
    return found
