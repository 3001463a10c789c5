"""Targets, chains, leases, and the removals that heartbeats carry."""

from __future__ import annotations

import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import ClusterMap, GetClusterMap, Heartbeat, TargetReport, TargetState
from kvfs_base.types import Address
from kvfs_metadata import messages as m
from kvfs_metadata import records
from t2_services.metadata_rig import ROOT, TERABYTE, Rig, keys


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=0)


def cluster_map(rig: Rig) -> ClusterMap:
    return rig.call(GetClusterMap())


def states(rig: Rig) -> dict[int, TargetState]:
    return {target.target_id: target.state for target in cluster_map(rig).targets}


def test_a_target_registers_with_its_first_heartbeat(rig: Rig) -> None:
    assert cluster_map(rig).targets == () and cluster_map(rig).chains == ()
    unix = Address.unix("/run/chunks")
    tcp = Address.tcp("127.0.0.1", 7000)
    reports = tuple(TargetReport(u, 10, 9, True, 0) for u in ("a", "b"))
    reply = rig.call(Heartbeat("server", "host", unix, tcp, reports))
    assert [(order.uuid, order.target_id) for order in reply.targets] == [("a", 1), ("b", 2)]
    found = cluster_map(rig)
    assert found.version == reply.map_version
    assert [c.targets for c in found.chains] == [(1,), (2,)]
    target = found.targets[1]
    assert (target.target_id, target.server_id, target.host_id) == (2, "server", "host")
    assert (target.unix, target.tcp) == (unix, tcp)
    assert (target.capacity_bytes, target.free_bytes) == (10, 9)
    assert target.state is TargetState.SERVING


def test_identities_survive_a_restart_and_versions_grow(rig: Rig) -> None:
    rig.heartbeat("a")
    rig.heartbeat("b")
    before = cluster_map(rig)
    rig.restart()
    after = cluster_map(rig)
    assert after.version > before.version
    assert after.targets == before.targets and after.chains == before.chains
    assert rig.heartbeat("c").targets[0].target_id == 3
    assert rig.heartbeat("b").targets[0].target_id == 2


def test_a_moved_server_is_told_to_everybody(rig: Rig) -> None:
    rig.heartbeat("a", server="one")
    version = cluster_map(rig).version
    rig.heartbeat("a", server="one")
    assert cluster_map(rig).version == version
    rig.heartbeat("a", server="two")
    assert cluster_map(rig).version > version
    assert [target.server_id for target in cluster_map(rig).targets] == ["two"]


def test_leases(rig: Rig) -> None:
    rig.heartbeat("a")
    rig.heartbeat("b")
    rig.clock.advance(limits.TARGET_LEASE_SECONDS)
    rig.heartbeat("b")
    assert states(rig) == {1: TargetState.SERVING, 2: TargetState.SERVING}
    version = cluster_map(rig).version
    rig.clock.advance(0.01)
    assert states(rig) == {1: TargetState.OFFLINE, 2: TargetState.SERVING}
    assert cluster_map(rig).version > version
    namespace = rig.namespace()
    assert {b.chain for b in rig.prepare(namespace, range(8)).blocks if b} == {2}
    assert {c for n in range(4) for c in layout(rig, b"%d" % n)} == {2}
    rig.heartbeat("a")
    assert states(rig)[1] is TargetState.SERVING
    assert {b.chain for b in rig.prepare(namespace, range(9, 17)).blocks if b} == {1, 2}


def test_a_target_whose_removal_was_taken_back_is_as_late_as_before(rig: Rig) -> None:
    targets = rig.core.cluster.targets
    rig.heartbeat("a")
    rig.heartbeat("b")
    entry = targets.named("a")
    assert entry is not None
    targets.remove(entry)
    rig.clock.advance(limits.TARGET_LEASE_SECONDS)
    rig.heartbeat("b")
    assert states(rig) == {2: TargetState.SERVING}
    targets.add(entry)
    rig.clock.advance(0.01)
    assert states(rig) == {1: TargetState.OFFLINE, 2: TargetState.SERVING}


def layout(rig: Rig, name: bytes) -> tuple[int, ...]:
    found = rig.make(ROOT, name).layout
    assert found is not None
    return found.chains


def test_after_a_restart_targets_have_one_lease_to_be_heard_of(rig: Rig) -> None:
    rig.heartbeat("a")
    rig.clock.advance(100)
    rig.restart()
    assert states(rig) == {1: TargetState.SERVING}
    rig.clock.advance(limits.TARGET_LEASE_SECONDS + 0.01)
    assert states(rig) == {1: TargetState.OFFLINE}


def test_full_and_failed_targets_take_nothing_new(rig: Rig) -> None:
    rig.heartbeat("a", capacity=1000, free=19)
    rig.heartbeat("b", capacity=1000, free=20)
    rig.heartbeat("c", healthy=False)
    assert list(states(rig).values()) == [
        TargetState.FULL,
        TargetState.SERVING,
        TargetState.OFFLINE,
    ]
    assert layout(rig, b"f") == (2,)
    rig.heartbeat("b", capacity=1000, free=0)
    with pytest.raises(e.CacheFull):  # ENOSPC, where no target at all would be EIO
        layout(rig, b"g")
    statistics = rig.statistics()
    assert statistics["targets"] == 3 and statistics["targets_full"] == 2
    assert statistics["targets_offline"] == 1 and statistics["targets_serving"] == 0


