"""Clients of the metadata service that outlive its restarts, and the end of one of many servers.

A request is repeated after a lost connection, and when a server had lost its store, of the next
server if there are several, for up to ``retry_seconds``. If doing it twice is as good as once it is
sent as it is; every other one as ``Once``, under a number of this client, so that the service
recognises the repetition and gives the first answer again.

One request does two things: ``Make`` with ``open`` makes a file, which is recorded, and counts an
open, which belongs to the session as it is on one connection. When its answer is lost, the greeting
of the next connection (``Attach``) declares what was answered, so not this file: the count of the
lost connection ends there, though the service keeps what was released for another grace period.
The repetition then gets the recorded answer, and the service counts the open again with it. So a
session has one count for each answer that its client got, whatever was carried out when.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import trio

from kvfs_base import threads
from kvfs_base.cluster import (
    ClusterMap,
    EndMoves,
    FindUnwanted,
    GetClusterMap,
    Heartbeat,
    TakeMoves,
)
from kvfs_base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    NotSupported,
    StoreUnavailable,
)
from kvfs_base.limits import CALL_SECONDS, CONNECT_SECONDS
from kvfs_base.rpc import BlockingRpcClient, Done, Request, RpcClient
from kvfs_base.seams import Env
from kvfs_base.types import ROOT_INODE, Address
from kvfs_metadata import messages as m
from kvfs_metadata.check import fixes
from kvfs_metadata.cluster.admin_messages import CountChunks, DescribeCluster, FindOpenFiles
from kvfs_metadata.limits import (
    ONCE_SLOTS,
    RETRY_SECONDS,
    SESSION_GRACE_SECONDS,
    WATCH_MARGIN_SECONDS,
    WATCH_SECONDS,
)

REPEATABLE: frozenset[type[Request]] = frozenset(
    {
        m.Attach,
        m.Watch,
        m.OpenInode,  # Attach has just said how often each file is open
        m.CloseInode,
        m.BeginCut,
        m.WidenChunks,
        m.EndCut,  # late copies come over connections that the session has left
        m.SetLock,  # the same
        m.Unlock,
        m.GetLock,
        m.AwaitLock,
        m.StopAwaiting,
        m.Lookup,
        m.Resolve,
        m.GetAttr,
        m.ReadDir,
        m.ReadLink,
        m.GetXattr,
        m.GetQuota,
        m.ListXattr,
        m.StatFs,
        m.Sync,
        m.OpenNamespace,
        m.MatchBlocks,
        m.LookupBlocks,
        m.UseBlocks,  # a use more
        m.CommitBlocks,  # a batch is committed once, and remembered
        m.AbortBlocks,
        m.Statistics,
        fixes.ScanRecords,
        fixes.RepairRecords,  # each fix looks again: the second time nothing is called for
        Heartbeat,
        GetClusterMap,
        FindUnwanted,
        TakeMoves,
        EndMoves,  # a move ends once: the second time it is not known any more
        DescribeCluster,
        CountChunks,
        FindOpenFiles,
    }
)
"""Requests that may be carried out twice. All others travel as Once."""

CLIENT_BYTES = 16


class Watcher(Protocol):
    """Who answers by himself for what the service leases him (docs/design/0007). Nothing here
    waits; all is called in the order in which the connection brought it."""

    def began(self) -> None:
        """What is sent from now on is asked by a watcher."""

    def revoked(self, revoked: m.Revoked, until: float) -> None:
        """Drops it. What is left may be used ``until`` then (monotonic seconds)."""

    def lost(self) -> None:
        """Nothing may be used any more."""


RETRY_DELAY_SECONDS = 0.02
RETRY_DELAY_SECONDS_MAX = 0.5
LATE_CALLS_SECONDS = 1.0
"""Between two looks for calls of which no task knows that they are late."""


class _Soon:
    """A call for which no task waits."""

    __slots__ = ("done", "number", "request", "sent", "slot", "until")

    def __init__(
        self, request: Request, sent: Request, slot: int, done: Done, until: float
    ) -> None:
        self.request = request
        self.sent = sent
        """The same with its number, if it has one: for the repetition."""
        self.slot = slot
        self.done = done
        self.until = until
        self.number = 0
        """Of RpcClient."""


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


class _Numbers:
    """What makes the requests of one client known when they come again."""

    def __init__(self, client: bytes) -> None:
        self._client = client
        self._last = [0] * ONCE_SLOTS

    def next(self, slot: int, request: Any) -> m.Once:
        """The caller has ``slot`` to itself until the request is done with."""
        self._last[slot] += 1
        return m.Once(self._client, slot, self._last[slot], request)


def _again(request: Request) -> Request:
    """``request`` as it is sent after the first time."""
    if isinstance(request, m.Once) and not request.again:
        return msgspec.structs.replace(request, again=True)
    return request


class MetadataClient:
    """Calls from trio tasks, pipelined over one connection. ``address`` may be several, of servers
    that share a store: the client begins with the first.

    With ``session`` (16 bytes, made by the caller) the client speaks for a session that has files
    open: it counts OpenInode and CloseInode, and tells the service after each reconnect. ``name``
    says to people who it is.
    """

    def __init__(
        self,
        env: Env,
        address: Address | Sequence[Address],
        *,
        session: bytes | None = None,
        name: str = "",
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._clock = env.clock
        self._session = session
        self._name = name
        self._watcher: Watcher | None = None
        self._watching = False
        self._watch_ended = trio.Event()
        self._retry_seconds = retry_seconds
        self._open: Counter[int] = Counter()
        self._written: set[int] = set()
        """Those that the session may write to."""
        self._connections = 0
        self._numbers = _Numbers(env.rng.randbytes(CLIENT_BYTES))
        # The slot given back last is used next: few in use are few answers kept by the service.
        self._slots = list(reversed(range(ONCE_SLOTS)))
        self._slots_free = trio.Semaphore(ONCE_SLOTS)
        self._soon: dict[int, _Soon] = {}
        """By number, calls for which no task waits, the oldest first."""
        self._closing = False
        self._rpc = RpcClient(
            env.network, address, on_connect=self._attach if session is not None else None
        )

    async def __aenter__(self) -> MetadataClient:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._rpc)
            if self._session is not None:
                self._nursery = await stack.enter_async_context(trio.open_nursery())
                stack.callback(self._nursery.cancel_scope.cancel)
                self._nursery.start_soon(self._stay_attached)
                self._nursery.start_soon(self._keep_watch)
                self._nursery.start_soon(self._end_late_calls)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._closing = True
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
        self._connections += 1
        self._begin_watch()
        opens = tuple(self._open.elements())
        written = tuple(self._written)
        await rpc.call(m.Attach(self._session, opens, self._connections, self._name, written))

    # --- watching

    def watch(self, watcher: Watcher) -> None:
        """Keeps a watch for him from now on, where the service gives leases. Needs a session."""
        self._watcher = watcher
        self._begin_watch()

    def _begin_watch(self) -> None:
        if self._watcher is not None:
            self._watcher.began()
            self._watching = self._watch(0)

    def _watch(self, seen: int) -> bool:
        assert self._session is not None
        done = functools.partial(self._watched, self._clock.monotonic())
        asked = self._rpc.call_soon(m.Watch(self._session, seen), done) != 0
        self._rpc.send_soon()
        return asked

    def _watched(self, sent_at: float, revoked: Any, error: KvfsError | None) -> None:
        assert self._watcher is not None
        if error is not None:
            self._watching = False
            self._watcher.lost()
            if isinstance(error, NotSupported):
                self._watcher = None
            self._watch_ended.set()
            return
        until = sent_at + WATCH_SECONDS - WATCH_MARGIN_SECONDS
        self._watcher.revoked(revoked, until)
        # The service hears in this very turn that it has been dropped.
        self._watching = self._watch(revoked.number)

    async def _keep_watch(self) -> None:
        """A service that has started again waits for those who watched: they come back at once."""
        while True:
            await self._watch_ended.wait()
            self._watch_ended = trio.Event()
            while self._watcher is not None and not self._watching:
                with contextlib.suppress(KvfsError):
                    await self._rpc.call(m.GetAttr(ROOT_INODE), CONNECT_SECONDS)
                    if not self._watching:  # the connection is there, and no greeting was needed
                        self._begin_watch()
                await trio.sleep(RETRY_DELAY_SECONDS_MAX)

    # --- calls

    async def call(self, request: Request, timeout: float = CALL_SECONDS) -> Any:
        """The reply. Raises what the service raised, and when it could not be reached for too long
        ConnectionLost, StoreUnavailable or DeadlineExceeded (which is not repeated: the time is
        up). After these three it is unknown whether the request was carried out."""
        if isinstance(request, m.CloseInode):
            return await self._close(request, timeout)
        if type(request) in REPEATABLE:
            reply = await self._call_patiently(request, timeout)
        else:
            reply = await self._call_once(request, timeout)
        self._answered(request, reply)
        return reply

    def _answered(self, request: Request, reply: Any) -> None:
        """Nothing waits between the arrival of a reply and this, so an Attach on a new connection
        finds counted what was opened."""
        makes = isinstance(request, m.Make) and request.open
        if (makes or isinstance(request, m.OpenInode)) and self._session is not None:
            self._open[reply.inode] += 1
            if makes or request.writes:  # type: ignore[attr-defined]
                self._written.add(reply.inode)

    def ask_soon(self, request: Request, done: Done) -> int:
        """One attempt at a request of REPEATABLE that opens and closes nothing: see
        RpcClient.call_soon. After an error that is temporary, ``call`` goes on."""
        return self._rpc.call_soon(request, done)

    def give_up(self, number: int) -> None:
        """Of what was asked."""
        self._rpc.give_up(number)

    def call_soon(self, request: Request, done: Done) -> bool:
        """As ``call`` of anything but CloseInode, without a task unless something goes wrong:
        ``done`` is told what ``call`` would return or raise, and that in any case. False, and
        nothing was done, if there is no connection, or too much is under way. Needs a session."""
        slot = -1
        sent = request
        if type(request) not in REPEATABLE:
            try:
                self._slots_free.acquire_nowait()
            except trio.WouldBlock:
                return False
            slot = self._slots.pop()
            sent = self._numbers.next(slot, request)
        call = _Soon(request, sent, slot, done, trio.current_time() + CALL_SECONDS)
        call.number = self._rpc.call_soon(sent, functools.partial(self._told, call))
        if call.number:
            self._soon[call.number] = call
        else:
            self._give_slot_back(slot)
        return call.number != 0

    def send_soon(self) -> None:
        """What ``ask_soon`` and ``call_soon`` left behind leaves now, in one write."""
        self._rpc.send_soon()

    @property
    def descriptor(self) -> int:
        """See ``receive_now``; -1 if nothing can be waited for but by the event loop."""
        return self._rpc.descriptor

    def receive_now(self) -> bool:
        """For who has waited until ``descriptor`` is readable: tells what has been answered. False
        if the event loop has to go on."""
        return self._rpc.receive_now()

    def _told(self, call: _Soon, reply: Any, error: KvfsError | None) -> None:
        del self._soon[call.number]
        if isinstance(error, StoreUnavailable):
            # What the server did last is unknown: the greeting comes first again.
            self._rpc.leave("store unavailable")
        if isinstance(error, ConnectionLost | StoreUnavailable) and not self._closing:
            self._nursery.start_soon(self._go_on, call)
        else:
            self._finish(call, reply, error)

    async def _go_on(self, call: _Soon) -> None:
        """The attempt failed that was made without a task."""
        try:
            await trio.sleep(RETRY_DELAY_SECONDS)
            reply = await self._call_patiently(_again(call.sent), CALL_SECONDS)
        except KvfsError as exc:
            self._finish(call, None, exc)
        else:
            self._finish(call, reply, None)

    def _finish(self, call: _Soon, reply: Any, error: KvfsError | None) -> None:
        self._give_slot_back(call.slot)
        if error is None:
            self._answered(call.request, reply)
        call.done(reply, error)

    def _give_slot_back(self, slot: int) -> None:
        if slot >= 0:
            self._slots.append(slot)
            self._slots_free.release()

    async def _end_late_calls(self) -> None:
        """Nobody waits for those that were made without a task."""
        while True:
            await trio.sleep(LATE_CALLS_SECONDS)
            now = trio.current_time()
            late = [call for call in self._soon.values() if call.until <= now]
            for call in late:
                self._rpc.give_up(call.number)
                del self._soon[call.number]
            if late:
                self._rpc.leave("no answer")
            for call in late:
                operation = type(call.request).__name__
                error = DeadlineExceeded(operation=operation, seconds=CALL_SECONDS)
                self._finish(call, None, error)

    async def _close(self, request: m.CloseInode, timeout: float) -> Any:
        try:
            # Counted as open until it is answered: if the connection is lost, Attach declares it
            # open and the repeated request closes it, whether or not the first one had.
            return await self._call_patiently(request, timeout)
        finally:
            for inode in (request.inode, *request.others):
                self._open[inode] -= 1
                if self._open[inode] <= 0:
                    del self._open[inode]
                    self._written.discard(inode)

    async def _call_once(self, request: Request, timeout: float) -> Any:
        async with self._slots_free:
            slot = self._slots.pop()
            try:
                return await self._call_patiently(self._numbers.next(slot, request), timeout)
            finally:
                self._slots.append(slot)

    async def _call_patiently(self, request: Request, timeout: float) -> Any:
        patience = _Patience(self._retry_seconds)
        while True:
            try:
                return await self._rpc.call(request, timeout)
            except DeadlineExceeded:
                if self._watcher is not None:
                    # Should it be carried out yet, then for somebody who does not watch.
                    self._rpc.leave("no answer")
                raise
            except (ConnectionLost, StoreUnavailable):
                delay = patience.next_delay()
                if delay is None:
                    raise
            request = _again(request)
            await trio.sleep(delay)


class BlockingMetadataClient:
    """Calls from one thread at a time. ``address`` as for MetadataClient."""

    def __init__(
        self,
        env: Env,
        address: Address | Sequence[Address],
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._retry_seconds = retry_seconds
        self._closed = threads.event()
        self._numbers = _Numbers(env.rng.randbytes(CLIENT_BYTES))
        self._rpc = BlockingRpcClient(env.blocking_network, address)

    def call(self, request: Request, timeout: float = CALL_SECONDS) -> Any:
        """As MetadataClient.call."""
        return self.call_many([request], timeout)[0]

    def call_many(self, requests: Sequence[Request], timeout: float = CALL_SECONDS) -> list[Any]:
        """All replies, in order; raises the first error. The requests travel in one write, or, if
        they need more slots than there are, in several one after the other."""
        replies: list[Any] = []
        for numbered in self._numbered(requests):
            replies += self._call_patiently(numbered, timeout)
        return replies

    def _numbered(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """``requests`` as they are sent. Each list has the slots to itself."""
        part: list[Request] = []
        slot = 0
        for request in requests:
            if type(request) in REPEATABLE:
                part.append(request)
                continue
            if slot == ONCE_SLOTS:
                yield part
                part, slot = [], 0
            part.append(self._numbers.next(slot, request))
            slot += 1
        yield part

    def _call_patiently(self, requests: list[Request], timeout: float) -> list[Any]:
        patience = _Patience(self._retry_seconds)
        while True:
            try:
                return self._rpc.call_many(requests, timeout)
            except (ConnectionLost, StoreUnavailable):
                delay = patience.next_delay()
                if delay is None or self._closed.wait(delay):
                    raise
            requests = [_again(request) for request in requests]

    def close(self) -> None:
        self._closed.set()
        self._rpc.close()


class ClusterView:
    """The cluster map as last seen. Thread-safe."""

    def __init__(
        self,
        env: Env,
        address: Address | Sequence[Address],
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._client = BlockingMetadataClient(env, address, retry_seconds=retry_seconds)
        self._lock = threads.lock()
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
    "Watcher",
]
