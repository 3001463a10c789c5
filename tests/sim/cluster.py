"""Hosts of a simulated cluster: what production processes run on them, and how those end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import trio

from kvfs.agent.watching import WATCHER_BYTES, Uses, Watching
from kvfs_base.cluster import ClusterMap
from kvfs_base.errors import KvfsError
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.seams import Disk, Env
from kvfs_base.types import Address
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_gds.block_cache import BlockCache
from kvfs_metadata.client import BlockingMetadataClient, ClusterView
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.service import MetadataService
from sim.disk import DiskKnobs, SimDisk
from sim.engine import SimEngine, SimStore
from sim.hub import Hub, Process, ProcessDied
from sim.network import Host, SimBlockingNetwork, SimNetwork
from sim.trio_host import SimTrioNetwork, TrioHost

START_NS = 1_700_000_000_000_000_000
METADATA_PORT = 6000
ARENA_BYTES = 16 * PAGE_BYTES
"""Less than all blocks need."""
CHUNK_PORT = 7000


class HostClock:
    """``skew_ns`` is how wrong the wall clock is; it may jump. Monotonic clocks begin anywhere."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._begin = hub.rng.random() * 1e6
        self.skew_ns = int((hub.rng.random() - 0.5) * 4e9)

    def time_ns(self) -> int:
        return START_NS + self.skew_ns + int(self._hub.now * 1e9)

    def monotonic(self) -> float:
        return self._begin + self._hub.now


class Site:
    """What the hosts have in common."""

    def __init__(self, hub: Hub, network: SimNetwork, trio_host: TrioHost) -> None:
        self.hub = hub
        self.network = network
        self.trio = trio_host
        self.metadata: tuple[Address, ...] = ()

    def env(
        self,
        host: Host,
        clock: HostClock,
        process: Process,
        open_disk: Callable[[str], Disk] | None = None,
    ) -> Env:
        def no_disk(path: str) -> Disk:
            raise AssertionError(f"{host.name} has no disk {path}")

        return Env(
            clock=clock,
            rng=random.Random(self.hub.rng.getrandbits(64)),
            network=SimTrioNetwork(self.trio, self.network, host, process),
            blocking_network=SimBlockingNetwork(self.network, host, process),
            host_id=host.name,
            open_disk=open_disk or no_disk,
        )


class ChunkHost:
    """A host with some disks and a chunk server."""

    def __init__(
        self,
        site: Site,
        name: str,
        targets: int,
        durability: str,
        knobs: Callable[[], DiskKnobs],
        capacity_bytes: int,
        sync_rate: int,
        garbage_seconds: float,
    ) -> None:
        self.site = site
        self.name = name
        self.host = site.network.host(name)
        self.clock = HostClock(site.hub)
        self.durability = durability
        self.sync_rate = sync_rate
        self.garbage_seconds = garbage_seconds
        self.disks = {
            f"/{name}/{number}": SimDisk(
                random.Random(site.hub.rng.getrandbits(64)), knobs(), capacity_bytes
            )
            for number in range(targets)
        }
        for disk in self.disks.values():
            self._connect(disk)
        self.process: Process | None = None
        self.server: ChunkServer | None = None

    def _connect(self, disk: SimDisk) -> None:
        hub = self.site.hub

        def pace(operation: str) -> None:
            if hub.current is None:
                return
            hub.require_alive()
            if disk.rng.random() < disk.knobs.stall_chance:
                hub.sleep(2.0 * disk.rng.random())
            elif operation == "sync" or operation == "sync_directory":
                hub.sleep(5 * disk.knobs.latency * disk.rng.random())
            elif disk.rng.random() < hub.switch_chance:
                hub.sleep(2 * disk.knobs.latency * disk.rng.random())

        disk.pace = pace
        disk.is_dead = lambda: hub.is_dead
        disk.note = lambda fault: hub.counts.update([fault])

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> bool:
        """Whether the server is up: a disk may refuse."""
        assert not self.is_running
        hub = self.site.hub
        process = self.process = hub.process(self.name)
        process.at_death.append(self._let_go)
        env = self.site.env(self.host, self.clock, process, self.disks.__getitem__)
        config = ChunkServerConfig(
            server_id=self.name,
            directories=tuple(self.disks),
            metadata=self.site.metadata,
            unix=None,
            tcp=Address.tcp(self.host.ip, CHUNK_PORT),
            durability=self.durability,
            sync_bytes_per_second=self.sync_rate,
            garbage_seconds=self.garbage_seconds,
        )

        def begin() -> ChunkServer:
            server = ChunkServer(env, config)
            server.start()
            return server

        try:
            self.server = process.run(begin)
        except ProcessDied:
            return False
        except KvfsError as exc:
            hub.trace(self.name, "does not start", type(exc).__name__)
            hub.kill(process)
            return False
        return True

    def _let_go(self) -> None:
        for disk in self.disks.values():
            disk.process_died()

    def kill(self) -> None:
        if self.process is not None:
            self.site.hub.kill(self.process)

    def power_off(self) -> None:
        """Everything at once, in the hub."""
        for end in self.site.network.of_host(self.host):
            end.vanish()
        self.site.network.power_off(self.host)
        if self.process is not None:
            self.site.hub.kill_now(self.process)
        for disk in self.disks.values():
            disk.lose_power()
        self.clock = HostClock(self.site.hub)

    def power_on(self) -> None:
        self.site.network.power_on(self.host)


