"""Writing blocks to replicated chains while members come, go and fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from chain_fakes import SECONDS, FakeCluster, Fault, always, first
from kvfs_base.cluster import TargetState
from kvfs_base.errors import (
    ChunkCorrupt,
    ConnectionLost,
    DiskFull,
    KvfsError,
    NoTarget,
    StaleChain,
    TargetFailed,
    TargetFenced,
)
from kvfs_base.limits import MIB
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkWrite
from t2_services.chunk_cluster import assert_equal, make_writes, reads_of, wait_until

CHAIN = 7


@pytest.fixture(params=["remote", "local"])
def cluster(request: pytest.FixtureRequest) -> Iterator[FakeCluster]:
    """A chain of targets 1 to 3; with ``local`` 2 is on the clients' host."""
    cluster = FakeCluster(4, local=[2] if request.param == "local" else [])
    cluster.start()
    cluster.set_chain(CHAIN, [1, 2, 3])
    yield cluster
    cluster.stop()


@pytest.fixture
def remote() -> Iterator[FakeCluster]:
    cluster = FakeCluster(4)
    cluster.start()
    cluster.set_chain(CHAIN, [1, 2, 3])
    yield cluster
    cluster.stop()


def assert_everywhere(cluster: FakeCluster, writes: list[ChunkWrite]) -> None:
    for write in writes:
        chunk = ChunkId(write.chunk.inode, 0, CHAIN)
        for _, found in cluster.everywhere(chunk):
            assert found is not None
            assert found.data == bytes(write.view[: write.size])
            assert found.info.key == write.key


def test_all_members_get_every_block(cluster: FakeCluster) -> None:
    client = cluster.client()
    writes = make_writes([MIB, 1, 5000, 0, 3 * MIB, 4096] * 3, chains=[CHAIN])
    assert client.write_chunks(writes) == [None] * len(writes)
    assert_everywhere(cluster, writes)
    assert {w.version for w in writes} == {1}
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * len(writes)
    assert_equal(reads, writes)
    assert client.statistics()["chunks_written"] == len(writes)


def test_those_that_are_brought_in_step_get_it_too(cluster: FakeCluster) -> None:
    cluster.set_chain(CHAIN, [1, 2], syncing=[4, 3])
    writes = make_writes([5000] * 5, chains=[CHAIN])
    assert cluster.client().write_chunks(writes) == [None] * 5
    assert_everywhere(cluster, writes)
    assert {w.version for w in writes} == {2}


def test_the_first_of_a_pass_changes(remote: FakeCluster) -> None:
    writes = make_writes([100] * 60, chains=[CHAIN])
    assert remote.client().write_chunks(writes) == [None] * 60
    taken = {n: s.named(m.WriteChunks) for n, s in remote.servers.items()}
    assert [sum(len(r.chunks) for r in taken[n]) for n in (1, 2, 3)] != [60, 0, 0]
    for n in (1, 2, 3):
        for request in taken[n]:
            assert sorted((n, *request.passing.hops)) == [1, 2, 3]
            assert (request.passing.chain, request.passing.version) == (CHAIN, 1)


def test_a_local_member_gets_it_by_descriptor() -> None:
    cluster = FakeCluster(3, local=[2])
    cluster.start()
    try:
        cluster.set_chain(CHAIN, [1, 2, 3])
        writes = make_writes([10_000] * 4, chains=[CHAIN])
        assert cluster.client().write_chunks(writes) == [None] * 4
        assert_everywhere(cluster, writes)
        (published,) = cluster.servers[2].named(m.PublishChunks)
        assert published.passing == m.Passing(CHAIN, 1)
        assert not cluster.servers[2].named(m.WriteChunks)
        for n in (1, 3):
            for request in cluster.servers[n].named(m.WriteChunks):
                assert request.passing.hops == (4 - n,)
    finally:
        cluster.stop()


def test_the_last_copy_left(cluster: FakeCluster) -> None:
    """A chain of several copies with one member keeps its tree and its version."""
    cluster.set_chain(CHAIN, [2])
    writes = make_writes([10_000] * 4, chains=[CHAIN])
    assert cluster.client().write_chunks(writes) == [None] * 4
    assert_everywhere(cluster, writes)


def test_single_copies_and_chains_in_one_batch(remote: FakeCluster) -> None:
    remote.set_chain(1, [4], copies=1)
    writes = make_writes([1000] * 10, chains=[CHAIN, 1])
    assert remote.client().write_chunks(writes) == [None] * 10
    assert_everywhere(remote, writes[0::2])
    assert {w.version for w in writes[1::2]} == {0}
    assert {request.passing for request in remote.servers[4].named(m.WriteChunks)} == {None}
    assert set(remote.servers[4].chunks) == {ChunkId(w.chunk.inode, 0) for w in writes[1::2]}


# --- members that change


