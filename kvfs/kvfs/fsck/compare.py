"""What the metadata says of chunks, against the chunks that targets have.

Both sides are streams in the order of inode numbers, blocks and files on the one, the sorted
listings of all targets on the other, and are merged: memory is a page of each, and what one inode
has. Like the check of the store, this reads while others write and yields candidates; ``run``
says what makes a finding of them.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvfs_base.types import Layout
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.messages import ListedChunk
from kvfs_metadata import records
from kvfs_metadata.check import fixes as f
from kvfs_metadata.check.findings import Finding, Kind, Place
from kvfs_metadata.check.fsck import Batches, MetadataCheck, RecordReader, is_file, read_sound
from kvfs_metadata.inodes import chunks_to_remove
from kvfs_metadata.records import BlockValue, ChainRecord, InodeRecord

PROGRESS_INODES = 1024


class Located(NamedTuple):
    """A chunk where it was found."""

    target_id: int
    chunk: ListedChunk


class _Item(NamedTuple):
    inode: int
    reference: BlockValue | InodeRecord | None
    found: Located | None


class QueuedRemovals:
    """Chunks that are on their way out: 16 bytes and the numbers for each entry of the queues."""

    def __init__(self, reader: RecordReader) -> None:
        targets, inodes, firsts, ends = array("Q"), array("Q"), array("Q"), array("Q")
        for key, value in read_sound(reader, records.REMOVAL):
            removal = records.unpack_removal(value)
            targets.append(int.from_bytes(key[4:8], "big"))
            inodes.append(removal.inode)
            firsts.append(removal.first)
            ends.append(removal.end)
        order = np.argsort(np.frombuffer(inodes, dtype=np.uint64), kind="stable")
        self._targets, self._inodes, self._firsts, self._ends = (
            np.frombuffer(values, dtype=np.uint64)[order]
            for values in (targets, inodes, firsts, ends)
        )

    def covers(self, target_id: int, inode: int, number: int) -> bool:
        wanted = np.uint64(inode)
        start = int(np.searchsorted(self._inodes, wanted, "left"))
        end = int(np.searchsorted(self._inodes, wanted, "right"))
        return any(
            self._targets[place] == target_id and self._firsts[place] <= number < self._ends[place]
            for place in range(start, end)
        )


def block_problem(block: BlockValue, chunk: ListedChunk) -> str | None:
    """Why a chunk is not the block's, or None."""
    info = chunk.info
    if info is None:
        return chunk.problem
    if not info.is_sealed:
        return "open for writing"
    if info.key != block.key:
        return "another key"
    if info.length != block.size:
        return f"{info.length} bytes, {block.size} recorded"
    if info.crc32c != block.crc32c:
        return f"checksum {info.crc32c:08x}, {block.crc32c:08x} recorded"
    return None


