"""The words of /dev/fuse: requests parsed, answers packed. No I/O.

Layouts and numbers are those of the kernel's ``include/uapi/linux/fuse.h``, protocol 7.31 to 7.45,
in the machine's byte order. A request is one read, an answer one write. What cannot be a request of
the kernel is a ProtocolError: the kernel is trusted, but a new one may say something unknown.
"""

from __future__ import annotations

import enum
import stat
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from kvfs.mount import fuse_wire_ranges as ranges
from kvfs.mount.frontend import BLOCK_SIZE, Space, sectors
from kvfs.mount.limits import MOUNT_BACKGROUND, MOUNT_PACKED_ENTRIES_MAX
from kvfs_base.errors import ProtocolError
from kvfs_base.limits import (
    MOUNT_IO_BYTES,
    NAME_BYTES_MAX,
    PAGE_BYTES,
)
from kvfs_base.seams import Buffer
from kvfs_base.types import Attr

MAJOR = 7
MINOR = 45
"""What is written here; the kernel and we speak the smaller of both numbers."""
MINOR_MIN = 31
"""Linux 5.4. Older ones leave out fields that are counted on here."""


class Opcode(enum.IntEnum):
    """What is answered here; every other number is ENOSYS, which the kernel remembers."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    STATX = 52


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class Feature(enum.IntFlag):
    """What INIT negotiates, as far as it is used here."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    FLOCK_LOCKS = 1 << 10
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37


class OpenFlag(enum.IntFlag):
    """How the kernel treats an open file."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class SetAttrValid(enum.IntFlag):
    """Which fields of a SETATTR count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


OPEN_KILL_SUIDGID = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2

NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_DELETE = 6

IOC_BACKING_OPEN = 0x4010E501
"""``_IOW(229, 1, struct fuse_backing_map)``"""
IOC_BACKING_CLOSE = 0x4004E502
"""``_IOW(229, 2, uint32_t)``"""
BACKING_MAP = struct.Struct("=iIQ")
BACKING_ID = struct.Struct("=I")

REQUEST_HEADER = struct.Struct("=IIQQIIIHH")
HEADER_BYTES = REQUEST_HEADER.size
_unpack_header = REQUEST_HEADER.unpack_from
ANSWER_HEADER = struct.Struct("=IiQ")
WRITE_ARGUMENTS = struct.Struct("=QQIIQII")
REQUEST_BYTES_MAX = MOUNT_IO_BYTES + PAGE_BYTES
"""A write of MOUNT_IO_BYTES with its headers; the kernel asks for room of exactly this."""

NANOSECONDS = 1_000_000_000
DIRENT_ALIGN = 8


class Request(msgspec.Struct, frozen=True, gc=False):
    """One is made for each request: a named tuple takes three times as long."""

    opcode: int
    unique: int
    inode: int
    uid: int
    gid: int
    arguments: Any
    """One of the tuples below, or None where the opcode has none or is not known. A tuple of one
    where it has one: a name, a handle (RELEASE, FSYNC and those of directories), a number (FORGET:
    of look-ups, INTERRUPT: of a request), inodes (BATCH_FORGET)."""
    thread: int = 0
    """Who asks; 0 if it cannot be named here."""


