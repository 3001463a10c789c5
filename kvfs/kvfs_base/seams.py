"""Seams: everything that touches time, chance, network or disk goes through one of these.

Production code takes an ``Env`` and imports no ``time``, ``random``, ``socket`` or file call of its
own (``tests/t0_base/test_seams_lint.py`` reads the syntax trees). ``kvfs_base.os_env`` is the real
thing, ``kvfs_base.testing`` has a memory fake of each, and both pass the suites in ``tests``.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

import trio

from kvfs_base.types import Address

Buffer = bytes | bytearray | memoryview


class Clock(Protocol):
    def time_ns(self) -> int:
        """Wall clock, nanoseconds since 1970: timestamps of files, expiry."""

    def monotonic(self) -> float:
        """Seconds that only grow: leases, deadlines, rates."""


@dataclasses.dataclass(frozen=True)
class DiskUsage:
    capacity_bytes: int
    free_bytes: int
    volume: str = ""
    """Equal for directories of one file system; empty where that is unknown."""


class DiskFile(Protocol):
    """An open file. Raises DiskFull, TargetFailed (EIO, read-only) and nothing else for I/O."""

    def fileno(self) -> int:
        """A real descriptor: it can be passed to another process or given to the kernel."""

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read, fewer than asked only at the end of the file."""

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Always writes everything."""

    def will_need(self, offset: int, length: int) -> None:
        """These bytes will be read soon; may wait for the disk. A hint: nothing is raised."""

    def truncate(self, size: int) -> None: ...

    def size(self) -> int: ...

    def get_attribute(self, name: str) -> bytes | None:
        """An extended attribute, or None."""

    def set_attribute(self, name: str, value: bytes) -> None: ...

    def sync(self, *, attributes: bool = False) -> None:
        """fdatasync, or fsync where extended attributes must be durable too. A failure is final:
        the caller takes the target out of service and never retries (Linux reports a lost write
        once and then forgets it)."""

    def has_writer(self) -> bool:
        """Whether any process has this file open for writing (or mapped so), descriptors that were
        passed on included. Only a read-only descriptor may be asked."""

    def lock(self) -> bool:
        """Takes the file's exclusive advisory lock, held until ``close``. False if it is taken."""

    def close(self) -> None:
        """Twice does no harm."""


class Disk(Protocol):
    """A directory tree of plain files. Paths are relative, with ``/`` between parts. A missing path
    raises FileNotFoundError, an existing one FileExistsError; I/O failures as for DiskFile."""

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        direct: bool = False,
    ) -> DiskFile:
        """``direct`` asks for O_DIRECT and falls back to buffered where there is none (tmpfs)."""

    def rename(self, source: str, target: str) -> None:
        """Replaces ``target`` in one step."""

    def unlink(self, path: str) -> None: ...

    def make_directory(self, path: str) -> None:
        """With parents; fine if it exists."""

    def spread(self, path: str) -> None:
        """Directories that will be made in this one are to lie far apart, and what is made in them
        near them. A hint: nothing is raised."""

    def remove_directory(self, path: str) -> bool:
        """An empty one. False if it is not empty, or missing."""

    def list(self, path: str) -> list[str]: ...

    def exists(self, path: str) -> bool:
        """Raises TargetFailed: who cannot look does not know."""

    def sync_directory(self, path: str) -> None: ...

    def usage(self) -> DiskUsage: ...


@runtime_checkable
class SendsNow(Protocol):
    """What a stream may have besides: for those who are in no task that could wait, and to whom a
    task a message would cost more than the message."""

    def send_now(self, data: bytes) -> int:
        """How many bytes were sent, from the first on, without waiting. Nobody else may be sending.
        Raises trio.BrokenResourceError."""


@runtime_checkable
class ReceivesNow(Protocol):
    """The same for what arrives: for those who wait for several descriptors by themselves."""

    def fileno(self) -> int:
        """Readable when something has arrived; -1 once it is closed."""

    def receive_now(self, bytes_max: int) -> bytes | None:
        """What has arrived, nothing at the stream's end; None if nothing has. A task may be waiting
        in ``receive_some``: it goes on waiting. Raises trio.BrokenResourceError."""


class Network(Protocol):
    """Streams for the control path (trio)."""

    async def connect(self, address: Address) -> trio.abc.Stream:
        """Raises ConnectionLost."""

    async def serve(
        self,
        address: Address,
        handler: Callable[[trio.abc.Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Runs ``handler`` for every connection until cancelled; reports the bound address."""


class Connection(Protocol):
    """A blocking byte stream for the data path. One thread uses one at a time."""

    can_pass_descriptors: bool

    def send(
        self, parts: Sequence[Buffer], descriptors: Sequence[int] = (), *, more: bool = False
    ) -> None:
        """Everything, or ConnectionLost / DeadlineExceeded. ``more`` follows at once: it may wait
        for that, to go in one packet and to wake the peer once."""

    def send_files(self, pieces: Sequence[tuple[DiskFile, int, int]]) -> None:
        """Of each open file, from an offset, so many bytes, without bringing them to user space.
        Raises ConnectionLost also if a file is shorter, TargetFailed if its disk fails."""

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fills every view, or ConnectionLost / DeadlineExceeded. The timeout covers the whole
        call: a peer that trickles does not hold a buffer for longer."""

    def receive_groups(
        self, groups: Sequence[Sequence[memoryview]], after: Callable[[int], None]
    ) -> None:
        """As ``receive_into`` for all the views together; calls ``after`` with the number of each
        group once it is filled, while the bytes of the next ones come in."""

    def receive_with_descriptors(self, view: memoryview) -> list[int]:
        """Fills ``view`` and returns the descriptors that came with it."""

    def set_timeout(self, seconds: float | None) -> None: ...

    def fileno(self) -> int:
        """Readable once something has arrived, where descriptors can be passed."""

    def shutdown(self) -> None:
        """Wakes a thread that is blocked in this connection; callable from any thread."""

    def close(self) -> None: ...


class Listener(Protocol):
    address: Address

    def accept(self) -> Connection:
        """Blocks. Raises ConnectionLost once closed."""

    def close(self) -> None: ...


class BlockingNetwork(Protocol):
    """Connections for the data path (threads)."""

    def connect(self, address: Address, timeout: float) -> Connection:
        """Raises ConnectionLost or DeadlineExceeded."""

    def listen(self, address: Address) -> Listener:
        """Port 0 picks one; ``Listener.address`` says which."""


@dataclasses.dataclass(frozen=True)
class Env:
    """What a service may know of the world."""

    clock: Clock
    rng: random.Random
    network: Network
    blocking_network: BlockingNetwork
    host_id: str
    """Equal for processes that can reach each other's Unix sockets and pass descriptors."""
    open_disk: Callable[[str], Disk]
    """A Disk over the directory at this absolute path."""
