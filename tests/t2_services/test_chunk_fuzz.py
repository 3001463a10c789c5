"""Noise against chunk servers and chunk clients: nothing hangs, leaks, or is answered wrongly."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfs_base import frames
from kvfs_base.errors import ConnectionLost, InternalError, InvalidRequest, ProtocolError
from kvfs_base.frames import Kind
from kvfs_base.seams import Connection
from kvfs_datapath import messages as m
from kvfs_datapath import session as session_module
from kvfs_datapath import views as views_module
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.server import ChunkServer
from kvfs_datapath.wire import (
    close_all,
    receive_body,
    receive_header_and_descriptors,
    send_message,
)
from t2_services.chain_cluster import CHAIN, ChainCluster, chains, payload
from t2_services.chunk_cluster import assert_equal, make_writes, reads_of, wait_until
from t2_services.chunk_noise import BODY_DEPTH, REQUESTS, Attack, Noise, frame_of

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
        wait_until(lambda: threading.active_count() <= self.threads + self._kept())
        for number in cluster.servers:
            assert cluster.disk(number).list("staging") == []
            assert cluster.read(number, inode=FILE) == self.file
            assert cluster.get_block(number, BLOCK, len(self.block)) == self.block
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
    chunk = m.NewChunk(1, 0, CHAIN, 5000, 0, b"")
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
    chunk = m.NewChunk(1, 0, CHAIN, 5000, 0, b"")
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


def test_the_documents_name_every_request() -> None:
    documents = Path(__file__).parents[2] / "docs" / "design"
    text = "".join(path.read_text() for path in sorted(documents.glob("000[24]-*.md")))
    missing = [kind.__name__ for kind in REQUESTS if kind.__name__ not in text]
    assert missing == []
