"""The client's side of data connections: one conversation at a time each, pooled by address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kvfs_base import frames, threads
from kvfs_base.errors import ConnectionLost, InternalError, ProtocolError
from kvfs_base.frames import Kind
from kvfs_base.limits import CALL_SECONDS, CONNECT_SECONDS
from kvfs_base.rpc import Request
from kvfs_base.seams import BlockingNetwork, Buffer, Clock, Connection
from kvfs_base.types import Address
from kvfs_datapath.checksum import crc32c, crc32c_held, have_sums
from kvfs_datapath.limits import (
    CHAIN_CONNECT_SECONDS,
    CLIENT_IDLE_CONNECTIONS,
    DATA_BYTES_PER_SECOND,
    DATA_SECONDS,
    PASS_CONNECT_SECONDS,
    SMALL_SUM_BYTES,
    SUM_BYTES,
)
from kvfs_datapath.watchdog import Watchdog
from kvfs_datapath.wire import (
    close_all,
    decode_reply,
    receive_body,
    receive_header_and_descriptors,
    receive_reply_header,
    send_message,
)

_Result = TypeVar("_Result")


def seconds_for(size: int) -> float:
    """How long a request with ``size`` bytes of payload may take. Whole seconds: the timeout of a
    connection is seldom set."""
    return DATA_SECONDS + size // DATA_BYTES_PER_SECOND


class DataConnection:
    """Asks one question at a time. ``broken`` is set while an answer is outstanding: if the caller
    gives up then, the next answer on this connection would not be its own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._timeout = 0.0
        self._next_id = 1
        self.broken = False
        self.given_up = False
        self.ahead: Request | None = None
        """Was asked for while the answer before it came in; must be called for next."""

    def fileno(self) -> int:
        """Readable once the answer begins to arrive."""
        return self._connection.fileno()

    def set_timeout(self, seconds: float) -> None:
        """For each step of the calls that follow."""
        if seconds != self._timeout:
            self._connection.set_timeout(seconds)
            self._timeout = seconds

    def call(
        self,
        request: Request,
        payload: Sequence[Buffer] = (),
        into: Callable[[Any], Sequence[memoryview]] | None = None,
    ) -> Any:
        """The reply. ``into`` names, from the reply, the memory for the payload that follows it.
        Raises what the server raised, ConnectionLost, DeadlineExceeded, ProtocolError."""
        self._ask(request, payload)
        header = receive_reply_header(self._connection)
        reply = self._reply(header, request)
        views = [] if into is None else into(reply)
        self._expect_payload(header, views)
        if views:
            self._connection.receive_into(views)
        self.broken = False
        return reply

    def call_summed(
        self,
        request: Request,
        into: Callable[[Any], Sequence[memoryview]],
        ahead: Ahead | None = None,
        expected: Sequence[int] = (),
    ) -> tuple[Any, list[int]]:
        """As ``call``, and the CRC32C of what came into each view. It is computed piece by piece,
        as they come in: later they would have to be fetched from memory again. What is to be asked
        for next, if ``ahead`` knows of anything, is on its way before the last piece is here: the
        server always has something to send. ``expected``: sums of the views, if there are so many,
        which it is faster to find true than to find."""
        if self.ahead is None:
            self._ask(request, ())
        elif self.ahead is not request:
            raise InternalError(detail="something else was asked for ahead")
        self.ahead = None
        header = receive_reply_header(self._connection)
        reply = self._reply(header, request)
        views = into(reply)
        self._expect_payload(header, views)
        sums = [0] * len(views)
        groups, add = _summing(views, sums, expected if len(expected) == len(views) else ())
        before_last = len(groups) - 2
        following: Request | None = None

        def ask_ahead() -> None:
            nonlocal following
            following = None if ahead is None else ahead.following()
            if following is not None:
                self._ask(following, ())

        def after(number: int) -> None:
            if number == before_last:
                ask_ahead()
            add(number)

        if len(groups) == 1:
            ask_ahead()
        self._connection.receive_groups(groups, after)
        self.ahead = following
        self.broken = following is not None
        return reply, sums

    def _expect_payload(self, header: frames.FrameHeader, views: Sequence[memoryview]) -> None:
        if sum(map(len, views)) != header.payload_bytes:
            raise ProtocolError(detail=f"a payload of {header.payload_bytes} bytes")
        if header.payload_bytes:
            self.set_timeout(max(self._timeout, seconds_for(header.payload_bytes)))

    def call_for_descriptors(
        self, request: Request, expected: Callable[[Any], int]
    ) -> tuple[Any, list[int]]:
        """The reply and the descriptors that came with it, ``expected`` of them; the caller closes
        them."""
        self._ask(request, ())
        header, descriptors = receive_header_and_descriptors(self._connection)
        try:
            reply = self._reply(header, request)
            if header.payload_bytes or len(descriptors) != expected(reply):
                raise ProtocolError(detail=f"a reply with {len(descriptors)} descriptors")
        except BaseException:
            close_all(descriptors)
            raise
        self.broken = False
        return reply, descriptors

    def begin(self, request: Request, payload_bytes: int) -> None:
        """Asks, with a payload that follows piece by piece (``send``); ``finish`` is the reply."""
        self.broken = True
        self._next_id += 1
        send_message(
            self._connection, Kind.REQUEST, self._next_id, request, payload_bytes=payload_bytes
        )

    def send(self, piece: Buffer) -> None:
        self._connection.send([piece])

    def finish(self, request: Request) -> Any:
        header = receive_reply_header(self._connection)
        reply = self._reply(header, request)
        if header.payload_bytes:
            raise ProtocolError(detail=f"a payload of {header.payload_bytes} bytes")
        self.broken = False
        return reply

    def _ask(self, request: Request, payload: Sequence[Buffer]) -> None:
        self.broken = True
        self._next_id += 1
        send_message(self._connection, Kind.REQUEST, self._next_id, request, payload)

    def _reply(self, header: frames.FrameHeader, request: Request) -> Any:
        body = receive_body(self._connection, header)
        if header.request_id != self._next_id:
            raise ProtocolError(detail="an answer to another request")
        if header.kind is Kind.ERROR:
            self.broken = bool(header.payload_bytes)
        return decode_reply(header, body, request)

    def shutdown(self) -> None:
        self._connection.shutdown()

    def give_up(self) -> None:
        """Its server cannot be reached any more."""
        self.given_up = True
        self.shutdown()

    def close(self) -> None:
        self._connection.close()


