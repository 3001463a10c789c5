"""Requests of the kernel, parsed; and bytes that the kernel would never send."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.mount import fuse_wire as wire
from kvfs.mount.fuse_wire import Opcode
from kvfs.mount.fuse_wire_statx import statx_out
from kvfs_base.errors import ProtocolError
from kvfs_base.limits import MOUNT_IO_BYTES
from kvfs_base.types import Attr
from kvfs_metadata.messages import FileLock


def request(opcode: int, body: bytes = b"", *, length: int | None = None, extra: int = 0) -> bytes:
    length = 40 + len(body) if length is None else length
    return struct.pack("=IIQQIIIHH", length, opcode, 7, 9, 1000, 100, 1, extra, 0) + body


def arguments(opcode: int, body: bytes) -> Any:
    found = wire.parse(memoryview(request(opcode, body)))
    assert found == wire.Request(opcode, 7, 9, 1000, 100, found.arguments, thread=1)
    return found.arguments


READ = struct.pack("=QQIIQII", 3, 4096, 100, 0, 0, 0, 0)
SETATTR = struct.pack(
    "=IIQQQqqqIIIIIIII", 0x3F, 0, 5, 77, 0, -1, 2, 3, 999_999_999, 5, 6, 0o644, 0, 8, 9, 0
)
LOCK = struct.pack("=Q8sQQIIII", 3, b"anybody!", 10, 19, 1, 77, 1, 0)
LOCKED = (3, fcntl.F_WRLCK, FileLock(10, 19, True, b"anybody!", flock=True, pid=77))

REQUESTS: dict[Opcode, tuple[bytes, Any]] = {
    Opcode.LOOKUP: (b"name\0", (b"name",)),
    Opcode.FORGET: (struct.pack("=Q", 2), (2,)),
    Opcode.GETATTR: (bytes(16), None),
    Opcode.SETATTR: (SETATTR, (0x3F, 77, -1, 2_000_000_005, 0o644, 8, 9)),
    Opcode.READLINK: (b"", None),
    Opcode.SYMLINK: (b"link\0to/that\0", (b"link", b"to/that")),
    Opcode.MKNOD: (struct.pack("=IIII", 0o10644, 3, 0, 0) + b"n\0", (0o10644, 3, b"n")),
    Opcode.MKDIR: (struct.pack("=II", 0o755, 0) + b"d\0", (0o755, 0, b"d")),
    Opcode.UNLINK: (b"n\0", (b"n",)),
    Opcode.RMDIR: (b"n\0", (b"n",)),
    Opcode.RENAME: (struct.pack("=Q", 4) + b"a\0b\0", (4, 0, b"a", b"b")),
    Opcode.LINK: (struct.pack("=Q", 4) + b"a\0", (4, b"a")),
    Opcode.OPEN: (struct.pack("=II", 2, 1), (2, True)),
    Opcode.READ: (READ, (3, 4096, 100)),
    Opcode.WRITE: (struct.pack("=QQIIQII", 3, 4096, 5, 4, 0, 0, 0) + b"bytes",
                   (3, 4096, b"bytes", True)),
    Opcode.STATFS: (b"", None),
    Opcode.RELEASE: (struct.pack("=QIIQ", 3, 0, 0, 0), (3,)),
    Opcode.FSYNC: (struct.pack("=QII", 3, 0, 0), (3,)),
    Opcode.SETXATTR: (struct.pack("=II", 3, 1) + b"user.a\0v\0w", (b"user.a", b"v\0w", 1)),
    Opcode.GETXATTR: (struct.pack("=II", 64, 0) + b"user.a\0", (64, b"user.a")),
    Opcode.LISTXATTR: (struct.pack("=II", 64, 0), (64, b"")),
    Opcode.REMOVEXATTR: (b"user.a\0", (b"user.a",)),
    Opcode.FLUSH: (struct.pack("=QIIQ", 3, 0, 0, 258), (3, b"\2\1\0\0\0\0\0\0")),
    Opcode.FALLOCATE: (struct.pack("=QQQII", 3, 10, 20, 3, 0), (3, 10, 20, 3)),
    Opcode.LSEEK: (struct.pack("=QQII", 3, 10, 4, 0), (3, 10, 4)),
    Opcode.GETLK: (LOCK, LOCKED),
    Opcode.SETLK: (LOCK, LOCKED),
    Opcode.SETLKW: (LOCK, LOCKED),
    Opcode.INIT: (struct.pack("=IIIII44x", 7, 45, 131072, 1 << 30 | 1, 1 << 5),
                  (7, 45, 131072, 1 << 37 | 1 << 30 | 1)),
    Opcode.OPENDIR: (struct.pack("=II", 0, 0), (0, False)),
    Opcode.READDIR: (READ, (3, 4096, 100)),
    Opcode.RELEASEDIR: (struct.pack("=QIIQ", 3, 0, 0, 0), (3,)),
    Opcode.FSYNCDIR: (struct.pack("=QII", 3, 0, 0), (3,)),
    Opcode.CREATE: (struct.pack("=IIII", 66, 0o644, 0, 0) + b"n\0", (66, 0o644, b"n")),
    Opcode.INTERRUPT: (struct.pack("=Q", 5), (5,)),
    Opcode.DESTROY: (b"", None),
    Opcode.BATCH_FORGET: (struct.pack("=IIQQQQ", 2, 0, 11, 1, 12, 3), ((11, 12),)),
    Opcode.READDIRPLUS: (READ, (3, 4096, 100)),
    Opcode.STATX: (struct.pack("=IIQII", 0, 0, 0, 0, 0xFFF), None),
    Opcode.RENAME2: (struct.pack("=QII", 4, 1, 0) + b"a\0b\0", (4, 1, b"a", b"b")),
}  # fmt: skip


@pytest.mark.parametrize("opcode", Opcode)
def test_every_request_is_understood(opcode: Opcode) -> None:
    body, expected = REQUESTS[opcode]
    assert arguments(opcode, body) == expected


def test_what_follows_the_arguments_is_not_taken_for_them() -> None:
    groups = request(Opcode.CREATE, REQUESTS[Opcode.CREATE][0] + bytes(16), extra=2)
    assert wire.parse(memoryview(groups)).arguments == (66, 0o644, b"n")


def test_unknown_requests_have_no_arguments() -> None:
    assert arguments(4711, b"whatever") is None


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(39),
        request(Opcode.LOOKUP, b"name\0", length=44),
        request(Opcode.LOOKUP, b"name\0", length=46),
        request(Opcode.LOOKUP, b"name\0", extra=1),
        request(Opcode.LOOKUP, b"name"),
        request(Opcode.LOOKUP, b"\0"),
        request(Opcode.LOOKUP, b"a\0b\0"),
        request(Opcode.RENAME, struct.pack("=Q", 4) + b"a\0"),
        request(Opcode.WRITE, struct.pack("=QQIIQII", 3, 0, 6, 0, 0, 0, 0) + b"bytes"),
        request(Opcode.READ, struct.pack("=QQIIQII", 3, 0, MOUNT_IO_BYTES + 1, 0, 0, 0, 0)),
        request(Opcode.BATCH_FORGET, struct.pack("=IIQQ", 2, 0, 11, 1)),
        request(Opcode.BATCH_FORGET, struct.pack("=II", 0xFFFF_FFFF, 0)),
        request(Opcode.SETLK, struct.pack("=QQQQIIII", 3, 0, 20, 19, 1, 77, 1, 0)),
        request(Opcode.SETLK, struct.pack("=QQQQIIII", 3, 0, 0, 1 << 63, 1, 77, 1, 0)),
        request(Opcode.SETLK, struct.pack("=QQQQIIII", 3, 0, 0, 19, 3, 77, 1, 0)),
        request(Opcode.SETXATTR, struct.pack("=II", 4, 0) + b"user.a\0v"),
        request(Opcode.SETXATTR, struct.pack("=II", 0, 0) + b"user.a"),
        request(Opcode.SETATTR, SETATTR[:-1]),
    ],
)
def test_what_is_no_request(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.parse(memoryview(raw))


@settings(max_examples=500, deadline=None)
@given(
    opcode=st.sampled_from([*Opcode, 4711]), body=st.binary(max_size=200), extra=st.integers(0, 9)
)
def test_any_bytes_are_a_request_or_a_protocol_error(opcode: int, body: bytes, extra: int) -> None:
    for raw in (body, request(opcode, body, extra=extra)):
        try:
            found = wire.parse(memoryview(raw))
        except ProtocolError:
            wire.unique_of(memoryview(raw))
        else:
            assert found.unique >= 0


@given(
    opcode=st.sampled_from([o for o in Opcode if REQUESTS[o][0]]),
    cut=st.integers(0, 300),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=4),
)
@settings(max_examples=500, deadline=None)
def test_damaged_requests(opcode: Opcode, cut: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(request(opcode, REQUESTS[opcode][0]))
    for place, bits in flips:
        raw[place % len(raw)] ^= bits
    view = memoryview(bytes(raw))
    for damaged in (view, view[: cut % len(view)]):
        try:
            wire.parse(damaged)
        except ProtocolError:
            pass


def test_answers_have_the_sizes_of_the_kernels_structures() -> None:
    attr, times = Attr(5, 0o100644, mtime_ns=-1), wire.Times.of(1.5)
    assert len(wire.attr_out(attr, times)) == 104
    assert len(wire.entry_out(attr, times, times)) == 128
    assert len(statx_out(attr, times)) == 288
    assert len(wire.missing_entry_out(times)) == 128
    assert len(wire.open_out(1, 2, 3)) == 16
    assert len(wire.size_out(1)) == 8
    init = wire.Init(7, 38, 131072, 0)
    assert len(wire.init_out(init, 0, 131072)) == 64
    assert struct.unpack_from("=II", wire.init_out(init, 0, 131072)) == (7, 38)
    assert wire.Times.of(1.5) == (1, 500_000_000)
    assert wire.handle_of(wire.open_out(77, 0)) == 77


@pytest.mark.parametrize(("born_ns", "mask"), [(0, 0x7FF), (5_000_000_007, 0xFFF)])
def test_a_time_of_birth_that_nobody_knows_is_not_told(born_ns: int, mask: int) -> None:
    attr = Attr(5, 0o060600, rdev=0x1234_5678, born_ns=born_ns)
    answer = statx_out(attr, wire.Times.of(1))[32:]
    assert struct.unpack_from("=I", answer)[0] == mask
    assert struct.unpack_from("=qI", answer, 80) == divmod(born_ns, 10**9)
    device = os.makedev(*struct.unpack_from("=II", answer, 128))
    assert device == os.makedev(0x456, 0x12378)


@pytest.mark.parametrize("plus", [False, True])
def test_a_listing_fills_its_room(plus: bool) -> None:
    times = wire.Times.of(1)
    listing = wire.Listing(0, 4096, wire.PackedEntries(times, times) if plus else None)
    listing.add_dot(b".", 1)
    names = [b"n" * (1 + n % 17) for n in range(1000)]
    listing.fill((name, Attr(n + 2, 0o100644)) for n, name in enumerate(names))
    assert listing.is_full
    count = listing.position - 1
    answer = listing.answer()
    assert 4096 - 200 < len(answer) <= 4096
    found, at = [], 0
    while at < len(answer):
        at += 128 * plus
        inode, position, length, kind = struct.unpack_from("=QQII", answer, at)
        found.append((inode, position, answer[at + 24 : at + 24 + length], kind))
        at += -(-(24 + length) // 8) * 8
    assert found[0] == (1, 1, b".", 4)
    assert found[1:] == [(n + 2, n + 2, names[n], 8) for n in range(count)]


def test_entries_that_were_packed_before_are_those_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = wire.Times.of(1)
    packed = wire.PackedEntries(times, times)
    old = Attr(5, 0o100644, size=1)
    changed = [
        (b"name", old, 3),
        (b"other", old, 3),
        (b"name", old, 4),
        (b"name", Attr(5, 0o100600, size=2), 3),
        (b"name", old, 3),
    ]
    for name, attr, position in changed:
        fresh = wire.PackedEntries(times, times).pack(name, attr, position)
        assert packed.pack(name, attr, position) == fresh
        assert packed.pack(name, attr, position) is packed.pack(name, attr, position)
    monkeypatch.setattr(wire, "MOUNT_PACKED_ENTRIES_MAX", 8)
    for inode in range(100, 120):
        packed.pack(b"name", Attr(inode, 0o100644), 1)
    assert len(packed._kept) <= 8


def test_notices() -> None:
    for notice, code in (
        (wire.inval_attributes(5), 2),
        (wire.inval_inode(5), 2),
        (wire.inval_entry(5, b"name"), 3),
        (wire.delete(5, 6, b"name"), 6),
    ):
        assert struct.unpack_from("=IiQ", notice) == (len(notice), code, 0)
    assert wire.delete(5, 6, b"name").endswith(struct.pack("=QQII", 5, 6, 4, 0) + b"name\0")
