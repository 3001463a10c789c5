"""The Python API for trio. The same names and errors as kvfs.client:

    async with await kvfs.aio.connect(target) as client:
        ns = await client.namespace("tenant/model", layout=layout, create=True)
        await ns.put(keys, buffers)
        async with await ns.get(keys) as blocks:
            ...

Each call runs in a worker thread, at most eight of one client at a time; a hop costs about 0.2 ms,
so batches matter more than ever. A call that was started is carried to its end: cancellation is
noticed after it, and blocks that nobody received are released.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import trio

from kvfs import client as sync
from kvfs.client import Blocks
from kvfs_base.limits import CLIENT_CONNECTIONS_MAX
from kvfs_base.seams import Env
from kvfs_base.types import KVLayout

T = TypeVar("T")


async def connect(
    target: str | os.PathLike[str] | None = None, *, env: Env | None = None
) -> Client:
    """As kvfs.connect."""
    limiter = trio.CapacityLimiter(CLIENT_CONNECTIONS_MAX)
    call = functools.partial(sync.connect, target, env=env)
    return Client(await trio.to_thread.run_sync(call, limiter=limiter), limiter)


class Client:
    """As kvfs.Client."""

    def __init__(self, client: sync.Client, limiter: trio.CapacityLimiter) -> None:
        self._sync = client
        self._limiter = limiter

    async def namespace(
        self,
        name: str,
        layout: KVLayout | None = None,
        *,
        create: bool = False,
        copies: int = 0,
    ) -> Namespace:
        """As kvfs.Client.namespace."""
        opened = await self._run(self._sync.namespace, name, layout, create=create, copies=copies)
        return Namespace(self, opened)

    async def statistics(self) -> dict[str, int]:
        """As kvfs.Client.statistics."""
        return await self._run(self._sync.statistics)

    def close(self) -> None:
        """As kvfs.Client.close; does not wait for anything."""
        self._sync.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def _run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await trio.to_thread.run_sync(call, limiter=self._limiter)


class Namespace:
    """As kvfs.Namespace. Made by Client.namespace."""

    def __init__(self, client: Client, namespace: sync.Namespace) -> None:
        self.name = namespace.name
        self.layout = namespace.layout
        self._client = client
        self._sync = namespace

    async def match(self, keys: Sequence[bytes]) -> int:
        """As kvfs.Namespace.match."""
        return await self._client._run(self._sync.match, keys)

    async def resident(self, keys: Sequence[bytes]) -> int:
        """As kvfs.Namespace.resident."""
        return await self._client._run(self._sync.resident, keys)

    async def get(self, keys: Sequence[bytes]) -> Blocks:
        """As kvfs.Namespace.get; releasing the blocks waits for nothing."""
        return await self._client._run(self._sync.get, keys)

    async def get_into(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> list[bool]:
        """As kvfs.Namespace.get_into."""
        return await self._client._run(self._sync.get_into, keys, buffers)

    async def put(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        """As kvfs.Namespace.put."""
        return await self._client._run(self._sync.put, keys, buffers)

    async def remove(self, keys: Sequence[bytes]) -> int:
        """As kvfs.Namespace.remove."""
        return await self._client._run(self._sync.remove, keys)

    async def keys(self) -> AsyncIterator[bytes]:
        """As kvfs.Namespace.keys."""
        after = b""
        more = True
        while more:
            page, more = await self._client._run(self._sync.keys_page, after)
            for key in page:
                yield key
            after = page[-1] if page else after


__all__ = ["Blocks", "Client", "Namespace", "connect"]
