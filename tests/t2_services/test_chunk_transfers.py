"""Whole chunks end to end: three servers, one client, both ways, in memory and for real."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvfs_base import frames
from kvfs_base.cluster import ClusterMap
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    DiskFull,
    InvalidRequest,
    KvfsError,
    NoTarget,
    TargetFailed,
)
from kvfs_base.frames import Kind
from kvfs_base.limits import (
    ITEMS_PER_REQUEST_MAX,
    MIB,
    TRANSFER_BYTES,
)
from kvfs_base.seams import Listener
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkRead, ChunkWrite, ClusterSource
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.format import directory_of, path_of
from kvfs_datapath.limits import PUBLISH_TOGETHER_MAX, SUM_BYTES
from kvfs_datapath.server import chunk_server as server_module
from t2_services.chunk_cluster import (
    SECONDS,
    Cluster,
    assert_equal,
    make_writes,
    pages,
    reads_of,
    running,
    wait_until,
)


@pytest.fixture(params=["os-local", "os-tcp", "memory-local", "memory-tcp"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    kind, _, prefer = request.param.partition("-")
    with running(kind, prefer, tmp_path) as cluster:
        yield cluster


@pytest.fixture(params=["local", "tcp"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with running("os", request.param, tmp_path) as cluster:
        yield cluster


@pytest.fixture(params=["local", "tcp"])
def in_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with running("memory", request.param, tmp_path) as cluster:
        yield cluster


# --- the usual


def test_a_batch_comes_back(cluster: Cluster) -> None:
    client = cluster.client()
    sizes = [0, 1, 4095, 4096, 4097, 100_000, 3 * MIB, TRANSFER_BYTES + 5, 10, 20, 30]
    writes = make_writes(sizes)
    assert client.write_chunks(writes) == [None] * len(sizes)
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * len(sizes)
    assert_equal(reads, writes)
    statistics = client.statistics()
    assert statistics["chunks_written"] == statistics["chunks_read"] == len(sizes)
    assert statistics["read_bytes"] == sum(sizes)
    for number in cluster.servers:
        assert drafts(cluster.disk(number)) == []


def test_a_chunk_file_is_its_payload(real: Cluster) -> None:
    write = make_writes([5000])[0]
    assert real.client().write_chunks([write]) == [None]
    file = Path(real.directory(1)) / path_of(write.chunk)
    assert file.read_bytes() == write.view[:5000]


def test_strict_durability_changes_no_answer(tmp_path: Path) -> None:
    for prefer in ("local", "tcp"):
        (tmp_path / prefer).mkdir()
        with running("os", prefer, tmp_path / prefer, durability="strict") as cluster:
            client = cluster.client()
            writes = make_writes([10_000] * 6)
            assert client.write_chunks(writes) == [None] * 6
            assert client.read_chunks(reads_of(writes)) == [None] * 6


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_bad_chunks_of_a_long_request_cost_only_themselves(tmp_path: Path, durability: str) -> None:
    """More than are published together, and two bad ones, one at the end."""
    count = PUBLISH_TOGETHER_MAX + 9
    bad = [PUBLISH_TOGETHER_MAX - 1, count - 1]
    writes = make_writes([5_000] * count, chains=(1,))
    messages = [write.message() for write in writes]
    for index in bad:
        messages[index] = msgspec.structs.replace(messages[index], crc32c=1)
    with running("memory", "tcp", tmp_path, durability=durability) as cluster:
        connection = DataConnection(cluster.connection(1))
        request = m.WriteChunks(1, tuple(messages))
        outcomes = connection.call(request, [write.view[: write.size] for write in writes])
        connection.close()
        assert sorted(outcomes.errors) == bad
        assert all(isinstance(outcomes.error(index), ChunkCorrupt) for index in bad)
        good = [write for index, write in enumerate(writes) if index not in bad]
        reads = reads_of(good)
        assert cluster.client().read_chunks(reads) == [None] * len(good)
        assert_equal(reads, good)
        lost = cluster.client().read_chunks(reads_of([writes[index] for index in bad]))
        assert all(isinstance(error, ChunkNotFound) for error in lost)
        assert drafts(cluster.disk(1)) == []


def test_many_small_chunks(cluster: Cluster) -> None:
    """More than one message may carry descriptors for."""
    client = cluster.client()
    count = 3 * ITEMS_PER_REQUEST_MAX + 50
    writes = make_writes([100] * count)
    assert client.write_chunks(writes) == [None] * count
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * count
    assert_equal(reads, writes)


def test_nothing_is_fine(cluster: Cluster) -> None:
    client = cluster.client()
    assert client.read_chunks([]) == client.write_chunks([]) == []


def test_writing_again_is_harmless(cluster: Cluster) -> None:
    client = cluster.client()
    writes = make_writes([5000, 6000])
    assert client.write_chunks(writes) == [None, None]
    assert client.write_chunks(writes) == [None, None]
    assert client.read_chunks(reads_of(writes)) == [None, None]


def test_many_threads_share_a_client(cluster: Cluster) -> None:
    client = cluster.client()

    def work(first: int) -> None:
        for batch in range(5):
            writes = make_writes([3000, 70_000, 1], first_inode=first + 10 * batch)
            assert client.write_chunks(writes) == [None] * 3
            reads = reads_of(writes)
            assert client.read_chunks(reads) == [None] * 3
            assert_equal(reads, writes)

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        for future in [threads.submit(work, 1000 * n) for n in range(1, 7)]:
            future.result(SECONDS)


def test_both_ways_see_the_same_chunks(tmp_path: Path) -> None:
    with running("os", "local", tmp_path) as cluster:
        local, remote = cluster.client("local"), cluster.client("tcp")
        writes = make_writes([10_000] * 3)
        assert local.write_chunks(writes) == [None] * 3
        assert remote.read_chunks(reads_of(writes)) == [None] * 3
        others = make_writes([10_000] * 3, first_inode=2000)
        assert remote.write_chunks(others) == [None] * 3
        assert local.read_chunks(reads_of(others)) == [None] * 3


def test_auto_takes_the_local_way_on_its_own_host(tmp_path: Path) -> None:
    with running("os", "auto", tmp_path) as cluster:
        write = make_writes([100])[0]
        here = cluster.client()
        assert here.write_chunks([write]) == [None]
        assert here.read_chunks(reads_of([write])) == [None]
        server = cluster.servers[1]
        wait_until(lambda: server.statistics()["descriptors_passed"] == 2)  # counted when sent
        elsewhere = ChunkClient(dataclasses.replace(cluster.env, host_id="other"), cluster.metadata)
        cluster.clients.append(elsewhere)
        assert elsewhere.read_chunks(reads_of([write])) == [None]
        assert server.statistics()["descriptors_passed"] == 2
        assert server.statistics()["chunks_read"] == 1


# --- never other bytes


def expect(cluster: Cluster, read: ChunkRead, error: type[KvfsError]) -> None:
    """The chunk beside it is not touched by the failure."""
    neighbour = make_writes([777], first_inode=1, chains=[read.chain])
    client = cluster.client()
    assert client.write_chunks(neighbour) == [None]
    bad, good = client.read_chunks([read, *reads_of(neighbour)])
    assert type(bad) is error
    assert good is None


def stored(cluster: Cluster, size: int = 20_000) -> ChunkWrite:
    write = make_writes([size])[0]
    assert cluster.client().write_chunks([write]) == [None]
    return write


def change(cluster: Cluster, write: ChunkWrite, offset: int | None, size: int | None) -> None:
    file = cluster.disk(write.chain).open(path_of(write.chunk), write=True)
    if offset is not None:
        view = memoryview(bytearray(1))
        file.preadv([view], offset)
        file.pwritev([bytes([view[0] ^ 1])], offset)
    if size is not None:
        file.truncate(size)
    file.close()


@pytest.mark.parametrize("offset", [0, 4096, 12_345, 19_999])
def test_a_flipped_bit_is_corrupt(cluster: Cluster, offset: int) -> None:
    write = stored(cluster)
    change(cluster, write, offset, None)
    expect(cluster, reads_of([write])[0], ChunkCorrupt)


@pytest.mark.parametrize("offset", [0, SUM_BYTES - 1, SUM_BYTES, 3 * SUM_BYTES + 4])
def test_a_flipped_bit_of_a_long_chunk_is_corrupt(cluster: Cluster, offset: int) -> None:
    """It comes in several pieces, each of which is summed when it is there."""
    sizes = [5, 3 * SUM_BYTES + 5, 0, SUM_BYTES - 5, 2 * SUM_BYTES]
    writes = make_writes(sizes, chains=[1])
    client = cluster.client()
    assert client.write_chunks(writes) == [None] * len(sizes)
    change(cluster, writes[1], offset, None)
    reads = reads_of(writes)
    results = client.read_chunks(reads)
    assert type(results.pop(1)) is ChunkCorrupt
    assert results == [None] * 4
    assert_equal([reads[0], *reads[2:]], [writes[0], *writes[2:]])


@pytest.mark.parametrize("size", [0, 19_999, 20_001])
def test_a_torn_chunk_is_a_mismatch(cluster: Cluster, size: int) -> None:
    write = stored(cluster)
    change(cluster, write, None, size)
    expect(cluster, reads_of([write])[0], ChunkMismatch)


def test_a_chunk_that_was_read_and_then_cut_is_a_mismatch(cluster: Cluster) -> None:
    """The server has it open, as it was; at the latest the second attempt looks again."""
    write = stored(cluster)
    client = cluster.client()
    assert client.read_chunks(reads_of([write])) == [None]
    change(cluster, write, None, 10_000)
    (error,) = client.read_chunks(reads_of([write]))
    assert type(error) is ChunkMismatch


def test_another_key_is_a_mismatch(cluster: Cluster) -> None:
    read = reads_of([stored(cluster)])[0]
    for key in (b"x" * 32, b""):
        expect(cluster, dataclasses.replace(read, key=key), ChunkMismatch)


def test_another_generation_is_not_found_or_a_mismatch(cluster: Cluster) -> None:
    write = stored(cluster)
    read = reads_of([write])[0]
    newer = dataclasses.replace(read, chunk=ChunkId(write.chunk.inode + 1, 0))
    expect(cluster, newer, ChunkNotFound)
    disk = cluster.disk(write.chain)
    disk.make_directory(directory_of(newer.chunk.inode))
    disk.rename(path_of(write.chunk), path_of(newer.chunk))  # a misdirected write
    expect(cluster, newer, ChunkMismatch)


def test_another_checksum_or_size_is_a_mismatch(cluster: Cluster) -> None:
    read = reads_of([stored(cluster)])[0]
    expect(cluster, dataclasses.replace(read, crc32c=read.crc32c ^ 1), ChunkMismatch)
    for size in (19_999, 20_001, 0):
        expect(cluster, dataclasses.replace(read, size=size, view=pages(30_000)), ChunkMismatch)


def test_an_open_chunk_is_a_mismatch(cluster: Cluster) -> None:
    connection = DataConnection(cluster.connection(1, "tcp"))
    piece = m.Piece(1000, 0, 0, 0, 100)
    connection.call(m.WritePieces(1, (piece,)), [bytes(100)])
    read = ChunkRead(ChunkId(1000, 0), 1, 100, crc32c(bytes(100)), b"", pages(100))
    expect(cluster, read, ChunkMismatch)
    connection.close()


def test_missing_chunks(cluster: Cluster) -> None:
    write = stored(cluster)
    cluster.disk(write.chain).unlink(path_of(write.chunk))
    expect(cluster, reads_of([write])[0], ChunkNotFound)


def test_a_remote_server_checks_what_it_receives(tmp_path: Path) -> None:
    with running("os", "tcp", tmp_path) as cluster:
        writes = make_writes([5000, TRANSFER_BYTES + 100, 5000], chains=[1])
        writes[1].crc32c ^= 1
        first, wrong, last = cluster.client().write_chunks(writes)
        assert first is last is None and isinstance(wrong, ChunkCorrupt)
        expect(cluster, reads_of(writes)[1], ChunkNotFound)
        assert drafts(cluster.disk(1)) == []
        assert cluster.servers[1].statistics()["bad_chunks"] == 1


# --- the caller's mistakes


def test_bad_arguments_cost_only_their_item(cluster: Cluster) -> None:
    client = cluster.client()
    good, small, negative, huge, key, chain = make_writes([100] * 6, chains=[1])
    small.view = small.view[:100]
    negative.size = -1
    huge.size = 1 << 40
    key.key = b"short"
    chain.chain = 99
    results = client.write_chunks([good, small, negative, huge, key, chain])
    assert [type(r) for r in results] == [type(None), *[InvalidRequest] * 4, NoTarget]
    with pytest.raises(InvalidRequest):
        ChunkClient(cluster.env, cluster.metadata, prefer="pigeon")


def test_a_client_that_is_closed_says_so(cluster: Cluster) -> None:
    client = cluster.client()
    writes = make_writes([100] * 10)
    client.close()
    with pytest.raises(ConnectionLost):
        client.write_chunks(writes)
    (result,) = client.write_chunks(writes[:1])
    assert isinstance(result, ConnectionLost)


# --- servers that fail


def test_one_dead_server_costs_its_items_only(cluster: Cluster) -> None:
    client = cluster.client()
    writes = make_writes([5000] * 30)
    assert client.write_chunks(writes) == [None] * 30
    cluster.servers[2].stop()
    results = client.read_chunks(reads_of(writes))
    assert {w.chain for w, r in zip(writes, results, strict=True) if r is not None} == {2}
    assert {type(r) for r in results} == {type(None), ConnectionLost}
    results = client.write_chunks(make_writes([5000] * 30, first_inode=5000))
    assert [type(r) for r in results] == [type(None), ConnectionLost, type(None)] * 10


def test_a_target_that_is_offline_is_asked_for_once(cluster: Cluster) -> None:
    client = cluster.client()
    writes = make_writes([100] * 30)
    cluster.metadata.take_offline(3)
    before = cluster.metadata.refreshes
    results = client.write_chunks(writes)
    assert [type(r) for r in results] == [type(None), type(None), NoTarget] * 10
    assert cluster.metadata.refreshes == before + 1
    cluster.metadata.take_offline()
    assert client.write_chunks(writes) == [None] * 30


def test_a_restarted_server_goes_on(real: Cluster) -> None:
    client = real.client()
    writes = make_writes([5000] * 9)
    assert client.write_chunks(writes) == [None] * 9
    real.servers[2].stop()
    real.start_server_again(2)
    assert client.read_chunks(reads_of(writes)) == [None] * 9
    assert real.metadata.report(2).healthy


class Remembering:
    """A source that asks only when it is told to, as a node's view of the cluster does."""

    def __init__(self, source: ClusterSource) -> None:
        self._source = source
        self._map = source.current()

    def current(self) -> ClusterMap:
        return self._map

    def refresh(self) -> ClusterMap:
        self._map = self._source.refresh()
        return self._map


