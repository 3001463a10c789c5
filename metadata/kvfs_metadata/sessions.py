"""Who has which files open.

A session is a client's, not a connection's: after a reconnect the client names it again and says
what it has open. A session without a connection keeps its files for SESSION_GRACE_SECONDS. Sessions
are not recorded; after a restart every unlinked file counts as open for the same time, until the
clients have come back and said what they need.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from functools import partial

from kvfs_base.errors import LimitExceeded, ServerBusy
from kvfs_base.limits import OPEN_INODES_MAX, SESSION_GRACE_SECONDS, SESSIONS_MAX
from kvfs_base.seams import Clock
from kvfs_metadata.transaction import Tx


@dataclasses.dataclass(slots=True)
class _Session:
    connection: int | None
    opens: Counter[int] = dataclasses.field(default_factory=Counter)
    detached_at: float = 0.0


class Sessions:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_at = clock.monotonic()
        self._sessions: dict[bytes, _Session] = {}
        self._by_connection: dict[int, bytes] = {}
        self._opens: Counter[int] = Counter()

    # --- connections

    def attach(self, tx: Tx, uuid: bytes, open_inodes: Iterable[int]) -> list[int]:
        """Connection ``tx.connection`` speaks for session ``uuid`` from now on, and exactly
        ``open_inodes`` are open. Answers with the inodes that were open and are not any more."""
        session = self._sessions.get(uuid)
        if session is None:
            session = self._new(tx, uuid)
        if self._by_connection.get(tx.connection, uuid) != uuid:
            self.disconnected(tx.connection)  # it spoke for another session until now
        before = session.opens
        connection = session.connection
        tx.undo.append(partial(self._restore, uuid, session, connection, before))
        session.connection = tx.connection
        self._by_connection[tx.connection] = uuid
        self._set_opens(session, Counter(open_inodes))
        return [inode for inode in before if inode not in self._opens]

    def _new(self, tx: Tx, uuid: bytes) -> _Session:
        if len(self._sessions) >= SESSIONS_MAX:
            raise ServerBusy(detail=f"{SESSIONS_MAX} sessions")
        session = self._sessions[uuid] = _Session(tx.connection)
        tx.undo.append(partial(self._forget, uuid))
        return session

    def _forget(self, uuid: bytes) -> None:
        del self._sessions[uuid]

    def _restore(
        self, uuid: bytes, session: _Session, connection: int | None, opens: Counter[int]
    ) -> None:
        if session.connection is not None:
            self._by_connection.pop(session.connection, None)
        session.connection = connection
        self._set_opens(session, opens)

    def _set_opens(self, session: _Session, opens: Counter[int]) -> None:
        self._opens -= session.opens
        session.opens = opens
        self._opens += opens

    def disconnected(self, connection: int) -> None:
        """The grace period of its session begins, unless it has a newer connection."""
        uuid = self._by_connection.pop(connection, None)
        session = self._sessions.get(uuid) if uuid is not None else None
        if session is not None and session.connection == connection:
            session.connection = None
            session.detached_at = self._clock.monotonic()

    def expire(self) -> list[int]:
        """Drops sessions whose grace is over; answers with the inodes nobody has open now."""
        oldest = self._clock.monotonic() - SESSION_GRACE_SECONDS
        late = [
            uuid
            for uuid, session in self._sessions.items()
            if session.connection is None and session.detached_at <= oldest
        ]
        released: set[int] = set()
        for uuid in late:
            session = self._sessions.pop(uuid)
            released.update(session.opens)
            self._opens -= session.opens
        return [inode for inode in released if inode not in self._opens]

    # --- files

    def open(self, tx: Tx, inode: int) -> None:
        """Counts one open for the connection's session; a connection that never attached has a
        session of its own that nobody can come back to."""
        session = self._session_of(tx)
        if len(session.opens) >= OPEN_INODES_MAX:
            raise LimitExceeded(detail="open files", limit=OPEN_INODES_MAX)
        session.opens[inode] += 1
        self._opens[inode] += 1
        tx.undo.append(partial(self._drop, session, inode))

    def close(self, tx: Tx, inode: int) -> bool:
        """Whether that was the last open of ``inode`` by anybody."""
        session = self._session_of(tx)
        if session.opens[inode] <= 0:
            return False
        self._drop(session, inode)
        tx.undo.append(partial(self._reopen, session, inode))
        return self._opens[inode] == 0

    def _session_of(self, tx: Tx) -> _Session:
        uuid = self._by_connection.get(tx.connection)
        if uuid is None:
            uuid = self._by_connection[tx.connection] = _anonymous(tx.connection)
        return self._sessions.get(uuid) or self._new(tx, uuid)

    def _drop(self, session: _Session, inode: int) -> None:
        for opens in (session.opens, self._opens):
            opens[inode] -= 1
            if opens[inode] <= 0:
                del opens[inode]

    def _reopen(self, session: _Session, inode: int) -> None:
        session.opens[inode] += 1
        self._opens[inode] += 1

    def may_be_open(self, inode: int) -> bool:
        return self.in_grace or inode in self._opens

    @property
    def in_grace(self) -> bool:
        """Just after the start clients may have files open that they have not told of yet."""
        return self._clock.monotonic() - self._started_at < SESSION_GRACE_SECONDS

    def statistics(self) -> dict[str, int]:
        attached = sum(s.connection is not None for s in self._sessions.values())
        return {
            "sessions": len(self._sessions),
            "sessions_attached": attached,
            "open_inodes": len(self._opens),
        }


def _anonymous(connection: int) -> bytes:
    """Longer than the 16 bytes of every uuid that a client can send."""
    return b"connection %020d" % connection
