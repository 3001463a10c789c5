"""Tells servers of replicas that readers could not use, behind the readers' backs."""

from __future__ import annotations

import collections
import logging

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import KvfsError
from kvfs_base.limits import ITEMS_PER_REQUEST_MAX
from kvfs_base.seams import Clock
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.client.routes import Route
from kvfs_datapath.connections import ConnectionPool
from kvfs_datapath.limits import (
    CHAIN_CONNECT_SECONDS,
    HELPER_IDLE_SECONDS,
    REPAIR_AGAIN_SECONDS,
    REPAIRS_QUEUED_MAX,
    REPAIRS_REMEMBERED_MAX,
)

log = logging.getLogger(__name__)


class Repairs:
    """Thread-safe. Has a thread once it is needed. What does not fit is not asked for: the next
    reader finds it again."""

    def __init__(self, clock: Clock, pool: ConnectionPool, counters: Counters) -> None:
        self._clock = clock
        self._pool = pool
        self._counters = counters
        self._condition = threads.condition()
        self._queue: collections.deque[tuple[Route, ChunkId]] = collections.deque()
        self._asked: collections.OrderedDict[tuple[int, ChunkId], float] = collections.OrderedDict()
        self._thread: threads.Thread | None = None
        self._closed = False

    def ask(self, route: Route, chunk: ChunkId) -> None:
        """The replica of this target is bad, and another one was good. Does not wait."""
        now = self._clock.monotonic()
        name = (route.target_id, chunk)
        with self._condition:
            before = self._asked.get(name)
            if before is not None and now - before < REPAIR_AGAIN_SECONDS:
                return
            if self._closed or len(self._queue) >= REPAIRS_QUEUED_MAX:
                return
            self._asked[name] = now
            self._asked.move_to_end(name)
            while len(self._asked) > REPAIRS_REMEMBERED_MAX:
                self._asked.popitem(last=False)
            self._queue.append((route, chunk))
            if self._thread is None:
                self._thread = threads.thread(self._run, name="kvfs-repairs")
                self._thread.start()
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed, HELPER_IDLE_SECONDS)
                if self._closed or not self._queue:
                    self._thread = None
                    return
                route = self._queue[0][0]
                chunks: list[ChunkId] = []
                while (
                    self._queue
                    and self._queue[0][0] == route
                    and len(chunks) < ITEMS_PER_REQUEST_MAX
                ):
                    chunks.append(self._queue.popleft()[1])
            self._send(route, chunks)

    def _send(self, route: Route, chunks: list[ChunkId]) -> None:
        request = m.RepairChunks(route.target_id, tuple(m.ChunkRef(*chunk) for chunk in chunks))
        self._counters.add(repairs_asked=len(chunks))
        try:
            self._pool.run(
                route.address, lambda c: c.call(request), connect_seconds=CHAIN_CONNECT_SECONDS
            )
        except KvfsError as exc:
            log.info("target %d was not told of bad chunks: %s", route.target_id, exc)

    def close(self) -> None:
        """The pool must be closed, or about to be: that ends a request under way."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None:
            thread.join()


__all__ = ["Repairs"]