_Groups = Sequence[Sequence[memoryview]]


def _summing(
    views: Sequence[memoryview], sums: list[int], expected: Sequence[int]
) -> tuple[_Groups, Callable[[int], None]]:
    """The views in groups of SUM_BYTES, and what adds a group that has come in to the ``sums``."""
    size = len(views[0]) if views else 0
    if 0 < 2 * size <= SUM_BYTES and all(len(view) == size for view in views):
        return _summing_equal(views, sums, expected, SUM_BYTES // size)
    groups, owners = _groups(views)

    def add(number: int) -> None:
        for index, piece in zip(owners[number], groups[number], strict=True):
            sum_up = crc32c_held if len(piece) <= SMALL_SUM_BYTES else crc32c
            sums[index] = sum_up(piece, sums[index])

    return groups, add


def _summing_equal(
    views: Sequence[memoryview], sums: list[int], expected: Sequence[int], count: int
) -> tuple[_Groups, Callable[[int], None]]:
    """Small chunks of one size are what most batches of small chunks have."""
    groups = [views[start : start + count] for start in range(0, len(views), count)]
    sum_up = crc32c_held if len(views[0]) <= SMALL_SUM_BYTES else crc32c

    def add(number: int) -> None:
        group, place = groups[number], slice(number * count, (number + 1) * count)
        if expected and have_sums(group, expected[place]):
            sums[place] = expected[place]
        else:
            sums[place] = map(sum_up, group)

    return groups, add


def _groups(views: Sequence[memoryview]) -> tuple[list[list[memoryview]], list[list[int]]]:
    """Pieces of the views in groups of SUM_BYTES, and the index of the view of each."""
    groups: list[list[memoryview]] = []
    owners: list[list[int]] = []
    room = 0
    for index, view in enumerate(views):
        rest = view
        while size := len(rest):
            if not room:
                groups.append([])
                owners.append([])
                room = SUM_BYTES
            owners[-1].append(index)
            if size <= room:
                groups[-1].append(rest)
                room -= size
                break
            groups[-1].append(rest[:room])
            rest = rest[room:]
            room = 0
    return groups, owners


class Ahead:
    """What one thread asks of one server, one after the other: each request is under way while the
    last bytes of the answer before it come in. Between two calls it keeps their connection."""

    def __init__(self, following: Callable[[], Request | None]) -> None:
        """``following`` chooses what will be called for next, for good; None: nothing."""
        self.following = following
        self.connection: DataConnection | None = None

    def take(self) -> DataConnection | None:
        connection, self.connection = self.connection, None
        return connection


class Attempt:
    """A try that another thread may break off: it then fails with ConnectionLost, at once where it
    waits for a server, and after the current call where it reads a disk."""

    def __init__(self) -> None:
        self._lock = threads.lock()
        self._connection: DataConnection | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def check(self) -> None:
        """Raises ConnectionLost once it was broken off."""
        if self._cancelled:
            raise ConnectionLost(detail="broken off")

    def begin(self, connection: DataConnection) -> None:
        """From now on the try waits for ``connection``. Raises as ``check``."""
        with self._lock:
            self.check()
            self._connection = connection

    def end(self) -> None:
        """The connection may be somebody else's from now on."""
        with self._lock:
            self._connection = None

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._connection is not None:
                self._connection.shutdown()


class ConnectionPool:
    """Connections by address, dialled when needed and kept for a while. Thread-safe."""

    def __init__(self, network: BlockingNetwork, clock: Clock) -> None:
        self._network = network
        self._watchdog = Watchdog(network, clock)
        self._lock = threads.lock()
        self._idle: dict[Address, list[DataConnection]] = {}
        self._busy: dict[DataConnection, None] = {}
        self._closed = False

    def run(
        self,
        address: Address,
        action: Callable[[DataConnection], _Result],
        *,
        seconds: float | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        attempt: Attempt | None = None,
        fresh: bool = False,
        watch: bool = False,
        ahead: Ahead | None = None,
    ) -> _Result:
        """Does ``action`` on a connection, each step of which may take ``seconds`` (CALL_SECONDS).
        If one that was kept turns out to be dead (the server was restarted), does it once more on a
        fresh one: every request of the data path may be repeated. ``attempt``: who may break it
        off. ``fresh``: on a connection that is dialled for this. ``watch``: for what may take
        long, so that one who cannot be reached any more is not waited for. ``ahead``: keeps the
        connection if ``action`` has asked for more on it, for the next call, or ``leave``."""
        connection = None if ahead is None else ahead.take()
        if connection is None and not fresh:
            connection = self._take(address)
        if connection is not None:
            try:
                with self._watching(address, connection, watch):
                    return self._use(
                        address, connection, action, seconds=seconds, attempt=attempt, ahead=ahead
                    )
            except ConnectionLost:
                if connection.given_up:
                    raise
                if attempt is not None:
                    attempt.check()
                self._drop_idle(address)
        if attempt is not None:
            connect_seconds = CHAIN_CONNECT_SECONDS  # dialling cannot be broken off
        dialled = DataConnection(self._network.connect(address, connect_seconds))
        with self._watching(address, dialled, watch):
            return self._use(
                address, dialled, action, seconds=seconds, attempt=attempt, ahead=ahead
            )

    def leave(self, ahead: Ahead) -> None:
        """What was asked for ahead, if anything, is not wanted any more."""
        connection = ahead.take()
        if connection is not None:
            with self._lock:
                self._busy.pop(connection, None)
            connection.close()

    @contextlib.contextmanager
    def lend(self, address: Address) -> Iterator[DataConnection]:
        """A connection for what must not be done twice: nothing is repeated, so whoever finds one
        that was kept dead fails with ConnectionLost. The next one is dialled."""
        connection = self._take(address)
        if connection is None:
            connection = DataConnection(self._network.connect(address, PASS_CONNECT_SECONDS))
        try:
            with self._in_use(address, connection), self._watching(address, connection):
                yield connection
        finally:
            if connection.broken:
                self._drop_idle(address)

    def _take(self, address: Address) -> DataConnection | None:
        with self._lock:
            idle = self._idle.get(address)
            return idle.pop() if idle else None

    def _use(
        self,
        address: Address,
        connection: DataConnection,
        action: Callable[[DataConnection], _Result],
        *,
        seconds: float | None,
        attempt: Attempt | None,
        ahead: Ahead | None,
    ) -> _Result:
        with self._in_use(address, connection, ahead):
            connection.set_timeout(CALL_SECONDS if seconds is None else seconds)
            if attempt is None:
                return action(connection)
            attempt.begin(connection)
            try:
                return action(connection)
            finally:
                attempt.end()

    @contextlib.contextmanager
    def _watching(
        self, address: Address, connection: DataConnection, watch: bool = True
    ) -> Iterator[None]:
        if not watch or address.kind == "unix":
            yield
            return
        try:
            with self._watchdog.watch(address, connection.give_up):
                yield
        finally:
            if connection.given_up:
                self._drop_idle(address)

    @contextlib.contextmanager
    def _in_use(
        self, address: Address, connection: DataConnection, ahead: Ahead | None = None
    ) -> Iterator[None]:
        with self._lock:
            closed = self._closed
            if not closed:
                self._busy[connection] = None
        if closed:
            connection.close()
            raise ConnectionLost(address=str(address), detail="the client is closed")
        try:
            yield
        except BaseException:
            self._give_back(address, connection)
            raise
        if ahead is not None and connection.ahead is not None:
            ahead.connection = connection  # and busy: close() breaks it off
        else:
            self._give_back(address, connection)

    def _give_back(self, address: Address, connection: DataConnection) -> None:
        with self._lock:
            self._busy.pop(connection, None)
            idle = self._idle.setdefault(address, [])
            keep = (
                not connection.broken and not self._closed and len(idle) < CLIENT_IDLE_CONNECTIONS
            )
            if keep:
                idle.append(connection)
        if not keep:
            connection.close()

    def _drop_idle(self, address: Address) -> None:
        with self._lock:
            dropped = self._idle.pop(address, [])
        for connection in dropped:
            connection.close()

    def close(self) -> None:
        """Breaks off what is under way."""
        with self._lock:
            self._closed = True
            idle = [c for group in self._idle.values() for c in group]
            self._idle.clear()
            busy = list(self._busy)
        for connection in idle:
            connection.close()
        for connection in busy:
            connection.shutdown()
        self._watchdog.close()
