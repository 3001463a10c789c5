"""Members that come back, or come new, are brought in step while others write; bad copies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    ChunkPending,
    Conflict,
    ConnectionLost,
    KvfsError,
    ServerBusy,
    StaleChain,
    TargetFenced,
)
from kvfs_base.limits import MIB
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chains import sync_sink as sync_sink_module
from kvfs_datapath.chains import sync_source as sync_source_module
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.format import ChunkInfo, ChunkState, path_of, pending_path_of
from kvfs_metadata.cluster import members
from kvfs_metadata.records import ChainRecord
from t2_services.chain_cluster import (
    CHAIN,
    ChainCluster,
    Cut,
    answers_get_lost,
    chains,
    only,
    payload,
    rot,
    wait_for_sync,
)
from t2_services.chunk_cluster import wait_until

CHUNK = ChunkId(7, 0, CHAIN)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path) as cluster:
        yield cluster


@pytest.fixture(params=["cache", "strict"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path, durability=request.param) as cluster:
        yield cluster


def contents(cluster: ChainCluster, number: int) -> dict[ChunkId, tuple[int, int, int]]:
    """Every chunk of the chain that lies there, checked."""
    store = cluster.store(number)
    infos = [store.recheck(chunk) for chunk in sorted(store.list(CHAIN))]
    return {i.chunk: (i.version, i.length, i.crc32c) for i in infos}


# --- coming back in step


def test_an_empty_chain_is_in_step_at_once(cluster: ChainCluster) -> None:
    """The handshake takes place all the same."""
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])
    cluster.metadata.wait_for(lambda: not cluster.metadata.synced())
    cluster.write(1, b"x", sequence=1)
    assert cluster.read(2) == b"x"


def test_a_new_member_gets_everything(
    either: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = either
    monkeypatch.setattr(sync_source_module, "SYNC_PAGE_CHUNKS", 3)
    cluster.set_chain([1, 2])
    for number in range(10):
        cluster.write(1, payload(1000 + number), number=number, sequence=number)
    cluster.write(1, b"", inode=8, sequence=50)
    blocks = {100 + n: payload(size) for n, size in enumerate([0, 1, 4096, 9 * MIB + 5])}
    assert cluster.put_blocks(1, [2], blocks) == [None] * 4
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)
    assert contents(cluster, 3) == contents(cluster, 1) == contents(cluster, 2)
    assert len(contents(cluster, 3)) == 15
    with pytest.raises(TargetFenced):
        cluster.read(3)
    cluster.set_chain([1, 2, 3])
    assert cluster.read(3) == cluster.read(1)
    assert cluster.get_block(3, 103, blocks[103]) == blocks[103]


def test_a_member_that_was_away_gets_what_it_missed(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    for number in range(6):
        cluster.write(1, b"old", number=number, sequence=number)
    assert cluster.put_blocks(1, [2], {100: b"block"}) == [None]
    cluster.set_chain([1], offline=[2])
    cluster.write(1, b"new", number=1, sequence=11)
    cluster.write(1, b"more", number=2, offset=3, sequence=12)
    cluster.store(1).remove(ChunkId(7, 3, CHAIN))
    cluster.store(1).remove(ChunkId(100, 0, CHAIN))
    assert cluster.put_blocks(1, [], {101: b"block"}) == [None]
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    after = contents(cluster, 2)
    assert after.pop(ChunkId(100, 0, CHAIN)), "who removes blocks has told it, or will"
    assert after == contents(cluster, 1)
    sent = cluster.servers[1].statistics()
    assert sent["chunks_synced"] == 3 and sent["synced_bytes"] == 3 + 7 + 5


def test_writes_go_on_while_a_member_comes_in_step(
    cluster: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_source_module, "SYNC_PAGE_CHUNKS", 2)
    cluster.set_chain([1, 2])
    for number in range(30):
        cluster.write(1, payload(500), number=number, sequence=number)
    stop, errors, done = threading.Event(), [], []

    def work(writer: int) -> None:
        sequence = 0
        while not stop.is_set():
            sequence += 1
            number = (sequence * 7) % 35
            try:
                data = payload(100)
                cluster.write(
                    1, data, number=number, offset=number, writer=writer, sequence=sequence
                )
                done.append(number)
            except StaleChain:
                pass  # the chain has changed on the way: somebody asks for the map
            except KvfsError as exc:
                errors.append(exc)

    workers = [threading.Thread(target=work, args=(n,)) for n in (2, 3)]
    for worker in workers:
        worker.start()
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)
    cluster.set_chain([1, 2, 3])
    before = len(done)
    wait_until(lambda: len(done) > before + 5)
    stop.set()
    for worker in workers:
        worker.join()
    assert errors == []
    wait_until(lambda: not any(s._chains.replicator.unresolved() for s in cluster.servers.values()))
    assert contents(cluster, 1) == contents(cluster, 2) == contents(cluster, 3)


def test_what_was_pending_is_forgotten_when_a_member_comes_back(cluster: ChainCluster) -> None:
    """A copy and an append that the others never had, and decided otherwise about."""
    cluster.set_chain([2, 1])
    cluster.write(2, b"old", sequence=1)
    cluster.write(2, b"old", number=1, sequence=2)
    # Its server does not try again: once it is out of the chain, that would forget it as well.
    replicator = cluster.servers[2]._chains.replicator
    resolve = replicator.resolve
    replicator.resolve = lambda *args: None  # type: ignore[method-assign]
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    cut.off(cluster.servers[1])
    for number, offset in ((0, 0), (1, 3), (2, 0)):
        with pytest.raises(ConnectionLost):
            cluster.write(2, b"lost", number=number, offset=offset, sequence=3 + number)
    cut.on(cluster.servers[1])
    cluster.set_chain([1], offline=[2])
    assert all(cluster.pending(2, chunk=n) is not None for n in range(3))
    assert cluster.write(1, b"new", sequence=10).version == 2
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    replicator.resolve = resolve  # type: ignore[method-assign]
    assert all(cluster.pending(2, chunk=n) is None for n in range(3))
    cluster.set_chain([1, 2])
    cluster.stop_server(1)
    cluster.set_chain([2], offline=[1])
    assert cluster.read(2) == b"new" and cluster.read(2, chunk=1) == b"old"
    with pytest.raises(ChunkNotFound):
        cluster.read(2, chunk=2)


def test_a_target_that_was_restarted_has_another_incarnation(cluster: ChainCluster) -> None:
    first = cluster.metadata.report(1).incarnation
    assert first and cluster.metadata.report(2).incarnation not in (0, first)
    cluster.stop_server(1)
    cluster.start_server(1)
    cluster.metadata.wait_for(lambda: cluster.metadata.report(1).incarnation != first)


def test_the_last_member_commits_what_it_had_pending_before_a_restart(
    either: ChainCluster,
) -> None:
    cluster = either
    cluster.set_chain([1, 2])
    for number in range(2):
        cluster.write(1, b"old", number=number, sequence=number)
    cluster.stop_server(2)
    for number, offset in ((0, 0), (1, 3), (2, 0)):
        with pytest.raises(ConnectionLost):
            cluster.write(1, b"new", number=number, offset=offset, sequence=10 + number)
    cluster.stop_server(1)
    cluster.metadata.set_chain(CHAIN, [1], offline=[2])
    cluster.start_server(1)
    wait_until(lambda: cluster.knows(1, cluster.chain().version) and cluster.may_act(1))
    wait_until(lambda: all(cluster.pending(1, chunk=n) is None for n in range(3)))
    assert [cluster.read(1, chunk=n) for n in range(3)] == [b"new", b"oldnew", b"new"]
    assert cluster.write(1, b"new", sequence=10, again=True, base=1).version == 2


def test_what_a_source_lost_with_its_process_no_sink_keeps(cluster: ChainCluster) -> None:
    """An update that was never acknowledged: the sink has committed it, and of what the source had
    pending nothing is left."""
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    replicator = cluster.servers[1]._chains.replicator
    replicator.resolve = lambda *args: None  # type: ignore[method-assign]
    with answers_get_lost(cluster, 1), pytest.raises(ConnectionLost):
        cluster.write(1, b"lost", sequence=1)
    assert cluster.committed(2) is not None
    cluster.stop_server(1)
    cluster.disk(1).unlink(pending_path_of(CHUNK))
    chain = cluster.chain()
    before = ChainRecord(chain.version, chain.targets, chain.copies, chain.syncing)
    after = members.restarted(before, 1)
    if after is not before:
        cluster.metadata.set_chain(CHAIN, after.targets, after.syncing)
    cluster.start_server(1)
    wait_for_sync(cluster, 2)
    assert cluster.committed(1) is None
    assert cluster.committed(2) is None
    wait_until(lambda: cluster.may_act(1))
    assert cluster.write(1, b"new", sequence=2).version == 1


def test_a_sink_that_is_silent_is_a_suspect_and_tried_again(cluster: ChainCluster) -> None:
    cluster.set_chain([1])
    cluster.write(1, b"x", sequence=1)
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    cut.off(cluster.servers[2])
    cluster.set_chain([1], syncing=[2])
    wait_until(lambda: cluster.servers[1]._chains.peers.reach.doubtful() == [2])
    cut.on(cluster.servers[2])
    wait_for_sync(cluster, 2)
    assert contents(cluster, 2) == contents(cluster, 1)


def test_several_members_come_in_one_after_the_other(cluster: ChainCluster) -> None:
    cluster.set_chain([1])
    cluster.write(1, b"x", sequence=1)
    cluster.set_chain([1], syncing=[2, 3])
    wait_for_sync(cluster, 2)
    assert contents(cluster, 3) == contents(cluster, 1), "it went through the other"
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)


def test_a_member_that_waits_for_its_turn_takes_any_number_of_chunks(
    cluster: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first one is sent passes the second one, which nothing is compared with yet."""
    monkeypatch.setattr(sync_sink_module, "SYNC_CAME_MAX", 1)
    cluster.set_chain([1])
    for number in range(4):
        cluster.write(1, payload(100), number=number, sequence=number)
    cluster.set_chain([1], syncing=[2, 3])
    wait_for_sync(cluster, 2)
    cluster.write(1, b"more", number=2, offset=100, sequence=9)
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)
    assert contents(cluster, 1) == contents(cluster, 2) == contents(cluster, 3)


