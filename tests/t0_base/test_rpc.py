"""Calls: pipelining, batches, errors, lost connections, deadlines; trio and blocking clients."""

from __future__ import annotations

import select
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import trio
import trio.testing

from kvfs_base import frames
from kvfs_base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    EntryNotFound,
    InvalidRequest,
    KvfsError,
    ProtocolError,
    StoreUnavailable,
)
from kvfs_base.frames import Kind
from kvfs_base.os_network import OsBlockingNetwork, OsNetwork
from kvfs_base.rpc import BlockingRpcClient, Request, RpcClient, RpcServer, receive_frame
from kvfs_base.seams import Connection, Listener, Network
from kvfs_base.testing import MemoryNetwork
from kvfs_base.types import Address


class Double(Request, tag="double"):
    Reply: ClassVar = int
    value: int


class Fail(Request, tag="fail"):
    Reply: ClassVar = int
    name: bytes


class Hang(Request, tag="hang"):
    Reply: ClassVar = int


class Said(Request, tag="say"):
    Reply: ClassVar = None
    text: str


class Say(Request, tag="say"):
    """As Said, with bytes of the test's choice."""

    Reply: ClassVar = None
    text: msgspec.Raw


class Unserved(Request, tag="unserved"):
    Reply: ClassVar = int


class WrongReply(Request, tag="double"):
    Reply: ClassVar = str
    value: int


class Calculator:
    def __init__(self) -> None:
        self.batches: list[int] = []
        self.sessions: set[int] = set()

    def connected(self, session_id: int) -> None:
        self.sessions.add(session_id)

    def disconnected(self, session_id: int, *, by_peer: bool) -> None:
        self.sessions.remove(session_id)

    async def handle(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        assert session_id in self.sessions
        self.batches.append(len(requests))
        answers: list[Any] = []
        for request in requests:
            match request:
                case Double(value=value):
                    answers.append(2 * value)
                case Fail(name=name):
                    answers.append(EntryNotFound(name=name))
                case Hang():
                    await trio.sleep_forever()
        return answers


ADDRESS = Address.unix("/memory")
Body = Callable[[RpcClient, Calculator], Awaitable[None]]


def run(
    body: Body,
    *,
    clock: Any = None,
    hanging: int = 0,
    network: Network | None = None,
    address: Address = ADDRESS,
) -> None:
    """A server, a client, and a check that the server noticed the client's end (a connection whose
    handler hangs is noticed when the handler is done)."""
    network = network or MemoryNetwork()

    async def main() -> None:
        calculator = Calculator()
        server = RpcServer(network, Double | Fail | Hang | Said, calculator)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, address)
            async with RpcClient(network, address) as client:
                await body(client, calculator)
            await trio.testing.wait_all_tasks_blocked(0.01 if address is not ADDRESS else 0)
            assert len(calculator.sessions) == hanging
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def test_a_call_returns_its_reply() -> None:
    async def body(client: RpcClient, _: Calculator) -> None:
        assert await client.call(Double(21)) == 42

    run(body)


def test_calls_without_a_task_leave_together(tmp_path: Path) -> None:
    told: list[tuple[Any, Any]] = []

    async def body(client: RpcClient, calculator: Calculator) -> None:
        def done(reply: Any, error: KvfsError | None) -> None:
            told.append((reply, type(error)))

        assert not client.call_soon(Double(0), done), "there is no connection"
        await client.call(Double(0))
        given_up = client.call_soon(Double(1), done)
        for i in (2, 3):
            assert client.call_soon(Double(i), done)
        assert client.call_soon(Fail(b"x"), done)
        client.give_up(given_up)
        client.send_soon()
        client.send_soon()  # there is nothing left
        assert await client.call(Double(4)) == 8
        assert told == [(4, type(None)), (6, type(None)), (None, EntryNotFound)]
        assert calculator.batches in ([1, 5], [1, 4, 1])

    run(body)
    told.clear()
    run(body, network=OsNetwork(), address=Address.unix(str(tmp_path / "s")))


def answer_doubles(listener: Listener, count: int) -> None:
    """A server of one connection that answers ``count`` requests, in a thread: it needs no turn of
    the event loop. Then it changes a byte of an answer."""
    connection = listener.accept()
    for number in range(count + 1):
        frame = receive_frame(connection)
        _, value = msgspec.msgpack.decode(frame.body)
        answer = bytearray(frames.encode(Kind.REPLY, frame.request_id, 2 * value))
        answer[-1] ^= number == count
        connection.send([answer])
    connection.close()


