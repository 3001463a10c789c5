"""Several metadata servers on one store: each answers as if it were the only one."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import GetClusterMap
from kvfs_base.rpc import Request
from kvfs_base.testing import ManualClock
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.core import MetadataCore
from kvfs_metadata.engines.memory_engine import MemoryEngine, MemoryStore
from posix_model import check
from t2_services.metadata_rig import FILE, ROOT, Rig, keys
from t2_services.test_posix_model import model_of

SESSION = b"one session.... "
LEASE = metadata_limits.SERVER_LEASE_SECONDS
GRACE = metadata_limits.SESSION_GRACE_SECONDS


class Servers:
    """Rigs over one store and one clock; the first server gets the heartbeats."""

    def __init__(self, count: int = 2, **options: Any) -> None:
        self.store = MemoryStore()
        first = Rig(engine=MemoryEngine(self.store), server=b"A" * 16, **options)
        self.rigs = [first]
        for number in range(1, count):
            self.rigs.append(self.start(bytes([65 + number]) * 16))

    def start(self, server: bytes) -> Rig:
        rig = Rig.__new__(Rig)
        rig.__dict__.update(self.rigs[0].__dict__)
        rig.engine, rig.server = MemoryEngine(self.store), server
        rig.restart()
        return rig

    def live(self, seconds: float, rigs: list[Rig] | None = None) -> None:
        """Time passes; ``rigs`` (all of them unless said otherwise) beat and do what is due."""
        rigs = self.rigs if rigs is None else rigs
        while seconds > 0:
            step = min(seconds, 1.0)
            rigs[0].clock.advance(step)
            seconds -= step
            rigs[0].heartbeat("target-1")
            for rig in rigs:
                rig.core.catch_up()
                rig.core.update([rig.core.beat])
                rig.work()


@pytest.fixture
def servers() -> Servers:
    return Servers()


@pytest.fixture
def a(servers: Servers) -> Rig:
    return servers.rigs[0]


@pytest.fixture
def b(servers: Servers) -> Rig:
    return servers.rigs[1]


def orphan(maker: Rig, remover: Rig, connection: int = 1) -> int:
    """A file that ``maker``'s connection has open and that ``remover`` has unlinked."""
    inode = maker.call(m.Make(ROOT, b"f", FILE, open=True), connection).inode
    assert remover.call(m.Unlink(ROOT, b"f")).nlink == 0
    return inode


def is_gone(rig: Rig, inode: int) -> bool:
    try:
        return rig.attr(inode).nlink > 0
    except e.InodeStale:
        return True


# --- locks


def test_locks_hold_between_servers_and_end_with_their_session(
    servers: Servers, a: Rig, b: Rig
) -> None:
    inode = a.make(ROOT, b"locked").inode
    lock = m.FileLock(0, 9, True, b"owner--a")
    other = m.FileLock(9, 9, False, b"owner--b")
    a.call(m.Attach(SESSION), 1)
    a.call(m.OpenInode(inode), 1)
    assert a.call(m.SetLock(inode, lock), 1) is None
    assert b.call(m.SetLock(inode, other), 2) is not None
    a.core.disconnected(1)
    b.call(m.Attach(SESSION, (inode,), 2), 3)  # it goes on at the other server
    servers.live(2 * GRACE)
    assert a.call(m.GetLock(inode, other), 2) is not None
    b.call(m.Unlock(inode, m.FileLock(9, 9, True, lock.owner)), 3)
    assert a.call(m.SetLock(inode, other), 2) is None
    b.core.disconnected(3)
    b.call(m.Unlock(inode, lock), 3)  # late: a session of its own has nothing locked
    for _ in range(3):
        servers.live(GRACE / 2, [a])  # the server that has the session dies
    assert a.call(m.SetLock(inode, m.FileLock(0, 8, True, other.owner)), 2) is None


# --- namespace and blocks


