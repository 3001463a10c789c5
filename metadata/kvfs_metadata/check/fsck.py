"""The check of the store itself: entries, inodes, links, blocks, counters.

``MetadataCheck`` reads records page by page, of whatever kinds it knows (others are not its), and
yields what does not fit together. It needs no consistent state: on a store that is being changed
what it yields are *candidates*, and whether they are true is decided where they would be repaired
(``check.repair``), in one transaction. For that every candidate names what the check relied
on. The important part is how names are counted without holding the store still:

* Inodes are read first, with their ctime. Entries are read after that. Whoever gives an inode a
  name, takes one or moves it, and whoever changes the entries of a directory, sets that inode's
  ctime in the same transaction. So if the ctime is still the same in the transaction that decides,
  all its entries stood still from before the first of them was read until now, and the count made
  over many pages is the count of one state.
* What is looked up by its key (the inode of an entry, the namespace of a block) is simply looked up
  again.
* Inode numbers are never used again, so a block or inode that is seen twice was there all the time.

Memory: 25 bytes an inode, 20 more a directory, 8 a block, in flat arrays; nothing is held of
entries and attributes. A million inodes cost 25 MB.
"""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np

from kvfs_base.limits import BATCH_BLOCKS_MAX
from kvfs_base.types import KV_DIRECTORY, ROOT_INODE
from kvfs_metadata import records
from kvfs_metadata.check import fixes as f
from kvfs_metadata.check.findings import DROPPABLE, Finding, Kind, record_problem
from kvfs_metadata.check.quota_usage import Charges, decode_quotas
from kvfs_metadata.engines.engine import Item, prefix_end
from kvfs_metadata.inodes import KV_INODE, charged_bytes
from kvfs_metadata.limits import SCAN_RECORDS_MAX
from kvfs_metadata.records import BlockValue, InodeRecord, QuotaRecord, Usage

DIRECTORY = 1
NAMESPACE = 2
ORPHAN = 4
DAMAGED = 8


class RecordReader(Protocol):
    """The part of KVRead that a check needs; each call may see a later state."""

    def range(self, start: bytes, end: bytes, limit: int) -> list[Item]: ...


def read_all(reader: RecordReader, prefix: bytes, start: bytes = b"") -> Iterator[Item]:
    """Every record whose key starts with ``prefix``, from ``start`` on."""
    start, end = max(start, prefix), prefix_end(prefix)
    while items := reader.range(start, end, SCAN_RECORDS_MAX):
        yield from items
        start = items[-1][0] + b"\x00"


def read_sound(reader: RecordReader, prefix: bytes) -> Iterator[Item]:
    """As ``read_all``, without records that cannot be decoded."""
    return (item for item in read_all(reader, prefix) if record_problem(*item) is None)


class _Inodes:
    """What the check keeps of every inode, in the order of their numbers."""

    def __init__(self) -> None:
        self.numbers = array("Q")
        self.ctimes = array("q")
        self.nlinks = array("I")
        self.flags = array("B")
        self.entries = array("I")

    def add(self, number: int, record: InodeRecord | None) -> None:
        """``record`` is None where it cannot be decoded."""
        self.numbers.append(number)
        self.entries.append(0)
        if record is None:
            self.ctimes.append(0)
            self.nlinks.append(0)
            self.flags.append(DAMAGED)
            return
        self.ctimes.append(record.ctime_ns)
        self.nlinks.append(record.nlink)
        self.flags.append(
            (DIRECTORY if record.is_dir else 0) | (NAMESPACE if record.is_namespace else 0)
        )

    def find(self, number: int) -> int | None:
        """Its place."""
        place = bisect_left(self.numbers, number)
        if place < len(self.numbers) and self.numbers[place] == number:
            return place
        return None

    def has(self, number: int, flag: int) -> bool:
        place = self.find(number)
        return place is not None and bool(self.flags[place] & flag)


class _Directories:
    """``claimed`` is the parent that the inode names, ``found`` the one whose entry leads there (0:
    none)."""

    def __init__(self) -> None:
        self.numbers = array("Q")
        self.claimed = array("Q")
        self.found = array("Q")
        self.children = array("I")

    def add(self, number: int, claimed: int) -> None:
        self.numbers.append(number)
        self.claimed.append(claimed)
        self.found.append(0)
        self.children.append(0)

    def find(self, number: int) -> int | None:
        place = bisect_left(self.numbers, number)
        if place < len(self.numbers) and self.numbers[place] == number:
            return place
        return None

    def count_child(self, parent: int, by: int) -> None:
        place = self.find(parent)
        if place is not None:
            self.children[place] += by


