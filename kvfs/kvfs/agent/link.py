"""The client's end of an agent session: its connections, its view of the arena, its staging area.

A session is held by a connection of its own that carries nothing else: as long as it stands, the
agent keeps the leases, so a call that fails on another connection never pulls the bytes away from
under a reader. Calls use a small pool of further connections that join the session.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from kvfs.agent.messages import Hello, Welcome
from kvfs_base import frames
from kvfs_base.answers import Answer
from kvfs_base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    EntryNotFound,
    ProtocolError,
)
from kvfs_base.frames import HEADER_BYTES, Frame, Kind
from kvfs_base.limits import (
    AGENT_CALL_SECONDS,
    CLIENT_CONNECTIONS_MAX,
    CONNECT_SECONDS,
)
from kvfs_base.rpc import Request, receive_frame
from kvfs_base.seams import BlockingNetwork, Connection
from kvfs_base.types import Address
from kvfs_gds.arena import ArenaView, SharedMemory, copy
from kvfs_gds.extents import ExtentAllocator


class SessionLost(ConnectionLost):
    """The agent no longer knows this session, or does not answer: open another one. Never travels
    and never reaches users: Client turns it into ConnectionLost if another session fails too."""


class Line:
    """One connection to the agent. ``usable`` turns false once an exchange broke off."""

    def __init__(self, connection: Connection, address: Address) -> None:
        self._connection = connection
        self._address = address
        self._next_id = 1
        self.usable = True
        connection.set_timeout(AGENT_CALL_SECONDS)

    def call(self, request: Request) -> Any:
        """The reply to one request. Raises as ``receive``."""
        self.send(request)
        return self.receive(type(request))

    def send(self, request: Request) -> None:
        """Sends a request. Its reply must be received before the next request is sent. Raises
        SessionLost or DeadlineExceeded."""
        frame = frames.encode(Kind.REQUEST, self._next_id, request)
        try:
            self._connection.send([frame])
        except ConnectionLost as exc:
            raise self._lost(exc) from exc
        except BaseException:
            self.usable = False
            raise

    def answered(self, seconds: float) -> bool:
        """Whether a reply, or the end of the connection, comes within so many seconds."""
        arrivals = select.poll()
        arrivals.register(self._connection.fileno(), select.POLLIN)
        return bool(arrivals.poll(1000 * seconds))

    def receive(self, request_type: type[Request]) -> Any:
        """The reply to the request sent last. Raises what the agent raised, SessionLost or
        DeadlineExceeded."""
        try:
            frame = receive_frame(self._connection)
            self._check(frame)
        except ConnectionLost as exc:
            raise self._lost(exc) from exc
        except BaseException:
            self.usable = False  # the reply may still come: out of step from now on
            raise
        return _decode(frame, request_type)

    def hello(self, session: bytes) -> tuple[Welcome, list[int]]:
        """The first exchange; descriptors come with it. Raises as ``receive``."""
        self.send(Hello(session))
        descriptors: list[int] = []
        try:
            head = memoryview(bytearray(HEADER_BYTES))
            descriptors = self._connection.receive_with_descriptors(head)
            header = frames.decode_header(head)
            body = bytearray(header.body_bytes)
            self._connection.receive_into([memoryview(body)])
            header.check(body)
            frame = Frame(header.kind, header.request_id, bytes(body))
            self._check(frame)
            welcome = _decode(frame, Hello)
            if len(descriptors) != (0 if session else 3):
                raise ProtocolError(detail=f"{len(descriptors)} descriptors")
        except BaseException as exc:
            self.usable = False
            for fd in descriptors:
                os.close(fd)
            if isinstance(exc, ConnectionLost):
                raise self._lost(exc) from exc
            raise
        return welcome, descriptors

    def _check(self, frame: Frame) -> None:
        if frame.request_id == 0 and frame.kind is Kind.ERROR:
            self.usable = False  # about the connection, which the agent is closing
        elif frame.request_id != self._next_id:
            raise ProtocolError(detail="a reply to another request")
        self._next_id += 1

    def _lost(self, exc: ConnectionLost) -> SessionLost:
        self.usable = False
        return SessionLost(address=str(self._address), detail=exc.detail)

    def close(self) -> None:
        self.usable = False
        self._connection.close()


def _decode(frame: Frame, request_type: type[Request]) -> Any:
    if frame.kind is Kind.ERROR:
        raise frames.decode_error(frame.body)
    try:
        return _decoder(request_type).decode(frame.body)
    except frames.UNDECODABLE as exc:
        raise ProtocolError(detail=f"reply to {request_type.__name__}: {exc}") from exc


@functools.cache
def _decoder(request_type: type[Request]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(request_type.Reply)


class StagingSpace:
    """The session's staging area, divided among the threads of this client."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor. Raises as SharedMemory.open."""
        self._memory = SharedMemory.open(fd)
        self.size_bytes = self._memory.size_bytes
        self._extents = ExtentAllocator(self.size_bytes)
        self._freed = threading.Condition()

    def allocate(self, sizes: Sequence[int], *, wait: bool) -> list[int]:
        """Offsets for as many of ``sizes``, from the first, as there is room for. With ``wait``
        at least one: who waits must hold nothing here, or two could wait for each other."""
        offsets: list[int] = []
        with self._freed:
            while True:
                for size in sizes[len(offsets) :]:
                    offset = self._extents.allocate(size)
                    if offset is None:
                        break
                    offsets.append(offset)
                if offsets or not wait:
                    return offsets
                if not self._freed.wait(AGENT_CALL_SECONDS):
                    raise DeadlineExceeded(operation="staging", seconds=AGENT_CALL_SECONDS)

    def free(self, offsets: Sequence[int]) -> None:
        with self._freed:
            for offset in offsets:
                self._extents.free(offset)
            self._freed.notify_all()

    def write(self, offset: int, data: memoryview) -> None:
        """Copies ``data`` to ``offset``; other threads run meanwhile."""
        copy(self._memory.view_to_fill(offset, len(data)), data)

    def close(self) -> None:
        self._memory.close()


