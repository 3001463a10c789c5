"""Reading blocks of replicated chains while replicas fail in every way."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import msgspec
import pytest

from chain_fakes import (
    SECONDS,
    FakeCluster,
    Fault,
    Script,
    Stored,
    always,
    avoid_for_good,
    first,
)
from kvfs_base.cluster import TargetState
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KvfsError,
    NoTarget,
    ServerBusy,
    StaleChain,
    TargetFailed,
    TargetFenced,
)
from kvfs_base.limits import MIB, TRANSFER_BYTES
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkWrite
from kvfs_datapath.limits import HEDGES_AT_ONCE
from t2_services.chunk_cluster import assert_equal, make_writes, reads_of, wait_until

CHAIN = 7


@pytest.fixture(params=["remote", "local"])
def cluster(request: pytest.FixtureRequest) -> Iterator[FakeCluster]:
    """A chain of targets 1 to 3; with ``local`` 1 is on the clients' host."""
    cluster = FakeCluster(3, local=[1] if request.param == "local" else [])
    cluster.start()
    cluster.set_chain(CHAIN, [1, 2, 3])
    yield cluster
    cluster.stop()


@pytest.fixture
def remote() -> Iterator[FakeCluster]:
    cluster = FakeCluster(3)
    cluster.start()
    cluster.set_chain(CHAIN, [1, 2, 3])
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.client.chain_reads.CHAIN_READ_SECONDS", 0.2)


def stored(cluster: FakeCluster, sizes: list[int], chain: int = CHAIN) -> list[ChunkWrite]:
    """Blocks that all members have."""
    writes = make_writes(sizes, chains=[chain])
    for write in writes:
        for target_id in cluster.chain(chain).members:
            server = cluster.servers[target_id]
            chunk = ChunkId(write.chunk.inode, 0, chain)
            new = m.WholeChunk(*chunk, write.size, write.crc32c, write.key)
            server.take(new, bytes(write.view[: write.size]))
    return writes


def asked_first(cluster: FakeCluster, client: ChunkClient, write: ChunkWrite) -> int:
    """Which target a reader of this block asks."""
    chain = client.router.chain(CHAIN)
    return chain.in_order(ChunkId(write.chunk.inode, 0, CHAIN), set())[0].target_id


def read_one(client: ChunkClient, write: ChunkWrite) -> KvfsError | None:
    (read,) = reads_of([write])
    (result,) = client.read_chunks([read])
    if result is None:
        assert_equal([read], [write])
    return result


# --- the usual


def test_reads_are_spread(remote: FakeCluster) -> None:
    client = remote.client()
    writes = stored(remote, [1000] * 60)
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * 60
    assert_equal(reads, writes)
    asked = {
        n: sum(len(r.chunks) for r in server.named(m.ReadChunks))
        for n, server in remote.servers.items()
    }
    assert sum(asked.values()) == 60
    assert min(asked.values()) >= 10
    # The same block is always asked of the same replica: its memory may have it.
    before = {n: len(s.requests) for n, s in remote.servers.items()}
    assert read_one(client, writes[0]) is None
    (again,) = [n for n, s in remote.servers.items() if len(s.requests) > before[n]]
    assert again == asked_first(remote, client, writes[0])


def test_the_replica_of_this_host_is_preferred() -> None:
    cluster = FakeCluster(3, local=[2])
    cluster.start()
    try:
        cluster.set_chain(CHAIN, [1, 2, 3])
        writes = stored(cluster, [5000] * 20)
        reads = reads_of(writes)
        assert cluster.client().read_chunks(reads) == [None] * 20
        assert_equal(reads, writes)
        assert [len(s.requests) for s in cluster.servers.values()] == [0, 1, 0]
    finally:
        cluster.stop()


def test_a_member_that_is_being_brought_in_step_is_not_asked(remote: FakeCluster) -> None:
    remote.set_chain(CHAIN, [2], syncing=[1, 3])
    writes = stored(remote, [100] * 10)
    assert remote.client().read_chunks(reads_of(writes)) == [None] * 10
    assert [len(s.requests) for s in remote.servers.values()] == [0, 1, 0]