class MetadataCheck:
    """One run. ``progress`` hears what is being read and how much of it was."""

    def __init__(
        self, reader: RecordReader, progress: Callable[[str, int], None] | None = None
    ) -> None:
        self._reader = reader
        self._progress = progress or (lambda stage, count: None)
        self._inodes = _Inodes()
        self._directories = _Directories()
        self._chains: set[int] = set()
        self._namespaces: set[int] = set()
        self._last_number = 0
        self.inode_count = self.entry_count = self.block_count = 0

    def run(self) -> Iterator[Finding]:
        yield from self._read_inodes()
        yield from self._read_namespaces()
        yield from self._read_orphans()
        yield from self._read_entries()
        yield from self._check_links()
        yield from self._check_reachable()
        yield from self._read_xattrs()
        yield from self._read_chains()
        yield from self._read_blocks()
        yield from self._read_others()
        yield from self._check_counter()

    def _sound(self, prefix: bytes, stage: str, bad: list[Finding]) -> Iterator[Item]:
        """The records of a kind; those that cannot be decoded go to ``bad``."""
        count = 0
        for key, value in read_all(self._reader, prefix):
            count += 1
            if count % SCAN_RECORDS_MAX == 0:
                self._progress(stage, count)
            problem = record_problem(key, value)
            if problem is None:
                yield key, value
                continue
            fix = f.DropDamaged(key) if prefix in DROPPABLE else None
            number = records.number_at(key) if len(key) >= 12 else 0
            detail = f"{prefix.decode()} record {key[4:].hex()}: {problem}"
            bad.append(Finding(kind=Kind.RECORD_DAMAGED, inode=number, detail=detail, fix=fix))
        self._progress(stage, count)

    # --- inodes

    def _read_inodes(self) -> Iterator[Finding]:
        before, quotas, charges = self._usage(), self._quotas([]), Charges()
        inodes = file_bytes = 0
        for key, value in read_all(self._reader, records.INODE):
            number = records.number_at(key)
            self._last_number = max(self._last_number, number)
            inodes += 1
            if inodes % SCAN_RECORDS_MAX == 0:
                self._progress("inodes", inodes)
            problem = record_problem(key, value)
            if problem is not None:
                self._inodes.add(number, None)
                yield Finding(kind=Kind.RECORD_DAMAGED, inode=number, detail=f"INOD: {problem}")
                continue
            record = records.decode_inode(value)
            file_bytes += charged_bytes(record)
            charges.add(record)
            self._inodes.add(number, record)
            if record.is_dir:
                self._directories.add(number, record.parent)
        self.inode_count = inodes
        counted = Usage(inodes, file_bytes)
        # If something changed meanwhile, the sum is of no state at all.
        if before == self._usage() != counted:
            detail = f"{_totals(before)} recorded, {_totals(counted)} counted"
            yield Finding(kind=Kind.USAGE_WRONG, inode=0, detail=detail, fix=f.SetUsage())
        bad: list[Finding] = []
        is_directory = partial(self._inodes.has, flag=DIRECTORY)
        yield from charges.compare(quotas, self._quotas(bad), is_directory)
        yield from bad

    def _quotas(self, bad: list[Finding]) -> dict[int, QuotaRecord]:
        return decode_quotas(self._sound(records.QUOTA, "quotas", bad))

    def _usage(self) -> Usage:
        for key, value in self._reader.range(records.USAGE_KEY, records.USAGE_KEY + b"\x00", 1):
            if key == records.USAGE_KEY and len(value) == 16:
                return records.unpack_usage(value)
        return Usage(0, 0)

    def _read_orphans(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        for key, _ in self._sound(records.ORPHAN, "unlinked files", bad):
            number = records.number_at(key)
            place = self._inodes.find(number)
            if place is None:
                yield Finding(
                    kind=Kind.ORPHAN_STRAY,
                    inode=number,
                    detail="noted for deletion, and does not exist",
                    fix=f.DropOrphan(number),
                )
            else:
                self._inodes.flags[place] |= ORPHAN
        yield from bad

    # --- entries

    def _read_entries(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        for key, value in self._sound(records.ENTRY, "entries", bad):
            self.entry_count += 1
            parent, name = records.number_at(key), key[12:]
            number = int.from_bytes(value, "big")
            plain = self._is_plain_directory(parent)
            if not plain or leads_nowhere(parent, name, number):
                where = "" if plain else ", which is no plain directory"
                yield Finding(
                    kind=Kind.ENTRY_MISPLACED,
                    inode=number,
                    detail=f"entry {_show(name)} in {parent}{where}, of inode {number}",
                    fix=f.DropEntry(parent, name, number),
                )
                continue
            place = self._inodes.find(number)
            if place is None and number == KV_INODE:
                self._directories.count_child(parent, 1)  # /kv will be made again
            elif place is None:
                yield Finding(
                    kind=Kind.ENTRY_DANGLING,
                    inode=number,
                    detail=f"entry {_show(name)} in {parent} leads to no inode",
                    fix=f.DropEntry(parent, name, number),
                )
            elif self._inodes.flags[place] & DIRECTORY:
                yield from self._directory_entry(place, parent, name)
            else:
                self._inodes.entries[place] += 1
        yield from bad

    def _is_plain_directory(self, number: int) -> bool:
        place = self._inodes.find(number)
        if place is None:
            return number in (ROOT_INODE, KV_INODE)  # that it is missing is a finding of its own
        flags = self._inodes.flags[place]
        return bool(flags & DAMAGED) or bool(flags & DIRECTORY and number not in self._namespaces)

    def _directory_entry(self, place: int, parent: int, name: bytes) -> Iterator[Finding]:
        number = self._inodes.numbers[place]
        own = self._directories.find(number)
        assert own is not None
        first = self._directories.found[own]
        if not first:
            self._inodes.entries[place] = 1
            self._directories.found[own] = parent
            self._directories.count_child(parent, 1)
            return
        # A directory has one entry: the one where it says that it lies, if there is such a one.
        if parent == self._directories.claimed[own] != first:
            self._directories.found[own] = parent
            self._directories.count_child(first, -1)
            self._directories.count_child(parent, 1)
            parent, name = first, self._name_in(first, number)
        yield Finding(
            kind=Kind.DIRECTORY_TWICE,
            inode=number,
            detail=f"a second entry {_show(name)} in {parent}",
            fix=f.DropEntry(parent, name, number, self._inodes.ctimes[place]),
        )

    def _name_in(self, parent: int, number: int) -> bytes:
        """The first name of an inode in a directory, empty if it is gone by now."""
        value = records.u64(number)
        for key, found in read_all(self._reader, records.entry_key(parent, b"")):
            if found == value:
                return key[12:]
        return b""

    # --- links

    def _check_links(self) -> Iterator[Finding]:
        inodes = self._inodes
        for root in (KV_INODE, ROOT_INODE):  # the one counts the other
            if inodes.find(root) is None:
                detail = "/ has no inode" if root == ROOT_INODE else "/kv has no inode"
                yield Finding(
                    kind=Kind.ROOT_MISSING, inode=root, detail=detail, fix=f.MakeRoot(root)
                )
        for place, number in enumerate(inodes.numbers):
            flags = inodes.flags[place]
            if flags & DIRECTORY:
                yield from self._check_directory(place, number)
            elif not flags & DAMAGED:
                yield from self._check_file(place, number)

    def _check_file(self, place: int, number: int) -> Iterator[Finding]:
        entries, nlink = self._inodes.entries[place], self._inodes.nlinks[place]
        ctime, noted = self._inodes.ctimes[place], self._inodes.flags[place] & ORPHAN
        if entries and noted:
            yield Finding(
                kind=Kind.ORPHAN_LINKED,
                inode=number,
                detail=f"noted for deletion, and has {entries} names",
                fix=f.DropOrphan(number, ctime),
            )
        if entries or noted:
            yield from self._compare_links(place, entries)
        elif nlink:
            yield Finding(
                kind=Kind.INODE_LOST,
                inode=number,
                detail="has no name",
                fix=f.LinkLost(number, ctime),
            )
        else:
            yield Finding(
                kind=Kind.INODE_UNLINKED,
                inode=number,
                detail="has no name, and is not noted for deletion",
                fix=f.QueueUnlinked(number, ctime),
            )

    def _check_directory(self, place: int, number: int) -> Iterator[Finding]:
        own = self._directories.find(number)
        assert own is not None
        found = ROOT_INODE if number == ROOT_INODE else self._directories.found[own]
        yield from self._compare_links(place, 2 + self._directories.children[own])
        if not found:
            yield Finding(
                kind=Kind.INODE_LOST,
                inode=number,
                detail="a directory that has no name",
                fix=f.LinkLost(number, self._inodes.ctimes[place]),
            )
        elif found != self._directories.claimed[own]:
            yield Finding(
                kind=Kind.PARENT_WRONG,
                inode=number,
                detail=f"lies in {found}, says {self._directories.claimed[own]}",
                fix=f.SetParent(
                    number,
                    found,
                    b"" if number == ROOT_INODE else self._name_in(found, number),
                ),
            )

    def _compare_links(self, place: int, nlink: int) -> Iterator[Finding]:
        inodes = self._inodes
        if inodes.nlinks[place] != nlink:
            yield Finding(
                kind=Kind.LINKS_WRONG,
                inode=inodes.numbers[place],
                detail=f"{inodes.nlinks[place]} links recorded, {nlink} found",
                fix=f.SetLinks(
                    inodes.numbers[place], inodes.ctimes[place], inodes.nlinks[place], nlink
                ),
            )

    def _check_reachable(self) -> Iterator[Finding]:
        """Directories that lie in each other. Each step up is taken once."""
        directories = self._directories
        state = bytearray(len(directories.numbers))  # 1: on the way up now, 2: done
        for start in range(len(directories.numbers)):
            way: list[int] = []
            place: int | None = start
            while place is not None and not state[place]:
                state[place] = 1
                way.append(place)
                number = directories.numbers[place]
                place = None if number == ROOT_INODE else directories.find(directories.found[place])
            if place is not None and state[place] == 1:
                yield self._detached(place)
            for step in way:
                state[step] = 2

    def _detached(self, place: int) -> Finding:
        number, parent = self._directories.numbers[place], self._directories.found[place]
        own = self._inodes.find(number)
        assert own is not None
        return Finding(
            kind=Kind.DIRECTORY_DETACHED,
            inode=number,
            detail=f"lies in {parent}, which lies in it",
            fix=f.LinkLost(number, self._inodes.ctimes[own], parent, self._name_in(parent, number)),
        )

    # --- what hangs on inodes

    def _read_xattrs(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        last = -1
        for key, _ in self._sound(records.XATTR, "attributes", bad):
            number = records.number_at(key)
            if number != last and self._inodes.find(number) is None:
                yield Finding(
                    kind=Kind.XATTR_STRAY,
                    inode=number,
                    detail="extended attributes of an inode that does not exist",
                    fix=f.DropXattrs(number),
                )
            last = number
        yield from bad

    def _read_chains(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        named = {
            int.from_bytes(key[4:], "big"): set(records.decode_chain(value).everybody)
            for key, value in self._sound(records.CHAIN, "chains", bad)
        }
        self._chains.update(named)
        # Read later: a target is recorded together with its chain, and stays.
        targets = {
            records.decode_target(value).target_id
            for _, value in self._sound(records.TARGET, "targets", bad)
        }
        for chain, members in named.items():
            missing = sorted(members - targets)
            if missing:
                detail = f"chain {chain} names targets that do not exist: {missing}"
                yield Finding(kind=Kind.CHAIN_BROKEN, inode=0, detail=detail)
        yield from bad

    def _read_namespaces(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        for key, _ in self._sound(records.NAMESPACE, "namespaces", bad):
            number = records.number_at(key)
            if self._inodes.has(number, NAMESPACE):
                self._namespaces.add(number)
                continue
            yield Finding(
                kind=Kind.NAMESPACE_STRAY,
                inode=number,
                detail="a namespace without a directory",
                fix=f.DropNamespace(number),
            )
        yield from bad
        for place, number in enumerate(self._inodes.numbers):
            if self._inodes.flags[place] & NAMESPACE and number not in self._namespaces:
                yield Finding(
                    kind=Kind.NAMESPACE_UNNAMED,
                    inode=number,
                    detail="a directory of blocks without a layout",
                    fix=f.ClearNamespace(number, self._inodes.ctimes[place]),
                )

    # --- blocks

    def _read_blocks(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        hashes = array("Q")
        for key, value in self._sound(records.BLOCK, "blocks", bad):
            self.block_count += 1
            number, block = records.number_at(key), records.unpack_block(value)
            self._last_number = max(self._last_number, number)
            if block.namespace not in self._namespaces:
                yield Finding(
                    kind=Kind.BLOCK_STRAY,
                    inode=number,
                    detail=f"a block of namespace {block.namespace}, which does not exist",
                    fix=f.DropBlock(number, "namespace"),
                )
            elif block.chain not in self._chains:
                yield Finding(
                    kind=Kind.CHAIN_MISSING,
                    inode=number,
                    detail=f"a block on chain {block.chain}, which does not exist",
                    fix=f.DropBlock(number, "chain"),
                )
            else:
                hashes.append(_block_hash(block))
        yield from bad
        yield from self._check_duplicates(hashes)

    def _check_duplicates(self, hashes: array[int]) -> Iterator[Finding]:
        """Looks closer at blocks of which another has the same hash."""
        ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64))
        suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not suspects:
            return
        first: dict[tuple[int, bytes], int] = {}
        for key, value in read_sound(self._reader, records.BLOCK):
            block = records.unpack_block(value)
            if _block_hash(block) not in suspects or block.chain not in self._chains:
                continue
            number = records.number_at(key)
            kept = first.setdefault((block.namespace, block.key), number)
            if kept != number:
                yield Finding(
                    kind=Kind.BLOCK_DUPLICATE,
                    inode=number,
                    detail=f"block {kept} has the same key",
                    fix=f.DropBlock(number, "duplicate", kept),
                )

    # --- the rest

    def _read_others(self) -> Iterator[Finding]:
        bad: list[Finding] = []
        for _, value in self._sound(records.PREPARED, "batches", bad):
            batch = records.decode_prepared(value)
            self._last_number = max(self._last_number, batch.first_inode + len(batch.sizes) - 1)
        for kind, name in ((records.REMOVAL, "removals"), (records.MOVE, "moves")):
            for _ in self._sound(kind, name, bad):
                pass
        yield from bad

    def _check_counter(self) -> Iterator[Finding]:
        """Read last: a counter only grows, so what was given before is below it."""
        key = records.counter_key(b"inode")
        stored = 0
        for found, value in self._reader.range(key, key + b"\x00", 1):
            stored = int.from_bytes(value, "big") if found == key else 0
        if self._last_number >= max(stored, 16):
            yield Finding(
                kind=Kind.COUNTER_LOW,
                inode=self._last_number,
                detail=f"is in use, and the next number would be {stored}",
                fix=f.RaiseCounter(self._last_number),
            )


def _block_hash(block: BlockValue) -> int:
    # Python salts its hashes in every process: nobody can choose keys that collide.
    return hash((block.namespace, block.key)) & 0xFFFF_FFFF_FFFF_FFFF


def _totals(usage: Usage) -> str:
    return f"{usage.inodes} inodes with {usage.file_bytes} bytes"


def _show(name: bytes) -> str:
    return repr(name.decode(errors="backslashreplace"))


class Batches:
    """Inode numbers that belong to blocks which are being written."""

    def __init__(self, reader: RecordReader) -> None:
        self._firsts = array("Q")
        self._ends = array("Q")
        found = sorted(
            (batch.first_inode, batch.first_inode + min(len(batch.sizes), BATCH_BLOCKS_MAX))
            for batch in (
                records.decode_prepared(value) for _, value in read_sound(reader, records.PREPARED)
            )
        )
        for first, end in found:
            self._firsts.append(first)
            self._ends.append(end)

    def __contains__(self, inode: int) -> bool:
        place = bisect_left(self._firsts, inode + 1) - 1
        return place >= 0 and inode < self._ends[place]


def leads_nowhere(parent: int, name: bytes, inode: int) -> bool:
    """``/`` has no entry, and ``/kv`` its own only."""
    if inode == KV_INODE:
        return (parent, name) != (ROOT_INODE, KV_DIRECTORY)
    return inode == ROOT_INODE


def is_file(record: InodeRecord) -> bool:
    return stat.S_ISREG(record.mode)


__all__ = [
    "Batches",
    "MetadataCheck",
    "RecordReader",
    "is_file",
    "leads_nowhere",
    "read_all",
    "read_sound",
]
