"""Holes of ordinary files: bytes that read as zeros and, by whole chunks, take no room.

A chunk that is missing is a hole, and so is what lies behind the end of one that is short. Holes in
a chunk are left to the file system that it lies on: here they count as data.
"""

from __future__ import annotations

import ctypes
import errno
import os

from kvfs_base.errors import NotSupported
from kvfs_base.limits import TRANSFER_BYTES
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.client.segments import Segment, segments
from kvfs_datapath.client.transfers import disk_error

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE, _PUNCH_HOLE = 1, 2

LOOK_AHEAD = 16
"""Chunks that are asked for first: 256 MiB of a file. Each further question is about so many times
as many as the one before: seven of them look through the largest file."""


def zero(file: StripedFile, start: int, end: int, *, keep_first: bool = False) -> None:
    """The bytes ``start <= x < end`` of a file that is sparse, and recorded as such, read as zeros
    afterwards. ``keep_first``: somebody reads the first chunk by its descriptor, so it stays. Bytes
    behind what was ever written are left alone. Raises what ``write`` does."""
    size = file.chunk_bytes
    first, last = -(-start // size), end // size
    if keep_first:
        first = max(first, 1)
    if first < last:
        file.drop_chunks(first, last)
        edges = [(start, min(end, first * size)), (max(start, last * size), end)]
    else:
        edges = [(start, end)]
    for begin, stop in edges:
        for segment in segments(size, begin, max(0, stop - begin)):
            _zero_part(file, segment)


def punch(descriptor: int, start: int, end: int) -> None:
    """The same in a file of its own, as far as it reaches. Raises NotSupported."""
    if _libc.fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, end - start):
        code = ctypes.get_errno()
        if code == errno.EOPNOTSUPP:
            raise NotSupported(detail="the file system below punches no holes")
        raise disk_error(OSError(code, os.strerror(code)), 0)


def _zero_part(file: StripedFile, segment: Segment) -> None:
    """Of one chunk. Nothing is written where nothing is."""
    lengths = file.lengths(segment.number, segment.number + 1)
    count = segment.length
    if lengths is not None:
        count = min(count, lengths.get(segment.number, 0) - segment.offset)
    at = segment.number * file.chunk_bytes + segment.offset
    for done in range(0, count, TRANSFER_BYTES):
        file.write(at + done, bytes(min(TRANSFER_BYTES, count - done)))


def next_data(file: StripedFile, offset: int, size: int) -> int:
    """The first byte from ``offset`` on that is no hole; ``size`` if there is none."""
    return _seek(file, offset, size, wants_data=True)


def next_hole(file: StripedFile, offset: int, size: int) -> int:
    """The first hole from ``offset`` on; ``size`` if there is none before the end."""
    return _seek(file, offset, size, wants_data=False)


def _seek(file: StripedFile, offset: int, size: int, *, wants_data: bool) -> int:
    chunk_bytes = file.chunk_bytes
    end = -(-size // chunk_bytes)
    number, ahead = offset // chunk_bytes, LOOK_AHEAD
    while number < end:
        stop = min(end, number + ahead)
        lengths = file.lengths(number, stop)
        if lengths is None:
            return offset if wants_data else size
        # Data is only in chunks that are there, and there may be millions that are not.
        for place in sorted(lengths) if wants_data else range(number, stop):
            begin = place * chunk_bytes
            data_end = min(begin + lengths.get(place, 0), size)
            if wants_data and max(offset, begin) < data_end:
                return max(offset, begin)
            if not wants_data and data_end < min(begin + chunk_bytes, size):
                return max(offset, data_end)
        number, ahead = stop, ahead * LOOK_AHEAD
    return size
