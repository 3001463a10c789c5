"""Updates of files along a chain: order, failures at every hop, repetitions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    Conflict,
    ConnectionLost,
    DiskFull,
    InvalidRequest,
    KvfsError,
    StaleChain,
    TargetFenced,
    WriteUncertain,
)
from kvfs_base.limits import TRANSFER_BYTES
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chains import peers as peers_module
from kvfs_datapath.chains import service as chain_service_module
from kvfs_datapath.chains.requests import side_by_side
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.format import ChunkInfo, path_of
from kvfs_datapath.limits import FENCE_SECONDS, RESOLVE_FULL_SECONDS
from t2_services.chain_cluster import (
    CHAIN,
    ChainCluster,
    Cut,
    chains,
    only,
    payload,
    quiet,
)
from t2_services.chunk_cluster import wait_until

CHUNK = ChunkId(7, 0, CHAIN)


@pytest.fixture(params=["cache", "strict"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path, durability=request.param) as cluster:
        yield cluster


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path) as cluster:
        yield cluster


def updated(chunk: int, sequence: int, data: bytes) -> m.Update:
    return m.Update(7, chunk, 0, len(data), crc32c(data), 1, sequence)


def everywhere(cluster: ChainCluster, *members: int) -> set[bytes]:
    return {cluster.read(number) for number in members}


# --- the usual


def test_every_member_has_every_version(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2, 3])
    expected = bytearray()
    steps = [(0, payload(5000)), (5000, payload(3000)), (100, b"in the middle"), (9000, b"gap")]
    for sequence, (offset, data) in enumerate(steps, start=1):
        expected.extend(bytes(max(0, offset + len(data) - len(expected))))
        expected[offset : offset + len(data)] = data
        info = cluster.write(1, data, offset=offset, sequence=sequence)
        assert (info.version, info.length, info.crc32c) == (
            sequence,
            len(expected),
            crc32c(expected),
        )
        assert everywhere(cluster, 1, 2, 3) == {bytes(expected)}
    cut = m.Update(7, 0, 10, 0, 0, 1, 9, cut=True)
    assert only(cluster.update(1, cut, data=[])).length == 10
    assert everywhere(cluster, 1, 2, 3) == {bytes(expected[:10])}
    assert {cluster.stat(n, CHUNK).version for n in (1, 2, 3)} == {5}


def test_several_updates_in_one_request(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    pieces = [b"first", b"second", b"third"]
    updates = [updated(place, place, data) for place, data in enumerate(pieces)]
    outcomes = cluster.update(1, *updates, data=pieces)
    assert outcomes.errors == {} and [i.version for i in outcomes.infos if i] == [1, 1, 1]
    assert [cluster.read(2, chunk=place) for place in range(3)] == pieces


def test_updates_of_different_chunks_go_down_the_chain_together(lazy: ChainCluster) -> None:
    """Each is kept at the last member until all are there."""
    lazy.set_chain([1, 2, 3])
    replicator = lazy.servers[3]._chains.replicator
    receive, together = replicator.receive, threading.Barrier(4)

    def wait(*args: Any) -> Any:
        together.wait(60)
        return receive(*args)

    replicator.receive = wait  # type: ignore[method-assign]
    data = [payload(1000 + place) for place in range(4)]
    updates = [updated(place, place, data[place]) for place in range(4)]
    assert lazy.update(1, *updates, data=data).errors == {}
    assert [lazy.read(3, chunk=place) for place in range(4)] == data
    assert lazy.call(1, m.RemoveRange(1, 7, 0, 4, 1, lazy.passing(), 10)).errors == {}
    assert [lazy.read(3, chunk=place) for place in range(4)] == [b""] * 4


def test_updates_of_one_chunk_keep_their_order(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    order = [0, 1, 0, 2, 2, 0, 1]
    data = [b"%d" % n for n in range(len(order))]
    updates = [updated(place, n, data[n]) for n, place in enumerate(order)]
    outcomes = lazy.update(1, *updates, data=data)
    assert outcomes.errors == {}
    assert [i.version for i in outcomes.infos if i] == [1, 1, 2, 1, 2, 3, 2]
    assert [lazy.read(2, chunk=place) for place in range(3)] == [b"5", b"6", b"4"]


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [
        ([1], 10, [range(1)]),
        ([4, 4, 4], 8, [range(2), range(2, 3)]),
        ([10, 10], 10, [range(1), range(1, 2)]),
        ([0] * 4, 0, [range(4)]),
    ],
)
def test_updates_are_taken_as_far_as_the_buffer_goes(
    sizes: list[int], room: int, expected: list[range]
) -> None:
    updates = [m.Update(7, place, 0, size, 0, 1, 1) for place, size in enumerate(sizes)]
    assert list(side_by_side(updates, room)) == expected


def test_more_updates_than_fit_into_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRANSFER_BYTES", "CHAIN_CHUNK_BYTES"):
        monkeypatch.setattr(chain_service_module, name, 10_000)
    with chains(tmp_path) as cluster:
        cluster.set_chain([1, 2])
        data = [payload(3000 + place) for place in range(9)]
        updates = [updated(place, place, data[place]) for place in range(9)]
        assert cluster.update(1, *updates, data=data).errors == {}
        assert [cluster.read(2, chunk=place) for place in range(9)] == data


def test_one_bad_update_is_its_own(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    good, bad = b"good", b"bad!"
    updates = [m.Update(7, 0, 0, 4, 0, 1, 1), m.Update(7, 1, 0, 4, crc32c(good), 1, 2)]
    outcomes = lazy.update(1, *updates, data=[bad, good])
    assert isinstance(outcomes.error(0), ChunkCorrupt) and outcomes.error(1) is None
    far = m.Update(7, 2, TRANSFER_BYTES, 1, crc32c(b"x"), 1, 3)
    assert isinstance(lazy.update(1, far, data=[b"x"]).error(0), InvalidRequest)


def test_the_last_copy_is_written_alone(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    lazy.write(1, b"both", sequence=1)
    lazy.set_chain([1], offline=[2])
    assert lazy.write(1, b"alone", sequence=2).version == 2
    assert lazy.read(1) == b"alone"
    with pytest.raises(TargetFenced):
        lazy.read(2)


def test_only_the_head_takes_updates_and_only_from_the_one_before(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    with pytest.raises(StaleChain):
        lazy.write(2, b"x")
    with pytest.raises(StaleChain):
        lazy.write(1, b"x", version=8)
    update = m.Update(7, 0, 0, 1, crc32c(b"x"), 1, 1)
    for number, hops in ((2, ()), (2, (1,)), (3, (2,))):
        passing = lazy.passing(*hops)
        request = m.PassUpdate(number, passing, update, 1, crc32c(b"x"), 1)
        with pytest.raises(StaleChain):
            lazy.call(number, request, [b"x"])
    assert all(lazy.committed(n) is None for n in (1, 2, 3))


def test_many_writers_of_one_chunk(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    errors: list[KvfsError] = []

    def work(writer: int) -> None:
        for sequence in range(1, 6):
            try:
                lazy.write(1, b"%d" % writer, offset=writer, writer=writer, sequence=sequence)
            except KvfsError as exc:
                errors.append(exc)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    assert everywhere(lazy, 1, 2, 3) == {b"\x001234"}
    assert lazy.stat(2, CHUNK).version == 20


# --- repetitions


def test_an_update_that_comes_again_is_answered(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"a", sequence=1)
    assert lazy.write(1, b"a", sequence=1, again=True, base=0).version == 1
    lazy.write(1, b"b", writer=2, sequence=1)
    # The first attempt, from a connection that was given up, is the last to arrive.
    assert lazy.write(1, b"a", sequence=1).version == 2
    assert everywhere(lazy, 1, 2, 3) == {b"b"}


def test_a_new_head_knows_what_the_old_one_did(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"a", sequence=1)
    lazy.write(1, b"b", writer=2, sequence=1)
    lazy.set_chain([2, 3], offline=[1])
    assert lazy.write(2, b"a", sequence=1, again=True, base=0).version == 2
    assert everywhere(lazy, 2, 3) == {b"b"}


def test_an_unknown_repetition_is_done_only_over_what_its_writer_knew(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    assert lazy.write(1, b"a", sequence=1, again=True).version == 1, "there was nothing"
    assert lazy.write(1, b"b", sequence=2, again=True, base=1).version == 2
    for base in (None, 0, 1, 3):
        with pytest.raises(WriteUncertain):
            lazy.write(1, b"c", sequence=3, again=True, base=base)
    assert lazy.read(1) == b"b"


# --- nowhere


@pytest.mark.parametrize("full", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 4])
def test_a_full_disk_anywhere_leaves_the_update_nowhere(
    cluster: ChainCluster, full: int, offset: int
) -> None:
    cluster.set_chain([1, 2, 3])
    cluster.write(1, b"four", sequence=1)

    def refuse(operation: str, path: str) -> None:
        if operation == "pwritev":
            raise DiskFull(path=path)

    disk = cluster.memory_disk(full)
    disk.before = refuse
    with pytest.raises(DiskFull):
        cluster.write(1, b"more", offset=offset, sequence=2)
    assert quiet(cluster, 1, 2, 3)()
    assert everywhere(cluster, 1, 2, 3) == {b"four"}
    disk.before = lambda operation, path: None
    assert cluster.write(1, b"more", offset=offset, sequence=2).version == 2
    assert len(everywhere(cluster, 1, 2, 3)) == 1


def fill(cluster: ChainCluster, number: int, *operations: str) -> None:
    """The disk of a member has no room for what these would write."""

    def refuse(operation: str, path: str) -> None:
        if operation in operations:
            raise DiskFull(path=path)

    cluster.memory_disk(number).before = refuse


def make_room(cluster: ChainCluster, number: int) -> None:
    cluster.memory_disk(number).before = lambda operation, path: None


@pytest.mark.parametrize("full", [2, 3])
@pytest.mark.parametrize("offset", [0, 4])
def test_an_update_that_was_not_answered_is_given_up_where_there_is_no_room(
    lazy: ChainCluster, full: int, offset: int
) -> None:
    """An attempt may still be on its way to the full member: it is not taken any more."""
    cluster = lazy
    cluster.set_chain([1, 2, 3])
    cluster.write(1, b"four", sequence=1)
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    cut.off(cluster.servers[full])
    with pytest.raises(ConnectionLost):
        cluster.write(1, b"more", offset=offset, sequence=2, base=1)
    made = cluster.pending(1)
    assert made is not None
    fill(cluster, full, "pwritev")
    cut.on(cluster.servers[full])
    wait_until(quiet(cluster, 1, 2, 3))
    assert everywhere(cluster, 1, 2, 3) == {b"four"}, "readers are not kept waiting"
    with pytest.raises(DiskFull):
        cluster.write(1, b"more", offset=offset, sequence=2, again=True, base=1)
    make_room(cluster, full)
    update = m.Update(7, 0, offset, 4, crc32c(b"more"), 1, 2)
    passing = cluster.passing(*range(full + 1, 4))
    late = m.PassUpdate(full, passing, update, 2, made.crc32c, made.length)
    assert isinstance(cluster.call(full, late, [b"more"]).error(0), DiskFull)
    assert everywhere(cluster, 1, 2, 3) == {b"four"}
    assert cluster.write(1, b"next", sequence=3).version == 2
    assert everywhere(cluster, 1, 2, 3) == {b"next"}


def test_what_was_carried_out_is_not_given_up(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    made = lazy.write(1, b"four", sequence=1)
    request = m.DropUpdate(2, lazy.passing(), made)
    assert only(lazy.call(2, request)) == made
    assert everywhere(lazy, 1, 2) == {b"four"}
    with pytest.raises(StaleChain):
        lazy.call(1, m.DropUpdate(1, lazy.passing(), made))


def test_a_tail_that_cannot_commit_refuses(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    lazy.write(1, b"four", sequence=1)
    commit = lazy.store(2).versions.commit

    def full(chunk: ChunkId) -> ChunkInfo:
        raise DiskFull(path="target-2")

    lazy.store(2).versions.commit = full  # type: ignore[method-assign]
    with pytest.raises(DiskFull):
        lazy.write(1, b"more", sequence=2)
    assert quiet(lazy, 1, 2)()
    assert everywhere(lazy, 1, 2) == {b"four"}
    lazy.store(2).versions.commit = commit  # type: ignore[method-assign]


@pytest.mark.logs_warnings
def test_a_member_that_cannot_commit_what_others_have_leaves(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    lazy.write(1, b"four", sequence=1)
    commit = lazy.store(1).versions.commit

    def full(chunk: ChunkId) -> ChunkInfo:
        raise DiskFull(path="target-1")

    lazy.store(1).versions.commit = full  # type: ignore[method-assign]
    before = lazy.metadata.report(1).incarnation
    with pytest.raises(ConnectionLost):
        lazy.write(1, b"more", sequence=2)
    assert lazy.read(2) == b"more", "it may be shown, so it may not be dropped"
    full_since = lazy.servers[1]._chains._maintenance._full
    wait_until(lambda: full_since)
    assert lazy.metadata.report(1).incarnation == before
    lazy.clock.advance(RESOLVE_FULL_SECONDS)
    lazy.metadata.wait_for(lambda: lazy.metadata.report(1).incarnation != before)
    lazy.store(1).versions.commit = commit  # type: ignore[method-assign]


def test_a_hop_without_a_lease_leaves_the_update_nowhere(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"a", sequence=1)
    views = lazy.servers[3]._chains.views
    learn, views.learn = views.learn, lambda *args: None  # type: ignore[method-assign]
    lazy.clock.advance(FENCE_SECONDS + 0.1)
    for number in (1, 2):
        wait_until(lambda n=number: lazy.may_act(n))
    with pytest.raises(TargetFenced):
        lazy.write(1, b"b", sequence=2)
    assert quiet(lazy, 1, 2, 3)()
    views.learn = learn  # type: ignore[method-assign]
    wait_until(lambda: lazy.may_act(3))
    assert lazy.write(1, b"b", sequence=2).version == 2


@pytest.mark.parametrize("ahead", [2, 3])
def test_a_hop_with_a_newer_map_leaves_the_update_nowhere(lazy: ChainCluster, ahead: int) -> None:
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"a", sequence=1)
    held = [lazy.servers[n]._chains.views for n in (1, 2, 3) if n != ahead]
    before = [views.learn for views in held]
    for views in held:
        views.learn = lambda *args: None  # type: ignore[method-assign]
    chain = lazy.metadata.set_chain(CHAIN, [1, 2, 3])
    wait_until(lambda: lazy.knows(ahead, chain.version))
    with pytest.raises(StaleChain):
        lazy.write(1, b"b", sequence=2, version=1)
    assert quiet(lazy, 1, 2, 3)()
    for views, learn in zip(held, before, strict=True):
        views.learn = learn  # type: ignore[method-assign]
    assert lazy.write(1, b"b", sequence=2).version == 2
    assert everywhere(lazy, 1, 2, 3) == {b"b"}


# --- what is refused, and what is replaced


def test_two_updates_are_never_taken_for_one(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    lazy.write(1, b"a", sequence=1)
    update = m.Update(7, 0, 0, 1, crc32c(b"z"), 5, 5)
    request = m.PassUpdate(2, lazy.passing(), update, 1, crc32c(b"z"), 1)
    error = lazy.call(2, request, [b"z"]).error(0)
    assert error is not None and lazy.read(2) == b"a"
    late = m.PassUpdate(2, lazy.passing(), update, 0, crc32c(b"z"), 1)
    assert isinstance(lazy.call(2, late, [b"z"]).error(0), Conflict)


def test_a_member_whose_copy_is_damaged_is_sent_the_whole_chunk(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    data = payload(10_000)
    lazy.write(1, data, sequence=1)
    file = lazy.disk(2).open(path_of(CHUNK), write=True)
    file.pwritev([b"rot"], 9_000)
    file.close()
    assert lazy.write(1, b"new", offset=10, sequence=2).version == 2
    expected = data[:10] + b"new" + data[13:]
    assert everywhere(lazy, 1, 2, 3) == {expected}


def test_a_member_that_lost_its_copy_is_sent_the_whole_chunk(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"some bytes", sequence=1)
    lazy.disk(3).unlink(path_of(CHUNK))
    with pytest.raises(ChunkNotFound):
        lazy.read(3)
    lazy.write(1, b" more", offset=10, sequence=2)
    assert everywhere(lazy, 1, 2, 3) == {b"some bytes more"}


# --- whole files


def test_a_range_is_cut_to_nothing_once(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    for number in range(4):
        lazy.write(1, b"bytes", number=number, sequence=number)
    request = m.RemoveRange(1, 7, 1, 3, 1, lazy.passing(), 10)
    assert lazy.call(1, request).errors == {}
    for member in (1, 2, 3):
        assert [lazy.read(member, chunk=n) for n in range(4)] == [b"bytes", b"", b"", b"bytes"]
    assert lazy.stat(3, ChunkId(7, 1, CHAIN)).version == 2
    lazy.write(1, b"again", number=2, sequence=11)
    assert lazy.call(1, request).errors == {}, "late"
    assert lazy.read(3, chunk=2) == b"again"
    with pytest.raises(StaleChain):
        lazy.call(2, m.RemoveRange(2, 7, 1, 3, 1, lazy.passing(), 12))


def test_a_range_is_cut_on_each_chain_that_has_its_head_here(lazy: ChainCluster) -> None:
    """A client gives the requests to all heads of a file one number."""
    for chain in (CHAIN, CHAIN + 1):
        version = lazy.metadata.set_chain(chain, [1, 2]).version
        wait_until(lambda c=chain, v=version: lazy.knows(1, v, c) and lazy.knows(2, v, c))
        passing = m.Passing(chain, version)
        update = m.Update(7, chain, 0, 5, crc32c(b"bytes"), 1, chain)
        only(lazy.call(1, m.UpdateChunks(1, passing, (update,)), [b"bytes"]))
        assert lazy.call(1, m.RemoveRange(1, 7, 0, 999, 1, passing, 10)).errors == {}
        assert lazy.stat(2, ChunkId(7, chain, chain)).length == 0


def test_a_range_is_not_cut_by_two_requests_with_one_number(lazy: ChainCluster) -> None:
    """What somebody writes after the first one has ended is not for the second one to take."""
    lazy.set_chain([1, 2])
    lazy.write(1, b"bytes", sequence=1)
    request = m.RemoveRange(1, 7, 0, 9, 1, lazy.passing(), 10)
    replicator = lazy.servers[1]._chains.replicator
    update, inside, outside = replicator.update, threading.Event(), threading.Event()

    def slowly(*args: Any) -> Any:
        inside.set()
        assert outside.wait(60)
        return update(*args)

    replicator.update = slowly  # type: ignore[method-assign]
    first = threading.Thread(target=lazy.call, args=(1, request))
    first.start()
    assert inside.wait(60)
    outcomes = lazy.call(1, request)
    assert next(iter(outcomes.errors.values())).code == "conflict"
    outside.set()
    first.join()
    assert lazy.call(1, request).errors == {}
    assert lazy.read(2) == b"" and lazy.stat(1, CHUNK).version == 2


def test_fsync_reaches_every_member(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"bytes", sequence=1)
    synced: list[int] = []
    for number in (1, 2, 3):

        def note(operation: str, path: str, number: int = number) -> None:
            if operation == "sync":
                synced.append(number)

        lazy.memory_disk(number).before = note
    request = m.SyncChunks(1, (m.ChunkRef(*CHUNK), m.ChunkRef(7, 5, CHAIN)), lazy.passing())
    assert lazy.call(1, request).errors == {}
    assert sorted(set(synced)) == [1, 2, 3]
    infos = [lazy.committed(n) for n in (1, 2, 3)]
    assert all(info is not None and info.durable for info in infos)
    lazy.stop_server(3)
    assert isinstance(lazy.call(1, request).error(0), ConnectionLost)
    with pytest.raises(StaleChain):
        lazy.call(2, m.SyncChunks(2, (m.ChunkRef(*CHUNK),), lazy.passing()))


def test_all_chunks_of_a_request_are_synced_together_on_all_members(lazy: ChainCluster) -> None:
    """Each sync of a file waits until all have begun."""
    lazy.set_chain([1, 2, 3])
    for number in range(3):
        lazy.write(1, b"bytes", number=number, sequence=number)
    together = threading.Barrier(9)

    def wait(operation: str, path: str) -> None:
        if operation == "sync":
            together.wait(60)

    for number in (1, 2, 3):
        lazy.memory_disk(number).before = wait
    refs = tuple(m.ChunkRef(7, number, CHAIN) for number in range(3))
    assert lazy.call(1, m.SyncChunks(1, refs, lazy.passing())).errors == {}
    assert not together.broken


def test_what_one_member_cannot_sync_is_told_of_that_chunk(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    for number in range(2):
        lazy.write(1, b"bytes", number=number, sequence=number)

    def fail(operation: str, path: str) -> None:
        if operation == "sync" and path == path_of(ChunkId(7, 1, CHAIN)):
            raise DiskFull(path=path)

    lazy.memory_disk(3).before = fail
    refs = tuple(m.ChunkRef(7, number, CHAIN) for number in range(2))
    outcomes = lazy.call(1, m.SyncChunks(1, refs, lazy.passing()))
    assert outcomes.error(0) is None and isinstance(outcomes.error(1), DiskFull)


def test_removals_are_ordered_of_every_member(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    lazy.write(1, b"bytes", sequence=1)
    for number in (1, 2):
        seq = lazy.metadata.order_removals(number, [(7, 0, 1)], chain=CHAIN)
        lazy.metadata.wait_for_removals(number, seq)
        assert lazy.committed(number) is None


def test_chains_in_all_orders_never_wait_in_a_circle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One buffer and one connection for each number of members behind: without that distinction
    three servers soon wait for each other."""
    monkeypatch.setattr(chain_service_module, "PASS_BUFFERS", 1)
    monkeypatch.setattr(peers_module, "PASS_CONNECTIONS", 1)
    orders = {CHAIN: (1, 2, 3), CHAIN + 1: (2, 3, 1), CHAIN + 2: (3, 1, 2)}
    failures: list[object] = []
    with chains(tmp_path) as cluster:
        for chain, order in orders.items():
            cluster.metadata.set_chain(chain, order)
        wait_until(
            lambda: all(
                server._chains.views.chain(chain) is not None
                for server in cluster.servers.values()
                for chain in orders
            )
        )

        def work(chain: int, worker: int) -> None:
            for sequence in range(1, 9):
                data = payload(20_000)
                updates = tuple(
                    m.Update(7, place, 0, len(data), crc32c(data), worker + 1, sequence)
                    for place in (worker, worker + 3)
                )
                head = orders[chain][0]
                request = m.UpdateChunks(head, m.Passing(chain, 1), updates)
                try:
                    failures.extend(cluster.call(head, request, [data, data]).errors.values())
                except KvfsError as exc:
                    failures.append(exc)

        workers = [threading.Thread(target=work, args=(c, n)) for c in orders for n in range(3)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        assert failures == []
        for chain in orders:
            for place in range(6):
                chunk = ChunkId(7, place, chain)
                found = {cluster.store(n).recheck(chunk).crc32c for n in (1, 2, 3)}
                assert len(found) == 1 and cluster.store(1).stat(chunk).version == 8