@pytest.mark.parametrize("uuid", ["", "x" * 129, "\N{SNOWMAN}" * 60])
def test_uuids_are_bounded(rig: Rig, uuid: str) -> None:
    with pytest.raises(e.InvalidRequest):
        rig.heartbeat(uuid)
    assert rig.dump(records.TARGET) == {}


def test_a_failed_registration_can_be_repeated(rig: Rig) -> None:
    def fail(writes: dict[bytes, bytes | None]) -> None:
        raise e.DiskFull(path="x")

    rig.engine.before_commit = fail
    with pytest.raises(e.DiskFull):
        rig.heartbeat("a")
    assert cluster_map(rig).targets == () and cluster_map(rig).chains == ()
    rig.engine.before_commit = lambda writes: None
    rig.heartbeat("a")
    assert len(cluster_map(rig).chains) == 1 and len(rig.dump(records.TARGET)) == 1


# --- removals


def test_removals_are_repeated_until_they_are_done(rig: Rig) -> None:
    rig.heartbeat("target-1")
    namespace = rig.namespace()
    inodes = [b.inode for b in rig.put(namespace, [1, 2, 3]).blocks if b]
    rig.call(m.RemoveBlocks(namespace, keys([1, 2])))
    expected = [(1, inodes[0]), (2, inodes[1])]
    assert rig.removals() == expected == rig.removals()
    rig.restart()
    assert rig.removals() == expected
    assert rig.statistics()["removals_pending"] == 2
    assert rig.removals(removed_seq=1) == expected[1:]
    assert rig.removals(removed_seq=2) == []
    assert rig.dump(records.REMOVAL) == {}
    rig.restart()
    rig.call(m.RemoveBlocks(namespace, keys([3])))
    assert rig.removals(removed_seq=2) == [(3, inodes[2])], "numbers go on after a restart"


def test_each_target_has_its_own_queue(rig: Rig) -> None:
    for uuid in ("target-1", "target-2"):
        rig.heartbeat(uuid)
    namespace = rig.namespace()
    chains = {b.inode: b.chain for b in rig.put(namespace, range(6)).blocks if b}
    rig.call(m.RemoveBlocks(namespace, keys(range(6))))
    for number in (1, 2):
        found = rig.removals(f"target-{number}")
        assert [seq for seq, _ in found] == [1, 2, 3]
        assert {inode for _, inode in found} == {i for i, c in chains.items() if c == number}


def test_a_heartbeat_carries_a_bounded_list(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.removals.REMOVALS_PER_HEARTBEAT", 3)
    rig.heartbeat("target-1")
    namespace = rig.namespace()
    rig.put(namespace, range(8))
    rig.call(m.RemoveBlocks(namespace, keys(range(8))))
    assert [seq for seq, _ in rig.removals()] == [1, 2, 3]
    assert [seq for seq, _ in rig.removals(removed_seq=3)] == [4, 5, 6]
    assert [seq for seq, _ in rig.removals(removed_seq=6)] == [7, 8]


def test_a_files_chunks_are_removed_where_they_may_be(rig: Rig) -> None:
    for number in range(1, 4):
        rig.heartbeat(f"target-{number}")
    file = rig.make(ROOT, b"f").inode
    chunk = limits.FILE_CHUNK_BYTES
    rig.call(m.SetAttr(file, size=10 * chunk + 1))
    rig.call(m.SetAttr(file, size=1))
    rig.call(m.Unlink(ROOT, b"f"))
    for number in range(1, 4):
        orders = rig.heartbeat(f"target-{number}").targets[0].removals
        assert [(r.inode, r.first) for r in orders] == [(file, 0)]
        # The largest size it ever had, and what a writer who died had not told.
        assert orders[0].end >= 11 + limits.MOUNT_UNPUSHED_BYTES // chunk
        assert orders[0].end < 100


def test_a_chain_of_a_lost_target_still_gets_its_removals(rig: Rig) -> None:
    rig.heartbeat("target-1", capacity=TERABYTE)
    namespace = rig.namespace()
    inode = next(b.inode for b in rig.put(namespace, [1]).blocks if b)
    rig.clock.advance(1000)
    rig.call(m.RemoveBlocks(namespace, keys([1])))
    assert rig.removals() == [(1, inode)]


def test_targets_on_one_file_system_hold_what_it_holds_once(rig: Rig) -> None:
    for uuid in ("a", "b", "c"):
        rig.heartbeat(uuid, capacity=1000, free=400, volume="dev1")
    stats = rig.call(m.StatFs())
    assert (stats.capacity_bytes, stats.used_bytes) == (400, 0)
    rig.heartbeat("d", capacity=1000, free=1000, volume="dev2")
    rig.heartbeat("e", capacity=100, free=100)  # a share of its own
    assert rig.call(m.StatFs()).capacity_bytes == 400 + 1000 + 100
    assert rig.call(m.Statistics())["capacity_bytes"] == int(0.9 * 2100)