def test_answers_are_told_without_a_turn_of_the_event_loop(tmp_path: Path) -> None:
    address = Address.unix(str(tmp_path / "s"))
    listener = OsBlockingNetwork().listen(address)
    server = threading.Thread(target=answer_doubles, args=(listener, 3))
    server.start()
    told: list[Any] = []

    def done(reply: Any, error: KvfsError | None) -> None:
        told.append(reply if error is None else type(error))

    def wait(client: RpcClient) -> bool:
        assert select.select([client.descriptor], [], [], 60)[0]
        return client.receive_now()

    async def main() -> None:
        async with RpcClient(OsNetwork(), address) as client:
            assert client.descriptor < 0
            assert not client.receive_now(), "there is no connection"
            assert await client.call(Double(1)) == 2
            assert client.receive_now(), "nothing is there, and nobody else is concerned"
            for value in (2, 3):
                client.call_soon(Double(value), done)
            client.send_soon()
            while len(told) < 2:
                assert wait(client)
            assert told == [4, 6]
            client.call_soon(Double(4), done)
            client.send_soon()
            assert not wait(client), "the connection is of no use any more"
            assert told == [4, 6, ConnectionLost]
            assert client.descriptor < 0

    trio.run(main)
    server.join()
    listener.close()


def test_concurrent_calls_are_pipelined_and_batched() -> None:
    results: dict[int, int] = {}

    async def body(client: RpcClient, calculator: Calculator) -> None:
        await client.call(Double(0))

        async def one(i: int) -> None:
            results[i] = await client.call(Double(i))

        async with trio.open_nursery() as nursery:
            for i in range(200):
                nursery.start_soon(one, i)
        assert results == {i: 2 * i for i in range(200)}
        assert len(calculator.batches) < 20

    run(body)


def test_errors_arrive_as_what_they_are() -> None:
    async def body(client: RpcClient, _: Calculator) -> None:
        with pytest.raises(EntryNotFound) as info:
            await client.call(Fail(b"x"))
        assert info.value.name == b"x"
        assert await client.call(Double(1)) == 2

    run(body)


def test_text_that_is_no_text_fails_alone() -> None:
    """msgspec raises UnicodeDecodeError for it: one frame must not end the service."""

    async def body(client: RpcClient, _: Calculator) -> None:
        with pytest.raises(ProtocolError):
            await client.call(Say(msgspec.Raw(b"\xa2\xff\xff")))
        assert await client.call(Double(1)) == 2

    run(body)


def test_a_request_that_the_service_does_not_know_fails_alone() -> None:
    async def body(client: RpcClient, _: Calculator) -> None:
        with pytest.raises(ProtocolError):
            await client.call(Unserved())
        assert await client.call(Double(1)) == 2

    run(body)


def test_a_reply_of_the_wrong_type_is_a_protocol_error() -> None:
    async def body(client: RpcClient, _: Calculator) -> None:
        with pytest.raises(ProtocolError):
            await client.call(WrongReply(1))

    run(body)


def test_a_call_without_an_answer_meets_its_deadline() -> None:
    async def body(client: RpcClient, _: Calculator) -> None:
        with pytest.raises(DeadlineExceeded):
            await client.call(Hang(), timeout=5)

    run(body, clock=trio.testing.MockClock(autojump_threshold=0), hanging=1)


def test_a_cancelled_call_leaves_the_connection_usable() -> None:
    async def body(client: RpcClient, _: Calculator) -> None:
        with trio.move_on_after(0):
            await client.call(Double(1))
        assert await client.call(Double(4)) == 8

    run(body)


def test_calls_in_flight_fail_when_the_server_goes_and_later_ones_dial_again() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        server = RpcServer(network, Double | Fail | Hang, Calculator())
        async with RpcClient(network, ADDRESS) as client, trio.open_nursery() as outer:

            async def hang() -> None:
                with pytest.raises(ConnectionLost):
                    await client.call(Hang())

            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, ADDRESS)
                assert await client.call(Double(1)) == 2
                outer.start_soon(hang)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ConnectionLost):
                await client.call(Double(1))
            await outer.start(server.serve, ADDRESS)
            assert await client.call(Double(2)) == 4
            outer.cancel_scope.cancel()

    trio.run(main)


class LastWords(trio.abc.Stream):
    """Answers the first request, and has ended by the time that anybody looks."""

    def __init__(self) -> None:
        self._asked = trio.Event()
        self._pieces = [frames.encode(Kind.REPLY, 1, 42), b""]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._asked.set()

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await self._asked.wait()
        return self._pieces.pop(0)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def test_an_answer_that_came_with_the_end_of_the_connection_counts() -> None:
    class Network(MemoryNetwork):
        async def connect(self, address: Address) -> trio.abc.Stream:
            return LastWords()

    async def main() -> None:
        async with RpcClient(Network(), ADDRESS) as client:
            assert await client.call(Double(21)) == 42

    for _ in range(20):  # trio runs what is ready in any order
        trio.run(main)


