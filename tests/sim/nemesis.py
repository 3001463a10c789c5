"""What goes wrong, and when: faults chosen by chance among those that a plan allows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvfs_base.errors import KvfsError
from kvfs_base.limits import TARGET_LEASE_SECONDS
from kvfs_datapath.limits import SUSPECT_SECONDS
from kvfs_metadata.cluster.admin_messages import SetDraining
from sim.cluster import ChunkHost, MetadataHost
from sim.disk import Node
from sim.keeper import Keeper

if TYPE_CHECKING:
    from sim.world import World

FAULTS = (
    "kill chunks",
    "kill metadata",
    "kill client",
    "pause",
    "partition",
    "one way",
    "isolate",
    "estrange",
    "clog",
    "break",
    "clock",
    "power chunks",
    "power metadata",
    "power all",
    "dead disk",
    "full disk",
    "rot",
    "drain",
    "behead",
    "take out",
    "wipe",
)


class Nemesis:
    """A thread of no process that production knows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hub = world.hub
        self.rng = world.hub.rng
        self.ordering = False
        self._actions: dict[str, Callable[[], None]] = {
            "kill chunks": self._kill_chunks,
            "kill metadata": self._kill_metadata,
            "kill client": self._kill_client,
            "pause": self._pause,
            "partition": lambda: self._cut(both=True),
            "one way": lambda: self._cut(both=False),
            "isolate": self._isolate,
            "estrange": self._estrange,
            "clog": self._clog,
            "break": self._break,
            "clock": self._clock,
            "power chunks": self._power_chunks,
            "power metadata": self._power_metadata,
            "power all": self._power_all,
            "dead disk": self._dead_disk,
            "full disk": self._full_disk,
            "rot": self._rot,
            "drain": self._drain,
            "behead": self._behead,
            "take out": lambda: world.keeper.begin(Keeper.drain),
            "wipe": lambda: world.keeper.begin(Keeper.wipe),
        }
        assert set(self._actions) == set(FAULTS)

    def run(self) -> None:
        plan = self.world.plan
        while not self.world.enough:
            self.hub.sleep(self.rng.expovariate(1 / plan.fault_seconds))
            if not self.world.enough:
                fault = self.rng.choice(plan.faults)
                self.hub.counts[f"fault: {fault}"] += 1
                self.hub.trace("nemesis", fault)
                self._actions[fault]()

    def _some_time(self) -> float:
        return self.rng.expovariate(1 / self.world.plan.outage_seconds)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        """In a thread of its own, as starting a server takes a while."""

        def run() -> None:
            self.hub.sleep(seconds)
            action()

        self.world.process.start(run, name="nemesis-later")

    # --- processes

    def _kill_chunks(self) -> None:
        host = self.rng.choice(self.world.chunk_hosts)
        if host.is_running:
            host.kill()
            self._later(self._some_time(), lambda: self.world.start_chunks(host))

    def _kill_metadata(self) -> None:
        host = self.rng.choice(self.world.metadata_hosts)
        if host.is_running:
            host.kill()
            self._later(self._some_time(), lambda: self._start_metadata(host))

    def _start_metadata(self, host: MetadataHost) -> None:
        if not host.is_running:
            host.start()

    def _kill_client(self) -> None:
        client = self.rng.choice(self.world.clients)
        if client.process.alive:
            client.kill()
            self._later(self._some_time(), lambda: self.world.start_client(client))

    def _pause(self) -> None:
        running = [h.process for h in self.world.chunk_hosts if h.process is not None]
        running += [client.process for client in self.world.clients]
        process = self.rng.choice([*running, self.world.trio.process])
        self.hub.pause(process, self._some_time())

    def _clock(self) -> None:
        host = self.rng.choice([*self.world.chunk_hosts, *self.world.metadata_hosts])
        host.clock.skew_ns += int((self.rng.random() - 0.5) * 20e9)

    # --- the network

    def _names(self) -> list[str]:
        return list(self.world.network.hosts)

    def _cut(self, *, both: bool) -> None:
        """Half of the time between members of chains, of which there are few among all hosts."""
        names = self._names()
        if self.world.plan.copies > 1 and self.rng.random() < 0.5:
            names = [host.name for host in self.world.chunk_hosts]
        one, other = self.rng.sample(names, 2)
        self._cut_paths([(one, other), (other, one)][: 2 if both else 1])

    def _isolate(self) -> None:
        victim = self.rng.choice(self._names())
        others = [name for name in self._names() if name != victim]
        directions = self.rng.choice(("in", "out", "both", "both"))
        paths = [(o, victim) for o in others if directions != "out"]
        paths += [(victim, o) for o in others if directions != "in"]
        self._cut_paths(paths)

    def _estrange(self) -> None:
        """A chunk server hears nothing of the metadata service for longer than its lease; clients
        still reach it."""
        victim = self.rng.choice(self.world.chunk_hosts).name
        servers = [host.name for host in self.world.metadata_hosts]
        paths = [(victim, s) for s in servers] + [(s, victim) for s in servers]
        self._cut_paths(paths, TARGET_LEASE_SECONDS)

    def _cut_paths(self, paths: list[tuple[str, str]], seconds_min: float = 0.0) -> None:
        self.hub.trace("cut", *paths)
        for path in paths:
            self.world.network.cut_path(*path)

        def heal() -> None:
            self.hub.trace("healed", *paths)
            for path in paths:
                self.world.network.heal_path(*path)

        self.hub.call_later(seconds_min + self._some_time(), heal)

    def _behead(self) -> None:
        """A server cannot reach the others, clients can reach it, and then it dies: what it has
        pending nobody else has heard of."""
        victim = self.rng.choice(self.world.chunk_hosts)
        others = [host.name for host in self.world.chunk_hosts if host is not victim]
        self._cut_paths([(victim.name, o) for o in others] + [(o, victim.name) for o in others])

        def strike() -> None:
            if victim.is_running:
                victim.kill()
                self._later(self._some_time(), lambda: self.world.start_chunks(victim))

        self._later(2 * SUSPECT_SECONDS * self.rng.random(), strike)

    def _clog(self) -> None:
        for name in self.rng.sample(self._names(), 2):
            for other in self._names():
                until = self.hub.now + self.rng.random() * self.world.plan.outage_seconds
                self.world.network.clogged[name, other] = until
                self.world.network.clogged[other, name] = until

    def _break(self) -> None:
        ends = list(self.world.network.endpoints)
        late = self.world.plan.late_seconds
        for end in self.rng.sample(ends, min(len(ends), self.rng.randint(1, 6))):
            end.break_off(late)

    # --- targets that are to leave

    def _drain(self) -> None:
        """One target for a while, and no other: blocks have somewhere to go."""
        host = self.world.observer.host
        if self.ordering:
            return  # two at once could leave no other
        self.ordering = True

        def order() -> None:
            with contextlib.suppress(KvfsError):
                targets = [target.target_id for target in host.map().targets]
                chosen = self.rng.choice(targets)
                others = tuple(target for target in targets if target != chosen)
                metadata = host.metadata_client()
                metadata.call(SetDraining(others, False))
                metadata.call(SetDraining((chosen,), True))
                self.hub.trace("drain", chosen)
            self.ordering = False

        host.process.start(order, name="nemesis-drain")

    # --- power

    def _power_chunks(self) -> None:
        host = self.rng.choice(self.world.chunk_hosts)
        if host.host.up:
            self.hub.in_hub(host.power_off)
            self._later(self._some_time(), lambda: self._power_on(host))

    def _power_on(self, host: ChunkHost) -> None:
        if not host.host.up:
            host.power_on()
            self.world.start_chunks(host)

    def _power_metadata(self) -> None:
        host = self.rng.choice(self.world.metadata_hosts)
        if self.world.store.shared:
            return  # the database is somebody else's
        if host.power_cycle():
            self.hub.counts["metadata went back"] += 1
            self.world.metadata_went_back = True
        self._later(self._some_time(), lambda: self._start_metadata(host))

    def _power_all(self) -> None:
        for host in self.world.chunk_hosts:
            if host.host.up:
                self.hub.in_hub(host.power_off)
                self._later(self._some_time(), lambda host=host: self._power_on(host))
        self._power_metadata()

    # --- disks

    def _dead_disk(self) -> None:
        host = self.rng.choice(self.world.chunk_hosts)
        disk = self.rng.choice(list(host.disks.values()))
        disk.failed = True

        def mend() -> None:
            disk.failed = False
            host.kill()
            self.world.start_chunks(host)

        self._later(self._some_time(), mend)

    def _full_disk(self) -> None:
        host = self.rng.choice(self.world.chunk_hosts)
        disk = self.rng.choice(list(host.disks.values()))
        disk.reserved_bytes = disk.capacity_bytes
        self.hub.call_later(self._some_time(), lambda: setattr(disk, "reserved_bytes", 0))

    def _rot(self) -> None:
        if self.world.plan.copies > 1:
            self._rot_at_rest()
            return
        host = self.rng.choice(self.world.chunk_hosts)
        disk = self.rng.choice(list(host.disks.values()))
        if disk.rot(_has_lasting_checksum):
            self.hub.trace("rot", host.name)

    def _rot_at_rest(self) -> None:
        """While the server is down: chunks of files are verified when they are first read after
        that. Always on the same host, so that another one has the right bytes, or on any."""
        hosts = self.world.chunk_hosts
        host = self.rng.choice(hosts) if self.world.plan.ruins else hosts[0]
        if not host.is_running:
            return
        host.kill()
        for disk in host.disks.values():
            for _ in range(self.rng.randint(1, 3)):
                disk.rot(_has_lasting_checksum)
        self._later(self._some_time(), lambda: self.world.start_chunks(host))


def _has_lasting_checksum(node: Node) -> bool:
    """A block, or a file chunk of a chain: others are written in place, and rot is sealed in."""
    attribute = node.attributes.get("kvfs", b"")
    return any(attribute[32:64])
