"""The real networks: sockets of the operating system, for trio and for threads."""

from __future__ import annotations

import array
import errno
import functools
import os
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from kvfs_base.errors import ConnectionLost, DeadlineExceeded, TargetFailed
from kvfs_base.handshake import Secret
from kvfs_base.limits import (
    CONNECTIONS_MAX,
    FDS_PER_MESSAGE_MAX,
    HANDSHAKE_SECONDS,
    KIB,
    MIB,
)
from kvfs_base.os_disk import rest_of
from kvfs_base.os_handshake import SocketGate, StreamGate, prove, prove_stream
from kvfs_base.seams import Buffer, Connection, DiskFile, Listener
from kvfs_base.types import Address

SOCKET_BUFFER_BYTES = 4 * MIB
"""Asked for on data connections: half a data request, so that sender and receiver overlap."""
MESSAGE_BYTES = 32 * KIB
"""Most requests and replies are shorter. Memory for 256 KiB comes from the kernel each time, and
goes back: 100 bytes sent and read take 8.8 us then, and 0.8 with room for 32 KiB."""
_BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF)
CORKED_BELOW_BYTES = 512 * KIB
"""Files of this size and more are sent without filling the segments between them."""
WAKE_BYTES = 256 * KIB
"""Who waits for more than this is woken once for so much, not for each packet: to wake a thread
costs the sender's side more than half of what sending takes."""
CONGESTION_NAME_BYTES = 16
"""TCP_CA_NAME_MAX of linux/tcp.h."""


# --- control network


def _remove_stale_socket(path: str) -> None:
    """A socket file that nobody listens on is what a killed server left."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return


def _listening_socket(address: Address, secret: Secret | None) -> tuple[socket.socket, Address]:
    if secret is None:
        address.require_loopback()
    if address.kind == "unix":
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if address.kind == "unix":
            _remove_stale_socket(address.path)
            previous = os.umask(0o177)
            try:
                sock.bind(address.path)
            finally:
                os.umask(previous)
            bound = address
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
            bound = Address.tcp(address.host, sock.getsockname()[1])
        sock.listen(min(CONNECTIONS_MAX, socket.SOMAXCONN))
    except OSError as exc:
        sock.close()
        raise ConnectionLost(address=str(address), detail=exc.strerror or str(exc)) from exc
    return sock, bound


class OsStream(trio.abc.HalfCloseableStream):
    """A trio stream that can send and receive without a task, too."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._descriptor = stream.socket.fileno()
        """-1 once it is closed: the number may then be another file's."""
        self._expected = MESSAGE_BYTES
        """What the next read makes room for."""

    def send_now(self, data: bytes) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise trio.BrokenResourceError from exc

    def fileno(self) -> int:
        return self._descriptor

    def receive_now(self, bytes_max: int) -> bytes | None:
        try:
            return self._read(bytes_max)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise trio.BrokenResourceError from exc

    def _read(self, bytes_max: int) -> bytes:
        room = min(bytes_max, self._expected)
        data = os.read(self._descriptor, room)
        self._expected = SOCKET_BUFFER_BYTES if len(data) == room else MESSAGE_BYTES
        return data

    async def send_all(self, data: Buffer) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        # Requests and replies are seldom there before somebody waits for them: looking first, as
        # trio's stream does, costs a call and an exception more.
        while True:
            if self._descriptor < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                return self._read(max_bytes or SOCKET_BUFFER_BYTES)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError from exc

    async def aclose(self) -> None:
        self._descriptor = -1
        await self._stream.aclose()


