"""What is charged to directories with quotas: counted while inodes are read, compared with what is
recorded, and recorded anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from kvfs_metadata import records
from kvfs_metadata.check import fixes as f
from kvfs_metadata.check.findings import Finding, Kind, record_problem
from kvfs_metadata.engines.engine import Item, scan
from kvfs_metadata.quotas import quota_bytes
from kvfs_metadata.records import InodeRecord, QuotaRecord, Usage
from kvfs_metadata.transaction import Tx


def decode_quotas(items: Iterable[Item]) -> dict[int, QuotaRecord]:
    """By the inode of the directory."""
    return {records.number_at(key): records.decode_quota(value) for key, value in items}


class Charges:
    """Counts inodes and bytes of files by the quota that they count for."""

    def __init__(self) -> None:
        self._counted: dict[int, Usage] = {}

    def add(self, record: InodeRecord) -> None:
        if record.quota:
            inodes, size = self.of(record.quota)
            self._counted[record.quota] = Usage(inodes + 1, size + quota_bytes(record))

    def of(self, quota: int) -> Usage:
        return self._counted.get(quota, Usage(0, 0))

    def compare(
        self,
        before: dict[int, QuotaRecord],
        after: dict[int, QuotaRecord],
        is_directory: Callable[[int], bool],
    ) -> Iterator[Finding]:
        """``before`` and ``after`` the inodes were read. Of a quota that changed meanwhile nothing
        can be said."""
        for number, quota in after.items():
            counted, detail = self.of(number), ""
            if not is_directory(number):
                detail = "a quota of a directory that does not exist"
            elif before.get(number) == quota and (quota.inodes, quota.file_bytes) != counted:
                detail = (
                    f"{quota.inodes} inodes with {quota.file_bytes} bytes charged, "
                    f"{counted.inodes} with {counted.file_bytes} counted"
                )
            if detail:
                fix = f.SetQuotaUsage(number)
                yield Finding(kind=Kind.QUOTA_WRONG, inode=number, detail=detail, fix=fix)


def set_quota_usage(tx: Tx, fix: f.SetQuotaUsage) -> bool:
    """Reads every inode: about 2 s a million, during which nothing else is written."""
    key = records.quota_key(fix.inode)
    value = tx.kv.get(key)
    if value is None:
        return False
    directory = tx.kv.get(records.inode_key(fix.inode))
    if directory is None or not records.decode_inode(directory).is_dir:
        tx.kv.delete(key)
        return True
    charges = Charges()
    for item, inode in scan(tx.kv, records.INODE):
        if record_problem(item, inode) is None:
            charges.add(records.decode_inode(inode))
    inodes, file_bytes = charges.of(fix.inode)
    quota = records.decode_quota(value)
    counted = msgspec.structs.replace(quota, inodes=inodes, file_bytes=file_bytes)
    if counted == quota:
        return False
    tx.kv.put(key, records.encode(counted))
    return True
