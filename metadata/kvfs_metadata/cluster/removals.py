"""What the chunk servers have yet to remove.

Each target has a queue in the store, numbered upwards. Heartbeat replies carry its head, again and
again, until the target reports a number as done; then everything up to it is deleted. So a removal
outlives restarts of either side, and doing one twice is harmless because inode numbers are never
used again.

The queue of a target that never comes back stays until the target is removed from the cluster. It
is bounded by what the target holds: nothing is placed on a target that does not serve.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

from kvfs_base.cluster import Removal
from kvfs_base.limits import REMOVALS_PER_HEARTBEAT
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, Writes, prefix_end, scan
from kvfs_metadata.records import RemovalState, RemovalValue
from kvfs_metadata.transaction import Tx

ACKNOWLEDGE_MAX = REMOVALS_PER_HEARTBEAT
"""Entries one heartbeat deletes. A target reports no more than it was sent."""


class _Queue:
    """One target's: the next number, and how many removals of how many bytes wait."""

    def __init__(self, state: RemovalState) -> None:
        self.state = state

    def change(self, tx: Tx, target_id: int, state: RemovalState) -> None:
        tx.undo.append(partial(setattr, self, "state", self.state))
        self.state = state
        tx.kv.put(records.removal_state_key(target_id), records.pack_removal_state(state))


class Removals:
    """All queues. Memory holds each queue's length and the bytes it will free."""

    def __init__(self, read: KVRead) -> None:
        self._queues: dict[int, _Queue] = {}
        self.apply(dict(scan(read, records.REMOVAL_STATE)))

    def apply(self, writes: Writes) -> None:
        """Another server committed ``writes``. A queue's state says it all."""
        for key, value in writes.items():
            if not key.startswith(records.REMOVAL_STATE):
                continue
            target_id = int.from_bytes(key[4:8], "big")
            if value is None:
                self._queues.pop(target_id, None)
            else:
                self._queue(target_id).state = records.unpack_removal_state(value)

    def _queue(self, target_id: int) -> _Queue:
        queue = self._queues.get(target_id)
        if queue is None:
            queue = self._queues[target_id] = _Queue(RemovalState(1, 0, 0))
        return queue

    def add(self, tx: Tx, target_ids: Sequence[int], removal: RemovalValue) -> None:
        """Queues ``removal`` for every one of the targets."""
        value = records.pack_removal(removal)
        for target_id in target_ids:
            queue = self._queue(target_id)
            seq, count, size = queue.state
            tx.kv.put(records.removal_key(target_id, seq), value)
            queue.change(tx, target_id, RemovalState(seq + 1, count + 1, size + removal.size))

    def acknowledge(self, tx: Tx, target_id: int, seq: int) -> None:
        """The target is done up to and including ``seq``."""
        queue = self._queue(target_id)
        next_seq, count, size = queue.state
        if count == 0 or seq <= 0:
            return
        start = records.removal_key(target_id, 0)
        end = records.removal_key(target_id, seq + 1)
        done = tx.kv.range(start, end, ACKNOWLEDGE_MAX)
        if not done:
            return
        for key, _ in done:
            tx.kv.delete(key)
        freed = sum(records.unpack_removal(value).size for _, value in done)
        queue.change(tx, target_id, RemovalState(next_seq, count - len(done), size - freed))

    def drop(self, tx: Tx, target_id: int) -> None:
        """The target was removed. What lies in its queue is left to ``sweep``."""
        tx.kv.delete(records.removal_state_key(target_id))
        queue = self._queues.pop(target_id, None)
        if queue is not None:
            tx.undo.append(partial(self._queues.__setitem__, target_id, queue))

    def sweep(self, tx: Tx, known: Collection[int], count_max: int) -> bool:
        """Deletes queued removals of targets that are not ``known``, one transaction's worth.
        Whether there may be more."""
        start = records.REMOVAL
        while True:
            item = tx.kv.range(start, prefix_end(records.REMOVAL), 1)
            if not item:
                return False
            target_id = int.from_bytes(item[0][0][4:8], "big")
            prefix = records.REMOVAL + records.u32(target_id)
            if target_id not in known:
                for key, _ in tx.kv.range(prefix, prefix_end(prefix), count_max):
                    tx.kv.delete(key)
                return True
            start = prefix_end(prefix)

    def head(self, read: KVRead, target_id: int) -> tuple[Removal, ...]:
        """What the target is to do next, in order."""
        if self.pending(target_id) == 0:
            return ()
        prefix = records.REMOVAL + records.u32(target_id)
        items = read.range(prefix, prefix_end(prefix), REMOVALS_PER_HEARTBEAT)
        return tuple(
            Removal(records.number_at(key, 8), value.inode, value.first, value.end, value.chain)
            for key, value in ((k, records.unpack_removal(v)) for k, v in items)
        )

    def pending(self, target_id: int) -> int:
        queue = self._queues.get(target_id)
        return queue.state.waiting if queue else 0

    def waits(self, read: KVRead, target_id: int, inode: int) -> bool:
        """Whether the target may yet be told to remove chunks of ``inode``."""
        if self.pending(target_id) == 0:
            return False
        prefix = records.REMOVAL + records.u32(target_id)
        items = read.range(prefix, prefix_end(prefix), REMOVALS_PER_HEARTBEAT + 1)
        return len(items) > REMOVALS_PER_HEARTBEAT or any(
            records.unpack_removal(value).inode == inode for _, value in items
        )

    def last_queued(self, target_id: int) -> int:
        """The number of the last removal of a queue, 0 if nothing waits there."""
        queue = self._queues.get(target_id)
        return queue.state.next_seq - 1 if queue and queue.state.waiting else 0

    def is_past(self, read: KVRead, target_id: int, seq: int) -> bool:
        """Whether the target has acknowledged everything up to ``seq``."""
        if self.pending(target_id) == 0:
            return True
        prefix = records.REMOVAL + records.u32(target_id)
        first = read.range(prefix, prefix_end(prefix), 1)
        return not first or records.number_at(first[0][0], 8) > seq

    def pending_bytes(self, target_id: int) -> int:
        queue = self._queues.get(target_id)
        return queue.state.size if queue else 0

    def pending_count(self) -> int:
        return sum(queue.state.waiting for queue in self._queues.values())