def test_single_copies_and_replicas_in_one_batch(remote: FakeCluster) -> None:
    remote.set_chain(1, [3], copies=1)
    several = stored(remote, [100] * 5)
    one = make_writes([200] * 5, first_inode=9000, chains=[1])
    for write in one:
        new = m.WholeChunk(*write.chunk, write.size, write.crc32c, write.key)
        remote.servers[3].take(new, bytes(write.view[: write.size]))
    mixed = [w for pair in zip(several, one, strict=True) for w in pair]
    reads = reads_of(mixed)
    assert remote.client().read_chunks(reads) == [None] * 10
    assert_equal(reads, mixed)


# --- the next replica


ANSWERS = [
    ChunkNotFound(1, 0, CHAIN),
    ChunkCorrupt(1, 0, CHAIN),
    TargetFailed(1),
    TargetFenced(1),
    StaleChain(CHAIN, 5),
    NoTarget(),
    ServerBusy(),
    DeadlineExceeded(),
    InternalError(),
]


@pytest.mark.parametrize("error", ANSWERS, ids=lambda e: type(e).__name__)
def test_an_error_costs_a_request(cluster: FakeCluster, error: KvfsError) -> None:
    client = cluster.client()
    (write,) = stored(cluster, [3000])
    bad = asked_first(cluster, client, write)
    cluster.servers[bad].script = first(1, Fault(error=error))
    assert read_one(client, write) is None
    assert client.statistics()["replica_retries"] == 1
    assert client.statistics()["failed_reads"] == 0


@pytest.mark.parametrize(
    "fault",
    [Fault(lose=True), Fault(lose_answer=True), Fault(cut=1000), Fault(flip=True)],
    ids=["no answer", "answer lost", "half a payload", "wrong bytes"],
)
def test_a_transfer_that_breaks_costs_a_request(remote: FakeCluster, fault: Fault) -> None:
    client = remote.client()
    writes = stored(remote, [3000] * 30)
    remote.servers[2].script = always(fault)
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * 30
    assert_equal(reads, writes)


def test_servers_that_are_gone_cost_nothing(cluster: FakeCluster) -> None:
    client = cluster.client()
    writes = stored(cluster, [MIB, 10, 5000] * 10)
    for gone in (1, 3):
        cluster.servers[gone].stop()
        reads = reads_of(writes)
        assert client.read_chunks(reads) == [None] * 30
        assert_equal(reads, writes)


