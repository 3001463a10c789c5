"""Members of chains, as a service decides about them: heartbeats, leases, fences, replacements."""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import (
    Chain,
    ClusterMap,
    FindUnwanted,
    GetClusterMap,
    Heartbeat,
    HeartbeatReply,
    Synced,
    TargetReport,
)
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.cluster.admin_messages import (
    DescribeCluster,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
)
from t2_services.metadata_rig import ROOT, TERABYTE, Rig, keys
from t2_services.test_metadata_shared import Servers

LEASE = limits.TARGET_LEASE_SECONDS
BEAT = limits.HEARTBEAT_SECONDS


class Disk:
    """A chunk server with one target, as far as the metadata service knows it."""

    def __init__(self, name: str, *, host: str = "", rack: str = "") -> None:
        self.name = name
        self.host = host or f"host of {name}"
        self.rack = rack
        self.incarnation = zlib.crc32(name.encode()) % 1000 + 1
        self.number = 0
        self.map_version = 0
        self.fenced = False
        self.healthy = True
        self.removed_seq = 0
        self.silent = False
        self.disks = [name]

    def request(self, suspects: Sequence[int] = (), synced: Sequence[Synced] = ()) -> Heartbeat:
        self.number += 1
        reports = tuple(
            TargetReport(
                uuid,
                TERABYTE,
                TERABYTE,
                self.healthy,
                self.removed_seq,
                incarnation=self.incarnation,
                fenced=self.fenced,
            )
            for uuid in self.disks
        )
        return Heartbeat(
            self.name,
            self.host,
            None,
            None,
            reports,
            tuple(suspects),
            tuple(synced),
            self.host,
            self.rack,
            self.number,
            self.map_version,
        )

    def restart(self) -> None:
        self.incarnation += 1000
        self.number = self.map_version = 0
        self.fenced = False


class World:
    """Disks 1, 2, ... of one server each, and a directory of two copies."""

    def __init__(self, disks: int = 3, copies: int = 2, **options: Any) -> None:
        self.rig = Rig(targets=0, **options)
        self.disks: list[Disk] = []
        for number in range(1, disks + 1):
            self.add(Disk(f"disk-{number}"))
        self.directory = self.rig.mkdir(ROOT, b"d")
        set_copies(self.rig, self.directory, copies)

    def add(self, disk: Disk) -> Disk:
        self.disks.append(disk)
        self.beat(disk)
        return disk

    def beat(self, disk: Disk, **news: Any) -> HeartbeatReply:
        """The disk asks for the map that the answer names."""
        reply: HeartbeatReply = self.rig.call(disk.request(**news))
        disk.map_version = reply.map_version
        return reply

    def restart(self, disk: Disk) -> None:
        """A new process, until it is known to be one."""
        disk.restart()
        assert all(order.fence for order in self.beat(disk).targets)
        disk.fenced = True
        assert not any(order.fence for order in self.beat(disk).targets)
        disk.fenced = False

    def live(self, seconds: float) -> None:
        """Disks that are not silent say so; what is due is done."""
        while seconds > 0:
            self.rig.clock.advance(BEAT)
            seconds -= BEAT
            for disk in self.disks:
                if not disk.silent:
                    reply = self.beat(disk)
                    disk.fenced = any(order.fence for order in reply.targets)
            self.rig.work()

    def file(self, name: bytes = b"f") -> int:
        return self.rig.make(self.directory, name).inode

    def map(self) -> ClusterMap:
        found: ClusterMap = self.rig.call(GetClusterMap())
        return found

    def chains(self) -> dict[int, Chain]:
        return {c.chain_id: c for c in self.map().chains if c.is_replicated}

    def of(self, target_id: int) -> list[Chain]:
        return [c for c in self.chains().values() if target_id in c.targets + c.syncing + c.offline]

    def sync_all(self) -> None:
        """Sources say that everybody is in step, until it is so."""
        for _ in range(10):
            for disk, target_id in zip(self.disks, itertools.count(1), strict=False):
                reports = [
                    Synced(c.chain_id, c.version, other)
                    for c in self.chains().values()
                    if c.targets[-1] == target_id
                    for other in c.syncing
                ]
                if reports:
                    self.beat(disk, synced=reports)
        assert not any(c.syncing for c in self.chains().values())


