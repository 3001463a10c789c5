"""Chunk servers and peers that send nonsense, stand still or come in numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base import frames, large_pages
from kvfs_base.errors import (
    ChunkNotFound,
    ConnectionLost,
    InvalidRequest,
    NoTarget,
    TargetFailed,
)
from kvfs_base.frames import Kind
from kvfs_base.limits import MIB, TRANSFER_BYTES
from kvfs_base.testing import MemoryBlockingNetwork, MemoryDisk
from kvfs_datapath import messages as m
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.server import chunk_server as server_module
from kvfs_datapath.server import session as session_module
from t2_services.chunk_cluster import (
    Cluster,
    make_writes,
    reads_of,
    running,
    wait_until,
)
from t2_services.chunk_noise import with_sums
from t2_services.test_chunk_transfers import stored


@pytest.fixture(params=["os-local", "os-tcp", "memory-local", "memory-tcp"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    kind, _, prefer = request.param.partition("-")
    with running(kind, prefer, tmp_path) as cluster:
        yield cluster


@pytest.fixture(params=["local", "tcp"])
def in_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with running("memory", request.param, tmp_path) as cluster:
        yield cluster


def test_requests_that_make_no_sense(cluster: Cluster) -> None:
    connection = DataConnection(cluster.connection(1))
    new = m.WholeChunk(1, 0, 0, 10, 0, b"")
    with pytest.raises(NoTarget):
        connection.call(m.StatChunks(99, (m.ChunkRef(1, 0, 0),)))
    with pytest.raises(InvalidRequest):
        connection.call(m.WriteChunks(1, (new,)), [b"x" * 5 + bytes(100_000)])
    with pytest.raises(InvalidRequest):
        connection.call(m.WriteChunks(1, (new,)), [b"short"])
    with pytest.raises(InvalidRequest):
        connection.call(m.StatChunks(1, (m.ChunkRef(1, 0, 0),)), [b"nobody asked"])
    outcomes = connection.call(m.PublishChunks(1, (m.StagedItem(77, new),), (78,)))
    assert isinstance(outcomes.error(0), InvalidRequest)
    outcomes = connection.call(m.StatChunks(1, (m.ChunkRef(1, 0, 0),)))
    assert isinstance(outcomes.error(0), ChunkNotFound)
    connection.close()


@pytest.mark.logs_warnings
def test_a_server_answers_for_itself(in_memory: Cluster) -> None:
    """Also when no target can be used any more."""
    (write,) = make_writes([5_000], chains=(1,))
    assert in_memory.client().write_chunks([write]) == [None]
    connection = DataConnection(in_memory.connection(1))
    figures = connection.call(m.Statistics())
    assert figures["chunks_written"] == 1 and figures["written_bytes"] == 5_000
    assert figures["failed_targets"] == 0 and figures["connections"] >= 2
    with pytest.raises(InvalidRequest):
        connection.call(m.Statistics(), [b"nobody asked"])
    disk = in_memory.disk(1)
    assert isinstance(disk, MemoryDisk)

    def before(operation: str, path: str) -> None:
        raise TargetFailed(detail="Input/output error")

    disk.before = before
    outcomes = connection.call(m.StatChunks(1, (m.ChunkRef(*write.chunk),)))
    assert isinstance(outcomes.error(0), TargetFailed)
    later = connection.call(m.Statistics())
    assert later["failed_targets"] == 1
    assert later["requests"] == figures["requests"] + 3
    connection.close()


def test_descriptors_are_for_unix_sockets(tmp_path: Path) -> None:
    with running("os", "tcp", tmp_path) as cluster:
        connection = DataConnection(cluster.connection(1, "tcp"))
        refs = (m.ChunkRef(1, 0, 0),)
        for request in (m.OpenChunks(1, refs), m.StageChunks(1, 1), m.OpenForWrite(1, refs)):
            with pytest.raises(InvalidRequest):
                connection.call(request)
        connection.close()


def send_raw(cluster: Cluster, data: bytes) -> bytes:
    """What the server answers before it hangs up."""
    connection = cluster.connection(1)
    connection.send([data])
    answer = bytearray()
    with contextlib.suppress(ConnectionLost):
        while True:
            byte = memoryview(bytearray(1))
            connection.receive_into([byte])
            answer += byte
    connection.close()
    return bytes(answer)


def changed(frame: bytes, place: int) -> bytes:
    """With one wrong bit."""
    bits = bytearray(frame)
    bits[place] ^= 1
    return bytes(bits)


@pytest.mark.parametrize(
    "data",
    [
        bytes(frames.HEADER_BYTES),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        with_sums(frames.FIELDS.pack(frames.MAGIC, 9, 1, 0, 1, 0)),
        with_sums(frames.FIELDS.pack(frames.MAGIC, frames.VERSION, 1, 1 << 31, 1, 0)),
        with_sums(frames.FIELDS.pack(frames.MAGIC, frames.VERSION, 1, 10, 1, 1 << 62)),
        changed(frames.encode(Kind.REQUEST, 1, m.StatChunks(1, (m.ChunkRef(1, 0, 0),))), 5),
        changed(frames.encode(Kind.REQUEST, 1, m.StatChunks(1, (m.ChunkRef(1, 0, 0),))), -3),
        changed(frames.encode(Kind.REQUEST, 1, m.StatChunks(1, (m.ChunkRef(1, 0, 0),))), 9),
    ],
    ids=[
        "zeros",
        "http",
        "version",
        "long body",
        "long payload",
        "longer body",
        "other body",
        "other number",
    ],
)
def test_noise_ends_a_connection(cluster: Cluster, data: bytes) -> None:
    assert send_raw(cluster, data) == b""
    assert cluster.client().write_chunks(make_writes([10])) == [None]


def test_a_body_that_does_not_parse_is_an_error_and_the_connection_lives(cluster: Cluster) -> None:
    connection = cluster.connection(1)
    for body in (b"\xc1", b"", b"\x93\xa4read\x01\x90", b"\x92\xa7unknown\x01"):
        connection.send([frames.frame(Kind.REQUEST, 5, body, 3), b"pay"])
        header = memoryview(bytearray(frames.HEADER_BYTES))
        connection.receive_into([header])
        answer = frames.decode_header(header)
        assert (answer.kind, answer.request_id) == (Kind.ERROR, 5)
        connection.receive_into([memoryview(bytearray(answer.body_bytes))])
    connection.close()


def test_staged_chunks_go_with_their_connection(tmp_path: Path) -> None:
    with running("os", "local", tmp_path) as cluster:
        connection = DataConnection(cluster.connection(1))
        _, passed = connection.call_for_descriptors(m.StageChunks(1, 3), lambda s: len(s.tokens))
        assert len(drafts(cluster.disk(1))) == 3
        connection.close()
        for descriptor in passed:
            os.close(descriptor)
        wait_until(lambda: drafts(cluster.disk(1)) == [])


def test_stalled_writers_cost_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty peers announce 64 MiB each, send a little and stop. The server lends its few buffers,
    takes them back when the peers' time is up, and serves others meanwhile and afterwards."""
    monkeypatch.setattr(server_module, "SERVER_BUFFERS", 3)
    monkeypatch.setattr(session_module, "STALL_SECONDS", 0.3)
    made: list[int] = []
    real_buffer = large_pages.buffer

    def counting(size: int) -> memoryview:
        made.append(size)
        return real_buffer(size)

    with running("memory", "tcp", tmp_path) as cluster:
        write = stored(cluster)
        monkeypatch.setattr(large_pages, "buffer", counting)
        new = m.WholeChunk(1, 0, 0, 64 * MIB, 0, b"")
        head = frames.encode(Kind.REQUEST, 1, m.WriteChunks(1, (new,)), payload_bytes=64 * MIB)
        stalled = [cluster.connection(1) for _ in range(40)]
        for connection in stalled:
            connection.send([head, bytes(1000)])
        assert cluster.client().read_chunks(reads_of([write])) == [None]
        wait_until(lambda: cluster.servers[1].statistics()["connections"] <= 2)
        assert drafts(cluster.disk(1)) == []
        assert 0 < sum(made) <= 3 * TRANSFER_BYTES
        monkeypatch.setattr(large_pages, "buffer", real_buffer)
        assert cluster.client().write_chunks(make_writes([100], 4000)) == [None]
        for connection in stalled:
            connection.close()


