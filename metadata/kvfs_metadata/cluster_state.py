"""Targets and chains: who serves, what they hold, where new chunks go.

A target registers with its first heartbeat and gets a number and a chain of its own; both are
recorded. Whether it serves is not: that is a lease, renewed by each heartbeat. After a restart of
this service every recorded target has one lease's time to be heard of again, so that a restart does
not look like the loss of all disks.

A target can be drained (nothing new is placed on it, ``draining.py`` empties it) and removed.
Removed ones are remembered (``GONE``): a server that was away does not bring them back.

On a shared store the last heartbeat of each target is recorded as well (``BEAT``), because it comes
to one server only. The others count the lease from when they hear of the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

import msgspec

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
from kvfs_base.errors import InvalidRequest, NoTarget, TargetInUse, TargetUnknown
from kvfs_base.limits import (
    GIB,
    MIB,
    REMOVED_TARGETS_MAX,
    STRIPE_MAX,
    TARGET_LEASE_SECONDS,
    TARGET_UUID_CHARS_MAX,
)
from kvfs_base.seams import Clock
from kvfs_metadata import records
from kvfs_metadata.engine import KVRead, Writes, scan
from kvfs_metadata.records import BeatValue, ChainRecord, GoneRecord, TargetRecord
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
class TargetEntry:
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
        self._by_uuid: dict[str, TargetEntry] = {}
        self._by_id: dict[int, TargetEntry] = {}
        self._chains: dict[int, ChainRecord] = {}
        self._gone: dict[str, GoneRecord] = {}
        self.departures = 0
        """Grows when targets begin or cease to be drained, or are removed."""
        self.sweep_wanted = read.get(records.SWEEP_KEY) is not None
        """Something may refer to targets that were removed."""
        self._serving: list[int] = []
        self._turn = 0
        self._changes = 0
        self._start = 0
        for prefix in (records.CHAIN, records.TARGET, records.BEAT, records.GONE):
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
            elif key.startswith(records.GONE):
                self._follow_gone(key[4:].decode(), value)
            elif key == records.SWEEP_KEY:
                self.sweep_wanted = value is not None
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
                self.departures += 1
            return
        record = records.decode_target(value)
        if entry is None:
            self._enter(uuid, record, free_bytes=record.capacity_bytes)
        else:
            self._set_record(entry, record)

    def _follow_gone(self, uuid: str, value: bytes | None) -> None:
        if value is None:
            self._gone.pop(uuid, None)
        else:
            self._gone[uuid] = records.decode_gone(value)

    def started(self, number: int) -> None:
        """``number`` grows with every start of the service, so map versions never go back."""
        self._start = number

    def _enter(self, uuid: str, record: TargetRecord, free_bytes: int) -> TargetEntry:
        state = _state(record, BeatValue(free_bytes, True))
        entry = TargetEntry(uuid, record, free_bytes, True, self._clock.monotonic(), state)
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
        refused = tuple(r.uuid for r in request.targets if r.uuid in self._gone)
        orders = tuple(
            self._report(tx, request, report)
            for report in request.targets
            if report.uuid not in self._gone
        )
        return HeartbeatReply(self.version, orders, refused)

    def _report(self, tx: Tx, request: Heartbeat, report: TargetReport) -> TargetOrders:
        entry = self._by_uuid.get(report.uuid)
        if entry is None:
            entry = self._register(tx, request, report)
        target_id = entry.record.target_id
        record = msgspec.structs.replace(
            _reported(target_id, request, report),
            draining=entry.record.draining,
            keep_blocks=entry.record.keep_blocks,
            drained=entry.record.drained,
        )
        self._record(tx, entry, record)
        beat = BeatValue(report.free_bytes, report.healthy)
        self._heard(entry, beat)
        if self._recorded:
            tx.kv.put(records.beat_key(target_id), records.pack_beat(beat))
        self._removals.acknowledge(tx, target_id, report.removed_seq)
        return TargetOrders(report.uuid, target_id, self._removals.head(tx.kv, target_id))

    def _record(self, tx: Tx, entry: TargetEntry, record: TargetRecord) -> None:
        if record != entry.record:
            tx.kv.put(records.target_key(entry.uuid), records.encode(record))
            tx.undo.append(partial(self._set_record, entry, entry.record))
            self._set_record(entry, record)

    def _set_record(self, entry: TargetEntry, record: TargetRecord) -> None:
        before, entry.record = entry.record, record
        if (before.draining, before.keep_blocks) != (record.draining, record.keep_blocks):
            self.departures += 1
        if entry.state is not TargetState.OFFLINE:
            entry.state = _state(record, BeatValue(entry.free_bytes, entry.healthy))
        self._changed()

    def _heard(self, entry: TargetEntry, beat: BeatValue) -> None:
        entry.free_bytes = beat.free_bytes
        entry.healthy = beat.healthy
        entry.heard_at = self._clock.monotonic()
        state = _state(entry.record, beat)
        if state is not entry.state:
            entry.state = state
            self._changed()

    def _register(self, tx: Tx, request: Heartbeat, report: TargetReport) -> TargetEntry:
        if not 0 < len(report.uuid.encode()) <= TARGET_UUID_CHARS_MAX:
            raise InvalidRequest(detail="the uuid of a target is 1 to 128 bytes")
        target_id = self._counters.target.take(tx)
        chain_id = self._counters.chain.take(tx)
        record = _reported(target_id, request, report)
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

    # --- targets that leave

    def target(self, target_id: int) -> TargetEntry:
        """Raises TargetUnknown."""
        entry = self._by_id.get(target_id)
        if entry is None:
            raise TargetUnknown(name=str(target_id))
        return entry

    def targets(self) -> list[TargetEntry]:
        self.expire()
        return list(self._by_id.values())

    def removed(self) -> dict[str, GoneRecord]:
        return self._gone

    def chains_of(self, target_id: int) -> list[int]:
        return [chain_id for chain_id, c in self._chains.items() if target_id in c.targets]

    def has_chain(self, chain_id: int) -> bool:
        return chain_id in self._chains

    def has_departures(self) -> bool:
        """Whether there is, or may be, anything that is to leave a target."""
        return self.sweep_wanted or any(
            entry.record.draining and not entry.record.drained for entry in self._by_id.values()
        )

    def leaving_chains(self) -> tuple[set[int], set[int]]:
        """Chains of draining targets, and those of them that keep their blocks."""
        draining: set[int] = set()
        keeping: set[int] = set()
        for target_id, entry in self._by_id.items():
            if entry.record.draining:
                draining.update(self.chains_of(target_id))
                if entry.record.keep_blocks:
                    keeping.update(self.chains_of(target_id))
        return draining, keeping

    def set_draining(self, tx: Tx, target_id: int, on: bool, keep_blocks: bool) -> None:
        """Raises TargetUnknown."""
        entry = self.target(target_id)
        keep_blocks = on and keep_blocks
        before = entry.record
        if (before.draining, before.keep_blocks) != (on, keep_blocks):
            record = msgspec.structs.replace(
                before, draining=on, keep_blocks=keep_blocks, drained=False
            )
            self._record(tx, entry, record)

    def set_drained(self, tx: Tx, target_id: int) -> None:
        entry = self.target(target_id)
        self._record(tx, entry, msgspec.structs.replace(entry.record, drained=True))

    def remove(self, tx: Tx, target_id: int, *, force: bool) -> None:
        """Raises TargetUnknown, TargetInUse."""
        self.expire()
        entry = self.target(target_id)
        if not force:
            self._require_empty(entry)
        chains = {chain_id: self._chains[chain_id] for chain_id in self.chains_of(target_id)}
        for key in map(records.chain_key, chains):
            tx.kv.delete(key)
        tx.kv.delete(records.target_key(entry.uuid))
        tx.kv.delete(records.beat_key(target_id))
        self._removals.drop(tx, target_id)
        self._set_sweep(tx, True)
        self._remember_gone(tx, entry)
        del self._by_uuid[entry.uuid], self._by_id[target_id]
        for chain_id in chains:
            del self._chains[chain_id]
        tx.undo.append(partial(self._bring_back, entry, chains))
        self.departures += 1
        self._changed()

    def _require_empty(self, entry: TargetEntry) -> None:
        record = entry.record
        if not record.draining:
            raise TargetInUse(target_id=record.target_id, detail="it is not draining")
        if not record.drained:
            raise TargetInUse(target_id=record.target_id, detail="it is not empty")
        removals = self._removals.pending(record.target_id)
        if removals and entry.state is not TargetState.OFFLINE:
            detail = "it has chunks to remove from its disk"
            raise TargetInUse(target_id=record.target_id, removals=removals, detail=detail)

    def _bring_back(self, entry: TargetEntry, chains: dict[int, ChainRecord]) -> None:
        self._by_uuid[entry.uuid] = self._by_id[entry.record.target_id] = entry
        self._chains |= chains
        self.departures += 1
        self._changed()

    def _remember_gone(self, tx: Tx, entry: TargetEntry) -> None:
        record = GoneRecord(entry.record.target_id, entry.record.server_id, tx.now_ns)
        tx.kv.put(records.gone_key(entry.uuid), records.encode(record))
        self._gone[entry.uuid] = record
        tx.undo.append(partial(self._gone.__delitem__, entry.uuid))
        while len(self._gone) > REMOVED_TARGETS_MAX:
            self._forget_gone(tx, min(self._gone, key=lambda uuid: self._gone[uuid].removed_ns))

    def _forget_gone(self, tx: Tx, uuid: str) -> None:
        tx.kv.delete(records.gone_key(uuid))
        tx.undo.append(partial(self._gone.__setitem__, uuid, self._gone.pop(uuid)))

    def admit(self, tx: Tx, uuid: str) -> None:
        """A removed target may register again. Raises TargetUnknown."""
        if uuid not in self._gone:
            raise TargetUnknown(name=uuid)
        self._forget_gone(tx, uuid)

    def swept(self, tx: Tx) -> None:
        """Nothing refers to removed targets but files that lost data."""
        self._set_sweep(tx, False)

    def _set_sweep(self, tx: Tx, wanted: bool) -> None:
        if wanted:
            tx.kv.put(records.SWEEP_KEY, b"")
        else:
            tx.kv.delete(records.SWEEP_KEY)
        tx.undo.append(partial(setattr, self, "sweep_wanted", self.sweep_wanted))
        self.sweep_wanted = wanted

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

    def place_instead(self, chains: Sequence[int]) -> int | None:
        """A chain for chunks to come of a file that is on ``chains``, if possible another one."""
        self.expire()
        if not self._serving:
            return None
        self._turn = (self._turn + 1) % len(self._serving)
        turned = self._serving[self._turn :] + self._serving[: self._turn]
        return next((chain for chain in turned if chain not in chains), turned[0])

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
        """What the targets hold; a volume that several of them share counts once. Where all are
        draining only what they still hold counts, so that the capacity shrinks as they empty."""
        return sum(
            max(
                e.record.capacity_bytes
                - (e.free_bytes if all(other.record.draining for other in group) else 0)
                for e in group
            )
            for group in self._volumes()
        )

    def disk_free_bytes(self) -> int:
        """For new chunks."""
        return sum(
            max(e.free_bytes for e in group)
            for group in self._volumes()
            if not all(e.record.draining for e in group)
        )

    def _volumes(self) -> Iterable[list[TargetEntry]]:
        volumes: dict[tuple[str, str], list[TargetEntry]] = {}
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
            "targets_draining": states.count(TargetState.DRAINING),
            "targets_offline": states.count(TargetState.OFFLINE),
            "removals_pending": self._removals.pending_count(),
        }


def _reported(target_id: int, request: Heartbeat, report: TargetReport) -> TargetRecord:
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
    if record.draining:
        return TargetState.DRAINING
    if beat.free_bytes < full_below_bytes(record.capacity_bytes):
        return TargetState.FULL
    return TargetState.SERVING


def _as_target(entry: TargetEntry) -> Target:
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
