"""Empty files that servers of this host passed ahead, for chunks that do not have a name yet.

A new file that the kernel is to write by itself needs a descriptor in the moment that it is made.
So some are asked for ahead, of each target of this host. A staged file belongs to
the connection that it was asked for on; if that ends, the server forgets it: what was written to it
lies behind its descriptor only, and ``adopt`` fails.

Chunks that were adopted are sealed when nobody writes to them any more: soon after the last of
several, many with one request, which nobody waits for. One that stays open is sealed by its next
reader or writer, or when the connection ends.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence

from kvfs_base import threads
from kvfs_base.errors import ConnectionLost, KvfsError
from kvfs_base.limits import CALL_SECONDS, CONNECT_SECONDS
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.client.outcomes import raise_first
from kvfs_datapath.client.routes import Route
from kvfs_datapath.client.shared import Shared
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.limits import (
    SEAL_CHUNKS_PER_REQUEST,
    SEAL_LATEST_SECONDS,
    SEAL_TOGETHER_SECONDS,
    STAGED_AHEAD,
    STAGED_AHEAD_RETRY_SECONDS,
    STAGED_AHEAD_TARGETS_MAX,
)

log = logging.getLogger(__name__)


class StagedFile:
    """``fd``: read and write, not O_DIRECT."""

    __slots__ = ("fd", "lane", "token")

    def __init__(self, fd: int, token: int, lane: _Lane) -> None:
        self.fd = fd
        self.token = token
        self.lane = lane


class _Lane:
    """One connection to one target. ``lock`` is for the conversation; ``ready`` needs none.
    ``refill`` is called after each adoption: who makes files one after the other does not wait
    for more to be fetched when it wants one adopted."""

    def __init__(
        self, route: Route, connection: DataConnection, refill: Callable[[_Lane], None]
    ) -> None:
        self.route = route
        self.refill = refill
        self.lock = threads.lock()
        self.ready: collections.deque[StagedFile] = collections.deque()
        self.filling = False
        self._connection: DataConnection | None = connection

    @property
    def usable(self) -> bool:
        return self._connection is not None

    def fill(self) -> None:
        """Raises KvfsError; the lane is of no use then."""
        count = STAGED_AHEAD - len(self.ready)
        if count <= 0:  # it was filled for another chain of the same target
            return
        with self.lock, self._talking() as connection:
            reply, descriptors = connection.call_for_descriptors(
                m.StageChunks(self.route.target_id, count), lambda reply: len(reply.tokens)
            )
            for token, descriptor in zip(reply.tokens, descriptors, strict=True):
                fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)  # without O_DIRECT
                self.ready.append(StagedFile(descriptor, token, self))

    def adopt(self, staged: StagedFile, chunk: ChunkId) -> None:
        try:
            with self.lock, self._talking() as connection:
                raise_first(connection.call(self._adoption(staged, chunk)))
        finally:
            self.refill(self)

    def _adoption(self, staged: StagedFile, chunk: ChunkId) -> m.AdoptChunks:
        return m.AdoptChunks(self.route.target_id, (m.Adopted(*chunk, staged.token),))

    def begin_adopt(self, staged: StagedFile, chunk: ChunkId) -> Adoption | None:
        if self._connection is None or not self.lock.acquire(blocking=False):
            return None
        with contextlib.ExitStack() as held:
            held.callback(self.refill, self)
            held.callback(self.lock.release)
            connection = held.enter_context(self._talking())
            request = self._adoption(staged, chunk)
            connection.begin(request, 0)
            return Adoption(connection, request, held.pop_all())

    def discard(self, staged: StagedFile) -> None:
        request = m.PublishChunks(self.route.target_id, (), discard=(staged.token,))
        with self.lock, self._talking() as connection:
            connection.call(request)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[DataConnection]:
        connection = self._connection
        if connection is None:
            raise ConnectionLost(detail="its staged files are gone")
        try:
            yield connection
        finally:
            if connection.broken:
                self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        with contextlib.suppress(IndexError):
            while True:
                os.close(self.ready.popleft().fd)


class Adoption:
    """An ``adopt`` that was asked for. Nobody else talks to the server on that connection until
    ``finish`` or ``give_up`` is called; with ``give_up`` the connection ends."""

    def __init__(
        self, connection: DataConnection, request: m.AdoptChunks, held: contextlib.ExitStack
    ) -> None:
        self._connection = connection
        self._request = request
        self._held = held

    def fileno(self) -> int:
        """Readable once ``finish`` need not wait."""
        return self._connection.fileno()

    def finish(self) -> None:
        """Raises what ``adopt`` does."""
        with self._held:
            raise_first(self._connection.finish(self._request))

    def give_up(self) -> None:
        self._held.close()


class StagedFiles:
    """Of one client; thread-safe."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._lock = threads.lock()
        self._lanes: dict[int, _Lane | float] = {}
        """By chain of one copy: a lane, or when to look again whether there may be one."""
        self._pool = threads.pool(1, "kvfs-staging")
        self._sealer = threads.pool(1, "kvfs-sealing")
        self._unsealed: collections.deque[tuple[Route, ChunkId]] = collections.deque()
        self._sealing = False
        self._closed = False

    def prepare(self) -> None:
        """Asks the targets of this host, for the first files that are made. Never waits."""
        with contextlib.suppress(RuntimeError):  # the client is closed
            self._pool.submit(self._prepare)

    def _prepare(self) -> None:
        try:
            for chain in self._shared.router.here():
                self._begin(chain)
        except KvfsError as exc:
            log.debug("nothing is staged ahead: %s", exc)

    def take(self, chain: int) -> StagedFile | None:
        """An empty file on the target of ``chain``, or None: there is none at hand, or that target
        is not on this host. Never waits."""
        lane = self._lanes.get(chain, 0.0)
        if isinstance(lane, _Lane):
            if lane.usable:
                return self._take(chain, lane)
        elif self._shared.env.clock.monotonic() < lane:
            return None
        self._begin(chain)
        return None

    def _take(self, chain: int, lane: _Lane) -> StagedFile | None:
        try:
            taken = lane.ready.popleft()
        except IndexError:
            taken = None
        # Many are made, and none is flushed.
        self._fill_soon(chain, lane, STAGED_AHEAD // 4)
        return taken

    def _fill_soon(self, chain: int, lane: _Lane, fewer_than: int = STAGED_AHEAD // 2) -> None:
        if len(lane.ready) < fewer_than and lane.usable and not lane.filling:
            lane.filling = True
            self._submit(chain)

    def _begin(self, chain: int) -> None:
        with self._lock:
            lane = self._lanes.get(chain)
            if not isinstance(lane, _Lane) and len(self._lanes) >= STAGED_AHEAD_TARGETS_MAX:
                return
            # Until the thread has looked, nobody else need ask it to.
            self._look_again_later(chain)
        self._submit(chain)

    def _look_again_later(self, chain: int) -> None:
        now = self._shared.env.clock.monotonic()
        self._lanes[chain] = now + STAGED_AHEAD_RETRY_SECONDS

    def _submit(self, chain: int) -> None:
        with contextlib.suppress(RuntimeError):  # the client is closed
            self._pool.submit(self._fill, chain)

    def _fill(self, chain: int) -> None:
        lane = self._lanes.get(chain)
        try:
            if not isinstance(lane, _Lane):
                lane = self._connect(chain)
            if lane is not None:
                lane.fill()
                self._keep(chain, lane)
        except KvfsError as exc:
            log.debug("nothing is staged ahead on chain %d: %s", chain, exc)
            if isinstance(lane, _Lane):
                with lane.lock:
                    lane.close()
            with self._lock:
                self._look_again_later(chain)
        finally:
            if isinstance(lane, _Lane):
                lane.filling = False

    def _connect(self, chain: int) -> _Lane | None:
        routes = self._shared.router.chain(chain)
        route = routes.serving[0]
        if routes.is_replicated or not route.local:
            return None
        with self._lock:
            for lane in self._lanes.values():
                if isinstance(lane, _Lane) and lane.usable and lane.route == route:
                    return lane
        network = self._shared.env.blocking_network
        connection = DataConnection(network.connect(route.address, CONNECT_SECONDS))
        connection.set_timeout(CALL_SECONDS)
        return _Lane(route, connection, functools.partial(self._fill_soon, chain))

    def _keep(self, chain: int, lane: _Lane) -> None:
        with self._lock:
            if not self._closed:
                self._lanes[chain] = lane
                return
        lane.close()

    def adopt(self, staged: StagedFile, chunk: ChunkId) -> None:
        """The file is ``chunk`` from now on, open for writing. The caller keeps its descriptor in
        any case. Raises ConnectionLost if the server has forgotten it, DiskFull and Conflict, which
        use it up, and InvalidRequest if it was used up."""
        staged.lane.adopt(staged, chunk)

    def begin_adopt(self, staged: StagedFile, chunk: ChunkId) -> Adoption | None:
        """``adopt``, for those who can wait for a descriptor: a thread would cost more than the
        call. None, and nothing was done, if the server is being talked to. Raises
        ConnectionLost."""
        return staged.lane.begin_adopt(staged, chunk)

    def seal_soon(self, staged: StagedFile, chunk: ChunkId) -> None:
        """``staged``, which was adopted as ``chunk``, will not be written to any more. Never
        waits."""
        with self._lock:
            self._unsealed.append((staged.lane.route, chunk))
            begin, self._sealing = not self._sealing, True
        if begin:
            with contextlib.suppress(RuntimeError):  # the client is closed
                self._sealer.submit(self._seal)

    def _seal(self) -> None:
        self._wait_for_more()
        with self._lock:
            self._sealing = False
            waiting = list(self._unsealed)
            self._unsealed.clear()
        by_route: dict[Route, list[ChunkId]] = {}
        for route, chunk in waiting:
            by_route.setdefault(route, []).append(chunk)
        for route, chunks in by_route.items():
            for start in range(0, len(chunks), SEAL_CHUNKS_PER_REQUEST):
                self._seal_batch(route, chunks[start : start + SEAL_CHUNKS_PER_REQUEST])

    def _wait_for_more(self) -> None:
        clock = self._shared.env.clock
        latest = clock.monotonic() + SEAL_LATEST_SECONDS
        waiting = 0
        while len(self._unsealed) > waiting and clock.monotonic() < latest:
            waiting = len(self._unsealed)
            if self._shared.closed.wait(SEAL_TOGETHER_SECONDS):
                return

    def _seal_batch(self, route: Route, chunks: Sequence[ChunkId]) -> None:
        request = m.SealChunks(route.target_id, tuple(m.ChunkRef(*chunk) for chunk in chunks))
        try:
            self._shared.pool.run(route.address, lambda c: c.call(request))
        except KvfsError as exc:
            log.info("%d chunks stay open: %s", len(chunks), exc)

    def give_back(self, staged: StagedFile) -> bool:
        """Nothing was written to it, and nobody has it open any more: somebody else may have it.
        Its descriptor is taken over; False, and nothing was done, if there are enough."""
        lane = staged.lane
        if not lane.usable or len(lane.ready) >= STAGED_AHEAD:
            return False
        lane.ready.append(staged)
        return True

    def discard(self, staged: StagedFile) -> None:
        """What was written to it is not wanted. Its descriptor is taken over. Never raises."""
        with contextlib.suppress(KvfsError):
            staged.lane.discard(staged)
        os.close(staged.fd)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes = {lane for lane in self._lanes.values() if isinstance(lane, _Lane)}
            self._lanes.clear()
        self._pool.shutdown(wait=True)
        self._sealer.shutdown(wait=True)
        for lane in lanes:
            with lane.lock:
                lane.close()


__all__ = ["Adoption", "StagedFile", "StagedFiles"]
