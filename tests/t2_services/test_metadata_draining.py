"""Targets that leave the cluster: draining, removal, and what they leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import EndMoves, GetClusterMap, TakeMoves, TargetState
from kvfs_base.types import Layout
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    ClusterDetails,
    CountChunks,
    DescribeCluster,
    RemoveTarget,
    SetDraining,
    TargetDetails,
)
from kvfs_metadata.cluster.administration import chunks_by_chain
from kvfs_metadata.engines.memory_engine import MemoryStore
from t2_services.metadata_rig import FILE, ROOT, Rig, keys
from t2_services.test_metadata_shared import Servers

CHUNK = limits.FILE_CHUNK_BYTES
UUIDS = ("target-1", "target-2", "target-3")


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=3)


def drain(rig: Rig, *targets: int, keep_blocks: bool = False) -> None:
    rig.call(SetDraining(targets, True, keep_blocks))
    work(rig)
    for target_id in targets:
        move_blocks(rig, target_id)
    work(rig)


def move_blocks(rig: Rig, target_id: int) -> None:
    """As the target's server does."""
    moved: tuple[int, ...] | None = None
    while moved != ():
        taken = rig.call(TakeMoves(target_id))
        blocks = tuple(move.inode for move in taken.moves if move.is_block)
        moved = rig.call(EndMoves(target_id, taken.ticket, blocks))


def work(rig: Rig) -> int:
    """One pass of the background's; how many transactions it took."""
    for count in range(1, 1000):
        if not rig.core.update([rig.core.drain])[0]:
            return count
    raise AssertionError("a pass without an end")


def details(rig: Rig) -> ClusterDetails:
    return rig.call(DescribeCluster())


def target(rig: Rig, target_id: int) -> TargetDetails:
    return next(t for t in details(rig).targets if t.target_id == target_id)


def count(rig: Rig, *, files: bool) -> dict[int, tuple[int, int, int]]:
    """(blocks or files, chunks, bytes) by chain."""
    found: dict[int, tuple[int, int, int]] = {}
    start = -1
    while start:
        page = rig.call(CountChunks(files, max(0, start)))
        for c in page.chains:
            before = found.get(c.chain, (0, 0, 0))
            found[c.chain] = before[0] + c.count, before[1] + c.chunks, before[2] + c.bytes
        start = page.next
    return found


def make_file(rig: Rig, name: bytes, chunks: int) -> tuple[int, tuple[int, ...]]:
    attr = rig.make(ROOT, name)
    rig.call(m.SetAttr(attr.inode, size=chunks * CHUNK))
    assert attr.layout is not None
    return attr.inode, attr.layout.chains


def chains(rig: Rig, inode: int) -> tuple[int, ...]:
    layout = rig.attr(inode).layout
    assert layout is not None
    return layout.chains


def acknowledge(rig: Rig, uuid: str) -> None:
    """The target does what it is asked to."""
    while orders := rig.removals(uuid):
        rig.removals(uuid, removed_seq=orders[-1][0])


# --- draining


def test_nothing_new_is_placed_on_a_draining_target(rig: Rig) -> None:
    rig.call(SetDraining((2,), True))
    namespace = rig.namespace()
    assert {b.chain for b in rig.prepare(namespace, range(9)).blocks if b} == {1, 3}
    assert set(make_file(rig, b"f", 1)[1]) == {1, 3}
    for uuid in UUIDS:
        rig.heartbeat(uuid)
    states = {t.target_id: t.state for t in rig.call(GetClusterMap()).targets}
    assert states == {1: "serving", 2: TargetState.DRAINING, 3: "serving"}
    assert rig.statistics()["targets_draining"] == 1
    rig.call(SetDraining((2,), False))
    assert {b.chain for b in rig.prepare(namespace, range(20, 29)).blocks if b} == {1, 2, 3}


