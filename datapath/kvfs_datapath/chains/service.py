"""A chunk server's side of chains of several copies: what its connections and threads share."""

from __future__ import annotations

from collections.abc import Sequence

from kvfs_base.cluster import Synced
from kvfs_base.counters import Counters
from kvfs_base.limits import (
    CHAIN_CHUNK_BYTES,
    HOPS_MAX,
    TRANSFER_BYTES,
)
from kvfs_base.seams import Env
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains.crew import Crew
from kvfs_datapath.chains.garbage import GarbageCollector
from kvfs_datapath.chains.maintenance import Maintenance
from kvfs_datapath.chains.peers import Peers
from kvfs_datapath.chains.repair import Repairer
from kvfs_datapath.chains.replication import Replicator
from kvfs_datapath.chains.sync_sink import SyncSinks
from kvfs_datapath.chains.sync_source import SyncSource
from kvfs_datapath.chains.views import Views
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.limits import (
    CREW_THREADS,
    PASS_BUFFERS,
    SYNC_BUFFERS,
)

INCARNATION_BITS = 62


class ChainService:
    """Works from ``start`` to ``stop``."""

    def __init__(
        self,
        env: Env,
        config: ChunkServerConfig,
        stores: Sequence[ChunkStore],
        counters: Counters,
    ) -> None:
        self.counters = counters
        self._clock = env.clock
        self.views = Views(
            env.clock,
            lambda: env.rng.getrandbits(INCARNATION_BITS) + 1,
            [store.uuid for store in stores],
        )
        self.peers = Peers(env, self.views)
        self._garbage = GarbageCollector(
            env,
            stores,
            self.views,
            counters,
            metadata=config.metadata,
            seconds=config.garbage_seconds,
        )
        self.sinks = SyncSinks(self.views, self._garbage.wait_past)
        # Each holds a whole chunk of a file.
        self.buffer_bytes = size = max(TRANSFER_BYTES, CHAIN_CHUNK_BYTES)
        self._buffers = [BufferPool(PASS_BUFFERS, size) for _ in range(HOPS_MAX + 1)]
        sending = BufferPool(SYNC_BUFFERS, size)
        self.crew = Crew(CREW_THREADS)
        self.replicator = Replicator(
            self.views, self.peers, self.sinks, sending, counters, crew=self.crew
        )
        self.repairer = Repairer(self.views, self.peers, self.replicator, sending, counters)
        self._source = SyncSource(
            stores,
            self.views,
            self.peers,
            self.replicator,
            repairer=self.repairer,
            buffers=sending,
            counters=counters,
            bytes_per_second=config.sync_bytes_per_second,
        )
        self._maintenance = Maintenance(
            env, stores, self.views, self.peers, self.replicator, repairer=self.repairer
        )

    def buffers(self, hops: int) -> BufferPool:
        """Receive buffers for what ``hops`` members get after this one. Who waits for one waits
        for requests with as many hops, and these for others with fewer: never in a circle."""
        return self._buffers[min(hops, HOPS_MAX)]

    def suspects(self) -> tuple[int, ...]:
        """Targets that could not be reached for a while."""
        return self.peers.reach.suspects(self._clock.monotonic())

    def synced(self) -> tuple[Synced, ...]:
        """Whom targets of this server have brought in step."""
        return self._source.synced()

    def start(self) -> None:
        self._maintenance.start()
        self._source.start()
        self._garbage.start()

    def stop(self) -> None:
        """Breaks off what is under way to other servers, and waits for the threads."""
        self.peers.close()
        self._maintenance.stop()
        self._source.stop()
        self._garbage.stop()
        self.crew.close()