def set_copies(rig: Rig, directory: int, copies: int) -> None:
    rig.call(m.SetXattr(directory, b"user.kvfs.copies", b"%d" % copies))


@pytest.fixture
def world() -> World:
    found = World()
    found.file()
    return found


# --- leases


def test_chains_are_made_when_somebody_needs_them() -> None:
    world = World()
    assert world.chains() == {}
    layout = world.rig.attr(world.file()).layout
    assert layout is not None and layout.chunk_bytes == limits.CHAIN_CHUNK_BYTES
    assert set(layout.chains) <= set(world.chains())
    assert all(len(set(c.targets)) == 2 and c.copies == 2 for c in world.chains().values())
    assert {c.version for c in world.chains().values()} == {1}


def test_a_silent_member_is_offline_and_comes_back_last(world: World) -> None:
    before = world.chains()
    world.disks[0].silent = True
    world.live(LEASE - BEAT)
    assert world.chains() == before, "not before its lease is over"
    world.live(3 * BEAT)
    for chain in world.of(1):
        assert (chain.offline, chain.syncing, len(chain.targets)) == ((1,), (), 1)
        assert chain.version > before[chain.chain_id].version
    assert [c for c in before.values() if 1 not in c.targets] == [
        c for c in world.chains().values() if 1 not in c.offline
    ]
    world.disks[0].silent = False
    world.live(BEAT)
    assert all((c.syncing, c.offline) == ((1,), ()) for c in world.of(1))
    world.sync_all()
    assert all(c.targets[-1] == 1 and len(c.targets) == 2 for c in world.of(1))
    assert world.rig.statistics()["chains_short"] == 0


def test_the_last_one_stays_whatever_happens(world: World) -> None:
    for disk in world.disks:
        disk.silent = True
    world.live(3 * LEASE)
    assert all(len(c.targets) == 1 and len(c.offline) == 1 for c in world.chains().values())
    assert world.rig.statistics()["chains_unavailable"] == 3 + len(world.chains())
    last = {c.chain_id: c.targets for c in world.chains().values()}
    for disk in world.disks:
        disk.silent = False
        disk.restart()
    world.live(2 * BEAT)
    assert {c.chain_id: c.targets for c in world.chains().values()} == last
    assert all(len(c.syncing) == 1 for c in world.chains().values())


def test_of_two_that_are_silent_the_one_that_was_heard_of_last_stays(world: World) -> None:
    for disk in world.disks[:2]:
        disk.silent = True
    world.live(1.0)
    world.beat(world.disks[0])
    world.live(2 * LEASE)
    both = [c for c in world.of(1) if 2 in c.targets + c.offline]
    assert both and all((c.targets, c.offline) == ((1,), (2,)) for c in both)


def test_a_restarted_server_serves_nothing_before_it_is_in_step(world: World) -> None:
    world.restart(world.disks[1])
    assert all(c.syncing == (2,) and 2 not in c.targets for c in world.of(2))
    version = {c.chain_id: c.version for c in world.of(2)}
    world.live(1.0)
    assert {c.chain_id: c.version for c in world.of(2)} == version


def test_the_first_one_that_is_heard_of_after_two_crashes_does_not_serve(world: World) -> None:
    shared = [c.chain_id for c in world.of(1) if 2 in c.targets]
    world.restart(world.disks[0])
    assert {world.chains()[c].targets for c in shared} == {(2,)}
    world.restart(world.disks[1])
    assert {world.chains()[c].targets for c in shared} == {(2,)}
    assert {world.chains()[c].syncing for c in shared} == {(1,)}


def test_a_disk_that_failed_is_out_at_once_and_not_brought_back(world: World) -> None:
    world.disks[2].healthy = False
    world.beat(world.disks[2])
    world.live(2.0)
    assert all(c.offline == (3,) and not c.syncing for c in world.of(3))


def test_old_news_change_nothing(world: World) -> None:
    """What a connection that was given up, or a dead process, has sent may come minutes later."""
    disk = world.disks[0]
    lost = [disk.request()]
    disk.restart()
    lost += [disk.request(), disk.request()]  # of a process that nobody has heard of before
    world.restart(disk)
    world.sync_all()
    before = world.chains()
    for request in lost:
        old_process = world.rig.call(request)
        assert old_process.targets[0].fence, "nobody is to live by this answer"
        assert not world.beat(disk).targets[0].fence
    disk.fenced = True
    late = disk.request()
    disk.fenced = False
    world.beat(disk)
    world.beat(world.disks[1], suspects=[1])
    world.beat(world.disks[2], suspects=[1])
    world.rig.call(late)
    assert world.chains() == before, "it says fenced, and knows of no fence"
    disk.fenced = True
    world.beat(disk)
    world.beat(disk)
    assert world.chains() != before