def test_a_target_that_failed_is_avoided(
    remote: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    avoid_for_good(monkeypatch)
    client = remote.client()
    writes = stored(remote, [1000] * 30)
    remote.servers[2].script = always(Fault(lose=True))
    assert client.read_chunks(reads_of(writes)) == [None] * 30
    asked = len(remote.servers[2].requests)
    assert asked
    for _ in range(5):
        assert client.read_chunks(reads_of(writes)) == [None] * 30
    assert len(remote.servers[2].requests) == asked


def test_an_old_map_is_noticed(remote: FakeCluster) -> None:
    """The chain has moved on to other members, and the reader has not heard of it."""
    client = remote.client()
    remote.set_chain(CHAIN, [1])
    (write,) = stored(remote, [100])
    assert read_one(client, write) is None
    (moved,) = make_writes([4000], first_inode=50, chains=[CHAIN])
    remote.set_chain(CHAIN, [2, 3])
    for target_id in (2, 3):
        new = m.WholeChunk(50, 0, CHAIN, moved.size, moved.crc32c, moved.key)
        remote.servers[target_id].take(new, bytes(moved.view[: moved.size]))
    assert read_one(client, moved) is None
    assert remote.servers[1].named(m.ReadChunks)


# --- all replicas


def fail_all(cluster: FakeCluster, script: Script) -> None:
    for server in cluster.servers.values():
        server.script = script


def test_lost_everywhere(cluster: FakeCluster) -> None:
    client = cluster.client()
    (write,) = make_writes([100], chains=[CHAIN])
    refreshes = cluster.refreshes
    assert isinstance(read_one(client, write), ChunkNotFound)
    # Of a map that was fetched after the read began.
    assert cluster.refreshes > refreshes
    assert client.statistics()["missing_chunks"] == 1


def test_nothing_is_lost_while_one_cannot_be_asked(cluster: FakeCluster) -> None:
    """The caller removes blocks that are lost: one that is away may have them."""
    client = cluster.client()
    (write,) = make_writes([100], chains=[CHAIN])
    cluster.servers[3].stop()
    assert isinstance(read_one(client, write), ConnectionLost)


def test_damaged_here_and_gone_there(remote: FakeCluster) -> None:
    client = remote.client()
    (write,) = stored(remote, [100])
    chunk = ChunkId(write.chunk.inode, 0, CHAIN)
    del remote.servers[1].chunks[chunk]
    for target_id in (2, 3):
        found = remote.servers[target_id].chunks[chunk]
        remote.servers[target_id].chunks[chunk] = Stored(b"\0" * 100, found.info)
    assert isinstance(read_one(client, write), ChunkCorrupt)
    assert client.statistics()["bad_chunks"] == 1
    assert client.statistics()["repairs_asked"] == 0


def test_another_block_under_this_name(remote: FakeCluster) -> None:
    client = remote.client()
    (write,) = stored(remote, [100])
    write.key = b"another key".ljust(32)
    assert isinstance(read_one(client, write), ChunkMismatch)


def test_fenced_for_a_moment(cluster: FakeCluster) -> None:
    client = cluster.client()
    (write,) = stored(cluster, [2000])
    fail_all(cluster, first(2, Fault(error=TargetFenced())))
    assert read_one(client, write) is None


def test_fenced_for_good(cluster: FakeCluster) -> None:
    client = cluster.client()
    (write,) = stored(cluster, [2000])
    fail_all(cluster, always(Fault(error=TargetFenced(3))))
    assert isinstance(read_one(client, write), TargetFenced)


def test_nobody_serves(remote: FakeCluster) -> None:
    client = remote.client()
    (write,) = stored(remote, [2000])
    for server in remote.servers.values():
        server.state = TargetState.OFFLINE
    remote.refresh()
    assert isinstance(read_one(client, write), NoTarget)


def test_what_the_caller_did_wrong_is_not_repeated(remote: FakeCluster) -> None:
    client = remote.client()
    (write,) = stored(remote, [2000])
    fail_all(remote, always(Fault(error=InvalidRequest())))
    assert isinstance(read_one(client, write), InvalidRequest)
    assert sum(len(s.requests) for s in remote.servers.values()) == 1


def test_closing_ends_the_wait(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.client.chain_reads.CHAIN_READ_SECONDS", 1e6)
    client = cluster.client()
    (write,) = stored(cluster, [2000])
    fail_all(cluster, always(Fault(error=TargetFenced(3))))
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(read_one(client, write)))
    reader.start()
    wait_until(lambda: client.statistics()["replica_retries"] > 6)
    client.close()
    reader.join(SECONDS)
    (error,) = results  # the former if it was about to ask somebody
    assert isinstance(error, ConnectionLost | TargetFenced)


# --- repairs


def test_a_bad_replica_is_reported(cluster: FakeCluster) -> None:
    client = cluster.client()
    writes = stored(cluster, [1000] * 12)
    for write in writes:
        chunk = ChunkId(write.chunk.inode, 0, CHAIN)
        server = cluster.servers[asked_first(cluster, client, write)]
        if write.chunk.inode % 2:
            del server.chunks[chunk]
        else:
            server.chunks[chunk] = Stored(b"x" * 1000, server.chunks[chunk].info)
    for _ in range(2):
        reads = reads_of(writes)
        assert client.read_chunks(reads) == [None] * 12
        assert_equal(reads, writes)
    wait_until(lambda: client.statistics()["repairs_asked"] == 12)
    wait_until(
        lambda: all(
            found is not None and found.data == bytes(w.view[:1000])
            for w in writes
            for _, found in cluster.everywhere(ChunkId(w.chunk.inode, 0, CHAIN))
        )
    )
    asked = client.statistics()["replica_retries"]
    assert client.read_chunks(reads_of(writes)) == [None] * 12
    assert client.statistics()["replica_retries"] == asked


def test_reports_are_bounded(remote: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.client.repairs.REPAIRS_QUEUED_MAX", 3)
    client = remote.client()
    held = threading.Event()
    writes = stored(remote, [100] * 200)
    for server in remote.servers.values():
        server.script = always(Fault(wait=held), m.RepairChunks)
    for write in writes:
        chunk = ChunkId(write.chunk.inode, 0, CHAIN)
        del remote.servers[asked_first(remote, client, write)].chunks[chunk]
    for write in writes:
        assert read_one(client, write) is None
    held.set()
    wait_until(lambda: client.statistics()["repairs_asked"] >= 3)
    # One request under way, of what was queued then, and as many as may wait.
    assert client.statistics()["repairs_asked"] <= 6


# --- hedges


def slow_one(cluster: FakeCluster, client: ChunkClient, write: ChunkWrite) -> threading.Event:
    """The replica that is asked first answers when the event is set."""
    event = threading.Event()
    server = cluster.servers[asked_first(cluster, client, write)]
    server.script = first(1, Fault(wait=event))
    return event


def test_a_slow_replica_is_overtaken(cluster: FakeCluster) -> None:
    client = cluster.client(hedges=True)
    writes = stored(cluster, [MIB, 70_000, 1])
    event = slow_one(cluster, client, writes[0])
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * 3
    assert_equal(reads, writes)
    figures = client.statistics()
    assert figures["hedged_reads"] >= 1
    assert figures["hedges_won"] >= 1
    for read in reads:
        read.view[:] = bytes(len(read.view))
    # What comes late meets a closed connection, not the caller's memory.
    event.set()
    slow = cluster.servers[asked_first(cluster, client, writes[0])]
    other = stored(cluster, [100])
    assert read_one(client, other[0]) is None
    slow.stop()
    assert all(bytes(read.view) == bytes(len(read.view)) for read in reads)


def test_the_first_may_still_win(remote: FakeCluster) -> None:
    client = remote.client(hedges=True)
    (write,) = stored(remote, [MIB])
    slow = asked_first(remote, client, write)
    mine, theirs = threading.Event(), threading.Event()
    for n, server in remote.servers.items():
        server.script = first(1, Fault(wait=mine if n == slow else theirs))
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(read_one(client, write)))
    reader.start()
    wait_until(lambda: client.statistics()["hedged_reads"] == 1)
    mine.set()
    reader.join(SECONDS)
    assert results == [None]
    assert client.statistics()["hedges_won"] == 0
    theirs.set()


def test_a_hedge_that_fails_changes_nothing(remote: FakeCluster) -> None:
    client = remote.client(hedges=True)
    (write,) = stored(remote, [MIB])
    slow = asked_first(remote, client, write)
    mine = threading.Event()
    for n, server in remote.servers.items():
        server.script = first(1, Fault(wait=mine) if n == slow else Fault(error=ChunkCorrupt()))
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(read_one(client, write)))
    reader.start()
    wait_until(lambda: sum(len(s.requests) for s in remote.servers.values()) == 2)
    mine.set()
    reader.join(SECONDS)
    assert results == [None]
    assert client.statistics()["hedges_won"] == 0


