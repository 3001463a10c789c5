"""The handshake on real sockets, of both networks: strangers, crowds, and the secret's file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio

from kvfs_base import frames
from kvfs_base.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    NotLoopback,
    SecretUnusable,
    VersionMismatch,
)
from kvfs_base.frames import Kind
from kvfs_base.handshake import CLIENT, HEAD, MAGIC, SERVER, VERSION, Secret
from kvfs_base.limits import HANDSHAKES_MAX
from kvfs_base.os_env import os_env
from kvfs_base.os_handshake import LINGER_BYTES, read_secret
from kvfs_base.os_network import OsBlockingNetwork, OsNetwork
from kvfs_base.rpc import BlockingRpcClient, Request, RpcClient, RpcServer, receive_frame
from kvfs_base.types import Address

SECONDS = 60.0
RIGHT = Secret(b"0123456789abcdef0123456789abcdef")
WRONG = Secret(b"fedcba9876543210fedcba9876543210")
HELLO = HEAD.pack(MAGIC, VERSION, CLIENT, 0) + bytes(32)


class Echo(Request, tag="echo"):
    Reply: ClassVar[Any] = int
    value: int


class Echoing:
    """An RPC handler that counts whom it met."""

    def __init__(self) -> None:
        self.sessions = 0

    def connected(self, session_id: int) -> None:
        self.sessions += 1

    async def handle(self, session_id: int, requests: Sequence[Echo]) -> Sequence[int]:
        return [request.value for request in requests]

    def disconnected(self, session_id: int, *, by_peer: bool) -> None:
        pass


class Served:
    """An echo behind each network: ``met`` counts those who got through."""

    def __init__(self, kind: str, seconds: float, host: str) -> None:
        self.kind = kind
        self._threads = concurrent.futures.ThreadPoolExecutor(HANDSHAKES_MAX + 8)
        self._handler = Echoing()
        self._accepted = 0
        if kind == "data":
            network = OsBlockingNetwork(RIGHT, handshake_seconds=seconds)
            self._listener = network.listen(Address.tcp(host, 0))
            self._bound = self._listener.address
            self._ended = self._threads.submit(self._accept)
        else:
            started: concurrent.futures.Future[Address] = concurrent.futures.Future()
            self._ended = self._threads.submit(trio.run, self._serve, seconds, host, started)
            self._bound = started.result(SECONDS)

    @property
    def address(self) -> Address:
        return Address.tcp("127.0.0.1", self._bound.port)

    @property
    def met(self) -> int:
        return self._accepted if self.kind == "data" else self._handler.sessions

    async def _serve(
        self, seconds: float, host: str, started: concurrent.futures.Future[Address]
    ) -> None:
        self._token = trio.lowlevel.current_trio_token()
        server = RpcServer(OsNetwork(RIGHT, handshake_seconds=seconds), Echo, self._handler)
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                started.set_result(await nursery.start(server.serve, Address.tcp(host, 0)))

    def _accept(self) -> None:
        with contextlib.suppress(ConnectionLost):
            while True:
                connection = self._listener.accept()
                self._accepted += 1
                self._threads.submit(self._answer, connection)

    def _answer(self, connection: Any) -> None:
        from kvfs_base import frames
        from kvfs_base.frames import Kind

        with contextlib.suppress(KvfsError):
            while True:
                frame = receive_frame(connection)
                value = frames.msgspec.msgpack.decode(frame.body)[1]
                connection.send([frames.encode(Kind.REPLY, frame.request_id, value)])
        connection.close()

    def close(self) -> None:
        if self.kind == "data":
            self._listener.close()
        else:
            self._token.run_sync_soon(self._scope.cancel)
        self._ended.result(SECONDS)
        self._threads.shutdown()


@pytest.fixture(params=["data", "control"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(request.param, SECONDS, "127.0.0.1")
    yield served
    served.close()


@contextlib.contextmanager
def stranger(address: Address, opening: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection((address.host, address.port), SECONDS) as sock:
        sock.sendall(opening)
        yield sock


def answer_of(sock: socket.socket) -> bytes:
    """Everything until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(4096):
            found += piece
    return found


def call(address: Address, secret: Secret | None, value: int = 7) -> int:
    client = BlockingRpcClient(OsBlockingNetwork(secret), address)
    try:
        found: int = client.call(Echo(value), SECONDS)
        return found
    finally:
        client.close()


def call_from_trio(address: Address, secret: Secret | None, value: int = 7) -> int:
    async def main() -> int:
        async with RpcClient(OsNetwork(secret), address) as client:
            found: int = await client.call(Echo(value), SECONDS)
            return found

    return trio.run(main)


@pytest.mark.parametrize("calling", [call, call_from_trio])
def test_whoever_has_the_secret_gets_through(served: Served, calling: Any) -> None:
    assert [calling(served.address, RIGHT, n) for n in (1, 2)] == [1, 2]
    assert served.met == 2


