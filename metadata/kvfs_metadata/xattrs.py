"""Extended attributes: stored ones, and ``user.kvfs.*``, which tell about blocks, namespaces and
copies. Only ``user.kvfs.copies`` of directories can be set (``copies``)."""

from __future__ import annotations

import re

import msgspec

from kvfs_base.errors import AttributeMissing, EntryExists, InvalidRequest, NotPermitted
from kvfs_base.types import Layout
from kvfs_metadata import records
from kvfs_metadata.block_index import BlockIndex
from kvfs_metadata.copies import Copies
from kvfs_metadata.engines.engine import KVRead, scan
from kvfs_metadata.inodes import load, save
from kvfs_metadata.messages import Done, GetXattr, ListXattr, RemoveXattr, SetXattr
from kvfs_metadata.records import InodeRecord
from kvfs_metadata.transaction import Tx

OWN_PREFIX = b"user.kvfs."
COPIES = OWN_PREFIX + b"copies"
COUNT = re.compile(rb"[1-9]")
CREATE = 1
REPLACE = 2


class Xattrs:
    def __init__(self, index: BlockIndex, copies: Copies) -> None:
        self._index = index
        self._copies = copies

    def get(self, kv: KVRead, request: GetXattr) -> bytes:
        value = self._own(request.inode).get(request.name)
        if request.name == COPIES:
            value = b"%d" % self._count(kv, request.inode)
        if value is None and request.inode not in self._index.by_inode:
            value = kv.get(records.xattr_key(request.inode, request.name))
            if value is None:
                load(kv, request.inode)  # what is wrong may be the inode
        if value is None:
            raise AttributeMissing(request.name)
        return value

    def list(self, kv: KVRead, request: ListXattr) -> tuple[bytes, ...]:
        own = tuple(sorted(self._own(request.inode)))
        if request.inode in self._index.by_inode:
            return own
        record = load(kv, request.inode)
        if record.copies:
            # Not where nobody asked for it, and not of files: whoever copies attributes would have
            # it where it does not belong.
            own = (COPIES, *own)
        prefix = records.xattr_key(request.inode, b"")
        return own + tuple(key[len(prefix) :] for key, _ in scan(kv, prefix))

    def _own(self, inode: int) -> dict[bytes, bytes]:
        """What the service itself says about an inode."""
        block = self._index.by_inode.get(inode)
        if block is not None:
            return {
                OWN_PREFIX + b"key": block.key.hex().encode(),
                OWN_PREFIX + b"generation": b"%d" % block.inode,
                OWN_PREFIX + b"crc32c": b"%08x" % block.crc32c,
                OWN_PREFIX + b"last_use_ns": b"%d" % block.last_use_ns,
            }
        namespace = self._index.namespaces.get(inode)
        if namespace is not None:
            layout = msgspec.json.encode(msgspec.structs.asdict(namespace.layout))
            return {OWN_PREFIX + b"layout": layout}
        return {}

    def _count(self, kv: KVRead, inode: int) -> int:
        """Of a block or file: how many there should be; of a directory: of what comes to lie there.
        Raises AttributeMissing where there is nothing to copy."""
        block = self._index.by_inode.get(inode)
        if block is not None:
            return self._copies.existing(Layout(block.size, (block.chain,)))
        record = load(kv, inode)
        if record.is_dir:
            return self._copies.wanted(record)
        if record.layout is None:
            raise AttributeMissing(COPIES)
        return self._copies.existing(record.layout)

    def set(self, tx: Tx, request: SetXattr) -> Done:
        self._require_changeable(request.inode, request.name)
        if request.flags not in (0, CREATE, REPLACE):
            raise InvalidRequest(detail=f"xattr flags {request.flags}")
        record = load(tx.kv, request.inode)
        if request.name == COPIES:
            return self._set_copies(tx, record, request)
        key = records.xattr_key(request.inode, request.name)
        exists = tx.kv.get(key) is not None
        if exists and request.flags == CREATE:
            raise EntryExists(request.name)
        if not exists and request.flags == REPLACE:
            raise AttributeMissing(request.name)
        tx.kv.put(key, request.value)
        record.ctime_ns = tx.now_ns
        save(tx, record)
        return Done()

    def _set_copies(self, tx: Tx, record: InodeRecord, request: SetXattr) -> Done:
        if record.copies and request.flags == CREATE:
            raise EntryExists(request.name)
        if not record.copies and request.flags == REPLACE:
            raise AttributeMissing(request.name)
        if not COUNT.fullmatch(request.value):
            raise InvalidRequest(detail="copies are a number")
        self._copies.set(record, int(request.value))
        record.ctime_ns = tx.now_ns
        save(tx, record)
        return Done()

    def remove(self, tx: Tx, request: RemoveXattr) -> Done:
        self._require_changeable(request.inode, request.name)
        record = load(tx.kv, request.inode)
        if request.name == COPIES:
            if not record.copies:
                raise AttributeMissing(request.name)
            self._copies.set(record, 0)
            record.ctime_ns = tx.now_ns
            save(tx, record)
            return Done()
        key = records.xattr_key(request.inode, request.name)
        if tx.kv.get(key) is None:
            raise AttributeMissing(request.name)
        tx.kv.delete(key)
        record.ctime_ns = tx.now_ns
        save(tx, record)
        return Done()

    def _require_changeable(self, inode: int, name: bytes) -> None:
        if inode in self._index.by_inode:
            raise NotPermitted(reason="a block is read-only")
        if name.startswith(OWN_PREFIX) and name != COPIES:
            raise NotPermitted(reason="user.kvfs.* is the service's")
