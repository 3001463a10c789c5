"""The next portion of a batch is asked for before the one before it is here. A server that is made
by hand says how far a client may be, and when its connections break."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from kvfs_base import frames
from kvfs_base.errors import ChunkCorrupt, ChunkNotFound, ConnectionLost, ServerBusy
from kvfs_base.frames import Kind
from kvfs_base.limits import KIB
from kvfs_base.seams import Connection
from kvfs_base.testing import ManualClock, MemoryBlockingNetwork
from kvfs_base.types import Address, ChunkId
from kvfs_datapath import checksum, connections
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client import workers
from kvfs_datapath.client.routes import Route
from kvfs_datapath.client.transfers import ChunkRead, ReadShare, Results, read_portion
from kvfs_datapath.client.workers import Portions
from kvfs_datapath.connections import Attempt, ConnectionPool
from kvfs_datapath.wire import receive_body, receive_header

SECONDS = 60.0
PIECE = 64 * KIB
PORTION = 3 * PIECE
_decoder = msgspec.msgpack.Decoder(m.DataRequest)
Talk = Callable[["Server", Connection], None]


class Server:
    """Talks on each connection as the next of ``talks`` says, then as the last one does."""

    def __init__(self, network: MemoryBlockingNetwork, chunks: dict[ChunkId, bytes]) -> None:
        self.chunks = chunks
        self.talks: list[Talk] = [honest]
        self.asked: list[list[ChunkId]] = []
        self.connections: list[Connection] = []
        self.errors: list[BaseException] = []
        self._listener = network.listen(Address.tcp("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def address(self) -> Address:
        return self._listener.address

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except ConnectionLost:
                return
            connection.set_timeout(SECONDS)
            talk = self.talks[min(len(self.connections), len(self.talks) - 1)]
            self.connections.append(connection)
            thread = threading.Thread(target=self._talk, args=(talk, connection))
            self._threads.append(thread)
            thread.start()

    def _talk(self, talk: Talk, connection: Connection) -> None:
        try:
            talk(self, connection)
        except ConnectionLost:
            pass
        except BaseException as exc:
            self.errors.append(exc)
        finally:
            connection.close()

    def receive(self, connection: Connection) -> tuple[int, list[ChunkId]]:
        header = receive_header(connection)
        request = _decoder.decode(receive_body(connection, header))
        if isinstance(request, m.CheckChunks):
            infos = tuple(None for _ in request.chunks)
            errors = {i: error_of(ChunkCorrupt(*c.chunk)) for i, c in enumerate(request.chunks)}
            reply = frames.encode(Kind.REPLY, header.request_id, m.Outcomes(infos, errors))
            connection.send([reply])
            return self.receive(connection)
        assert isinstance(request, m.ReadChunks)
        wanted = [item.chunk for item in request.chunks]
        self.asked.append(wanted)
        return header.request_id, wanted

    def answer(self, request_id: int, wanted: list[ChunkId]) -> tuple[bytes, bytes]:
        """The frame and the payload."""
        errors = {
            place: error_of(ChunkNotFound(*chunk))
            for place, chunk in enumerate(wanted)
            if chunk not in self.chunks
        }
        payload = b"".join(self.chunks.get(chunk, b"") for chunk in wanted)
        reply = m.Outcomes((), errors)
        return frames.encode(Kind.REPLY, request_id, reply, len(payload)), payload

    def stop(self) -> None:
        self._listener.close()
        for connection in self.connections:
            connection.shutdown()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert not self.errors


def error_of(error: Any) -> frames.ErrorBody:
    return frames.ErrorBody(error.wire_code, error.wire_data())


def honest(server: Server, connection: Connection) -> None:
    while True:
        connection.send([*server.answer(*server.receive(connection))])


class World:
    """Portions of two chunks each, one piece and two long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, portions: int, threads: int = 1) -> None:
        self.network = MemoryBlockingNetwork()
        self.chunks = {
            ChunkId(1000 + i, 0): os.urandom((1 + i % 2) * PIECE) for i in range(2 * portions)
        }
        self.server = Server(self.network, self.chunks)
        self.pool = ConnectionPool(self.network, ManualClock())
        self.route = Route(1, self.server.address, local=False)
        self.reads = [
            ChunkRead(chunk, 1, len(d), crc32c(d), b"", memoryview(bytearray(len(d))))
            for chunk, d in self.chunks.items()
        ]
        monkeypatch.setattr(workers, "CLIENT_THREADS_PER_TARGET", threads)
        self.portions = Portions([[2 * i, 2 * i + 1] for i in range(portions)])
        self.share = ReadShare(self.pool, self.route, self.portions, self.reads)

    def portion(self) -> list[int]:
        taken = self.share.take()
        assert taken is not None
        return taken

    def read(self, attempt: Attempt | None = None) -> Results:
        return self.share.transfer([self.reads[i] for i in self.portion()], attempt)

    def read_all(self) -> Results:
        results: Results = []
        while (taken := self.share.take()) is not None:
            results += self.share.transfer([self.reads[i] for i in taken])
        return results

    def assert_read(self) -> None:
        for read in self.reads:
            assert bytes(read.view) == self.chunks[read.chunk]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(connections, "SUM_BYTES", PIECE)
    with contextlib.ExitStack() as stack:
        world = World(monkeypatch, 4)
        stack.callback(world.server.stop)
        stack.callback(world.pool.close)
        yield world


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_the_next_request_comes_before_the_last_piece_leaves(
    world: World, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """Such a server would wait for ever if it had to send the rest first."""
    monkeypatch.setattr(connections, "SUM_BYTES", -(-PORTION // pieces))

    def reluctant(server: Server, connection: Connection) -> None:
        request = server.receive(connection)
        for left in (3, 2, 1, 0):
            frame, payload = server.answer(*request)
            held_back = connections.SUM_BYTES if left else 0
            connection.send([frame, payload[: PORTION - held_back]])
            if left:
                request = server.receive(connection)
            connection.send([payload[PORTION - held_back :]])

    world.server.talks = [reluctant]
    assert world.read_all() == [None] * 8
    world.assert_read()
    assert len(world.server.asked) == 4


def test_a_portion_is_taken_late(world: World) -> None:
    """Another thread may be done sooner: while most of a portion is to come, the rest is free."""
    is_half = threading.Event()
    go_on = threading.Event()

    def halting(server: Server, connection: Connection) -> None:
        frame, payload = server.answer(*server.receive(connection))
        connection.send([frame, payload[: PIECE + 1]])
        is_half.set()
        assert go_on.wait(SECONDS)
        connection.send([payload[PIECE + 1 :]])
        honest(server, connection)

    world.server.talks = [halting, honest]
    reading = threading.Thread(target=world.read_all)
    reading.start()
    assert is_half.wait(SECONDS)
    for left in (1, 2, 3):
        taken = world.portions.take()
        assert taken == [2 * left, 2 * left + 1]
        assert read_portion(world.pool, world.route, [world.reads[i] for i in taken]) == [None] * 2
    assert world.portions.take() is None
    go_on.set()
    reading.join(SECONDS)
    world.assert_read()


@pytest.mark.parametrize("sent", [0, 10, PIECE, PORTION - 1, PORTION])
def test_a_connection_that_breaks_costs_nothing(world: World, sent: int) -> None:
    """It was kept: the portion that was coming is asked for again, and so is the one ahead."""

    def breaking(server: Server, connection: Connection) -> None:
        for _ in range(2):
            request = server.receive(connection)
            frame, payload = server.answer(*request)
            connection.send([frame, payload])
        frame, payload = server.answer(*server.receive(connection))
        if sent:
            connection.send([frame, payload[:sent]])

    world.server.talks = [breaking, honest]
    assert world.read_all() == [None] * 8
    world.assert_read()


def test_chunks_that_are_not_there_cost_only_themselves(world: World) -> None:
    kept = dict(world.chunks)
    for index in (
        1,
        2,
        3,
    ):  # of the first portion one, of the second all: there is nothing to wait for
        del world.chunks[world.reads[index].chunk]
    results = world.read_all()
    assert [type(r) for r in results[1:4]] == [ChunkNotFound] * 3
    assert results[:1] + results[4:] == [None] * 5
    for read, result in zip(world.reads, results, strict=True):
        assert result is not None or bytes(read.view) == kept[read.chunk]
    assert len(world.server.connections) == 1


def test_a_bad_chunk_is_looked_at_while_the_next_portion_comes(world: World) -> None:
    read = world.reads[0]
    world.server.chunks = dict(world.chunks)
    world.server.chunks[read.chunk] = bytes(read.size)
    results = world.read_all()
    assert isinstance(results[0], ChunkCorrupt)
    assert results[1:] == [None] * 7


def test_a_request_that_is_refused_leaves_the_next_one_alone(world: World) -> None:
    def busy(server: Server, connection: Connection) -> None:
        connection.send([*server.answer(*server.receive(connection))])
        request_id, _ = server.receive(connection)
        connection.send([frames.encode_error(request_id, ServerBusy())])
        honest(server, connection)

    world.server.talks = [busy]
    assert world.read() == [None, None]
    with pytest.raises(ServerBusy):
        world.read()
    assert world.read_all() == [None] * 4
    assert len(world.server.connections) == 1


def test_one_that_was_broken_off_before_it_began(world: World) -> None:
    """What was asked for ahead of it is thrown away with its connection, not taken for another."""
    assert world.read() == [None, None]
    attempt = Attempt()
    attempt.cancel()
    with pytest.raises(ConnectionLost):
        world.read(attempt)
    assert world.read_all() == [None] * 4
    assert len(world.server.connections) == 2


def test_what_is_left_breaks_its_connection(world: World) -> None:
    """Nobody reads the answer: it must not be taken for one to somebody else's request."""
    assert world.read() == [None, None]
    world.share.leave()
    assert world.read_all() == [None] * 6
    world.assert_read()
    assert len(world.server.connections) == 2


def test_closing_breaks_off_what_was_asked_for_ahead(world: World) -> None:
    stopped = threading.Event()

    def silent(server: Server, connection: Connection) -> None:
        connection.send([*server.answer(*server.receive(connection))])
        server.receive(connection)
        with contextlib.suppress(ConnectionLost):
            server.receive(connection)
        stopped.set()

    world.server.talks = [silent]
    assert world.read() == [None, None]
    world.pool.close()
    assert stopped.wait(SECONDS)
    with pytest.raises(ConnectionLost):
        world.read()


def test_small_chunks_that_lie_together_are_told_apart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sums are looked at together; one that is wrong is found among them."""
    size, count = PIECE // 4, 10
    memory = memoryview(bytearray(count * size))
    chunks = {ChunkId(2000 + i, 0): os.urandom(size) for i in range(count)}
    reads = [
        ChunkRead(chunk, 1, size, crc32c(data), b"", memory[i * size : (i + 1) * size])
        for i, (chunk, data) in enumerate(chunks.items())
    ]
    together: list[bool] = []

    def have_sums(views: list[memoryview], sums: list[int]) -> bool:
        together.append(checksum.have_sums(views, sums))
        return together[-1]

    monkeypatch.setattr(connections, "have_sums", have_sums)
    world.server.chunks = chunks
    assert read_portion(world.pool, world.route, reads) == [None] * count
    assert bytes(memory) == b"".join(chunks.values())
    assert together == [True] * 3
    together.clear()
    world.server.chunks = {**chunks, reads[5].chunk: bytes(size)}
    results = read_portion(world.pool, world.route, reads)
    assert [i for i, result in enumerate(results) if result is not None] == [5]
    assert isinstance(results[5], ChunkCorrupt)
    assert together[:3] == [True, False, True]


def test_threads_that_have_not_begun_get_one_portion_each(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many portions as threads: the first to run must not take another one's."""
    monkeypatch.setattr(workers, "CLIENT_THREADS_PER_TARGET", 2)
    portions = Portions([[0, 1], [2, 3], [4, 5]])
    assert portions.threads == 2
    shares = [ReadShare(world.pool, world.route, portions, world.reads)]
    assert shares[0].take() == [0, 1]
    assert shares[0].transfer(world.reads[:2]) == [None] * 2  # and the second one, ahead
    assert shares[0].take() == [2, 3]
    assert shares[0].transfer(world.reads[2:4]) == [None] * 2
    shares.append(ReadShare(world.pool, world.route, portions, world.reads))
    assert shares[1].take() == [4, 5]
    assert shares[1].transfer(world.reads[4:6]) == [None] * 2
    assert [share.take() for share in shares] == [None, None]
    assert len(world.server.asked) == 3
