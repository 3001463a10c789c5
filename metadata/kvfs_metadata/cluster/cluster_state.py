"""Targets and chains: who serves, what they hold, where new chunks go.

A target registers with its first heartbeat and gets a number and a chain of its own; both are
recorded. Whether it serves is not: that is a lease, renewed by each heartbeat. After a restart of
this service every recorded target has one lease's time to be heard of again, so that a restart does
not look like the loss of all disks.

Chains of several copies have members, whose states are recorded (``membership.py``), since a member
that may have missed something must not serve again before it is brought in step.

On a shared store the last heartbeat of each target is recorded as well (``BEAT``), because it comes
to one server only. The others count the lease from when they hear of the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from kvfs_base.cluster import (
    Chain,
    ClusterMap,
    Heartbeat,
    HeartbeatReply,
    TargetOrders,
    TargetReport,
    TargetState,
)
from kvfs_base.errors import InvalidRequest
from kvfs_base.seams import Clock
from kvfs_metadata import records
from kvfs_metadata.cluster.chains import ChainTable, MapVersion
from kvfs_metadata.cluster.departures import Departures
from kvfs_metadata.cluster.membership import Membership
from kvfs_metadata.cluster.moves import Moves
from kvfs_metadata.cluster.placing import Placement
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.cluster.targets import TargetEntry, TargetTable, as_target, evict_below_bytes
from kvfs_metadata.engines.engine import KVRead, Writes, scan
from kvfs_metadata.limits import TARGET_UUID_CHARS_MAX
from kvfs_metadata.records import BeatValue, ChainRecord, TargetRecord
from kvfs_metadata.transaction import Counters, Tx

CAPACITY_FRACTION = 0.90
"""Without a configured capacity the cache may fill this much of the disks."""


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
        self._recorded = recorded
        self._counters = counters
        self._removals = removals
        self.moves = Moves(read)
        self.map_version = MapVersion(read)
        self.targets = TargetTable(clock, self.map_version)
        self.chains = ChainTable(self.map_version)
        self.placement = Placement(self.map_version, self.targets, self.chains, counters)
        self.membership = Membership(self.targets, self.chains, self.placement)
        self.departures = Departures(
            read,
            self.map_version,
            targets=self.targets,
            chains=self.chains,
            membership=self.membership,
            removals=removals,
        )
        for prefix in (records.CHAIN, records.TARGET, records.BEAT, records.GONE):
            self.apply(dict(scan(read, prefix)))

    def apply(self, writes: Writes) -> None:
        """Another server committed ``writes``."""
        self.moves.apply(writes)
        beats: list[tuple[int, BeatValue]] = []
        changed = False
        for key, value in writes.items():
            if key.startswith(records.CHAIN):
                self.chains.apply(int.from_bytes(key[4:8], "big"), value)
                changed = True
            elif key.startswith(records.TARGET):
                self._follow_target(key[4:].decode(), value)
                changed = True
            elif key.startswith(records.GONE):
                self.departures.apply(key[4:].decode(), value)
            elif key == records.SWEEP_KEY:
                self.departures.sweep_wanted = value is not None
            elif key == records.MAP_KEY:
                self.map_version.apply(value)
            elif key.startswith(records.BEAT) and value is not None:
                beats.append((int.from_bytes(key[4:8], "big"), records.unpack_beat(value)))
        if changed:
            self.map_version.changed()
        for target_id, beat in beats:
            entry = self.targets.get(target_id)
            if entry is not None:
                self.targets.heard(entry, beat)

    def _follow_target(self, uuid: str, value: bytes | None) -> None:
        entry = self.targets.named(uuid)
        if value is None:
            if entry is not None:
                self.targets.remove(entry)
                self.targets.departures += 1
            return
        record = records.decode_target(value)
        if entry is None:
            self.targets.enter(uuid, record, free_bytes=record.capacity_bytes)
        else:
            self.targets.set_record(entry, record)

    def started(self, tx: Tx, number: int, *, went_back: bool) -> None:
        """``number`` grows with every start of the service, so map versions never go back. A store
        that did has forgotten versions that others know."""
        at_least = number + (VERSIONS_SKIPPED if went_back else 0)
        self.map_version.record(tx, at_least=at_least)
        if not went_back:
            return
        for chain_id in self.chains:
            chain = self.chains[chain_id]
            if chain.is_replicated:
                version = chain.version + VERSIONS_SKIPPED
                self.chains.put(tx, chain_id, msgspec.structs.replace(chain, version=version))

    # --- the map

    @property
    def version(self) -> int:
        """On a shared store what is not recorded does not count: other servers know otherwise."""
        return self.map_version.recorded if self._recorded else int(self.map_version)

    def map(self) -> ClusterMap:
        self.targets.expire()
        return ClusterMap(
            version=self.version,
            targets=tuple(map(as_target, self.targets)),
            chains=tuple(_as_chain(chain_id, self.chains[chain_id]) for chain_id in self.chains),
        )

    # --- heartbeats

    def heartbeat(self, tx: Tx, request: Heartbeat) -> HeartbeatReply:
        """Registers, renews, and answers with what is to be removed."""
        version = self.version
        self.targets.expire()
        gone = self.departures.gone
        heard: list[TargetEntry] = []
        named: list[TargetEntry] = []
        for report in request.targets:
            if report.uuid in gone:
                continue
            entry = self.targets.named(report.uuid)
            if entry is None:
                entry = self._register(tx, request, report)
            named.append(entry)
            if not _is_late(entry, request, report):
                self._report(tx, request, report, entry, version)
                heard.append(entry)
        reporters = {entry.target_id for entry in heard if entry.record.candidate == 0}
        self.membership.synced(tx, reporters, request.synced)
        self.membership.suspects(tx, reporters, request.suspects)
        return HeartbeatReply(
            map_version=self.version,
            targets=tuple(self._orders(tx, entry, is_late=entry not in heard) for entry in named),
            refused=tuple(report.uuid for report in request.targets if report.uuid in gone),
        )

    def _report(
        self, tx: Tx, request: Heartbeat, report: TargetReport, entry: TargetEntry, version: int
    ) -> None:
        """``version`` is that of the newest map that anybody can have seen."""
        number = entry.number
        if report.incarnation != entry.record.incarnation:
            self._meet(tx, request, report, entry)
        elif entry.record.candidate:
            self._record(tx, entry, candidate=0)
        self.targets.put(tx, entry, _reported(entry.record, request, report))
        if entry.record.candidate == 0:
            if not report.healthy:
                self.membership.failed(tx, entry)
            elif report.fenced and not _may_be_over(request, number, version):
                self.membership.fenced(tx, entry)
            number = request.number
        beat = BeatValue(report.free_bytes, report.healthy, number)
        self.targets.heard(entry, beat)
        if self._recorded:
            tx.kv.put(records.beat_key(entry.target_id), records.pack_beat(beat))
        if report.healthy:
            self.membership.heard(tx, entry)
        self._removals.acknowledge(tx, entry.target_id, report.removed_seq)

    def _meet(self, tx: Tx, request: Heartbeat, report: TargetReport, entry: TargetEntry) -> None:
        """Another incarnation, or an old one whose heartbeat was long on its way: it has to show
        that it knows a map that was made since. The answers tell it to stop until then."""
        record, found = entry.record, report.incarnation
        replicated = bool(self.chains.replicated(entry.target_id))
        known = found == record.candidate and request.map_version >= record.challenge
        if replicated and not known:
            if found != record.candidate:
                challenge = self.map_version.next
                self._record(tx, entry, candidate=found, challenge=challenge)
            return
        self._record(tx, entry, incarnation=found, candidate=0, challenge=0)
        self.membership.restarted(tx, entry)
        if replicated:
            # Otherwise it could be taken for another one again, while it serves.
            self.map_version.urgent = True

    def _record(self, tx: Tx, entry: TargetEntry, **fields: int) -> None:
        self.targets.put(tx, entry, msgspec.structs.replace(entry.record, **fields))

    def _orders(self, tx: Tx, entry: TargetEntry, *, is_late: bool) -> TargetOrders:
        """Whoever hears the answer to a heartbeat that was overtaken must not live by it."""
        return TargetOrders(
            entry.uuid,
            entry.target_id,
            self._removals.head(tx.kv, entry.target_id),
            fence=is_late or entry.record.is_to_be_fenced,
            moving=entry.record.draining and not entry.record.drained,
        )

    def _register(self, tx: Tx, request: Heartbeat, report: TargetReport) -> TargetEntry:
        if not 0 < len(report.uuid.encode()) <= TARGET_UUID_CHARS_MAX:
            raise InvalidRequest(detail="the uuid of a target is 1 to 128 bytes")
        named = [other.uuid for other in request.targets]
        record = TargetRecord(
            target_id=self._counters.target.take(tx),
            server_id=request.server_id,
            host_id=request.host_id,
            unix=request.unix,
            tcp=request.tcp,
            capacity_bytes=report.capacity_bytes,
            incarnation=report.incarnation,
            replaces=self.membership.exchanged(request.server_id, named),
        )
        record = _reported(record, request, report)
        tx.kv.put(records.target_key(report.uuid), records.encode(record))
        entry = self.targets.enter(report.uuid, record, report.free_bytes)
        tx.undo.append(partial(self.targets.remove, entry))
        chain = ChainRecord(version=1, targets=(record.target_id,))
        self.chains.put(tx, self._counters.chain.take(tx), chain)
        return entry

    # --- chunks

    def require_chains(self, copies: int) -> None:
        """Raises NoTarget if there cannot be chains of so many copies."""
        if copies > 1:
            self.placement.require_hosts(copies)

    def remove_chunks(
        self, tx: Tx, chains: Sequence[int], inode: int, end: int, size: int = 0
    ) -> None:
        """Queues the removal of chunks 0 to ``end`` of ``inode`` on every target of ``chains``, of
        several copies on those that are away, too."""
        for chain_id in chains:
            chain = self.chains.get(chain_id)
            if chain is not None:
                number = chain_id if chain.is_replicated else 0
                removal = records.RemovalValue(inode, 0, end, size, number)
                self._removals.add(tx, chain.everybody, removal)

    def stop_move(self, tx: Tx, chains: Sequence[int], inode: int, end: int) -> None:
        """Of a block or file that is gone, with its chunks on ``chains``: also what was copied."""
        move = self.moves.get(inode)
        if move is not None:
            self.moves.put(tx, inode, None)
            if move.to not in chains:
                self.remove_chunks(tx, (move.to,), inode, end)

    def missing_bytes(self) -> int:
        """How much the target that is worst off lacks of what it keeps free, not counting what it
        is about to remove. Somebody else may be filling the disk."""
        return max(
            (
                evict_below_bytes(entry.record.capacity_bytes)
                - entry.free_bytes
                - self._removals.pending_bytes(entry.target_id)
                for entry in self.targets
                if entry.state is not TargetState.OFFLINE
            ),
            default=0,
        )

    def statistics(self) -> dict[str, int]:
        states = [entry.state for entry in self.targets]
        return {
            "targets": len(states),
            "targets_serving": states.count(TargetState.SERVING),
            "targets_full": states.count(TargetState.FULL),
            "targets_draining": states.count(TargetState.DRAINING),
            "targets_offline": states.count(TargetState.OFFLINE),
            "removals_pending": self._removals.pending_count(),
            **self.membership.statistics(),
        }


VERSIONS_SKIPPED = 1 << 20
"""Changes of one chain, and of all, that a store that went back may have forgotten."""


def _is_late(entry: TargetEntry, request: Heartbeat, report: TargetReport) -> bool:
    """Whether a later heartbeat of the same process has come before this one."""
    same = report.incarnation == entry.record.incarnation
    return same and 0 < request.number < entry.number


def _may_be_over(request: Heartbeat, number: int, version: int) -> bool:
    """Whether a target that was fenced when it sent this may have seen a newer map since, or the
    answer to an earlier copy of it, and answer again."""
    return 0 < request.map_version < version or 0 < request.number == number


def _reported(record: TargetRecord, request: Heartbeat, report: TargetReport) -> TargetRecord:
    return msgspec.structs.replace(
        record,
        server_id=request.server_id,
        host_id=request.host_id,
        unix=request.unix,
        tcp=request.tcp,
        capacity_bytes=report.capacity_bytes,
        volume=report.volume,
        host=request.host,
        rack=request.rack,
    )


def _as_chain(chain_id: int, record: ChainRecord) -> Chain:
    return Chain(
        chain_id,
        record.version,
        record.targets,
        record.copies,
        record.syncing,
        record.offline,
    )
