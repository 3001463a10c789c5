"""The words of /dev/fuse for statx(2) with the time of birth. See ``fuse_wire``.

The kernel (protocol 7.39) sends STATX where somebody asks for more than GETATTR tells; what it is
told counts for both.
"""

from __future__ import annotations

import struct

from kvfs.mount.frontend import BLOCK_SIZE, sectors
from kvfs.mount.fuse_wire import NANOSECONDS, Times
from kvfs_base.types import Attr

STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800

_STATX_OUT = struct.Struct("=QII16x" + "IIQIIIHxxQQQQ" + "qIxxxx" * 4 + "IIII112x")


def statx_out(attr: Attr, valid: Times) -> bytes:
    mask = STATX_BASIC_STATS | (STATX_BTIME if attr.born_ns else 0)
    times = [
        part
        for time_ns in (attr.atime_ns, attr.born_ns, attr.ctime_ns, attr.mtime_ns)
        for part in divmod(time_ns, NANOSECONDS)
    ]
    return _STATX_OUT.pack(
        *valid, 0,
        mask, BLOCK_SIZE, 0, attr.nlink, attr.uid, attr.gid, attr.mode, attr.inode, attr.size,
        sectors(attr), 0, *times, *_major_and_minor(attr.rdev), 0, 0,
    )  # fmt: skip


def _major_and_minor(rdev: int) -> tuple[int, int]:
    """Of a device, as the kernel packs it into 32 bits."""
    return rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00
