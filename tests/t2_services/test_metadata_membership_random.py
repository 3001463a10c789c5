"""Members of chains at random: what servers believe, against what was acknowledged."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest

from kvfs_base.cluster import (
    Chain,
    ClusterMap,
    GetClusterMap,
    Heartbeat,
    HeartbeatReply,
    Synced,
)
from kvfs_datapath import limits
from kvfs_metadata.cluster.admin_messages import (
    SetDraining,
)
from t2_services.membership_world import BEAT, Disk, set_copies
from t2_services.metadata_rig import ROOT, Rig
from t2_services.test_metadata_shared import Servers


@dataclasses.dataclass
class Server:
    """What a chunk server does, by docs/design/0004-chains.md."""

    disk: Disk
    target_id: int
    rate: float
    """Of its clock."""
    by_map: bool
    """Ends a fence with any newer map, not with an answer that says so."""
    up: bool = True
    cut: bool = False
    lease_at: float = -1e9
    needed: int = 0
    fenced_at: int = 0
    known: ClusterMap | None = None
    data: dict[int, set[int]] = dataclasses.field(default_factory=dict)

    def chain(self, chain_id: int) -> Chain | None:
        chains = self.known.chains if self.known is not None else ()
        return next((c for c in chains if c.chain_id == chain_id), None)

    def may_answer(self, now: float) -> bool:
        fresh = (now - self.lease_at) * self.rate <= limits.FENCE_SECONDS
        known = self.known is not None and self.known.version >= self.needed
        return self.up and fresh and known and not self.disk.fenced and self.disk.healthy

    def serves(self, chain_id: int, now: float) -> bool:
        chain = self.chain(chain_id)
        return chain is not None and self.target_id in chain.targets and self.may_answer(now)

    def take(
        self, sent_at: float, said_fenced: bool, reply: HeartbeatReply, found: ClusterMap | None
    ) -> None:
        (order,) = reply.targets
        if found is not None and found != self.known:
            if self.by_map and found.version > self.fenced_at:
                self.disk.fenced = False
            self.known = found
        if order.fence:
            self.disk.fenced = True
            self.fenced_at = self.known.version if self.known is not None else 0
        elif not self.by_map and said_fenced:
            self.disk.fenced = False
        if not order.fence or self.by_map:
            self.lease_at = sent_at
            self.needed = reply.map_version


class Cluster:
    """Servers that crash, are cut off and come back, on a network that delivers late."""

    def __init__(self, seed: int, servers: int, copies: int, rigs: Sequence[Rig]) -> None:
        self.chance = random.Random(seed)
        self.rigs = rigs
        self.rig = rigs[0]
        self.servers: list[Server] = []
        for number in range(1, servers + 1):
            disk = Disk(f"disk-{number}")
            rate = self.chance.uniform(0.6, 1.6)
            self.servers.append(Server(disk, number, rate, self.chance.random() < 0.5))
            self.rig.call(disk.request())
        directory = self.rig.mkdir(ROOT, b"d")
        set_copies(self.rig, directory, copies)
        self.rig.make(directory, b"f")
        self.late: list[Heartbeat] = []
        self.acknowledged: dict[int, set[int]] = {}
        self.versions: dict[int, int] = {}
        self.next_write = 1
        self.reads = self.writes = 0
        self.frail: Server | None = None

    def any_rig(self) -> Rig:
        return self.chance.choice(self.rigs)

    @property
    def now(self) -> float:
        return self.rig.clock.monotonic()

    def beat(self, server: Server) -> None:
        sent_at, said = self.now, server.disk.fenced
        server.disk.map_version = server.known.version if server.known is not None else 0
        request = server.disk.request(self._suspects(server), self._synced(server))
        how = self.chance.random()
        if self.chance.random() < 0.3:
            self.late.append(request)
        if server.cut or how < 0.1:
            return
        reply = self.any_rig().call(request)
        if how < 0.2:
            return  # the answer is lost
        found = None
        wanted = server.known is None or server.known.version < reply.map_version
        if self.chance.random() < (0.8 if wanted else 0.1):
            found = self.any_rig().call(GetClusterMap())
        server.take(sent_at, said, reply, found)

    def _suspects(self, server: Server) -> list[int]:
        """Those that it cannot pass anything on to."""
        return [
            other
            for chain in (server.known.chains if server.known is not None else ())
            if server.target_id in chain.members
            for other in chain.members[chain.members.index(server.target_id) + 1 :]
            if not self.servers[other - 1].up or self.servers[other - 1].cut
            if self.chance.random() < 0.3
        ]

    def _synced(self, server: Server) -> list[Synced]:
        """It compares with those that know the same members, and copies what is missing."""
        found = []
        for chain in server.known.chains if server.known is not None else ():
            if not chain.is_replicated or not server.serves(chain.chain_id, self.now):
                continue
            if chain.targets[-1] != server.target_id or server.cut:
                continue
            for sink in (self.servers[other - 1] for other in chain.syncing):
                if sink.up and not sink.cut and sink.chain(chain.chain_id) == chain:
                    own = server.data.setdefault(chain.chain_id, set())
                    sink.data[chain.chain_id] = set(own)
                    found.append(Synced(chain.chain_id, chain.version, sink.target_id))
        return found

    def write(self, chain_id: int) -> None:
        """By a client that asks the head; everybody looks whether he knows the same members."""
        for head in self.servers:
            chain = head.chain(chain_id)
            if chain is None or chain.targets[0] != head.target_id:
                continue
            passed = []
            for member in (self.servers[t - 1] for t in chain.members):
                reached = member is head or not (member.cut or head.cut)
                answers = member.may_answer(self.now) or (
                    member.target_id in chain.syncing and member.up and member.disk.healthy
                )
                if not reached or not answers or member.chain(chain_id) != chain:
                    break
                passed.append(member)
            write, self.next_write = self.next_write, self.next_write + 1
            for member in passed:
                member.data.setdefault(chain_id, set()).add(write)
            if len(passed) == len(chain.members):
                self.acknowledged.setdefault(chain_id, set()).add(write)
                self.writes += 1

    def read(self) -> None:
        """Whoever thinks that it may answer has everything that was acknowledged."""
        for server, chain_id in itertools.product(self.servers, self.acknowledged):
            if server.serves(chain_id, self.now):
                missing = self.acknowledged[chain_id] - server.data.get(chain_id, set())
                assert not missing, (server.target_id, chain_id, self.rig.core.cluster.map())
                self.reads += 1

    def check(self) -> None:
        for chain in self.rig.call(GetClusterMap()).chains:
            assert chain.version >= self.versions.get(chain.chain_id, 0)
            self.versions[chain.chain_id] = chain.version
            assert chain.targets

    def step(self) -> None:
        self.rig.clock.advance(self.chance.uniform(0.05, 0.6))
        for server in self.servers:
            if server.up and self.chance.random() < 0.7:
                self.beat(server)
        victim = self.chance.choice(self.servers)
        trouble = self.chance.random()
        if not victim.up or victim.cut:
            if trouble < 0.2:
                self.recover(victim)
        elif self.is_frail():
            pass
        elif trouble < 0.04:
            self.crash(victim)
        elif trouble < 0.08:
            victim.cut = True
        elif trouble < 0.1:
            on = self.chance.random() < 0.3
            self.any_rig().call(SetDraining((victim.target_id,), on))
        if self.late and self.chance.random() < 0.3:
            # The last ones are those that may still be believed.
            place = max(self.chance.randrange(len(self.late)) for _ in range(3))
            self.any_rig().call(self.late.pop(place))
        for chain in self.rig.call(GetClusterMap()).chains:
            if chain.is_replicated and self.chance.random() < 0.2:
                self.write(chain.chain_id)
        for rig in self.rigs:
            if self.chance.random() < 0.7:
                rig.core.catch_up()
                for result in rig.core.update(rig.core.due()):
                    assert not isinstance(result, BaseException), result
        self.read()
        self.check()

    def crash(self, server: Server) -> None:
        """What others have as well may be lost, if they live until it is out of the chain: with the
        ``cache`` durability, data that is not on stable storage bears one crash at a time."""
        server.up = False
        for chain in self.rig.call(GetClusterMap()).chains:
            others = [self.servers[other - 1] for other in chain.targets]
            others = [
                other for other in others if other.up and not other.cut and self.is_known(other)
            ]
            if server.target_id in chain.targets and others and self.chance.random() < 0.5:
                for other in others:
                    self.rig.call(other.disk.request())
                kept = {w for w in server.data.get(chain.chain_id, ()) if w % 3}
                server.data[chain.chain_id] = kept
                self.frail = server

    def is_known(self, server: Server) -> bool:
        """Whether it has not been restarted since it was heard of, and is not about to be fenced
        because somebody could not reach it."""
        for rig in self.rigs:
            rig.core.catch_up()
        record = self.rig.core.cluster.targets[server.target_id].record
        return record.incarnation == server.disk.incarnation and not record.is_to_be_fenced

    def is_frail(self) -> bool:
        """Whether a server that lost something has still to be taken out."""
        if self.frail is not None and not any(
            self.frail.target_id in chain.targets and len(chain.targets) > 1
            for chain in self.rig.call(GetClusterMap()).chains
        ):
            self.frail = None
        return self.frail is not None

    def recover(self, server: Server) -> None:
        if not server.up:
            server.disk.restart()
            server.known, server.needed, server.lease_at = None, 0, -1e9
        server.up, server.cut = True, False

    def heal(self) -> None:
        """Faults stop, and every chain is whole again."""
        for server in self.servers:
            self.recover(server)
            self.rig.call(SetDraining((server.target_id,), False))
        self.late.clear()
        for _ in range(1000):
            self.rig.clock.advance(BEAT)
            for server in self.servers:
                self.beat(server)
            for rig in self.rigs:
                rig.core.catch_up()
                rig.core.update(rig.core.due())
            self.read()
            chains = [c for c in self.rig.call(GetClusterMap()).chains if c.is_replicated]
            if all(len(c.targets) >= c.copies and not c.syncing + c.offline for c in chains):
                return
        raise AssertionError(f"not whole: {chains}")


@pytest.mark.parametrize("seed", range(24))
def test_whoever_answers_has_everything_that_was_acknowledged(seed: int) -> None:
    copies = 2 + seed % 2
    rigs = Servers(2, targets=0).rigs if seed % 3 == 2 else [Rig(targets=0)]
    cluster = Cluster(seed, 3 + seed % 3, copies, rigs)
    for _ in range(250):
        cluster.step()
    cluster.heal()
    assert cluster.reads > 500 and cluster.writes > 100


def test_expiry_is_decided_once_on_a_shared_store() -> None:
    servers = Servers(2, targets=0)
    a, b = servers.rigs
    disks = [Disk("disk-1"), Disk("disk-2")]
    for disk in disks:
        a.call(disk.request())
    directory = a.mkdir(ROOT, b"d")
    set_copies(b, directory, 2)
    b.make(directory, b"f")
    for _ in range(20):
        a.clock.advance(BEAT)
        a.call(disks[0].request())
        for rig in (a, b):
            rig.core.catch_up()
            rig.core.update(rig.core.due())
    chains = [c for c in a.call(GetClusterMap()).chains if c.is_replicated]
    assert chains == [c for c in b.call(GetClusterMap()).chains if c.is_replicated]
    assert all((c.targets, c.offline, c.version) == ((1,), (2,), 2) for c in chains)
