"""A metadata service that hangs up when it is told to, for trio clients and for threads."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio
import trio.testing

from kvfs_base import errors as e
from kvfs_base import frames
from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request, RpcServer
from kvfs_base.seams import Env
from kvfs_base.testing import memory_env
from kvfs_base.types import Address
from kvfs_metadata import messages as m
from kvfs_metadata.client import MetadataClient
from kvfs_metadata.core import MetadataCore
from t2_services.metadata_rig import Rig

ADDRESS = Address.unix("/meta")
HEARTBEAT = Heartbeat("s", "h", None, None, (TargetReport("t", 10**9, 10**9, True, 0),))
SESSION = b"a session of mine"[:16]
CHANGING = set(m.Changing.__args__)


class Scripted:
    """A service that answers, or hangs up instead (before or after doing it)."""

    def __init__(self, core: MetadataCore) -> None:
        self.core = core
        self.seen: list[Request] = []
        self.silent = False
        """Nothing is carried out or answered."""
        self.hang_up: deque[str] = deque()
        """For the next requests: "" answers, "before" and "after" hang up, "away" has done the
        request, but does not know that it was written."""

    def connected(self, session_id: int) -> None:
        pass

    def disconnected(self, session_id: int, *, by_peer: bool) -> None:
        self.core.disconnected(session_id)

    async def handle(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        answers = []
        if self.silent:
            await trio.sleep_forever()
        for request in requests:
            self.seen.append(request)
            how = self.hang_up.popleft() if self.hang_up else ""
            if how == "before":
                raise trio.BrokenResourceError
            answers += self.core.update([self.core.operation(session_id, request)])
            if how == "after":
                raise trio.BrokenResourceError
            if how == "away":
                answers[-1] = e.StoreUnavailable()
        return answers

    def types(self) -> list[type]:
        return [type(request) for request in self.seen]

    def lose(self, how: str, times: int) -> None:
        self.hang_up.extend([how] * times + [""])


class HangingUpServer(RpcServer):
    """Lets the handler's BrokenResourceError end the connection instead of answering it."""

    async def _results(self, session_id: int, batch: Sequence[frames.Frame]) -> Sequence[Any]:
        requests = [self._decoder.decode(frame.body) for frame in batch]
        return await self._handler.handle(session_id, requests)


class Stage:
    def __init__(self) -> None:
        self.env, self.clock = memory_env()
        self.rig = Rig()
        self.handler = Scripted(self.rig.core)

    @contextlib.asynccontextmanager
    async def serving(self, address: Address = ADDRESS) -> AsyncIterator[None]:
        server = HangingUpServer(self.env.network, m.MetadataRequest, self.handler)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, address)
            yield
            nursery.cancel_scope.cancel()

    def client(self, **options: Any) -> MetadataClient:
        return MetadataClient(self.env, ADDRESS, **options)


async def call_soon(client: MetadataClient, request: Request) -> Any:
    """As ``client.call``, by way of ``client.call_soon``."""
    told: list[tuple[Any, e.KvfsError | None]] = []
    is_told = trio.Event()

    def done(reply: Any, error: e.KvfsError | None) -> None:
        told.append((reply, error))
        is_told.set()

    assert client.call_soon(request, done)
    client.send_soon()
    await is_told.wait()
    ((reply, error),) = told
    if error is not None:
        raise error
    return reply


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@dataclasses.dataclass
class BlockingStage:
    env: Env
    address: Address
    rig: Rig
    handler: Scripted
    cut: Callable[[], None]
    """Ends all connections; the server listens again."""


@contextlib.contextmanager
def blocking_stage(tmp_path: Path, targets: int = 2) -> Iterator[BlockingStage]:
    """A real server in a thread."""
    env = os_env()
    rig = Rig(targets=targets)
    handler = Scripted(rig.core)
    address = Address.unix(str(tmp_path / "sock"))
    ready = threading.Event()
    token: list[Any] = []
    scopes: list[trio.CancelScope] = []

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with trio.CancelScope() as outer:
            token.append(outer)
            while True:
                with trio.CancelScope() as scope:
                    scopes[:] = [scope]
                    server = HangingUpServer(env.network, m.MetadataRequest, handler)
                    async with trio.open_nursery() as nursery:
                        await nursery.start(server.serve, address)
                        ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(60)

    def cut() -> None:
        ready.clear()
        trio.from_thread.run_sync(scopes[0].cancel, trio_token=token[0])
        assert ready.wait(60)  # it listens again

    try:
        yield BlockingStage(env, address, rig, handler, cut)
    finally:
        trio.from_thread.run_sync(token[1].cancel, trio_token=token[0])
        thread.join()
