"""A chunk server's way to the other members of its chains.

Errors of the way itself are ``Unreached``, which is no KvfsError: what a peer answers may be any of
those, and the two mean different things to whoever passes something on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kvfs_base import threads
from kvfs_base.cluster import Target
from kvfs_base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    NoTarget,
    ProtocolError,
    ServerBusy,
)
from kvfs_base.limits import SUSPECTS_MAX
from kvfs_base.rpc import Request
from kvfs_base.seams import Buffer, Clock, Env
from kvfs_base.types import Address
from kvfs_datapath.chains.views import Views
from kvfs_datapath.connections import ConnectionPool, DataConnection
from kvfs_datapath.limits import (
    PASS_CONNECTIONS,
    PASS_SECONDS,
    SUSPECT_SECONDS,
)

_Result = TypeVar("_Result")


class Unreached(Exception):
    """The peer did not answer: whether it did what it was asked is unknown."""

    def __init__(self, target_id: int, error: KvfsError) -> None:
        super().__init__(f"target {target_id}: {error}")
        self.target_id = target_id
        self.error = error


class Reach:
    """Who cannot be reached, and since when. Time is what the caller says."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._lock = threads.lock()
        self.wake: Callable[[], None] = lambda: None
        """Somebody is to ask those that are doubtful: one lost connection must not be held against
        a member that nothing else is sent to."""

    def failed(self, target_id: int, now: float) -> None:
        with self._lock:
            is_new = target_id not in self._since
            self._since.setdefault(target_id, now)
        if is_new:
            self.wake()

    def answered(self, target_id: int) -> None:
        with self._lock:
            self._since.pop(target_id, None)

    def keep(self, targets: set[int]) -> None:
        """Nothing is passed to others any more: what was held against them is forgotten."""
        with self._lock:
            for target_id in self._since.keys() - targets:
                del self._since[target_id]

    def doubtful(self) -> list[int]:
        """Targets that failed last."""
        with self._lock:
            return sorted(self._since)

    def suspects(self, now: float) -> tuple[int, ...]:
        """Those that have failed for SUSPECT_SECONDS."""
        with self._lock:
            found = [t for t, since in self._since.items() if now - since >= SUSPECT_SECONDS]
        return tuple(sorted(found)[:SUSPECTS_MAX])


class Peers:
    """Connections to other servers; may be used from any number of threads."""

    def __init__(self, env: Env, views: Views) -> None:
        self._clock: Clock = env.clock
        self._host_id = env.host_id
        self._views = views
        self._pool = ConnectionPool(env.blocking_network, env.clock)
        self._slots: dict[tuple[Address, int], threads.Semaphore] = {}
        self._lock = threads.lock()
        self.reach = Reach()

    def call(
        self,
        target_id: int,
        request: Request,
        payload: Sequence[Buffer] = (),
        *,
        hops: int = 0,
        into: Callable[[Any], Sequence[memoryview]] | None = None,
        seconds: float = PASS_SECONDS,
    ) -> Any:
        """The reply; ``hops`` members get it after this one, and each has ``seconds``. Raises
        Unreached, and what the peer raised. NoTarget and ServerBusy may also mean that nobody was
        asked."""
        with self.connection(target_id, hops) as connection:
            connection.set_timeout(seconds * (hops + 1))
            return self.watch(
                target_id, connection, lambda: connection.call(request, payload, into)
            )

    @contextlib.contextmanager
    def connection(self, target_id: int, hops: int) -> Iterator[DataConnection]:
        """One to a target, for a request that goes on to ``hops`` others. Raises Unreached,
        NoTarget, ServerBusy."""
        address = self._address(self._views.target(target_id))
        with self._lock:
            slots = self._slots.setdefault((address, hops), threads.semaphore(PASS_CONNECTIONS))
        if not slots.acquire(timeout=PASS_SECONDS):
            raise ServerBusy(detail=f"too many requests to target {target_id}")
        try:
            with contextlib.ExitStack() as stack:
                try:
                    connection = stack.enter_context(self._pool.lend(address))
                    connection.set_timeout(PASS_SECONDS * (hops + 1))
                except (ConnectionLost, DeadlineExceeded) as exc:
                    self.reach.failed(target_id, self._clock.monotonic())
                    raise Unreached(target_id, exc) from exc
                yield connection
        finally:
            slots.release()

    def watch(
        self, target_id: int, connection: DataConnection, action: Callable[[], _Result]
    ) -> _Result:
        """Does ``action`` on a connection to the target, and tells what the peer answers from
        having no answer: then the connection is left in the middle of something."""
        try:
            return action()
        except (ConnectionLost, DeadlineExceeded, ProtocolError) as exc:
            if not connection.broken:
                raise
            self.reach.failed(target_id, self._clock.monotonic())
            raise Unreached(target_id, exc) from exc
        finally:
            if not connection.broken:
                self.reach.answered(target_id)

    def _address(self, target: Target) -> Address:
        if target.unix is not None and target.host_id == self._host_id:
            return target.unix
        if target.tcp is not None:
            return target.tcp
        raise NoTarget(detail=f"target {target.target_id} has no address that can be reached")

    def close(self) -> None:
        """Breaks off what is under way."""
        self._pool.close()


class Relay:
    """A request to a peer whose payload is passed on while it comes in. Nothing that happens on
    the way there stops the payload from being received: ``finish`` says what did."""

    def __init__(
        self,
        peers: Peers,
        target_id: int,
        request: Request,
        payload_bytes: int,
        hops: int,
        *,
        seconds: float | None = None,
    ) -> None:
        """``seconds``: less than what the hops would get."""
        self._peers = peers
        self._target_id = target_id
        self._request = request
        self._stack = contextlib.ExitStack()
        self._connection: DataConnection | None = None
        self._failure: Unreached | KvfsError | None = None
        try:
            connection = self._stack.enter_context(peers.connection(target_id, hops))
            self._connection = connection
            if seconds is not None:
                connection.set_timeout(min(seconds, PASS_SECONDS * (hops + 1)))
            self._try(lambda: connection.begin(request, payload_bytes))
        except (Unreached, KvfsError) as exc:
            self._failure = exc

    def _try(self, action: Callable[[], _Result]) -> _Result | None:
        if self._connection is None or self._failure is not None:
            return None
        try:
            return self._peers.watch(self._target_id, self._connection, action)
        except (Unreached, KvfsError) as exc:
            self._failure = exc
            return None

    def send(self, piece: Buffer) -> None:
        connection = self._connection
        if connection is not None:
            self._try(lambda: connection.send(piece))

    def finish(self) -> Any:
        """The reply. Raises Unreached, and what the peer raised."""
        connection = self._connection
        reply = None
        if connection is not None:
            reply = self._try(lambda: connection.finish(self._request))
        if self._failure is not None:
            raise self._failure
        return reply

    def close(self) -> None:
        self._stack.close()
