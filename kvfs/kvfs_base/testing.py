"""Memory fakes of the seams, shipped so that users can test against them too.

``MemoryDisk`` keeps contents in memfds: descriptors are real, so sendfile and descriptor passing
work on it as on a disk.
"""

from __future__ import annotations

import collections
import os
import queue
import random
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio
import trio.testing

from kvfs_base.errors import ConnectionLost, DiskFull
from kvfs_base.os_disk import OsDiskFile
from kvfs_base.os_network import OsConnection
from kvfs_base.seams import Buffer, Connection, Disk, DiskFile, DiskUsage, Env, Listener
from kvfs_base.types import Address


class ManualClock:
    """Stands still until told."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self._start_ns = start_ns
        self._elapsed_ns = 0

    def time_ns(self) -> int:
        return self._start_ns + self._elapsed_ns

    def monotonic(self) -> float:
        return self._elapsed_ns / 1e9

    def advance(self, seconds: float) -> None:
        self._elapsed_ns += int(seconds * 1e9)


class _MemoryInode:
    """A memfd. It is kept open read-only, so that ``has_writer`` sees the users' descriptors only,
    and lives as long as one of them."""

    def __init__(self) -> None:
        writable = os.memfd_create("kvfs", os.MFD_CLOEXEC)
        try:
            self.fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(writable)
        self.attributes: dict[str, bytes] = {}

    def __del__(self) -> None:
        os.close(self.fd)


class MemoryDiskFile(OsDiskFile):
    """Asks its disk's ``before`` first, then does as a file does."""

    def __init__(self, disk: MemoryDisk, inode: _MemoryInode, path: str, *, write: bool) -> None:
        flags = os.O_RDWR if write else os.O_RDONLY
        super().__init__(os.open(f"/proc/self/fd/{inode.fd}", flags | os.O_CLOEXEC), path)
        self._inode = inode
        self._disk = disk
        self._write = write

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._disk.before("preadv", self._path)
        return super().preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        self._disk.before("pwritev", self._path)
        grows = offset + sum(len(b) for b in buffers) - self.size()
        if self._write and grows > self._disk.usage().free_bytes:
            raise DiskFull(path=self._path)
        return super().pwritev(buffers, offset)

    def truncate(self, size: int) -> None:
        self._disk.before("truncate", self._path)
        super().truncate(size)

    def get_attribute(self, name: str) -> bytes | None:
        self._disk.before("get_attribute", self._path)
        return self._inode.attributes.get(name)

    def set_attribute(self, name: str, value: bytes) -> None:
        self._disk.before("set_attribute", self._path)
        self._inode.attributes[name] = value

    def sync(self, *, attributes: bool = False) -> None:
        self._disk.before("sync", self._path)


class MemoryDisk:
    """A directory tree in memory. ``before(operation, path)`` is called before each operation and
    may raise, which is how tests make disks fail."""

    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self._capacity_bytes = capacity_bytes
        self._files: dict[str, _MemoryInode] = {}
        self._directories = {""}
        self.before: Callable[[str, str], None] = lambda operation, path: None

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        direct: bool = False,
    ) -> DiskFile:
        self.before("open", path)
        inode = self._files.get(path)
        if inode is None:
            if not create or path.rpartition("/")[0] not in self._directories:
                raise FileNotFoundError(path)
            inode = self._files[path] = _MemoryInode()
        elif create and exclusive:
            raise FileExistsError(path)
        return MemoryDiskFile(self, inode, path, write=write)

    def rename(self, source: str, target: str) -> None:
        self.before("rename", source)
        if source not in self._files or target.rpartition("/")[0] not in self._directories:
            raise FileNotFoundError(source)
        self._files[target] = self._files.pop(source)

    def unlink(self, path: str) -> None:
        self.before("unlink", path)
        if self._files.pop(path, None) is None:
            raise FileNotFoundError(path)

    def make_directory(self, path: str) -> None:
        self.before("make_directory", path)
        parts = path.split("/")
        self._directories.update("/".join(parts[:n]) for n in range(1, len(parts) + 1))

    def spread(self, path: str) -> None:
        pass

    def remove_directory(self, path: str) -> bool:
        self.before("remove_directory", path)
        if path not in self._directories:
            return False
        if any(name.startswith(f"{path}/") for name in (*self._files, *self._directories)):
            return False
        self._directories.discard(path)
        return True

    def list(self, path: str) -> list[str]:
        self.before("list", path)
        if path not in self._directories:
            raise FileNotFoundError(path)
        prefix = f"{path}/" if path else ""
        names = (*self._files, *self._directories)
        below = {n[len(prefix) :].partition("/")[0] for n in names if n.startswith(prefix)}
        return sorted(below - {""})

    def exists(self, path: str) -> bool:
        self.before("exists", path)
        return path in self._files or path in self._directories

    def sync_directory(self, path: str) -> None:
        self.before("sync_directory", path)
        if path not in self._directories:
            raise FileNotFoundError(path)

    def usage(self) -> DiskUsage:
        used = sum(os.fstat(inode.fd).st_size for inode in list(self._files.values()))
        return DiskUsage(self._capacity_bytes, max(0, self._capacity_bytes - used))


