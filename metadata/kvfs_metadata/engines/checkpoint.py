"""Power loss with durability "cache": back to the last checkpoint instead of a broken store.

Without syncs LMDB survives its process but not the machine: after a power failure any page may be
old, new or torn, the two meta pages included. A checkpoint makes one state safe from that:

1. a read transaction pins the state, so that LMDB uses none of its pages again;
2. the data file is synced, which puts all of those pages on the disk;
3. the meta data of that state (its roots, its size) goes into a side file, synced;
4. only then the pin of the checkpoint before is released.

So at every moment the side file names a state whose pages are on the disk and stay untouched. When
the machine has booted since, that meta data is written over both of the data file's meta pages.
When only the process died the kernel still had everything, and the newest state is used.

The side file has two slots of 4 KiB that are written in turn: the last good one outlives a torn
write of the other, and a full disk stops no checkpoint. A slot is ``<4sIQIH``: magic ``KVCP``,
CRC32C of everything after it, number of the checkpoint, page size, length of the boot id; then the
boot id and the first 152 bytes of the meta page. A store that was closed cleanly has no side file.

Meta pages as LMDB 0.9 has them on 64-bit machines: a 16-byte page header whose first 8 bytes are
the page number, then ``MDB_meta``: magic 0xBEEFC0DE (u32), version 1 (u32), address, map size (u64
each), two 48-byte tables, last page (u64), transaction id (u64).
"""

from __future__ import annotations

import dataclasses
import struct

from crc32c import crc32c

from kvfs_base.errors import VersionMismatch
from kvfs_base.seams import Disk

DATA_FILE = "data.mdb"
CHECKPOINT_FILE = "checkpoint"

MAGIC = b"KVCP"
SLOT_BYTES = 4096
_HEADER = struct.Struct("<4sIQIH")
_CHECKED_FROM = 8

META_MAGIC = 0xBEEFC0DE
META_VERSION = 1
_META_HEAD = struct.Struct("<16xII")
_PAGE_NUMBER = struct.Struct("<Q")
_TXNID = struct.Struct("<Q")
_TXNID_OFFSET = 16 + 4 + 4 + 8 + 8 + 2 * 48 + 8
META_BYTES = _TXNID_OFFSET + 8


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    number: int
    boot_id: str
    page_bytes: int
    meta: bytes
    """The first META_BYTES of a meta page of LMDB's."""


def read_meta(disk: Disk, page_bytes: int, transaction_id: int) -> bytes:
    """The meta data of the committed state ``transaction_id``, which must be the newest. Raises
    VersionMismatch if the file is laid out in another way than is described above."""
    file = disk.open(DATA_FILE)
    try:
        for number in range(2):
            meta = bytearray(META_BYTES)
            file.preadv([memoryview(meta)], number * page_bytes)
            head = _META_HEAD.unpack_from(meta)
            found = _TXNID.unpack_from(meta, _TXNID_OFFSET)[0]
            if head == (META_MAGIC, META_VERSION) and found == transaction_id:
                return bytes(meta)
    finally:
        file.close()
    raise VersionMismatch(
        detail="no meta page of this state", found="unknown", expected="LMDB 0.9, 64 bits"
    )


def save(disk: Disk, checkpoint: Checkpoint) -> None:
    """Durable when this returns. The slot of the checkpoint before is left alone."""
    boot_id = checkpoint.boot_id.encode()
    numbers = (checkpoint.number, checkpoint.page_bytes, len(boot_id))
    data = bytearray(_HEADER.pack(MAGIC, 0, *numbers) + boot_id + checkpoint.meta)
    struct.pack_into("<I", data, 4, crc32c(data[_CHECKED_FROM:]))
    new = not disk.exists(CHECKPOINT_FILE)
    file = disk.open(CHECKPOINT_FILE, write=True, create=True)
    try:
        slot = bytes(data).ljust(SLOT_BYTES, b"\x00")
        if new:
            file.pwritev([bytes(2 * SLOT_BYTES)], 0)  # the room for both
        file.pwritev([slot], checkpoint.number % 2 * SLOT_BYTES)
        file.sync()
    finally:
        file.close()
    if new:
        disk.sync_directory("")


def load(disk: Disk) -> Checkpoint | None:
    """The newest whole checkpoint. None if the store was closed cleanly and nothing was committed
    since."""
    try:
        file = disk.open(CHECKPOINT_FILE)
    except FileNotFoundError:
        return None
    data = bytearray(2 * SLOT_BYTES)
    try:
        file.preadv([memoryview(data)], 0)
    finally:
        file.close()
    found = [_parse(bytes(data[:SLOT_BYTES])), _parse(bytes(data[SLOT_BYTES:]))]
    return max(filter(None, found), key=lambda checkpoint: checkpoint.number, default=None)


def _parse(slot: bytes) -> Checkpoint | None:
    magic, checksum, number, page_bytes, length = _HEADER.unpack_from(slot)
    end = _HEADER.size + length + META_BYTES
    if magic != MAGIC or end > SLOT_BYTES or crc32c(slot[_CHECKED_FROM:end]) != checksum:
        return None
    boot_id = slot[_HEADER.size : _HEADER.size + length].decode()
    return Checkpoint(number, boot_id, page_bytes, slot[end - META_BYTES : end])


def remove(disk: Disk) -> None:
    """After a clean end; durable when this returns."""
    try:
        disk.unlink(CHECKPOINT_FILE)
    except FileNotFoundError:
        return
    disk.sync_directory("")


def restore(disk: Disk, boot_id: str) -> bool:
    """Before LMDB opens the store: if the machine went down since the last checkpoint, that state
    becomes the newest one. Whether it did."""
    checkpoint = load(disk)
    if checkpoint is None or checkpoint.boot_id == boot_id:
        return False
    file = disk.open(DATA_FILE, write=True)
    try:
        # The two differ in their page numbers only: of two equal states LMDB takes the first.
        for number in range(2):
            meta = _PAGE_NUMBER.pack(number) + checkpoint.meta[_PAGE_NUMBER.size :]
            file.pwritev([meta], number * checkpoint.page_bytes)
        file.sync()
    finally:
        file.close()
    return True