class AgentSession:
    """Thread-safe. Leases live until nobody in this process can see their bytes any more."""

    def __init__(self, network: BlockingNetwork, address: Address) -> None:
        """Opens a session. Raises ConnectionLost if no agent listens, ServerBusy."""
        self._network = network
        self._address = address
        self._lifeline = self._dial()
        try:
            welcome, descriptors = self._lifeline.hello(b"")
        except BaseException:
            self._lifeline.close()
            raise
        arena_fd, staging_fd, board_fd = descriptors
        self.arena = ArenaView.open(arena_fd)
        self.staging = StagingSpace(staging_fd)
        self._board = SharedMemory.open(board_fd)
        self._marks = self._board.view(0, self._board.size_bytes)
        self._secret = welcome.session
        self._array_type = ctypes.c_uint8 * self.arena.size_bytes
        self._arena_address = self.arena.address
        self._whole_arena = self.arena.view(0, self.arena.size_bytes)
        self._pid = os.getpid()
        self._free_lines: list[Line] = []
        self._slots = threading.BoundedSemaphore(CLIENT_CONNECTIONS_MAX)
        self._lock = threading.Lock()
        self._leases: dict[int, weakref.ref[Any]] = {}
        self._closed = False
        self.broken = False
        """An exchange broke off: the agent may have granted a lease that nobody knows of, or may
        still read what was staged. Use another session for what comes next."""

    def _dial(self) -> Line:
        connection = self._network.connect(self._address, CONNECT_SECONDS)
        return Line(connection, self._address)

    # --- calls

    def call(self, request: Request) -> Any:
        """The reply to one request. Raises what the agent raised, SessionLost, DeadlineExceeded."""
        with self._slots:
            line = self._take_line()
            try:
                return line.call(request)
            finally:
                self._put_back(line)

    def ask(self, request: Request) -> Answer[Any] | None:
        """Sends a request and does not wait. The reply (which raises as ``call``) must be taken.
        None if no connection is free."""
        if not self._slots.acquire(blocking=False):
            return None
        with self._lock:
            line = self._free_lines.pop() if self._free_lines else None
        try:
            if line is not None:
                line.send(request)
                take = functools.partial(self._answer, line, type(request))
                return Answer(take, line.answered)
        except SessionLost:
            pass  # as if none had been free: who calls finds out
        except BaseException:
            self._over_with(line)
            raise
        self._over_with(line)
        return None

    def _answer(self, line: Line, request_type: type[Request]) -> Any:
        try:
            return line.receive(request_type)
        finally:
            self._over_with(line)

    def _over_with(self, line: Line | None) -> None:
        if line is not None:
            self._put_back(line)
        self._slots.release()

    @contextlib.contextmanager
    def line(self) -> Iterator[Line]:
        """A connection for the length of the block; waits for one if all are in use."""
        with self._slots:
            line = self._take_line()
            try:
                yield line
            finally:
                self._put_back(line)

    def _take_line(self) -> Line:
        with self._lock:
            if self._closed:
                raise SessionLost(address=str(self._address), detail="closed")
            if self._free_lines:
                return self._free_lines.pop()
        return self._join()

    def _put_back(self, line: Line) -> None:
        with self._lock:
            if line.usable and not self._closed:
                self._free_lines.append(line)
                return
        self.broken = True
        line.close()

    def _join(self) -> Line:
        try:
            line = self._dial()
        except ConnectionLost as exc:
            raise SessionLost(address=exc.address, detail=exc.detail) from exc
        try:
            line.hello(self._secret)
        except EntryNotFound as exc:
            line.close()
            raise SessionLost(address=str(self._address), detail="unknown session") from exc
        except BaseException:
            line.close()
            raise
        return line

    # --- leases

    def lease(self, number: int) -> memoryview:
        """The arena, read-only. The lease is over once this view and all that were made from it,
        by whomever, are gone: a numpy array that outlives its ``with`` block keeps its bytes."""
        exporter: Any = self._array_type.from_address(self._arena_address)
        # What must outlive the pointer: the mapping, and the connection that holds the lease.
        exporter.mapping = self._whole_arena
        exporter.session = self
        self._leases[number] = weakref.ref(exporter, functools.partial(self._over, number))
        return memoryview(exporter).cast("B").toreadonly()

    def _over(self, number: int, _: object) -> None:
        # May run anywhere, inside the garbage collector too: no lock, no call. The number is not
        # given out again before the mark is seen.
        self._leases.pop(number, None)
        if os.getpid() == self._pid:  # a forked child does not give back what its parent holds
            self._marks[number - 1] = 1

    # --- life

    def retire(self) -> None:
        """Nothing new is asked of this session: it closes as soon as its last lease is over."""
        if not self._leases:
            self.close()

    def close(self) -> None:
        """Ends all leases. Bytes of a living agent's arena may change from now on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            lines, self._free_lines = self._free_lines, []
        for line in (*lines, self._lifeline):
            line.close()
        self.staging.close()
        self._board.close()
        self.arena.close()

    def abandon(self) -> None:
        """After a fork, in the child: the session stays the parent's. Its lock may have been held
        by a thread that does not exist here."""
        self._lock = threading.Lock()
        self.close()

    def __del__(self) -> None:
        # Leases refer to their session: there are none.
        if hasattr(self, "_closed"):
            self.close()


__all__ = ["AgentSession", "Line", "SessionLost", "StagingSpace"]
