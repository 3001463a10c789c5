"""One suite that every BlockingNetwork passes: Unix sockets, TCP, and the memory one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base import os_network
from kvfs_base.errors import ConnectionLost, DeadlineExceeded, NotLoopback
from kvfs_base.handshake import Secret
from kvfs_base.limits import FDS_PER_MESSAGE_MAX
from kvfs_base.os_network import OsBlockingNetwork, OsConnection
from kvfs_base.seams import BlockingNetwork, Connection, Listener
from kvfs_base.testing import MemoryBlockingNetwork, MemoryDisk
from kvfs_base.types import Address

SECONDS = 60.0


class Pair:
    """Both ends of one connection, and a thread for one of them."""

    def __init__(self, network: BlockingNetwork, address: Address) -> None:
        self.network = network
        self.listener: Listener = network.listen(address)
        self.threads = concurrent.futures.ThreadPoolExecutor(4)
        accepted = self.threads.submit(self.listener.accept)
        self.near: Connection = network.connect(self.listener.address, SECONDS)
        self.far: Connection = accepted.result(SECONDS)
        self.near.set_timeout(SECONDS)
        self.far.set_timeout(SECONDS)

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.listener.close()
        self.threads.shutdown()


@pytest.fixture(
    params=["os-unix", "os-tcp", "secret-unix", "secret-tcp", "memory-unix", "memory-tcp"]
)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    kind, _, family = request.param.partition("-")
    secret = Secret(bytes(range(32))) if kind == "secret" else None
    network: BlockingNetwork
    network = MemoryBlockingNetwork() if kind == "memory" else OsBlockingNetwork(secret)
    unix = Address.unix(str(tmp_path / "s"))
    pair = Pair(network, unix if family == "unix" else Address.tcp("127.0.0.1", 0))
    yield pair
    pair.close()


def receive(connection: Connection, count: int) -> bytes:
    buffer = bytearray(count)
    connection.receive_into([memoryview(buffer)])
    return bytes(buffer)


def test_parts_arrive_in_order(pair: Pair) -> None:
    pair.near.send([b"one ", bytearray(b"two "), memoryview(b"three")])
    pair.far.send([b"back"])
    assert receive(pair.far, 13) == b"one two three"
    assert receive(pair.near, 4) == b"back"


def test_more_than_the_socket_holds(pair: Pair) -> None:
    data = os.urandom(30 << 20)
    received = pair.threads.submit(receive, pair.far, len(data))
    pair.near.send([data[:100], data[100:]])
    assert received.result(SECONDS) == data


def test_many_small_parts_and_views(pair: Pair) -> None:
    pieces = [os.urandom(7) for _ in range(5000)]
    views = [memoryview(bytearray(5)) for _ in range(7000)]
    received = pair.threads.submit(pair.far.receive_into, views)
    pair.near.send(pieces)
    received.result(SECONDS)
    assert b"".join(views) == b"".join(pieces)


@pytest.mark.parametrize("excess", [0, 1, 5000])
def test_large_views_that_arrive_a_little_at_a_time(pair: Pair, excess: int) -> None:
    """Whoever is woken seldom must still be woken for the end: nothing follows it."""
    data = os.urandom((3 << 18) + excess)
    views = [
        memoryview(bytearray(count)) for count in (1000, 0, 1 << 19, len(data) - 1000 - (1 << 19))
    ]
    received = pair.threads.submit(pair.far.receive_into, views)
    for start in range(0, len(data), 50_000):
        pair.near.send([data[start : start + 50_000]])
    received.result(SECONDS)
    assert b"".join(views) == data
    received = pair.threads.submit(receive, pair.far, len(data))
    pair.near.send([data])
    assert received.result(SECONDS) == data
    received = pair.threads.submit(receive, pair.far, 3)
    pair.near.send([b"end"])
    assert received.result(SECONDS) == b"end"


@pytest.mark.parametrize("excess", [0, 1, 5000, 600_000])
def test_groups_are_told_of_one_after_the_other(pair: Pair, excess: int) -> None:
    """The last bytes wake the reader though there are few, and so does what comes after them."""
    sizes = [[400_000, 0, 100_000], [], [700_000], [1], [500_000 + excess]]
    groups = [[memoryview(bytearray(size)) for size in group] for group in sizes]
    data = os.urandom(sum(map(sum, sizes)))
    seen: list[int] = []

    def after(number: int) -> None:
        seen.append(number)
        have = b"".join(view for group in groups[: number + 1] for view in group)
        assert have == data[: len(have)]

    for _ in range(2):
        received = pair.threads.submit(pair.far.receive_groups, groups, after)
        for start in range(0, len(data), 50_000):
            pair.near.send([data[start : start + 50_000]])
        received.result(SECONDS)
        one = pair.threads.submit(receive, pair.far, 3)
        pair.near.send([b"end"])
        assert one.result(SECONDS) == b"end"
    assert seen == [*range(len(groups))] * 2


@pytest.mark.parametrize("size", [65_536, 212_992])
def test_groups_through_a_small_socket_buffer(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """It never holds as much as a reader would like to be woken for."""
    monkeypatch.setattr(os_network, "SOCKET_BUFFER_BYTES", size)
    with contextlib.closing(Pair(OsBlockingNetwork(), Address.tcp("127.0.0.1", 0))) as pair:
        groups = [[memoryview(bytearray(1 << 20))] for _ in range(3)]
        seen: list[int] = []
        received = pair.threads.submit(pair.far.receive_groups, groups, seen.append)
        pair.near.send([bytes(3 << 20)])
        received.result(SECONDS)
        assert seen == [0, 1, 2]


def test_a_peer_that_goes_between_groups(pair: Pair) -> None:
    groups = [[memoryview(bytearray(1 << 20))] for _ in range(3)]
    seen: list[int] = []
    received = pair.threads.submit(pair.far.receive_groups, groups, seen.append)
    pair.near.send([bytes((1 << 20) + 1000)])
    pair.near.close()
    with pytest.raises(ConnectionLost):
        received.result(SECONDS)
    assert seen == [0]


def test_groups_have_one_deadline(pair: Pair) -> None:
    """A peer that sends a little of each in time does not hold a buffer for longer."""
    pair.far.set_timeout(0.3)
    groups = [[memoryview(bytearray(10))]] * 200_000
    filled = 0

    def after(number: int) -> None:
        nonlocal filled
        filled = number
        pair.near.send([bytes(10)])

    pair.near.send([bytes(10)])
    with pytest.raises(DeadlineExceeded):
        pair.far.receive_groups(groups, after)
    assert 0 < filled < len(groups) - 1


def test_a_peer_that_goes_in_the_middle_of_a_large_view(pair: Pair) -> None:
    received = pair.threads.submit(receive, pair.far, 1 << 20)
    pair.near.send([bytes(1000)])
    pair.near.close()
    with pytest.raises(ConnectionLost):
        received.result(SECONDS)


def test_shutdown_wakes_who_waits_for_much(pair: Pair) -> None:
    received = pair.threads.submit(receive, pair.far, 1 << 20)
    pair.near.send([bytes(1000)])
    pair.far.shutdown()
    with pytest.raises(ConnectionLost):
        received.result(SECONDS)


@pytest.mark.parametrize("more", [False, True])
def test_files_are_sent_from_their_middle(pair: Pair, more: bool) -> None:
    data = os.urandom(3 << 20)
    disk = MemoryDisk()
    with contextlib.closing(disk.open("sent", write=True, create=True)) as file:
        file.pwritev([data], 0)
        received = pair.threads.submit(receive, pair.far, (2 << 20) + 4)
        pair.near.send([b"head"], more=more)
        pair.near.send_files([(file, 1000, 2 << 20)])
        assert received.result(SECONDS) == b"head" + data[1000 : 1000 + (2 << 20)]
        with pytest.raises(ConnectionLost):
            pair.near.send_files([(file, len(data), 1)])


def test_a_closed_peer_is_connection_lost(pair: Pair) -> None:
    pair.far.send([b"last"])
    pair.far.close()
    with pytest.raises(ConnectionLost):
        receive(pair.near, 5)
    with pytest.raises(ConnectionLost):
        pair.near.send([bytes(1 << 20)])
        pair.near.send([bytes(1 << 20)])


def test_a_silent_peer_is_deadline_exceeded(pair: Pair) -> None:
    pair.near.set_timeout(0.02)
    with pytest.raises(DeadlineExceeded) as caught:
        receive(pair.near, 1)
    assert caught.value.seconds == 0.02


def test_a_trickling_peer_is_deadline_exceeded(pair: Pair) -> None:
    """The timeout covers the whole call, however often a byte comes."""
    pair.near.set_timeout(0.2)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            pair.far.send([b"x"])

    trickling = pair.threads.submit(trickle)
    try:
        with pytest.raises(DeadlineExceeded):
            receive(pair.near, 1 << 20)
    finally:
        stop.set()
        trickling.result(SECONDS)


def test_a_peer_that_does_not_take_is_deadline_exceeded(pair: Pair) -> None:
    pair.near.set_timeout(0.05)
    with pytest.raises(DeadlineExceeded):
        pair.near.send([bytes(64 << 20)])


def test_shutdown_wakes_a_blocked_thread(pair: Pair) -> None:
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        receive(pair.near, 1)

    blocked = pair.threads.submit(wait)
    assert entered.wait(SECONDS)
    pair.near.shutdown()
    with pytest.raises(ConnectionLost):
        blocked.result(SECONDS)
    pair.near.shutdown()


def test_descriptors_pass_where_they_can(pair: Pair) -> None:
    assert pair.near.can_pass_descriptors == pair.far.can_pass_descriptors
    assert pair.near.can_pass_descriptors == (pair.listener.address.kind == "unix")
    if not pair.near.can_pass_descriptors:
        return
    files = [tempfile.TemporaryFile() for _ in range(FDS_PER_MESSAGE_MAX)]  # noqa: SIM115
    for number, file in enumerate(files):
        file.write(b"%d" % number)
        file.flush()
    pair.near.send([b"head", b"body", bytes(1 << 16)], [file.fileno() for file in files])
    pair.near.send([b"next"])
    head = bytearray(4)
    passed = pair.far.receive_with_descriptors(memoryview(head))
    assert bytes(head) == b"head"
    assert receive(pair.far, 4 + (1 << 16) + 4) == b"body" + bytes(1 << 16) + b"next"
    assert len(passed) == len(files)
    for number, (descriptor, file) in enumerate(zip(passed, files, strict=True)):
        assert descriptor != file.fileno()
        assert not os.get_inheritable(descriptor)
        assert os.pread(descriptor, 10, 0) == b"%d" % number
        os.close(descriptor)
        file.close()


def test_a_message_may_come_without_descriptors(pair: Pair) -> None:
    pair.near.send([b"head"])
    head = bytearray(4)
    assert pair.far.receive_with_descriptors(memoryview(head)) == []
    assert bytes(head) == b"head"


def test_a_closed_peer_while_waiting_for_descriptors(pair: Pair) -> None:
    pair.near.close()
    with pytest.raises(ConnectionLost):
        pair.far.receive_with_descriptors(memoryview(bytearray(4)))


def test_nobody_listening(pair: Pair) -> None:
    address = pair.listener.address
    pair.listener.close()
    with pytest.raises(ConnectionLost):
        pair.network.connect(address, SECONDS)


def test_closing_a_listener_wakes_accept(pair: Pair) -> None:
    waiting = pair.threads.submit(pair.listener.accept)
    pair.listener.close()
    with pytest.raises(ConnectionLost):
        waiting.result(SECONDS)
    again = pair.network.listen(pair.listener.address)
    assert again.address == pair.listener.address
    again.close()


def test_an_address_has_one_listener(pair: Pair) -> None:
    with pytest.raises(ConnectionLost):
        pair.network.listen(pair.listener.address)
    waiting = pair.threads.submit(pair.listener.accept)
    pair.network.connect(pair.listener.address, SECONDS).close()
    waiting.result(SECONDS).close()


def test_the_real_network_stays_on_this_machine(tmp_path: Path) -> None:
    network = OsBlockingNetwork()
    with pytest.raises(NotLoopback):
        network.listen(Address.tcp("0.0.0.0", 0))
    with pytest.raises(NotLoopback):
        network.connect(Address.tcp("192.0.2.1", 80), 0.1)
    listener = network.listen(Address.unix(str(tmp_path / "private")))
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    listener.close()


def test_a_socket_file_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "left")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = OsBlockingNetwork().listen(Address.unix(path))
    OsBlockingNetwork().connect(Address.unix(path), SECONDS).close()
    listener.close()
    assert not Path(path).exists()


@pytest.mark.parametrize(("chosen", "taken"), [("bbr", "cubic"), ("reno", "reno")])
def test_data_is_not_sent_by_a_timer(
    chosen: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled = os_network._dialled

    def dial(address: Address, timeout: float) -> socket.socket:
        sock = dialled(address, timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, chosen.encode())
        except OSError:
            sock.close()
            pytest.skip(f"the kernel has no {chosen}")
        return sock

    monkeypatch.setattr(os_network, "_dialled", dial)
    pair = Pair(OsBlockingNetwork(None), Address.tcp("127.0.0.1", 0))
    try:
        assert isinstance(pair.near, os_network.OsConnection)
        name = pair.near._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name.rstrip(b"\0") == taken.encode()
    finally:
        pair.close()


@pytest.mark.parametrize("option", [socket.SO_SNDBUF, socket.SO_RCVBUF])
def test_buffers_are_left_to_tcp_where_the_host_allows_only_small_ones(
    monkeypatch: pytest.MonkeyPatch, option: int
) -> None:
    """Whoever has asked, and got a twentieth, is given no more."""

    def found() -> int:
        with contextlib.closing(Pair(OsBlockingNetwork(), Address.tcp("127.0.0.1", 0))) as pair:
            assert isinstance(pair.near, OsConnection)
            return pair.near._sock.getsockopt(socket.SOL_SOCKET, option)

    asked = 300_000
    monkeypatch.setattr(os_network, "SOCKET_BUFFER_BYTES", asked)
    monkeypatch.setattr(os_network, "_is_granted", lambda *_: True)
    with_asking = found()
    monkeypatch.undo()
    monkeypatch.setattr(os_network, "SOCKET_BUFFER_BYTES", 2**31 - 1)  # more than there can be
    assert not os_network._is_granted(option, 2**31 - 1)
    assert os_network._is_granted(option, 4096)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as plain:
        plain.connect(listener.getsockname())
        assert found() == plain.getsockopt(socket.SOL_SOCKET, option) != with_asking