def test_what_comes_late_to_a_member_that_waits_is_put_right_in_its_turn(
    cluster: ChainCluster,
) -> None:
    cluster.set_chain([1])
    cluster.write(1, b"first", sequence=1)
    cluster.set_chain([1], syncing=[2, 3])
    wait_for_sync(cluster, 2)
    cluster.write(1, b"second", sequence=2)
    update = m.Update(7, 0, 0, 5, crc32c(b"first"), 1, 1)
    late = m.PassUpdate(3, cluster.passing(), update, 1, crc32c(b"first"), 5, True)
    assert cluster.call(3, late, [b"first"]).errors == {}
    cluster.write(1, b" and third", offset=6, sequence=3)
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)
    cluster.set_chain([1, 2, 3])
    assert cluster.read(3) == b"second and third"


def test_a_member_whose_follower_refused_a_chunk_is_sent_it_again(cluster: ChainCluster) -> None:
    """Nothing came to stay: it must not count as in step with what it had before."""
    cluster.set_chain([1, 2])
    cluster.write(1, b"old", sequence=1)
    cluster.set_chain([1], offline=[2])
    cluster.write(1, b"new", sequence=2)
    replicator = cluster.servers[3]._chains.replicator
    receive, refused = replicator.receive, threading.Event()

    def refuse_once(*args: object) -> ChunkInfo:
        if refused.is_set():
            return receive(*args)  # type: ignore[arg-type]
        refused.set()
        raise TargetFenced(target_id=3, detail="its lease is over")

    replicator.receive = refuse_once  # type: ignore[method-assign]
    cluster.set_chain([1], syncing=[2, 3])
    wait_for_sync(cluster, 2)
    assert refused.is_set()
    assert contents(cluster, 1) == contents(cluster, 2) == contents(cluster, 3) != {}


