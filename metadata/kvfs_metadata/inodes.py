"""Inodes and directory entries: the small steps that the namespace's operations are made of."""

from __future__ import annotations

import stat

from kvfs_base.errors import InodeStale, InvalidRequest, NameTooLong, NotADirectory
from kvfs_base.limits import MOUNT_UNPUSHED_BYTES, NAME_BYTES_MAX
from kvfs_base.types import ROOT_INODE
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.records import InodeRecord
from kvfs_metadata.transaction import Tx

KV_INODE = 2
"""``/kv``. It exists from the start and never goes or moves."""


def unrecorded_chunks(chunk_bytes: int) -> int:
    """Chunks that a writer who died may have left behind the recorded size: what it had not pushed,
    one write, and the chunk that both begin in."""
    return MOUNT_UNPUSHED_BYTES // chunk_bytes + 2


def load(kv: KVRead, inode: int) -> InodeRecord:
    """Raises InodeStale."""
    value = kv.get(records.inode_key(inode))
    if value is None:
        raise InodeStale(inode)
    return records.decode_inode(value)


def load_directory(kv: KVRead, inode: int) -> InodeRecord:
    """Raises InodeStale, NotADirectory."""
    record = load(kv, inode)
    if not record.is_dir:
        raise NotADirectory()
    return record


def save(tx: Tx, record: InodeRecord) -> None:
    tx.kv.put(records.inode_key(record.inode), records.encode(record))


def child(kv: KVRead, parent: int, name: bytes) -> int | None:
    value = kv.get(records.entry_key(parent, name))
    return None if value is None else int.from_bytes(value, "big")


def load_named(kv: KVRead, entry: bytes) -> InodeRecord | None:
    """What the entry with this key leads to, None if there is no such entry. Raises InodeStale."""
    inode = kv.get(entry)
    if inode is None:
        return None
    value = kv.get(records.INODE + inode)
    if value is None:
        raise InodeStale(int.from_bytes(inode, "big"))
    return records.decode_inode(value)


def put_entry(tx: Tx, parent: int, name: bytes, inode: int) -> None:
    tx.kv.put(records.entry_key(parent, name), records.u64(inode))


def has_entries(kv: KVRead, inode: int) -> bool:
    start = records.entry_key(inode, b"")
    end = records.entry_key(inode + 1, b"")
    return bool(kv.range(start, end, 1))


def touch(record: InodeRecord, now_ns: int) -> None:
    """A directory's entries changed."""
    record.mtime_ns = record.ctime_ns = now_ns


def check_name(name: bytes) -> None:
    """Raises NameTooLong, InvalidRequest."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(len(name))
    if not name or name in (b".", b"..") or b"/" in name or b"\x00" in name:
        raise InvalidRequest(detail=f"not a name: {name!r}")


def is_below(kv: KVRead, inode: int, ancestor: int) -> bool:
    """Whether directory ``inode`` is ``ancestor`` or lies somewhere below it."""
    while inode != ancestor:
        if inode == ROOT_INODE:
            return False
        inode = load(kv, inode).parent
    return True


def charged_bytes(record: InodeRecord) -> int:
    """What a file counts for in the capacity. A sparse file's size says nothing about its space
    (1 TiB of hole must not evict the cache); the targets' free space accounts for it."""
    return record.size if stat.S_ISREG(record.mode) and not record.sparse else 0


def chunks_to_remove(record: InodeRecord) -> tuple[tuple[int, ...], int]:
    """The chains that may hold chunks of a file, and the number after its last possible chunk."""
    layout = record.layout
    if layout is None or not layout.chains:
        return (), 0
    size = max(record.size, record.size_max)
    end = -(-size // layout.chunk_bytes) + unrecorded_chunks(layout.chunk_bytes)
    return tuple(dict.fromkeys(layout.chains[:end])), end