def test_a_server_that_moved_is_found_again(tmp_path: Path) -> None:
    with running("os", "tcp", tmp_path) as cluster:
        client = ChunkClient(cluster.env, Remembering(cluster.metadata), prefer="tcp")
        writes = make_writes([5000] * 9)
        assert client.write_chunks(writes) == [None] * 9
        cluster.servers[2].stop()
        cluster.start_server_again(2)  # on another port
        assert {type(r) for r in client.read_chunks(reads_of(writes))} <= {
            type(None),
            ConnectionLost,
        }
        assert client.read_chunks(reads_of(writes)) == [None] * 9
        client.close()


@pytest.mark.parametrize("cut_after", [1, 30, 20_000])
def test_a_server_that_dies_in_the_middle(tmp_path: Path, cut_after: int) -> None:
    """Its last answer announces more payload than comes."""
    with running("memory", "tcp", tmp_path) as cluster:
        write = make_writes([50_000])[0]
        assert cluster.client().write_chunks([write]) == [None]
        (address,) = (a for a in cluster.servers[1].addresses if a.kind == "tcp")
        cluster.servers[1].stop()
        listener = cluster.env.blocking_network.listen(address)
        dying = threading.Thread(target=die_answering, args=(listener, write, cut_after))
        dying.start()
        (result,) = cluster.client().read_chunks(reads_of([write]))
        assert isinstance(result, ConnectionLost)
        dying.join()
        listener.close()