def test_a_heartbeat_may_be_repeated(world: World) -> None:
    request = world.disks[0].request()
    for _ in range(2):
        assert not world.rig.call(request).targets[0].fence


def test_whoever_is_in_step_must_be_so_now(world: World) -> None:
    world.restart(world.disks[0])
    chain = world.of(1)[0]
    source, other = chain.targets[0], 5 - chain.targets[0]
    good = Synced(chain.chain_id, chain.version, 1)
    for wrong in (
        Synced(chain.chain_id, chain.version - 1, 1),
        Synced(chain.chain_id, chain.version, other),
        Synced(999, 1, 1),
    ):
        world.beat(world.disks[source - 1], synced=[wrong])
    world.beat(world.disks[other - 1], synced=[good])
    world.beat(world.disks[0], synced=[good])
    assert world.chains()[chain.chain_id] == chain
    world.beat(world.disks[source - 1], synced=[good])
    assert world.chains()[chain.chain_id].targets == (source, 1)


def test_after_a_restart_of_the_service_everybody_has_a_whole_lease(world: World) -> None:
    before = world.chains()
    world.rig.clock.advance(100)
    world.rig.restart()
    world.rig.work()
    assert world.chains() == before
    world.rig.work(LEASE - 0.01)
    assert world.chains() == before
    world.rig.work(0.02)
    assert all(len(c.targets) == 1 for c in world.chains().values())


def test_a_service_that_stood_still_cannot_tell_who_was_silent(world: World) -> None:
    before = world.chains()
    world.rig.clock.advance(60)
    world.rig.core.stood_still(60)
    world.rig.work()
    assert world.chains() == before


def test_members_are_on_stable_storage_before_anybody_hears_of_them(world: World) -> None:
    """With the ``cache`` durability, too: a store that forgot them could let two serve."""
    synced: list[dict[int, Chain]] = []
    engine = world.rig.engine
    engine.sync = lambda: synced.append(world.chains())  # type: ignore[method-assign]
    world.rig.make(ROOT, b"f")
    world.live(2.0)
    assert synced == [], "only for that"
    world.restart(world.disks[0])
    assert synced and synced[-1] == world.chains()
    count = len(synced)
    world.disks[1].silent = True
    world.live(2 * LEASE)
    assert len(synced) > count and synced[-1] == world.chains()


def test_a_change_that_may_be_lost_again_is_told_to_nobody(world: World) -> None:
    def fail() -> None:
        raise e.DiskFull(path="store")

    world.rig.engine.sync = fail  # type: ignore[method-assign]
    disk = world.disks[0]
    disk.healthy = False
    with pytest.raises(e.DiskFull):
        world.beat(disk)


# --- fences


def test_a_suspect_stops_before_it_is_taken_out(world: World) -> None:
    shared = next(c for c in world.of(1) if c.targets[0] == 1)
    suspect = shared.targets[1]
    before = world.chains()
    world.beat(world.disks[0], suspects=[suspect])
    assert world.chains() == before
    disk = world.disks[suspect - 1]
    assert world.beat(disk).targets[0].fence
    assert world.chains() == before
    disk.fenced = True
    assert not world.beat(disk).targets[0].fence
    assert all(c.offline == (suspect,) for c in world.of(suspect))
    disk.fenced = False
    world.live(limits.REJOIN_SECONDS - 2 * BEAT)
    assert all(c.offline == (suspect,) for c in world.of(suspect))
    world.live(3 * BEAT)
    assert all(c.syncing == (suspect,) for c in world.of(suspect))


def test_a_suspect_that_does_not_answer_loses_its_lease(world: World) -> None:
    shared = next(c for c in world.of(1) if c.targets[0] == 1)
    suspect = shared.targets[1]
    world.beat(world.disks[0], suspects=[suspect])
    for _ in range(int(LEASE / BEAT) + 2):
        world.rig.clock.advance(BEAT)
        for disk in world.disks:
            world.beat(disk)  # it hears of the fence and does not say that it obeys
        world.rig.work()
    assert all(suspect in c.offline for c in world.of(suspect))