class MetadataHost:
    """A host with a metadata server; the store may be shared with others."""

    def __init__(
        self, site: Site, name: str, store: SimStore, durability: str, **settings: Any
    ) -> None:
        self.site = site
        self.name = name
        self.host = site.network.host(name)
        self.clock = HostClock(site.hub)
        self.store = store
        self.address = Address.tcp(self.host.ip, METADATA_PORT)
        self._durability = durability
        self._settings = settings
        self.process: Process | None = None
        self.service: MetadataService | None = None
        self._scope: trio.CancelScope | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        assert not self.is_running
        self.process = self.site.hub.process(self.name)
        self._scope = trio.CancelScope()
        self.site.trio.start_soon(self._serve, self.process, self._scope)

    async def _serve(self, process: Process, scope: trio.CancelScope) -> None:
        env = self.site.env(self.host, self.clock, process)
        config = MetadataConfig(
            directory=f"/{self.name}",
            unix=Address.unix(f"/{self.name}/meta.sock"),
            tcp=self.address,
            durability=self._durability,
            **self._settings,
        )
        engine = SimEngine(self.store, process)
        try:
            with scope:
                self.service = MetadataService(env, config, engine)
                await self.service.serve()
        except Exception as exc:
            if process.alive:
                self.site.hub.fail(f"{self.name} died", exc)

    def kill(self) -> None:
        if self.process is not None and self.process.alive:
            self.site.hub.kill(self.process)
            assert self._scope is not None
            self.site.trio.cancel(self._scope)

    def power_cycle(self) -> bool:
        """Whether what was acknowledged was lost."""
        hub = self.site.hub
        if self.process is not None and self.process.alive:
            for end in self.site.network.of_host(self.host):
                end.vanish()
            self.kill()
        self.clock = HostClock(hub)
        return self.store.lose_power()


class ClientHost:
    """A process that uses the cluster."""

    def __init__(self, site: Site, name: str, *, leases: bool = False) -> None:
        """``leases``: it answers for blocks by itself, as an agent does."""
        self.site = site
        self.name = name
        self.host = site.network.host(name)
        self.clock = HostClock(site.hub)
        self._leases = leases
        self.cache: BlockCache | None = None
        self.uses = Uses()
        self.watcher = b""
        self.process: Process
        self.env: Env
        self.chunks: ChunkClient
        self.view: ClusterView

    def start(self) -> None:
        self.process = self.site.hub.process(self.name)
        self.env = self.site.env(self.host, self.clock, self.process)
        self.process.run(self._begin)

    def _begin(self) -> None:
        self.view = ClusterView(self.env, self.site.metadata)
        self.chunks = ChunkClient(self.env, self.view, prefer="tcp")
        if self._leases:
            self.cache, self.uses = BlockCache(ARENA_BYTES), Uses()
            self.watcher = self.env.rng.randbytes(WATCHER_BYTES)
            Watching(self.env, self.site.metadata, self.watcher, self.cache, self.uses).start()

    def metadata_client(self) -> BlockingMetadataClient:
        return BlockingMetadataClient(self.env, self.site.metadata)

    def map(self) -> ClusterMap:
        return self.view.refresh()

    def kill(self) -> None:
        self.site.hub.kill(self.process)
