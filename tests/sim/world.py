"""A cluster of production code under a seed: made, used, hurt, healed and looked at.

First there are faults, and what clients see is noted. Then everything is healed, and it must come
back to service within LIVENESS_SECONDS. In the end the history is checked, and what lies in the
store and on the disks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable

from kvfs_base import threads
from kvfs_base.cluster import TargetState
from kvfs_base.errors import KvfsError
from kvfs_base.limits import MIB
from kvfs_base.types import Attr
from kvfs_metadata import messages as m
from sim import checks, tiny
from sim.cluster import ChunkHost, ClientHost, MetadataHost, Site
from sim.disk import DiskKnobs
from sim.engine import SimStore
from sim.history import History
from sim.hub import Hub, ProcessDied, SimulationFailed
from sim.nemesis import Nemesis
from sim.network import NetworkKnobs, SimNetwork
from sim.sim_threads import SimThreads
from sim.trio_host import TrioHost
from sim.workloads import (
    FILES,
    LAYOUT,
    BlockWorker,
    ChurnWorker,
    FileWorker,
    Worker,
    make_directory,
    make_file,
)

LIVENESS_SECONDS = 120.0
RUN_SECONDS_MAX = 1000.0

HARMLESS = ("kill metadata", "kill client", "pause", "clock")
NETWORK = ("partition", "one way", "isolate", "clog", "break")


@dataclasses.dataclass
class Plan:
    """What a seed makes of the world."""

    metadata_servers: int
    chunk_servers: int
    targets: int
    clients: int
    durability: str
    copies: int
    faults: tuple[str, ...]
    lossy: bool
    """Acknowledged blocks may be lost, as misses: never their bytes mixed up."""
    evicts: bool
    """Blocks may vanish: a full disk makes the cache evict."""
    files: bool
    """Files are compared with linearizable registers."""
    files_lossy: bool
    """What was written to a file may be lost: nobody had synced it."""
    late_writes: bool
    """A write may arrive after its removal, and stays on the disk."""
    seconds: float
    fault_seconds: float
    outage_seconds: float
    pause_seconds: float
    late_seconds: float
    network: NetworkKnobs
    disk: DiskKnobs


def make_plan(rng: random.Random) -> Plan:
    durability = rng.choice(("cache", "strict"))
    faults: tuple[str, ...]
    lossy, files = False, True
    kind = rng.randrange(4)
    if kind == 0:  # a file of one copy survives what does not repeat writes
        faults = (*HARMLESS, "kill chunks")
    elif kind == 1:
        faults, files = (*HARMLESS, "kill chunks", *NETWORK), False
    elif kind == 2:
        durability = "strict"
        faults, files = (*HARMLESS, *NETWORK, "power chunks", "power metadata", "full disk"), False
    else:
        lossy, files = True, False
        faults = (*HARMLESS, *NETWORK, "power all", "power metadata", "dead disk", "rot")
    chosen = tuple(f for f in faults if rng.random() < 0.7) or faults[:1]
    return Plan(
        metadata_servers=rng.choice((1, 1, 2)),
        chunk_servers=rng.randint(2, 3),
        targets=rng.randint(1, 2),
        clients=rng.randint(2, 3),
        durability=durability,
        copies=1,
        faults=chosen,
        lossy=lossy,
        evicts=lossy or "full disk" in chosen,
        files=files,
        files_lossy=lossy or "power chunks" in chosen,
        late_writes=not set(chosen) <= {"kill metadata", "clock", "kill chunks"},
        seconds=rng.uniform(10.0, 25.0),
        fault_seconds=rng.choice((0.7, 2.0, 4.0)),
        outage_seconds=rng.choice((0.5, 2.0, 6.0)),
        pause_seconds=rng.choice((0.05, 0.15, 0.4)),
        late_seconds=rng.choice((0.0, 1.0, 10.0)),
        network=NetworkKnobs(
            latency=rng.choice((0.0001, 0.001, 0.01)),
            slow_chance=0.0 if files else rng.choice((0.0, 0.001, 0.02)),
            split_chance=rng.choice((0.0, 0.05, 0.3)),
            window_bytes=rng.choice((8 << 10, 128 << 10)),
            flip_chance=rng.choice((0.0, 0.05)) if lossy else 0.0,
        ),
        disk=DiskKnobs(
            latency=rng.choice((0.0001, 0.001, 0.01)),
            stall_chance=rng.choice((0.0, 0.0005, 0.005)),
            lost_write_chance=rng.choice((0.0, 0.01)) if lossy else 0.0,
            misdirected_chance=rng.choice((0.0, 0.01)) if lossy else 0.0,
        ),
    )


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
    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        self.seed = seed
        self.hub = Hub(seed)
        self.plan = plan or make_plan(self.hub.rng)
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
        self.workers: list[Worker] = []

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
            )
            for n in range(plan.chunk_servers)
        ]
        self.clients = [ClientHost(self.site, f"client{n}") for n in range(plan.clients)]
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
        opened = call(m.OpenNamespace("t/m", LAYOUT, create=True))
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

    def wait(
        self,
        condition: Callable[[], bool],
        what: str,
        explain: Callable[[], str] = str,
    ) -> None:
        """Raises SimulationFailed if it does not become true in time."""
        end = self.hub.now + LIVENESS_SECONDS
        while True:
            with contextlib.suppress(KvfsError):
                if self.clients[0].process.run(condition):
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

        def make(kind: type[Worker], number: int) -> Worker:
            return kind(self, client, number)

        for number, kind in enumerate(kinds):
            worker = client.process.run(make, kind, number)
            self.workers.append(worker)
            client.process.start(worker.run, name=worker.name)

    def _main(self) -> None:
        self.trio.start(self.hub.rng.getrandbits(32))
        self._build()
        self._prepare()
        for client in self.clients:
            self._set_to_work(client)
        nemesis = self.process.start(Nemesis(self).run, name="nemesis")
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
        knobs.flip_chance = knobs.slow_chance = 0.0
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
        for client in self.clients:
            for thread in list(client.process.threads):
                thread.join(LIVENESS_SECONDS)
                if thread.is_alive():
                    raise SimulationFailed(f"never ended:\n{thread.stack()}")

    def run(self) -> None:
        """Raises SimulationFailed, with what was wrong as its cause."""
        log = _Log(self.hub)
        logging.getLogger().addHandler(log)
        try:
            with (
                threads.installed(SimThreads(self.hub)),
                self.trio.installed(),
                tiny.limits(self.hub.rng),
            ):
                try:
                    main = self.process.start(self._main, name="main")
                    self.hub.run(main, RUN_SECONDS_MAX)
                finally:
                    self.hub.close()
        finally:
            logging.getLogger().removeHandler(log)