@pytest.mark.parametrize("again", [1, 2])
def test_a_suspect_that_was_away_need_not_wait_when_it_is_back(world: World, again: int) -> None:
    """Whoever passes writes on notices a death before the lease is over."""
    for _ in range(again):
        shared = next(c for c in world.of(1) if c.targets[0] == 1)
        suspect = shared.targets[1]
        disk = world.disks[suspect - 1]
        disk.silent = True
        world.live(2.0)
        world.beat(world.disks[0], suspects=[suspect])
        world.live(LEASE + BEAT)
        assert all(suspect in c.offline for c in world.of(suspect))
        disk.silent = False
        world.restart(disk)
        world.live(2 * BEAT)
        assert all(suspect in c.syncing for c in world.of(suspect))
        for chain in world.of(suspect):
            synced = Synced(chain.chain_id, chain.version, suspect)
            world.beat(world.disks[chain.targets[-1] - 1], synced=[synced])
        assert all(suspect in c.targets for c in world.of(suspect))


def test_a_suspect_that_is_another_process_need_not_wait(world: World) -> None:
    shared = next(c for c in world.of(1) if c.targets[0] == 1)
    suspect = shared.targets[1]
    world.beat(world.disks[0], suspects=[suspect])
    world.restart(world.disks[suspect - 1])
    world.live(2 * BEAT)
    assert all(suspect in c.syncing for c in world.of(suspect))


def test_only_whoever_passes_something_on_can_suspect(world: World) -> None:
    shared = next(c for c in world.of(1) if c.targets[0] == 1)
    tail = shared.targets[1]
    only = [c for c in world.of(tail) if c.targets[0] == tail and c.targets[1] == 1]
    world.beat(world.disks[1], suspects=[2, 99])
    if not only:
        world.beat(world.disks[tail - 1], suspects=[1])
    assert not any(e_.record.suspected for e_ in world.rig.core.cluster.targets if e_.target_id > 1)


def test_a_sink_that_cannot_be_reached_is_out_for_longer_each_time(world: World) -> None:
    disk = world.disks[0]
    world.restart(disk)
    pauses = []
    for _ in range(3):
        chain = world.of(1)[0]
        assert chain.syncing == (1,)
        world.beat(world.disks[chain.targets[0] - 1], suspects=[1])
        assert world.chains()[chain.chain_id].offline == (1,)
        pause = 0.0
        while world.chains()[chain.chain_id].offline:
            world.live(BEAT)
            pause += BEAT
        pauses.append(pause)
    for pause, expected in zip(pauses, (5.0, 10.0, 20.0), strict=True):
        assert expected - BEAT <= pause <= expected + 3 * BEAT


# --- replacements


def test_who_is_away_for_long_is_replaced() -> None:
    world = World(disks=4)
    world.file()
    world.disks[3].silent = True
    world.live(limits.REPLACE_SECONDS - 1)
    waiting = world.of(4)
    assert waiting and all(c.offline == (4,) for c in waiting)
    world.live(LEASE + 2)
    assert world.of(4) == []
    for chain in waiting:
        now = world.chains()[chain.chain_id]
        assert now.targets == chain.targets and len(now.syncing) == 1
    world.sync_all()
    assert world.rig.statistics()["chains_short"] == 0


def test_there_may_be_no_place_for_another_copy() -> None:
    world = World(disks=2)
    world.file()
    world.disks[1].silent = True
    world.live(limits.REPLACE_SECONDS + 2 * LEASE)
    assert all(c.offline == (2,) for c in world.chains().values())
    assert world.rig.statistics()["chains_short"] == len(world.chains())
    world.disks[1].silent = False
    world.live(2 * BEAT)
    world.sync_all()
    assert all(set(c.targets) == {1, 2} for c in world.chains().values())


def test_a_new_disk_of_the_same_server_takes_the_places_of_the_lost_one(world: World) -> None:
    places = world.of(1)
    disk = world.disks[0]
    disk.disks = ["new disk"]
    disk.restart()
    world.live(LEASE + 2)
    assert world.of(1) == []
    assert {c.chain_id for c in world.of(4)} == {c.chain_id for c in places}
    assert all(c.syncing == (4,) for c in world.of(4))


