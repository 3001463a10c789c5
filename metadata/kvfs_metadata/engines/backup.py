"""Backups: a whole store in one file that shows whether it is whole.

    file    magic "KVFSMETA", u32 version, then frames
    frame   <4sIIIII: kind, number, stored bytes, unpacked bytes, items, CRC32C; then stored bytes

The frames are any number of ``ITEM`` and one ``TAIL`` (msgpack: items and bytes in all), after
which nothing follows. An ``ITEM`` is a msgpack array of [key, value] in the order of keys,
compressed with zstd. Each CRC32C covers the one before
it (the first: the twelve bytes of magic and version), the frame's header up to it and what is
stored. So a frame that was cut off, changed, left out, repeated or put elsewhere is noticed.

A file is written under another name and gets its own when it is whole and on the disk. It is read
through once before anything of it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import zstandard
from crc32c import crc32c

from kvfs_base.errors import BackupDamaged, LimitExceeded, VersionMismatch
from kvfs_base.seams import Disk, DiskFile
from kvfs_metadata.engines.engine import Item
from kvfs_metadata.engines.stores import Summary
from kvfs_metadata.limits import BACKUP_FRAME_BYTES_MAX

MAGIC = b"KVFSMETA"
VERSION = 1
START = MAGIC + VERSION.to_bytes(4, "little")

ITEMS, TAIL = b"ITEM", b"TAIL"
_FRAME = struct.Struct("<4sIIIII")
_CHECKED_BYTES = _FRAME.size - 4

LEVEL = 3
"""zstd's usual one: 300 MB/s, and a third of the size."""


class _Tail(msgspec.Struct):
    items: int
    bytes: int


class _Frame(NamedTuple):
    offset: int
    kind: bytes
    number: int
    items: int
    payload: bytes


def write_backup(disk: Disk, name: str, batches: Iterable[list[Item]]) -> Summary:
    """Writes ``name``, which replaces a file of this name once it is whole. Raises DiskFull,
    TargetFailed."""
    part = f"{name}.part"
    file = disk.open(part, write=True, create=True)
    try:
        file.truncate(0)
        summary = _write(file, batches)
        file.sync()
        disk.rename(part, name)
        disk.sync_directory("")
    except BaseException:
        disk.unlink(part)
        raise
    finally:
        file.close()
    return summary


def _write(file: DiskFile, batches: Iterable[list[Item]]) -> Summary:
    writer = _Writer(file)
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False)
    summary = Summary()
    for batch in batches:
        summary.count(batch)
        raw = msgspec.msgpack.encode(batch)
        if len(raw) > BACKUP_FRAME_BYTES_MAX:
            raise LimitExceeded(detail="a value is too large", limit=BACKUP_FRAME_BYTES_MAX)
        writer.add(ITEMS, len(batch), compressor.compress(raw), len(raw))
    writer.add(TAIL, 0, msgspec.msgpack.encode(_Tail(summary.items, summary.bytes)))
    return summary


class _Writer:
    def __init__(self, file: DiskFile) -> None:
        self._file = file
        self._crc = crc32c(START)
        self._number = 0
        file.pwritev([START], 0)
        self._offset = len(START)

    def add(self, kind: bytes, items: int, stored: bytes, unpacked: int = 0) -> None:
        header = _FRAME.pack(kind, self._number, len(stored), unpacked, items, 0)[:_CHECKED_BYTES]
        self._crc = _chained(self._crc, header, stored)
        self._file.pwritev([header + self._crc.to_bytes(4, "little"), stored], self._offset)
        self._offset += _FRAME.size + len(stored)
        self._number += 1


def _chained(crc: int, header: bytes, stored: bytes) -> int:
    return crc32c(stored, crc32c(header, crc32c(crc.to_bytes(4, "little"))))


def check_backup(disk: Disk, name: str) -> Summary:
    """Reads everything. Raises BackupDamaged, VersionMismatch, FileNotFoundError."""
    summary = Summary()
    for batch in read_backup(disk, name):
        summary.count(batch)
    return summary


def read_backup(disk: Disk, name: str) -> Iterator[list[Item]]:
    """The items. That the file is whole is known only when this ends: see ``check_backup``."""
    file = disk.open(name)
    try:
        yield from _read(file, name)
    finally:
        file.close()


def _read(file: DiskFile, name: str) -> Iterator[list[Item]]:
    decode = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]]).decode
    decompressor = zstandard.ZstdDecompressor()
    items = size = 0
    whole = False
    for frame in _frames(file, name):
        if whole or frame.kind not in (ITEMS, TAIL):
            raise BackupDamaged(path=name, offset=frame.offset, detail="a frame out of order")
        try:
            if frame.kind == TAIL:
                tail = msgspec.msgpack.decode(frame.payload, type=_Tail)
                whole = (tail.items, tail.bytes) == (items, size)
                continue
            batch = decode(decompressor.decompress(frame.payload, BACKUP_FRAME_BYTES_MAX))
        except (msgspec.MsgspecError, zstandard.ZstdError) as exc:
            raise BackupDamaged(path=name, offset=frame.offset, detail=str(exc)) from exc
        items += len(batch)
        size += sum(len(key) + len(value) for key, value in batch)
        yield batch
    if not whole:
        raise BackupDamaged(path=name, offset=file.size(), detail="the end is missing")


def _frames(file: DiskFile, name: str) -> Iterator[_Frame]:
    """The frames whose checksums are right. Raises BackupDamaged at the first that is not."""
    end = file.size()
    start = _bytes_at(file, 0, min(len(START), end))
    if start[: len(MAGIC)] != MAGIC:
        raise BackupDamaged(path=name, detail="not a backup of metadata")
    if len(start) < len(START):
        raise BackupDamaged(path=name, detail="the file is cut")
    if start != START:
        version = int.from_bytes(start[len(MAGIC) :], "little")
        raise VersionMismatch(detail=name, found=str(version), expected=str(VERSION))
    crc, number, offset = crc32c(START), 0, len(START)
    while offset < end:
        if end - offset < _FRAME.size:
            raise BackupDamaged(path=name, offset=offset, detail="the file is cut")
        header = _bytes_at(file, offset, _FRAME.size)
        kind, found, stored_bytes, unpacked, items, expected = _FRAME.unpack(header)
        if stored_bytes > end - offset - _FRAME.size:
            raise BackupDamaged(path=name, offset=offset, detail="the file is cut")
        if stored_bytes > BACKUP_FRAME_BYTES_MAX or unpacked > BACKUP_FRAME_BYTES_MAX:
            raise BackupDamaged(path=name, offset=offset, detail="a frame is too large")
        payload = _bytes_at(file, offset + _FRAME.size, stored_bytes)
        crc = _chained(crc, header[:_CHECKED_BYTES], payload)
        if crc != expected or found != number:
            raise BackupDamaged(path=name, offset=offset, detail="the checksum is wrong")
        yield _Frame(offset, kind, number, items, payload)
        number += 1
        offset += _FRAME.size + stored_bytes


def _bytes_at(file: DiskFile, offset: int, count: int) -> bytes:
    data = bytearray(count)
    found = file.preadv([memoryview(data)], offset) if count else 0
    return bytes(data[:found])


__all__ = ["check_backup", "read_backup", "write_backup"]
