"""Striped files against a model that is a bytearray, both ways, and what flush and sync promise."""

from __future__ import annotations

import array
import concurrent.futures
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    ConnectionLost,
    DiskFull,
    InvalidRequest,
    NoTarget,
    TargetFailed,
)
from kvfs_base.limits import MIB, TRANSFER_BYTES
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId, Layout
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.client import chunk_client as client_module
from kvfs_datapath.client import files as files_module
from kvfs_datapath.client import holes
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.format import path_of
from t2_services.chunk_cluster import SECONDS, Cluster, running, wait_until

CHUNK_BYTES = 1000
LAYOUT = Layout(CHUNK_BYTES, (1, 2, 3, 2))
ROOM = 6 * CHUNK_BYTES


@pytest.fixture(params=["os-local", "os-tcp", "memory-local", "memory-tcp"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    kind, _, prefer = request.param.partition("-")
    with running(kind, prefer, tmp_path) as cluster:
        yield cluster


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Cluster]:
    with running("os", "local", tmp_path) as cluster:
        yield cluster


def new_file(client: ChunkClient, inode: int = 7, layout: Layout = LAYOUT) -> StripedFile:
    return StripedFile(client, inode, layout, retry_seconds=0)


def store_of(cluster: Cluster, number: int) -> ChunkStore:
    return cluster.servers[number]._targets.stores[0]


# --- the model


class FileMachine(RuleBasedStateMachine):
    """One file, two mounts (clients with descriptors of their own), and a bytearray."""

    cluster: Cluster
    inodes = iter(range(100, 1 << 30))

    @initialize()
    def start(self) -> None:
        self.inode = next(self.inodes)
        self.clients = [self.cluster.client(), self.cluster.client()]
        self.files = [new_file(client, self.inode) for client in self.clients]
        self.model = bytearray()
        self.sparse = False

    @rule(
        which=st.integers(0, 1),
        offset=st.integers(0, ROOM),
        data=st.binary(min_size=1, max_size=2500),
        now=st.booleans(),
    )
    def write(self, which: int, offset: int, data: bytes, now: bool) -> None:
        file = self.files[which]
        if not (now and file.write_now(offset, data)):
            file.write(offset, data)
        if offset > len(self.model):
            self.sparse = True
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    @rule(which=st.integers(0, 1), size=st.integers(0, ROOM))
    def truncate(self, which: int, size: int) -> None:
        self.files[which].truncate(len(self.model), size)
        if size > len(self.model):
            self.sparse = True
            self.model.extend(bytes(size - len(self.model)))
        del self.model[size:]

    @rule(which=st.integers(0, 1), offset=st.integers(0, ROOM), length=st.integers(0, 3000))
    def read(self, which: int, offset: int, length: int) -> None:
        file = self.files[which]
        expected = self.model[offset : offset + length]
        assert file.read(offset, length, len(self.model), self.sparse) == expected
        quick = file.read_now(offset, length, len(self.model), self.sparse)
        assert quick is None or quick == expected

    @rule(which=st.integers(0, 1), offset=st.integers(0, ROOM), length=st.integers(0, 3500))
    def zero(self, which: int, offset: int, length: int) -> None:
        end = min(offset + length, len(self.model))
        if offset < end:
            self.sparse = True
            holes.zero(self.files[which], offset, end)
            self.model[offset:end] = bytes(end - offset)

    @rule(which=st.integers(0, 1), offset=st.integers(0, ROOM))
    def seek(self, which: int, offset: int) -> None:
        file, size = self.files[which], len(self.model)
        if offset < size:
            data, hole = holes.next_data(file, offset, size), holes.next_hole(file, offset, size)
            assert not any(self.model[offset:data])
            assert (data == offset) == (hole > offset)
            assert holes.next_data(file, hole, size) > hole or hole == size

    @rule(which=st.integers(0, 1))
    def flush(self, which: int) -> None:
        self.files[which].flush()

    @rule(which=st.integers(0, 1))
    def sync(self, which: int) -> None:
        self.files[which].sync()

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.files[which].close()
        self.files[which] = new_file(self.clients[which], self.inode)

    @invariant()
    def whole_file_is_the_model(self) -> None:
        if hasattr(self, "model"):
            size = len(self.model)
            assert self.files[0].read(0, size, size, self.sparse) == self.model

    def teardown(self) -> None:
        if not hasattr(self, "files"):
            return
        for file in self.files:
            file.close()
        # Nobody writes any more: every chunk is sealed, and its checksum is right.
        for number in range(1 + len(self.model) // CHUNK_BYTES):
            store = store_of(self.cluster, LAYOUT.chain_of(number))
            try:
                descriptor, info = store.open(ChunkId(self.inode, number))
            except ChunkNotFound:
                continue
            assert info.is_sealed
            store.verify(descriptor, info)
            descriptor.close()
        for client in self.clients:
            assert len(client.descriptors) == 0
            client.close()
            self.cluster.clients.remove(client)


def test_random_operations_against_the_model(cluster: Cluster) -> None:
    class Machine(FileMachine):
        pass

    Machine.cluster = cluster
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- reading and writing


def test_bytes_lie_where_the_layout_says(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    data = os.urandom(4500)
    file.write(0, data)
    file.close()
    for number in range(5):
        disk = cluster.disk(LAYOUT.chain_of(number))
        stored = disk.open(path_of(ChunkId(7, number)))
        view = memoryview(bytearray(CHUNK_BYTES))
        count = stored.preadv([view], 0)
        stored.close()
        assert view[:count] == data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]


def test_reads_are_clipped_to_the_size(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"0123456789")
    assert file.read(8, 100, 10, False) == b"89"
    assert file.read(10, 5, 10, False) == b""
    assert file.read(500, 5, 10, False) == b""
    assert file.read(0, 0, 10, False) == b""
    assert file.read(2, 3, 4, False) == b"23"
    file.close()


def test_holes_are_zeros_only_where_the_file_is_sparse(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"a" * 100)
    file.write(2 * CHUNK_BYTES, b"b" * 100)
    size = 2 * CHUNK_BYTES + 100
    assert file.read(0, size, size, True) == b"a" * 100 + bytes(1900) + b"b" * 100
    for offset, number in ((500, 0), (1500, 1)):
        with pytest.raises(ChunkNotFound) as caught:
            file.read(offset, 10, size, False)
        assert (caught.value.inode, caught.value.number) == (7, number)
    assert file.read(50, 50, size, False) == b"a" * 50
    file.close()


def test_what_is_no_hole_is_found_page_by_page(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few of very many chunks there are."""
    monkeypatch.setattr(files_module, "STAT_CHUNKS_MAX", 4)
    monkeypatch.setattr("kvfs_datapath.chunks.listing.LIST_CHUNKS_MAX", 2)
    file = new_file(cluster.client())
    numbers = [0, 1, 2, 5, 9, 11, 400_000, 400_003]
    for number in numbers:
        file.write(number * CHUNK_BYTES, b"x" * 10)
    assert file.lengths(0, 500_000) == dict.fromkeys(numbers, 10)
    assert file.lengths(2, 9) == {2: 10, 5: 10}
    size = 500_000 * CHUNK_BYTES
    assert holes.next_data(file, 12 * CHUNK_BYTES, size) == 400_000 * CHUNK_BYTES
    assert holes.next_data(file, 400_004 * CHUNK_BYTES, size) == size
    assert holes.next_hole(file, 400_000 * CHUNK_BYTES, size) == 400_000 * CHUNK_BYTES + 10
    holes.zero(file, 5, size)
    assert file.lengths(0, 500_000) == {0: 10}
    assert file.read(0, 20, size, True) == b"x" * 5 + bytes(15)


def test_large_pieces(cluster: Cluster) -> None:
    layout = Layout(16 * MIB, (1, 2))
    file = new_file(cluster.client(), layout=layout)
    data = os.urandom(16 * MIB + TRANSFER_BYTES + 12_345)
    file.write(5, data)
    size = 5 + len(data)
    assert file.read(0, size, size, True) == bytes(5) + data
    file.close()
    assert file.read(5, 100, size, True) == data[:100]
    file.close()


def test_layouts_that_make_no_sense(cluster: Cluster) -> None:
    for layout in (Layout(0, (1,)), Layout(1000, ())):
        with pytest.raises(InvalidRequest):
            new_file(cluster.client(), layout=layout)


def test_any_buffer_can_be_written(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    file.write(0, memoryview(array.array("I", [0x01020304])))
    file.write(4, bytearray(b"x"))
    assert file.read(0, 5, 5, False) == b"\4\3\2\1x"
    file.close()


# --- without waiting


def test_what_is_open_here_needs_no_server(local: Cluster) -> None:
    client = local.client()
    file = new_file(client)
    assert not file.write_now(0, b"x")
    assert file.read_now(0, 1, 1, False) is None
    file.write(0, b"first" * 300)
    requests = [server.statistics()["requests"] for server in local.servers.values()]
    assert file.write_now(3, b"second" * 200)
    assert file.read_now(3, 1200, 1500, False) == b"second" * 200
    assert not file.write_now(1000, b"x" * 1500)  # reaches into a chunk that is not open
    assert file.read_now(1000, 1500, 2500, False) is None
    assert [s.statistics()["requests"] for s in local.servers.values()] == requests
    file.flush()
    assert not file.write_now(0, b"x")  # sealed: the server must mark it open first
    file.close()
    assert file.read_now(0, 10, 1500, False) is None


def test_reading_into_a_buffer_that_is_used_again(local: Cluster) -> None:
    file = new_file(local.client())
    data = os.urandom(2500)
    buffer = memoryview(bytearray(4000))
    assert not file.read_into_now(0, buffer[:10])
    file.write(0, data)
    assert file.read_into_now(700, buffer[:1500])  # over three chunks
    assert buffer[:1500] == data[700:2200]
    assert bytes(buffer[1500:]) == bytes(2500)
    assert not file.read_into_now(2400, buffer[:101])
    assert file.read_into_now(5, buffer[:0])
    file.close()


def test_a_short_chunk_is_for_the_long_way(local: Cluster) -> None:
    file = new_file(local.client())
    file.write(0, b"abc")
    assert file.read_now(0, 10, 10, True) is None
    assert file.read(0, 10, 10, True) == b"abc" + bytes(7)
    file.close()


def test_remote_files_always_wait(tmp_path: Path) -> None:
    with running("os", "tcp", tmp_path) as cluster:
        file = new_file(cluster.client())
        file.write(0, b"x")
        assert file.read_now(0, 1, 1, False) is None
        assert not file.write_now(0, b"x")
        file.close()


def test_a_file_of_one_chunk_as_a_descriptor(local: Cluster) -> None:
    client = local.client()
    file = new_file(client)
    file.write(0, b"a" * 600)
    file.flush()
    for size in (599, 601, CHUNK_BYTES + 1):
        with pytest.raises(NoTarget):
            file.open_whole(size)
    descriptor = file.open_whole(600)
    try:
        file.truncate_in_place(600, 100)
        assert os.pread(descriptor, 1000, 0) == b"a" * 100
        file.truncate_in_place(100, 0)
        assert os.fstat(descriptor).st_size == 0
        file.truncate_in_place(0, 300)
        assert os.pread(descriptor, 1000, 0) == bytes(300)
        file.write(300, b"b" * 2000)
        file.truncate_in_place(2300, 400)
        assert os.pread(descriptor, 1000, 0) == bytes(300) + b"b" * 100
        assert file.read(0, 4000, 4000, True) == bytes(300) + b"b" * 100 + bytes(3600)
        file.flush()
        assert store_of(local, 1).stat(ChunkId(7, 0)).is_sealed
    finally:
        os.close(descriptor)


def test_a_removed_chunk_is_not_written_to(local: Cluster) -> None:
    """Another mount truncates and writes anew while this one has the old chunk open."""
    mine, other = new_file(local.client()), new_file(local.client())
    mine.write(0, b"old" * 100)
    other.truncate(300, 0)
    other.write(0, b"new" * 100)
    assert mine.read_now(0, 300, 300, False) is None
    assert mine.read(0, 300, 300, False) == b"new" * 100
    other.truncate(300, 0)
    assert not mine.write_now(0, b"lost?")
    mine.write(0, b"kept!")
    assert other.read(0, 5, 5, False) == b"kept!"
    mine.close()
    other.close()


def test_descriptors_are_bounded(local: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FILE_DESCRIPTORS_MAX", 4)
    client = local.client()
    file = new_file(client, layout=Layout(100, (1, 2, 3)))
    data = os.urandom(3000)
    file.write(0, data)
    assert len(client.descriptors) == 4
    assert file.read(0, 3000, 3000, False) == data
    file.flush()
    assert file.read(0, 3000, 3000, False) == data
    assert len(client.descriptors) == 4
    file.close()
    assert len(client.descriptors) == 0
    for number in range(30):
        assert store_of(local, 1 + number % 3).stat(ChunkId(7, number)).is_sealed


# --- flush, sync, close


def test_flush_seals(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    data = os.urandom(2500)
    file.write(0, data)
    infos = [store_of(cluster, LAYOUT.chain_of(n)).stat(ChunkId(7, n)) for n in range(3)]
    assert not any(info.is_sealed for info in infos)
    file.flush()
    for number in range(3):
        info = store_of(cluster, LAYOUT.chain_of(number)).stat(ChunkId(7, number))
        assert info.is_sealed
        assert info.crc32c == crc32c(data[number * CHUNK_BYTES :][:CHUNK_BYTES])
    requests = cluster.servers[1].statistics()["requests"]
    file.flush()
    file.close()
    assert cluster.servers[1].statistics()["requests"] == requests


def test_a_second_writer_keeps_a_chunk_open(local: Cluster) -> None:
    mine, other = new_file(local.client()), new_file(local.client())
    mine.write(0, b"mine")
    other.write(4, b"other")
    mine.flush()
    info = store_of(local, 1).stat(ChunkId(7, 0))
    assert not info.is_sealed
    other.flush()
    assert store_of(local, 1).stat(ChunkId(7, 0)).crc32c == crc32c(b"mineother")
    mine.close()
    other.close()


def test_a_second_remote_writer_leaves_the_chunk_right(tmp_path: Path) -> None:
    """Patches through the server may be sealed between: the next one opens the chunk again."""
    with running("os", "tcp", tmp_path) as cluster:
        mine, other = new_file(cluster.client()), new_file(cluster.client())
        mine.write(0, b"mine")
        other.write(4, b"other")
        mine.flush()
        other.write(9, b"more")
        other.close()
        mine.close()
        assert store_of(cluster, 1).stat(ChunkId(7, 0)).crc32c == crc32c(b"mineothermore")


def test_sync_reaches_the_disk(tmp_path: Path) -> None:
    for prefer in ("local", "tcp"):
        with running("memory", prefer, tmp_path) as cluster:
            disk = cluster.disk(1)
            assert isinstance(disk, MemoryDisk)
            seen: list[tuple[str, str]] = []
            disk.before = lambda operation, path, seen=seen: seen.append((operation, path))  # type: ignore[misc]
            file = new_file(cluster.client())
            file.write(0, b"x" * 10)
            assert ("sync", path_of(ChunkId(7, 0))) not in seen
            file.sync()
            assert ("sync", path_of(ChunkId(7, 0))) in seen
            del seen[:]
            file.sync()
            assert seen == []
            file.flush()  # sealed before and not synced since: nothing is lost
            file.write(0, b"y")
            file.flush()
            file.sync()
            assert ("sync", path_of(ChunkId(7, 0))) in seen
            file.close()


def test_reading_a_damaged_chunk_fails(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"good" * 100)
    file.close()
    cluster.servers[1].stop()
    damaged = cluster.disk(1).open(path_of(ChunkId(7, 0)), write=True)
    damaged.pwritev([b"evil"], 40)
    damaged.close()
    cluster.start_server_again(1)
    with pytest.raises(ChunkCorrupt):
        new_file(cluster.client()).read(0, 10, 400, False)


# --- threads


def test_writers_and_readers_in_many_threads(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    size = 16 * 500
    file.write(0, bytes(size))
    stop = threading.Event()

    def write(first: int) -> None:
        for place in range(first, 500, 4):
            data = place.to_bytes(2, "big") * 8
            if not file.write_now(place * 16, data):
                file.write(place * 16, data)
            if place % 50 == 0:
                file.flush()

    def read() -> None:
        while not stop.is_set():
            data = file.read(0, size, size, False)
            for place in range(500):
                piece = data[place * 16 : place * 16 + 16]
                written = place.to_bytes(2, "big") * 8
                # A part of a write may be seen, never other bytes.
                assert all(a in (0, b) for a, b in zip(piece, written, strict=True))

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        reader = threads.submit(read)
        for writer in [threads.submit(write, n) for n in range(4)]:
            writer.result(SECONDS)
        stop.set()
        reader.result(SECONDS)
    file.close()
    expected = b"".join(n.to_bytes(2, "big") * 8 for n in range(500))
    assert new_file(cluster.client()).read(0, size, size, False) == expected
    for number in range(8):
        assert store_of(cluster, LAYOUT.chain_of(number)).stat(ChunkId(7, number)).is_sealed


# --- servers that fail


def test_a_dead_server_is_an_error(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    file.write(0, bytes(3000))
    cluster.servers[2].stop()
    with pytest.raises((ConnectionLost, ChunkNotFound)):
        new_file(cluster.client()).read(0, 3000, 3000, False)
    with pytest.raises(ConnectionLost):
        file.flush()
    cluster.start_server_again(2)
    file.close()  # what could not be sealed then is sealed now
    assert new_file(cluster.client()).read(0, 3000, 3000, False) == bytes(3000)
    assert store_of(cluster, 2).stat(ChunkId(7, 1)).is_sealed


def test_a_restart_is_waited_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cluster.client()
    file = StripedFile(client, 7, LAYOUT, retry_seconds=10)
    file.write(0, b"before")
    file.flush()
    client.descriptors.clear()
    cluster.servers[1].stop()
    failed = threading.Event()
    real = client.router.route

    def route(chain: int) -> object:
        # The second attempt: by then the first has met a dead server.
        if failed.is_set() and cluster.servers[1]._stopping.is_set():
            cluster.start_server_again(1)
        failed.set()
        return real(chain)

    monkeypatch.setattr(client.router, "route", route)
    assert file.read(0, 6, 6, False) == b"before"
    file.close()


def test_no_target_at_all(cluster: Cluster) -> None:
    cluster.metadata.take_offline(1, 2, 3)
    file = new_file(cluster.client())
    with pytest.raises(NoTarget):
        file.write(0, b"x")
    with pytest.raises(NoTarget):
        file.read(0, 1, 1, True)


def test_a_chain_that_was_removed_is_not_waited_for(cluster: Cluster) -> None:
    layout = Layout(CHUNK_BYTES, (1, 99))
    file = StripedFile(cluster.client(), 7, layout, retry_seconds=1e6)
    file.write(0, bytes(CHUNK_BYTES))
    for sparse in (False, True):
        assert file.read(0, CHUNK_BYTES, 2 * CHUNK_BYTES, sparse) == bytes(CHUNK_BYTES)
        with pytest.raises(TargetFailed):
            file.read(0, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES, sparse)
    with pytest.raises(TargetFailed):
        file.write(CHUNK_BYTES, b"x")
    file.flush()
    with pytest.raises(TargetFailed):
        file.truncate(2 * CHUNK_BYTES, 1)
    assert file.read(0, CHUNK_BYTES, 1, False) == b"\0"
    file.close()


def test_a_full_disk(tmp_path: Path) -> None:
    with running("memory", "tcp", tmp_path) as cluster:
        file = new_file(cluster.client())
        file.write(0, b"x")

        def full(operation: str, path: str) -> None:
            if operation == "pwritev":
                raise DiskFull(path=path)

        disk = cluster.disk(1)
        assert isinstance(disk, MemoryDisk)
        disk.before = full
        with pytest.raises(DiskFull):
            file.write(0, b"y")
        assert file.read(0, 1, 1, False) == b"x"
        file.close()
        wait_until(lambda: store_of(cluster, 1).stat(ChunkId(7, 0)).is_sealed)


def test_a_truncate_asks_each_target_once(cluster: Cluster) -> None:
    file = new_file(cluster.client())
    file.write(0, bytes(6000))
    before = {n: s.statistics()["requests"] for n, s in cluster.servers.items()}
    file.truncate(6000, 500)
    after = {n: s.statistics()["requests"] for n, s in cluster.servers.items()}
    # Chain 2 stands twice in the layout; the cut itself is one more on target 1.
    assert {n: after[n] - before[n] for n in after} == {1: 2, 2: 2, 3: 1}
    file.truncate(500, 500)
    file.truncate(500, 9000)
    assert file.read(0, 9000, 9000, True) == bytes(9000)
    file.close()
