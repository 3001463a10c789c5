"""Locks that programs take (flock, fcntl), kept by the metadata service: they hold between mounts.

The kernel gives each process and each open file that locks a number, the owner, and leaves two ends
of locks to us: a process's end with any close of the file by it (FLUSH), an open file's with its
last close (RELEASE). So this remembers who locked through which handle.

A lock that was asked for may be had although its answer was lost or given up. It is remembered
before it is asked for, so that it ends with the file in any case.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import trio

from kvfs.mount.backend import Backend
from kvfs.mount.limits import MOUNT_LOCK_WAITS_MAX
from kvfs_base.errors import KvfsError, LockHeld, TooManyLocks
from kvfs_metadata.messages import AwaitLock, FileLock, GetLock, SetLock, StopAwaiting, Unlock

log = logging.getLogger(__name__)

RANGE_END = (1 << 63) - 1


class _Owner(NamedTuple):
    owner: bytes
    flock: bool


class FileLocks:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._used: dict[int, dict[_Owner, set[int]]] = {}
        """By inode and owner: the handles that it locked through."""
        self._waiting = 0

    async def get(self, inode: int, lock: FileLock) -> FileLock | None:
        """What is in the way of ``lock``."""
        found: FileLock | None = await self._backend.call(GetLock(inode, lock))
        return found

    async def lock(self, inode: int, handle: int, lock: FileLock, *, wait: bool) -> None:
        """Raises LockHeld unless ``wait``, LockDeadlock, TooManyLocks. May be cancelled while it
        waits, and then has locked nothing."""
        owners = self._used.setdefault(inode, {})
        owners.setdefault(_Owner(lock.owner, lock.flock), set()).add(handle)
        while not await self._try(inode, lock):
            if not wait:
                raise LockHeld(inode=inode)
            await self._wait(inode, lock)

    async def _try(self, inode: int, lock: FileLock) -> bool:
        # Who is told that it does not have the lock must not have it.
        in_the_way: FileLock | None = lock
        with trio.CancelScope(shield=True):
            in_the_way = await self._backend.call(SetLock(inode, lock))
        return in_the_way is None

    async def _wait(self, inode: int, lock: FileLock) -> None:
        if self._waiting >= MOUNT_LOCK_WAITS_MAX:
            raise TooManyLocks(limit=MOUNT_LOCK_WAITS_MAX)
        self._waiting += 1
        try:
            await self._backend.call(AwaitLock(inode, lock))
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._tell(StopAwaiting(lock.owner))
            raise
        finally:
            self._waiting -= 1

    async def unlock(self, inode: int, lock: FileLock) -> None:
        await self._backend.call(Unlock(inode, lock))

    # --- closing

    def ends_with_flush(self, inode: int, owner: bytes) -> bool:
        """Whether a close by this owner has to be told."""
        owners = self._used.get(inode)
        return owners is not None and _Owner(owner, False) in owners

    async def flushed(self, inode: int, owner: bytes) -> None:
        """A process closed the file, maybe not all that it has of it."""
        await self._drop(inode, _Owner(owner, False))

    def ends_with_release(self, inode: int, handle: int) -> bool:
        owners = self._used.get(inode)
        return owners is not None and any(handle in handles for handles in owners.values())

    async def released(self, inode: int, handle: int) -> None:
        """An open file is gone."""
        owners = self._used.get(inode, {})
        for owner in [owner for owner, handles in owners.items() if handle in handles]:
            await self._drop(inode, owner)

    async def _drop(self, inode: int, owner: _Owner) -> None:
        owners = self._used.get(inode, {})
        if owners.pop(owner, None) is None:
            return
        if not owners:
            self._used.pop(inode, None)
        lock = FileLock(0, RANGE_END, True, owner.owner, owner.flock)
        await self._tell(Unlock(inode, lock))

    async def _tell(self, request: StopAwaiting | Unlock) -> None:
        """If the service cannot be told now, the last close or the session's end will do."""
        try:
            await self._backend.call(request)
        except KvfsError as exc:
            log.info("%s: %s", type(request).__name__, exc)