@pytest.mark.parametrize("calling", [call, call_from_trio])
@pytest.mark.parametrize("secret", [WRONG, None])
def test_others_are_told_why_not(served: Served, calling: Any, secret: Secret | None) -> None:
    with pytest.raises(AuthenticationFailed):
        try:
            calling(served.address, secret)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    assert served.met == 0
    assert call(served.address, RIGHT) == 7


def test_a_large_request_without_a_secret_is_answered_too(served: Served) -> None:
    """The server reads some of it: closing with bytes unread would take the answer back."""
    request = frames.frame(Kind.REQUEST, 0, bytes(LINGER_BYTES // 2))
    with stranger(served.address, request) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert b"authentication_failed" in answer_of(sock)
    assert served.met == 0


@pytest.mark.parametrize(
    "opening",
    [b"", HELLO[:5], HELLO[:16], HELLO[:47], HELLO, HELLO + bytes(31)],
    ids=lambda opening: str(len(opening)),
)
def test_a_handshake_that_is_cut_off(served: Served, opening: bytes) -> None:
    with stranger(served.address, opening) as sock:
        sock.shutdown(socket.SHUT_WR)
        answer_of(sock)
    assert call(served.address, RIGHT) == 7
    assert served.met == 1


@pytest.mark.parametrize(
    "opening",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(500), HELLO + bytes(32), MAGIC * 20, b"\xff" * 70_000],
    ids=["http", "zeros", "proof", "magic", "long"],
)
def test_garbage_is_refused(served: Served, opening: bytes) -> None:
    with contextlib.suppress(OSError):  # it may be thrown out before it has said everything
        with stranger(served.address, opening) as sock:
            sock.shutdown(socket.SHUT_WR)
            answer_of(sock)
    assert call(served.address, RIGHT) == 7
    assert served.met == 1


def test_another_version_is_answered_with_ours(served: Served) -> None:
    with stranger(served.address, HEAD.pack(MAGIC, 9, CLIENT, 0) + bytes(32)) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert answer_of(sock) == HEAD.pack(MAGIC, VERSION, SERVER, 0)


class Recorder:
    """Passes one connection on to ``address`` and keeps what the client says."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address.tcp("127.0.0.1", self._listener.getsockname()[1])
        self.said = b""
        self._thread = concurrent.futures.ThreadPoolExecutor(2)
        self._done = self._thread.submit(self._pass_on)

    def _pass_on(self) -> None:
        near, _ = self._listener.accept()
        with near, stranger(self._address) as far:
            back = self._thread.submit(self._copy_back, far, near)
            while piece := near.recv(4096):
                self.said += piece
                far.sendall(piece)
            far.shutdown(socket.SHUT_WR)
            back.result(SECONDS)

    @staticmethod
    def _copy_back(far: socket.socket, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := far.recv(4096):
                near.sendall(piece)

    def close(self) -> None:
        self._done.result(SECONDS)
        self._thread.shutdown()
        self._listener.close()


def test_a_recorded_connection_cannot_be_repeated(served: Served) -> None:
    recorder = Recorder(served.address)
    assert call(recorder.address, RIGHT) == 7
    recorder.close()
    assert served.met == 1
    with stranger(served.address, recorder.said) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert len(answer_of(sock)) <= 80  # the server's hello, and no reply
    assert served.met == 1


def test_a_crowd_of_silent_peers_keeps_nobody_out(served: Served) -> None:
    """More than may be pending, half of them in the middle of their hello: the oldest go."""
    with contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(stranger(served.address, HELLO[: 30 * (n % 2)]))
            for n in range(HANDSHAKES_MAX + 10)
        ]
        assert call(served.address, RIGHT) == 7
        assert [answer_of(sock) for sock in crowd[:10]] == [b""] * 10
        with contextlib.suppress(BlockingIOError):
            crowd[-1].setblocking(False)
            assert crowd[-1].recv(1) != b""
    assert served.met == 1


@pytest.mark.parametrize("kind", ["data", "control"])
@pytest.mark.parametrize("opening", [b"", HELLO], ids=["silent", "hello"])
def test_silent_peers_are_given_up_after_a_while(kind: str, opening: bytes) -> None:
    served = Served(kind, 0.05, "127.0.0.1")
    try:
        with stranger(served.address, opening) as sock:
            assert len(answer_of(sock)) in (0, 80)  # returns because the server closed
        assert served.met == 0
    finally:
        served.close()


def test_a_peer_that_trickles_is_given_up_too() -> None:
    served = Served("data", 0.2, "127.0.0.1")
    try:
        with stranger(served.address) as sock:
            sock.settimeout(0.01)
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                for place in range(10_000):
                    sock.sendall(HELLO[place : place + 1] if place < 40 else b"")
                    try:
                        if sock.recv(1) == b"":
                            break
                    except TimeoutError:
                        pass
                else:
                    pytest.fail("it was never given up")
        assert served.met == 0
    finally:
        served.close()


def test_a_listener_that_closes_lets_its_strangers_go() -> None:
    served = Served("data", SECONDS, "127.0.0.1")
    with stranger(served.address, HELLO) as sock:
        assert len(sock.recv(80, socket.MSG_WAITALL)) == 80
        served.close()
        assert answer_of(sock) == b""


# --- the side that dials


@contextlib.contextmanager
def impostor(*pieces: bytes) -> Iterator[Address]:
    """A server that says ``pieces`` to one client, whatever it hears, and waits for it to go."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(ConnectionError):
                for piece in pieces:
                    sock.sendall(piece)
                if not pieces or pieces[-1]:
                    while sock.recv(4096):
                        pass

        served = thread.submit(serve)
        yield Address.tcp("127.0.0.1", listener.getsockname()[1])
        served.result(SECONDS)


SERVER_HEAD = HEAD.pack(MAGIC, VERSION, SERVER, 0)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"",), ConnectionLost),
        ((SERVER_HEAD[:9], b""), ConnectionLost),
        ((SERVER_HEAD + bytes(64),), AuthenticationFailed),
        ((HELLO,), AuthenticationFailed),
        ((HEAD.pack(MAGIC, 2, SERVER, 0),), VersionMismatch),
        ((b"SSH-2.0-OpenSSH_9.2p1\r\n",), KvfsError),
    ],
)
def test_a_server_that_proves_nothing(pieces: tuple[bytes, ...], error: type[KvfsError]) -> None:
    with impostor(*pieces) as address, pytest.raises(error):
        OsBlockingNetwork(RIGHT).connect(address, SECONDS)

    async def connect(address: Address) -> None:
        with trio.fail_after(SECONDS):
            await OsNetwork(RIGHT).connect(address)

    with impostor(*pieces) as address, pytest.raises(error):
        trio.run(connect, address)


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_asked() -> None:
    with impostor() as address, pytest.raises(DeadlineExceeded):
        OsBlockingNetwork(RIGHT).connect(address, 0.05)

    async def connect(address: Address) -> bool:
        with trio.move_on_after(0.05) as scope:
            await OsNetwork(RIGHT).connect(address)
        return scope.cancelled_caught

    with impostor() as address:
        assert trio.run(connect, address)  # and the impostor sees it go


