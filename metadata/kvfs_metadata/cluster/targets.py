"""The targets in memory: what is recorded of each, when it was heard of, and what follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial

from kvfs_base.cluster import Target, TargetState
from kvfs_base.errors import TargetUnknown
from kvfs_base.limits import (
    GIB,
    MIB,
    TARGET_LEASE_SECONDS,
)
from kvfs_base.seams import Clock
from kvfs_metadata import records
from kvfs_metadata.cluster.chains import MapVersion
from kvfs_metadata.limits import REJOIN_SECONDS, REJOIN_SECONDS_MAX
from kvfs_metadata.records import BeatValue, TargetRecord
from kvfs_metadata.transaction import Tx


def full_below_bytes(capacity_bytes: int) -> int:
    """A target with less free space takes no new chunks: 2 %, at most 512 MiB."""
    return min(capacity_bytes // 50, 512 * MIB)


def evict_below_bytes(capacity_bytes: int) -> int:
    """A target with less free space makes the cache evict: 5 %, at most 2 GiB."""
    return min(capacity_bytes // 20, 2 * GIB)


@dataclasses.dataclass(slots=True)
class TargetEntry:
    """Times are monotonic seconds of this server."""

    uuid: str
    record: TargetRecord
    free_bytes: int
    healthy: bool
    heard_at: float
    state: TargetState
    renewed_at: float
    """When its lease as a member of chains began: not with heartbeats while it is to be fenced."""
    suspected_at: float
    number: int = 0
    """Of its last heartbeat."""

    @property
    def target_id(self) -> int:
        return self.record.target_id

    @property
    def is_settled(self) -> bool:
        """It stays, as far as anybody knows."""
        return not self.record.draining


class TargetTable:
    """``departures`` grows when targets begin or cease to be drained, or are removed."""

    def __init__(self, clock: Clock, version: MapVersion) -> None:
        self._clock = clock
        self._version = version
        self.departures = 0
        self._by_uuid: dict[str, TargetEntry] = {}
        self._by_id: dict[int, TargetEntry] = {}
        self._expires_from = 0.0
        """Until then ``expire`` has nothing to do."""

    def enter(self, uuid: str, record: TargetRecord, free_bytes: int) -> TargetEntry:
        """One that was not known. It has a whole lease to be heard of."""
        now = self._clock.monotonic()
        state = state_of(record, BeatValue(free_bytes, True))
        entry = TargetEntry(uuid, record, free_bytes, True, now, state, now, now)
        self.add(entry)
        return entry

    def add(self, entry: TargetEntry) -> None:
        self._by_uuid[entry.uuid] = self._by_id[entry.target_id] = entry
        self._expires_from = min(self._expires_from, entry.heard_at + TARGET_LEASE_SECONDS)

    def remove(self, entry: TargetEntry) -> None:
        del self._by_uuid[entry.uuid], self._by_id[entry.target_id]

    def named(self, uuid: str) -> TargetEntry | None:
        return self._by_uuid.get(uuid)

    def get(self, target_id: int) -> TargetEntry | None:
        return self._by_id.get(target_id)

    def __getitem__(self, target_id: int) -> TargetEntry:
        """Raises TargetUnknown."""
        entry = self._by_id.get(target_id)
        if entry is None:
            raise TargetUnknown(name=str(target_id))
        return entry

    def __iter__(self) -> Iterator[TargetEntry]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def put(self, tx: Tx, entry: TargetEntry, record: TargetRecord) -> None:
        """Records what is known of a target."""
        before = entry.record
        if record == before:
            return
        tx.kv.put(records.target_key(entry.uuid), records.encode(record))
        self._version.record(tx)
        tx.undo.append(partial(self.set_record, entry, before))
        self.set_record(entry, record)

    def set_record(self, entry: TargetEntry, record: TargetRecord) -> None:
        before, entry.record = entry.record, record
        if (before.draining, before.keep_blocks) != (record.draining, record.keep_blocks):
            self.departures += 1
        if record.suspicions != before.suspicions:
            entry.suspected_at = self._clock.monotonic()
        if entry.state is not TargetState.OFFLINE:
            entry.state = state_of(record, BeatValue(entry.free_bytes, entry.healthy))
        self._version.changed()

    # --- time

    def silent_seconds(self, entry: TargetEntry) -> float:
        """How long ago its lease was renewed."""
        return self._clock.monotonic() - entry.renewed_at

    def is_heard_of(self, entry: TargetEntry) -> bool:
        """Whether it talks: also one that does not obey, whose lease is not renewed."""
        return self._clock.monotonic() - entry.heard_at <= TARGET_LEASE_SECONDS

    def is_alive(self, target_id: int) -> bool:
        """Whether it may be serving its chains."""
        entry = self._by_id.get(target_id)
        return (
            entry is not None
            and entry.healthy
            and self.silent_seconds(entry) <= TARGET_LEASE_SECONDS
        )

    def may_return(self, target_id: int) -> bool:
        """Whether it is alive and was not suspected lately."""
        if not self.is_alive(target_id):
            return False
        entry = self._by_id[target_id]
        if entry.record.is_to_be_fenced:
            return False
        return self._clock.monotonic() - entry.suspected_at >= rejoin_seconds(entry.record)

    def expire(self) -> None:
        """Targets that are silent for too long go offline."""
        now = self._clock.monotonic()
        if now < self._expires_from:
            return  # asked for each new file, and there may be a thousand targets
        oldest = now - TARGET_LEASE_SECONDS
        late = [e for e in self if e.heard_at < oldest and e.state is not TargetState.OFFLINE]
        for entry in late:
            entry.state = TargetState.OFFLINE
        if late:
            self._version.changed()
        heard = [e.heard_at for e in self if e.state is not TargetState.OFFLINE]
        self._expires_from = min(heard, default=now) + TARGET_LEASE_SECONDS

    def heard(self, entry: TargetEntry, beat: BeatValue) -> None:
        now = self._clock.monotonic()
        entry.free_bytes, entry.healthy, entry.number = beat
        entry.heard_at = now
        if entry.healthy and not entry.record.is_to_be_fenced:
            entry.renewed_at = now
        state = state_of(entry.record, beat)
        if state is not entry.state:
            entry.state = state
            self._version.changed()

    def stood_still(self, seconds: float) -> None:
        """This server did nothing for so long: it cannot tell who was silent."""
        now = self._clock.monotonic()
        for entry in self:
            entry.heard_at = min(now, entry.heard_at + seconds)
            entry.renewed_at = min(now, entry.renewed_at + seconds)

    def suspicions(self, entry: TargetEntry) -> int:
        """In a row, with one more now."""
        quiet = self._clock.monotonic() - entry.suspected_at
        return 1 if quiet > 2 * REJOIN_SECONDS_MAX else entry.record.suspicions + 1

    # --- space

    def capacity_bytes(self) -> int:
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

    def free_bytes(self) -> int:
        """For new chunks."""
        return sum(
            max(e.free_bytes for e in group)
            for group in self._volumes()
            if not all(e.record.draining for e in group)
        )

    def _volumes(self) -> Iterable[list[TargetEntry]]:
        volumes: dict[tuple[str, str], list[TargetEntry]] = {}
        for entry in self:
            record = entry.record
            name = (record.host_id, record.volume) if record.volume else ("", entry.uuid)
            volumes.setdefault(name, []).append(entry)
        return volumes.values()


def rejoin_seconds(record: TargetRecord) -> float:
    """How long a target that was suspected so often in a row waits."""
    if record.suspicions == 0:
        return 0.0
    return min(REJOIN_SECONDS * 2.0 ** min(record.suspicions - 1, 16), REJOIN_SECONDS_MAX)


def state_of(record: TargetRecord, beat: BeatValue) -> TargetState:
    if not beat.healthy:
        return TargetState.OFFLINE
    if record.draining:
        return TargetState.DRAINING
    if beat.free_bytes < full_below_bytes(record.capacity_bytes):
        return TargetState.FULL
    return TargetState.SERVING


def as_target(entry: TargetEntry) -> Target:
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
