"""A cluster of production code under a seed: made, used, hurt, healed and looked at.

First there are faults, and what clients see is noted. Then everything is healed, and it must come
back to service within LIVENESS_SECONDS. In the end the history is checked, and what lies in the
store and on the disks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable

from kvfs_base import threads
from kvfs_base.cluster import TargetState
from kvfs_base.errors import KvfsError
from kvfs_base.limits import MIB
from kvfs_base.types import Attr
from kvfs_metadata import messages as m
from kvfs_metadata.cluster.admin_messages import SetDraining
from sim import checks, rare, tiny
from sim.cluster import ChunkHost, ClientHost, MetadataHost, Site
from sim.disk import DiskKnobs
from sim.engine import SimStore
from sim.history import History
from sim.holding import HoldWorker
from sim.hub import Hub, Process, ProcessDied, SimThread, SimulationFailed
from sim.keeper import Keeper
from sim.nemesis import Nemesis
from sim.network import SimNetwork
from sim.observer import Observer
from sim.plan import CUTS, LIVENESS_SECONDS, make_plan
from sim.sim_threads import SimThreads
from sim.trio_host import TrioHost
from sim.workloads import (
    FILES,
    LAYOUT,
    BlockWorker,
    ChurnWorker,
    CutWorker,
    FileWorker,
    ReadWorker,
    Worker,
    make_directory,
    make_file,
)

RUN_SECONDS_MAX = 1000.0


class _Log(logging.Handler):
    """Warnings are part of the trace; an exception that production code did not expect is a
    failure."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(level=logging.WARNING)
        self._hub = hub

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("kvfs"):
            return
        self._hub.counts["logged"] += 1
        self._hub.trace("log", record.name, record.getMessage())
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, KvfsError) and not self._hub.is_dead:
            self._hub.fail(f"logged: {record.getMessage()}", error)