def test_a_first_that_breaks_waits_for_its_hedge(remote: FakeCluster) -> None:
    client = remote.client(hedges=True)
    (write,) = stored(remote, [MIB])
    slow = asked_first(remote, client, write)
    mine, theirs = threading.Event(), threading.Event()
    for n, server in remote.servers.items():
        server.script = first(1, Fault(wait=mine, lose=True) if n == slow else Fault(wait=theirs))
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(read_one(client, write)))
    reader.start()
    wait_until(lambda: client.statistics()["hedged_reads"] == 1)
    mine.set()
    wait_until(lambda: remote.servers[slow].script(m.StatChunks(1, ())) is None)
    theirs.set()
    reader.join(SECONDS)
    assert results == [None]


def test_hedges_are_bounded(remote: FakeCluster) -> None:
    """All replicas hang: no more second requests than buffers."""
    client = remote.client(hedges=True)
    writes = stored(remote, [MIB] * 24)
    event = threading.Event()
    fail_all(remote, always(Fault(wait=event)))
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.extend(client.read_chunks(reads_of(writes))))
    reader.start()
    wait_until(lambda: client.statistics()["hedged_reads"] == HEDGES_AT_ONCE)
    event.set()
    reader.join(SECONDS)
    assert results == [None] * 24


def test_what_is_too_large_for_a_buffer_is_not_hedged(remote: FakeCluster) -> None:
    client = remote.client(hedges=True)
    (write,) = stored(remote, [TRANSFER_BYTES + 1])
    event = slow_one(remote, client, write)
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(read_one(client, write)))
    reader.start()
    wait_until(lambda: any(s.requests for s in remote.servers.values()))
    event.set()
    reader.join(SECONDS)
    assert results == [None]
    assert client.statistics()["hedged_reads"] == 0


