"""Heartbeats, removals, and chunks that dying writers leave."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.cluster import HeartbeatReply, TargetState
from kvfs_base.errors import (
    ChunkNotFound,
    Conflict,
    ConnectionLost,
    InvalidRequest,
    NoTarget,
    NotLoopback,
)
from kvfs_base.limits import HEARTBEAT_SECONDS
from kvfs_base.os_disk import OsDisk
from kvfs_base.os_env import os_env
from kvfs_base.types import Address, ChunkId, Layout
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.format import ChunkInfo, path_of
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_datapath.server.heartbeat import Housekeeping
from kvfs_datapath.testing import FakeMetadata
from t2_services.chunk_cluster import (
    SECONDS,
    SERVERS,
    Cluster,
    make_writes,
    reads_of,
    running,
    wait_until,
)


@pytest.fixture(params=["os", "memory"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with running(request.param, "auto", tmp_path) as cluster:
        yield cluster


def stat(cluster: Cluster, chunk: ChunkId, target: int) -> ChunkInfo:
    connection = DataConnection(cluster.connection(target, "unix"))
    try:
        outcomes = connection.call(m.StatChunks(target, (m.ChunkRef(*chunk),)))
    finally:
        connection.close()
    error = outcomes.error(0)
    if error is not None:
        raise error.with_traceback(None)
    (info,) = outcomes.infos
    assert isinstance(info, ChunkInfo)
    return info


# --- heartbeats


def test_what_a_heartbeat_says(cluster: Cluster) -> None:
    report = cluster.metadata.report(1)
    assert report.healthy and report.removed_seq == 0
    assert 0 < report.free_bytes <= report.capacity_bytes
    target = cluster.metadata.current().targets[0]
    assert target.state == TargetState.SERVING
    assert target.host_id == cluster.env.host_id
    assert {target.unix, target.tcp} == set(cluster.servers[1].addresses)
    assert target.tcp is not None and target.tcp.port != 0


def test_a_server_says_where_it_stands(tmp_path: Path) -> None:
    env = os_env()
    metadata = FakeMetadata(env, Address.unix(f"{tmp_path}/m"))
    metadata.start()
    config = ChunkServerConfig(
        server_id="s",
        directories=(f"{tmp_path}/target",),
        metadata=(metadata.address,),
        unix=Address.unix(f"{tmp_path}/s"),
        tcp=None,
        host="blade-7",
        rack="row-2",
    )
    server = ChunkServer(env, config)
    server.start()
    try:
        metadata.wait_for_targets(1)
        beat = metadata.beat(1)
        assert (beat.host, beat.rack) == ("blade-7", "row-2")
    finally:
        server.stop()
        metadata.stop()


def test_clients_may_hear_of_a_target_before_its_server_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, obey = threading.Event(), Housekeeping._obey

    def late(self: Housekeeping, reply: HeartbeatReply) -> None:
        assert heard.wait(SECONDS)
        obey(self, reply)

    monkeypatch.setattr(Housekeeping, "_obey", late)
    cluster = Cluster(os_env(), str(tmp_path), "auto")
    cluster.metadata.start()
    server = cluster.start_server(1)
    results: list[object] = []
    try:
        cluster.metadata.wait_for_targets(1)
        client, writes = cluster.client(), make_writes([1000], chains=[1])
        writer = threading.Thread(target=lambda: results.extend(client.write_chunks(writes)))
        writer.start()
        wait_until(lambda: server.statistics()["requests"])
        writer.join(2 * HEARTBEAT_SECONDS)
        assert not results
        heard.set()
        writer.join(SECONDS)
        assert results == [None]
    finally:
        heard.set()
        cluster.stop()


@pytest.mark.logs_warnings
def test_a_target_that_was_removed_serves_nobody_until_it_is_admitted(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    (write,) = make_writes([1000], chains=[1])
    assert cluster.client().write_chunks([write]) == [None]
    seq = cluster.metadata.order_removals(1, [(99, 0, 1)])
    cluster.metadata.wait_for_removals(1, seq)
    uuid = cluster.metadata.remove(1)
    wait_until(lambda: f"TargetRemoved(uuid='{uuid}')" in caplog.text)
    with pytest.raises(NoTarget):
        stat(cluster, write.chunk, 1)
    assert isinstance(cluster.client().read_chunks(reads_of([write]))[0], NoTarget)
    cluster.metadata.wait_for_beats(2)
    assert caplog.text.count("TargetRemoved") == 1
    cluster.metadata.admit(uuid)
    number = SERVERS + 1
    (store,) = cluster.servers[1]._targets.stores
    wait_until(lambda: store.target_id == number)
    assert cluster.metadata.report(number).removed_seq == 0, "its queue is a new one"
    (again,) = make_writes([1000], first_inode=50, chains=[number])
    assert cluster.client().write_chunks([again]) == [None]
    (read,) = reads_of([again])
    assert cluster.client().read_chunks([read]) == [None]
    assert bytes(read.view[:1000]) == bytes(again.view[:1000])


def test_a_configured_capacity_is_reported(tmp_path: Path) -> None:
    with running("os", "auto", tmp_path) as cluster:
        config = ChunkServerConfig(
            server_id="small",
            directories=(f"{tmp_path}/a", f"{tmp_path}/b"),
            metadata=(cluster.metadata.address,),
            unix=Address.unix(f"{tmp_path}/small.sock"),
            tcp=None,
            capacity_bytes=12_345,
        )
        server = ChunkServer(cluster.env, config)
        server.start()
        cluster.metadata.wait_for_targets(5)
        for number in (4, 5):
            report = cluster.metadata.report(number)
            assert report.capacity_bytes == report.free_bytes == 12_345
        server.stop()


def test_the_metadata_service_may_come_late_and_go_away(tmp_path: Path) -> None:
    with running("os", "auto", tmp_path) as cluster:
        write = make_writes([1000])[0]
        client = cluster.client()
        assert client.write_chunks([write]) == [None]
        cluster.metadata.stop()
        cluster.servers[1].stop()
        server = cluster.start_server(1)  # serves what it has without being told who it is
        wait_until(lambda: server.statistics()["heartbeats_failed"] >= 1)
        assert client.read_chunks(reads_of([write])) == [None]
        cluster.metadata.start()
        wait_until(lambda: server.statistics()["heartbeats"] >= 1)


def test_heartbeats_go_on_with_another_metadata_server(tmp_path: Path) -> None:
    env = os_env()
    metadata = [FakeMetadata(env, Address.unix(f"{tmp_path}/m{n}")) for n in range(2)]
    nobody = Address.unix(f"{tmp_path}/nobody")
    metadata[0].start()
    config = ChunkServerConfig(
        server_id="s",
        directories=(f"{tmp_path}/target",),
        metadata=(nobody, metadata[0].address, metadata[1].address),
        unix=Address.unix(f"{tmp_path}/s"),
        tcp=None,
    )
    server = ChunkServer(env, config)
    server.start()
    try:
        metadata[0].wait_for_targets(1)
        metadata[1].start()
        metadata[0].stop()
        metadata[1].wait_for_targets(1)
        metadata[0].start()
        metadata[1].stop()
        metadata[0].wait_for_beats(1)
    finally:
        server.stop()
        metadata[0].stop()


def test_a_server_whose_address_is_taken(tmp_path: Path) -> None:
    with running("os", "auto", tmp_path) as cluster:
        for unix, tcp, error in (
            (cluster.servers[1].addresses[0], None, ConnectionLost),
            (None, Address.tcp("0.0.0.0", 0), NotLoopback),
        ):
            config = ChunkServerConfig(
                "x", (f"{tmp_path}/x",), (cluster.metadata.address,), unix, tcp
            )
            server = ChunkServer(cluster.env, config)
            with pytest.raises(error):
                server.start()
            again = ChunkServer(cluster.env, config)  # the directory was given back
            again.stop()


def test_two_servers_on_one_directory(cluster: Cluster, tmp_path: Path) -> None:
    config = ChunkServerConfig(
        server_id="second",
        directories=(f"{tmp_path}/fresh", cluster.directory(1)),
        metadata=(cluster.metadata.address,),
        unix=Address.unix(f"{tmp_path}/second.sock"),
        tcp=None,
    )
    for _ in range(2):
        with pytest.raises(Conflict):
            ChunkServer(cluster.env, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"directories": ()},
        {"directories": ("/a", "/a")},
        {"directories": tuple(f"/{n}" for n in range(65))},
        {"durability": "hope"},
        {"unix": None},
        {"capacity_bytes": -1},
        {"rack": "r" * 256},
        {"metadata": ()},
    ],
)
def test_bad_settings(changes: dict[str, object]) -> None:
    settings: dict[str, object] = {
        "server_id": "s",
        "directories": ("/a",),
        "metadata": (Address.unix("/m"),),
        "unix": Address.unix("/u"),
        "tcp": None,
    }
    with pytest.raises(InvalidRequest):
        ChunkServerConfig(**{**settings, **changes})  # type: ignore[arg-type]


# --- removals


def test_removals_are_carried_out_and_reported(cluster: Cluster) -> None:
    client = cluster.client()
    writes = make_writes([100] * 6, chains=[1])
    assert client.write_chunks(writes) == [None] * 6
    seq = cluster.metadata.order_removals(
        1, [(w.chunk.inode, 0, 1) for w in writes[:4]] + [(99, 0, 5), (98, 0, 1 << 31)]
    )
    cluster.metadata.wait_for_removals(1, seq)
    results = client.read_chunks(reads_of(writes))
    assert [type(r) for r in results] == [ChunkNotFound] * 4 + [type(None)] * 2
    assert cluster.servers[1].statistics()["chunks_removed"] == 4
    assert cluster.metadata.report(2).removed_seq == 0


def test_a_restart_forgets_no_removal(cluster: Cluster) -> None:
    client = cluster.client()
    writes = make_writes([100] * 2, chains=[1])
    assert client.write_chunks(writes) == [None] * 2
    cluster.servers[1].stop()
    seq = cluster.metadata.order_removals(1, [(writes[0].chunk.inode, 0, 1)])
    cluster.start_server(1)
    cluster.metadata.wait_for_removals(1, seq)
    results = client.read_chunks(reads_of(writes))
    assert [type(r) for r in results] == [ChunkNotFound, type(None)]


def test_a_wide_removal_takes_a_whole_file(cluster: Cluster) -> None:
    client = cluster.client()
    file = StripedFile(client, 7, Layout(4096, (1, 2, 3)))
    file.write(0, bytes(100_000))
    file.close()
    for number in (1, 2, 3):
        seq = cluster.metadata.order_removals(number, [(7, 0, (1 << 32) - 1)])
        cluster.metadata.wait_for_removals(number, seq)
    for number in range(25):
        with pytest.raises(ChunkNotFound):
            stat(cluster, ChunkId(7, number), 1 + number % 3)


# --- writers that die


@pytest.mark.parametrize("prefer", ["local", "tcp"])
def test_a_chunk_is_sealed_when_its_writer_goes(cluster: Cluster, prefer: str) -> None:
    client = ChunkClient(cluster.env, cluster.metadata, prefer=prefer)
    file = StripedFile(client, 7, Layout(1 << 20, (1,)))
    file.write(3, b"bytes")
    chunk = ChunkId(7, 0)
    assert not stat(cluster, chunk, 1).is_sealed
    client.close()  # without flush or close of the file
    wait_until(lambda: stat(cluster, chunk, 1).is_sealed)
    assert stat(cluster, chunk, 1).crc32c == crc32c(b"\0\0\0bytes")


WRITER = """
import os, sys
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from kvfs_datapath import messages as m
from kvfs_datapath.connections import DataConnection

