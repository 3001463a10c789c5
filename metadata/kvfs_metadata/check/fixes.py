"""How the check of a store is asked for over the wire: raw records, and repairs of single findings.

A fix names what was found wrong and what would be right. It is never taken on trust: the service
looks again, in the transaction that repairs (``check.repair``), and does nothing if things
are not, or no longer, as the fix says.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec

from kvfs_base.limits import (
    FIXES_PER_REQUEST,
    NAME_BYTES_MAX,
    STRIPE_MAX,
)
from kvfs_base.rpc import Request
from kvfs_base.types import U32, U64
from kvfs_metadata.limits import SCAN_RECORDS_MAX

RecordKey = Annotated[bytes, msgspec.Meta(max_length=511)]
"""LMDB's longest key."""

AnyName = Annotated[bytes, msgspec.Meta(max_length=NAME_BYTES_MAX)]


class RecordPage(msgspec.Struct, array_like=True, frozen=True):
    items: tuple[tuple[bytes, bytes], ...]
    more: bool
    """There is something between the last item and the end that was asked for."""


class ScanRecords(Request, tag="scan_records"):
    """The store's records as they are, ``start <= key < end`` in the order of their bytes: one page
    of one consistent state. The next page may be of a later one."""

    Reply: ClassVar = RecordPage
    start: RecordKey
    end: RecordKey
    limit: Annotated[int, msgspec.Meta(ge=1, le=SCAN_RECORDS_MAX)] = SCAN_RECORDS_MAX


class Verdict(enum.IntEnum):
    """What became of a fix."""

    GONE = 0
    """It is not called for: things are not, or no longer, as it says."""
    DONE = 1
    """It was called for, and (not in a dry run) is carried out."""
    BLOCKED = 2
    """It is called for, and something is in the way that a person has to see to."""


class FixBase(msgspec.Struct, array_like=True, frozen=True):
    """``rank`` orders repairs: a fix expects what it looks at as the check saw it, so those that
    change it for others come later.

    ``ctime_ns`` of a fix is what the inode's was before the check read the directories. Whatever
    changes a name of an inode, or an entry of a directory, sets it: while it is the same, what the
    check counted meanwhile is still true."""

    rank: ClassVar[int] = 0


class SetLinks(FixBase, frozen=True, tag="links"):
    """The inode has ``nlink`` links, not ``seen``."""

    inode: U64
    ctime_ns: int
    seen: U32
    nlink: U32


class SetParent(FixBase, frozen=True, tag="parent"):
    """The directory lies in ``parent`` as ``name``, and its inode says otherwise."""

    inode: U64
    parent: U64
    name: AnyName


class ClearNamespace(FixBase, frozen=True, tag="clear_namespace"):
    """The directory says that it is a namespace, and there is none: it becomes a plain one."""

    inode: U64
    ctime_ns: int


class MakeRoot(FixBase, frozen=True, tag="root"):
    """``/`` or ``/kv`` has no inode."""

    rank: ClassVar[int] = 3
    inode: U64


class MarkSparse(FixBase, frozen=True, tag="sparse"):
    """What is lost of the file will read as zeros instead of failing. ``chains`` are its layout's:
    of others it was not missed."""

    inode: U64
    ctime_ns: int
    chains: Annotated[tuple[U32, ...], msgspec.Meta(max_length=STRIPE_MAX)] = ()


class CoverTail(FixBase, frozen=True, tag="tail"):
    """Chunks up to number ``end`` exist behind the recorded end of the file: they will be removed
    with it."""

    inode: U64
    end: U32


class DropBlock(FixBase, frozen=True, tag="block"):
    """``why``: ``chunk`` (lost or damaged, on ``chain`` if that is named), ``namespace`` (gone),
    ``chain`` (unknown), or ``duplicate`` of the block ``other``."""

    rank: ClassVar[int] = 1
    inode: U64
    why: Annotated[str, msgspec.Meta(max_length=16)]
    other: U64 = 0
    chain: U32 = 0


class DropDamaged(FixBase, frozen=True, tag="damaged"):
    """The record cannot be decoded, and nothing is lost without it that was not lost before."""

    rank: ClassVar[int] = 1
    key: RecordKey


class DropNamespace(FixBase, frozen=True, tag="namespace"):
    """A namespace without a directory and without blocks."""

    rank: ClassVar[int] = 2
    inode: U64


class DropEntry(FixBase, frozen=True, tag="entry"):
    """An entry of something that does not exist, or in something that is no plain directory.
    With ``ctime_ns``: the second entry of a directory."""

    rank: ClassVar[int] = 2
    parent: U64
    name: AnyName
    inode: U64
    ctime_ns: int | None = None


class DropXattrs(FixBase, frozen=True, tag="xattrs"):
    """Extended attributes of an inode that does not exist."""

    rank: ClassVar[int] = 2
    inode: U64


class DropOrphan(FixBase, frozen=True, tag="orphan"):
    """A note to delete an inode that does not exist, or that has a name (``ctime_ns``)."""

    rank: ClassVar[int] = 2
    inode: U64
    ctime_ns: int | None = None


class QueueUnlinked(FixBase, frozen=True, tag="unlinked"):
    """An inode without names that nobody will ever delete: it is noted for deletion."""

    rank: ClassVar[int] = 4
    inode: U64
    ctime_ns: int


class LinkLost(FixBase, frozen=True, tag="lost"):
    """An inode that cannot be reached from ``/`` gets a name in ``/lost+found``; a namespace gets
    back its own. ``parent`` and ``name`` are the entry it has, if it has one."""

    rank: ClassVar[int] = 4
    inode: U64
    ctime_ns: int
    parent: U64 = 0
    name: AnyName = b""


class RaiseCounter(FixBase, frozen=True, tag="counter"):
    """``inode`` is in use, and the counter would give it out again."""

    rank: ClassVar[int] = 4
    inode: U64


class RemoveChunks(FixBase, frozen=True, tag="chunks"):
    """Chunks ``first <= number < end`` of ``inode`` on one target belong to nothing, or lie where
    nobody looks for them."""

    rank: ClassVar[int] = 5
    target_id: U32
    inode: U64
    first: U32
    end: U32
    size: U64 = 0
    chain: U32 = 0
    """Of which it holds them, if that has several copies."""


class SetUsage(FixBase, frozen=True, tag="usage"):
    """The totals of inodes and bytes are counted anew, in one transaction."""

    rank: ClassVar[int] = 6


class SetQuotaUsage(FixBase, frozen=True, tag="quota"):
    """What is charged to a directory is counted anew, in one transaction; its quota goes if there
    is no such directory."""

    rank: ClassVar[int] = 6
    inode: U64


Fix = (
    SetLinks
    | SetParent
    | ClearNamespace
    | MakeRoot
    | MarkSparse
    | CoverTail
    | DropBlock
    | DropDamaged
    | DropNamespace
    | DropEntry
    | DropXattrs
    | DropOrphan
    | QueueUnlinked
    | LinkLost
    | RaiseCounter
    | RemoveChunks
    | SetUsage
    | SetQuotaUsage
)


class RepairRecords(Request, tag="repair_records"):
    """Looks again whether each of ``fixes`` is called for and, unless ``dry``, carries it out: all
    in one transaction. One that is blocked does not hold up the others."""

    Reply: ClassVar = tuple[Verdict, ...]
    fixes: Annotated[tuple[Fix, ...], msgspec.Meta(max_length=FIXES_PER_REQUEST)]
    dry: bool = False
