"""A client that has files open as the mount has: through a session, unlinked or not."""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING, Any

import trio

from kvfs_base import threads
from kvfs_base.errors import ChunkNotFound, ConnectionLost, InodeStale, IntegrityError, KvfsError
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.types import Attr
from kvfs_datapath.client.files import StripedFile
from kvfs_metadata import messages as m
from kvfs_metadata.client import MetadataClient
from sim import tiny
from sim.history import WrongBytes, page, read_page
from sim.workloads import Worker

if TYPE_CHECKING:
    from sim.cluster import ClientHost
    from sim.world import World

READS_MAX = 6


class Session:
    """The metadata client of a mount, for threads. Ends with its process."""

    def __init__(self, host: ClientHost) -> None:
        self._host = host
        self._trio = host.site.trio
        self._scope = trio.CancelScope()
        self._ready = threads.event()
        self._client: MetadataClient
        self._nursery: trio.Nursery
        host.process.at_death.append(self.close)
        self._trio.start_soon(self._run)
        self._ready.wait()

    async def _run(self) -> None:
        env = self._host.env
        with self._scope:
            client = MetadataClient(env, self._host.site.metadata, session=env.rng.randbytes(16))
            async with client as self._client, trio.open_nursery() as self._nursery:
                self._ready.set()
                await trio.sleep_forever()

    def close(self) -> None:
        self._trio.cancel(self._scope)

    def call(self, request: Any) -> Any:
        done = threads.event()
        outcome: list[Any] = []

        async def ask() -> None:
            try:
                outcome.append(await self._client.call(request))
            except KvfsError as exc:
                outcome.append(exc)
            finally:
                done.set()

        self._trio.start_soon_in(self._nursery, ask)
        done.wait()
        if not outcome:
            raise ConnectionLost(detail="the session is closed")
        if isinstance(outcome[0], KvfsError):
            raise outcome[0]
        return outcome[0]


class HoldWorker(Worker):
    """Makes a file, opens it, unlinks it, and goes on reading and writing it: it stays until it is
    closed. Afterwards it must go."""

    kind = "holder"

    def __init__(self, world: World, client: ClientHost, number: int) -> None:
        super().__init__(world, client, number)
        self._session = Session(client)
        self._heard_at = 0.0
        """When the last request was sent that was answered."""

    def run(self) -> None:
        super().run()
        self._session.close()

    def _call(self, request: Any) -> Any:
        begun = self.world.hub.now
        reply = self._session.call(request)
        self._heard_at = begun
        return reply

    def step(self) -> None:
        name = f"{self.name}.{self.world.next_value()}".encode()
        kind = stat.S_IFREG | 0o600
        attr: Attr = self._call(m.Make(self.world.directory, name, kind, open=True))
        try:
            self._use(name, attr)
        finally:
            with contextlib.suppress(KvfsError):
                self._call(m.CloseInode(attr.inode))

    def _use(self, name: bytes, attr: Attr) -> None:
        assert attr.layout is not None
        file = StripedFile(self.client.chunks, attr.inode, attr.layout)
        size = 0
        unlink_after = self.rng.randrange(READS_MAX)
        for turn in range(self.rng.randint(1, READS_MAX)):
            if size == 0 or self.rng.random() < 0.3:
                file.write(size, page(attr.inode, size // PAGE_BYTES, turn + 1))
                size += PAGE_BYTES
                self._call(m.SetAttr(attr.inode, grow_to=size))
            if turn == unlink_after:
                self._call(m.Unlink(self.world.directory, name))
            self.world.hub.sleep(self.rng.expovariate(1 / (4 * self.world.plan.pause_seconds)))
            self._look(file, attr.inode, size)
        if unlink_after > turn:
            self._call(m.Unlink(self.world.directory, name))
        self.world.hub.counts["held"] += 1

    def _read(self, file: StripedFile, inode: int, size: int) -> None:
        data = file.read(0, size, size, False)
        for index in range(size // PAGE_BYTES):
            piece = data[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
            if not read_page(piece, inode, index):
                raise WrongBytes(f"open file {inode}: page {index} is gone")

    def _look(self, file: StripedFile, inode: int, size: int) -> None:
        """What is open is there, as long as the session was heard of within its grace period."""
        plan = self.world.plan
        if plan.lossy or plan.may_be_damaged or self.world.metadata_went_back:
            with contextlib.suppress(IntegrityError, ChunkNotFound, WrongBytes):
                self._read(file, inode, size)
            return
        error: Exception
        try:
            self._call(m.GetAttr(inode))
            self._read(file, inode, size)
            return
        except (IntegrityError, ChunkNotFound, InodeStale, WrongBytes) as exc:
            error = exc
        silent = self.world.hub.now - self._heard_at
        if silent < float(str(tiny.ALWAYS["SESSION_GRACE_SECONDS"])):
            raise WrongBytes(f"open file {inode}, heard of {silent:.1f} s ago: {error}") from error
        self.world.hub.counts["session was over"] += 1
