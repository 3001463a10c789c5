"""Noise against chunk servers and chunk clients: nothing hangs, leaks, or is answered wrongly."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chain_fakes import FakeCluster, FakeServer, Stored
from kvfs_base import frames
from kvfs_base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KvfsError,
    ProtocolError,
)
from kvfs_base.frames import Kind
from kvfs_base.seams import Connection
from kvfs_base.types import ChunkId, Layout
from kvfs_datapath import connections as connections_module
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains import views as views_module
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.client import chain_reads as chain_reads_module
from kvfs_datapath.client import chain_writes as chain_writes_module
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.server import session as session_module
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_datapath.wire import (
    close_all,
    decode_reply,
    receive_body,
    receive_header_and_descriptors,
    send_message,
)
from t2_services.chain_cluster import CHAIN, ChainCluster, chains, payload
from t2_services.chunk_cluster import assert_equal, make_writes, reads_of, wait_until
from t2_services.chunk_noise import BODY_DEPTH, REQUESTS, Answers, Attack, Noise, frame_of

FILE = 0x7A7A_7A7A_7A01
BLOCK = 0x7A7A_7A7A_7A02
SINGLE = 0x7A7A_7A7A_7B00
"""Inodes that no noise names: what they hold is somebody else's."""

OTHER = CHAIN + 1
"""A chain with a member that is being brought in step."""


class Attacked:
    """Servers with chunks of their own on a chain of three copies, and on chains of one."""

    def __init__(self, cluster: ChainCluster) -> None:
        self.cluster = cluster
        self.chains = (
            cluster.metadata.set_chain(OTHER, (2, 1), syncing=(3,)),
            cluster.set_chain((1, 2, 3)),
        )
        self.file, self.block = payload(5000), payload(70_000)
        cluster.write(1, self.file, inode=FILE)
        assert cluster.put_blocks(1, (2, 3), {BLOCK: self.block}) == [None]
        self.client = cluster.client()
        self.writes = make_writes([5000, 3 << 20], SINGLE)
        assert self.client.write_chunks(self.writes) == [None, None]
        self.threads = threading.active_count()

    def noise(self, rng: random.Random, number: int) -> Noise:
        return Noise(rng, number, self.chains)

    def send(self, number: int, kind: str, attack: Attack, *, listen: bool = True) -> None:
        """Everything that must be answered is. ``listen``: or else is gone before that."""
        with contextlib.closing(self.cluster.connection(number, kind)) as connection:
            for data in attack.asked:
                connection.send([data])
                if not listen:
                    return
                error = answer_of(connection)
                assert not isinstance(error, InternalError), attack
            with contextlib.suppress(ConnectionLost):  # closed while it was told more
                connection.send([attack.rest])

    def check(self) -> None:
        """Everything is as it was, and honest clients get what they ask for."""
        cluster = self.cluster
        for server in cluster.servers.values():
            wait_until(lambda s=server: in_use(s) == 0)
        wait_until(lambda: self._connections() == self._kept())
        helpers = sum(len(s._chains.crew._pool._threads) for s in cluster.servers.values())
        wait_until(lambda: threading.active_count() <= self.threads + self._kept() + helpers)
        for number in cluster.servers:
            assert drafts(cluster.disk(number)) == []
            assert cluster.read(number, inode=FILE) == self.file
            assert cluster.get_block(number, BLOCK, self.block) == self.block
        reads = reads_of(self.writes)
        assert self.client.read_chunks(reads) == [None, None]
        assert_equal(reads, self.writes)
        self.file = self.file[:100] + payload(100) + self.file[200:]
        cluster.write(1, self.file[100:200], inode=FILE, offset=100, sequence=1)
        assert {cluster.read(n, inode=FILE) for n in cluster.servers} == {self.file}

    def _connections(self) -> int:
        return sum(s.statistics()["connections"] for s in self.cluster.servers.values())

    def _kept(self) -> int:
        """Connections that servers, and the honest client, keep for their next request."""
        pools = [server._chains.peers._pool for server in self.cluster.servers.values()]
        pools.append(self.client.pool)
        return sum(len(idle) for pool in pools for idle in pool._idle.values())


def in_use(server: ChunkServer) -> int:
    """Buffers that somebody has, or that were lost."""
    sending = server._chains.replicator._buffers
    pools = [server._buffers, server._check_buffers, sending, *server._chains._buffers]
    return sum(_lent(pool) for pool in pools)


def _lent(pool: BufferPool) -> int:
    slots = pool._slots
    assert isinstance(slots, threading.BoundedSemaphore)
    return int(slots._initial_value - slots._value)  # type: ignore[attr-defined]


def answer_of(connection: Connection) -> object:
    """Reads one answer; its error, if it is one. Raises DeadlineExceeded if there is none."""
    header, descriptors = receive_header_and_descriptors(connection)
    close_all(descriptors)
    body = receive_body(connection, header)
    if header.payload_bytes:
        connection.receive_into([memoryview(bytearray(header.payload_bytes))])
    return frames.decode_error(body) if header.kind is Kind.ERROR else None


