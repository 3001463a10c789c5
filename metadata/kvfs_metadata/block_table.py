"""Committed blocks in memory, as rows of a table.

An object a block, with its entries in dicts, took 420 to 520 bytes and 2 us to load. A row takes
120 bytes and 0.4 us; one that was stored, or asked for, since the start has its key in a dict too,
which makes 260. Objects are made of rows when somebody asks for one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvfs_base.types import BlockInfo
from kvfs_metadata import records
from kvfs_metadata.engines.engine import Item

ROW = np.dtype(
    [("inode", "<u8"), *((n, records.BLOCK_VALUE[n]) for n in records.BLOCK_VALUE.fields or ())]
)
"""A row is the inode and the record, byte by byte. A free row is all zeros: there is no inode 0."""

HASH_FACTORS = np.array(
    [
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
    ],
    np.uint64,
)
"""Odd, otherwise arbitrary: keys are hashes as a rule, but nobody checks. Blocks with equal hashes
are told apart by their keys."""

LAST_HASH = np.full(1, 2**64 - 1, np.uint64)
KEY_WORDS = 4

ROWS_MIN = 1 << 20
"""80 MB of addresses; memory only as rows are used. So a million blocks are never copied."""

PAGE_BITS = 5
PAGE_INODES = 1 << PAGE_BITS


class Block(msgspec.Struct, frozen=True, gc=False):
    """A block as it was when it was asked for."""

    inode: int
    namespace: int
    key: bytes
    size: int
    crc32c: int
    chain: int
    created_ns: int
    last_use_ns: int

    def record(self) -> bytes:
        """Its value in the store."""
        return records.pack_block(
            (
                self.namespace,
                self.size,
                self.crc32c,
                self.chain,
                self.created_ns,
                self.last_use_ns,
                self.key,
            )
        )


class InodeRows:
    """Rows by inode number.

    A batch has its inodes in a row, so PAGE_INODES of them share an array: 8 bytes a block, where
    an entry of a dict takes 75. A block whose neighbours are files, or gone, costs 250.
    """

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self._count = 0

    def get(self, inode: int) -> int | None:
        page = self._pages.get(inode >> PAGE_BITS)
        if page is None:
            return None
        row = page[inode % PAGE_INODES]
        return None if row < 0 else row

    def __contains__(self, inode: int) -> bool:
        return self.get(inode) is not None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for number, page in self._pages.items():
            first = number << PAGE_BITS
            yield from (first + i for i, row in enumerate(page) if row >= 0)

    def put(self, inode: int, row: int) -> None:
        """A new inode."""
        page = self._pages.get(inode >> PAGE_BITS)
        if page is None:
            page = self._pages[inode >> PAGE_BITS] = array("i", [-1]) * PAGE_INODES
        page[inode % PAGE_INODES] = row
        self._count += 1

    def drop(self, inode: int) -> None:
        """A known inode."""
        page = self._pages[inode >> PAGE_BITS]
        page[inode % PAGE_INODES] = -1
        self._count -= 1
        if page.count(-1) == PAGE_INODES:
            del self._pages[inode >> PAGE_BITS]

    def load(self, inodes: NDArray[np.uint64]) -> None:
        """Into an empty map, in ascending order: row ``i`` has ``inodes[i]``."""
        if not len(inodes):
            return
        numbers = inodes >> np.uint64(PAGE_BITS)
        first = np.concatenate(([True], numbers[1:] != numbers[:-1]))
        rows = np.full((np.count_nonzero(first), PAGE_INODES), -1, np.int32)
        rows[np.cumsum(first) - 1, inodes % np.uint64(PAGE_INODES)] = np.arange(len(inodes))
        data, size = rows.tobytes(), rows.itemsize * PAGE_INODES
        for i, number in enumerate(numbers[first].tolist()):
            self._pages[number] = array("i", data[i * size : (i + 1) * size])
        self._count = len(inodes)


class LoadedKeys:
    """Rows of the blocks that were there at the start, by namespace and key: sorted hashes, because
    sorting takes a third of the time that filling a dict takes, and a tenth of the memory.

    Nothing is ever added or taken away. Whoever finds a row looks whether it still is that block's.
    """

    def __init__(self) -> None:
        self._rows = np.zeros(0, np.int32)
        self._hashes = LAST_HASH
        """One more than there are rows, so that there is one at every place that is looked at."""

    def load(self, rows: NDArray[Any]) -> None:
        hashes = _hashes(_words(rows["key"]), rows["namespace"])
        self._rows = np.argsort(hashes).astype(np.int32)
        self._hashes = np.concatenate((hashes[self._rows], LAST_HASH))

    def find(self, rows: NDArray[Any], namespace: int, keys: bytes) -> list[int]:
        """The row of each of ``keys``, or -1; empty if there is none of them."""
        words = np.frombuffer(keys, np.uint64).reshape(-1, KEY_WORDS)
        hashes = _hashes(words, np.array([namespace], np.uint64))
        places = np.searchsorted(self._hashes, hashes)
        left = np.flatnonzero(self._hashes[places] == hashes)
        if not len(left):
            return []
        found = np.full(len(words), -1)
        while len(left):
            left = left[places[left] < len(self._rows)]
            left = left[self._hashes[places[left]] == hashes[left]]
            chosen = self._rows[places[left]]
            blocks = rows[chosen]
            same = (_words(blocks["key"]) == words[left]).all(axis=1)
            same &= blocks["namespace"] == namespace
            found[left[same]] = chosen[same]
            # What has the same hash stands next to it.
            left = left[~same]
            places[left] += 1
        return found.tolist()


def _words(keys: NDArray[Any]) -> NDArray[np.uint64]:
    """Keys as rows of numbers."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, KEY_WORDS)


