"""The moves that have begun, in memory and in the store (docs/design/0006-moves.md)."""

from __future__ import annotations

from functools import partial

from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, Writes, scan
from kvfs_metadata.records import MoveValue
from kvfs_metadata.transaction import Tx


class Moves:
    def __init__(self, read: KVRead) -> None:
        self._by_inode: dict[int, MoveValue] = {}
        self._of_source: dict[int, dict[int, None]] = {}
        self.apply(dict(scan(read, records.MOVE)))

    def apply(self, writes: Writes) -> None:
        """Another server committed ``writes``."""
        for key, value in writes.items():
            if key.startswith(records.MOVE):
                move = None if value is None else records.unpack_move(value)
                self._set(records.number_at(key), move)

    def _set(self, inode: int, move: MoveValue | None) -> None:
        before = self._by_inode.pop(inode, None)
        if before is not None and (move is None or move.source != before.source):
            del self._of_source[before.source][inode]
        if move is not None:
            self._by_inode[inode] = move
            self._of_source.setdefault(move.source, {})[inode] = None

    def put(self, tx: Tx, inode: int, move: MoveValue | None) -> None:
        """Records it; None: the inode does not move any more."""
        before = self._by_inode.get(inode)
        if move == before:
            return
        if move is None:
            tx.kv.delete(records.move_key(inode))
        else:
            tx.kv.put(records.move_key(inode), records.pack_move(move))
        tx.undo.append(partial(self._set, inode, before))
        self._set(inode, move)

    def disarm(self, tx: Tx, inode: int) -> None:
        """Somebody opens a file: its move must not end before it was looked at again."""
        move = self._by_inode.get(inode)
        if move is not None:
            self.put(tx, inode, move._replace(ticket=0))

    def get(self, inode: int) -> MoveValue | None:
        return self._by_inode.get(inode)

    def of_source(self, target_id: int) -> list[int]:
        """Inodes that leave a target, the first one begun first."""
        return list(self._of_source.get(target_id, ()))

    def to_chain(self, chain_id: int) -> list[int]:
        return [inode for inode, move in self._by_inode.items() if move.to == chain_id]

    def __len__(self) -> int:
        return len(self._by_inode)