# --- addresses


@pytest.mark.parametrize("kind", ["data", "control"])
def test_with_a_secret_any_address_is_served(kind: str) -> None:
    served = Served(kind, SECONDS, "0.0.0.0")
    try:
        assert call(served.address, RIGHT) == 7
        with pytest.raises(AuthenticationFailed):
            call(served.address, None)
    finally:
        served.close()


def test_without_one_none_is() -> None:
    for address in (Address.tcp("0.0.0.0", 0), Address.tcp("192.0.2.1", 1)):
        with pytest.raises(NotLoopback, match="secret_file"):
            OsBlockingNetwork().listen(address)
        with pytest.raises(NotLoopback):
            trio.run(OsNetwork().connect, address)


# --- the file


def written(path: Path, data: bytes, mode: int = 0o600) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_a_secret_is_read_from_its_file(tmp_path: Path) -> None:
    key = os.urandom(31) + b"x"
    nonces = (bytes(32), bytes(32))
    for name, text in (("plain", key), ("newline", key + b"\n"), ("windows", key + b"\r\n")):
        found = read_secret(written(tmp_path / name, text))
        assert found.proof(1, *nonces) == Secret(key).proof(1, *nonces)
    assert read_secret(written(tmp_path / "read-only", key, 0o400))
    env = os_env(secret_file=str(tmp_path / "plain"))
    listener = env.blocking_network.listen(Address.tcp("0.0.0.0", 0))
    listener.close()


SOME_BYTES = random.Random(1).randbytes(5000)


@pytest.mark.parametrize(
    ("data", "mode", "reason"),
    [
        (SOME_BYTES[:41], 0o640, "0640 lets others"),
        (SOME_BYTES[:41], 0o602, "0602 lets others"),
        (b"", 0o600, "0 bytes, at least 32"),
        (b"0123456789abcdef0123456789abcde\n", 0o600, "31 bytes, at least 32"),
        (bytes(64), 0o600, "not random"),
        (b"secret" * 10, 0o600, "not random"),
        (SOME_BYTES, 0o600, "more than 4096"),
    ],
)
def test_a_file_that_will_not_do(tmp_path: Path, data: bytes, mode: int, reason: str) -> None:
    with pytest.raises(SecretUnusable, match=reason) as caught:
        read_secret(written(tmp_path / "secret", data, mode))
    assert caught.value.path == str(tmp_path / "secret")


def test_what_is_no_file_will_not_do(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, reason in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "no file"),
        (tmp_path / "fifo", "no file"),
    ):
        with pytest.raises(SecretUnusable, match=reason):
            read_secret(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away: needs root")
def test_somebody_elses_file_will_not_do(tmp_path: Path) -> None:
    path = written(tmp_path / "secret", os.urandom(40) + b"x")
    os.chown(path, 65534, -1)
    with pytest.raises(SecretUnusable, match="belongs to user 65534"):
        read_secret(path)
