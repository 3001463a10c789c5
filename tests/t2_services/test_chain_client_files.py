"""Files on replicated chains, against a model and with servers that fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from chain_fakes import SECONDS, FakeCluster, Fault, Stored, always, first
from kvfs_base.cluster import ClusterMap, TargetState
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    ChunkPending,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    DiskFull,
    InternalError,
    KvfsError,
    NoTarget,
    StaleChain,
    TargetFenced,
    WriteUncertain,
)
from kvfs_base.limits import MIB, TRANSFER_BYTES
from kvfs_base.seams import Buffer
from kvfs_base.types import ChunkId, Layout
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.format import ChunkInfo, ChunkState
from t2_services.chunk_cluster import wait_until
from t2_services.test_chunk_files import CHUNK_BYTES, LAYOUT, FileMachine

INODE = 7
LARGE = Layout(MIB, (1, 2, 3))


@pytest.fixture(params=["remote", "local"])
def cluster(request: pytest.FixtureRequest) -> Iterator[FakeCluster]:
    """Chains 1 to 3, with different heads; with ``local`` target 2 is on the clients' host."""
    cluster = FakeCluster(3, local=[2] if request.param == "local" else [])
    cluster.start()
    cluster.set_chain(1, [1, 2, 3])
    cluster.set_chain(2, [2, 3])
    cluster.set_chain(3, [3, 1])
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.client.chain_reads.CHAIN_READ_SECONDS", 0.2)


def new_file(
    client: ChunkClient, layout: Layout = LAYOUT, retry_seconds: float = SECONDS
) -> StripedFile:
    return StripedFile(client, INODE, layout, retry_seconds=retry_seconds)


def updates(cluster: FakeCluster) -> list[m.Update]:
    """All that heads were asked, in the order of the targets."""
    return [
        update
        for server in cluster.servers.values()
        for request in server.named(m.UpdateChunks)
        for update in request.updates
    ]


def assert_quiet(cluster: FakeCluster) -> None:
    """All members of each chain have the same."""
    for server in cluster.servers.values():
        for chunk in server.chunks:
            if chunk.chain:
                found = {
                    None if stored is None else (stored.data, stored.info.version)
                    for _, stored in cluster.everywhere(chunk)
                }
                assert len(found) == 1


# --- the model


class PersistentFile(StripedFile):
    """Who has seen an older version than there is may be told that a lost write is uncertain.
    Nobody else writes here at the same time: it may be done again."""

    def write(self, offset: int, data: Buffer) -> None:
        try:
            super().write(offset, data)
        except WriteUncertain:
            super().write(offset, data)

    def truncate(self, old_size: int, new_size: int) -> None:
        try:
            super().truncate(old_size, new_size)
        except WriteUncertain:
            super().truncate(old_size, new_size)


def persistent_file(client: ChunkClient, inode: int) -> StripedFile:
    return PersistentFile(client, inode, LAYOUT, retry_seconds=SECONDS)


