"""Members of chains, as a service decides about them: heartbeats, leases, fences, replacements."""

from __future__ import annotations

import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import (
    Chain,
    FindUnwanted,
    Synced,
)
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.cluster.admin_messages import (
    DescribeCluster,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
)
from t2_services.membership_world import BEAT, LEASE, Disk, World
from t2_services.metadata_rig import ROOT, keys


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


def test_a_restart_of_the_only_one_that_serves_is_another_version(world: World) -> None:
    """What those that it was bringing in step know of it is old."""
    world.disks[1].silent = True
    world.live(2 * LEASE)
    world.disks[1].silent = False
    world.live(BEAT)
    before = [c for c in world.of(2) if c.targets == (1,)]
    assert before and all(c.syncing == (2,) for c in before)
    world.restart(world.disks[0])
    for chain in before:
        after = world.chains()[chain.chain_id]
        assert (after.targets, after.syncing) == (chain.targets, chain.syncing)
        assert after.version == chain.version + 1
        world.beat(world.disks[0], synced=[Synced(chain.chain_id, chain.version, 2)])
        assert world.chains()[chain.chain_id] == after


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
    world.live(metadata_limits.REJOIN_SECONDS - 2 * BEAT)
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
    world.live(metadata_limits.REPLACE_SECONDS - 1)
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
    world.live(metadata_limits.REPLACE_SECONDS + 2 * LEASE)
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
