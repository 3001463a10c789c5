"""A mount whose namespace lives in its own process, to see what the mount itself costs:

    python -m kvfs_tools.mount_memory MOUNTPOINT ADDRESS

The mount is the one of ``kvfs mount``, up to its calls of the metadata service. The service is the
one of ``kvfs serve metadata``, on the engine in memory: calls of the mount are calls of its core,
chunk servers reach it at ADDRESS. Nobody else may change anything: all is leased to the mount.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from types import TracebackType
from typing import Any

import trio

from kvfs.cli.process import run_trio
from kvfs.mount.config import MountConfig
from kvfs.mount.main import run_mount
from kvfs.mount.names import Names
from kvfs_base.errors import KvfsError
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Done, Later, Request
from kvfs_base.types import Address
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.messages import Attach, Revoked
from kvfs_metadata.service import MetadataService
from kvfs_metadata.turns import update

CONNECTION = 1 << 32
"""Of the mount. Those of chunk servers are counted from 1."""


class Calls:
    """As a MetadataClient, as far as the mount uses it."""

    descriptor = -1

    def __init__(self, service: MetadataService, session: bytes) -> None:
        self._service = service
        self._core = service.core
        self._session = session
        self._queue: list[tuple[Request, Done]] = []

    async def __aenter__(self) -> Calls:
        await self.call(Attach(self._session, (), 1, "in this process"))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._core.disconnected(CONNECTION)

    def watch(self, names: Names) -> None:
        names.began()
        names.revoked(Revoked(1), math.inf)

    async def call(self, request: Request) -> Any:
        (answer,) = await self._service.handle(CONNECTION, [request])
        if isinstance(answer, Later):
            answer = await answer.wait()
        if isinstance(answer, KvfsError):
            raise answer
        return answer

    def ask_soon(self, request: Request, done: Done) -> int:
        return self.call_soon(request, done)

    def give_up(self, number: int) -> None:
        raise AssertionError("what is asked here is answered in the same turn")

    def receive_now(self) -> bool:
        raise AssertionError("nothing is waited for")

    def call_soon(self, request: Request, done: Done) -> bool:
        self._queue.append((request, done))
        return True

    def send_soon(self) -> None:
        queue, self._queue = self._queue, []
        for request, done in queue:
            if self._core.only_reads([request]):
                answer = self._core.answer([request], CONNECTION)[0]
            else:
                operation = self._core.operation(CONNECTION, request)
                answer = update(self._core, [operation], CONNECTION)[0][0]
            failed = isinstance(answer, KvfsError)
            done(*(None, answer) if failed else (answer, None))


async def serve(
    mountpoint: str,
    address: Address,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    env = os_env()
    metadata = MetadataConfig(directory="", unix=address)
    service = MetadataService(env, metadata, MemoryEngine())
    config = MountConfig(mountpoint, (address,), frontend="direct")
    async with trio.open_nursery() as nursery:
        await nursery.start(service.serve)
        await run_mount(
            env,
            config,
            connect=lambda session, _: Calls(service, session),
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()


def main() -> None:
    run_trio("mount", partial(serve, sys.argv[1], Address.parse(sys.argv[2])))


if __name__ == "__main__":
    main()