def test_a_disk_that_comes_back_in_time_keeps_its_places(world: World) -> None:
    disk = world.disks[0]
    disk.disks = ["new disk"]
    world.live(2.0)
    disk.disks = ["disk-1", "new disk"]
    world.live(2 * LEASE)
    assert world.of(4) == [] and len(world.of(1)) > 0


def test_one_command_gives_the_places_of_a_lost_disk_to_another(world: World) -> None:
    with pytest.raises(e.TargetInUse):
        world.rig.call(ReplaceTarget(1))
    world.disks[0].silent = True
    world.live(2 * LEASE)
    places = {c.chain_id for c in world.of(1)}
    assert all(c.offline == (1,) for c in world.of(1))
    new = world.add(Disk("another", host="host of disk-1"))
    assert world.rig.call(ReplaceTarget(1)) == 4
    assert world.of(1) == []
    assert {c.chain_id for c in world.of(4)} == places
    world.live(2.0)
    world.sync_all()
    assert world.rig.statistics()["chains_short"] == 0
    with pytest.raises(e.TargetUnknown):
        world.rig.call(ReplaceTarget(99))
    with pytest.raises(e.InvalidRequest):
        world.rig.call(ReplaceTarget(1, 1))
    assert new.number > 0


def test_a_draining_disk_hands_its_places_to_the_one_that_is_named() -> None:
    world = World(disks=5)
    world.file()
    places = {c.chain_id for c in world.of(1) if 5 not in c.targets}
    world.rig.call(SetDraining((1,), True))
    assert world.rig.call(ReplaceTarget(1, 5)) == 5
    world.live(2.0)
    assert {c.chain_id for c in world.of(1) if c.syncing == (5,)} >= places


def test_drain_brings_everything_to_others_first() -> None:
    world = World(disks=4)
    world.file()
    places = {c.chain_id: c for c in world.of(1)}
    world.rig.call(SetDraining((1,), True))
    world.live(2.0)
    for chain in world.of(1):
        assert chain.targets == places[chain.chain_id].targets and len(chain.syncing) == 1
    with pytest.raises(e.TargetInUse) as caught:
        world.rig.call(RemoveTarget((1,)))
    assert "several copies" in caught.value.detail
    layout = world.rig.attr(world.file(b"g")).layout
    assert layout is not None
    assert not set(layout.chains) & set(places), "chains that are not whole without it wait"
    world.sync_all()
    assert all(1 in c.targets and len(c.targets) == 3 for c in world.of(1))
    world.live(3 * BEAT)
    assert world.of(1) == []
    assert all(len(world.chains()[c].targets) == 2 for c in places)
    world.rig.core.update([world.rig.core.drain] * 9)
    world.rig.call(RemoveTarget((1,)))


def test_a_drain_that_is_given_up_leaves_the_target_where_it_is() -> None:
    world = World(disks=4)
    world.file()
    world.rig.call(SetDraining((1,), True))
    world.live(1.0)
    world.rig.call(SetDraining((1,), False))
    world.sync_all()
    world.live(3.0)
    assert all(1 in c.targets for c in world.of(1)) and world.of(1)


def test_force_makes_somebody_serve_who_may_have_missed_something(world: World) -> None:
    with pytest.raises(e.TargetInUse) as caught:
        world.rig.call(RemoveTarget((1,), force=True))
    assert "serves" in caught.value.detail
    world.disks[1].silent = True
    world.live(2 * LEASE)
    world.disks[0].silent = True
    world.live(2 * LEASE)
    lost = [c.chain_id for c in world.of(2) if c.targets == (1,)]
    assert lost
    world.rig.call(RemoveTarget((1,), force=True))
    assert all(world.chains()[c].targets == (2,) for c in lost)
    assert world.of(1) == []


# --- blocks


