"""Locks of ordinary files: who holds which range, in one record an inode.

Two kinds that do not see each other. Ranges (fcntl: POSIX and OFD) belong to an owner, which is a
process or an open file of one mount; what one owner locks replaces what it had there. Whole files
(flock) are one range from the first byte to the last. The owner's number is the mount's kernel's;
with the session it is unique.

Locks are recorded: a server that starts again, and every server of a shared store, knows them. They
end with an unlock, with the last close of the file by their session, and with the session.

Who waits for a lock is not recorded. The one that waits asks (``AwaitLock``), is told once nothing
is in the way any more, and tries again; somebody else may have been faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from kvfs_base.errors import LockDeadlock, TooManyLocks
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, scan
from kvfs_metadata.limits import INODE_LOCKS_MAX
from kvfs_metadata.messages import FileLock
from kvfs_metadata.records import HeldLock
from kvfs_metadata.transaction import Tx


class Holder(NamedTuple):
    """Who locks, or waits to."""

    session: bytes
    owner: bytes


class Locks:
    def __init__(self) -> None:
        self.changed: set[int] = set()
        """Inodes of which something was unlocked, for those who wait. It may have been taken back:
        they look."""

    def in_the_way(self, kv: KVRead, inode: int, asker: Holder, lock: FileLock) -> list[HeldLock]:
        """What others hold that ``lock`` conflicts with, in the order of the ranges."""
        return _conflicts(_load(kv, inode), asker, lock)

    def take(self, tx: Tx, inode: int, asker: Holder, lock: FileLock) -> HeldLock | None:
        """Locks, or answers with what is in the way. A flock that the owner has with the other
        mode is given up first, also if the new one is not had then: else two that share a file and
        both want it alone would wait for each other."""
        held = _load(tx.kv, inode)
        conflicts = _conflicts(held, asker, lock)
        if not conflicts:
            left = _without(held, asker, lock)
            own = HeldLock(
                asker.session,
                asker.owner,
                lock.start,
                lock.end,
                lock.exclusive,
                lock.flock,
                lock.pid,
            )
            self._store(tx, inode, [*left, own])
            return None
        if lock.flock:
            self._shrink(tx, inode, held, _without(held, asker, lock))
        return conflicts[0]

    def release(self, tx: Tx, inode: int, asker: Holder, lock: FileLock) -> None:
        """The owner holds nothing in the range of ``lock`` afterwards."""
        held = _load(tx.kv, inode)
        self._shrink(tx, inode, held, _without(held, asker, lock))

    def close(self, tx: Tx, inode: int, session: bytes) -> None:
        """The session has the file open no longer."""
        held = _load(tx.kv, inode)
        if held:
            self._shrink(tx, inode, held, [one for one in held if one.session != session])

    def keep_only(self, tx: Tx, is_known: Callable[[bytes], bool]) -> None:
        """Sessions that are not known have ended."""
        for key, value in list(scan(tx.kv, records.LOCK)):
            held = records.decode_locks(value)
            left = [one for one in held if is_known(one.session)]
            self._shrink(tx, records.number_at(key), held, left)

    def _shrink(self, tx: Tx, inode: int, held: list[HeldLock], left: list[HeldLock]) -> None:
        if left != held:
            self._store(tx, inode, left)

    def _store(self, tx: Tx, inode: int, held: list[HeldLock]) -> None:
        merged = _merged(held)
        if len(merged) > INODE_LOCKS_MAX:
            raise TooManyLocks(limit=INODE_LOCKS_MAX)
        if merged:
            tx.kv.put(records.lock_key(inode), records.encode(merged))
        else:
            tx.kv.delete(records.lock_key(inode))
        # A range that is shared from now on instead of alone lets others in.
        self.changed.add(inode)

    def take_changed(self) -> set[int]:
        """Inodes of which something was unlocked since this was asked last."""
        changed, self.changed = self.changed, set()
        return changed


class Waits:
    """Who waits for what at this server: enough to see a circle before it closes."""

    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self._waits: dict[Holder, tuple[int, FileLock]] = {}

    def may_lock(self, kv: KVRead, inode: int, asker: Holder, lock: FileLock) -> bool:
        """Whether nothing is in the way. Else ``asker`` waits from now on; raises LockDeadlock if
        one who holds it waits, through however many others, for ``asker``. Edges are looked up as
        they are now: what a waiter waited for may have been released since."""
        self._waits.pop(asker, None)
        ahead = self._holders(kv, inode, asker, lock)
        if not ahead:
            return True
        seen: set[Holder] = set()
        while ahead and not lock.flock:
            holder = ahead.pop()
            if holder == asker:
                raise LockDeadlock(inode=inode)
            if holder not in seen:
                seen.add(holder)
                waits_for = self._waits.get(holder)
                if waits_for is not None:
                    ahead += self._holders(kv, waits_for[0], holder, waits_for[1])
        if not lock.flock:
            self._waits[asker] = (inode, lock)
        return False

    def _holders(self, kv: KVRead, inode: int, asker: Holder, lock: FileLock) -> list[Holder]:
        found = self._locks.in_the_way(kv, inode, asker, lock)
        return [Holder(held.session, held.owner) for held in found]

    def end(self, asker: Holder) -> None:
        self._waits.pop(asker, None)

    def __len__(self) -> int:
        return len(self._waits)


def as_message(held: HeldLock, session: bytes) -> FileLock:
    """As ``session`` is told. A process number of another mount means nothing there: 0."""
    pid = held.pid if held.session == session else 0
    return FileLock(held.start, held.end, held.exclusive, held.owner, held.flock, pid)


def _load(kv: KVRead, inode: int) -> list[HeldLock]:
    value = kv.get(records.lock_key(inode))
    return [] if value is None else records.decode_locks(value)


def _is_of(held: HeldLock, asker: Holder, lock: FileLock) -> bool:
    return (held.session, held.owner, held.flock) == (*asker, lock.flock)


def _conflicts(held: list[HeldLock], asker: Holder, lock: FileLock) -> list[HeldLock]:
    return [
        one
        for one in held
        if one.flock == lock.flock
        and one.start <= lock.end
        and lock.start <= one.end
        and (one.exclusive or lock.exclusive)
        and not _is_of(one, asker, lock)
    ]


def _without(held: list[HeldLock], asker: Holder, lock: FileLock) -> list[HeldLock]:
    """What is left when the owner gives up the range of ``lock``."""
    left: list[HeldLock] = []
    for one in held:
        if not _is_of(one, asker, lock) or one.end < lock.start or lock.end < one.start:
            left.append(one)
            continue
        if one.start < lock.start:
            left.append(msgspec.structs.replace(one, end=lock.start - 1))
        if lock.end < one.end:
            left.append(msgspec.structs.replace(one, start=lock.end + 1))
    return left


def _merged(held: list[HeldLock]) -> list[HeldLock]:
    """In the order of the ranges, those of one owner that touch as one."""
    merged: list[HeldLock] = []
    last: dict[tuple[object, ...], int] = {}
    for one in sorted(held, key=lambda one: (one.start, one.end, one.session, one.owner)):
        same = (one.session, one.owner, one.flock, one.exclusive)
        place = last.get(same)
        if place is not None and merged[place].end + 1 >= one.start:
            merged[place] = msgspec.structs.replace(merged[place], end=one.end)
        else:
            last[same] = len(merged)
            merged.append(one)
    return merged
