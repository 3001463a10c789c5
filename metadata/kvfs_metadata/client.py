"""Clients of the metadata service that outlive its restarts.

A request is repeated after a lost connection if doing it twice is as good as once; every other one
only if it was never sent, because its first copy may have been carried out. Either kind waits up to
``retry_seconds`` for a service that does not answer the door.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from kvfs_base.cluster import ClusterMap, GetClusterMap, Heartbeat
from kvfs_base.errors import ConnectionLost, DeadlineExceeded, KvfsError
from kvfs_base.limits import CALL_SECONDS, RETRY_SECONDS, SESSION_GRACE_SECONDS
from kvfs_base.rpc import BlockingRpcClient, Request, RpcClient
from kvfs_base.seams import BlockingNetwork, Connection, Env, Listener, Network
from kvfs_base.types import ROOT_INODE, Address
from kvfs_metadata import messages as m

REPEATABLE: frozenset[type[Request]] = frozenset(
    {
        m.Attach,
        m.OpenInode,  # Attach has just said how often each file is open
        m.CloseInode,
        m.Lookup,
        m.Resolve,
        m.GetAttr,
        m.ReadDir,
        m.ReadLink,
        m.GetXattr,
        m.ListXattr,
        m.StatFs,
        m.Sync,
        m.OpenNamespace,
        m.MatchBlocks,
        m.LookupBlocks,
        m.PrepareBlocks,  # the first batch expires
        m.CommitBlocks,
        m.AbortBlocks,
        m.RemoveBlocks,
        m.Statistics,
        Heartbeat,
        GetClusterMap,
    }
)
"""Requests that may be carried out twice."""

RETRY_DELAY_SECONDS = 0.02
RETRY_DELAY_SECONDS_MAX = 0.5


@dataclasses.dataclass(eq=False)
class _NeverSent(ConnectionLost):
    """The connection could not be made, so the request is certainly not carried out."""


class _DiallingNetwork:
    """A Network whose failures to connect can be told from connections lost later."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def connect(self, address: Address) -> trio.abc.Stream:
        try:
            return await self._network.connect(address)
        except ConnectionLost as exc:
            raise _NeverSent(address=exc.address, detail=exc.detail) from exc

    async def serve(
        self,
        address: Address,
        handler: Callable[[trio.abc.Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        await self._network.serve(address, handler, task_status=task_status)


class _DiallingBlockingNetwork:
    """The same for threads."""

    def __init__(self, network: BlockingNetwork) -> None:
        self._network = network

    def connect(self, address: Address, timeout: float) -> Connection:
        try:
            return self._network.connect(address, timeout)
        except (ConnectionLost, DeadlineExceeded) as exc:
            raise _NeverSent(address=str(address), detail=str(exc)) from exc

    def listen(self, address: Address) -> Listener:
        return self._network.listen(address)


class _Patience:
    """How long to wait before each further attempt, until ``seconds`` are used up."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._delay = RETRY_DELAY_SECONDS

    def next_delay(self) -> float | None:
        """None when it is over."""
        if self._left <= 0:
            return None
        delay = min(self._delay, self._left)
        self._left -= delay
        self._delay = min(2 * self._delay, RETRY_DELAY_SECONDS_MAX)
        return delay


class MetadataClient:
    """Calls from trio tasks, pipelined over one connection.

    With ``session`` (16 bytes, made by the caller) the client speaks for a session that has files
    open: it counts OpenInode and CloseInode, and tells the service after each reconnect.
    """

    def __init__(
        self,
        env: Env,
        address: Address,
        *,
        session: bytes | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._session = session
        self._retry_seconds = retry_seconds
        self._open: Counter[int] = Counter()
        self._rpc = RpcClient(
            _DiallingNetwork(env.network),
            address,
            on_connect=self._attach if session is not None else None,
        )

    async def __aenter__(self) -> MetadataClient:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._rpc)
            if self._session is not None:
                nursery = await stack.enter_async_context(trio.open_nursery())
                stack.callback(nursery.cancel_scope.cancel)
                nursery.start_soon(self._stay_attached)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.__aexit__(*exc_info)

    async def _stay_attached(self) -> None:
        """Somebody who only reads an open file makes no calls: without this a service that was
        restarted would never hear of the file, and collect it after the grace period."""
        while True:
            await trio.sleep(SESSION_GRACE_SECONDS / 6)
            if self._open:
                with contextlib.suppress(KvfsError):  # there will be another time
                    await self._rpc.call(m.GetAttr(ROOT_INODE), SESSION_GRACE_SECONDS / 6)

    async def _attach(self, rpc: RpcClient) -> None:
        # RpcClient calls this before any other frame of the new connection is queued, so what was
        # answered on the old one is in ``_open`` and everything else is sent after it.
        assert self._session is not None
        await rpc.call(m.Attach(self._session, tuple(self._open.elements())))

    async def call(self, request: Request, timeout: float = CALL_SECONDS) -> Any:
        """The reply. Raises what the service raised, ConnectionLost, DeadlineExceeded (which is
        not repeated: the time is up)."""
        if isinstance(request, m.CloseInode):
            return await self._close(request, timeout)
        reply = await self._call_patiently(request, timeout)
        opens = isinstance(request, m.OpenInode) or (isinstance(request, m.Make) and request.open)
        if opens and self._session is not None:
            # Nothing waits between the arrival of the reply and this line, so an Attach on a new
            # connection finds it counted.
            self._open[reply.inode] += 1
        return reply

    async def _close(self, request: m.CloseInode, timeout: float) -> Any:
        try:
            # Counted as open until it is answered: if the connection is lost, Attach declares it
            # open and the repeated request closes it, whether or not the first one had.
            return await self._call_patiently(request, timeout)
        finally:
            self._open[request.inode] -= 1
            if self._open[request.inode] <= 0:
                del self._open[request.inode]

    async def _call_patiently(self, request: Request, timeout: float) -> Any:
        patience = _Patience(self._retry_seconds)
        while True:
            try:
                return await self._rpc.call(request, timeout)
            except ConnectionLost as exc:
                if not _may_repeat(exc, [request]):
                    raise
                delay = patience.next_delay()
                if delay is None:
                    raise
            await trio.sleep(delay)


class BlockingMetadataClient:
    """Calls from one thread at a time."""

    def __init__(self, env: Env, address: Address, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._retry_seconds = retry_seconds
        self._closed = threading.Event()
        self._rpc = BlockingRpcClient(_DiallingBlockingNetwork(env.blocking_network), address)

    def call(self, request: Request, timeout: float = CALL_SECONDS) -> Any:
        """As MetadataClient.call."""
        return self.call_many([request], timeout)[0]

    def call_many(self, requests: Sequence[Request], timeout: float = CALL_SECONDS) -> list[Any]:
        """All replies, in order; raises the first error. The requests travel in one write. They
        are repeated after a lost connection only if every one of them may be."""
        patience = _Patience(self._retry_seconds)
        while True:
            try:
                return self._rpc.call_many(requests, timeout)
            except ConnectionLost as exc:
                if not _may_repeat(exc, requests):
                    raise
                delay = patience.next_delay()
                if delay is None or self._closed.wait(delay):
                    raise

    def close(self) -> None:
        self._closed.set()
        self._rpc.close()


def _may_repeat(exc: ConnectionLost, requests: Sequence[Request]) -> bool:
    return isinstance(exc, _NeverSent) or all(type(r) in REPEATABLE for r in requests)


class ClusterView:
    """The cluster map as last seen. Thread-safe."""

    def __init__(self, env: Env, address: Address, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._client = BlockingMetadataClient(env, address, retry_seconds=retry_seconds)
        self._lock = threading.Lock()
        self._map: ClusterMap | None = None
        self._fetched = 0

    def current(self) -> ClusterMap:
        """The last map, fetched only if there is none."""
        found = self._map
        return self.refresh() if found is None else found

    def refresh(self) -> ClusterMap:
        """A map that the service sent after this was called. Threads that ask while one fetch is
        on its way share the next one."""
        begun = self._fetched
        with self._lock:
            # Two fetches later than ``begun`` at least one began after this call.
            if self._map is None or self._fetched < begun + 2:
                found: ClusterMap = self._client.call(GetClusterMap())
                self._map = found
                self._fetched += 1
            return self._map

    def close(self) -> None:
        self._client.close()


__all__ = [
    "REPEATABLE",
    "BlockingMetadataClient",
    "ClusterView",
    "MetadataClient",
]
