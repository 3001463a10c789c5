"""A server's two housekeeping threads: heartbeats, and the removals that their replies ask for.

Removing takes a millisecond a chunk (ext4 with discard), so it has its own thread: a server with
much to remove must not look dead. The metadata service repeats an order until ``removed_seq``
passes it, and removing twice does no harm, so nothing is remembered across a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvfs_base import threads
from kvfs_base.cluster import (
    GetClusterMap,
    Heartbeat,
    HeartbeatReply,
    Removal,
    TargetOrders,
    TargetReport,
)
from kvfs_base.counters import Counters
from kvfs_base.errors import KvfsError, TargetRemoved
from kvfs_base.limits import HEARTBEAT_SECONDS, TARGET_LEASE_SECONDS
from kvfs_base.rpc import BlockingRpcClient
from kvfs_base.seams import DiskUsage, Env
from kvfs_base.types import Address
from kvfs_datapath.chains.service import ChainService
from kvfs_datapath.chains.views import Said
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.limits import BEAT_PAUSE_SECONDS
from kvfs_datapath.server.targets import Targets

log = logging.getLogger(__name__)


class Housekeeping:
    """Runs from ``start`` to ``stop``. A dead metadata service is waited for without limit; where
    there are several servers, each heartbeat that fails goes to the next one."""

    def __init__(
        self,
        env: Env,
        config: ChunkServerConfig,
        targets: Targets,
        chains: ChainService,
        counters: Counters,
        *,
        moving: Callable[[frozenset[str]], None],
    ) -> None:
        """``moving`` is told which targets are being drained."""
        self._env = env
        self._moving = moving
        self._config = config
        self._targets = targets
        self._chains = chains
        self._views = chains.views
        self._counters = counters
        self._rpc = BlockingRpcClient(env.blocking_network, config.metadata)
        # Where there are others, the next one is to hear of us before the lease is over.
        self._deadline = TARGET_LEASE_SECONDS / (1 if len(config.metadata) == 1 else 3)
        self._unix: Address | None = None
        self._tcp: Address | None = None
        self._stopping = threads.event()
        self._due = threads.event()
        self._views.wake = self._due.set
        self._work = threads.condition()
        self._orders: dict[str, tuple[Removal, ...]] = {}
        self._removed: dict[str, int] = {}
        self._refused: frozenset[str] = frozenset()
        self._usage: dict[str, DiskUsage] = {}
        self._connected = True
        self._threads = [
            threads.thread(self._beat, name="kvfs-heartbeat"),
            threads.thread(self._remove, name="kvfs-remover"),
        ]

    def start(self, unix: Address | None, tcp: Address | None) -> None:
        """``unix`` and ``tcp`` are where clients find the server."""
        self._unix, self._tcp = unix, tcp
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns once both threads have ended: at most one heartbeat's deadline."""
        self._stopping.set()
        self._due.set()
        with self._work:
            self._work.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    # --- heartbeats

    def _beat(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._ask()
                    self._note(connected=True)
                except KvfsError as exc:
                    self._note(connected=False, reason=str(exc))
                self._targets.retry()
                self._stopping.wait(BEAT_PAUSE_SECONDS)
                self._due.wait(HEARTBEAT_SECONDS - BEAT_PAUSE_SECONDS)
        except Exception:
            log.exception("the heartbeat thread failed")
        finally:
            self._rpc.close()

    def _ask(self) -> None:
        self._due.clear()
        # The lease counts from here: whatever happens on the way makes it shorter.
        said = self._views.say()
        reply = self._rpc.call(self._heartbeat(said), self._deadline)
        self._obey(reply)
        cluster = None
        if self._views.must_ask(reply):
            cluster = self._rpc.call(GetClusterMap(), self._deadline)
        self._views.learn(said, reply, cluster)

    def _note(self, *, connected: bool, reason: str = "") -> None:
        if connected != self._connected:
            self._connected = connected
            log.info("metadata service %s %s", "is back" if connected else "is lost:", reason)
        self._counters.add(**{"heartbeats" if connected else "heartbeats_failed": 1})

    def _heartbeat(self, said: Said) -> Heartbeat:
        return Heartbeat(
            server_id=self._config.server_id,
            host_id=self._env.host_id,
            unix=self._unix,
            tcp=self._tcp,
            targets=tuple(self._report(store, said) for store in self._targets.stores),
            suspects=self._chains.suspects(),
            synced=self._chains.synced(),
            host=self._config.host,
            rack=self._config.rack,
            number=said.number,
            map_version=self._views.map_version,
        )

    def _report(self, store: ChunkStore, said: Said) -> TargetReport:
        try:
            usage = self._usage[store.uuid] = store.usage()
        except KvfsError:
            usage = self._usage.get(store.uuid, DiskUsage(0, 0))
        capacity = self._config.capacity_bytes or usage.capacity_bytes
        with self._work:
            removed = self._removed.get(store.uuid, 0)
        return TargetReport(
            uuid=store.uuid,
            capacity_bytes=capacity,
            free_bytes=min(capacity, usage.free_bytes),
            healthy=store.healthy,
            removed_seq=removed,
            volume="" if self._config.capacity_bytes else usage.volume,
            incarnation=said.incarnations[store.uuid],
            fenced=store.uuid in said.fenced,
        )

    def _obey(self, reply: HeartbeatReply) -> None:
        by_uuid = {store.uuid: store for store in self._targets.stores}
        refused = frozenset(reply.refused) & by_uuid.keys()
        for uuid in sorted(refused - self._refused):
            self._retire(by_uuid[uuid])
        self._refused = refused
        for orders in reply.targets:
            store = by_uuid.get(orders.uuid)
            if store is not None:
                self._take_orders(store, orders)
        self._moving(frozenset(orders.uuid for orders in reply.targets if orders.moving))

    def _retire(self, store: ChunkStore) -> None:
        """A target that was removed from the cluster has no number: nobody writes to it any more
        who has not heard. What lies in its directory stays there."""
        target_id = store.target_id
        with self._work:
            self._orders.pop(store.uuid, None)
            self._removed.pop(store.uuid, None)
        self._targets.number(store, 0)
        log.error("target %d: %s", target_id, TargetRemoved(uuid=store.uuid))

    def _take_orders(self, store: ChunkStore, orders: TargetOrders) -> None:
        renumbered = store.target_id not in (0, orders.target_id)
        with self._work:
            if renumbered:
                # Another metadata service, or one that lost its memory: it counts from the start.
                self._removed.pop(store.uuid, None)
            self._orders[store.uuid] = orders.removals
            self._work.notify_all()
        self._targets.number(store, orders.target_id)

    # --- removals

    def _remove(self) -> None:
        try:
            while not self._stopping.is_set():
                with self._work:
                    while not self._orders and not self._stopping.is_set():
                        self._work.wait()
                    orders, self._orders = self._orders, {}
                for store in self._targets.stores:
                    self._carry_out(store, orders.get(store.uuid, ()))
        except Exception:
            log.exception("the remover thread failed")

    def _carry_out(self, store: ChunkStore, removals: tuple[Removal, ...]) -> None:
        with self._work:
            done = self._removed.get(store.uuid, 0)
        due = [r for r in removals if r.seq > done]
        try:
            for removal in due:
                if self._stopping.is_set():
                    return
                removed = store.remove_range(
                    removal.inode, removal.first, removal.end, removal.chain
                )
                self._counters.add(chunks_removed=removed)
                if self._env_is_lazy():
                    self._acknowledge(store, removal.seq)
            for chain in sorted({r.chain for r in due}):
                store.sync_removals([r.inode for r in due if r.chain == chain], chain)
        except KvfsError as exc:
            log.info("removals on target %d wait: %s", store.target_id, exc)
            return
        if due:
            self._acknowledge(store, due[-1].seq)

    def _env_is_lazy(self) -> bool:
        """Without durability each removal counts at once; with it, all of them after the sync."""
        return self._config.durability == "cache"

    def _acknowledge(self, store: ChunkStore, seq: int) -> None:
        with self._work:
            self._removed[store.uuid] = seq
