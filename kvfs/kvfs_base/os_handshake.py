"""The handshake on real sockets: for one that was dialled, for listeners of either kind.

A peer that has proved nothing costs a descriptor and a few hundred bytes: no thread, no buffers of
data connections, no answer but those of ``kvfs_base.handshake``. There are at most HANDSHAKES_MAX
of them, each for HANDSHAKE_SECONDS; with one more the oldest is given up, so a crowd of silent
peers keeps nobody out who answers within a round trip.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable

import trio

from kvfs_base.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    SecretUnusable,
)
from kvfs_base.handshake import NONCE_BYTES, Secret, Steps, client_steps, server_steps
from kvfs_base.limits import (
    HANDSHAKE_SECONDS,
    HANDSHAKES_MAX,
    KIB,
    SECRET_BYTES_MAX,
    SECRET_BYTES_MIN,
)
from kvfs_base.types import Address

log = logging.getLogger(__name__)

DISTINCT_BYTES_MIN = 8
"""Of 32 random bytes (or 64 random hex digits) fewer are different less often than a disk errs; of
zeros, or of a password that was made longer by repeating it, they are."""

REFUSALS_LOGGED_SECONDS = 1.0
LINGER_BYTES = 64 * KIB
"""What is read, and dropped, of a peer that was refused, so that it gets the answer: a socket that
is closed with bytes unread takes its own last words back."""


def read_secret(path: str) -> Secret:
    """The secret in a file. Raises SecretUnusable unless it is a file of this user's alone, with at
    least 32 random bytes (newlines at the end do not count)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            data = os.read(fd, SECRET_BYTES_MAX + 1) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(fd)
    except OSError as exc:
        raise SecretUnusable(detail=f"{path}: {exc.strerror}", path=path) from exc
    key = data.rstrip(b"\r\n")
    wrong = ""
    if not stat.S_ISREG(found.st_mode):
        wrong = "no file"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}, not to {os.geteuid()}"
    elif found.st_mode & 0o077:
        wrong = f"mode {found.st_mode & 0o777:04o} lets others at it: chmod 600"
    elif len(data) > SECRET_BYTES_MAX:
        wrong = f"more than {SECRET_BYTES_MAX} bytes"
    elif len(key) < SECRET_BYTES_MIN:
        wrong = f"{len(key)} bytes, at least {SECRET_BYTES_MIN} are needed (kvfs secret makes one)"
    elif len(set(key)) < DISTINCT_BYTES_MIN:
        wrong = "not random (kvfs secret makes one)"
    if wrong:
        raise SecretUnusable(detail=f"{path}: {wrong}", path=path)
    return Secret(key)


def _nonce() -> bytes:
    return os.urandom(NONCE_BYTES)


def _named(error: KvfsError, address: Address) -> KvfsError:
    if isinstance(error, AuthenticationFailed):
        return AuthenticationFailed(address=str(address), detail=error.detail)
    return error


# --- the side that dials


def prove(sock: socket.socket, secret: Secret, address: Address, timeout: float) -> None:
    """Leaves ``sock`` where the first frame belongs. Raises AuthenticationFailed, VersionMismatch,
    ProtocolError, ConnectionLost, DeadlineExceeded."""
    deadline = time.monotonic() + timeout
    steps = client_steps(secret, _nonce())
    data: bytes | None = None
    try:
        while True:
            outgoing, wanted = next(steps) if data is None else steps.send(data)
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.sendall(outgoing)
            data = b""
            while len(data) < wanted:
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                piece = sock.recv(wanted - len(data))
                if not piece:
                    raise _closed(address)
                data += piece
    except StopIteration:
        return
    except TimeoutError:
        raise DeadlineExceeded(operation=f"handshake {address}", seconds=timeout) from None
    except OSError as exc:
        raise ConnectionLost(address=str(address), detail=exc.strerror or str(exc)) from exc
    except KvfsError as exc:
        raise _named(exc, address) from None


def _closed(address: Address) -> ConnectionLost:
    # A server that is being stopped does the same, so this may be tried again.
    return ConnectionLost(address=str(address), detail="closed in the handshake (has it a secret?)")


async def prove_stream(stream: trio.abc.Stream, secret: Secret, address: Address) -> None:
    """As ``prove``; the deadline is the caller's. Closes ``stream`` if it raises."""
    try:
        if not await _walk(stream, client_steps(secret, _nonce())):
            raise _closed(address)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(stream)
        raise _closed(address) from None
    except BaseException as exc:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
        if isinstance(exc, KvfsError):
            raise _named(exc, address) from None
        raise


async def _walk(stream: trio.abc.Stream, steps: Steps) -> bool:
    """False if the peer closed."""
    data: bytes | None = None
    with contextlib.suppress(StopIteration):
        while True:
            outgoing, wanted = next(steps) if data is None else steps.send(data)
            if outgoing:
                await stream.send_all(outgoing)
            data = b""
            while len(data) < wanted:
                piece = await stream.receive_some(wanted - len(data))
                if not piece:
                    return False
                data += piece
    return True


# --- the side that listens


