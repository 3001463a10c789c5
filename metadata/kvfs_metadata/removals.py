"""What the chunk servers have yet to remove.

Each target has a queue in the store, numbered upwards. Heartbeat replies carry its head, again and
again, until the target reports a number as done; then everything up to it is deleted. So a removal
outlives restarts of either side, and doing one twice is harmless because inode numbers are never
used again.

The queue of a target that never comes back stays. It is bounded by what the target holds: nothing
is placed on a target that does not serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kvfs_base.cluster import Removal
from kvfs_base.limits import REMOVALS_PER_HEARTBEAT
from kvfs_metadata import records
from kvfs_metadata.engine import KVRead, prefix_end, scan
from kvfs_metadata.records import RemovalValue
from kvfs_metadata.transaction import Tx

ACKNOWLEDGE_MAX = REMOVALS_PER_HEARTBEAT
"""Entries one heartbeat deletes. A target reports no more than it was sent."""


class _Queue:
    def __init__(self, next_seq: int) -> None:
        self.next_seq = next_seq
        self.count = 0
        self.size = 0

    def add(self, count: int, size: int) -> None:
        self.count += count
        self.size += size


class Removals:
    """All queues. Memory holds each queue's length and the bytes it will free."""

    def __init__(self, read: KVRead) -> None:
        self._queues: dict[int, _Queue] = {}
        for key, value in scan(read, records.REMOVAL_COUNTER):
            target_id = int.from_bytes(key[4:8], "big")
            self._queues[target_id] = _Queue(int.from_bytes(value, "big"))
        for key, value in scan(read, records.REMOVAL):
            queue = self._queue(int.from_bytes(key[4:8], "big"))
            queue.add(1, records.unpack_removal(value).size)

    def _queue(self, target_id: int) -> _Queue:
        return self._queues.setdefault(target_id, _Queue(1))

    def add(self, tx: Tx, target_ids: Sequence[int], removal: RemovalValue) -> None:
        """Queues ``removal`` for every one of the targets."""
        value = records.pack_removal(removal)
        for target_id in target_ids:
            queue = self._queue(target_id)
            seq = queue.next_seq
            tx.kv.put(records.removal_key(target_id, seq), value)
            # Kept apart from the entries: an empty queue must not start from 1 again.
            tx.kv.put(records.removal_counter_key(target_id), records.u64(seq + 1))
            queue.next_seq = seq + 1
            queue.add(1, removal.size)
            tx.undo.append(partial(self._take_back, queue, removal.size))

    @staticmethod
    def _take_back(queue: _Queue, size: int) -> None:
        queue.next_seq -= 1
        queue.add(-1, -size)

    def acknowledge(self, tx: Tx, target_id: int, seq: int) -> None:
        """The target is done up to and including ``seq``."""
        queue = self._queue(target_id)
        if queue.count == 0 or seq <= 0:
            return
        start = records.removal_key(target_id, 0)
        end = records.removal_key(target_id, seq + 1)
        done = tx.kv.range(start, end, ACKNOWLEDGE_MAX)
        for key, _ in done:
            tx.kv.delete(key)
        size = sum(records.unpack_removal(value).size for _, value in done)
        queue.add(-len(done), -size)
        tx.undo.append(partial(queue.add, len(done), size))

    def head(self, read: KVRead, target_id: int) -> tuple[Removal, ...]:
        """What the target is to do next, in order."""
        if self.pending(target_id) == 0:
            return ()
        prefix = records.REMOVAL + records.u32(target_id)
        items = read.range(prefix, prefix_end(prefix), REMOVALS_PER_HEARTBEAT)
        return tuple(
            Removal(records.number_at(key, 8), value.inode, value.first, value.end)
            for key, value in ((k, records.unpack_removal(v)) for k, v in items)
        )

    def pending(self, target_id: int) -> int:
        queue = self._queues.get(target_id)
        return queue.count if queue else 0

    def pending_bytes(self, target_id: int) -> int:
        queue = self._queues.get(target_id)
        return queue.size if queue else 0

    def pending_count(self) -> int:
        return sum(queue.count for queue in self._queues.values())
