"""What the people who look after a cluster ask and order (``admin_messages``)."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator

from kvfs_base.errors import TargetInUse
from kvfs_base.limits import COPIES_MAX
from kvfs_base.seams import Clock
from kvfs_base.types import Layout
from kvfs_metadata import records
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    ChainCount,
    Changed,
    ChunkCounts,
    ClusterDetails,
    CountChunks,
    DescribeCluster,
    FindOpenFiles,
    OpenFile,
    RemovedTarget,
    RemoveTarget,
    ReplaceTarget,
    ServerDetails,
    SetDraining,
    SpreadDetails,
    TargetDetails,
)
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.cluster.draining import Drainer
from kvfs_metadata.cluster.moving import Mover
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.cluster.targets import TargetEntry
from kvfs_metadata.engines.engine import Item, KVRead, prefix_end, scan
from kvfs_metadata.limits import (
    COUNT_PAGE_RECORDS,
    OPEN_FILE_HOLDERS_MAX,
    OPEN_FILES_SHOWN_MAX,
)
from kvfs_metadata.sessions import Sessions
from kvfs_metadata.transaction import Tx

_Counts = defaultdict[int, list[int]]


class Administration:
    """``server`` is this server's number, ``addresses`` are where it listens."""

    def __init__(
        self,
        clock: Clock,
        *,
        cluster: ClusterState,
        removals: Removals,
        sessions: Sessions,
        drainer: Drainer,
        mover: Mover,
        server: bytes,
        addresses: tuple[str, ...],
    ) -> None:
        self._clock = clock
        self._cluster = cluster
        self._removals = removals
        self._sessions = sessions
        self._drainer = drainer
        self._mover = mover
        self._server = server
        self._addresses = addresses

    # --- looking

    def describe(self, kv: KVRead, request: DescribeCluster) -> ClusterDetails:
        self._cluster.targets.expire()
        return ClusterDetails(
            targets=tuple(map(self._target, self._cluster.targets)),
            servers=self._servers(kv),
            removed=tuple(
                RemovedTarget(uuid, record.target_id, record.server_id, record.removed_ns)
                for uuid, record in self._cluster.departures.gone.items()
            ),
            chains=self._cluster.map().chains,
            spreads=tuple(self._spreads()),
        )

    def _spreads(self) -> Iterator[SpreadDetails]:
        placement = self._cluster.placement
        for copies in range(2, COPIES_MAX + 1):
            count = len(placement.usable(copies))
            if count:
                yield SpreadDetails(copies, count, *placement.spread(copies))

    def _target(self, entry: TargetEntry) -> TargetDetails:
        record = entry.record
        left = self._drainer.left_on(record.target_id) if record.draining else (0, 0)
        return TargetDetails(
            target_id=record.target_id,
            uuid=entry.uuid,
            server_id=record.server_id,
            unix=record.unix,
            tcp=record.tcp,
            state=entry.state,
            capacity_bytes=record.capacity_bytes,
            free_bytes=entry.free_bytes,
            chains=tuple(self._cluster.chains.of_target(record.target_id)),
            draining=record.draining,
            keep_blocks=record.keep_blocks,
            drained=record.drained,
            removals=self._removals.pending(record.target_id),
            heard_seconds=self._clock.monotonic() - entry.heard_at,
            host=record.domain,
            rack=record.rack,
            replaces=record.replaces,
            blocks_left=left[0],
            files_left=left[1],
        )

    def _servers(self, kv: KVRead) -> tuple[ServerDetails, ...]:
        """The others are known on a shared store only, by their beats."""
        found = {self._server: ServerDetails(self._server, self._addresses, 0, True, True)}
        for key, value in scan(kv, records.SERVER):
            number, record = key[4:], records.decode_server(value)
            found[number] = ServerDetails(
                number,
                record.addresses,
                record.beats,
                alive=self._sessions.is_alive(number),
                answering=number == self._server,
            )
        return tuple(found.values())

    def count(self, kv: KVRead, request: CountChunks) -> ChunkCounts:
        prefix = records.INODE if request.files else records.BLOCK
        start = prefix + records.u64(request.start)
        items = kv.range(start, prefix_end(prefix), COUNT_PAGE_RECORDS)
        counts = _count_files(items) if request.files else _count_blocks(items)
        more = len(items) == COUNT_PAGE_RECORDS
        return ChunkCounts(
            tuple(ChainCount(chain, *numbers) for chain, numbers in counts.items()),
            next=records.number_at(items[-1][0]) + 1 if more else 0,
        )

    def open_files(self, kv: KVRead, request: FindOpenFiles) -> tuple[OpenFile, ...]:
        entry = self._cluster.targets[request.target_id]
        inodes = [
            inode
            for chain in self._cluster.chains.single(entry.target_id)
            for inode in self._drainer.open_files(chain)
            if self._sessions.may_be_open(inode)
        ]
        return tuple(
            OpenFile(inode, tuple(self._sessions.holders(inode, OPEN_FILE_HOLDERS_MAX)))
            for inode in inodes[:OPEN_FILES_SHOWN_MAX]
        )

    # --- changing

    def set_draining(self, tx: Tx, request: SetDraining) -> Changed:
        for target_id in request.targets:
            self._cluster.departures.set_draining(tx, target_id, request.on, request.keep_blocks)
            if request.on:
                self._mover.turn_away(tx, target_id)
            else:
                self._mover.cancel_all(tx, target_id)
        return Changed()

    def remove(self, tx: Tx, request: RemoveTarget) -> Changed:
        for target_id in request.targets:
            self._mover.forget_target(tx, target_id)
            try:
                self._cluster.departures.remove(tx, target_id, force=request.force)
            except TargetInUse as exc:
                exc.blocks, exc.files = self._drainer.left_on(target_id)
                raise
        return Changed()

    def replace(self, tx: Tx, request: ReplaceTarget) -> int:
        lost = self._cluster.targets[request.lost]
        if request.target_id:
            other = self._cluster.targets[request.target_id]
        else:
            other = self._cluster.targets[self._cluster.placement.other_for(lost)]
        self._cluster.membership.replace(tx, lost, other)
        self._cluster.membership.settle(tx)
        return other.target_id

    def admit(self, tx: Tx, request: AdmitTarget) -> Changed:
        self._cluster.departures.admit(tx, request.uuid)
        return Changed()


def _count_blocks(items: list[Item]) -> _Counts:
    counts: _Counts = defaultdict(lambda: [0, 0, 0])
    for _, value in items:
        block = records.unpack_block(value)
        numbers = counts[block.chain]
        numbers[0] += 1
        numbers[1] += 1
        numbers[2] += block.size
    return counts


def _count_files(items: list[Item]) -> _Counts:
    counts: _Counts = defaultdict(lambda: [0, 0, 0])
    for _, value in items:
        record = records.decode_inode(value)
        if record.layout is None or not stat.S_ISREG(record.mode):
            continue
        for chain, chunks in chunks_by_chain(record.size, record.layout).items():
            counts[chain][0] += 1
            counts[chain][1] += chunks
    return counts


def chunks_by_chain(size: int, layout: Layout) -> dict[int, int]:
    """How many chunks of a file of ``size`` bytes each chain has, holes included."""
    total, width = -(-size // layout.chunk_bytes), len(layout.chains)
    found: dict[int, int] = {}
    for place, chain in enumerate(layout.chains[:total]):
        found[chain] = found.get(chain, 0) + (total - place - 1) // width + 1
    return found