class World:
    def __init__(self, seed: int, kind: str = "") -> None:
        self.seed = seed
        self.hub = Hub(seed)
        self.plan = make_plan(self.hub.rng, kind)
        self.hub.switch_chance = self.hub.rng.choice((0.05, 0.3, 0.8))
        self.network = SimNetwork(self.hub, self.plan.network)
        self.trio = TrioHost(self.hub)
        self.process = self.hub.process("world")
        self.site = Site(self.hub, self.network, self.trio)
        self.history = History()
        self.enough = False
        self.healing = False
        self.metadata_went_back = False
        self._value = 0
        self.blocks: dict[int, int] = {}
        """The value that the bytes of each block have, by inode number."""
        self.working: list[SimThread] = []

    def next_value(self) -> int:
        self._value += 1
        return self._value

    # --- making

    def _build(self) -> None:
        plan = self.plan
        strict = plan.durability == "strict"
        self.store = SimStore(self.hub, shared=plan.metadata_servers > 1, strict=strict)
        self.metadata_hosts = [
            MetadataHost(self.site, f"meta{n}", self.store, plan.durability)
            for n in range(plan.metadata_servers)
        ]
        self.site.metadata = tuple(host.address for host in self.metadata_hosts)
        self.chunk_hosts = [
            ChunkHost(
                self.site,
                f"chunks{n}",
                plan.targets,
                plan.durability,
                lambda: dataclasses.replace(plan.disk),
                64 * MIB,
                plan.sync_rate,
                plan.garbage_seconds,
            )
            for n in range(plan.chunk_servers)
        ]
        self.clients = [
            ClientHost(self.site, f"client{n}", leases=plan.leases_blocks)
            for n in range(plan.clients)
        ]
        self.observer = Observer(self)
        self.keeper = Keeper(self)
        self.store.watch = self.observer.watch
        for metadata_host in self.metadata_hosts:
            metadata_host.start()
        for chunk_host in self.chunk_hosts:
            chunk_host.start()
        for client in self.clients:
            client.start()

    def _prepare(self) -> None:
        client = self.clients[0]
        self.wait(lambda: self._all_serving(client), "the cluster to come up")
        call = client.metadata_client().call
        opened = call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=self.plan.copies))
        self.namespace: int = opened.inode
        self.directory = make_directory(call, b"files", self.plan.copies)
        self.files: list[Attr] = [
            make_file(call, self.directory, b"shared%d" % n)
            for n in range(FILES if self.plan.files else 0)
        ]
        if self.plan.durability == "cache":
            call(m.Sync())

    def _all_serving(self, client: ClientHost) -> bool:
        found = client.map().targets
        wanted = self.plan.chunk_servers * self.plan.targets
        serving = [t for t in found if t.state is TargetState.SERVING]
        return len(serving) == wanted

    def all_whole(self, client: ClientHost) -> bool:
        """Every target serves, and every chain has all of its members in step. One more than it
        needs may stay, of a drain that was given up."""
        found = client.map()
        return self._all_serving(client) and all(
            len(chain.targets) >= chain.copies and not chain.syncing and not chain.offline
            for chain in found.chains
        )

    def wait(
        self,
        condition: Callable[[], bool],
        what: str,
        explain: Callable[[], str] = str,
        process: Process | None = None,
        seconds: float = LIVENESS_SECONDS,
    ) -> None:
        """Until it is so, asked in a process that is a client's. Raises SimulationFailed if that is
        not in time."""
        end = self.hub.now + seconds
        while True:
            with contextlib.suppress(KvfsError):
                if (process or self.clients[0].process).run(condition):
                    return
            if self.hub.now > end:
                raise SimulationFailed(f"waited in vain for {what}\n{explain()}")
            self.hub.sleep(1.0)

    # --- running

    def start_chunks(self, host: ChunkHost) -> None:
        if not host.is_running and host.host.up:
            host.start()

    def start_client(self, client: ClientHost) -> None:
        if not client.process.alive:
            with contextlib.suppress(ProcessDied):
                client.start()
                if not self.enough:
                    self._set_to_work(client)

    def _set_to_work(self, client: ClientHost) -> None:
        kinds: list[type[Worker]] = [BlockWorker, BlockWorker, ChurnWorker]
        if self.plan.files:
            kinds += [FileWorker, FileWorker]
        elif self.plan.kind == CUTS:
            kinds = [CutWorker, CutWorker, CutWorker]
        elif self.plan.drains:
            # Their clients may be silent for longer than a session lasts.
            kinds.remove(ChurnWorker)
        if client is self.clients[0] and not self.plan.drains:
            kinds.append(HoldWorker)
        if self.plan.copies > 1 and client is self.clients[-1]:
            kinds = [ReadWorker, ReadWorker]

        def make(kind: type[Worker], number: int) -> Worker:
            return kind(self, client, number)

        for number, kind in enumerate(kinds):
            worker = client.process.run(make, kind, number)
            self.working.append(client.process.start(worker.run, name=worker.name))

    def _main(self) -> None:
        self.trio.start(self.hub.rng.getrandbits(32))
        self._build()
        # Who prepares does not ask again; faults begin with the work.
        self.network.may_damage = False
        self._prepare()
        self.network.may_damage = True
        for client in self.clients:
            self._set_to_work(client)
        self.observer.start()
        self.keeper.start()
        self.nemesis = Nemesis(self)
        nemesis = self.process.start(self.nemesis.run, name="nemesis")
        self.hub.sleep(self.plan.seconds)
        self.enough = True
        nemesis.join()
        self._heal()
        checks.after(self)
        self.trio.stop()

    def _heal(self) -> None:
        """No fault is left; whoever works ends its last operation."""
        self.hub.trace("heal")
        self.network.heal()
        knobs = self.network.knobs
        knobs.flip_chance = knobs.slow_chance = knobs.stop_chance = 0.0
        for metadata_host in self.metadata_hosts:
            if not metadata_host.is_running:
                metadata_host.start()
        for chunk_host in self.chunk_hosts:
            for disk in chunk_host.disks.values():
                disk.knobs = DiskKnobs(latency=disk.knobs.latency, stall_chance=0.0)
                disk.reserved_bytes = 0
                if disk.failed:
                    disk.failed = False
                    chunk_host.kill()
            if not chunk_host.host.up:
                chunk_host.power_on()
            self.start_chunks(chunk_host)
        for client in self.clients:
            self.start_client(client)
        for host in (*self.chunk_hosts, *self.clients):
            host.process.paused_until = 0.0
        if "drain" in self.plan.faults:
            self.wait(self._end_drains, "the drains to end")
        self.keeper.tidy()
        for thread in self.working:
            thread.join(LIVENESS_SECONDS)
            if thread.is_alive():
                raise SimulationFailed(f"never ended:\n{thread.stack()}")

    def _end_drains(self) -> bool:
        client = self.clients[0]
        targets = tuple(target.target_id for target in client.map().targets)
        ordered = not self.nemesis.ordering
        metadata = client.metadata_client()
        metadata.call(SetDraining(targets, False))
        figures = metadata.call(m.Statistics())
        for name in ("moved_blocks", "moved_files"):
            self.hub.counts[name.replace("_", " ")] += figures[name]
        return ordered

    def run(self) -> None:
        """Raises SimulationFailed, with what was wrong as its cause."""
        log = _Log(self.hub)
        logging.getLogger().addHandler(log)
        try:
            with (
                threads.installed(SimThreads(self.hub)),
                self.trio.installed(),
                tiny.limits(
                    self.hub.rng,
                    short_sessions=self.plan.drains,
                    short_tails=self.plan.kind == CUTS,
                ),
                rare.forced(self.hub),
            ):
                try:
                    main = self.process.start(self._main, name="main")
                    self.hub.run(main, RUN_SECONDS_MAX)
                finally:
                    self.hub.close()
        finally:
            logging.getLogger().removeHandler(log)