def test_what_a_member_has_pending_from_before_is_forgotten_though_the_chunk_comes_again(
    either: ChainCluster,
) -> None:
    """The version that it has committed, before the comparison begins: so the chunk is in step."""
    cluster = either
    cluster.set_chain([2, 1])
    cluster.write(2, b"old", sequence=1)
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    cut.off(cluster.servers[1])
    with pytest.raises(ConnectionLost):
        cluster.write(2, b"nowhere", sequence=2)
    source = cluster.servers[1]._chains._source
    bring = source._bring_in_step
    source._bring_in_step = lambda *args: (_ for _ in ()).throw(Conflict())  # type: ignore
    cluster.set_chain([1], syncing=[2])
    cut.on(cluster.servers[1])
    assert cluster.pending(2) is not None
    update = m.Update(7, 0, 0, 3, crc32c(b"old"), 1, 1)
    again = m.PassUpdate(2, cluster.passing(), update, 1, crc32c(b"old"), 3, True)
    assert only(cluster.call(2, again, [b"old"])).version == 1
    source._bring_in_step = bring  # type: ignore[method-assign]
    wait_for_sync(cluster, 2)
    assert cluster.pending(2) is None
    cluster.set_chain([1, 2])
    assert cluster.read(1) == cluster.read(2) == b"old"


