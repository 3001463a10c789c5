"""Emptying targets that are to leave the cluster, in the background, a page of records at a time.

What has one copy there is moved, by the target's server (``moving.py``). A *pass* looks at every
block and every file once. It counts what is left, and finds the files that are to be moved. Most
files only *might* have chunks on a target: a file names its chains when it is made, and a short one
has used few of them. Those places of a layout get another chain at once. Only files that nobody has
open are changed, because whoever opens one takes the layout along; the next pass finds the others.
Where there is no target that blocks could be moved to, they are given up as if they had been
evicted: a cache may lose them.

After a pass that found nothing the target is *drained*, which is recorded. It stays true: nothing
new is placed on a draining target, and a batch of blocks that was prepared before spoils the pass.
So a drained target can be removed without looking again.

Passes also clear up behind targets that were removed by force: their queues, blocks and places in
layouts. A file that had chunks there keeps its layout: what was lost must not look like a hole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

from kvfs_base.types import Layout
from kvfs_metadata import records
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.engines.engine import prefix_end
from kvfs_metadata.inodes import chunks_to_remove, save
from kvfs_metadata.limits import (
    DRAIN_PAGE_RECORDS,
    MOVE_CANDIDATES_MAX,
    OPEN_FILES_SHOWN_MAX,
)
from kvfs_metadata.records import InodeRecord
from kvfs_metadata.transaction import Tx


@dataclasses.dataclass
class _Pass:
    departures: int
    draining: set[int]
    """Chains, as below."""
    keeping: set[int]
    hopeless: bool
    """There is nowhere to move to."""
    spoiled: set[int]
    """Batches that were prepared before may yet bring blocks."""
    stage: int = 0
    start: int = 0
    blocks: Counter[int] = dataclasses.field(default_factory=Counter)
    """What is left, by chain; of removed targets, too."""
    files: Counter[int] = dataclasses.field(default_factory=Counter)
    open_files: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Some that have chunks there, by chain."""
    unswept: bool = False
    """A file that somebody has open names a chain of a removed target without need."""


