"""One check, from candidates to repairs.

What the two streams of the check yield (``check.fsck``, ``compare``) was read over many
pages while others wrote. It becomes a finding after a second look, whose order matters:

* A chunk that is missing or wrong: first the chunk is looked at again, then the metadata, in one
  transaction. A block is published before it is committed and its number is never used again: if
  its record is there before and after the chunk was found missing, the chunk was missing while the
  block existed.
* A chunk that belongs to nothing: first the metadata, in one transaction (``check.repair``
  says why its answer is final); then the queues of removals, where it may wait for its end; then
  the chunk. Whatever referred to it went into a queue in the transaction that dropped it, and
  leaves the queue only when the chunk is gone. So what is in no queue, and still there after
  that, is there to stay.
* Who makes a file shorter cuts its chunks and then records the size. In between its end is missing,
  as it would be if he had died there; so what is missing of files is looked at once more after
  ``settle_seconds``.
* Everything else is looked at in one transaction of the store.

Repairs go through the same transactions once more. A chunk is never removed here: removals are
queued, as the service's own are.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvfs.fsck.compare import ChunkCheck, Located, QueuedRemovals, block_problem, same_copy
from kvfs.fsck.sources import Store, Targets
from kvfs_base.errors import ChunkCorrupt
from kvfs_base.limits import (
    CHECK_BYTES_PER_REQUEST,
    CHECK_CHUNKS_PER_REQUEST,
    FINDINGS_MAX,
    FIXES_PER_REQUEST,
    ITEMS_PER_REQUEST_MAX,
)
from kvfs_base.types import ChunkId
from kvfs_datapath.messages import ListedChunk
from kvfs_metadata import records
from kvfs_metadata.check.findings import Finding, Kind, Place, record_problem
from kvfs_metadata.check.fixes import DropBlock, Fix, MarkSparse, Verdict
from kvfs_metadata.check.fsck import MetadataCheck

Progress = Callable[[str, int], None]

LOST = (Kind.BLOCK_LOST, Kind.BLOCK_DAMAGED, Kind.FILE_HOLE, Kind.FILE_DAMAGED)
COPIES = (Kind.COPY_LOST, Kind.COPY_DAMAGED, Kind.COPY_DIFFERS)
"""Another member of the chain has what is missing."""
UNUSED = (Kind.CHUNK_ORPHAN, Kind.CHUNK_MISPLACED, Kind.FILE_TAIL)


class State(enum.StrEnum):
    FOUND = "found"
    REPAIRED = "repaired"
    BLOCKED = "blocked"
    """Something is in the way of its repair."""


@dataclasses.dataclass
class Outcome:
    finding: Finding
    state: State = State.FOUND


@dataclasses.dataclass
class Report:
    """``unchecked`` blocks and files lie on targets that could not be looked at."""

    outcomes: list[Outcome]
    inodes: int = 0
    entries: int = 0
    blocks: int = 0
    chunks: int = 0
    unchecked: int = 0
    unreachable: dict[str, str] = dataclasses.field(default_factory=dict)
    truncated: bool = False
    """There were more findings than one run keeps."""

    @property
    def remaining(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.state is not State.REPAIRED]


class Fsck:
    """``verify`` reads every sealed chunk again. ``zero_holes`` lets a repair of a file that lost
    bytes make them zeros; else they stay errors. ``settle_seconds`` is 0 where nobody writes."""

    def __init__(
        self,
        store: Store,
        targets: Targets,
        *,
        verify: bool = False,
        zero_holes: bool = False,
        settle_seconds: float = 0.0,
        progress: Progress | None = None,
    ) -> None:
        self._store = store
        self._targets = targets
        self._verify = verify
        self._zero_holes = zero_holes
        self._settle_seconds = settle_seconds
        self._progress = progress or (lambda stage, count: None)

    def check(self) -> Report:
        metadata = MetadataCheck(self._store, self._progress)
        rereader = _Rereader(self._targets)
        listings = self._targets.listings()
        chunks = ChunkCheck(
            self._store, listings, self._progress, rereader.examine if self._verify else None
        )
        candidates = itertools.chain(metadata.run(), chunks.run(), rereader.rest())
        found: list[Finding] = []
        for batch in _batches(candidates):
            found += self._confirm(batch)
            if len(found) >= FINDINGS_MAX:
                break
        truncated = len(found) >= FINDINGS_MAX
        return Report(
            [Outcome(finding) for finding in self._settled(found)],
            inodes=metadata.inode_count,
            entries=metadata.entry_count,
            blocks=metadata.block_count,
            chunks=chunks.chunk_count,
            unchecked=chunks.unchecked,
            unreachable=dict(self._targets.unreachable),
            truncated=truncated,
        )

    def repair(self, report: Report) -> None:
        """Carries out what can be, and notes in ``report`` what became of it."""
        wanted = [
            (one, fix)
            for one in report.outcomes
            if (fix := one.finding.fix) is not None
            and (self._zero_holes or not isinstance(fix, MarkSparse))
        ]
        wanted.sort(key=lambda pair: pair[1].rank)
        for start in range(0, len(wanted), FIXES_PER_REQUEST):
            part = wanted[start : start + FIXES_PER_REQUEST]
            verdicts = self._store.repair([fix for _, fix in part], dry=False)
            for (one, _), verdict in zip(part, verdicts, strict=True):
                # What is gone by now was repaired along with something else, or by its owner.
                blocked = verdict is Verdict.BLOCKED
                one.state = State.BLOCKED if blocked else State.REPAIRED
            self._progress("repairs", start + len(part))
        self._repair_copies([one for one in report.outcomes if one.finding.kind in COPIES])

    def _repair_copies(self, outcomes: Sequence[Outcome]) -> None:
        """The target that has a bad copy gets it from another member itself."""
        for one in outcomes:
            place = one.finding.place
            assert place is not None
            done = self._targets.repair(place.target_id, [place.chunk(one.finding.inode)])
            one.state = State.REPAIRED if done else State.BLOCKED

    # --- the second look

    def _settled(self, found: list[Finding]) -> list[Finding]:
        passing = (Kind.FILE_HOLE, *COPIES)
        if not self._settle_seconds or not any(one.kind in passing for one in found):
            return found
        threading.Event().wait(self._settle_seconds)
        again = iter([one for one in found if one.kind in passing])
        still = {id(one) for batch in _batches(again) for one in self._confirm(batch)}
        return [one for one in found if one.kind not in passing or id(one) in still]

    def _confirm(self, batch: Sequence[Finding]) -> Iterator[Finding]:
        batch = self._still_bad(self._still_lost(batch))
        fixes: list[Fix] = [one.fix for one in batch if one.fix is not None]
        verdicts = iter(self._store.repair(fixes, dry=True) if fixes else ())
        batch = [one for one in batch if one.fix is None or next(verdicts) is not Verdict.GONE]
        return self._still_unused(batch)

    def _still_lost(self, batch: Sequence[Finding]) -> list[Finding]:
        places = [
            (one.place.target_id, one.place.chunk(one.inode))
            for one in batch
            if one.kind in LOST and one.place is not None and not one.place.was_read
        ]
        found = self._look(places)
        return [
            one
            for one in batch
            if one.kind not in LOST
            or one.place is None
            or one.place.was_read
            or self._is_lost(one, found.get((one.place.target_id, one.place.chunk(one.inode))))
        ]

    def _still_bad(self, batch: Sequence[Finding]) -> list[Finding]:
        """Copies that are neither as another one is nor newer than they were."""
        places = [
            (target_id, one.place.chunk(one.inode))
            for one in batch
            if one.kind in COPIES and one.place is not None and not one.place.was_read
            for target_id in (one.place.target_id, one.place.source)
        ]
        found = self._look(places)

        def is_bad(one: Finding) -> bool:
            place = one.place
            if one.kind not in COPIES or place is None or place.was_read:
                return True
            good = found.get((place.source, place.chunk(one.inode)))
            own = found.get((place.target_id, place.chunk(one.inode)))
            if good is None or good.info is None:
                return False  # it went meanwhile, or is another finding
            if place.target_id not in self._serving(place.chain):
                return False  # it is out, and comes back in step
            if own is None or own.info is None:
                return True
            return own.info.version == place.version and not same_copy(own.info, good.info)

        return [one for one in batch if is_bad(one)]

    def _is_lost(self, finding: Finding, chunk: ListedChunk | None) -> bool:
        assert finding.place is not None
        if finding.kind in (Kind.BLOCK_LOST, Kind.BLOCK_DAMAGED):
            key = records.block_key(finding.inode)
            for found, value in self._store.range(key, key + b"\x00", 1):
                if record_problem(found, value) is None:
                    block = records.unpack_block(value)
                    return chunk is None or block_problem(block, chunk) is not None
            return False
        if finding.kind is Kind.FILE_DAMAGED:
            return chunk is not None and chunk.info is None
        info = None if chunk is None else chunk.info
        return info is None or info.length < finding.place.expected

    def _serving(self, chain: int) -> tuple[int, ...]:
        key = records.chain_key(chain)
        found = self._store.range(key, key + b"\x00", 1)
        return records.decode_chain(found[0][1]).targets if found else ()

    def _still_unused(self, batch: Sequence[Finding]) -> Iterator[Finding]:
        unused = [one for one in batch if one.kind in UNUSED]
        if not unused:
            yield from batch
            return
        queued = QueuedRemovals(self._store)
        found = self._look([chunk for one in unused for chunk in _chunks_of(one)])
        there = Counter((target_id, chunk.inode) for target_id, chunk in found)
        for one in batch:
            place = one.place
            if one.kind not in UNUSED or place is None:
                yield one
                continue
            waits = queued.covers(place.target_id, one.inode, place.first)
            if there[place.target_id, one.inode] and not waits:
                yield one

    def _look(
        self, places: Iterable[tuple[int, ChunkId]]
    ) -> dict[tuple[int, ChunkId], ListedChunk]:
        by_target: dict[int, list[ChunkId]] = {}
        for target_id, chunk in places:
            by_target.setdefault(target_id, []).append(chunk)
        return {
            (target_id, chunk.chunk): chunk
            for target_id, chunks in by_target.items()
            for chunk in self._targets.look(target_id, chunks)
        }


def _chunks_of(finding: Finding) -> Iterator[tuple[int, ChunkId]]:
    place = finding.place
    assert place is not None
    for number in range(place.first, min(place.end, place.first + ITEMS_PER_REQUEST_MAX)):
        yield place.target_id, ChunkId(finding.inode, number, place.chain)


def _batches(candidates: Iterator[Finding]) -> Iterator[list[Finding]]:
    while batch := list(itertools.islice(candidates, FIXES_PER_REQUEST)):
        yield batch


class _Rereader:
    """Reads chunks again, in batches by target, and says which hold other bytes than they did."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._waiting: dict[int, list[Located]] = {}

    def examine(self, target_id: int, one: Located) -> Iterator[Finding]:
        waiting = self._waiting.setdefault(target_id, [])
        waiting.append(one)
        size = sum(located.chunk.info.length for located in waiting if located.chunk.info)
        if len(waiting) >= CHECK_CHUNKS_PER_REQUEST or size >= CHECK_BYTES_PER_REQUEST:
            yield from self._read(target_id)

    def rest(self) -> Iterator[Finding]:
        for target_id in list(self._waiting):
            yield from self._read(target_id)

    def _read(self, target_id: int) -> Iterator[Finding]:
        batch = self._waiting.pop(target_id)
        chunks = [one.chunk.chunk for one in batch]
        for one, result in zip(batch, self._targets.recheck(target_id, chunks), strict=True):
            # What has gone, or was written to, since it was listed is nobody's damage.
            if isinstance(result, ChunkCorrupt):
                yield _corrupt(one, result)


def _corrupt(one: Located, error: ChunkCorrupt) -> Finding:
    info, number = one.chunk.info, one.chunk.number
    assert info is not None
    found = f"checksum {error.found_crc32c:08x} instead of {error.expected_crc32c:08x}"
    if one.chunk.chain:  # other members have it, or the target will say that nobody has
        return Finding(
            kind=Kind.COPY_DAMAGED,
            inode=one.chunk.inode,
            detail=f"chunk {number} on target {one.target_id}: {found}",
            place=Place(one.target_id, number, number + 1, was_read=True, chain=one.chunk.chain),
        )
    return Finding(
        kind=Kind.BLOCK_DAMAGED if info.key else Kind.FILE_DAMAGED,
        inode=one.chunk.inode,
        detail=f"chunk {number} on target {one.target_id}: {found}",
        fix=DropBlock(one.chunk.inode, "chunk") if info.key else None,
        place=Place(one.target_id, number, number + 1, was_read=True),
    )


__all__ = ["Fsck", "Outcome", "Report", "State"]