def test_an_old_version_is_noticed(cluster: FakeCluster) -> None:
    client = cluster.client()
    client.router.chain(CHAIN)
    cluster.set_chain(CHAIN, [3, 4])
    writes = make_writes([7000] * 6, chains=[CHAIN])
    assert client.write_chunks(writes) == [None] * 6
    assert_everywhere(cluster, writes)
    assert {w.version for w in writes} == {2}


@pytest.mark.parametrize(
    "error", [TargetFenced(1), TargetFailed(1), ConnectionLost(), StaleChain(CHAIN, 2)]
)
def test_a_member_in_trouble_is_tried_again(cluster: FakeCluster, error: KvfsError) -> None:
    for server in cluster.servers.values():
        server.script = first(1, Fault(error=error))
    writes = make_writes([7000] * 6, chains=[CHAIN])
    assert cluster.client().write_chunks(writes) == [None] * 6
    assert_everywhere(cluster, writes)


@pytest.mark.parametrize("lost", [Fault(lose=True), Fault(lose_answer=True)])
def test_lost_connections_are_tried_again(cluster: FakeCluster, lost: Fault) -> None:
    for server in cluster.servers.values():
        server.script = first(2, lost)
    writes = make_writes([7000] * 6, chains=[CHAIN])
    assert cluster.client().write_chunks(writes) == [None] * 6
    assert_everywhere(cluster, writes)


def in_background(client: ChunkClient, writes: list[ChunkWrite]) -> Callable[[], list[object]]:
    results: list[object] = []
    writer = threading.Thread(target=lambda: results.extend(client.write_chunks(writes)))
    writer.start()

    def finish() -> list[object]:
        writer.join(SECONDS)
        return results

    return finish


def test_a_write_waits_until_a_dead_member_is_left_out(cluster: FakeCluster) -> None:
    client = cluster.client()
    cluster.servers[3].stop()
    writes = make_writes([7000] * 6, chains=[CHAIN])
    finish = in_background(client, writes)
    seen = cluster.refreshes
    wait_until(lambda: cluster.refreshes > seen + 2)
    cluster.set_chain(CHAIN, [1, 2])
    assert finish() == [None] * 6
    assert_everywhere(cluster, writes)
    assert {w.version for w in writes} == {2}


def test_a_member_without_a_way_is_waited_for(cluster: FakeCluster) -> None:
    """Its server is known to be away, and the chain has not changed yet: nobody else is asked to
    do without it."""
    cluster.servers[1].state = cluster.servers[3].state = TargetState.OFFLINE
    cluster.servers[1].stop()
    cluster.servers[3].stop()
    writes = make_writes([7000] * 2, chains=[CHAIN])
    finish = in_background(cluster.client(), writes)
    seen = cluster.refreshes
    wait_until(lambda: cluster.refreshes > seen + 2)
    cluster.set_chain(CHAIN, [2])
    assert finish() == [None] * 2
    assert_everywhere(cluster, writes)


def test_a_chain_that_never_recovers(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.client.chain_writes.CHAIN_WRITE_SECONDS", 0.2)
    cluster.servers[3].stop()
    client = cluster.client()
    assert {type(r) for r in client.write_chunks(make_writes([100] * 3, chains=[CHAIN]))} == {
        ConnectionLost
    }
    assert client.statistics()["failed_writes"] == 3


def test_nobody_serves(cluster: FakeCluster) -> None:
    """That is not waited for: for a cache there is nothing to lose."""
    for server in cluster.servers.values():
        server.state = TargetState.OFFLINE
    (result,) = cluster.client().write_chunks(make_writes([100], chains=[CHAIN]))
    assert isinstance(result, NoTarget)


@pytest.mark.parametrize(("error", "requests"), [(DiskFull(), 1), (ChunkCorrupt(), 2)])
def test_what_time_does_not_heal(remote: FakeCluster, error: KvfsError, requests: int) -> None:
    """Bytes that do not match are sent once more: they may have broken on their way."""
    for server in remote.servers.values():
        server.script = always(Fault(error=error))
    (result,) = remote.client().write_chunks(make_writes([100], chains=[CHAIN]))
    assert type(result) is type(error)
    assert sum(len(s.requests) for s in remote.servers.values()) == requests


def test_bytes_that_broke_on_their_way(cluster: FakeCluster) -> None:
    for server in cluster.servers.values():
        server.script = first(1, Fault(error=ChunkCorrupt()), m.WriteChunks)
    writes = make_writes([7000] * 3, chains=[CHAIN])
    # One request to the first of a pass, then, the order being the same, another to it.
    results = cluster.client().write_chunks(writes)
    assert results == [None] * 3
    assert_everywhere(cluster, writes)


def test_closing_ends_the_wait(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.client.chain_writes.CHAIN_WRITE_SECONDS", 1e6)
    client = cluster.client()
    for server in cluster.servers.values():
        server.script = always(Fault(error=TargetFenced(1)))
    finish = in_background(client, make_writes([100], chains=[CHAIN]))
    wait_until(lambda: sum(len(s.requests) for s in cluster.servers.values()) > 4)
    client.close()
    assert len(finish()) == 1
