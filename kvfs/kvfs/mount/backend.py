"""What the mount stands on: calls of the metadata service, and data path calls in threads."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import trio

from kvfs.mount.names import Names
from kvfs_base.errors import KvfsError
from kvfs_base.limits import MOUNT_IO_BYTES, MOUNT_THREADS
from kvfs_base.rpc import Done, Request
from kvfs_base.seams import Env
from kvfs_datapath.client.chunk_client import ChunkClient

T = TypeVar("T")

NO_DESCRIPTOR = -1


class MetadataCalls(Protocol):
    """The part of MetadataClient that the mount uses."""

    async def call(self, request: Request) -> Any: ...

    def call_soon(self, request: Request, done: Done) -> int: ...

    def give_up(self, number: int) -> None: ...


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

    def call_soon(self, request: Request, done: Done) -> int:
        """A look-up, in the turn of the event loop that it came up in; ``done`` is told in the one
        that the answer arrives in. A number for ``give_up``; 0 if ``call`` has to be used, as after
        an error that is temporary."""
        token = self.names.token

        def tell(reply: Any, error: KvfsError | None) -> None:
            if error is None:
                self.names.answered(request, reply, token)
            else:
                self.names.failed(request, error, token)
            done(reply, error)

        return self.metadata.call_soon(request, tell)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """A hop costs about 190 us of CPU: callers first try what does not wait."""
        return await trio.to_thread.run_sync(function, *args, limiter=self.threads)