class Init(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    features: int


class TwoNames(NamedTuple):
    """SYMLINK: the link's name and its target."""

    name: bytes
    other: bytes


class SetAttrs(NamedTuple):
    valid: int
    size: int
    atime_ns: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int


class MakeNode(NamedTuple):
    """MKNOD and MKDIR (which has no ``rdev``)."""

    mode: int
    rdev: int
    name: bytes


class Rename(NamedTuple):
    new_parent: int
    flags: int
    name: bytes
    new_name: bytes


class Link(NamedTuple):
    inode: int
    name: bytes


class Open(NamedTuple):
    flags: int
    kill_privileges: bool


class Create(NamedTuple):
    flags: int
    mode: int
    name: bytes


class Read(NamedTuple):
    """READ, READDIR, READDIRPLUS."""

    handle: int
    offset: int
    size: int


class Write(NamedTuple):
    handle: int
    offset: int
    data: memoryview
    """In the buffer that the request was read into: valid until the next one is."""
    kill_privileges: bool


class SetXattr(NamedTuple):
    name: bytes
    value: bytes
    flags: int


class GetXattr(NamedTuple):
    """GETXATTR, LISTXATTR (without a name). ``size`` 0 asks for the size."""

    size: int
    name: bytes


def parse(view: memoryview) -> Request:
    """One request, as it was read. Raises ProtocolError."""
    size = len(view)
    if size < HEADER_BYTES:
        raise ProtocolError(detail=f"a request of {size} bytes")
    length, opcode, unique, inode, uid, gid, thread, extensions, _ = _unpack_header(view)
    body_end = length - DIRENT_ALIGN * extensions
    if length != size or body_end < HEADER_BYTES:
        raise ProtocolError(detail=f"a request of {size} bytes that says {length}")
    parser = _PARSERS.get(opcode)
    try:
        arguments = None if parser is None else parser(view[HEADER_BYTES:body_end])
    except (struct.error, ValueError) as exc:
        raise ProtocolError(detail=f"request {opcode}: {exc}") from exc
    return Request(opcode, unique, inode, uid, gid, arguments, thread)


def unique_of(view: memoryview) -> int | None:
    """The number under which a request that ``parse`` refused is answered; None if it is not."""
    if len(view) < HEADER_BYTES:
        return None
    _, opcode, unique, *_ = REQUEST_HEADER.unpack_from(view)
    return None if opcode in UNANSWERED else unique


def _name(view: memoryview) -> bytes:
    """A string with its NUL; nothing else."""
    name, end, rest = bytes(view).partition(b"\0")
    if not (name and end) or rest:
        raise ValueError("not a name")
    return name


def _two_names(view: memoryview) -> tuple[bytes, bytes]:
    """The same twice."""
    name, end, rest = bytes(view).partition(b"\0")
    other, other_end, rest = rest.partition(b"\0")
    if not (name and end and other and other_end) or rest:
        raise ValueError("not two names")
    return name, other


_SETATTR = struct.Struct("=IIQQQqqqIIIIIIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_BATCH_FORGET = struct.Struct("=II")
_FORGET_ONE = struct.Struct("=QQ")
_U64 = struct.Struct("=Q")
_U32X2 = struct.Struct("=II")
_U32X4 = struct.Struct("=IIII")
_RENAME2 = struct.Struct("=QII")


def _parse_init(view: memoryview) -> Init:
    major, minor, max_readahead, low = _U32X4.unpack_from(view)
    high = struct.unpack_from("=I", view, 16)[0] if low & Feature.INIT_EXT else 0
    return Init(major, minor, max_readahead, low | high << 32)


def _parse_name(view: memoryview) -> tuple[bytes]:
    return (_name(view),)


def _parse_two_names(view: memoryview) -> TwoNames:
    return TwoNames(*_two_names(view))


def _parse_batch_forget(view: memoryview) -> tuple[tuple[int, ...]]:
    count, _ = _BATCH_FORGET.unpack_from(view)
    items = view[_BATCH_FORGET.size :]
    if count * _FORGET_ONE.size > len(items):
        raise ValueError(f"{count} inodes in {len(items)} bytes")
    pairs = _FORGET_ONE.iter_unpack(items[: count * _FORGET_ONE.size])
    return (tuple(inode for inode, _ in pairs),)


def _parse_setattr(view: memoryview) -> SetAttrs:
    (valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = (
        _SETATTR.unpack_from(view)
    )
    return SetAttrs(
        valid, size, atime * NANOSECONDS + atime_ns, mtime * NANOSECONDS + mtime_ns, mode, uid, gid
    )


def _parse_mknod(view: memoryview) -> MakeNode:
    mode, rdev, _, _ = _U32X4.unpack_from(view)
    return MakeNode(mode, rdev, _name(view[_U32X4.size :]))


def _parse_mkdir(view: memoryview) -> MakeNode:
    mode, _ = _U32X2.unpack_from(view)
    return MakeNode(mode, 0, _name(view[_U32X2.size :]))


def _parse_rename(view: memoryview) -> Rename:
    (parent,) = _U64.unpack_from(view)
    return Rename(parent, 0, *_two_names(view[_U64.size :]))


def _parse_rename2(view: memoryview) -> Rename:
    parent, flags, _ = _RENAME2.unpack_from(view)
    return Rename(parent, flags, *_two_names(view[_RENAME2.size :]))


def _parse_link(view: memoryview) -> Link:
    (inode,) = _U64.unpack_from(view)
    return Link(inode, _name(view[_U64.size :]))


def _parse_open(view: memoryview) -> Open:
    flags, more = _U32X2.unpack_from(view)
    return Open(flags, bool(more & OPEN_KILL_SUIDGID))


def _parse_create(view: memoryview) -> Create:
    flags, mode, _, _ = _U32X4.unpack_from(view)
    return Create(flags, mode, _name(view[_U32X4.size :]))


def _parse_read(view: memoryview) -> Read:
    handle, offset, size, *_ = WRITE_ARGUMENTS.unpack_from(view)
    if size > MOUNT_IO_BYTES:
        raise ValueError(f"{size} bytes asked for")
    return Read(handle, offset, size)


def _parse_write(view: memoryview) -> Write:
    handle, offset, size, flags, *_ = WRITE_ARGUMENTS.unpack_from(view)
    data = view[WRITE_ARGUMENTS.size :]
    if size != len(data):
        raise ValueError(f"{size} bytes to write, {len(data)} came")
    return Write(handle, offset, data, bool(flags & WRITE_KILL_SUIDGID))


def _parse_setxattr(view: memoryview) -> SetXattr:
    size, flags = _U32X2.unpack_from(view)
    name, end, value = bytes(view[_U32X2.size :]).partition(b"\0")
    if not name or not end or len(value) != size:
        raise ValueError(f"not a name and a value of {size} bytes")
    return SetXattr(name, value, flags)


def _parse_getxattr(view: memoryview) -> GetXattr:
    size, _ = _U32X2.unpack_from(view)
    return GetXattr(size, _name(view[_U32X2.size :]))


def _parse_listxattr(view: memoryview) -> GetXattr:
    size, _ = _U32X2.unpack_from(view)
    return GetXattr(size, b"")


_PARSERS: dict[int, Callable[[memoryview], Any]] = {
    Opcode.LOOKUP: _parse_name,
    Opcode.FORGET: _U64.unpack_from,
    Opcode.SETATTR: _parse_setattr,
    Opcode.SYMLINK: _parse_two_names,
    Opcode.MKNOD: _parse_mknod,
    Opcode.MKDIR: _parse_mkdir,
    Opcode.UNLINK: _parse_name,
    Opcode.RMDIR: _parse_name,
    Opcode.RENAME: _parse_rename,
    Opcode.LINK: _parse_link,
    Opcode.OPEN: _parse_open,
    Opcode.READ: _parse_read,
    Opcode.WRITE: _parse_write,
    Opcode.RELEASE: _U64.unpack_from,
    Opcode.FSYNC: _U64.unpack_from,
    Opcode.SETXATTR: _parse_setxattr,
    Opcode.GETXATTR: _parse_getxattr,
    Opcode.LISTXATTR: _parse_listxattr,
    Opcode.REMOVEXATTR: _parse_name,
    **{Opcode[name]: parser for name, parser in ranges.PARSERS.items()},
    Opcode.INIT: _parse_init,
    Opcode.OPENDIR: _parse_open,
    Opcode.READDIR: _parse_read,
    Opcode.RELEASEDIR: _U64.unpack_from,
    Opcode.FSYNCDIR: _U64.unpack_from,
    Opcode.CREATE: _parse_create,
    Opcode.INTERRUPT: _U64.unpack_from,
    Opcode.BATCH_FORGET: _parse_batch_forget,
    Opcode.READDIRPLUS: _parse_read,
    Opcode.RENAME2: _parse_rename2,
}


# --- answers


class Times(NamedTuple):
    """How long the kernel may believe something, as it wants to be told."""

    seconds: int
    nanoseconds: int

    @classmethod
    def of(cls, seconds: float) -> Times:
        return cls(*divmod(round(seconds * NANOSECONDS), NANOSECONDS))


_ATTR = "QQQqqqIIIIIIIIII"
_ATTR_OUT = struct.Struct("=QII" + _ATTR)
_ENTRY_OUT = struct.Struct("=QQQQII" + _ATTR)
_OPEN_OUT = struct.Struct("=QIi")
_WRITE_OUT = struct.Struct("=II")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_DIRENT_PLUS = struct.Struct("=QQQQII" + _ATTR + "QQII")


def _attr_fields(attr: Attr) -> tuple[int, ...]:
    atime, atime_ns = divmod(attr.atime_ns, NANOSECONDS)
    mtime, mtime_ns = divmod(attr.mtime_ns, NANOSECONDS)
    ctime, ctime_ns = divmod(attr.ctime_ns, NANOSECONDS)
    return (
        attr.inode, attr.size, sectors(attr), atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, BLOCK_SIZE, 0,
    )  # fmt: skip


def attr_out(attr: Attr, valid: Times) -> bytes:
    return _ATTR_OUT.pack(*valid, 0, *_attr_fields(attr))


def entry_out(attr: Attr, entry: Times, valid: Times) -> bytes:
    return _ENTRY_OUT.pack(
        attr.inode, 0, entry.seconds, valid.seconds, entry.nanoseconds, valid.nanoseconds,
        *_attr_fields(attr),
    )  # fmt: skip


def missing_entry_out(entry: Times) -> bytes:
    """The name does not exist, and may be taken for missing so long."""
    return _ENTRY_OUT.pack(0, 0, entry.seconds, 0, entry.nanoseconds, 0, *([0] * 16))


def open_out(handle: int, flags: int, backing_id: int = 0) -> bytes:
    return _OPEN_OUT.pack(handle, flags, backing_id)


def handle_of(answer: Buffer) -> int:
    """Of an ``open_out``."""
    handle: int = _OPEN_OUT.unpack(answer)[0]
    return handle


def size_out(size: int) -> bytes:
    """WRITE: bytes taken; GETXATTR and LISTXATTR: bytes there are."""
    return _WRITE_OUT.pack(size, 0)


def statfs_out(space: Space) -> bytes:
    blocks, free, files, files_free = space
    return _STATFS_OUT.pack(
        blocks, free, free, files, files_free, PAGE_BYTES, NAME_BYTES_MAX, PAGE_BYTES, 0
    )


def _aligned(packed: bytes) -> bytes:
    return packed + bytes(-len(packed) % DIRENT_ALIGN)


def _dirent(name: bytes, inode: int, mode: int, position: int) -> bytes:
    return _aligned(_DIRENT.pack(inode, position, len(name), mode >> 12) + name)


class PackedEntries:
    """Entries of READDIRPLUS as they were packed last, by inode: a directory that is listed again
    is mostly what it was. All of them have the same times."""

    def __init__(self, entry: Times, valid: Times) -> None:
        self._times = entry.seconds, valid.seconds, entry.nanoseconds, valid.nanoseconds
        self._kept: dict[int, tuple[Attr, int, bytes, bytes]] = {}
        """Attributes, position, name, and what they come to."""

    def pack(self, name: bytes, attr: Attr, position: int) -> bytes:
        """``position`` is that of the next entry."""
        kept = self._kept.get(attr.inode)
        if kept is not None and kept[0] is attr and kept[1] == position and kept[2] == name:
            return kept[3]
        if len(self._kept) >= MOUNT_PACKED_ENTRIES_MAX:
            self._kept.clear()
        packed = _DIRENT_PLUS.pack(
            attr.inode, 0, *self._times, *_attr_fields(attr),
            attr.inode, position, len(name), attr.mode >> 12,
        )  # fmt: skip
        packed = _aligned(packed + name)
        self._kept[attr.inode] = attr, position, name, packed
        return packed


class Listing:
    """Fills the answer of one READDIR, or READDIRPLUS with ``plus``, of ``size`` bytes at most."""

    def __init__(self, position: int, size: int, plus: PackedEntries | None) -> None:
        self.position = position
        """Where to go on: after the last entry that found room."""
        self.is_full = False
        self._parts: list[bytes] = []
        self._left = size
        self._plus = plus

    def fill(self, entries: Iterable[tuple[bytes, Attr]]) -> None:
        """With those that find room."""
        plus = self._plus
        for name, attr in entries:
            position = self.position + 1
            if plus is None:
                self._add(_dirent(name, attr.inode, attr.mode, position))
            else:
                self._add(plus.pack(name, attr, position))
            if self.is_full:
                return

    def add_dot(self, name: bytes, inode: int) -> None:
        """``.`` and ``..``, which are not looked up."""
        entry = b"" if self._plus is None else bytes(_ENTRY_OUT.size)
        self._add(entry + _dirent(name, inode, stat.S_IFDIR, self.position + 1))

    def _add(self, packed: bytes) -> None:
        if len(packed) > self._left:
            self.is_full = True
            return
        self._left -= len(packed)
        self.position += 1
        self._parts.append(packed)

    def answer(self) -> bytes:
        return b"".join(self._parts)


def init_out(init: Init, features: int, max_readahead: int) -> bytes:
    return _INIT_OUT.pack(
        MAJOR,
        min(MINOR, init.minor),
        max_readahead,
        features & 0xFFFF_FFFF,
        MOUNT_BACKGROUND,
        MOUNT_BACKGROUND * 3 // 4,  # from here on the kernel calls us congested
        MOUNT_IO_BYTES,
        1,  # nanosecond times
        MOUNT_IO_BYTES // PAGE_BYTES,
        0,
        features >> 32,
        1 if features & Feature.PASSTHROUGH else 0,  # backing files lie on plain file systems
        0,  # no time limit for requests
    )


# --- what the kernel is told unasked


def _notice(code: int, body: bytes) -> bytes:
    return ANSWER_HEADER.pack(ANSWER_HEADER.size + len(body), code, 0) + body


def inval_attributes(inode: int) -> bytes:
    """Sizes, times and modes are to be asked for again; pages stay."""
    return _notice(NOTIFY_INVAL_INODE, struct.pack("=Qqq", inode, -1, 0))


def inval_inode(inode: int) -> bytes:
    """The same, and all pages go: whoever sends it waits for those that are being read."""
    return _notice(NOTIFY_INVAL_INODE, struct.pack("=Qqq", inode, 0, 0))


def inval_entry(parent: int, name: bytes) -> bytes:
    """A name is to be looked up again. Waits for changes of the directory that are under way."""
    return _notice(NOTIFY_INVAL_ENTRY, struct.pack("=QII", parent, len(name), 0) + name + b"\0")


def delete(parent: int, inode: int, name: bytes) -> bytes:
    """A name is gone, as by unlink: watchers are told. Waits as ``inval_entry`` does."""
    body = struct.pack("=QQII", parent, inode, len(name), 0) + name + b"\0"
    return _notice(NOTIFY_DELETE, body)