@pytest.fixture
def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attacked]:
    monkeypatch.setattr(views_module, "VIEW_WAIT_SECONDS", 0.01)
    with chains(tmp_path) as cluster:
        yield Attacked(cluster)


# --- servers


def test_servers_survive_noise(attacked: Attacked) -> None:
    for seed in range(400):
        rng = random.Random(seed)
        number, kind = rng.randint(1, 3), rng.choice(("tcp", "unix"))
        attack = attacked.noise(rng, number).attack()
        attacked.send(number, kind, attack, listen=rng.random() < 0.9)
    attacked.check()


def test_servers_survive_what_hypothesis_finds(attacked: Attacked) -> None:
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from(("tcp", "unix")))
    def attack(rng: random.Random, number: int, kind: str) -> None:
        attacked.send(number, kind, attacked.noise(rng, number).attack())

    attack()
    attacked.check()


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
def test_every_request_is_answered(attacked: Attacked, kind: type[m.ChunkRequest]) -> None:
    """With fields that are right one by one, several times on one connection."""
    rng = random.Random(kind.__name__)
    for number in attacked.cluster.servers:
        noise = attacked.noise(rng, number)
        for way in ("tcp", "unix"):
            asked = tuple(noise.frame(noise.request(kind)) for _ in range(10))
            attacked.send(number, way, Attack(asked))
    attacked.check()


def test_bodies_may_not_be_deeper_than_the_stack(attacked: Attacked) -> None:
    body = b"\x93\xa4stat\x01" + b"\x91" * BODY_DEPTH + b"\xc0"
    with contextlib.closing(attacked.cluster.connection(1)) as connection:
        connection.send([frame_of(body)])
        assert isinstance(answer_of(connection), ProtocolError)


def test_a_payload_that_does_not_fit_is_refused_before_it_is_passed_on(attacked: Attacked) -> None:
    """Once the next member waited for bytes that never came, and was taken for dead."""
    chunk = m.WholeChunk(1, 0, CHAIN, 5000, 0, b"")
    request = m.WriteChunks(1, (chunk,), attacked.cluster.passing(2, 3))
    for size in (0, 4999, 5001):
        with contextlib.closing(attacked.cluster.connection(1)) as connection:
            send_message(connection, Kind.REQUEST, 1, request, [bytes(size)])
            assert isinstance(answer_of(connection), InvalidRequest)
    assert attacked.cluster.servers[1]._chains.peers.reach.doubtful() == []
    attacked.check()


def test_whoever_stands_still_gives_back_what_he_has(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "STALL_SECONDS", 0.05)
    chunk = m.WholeChunk(1, 0, CHAIN, 5000, 0, b"")
    request = m.WriteChunks(1, (chunk,), attacked.cluster.passing(2, 3))
    whole = frames.encode(Kind.REQUEST, 1, request, 5000) + bytes(5000)
    with contextlib.ExitStack() as stack:
        for end in (
            frames.HEADER_BYTES,
            frames.HEADER_BYTES + 5,
            len(whole) - 5000,
            len(whole) - 1,
        ):
            connection = stack.enter_context(contextlib.closing(attacked.cluster.connection(1)))
            connection.send([whole[:end]])
            with pytest.raises(ConnectionLost):
                answer_of(connection)
        attacked.check()


# --- clients


class Hostile(FakeServer):
    """Does what it is asked, and says something else."""

    rng = random.Random(0)

    def _do(
        self, request: Any, payload: bytes, staged: dict[int, int]
    ) -> tuple[Any, bytes, list[int]]:
        match request:
            case m.PublishChunks() if {c.token for c in request.chunks} - staged.keys():
                raise InvalidRequest(detail="tokens that were made up")
            case m.RemoveRange(passing=None):
                return m.Outcomes((), {}), b"", []
            case m.WritePieces():
                return m.Outcomes((None,) * len(request.pieces), {}), b"", []
            case m.TruncateChunks():
                return m.Outcomes((None,) * len(request.chunks), {}), b"", []
            case m.SealChunks() | m.OpenForWrite():
                infos = tuple(ChunkInfo(*c.chunk, ChunkState.OPEN) for c in request.chunks)
                is_open = isinstance(request, m.OpenForWrite)
                made = [os.memfd_create("hostile") for _ in infos] if is_open else []
                return m.Outcomes(infos, {}), b"", made
        return super()._do(request, payload, staged)

    def _answer(
        self,
        connection: Connection,
        number: int,
        request: m.ChunkRequest,
        payload: bytes,
        staged: dict[int, int],
    ) -> None:
        descriptors: list[int] = []
        try:
            with self.cluster.lock:
                reply, out, descriptors = self._do(request, payload, staged)
                answers = Answers(random.Random(self.rng.getrandbits(64)))
            answers.send(connection, number, (reply, out, descriptors))
        except KvfsError as exc:
            if isinstance(exc, ConnectionLost | DeadlineExceeded):
                raise
            connection.send([frames.encode_error(number, exc)])
        finally:
            close_all([d for d in descriptors if d not in staged.values()])


