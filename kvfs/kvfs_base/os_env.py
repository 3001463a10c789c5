"""The real seams: the operating system's clock, sockets and files. Of kvfs_base only this module
and ``os_handshake`` import them."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import random
import resource
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from kvfs_base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    DiskFull,
    ServerBusy,
    TargetFailed,
)
from kvfs_base.handshake import Secret
from kvfs_base.limits import CONNECTIONS_MAX, FDS_PER_MESSAGE_MAX, HANDSHAKE_SECONDS, KIB, MIB
from kvfs_base.os_handshake import SocketGate, StreamGate, prove, prove_stream, read_secret
from kvfs_base.seams import (
    Buffer,
    Connection,
    Disk,
    DiskFile,
    DiskUsage,
    Env,
    Listener,
)
from kvfs_base.types import Address

IOV_MAX = 1024
LOOKED_FOR_BYTES = 256 * KIB
"""From here on it is cheaper to look whether bytes are in memory than to ask for them."""
SOCKET_BUFFER_BYTES = 4 * MIB
"""Asked for on data connections: half a data request, so that sender and receiver overlap."""
WAKE_BYTES = 256 * KIB
"""Who waits for more than this is woken once for so much, not for each packet: to wake a thread
costs the sender's side more than half of what sending takes."""
CONGESTION_NAME_BYTES = 16
"""TCP_CA_NAME_MAX of linux/tcp.h."""


class SystemClock:
    def time_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()


# --- disk


def _disk_error(exc: OSError, path: str) -> Exception:
    """Missing and existing paths are the caller's business; everything else is the disk's."""
    if isinstance(exc, FileNotFoundError | FileExistsError):
        return exc
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(path=path)
    if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ServerBusy(detail=os.strerror(exc.errno))  # this process's trouble, not the disk's
    return TargetFailed(detail=f"{path}: {os.strerror(exc.errno or 0)}")


FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_TOPDIR_FL = 0x00020000


class OsDiskFile:
    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path

    def fileno(self) -> int:
        return self._fd

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        wanted = sum(len(b) for b in buffers)
        done = 0
        try:
            while done < wanted:
                count = os.preadv(self._fd, _tail(buffers, done), offset + done)
                if count == 0:
                    break
                done += count
        except OSError as exc:
            raise _disk_error(exc, self._path) from exc
        return done

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        wanted = sum(len(b) for b in buffers)
        done = 0
        try:
            while done < wanted:
                done += os.pwritev(self._fd, _tail(buffers, done), offset + done)
        except OSError as exc:
            raise _disk_error(exc, self._path) from exc
        return done

    def will_need(self, offset: int, length: int) -> None:
        try:
            # The kernel looks for every page: 23 us for 2 MiB that are all in memory. A byte at the
            # end tells in 1 us; what this takes for cached and is not will only be read later.
            if length < LOOKED_FOR_BYTES or not self._is_cached(offset + length - 1):
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # not in memory, or a file system that cannot tell
            return False

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as exc:
            raise _disk_error(exc, self._path) from exc

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def get_attribute(self, name: str) -> bytes | None:
        try:
            return os.getxattr(self._fd, f"user.{name}")
        except OSError as exc:
            if exc.errno == errno.ENODATA:
                return None
            raise _disk_error(exc, self._path) from exc

    def set_attribute(self, name: str, value: bytes) -> None:
        try:
            os.setxattr(self._fd, f"user.{name}", value)
        except OSError as exc:
            raise _disk_error(exc, self._path) from exc

    def sync(self, *, attributes: bool = False) -> None:
        try:
            if attributes:
                os.fsync(self._fd)
            else:
                os.fdatasync(self._fd)
        except OSError as exc:
            raise TargetFailed(detail=f"sync {self._path}: {exc.strerror}") from exc

    def has_writer(self) -> bool:
        # The kernel grants a read lease only while no file description is open for writing, which
        # also sees descriptors that were passed to processes we know nothing of.
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as exc:
            if exc.errno == errno.EAGAIN:
                return True
            raise _disk_error(exc, self._path) from exc
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False

    def lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise _disk_error(exc, self._path) from exc
        return True

    def close(self) -> None:
        # The number may belong to another file by the time of a second close.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _tail(buffers: Sequence[Buffer], done: int) -> list[Buffer]:
    """What is left of ``buffers`` after ``done`` bytes, at most IOV_MAX pieces."""
    if not done and len(buffers) <= IOV_MAX:
        return list(buffers)
    rest: list[Buffer] = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
            continue
        rest.append(memoryview(buffer)[done:] if done else buffer)
        done = 0
        if len(rest) == IOV_MAX:
            break
    return rest