class Unable(Calculator):
    """A server that is there and cannot reach its store."""

    async def handle(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        return [StoreUnavailable() for _ in requests]


NOBODY, ELSEWHERE = Address.unix("/nobody"), Address.unix("/elsewhere")


def test_the_next_server_is_dialled_after_one_that_fails() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        greeted: list[object] = []
        requests = Double | Fail | Hang

        async def greet(client: RpcClient) -> None:
            greeted.append(client)

        addresses = [NOBODY, ADDRESS, ELSEWHERE]
        async with (
            RpcClient(network, addresses, on_connect=greet) as client,
            trio.open_nursery() as nursery,
        ):
            hanging = Calculator()
            await nursery.start(RpcServer(network, requests, hanging).serve, ADDRESS)
            await nursery.start(RpcServer(network, requests, Unable()).serve, ELSEWHERE)
            with pytest.raises(ConnectionLost):
                await client.call(Double(1))
            assert await client.call(Double(1)) == 2
            with pytest.raises(DeadlineExceeded):
                await client.call(Hang(), timeout=5)
            with pytest.raises(StoreUnavailable):
                await client.call(Double(1))
            with pytest.raises(ConnectionLost):  # round it goes
                await client.call(Double(1))
            assert await client.call(Double(3)) == 6
            assert len(greeted) == 3
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_server_without_its_store_is_greeted_again() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        greeted: list[object] = []

        async def greet(client: RpcClient) -> None:
            greeted.append(client)

        async with RpcClient(network, ADDRESS, on_connect=greet) as client:
            async with trio.open_nursery() as nursery:
                server = RpcServer(network, Double | Fail | Hang, Unable())
                await nursery.start(server.serve, ADDRESS)
                for _ in range(2):
                    with pytest.raises(StoreUnavailable):
                        await client.call(Double(1))
                assert len(greeted) == 2
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_client_of_nobody_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        RpcClient(MemoryNetwork(), [])


def test_a_peer_that_talks_nonsense_loses_its_connection_only() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        server = RpcServer(network, Double | Fail | Hang, Calculator())
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, ADDRESS)
            stream = await network.connect(ADDRESS)
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: kvfs.example\r\n\r\n")
            assert await stream.receive_some(100) == b""
            async with RpcClient(network, ADDRESS) as client:
                assert await client.call(Double(1)) == 2
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """A calculator on a real Unix socket, in a thread of its own."""
    address = Address.unix(str(tmp_path / "calculator"))
    ready = threading.Event()
    token: list[Any] = []
    scope = trio.CancelScope()

    async def main() -> None:
        server = RpcServer(OsNetwork(), Double | Fail | Hang, Calculator())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, address)
                token.append(trio.lowlevel.current_trio_token())
                ready.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert ready.wait(60)
    yield address
    token[0].run_sync_soon(scope.cancel)
    thread.join(60)
    assert not thread.is_alive()


def test_blocking_client(served: Address) -> None:
    client = BlockingRpcClient(OsBlockingNetwork(), served)
    assert client.call(Double(3)) == 6
    assert client.call_many([Double(i) for i in range(100)]) == [2 * i for i in range(100)]
    with pytest.raises(EntryNotFound):
        client.call(Fail(b"y"))
    assert client.call(Double(5)) == 10
    with pytest.raises(DeadlineExceeded):
        BlockingRpcClient(OsBlockingNetwork(), served).call(Hang(), timeout=0.05)
    client.close()
    assert client.call(Double(6)) == 12
    client.close()


def test_a_blocking_client_goes_on_with_the_next_server(served: Address, tmp_path: Path) -> None:
    nobody = Address.unix(str(tmp_path / "nobody"))
    client = BlockingRpcClient(OsBlockingNetwork(), (nobody, served))
    for _ in range(2):
        with pytest.raises(ConnectionLost):
            client.call(Double(3))
        assert client.call(Double(3)) == 6
        assert client.call(Double(4)) == 8
        with pytest.raises(DeadlineExceeded):
            client.call(Hang(), timeout=0.05)
    client.close()


def test_each_blocking_call_has_its_own_deadline(served: Address) -> None:
    client = BlockingRpcClient(OsBlockingNetwork(), served)
    assert client.call(Double(3)) == 6
    with pytest.raises(DeadlineExceeded):
        client.call(Hang(), timeout=0.05)
    client.close()


def test_replies_out_of_order_are_refused(tmp_path: Path) -> None:
    network = OsBlockingNetwork()
    listener = network.listen(Address.unix(str(tmp_path / "liar")))
    peers: list[Connection] = []

    def lie() -> None:
        connection = listener.accept()
        peers.append(connection)
        connection.receive_into([memoryview(bytearray(24))])
        connection.send([frames.encode(Kind.REPLY, 999, 1)])

    thread = threading.Thread(target=lie)
    thread.start()
    client = BlockingRpcClient(network, listener.address)
    with pytest.raises(ProtocolError):
        client.call(Double(1))
    thread.join()
    peers[0].close()
    listener.close()