def test_only_the_source_may_compare(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)
    everything = m.ChunkRef(0, 0, CHAIN)
    for number, hops in ((2, (3,)), (1, (2, 3))):
        with pytest.raises(StaleChain):
            cluster.call(number, m.SyncChain(number, cluster.passing(*hops)))
    with pytest.raises(StaleChain):
        cluster.call(3, m.CompareChunks(3, cluster.passing(version=9), everything, None, ()))


def test_what_comes_late_does_not_undo_what_came_since(cluster: ChainCluster) -> None:
    """A whole chunk that was sent to a member that is brought in step, and is late."""
    cluster.set_chain([1], syncing=[2])
    cluster.write(1, b"first", sequence=1)
    cluster.write(1, b"second", sequence=2)
    update = m.Update(7, 0, 0, 5, crc32c(b"first"), 1, 1)
    late = m.PassUpdate(2, cluster.passing(), update, 1, crc32c(b"first"), 5, True)
    assert cluster.call(2, late, [b"first"]).error(0) is not None
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])
    assert cluster.read(2) == b"second"


def test_a_member_that_cannot_keep_track_of_updates_has_none_of_them(
    cluster: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_sink_module, "SYNC_CAME_MAX", 1)
    source = cluster.servers[1]._chains._source
    bring = source._bring_in_step
    source._bring_in_step = lambda *args: (_ for _ in ()).throw(Conflict())  # type: ignore
    cluster.set_chain([1], syncing=[2])
    cluster.write(1, b"x", sequence=1)
    with pytest.raises(ServerBusy):
        cluster.write(1, b"y", number=1, sequence=2)
    assert [cluster.pending(n, chunk=1) for n in (1, 2)] == [None, None]
    source._bring_in_step = bring  # type: ignore[method-assign]
    wait_for_sync(cluster, 2)
    cluster.write(1, b"y", number=1, sequence=2)
    assert cluster.servers[2]._chains.sinks._comparisons
    cluster.set_chain([1, 2])
    wait_until(lambda: not cluster.servers[2]._chains.sinks._comparisons)
    assert contents(cluster, 1) == contents(cluster, 2)


def test_durability_that_was_asked_for_comes_with_the_chunk(cluster: ChainCluster) -> None:
    cluster.set_chain([1])
    cluster.write(1, b"x", sequence=1)
    assert cluster.call(1, m.SyncChunks(1, (m.ChunkRef(*CHUNK),), cluster.passing())).errors == {}
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    info = cluster.committed(2)
    assert info is not None and info.durable


def test_what_is_sent_is_bounded_by_a_rate(tmp_path: Path) -> None:
    pauses: list[float] = []
    with chains(tmp_path, sync_bytes_per_second=1000) as cluster:
        cluster.set_chain([1])
        for number in range(3):
            cluster.write(1, payload(500), number=number, sequence=number)
        stopping = cluster.servers[1]._chains._source._stopping
        stopping.wait = lambda seconds: pauses.append(seconds)  # type: ignore
        cluster.set_chain([1], syncing=[2])
        wait_for_sync(cluster, 2)
    assert pauses == [0.5] * 3


# --- bad copies


def test_a_bad_block_is_fetched_again(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2, 3])
    data = payload(9 * MIB)
    assert cluster.put_blocks(1, [2, 3], {100: data, 101: b""}) == [None, None]
    chunk = ChunkId(100, 0, CHAIN)
    rot(cluster, 2, chunk, 5000)
    cluster.disk(2).unlink(path_of(ChunkId(101, 0, CHAIN)))
    refs = (m.ChunkRef(*chunk), m.ChunkRef(101, 0, CHAIN), m.ChunkRef(102, 0, CHAIN))
    outcomes = cluster.call(2, m.RepairChunks(2, refs))
    assert outcomes.infos[0] == cluster.store(1).stat(chunk)
    assert outcomes.error(1) is None and isinstance(outcomes.error(2), ChunkNotFound)
    assert cluster.get_block(2, 100, data) == data
    assert cluster.servers[2].statistics()["chunks_repaired"] == 2
    assert drafts(cluster.disk(2)) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_bad_file_chunk_is_fetched_again(cluster: ChainCluster, number: int) -> None:
    cluster.set_chain([1, 2, 3])
    data = payload(100_000)
    cluster.write(1, data, sequence=1)
    rot(cluster, number, CHUNK, 77)
    with pytest.raises(ChunkCorrupt):
        cluster.store(number).recheck(CHUNK)
    only(cluster.call(number, m.RepairChunks(number, (m.ChunkRef(*CHUNK),))))
    assert cluster.store(number).recheck(CHUNK).version == 1
    assert cluster.read(number) == data
    cluster.write(1, b"more", offset=len(data), sequence=2)
    assert {cluster.read(n) for n in (1, 2, 3)} == {data + b"more"}


