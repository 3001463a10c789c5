"""What has one copy on a target that is being drained: where it goes, and when it is there.

The state machine of docs/design/0006-moves.md. A chunk server asks what to move (``take``) and says
what it has moved (``end``); everything is decided here, in transactions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from kvfs_base.cluster import EndMoves, Move, TakeMoves, TargetState
from kvfs_base.cluster import Moves as TakenMoves
from kvfs_base.limits import MOVES_AT_ONCE
from kvfs_base.types import Layout
from kvfs_metadata import records
from kvfs_metadata.block_table import Block
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.cluster.draining import Drainer
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.inodes import chunks_to_remove, save
from kvfs_metadata.limits import (
    MOVE_FILES_AT_ONCE,
    MOVE_LOOKS_MAX,
    MOVE_REMOVALS_MAX,
)
from kvfs_metadata.records import InodeRecord, MoveValue, RemovalValue
from kvfs_metadata.transaction import Counters, Tx

CHUNKS_MAX = 0xFFFF_FFFF


class Mover:
    """``may_be_open`` says whether somebody may have a file open."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        cluster: ClusterState,
        removals: Removals,
        drainer: Drainer,
        counters: Counters,
        may_be_open: Callable[[int], bool],
    ) -> None:
        self._blocks = blocks
        self._index = blocks.index
        self._cluster = cluster
        self._moves = cluster.moves
        self._removals = removals
        self._drainer = drainer
        self._counters = counters
        self._may_be_open = may_be_open
        self.moved = {"moved_blocks": 0, "moved_files": 0, "moved_bytes": 0}

    # --- what to move

    def take(self, tx: Tx, request: TakeMoves) -> TakenMoves:
        """Raises TargetUnknown."""
        entry = self._cluster.targets[request.target_id]
        ticket = self._counters.move.take(tx)
        if not entry.record.draining:
            self.cancel_all(tx, entry.target_id)
            return TakenMoves(ticket, ())
        self._cluster.targets.expire()
        found: list[Move] = []
        for inode in self._moves.of_source(entry.target_id):
            move = self._go_on(tx, inode, ticket)
            if move is not None:
                found.append(move)
            if len(found) == MOVES_AT_ONCE:
                return TakenMoves(ticket, tuple(found))
        for chain in self._cluster.chains.single(entry.target_id):
            found += self._begin_files(
                tx, entry.target_id, chain, MOVES_AT_ONCE - len(found), ticket
            )
            if not entry.record.keep_blocks:
                count = MOVES_AT_ONCE - len(found)
                found += self._begin_blocks(tx, entry.target_id, chain, count, ticket)
        return TakenMoves(ticket, tuple(found))

    def _go_on(self, tx: Tx, inode: int, ticket: int) -> Move | None:
        """A move that was begun; None if it is off, or not now."""
        move = self._moves.get(inode)
        assert move is not None
        target_id = self._taker(move.to)
        if target_id is not None and self._is_away(target_id):
            target_id = None  # others may be there
        block = self._index.by_inode.get(inode)
        record = None if block is not None else self._file(tx, inode, move.chain)
        is_there = record is not None or (block is not None and block.chain == move.chain)
        if target_id is None or not is_there:
            self.cancel(tx, inode)
            return None
        open_now = record is not None and self._may_be_open(inode)
        if open_now:
            _ask_to_close(tx, inode)
        if open_now or not self._removals.is_past(tx.kv, target_id, move.after):
            self._moves.put(tx, inode, move._replace(ticket=0))
            return None
        self._moves.put(tx, inode, move._replace(ticket=ticket))
        if block is not None:
            return Move(inode, move.to, target_id, block.size, block.crc32c)
        assert record is not None and record.layout is not None
        chains = record.layout.chains
        places = tuple(p for p, chain in enumerate(chains) if chain == move.chain)
        _, end = chunks_to_remove(record)
        return Move(inode, move.to, target_id, width=len(chains), places=places, end=end)

    def _file(self, tx: Tx, inode: int, chain: int) -> InodeRecord | None:
        """A file that has a chain in its layout."""
        value = tx.kv.get(records.inode_key(inode))
        record = None if value is None else records.decode_inode(value)
        if record is None or record.layout is None or chain not in record.layout.chains:
            return None
        return record

    def _taker(self, chain_id: int) -> int | None:
        """The target of a chain of one copy, if something may be moved there."""
        chain = self._cluster.chains.get(chain_id)
        entry = None if chain is None else self._cluster.targets.get(chain.targets[0])
        return None if entry is None or entry.record.draining else entry.target_id

    def _is_away(self, target_id: int) -> bool:
        return self._cluster.targets[target_id].state is TargetState.OFFLINE

    def _begin(self, tx: Tx, inode: int, chain: int, to: int, ticket: int) -> Move | None:
        """None: begun, but not to be carried out yet."""
        source, taker = (self._cluster.chains[one].targets[0] for one in (chain, to))
        move = MoveValue(source, chain, to, self._removals.last_queued(taker))
        self._moves.put(tx, inode, move)
        return self._go_on(tx, inode, ticket)

    def _begin_blocks(
        self, tx: Tx, target_id: int, chain: int, count: int, ticket: int
    ) -> Iterator[Move]:
        """The most recently used ones first: for the others there may be no room."""
        begun = sum(i in self._index.by_inode for i in self._moves.of_source(target_id))
        count = min(count, MOVES_AT_ONCE - begun)
        room = self._cluster.placement.room()
        for block in self._index.table.newest_on(chain, max(0, count) + begun):
            if count <= 0:
                return
            if self._moves.get(block.inode) is not None:
                continue
            to = room.take(block.inode, block.size)
            if to is None:
                return
            count -= 1
            move = self._begin(tx, block.inode, chain, to, ticket)
            if move is not None:
                yield move

    def _begin_files(
        self, tx: Tx, target_id: int, chain: int, count: int, ticket: int
    ) -> list[Move]:
        closed = sum(
            inode not in self._index.by_inode and not self._may_be_open(inode)
            for inode in self._moves.of_source(target_id)
        )
        count = min(count, MOVE_FILES_AT_ONCE - closed)
        room = self._cluster.placement.room()
        begun: list[Move] = []
        for inode in self._drainer.candidates(chain, MOVE_LOOKS_MAX):
            if count <= 0:
                break
            record = self._file(tx, inode, chain)
            open_now = record is not None and self._may_be_open(inode)
            if open_now:
                _ask_to_close(tx, inode)
            if record is None or open_now or self._moves.get(inode) is not None:
                self._drainer.looked_at(chain, inode)
                continue
            assert record.layout is not None
            to = room.take(inode, _bytes_on(record, record.layout, chain), record.layout.chains)
            if to is None:
                break
            self._drainer.looked_at(chain, inode)
            count -= 1
            move = self._begin(tx, inode, chain, to, ticket)
            if move is not None:
                begun.append(move)
        return begun

    # --- what was moved

    def end(self, tx: Tx, request: EndMoves) -> tuple[int, ...]:
        """Raises TargetUnknown."""
        target_id = self._cluster.targets[request.target_id].target_id

        def is_own(inode: int) -> bool:
            move = self._moves.get(inode)
            return move is not None and move.source == target_id and move.ticket == request.ticket

        ended = [inode for inode in request.done if is_own(inode) and self._end(tx, inode)]
        for inode in filter(is_own, request.failed):
            self.cancel(tx, inode)
        for inode in filter(is_own, request.lost):
            block = self._index.by_inode.get(inode)
            if block is not None:
                self._blocks.remove_block(tx, block)
        return tuple(ended)

    def _end(self, tx: Tx, inode: int) -> bool:
        move = self._moves.get(inode)
        assert move is not None
        if self._taker(move.to) is None:
            self.cancel(tx, inode)
            return False
        block = self._index.by_inode.get(inode)
        if block is not None and block.chain == move.chain:
            self._end_block(tx, block, move)
            return True
        record = self._file(tx, inode, move.chain)
        if record is None or self._may_be_open(inode):
            return False
        self._end_file(tx, record, move)
        return True

    def _end_block(self, tx: Tx, block: Block, move: MoveValue) -> None:
        self._moves.put(tx, block.inode, None)
        self._blocks.move_block(tx, block, move.to)
        self._cluster.remove_chunks(tx, (move.chain,), block.inode, 1, block.size)
        self._count(tx, moved_blocks=1, moved_bytes=block.size)

    def _end_file(self, tx: Tx, record: InodeRecord, move: MoveValue) -> None:
        layout = record.layout
        assert layout is not None
        self._moves.put(tx, record.inode, None)
        size = _bytes_on(record, layout, move.chain)
        _, end = chunks_to_remove(record)
        chains = [move.to if chain == move.chain else chain for chain in layout.chains]
        record.layout = Layout(layout.chunk_bytes, tuple(chains))
        save(tx, record)
        self._cluster.remove_chunks(tx, (move.chain,), record.inode, end, size)
        # A store that forgot this would look for chunks that are removed by then.
        self._cluster.map_version.urgent = True
        self._count(tx, moved_files=1, moved_bytes=size)

    def _count(self, tx: Tx, **changes: int) -> None:
        before = dict(self.moved)
        for name, change in changes.items():
            self.moved[name] += change
        tx.undo.append(partial(self.moved.update, before))

    # --- moves that are off

    def cancel(self, tx: Tx, inode: int) -> None:
        """Whatever was copied is removed."""
        move = self._moves.get(inode)
        assert move is not None
        self._moves.put(tx, inode, None)
        if move.to not in self._cluster.chains:
            return
        if inode in self._index.by_inode:
            self._cluster.remove_chunks(tx, (move.to,), inode, 1)
            return
        value = tx.kv.get(records.inode_key(inode))
        record = None if value is None else records.decode_inode(value)
        layout = None if record is None else record.layout
        if record is None or layout is None:
            self._cluster.remove_chunks(tx, (move.to,), inode, CHUNKS_MAX)
        elif move.to not in layout.chains:
            self._cluster.remove_chunks(tx, (move.to,), inode, chunks_to_remove(record)[1])
        else:
            self._remove_places(tx, record, layout, move)

    def _remove_places(self, tx: Tx, record: InodeRecord, layout: Layout, move: MoveValue) -> None:
        """The file has other chunks on that target: only what is not its own there goes."""
        (target_id,) = self._cluster.chains[move.to].targets
        left = MOVE_REMOVALS_MAX
        for number in range(min(chunks_to_remove(record)[1], left * len(layout.chains))):
            if layout.chain_of(number) == move.chain and left:
                left -= 1
                removal = RemovalValue(record.inode, number, number + 1, 0)
                self._removals.add(tx, (target_id,), removal)

    def cancel_all(self, tx: Tx, target_id: int) -> None:
        """The target is not to be emptied any more."""
        for inode in self._moves.of_source(target_id):
            self.cancel(tx, inode)

    def turn_away(self, tx: Tx, target_id: int) -> None:
        """The target is not to be moved to any more: it is to leave as well."""
        for chain in self._cluster.chains.single(target_id):
            for inode in self._moves.to_chain(chain):
                self.cancel(tx, inode)

    def forget_target(self, tx: Tx, target_id: int) -> None:
        """The target is about to be removed from the cluster."""
        self.cancel_all(tx, target_id)
        for chain in self._cluster.chains.single(target_id):
            for inode in self._moves.to_chain(chain):
                self._moves.put(tx, inode, None)

    def statistics(self) -> dict[str, int]:
        return {**self.moved, "moves_begun": len(self._moves)}


def _ask_to_close(tx: Tx, inode: int) -> None:
    """A mount may count a file as open that nobody has open there any more (0007). It closes it
    when it is told that the file has changed: so the inode is written as it is."""
    key = records.inode_key(inode)
    value = tx.kv.get(key)
    if value is not None:
        tx.kv.put(key, value)


def _bytes_on(record: InodeRecord, layout: Layout, chain: int) -> int:
    """At most; a sparse file has fewer."""
    total, width = -(-record.size // layout.chunk_bytes), len(layout.chains)
    places = [place for place, one in enumerate(layout.chains[:total]) if one == chain]
    chunks = sum((total - place - 1) // width + 1 for place in places)
    return min(record.size, chunks * layout.chunk_bytes)


__all__ = ["Mover"]
