"""All committed blocks in memory: by namespace and key, by inode, and in the order of use.

The store has the same blocks under ``BLCK``; this index answers match and lookup without it, at
about 0.25 us a key. A block costs about 600 bytes here: 1 M blocks (of 1 MiB, a full 1 TB disk)
cost 0.6 GB.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from kvfs_base.limits import BLOCK_KEY_BYTES
from kvfs_base.types import KVLayout
from kvfs_metadata import records
from kvfs_metadata.engine import KVRead, scan
from kvfs_metadata.policy import CachePolicy
from kvfs_metadata.records import BlockValue


class Block(msgspec.Struct, gc=False):
    """Not tracked by the garbage collector: a million of them would be walked again and again."""

    inode: int
    namespace: int
    key: bytes
    size: int
    crc32c: int
    chain: int
    created_ns: int
    last_use_ns: int

    def value(self) -> BlockValue:
        return BlockValue(
            self.namespace,
            self.size,
            self.crc32c,
            self.chain,
            self.created_ns,
            self.last_use_ns,
            self.key,
        )


class Listing:
    """The keys of a namespace in order, for those who list it.

    Kept from the first listing on: sorting a million keys takes 0.6 s, merging new ones 20 ms. A
    listing that starts from the beginning shows all that was stored before; one that goes on may
    miss what came meanwhile, as readdir may.
    """

    def __init__(self, blocks: dict[bytes, Block]) -> None:
        self._blocks = blocks
        self._keys: list[bytes] | None = None
        self._new: list[bytes] = []

    def stored(self, key: bytes) -> None:
        if self._keys is not None:
            self._new.append(key)

    def page(self, after: bytes, limit: int) -> list[Block]:
        """At most ``limit`` blocks whose keys sort after ``after`` (empty: from the first)."""
        if self._keys is None or not after:
            self._refresh()
        keys = self._keys or []
        found: list[Block] = []
        previous = after
        for place in range(bisect.bisect_right(keys, after), len(keys)):
            key = keys[place]
            block = self._blocks.get(key)
            if block is not None and key != previous:  # stored again: it stands there twice
                found.append(block)
                if len(found) == limit:
                    break
            previous = key
        return found

    def _refresh(self) -> None:
        if self._keys is None or len(self._keys) + len(self._new) > 2 * len(self._blocks) + 1024:
            self._keys = sorted(self._blocks)
        else:
            self._keys += sorted(self._new)
            self._keys.sort()  # two sorted runs: a merge
        self._new.clear()


class KVNamespace:
    """One directory of blocks."""

    __slots__ = ("block_bytes", "blocks", "changed_ns", "inode", "layout", "listing", "path")

    def __init__(self, inode: int, path: str, layout: KVLayout) -> None:
        self.inode = inode
        self.path = path
        self.layout = layout
        self.blocks: dict[bytes, Block] = {}
        self.listing = Listing(self.blocks)
        self.block_bytes = 0
        self.changed_ns = 0
        """When a block last came or went. Not recorded: writing the directory's inode with every
        commit would buy nothing but an mtime."""


class BlockIndex:
    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.namespaces: dict[int, KVNamespace] = {}
        self.by_path: dict[str, KVNamespace] = {}
        self.by_inode: dict[int, Block] = {}
        self.block_bytes = 0
        self._touched: set[int] = set()

    # --- loading

    def load(self, read: KVRead) -> None:
        """Everything in the store, in the order of last use."""
        for key, value in scan(read, records.NAMESPACE):
            record = records.decode_namespace(value)
            self.add_namespace(KVNamespace(records.number_at(key), record.path, record.layout))
        blocks = [_block(key, value) for key, value in scan(read, records.BLOCK)]
        _sort_by_use(blocks)
        self.insert(blocks)

    def apply(self, writes: Mapping[bytes, bytes | None], now_ns: int) -> None:
        """Brings the index in step with records that another server changed."""
        for key, value in writes.items():
            inode = records.number_at(key)
            if key.startswith(records.NAMESPACE) and value and inode not in self.namespaces:
                record = records.decode_namespace(value)
                self.add_namespace(KVNamespace(inode, record.path, record.layout))
        self._apply_blocks(writes, now_ns)
        for key, value in writes.items():
            namespace = self.namespaces.get(records.number_at(key))
            if key.startswith(records.NAMESPACE) and value is None and namespace is not None:
                self.remove_namespace(namespace)

    def _apply_blocks(self, writes: Mapping[bytes, bytes | None], now_ns: int) -> None:
        new: list[Block] = []
        used: list[Block] = []
        for key, value in writes.items():
            if not key.startswith(records.BLOCK):
                continue
            block = self.by_inode.get(records.number_at(key))
            if value is not None:
                written = _block(key, value)
                if block is None:
                    new.append(written)
                elif written.last_use_ns >= block.last_use_ns:
                    # Otherwise the last use was here, and is still to be written down.
                    self._touched.discard(block.inode)
                    if written.last_use_ns > block.last_use_ns:
                        block.last_use_ns = written.last_use_ns
                        used.append(block)
            elif block is not None:
                self.remove(block)
                self.namespaces[block.namespace].changed_ns = now_ns
        _sort_by_use(used)
        self.policy.used([block.inode for block in used])
        # Last: the key of a new block may have been another's, which is removed by now.
        _sort_by_use(new)
        self.insert(new)

    def add_namespace(self, namespace: KVNamespace) -> None:
        self.namespaces[namespace.inode] = namespace
        self.by_path[namespace.path] = namespace

    def remove_namespace(self, namespace: KVNamespace) -> None:
        del self.namespaces[namespace.inode]
        del self.by_path[namespace.path]

    # --- changing

    def insert(self, blocks: Sequence[Block]) -> None:
        """New blocks, in the order of their prefix. Their namespace exists, their keys do not."""
        for block in blocks:
            namespace = self.namespaces[block.namespace]
            namespace.blocks[block.key] = block
            namespace.listing.stored(block.key)
            namespace.block_bytes += block.size
            namespace.changed_ns = max(namespace.changed_ns, block.created_ns)
            self.by_inode[block.inode] = block
            self.block_bytes += block.size
        self.policy.inserted([(block.inode, block.size) for block in blocks])

    def remove(self, block: Block) -> None:
        namespace = self.namespaces[block.namespace]
        if namespace.blocks.get(block.key) is block:  # a damaged store may have two of one key
            del namespace.blocks[block.key]
        namespace.block_bytes -= block.size
        del self.by_inode[block.inode]
        self.block_bytes -= block.size
        self.policy.removed(block.inode)

    # --- asking

    def prefix(self, namespace: KVNamespace, keys: bytes) -> list[Block]:
        """The stored blocks of ``keys`` up to the first that is missing."""
        get = namespace.blocks.get
        found: list[Block] = []
        for start in range(0, len(keys), BLOCK_KEY_BYTES):
            block = get(keys[start : start + BLOCK_KEY_BYTES])
            if block is None:
                break
            found.append(block)
        return found

    def find(self, namespace: KVNamespace, keys: bytes) -> list[Block | None]:
        """Each of ``keys``, or None."""
        get = namespace.blocks.get
        return [
            get(keys[start : start + BLOCK_KEY_BYTES])
            for start in range(0, len(keys), BLOCK_KEY_BYTES)
        ]

    def use(self, blocks: Sequence[Block], now_ns: int) -> None:
        """Records one use of each, in the order of their prefix."""
        for block in blocks:
            block.last_use_ns = now_ns
        inodes = list(map(_inode_of, blocks))
        self.policy.used(inodes)
        self._touched.update(inodes)

    def take_touched(self, count_max: int) -> list[Block]:
        """Blocks whose last use is newer than the store's, at most ``count_max``."""
        count = min(count_max, len(self._touched))
        inodes = (self._touched.pop() for _ in range(count))
        return [self.by_inode[inode] for inode in inodes if inode in self.by_inode]

    @property
    def touched_count(self) -> int:
        return len(self._touched)

    def touch(self, blocks: Iterable[Block]) -> None:
        """Takes ``take_touched`` back."""
        self._touched.update(map(_inode_of, blocks))


_inode_of = operator.attrgetter("inode")
_last_use_of = operator.attrgetter("last_use_ns")


def _sort_by_use(blocks: list[Block]) -> None:
    """As the policy wants them: the last used first, those of one batch along their prefix.

    Blocks of one batch share their last use; their inodes grow along the prefix, and the end of a
    prefix counts as older. Two sorts by plain numbers beat one by pairs.
    """
    blocks.sort(key=_inode_of)
    blocks.sort(key=_last_use_of, reverse=True)


def _block(key: bytes, value: bytes) -> Block:
    namespace, size, crc32c, chain, created_ns, last_use_ns, name = records.unpack_block(value)
    return Block(
        records.number_at(key), namespace, name, size, crc32c, chain, created_ns, last_use_ns
    )