def die_answering(listener: Listener, write: ChunkWrite, cut_after: int) -> None:
    connection = listener.accept()
    header = bytearray(frames.HEADER_BYTES)
    connection.receive_into([memoryview(header)])
    request = frames.decode_header(header)
    reply = frames.encode(
        Kind.REPLY, request.request_id, m.Outcomes((), {}), payload_bytes=write.size
    )
    connection.send([(reply + bytes(20_000))[:cut_after]])
    connection.close()


def test_stopping_breaks_off_transfers(real: Cluster) -> None:
    """Readers get whole chunks or errors, never anything else, and nothing hangs."""
    writes = make_writes([MIB] * 12)
    client = real.client()
    assert client.write_chunks(writes) == [None] * 12
    seen: set[type] = set()
    stopped = threading.Event()

    def read_on() -> None:
        while not stopped.is_set() or not seen - {type(None)}:
            reads = reads_of(writes)
            results = client.read_chunks(reads)
            seen.update(type(r) for r in results)
            for read, write, result in zip(reads, writes, results, strict=True):
                if result is None:
                    assert read.view[:MIB] == write.view[:MIB]

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read_on) for _ in range(2)]
        real.servers[1].stop()
        stopped.set()
        for reader in readers:
            reader.result(SECONDS)
    assert seen <= {type(None), ConnectionLost}


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_datapath.connections.DATA_SECONDS", 1.0)
    with running("memory", "tcp", tmp_path) as cluster:
        (address,) = (a for a in cluster.servers[2].addresses if a.kind == "tcp")
        cluster.servers[2].stop()
        # Takes connections, never answers.
        listener = cluster.env.blocking_network.listen(address)
        results = cluster.client().write_chunks(make_writes([MIB] * 30))
        listener.close()
        assert [type(r) for r in results] == [type(None), DeadlineExceeded, type(None)] * 10