def test_closing_ends_hedged_reads(remote: FakeCluster) -> None:
    client = remote.client(hedges=True)
    (write,) = stored(remote, [MIB])
    fail_all(remote, always(Fault(wait=threading.Event())))
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(read_one(client, write)))
    reader.start()
    wait_until(lambda: client.statistics()["hedged_reads"] == 1)
    client.close()
    reader.join(SECONDS)
    assert [type(r) for r in results] == [ConnectionLost]


# --- descriptors


def test_open_sealed_leaves_trouble_to_read_chunks() -> None:
    cluster = FakeCluster(3, local=[1])
    cluster.start()
    try:
        cluster.set_chain(CHAIN, [1, 2, 3])
        client = cluster.client()
        (write,) = stored(cluster, [3000])
        descriptor = client.open_sealed(write.chunk, CHAIN)
        with open(descriptor, "rb") as file:
            assert file.read() == write.view[:3000]
        chunk = ChunkId(write.chunk.inode, 0, CHAIN)
        info = cluster.servers[1].chunks[chunk].info
        cluster.servers[1].chunks[chunk] = Stored(b"x" * 3000, info)
        with pytest.raises(NoTarget):
            client.open_sealed(write.chunk, CHAIN)
        cluster.servers[1].stop()
        with pytest.raises(NoTarget):
            client.open_sealed(write.chunk, CHAIN)
        assert read_one(client, write) is None
    finally:
        cluster.stop()


# --- bytes that change on their way


def stored_with(cluster: FakeCluster, copies: int, sizes: list[int]) -> list[ChunkWrite]:
    """On a chain of so many copies. Chunks of single copies are named by no chain."""
    writes = stored(cluster, sizes)
    if copies > 1:
        return writes
    cluster.set_chain(4, [1], copies=1)
    for server in cluster.servers.values():
        for chunk, found in list(server.chunks.items()):
            info = msgspec.structs.replace(found.info, chain=0)
            server.chunks[ChunkId(chunk.inode, 0)] = Stored(found.data, info)
    return [dataclasses.replace(write, chain=4) for write in writes]


@pytest.mark.parametrize("flips", [1, 2, 3])
@pytest.mark.parametrize("copies", [1, 3])
def test_flips_in_a_row_are_no_damage(remote: FakeCluster, flips: int, copies: int) -> None:
    """The disks are right, and the servers say so."""
    client = remote.client()
    writes = stored_with(remote, copies, [3000, 5000])
    for server in remote.servers.values():
        server.script = first(flips, Fault(flip=True), m.ReadChunks)
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * 2
    assert_equal(reads, writes)
    assert client.statistics()["repairs_asked"] == client.statistics()["bad_chunks"] == 0


@pytest.mark.parametrize("copies", [1, 3])
def test_a_way_that_flips_all_loses_no_block(remote: FakeCluster, copies: int) -> None:
    """Whoever is told that a block is damaged or missing removes it."""
    client = remote.client()
    (write,) = stored_with(remote, copies, [3000])
    for server in remote.servers.values():
        server.script = always(Fault(flip=True), m.ReadChunks)
    assert type(read_one(client, write)) is ConnectionLost
    for server in remote.servers.values():
        server.script = lambda request: None
    assert read_one(client, write) is None


def test_what_is_damaged_on_the_disk_is_damaged(remote: FakeCluster) -> None:
    client = remote.client()
    (write,) = stored_with(remote, 1, [3000])
    kept, name = remote.servers[1].chunks, write.chunk
    kept[name] = Stored(b"x" + kept[name].data[1:], kept[name].info)
    asked = len(remote.servers[1].requests)
    assert type(read_one(client, write)) is ChunkCorrupt
    assert len(remote.servers[1].requests) == asked + 2, "it is asked to look, once"