def test_a_restart_keeps_draining_and_offline_shows(rig: Rig) -> None:
    rig.call(SetDraining((2,), True, keep_blocks=True))
    rig.restart()
    assert target(rig, 2).state is TargetState.DRAINING
    assert target(rig, 2).keep_blocks
    rig.clock.advance(limits.TARGET_LEASE_SECONDS + 1)
    assert target(rig, 2).state is TargetState.OFFLINE
    assert target(rig, 2).draining
    assert target(rig, 2).heard_seconds == pytest.approx(limits.TARGET_LEASE_SECONDS + 1)
    rig.heartbeat("target-2", server="moved")
    assert target(rig, 2).state is TargetState.DRAINING
    assert (target(rig, 2).server_id, target(rig, 2).keep_blocks) == ("moved", True)
    assert target(rig, 2).heard_seconds == 0


def test_records_of_before_there_was_draining_are_read(rig: Rig) -> None:
    key, value = next(iter(rig.dump(records.TARGET).items()))
    old = msgspec.msgpack.encode(msgspec.msgpack.decode(value)[:7])
    rig.core.update([lambda tx: tx.kv.put(key, old)])
    rig.restart()
    assert not any(t.draining or t.drained for t in details(rig).targets)


def test_blocks_are_given_up_a_page_at_a_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.draining.DRAIN_PAGE_RECORDS", 4)
    namespace = rig.namespace()
    placed = {b.inode: b.chain for b in rig.put(namespace, range(30)).blocks if b}
    assert rig.core.update([rig.core.drain]) == [False], "nothing to do"
    rig.call(SetDraining((1, 2, 3), True))
    assert rig.statistics()["blocks"] == 30
    assert work(rig) > 30 / 4
    assert rig.statistics()["blocks"] == 0 == len(rig.stored(namespace, range(30)))
    assert rig.statistics()["drained_blocks"] == 30
    assert {i for _, i in rig.removals("target-2")} == {i for i, c in placed.items() if c == 2}
    assert target(rig, 2).drained
    assert target(rig, 2).removals == 10


def test_kept_blocks_stay_and_keep_it_from_being_drained(rig: Rig) -> None:
    namespace = rig.namespace()
    rig.put(namespace, range(9))
    drain(rig, 2, keep_blocks=True)
    assert rig.match(namespace, range(9)) == 9
    assert not target(rig, 2).drained
    with pytest.raises(e.TargetInUse) as caught:
        rig.call(RemoveTarget((2,)))
    assert (caught.value.target_id, caught.value.blocks, caught.value.files) == (2, 3, 0)
    drain(rig, 2)
    assert rig.statistics()["blocks"] == 9
    assert target(rig, 2).drained


def test_a_batch_that_was_prepared_before_is_waited_for(rig: Rig) -> None:
    namespace = rig.namespace()
    batch = rig.prepare(namespace, range(6))
    drain(rig, 2)
    assert not target(rig, 2).drained
    rig.commit(batch)
    assert rig.match(namespace, range(6)) == 6
    drain(rig, 2)
    assert rig.statistics()["blocks"] == 6
    assert target(rig, 2).drained


def test_blocks_that_come_behind_a_pass_spoil_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.draining.DRAIN_PAGE_RECORDS", 1)
    namespace = rig.namespace()
    batch = rig.prepare(namespace, range(3))
    rig.put(namespace, range(10, 40))
    rig.call(SetDraining((2,), True))
    move_blocks(rig, 2)
    for _ in range(5):
        assert rig.core.update([rig.core.drain]) == [True]
    rig.commit(batch)  # its inodes are the smallest
    work(rig)
    assert not target(rig, 2).drained
    move_blocks(rig, 2)
    work(rig)
    assert target(rig, 2).drained


def test_files_stay_where_their_chunks_are_and_leave_where_they_have_none(rig: Rig) -> None:
    for n in range(6):
        make_file(rig, b"%d" % n, n)
    before = {n: rig.resolve(b"/%d" % n) for n in range(6)}
    drain(rig, 2)
    for n, old in before.items():
        new = rig.resolve(b"/%d" % n)
        assert old.layout is not None and new.layout is not None
        assert [old.layout.chain_of(i) for i in range(n)] == [
            new.layout.chain_of(i) for i in range(n)
        ]
        assert 2 not in new.layout.chains[min(n, 3) :]
        assert new.ctime_ns == old.ctime_ns
    holding = [n for n, attr in before.items() if attr.layout and 2 in attr.layout.chains[:n]]
    assert 0 < len(holding) < 6
    with pytest.raises(e.TargetInUse) as caught:
        rig.call(RemoveTarget((2,)))
    assert (caught.value.blocks, caught.value.files) == (0, len(holding))
    assert count(rig, files=True)[2][0] == len(holding)
    for n in holding:
        rig.call(m.Unlink(ROOT, b"%d" % n))
    work(rig)
    assert target(rig, 2).drained