# --- disks that fail


def memory_disk(cluster: Cluster) -> MemoryDisk:
    disk = cluster.disk(1)
    assert isinstance(disk, MemoryDisk)
    return disk


@pytest.mark.logs_warnings
def test_a_failed_disk_is_reported_and_avoided(in_memory: Cluster) -> None:
    cluster, disk = in_memory, memory_disk(in_memory)
    client = cluster.client()
    writes = make_writes([100] * 3)

    def fail(operation: str, path: str) -> None:
        if operation == "set_attribute":
            raise TargetFailed(detail="EIO")

    disk.before = fail
    results = client.write_chunks(writes)
    assert [type(r) for r in results] == [TargetFailed, type(None), type(None)]
    disk.before = lambda operation, path: None
    cluster.metadata.wait_until_unhealthy(1)
    results = client.write_chunks(writes)
    assert [type(r) for r in results] == [NoTarget, type(None), type(None)]
    assert cluster.servers[1].statistics()["failed_targets"] == 1


def test_a_full_disk_fails_writes_and_serves_reads(in_memory: Cluster) -> None:
    cluster, disk = in_memory, memory_disk(in_memory)
    client = cluster.client()
    kept = make_writes([100], chains=[1])
    assert client.write_chunks(kept) == [None]

    def full(operation: str, path: str) -> None:
        if operation in ("pwritev", "set_attribute"):
            raise DiskFull(path=path)

    disk.before = full
    results = client.write_chunks(make_writes([100] * 3, first_inode=2000))
    assert [type(r) for r in results] == [DiskFull, type(None), type(None)]
    assert client.read_chunks(reads_of(kept)) == [None]
    assert drafts(disk) == []
    assert cluster.servers[1].statistics()["failed_targets"] == 0