def test_a_commit_names_the_versions_that_its_blocks_were_written_under(world: World) -> None:
    namespace = world.rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=2)).inode
    batch = world.rig.prepare(namespace, range(4))
    used = {b.chain for b in batch.blocks if b}
    versions = tuple((c, world.chains()[c].version) for c in used)
    for wrong in ((), tuple((c, v + 1) for c, v in versions)):
        with pytest.raises(e.StaleChain) as caught:
            world.rig.call(m.CommitBlocks(batch.batch_id, (0, 1, 2, 3), wrong))
        assert (caught.value.chain, caught.value.version) in versions
    member = world.chains()[next(iter(used))].targets[0]
    world.restart(world.disks[member - 1])
    with pytest.raises(e.StaleChain):
        world.rig.call(m.CommitBlocks(batch.batch_id, (0, 1, 2, 3), versions))
    assert world.rig.match(namespace, range(4)) == 0
    versions = tuple((c, world.chains()[c].version) for c in used)
    world.rig.call(m.CommitBlocks(batch.batch_id, (0, 1, 2, 3), versions))
    assert world.rig.match(namespace, range(4)) == 4
    world.rig.call(m.CommitBlocks(batch.batch_id, (0, 1, 2, 3), ()))  # it is remembered


def test_removals_go_to_everybody_and_name_the_chain(world: World) -> None:
    namespace = world.rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=2)).inode
    batch = world.rig.prepare(namespace, [1])
    (block,) = [b for b in batch.blocks if b]
    chain = world.chains()[block.chain]
    world.rig.call(m.CommitBlocks(batch.batch_id, (0,), ((block.chain, chain.version),)))
    away = chain.targets[0]
    world.disks[away - 1].silent = True
    world.live(2 * LEASE)
    world.rig.call(m.RemoveBlocks(namespace, keys([1])))
    for target_id in chain.targets:
        (removal,) = world.beat(world.disks[target_id - 1]).targets[0].removals
        assert (removal.inode, removal.chain) == (block.inode, block.chain)


LAYOUT = records.KVLayout(block_tokens=16, model="test")


def find(world: World, target_id: int, chain: int, *inodes: int) -> tuple[int, ...]:
    found: tuple[int, ...] = world.rig.call(FindUnwanted(target_id, chain, inodes))
    return found


def test_chunks_that_nothing_refers_to_are_told_from_those_that_are_wanted(world: World) -> None:
    namespace = world.rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=2)).inode
    batch = world.rig.prepare(namespace, range(2))
    (first, second) = (b for b in batch.blocks if b)
    chain = world.chains()[first.chain]
    member, stranger = chain.targets[0], 6 - sum(chain.targets)
    assert find(world, member, first.chain, first.inode, second.inode) == (), "it may be committed"
    versions = {(b.chain, world.chains()[b.chain].version) for b in batch.blocks if b}
    world.rig.call(m.CommitBlocks(batch.batch_id, (0, 1), tuple(versions)))
    assert find(world, member, first.chain, first.inode, second.inode) == ()
    assert find(world, stranger, first.chain, first.inode) == (0,), "it is no member"
    other = next(
        c for c in world.chains() if c != first.chain and member in world.chains()[c].targets
    )
    assert find(world, member, other, first.inode) == (0,), "the block is on another chain"
    world.rig.call(m.RemoveBlocks(namespace, keys([0])))
    assert find(world, member, first.chain, first.inode, second.inode) == (0,)
    file = world.file(b"g")
    assert find(world, member, first.chain, file) == ()
    world.rig.call(m.Unlink(world.directory, b"g"))
    assert find(world, member, first.chain, file, 10**12) == (0,), "it will be given out one day"
    assert find(world, member, 10**6, file) == (), "so will the chain"
    with pytest.raises(e.TargetUnknown):
        find(world, 77, 0, file)


def test_chunks_of_one_copy_are_looked_for_as_well() -> None:
    world = World(disks=2)
    file = world.rig.make(ROOT, b"one copy").inode
    assert find(world, 1, 0, file) == find(world, 2, 0, file) == ()
    several = world.file()
    assert find(world, 1, 0, several) == (0,)
    world.rig.call(m.Unlink(ROOT, b"one copy"))
    assert find(world, 1, 0, file) == (0,)


def test_the_cluster_is_described_with_members_and_spread(world: World) -> None:
    details = world.rig.call(DescribeCluster())
    assert {c.chain_id for c in details.chains if c.copies == 2} == set(world.chains())
    (spread,) = details.spreads
    assert (spread.copies, spread.chains) == (2, len(world.chains()))
    assert spread.pairs == spread.rebuild == 1.0
    assert {t.host for t in details.targets} == {f"host of disk-{n}" for n in (1, 2, 3)}


# --- everything at once: what servers believe, against what was acknowledged


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
