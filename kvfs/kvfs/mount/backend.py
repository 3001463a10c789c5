"""What the mount stands on: calls of the metadata service, and data path calls in threads."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import trio

from kvfs.mount.adoptions import Adoptions
from kvfs.mount.limits import MOUNT_THREADS
from kvfs.mount.names import Names
from kvfs_base.errors import CacheFull, InternalError, KvfsError
from kvfs_base.limits import MOUNT_IO_BYTES
from kvfs_base.rpc import Done, Request
from kvfs_base.seams import Env
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_metadata.messages import StatFs

log = logging.getLogger(__name__)
T = TypeVar("T")

NO_DESCRIPTOR = -1


class Backing(NamedTuple):
    """A descriptor that the kernel may read by itself, and the state of the file that it is of."""

    descriptor: int
    size: int
    mtime_ns: int
    is_finished: bool = False
    """Who wrote it has closed it, and nobody else did."""

    def close(self) -> None:
        os.close(self.descriptor)


class MetadataCalls(Protocol):
    """The part of MetadataClient that the mount uses."""

    async def call(self, request: Request) -> Any: ...

    def ask_soon(self, request: Request, done: Done) -> int: ...

    def give_up(self, number: int) -> None: ...

    def call_soon(self, request: Request, done: Done) -> bool: ...

    def send_soon(self) -> None: ...

    @property
    def descriptor(self) -> int: ...

    def receive_now(self) -> bool: ...


@dataclasses.dataclass
class Backend:
    env: Env
    metadata: MetadataCalls
    chunks: ChunkClient
    statistics: dict[str, int] = dataclasses.field(default_factory=dict)
    threads: trio.CapacityLimiter = dataclasses.field(
        default_factory=lambda: trio.CapacityLimiter(MOUNT_THREADS)
    )

    name_is_gone: Callable[[int, int, bytes], None] = lambda *_: None
    """Told parent, inode and name of what disappears without the kernel's having asked for it."""
    names: Names = dataclasses.field(init=False)
    """Every question and every change goes by it."""
    adoptions: Adoptions = dataclasses.field(default_factory=Adoptions)
    epoch: int = 0
    """Counts changes that were made here and that a reply on its way cannot know of."""
    scratch: memoryview = dataclasses.field(
        default_factory=lambda: memoryview(mmap.mmap(-1, MOUNT_IO_BYTES))
    )
    """Where data that is at hand is put for a reply: the next read overwrites it. Used only between
    two awaits. The page faults of a fresh buffer would cost as much as the copy."""

    def __post_init__(self) -> None:
        self.names = Names(self.env.clock)

    def count(self, name: str, amount: int = 1) -> None:
        self.statistics[name] = self.statistics.get(name, 0) + amount

    async def call(self, request: Request) -> Any:
        """The client waits for a service that restarts, and makes sure that what it repeats happens
        once. ConnectionLost, when that took too long, leaves open whether it was carried out."""
        token = self.names.token
        try:
            reply = await self.metadata.call(request)
        except KvfsError as exc:
            self.names.failed(request, exc, token)
            raise
        self.names.answered(request, reply, token)
        return reply

    def ask_soon(self, request: Request, done: Done) -> int:
        """A look-up, which leaves with the next ``send_soon``; ``done`` is told in the turn of the
        event loop that the answer arrives in. A number for ``give_up``; 0 if ``call`` has to be
        used, as after an error that is temporary."""
        return self.metadata.ask_soon(request, self._settled(request, done))

    def call_soon(self, request: Request, done: Done) -> bool:
        """As ``call``, in the same way, and ``done`` is told in any case. False if ``call`` has to
        be used."""
        return self.metadata.call_soon(request, self._settled(request, done))

    def _settled(self, request: Request, done: Done) -> Done:
        token = self.names.token

        def tell(reply: Any, error: KvfsError | None) -> None:
            try:
                if error is None:
                    self.names.answered(request, reply, token)
                else:
                    self.names.failed(request, error, token)
                done(reply, error)
            except Exception as exc:  # a bug, and no task's: who asked is told
                log.exception("%s was answered and not taken in", type(request).__name__)
                done(None, InternalError(detail=type(exc).__name__))

        return tell

    async def check_space(self, needed: int) -> None:
        """Raises CacheFull."""
        space = await self.call(StatFs())
        free = max(0, space.capacity_bytes - space.used_bytes)
        if needed > free:
            raise CacheFull(needed_bytes=needed, capacity_bytes=space.capacity_bytes)

    def guard(self, action: Callable[[Done], None], done: Done) -> None:
        """``action`` of something that no task waits for."""
        try:
            action(done)
        except Exception as exc:  # a bug: who asked is told
            log.exception("what was answered was not taken in")
            done(None, InternalError(detail=type(exc).__name__))

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """A hop costs about 190 us of CPU: callers first try what does not wait."""
        return await trio.to_thread.run_sync(function, *args, limiter=self.threads)