class OsDisk:
    """Files below ``root``."""

    def __init__(self, root: str) -> None:
        self._root = root

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        direct: bool = False,
    ) -> DiskFile:
        flags = os.O_CLOEXEC | (os.O_RDWR if write else os.O_RDONLY)
        flags |= (os.O_CREAT if create else 0) | (os.O_EXCL if exclusive else 0)
        full = self._path(path)
        try:
            if direct:
                try:
                    return OsDiskFile(os.open(full, flags | os.O_DIRECT, 0o600), path)
                except OSError as exc:
                    if exc.errno != errno.EINVAL:
                        raise
            return OsDiskFile(os.open(full, flags & ~os.O_EXCL if direct else flags, 0o600), path)
        except OSError as exc:
            raise _disk_error(exc, path) from exc

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(self._path(source), self._path(target))
        except OSError as exc:
            raise _disk_error(exc, target) from exc

    def unlink(self, path: str) -> None:
        try:
            os.unlink(self._path(path))
        except OSError as exc:
            raise _disk_error(exc, path) from exc

    def make_directory(self, path: str) -> None:
        try:
            os.makedirs(self._path(path), mode=0o700, exist_ok=True)
        except OSError as exc:
            raise _disk_error(exc, path) from exc

    def spread(self, path: str) -> None:
        # What ext4 does with the directories of its root; others know no such flag.
        try:
            fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        flags = array.array("l", [0])
        try:
            fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
            flags[0] |= FS_TOPDIR_FL
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags)
        except OSError:
            pass
        finally:
            os.close(fd)

    def remove_directory(self, path: str) -> bool:
        try:
            os.rmdir(self._path(path))
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return False
            raise _disk_error(exc, path) from exc
        return True

    def list(self, path: str) -> list[str]:
        try:
            return os.listdir(self._path(path))
        except OSError as exc:
            raise _disk_error(exc, path) from exc

    def exists(self, path: str) -> bool:
        return os.path.lexists(self._path(path))

    def sync_directory(self, path: str) -> None:
        try:
            fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise TargetFailed(detail=f"fsync {path}: {exc.strerror}") from exc

    def usage(self) -> DiskUsage:
        try:
            st = os.statvfs(self._root)
            device = os.stat(self._root).st_dev
        except OSError as exc:
            raise _disk_error(exc, self._root) from exc
        return DiskUsage(st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize, f"dev{device:x}")


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
                return await trio.open_unix_socket(address.path)
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as exc:
            detail = exc.strerror or str(exc)
            raise ConnectionLost(address=str(address), detail=detail) from exc
        if self._secret is not None:
            await prove_stream(stream, self._secret, address)
        return stream

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
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, handler, [listener])
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
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
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
                done += self._sock.sendmsg(_tail(parts, done), ancillary, flags)
                ancillary = []
        except OSError as exc:
            raise self._lost(exc) from exc

    def send_files(self, pieces: Sequence[tuple[DiskFile, int, int]]) -> None:
        sendfile, out = os.sendfile, self._sock.fileno()
        try:
            for file, start, count in pieces:
                descriptor, done = file.fileno(), 0
                while done < count:
                    sent = sendfile(out, descriptor, start + done, count - done)
                    if not sent:
                        detail = "file shorter than said"
                        raise ConnectionLost(address=str(self._peer), detail=detail)
                    done += sent
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
                rest = _tail(views, done)
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


def host_id() -> str:
    """Boot and network namespace (of the calling thread): two processes with equal ids share a
    kernel and its sockets."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}-{os.stat('/proc/thread-self/ns/net').st_ino}"


def os_env(seed: int | None = None, *, secret_file: str | None = None) -> Env:
    """The real world. ``seed`` makes chance repeatable. ``secret_file`` opens it beyond this
    machine: raises SecretUnusable."""
    secret = None if secret_file is None else read_secret(secret_file)
    disk: Callable[[str], Disk] = OsDisk
    return Env(
        clock=SystemClock(),
        rng=random.Random(seed),
        network=OsNetwork(secret),
        blocking_network=OsBlockingNetwork(secret),
        host_id=host_id(),
        open_disk=disk,
    )


def raise_open_files_limit() -> None:
    """For processes that keep chunks open, each with a descriptor: as many as this one may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


__all__ = [
    "OsBlockingNetwork",
    "OsDisk",
    "OsNetwork",
    "SystemClock",
    "host_id",
    "os_env",
    "raise_open_files_limit",
]