def test_random_operations_against_the_model(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are lost, heads are refused, chains change: the model does not notice."""
    monkeypatch.setattr("t2_services.test_chunk_files.new_file", persistent_file)

    class Machine(FileMachine):
        @rule(
            target_id=st.integers(1, 3),
            fault=st.sampled_from(
                [
                    Fault(lose=True),
                    Fault(lose_answer=True),
                    Fault(cut=10),
                    Fault(error=TargetFenced()),
                    Fault(error=StaleChain()),
                ]
            ),
        )
        def trouble(self, target_id: int, fault: Fault) -> None:
            self.fakes.servers[target_id].script = first(1, fault)

        @rule(chain=st.integers(1, 3), shift=st.integers(0, 2))
        def change(self, chain: int, shift: int) -> None:
            members = self.fakes.chain(chain).targets
            shift %= len(members)
            self.fakes.set_chain(chain, members[shift:] + members[:shift])

        def teardown(self) -> None:
            if hasattr(self, "files"):
                assert_quiet(self.fakes)
                for client in self.clients:
                    client.close()
                    self.fakes.clients.remove(client)

    Machine.cluster = cluster  # type: ignore[assignment]
    Machine.fakes = cluster  # type: ignore[attr-defined]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- reading


def written(cluster: FakeCluster, data: bytes, layout: Layout = LAYOUT) -> None:
    file = new_file(cluster.client(), layout)
    file.write(0, data)
    file.close()


def test_a_file_comes_back(cluster: FakeCluster) -> None:
    data = os.urandom(5 * MIB + 12_345)
    written(cluster, data, LARGE)
    assert_quiet(cluster)
    file = new_file(cluster.client(), LARGE)
    assert file.read(0, len(data), len(data), False) == data
    assert file.read(3 * MIB - 5, 10, len(data), False) == data[3 * MIB - 5 : 3 * MIB + 5]
    assert file.read(len(data) - 3, 100, len(data), False) == data[-3:]
    assert file.read_now(0, 10, len(data), False) is None
    for server in cluster.servers.values():
        assert all(c.chain for c in server.chunks)
        assert not server.named(m.OpenForWrite)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(lose=True),
        Fault(cut=100),
        Fault(flip=True),
        Fault(error=TargetFenced()),
        Fault(error=DeadlineExceeded()),
        Fault(error=InternalError()),
    ],
)
def test_a_reader_takes_the_next_replica(cluster: FakeCluster, fault: Fault) -> None:
    data = os.urandom(5000)
    written(cluster, data)
    cluster.servers[2].script = always(fault, m.ReadPieces)
    file = new_file(cluster.client())
    for _ in range(3):
        assert file.read(0, 5000, 5000, False) == data


def test_holes(cluster: FakeCluster) -> None:
    written(cluster, b"x")
    file = new_file(cluster.client())
    assert file.read(0, 5000, 5000, True) == b"x" + bytes(4999)
    with pytest.raises(ChunkNotFound):
        file.read(0, 5000, 5000, False)


def test_half_a_transfer_leaves_nothing_in_a_hole(cluster: FakeCluster) -> None:
    """The first replica breaks off in the middle of a chunk that the others do not have."""
    written(cluster, b"y" * 1000)
    chunk = ChunkId(INODE, 0, 1)
    keeper, *others = cluster.client().router.chain(1).in_order(chunk, set())
    for route in others:
        del cluster.servers[route.target_id].chunks[chunk]
    cluster.servers[keeper.target_id].script = always(Fault(cut=500))
    file = new_file(cluster.client(), retry_seconds=0)
    try:
        assert file.read(0, 1000, 1000, True) in (bytes(1000), b"y" * 1000)
    except ConnectionLost:
        pass


def test_pending_asks_the_tail(cluster: FakeCluster) -> None:
    data = os.urandom(1000)
    written(cluster, data)
    for target_id in (1, 2):
        cluster.servers[target_id].script = always(Fault(error=ChunkPending()), m.ReadPieces)
    file = new_file(cluster.client())
    for _ in range(5):
        assert file.read(0, 1000, 1000, False) == data
    # Whoever was asked first: the tail was the second at the latest.
    assert len(cluster.servers[3].named(m.ReadPieces)) == 5


def test_pending_everywhere_is_waited_for(cluster: FakeCluster) -> None:
    data = os.urandom(1000)
    written(cluster, data)
    for server in cluster.servers.values():
        server.script = first(4, Fault(error=ChunkPending()), m.ReadPieces)
    assert new_file(cluster.client()).read(0, 1000, 1000, False) == data


def test_a_bad_piece_is_reported(cluster: FakeCluster) -> None:
    data = os.urandom(1000)
    written(cluster, data)
    client = cluster.client()
    bad = client.router.chain(1).in_order(ChunkId(INODE, 0, 1), set())[0].target_id
    cluster.servers[bad].script = first(1, Fault(error=ChunkCorrupt()), m.ReadPieces)
    assert new_file(client).read(0, 1000, 1000, False) == data
    wait_until(lambda: cluster.servers[bad].named(m.RepairChunks))


def test_a_slow_piece_is_overtaken(cluster: FakeCluster) -> None:
    data = os.urandom(MIB)
    written(cluster, data, LARGE)
    client = cluster.client(hedges=True)
    slow = client.router.chain(1).in_order(ChunkId(INODE, 0, 1), set())[0].target_id
    event = threading.Event()
    cluster.servers[slow].script = first(1, Fault(wait=event), m.ReadPieces)
    assert new_file(client, LARGE).read(0, MIB, MIB, False) == data
    assert client.statistics()["hedges_won"] == 1
    event.set()


# --- writing


def test_writes_go_to_the_head_and_know_their_base(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"a" * 2500)
    file.write(2500, b"b" * 700)
    file.write(10, b"c")
    for target_id, chain in ((1, 1), (2, 2), (3, 3)):
        for request in cluster.servers[target_id].named(m.UpdateChunks):
            assert request.passing == m.Passing(chain, 1)
    sent = updates(cluster)
    assert {(u.again, u.base) for u in sent if u.number == 0} == {(False, 0), (False, 1)}
    assert {(u.again, u.base) for u in sent if u.number == 2} == {(False, 0), (False, 1)}
    assert len({u.writer for u in sent}) == 1
    assert len({u.sequence for u in sent}) == len(sent)
    assert_quiet(cluster)


def test_a_stream_asks_for_versions_once_in_a_while(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    for number in range(40):
        file.write(number * CHUNK_BYTES, b"x" * CHUNK_BYTES)
    asked = sum(len(s.named(m.StatChunks)) for s in cluster.servers.values())
    assert asked <= 6
    assert all(u.base == 0 for u in updates(cluster))


def test_what_was_there_before_is_known(cluster: FakeCluster) -> None:
    written(cluster, b"a" * CHUNK_BYTES)
    written(cluster, b"b" * CHUNK_BYTES)
    file = new_file(cluster.client())
    file.write(100, b"c")
    assert [u.base for u in updates(cluster)] == [0, 1, 2]


def test_who_has_read_knows_the_version(cluster: FakeCluster) -> None:
    written(cluster, b"a" * CHUNK_BYTES)
    file, other = new_file(cluster.client()), new_file(cluster.client())
    file.write(0, b"b")
    other.write(1, b"c")
    assert file.read(0, 2, 2, False) == b"bc"
    file.write(0, b"d")
    assert [u.base for u in updates(cluster)] == [0, 1, 2, 3]


def test_what_was_removed_is_asked_for_again(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"a" * 900)
    file.truncate(900, 0)
    cluster.servers[1].script = first(1, Fault(lose=True), m.UpdateChunks)
    file.write(0, b"b")
    assert [u.base for u in updates(cluster)] == [0, 2, 2]


def test_who_was_told_that_it_is_uncertain_asks_before_the_next_write(
    cluster: FakeCluster,
) -> None:
    file = new_file(cluster.client())
    file.write(0, b"old")
    new_file(cluster.client()).write(0, b"new")
    cluster.servers[1].script = first(2, Fault(lose=True), m.UpdateChunks)
    with pytest.raises(WriteUncertain):
        file.write(0, b"mine")
    file.write(0, b"mine")
    assert updates(cluster)[-1].base == 2


def test_a_cut_asks_what_is_there(cluster: FakeCluster) -> None:
    written(cluster, b"a" * 900)
    cluster.servers[1].script = first(1, Fault(lose=True), m.UpdateChunks)
    new_file(cluster.client()).truncate(900, 100)
    assert [u.base for u in updates(cluster)] == [0, 1, 1]


def test_two_clients_have_different_writers(cluster: FakeCluster) -> None:
    for _ in range(2):
        written(cluster, b"x")
    assert len({u.writer for u in updates(cluster)}) == 2


def test_small_pieces_share_requests(cluster: FakeCluster) -> None:
    """One request to each head, however many chunks."""
    written(cluster, os.urandom(60 * CHUNK_BYTES))
    assert sum(len(s.named(m.UpdateChunks)) for s in cluster.servers.values()) == 3


def test_large_writes_go_over_several_connections(cluster: FakeCluster) -> None:
    data = os.urandom(12 * MIB)
    written(cluster, data, LARGE)
    for server in cluster.servers.values():
        assert len(server.named(m.UpdateChunks)) == 4
    assert new_file(cluster.client(), LARGE).read(0, len(data), len(data), False) == data


def test_chunks_larger_than_a_request(cluster: FakeCluster) -> None:
    layout = Layout(2 * TRANSFER_BYTES, (1,))
    data = os.urandom(TRANSFER_BYTES + MIB)
    written(cluster, data, layout)
    assert new_file(cluster.client(), layout).read(0, len(data), len(data), False) == data


@pytest.mark.parametrize(
    "fault",
    [
        Fault(lose=True),
        Fault(lose_answer=True),
        Fault(error=TargetFenced()),
        Fault(error=StaleChain()),
        Fault(error=Conflict()),
        Fault(error=DeadlineExceeded()),
    ],
)
def test_an_update_happens_once(cluster: FakeCluster, fault: Fault) -> None:
    file = new_file(cluster.client())
    file.write(0, b"before")
    for server in cluster.servers.values():
        server.script = first(3, fault, m.UpdateChunks)
    file.write(3, b"again")
    assert file.read(0, 8, 8, False) == b"befagain"
    for _, found in cluster.everywhere(ChunkId(INODE, 0, 1)):
        assert found is not None
        assert found.info.version == 2


def test_what_was_refused_is_not_sent_as_a_repetition(cluster: FakeCluster) -> None:
    cluster.servers[1].script = first(1, Fault(error=StaleChain()), m.UpdateChunks)
    new_file(cluster.client()).write(0, b"x")
    assert [u.again for u in updates(cluster)] == [False, False]


def test_a_lost_answer_makes_a_repetition(cluster: FakeCluster) -> None:
    cluster.servers[1].script = first(1, Fault(lose_answer=True), m.UpdateChunks)
    new_file(cluster.client()).write(0, b"x")
    first_sent, second = updates(cluster)
    assert [first_sent.again, second.again] == [False, True]
    assert (first_sent.writer, first_sent.sequence) == (second.writer, second.sequence)


def test_a_head_that_dies_with_an_update(cluster: FakeCluster) -> None:
    """It reached nobody, and the new head does not know it: neither a new chunk's first one, nor a
    later one is refused."""
    file = new_file(cluster.client())

    def die(request: m.ChunkRequest) -> Fault | None:
        if not isinstance(request, m.UpdateChunks):
            return None
        head, *others = cluster.chain(1).targets
        cluster.servers[head].script = lambda request: None
        cluster.set_chain(1, [*others, head])
        return Fault(lose=True)

    cluster.servers[1].script = die
    file.write(0, b"x" * 10)
    cluster.servers[2].script = die
    file.write(10, b"y" * 10)
    assert file.read(0, 20, 20, False) == b"x" * 10 + b"y" * 10
    assert sum(u.again for u in updates(cluster)) >= 2
    assert_quiet(cluster)


def test_somebody_else_has_written_since(cluster: FakeCluster) -> None:
    """The answer is lost, another one writes, and nobody remembers: it must not be done now."""
    file = new_file(cluster.client())
    file.write(0, b"old")
    other = new_file(cluster.client())

    def forget(request: m.ChunkRequest) -> Fault | None:
        if not isinstance(request, m.UpdateChunks):
            return None
        cluster.servers[1].script = lambda request: None
        return Fault(lose=True, wait=meanwhile)

    meanwhile = threading.Event()
    cluster.servers[1].script = forget
    errors: list[KvfsError] = []

    def write() -> None:
        try:
            file.write(0, b"mine")
        except KvfsError as exc:
            errors.append(exc)

    writer = threading.Thread(target=write)
    writer.start()
    wait_until(lambda: len(updates(cluster)) == 2)
    other.write(0, b"newer")
    meanwhile.set()
    writer.join(SECONDS)
    assert [type(e) for e in errors] == [WriteUncertain]
    assert other.read(0, 5, 5, False) == b"newer"


def test_many_writers_of_one_chunk(cluster: FakeCluster) -> None:
    """They take turns, so that each knows what was there before it."""
    file = new_file(cluster.client())
    cluster.servers[1].script = first(6, Fault(lose_answer=True), m.UpdateChunks)
    threads = [
        threading.Thread(target=file.write, args=(100 * n, bytes([n]) * 100)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    expected = b"".join(bytes([n]) * 100 for n in range(8))
    assert file.read(0, 800, 800, False) == expected
    for _, found in cluster.everywhere(ChunkId(INODE, 0, 1)):
        assert found is not None
        assert found.info.version == 8


@pytest.mark.parametrize("error", [DiskFull(), WriteUncertain(), ChunkCorrupt()])
def test_what_a_writer_is_told(cluster: FakeCluster, error: KvfsError) -> None:
    cluster.servers[1].script = always(Fault(error=error), m.UpdateChunks)
    with pytest.raises(type(error)):
        new_file(cluster.client(), retry_seconds=0).write(0, b"x")


def test_writes_wait_for_a_chain_that_changes(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"abc")
    cluster.servers[1].stop()
    done = threading.Event()

    def write() -> None:
        file.write(3, b"def")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = cluster.refreshes
    wait_until(lambda: cluster.refreshes > seen + 2)
    assert not done.is_set()
    cluster.set_chain(1, [2, 3])
    writer.join(SECONDS)
    assert done.is_set()
    assert file.read(0, 6, 6, False) == b"abcdef"


def test_reads_wait_while_nobody_serves(cluster: FakeCluster) -> None:
    written(cluster, b"abc")
    file = new_file(cluster.client())
    for server in cluster.servers.values():
        server.state = TargetState.OFFLINE
    cluster.refresh()
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(file.read(0, 3, 3, False)))
    seen = cluster.refreshes
    reader.start()
    wait_until(lambda: cluster.refreshes > seen + 2)
    assert not results
    for server in cluster.servers.values():
        server.state = TargetState.SERVING
    reader.join(SECONDS)
    assert results == [b"abc"]


def test_nobody_waits_who_does_not_want_to(cluster: FakeCluster) -> None:
    for server in cluster.servers.values():
        server.state = TargetState.OFFLINE
    file = new_file(cluster.client(), retry_seconds=0)
    with pytest.raises(NoTarget):
        file.write(0, b"x")
    with pytest.raises(NoTarget):
        file.read(0, 1, 1, False)


def test_closing_ends_the_wait(cluster: FakeCluster) -> None:
    file = new_file(cluster.client(), retry_seconds=1e6)
    file.write(0, b"x")
    for server in cluster.servers.values():
        server.state = TargetState.OFFLINE
    cluster.refresh()
    errors: list[type[BaseException]] = []

    def fails(action: Callable[[], object]) -> None:
        try:
            action()
        except KvfsError as exc:
            errors.append(type(exc))

    threads = [
        threading.Thread(target=fails, args=(action,))
        for action in (lambda: file.write(0, b"y"), lambda: file.read(0, 1, 1, False))
    ]
    for thread in threads:
        thread.start()
    seen = cluster.refreshes
    wait_until(lambda: cluster.refreshes > seen + 2)
    file.close()
    for thread in threads:
        thread.join(SECONDS)
    assert errors == [NoTarget, NoTarget]


# --- making shorter


def test_truncate_cuts_and_removes(cluster: FakeCluster) -> None:
    data = os.urandom(5 * CHUNK_BYTES)
    file = new_file(cluster.client())
    file.write(0, data)
    file.truncate(5 * CHUNK_BYTES, 1500)
    assert file.read(0, 5000, 5000, True) == data[:1500] + bytes(3500)
    file.write(4200, b"new")
    assert file.read(0, 5000, 5000, True) == data[:1500] + bytes(2700) + b"new" + bytes(797)
    assert_quiet(cluster)


def test_a_cut_whose_answer_is_lost_does_not_cut_twice(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"x" * 900)
    cluster.servers[1].script = first(1, Fault(lose_answer=True), m.UpdateChunks)
    file.truncate(900, 100)
    (cut, repeated) = [u for u in updates(cluster) if u.cut]
    assert (cut.sequence, cut.base) == (repeated.sequence, repeated.base)
    assert repeated.again


def test_a_tail_is_removed_by_range(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"x" * 5000)
    before = len(updates(cluster))
    cluster.servers[2].script = first(1, Fault(lose_answer=True), m.RemoveRange)
    file.truncate(1 << 40, 1000)
    assert len(updates(cluster)) == before
    removed = [r for s in cluster.servers.values() for r in s.named(m.RemoveRange)]
    assert sorted(r.passing.chain for r in removed) == [1, 2, 2, 3]
    assert {(r.inode, r.first, r.end) for r in removed} == {
        (INODE, 1, -(-(1 << 40) // CHUNK_BYTES))
    }
    assert len({(r.writer, r.sequence) for r in removed}) == 1
    assert file.read(0, 5000, 5000, True) == b"x" * 1000 + bytes(4000)
    file.write(1000, b"new")
    assert file.read(0, 1003, 1003, True) == b"x" * 1000 + b"new"


# --- syncing


def test_sync_asks_the_heads_for_what_was_written(cluster: FakeCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"x" * 2500)
    file.sync()
    asked = [r for s in cluster.servers.values() for r in s.named(m.SyncChunks)]
    assert sorted((r.target_id, r.chunks[0].number, r.passing) for r in asked) == [
        (1, 0, m.Passing(1, 1)),
        (2, 1, m.Passing(2, 1)),
        (3, 2, m.Passing(3, 1)),
    ]
    file.sync()
    assert sum(len(s.named(m.SyncChunks)) for s in cluster.servers.values()) == 3


def test_a_sync_that_failed_is_asked_for_again(cluster: FakeCluster) -> None:
    file = new_file(cluster.client(), retry_seconds=0)
    file.write(0, b"x")
    cluster.servers[1].script = first(2, Fault(error=InternalError()), m.SyncChunks)
    for _ in range(2):
        with pytest.raises(InternalError):
            file.sync()
    file.sync()
    assert len(cluster.servers[1].named(m.SyncChunks)) == 3


# --- which kind of file it is


def test_a_map_that_cannot_be_had_is_waited_for(cluster: FakeCluster) -> None:
    client = cluster.client()
    refresh = cluster.refresh
    failures = iter(range(2))

    def failing() -> ClusterMap:
        if next(failures, None) is not None:
            raise ConnectionLost
        return refresh()

    cluster.refresh = failing  # type: ignore[method-assign]
    new_file(client).write(0, b"x")
    assert set(cluster.servers[3].chunks) == {ChunkId(INODE, 0, 1)}
    file = new_file(client)
    assert file.read(0, 1, 1, False) == b"x"


def test_a_file_on_single_copies_is_not_touched(cluster: FakeCluster) -> None:
    cluster.set_chain(4, [1], copies=1)
    client = cluster.client()
    with pytest.raises(StaleChain):
        client.router.route(1)
    assert client.router.route(4).target_id == 1


def test_bytes_that_change_on_their_way(cluster: FakeCluster) -> None:
    """A chunk's checksum is of no use for a part of it: each piece has its own."""
    cluster.set_chain(4, [1], copies=1)
    server = cluster.servers[1]
    data = os.urandom(5000)
    info = ChunkInfo(INODE, 0, 0, ChunkState.SEALED, len(data), crc32c(data))
    server.chunks[ChunkId(INODE, 0)] = Stored(data, info)
    file = StripedFile(cluster.client(), INODE, Layout(MIB, (4,)), retry_seconds=0)
    server.script = first(1, Fault(flip=True), m.ReadPieces)
    assert file.read(100, 3000, 5000, False) == data[100:3100]
    server.script = always(Fault(flip=True), m.ReadPieces)
    with pytest.raises(ConnectionLost):  # the chunk is not damaged
        file.read(100, 3000, 5000, False)


def test_a_head_whose_copy_is_damaged(cluster: FakeCluster) -> None:
    """It gets a good one meanwhile."""
    file = new_file(cluster.client())
    file.write(0, b"x" * 100)
    cluster.servers[1].script = first(3, Fault(error=ChunkCorrupt()), m.UpdateChunks)
    file.write(0, b"y")
    assert file.read(0, 2, 2, False) == b"yx"