def test_chunks_behind_the_end_are_removed_where_the_file_leaves(rig: Rig) -> None:
    """Of a file that was longer, or whose writer died."""
    inode, _ = make_file(rig, b"f", 9)
    rig.call(m.SetAttr(inode, size=0))
    drain(rig, 2)
    (order,) = rig.heartbeat("target-2").targets[0].removals
    assert (order.inode, order.first) == (inode, 0)
    assert order.end >= 9
    assert rig.heartbeat("target-1").targets[0].removals == ()


def test_open_files_are_left_alone_until_they_are_closed(rig: Rig) -> None:
    inode = rig.call(m.Make(ROOT, b"f", FILE, open=True)).inode
    old = chains(rig, inode)
    drain(rig, 2)
    assert chains(rig, inode) == old
    assert not target(rig, 2).drained
    rig.call(m.CloseInode(inode))
    work(rig)
    assert 2 not in chains(rig, inode)
    assert target(rig, 2).drained


def test_after_a_restart_files_may_be_open(rig: Rig) -> None:
    inode, old = make_file(rig, b"f", 0)
    rig.restart()
    drain(rig, 2)
    assert chains(rig, inode) == old
    rig.advance(metadata_limits.SESSION_GRACE_SECONDS + 1)
    work(rig)
    assert target(rig, 2).drained


def test_no_other_target(rig: Rig) -> None:
    inode, old = make_file(rig, b"f", 0)
    drain(rig, 1, 2, 3)
    assert chains(rig, inode) == old
    with pytest.raises(e.NoTarget):
        rig.make(ROOT, b"g")
    rig.call(SetDraining((1,), False))
    work(rig)
    assert chains(rig, inode) == (1, 1, 1)


def test_the_capacity_shrinks_as_a_target_empties() -> None:
    rig = Rig(targets=0)
    for uuid, free in (("a", 1000), ("b", 1000), ("c", 400)):
        rig.heartbeat(uuid, capacity=1000, free=free)
    assert rig.core.cluster.targets.capacity_bytes() == 3000
    rig.call(SetDraining((3,), True))
    assert rig.core.cluster.targets.capacity_bytes() == 2600
    assert rig.core.cluster.targets.free_bytes() == 2000
    rig.heartbeat("c", capacity=1000, free=1000)
    assert rig.core.cluster.targets.capacity_bytes() == 2000


# --- undo


class Failing:
    """Commits of a rig fail while ``active``."""

    def __init__(self, rig: Rig) -> None:
        self.active = True
        rig.engine.before_commit = self._check

    def _check(self, writes: dict[bytes, bytes | None]) -> None:
        if self.active:
            raise e.DiskFull(path="x")


def image(rig: Rig) -> Any:
    """Memory and store."""
    cluster = rig.core.cluster
    found = rig.call(GetClusterMap())
    return (
        rig.dump(),
        sorted(found.targets, key=lambda t: t.target_id),
        sorted(found.chains, key=lambda c: c.chain_id),
        dict(cluster.departures.gone),
        cluster.departures.sweep_wanted,
        rig.core.removals.pending_count(),
        sorted(rig.core.index.by_inode),
        rig.core.drainer.drained_blocks,
        {t.target_id: t.drained for t in details(rig).targets},
    )


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: SetDraining((1, 2), True),
        lambda: SetDraining((3,), False),
        lambda: RemoveTarget((2, 3), force=True),
        lambda: AdmitTarget("gone"),
    ],
)
def test_a_change_that_cannot_be_written_did_not_happen(
    rig: Rig, request_of: Callable[[], Any]
) -> None:
    namespace = rig.namespace()
    rig.put(namespace, range(6))
    rig.call(m.RemoveBlocks(namespace, keys(range(3))))
    rig.heartbeat("gone")
    rig.call(RemoveTarget((4,), force=True))
    rig.call(SetDraining((3,), True))
    before = image(rig)
    failing = Failing(rig)
    with pytest.raises(e.DiskFull):
        rig.call(request_of())
    failing.active = False
    assert image(rig) == before
    rig.call(request_of())
    after = image(rig)
    assert after != before
    rig.restart()
    assert image(rig)[2:-2] == after[2:-2]