class OsNetwork:
    """With a ``secret`` every TCP connection begins with ``kvfs_base.handshake``, and any address
    may be used; without one, those of this machine. Raises what ``prove_stream`` does as well."""

    def __init__(
        self, secret: Secret | None = None, *, handshake_seconds: float = HANDSHAKE_SECONDS
    ) -> None:
        self._secret = secret
        self._handshake_seconds = handshake_seconds

    async def connect(self, address: Address) -> trio.abc.Stream:
        if self._secret is None:
            address.require_loopback()
        try:
            if address.kind == "unix":
                stream = await trio.open_unix_socket(address.path)
            else:
                stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as exc:
            detail = exc.strerror or str(exc)
            raise ConnectionLost(address=str(address), detail=detail) from exc
        if self._secret is not None and address.kind != "unix":
            await prove_stream(stream, self._secret, address)
        return OsStream(stream)

    async def serve(
        self,
        address: Address,
        handler: Callable[[trio.abc.Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        sock, bound = _listening_socket(address, self._secret)
        sock.setblocking(False)
        if self._secret is not None and address.kind == "tcp":
            handler = StreamGate(self._secret, bound, handler, self._handshake_seconds)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

        async def serve_stream(stream: trio.SocketStream) -> None:
            await handler(OsStream(stream))

        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, serve_stream, [listener])
                task_status.started(bound)
        finally:
            if address.kind == "unix":
                try:
                    os.unlink(address.path)
                except FileNotFoundError:
                    pass


# --- data network


def _timeval(seconds: float | None) -> bytes:
    whole = int(seconds or 0)
    return struct.pack("@ll", whole, int(((seconds or 0) - whole) * 1e6))


def _send_unpaced(sock: socket.socket) -> None:
    """BBR has packets sent by a timer, which halves what two cores move. Where it is the host's
    choice, sockets of data take CUBIC instead."""
    level = socket.IPPROTO_TCP, socket.TCP_CONGESTION
    if sock.getsockopt(*level, CONGESTION_NAME_BYTES).startswith(b"bbr"):
        try:
            sock.setsockopt(*level, b"cubic")
        except OSError:  # the host allows no other: it works, slower
            pass


def set_buffers(sock: socket.socket) -> None:
    """Large ones. Many hosts allow 208 KiB (``net.core.rmem_max``, ``wmem_max``) to those who ask,
    and several MiB to TCP itself, which makes them as large as they need be: there nobody asks."""
    for option in _BUFFERS:
        if sock.family == socket.AF_UNIX or _is_granted(option, SOCKET_BUFFER_BYTES):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


@functools.cache
def _is_granted(option: int, count: int) -> bool:
    """Tried on another socket: one that has asked is not looked after by TCP any more."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, option, count)
        return sock.getsockopt(socket.SOL_SOCKET, option) >= count


class OsConnection:
    """A blocking socket. Timeouts are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO): Python's own would
    make the socket non-blocking and add a poll to every call."""

    def __init__(self, sock: socket.socket, peer: Address) -> None:
        self._sock = sock
        self._peer = peer
        self._timeout = 0.0
        self._wakes_from = 1
        self.can_pass_descriptors = sock.family == socket.AF_UNIX
        sock.setblocking(True)
        set_buffers(sock)
        if not self.can_pass_descriptors:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _send_unpaced(sock)

    def _lost(self, exc: OSError) -> Exception:
        if exc.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            return DeadlineExceeded(operation=str(self._peer), seconds=self._timeout)
        return ConnectionLost(address=str(self._peer), detail=exc.strerror or str(exc))

    def send(
        self, parts: Sequence[Buffer], descriptors: Sequence[int] = (), *, more: bool = False
    ) -> None:
        wanted = sum(map(len, parts))
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            if descriptors
            else []
        )
        flags = socket.MSG_MORE if more else 0
        done = 0
        try:
            while done < wanted:
                done += self._sock.sendmsg(rest_of(parts, done), ancillary, flags)
                ancillary = []
        except OSError as exc:
            raise self._lost(exc) from exc

    def send_files(self, pieces: Sequence[tuple[DiskFile, int, int]]) -> None:
        sendfile, out = os.sendfile, self._sock.fileno()
        # Else the end of each piece would go on its way alone, in a segment of a few bytes. For
        # large ones to fill each segment costs more than to send one more.
        corked = (
            len(pieces) > 1
            and pieces[0][2] < CORKED_BELOW_BYTES
            and self._sock.family != socket.AF_UNIX
        )
        try:
            if corked:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            for file, start, count in pieces:
                descriptor, done = file.fileno(), 0
                while done < count:
                    sent = sendfile(out, descriptor, start + done, count - done)
                    if not sent:
                        detail = "file shorter than said"
                        raise ConnectionLost(address=str(self._peer), detail=detail)
                    done += sent
            if corked:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        except OSError as exc:
            if exc.errno == errno.EIO:  # sockets have other names for their troubles
                raise TargetFailed(detail=f"sendfile: {exc.strerror}") from exc
            raise self._lost(exc) from exc

    def receive_into(self, views: Sequence[memoryview]) -> None:
        self._fill(views, sum(map(len, views)), time.monotonic())

    def receive_groups(
        self, groups: Sequence[Sequence[memoryview]], after: Callable[[int], None]
    ) -> None:
        sizes = [sum(map(len, views)) for views in groups]
        left = sum(sizes)
        started = time.monotonic()
        for number, (views, size) in enumerate(zip(groups, sizes, strict=True)):
            left -= size
            # At most what follows this group: else the last bytes would wake nobody.
            self._wake_from(WAKE_BYTES if left >= WAKE_BYTES else 1)
            if number and self._timeout and time.monotonic() - started >= self._timeout:
                raise DeadlineExceeded(operation=str(self._peer), seconds=self._timeout)
            self._fill(views, size, started)
            after(number)

    def _wake_from(self, count: int) -> None:
        """A thread that waits for bytes sleeps until so many are there."""
        if count != self._wakes_from and not self.can_pass_descriptors:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            except OSError as exc:
                raise self._lost(exc) from exc
            self._wakes_from = count

    def _fill(self, views: Sequence[memoryview], wanted: int, started: float) -> None:
        done = 0
        try:
            if len(views) == 1 and wanted:
                # Headers and bodies of frames, whole in the socket's buffer: 4 us against 7.
                done = self._sock.recv_into(views[0], wanted, socket.MSG_WAITALL)
                if done == 0:
                    raise ConnectionLost(address=str(self._peer), detail="closed by peer")
            while done < wanted:
                if done and self._timeout and time.monotonic() - started >= self._timeout:
                    raise DeadlineExceeded(operation=str(self._peer), seconds=self._timeout)
                rest = rest_of(views, done)
                count = self._sock.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0]
                if count == 0:
                    raise ConnectionLost(address=str(self._peer), detail="closed by peer")
                done += count
        except OSError as exc:
            raise self._lost(exc) from exc

    def receive_with_descriptors(self, view: memoryview) -> list[int]:
        space = socket.CMSG_SPACE(4 * FDS_PER_MESSAGE_MAX)
        found = array.array("i")
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into(
                [view], space, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
            )
        except OSError as exc:
            raise self._lost(exc) from exc
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found.frombytes(data[: len(data) - len(data) % found.itemsize])
        if count == 0 or flags & socket.MSG_CTRUNC:
            for fd in found:
                os.close(fd)
            detail = "closed by peer" if count == 0 else "descriptors were cut off"
            raise ConnectionLost(address=str(self._peer), detail=detail)
        if count < len(view):
            self.receive_into([view[count:]])
        return list(found)

    def set_timeout(self, seconds: float | None) -> None:
        self._timeout = seconds or 0.0
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, _timeval(seconds))

    def fileno(self) -> int:
        return self._sock.fileno()

    def shutdown(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self._sock.close()


class OsListener:
    def __init__(self, address: Address, secret: Secret | None, handshake_seconds: float) -> None:
        self._sock, self.address = _listening_socket(address, secret)
        self._gate: SocketGate | None = None
        if secret is not None and address.kind == "tcp":
            self._gate = SocketGate(self._sock, self.address, secret, handshake_seconds)

    def accept(self) -> Connection:
        try:
            sock = self._sock.accept()[0] if self._gate is None else self._gate.accept()
        except OSError as exc:
            raise ConnectionLost(address=str(self.address), detail=str(exc.strerror)) from exc
        return OsConnection(sock, self.address)

    def close(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread blocked in accept
        except OSError:
            pass
        if self._gate is not None:
            self._gate.close()
        self._sock.close()
        if self.address.kind == "unix":
            try:
                os.unlink(self.address.path)
            except FileNotFoundError:
                pass


class OsBlockingNetwork:
    """As OsNetwork. Raises what ``prove`` does as well."""

    def __init__(
        self, secret: Secret | None = None, *, handshake_seconds: float = HANDSHAKE_SECONDS
    ) -> None:
        self._secret = secret
        self._handshake_seconds = handshake_seconds

    def connect(self, address: Address, timeout: float) -> Connection:
        if self._secret is None:
            address.require_loopback()
        started = time.monotonic()
        try:
            sock = _dialled(address, timeout)
        except TimeoutError:
            raise DeadlineExceeded(operation=f"connect {address}", seconds=timeout) from None
        except OSError as exc:
            detail = exc.strerror or str(exc)
            raise ConnectionLost(address=str(address), detail=detail) from exc
        if self._secret is not None and address.kind == "tcp":
            try:
                prove(sock, self._secret, address, timeout - (time.monotonic() - started))
            except BaseException:
                sock.close()
                raise
        return OsConnection(sock, address)

    def listen(self, address: Address) -> Listener:
        return OsListener(address, self._secret, self._handshake_seconds)


def _dialled(address: Address, timeout: float) -> socket.socket:
    if address.kind == "tcp":
        return socket.create_connection((address.host, address.port), timeout)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(address.path)
    except BaseException:
        sock.close()
        raise
    return sock


__all__ = ["OsBlockingNetwork", "OsConnection", "OsNetwork", "set_buffers"]
