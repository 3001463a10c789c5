"""Everything the metadata service decides, without any waiting: requests in, answers out.

Reads are answered from a snapshot of the store and from the block index. Writes are decided in
groups by ``decide`` and written by ``commit``; the service calls the two apart when the writing
waits for a disk. On a shared store memory follows what other servers commit (``_follow``): the
engine says so before each snapshot and each decision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from kvfs_base.cluster import (
    ClusterMap,
    EndMoves,
    FindUnwanted,
    GetClusterMap,
    Heartbeat,
    HeartbeatReply,
    TakeMoves,
)
from kvfs_base.errors import (
    Conflict,
    EntryNotFound,
    InternalError,
    InvalidRequest,
    KvfsError,
)
from kvfs_base.seams import Clock
from kvfs_base.types import Attr
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.answers import Answers
from kvfs_metadata.block_index import BlockIndex
from kvfs_metadata.blocks import BlockCounts, Blocks
from kvfs_metadata.capacity import Capacity
from kvfs_metadata.check import fixes
from kvfs_metadata.check.repair import Repairer, ServiceMemory, scan_records
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    CountChunks,
    DescribeCluster,
    FindOpenFiles,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
)
from kvfs_metadata.cluster.administration import Administration
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.cluster.draining import Drainer
from kvfs_metadata.cluster.moving import Mover
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.cluster.unwanted import find_unwanted
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.copies import Copies
from kvfs_metadata.engines.engine import (
    Group,
    KVEngine,
    KVRead,
    KVTransaction,
    Writes,
)
from kvfs_metadata.engines.migrations import migrate
from kvfs_metadata.leases import Leases, Revocation, leased_keys, recorded_watchers
from kvfs_metadata.limits import CONFLICT_RETRIES, NUMBERS_SKIPPED
from kvfs_metadata.lock_requests import LockRequests
from kvfs_metadata.namespace import FileTree
from kvfs_metadata.policy import CachePolicy, LruPolicy
from kvfs_metadata.rename import rename
from kvfs_metadata.sessions import Sessions
from kvfs_metadata.transaction import ANY_CONNECTION, Counters, Grant, Tx, roll_back
from kvfs_metadata.xattrs import Xattrs

log = logging.getLogger(__name__)
Operation = Callable[[Tx], Any]

COLLECT_BATCH = 256
"""Unlinked files one transaction deletes."""


class Decision(msgspec.Struct):
    """A group that was decided and is not written yet."""

    group: Group[Any]
    undo: list[Callable[[], None]]
    grants: list[Grant]


class MetadataCore:
    """Brings a store that an older version wrote to this version's format. ``server`` is a number
    (16 bytes) that no other process has. Raises VersionMismatch if the store is a newer
    version's."""

    def __init__(
        self,
        engine: KVEngine,
        clock: Clock,
        config: MetadataConfig,
        policy: Callable[[], CachePolicy] = LruPolicy,
        *,
        server: bytes = bytes(16),
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._config = config
        self._policy = policy
        self._server = server
        self._requests = 0
        self._counts = BlockCounts()
        self.answers = Answers()
        self.sessions = Sessions(clock, server, recorded=engine.shared, opened=self._opened)
        self.locks = LockRequests(self.sessions, engine)
        self.leases = Leases(clock)
        migrate(engine)
        engine.listen(self._follow)
        engine.view(self._load)
        self.update([self._start])
        if not engine.shared:
            self.leases.expect(engine.view(recorded_watchers))
        # Else a machine that loses its power again at once skips the same numbers a second time,
        # and those given out in between are given out again.
        engine.sync()

    def _follow(self, read: KVRead, writes: Writes | None) -> None:
        """Another server committed ``writes``; None if that was too long ago to be told."""
        if writes is None:
            log.info("far behind the other servers: loading everything anew")
            self._load(read)
            return
        self.cluster.apply(writes)
        self.removals.apply(writes)
        self.blocks.apply(writes)
        self.sessions.apply(writes)

    def _load(self, read: KVRead) -> None:
        self.index = BlockIndex(self._policy())
        self._counters = Counters(read.get)
        self.removals = Removals(read)
        self.cluster = ClusterState(
            read, self._clock, self._counters, self.removals, recorded=self._engine.shared
        )
        self._capacity = Capacity(self._config, self.cluster)
        copies = Copies(self.cluster, self._config.default_copies)
        self.sessions.load(read)
        self.blocks = Blocks(
            read,
            self.index,
            clock=self._clock,
            counters=self._counters,
            cluster=self.cluster,
            copies=copies,
            capacity_bytes=self._capacity.total_bytes,
            counts=self._counts,
            shared=self._engine.shared,
        )
        self.tree = FileTree(
            blocks=self.blocks,
            cluster=self.cluster,
            copies=copies,
            counters=self._counters,
            may_be_open=self.sessions.may_be_open,
        )
        self._xattrs = Xattrs(self.index, copies)
        self._repairer = Repairer(
            counters=self._counters,
            removals=self.removals,
            memory=ServiceMemory(self.index, self.tree, self.sessions),
        )
        self._load_administration()
        self._reads = self._read_table()
        self._writes = self._write_table()
        self._read_kinds = self._find_read_kinds()
        self._orphans_from: int | None = 0

    def _load_administration(self) -> None:
        self.drainer = Drainer(
            blocks=self.blocks,
            cluster=self.cluster,
            removals=self.removals,
            may_be_open=self.sessions.may_be_open,
        )
        self.mover = Mover(
            blocks=self.blocks,
            cluster=self.cluster,
            removals=self.removals,
            drainer=self.drainer,
            counters=self._counters,
            may_be_open=self.sessions.may_be_open,
        )
        self._administration = Administration(
            self._clock,
            cluster=self.cluster,
            removals=self.removals,
            sessions=self.sessions,
            drainer=self.drainer,
            mover=self.mover,
            server=self._server,
            addresses=self._addresses(),
        )

    def _addresses(self) -> tuple[str, ...]:
        addresses = (self._config.unix, self._config.tcp)
        return tuple(str(address) for address in addresses if address is not None)

    def _start(self, tx: Tx) -> None:
        went_back = tx.kv.get(records.WENT_BACK_KEY) is not None
        if went_back:
            # Chunks of numbers that were given out and forgotten may lie on the targets.
            self._counters.inode.take(tx, NUMBERS_SKIPPED)
            self._counters.batch.take(tx, NUMBERS_SKIPPED)
            tx.kv.delete(records.WENT_BACK_KEY)
        tx.kv.put(records.FORMAT_KEY, records.FORMAT)
        self.tree.create_roots(tx)
        self.cluster.started(tx, self._counters.start.take(tx), went_back=went_back)

    # --- requests

    def _read_table(self) -> dict[type, Callable[[KVRead, Any], Any]]:
        tree, blocks, xattrs = self.tree, self.blocks, self._xattrs
        return {
            m.Lookup: tree.lookup,
            m.Resolve: tree.resolve,
            m.GetAttr: tree.get_attr,
            m.ReadDir: tree.read_directory,
            m.ReadLink: tree.read_link,
            m.GetXattr: xattrs.get,
            m.ListXattr: xattrs.list,
            m.StatFs: self._statfs,
            m.GetQuota: blocks.quotas.get,
            m.MatchBlocks: lambda kv, request: blocks.match(request),
            m.LookupBlocks: lambda kv, request: blocks.lookup(request),
            m.UseBlocks: lambda kv, request: blocks.use(request),
            m.Statistics: lambda kv, request: self.statistics(kv),
            fixes.ScanRecords: scan_records,
            GetClusterMap: self._cluster_map,
            DescribeCluster: self._administration.describe,
            CountChunks: self._administration.count,
            FindOpenFiles: self._administration.open_files,
        }

    def _write_table(self) -> dict[type, Callable[[Tx, Any], Any]]:
        tree, blocks, xattrs = self.tree, self.blocks, self._xattrs
        return {
            m.Attach: self._attach,
            m.OpenInode: self._open_inode,
            m.CloseInode: self._close_inode,
            m.BeginCut: self._begin_cut,
            m.EndCut: self._end_cut,
            m.WidenChunks: self._widen,
            m.SetLock: self._set_lock,
            m.Unlock: self.locks.unlock,
            m.GetLock: self.locks.get,
            m.AwaitLock: _nothing,
            m.StopAwaiting: self.locks.stop_awaiting,
            m.Sync: _nothing,
            m.SetAttr: tree.set_attr,
            m.Make: self._make,
            m.Link: tree.link,
            m.Unlink: tree.unlink,
            m.Rmdir: tree.rmdir,
            m.Rename: partial(rename, tree),
            m.SetXattr: xattrs.set,
            m.RemoveXattr: xattrs.remove,
            m.SetQuota: blocks.quotas.set,
            m.OpenNamespace: tree.open_namespace,
            m.PrepareBlocks: blocks.prepare,
            m.CommitBlocks: blocks.commit,
            m.AbortBlocks: blocks.abort,
            m.RemoveBlocks: blocks.remove,
            m.Once: self._once,
            fixes.RepairRecords: self._repair,
            Heartbeat: self._heartbeat,
            FindUnwanted: partial(find_unwanted, self.cluster, blocks, self._counters),
            TakeMoves: self.mover.take,
            EndMoves: self.mover.end,
            SetDraining: self._administration.set_draining,
            RemoveTarget: self._administration.remove,
            AdmitTarget: self._administration.admit,
            ReplaceTarget: self._administration.replace,
        }

    def _find_read_kinds(self) -> set[type]:
        """What need not wait for its turn among the writes. A map must not show members of chains
        that are decided and not written yet: only ``StrictTurns`` answers reads meanwhile."""
        kinds = set(self._reads)
        if self._config.durability == "strict":
            kinds.discard(GetClusterMap)
        return kinds

    def only_reads(self, requests: Sequence[Any]) -> bool:
        """Whether a snapshot is enough to answer them."""
        return self._read_kinds.issuperset(map(type, requests))

    def answer(self, requests: Sequence[Any], connection: int = ANY_CONNECTION) -> list[Any]:
        """Answers to requests that only read, on one snapshot."""
        self._requests += len(requests)
        answers = self._engine.view(lambda kv: [self._answer(kv, r) for r in requests])
        for request, answer in zip(requests, answers, strict=True):
            watcher = self.leases.watcher_of(connection, request)
            if watcher is not None:
                self.leases.grant(watcher, *leased_keys(request, answer, self._namespace_of))
        return answers

    def _namespace_of(self, inode: int) -> int | None:
        block = self.index.by_inode.get(inode)
        return None if block is None else block.namespace

    def _answer(self, kv: KVRead, request: Any) -> Any:
        try:
            return self._reads[type(request)](kv, request)
        except KvfsError as exc:
            return exc
        except Exception as exc:
            log.exception("a read failed: %s", type(request).__name__)
            return InternalError(detail=type(exc).__name__)

    def operation(self, connection: int, request: Any) -> Operation:
        """``request`` as part of a group. Reads among writes see those before them."""
        self._requests += 1
        return partial(self._carry_out, connection, request)

    def _carry_out(self, connection: int, request: Any, tx: Tx) -> Any:
        tx.connection = connection
        # Looked up now and not before: memory may have been loaded anew.
        write = self._writes.get(type(request))
        watcher = self.leases.watcher_of(connection, request)
        if watcher is None:
            return write(tx, request) if write else self._read_among_writes(tx, request)
        try:
            answer = write(tx, request) if write else self._read_among_writes(tx, request)
        except EntryNotFound as exc:
            tx.grants.append((watcher, leased_keys(request, exc, self._namespace_of)))
            raise
        tx.grants.append((watcher, leased_keys(request, answer, self._namespace_of)))
        return answer

    def _read_among_writes(self, tx: Tx, request: Any) -> Any:
        read = self._reads.get(type(request))
        if read is None:
            raise InvalidRequest(detail=f"unexpected {type(request).__name__}")
        return read(tx.kv, request)

    def _once(self, tx: Tx, request: m.Once) -> Any:
        inner = request.request
        slot = records.answer_key(request.client, request.slot)
        found = self.answers.find(tx, slot, request)
        if found is not None:
            return self._repeated(tx, inner, found)
        write = self._writes[type(inner)]
        reply = self._try(tx, write, inner) if request.again else write(tx, inner)
        self.answers.keep(tx, slot, request, reply)
        return reply

    def _repeated(self, tx: Tx, request: Any, found: Any) -> Any:
        opened = isinstance(request, m.Make) and request.open and isinstance(found, Attr)
        if opened and not self.sessions.has_open(tx, found.inode):
            # The client has attached again since the first time, not knowing of this file.
            self.sessions.open(tx, found.inode, writes=True)
        return found

    def _try(self, tx: Tx, write: Callable[[Tx, Any], Any], request: Any) -> Any:
        """Its reply, or the KvfsError that it raised, with what it did taken back."""
        mark = tx.mark()
        try:
            return write(tx, request)
        except KvfsError as exc:
            tx.roll_back(mark)
            return exc

    # --- groups

    def decide(self, operations: Sequence[Operation]) -> Decision:
        """Runs each operation as a transaction of its own; nothing is written yet. No other group
        may be decided until this one is committed."""
        undo: list[Callable[[], None]] = []
        grants: list[Grant] = []
        now_ns = self._clock.time_ns()
        fns = [partial(_run, operation, now_ns, undo, grants) for operation in operations]
        self.cluster.map_version.urgent = False
        try:
            group = self._engine.run(fns)
            group.urgent = self.cluster.map_version.urgent
            return Decision(group, undo, grants)
        except BaseException:
            roll_back(undo)  # the store went away while functions were at work
            raise

    def commit(self, decision: Decision) -> None:
        """Writes a group; from any thread. If it raises, ``take_back`` must follow."""
        self._engine.commit(decision.group)
        if decision.group.urgent and not self._engine.shared:
            try:
                self._engine.sync()
            except KvfsError as exc:
                # It is written, only not for good yet: nobody may act on it.
                results = decision.group.results
                results[:] = [exc] * len(results)

    def committed(self, decision: Decision, author: int) -> Revocation | None:
        """After each commit, before anything else is answered: tells who watches what was changed.
        What is returned is to be waited for before the group is answered."""
        # First: of several clients one may have been answered what the next one changed.
        for connection, keys in decision.grants:
            self.leases.grant(connection, *keys)
        return self.leases.changed(decision.group.writes, author)

    def take_back(self, decision: Decision) -> None:
        """Memory as it was before the decision, which is given up."""
        self.leases.reset_all()
        roll_back(decision.undo)
        self._engine.abandon(decision.group)
        self._orphans_from = 0  # what was to be collected is looked for again

    def update(self, operations: Sequence[Operation]) -> list[Any]:
        """``change`` of nobody that waits for watchers."""
        return self.change(operations)[0]

    def change(
        self, operations: Sequence[Operation], author: int = ANY_CONNECTION
    ) -> tuple[list[Any], Revocation | None]:
        """Decides and commits, and does so anew after a lost race; a result or KvfsError each, and
        what is to be over before they are told. Raises if nothing could be written."""
        for _ in range(CONFLICT_RETRIES):
            decision = self.decide(operations)
            try:
                self.commit(decision)
            except Conflict as exc:
                self.take_back(decision)
                conflict = exc
            except BaseException:
                self.take_back(decision)
                raise
            else:
                return decision.group.results, self.committed(decision, author)
        raise conflict

    def sync(self) -> None:
        self._engine.sync()

    def catch_up(self) -> None:
        """Hears what other servers committed, also if there are no requests."""
        self._engine.view(lambda kv: None)

    # --- sessions

    def beat(self, tx: Tx) -> None:
        """To the other servers on the store."""
        self.sessions.beat(tx, self._addresses())

    def goodbye(self, tx: Tx) -> None:
        self.sessions.goodbye(tx)

    def _attach(self, tx: Tx, request: m.Attach) -> m.Done:
        self.sessions.attach(tx, request)
        return m.Done()

    def _open_inode(self, tx: Tx, request: m.OpenInode) -> Attr:
        attr = self.tree.attr_of(tx.kv, request.inode)
        if attr.is_block:
            # Readers of the mount bypass everybody once a block is open: this is its use.
            self.index.use([self.index.by_inode[request.inode]], tx.now_ns)
        else:
            self.sessions.open(tx, request.inode, writes=request.writes)
        return attr

    def _opened(self, tx: Tx, inode: int) -> None:
        self.cluster.moves.disarm(tx, inode)

    def _make(self, tx: Tx, request: m.Make) -> Attr:
        attr = self.tree.make(tx, request)
        if request.open:
            self.sessions.open(tx, attr.inode, writes=True)
        return attr

    def _close_inode(self, tx: Tx, request: m.CloseInode) -> m.Done:
        for inode in (request.inode, *request.others):
            was_last = self.sessions.close(tx, inode)
            self.locks.closed(tx, inode)
            if was_last:
                self.tree.collect(tx, inode)
        return m.Done()

    def _begin_cut(self, tx: Tx, request: m.BeginCut) -> m.Tail:
        size = self.tree.attr_of(tx.kv, request.inode).size
        may_cut, is_open = self.sessions.begin_cut(tx, request.inode)
        return m.Tail(size, may_cut, is_open)

    def _end_cut(self, tx: Tx, request: m.EndCut) -> m.Done:
        self.sessions.end_cut(tx, request.inode)
        return m.Done()

    def _widen(self, tx: Tx, request: m.WidenChunks) -> Attr:
        if not self.sessions.writes_alone(tx, request.inode):
            raise InvalidRequest(detail=f"others may write to inode {request.inode}")
        return self.tree.widen(tx, request.inode)

    def _set_lock(self, tx: Tx, request: m.SetLock) -> m.FileLock | None:
        self.tree.attr_of(tx.kv, request.inode)
        return self.locks.lock(tx, request)

    def _repair(self, tx: Tx, request: fixes.RepairRecords) -> tuple[fixes.Verdict, ...]:
        done = self._repairer.repair(tx, request)
        self._orphans_from = 0  # it may have found files that wait for their deletion
        return done

    def disconnected(self, connection: int) -> None:
        self.sessions.disconnected(connection)

    # --- cluster and capacity

    def _heartbeat(self, tx: Tx, request: Heartbeat) -> HeartbeatReply:
        return self.cluster.heartbeat(tx, request)

    def _cluster_map(self, kv: KVRead, request: GetClusterMap) -> ClusterMap:
        return self.cluster.map()

    def _statfs(self, kv: KVRead, request: m.StatFs) -> m.FilesystemStats:
        return self._capacity.statfs(kv, request, self.blocks)

    # --- work in the background, as operations for the same queue as the requests

    def excess_bytes(self) -> int:
        """What the cache is to evict now."""
        return self._capacity.excess_bytes(self._engine.view(self.blocks.used_bytes))

    def blocks_size(self) -> int:
        """Bytes of blocks, prepared ones included."""
        return self.index.block_bytes + self.blocks.prepared_bytes

    def eviction(self, bytes_needed: int) -> Operation:
        """One transaction's worth; its result is the bytes evicted, 0 if there is nothing left."""
        return lambda tx: self.blocks.evict(tx, bytes_needed)

    def has_departures(self) -> bool:
        """Whether ``drain`` has something to do."""
        return self.cluster.departures.has_departures()

    def drain(self, tx: Tx) -> bool:
        """One transaction's worth of emptying targets; its result is whether to go on at once."""
        return self.drainer.step(tx)

    def stood_still(self, seconds: float) -> None:
        """The process did nothing for so long: heartbeats and requests may lie unread."""
        self.cluster.targets.stood_still(seconds)
        self.sessions.stood_still(seconds)

    def due(self) -> list[Operation]:
        """For prepared batches, sessions and unlinked files whose time is over. Targets whose
        lease is over go out of service at once."""
        self.cluster.targets.expire()
        operations: list[Operation] = []
        if self.cluster.membership.has_work():
            operations.append(self.cluster.membership.settle)
        expiry = self.blocks.next_expiry()
        if expiry is not None and expiry <= self._clock.monotonic():
            operations.append(self.blocks.expire)
        if self.sessions.has_late():
            operations.append(self._expire_sessions)
        if self.locks.has_work():
            operations.append(self.locks.drop)
        if self._orphans_from is not None and not self.sessions.in_grace:
            operations.append(self._collect_orphans)
        self.leases.expire()
        if self.leases.forgotten():
            operations.append(self.leases.forget)
        return operations

    def _expire_sessions(self, tx: Tx) -> None:
        self._collect_all(self.sessions.expire(tx), tx)
        self.locks.drop(tx)

    def _collect_all(self, inodes: Sequence[int], tx: Tx) -> None:
        for inode in inodes:
            self.tree.collect(tx, inode)

    def _collect_orphans(self, tx: Tx) -> None:
        """What the process before this one left, a page at a time. Unlinked files that somebody
        has open go with the last session that has them."""
        start, end = records.orphan_key(self._orphans_from or 0), records.ORPHAN + b"\xff" * 9
        inodes = [records.number_at(key) for key, _ in tx.kv.range(start, end, COLLECT_BATCH)]
        self._collect_all(inodes, tx)
        self._orphans_from = inodes[-1] + 1 if len(inodes) == COLLECT_BATCH else None

    def persist_uses(self, tx: Tx) -> int:
        """Writes down some of the uses of blocks; its result is how many are left."""
        return self.blocks.persist_uses(tx)

    @property
    def unrecorded_uses(self) -> int:
        return self.index.touched_count

    # --- numbers

    def statistics(self, kv: KVRead) -> dict[str, int]:
        usage = records.unpack_usage(kv.get(records.USAGE_KEY))
        return {
            "requests": self._requests,
            "capacity_bytes": self._capacity.total_bytes(),
            "used_bytes": self.blocks.used_bytes(kv),
            "file_bytes": usage.file_bytes,
            "inodes": usage.inodes,
            **self.blocks.statistics(),
            **self.cluster.statistics(),
            "drained_blocks": self.drainer.drained_blocks,
            **self.mover.statistics(),
            **self.sessions.statistics(),
            **self.leases.statistics(),
        }


def _nothing(tx: Tx, request: Any) -> None:
    """Holds the place of a request that is no transaction: the service answers it."""


def _run(
    operation: Operation,
    now_ns: int,
    undo: list[Callable[[], None]],
    grants: list[Grant],
    kv: KVTransaction,
) -> Any:
    """One operation of a group: whole or, in the store and in memory, not at all."""
    mark = len(undo)
    try:
        return operation(Tx(kv, now_ns, ANY_CONNECTION, undo, grants))
    except KvfsError:
        roll_back(undo, mark)
        raise
    except Exception as exc:
        roll_back(undo, mark)
        log.exception("an operation failed")
        raise InternalError(detail=type(exc).__name__) from exc


__all__ = ["Decision", "MetadataCore", "Operation"]
