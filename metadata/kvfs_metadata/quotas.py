"""Quotas: how much may lie below a directory.

What is made below a directory that has a quota is charged to it: its inode says to which
(``InodeRecord.quota``), as with the project quotas of XFS. A directory with a quota of its own
below it is charged to itself alone, with all that it holds. What is charged to one cannot get below
another, by a rename or as a second name (CrossesQuota): whoever moves it copies it.

Files count for their size, holes included, blocks for theirs, from when they are prepared. The
files' sum and the number of inodes are recorded (``QUOT``) in the transaction that changes them;
blocks are summed from the index, so there is nothing about them that could be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvfs_base.errors import (
    InodeStale,
    InvalidRequest,
    LimitExceeded,
    NotADirectory,
    QuotaExceeded,
)
from kvfs_metadata import records
from kvfs_metadata.block_index import BlockIndex, KVNamespace
from kvfs_metadata.engines.engine import KVRead, scan
from kvfs_metadata.inodes import load, save
from kvfs_metadata.limits import QUOTA_INODES_MAX
from kvfs_metadata.messages import GetQuota, QuotaInfo, SetQuota
from kvfs_metadata.records import InodeRecord, QuotaRecord
from kvfs_metadata.transaction import Tx


def quota_bytes(record: InodeRecord) -> int:
    """What an inode counts for."""
    return record.size if record.is_file else 0


class Quotas:
    """``block_bytes`` tells what the blocks below a directory with a quota count for."""

    def __init__(self, index: BlockIndex, block_bytes: Callable[[int], int]) -> None:
        self._index = index
        self._block_bytes = block_bytes

    def record(self, kv: KVRead, quota: int) -> QuotaRecord | None:
        value = kv.get(records.quota_key(quota)) if quota else None
        return None if value is None else records.decode_quota(value)

    def charge(self, tx: Tx, quota: int, *, inodes: int, file_bytes: int) -> None:
        """Raises QuotaExceeded if there is more of something than before, and too much."""
        found = self.record(tx.kv, quota)
        if found is None:  # none, or an unlinked file has outlived its directory
            return
        inodes_now = max(0, found.inodes + inodes)
        bytes_now = max(0, found.file_bytes + file_bytes)
        if inodes > 0 and found.inodes_max and inodes_now > found.inodes_max:
            raise QuotaExceeded("inodes", inodes, found.inodes, found.inodes_max, quota)
        if file_bytes > 0 and found.bytes_max:
            used = found.file_bytes + self._block_bytes(quota)
            if used + file_bytes > found.bytes_max:
                raise QuotaExceeded("bytes", file_bytes, used, found.bytes_max, quota)
        _save(tx, quota, QuotaRecord(found.bytes_max, found.inodes_max, bytes_now, inodes_now))

    def missing_bytes(self, kv: KVRead, namespace: KVNamespace, size: int) -> int:
        """What has to go before new blocks of ``size`` bytes fit. Raises QuotaExceeded if there are
        not so many blocks that could."""
        found = self.record(kv, namespace.quota)
        if found is None or not found.bytes_max:
            return 0
        block_bytes = self._block_bytes(namespace.quota)
        used = found.file_bytes + block_bytes
        missing = used + size - found.bytes_max
        if missing > self._index.bytes_of_quota(namespace.quota):
            raise QuotaExceeded("bytes", size, used, found.bytes_max, namespace.quota)
        return max(0, missing)

    def deleted(self, tx: Tx, record: InodeRecord) -> None:
        """The inode has gone."""
        if record.quota == record.inode:
            tx.kv.delete(records.quota_key(record.inode))
        else:
            self.charge(tx, record.quota, inodes=-1, file_bytes=-quota_bytes(record))

    # --- requests

    def get(self, kv: KVRead, request: GetQuota) -> QuotaInfo | None:
        """The quota that an inode or block is charged to, None if it is to none."""
        block = self._index.by_inode.get(request.inode)
        return self.info(kv, load(kv, block.namespace if block else request.inode).quota)

    def find(self, kv: KVRead, inode: int) -> QuotaInfo | None:
        """As ``get``, for an inode that may be gone."""
        try:
            return self.get(kv, GetQuota(inode))
        except InodeStale:
            return None

    def info(self, kv: KVRead, quota: int) -> QuotaInfo | None:
        found = self.record(kv, quota)
        if found is None:
            return None
        used = found.file_bytes + self._block_bytes(quota)
        return QuotaInfo(quota, found.bytes_max, found.inodes_max, used, found.inodes)

    def set(self, tx: Tx, request: SetQuota) -> QuotaInfo:
        """Raises NotADirectory, and what ``_claim`` does."""
        if request.inode in self._index.by_inode:
            raise NotADirectory()
        record = load(tx.kv, request.inode)
        if not record.is_dir:
            raise NotADirectory()
        found = self.record(tx.kv, request.inode) or self._claim(tx, record)
        new = QuotaRecord(
            found.bytes_max if request.bytes_max is None else request.bytes_max,
            found.inodes_max if request.inodes_max is None else request.inodes_max,
            found.file_bytes,
            found.inodes,
        )
        _save(tx, request.inode, new)
        info = self.info(tx.kv, request.inode)
        assert info is not None
        return info

    def _claim(self, tx: Tx, directory: InodeRecord) -> QuotaRecord:
        """All that lies below is charged to the directory from now on, in this one transaction.
        Raises LimitExceeded if that is much, and InvalidRequest for a file that has names
        elsewhere."""
        outer = directory.quota
        found, names = self._below(tx.kv, directory)
        for record in found.values():
            if not record.is_dir and record.nlink != names[record.inode]:
                detail = f"inode {record.inode} has other names elsewhere"
                raise InvalidRequest(detail=detail)
        file_bytes = sum(map(quota_bytes, found.values()))
        self.charge(tx, outer, inodes=-len(found), file_bytes=-file_bytes)
        for record in found.values():
            record.quota = directory.inode
            save(tx, record)
            namespace = self._index.namespaces.get(record.inode)
            if namespace is not None:
                self._index.set_quota(namespace, directory.inode)
                tx.undo.append(partial(self._index.set_quota, namespace, outer))
        return QuotaRecord(0, 0, file_bytes, len(found))

    def _below(
        self, kv: KVRead, directory: InodeRecord
    ) -> tuple[dict[int, InodeRecord], dict[int, int]]:
        """The directory and what is charged as it is below it; how many names each has there."""
        found, names = {directory.inode: directory}, {directory.inode: 1}
        waiting = [directory.inode]
        while waiting:
            for _, value in scan(kv, records.entry_key(waiting.pop(), b"")):
                inode = int.from_bytes(value, "big")
                names[inode] = names.get(inode, 0) + 1
                if inode in found:
                    continue
                record = load(kv, inode)
                if record.quota == inode:
                    continue  # it has its own
                found[inode] = record
                if len(found) > QUOTA_INODES_MAX:
                    raise LimitExceeded(
                        detail="inodes below a directory that gets its first quota",
                        limit=QUOTA_INODES_MAX,
                    )
                if record.is_dir:
                    waiting.append(inode)
        return found, names


def _save(tx: Tx, quota: int, record: QuotaRecord) -> None:
    tx.kv.put(records.quota_key(quota), records.encode(record))