connection = os_env().blocking_network.connect(Address.unix(sys.argv[1]), 10)
request = m.OpenForWrite(1, (m.ChunkRef(7, 0, 0),))
_, (fd,) = DataConnection(connection).call_for_descriptors(request, lambda _: 1)
os.pwrite(fd, b"first", 0)
if sys.argv[2] == "keep":
    connection.close()
print("written", flush=True)
sys.stdin.readline()
os.pwrite(fd, b" last", 5)
print("again", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", ["keep", "die"])
def test_a_killed_process_leaves_a_sealed_chunk(tmp_path: Path, mode: str) -> None:
    """``keep``: its connection ends first, but it still has the descriptor and writes through it.
    The kernel says so, and the chunk stays open until it is gone."""
    with running("os", "auto", tmp_path) as cluster:
        path = cluster.servers[1].addresses[0].path
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, path, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as writer:
            assert writer.stdin is not None and writer.stdout is not None
            assert writer.stdout.readline() == "written\n"
            cluster.metadata.wait_for_beats(2)  # time for hasty seals
            assert not stat(cluster, ChunkId(7, 0), 1).is_sealed
            writer.stdin.write("\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "again\n"
            writer.kill()
        wait_until(lambda: stat(cluster, ChunkId(7, 0), 1).is_sealed)
        assert stat(cluster, ChunkId(7, 0), 1).crc32c == crc32c(b"first last")


def test_a_killed_server_loses_nothing_published(tmp_path: Path) -> None:
    """kill -9 of a server process between two clients' requests."""
    program = """
import sys
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_datapath.server.heartbeat import Housekeeping

root = sys.argv[1]
config = ChunkServerConfig(
    "victim", (root + "/victim",), (Address.unix(root + "/metadata.sock"),),
    Address.unix(root + "/victim.sock"), None)
server = ChunkServer(os_env(), config)
server.start()
print("ready", flush=True)
sys.stdin.readline()
"""

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    with running("os", "auto", tmp_path) as cluster:
        client = cluster.client()
        with start() as process:
            cluster.metadata.wait_for_targets(4)
            cluster.metadata.wait_for_beats(2)  # it has heard what its number is
            writes = make_writes([50_000] * 20, chains=[4])
            assert client.write_chunks(writes) == [None] * 20
            process.kill()
        results = client.read_chunks(reads_of(writes))
        assert {type(r) for r in results} == {ConnectionLost}
        (tmp_path / "victim" / "staging" / "torn").write_bytes(b"x")
        with start() as process:
            assert client.read_chunks(reads_of(writes)) == [None] * 20
            assert drafts(OsDisk(str(tmp_path / "victim"))) == []
            process.kill()


def open_files() -> set[tuple[str, str]]:
    """Descriptors of this process and what they are."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def test_nothing_of_a_server_remains_after_stop(tmp_path: Path) -> None:
    before = open_files()
    with running("os", "auto", tmp_path) as cluster:
        client = cluster.client()
        assert client.write_chunks(make_writes([5000] * 9)) == [None] * 9
        file = StripedFile(client, 7, Layout(4096, (1, 2, 3)))
        file.write(0, bytes(20_000))
        assert (Path(cluster.directory(1)) / path_of(ChunkId(7, 0))).exists()
    assert open_files() - before == set()
    assert not list(tmp_path.glob("*.sock"))