class Refusals:
    """Logs refused peers without letting them fill the log."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._count = 0
        self._logged = float("-inf")

    def note(self, reason: object) -> None:
        self._count += 1
        now = time.monotonic()
        if now - self._logged >= REFUSALS_LOGGED_SECONDS:
            log.info("%s: refused %d connections, the last: %s", self._address, self._count, reason)
            self._count, self._logged = 0, now


class StreamGate:
    """Lets streams to ``handler`` that have proved themselves."""

    def __init__(
        self,
        secret: Secret,
        address: Address,
        handler: Callable[[trio.abc.Stream], Awaitable[None]],
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._secret = secret
        self._handler = handler
        self._seconds = seconds
        self._refusals = Refusals(address)
        self._pending: dict[trio.CancelScope, None] = {}

    async def __call__(self, stream: trio.abc.Stream) -> None:
        proven = False
        reason: object = "no proof in time"
        with trio.move_on_after(self._seconds) as scope:
            if len(self._pending) >= HANDSHAKES_MAX:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                oldest.cancel()
            self._pending[scope] = None
            try:
                proven = await _walk(stream, server_steps(self._secret, _nonce()))
                reason = "closed by peer"
            except KvfsError as exc:
                reason = exc
                await _linger(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                reason = exc
            finally:
                self._pending.pop(scope, None)
        if proven:
            await self._handler(stream)
            return
        self._refusals.note(reason)
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)


async def _linger(stream: trio.abc.Stream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        left = LINGER_BYTES
        while left > 0 and (data := await stream.receive_some(4 * KIB)):
            left -= len(data)


@dataclasses.dataclass(eq=False, slots=True)
class _Arrival:
    """A socket that has proved nothing yet. ``steps`` is None once it was refused and only has to
    read why."""

    sock: socket.socket
    deadline: float
    steps: Steps | None
    wanted: int = 0
    received: bytes = b""
    left: int = LINGER_BYTES


class SocketGate:
    """A listening socket whose ``accept`` returns only sockets that have proved themselves. All
    handshakes go on inside ``accept``: whoever serves calls it again and again anyway."""

    def __init__(
        self,
        sock: socket.socket,
        address: Address,
        secret: Secret,
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._sock = sock
        self._secret = secret
        self._seconds = seconds
        self._refusals = Refusals(address)
        self._pending: dict[int, _Arrival] = {}
        self._proven: collections.deque[socket.socket] = collections.deque()
        self._poll = select.poll()
        self._lock = threading.Lock()
        self._closed = False
        sock.setblocking(False)
        self._poll.register(sock, select.POLLIN)

    def accept(self) -> socket.socket:
        """Raises OSError once the socket is shut down, and if there are no descriptors left."""
        with self._lock:
            while not self._proven:
                if self._closed:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._turn()
            return self._proven.popleft()

    def close(self) -> None:
        """The listening socket must be shut down already, which wakes ``accept``."""
        with self._lock:
            self._closed = True
            self._sock.close()
            for sock in (*(a.sock for a in self._pending.values()), *self._proven):
                sock.close()
            self._pending.clear()
            self._proven.clear()

    def _turn(self) -> None:
        now = time.monotonic()
        for arrival in [a for a in self._pending.values() if a.deadline <= now]:
            self._give_up(arrival, "no proof in time")
        oldest = next(iter(self._pending.values()), None)  # the deadlines are in order of arrival
        wait = None if oldest is None else max(oldest.deadline - now, 0.001) * 1000
        for descriptor, _ in self._poll.poll(wait):
            if descriptor == self._sock.fileno():
                self._admit()
            elif descriptor in self._pending:  # unless it was given up for a new one just now
                self._advance(self._pending[descriptor])

    def _admit(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if len(self._pending) >= HANDSHAKES_MAX:
            self._give_up(next(iter(self._pending.values())), "too many that prove nothing")
        sock.setblocking(False)
        steps = server_steps(self._secret, _nonce())
        arrival = _Arrival(sock, time.monotonic() + self._seconds, steps)
        self._pending[sock.fileno()] = arrival
        self._poll.register(sock, select.POLLIN)
        arrival.wanted = next(steps)[1]

    def _advance(self, arrival: _Arrival) -> None:
        try:
            if arrival.steps is None:
                data = arrival.sock.recv(4 * KIB)
                arrival.left -= len(data)
                if not data or arrival.left <= 0:
                    self._forget(arrival)
                    arrival.sock.close()
                return
            data = arrival.sock.recv(arrival.wanted - len(arrival.received))
            if not data:
                self._give_up(arrival, "closed by peer")
                return
            arrival.received += data
            while len(arrival.received) == arrival.wanted:
                self._step(arrival, arrival.steps)
        except BlockingIOError:
            return
        except StopIteration:
            self._forget(arrival)
            self._proven.append(arrival.sock)
        except KvfsError as exc:
            self._refusals.note(exc)
            arrival.steps = None
            with contextlib.suppress(OSError):
                arrival.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            self._give_up(arrival, exc)

    def _step(self, arrival: _Arrival, steps: Steps) -> None:
        outgoing, wanted = steps.send(arrival.received)
        arrival.received, arrival.wanted = b"", wanted
        # A hundred bytes fit into a fresh socket's buffer.
        if arrival.sock.send(outgoing) != len(outgoing):
            raise ConnectionError("takes nothing")

    def _forget(self, arrival: _Arrival) -> None:
        self._poll.unregister(arrival.sock)
        del self._pending[arrival.sock.fileno()]

    def _give_up(self, arrival: _Arrival, reason: object) -> None:
        if arrival.steps is not None:
            self._refusals.note(reason)
        self._forget(arrival)
        arrival.sock.close()