class Deceived:
    """A client of three hostile servers: chains 1 and 2 of one copy, chain 10 of three."""

    def __init__(self, cluster: FakeCluster, prefer: str) -> None:
        self.client = cluster.client(prefer)
        self.writes = make_writes([5000, 0, 70_000, 4096], SINGLE, chains=(1, 2))
        chained = make_writes([5000, 70_000], BLOCK, chains=(10,))
        for write in chained:
            write.chunk = ChunkId(write.chunk.inode, write.chunk.number, 10)
        self.writes += chained
        for server in cluster.servers.values():
            for write in self.writes:
                chunk, state = write.chunk, ChunkState.SEALED
                info = ChunkInfo(*chunk, state, write.size, write.crc32c, write.key)
                server.chunks[chunk] = Stored(bytes(write.view[: write.size]), info)

    def attempt(self, rng: random.Random) -> None:
        """Something that clients do: it works, or fails as the tree of errors has it."""
        what = (self.read, self.read, self.write, self.open, self.files)
        with contextlib.suppress(KvfsError):
            rng.choice(what)(rng)

    def read(self, rng: random.Random) -> None:
        wanted = rng.sample(self.writes, rng.randint(1, len(self.writes)))
        reads = reads_of(wanted)
        for read, write, error in zip(reads, wanted, self.client.read_chunks(reads), strict=True):
            assert error is None or isinstance(error, KvfsError)
            assert str(error)
            if error is None:
                assert read.view[: read.size] == write.view[: write.size]

    def write(self, rng: random.Random) -> None:
        for error in self.client.write_chunks(rng.sample(self.writes, 3)):
            assert error is None or isinstance(error, KvfsError)

    def open(self, rng: random.Random) -> None:
        write = rng.choice(self.writes)
        os.close(self.client.open_sealed(write.chunk, write.chain))

    def files(self, rng: random.Random) -> None:
        layout = Layout(4096, rng.choice(((1, 2), (10,))))
        file = StripedFile(self.client, FILE + rng.randrange(4), layout, retry_seconds=0)
        for _ in range(3):
            with contextlib.suppress(KvfsError):
                match rng.randrange(4):
                    case 0:
                        file.write(rng.randrange(9000), bytes(rng.randrange(9000)))
                    case 1:
                        file.read(rng.randrange(9000), 5000, 18_000, True)
                    case 2:
                        file.truncate(18_000, rng.randrange(9000))
                    case 3:
                        file.sync()
        file.close()


@pytest.mark.parametrize("prefer", ["auto", "tcp"])
def test_clients_survive_noise(prefer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "DATA_SECONDS", 0.03)
    monkeypatch.setattr(connections_module, "CALL_SECONDS", 0.03)
    monkeypatch.setattr(chain_reads_module, "CHAIN_READ_SECONDS", 0.05)
    monkeypatch.setattr(chain_writes_module, "CHAIN_WRITE_SECONDS", 0.05)
    before = threading.active_count(), open_descriptors()
    cluster = FakeCluster(local=(1, 2) if prefer == "auto" else ())
    for number, honest in list(cluster.servers.items()):
        cluster.servers[number] = Hostile(cluster, number, honest.host)
    cluster.set_chain(1, (1,))
    cluster.set_chain(2, (2,))
    cluster.set_chain(10, (1, 2, 3))
    cluster.start()
    try:
        deceived = Deceived(cluster, prefer)
        for seed in range(150):
            Hostile.rng = random.Random(seed)
            deceived.attempt(random.Random(seed))
    finally:
        cluster.stop()
    wait_until(lambda: (threading.active_count(), open_descriptors()) <= before)


@pytest.mark.parametrize("infos", [(), (None,), (None, None)])
def test_an_answer_without_a_reason_is_none(infos: tuple[None, ...]) -> None:
    """An item without info and error once counted as read, its memory as it was before."""
    request = m.StatChunks(1, (m.ChunkRef(1, 0, 0),))
    reply = m.Outcomes(infos, {})
    assert m.reply_problem(request, reply)
    assert not m.reply_problem(request, m.Outcomes((None,), {0: frames.ErrorBody("conflict", {})}))
    frame = frames.encode(Kind.REPLY, 1, reply)
    header = frames.decode_header(frame)
    with pytest.raises(ProtocolError):
        decode_reply(header, frame[frames.HEADER_BYTES :], request)


def test_a_read_is_answered_by_bytes_and_reasons_alone() -> None:
    request = m.ReadChunks(1, (m.WholeChunk(1, 0, 0, 5000, 0, b""),) * 2)
    gone = frames.ErrorBody("conflict", {})
    for good in (m.Outcomes((), {}), m.Outcomes((), {1: gone})):
        assert not m.reply_problem(request, good)
    for bad in (m.Outcomes((None, None), {}), m.Outcomes((), {2: gone})):
        assert m.reply_problem(request, bad)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_documents_name_every_request() -> None:
    documents = Path(__file__).parents[2] / "docs" / "design"
    text = "".join(path.read_text() for path in sorted(documents.glob("000[246]-*.md")))
    missing = [kind.__name__ for kind in REQUESTS if kind.__name__ not in text]
    assert missing == []