def test_a_real_disk_that_fills_up() -> None:
    """A tmpfs of 16 MiB: the client's own writes into staged files meet the end of it."""
    root = Path("/tmp") / f"kvfs-full-{os.getpid()}"
    root.mkdir()
    if os.system(f"mount -t tmpfs -o size=16m kvfs-test {root} 2>/dev/null"):
        root.rmdir()
        pytest.skip("may not mount")
    try:
        for prefer in ("local", "tcp"):
            with running("os", prefer, root) as cluster:
                client = cluster.client()
                results = client.write_chunks(make_writes([3 * MIB] * 8))
                assert {type(r) for r in results} == {type(None), DiskFull}
                for number in cluster.servers:
                    assert drafts(cluster.disk(number)) == []
            for target in root.iterdir():
                shutil.rmtree(target)
    finally:
        os.system(f"umount {root}")
        root.rmdir()


# --- descriptors


def test_open_sealed(tmp_path: Path) -> None:
    for kind in ("os", "memory"):
        with running(kind, "local", tmp_path) as cluster:
            client = cluster.client()
            write = stored(cluster)
            descriptor = client.open_sealed(write.chunk, 1)
            assert os.pread(descriptor, 30_000, 0) == write.view[:20_000]
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(descriptor, b"x", 0)
            os.close(descriptor)
            with pytest.raises(ChunkNotFound):
                client.open_sealed(ChunkId(1, 1), 1)
            with pytest.raises(TargetFailed):
                client.open_sealed(write.chunk, 99)
            damaged = make_writes([20_000], first_inode=3000)[0]
            assert client.write_chunks([damaged]) == [None]
            change(cluster, damaged, 5, None)
            with pytest.raises(ChunkCorrupt):
                client.open_sealed(damaged.chunk, 1)


