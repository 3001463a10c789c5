"""Files that the service counts as open by this mount, so that they keep their data when unlinked.

One that nobody has open any more stays counted for a moment (*idle*): the next open then costs no
call if its attributes are leased, and many are closed with one request. Without leases an open
costs a call anyway, and nobody could tell us to close what is idle: then it is closed at once.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

import trio

from kvfs.mount.backend import Backend
from kvfs.mount.limits import (
    MOUNT_CLOSE_SECONDS,
    MOUNT_IDLE_FILES,
    MOUNT_IDLE_SECONDS,
)
from kvfs.mount.tails import when_cut
from kvfs_base.errors import KvfsError, TailBusy
from kvfs_base.limits import CLOSED_TOGETHER_MAX
from kvfs_base.rpc import Done
from kvfs_base.types import Attr
from kvfs_metadata.messages import CloseInode, GetAttr, OpenInode

log = logging.getLogger(__name__)


class Opens:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._counted: dict[int, int] = {}
        """How often the service counts an inode as open by us."""
        self._written: set[int] = set()
        """Counted ones that the service knows we may write to."""
        self._users: dict[int, int] = {}
        """How often it was taken here and not given back."""
        self._idle: dict[int, None] = {}
        """Counted and not used, the longest first."""
        self._idle_before: set[int] = set()
        """Those that were idle in the last round, and since."""
        self._unwanted: set[int] = set()
        """Idle ones to be closed at once."""
        self._restless: set[int] = set()
        """Counted, and changed by somebody else in this round or the last: not kept idle, as they
        may be about to move, which they can while nobody has them open."""
        self._restless_before: set[int] = set()
        self._work = trio.Event()
        self._closing = False
        """``close_idle`` runs."""

    def take_now(self, inode: int, *, writes: bool = False) -> Attr | None:
        """Its attributes; None if the service has to be asked, and nothing was taken."""
        if inode not in (self._written if writes else self._counted):
            return None
        attr = self._backend.names.attr(inode)
        if attr is not None:
            self._use(inode)
        return attr

    async def take(self, inode: int, *, writes: bool = False) -> Attr:
        """Fresh attributes of an inode that stays open until it is given back. ``writes``: chunks
        of it may be changed until then. Raises TailBusy."""
        leased = self.take_now(inode, writes=writes)
        if leased is not None:
            return leased
        known = inode in (self._written if writes else self._counted)
        self._use(inode)  # so that nobody closes it meanwhile
        try:
            request = GetAttr(inode) if known else OpenInode(inode, writes)
            attr: Attr = await when_cut(lambda: self._backend.call(request))
        except BaseException:
            self.give_back(inode)
            raise
        if not known:
            self._count(inode, writes=writes)
        return attr

    def count_soon(self, inode: int, done: Done, *, writes: bool = False) -> bool:
        """The service counts it, for who takes it in ``done``: see Backend.call_soon. Otherwise it
        is idle. False if ``take`` has to be used."""
        if inode in self._counted or not self._may_be_idle(inode):
            return False

        def tell(attr: Attr | None, error: KvfsError | None) -> None:
            if attr is not None:
                self._count(inode, writes=writes)
                if inode not in self._users:
                    self._idle[inode] = None
            done(None, None if isinstance(error, TailBusy) else error)

        return self._backend.call_soon(OpenInode(inode, writes), tell)

    def made(self, inode: int) -> None:
        """The service has counted it with its creation, as one that we write to."""
        self._count(inode, writes=True)
        self._use(inode)

    def _count(self, inode: int, *, writes: bool) -> None:
        self._counted[inode] = self._counted.get(inode, 0) + 1
        if writes:
            self._written.add(inode)

    def _use(self, inode: int) -> None:
        self._users[inode] = self._users.get(inode, 0) + 1
        self._idle.pop(inode, None)
        self._idle_before.discard(inode)
        self._unwanted.discard(inode)

    def give_back(self, inode: int, *, wanted: bool = True) -> None:
        """``wanted`` is False for one that will not be opened again."""
        left = self._users.pop(inode) - 1
        if left:
            self._users[inode] = left
            return
        if inode not in self._counted:
            return
        self._idle[inode] = None
        if not (wanted and self._may_be_idle(inode)):
            self._close_soon((inode,))
        if len(self._idle) > MOUNT_IDLE_FILES:
            self._work.set()

    def _may_be_idle(self, inode: int) -> bool:
        restless = inode in self._restless or inode in self._restless_before
        return self._closing and self._backend.names.are_leased and not restless

    def changed(self, inodes: Iterable[int]) -> None:
        """Perhaps these were removed, or are to move: what is idle is closed, or its data would
        stay."""
        counted = [inode for inode in inodes if inode in self._counted]
        self._restless.update(counted)
        self._close_soon(counted)

    def _close_soon(self, inodes: Iterable[int]) -> None:
        idle = [inode for inode in inodes if inode in self._idle]
        if idle:
            self._unwanted.update(idle)
            self._work.set()

    async def close_idle(self) -> None:
        """Closes what was idle for long, is unwanted or too much. Until cancelled."""
        self._closing = True
        while True:
            with trio.move_on_after(MOUNT_IDLE_SECONDS) as round_:
                await self._work.wait()
                # Who removes one file removes others, mostly: one request closes all of them.
                await trio.sleep(MOUNT_CLOSE_SECONDS)
            self._work = trio.Event()
            if round_.cancelled_caught:
                late, self._idle_before = self._idle_before, set(self._idle)
                self._unwanted |= late
                self._restless_before, self._restless = self._restless, set()
            excess = len(self._idle) - MOUNT_IDLE_FILES
            if excess > 0:
                half = excess + MOUNT_IDLE_FILES // 2
                self._unwanted.update(itertools.islice(self._idle, half))
            await self._close()

    async def close_unwanted(self) -> None:
        """For those who have nobody that does it behind their backs."""
        if not self._closing:
            await self._close()

    async def close_all(self) -> None:
        self._unwanted.update(self._idle)
        await self._close()

    async def _close(self) -> None:
        while self._unwanted:
            inodes = list(itertools.islice(self._unwanted, CLOSED_TOGETHER_MAX))
            opens: list[int] = []
            for inode in inodes:
                self._unwanted.discard(inode)
                self._idle_before.discard(inode)
                self._idle.pop(inode, None)
                # From here on it counts as not open: who opens it asks the service, after this.
                opens += [inode] * self._counted.pop(inode, 0)
                self._written.discard(inode)
            for start in range(0, len(opens), CLOSED_TOGETHER_MAX):
                first, *others = opens[start : start + CLOSED_TOGETHER_MAX]
                try:
                    await self._backend.call(CloseInode(first, tuple(others)))
                except KvfsError as exc:
                    log.info("%d files stay open at the service: %s", len(others) + 1, exc)

    def __len__(self) -> int:
        """Idle ones."""
        return len(self._idle)
