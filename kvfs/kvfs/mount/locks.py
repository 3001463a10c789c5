"""A lock with shared and exclusive holders, for trio tasks."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import AsyncIterator

import trio


class SharedLock:
    """Many shared holders or one exclusive one. First come, first served, so that a truncate is
    not starved by a stream of writes. ``try_shared`` costs no event-loop turn."""

    def __init__(self) -> None:
        self._shared = 0
        self._exclusive = False
        self._waiting: collections.deque[tuple[bool, trio.Event]] = collections.deque()

    def try_shared(self) -> bool:
        if self._exclusive or self._waiting:
            return False
        self._shared += 1
        return True

    def release_shared(self) -> None:
        self._shared -= 1
        self._admit()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        if not self.try_shared():
            await self._wait(exclusive=False)
        try:
            yield
        finally:
            self.release_shared()

    @property
    def is_free(self) -> bool:
        return not (self._exclusive or self._shared or self._waiting)

    def try_exclusive(self) -> bool:
        if not self.is_free:
            return False
        self._exclusive = True
        return True

    def release_exclusive(self) -> None:
        """By whoever: it need not be the task that took it."""
        self._exclusive = False
        self._admit()

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        if not self.try_exclusive():
            await self._wait(exclusive=True)
        try:
            yield
        finally:
            self.release_exclusive()

    async def _wait(self, *, exclusive: bool) -> None:
        place = (exclusive, trio.Event())
        self._waiting.append(place)
        try:
            await place[1].wait()
        except trio.Cancelled:
            if place[1].is_set():  # admitted and cancelled in the same turn
                self._leave(exclusive)
            else:
                self._waiting.remove(place)
            self._admit()
            raise

    def _leave(self, exclusive: bool) -> None:
        if exclusive:
            self._exclusive = False
        else:
            self._shared -= 1

    def _admit(self) -> None:
        while self._waiting and not self._exclusive:
            exclusive, event = self._waiting[0]
            if exclusive and self._shared:
                return
            self._waiting.popleft()
            if exclusive:
                self._exclusive = True
            else:
                self._shared += 1
            event.set()
