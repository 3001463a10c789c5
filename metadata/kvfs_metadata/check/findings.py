"""What a check of the store and of the chunk servers can find."""

from __future__ import annotations

import enum

import msgspec

from kvfs_base.errors import KvfsError
from kvfs_base.types import ChunkId
from kvfs_metadata import records
from kvfs_metadata.check.fixes import Fix


class Kind(enum.StrEnum):
    """docs/fsck.md explains each for people."""

    RECORD_DAMAGED = "record-damaged"
    ROOT_MISSING = "root-missing"
    ENTRY_DANGLING = "entry-dangling"
    ENTRY_MISPLACED = "entry-misplaced"
    DIRECTORY_TWICE = "directory-twice"
    DIRECTORY_DETACHED = "directory-detached"
    INODE_LOST = "inode-lost"
    INODE_UNLINKED = "inode-unlinked"
    LINKS_WRONG = "links-wrong"
    PARENT_WRONG = "parent-wrong"
    XATTR_STRAY = "xattr-stray"
    ORPHAN_STRAY = "orphan-stray"
    ORPHAN_LINKED = "orphan-linked"
    NAMESPACE_STRAY = "namespace-stray"
    NAMESPACE_UNNAMED = "namespace-unnamed"
    BLOCK_STRAY = "block-stray"
    BLOCK_DUPLICATE = "block-duplicate"
    CHAIN_MISSING = "chain-missing"
    CHAIN_BROKEN = "chain-broken"
    COUNTER_LOW = "counter-low"
    USAGE_WRONG = "usage-wrong"
    QUOTA_WRONG = "quota-wrong"
    BLOCK_LOST = "block-lost"
    BLOCK_DAMAGED = "block-damaged"
    FILE_HOLE = "file-hole"
    FILE_DAMAGED = "file-damaged"
    FILE_TAIL = "file-tail"
    COPY_LOST = "copy-lost"
    COPY_DAMAGED = "copy-damaged"
    COPY_DIFFERS = "copy-differs"
    CHUNK_ORPHAN = "chunk-orphan"
    CHUNK_MISPLACED = "chunk-misplaced"


class Place(msgspec.Struct, frozen=True):
    """Chunks ``first <= number < end`` that a finding is about. ``expected`` is how long the first
    should be, where the finding is that it is missing, short or damaged. ``was_read``: its bytes
    were, and the attribute beside them tells nothing new."""

    target_id: int
    first: int
    end: int
    expected: int = 0
    was_read: bool = False
    chain: int = 0
    """If it has several copies."""
    source: int = 0
    """Of a copy: another member, whose copy is good."""
    version: int = 0
    """That the copy had."""

    def chunk(self, inode: int) -> ChunkId:
        """The first one."""
        return ChunkId(inode, self.first, self.chain)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """``fix`` is None where nothing can be done without losing or inventing something."""

    kind: Kind
    inode: int
    detail: str
    fix: Fix | None = None
    place: Place | None = None


_KEY_BYTES = {
    records.INODE: 12,
    records.ORPHAN: 12,
    records.NAMESPACE: 12,
    records.BLOCK: 12,
    records.PREPARED: 12,
    records.REMOVAL: 16,
    records.MOVE: 12,
    records.CHAIN: 8,
    records.QUOTA: 12,
}
_VALUE_BYTES = {records.ENTRY: 8, records.BLOCK: 68, records.REMOVAL: 28, records.MOVE: 28}
_NAMED = (records.ENTRY, records.XATTR)

DROPPABLE = frozenset(
    {
        records.ENTRY,
        records.ORPHAN,
        records.BLOCK,
        records.PREPARED,
        records.REMOVAL,
        records.MOVE,
        records.XATTR,
    }
)
"""Kinds of which a record that cannot be decoded is dropped: what it stood for is found again
otherwise (an entry's inode is then lost, a block's chunk an orphan). The rest is for a person."""


def record_problem(key: bytes, value: bytes) -> str | None:
    """Why a record of a kind that is checked cannot be used, or None."""
    kind = key[:4]
    if len(key) != _KEY_BYTES.get(kind, len(key)) or (kind in _NAMED and len(key) < 13):
        return f"a key of {len(key)} bytes"
    if len(value) != _VALUE_BYTES.get(kind, len(value)):
        return f"a value of {len(value)} bytes"
    try:
        return _content_problem(kind, key, value)
    except (msgspec.MsgspecError, KvfsError, ValueError) as exc:
        return str(exc)


def _content_problem(kind: bytes, key: bytes, value: bytes) -> str | None:
    if kind == records.INODE:
        if records.decode_inode(value).inode != records.number_at(key):
            return "another inode's attributes"
    elif kind == records.PREPARED:
        batch = records.decode_prepared(value)
        if not len(batch.sizes) == len(batch.chains) == len(batch.keys) // 32:
            return "keys, sizes and chains of different number"
    elif kind == records.NAMESPACE:
        records.decode_namespace(value)
    elif kind == records.TARGET:
        records.decode_target(value)
    elif kind == records.CHAIN:
        records.decode_chain(value)
    elif kind == records.QUOTA:
        records.decode_quota(value)
    return None
