"""Extended attributes: stored ones, and ``user.kvfs.*``, which tell about blocks and namespaces."""

from __future__ import annotations

import msgspec

from kvfs_base.errors import AttributeMissing, EntryExists, InvalidRequest, NotPermitted
from kvfs_metadata import records
from kvfs_metadata.block_index import BlockIndex
from kvfs_metadata.engine import KVRead, scan
from kvfs_metadata.inodes import load, save
from kvfs_metadata.messages import Done, GetXattr, ListXattr, RemoveXattr, SetXattr
from kvfs_metadata.transaction import Tx

OWN_PREFIX = b"user.kvfs."
CREATE = 1
REPLACE = 2


class Xattrs:
    def __init__(self, index: BlockIndex) -> None:
        self._index = index

    def get(self, kv: KVRead, request: GetXattr) -> bytes:
        own = self._own(request.inode)
        value = own.get(request.name)
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
        load(kv, request.inode)
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

    def set(self, tx: Tx, request: SetXattr) -> Done:
        self._require_changeable(request.inode, request.name)
        if request.flags not in (0, CREATE, REPLACE):
            raise InvalidRequest(detail=f"xattr flags {request.flags}")
        record = load(tx.kv, request.inode)
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

    def remove(self, tx: Tx, request: RemoveXattr) -> Done:
        self._require_changeable(request.inode, request.name)
        record = load(tx.kv, request.inode)
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
        if name.startswith(OWN_PREFIX):
            raise NotPermitted(reason="user.kvfs.* is the service's")