def test_a_pass_that_cannot_be_written_is_begun_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.draining.DRAIN_PAGE_RECORDS", 4)
    rig.put(rig.namespace(), range(30))
    inode, _ = make_file(rig, b"f", 0)
    rig.call(SetDraining((2,), True))
    failing = Failing(rig)
    for good in range(8):
        failing.active = False
        for _ in range(good):
            rig.core.update([rig.core.drain])
        failing.active = True
        before = image(rig)
        with contextlib.suppress(e.DiskFull):  # nothing to write is no failure
            rig.core.update([rig.core.drain])
        assert image(rig) == before
    assert not target(rig, 2).drained
    failing.active = False
    drain(rig, 2)
    assert target(rig, 2).drained
    assert rig.statistics()["blocks"] == 30
    assert 2 not in chains(rig, inode)


def test_a_request_for_several_targets_is_done_whole_or_not_at_all(rig: Rig) -> None:
    with pytest.raises(e.TargetUnknown):
        rig.call(SetDraining((1, 9), True))
    assert not target(rig, 1).draining
    drain(rig, 1)
    with pytest.raises(e.TargetInUse):
        rig.call(RemoveTarget((1, 2)))
    assert len(details(rig).targets) == 3
    with pytest.raises(e.TargetUnknown):
        rig.call(AdmitTarget("target-1"))


# --- removal


def test_a_drained_target_is_removed_with_all_its_records(rig: Rig) -> None:
    namespace = rig.namespace()
    rig.put(namespace, range(9))
    with pytest.raises(e.TargetInUse):
        rig.call(RemoveTarget((2,)))
    drain(rig, 2)
    with pytest.raises(e.TargetInUse) as caught:
        rig.call(RemoveTarget((2,)))
    assert caught.value.removals == 3
    acknowledge(rig, "target-2")
    rig.call(RemoveTarget((2,)))
    work(rig)
    assert rig.dump(records.target_key("target-2")) == {}
    assert rig.dump(records.CHAIN).keys() == {records.chain_key(1), records.chain_key(3)}
    assert rig.dump(records.REMOVAL_STATE).keys().isdisjoint({records.removal_state_key(2)})
    assert rig.dump(records.SWEEP_KEY) == {}
    rig.restart()
    found = rig.call(GetClusterMap())
    assert [t.target_id for t in found.targets] == [1, 3]
    assert [c.chain_id for c in found.chains] == [1, 3]
    assert len(rig.stored(namespace, range(9))) == 9


def test_removals_of_a_dead_disk_do_not_keep_it(rig: Rig) -> None:
    rig.put(rig.namespace(), range(9))
    drain(rig, 2)
    rig.clock.advance(limits.TARGET_LEASE_SECONDS + 1)
    rig.call(RemoveTarget((2,)))
    work(rig)
    assert rig.dump(records.REMOVAL) == {}
    assert rig.statistics()["removals_pending"] == 0


def test_a_removed_target_is_refused_and_its_server_keeps_the_others(rig: Rig) -> None:
    rig.call(RemoveTarget((2,), force=True))
    reply = rig.heartbeat("target-2")
    assert (reply.targets, reply.refused) == ((), ("target-2",))
    rig.restart()
    assert rig.heartbeat("target-2").refused == ("target-2",)
    assert rig.heartbeat("target-1").refused == ()
    assert [r.uuid for r in details(rig).removed] == ["target-2"]
    rig.call(AdmitTarget("target-2"))
    reply = rig.heartbeat("target-2")
    assert (reply.targets[0].target_id, reply.refused) == (4, ())
    assert details(rig).removed == ()
    assert target(rig, 4).chains == (4,)


