"""Targets and chains: who serves, what they hold, where new chunks go.

A target registers with its first heartbeat and gets a number and a chain of its own; both are
recorded. Whether it serves is not: that is a lease, renewed by each heartbeat. After a restart of
this service every recorded target has one lease's time to be heard of again, so that a restart does
not look like the loss of all disks.

On a shared store the last heartbeat of each target is recorded as well (``BEAT``), because it comes
to one server only. The others count the lease from when they hear of the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

from kvfs_base.cluster import (
    Chain,
    ClusterMap,
    Heartbeat,
    HeartbeatReply,
    Target,
    TargetOrders,
    TargetReport,
    TargetState,
)
from kvfs_base.errors import InvalidRequest, NoTarget
from kvfs_base.limits import (
    GIB,
    MIB,
    STRIPE_MAX,
    TARGET_LEASE_SECONDS,
    TARGET_UUID_CHARS_MAX,
)
from kvfs_base.seams import Clock
from kvfs_metadata import records
from kvfs_metadata.engine import KVRead, Writes, scan
from kvfs_metadata.records import BeatValue, ChainRecord, TargetRecord
from kvfs_metadata.removals import Removals
from kvfs_metadata.transaction import Counters, Tx

CAPACITY_FRACTION = 0.90
"""Without a configured capacity the cache may fill this much of the disks."""


def full_below_bytes(capacity_bytes: int) -> int:
    """A target with less free space takes no new chunks: 2 %, at most 512 MiB."""
    return min(capacity_bytes // 50, 512 * MIB)


def evict_below_bytes(capacity_bytes: int) -> int:
    """A target with less free space makes the cache evict: 5 %, at most 2 GiB."""
    return min(capacity_bytes // 20, 2 * GIB)


@dataclasses.dataclass(slots=True)
class _TargetEntry:
    uuid: str
    record: TargetRecord
    free_bytes: int
    healthy: bool
    heard_at: float
    """Monotonic seconds."""
    state: TargetState


class ClusterState:
    """``recorded`` if the store is shared with other servers."""

    def __init__(
        self,
        read: KVRead,
        clock: Clock,
        counters: Counters,
        removals: Removals,
        *,
        recorded: bool = False,
    ) -> None:
        self._clock = clock
        self._recorded = recorded
        self._counters = counters
        self._removals = removals
        self._by_uuid: dict[str, _TargetEntry] = {}
        self._by_id: dict[int, _TargetEntry] = {}
        self._chains: dict[int, ChainRecord] = {}
        self._serving: list[int] = []
        self._turn = 0
        self._changes = 0
        self._start = 0
        for prefix in (records.CHAIN, records.TARGET, records.BEAT):
            self.apply(dict(scan(read, prefix)))

    def apply(self, writes: Writes) -> None:
        """Another server committed ``writes``."""
        beats: list[tuple[int, BeatValue]] = []
        changed = False
        for key, value in writes.items():
            if key.startswith(records.CHAIN):
                self._follow_chain(int.from_bytes(key[4:8], "big"), value)
                changed = True
            elif key.startswith(records.TARGET):
                self._follow_target(key[4:].decode(), value)
                changed = True
            elif key.startswith(records.BEAT) and value is not None:
                beats.append((int.from_bytes(key[4:8], "big"), records.unpack_beat(value)))
        if changed:
            self._changed()
        for target_id, beat in beats:
            if target_id in self._by_id:
                self._heard(self._by_id[target_id], beat)

    def _follow_chain(self, chain_id: int, value: bytes | None) -> None:
        if value is None:
            self._chains.pop(chain_id, None)
        else:
            self._chains[chain_id] = records.decode_chain(value)

    def _follow_target(self, uuid: str, value: bytes | None) -> None:
        entry = self._by_uuid.get(uuid)
        if value is None:
            if entry is not None:
                del self._by_uuid[uuid], self._by_id[entry.record.target_id]
            return
        record = records.decode_target(value)
        if entry is None:
            self._enter(uuid, record, free_bytes=record.capacity_bytes)
        else:
            entry.record = record

    def started(self, number: int) -> None:
        """``number`` grows with every start of the service, so map versions never go back."""
        self._start = number

    def _enter(self, uuid: str, record: TargetRecord, free_bytes: int) -> _TargetEntry:
        entry = _TargetEntry(
            uuid, record, free_bytes, True, self._clock.monotonic(), TargetState.SERVING
        )
        self._by_uuid[uuid] = self._by_id[record.target_id] = entry
        return entry

    # --- the map

    @property
    def version(self) -> int:
        return self._start << 32 | self._changes

    def map(self) -> ClusterMap:
        self.expire()
        return ClusterMap(
            version=self.version,
            targets=tuple(_as_target(entry) for entry in self._by_id.values()),
            chains=tuple(
                Chain(chain_id, record.version, record.targets)
                for chain_id, record in self._chains.items()
            ),
        )

    def _changed(self) -> None:
        self._changes += 1
        serving = {
            target_id
            for target_id, entry in self._by_id.items()
            if entry.state is TargetState.SERVING
        }
        self._serving = [
            chain_id
            for chain_id, chain in self._chains.items()
            if serving.issuperset(chain.targets)
        ]

    def expire(self) -> None:
        """Takes targets whose lease is over out of service."""
        oldest = self._clock.monotonic() - TARGET_LEASE_SECONDS
        late = [
            entry
            for entry in self._by_id.values()
            if entry.heard_at < oldest and entry.state is not TargetState.OFFLINE
        ]
        for entry in late:
            entry.state = TargetState.OFFLINE
        if late:
            self._changed()

    # --- heartbeats

    def heartbeat(self, tx: Tx, request: Heartbeat) -> HeartbeatReply:
        """Registers, renews, and answers with what is to be removed."""
        self.expire()
        orders = tuple(self._report(tx, request, report) for report in request.targets)
        return HeartbeatReply(self.version, orders)

    def _report(self, tx: Tx, request: Heartbeat, report: TargetReport) -> TargetOrders:
        entry = self._by_uuid.get(report.uuid)
        if entry is None:
            entry = self._register(tx, request, report)
        target_id = entry.record.target_id
        record = _record(target_id, request, report)
        if record != entry.record:
            tx.kv.put(records.target_key(report.uuid), records.encode(record))
            tx.undo.append(partial(setattr, entry, "record", entry.record))
            entry.record = record
            self._changed()
        beat = BeatValue(report.free_bytes, report.healthy)
        self._heard(entry, beat)
        if self._recorded:
            tx.kv.put(records.beat_key(target_id), records.pack_beat(beat))
        self._removals.acknowledge(tx, target_id, report.removed_seq)
        return TargetOrders(report.uuid, target_id, self._removals.head(tx.kv, target_id))

    def _heard(self, entry: _TargetEntry, beat: BeatValue) -> None:
        entry.free_bytes = beat.free_bytes
        entry.healthy = beat.healthy
        entry.heard_at = self._clock.monotonic()
        state = _state(entry.record, beat)
        if state is not entry.state:
            entry.state = state
            self._changed()

    def _register(self, tx: Tx, request: Heartbeat, report: TargetReport) -> _TargetEntry:
        if not 0 < len(report.uuid.encode()) <= TARGET_UUID_CHARS_MAX:
            raise InvalidRequest(detail="the uuid of a target is 1 to 128 bytes")
        target_id = self._counters.target.take(tx)
        chain_id = self._counters.chain.take(tx)
        record = _record(target_id, request, report)
        chain = ChainRecord(version=1, targets=(target_id,))
        tx.kv.put(records.target_key(report.uuid), records.encode(record))
        tx.kv.put(records.chain_key(chain_id), records.encode(chain))
        entry = self._enter(report.uuid, record, report.free_bytes)
        self._chains[chain_id] = chain
        self._changed()
        tx.undo.append(partial(self._forget, report.uuid, target_id, chain_id))
        return entry

    def _forget(self, uuid: str, target_id: int, chain_id: int) -> None:
        del self._by_uuid[uuid], self._by_id[target_id], self._chains[chain_id]
        self._changed()

    # --- placement

    def place_file(self) -> tuple[int, ...]:
        """Chains for a new file, the next one first. Raises NoTarget."""
        serving = self._require_serving()
        turn = self._turn = (self._turn + 1) % len(serving)
        count = min(STRIPE_MAX, len(serving))
        return tuple(serving[(turn + i) % len(serving)] for i in range(count))

    def place_blocks(self, count: int) -> list[int]:
        """A chain for each of ``count`` blocks, in rotation. Raises NoTarget."""
        serving = self._require_serving()
        turn = self._turn
        self._turn = (turn + count) % len(serving)
        return [serving[(turn + i) % len(serving)] for i in range(count)]

    def _require_serving(self) -> list[int]:
        self.expire()
        if not self._serving:
            raise NoTarget(detail=f"none of {len(self._by_id)} targets is serving")
        return self._serving

    def remove_chunks(
        self, tx: Tx, chains: Sequence[int], inode: int, end: int, size: int = 0
    ) -> None:
        """Queues the removal of chunks 0 to ``end`` of ``inode`` on every target of ``chains``."""
        removal = records.RemovalValue(inode, 0, end, size)
        for chain_id in chains:
            chain = self._chains.get(chain_id)
            if chain is not None:
                self._removals.add(tx, chain.targets, removal)

    # --- space

    def disk_capacity_bytes(self) -> int:
        """What the targets hold; a volume that several of them share counts once."""
        return sum(max(e.record.capacity_bytes for e in group) for group in self._volumes())

    def disk_free_bytes(self) -> int:
        return sum(max(e.free_bytes for e in group) for group in self._volumes())

    def _volumes(self) -> Iterable[list[_TargetEntry]]:
        volumes: dict[tuple[str, str], list[_TargetEntry]] = {}
        for entry in self._by_id.values():
            record = entry.record
            name = (record.host_id, record.volume) if record.volume else ("", entry.uuid)
            volumes.setdefault(name, []).append(entry)
        return volumes.values()

    def missing_bytes(self) -> int:
        """How much the target that is worst off lacks of what it keeps free, not counting what it
        is about to remove. Somebody else may be filling the disk."""
        return max(
            (
                evict_below_bytes(entry.record.capacity_bytes)
                - entry.free_bytes
                - self._removals.pending_bytes(entry.record.target_id)
                for entry in self._by_id.values()
                if entry.state is not TargetState.OFFLINE
            ),
            default=0,
        )

    def statistics(self) -> dict[str, int]:
        states = [entry.state for entry in self._by_id.values()]
        return {
            "targets": len(states),
            "targets_serving": states.count(TargetState.SERVING),
            "targets_full": states.count(TargetState.FULL),
            "targets_offline": states.count(TargetState.OFFLINE),
            "removals_pending": self._removals.pending_count(),
        }


def _record(target_id: int, request: Heartbeat, report: TargetReport) -> TargetRecord:
    return TargetRecord(
        target_id=target_id,
        server_id=request.server_id,
        host_id=request.host_id,
        unix=request.unix,
        tcp=request.tcp,
        capacity_bytes=report.capacity_bytes,
        volume=report.volume,
    )


def _state(record: TargetRecord, beat: BeatValue) -> TargetState:
    if not beat.healthy:
        return TargetState.OFFLINE
    if beat.free_bytes < full_below_bytes(record.capacity_bytes):
        return TargetState.FULL
    return TargetState.SERVING


def _as_target(entry: _TargetEntry) -> Target:
    record = entry.record
    return Target(
        target_id=record.target_id,
        server_id=record.server_id,
        host_id=record.host_id,
        unix=record.unix,
        tcp=record.tcp,
        state=entry.state,
        capacity_bytes=record.capacity_bytes,
        free_bytes=entry.free_bytes,
    )
