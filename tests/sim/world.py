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
from kvfs_metadata.cluster.admin_messages import SetDraining
from sim import checks, tiny
from sim.cluster import ChunkHost, ClientHost, MetadataHost, Site
from sim.disk import DiskKnobs
from sim.engine import SimStore
from sim.history import History
from sim.hub import Hub, ProcessDied, SimThread, SimulationFailed
from sim.nemesis import Nemesis
from sim.network import NetworkKnobs, SimNetwork
from sim.observer import Observer
from sim.sim_threads import SimThreads
from sim.trio_host import TrioHost
from sim.workloads import (
    FILES,
    LAYOUT,
    BlockWorker,
    ChurnWorker,
    FileWorker,
    ReadWorker,
    Worker,
    make_directory,
    make_file,
)

LIVENESS_SECONDS = 120.0
RUN_SECONDS_MAX = 1000.0

HARMLESS = ("kill metadata", "kill client", "pause", "clock")
NETWORK = ("partition", "one way", "isolate", "estrange", "clog", "break")


@dataclasses.dataclass
class Plan:
    """What a seed makes of the world."""

    kind: str
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
    sync_rate: int
    """Bytes a second that bring members in step; 0 is no bound."""
    network: NetworkKnobs
    disk: DiskKnobs

    @property
    def ruins(self) -> bool:
        """All copies of a chunk may rot: whoever finds that writes it anew."""
        return self.kind == "chains and ruin"

    @property
    def may_be_damaged(self) -> bool:
        """For a while nobody may have a good copy: the others are away. In the end somebody has."""
        return self.files_lossy or "rot" in self.faults


SINGLE_COPY = ("restarts", "network", "power", "anything")
CHAINS = (
    "chains",
    "leases",
    "chains and power",
    "chains and disks",
    "chains and rot",
    "chains and ruin",
    "chains and memory",
)
KINDS = (*SINGLE_COPY, *CHAINS, *CHAINS)
DRAINS = "drains"
"""Only when it is asked for: seeds stay what they are."""
FLIPPING = ("chains", "chains and rot", "chains and ruin")
"""Where bytes change on their way, for whole chunks and for pieces of files."""


def make_plan(rng: random.Random, kind: str = "") -> Plan:
    kind = kind or rng.choice(KINDS)
    durability = rng.choice(("cache", "strict"))
    copies = rng.choice((2, 2, 3)) if kind in CHAINS else 1
    lossy, files, lying = False, True, False
    faults: tuple[str, ...] = (*HARMLESS, "kill chunks")
    if kind == "network":
        faults, files = (*faults, *NETWORK), False
    elif kind == "power":
        durability, files = "strict", False
        faults = (*HARMLESS, *NETWORK, "power chunks", "power metadata", "full disk")
    elif kind == "anything":
        lossy, files, lying = True, False, True
        faults = (*HARMLESS, *NETWORK, "power all", "power metadata", "dead disk", "rot")
    elif kind == DRAINS:  # writes in place are not to come late
        files = rng.random() < 0.5
        more = () if files else (*NETWORK, "pause")
        harmless = tuple(fault for fault in HARMLESS if fault != "pause")
        faults = ("drain", "drain", "drain", *harmless, *more, "kill chunks")
    elif kind == "chains":
        faults = (*faults, *NETWORK)
    elif kind == "leases":
        faults = ("estrange", "estrange", "pause", "kill chunks", "partition")
    elif kind == "chains and memory":  # what the metadata service decided may be forgotten
        durability, lossy = "cache", True
        faults = ("power metadata", "estrange", "estrange", "kill chunks", "partition", "break")
    elif kind == "chains and power":
        durability = "strict"
        faults = (*faults, *NETWORK, "power chunks", "power metadata", "power all")
    elif kind == "chains and disks":
        faults = (*faults, *NETWORK, "dead disk", "full disk")
    elif kind == "chains and rot":  # and nobody else away: of two copies one may rot
        faults = ("rot", "rot", "kill client", "clock", "break", "kill metadata")
    elif kind == "chains and ruin":  # of some chunks no good copy is left
        lossy = True
        faults = ("rot", "rot", "kill chunks", "kill client", "break", "isolate")
    chosen = tuple(f for f in faults if f == "drain" or rng.random() < 0.7) or faults[:1]
    return Plan(
        kind=kind,
        metadata_servers=rng.choice((1, 1, 2)),
        chunk_servers=rng.randint(max(2, copies), 4 if copies > 1 else 3),
        targets=1 if copies > 1 and rng.random() < 0.7 else rng.randint(1, 2),
        clients=rng.randint(2, 3),
        durability=durability,
        copies=copies,
        faults=chosen,
        lossy=lossy,
        evicts=lossy or "full disk" in chosen,
        files=files,
        files_lossy=copies == 1 and (lossy or "power chunks" in chosen),
        late_writes=not set(chosen) <= {"kill metadata", "clock", "kill chunks"},
        seconds=rng.uniform(10.0, 25.0),
        fault_seconds=rng.choice((0.7, 2.0, 4.0)) + 2.0 * (kind == DRAINS),
        outage_seconds=rng.choice((0.5, 2.0, 6.0)),
        pause_seconds=0.05 if kind == "leases" else rng.choice((0.05, 0.15, 0.4)),
        late_seconds=rng.choice((0.0, 1.0, 10.0)),
        sync_rate=20_000 if kind == "leases" else rng.choice((0, 0, 20_000)),
        network=NetworkKnobs(
            latency=rng.choice((0.0001, 0.001, 0.01)),
            slow_chance=0.0 if files and copies == 1 else rng.choice((0.0, 0.001, 0.02)),
            split_chance=rng.choice((0.0, 0.05, 0.3)),
            window_bytes=rng.choice((8 << 10, 128 << 10)),
            flip_chance=rng.choice((0.0, 0.05)) if lying or kind in FLIPPING else 0.0,
        ),
        disk=DiskKnobs(
            latency=rng.choice((0.0001, 0.001, 0.01)),
            stall_chance=rng.choice((0.0, 0.0005, 0.005)),
            lost_write_chance=rng.choice((0.0, 0.01)) if lying else 0.0,
            misdirected_chance=rng.choice((0.0, 0.01)) if lying else 0.0,
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
            )
            for n in range(plan.chunk_servers)
        ]
        self.clients = [ClientHost(self.site, f"client{n}") for n in range(plan.clients)]
        self.observer = Observer(self)
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
        """Every target serves, and every chain has all of its members in step."""
        found = client.map()
        return self._all_serving(client) and all(
            len(chain.targets) == chain.copies and not chain.syncing and not chain.offline
            for chain in found.chains
        )

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
        elif self.plan.kind == DRAINS:
            # Their clients may be silent for longer than a session lasts.
            kinds.remove(ChurnWorker)
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
        self._prepare()
        for client in self.clients:
            self._set_to_work(client)
        self.observer.start()
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
        if "drain" in self.plan.faults:
            self.wait(self._end_drains, "the drains to end")
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
                tiny.limits(self.hub.rng, short_sessions=self.plan.kind == DRAINS),
            ):
                try:
                    main = self.process.start(self._main, name="main")
                    self.hub.run(main, RUN_SECONDS_MAX)
                finally:
                    self.hub.close()
        finally:
            logging.getLogger().removeHandler(log)
