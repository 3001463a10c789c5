"""All committed blocks in memory: by namespace and key, by inode, and in the order of use.

The store has the same blocks under ``BLCK``; this index answers match and lookup without it.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvfs_base.limits import BLOCK_KEY_BYTES
from kvfs_base.types import KVLayout
from kvfs_metadata import records
from kvfs_metadata.block_table import Block, BlocksByInode, BlockTable
from kvfs_metadata.engines.engine import Item, KVRead, prefix_end, scan, scan_pages
from kvfs_metadata.policy import CachePolicy

LOAD_PAGE = 1024
"""Records that are loaded at once. More fill whole arenas of Python's allocator, which go back to
the system after every page: 28,000 page faults in a million records."""

LOOK_UP_KEYS = 256
"""Keys that a match looks up before it looks whether one was missing."""


class Listing:
    """The keys of a namespace in order, for those who list it.

    Kept from the first listing on: sorting a million keys takes 0.6 s, merging new ones 20 ms. A
    listing that starts from the beginning shows all that was stored before; one that goes on may
    miss what came meanwhile, as readdir may.
    """

    def __init__(self, namespace: KVNamespace) -> None:
        self._namespace = namespace
        self._keys: list[bytes] | None = None
        self._new: list[bytes] = []

    def stored(self, keys: Iterable[bytes]) -> None:
        if self._keys is not None:
            self._new += keys

    def page(self, after: bytes, limit: int) -> list[Block]:
        """At most ``limit`` blocks whose keys sort after ``after`` (empty: from the first)."""
        if self._keys is None or not after:
            self._refresh()
        keys = self._keys or []
        found: list[Block] = []
        previous = after
        place = bisect.bisect_right(keys, after)
        while place < len(keys) and len(found) < limit:
            names = keys[place : place + limit - len(found)]
            place += len(names)
            for name, row in zip(names, self._namespace.find(names), strict=True):
                if row is not None and name != previous:  # stored again: it stands there twice
                    found.append(self._namespace.block(row))
                previous = name
        return found

    def _refresh(self) -> None:
        stored = self._namespace.count
        if self._keys is None or len(self._keys) + len(self._new) > 2 * stored + 1024:
            self._keys = sorted(self._namespace.keys())
        else:
            self._keys += sorted(self._new)
            self._keys.sort()  # two sorted runs: a merge
        self._new.clear()


class KVNamespace:
    """One directory of blocks."""

    def __init__(
        self, table: BlockTable, inode: int, path: str, layout: KVLayout, quota: int = 0
    ) -> None:
        self.inode = inode
        self.quota = quota
        """As the record of its directory says."""
        self.path = path
        self.layout = layout
        self._table = table
        self.rows: dict[bytes, int] = {}
        """Of the blocks that were stored, or asked for, since the start."""
        self.blocks = BlocksByKey(self)
        self.listing = Listing(self)
        self.count = 0
        self.block_bytes = 0
        self.changed_ns = 0
        """When a block last came or went. Not recorded: writing the directory's inode with every
        commit would buy nothing but an mtime."""

    def find(self, names: Sequence[bytes]) -> list[int | None]:
        """The row of each of ``names``, or None."""
        rows = list(map(self.rows.get, names))
        if len(self.rows) < self.count and None in rows:
            self._find_loaded(names, rows)
        return rows

    def _find_loaded(self, names: Sequence[bytes], rows: list[int | None]) -> None:
        places = [place for place, row in enumerate(rows) if row is None]
        found = self._table.find_loaded(self.inode, [names[place] for place in places])
        for place, row in zip(places, found, strict=False):
            if row >= 0:
                # The next time it is found at once.
                rows[place] = self.rows[names[place]] = row

    def block(self, row: int) -> Block:
        return self._table.block(row)

    def keys(self) -> list[bytes]:
        """In no order."""
        return self._table.keys_of(self.inode)


class BlocksByKey:
    """The blocks of a namespace. Each is made when it is asked for."""

    def __init__(self, namespace: KVNamespace) -> None:
        self._namespace = namespace

    def get(self, key: bytes) -> Block | None:
        row = self._namespace.find([key])[0]
        return None if row is None else self._namespace.block(row)

    def __getitem__(self, key: bytes) -> Block:
        block = self.get(key)
        if block is None:
            raise KeyError(key)
        return block

    def __contains__(self, key: bytes) -> bool:
        return self._namespace.find([key])[0] is not None

    def __len__(self) -> int:
        return self._namespace.count

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._namespace.keys())


class BlockIndex:
    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.namespaces: dict[int, KVNamespace] = {}
        self.by_path: dict[str, KVNamespace] = {}
        self.by_quota: dict[int, dict[int, KVNamespace]] = {}
        """Those that count for a quota, by its directory and their own."""
        self.table = BlockTable()
        self.by_inode = BlocksByInode(self.table)
        self.block_bytes = 0
        self._touched: set[int] = set()

    # --- loading

    def load(self, read: KVRead) -> None:
        """Everything in the store, in the order of last use."""
        for key, value in scan(read, records.NAMESPACE):
            record = records.decode_namespace(value)
            inode = records.number_at(key)
            directory = read.get(records.inode_key(inode))
            quota = 0 if directory is None else records.decode_inode(directory).quota
            self.add_namespace(KVNamespace(self.table, inode, record.path, record.layout, quota))
        with _without_collector():
            for page in scan_pages(read, records.BLOCK, prefix_end(records.BLOCK), LOAD_PAGE):
                self._load_page(page)
        rows = self.table.loaded()
        # Newest first and then by inode, as ``_sort_by_use``; by inode they are already.
        order = np.argsort(-rows["last_use_ns"].astype(np.int64), kind="stable")
        self.policy.inserted(np.column_stack((order, rows["size"][order])))

    def _load_page(self, page: Sequence[Item]) -> None:
        """Each run of blocks of the same namespace is counted in one step."""
        rows = self.table.load(page)
        starts = [0, *(np.flatnonzero(np.diff(rows["namespace"])) + 1).tolist()]
        sizes = np.add.reduceat(rows["size"].astype(np.int64), starts).tolist()
        newest = np.maximum.reduceat(rows["created_ns"], starts).tolist()
        for i, (start, end) in enumerate(itertools.pairwise([*starts, len(rows)])):
            namespace = self.namespaces[int(rows["namespace"][start])]
            self._count(namespace, end - start, sizes[i])
            namespace.changed_ns = max(namespace.changed_ns, newest[i])

    def _count(self, namespace: KVNamespace, blocks: int, size: int) -> None:
        namespace.count += blocks
        namespace.block_bytes += size
        self.block_bytes += size

    def apply(self, writes: Mapping[bytes, bytes | None], now_ns: int) -> None:
        """Brings the index in step with records that another server changed."""
        for key, value in writes.items():
            inode = records.number_at(key)
            if key.startswith(records.NAMESPACE) and value and inode not in self.namespaces:
                record = records.decode_namespace(value)
                self.add_namespace(KVNamespace(self.table, inode, record.path, record.layout))
        for key, value in writes.items():
            if key.startswith(records.INODE) and value:
                namespace = self.namespaces.get(records.number_at(key))
                if namespace is not None:
                    self.set_quota(namespace, records.decode_inode(value).quota)
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
                if block is not None and block.chain != written.chain:
                    self.set_chain(block.inode, written.chain)
                if block is None:
                    new.append(written)
                elif written.last_use_ns >= block.last_use_ns:
                    # Otherwise the last use was here, and is still to be written down.
                    row = self._row(block)
                    self._touched.discard(row)
                    if written.last_use_ns > block.last_use_ns:
                        self.table.use([row], written.last_use_ns)
                        used.append(written)
            elif block is not None:
                self.remove(block)
                self.namespaces[block.namespace].changed_ns = now_ns
        _sort_by_use(used)
        self.policy.used(list(map(self._row, used)))
        # Last: the key of a new block may have been another's, which is removed by now.
        _sort_by_use(new)
        self.insert(new)

    def add_namespace(self, namespace: KVNamespace) -> None:
        self.namespaces[namespace.inode] = namespace
        self.by_path[namespace.path] = namespace
        if namespace.quota:
            self.by_quota.setdefault(namespace.quota, {})[namespace.inode] = namespace

    def remove_namespace(self, namespace: KVNamespace) -> None:
        del self.namespaces[namespace.inode]
        del self.by_path[namespace.path]
        self._leave_quota(namespace)

    def set_quota(self, namespace: KVNamespace, quota: int) -> None:
        if quota != namespace.quota:
            self._leave_quota(namespace)
            namespace.quota = quota
            if quota:
                self.by_quota.setdefault(quota, {})[namespace.inode] = namespace

    def _leave_quota(self, namespace: KVNamespace) -> None:
        if namespace.quota:
            own = self.by_quota[namespace.quota]
            del own[namespace.inode]
            if not own:
                del self.by_quota[namespace.quota]

    def bytes_of_quota(self, quota: int) -> int:
        return sum(namespace.block_bytes for namespace in self.by_quota.get(quota, {}).values())

    def victims_of_quota(self, quota: int, bytes_needed: int) -> list[Block]:
        """The blocks that the policy gives up first of those that count for the quota."""
        rows = self.table.rows_of(list(self.by_quota.get(quota, {})))
        return [self.table.block(row) for row in self.policy.victims_among(rows, bytes_needed)]

    # --- changing

    def insert(self, blocks: Sequence[Block], values: Sequence[bytes] = ()) -> None:
        """New blocks, in the order of their prefix. Their namespace exists, their keys do not.
        ``values`` are their records, if the caller has made them already."""
        if not blocks:
            return
        rows = self.table.add(blocks, values or [block.record() for block in blocks])
        for number, part in itertools.groupby(zip(blocks, rows, strict=True), _namespace_of):
            own, own_rows = zip(*part, strict=True)
            self._enter(self.namespaces[number], own, own_rows)
        self.policy.inserted(np.array([rows, [block.size for block in blocks]]).T)

    def _enter(self, namespace: KVNamespace, blocks: Sequence[Block], rows: Sequence[int]) -> None:
        keys = [block.key for block in blocks]
        namespace.rows.update(zip(keys, rows, strict=True))
        namespace.listing.stored(keys)
        self._count(namespace, len(blocks), sum(map(_size_of, blocks)))
        newest = max(block.created_ns for block in blocks)
        namespace.changed_ns = max(namespace.changed_ns, newest)

    def remove(self, block: Block) -> None:
        namespace = self.namespaces[block.namespace]
        row = self._row(block)
        # Those that nobody asked for are not there, and a damaged store may have two of one key.
        if namespace.rows.get(block.key) == row:
            del namespace.rows[block.key]
        self._count(namespace, -1, -block.size)
        self.table.remove(row, block.inode)
        self.policy.removed(row)

    def set_chain(self, inode: int, chain: int) -> None:
        """Of a block that is here; no use of it."""
        row = self.table.inodes.get(inode)
        assert row is not None
        self.table.set_chain(row, chain)

    # --- asking

    def prefix(self, namespace: KVNamespace, keys: bytes) -> list[int]:
        """Rows of the stored blocks of ``keys`` up to the first that is missing."""
        found: list[Any] = []
        size = LOOK_UP_KEYS * BLOCK_KEY_BYTES
        for start in range(0, len(keys), size):
            rows = namespace.find(split_keys(keys[start : start + size]))
            if None in rows:
                found += rows[: rows.index(None)]
                break
            found += rows
        return found

    def use(self, blocks: Sequence[Block], now_ns: int) -> None:
        """Records one use of each, in the order of their prefix."""
        self.use_rows(list(map(self._row, blocks)), now_ns)

    def use_rows(self, rows: Sequence[int], now_ns: int) -> None:
        if rows:
            self.table.use(rows, now_ns)
            self.policy.used(rows)
            self._touched.update(rows)

    def take_touched(self, count_max: int) -> list[Block]:
        """Blocks whose last use is newer than the store's, at most ``count_max``."""
        count = min(count_max, len(self._touched))
        rows = (self._touched.pop() for _ in range(count))
        # A row may have gone meanwhile, even to another block: to write that one again is harmless.
        return [self.table.block(row) for row in rows if not self.table.is_free(row)]

    @property
    def touched_count(self) -> int:
        return len(self._touched)

    def touch(self, blocks: Iterable[Block]) -> None:
        """Takes ``take_touched`` back."""
        rows = (self.table.inodes.get(block.inode) for block in blocks)
        self._touched.update(row for row in rows if row is not None)

    def _row(self, block: Block) -> int:
        """Of a block that is here."""
        row = self.table.inodes.get(block.inode)
        assert row is not None
        return row


def split_keys(keys: bytes) -> list[bytes]:
    """A third of the time that slicing takes, from a dozen keys on."""
    found: list[bytes] = np.frombuffer(keys, KEY).tolist()
    return found


KEY = np.dtype((np.void, BLOCK_KEY_BYTES))


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Loading makes millions of tuples and no cycles; looking for some took half of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_inode_of = operator.attrgetter("inode")
_last_use_of = operator.attrgetter("last_use_ns")
_size_of = operator.attrgetter("size")


def _namespace_of(pair: tuple[Block, int]) -> int:
    return pair[0].namespace


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