class Drainer:
    """``may_be_open`` says whether somebody may have a file open."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        cluster: ClusterState,
        removals: Removals,
        may_be_open: Callable[[int], bool],
    ) -> None:
        self._blocks = blocks
        self._cluster = cluster
        self._departures = cluster.departures
        self._removals = removals
        self._may_be_open = may_be_open
        self._pass: _Pass | None = None
        self._left: dict[int, tuple[int, int]] = {}
        self.drained_blocks = 0
        self._candidates: dict[int, dict[int, None]] = {}
        self._open_files: dict[int, list[int]] = {}

    def left_on(self, target_id: int) -> tuple[int, int]:
        """Blocks and files that the last pass left on a target."""
        return self._left.get(target_id, (0, 0))

    def candidates(self, chain: int, count_max: int) -> list[int]:
        """Files that had chunks on a draining chain when they were looked at, some of them."""
        return list(itertools.islice(self._candidates.get(chain, ()), count_max))

    def open_files(self, chain: int) -> list[int]:
        """Files on a draining chain that somebody may have had open in the last pass, some."""
        return self._open_files.get(chain, [])

    def looked_at(self, chain: int, inode: int) -> None:
        """Not to be named again before the next pass."""
        self._candidates[chain].pop(inode, None)

    def step(self, tx: Tx) -> bool:
        """One transaction's worth of a pass; False at its end, or if there is nothing to do."""
        if not self._departures.has_departures():
            self._pass = None
            self._candidates.clear()
            return False
        # What is undone must be looked at again.
        tx.undo.append(self._abandon)
        current = self._pass
        if current is None or current.departures != self._cluster.targets.departures:
            current = self._pass = self._begin()
        stages = (self._sweep_queues, self._look_at_blocks, self._look_at_files)
        if stages[current.stage](tx, current):
            return True
        current.stage, current.start = current.stage + 1, 0
        if current.stage < len(stages):
            return True
        self._finish(tx, current)
        self._pass = None
        return False

    def _abandon(self) -> None:
        self._pass = None

    def _begin(self) -> _Pass:
        draining, keeping = self._departures.leaving_chains()
        spoiled = self._blocks.prepared_chains() & draining
        hopeless = not any(entry.is_settled for entry in self._cluster.targets)
        for chain in self._candidates.keys() - draining:
            del self._candidates[chain]
        return _Pass(self._cluster.targets.departures, draining, keeping, hopeless, spoiled)

    def _finish(self, tx: Tx, done: _Pass) -> None:
        left: dict[int, tuple[int, int]] = {}
        for entry in self._cluster.targets:
            target_id = entry.target_id
            chains = self._cluster.chains.single(target_id)
            if not done.draining.issuperset(chains) or not entry.record.draining:
                continue
            blocks = sum(done.blocks[chain] for chain in chains)
            files = sum(done.files[chain] for chain in chains)
            left[target_id] = blocks, files
            needed = self._cluster.chains.replicated(target_id)
            if not blocks and not files and not needed and done.spoiled.isdisjoint(chains):
                self._departures.set_drained(tx, target_id)
        self._left = left
        self._open_files = done.open_files
        if self._departures.sweep_wanted and not done.unswept:
            self._departures.swept(tx)

    # --- the stages: each answers whether there is more of it

    def _sweep_queues(self, tx: Tx, current: _Pass) -> bool:
        known = {entry.target_id for entry in self._cluster.targets}
        return self._removals.sweep(tx, known, DRAIN_PAGE_RECORDS)

    def _look_at_blocks(self, tx: Tx, current: _Pass) -> bool:
        start, end = records.block_key(current.start), prefix_end(records.BLOCK)
        items = tx.kv.range(start, end, DRAIN_PAGE_RECORDS)
        for key, value in items:
            chain = records.unpack_block(value).chain
            stays = chain in current.keeping or not current.hopeless
            if chain in current.draining and stays:
                current.blocks[chain] += 1
            elif chain in current.draining or chain not in self._cluster.chains:
                self._blocks.remove_block(tx, self._blocks.index.by_inode[records.number_at(key)])
                self._count(tx)
        return self._turn_page(current, items)

    def _count(self, tx: Tx) -> None:
        tx.undo.append(partial(setattr, self, "drained_blocks", self.drained_blocks))
        self.drained_blocks += 1

    def _look_at_files(self, tx: Tx, current: _Pass) -> bool:
        start, end = records.inode_key(current.start), prefix_end(records.INODE)
        items = tx.kv.range(start, end, DRAIN_PAGE_RECORDS)
        for _, value in items:
            record = records.decode_inode(value)
            if record.layout is not None:
                self._look_at_file(tx, current, record, record.layout)
        return self._turn_page(current, items)

    def _turn_page(self, current: _Pass, items: list[tuple[bytes, bytes]]) -> bool:
        if len(items) < DRAIN_PAGE_RECORDS:
            return False
        current.start = records.number_at(items[-1][0]) + 1
        return True

    def _look_at_file(self, tx: Tx, current: _Pass, record: InodeRecord, layout: Layout) -> None:
        leaving = {
            chain
            for chain in layout.chains
            if chain in current.draining or chain not in self._cluster.chains
        }
        if not leaving:
            return
        used = used_places(record, layout)
        unused = [p for p in range(used, len(layout.chains)) if layout.chains[p] in leaving]
        current.files.update(leaving.intersection(layout.chains[:used]))
        for chain in leaving.intersection(layout.chains[:used]) & current.draining:
            found = self._candidates.setdefault(chain, {})
            if len(found) < MOVE_CANDIDATES_MAX:
                found[record.inode] = None
            if self._may_be_open(record.inode):
                shown = current.open_files.setdefault(chain, [])
                if len(shown) < OPEN_FILES_SHOWN_MAX:
                    shown.append(record.inode)
        if unused and not self._replace(tx, record, layout, unused):
            # Whoever has it open may write there any time.
            kept = {layout.chains[place] for place in unused} - set(layout.chains[:used])
            current.files.update(kept)
            current.unswept = current.unswept or any(
                layout.chains[place] not in self._cluster.chains for place in unused
            )

    def _replace(self, tx: Tx, record: InodeRecord, layout: Layout, places: list[int]) -> bool:
        """Gives chunks to come other chains; False if that cannot be now."""
        if self._may_be_open(record.inode):
            return False
        if tx.kv.get(records.move_key(record.inode)) is not None:
            return False  # what was copied before the file was cut would be its chunks there
        chains = list(layout.chains)
        for place in places:
            other = self._cluster.placement.place_instead(record.inode, chains)
            if other is None or self._is_dangerous(tx, other, record.inode):
                return False
            chains[place] = other
        # A file that was longer, or whose writer died, may have left chunks behind its end.
        _, end = chunks_to_remove(record)
        gone = dict.fromkeys(layout.chains[p] for p in places if layout.chains[p] not in chains)
        self._cluster.remove_chunks(tx, tuple(gone), record.inode, end)
        record.layout = Layout(layout.chunk_bytes, tuple(chains))
        save(tx, record)
        return True

    def _is_dangerous(self, tx: Tx, chain: int, inode: int) -> bool:
        """A target that the file has left before may not have removed its chunks yet, and would
        take new ones for those."""
        members = self._cluster.chains[chain].everybody
        return any(self._removals.waits(tx.kv, target_id, inode) for target_id in members)


def used_places(record: InodeRecord, layout: Layout) -> int:
    """How many of a layout's chains, from the first, the recorded size reaches."""
    return min(-(-record.size // layout.chunk_bytes), len(layout.chains))