class MemoryNetwork:
    """Control streams inside one process; TCP addresses need no loopback here."""

    def __init__(self) -> None:
        self._handlers: dict[Address, trio.MemorySendChannel[trio.abc.Stream]] = {}
        self._next_port = 40_000

    async def connect(self, address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        channel = self._handlers.get(address)
        if channel is None:
            raise ConnectionLost(address=str(address), detail="connection refused")
        near, far = trio.testing.memory_stream_pair()
        await channel.send(far)
        return near

    async def serve(
        self,
        address: Address,
        handler: Callable[[trio.abc.Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        if address.kind == "tcp" and address.port == 0:
            self._next_port += 1
            address = Address.tcp(address.host, self._next_port)
        if address in self._handlers:
            raise ConnectionLost(address=str(address), detail="address in use")
        send, receive = trio.open_memory_channel[trio.abc.Stream](0)
        self._handlers[address] = send
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(address)
                async for stream in receive:
                    nursery.start_soon(handler, stream)
        finally:
            del self._handlers[address]


class _MemoryListener:
    def __init__(self, network: MemoryBlockingNetwork, address: Address) -> None:
        self.address = address
        self._network = network
        self.arrivals: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()

    def accept(self) -> Connection:
        connection = self.arrivals.get()
        if connection is None:
            raise ConnectionLost(address=str(self.address), detail="listener closed")
        return connection

    def close(self) -> None:
        self._network.listeners.pop(self.address, None)
        try:
            while (waiting := self.arrivals.get_nowait()) is not None:
                waiting.close()
        except queue.Empty:
            pass
        self.arrivals.put(None)


class MemoryBlockingNetwork:
    """Data connections inside one process, over socket pairs."""

    def __init__(self) -> None:
        self.listeners: dict[Address, _MemoryListener] = {}
        self._next_port = 50_000

    def connect(self, address: Address, timeout: float) -> Connection:
        listener = self.listeners.get(address)
        if listener is None:
            raise ConnectionLost(address=str(address), detail="connection refused")
        near, far = (OsConnection(s, address) for s in socket.socketpair())
        near.can_pass_descriptors = far.can_pass_descriptors = address.kind == "unix"
        listener.arrivals.put(far)
        return near

    def listen(self, address: Address) -> Listener:
        if address.kind == "tcp" and address.port == 0:
            self._next_port += 1
            address = Address.tcp(address.host, self._next_port)
        if address in self.listeners:
            raise ConnectionLost(address=str(address), detail="address in use")
        listener = self.listeners[address] = _MemoryListener(self, address)
        return listener


def memory_env(seed: int = 0, host_id: str = "host-a") -> tuple[Env, ManualClock]:
    """A world in memory; each disk path names one MemoryDisk that outlives its users."""
    clock = ManualClock()
    disks: dict[str, Disk] = collections.defaultdict(MemoryDisk)
    env = Env(
        clock=clock,
        rng=random.Random(seed),
        network=MemoryNetwork(),
        blocking_network=MemoryBlockingNetwork(),
        host_id=host_id,
        open_disk=disks.__getitem__,
    )
    return env, clock


def gather(buffers: Sequence[Buffer]) -> bytes:
    """The bytes of several buffers, for comparisons in tests."""
    return b"".join(bytes(b) for b in buffers)
