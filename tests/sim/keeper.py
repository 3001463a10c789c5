"""Whoever looks after the cluster: empties targets, takes them out, and exchanges disks, in the
middle of everything else that goes wrong.

A disk is exchanged (wiped, at once, with its server killed) only while by the record every chain of
its target has another member that serves and whose disk is the old one: then nothing that was
acknowledged may be lost. A target that was drained is removed without force, and its disk wiped:
nothing may need it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvfs_base.cluster import TargetState
from kvfs_base.errors import KvfsError, NoTarget, TargetInUse, TargetUnknown
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    ClusterDetails,
    DescribeCluster,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
)
from sim import leftovers
from sim.cluster import ChunkHost, ClientHost
from sim.disk import SimDisk
from sim.hub import SimThread

if TYPE_CHECKING:
    from sim.world import World

DRAIN_SECONDS = 30.0
"""Then it is given up: other faults kept the copies from coming to be elsewhere."""

_Place = tuple[ChunkHost, SimDisk]


class Keeper:
    """A client that the network may be cut from, and that does one thing at a time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.hub.rng
        self._host = ClientHost(world.site, "keeper")
        self._threads: list[SimThread] = []
        self._busy = False
        self.lost: dict[int, str] = {}
        """Targets whose disks are gone: numbers and uuids."""
        self._draining: dict[int, None] = {}

    def start(self) -> None:
        self._host.start()

    def begin(self, action: Callable[[Keeper], None]) -> None:
        """In a thread of its own, unless there is something at work."""
        if self._busy:
            return
        self._busy = True

        def run() -> None:
            try:
                action(self)
            except KvfsError as exc:
                self._world.hub.trace("keeper", "gives up", type(exc).__name__)
            finally:
                self._busy = False

        self._threads.append(self._host.process.start(run, name="keeper"))

    def _call(self, request: Any) -> Any:
        with contextlib.closing(self._host.metadata_client()) as client:
            return client.call(request)

    def _tell(self, what: str, *words: Any) -> None:
        self._world.hub.counts[f"keeper {what}"] += 1
        self._world.hub.trace("keeper", what, *words)

    def _places(self) -> dict[str, _Place]:
        """By the uuid of the target there."""
        return {
            leftovers.uuid_on(disk): (host, disk)
            for host in self._world.chunk_hosts
            for disk in host.disks.values()
        }

    # --- draining

    def drain(self) -> None:
        details: ClusterDetails = self._call(DescribeCluster())
        found = [
            t
            for t in details.targets
            if t.state is TargetState.SERVING and t.target_id not in self.lost
        ]
        if not found:
            return
        target = self._rng.choice(found)
        self._draining[target.target_id] = None
        self._call(SetDraining((target.target_id,), on=True))
        self._tell("drains", target.target_id)
        end = self._world.hub.now + DRAIN_SECONDS
        while not self._world.enough and self._world.hub.now < end:
            self._world.hub.sleep(0.5 + self._rng.random())
            try:
                self._call(RemoveTarget((target.target_id,)))
            except TargetInUse:
                continue
            self._draining.pop(target.target_id)
            self._tell("removed", target.target_id)
            self._renew(target.uuid)
            return

    def _renew(self, uuid: str) -> None:
        """The place of a removed target is used again: with a new disk, or with the old one."""
        host, disk = self._places()[uuid]
        if self._rng.random() < 0.5:
            self._call(AdmitTarget(uuid))
            return

        def exchange() -> None:
            if host.process is not None:
                self._world.hub.kill_now(host.process)
            disk.wipe()

        self._world.hub.in_hub(exchange)
        self._world.start_chunks(host)

    # --- exchanging

    def wipe(self) -> None:
        """Nothing happens between the look at the record and the end of the disk."""
        struck: list[tuple[int, ChunkHost]] = []
        places = self._places()
        uuid = self._rng.choice(sorted(places))

        def strike() -> None:
            host, disk = places[uuid]
            record = leftovers.targets(self._world.store.state).get(uuid)
            if record is None or not self._may_go(record.target_id):
                return
            if host.process is not None:
                self._world.hub.kill_now(host.process)
            disk.wipe()
            self.lost[record.target_id] = uuid
            struck.append((record.target_id, host))

        self._world.hub.in_hub(strike)
        for target_id, host in struck:
            self._tell("wiped", target_id)
            self._world.hub.sleep(self._rng.expovariate(1 / self._world.plan.outage_seconds))
            self._world.start_chunks(host)
            self._exchange(target_id)

    def _may_go(self, target_id: int) -> bool:
        for _, chain in leftovers.chains_of(self._world.store.state):
            if target_id in chain.everybody and chain.copies > 1:
                others = set(chain.targets) - {target_id} - self.lost.keys()
                if not others or self.lost.keys() & set(chain.everybody):
                    return False
        return True

    def _exchange(self, target_id: int) -> None:
        """As somebody does who looks after it: says who takes its places, or that it is gone, or
        leaves it to the cluster, which finds that the server has another target now."""
        way = self._rng.choice(("replace", "remove", "wait"))
        while way != "wait" and not self._world.enough:
            self._world.hub.sleep(0.5 + self._rng.random())
            try:
                if way == "remove":
                    self._forget(target_id)
                else:
                    self._call(ReplaceTarget(target_id))
                    self._tell("replaces", target_id)
                return
            except (TargetInUse, NoTarget):
                continue  # its lease is not over; the new one is not there yet

    def _forget(self, target_id: int) -> None:
        """A new disk that took the old one's name is the same target, and has lost nothing."""
        if self.lost[target_id] in self._places():
            del self.lost[target_id]
            return
        with contextlib.suppress(TargetUnknown):
            self._call(RemoveTarget((target_id,), force=True))
        self.lost.pop(target_id, None)
        self._tell("forgets", target_id)

    # --- the end

    def tidy(self) -> None:
        """Nothing is draining, and what is gone is not waited for."""
        for thread in self._threads:
            thread.join()
        self._world.wait(self._is_tidy, "the keeper to tidy up", process=self._host.process)

    def _is_tidy(self) -> bool:
        for target_id in list(self._draining):
            with contextlib.suppress(TargetUnknown):  # it was removed, and the answer was lost
                self._call(SetDraining((target_id,), on=False))
            del self._draining[target_id]
        for target_id in list(self.lost):
            self._forget(target_id)
        details: ClusterDetails = self._call(DescribeCluster())
        places = self._places()
        for removed in details.removed:
            if removed.uuid in places:
                self._call(AdmitTarget(removed.uuid))
        return True
