"""Requests that wait for a lock: woken when something was unlocked, without anybody's polling."""

from __future__ import annotations

from functools import partial

import trio

from kvfs_base.errors import ServerBusy
from kvfs_metadata.limits import (
    LOCK_LOOK_SECONDS,
    LOCK_WAIT_SECONDS,
    LOCK_WAITS_MAX,
)
from kvfs_metadata.lock_requests import LockRequests
from kvfs_metadata.locks import Holder
from kvfs_metadata.messages import AwaitLock, Done
from kvfs_metadata.turns import Turns


class LockWaiters:
    """``shared``: other servers unlock, too. That is not told, so it is looked for."""

    def __init__(self, locks: LockRequests, turns: Turns, *, shared: bool) -> None:
        self._locks = locks
        self._turns = turns
        self._look_seconds = LOCK_LOOK_SECONDS if shared else LOCK_WAIT_SECONDS
        self._events: dict[int, set[trio.Event]] = {}
        """By inode: of each who waits, set when something of it was unlocked."""
        self._count = 0

    def look(self) -> None:
        """A group was committed."""
        for inode in self._locks.take_changed():
            for event in self._events.get(inode, ()):
                event.set()

    async def wait(self, connection: int, request: AwaitLock) -> Done:
        """Raises LockDeadlock, ServerBusy, and what the store raises."""
        if self._count >= LOCK_WAITS_MAX:
            raise ServerBusy(detail=f"{LOCK_WAITS_MAX} wait for locks")
        asker = self._locks.asker(connection, request)
        self._count += 1
        try:
            with trio.move_on_after(LOCK_WAIT_SECONDS):
                while not await self._is_free(asker, request):
                    pass
        finally:
            self._count -= 1
            self._locks.waits_no_more(asker)  # whoever asks again counts anew
        return Done()

    async def _is_free(self, asker: Holder, request: AwaitLock) -> bool:
        """False once something has changed, or may have."""
        event = trio.Event()
        events = self._events.setdefault(request.inode, set())
        # Before the question: what is unlocked from here on is heard of.
        events.add(event)
        try:
            if await self._turns.ask(partial(self._locks.may_lock, asker, request)):
                return True
            with trio.move_on_after(self._look_seconds):
                await event.wait()
        finally:
            events.discard(event)
            if not events and self._events.get(request.inode) is events:
                del self._events[request.inode]
        return False