def test_removed_targets_are_remembered_up_to_a_bound(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.departures.REMOVED_TARGETS_MAX", 2)
    for target_id in (3, 1, 2):
        rig.clock.advance(0.1)
        rig.call(RemoveTarget((target_id,), force=True))
    assert {r.target_id for r in details(rig).removed} == {1, 2}
    assert len(rig.dump(records.GONE)) == 2


def test_force_loses_blocks_and_chunks_and_nothing_else(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.draining.DRAIN_PAGE_RECORDS", 4)
    namespace = rig.namespace()
    rig.put(namespace, range(30))
    rig.call(m.RemoveBlocks(namespace, keys(range(15))))
    lost, old = make_file(rig, b"lost", 5)
    kept, _ = make_file(rig, b"kept", 0)
    rig.call(RemoveTarget((2,), force=True))
    assert rig.call(m.StatFs()).used_bytes > 0
    work(rig)
    assert rig.statistics()["blocks"] == 10
    assert all(key[4:8] != records.u32(2) for key in rig.dump(records.REMOVAL))
    assert rig.dump(records.SWEEP_KEY) == {}
    assert chains(rig, lost) == old, "what was lost must not look like a hole"
    assert set(chains(rig, kept)) <= {1, 3}
    assert work(rig) == 1, "all is swept"
    rig.call(m.Unlink(ROOT, b"lost"))
    assert rig.names(ROOT) == [b"kept", b"kv"]
    for uuid in ("target-1", "target-3"):
        assert lost in {inode for _, inode in rig.removals(uuid)}


def test_a_restart_in_the_middle_of_a_sweep_goes_on(rig: Rig) -> None:
    namespace = rig.namespace()
    rig.put(namespace, range(9))
    rig.call(RemoveTarget((2,), force=True))
    rig.restart()
    rig.advance(metadata_limits.SESSION_GRACE_SECONDS + 1)
    work(rig)
    assert rig.statistics()["blocks"] == 6
    assert rig.dump(records.SWEEP_KEY) == {}


def test_open_files_of_a_removed_target_are_swept_later(rig: Rig) -> None:
    inode = rig.call(m.Make(ROOT, b"f", FILE, open=True)).inode
    rig.call(RemoveTarget((2,), force=True))
    work(rig)
    assert rig.dump(records.SWEEP_KEY) != {}
    rig.call(m.CloseInode(inode))
    work(rig)
    assert rig.dump(records.SWEEP_KEY) == {}
    assert 2 not in chains(rig, inode)


def test_a_batch_that_was_on_its_way_to_a_removed_target(rig: Rig) -> None:
    namespace = rig.namespace()
    committed, aborted = rig.prepare(namespace, range(6)), rig.prepare(namespace, range(6, 12))
    rig.call(RemoveTarget((2,), force=True))
    rig.commit(committed)
    rig.call(m.AbortBlocks(aborted.batch_id))
    assert rig.statistics()["blocks"] == 4
    assert rig.statistics()["prepared_bytes"] == 0
    infos = rig.call(m.LookupBlocks(namespace, keys(range(6))))
    assert {info.chain for info in infos if info} == {1, 3}


# --- counting and listing


@pytest.mark.parametrize("chunks", range(12))
def test_chunks_of_a_file_by_chain(chunks: int) -> None:
    layout = Layout(10, (4, 7, 4, 9))
    expected: dict[int, int] = {}
    for number in range(chunks):
        chain = layout.chain_of(number)
        expected[chain] = expected.get(chain, 0) + 1
    assert chunks_by_chain(chunks * 10, layout) == expected
    if chunks:
        assert chunks_by_chain(chunks * 10 - 9, layout) == expected


def test_counts_come_in_pages(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.administration.COUNT_PAGE_RECORDS", 3)
    rig.put(rig.namespace(), range(9), size=10)
    for n in range(7):
        make_file(rig, b"%d" % n, n)
    assert count(rig, files=False) == dict.fromkeys((1, 2, 3), (3, 3, 30))
    assert sum(chunks for _, chunks, _ in count(rig, files=True).values()) == sum(range(7))


def test_a_server_of_its_own_lists_itself(rig: Rig) -> None:
    (server,) = details(rig).servers
    assert (server.addresses, server.alive, server.answering) == (("unix:/unused",), True, True)


# --- several servers on one store


def test_servers_on_one_store_know_of_each_other() -> None:
    servers = Servers()
    a, b = servers.rigs
    servers.live(1)
    found = {s.number: s for s in details(a).servers}
    assert {n: (s.alive, s.answering) for n, s in found.items()} == {
        a.server: (True, True),
        b.server: (True, False),
    }
    assert found[b.server].beats > 0
    servers.live(metadata_limits.SERVER_LEASE_SECONDS + 1, [a])
    assert {s.number: s.alive for s in details(a).servers} == {a.server: True, b.server: False}


def test_every_server_follows() -> None:
    servers = Servers(2, targets=3)
    a, b = servers.rigs
    namespace = a.namespace()
    batch = a.prepare(namespace, range(100, 106))
    a.put(namespace, range(9))
    inode, _ = make_file(b, b"f", 0)
    a.call(SetDraining((2,), True))
    assert target(b, 2).state is TargetState.DRAINING
    assert {blk.chain for blk in b.prepare(namespace, range(20, 29)).blocks if blk} == {1, 3}
    work(b)
    move_blocks(b, 2)
    assert not target(a, 2).drained
    b.call(m.AbortBlocks(batch.batch_id))
    work(a)
    assert target(b, 2).drained
    assert b.match(namespace, range(9)) == a.match(namespace, range(9))
    assert 2 not in chains(a, inode)
    acknowledge(b, "target-2")
    b.call(RemoveTarget((2,)))
    assert [t.target_id for t in details(a).targets] == [1, 3]
    assert len(a.dump(records.BEAT)) == 2
    assert a.heartbeat("target-2").refused == ("target-2",)
    work(a)
    assert b.core.update([b.core.drain]) == [False]
    assert not b.core.cluster.departures.sweep_wanted
    a.call(AdmitTarget("target-2"))
    assert b.heartbeat("target-2").targets[0].target_id == 4
    assert {blk.chain for blk in a.prepare(namespace, range(40, 49)).blocks if blk} == {1, 3, 4}


def test_a_file_that_is_open_at_another_server_is_left_alone() -> None:
    servers = Servers(2, targets=3)
    a, b = servers.rigs
    inode = b.call(m.Make(ROOT, b"f", FILE, open=True)).inode
    old = chains(a, inode)
    drain(a, 2)
    assert chains(a, inode) == old
    assert not target(a, 2).drained
    b.call(m.CloseInode(inode))
    work(a)
    assert target(a, 2).drained


def test_a_pass_notices_what_another_server_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.draining.DRAIN_PAGE_RECORDS", 1)
    servers = Servers(2, targets=3)
    a, b = servers.rigs
    namespace = a.namespace()
    a.put(namespace, range(6))
    a.call(SetDraining((2,), True))
    for _ in range(10):
        a.core.update([a.core.drain])
    b.call(SetDraining((2,), False))
    b.put(namespace, range(10, 16))
    b.call(SetDraining((2,), True))
    work(a)
    assert not target(b, 2).drained
    move_blocks(a, 2)
    work(a)
    stored = [a.core.index.by_inode[inode].chain for inode in a.core.index.by_inode]
    assert set(stored) == {1, 3}
    assert target(b, 2).drained


def test_who_was_away_for_long_knows_who_left() -> None:
    servers = Servers(2, targets=3)
    a, b = servers.rigs
    assert isinstance(servers.store, MemoryStore)
    servers.store.log_max = 1
    drain(a, 1)
    acknowledge(a, "target-1")
    a.call(RemoveTarget((1,)))
    a.call(SetDraining((3,), True))
    assert [(t.target_id, t.draining) for t in details(b).targets] == [(2, False), (3, True)]
    assert b.heartbeat("target-1").refused == ("target-1",)
