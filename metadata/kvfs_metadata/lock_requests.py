"""Requests for locks: which session asks, what it is told."""

from __future__ import annotations

from kvfs_metadata import messages as m
from kvfs_metadata.engines.engine import KVEngine
from kvfs_metadata.locks import Holder, Locks, Waits, as_message
from kvfs_metadata.sessions import Sessions
from kvfs_metadata.transaction import Tx


class LockRequests:
    def __init__(self, sessions: Sessions, engine: KVEngine) -> None:
        self._sessions = sessions
        self._engine = engine
        self._locks = Locks()
        self.take_changed = self._locks.take_changed
        self._waits = Waits(self._locks)
        self._swept = False
        """What sessions of earlier processes left is gone."""

    def lock(self, tx: Tx, request: m.SetLock) -> m.FileLock | None:
        session = self._sessions.speaker(tx)
        if session is None:
            return request.lock  # nobody reads the answer
        asker = Holder(session, request.lock.owner)
        self._waits.end(asker)
        found = self._locks.take(tx, request.inode, asker, request.lock)
        return None if found is None else as_message(found, session)

    def unlock(self, tx: Tx, request: m.Unlock) -> m.Done:
        session = self._sessions.speaker(tx)
        if session is not None:
            asker = Holder(session, request.lock.owner)
            self._locks.release(tx, request.inode, asker, request.lock)
        return m.Done()

    def get(self, tx: Tx, request: m.GetLock) -> m.FileLock | None:
        session = self._sessions.session_on(tx.connection)
        asker = Holder(session, request.lock.owner)
        found = self._locks.in_the_way(tx.kv, request.inode, asker, request.lock)
        return as_message(found[0], session) if found else None

    def asker(self, connection: int, request: m.AwaitLock) -> Holder:
        return Holder(self._sessions.session_on(connection), request.lock.owner)

    def may_lock(self, asker: Holder, request: m.AwaitLock) -> bool:
        """As Waits.may_lock."""
        return self._engine.view(
            lambda kv: self._waits.may_lock(kv, request.inode, asker, request.lock)
        )

    def stop_awaiting(self, tx: Tx, request: m.StopAwaiting) -> m.Done:
        self.waits_no_more(Holder(self._sessions.session_on(tx.connection), request.owner))
        return m.Done()

    def waits_no_more(self, asker: Holder) -> None:
        self._waits.end(asker)

    def closed(self, tx: Tx, inode: int) -> None:
        """The connection's session closed a file, maybe not for the last time."""
        session = self._sessions.speaker_without(tx, inode)
        if session is not None:
            self._locks.close(tx, inode, session)

    def has_work(self) -> bool:
        return not self._swept and not self._sessions.in_grace

    def drop(self, tx: Tx) -> None:
        """Locks of sessions that ended, also of those that never came back to this process."""
        self._locks.keep_only(tx, self._sessions.is_known)
        tx.undo.append(self._not_swept)
        self._swept = True

    def _not_swept(self) -> None:
        self._swept = False
