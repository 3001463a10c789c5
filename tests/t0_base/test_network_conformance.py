"""One suite that every Network passes: the operating system's and the memory one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kvfs_base.errors import ConnectionLost, NotLoopback
from kvfs_base.handshake import Secret
from kvfs_base.limits import KIB, MIB
from kvfs_base.os_network import MESSAGE_BYTES, OsNetwork, OsStream
from kvfs_base.seams import Network, ReceivesNow, SendsNow
from kvfs_base.testing import MemoryNetwork
from kvfs_base.types import Address

World = tuple[Network, Address]


@pytest.fixture(
    params=["os-unix", "os-tcp", "secret-unix", "secret-tcp", "memory-unix", "memory-tcp"]
)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    kind, _, family = request.param.partition("-")
    secret = Secret(bytes(range(32))) if kind == "secret" else None
    network: Network = MemoryNetwork() if kind == "memory" else OsNetwork(secret)
    unix = Address.unix(str(tmp_path / "s"))
    return network, unix if family == "unix" else Address.tcp("127.0.0.1", 0)


async def echo(stream: trio.abc.Stream) -> None:
    async with stream:
        while data := await stream.receive_some(1000):
            await stream.send_all(data)


def run_with_server(world: World, body: Callable[[Network, Address], object]) -> None:
    async def main() -> None:
        network, address = world
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(network.serve, address, echo)
            await body(network, bound)  # type: ignore[misc]
            nursery.cancel_scope.cancel()

    trio.run(main)


async def receive_exactly(stream: trio.abc.Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await stream.receive_some(count - len(data))
        assert piece
        data += piece
    return data


def test_bytes_arrive_in_order_both_ways(world: World) -> None:
    async def body(network: Network, address: Address) -> None:
        stream = await network.connect(address)
        async with stream:
            for i in range(20):
                await stream.send_all(bytes([i]) * 100)
                assert await receive_exactly(stream, 100) == bytes([i]) * 100

    run_with_server(world, body)


def test_what_can_be_sent_without_waiting_is_sent(world: World) -> None:
    async def body(network: Network, address: Address) -> None:
        async with await network.connect(address) as stream:
            if not isinstance(stream, SendsNow):
                return
            assert stream.send_now(b"at once") == 7
            assert await receive_exactly(stream, 7) == b"at once"
            data = bytes(range(251)) * 100_000
            sent = stream.send_now(data)
            assert 0 < sent < len(data), "there is room for all"
            assert await receive_exactly(stream, sent) == data[:sent]
        with pytest.raises(trio.BrokenResourceError):
            stream.send_now(b"closed")

    run_with_server(world, body)


def test_what_has_arrived_is_received_without_a_task(world: World) -> None:
    async def body(network: Network, address: Address) -> None:
        async with await network.connect(address) as stream, trio.open_nursery() as nursery:
            if not isinstance(stream, ReceivesNow):
                return
            assert stream.receive_now(100) is None
            await stream.send_all(b"first")
            while (first := stream.receive_now(100)) is None:
                await trio.lowlevel.checkpoint()
            assert first == b"first"
            received: list[bytes | bytearray] = []

            async def wait() -> None:
                received.append(await stream.receive_some(100))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert stream.receive_now(100) is None
            await stream.send_all(b"second")
            while not received:
                await trio.lowlevel.checkpoint()
            assert received == [b"second"]
        assert stream.fileno() < 0
        with pytest.raises(trio.BrokenResourceError):
            stream.receive_now(100)

    run_with_server(world, body)


def test_many_connections_at_once(world: World) -> None:
    async def one(network: Network, address: Address, i: int) -> None:
        async with await network.connect(address) as stream:
            await stream.send_all(b"%04d" % i)
            assert await receive_exactly(stream, 4) == b"%04d" % i

    async def body(network: Network, address: Address) -> None:
        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(one, network, address, i)

    run_with_server(world, body)


def test_a_closed_peer_is_an_end_of_stream(world: World) -> None:
    async def main() -> None:
        network, address = world

        async def goodbye(stream: trio.abc.Stream) -> None:
            async with stream:
                await stream.send_all(b"bye")

        async with trio.open_nursery() as nursery:
            bound = await nursery.start(network.serve, address, goodbye)
            stream = await network.connect(bound)
            assert await receive_exactly(stream, 3) == b"bye"
            assert await stream.receive_some(1) == b""
            await stream.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_closed_stream_touches_no_file_that_has_its_number_now() -> None:
    async def test() -> None:
        near, far = trio.socket.socketpair()
        number = near.fileno()
        stream = OsStream(trio.SocketStream(near))
        await stream.aclose()
        other = os.open("/dev/null", os.O_RDWR)
        os.dup2(other, number)
        try:
            with far, pytest.raises(trio.ClosedResourceError):
                await stream.receive_some(1)
            with pytest.raises(trio.BrokenResourceError):
                stream.send_now(b"x")
        finally:
            for descriptor in {other, number}:
                os.close(descriptor)

    trio.run(test)


def test_nobody_listening_is_connection_lost(world: World) -> None:
    network, address = world
    if address.kind == "tcp":
        address = Address.tcp("127.0.0.1", 1)
    with pytest.raises(ConnectionLost) as info:
        trio.run(network.connect, address)
    assert info.value.address == str(address)


def test_two_servers_cannot_share_an_address(world: World) -> None:
    async def body(network: Network, address: Address) -> None:
        with pytest.raises(ConnectionLost):
            await network.serve(address, echo)

    run_with_server(world, body)


def test_an_address_is_free_again_after_its_server(world: World) -> None:
    async def nothing(network: Network, address: Address) -> None:
        async with await network.connect(address):
            pass

    run_with_server(world, nothing)
    run_with_server(world, nothing)


def test_os_network_refuses_addresses_outside_the_machine() -> None:
    for call in (OsNetwork().connect, lambda a: OsNetwork().serve(a, echo)):
        with pytest.raises(NotLoopback):
            trio.run(call, Address.tcp("0.0.0.0", 0))


def test_a_socket_file_left_by_a_killed_server_is_replaced(tmp_path: Path) -> None:
    import socket

    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert Path(path).exists()

    async def nothing(network: Network, address: Address) -> None:
        async with await network.connect(address):
            pass

    run_with_server((OsNetwork(), Address.unix(path)), nothing)
    assert not Path(path).exists()


def test_sockets_are_private(tmp_path: Path) -> None:
    async def body(network: Network, address: Address) -> None:
        assert Path(address.path).stat().st_mode & 0o777 == 0o600

    run_with_server((OsNetwork(), Address.unix(str(tmp_path / "s"))), body)


def test_a_stream_makes_room_for_long_messages_while_they_come() -> None:
    async def test() -> None:
        near, far = trio.socket.socketpair()
        stream, peer = OsStream(trio.SocketStream(near)), trio.SocketStream(far)
        async with stream, peer, trio.open_nursery() as nursery:
            nursery.start_soon(peer.send_all, bytes(MIB))
            sizes = []
            while sum(sizes) < MIB:
                sizes.append(len(await stream.receive_some(256 * KIB)))
        assert sizes[0] <= MESSAGE_BYTES < max(sizes)

    trio.run(test)