def _hashes(words: NDArray[np.uint64], namespaces: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = words @ HASH_FACTORS[:-1] + namespaces * HASH_FACTORS[-1]
    return mixed


class BlockTable:
    """All committed blocks. A row stays a block's until it is removed; then another gets it, so the
    table is as large as it ever had to be."""

    def __init__(self) -> None:
        self._rows = np.zeros(ROWS_MIN, ROW)
        self._end = 0
        self._free: list[int] = []
        self.inodes = InodeRows()
        self._loaded = LoadedKeys()

    def __len__(self) -> int:
        return len(self.inodes)

    def load(self, page: Sequence[Item]) -> NDArray[Any]:
        """The new rows of blocks' records, which come in the order of their inodes; ``loaded`` must
        follow the last."""
        keys, values = zip(*page, strict=True)
        first = self._end
        self._extend(len(page))
        rows = self._rows[first : self._end]
        rows["inode"] = np.frombuffer(b"".join(keys), records.BLOCK_KEY)["inode"]
        _bytes_of(rows)[:, 8:] = np.frombuffer(b"".join(values), np.uint8).reshape(len(page), -1)
        return rows

    def loaded(self) -> NDArray[Any]:
        """Every row, in the order of the inodes."""
        rows = self._rows[: self._end]
        self.inodes.load(rows["inode"])
        self._loaded.load(rows)
        return rows

    def _extend(self, count: int) -> None:
        self._end += count
        if self._end > len(self._rows):
            rows = np.zeros(max(2 * len(self._rows), self._end), ROW)
            _bytes_of(rows)[: len(self._rows)] = _bytes_of(self._rows)
            self._rows = rows

    def add(self, blocks: Sequence[Block], values: Sequence[bytes]) -> list[int]:
        """Their rows. ``values`` are their records."""
        reused = min(len(blocks), len(self._free))
        rows = self._free[len(self._free) - reused :]
        del self._free[len(self._free) - reused :]
        first = self._end
        self._extend(len(blocks) - reused)
        rows += range(first, self._end)
        packed = []
        put = self.inodes.put
        for block, row, value in zip(blocks, rows, values, strict=True):
            packed.append(block.inode.to_bytes(8, "little") + value)
            put(block.inode, row)
        _bytes_of(self._rows)[rows] = _bytes_of(np.frombuffer(b"".join(packed), ROW))
        return rows

    def remove(self, row: int, inode: int) -> None:
        self._rows[row] = FREE
        self.inodes.drop(inode)
        self._free.append(row)

    def is_free(self, row: int) -> bool:
        return not self._rows["inode"].item(row)

    def block(self, row: int) -> Block:
        fields: Any = self._rows.item(row)
        inode, namespace, size, crc32c, chain, created_ns, last_use_ns, key = fields
        return Block(inode, namespace, key, size, crc32c, chain, created_ns, last_use_ns)

    def infos(self, rows: Sequence[int]) -> list[BlockInfo]:
        chosen = self._rows[list(rows)]
        columns = (chosen[name].tolist() for name in ("inode", "size", "crc32c", "chain"))
        return list(map(BlockInfo, *columns))

    def use(self, rows: Sequence[int], now_ns: int) -> None:
        self._rows["last_use_ns"][list(rows)] = now_ns

    def set_chain(self, row: int, chain: int) -> None:
        self._rows["chain"][row] = chain

    def newest_on(self, chain: int, count: int) -> list[Block]:
        """At most so many blocks of a chain, the last used first. Some 10 ms for a million."""
        rows = self._rows[: self._end]
        found = np.flatnonzero(rows["chain"] == chain)
        used = rows["last_use_ns"][found]
        if len(found) > count:
            newest = np.argpartition(used, len(found) - count)[len(found) - count :]
            found, used = found[newest], used[newest]
        order = np.argsort(used, kind="stable")[::-1]
        return [self.block(row) for row in found[order].tolist()]

    def find_loaded(self, namespace: int, names: Sequence[bytes]) -> list[int]:
        """The row of each of ``names`` among those that were there at the start, or -1; empty if
        there is none of them."""
        return self._loaded.find(self._rows, namespace, b"".join(names))

    def rows_of(self, namespaces: Sequence[int]) -> NDArray[Any]:
        """Of all blocks of these namespaces. 15 ms in a million blocks."""
        return np.flatnonzero(np.isin(self._rows["namespace"][: self._end], namespaces))

    def keys_of(self, namespace: int) -> list[bytes]:
        """All keys of a namespace, in no order."""
        rows = self._rows[: self._end]
        keys: list[bytes] = rows["key"][rows["namespace"] == namespace].tolist()
        return keys


FREE = np.zeros((), ROW)


def _bytes_of(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Copied as they are they take a quarter of the time that numpy takes field by field."""
    return rows.view(np.uint8).reshape(len(rows), -1)


class BlocksByInode:
    """Each block is made when it is asked for."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table

    def get(self, inode: int) -> Block | None:
        row = self._table.inodes.get(inode)
        return None if row is None else self._table.block(row)

    def __getitem__(self, inode: int) -> Block:
        block = self.get(inode)
        if block is None:
            raise KeyError(inode)
        return block

    def __contains__(self, inode: int) -> bool:
        return self._table.inodes.get(inode) is not None

    def __len__(self) -> int:
        return len(self._table.inodes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._table.inodes)