def test_open_sealed_of_another_host(tmp_path: Path) -> None:
    with running("os", "tcp", tmp_path) as cluster:
        write = stored(cluster)
        with pytest.raises(NoTarget):
            cluster.client().open_sealed(write.chunk, 1)


def test_open_sealed_seals_what_nobody_writes(tmp_path: Path) -> None:
    with running("os", "local", tmp_path) as cluster:
        client = cluster.client()
        connection = DataConnection(cluster.connection(1))
        refs = (m.ChunkRef(5, 0, 0),)
        _, (writable,) = connection.call_for_descriptors(m.OpenForWrite(1, refs), lambda _: 1)
        os.pwrite(writable, b"bytes", 0)
        with pytest.raises(Conflict):
            client.open_sealed(ChunkId(5, 0), 1)
        os.close(writable)
        found: list[int] = []

        def opened() -> bool:
            """Once the server has closed its own, which it does after it has passed it."""
            with contextlib.suppress(Conflict):
                found.append(client.open_sealed(ChunkId(5, 0), 1))
            return bool(found)

        wait_until(opened)
        (descriptor,) = found
        assert os.pread(descriptor, 10, 0) == b"bytes"
        os.close(descriptor)
        connection.close()


def test_descriptors_do_not_leak(real: Cluster) -> None:
    client = real.client()
    writes = make_writes([5000] * 20)
    writes[3].key = b"short"
    missing = make_writes([100] * 2, first_inode=9000)

    def rounds() -> None:
        client.write_chunks(writes)
        client.read_chunks(reads_of(writes + missing))

    rounds()
    real.metadata.wait_for_beats(1)
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(5):
        rounds()
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 3 * server_module.SERVER_BUFFERS