def test_stalled_readers_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "STALL_SECONDS", 0.2)
    with running("os", "tcp", tmp_path) as cluster:
        write = make_writes([64 * MIB])[0]
        assert cluster.client().write_chunks([write]) == [None]
        connection = cluster.connection(1)
        request = m.ReadChunks(1, (write.message(),))
        connection.send([frames.encode(Kind.REQUEST, 1, request)])
        wait_until(lambda: cluster.servers[1].statistics()["chunks_read"] == 1)
        wait_until(lambda: cluster.servers[1].statistics()["connections"] <= 1)
        connection.close()


def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CONNECTIONS_MAX", 2)
    with running("memory", "tcp", tmp_path) as cluster:
        kept = [DataConnection(cluster.connection(1)) for _ in range(2)]
        for connection in kept:
            connection.call(m.StatChunks(1, (m.ChunkRef(1, 0, 0),)))
        refused = DataConnection(cluster.connection(1))
        with pytest.raises(ConnectionLost):
            refused.call(m.StatChunks(1, (m.ChunkRef(1, 0, 0),)))
        kept[0].call(m.StatChunks(1, (m.ChunkRef(1, 0, 0),)))
        assert cluster.servers[1].statistics()["connections_refused"] == 1
        assert isinstance(cluster.env.blocking_network, MemoryBlockingNetwork)
        for connection in (*kept, refused):
            connection.close()
