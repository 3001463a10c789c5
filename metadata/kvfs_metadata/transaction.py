"""What a request's code works on: the store's transaction, the time, and a way back.

Some state lives in memory beside the store (the block index, sessions, counters). Code changes it
at once and says in ``undo`` how to take that back; a request that fails, or a group whose commit
fails, is undone in reverse order. Between the decision and the end of a synced commit a reader of
the block index may therefore see a block that is taken back later. For a cache that is no more than
a block that was stored and evicted: its chunk was complete, and gone blocks are misses.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVTransaction
from kvfs_metadata.limits import INODE_RANGE

ANY_CONNECTION = 0
"""Connection id of the service's own transactions."""


Grant = tuple[int, tuple[bytes, ...]]
"""A connection, and the keys of what it may answer for by itself once this is committed."""


class Tx(msgspec.Struct):
    """One for each operation: a dataclass takes three times as long to make."""

    kv: KVTransaction
    now_ns: int
    connection: int
    undo: list[Callable[[], None]]
    grants: list[Grant] = []

    def mark(self) -> tuple[int, int]:
        """How far it is now, for ``roll_back``."""
        return self.kv.mark(), len(self.undo)

    def roll_back(self, mark: tuple[int, int]) -> None:
        """Takes back what happened since then, in the store and in memory."""
        self.kv.roll_back(mark[0])
        roll_back(self.undo, mark[1])


def roll_back(undo: list[Callable[[], None]], mark: int = 0) -> None:
    """Takes back what was done after ``undo`` had ``mark`` entries."""
    while len(undo) > mark:
        undo.pop()()


class Counter:
    """Numbers that are never given twice, not even by the next process: the store holds the end of
    the range that this process may give from."""

    def __init__(self, name: bytes, first: int, stored: bytes | None, step: int) -> None:
        self._key = records.counter_key(name)
        self._step = step
        self._next = self._end = first if stored is None else int.from_bytes(stored, "big")

    def take(self, tx: Tx, count: int = 1) -> int:
        """The first of ``count`` numbers in a row."""
        if self._next + count > self._end:
            self._extend(tx, count)
        first = self._next
        self._next += count
        return first

    def given(self, tx: Tx) -> int:
        """Nothing from here on was ever given out by anybody: the end of the last range."""
        stored = tx.kv.get(self._key)
        return self._end if stored is None else int.from_bytes(stored, "big")

    def _extend(self, tx: Tx, count: int) -> None:
        before = self._next, self._end
        stored = tx.kv.get(self._key)
        if stored is not None and int.from_bytes(stored, "big") > self._end:
            # Another server took the numbers behind ours; the few that are left of ours are lost.
            self._next = int.from_bytes(stored, "big")
        self._end = self._next + count + self._step - 1
        tx.kv.put(self._key, records.u64(self._end))
        tx.undo.append(lambda: self._shrink(*before))

    def _shrink(self, first: int, end: int) -> None:
        """The longer range was never recorded; what was given from it is undone as well."""
        self._next, self._end = first, end


class Counters:
    """All of the service's counters."""

    def __init__(self, get: Callable[[bytes], bytes | None]) -> None:
        def counter(name: bytes, first: int, step: int) -> Counter:
            return Counter(name, first, get(records.counter_key(name)), step)

        self.inode = counter(b"inode", 16, INODE_RANGE)
        """Numbers below 16 are the root's, ``/kv``'s and in reserve."""
        self.batch = counter(b"batch", 1, INODE_RANGE)
        self.target = counter(b"target", 1, 1)
        self.chain = counter(b"chain", 1, 1)
        self.start = counter(b"start", 1, 1)
        """Starts of the service: makes map versions grow across restarts."""
        self.move = counter(b"move", 1, 1)
        """Rounds of movers. One at a time, so that they grow whichever server is asked."""


def change_usage(tx: Tx, inodes: int, file_bytes: int) -> None:
    """Keeps the totals that statfs and the capacity need. In the store, because counting at start
    costs 2 s for a million inodes; one small record more a group costs 3 us."""
    inodes_before, bytes_before = records.unpack_usage(tx.kv.get(records.USAGE_KEY))
    changed = max(0, inodes_before + inodes), max(0, bytes_before + file_bytes)
    tx.kv.put(records.USAGE_KEY, records.pack_usage(changed))