class ChunkCheck:
    """One run over all targets in ``listings``; what lies on others is not judged, and counted in
    ``unchecked``. ``examine`` is given every sealed chunk that is in use."""

    def __init__(
        self,
        reader: RecordReader,
        listings: Mapping[int, Iterable[ListedChunk]],
        progress: Callable[[str, int], None] | None = None,
        examine: Callable[[int, Located], Iterable[Finding]] | None = None,
    ) -> None:
        self._reader = reader
        self._listings = listings
        self._progress = progress or (lambda stage, count: None)
        self._examine = examine
        self._chains: dict[int, ChainRecord] = {}
        self.chunk_count = 0
        self.unchecked = 0

    def run(self) -> Iterator[Finding]:
        self._load_chains()
        self._batches = Batches(self._reader)
        self._queued = QueuedRemovals(self._reader)
        self._moving = {records.number_at(key) for key, _ in read_sound(self._reader, records.MOVE)}
        merged = heapq.merge(
            self._blocks(), self._files(), self._chunks(), key=lambda item: item.inode
        )
        groups = itertools.groupby(merged, key=lambda item: item.inode)
        for count, (inode, group) in enumerate(groups, start=1):
            reference = None
            found: list[Located] = []
            for item in group:
                if item.found is not None:
                    found.append(item.found)
                else:
                    reference = item.reference
            if count % PROGRESS_INODES == 0:
                self._progress("chunks", self.chunk_count)
            yield from self._check(inode, reference, found)
        self._progress("chunks", self.chunk_count)

    def _load_chains(self) -> None:
        for key, value in read_sound(self._reader, records.CHAIN):
            self._chains[int.from_bytes(key[4:], "big")] = records.decode_chain(value)

    def _chain(self, chain: int) -> ChainRecord | None:
        """None for a chain that does not exist. One that is new is looked for again."""
        if chain not in self._chains:
            self._load_chains()
        return self._chains.get(chain)

    # --- streams

    def _blocks(self) -> Iterator[_Item]:
        for key, value in read_sound(self._reader, records.BLOCK):
            yield _Item(records.number_at(key), records.unpack_block(value), None)

    def _files(self) -> Iterator[_Item]:
        for key, value in read_sound(self._reader, records.INODE):
            record = records.decode_inode(value)
            if is_file(record):
                yield _Item(records.number_at(key), record, None)

    def _chunks(self) -> Iterator[_Item]:
        def of(target_id: int, listing: Iterable[ListedChunk]) -> Iterator[_Item]:
            for chunk in listing:
                yield _Item(chunk.inode, None, Located(target_id, chunk))

        streams = [of(target_id, listing) for target_id, listing in self._listings.items()]
        for item in heapq.merge(*streams, key=lambda item: item.inode):
            self.chunk_count += 1
            yield item

    # --- one inode

    def _check(
        self, inode: int, reference: BlockValue | InodeRecord | None, found: list[Located]
    ) -> Iterator[Finding]:
        if isinstance(reference, BlockValue):
            yield from self._check_block(inode, reference, found)
        elif reference is not None:
            yield from self._check_file(reference, found)
        elif inode not in self._batches:
            yield from self._unused(Kind.CHUNK_ORPHAN, inode, found)

    def _unused(self, kind: Kind, inode: int, found: Sequence[Located]) -> Iterator[Finding]:
        """Chunks that nobody will look for, each run of numbers on one target in one finding. What
        is being moved lies in two places; there are few, and the next check finds what was left."""
        if inode in self._moving:
            return
        left = [
            one for one in found if not self._queued.covers(one.target_id, inode, one.chunk.number)
        ]
        left.sort(key=lambda one: (one.target_id, one.chunk.chain, one.chunk.number))
        for _, run in itertools.groupby(
            enumerate(left),
            key=lambda pair: (
                pair[1].target_id,
                pair[1].chunk.chain,
                pair[1].chunk.number - pair[0],
            ),
        ):
            chunks = [one for _, one in run]
            target_id, first = chunks[0].target_id, chunks[0].chunk.number
            chain = chunks[0].chunk.chain
            size = sum(one.chunk.info.length for one in chunks if one.chunk.info is not None)
            end = first + len(chunks)
            what = "nothing refers to" if kind is Kind.CHUNK_ORPHAN else "nobody looks there for"
            yield Finding(
                kind=kind,
                inode=inode,
                detail=f"{what} {_numbers(first, end)} on target {target_id}, {size} bytes",
                fix=f.RemoveChunks(target_id, inode, first, end, size, chain),
                place=Place(target_id, first, end, chain=chain),
            )

    def _check_block(
        self, inode: int, block: BlockValue, found: list[Located]
    ) -> Iterator[Finding]:
        chain = self._chain(block.chain)
        if chain is None:  # the block is a finding already
            yield from self._unused(Kind.CHUNK_ORPHAN, inode, found)
            return
        own: dict[int, Located] = {}
        misplaced: list[Located] = []
        for one in found:
            if one.chunk.number == 0 and _belongs(one, block.chain, chain):
                own[one.target_id] = one
            else:
                misplaced.append(one)
        yield from self._unused(Kind.CHUNK_MISPLACED, inode, misplaced)
        if not self._all_listed(chain.targets):
            self.unchecked += 1
            return
        yield from self._judge_block(inode, block, chain, own)

    def _judge_block(
        self, inode: int, block: BlockValue, chain: ChainRecord, own: Mapping[int, Located]
    ) -> Iterator[Finding]:
        """Members that serve have it. While one of them does, it is no miss."""
        problems: dict[int, str | None] = {}
        for target_id in chain.targets:
            one = own.get(target_id)
            problems[target_id] = "missing" if one is None else block_problem(block, one.chunk)
        good = [target_id for target_id, problem in problems.items() if problem is None]
        fix = None if good else f.DropBlock(inode, "chunk", chain=block.chain)
        for target_id, problem in problems.items():
            if problem is None:
                if self._examine is not None:
                    yield from self._examine(target_id, own[target_id])
                continue
            kinds = (Kind.COPY_DAMAGED, Kind.COPY_LOST) if good else _BLOCK_KINDS
            yield Finding(
                kind=kinds[target_id not in own],
                inode=inode,
                detail=f"the block's chunk on target {target_id}: {problem}",
                fix=fix,
                place=Place(
                    target_id,
                    0,
                    1,
                    block.size,
                    chain=_tag(block.chain, chain),
                    source=good[0] if good else 0,
                ),
            )

    def _all_listed(self, targets: Iterable[int]) -> bool:
        return all(target_id in self._listings for target_id in targets)

    def _check_file(self, record: InodeRecord, found: list[Located]) -> Iterator[Finding]:
        layout = record.layout
        if layout is None or not layout.chains:
            yield from self._unused(Kind.CHUNK_MISPLACED, record.inode, found)
            return
        places = [self._chain(chain) for chain in layout.chains]
        known = [chain for chain in places if chain is not None]
        if len(known) < len(places):
            detail = "a file on chains that do not exist"
            yield Finding(kind=Kind.CHAIN_MISSING, inode=record.inode, detail=detail)
        own: list[Located] = []
        misplaced: list[Located] = []
        for one in found:
            chain = places[one.chunk.number % len(places)]
            number = layout.chain_of(one.chunk.number)
            if chain is None or not _belongs(one, number, chain):
                misplaced.append(one)
            elif one.target_id in chain.targets:  # others need not have it yet
                own.append(one)
        own.sort(key=lambda one: (one.chunk.number, one.target_id))
        yield from self._unused(Kind.CHUNK_MISPLACED, record.inode, misplaced)
        yield from self._check_tail(record, own)
        if len(known) < len(places) or not all(self._all_listed(c.targets) for c in known):
            self.unchecked += 1
            return
        yield from self._check_data(record, layout, own)

    @staticmethod
    def _check_tail(record: InodeRecord, own: Sequence[Located]) -> Iterator[Finding]:
        if not own or own[-1].chunk.number < chunks_to_remove(record)[1]:
            return
        last = own[-1]
        number = last.chunk.number
        yield Finding(
            kind=Kind.FILE_TAIL,
            inode=record.inode,
            detail=f"chunk {number} lies behind the end of a file of {record.size} bytes",
            fix=f.CoverTail(record.inode, number + 1),
            place=Place(last.target_id, number, number + 1, chain=last.chunk.chain),
        )

    def _check_data(
        self, record: InodeRecord, layout: Layout, own: Sequence[Located]
    ) -> Iterator[Finding]:
        """Damaged chunks and, unless the file is sparse, what is missing of its bytes."""
        complete = record.sparse
        next_number = 0
        for number, group in itertools.groupby(own, key=lambda one: one.chunk.number):
            copies = list(group)
            if not complete:
                yield from self._hole(record, layout, next_number, number)
            next_number = number + 1
            expected = 0 if complete else _expected(record, layout, number)
            chain = self._chain(layout.chain_of(number))
            if chain is not None and chain.is_replicated:
                members = chain.targets
                good, found = compare_copies(record.inode, number, members, copies)
                yield from found
                copies = good or copies
            yield from self._check_copies(record, copies, expected)
        if not complete:
            end = -(-record.size // layout.chunk_bytes)
            yield from self._hole(record, layout, next_number, end)

    def _check_copies(
        self, record: InodeRecord, copies: Sequence[Located], expected: int
    ) -> Iterator[Finding]:
        for one in copies:
            info, number = one.chunk.info, one.chunk.number
            place = Place(one.target_id, number, number + 1, expected, chain=one.chunk.chain)
            if info is None:
                yield Finding(
                    kind=Kind.FILE_DAMAGED,
                    inode=record.inode,
                    detail=f"chunk {number} on target {one.target_id}: {one.chunk.problem}",
                    place=place,
                )
            elif info.length < expected:
                yield Finding(
                    kind=Kind.FILE_HOLE,
                    inode=record.inode,
                    detail=f"chunk {number} on target {one.target_id} has {info.length} bytes, "
                    f"{expected} expected",
                    fix=_mark_sparse(record),
                    place=place,
                )
            elif info.is_sealed and self._examine is not None:
                yield from self._examine(one.target_id, one)

    def _hole(self, record: InodeRecord, layout: Layout, first: int, end: int) -> Iterator[Finding]:
        end = min(end, -(-record.size // layout.chunk_bytes))
        if first >= end:
            return
        number = layout.chain_of(first)
        chain = self._chain(number)
        target_id = 0 if chain is None else chain.targets[0]
        yield Finding(
            kind=Kind.FILE_HOLE,
            inode=record.inode,
            detail=f"{_numbers(first, end)} of a file of {record.size} bytes are missing"
            if end - first > 1
            else f"chunk {first} of a file of {record.size} bytes is missing",
            fix=_mark_sparse(record),
            place=Place(
                target_id,
                first,
                end,
                _expected(record, layout, first),
                chain=0 if chain is None else _tag(number, chain),
            ),
        )


_BLOCK_KINDS = (Kind.BLOCK_DAMAGED, Kind.BLOCK_LOST)


def _mark_sparse(record: InodeRecord) -> f.MarkSparse:
    chains = () if record.layout is None else record.layout.chains
    return f.MarkSparse(record.inode, record.ctime_ns, chains)


def _tag(number: int, chain: ChainRecord) -> int:
    """How chunks of a chain are named on its targets."""
    return number if chain.is_replicated else 0


def _belongs(one: Located, number: int, chain: ChainRecord) -> bool:
    """Whether a chunk lies where a member of the chain keeps it."""
    return one.chunk.chain == _tag(number, chain) and one.target_id in chain.everybody


def same_copy(one: ChunkInfo, other: ChunkInfo) -> bool:
    return (one.version, one.length, one.crc32c) == (other.version, other.length, other.crc32c)


def compare_copies(
    inode: int, number: int, members: Sequence[int], copies: Sequence[Located]
) -> tuple[list[Located], list[Finding]]:
    """Copies that are as those of the chain's last member are (it commits first), or as the newest
    if that has none; and a finding for each other member."""
    own = {one.target_id: one for one in copies}
    infos = {one.target_id: one.chunk.info for one in copies if one.chunk.info is not None}
    if not infos:
        return [], []
    source = members[-1] if members[-1] in infos else max(infos, key=lambda t: infos[t].version)
    good: list[Located] = []
    found: list[Finding] = []
    chain = own[source].chunk.chain
    for target_id in members:
        info = infos.get(target_id)
        if info is not None and same_copy(info, infos[source]):
            good.append(own[target_id])
            continue
        kind, problem = Kind.COPY_LOST, "missing"
        if info is not None:
            kind = Kind.COPY_DIFFERS
            problem = f"version {info.version}, target {source} has {infos[source].version}"
        elif target_id in own:
            kind, problem = Kind.COPY_DAMAGED, own[target_id].chunk.problem
        place = Place(
            target_id,
            number,
            number + 1,
            chain=chain,
            source=source,
            version=0 if info is None else info.version,
        )
        detail = f"chunk {number} on target {target_id}: {problem}"
        found.append(Finding(kind=kind, inode=inode, detail=detail, place=place))
    return good, found


def _expected(record: InodeRecord, layout: Layout, number: int) -> int:
    """Bytes that a chunk of a file without holes has at least."""
    return max(0, min(layout.chunk_bytes, record.size - number * layout.chunk_bytes))


def _numbers(first: int, end: int) -> str:
    return f"chunk {first}" if end == first + 1 else f"chunks {first} to {end - 1}"


def check(reader: RecordReader, listings: Mapping[int, Iterable[ListedChunk]]) -> list[Finding]:
    """Everything that is wrong in a store and on its targets while nobody changes them.
    ``listings`` are the chunks of each target, by its number, in the order of inode and number."""
    findings = list(MetadataCheck(reader).run())
    findings += ChunkCheck(reader, listings).run()
    return findings


__all__ = ["ChunkCheck", "Located", "QueuedRemovals", "block_problem", "check", "same_copy"]