def test_a_head_with_a_bad_copy_repairs_it_before_it_changes_it(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    data = payload(10_000)
    cluster.write(1, data, sequence=1)
    rot(cluster, 1, CHUNK, 9_000)
    cluster.write(1, b"new", sequence=2)
    assert {cluster.read(n) for n in (1, 2)} == {b"new" + data[3:]}


@pytest.mark.logs_warnings
def test_a_target_that_others_do_not_agree_with_is_brought_in_step_as_a_whole(
    cluster: ChainCluster,
) -> None:
    cluster.set_chain([1, 2])
    cluster.write(1, b"bytes", sequence=1)
    before = cluster.metadata.report(2).incarnation
    versions = cluster.store(2).versions
    other = ChunkInfo(
        *CHUNK, ChunkState.SEALED, length=5, crc32c=crc32c(b"other"), version=9, writer=3
    )
    versions.replace(CHUNK, other, [b"other"])
    rot(cluster, 2, CHUNK)
    outcomes = cluster.call(2, m.RepairChunks(2, (m.ChunkRef(*CHUNK),)))
    assert outcomes.error(0) is not None
    cluster.metadata.wait_for(lambda: cluster.metadata.report(2).incarnation != before)
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])
    assert cluster.read(2) == b"bytes"


def test_a_source_with_a_bad_copy_sends_the_repaired_one(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    data, block = payload(5000), payload(6000)
    cluster.write(1, data, sequence=1)
    assert cluster.put_blocks(1, [2], {100: block}) == [None]
    rot(cluster, 2, CHUNK)
    rot(cluster, 2, ChunkId(100, 0, CHAIN))
    cluster.set_chain([1, 2], syncing=[3])
    wait_for_sync(cluster, 3)
    cluster.set_chain([1, 2, 3])
    assert [cluster.read(n) for n in (2, 3)] == [data] * 2
    assert [cluster.get_block(n, 100, block) for n in (2, 3)] == [block] * 2


# --- fences


def test_a_target_that_is_told_to_stop_says_so_until_it_is_not_any_more(
    cluster: ChainCluster,
) -> None:
    cluster.set_chain([1, 2])
    cluster.write(1, b"x", sequence=1)
    cluster.metadata.order_fences(2)
    cluster.metadata.wait_for(lambda: cluster.metadata.report(2).fenced)
    with pytest.raises(TargetFenced):
        cluster.read(2)
    with pytest.raises(TargetFenced):
        cluster.write(1, b"y", sequence=2)
    assert cluster.read(1) == b"x", "others are not concerned"
    cluster.set_chain([1], offline=[2])
    cluster.metadata.wait_for_beats(2)
    assert cluster.metadata.report(2).fenced, "a newer map alone does not end it"
    cluster.metadata.order_fences()
    cluster.metadata.wait_for(lambda: not cluster.metadata.report(2).fenced)
    assert cluster.write(1, b"y", sequence=2, again=True, base=1).version == 2


def test_heartbeats_are_numbered(cluster: ChainCluster) -> None:
    before = cluster.metadata.beat(1).number
    cluster.metadata.wait_for(lambda: cluster.metadata.beat(1).number > before > 0)


def test_pending_is_not_read_by_statistics_either(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    cluster.write(1, b"x", sequence=1)
    cluster.stop_server(2)
    with pytest.raises(ConnectionLost):
        cluster.write(1, b"y", sequence=2)
    for request in (
        m.StatChunks(1, (m.ChunkRef(*CHUNK),)),
        m.ReadChunks(1, (m.WholeChunk(*CHUNK, 1, crc32c(b"x"), b""),)),
    ):
        assert isinstance(cluster.call(1, request).error(0), ChunkPending)