def test_what_one_server_did_the_other_one_shows(a: Rig, b: Rig) -> None:
    folder = a.mkdir(ROOT, b"d")
    one, two = a.make(folder, b"one").inode, b.make(folder, b"two").inode
    assert one != two
    assert a.names(folder) == b.names(folder) == [b"one", b"two"]
    a.call(m.Rename(folder, b"two", ROOT, b"moved"))
    assert b.resolve(b"/moved").inode == two
    with pytest.raises(e.EntryExists):
        b.make(ROOT, b"moved")
    assert a.call(m.StatFs()).inodes == b.call(m.StatFs()).inodes


def test_numbers_are_never_given_twice(a: Rig, b: Rig) -> None:
    count = 3 * metadata_limits.INODE_RANGE // 2
    namespace = a.namespace()
    inodes = []
    for start in range(0, count, 512):
        for rig, offset in ((a, 0), (b, count)):
            batch = rig.put(namespace, range(start + offset, start + offset + 512))
            inodes += [block.inode for block in batch.blocks if block is not None]
    assert len(set(inodes)) == len(inodes) == 2 * count
    assert a.match(namespace, range(count)) == b.match(namespace, range(count)) == count


def test_a_batch_prepared_at_one_server_is_committed_at_the_other(a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    batch = a.prepare(namespace, range(4))
    assert b.match(namespace, range(4)) == 0
    assert b.statistics()["prepared_batches"] == 1
    b.commit(batch)
    assert a.match(namespace, range(4)) == 4
    a.commit(batch)  # the answer of the first was lost
    assert a.statistics()["prepared_batches"] == b.statistics()["prepared_batches"] == 0


def test_a_batch_prepared_elsewhere_expires_by_this_servers_clock(a: Rig, b: Rig) -> None:
    """Wall clocks of two hosts may be hours apart."""
    namespace = a.namespace()
    late = ManualClock(a.clock.time_ns() + 10**13)
    b.clock = late
    b.restart()
    a.prepare(namespace, range(3))
    b.core.catch_up()
    b.work()
    b.work(metadata_limits.PREPARE_SECONDS_MAX - 1)
    assert a.statistics()["prepared_batches"] == 1
    b.work(1)
    assert a.statistics()["prepared_batches"] == 0


def test_both_store_the_same_keys(a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    first, second = a.prepare(namespace, range(3)), b.prepare(namespace, range(4))
    a.commit(first)
    b.commit(second)
    assert a.match(namespace, range(4)) == 4
    kept = a.call(m.LookupBlocks(namespace, keys(range(4))))
    assert [info.inode for info in kept[:3]] == [block.inode for block in first.blocks]
    unused = {block.inode for block in second.blocks[:3]}
    assert {inode for _, inode in b.removals()} == unused


def test_removed_and_evicted_blocks_miss_everywhere(a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    b.put(namespace, range(8))
    a.call(m.RemoveBlocks(namespace, keys([5])))
    assert b.match(namespace, range(8)) == 5
    a.core.update([a.core.eviction(10**9)])
    assert b.match(namespace, range(8)) == 0
    assert b.statistics()["used_bytes"] == 0
    assert len(b.removals()) == 8


def test_a_namespace_that_goes(a: Rig, b: Rig) -> None:
    namespace = a.namespace("t/m")
    b.put(namespace, [1])
    a.call(m.Unlink(namespace, b.names(namespace)[0]))
    folder = b.resolve(b"/kv/t").inode
    b.call(m.Rmdir(folder, b"m"))
    with pytest.raises(e.InodeStale):
        a.match(namespace, [1])
    assert a.namespace("t/m") != namespace


def test_who_was_away_for_long_loads_everything(servers: Servers, a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    a.put(namespace, range(4))
    b.match(namespace, range(4))
    servers.store.log_max = 2
    a.call(m.RemoveBlocks(namespace, keys([0])))
    a.put(namespace, range(10, 20))
    other = a.namespace("t/other")
    index = b.core.index
    assert b.match(namespace, range(10, 20)) == 10
    assert b.core.index is not index
    assert b.match(namespace, [0]) == 0
    b.put(other, range(3))
    assert a.match(other, range(3)) == 3


# --- lost races


def test_a_group_that_lost_its_race_is_decided_anew(a: Rig, b: Rig) -> None:
    losses = [2]

    def lose(writes: dict[bytes, bytes | None]) -> None:
        if losses[0]:
            losses[0] -= 1
            raise e.Conflict(detail="somebody was faster")

    namespace = a.namespace()
    a.engine.before_commit = lose
    batch = a.put(namespace, range(3))
    assert losses == [0]
    assert a.statistics()["prepared_batches"] == 0
    assert b.match(namespace, range(3)) == 3
    losses[0] = metadata_limits.CONFLICT_RETRIES
    with pytest.raises(e.Conflict):
        a.call(m.RemoveBlocks(namespace, keys([0])))
    assert a.match(namespace, range(3)) == b.match(namespace, range(3)) == 3
    assert batch.batch_id


def test_a_store_that_goes_away_in_the_middle_leaves_memory_as_it_was(a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    a.put(namespace, range(3))

    class Away(MemoryEngine):
        """Notices only after the functions that the database is gone."""

        def run(self, fns: Any) -> Any:
            super().abandon(super().run(fns))
            raise e.StoreUnavailable(detail="gone")

    there = a.engine.__class__
    a.engine.__class__ = Away
    with pytest.raises(e.StoreUnavailable):
        a.call(m.RemoveBlocks(namespace, keys(range(3))))
    a.engine.__class__ = there
    assert a.match(namespace, range(3)) == 3
    assert a.statistics()["removed_blocks"] == 0


# --- sessions


def test_a_file_that_is_open_at_another_server_outlives_its_name(a: Rig, b: Rig) -> None:
    inode = orphan(a, b)
    assert not is_gone(b, inode)
    a.call(m.CloseInode(inode), 1)
    assert is_gone(b, inode)
    assert inode in [i for _, i in b.removals()]


def test_open_at_two_servers(a: Rig, b: Rig) -> None:
    inode = orphan(a, b)
    b.call(m.OpenInode(inode), 1)
    a.call(m.OpenInode(inode), 1)
    a.call(m.CloseInode(inode), 1)
    a.call(m.CloseInode(inode), 1)
    assert not is_gone(a, inode)
    b.call(m.CloseInode(inode), 1)
    assert is_gone(a, inode)


def test_a_client_that_moves_to_the_other_server(servers: Servers, a: Rig, b: Rig) -> None:
    a.call(m.Attach(SESSION), 7)
    inode = orphan(a, b, connection=7)
    b.call(m.Attach(SESSION, (inode,)), 3)
    a.core.disconnected(7)
    servers.live(GRACE + LEASE + 1)
    assert not is_gone(a, inode)
    b.call(m.CloseInode(inode), 3)
    assert is_gone(a, inode)


def test_files_closed_while_moving_are_collected(servers: Servers, a: Rig, b: Rig) -> None:
    a.call(m.Attach(SESSION), 7)
    inode = orphan(a, b, connection=7)
    b.call(m.Attach(SESSION, ()), 3)
    servers.live(GRACE - 1)
    assert not is_gone(a, inode)
    servers.live(2)
    assert is_gone(a, inode)


def test_a_server_that_dies_takes_its_sessions_along_after_their_grace(
    servers: Servers, a: Rig, b: Rig
) -> None:
    servers.live(1)
    inode = orphan(b, a)
    servers.live(GRACE + LEASE + 1)
    assert not is_gone(a, inode)
    servers.live(GRACE + LEASE - 1, [a])
    assert not is_gone(a, inode)
    servers.live(3, [a])
    assert is_gone(a, inode)
    assert a.dump(records.SESSION) == a.dump(records.OPEN) == {}


def test_a_server_that_stood_still_cannot_tell_which_others_are_gone(
    servers: Servers, a: Rig, b: Rig
) -> None:
    servers.live(1)
    inode = orphan(b, a)
    still = GRACE + LEASE + 1
    a.clock.advance(still)
    a.core.stood_still(still)
    servers.live(GRACE + LEASE - 1, [a])
    assert not is_gone(a, inode)
    servers.live(3, [a])
    assert is_gone(a, inode)


def test_a_server_that_says_goodbye(servers: Servers, a: Rig, b: Rig) -> None:
    servers.live(1)
    inode = orphan(b, a)
    b.core.update([b.core.goodbye])
    servers.live(GRACE - 1, [a])
    assert not is_gone(a, inode)
    servers.live(3, [a])
    assert is_gone(a, inode)


def test_a_new_server_knows_who_has_what_open(servers: Servers, a: Rig, b: Rig) -> None:
    inode = orphan(a, b)
    third = servers.start(b"C" * 16)
    third.work()
    assert not is_gone(third, inode)
    a.call(m.CloseInode(inode), 1)
    assert is_gone(third, inode)


def test_a_silent_client_is_noticed(servers: Servers, a: Rig, b: Rig) -> None:
    """Its host lost its power: nothing closed the connection."""
    inode = orphan(a, b)
    a.clock.advance(GRACE - 1)
    a.work(silent=True)
    assert not is_gone(b, inode)
    a.clock.advance(2)
    a.work(silent=True)
    assert is_gone(b, inode)


# --- the cluster


def test_a_target_serves_at_all_servers_whoever_gets_its_heartbeats(a: Rig, b: Rig) -> None:
    a.heartbeat("disk", free=10**11)
    states = {t.target_id: t.state for t in b.call(GetClusterMap()).targets}
    assert len(states) == 2
    a.heartbeat("disk", healthy=False)
    b.core.catch_up()
    assert a.statistics()["targets_serving"] == b.statistics()["targets_serving"] == 1
    for _ in range(4):
        a.clock.advance(limits.TARGET_LEASE_SECONDS / 2)
        a.core.catch_up()
        b.heartbeat("disk")
        b.heartbeat("target-1")
        a.work()
        assert a.statistics()["targets_serving"] == b.statistics()["targets_serving"] == 2
    a.clock.advance(limits.TARGET_LEASE_SECONDS + 0.1)
    for rig in (a, b):
        rig.work()
        assert rig.statistics()["targets_serving"] == 0


def test_removals_are_done_once_whoever_is_asked(a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    a.put(namespace, range(4))
    a.call(m.RemoveBlocks(namespace, keys(range(2))))
    b.call(m.RemoveBlocks(namespace, keys(range(2, 4))))
    orders = b.removals()
    assert [seq for seq, _ in orders] == [1, 2, 3, 4]
    assert a.removals(removed_seq=3) == orders[3:]
    assert b.removals(removed_seq=4) == []
    assert a.statistics()["removals_pending"] == 0


# --- requests that are repeated


def once(request: Any, number: int, slot: int = 0) -> m.Once:
    return m.Once(b"some client.....", slot, number, request)


def test_a_repeated_request_gets_its_first_answer_from_any_server(a: Rig, b: Rig) -> None:
    request = once(m.Make(ROOT, b"f", FILE), 1)
    first = a.call(request)
    a.call(m.Unlink(ROOT, b"f"))
    assert b.call(request) == a.call(request) == first
    assert a.names(ROOT) == [b"kv"]
    assert b.call(once(m.Make(ROOT, b"f", FILE), 2)).inode != first.inode
    with pytest.raises(e.InvalidRequest):
        a.call(request)
    assert a.call(once(m.Make(ROOT, b"g", FILE), 1, slot=255)).inode


def test_errors_are_not_kept(a: Rig, b: Rig) -> None:
    request = once(m.Unlink(ROOT, b"f"), 1)
    with pytest.raises(e.EntryNotFound):
        a.call(request)
    a.make(ROOT, b"f")
    assert b.call(request).nlink == 0
    assert a.call(request).nlink == 0


def test_a_repeated_prepare_reserves_once(a: Rig, b: Rig) -> None:
    namespace = a.namespace()
    request = once(m.PrepareBlocks(namespace, keys(range(3)), (10, 10, 10)), 1)
    assert a.call(request) == b.call(request)
    assert b.statistics()["prepared_batches"] == 1


def test_a_file_made_open_is_open_for_who_repeats_it(servers: Servers, a: Rig, b: Rig) -> None:
    a.call(m.Attach(SESSION), 7)
    request = once(m.Make(ROOT, b"f", FILE, open=True), 1)
    inode = a.call(request, 7).inode
    b.call(m.Attach(SESSION), 3)  # its answer was lost, so the client does not name it
    assert b.call(request, 3).inode == inode
    assert b.call(request, 3).inode == inode
    a.call(m.Unlink(ROOT, b"f"))
    servers.live(GRACE + 1)
    assert not is_gone(a, inode)
    b.call(m.CloseInode(inode), 3)
    assert is_gone(a, inode)


def test_an_old_copy_does_not_succeed_after_the_client_heard_of_a_failure(a: Rig, b: Rig) -> None:
    request = once(m.Unlink(ROOT, b"f"), 1)
    again = msgspec.structs.replace(request, again=True)
    with pytest.raises(e.EntryNotFound):
        b.call(again)
    a.make(ROOT, b"f")
    for copy in (request, again):
        with pytest.raises(e.EntryNotFound):
            a.call(copy)
    assert a.names(ROOT) == [b"f", b"kv"]


def test_answers_of_clients_that_are_gone_are_collected(
    a: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_metadata.answers.ANSWERS_PER_COLLECTION", 2)
    for slot in range(5):
        a.call(once(m.Make(ROOT, b"%d" % slot, FILE), 1, slot))
    a.advance(metadata_limits.ONCE_SECONDS + 1)
    a.call(once(m.Make(ROOT, b"new", FILE), 1, 9))
    for _ in range(4):
        a.core.update([a.core.answers.collect])
    assert list(a.dump(records.ANSWER)) == [records.answer_key(b"some client.....", 9)]


# --- everything at random


def test_servers_that_take_turns_agree_with_the_kernel() -> None:
    servers = Servers(3)
    chance = random.Random(7)

    def call(request: Request) -> Any:
        return servers.rigs[chance.randrange(3)].call(request)

    check(model_of(call), 20)


def snapshot(core: MetadataCore) -> dict[str, Any]:
    """What every server must hold alike."""
    core.catch_up()
    index = core.index
    return {
        "blocks": {(b.namespace, b.key): (b.inode, b.size, b.crc32c) for b in _blocks(core)},
        "bytes": index.block_bytes,
        "namespaces": sorted(index.by_path),
        "prepared": core.blocks.prepared_bytes,
        "removals": core.removals.pending_count(),
        "targets": core.cluster.statistics(),
        "open": core.sessions.statistics()["open_inodes"],
    }


def _blocks(core: MetadataCore) -> Any:
    return [core.index.by_inode[inode] for inode in core.index.by_inode]


@pytest.mark.parametrize("seed", range(5))
def test_memory_of_all_servers_stays_alike(seed: int) -> None:
    chance = random.Random(seed)
    servers = Servers(3, capacity_bytes=200_000)
    namespaces = [servers.rigs[0].namespace(f"t/{n}") for n in range(2)]
    batches: list[m.PreparedBatch] = []
    for _ in range(300):
        rig = chance.choice(servers.rigs)
        namespace = chance.choice(namespaces)
        names = range(start := chance.randrange(60), start + chance.randrange(1, 8))
        action = chance.choice(("prepare", "commit", "abort", "remove", "match", "open", "close"))
        if action == "prepare":
            batches.append(rig.prepare(namespace, names, chance.randrange(1, 5000)))
        elif action == "commit" and batches:
            rig.commit(batches.pop(chance.randrange(len(batches))))
        elif action == "abort" and batches:
            rig.call(m.AbortBlocks(batches.pop().batch_id))
        elif action == "remove":
            rig.call(m.RemoveBlocks(namespace, keys(names)))
        elif action == "match":
            rig.match(namespace, names)
        elif action == "open":
            rig.call(m.Make(ROOT, b"%d" % chance.randrange(5), FILE, exclusive=False, open=True))
        elif action == "close":
            rig.call(m.CloseInode(chance.randrange(16, 200)))
        if chance.random() < 0.1:
            rig.core.update([rig.core.persist_uses])
        if chance.random() < 0.05:
            servers.rigs[chance.randrange(1, 3)] = servers.start(chance.randbytes(16))
    fresh = servers.start(b"Z" * 16)
    expected = snapshot(fresh.core)
    assert all(snapshot(rig.core) == expected for rig in servers.rigs)
