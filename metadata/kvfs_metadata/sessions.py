"""Who has which files open.

A session is a client's, not a connection's: after a reconnect the client names it again and says
what it has open. A session keeps its files for SESSION_GRACE_SECONDS after its connection broke, or
after it was last heard of: a host that lost its power closes no connection.

On a store of its own a server does not record sessions: each open would cost a write. After a
restart every unlinked file counts as open for the grace period, until the clients have come back
and said what they need. On a shared store sessions are recorded (``SESS``, with the server that has
them, and ``OPEN``), so that each server knows what is open anywhere. A session whose server is not
heard of any more has its grace period to come back to another one. Only its own server, or after
that any other, gives a session up.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

from kvfs_base.errors import LimitExceeded, ServerBusy
from kvfs_base.seams import Clock
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, Writes, scan
from kvfs_metadata.limits import (
    OPEN_INODES_MAX,
    SERVER_LEASE_SECONDS,
    SESSION_GRACE_SECONDS,
    SESSION_SILENT_SECONDS,
    SESSIONS_MAX,
)
from kvfs_metadata.messages import Attach
from kvfs_metadata.records import ServerRecord
from kvfs_metadata.transaction import Tx
from kvfs_metadata.writers import Writers


@dataclasses.dataclass(slots=True)
class _Session:
    server: bytes
    connection: int | None
    """None if it has none, or has it at another server."""
    heard_at: float
    """When it had a connection for the last time, or was heard of on it."""
    number: int = 0
    """Of its connection: they are counted by the client."""
    name: str = ""
    """As its client calls it; not known of sessions of other servers."""
    opens: Counter[int] = dataclasses.field(default_factory=Counter)


class Sessions:
    """``server`` is this server's number; ``recorded`` if the store is shared with others.
    ``opened`` is told, in the same transaction, what somebody opens."""

    def __init__(
        self,
        clock: Clock,
        server: bytes,
        *,
        recorded: bool,
        opened: Callable[[Tx, int], None] = lambda tx, inode: None,
    ) -> None:
        self._clock = clock
        self._opened = opened
        self._server = server
        self._recorded = recorded
        self._started_at = clock.monotonic()
        self._sessions: dict[bytes, _Session] = {}
        self._by_connection: dict[int, bytes] = {}
        self._writers = Writers(shared=recorded)
        self._holders: Counter[int] = Counter()
        """How many sessions have an inode open."""
        self._servers: dict[bytes, float] = {}
        """When each other server was heard of."""
        self._beats = 0
        self._held = 0

    # --- the store

    def load(self, read: KVRead) -> None:
        """What other servers recorded. Connections of this server stay what they are."""
        if not self._recorded:
            self._writers.load(read)
            return
        self._writers.clear()
        connections = {uuid: s for uuid, s in self._sessions.items() if s.connection is not None}
        self._sessions.clear()
        self._holders.clear()
        for prefix in (records.SERVER, records.SESSION, records.OPEN):
            self.apply(dict(scan(read, prefix)))
        for uuid, session in connections.items():
            found = self._sessions.get(uuid)
            if found is not None and found.server == self._server:
                found.connection, found.heard_at = session.connection, session.heard_at

    def apply(self, writes: Writes) -> None:
        """Another server committed ``writes``."""
        now = self._clock.monotonic()
        gone: list[bytes] = []
        for key, value in writes.items():
            if key.startswith(records.SESSION):
                if value is None:
                    gone.append(key[4:])
                else:
                    self._belongs_to(key[4:], *records.unpack_session(value), now)
            elif key.startswith(records.SERVER):
                # One that said goodbye is as good as one whose lease is over.
                self._servers[key[4:]] = now if value is not None else now - SERVER_LEASE_SECONDS
        for key, value in writes.items():
            if key.startswith(records.OPEN):
                self._opened_elsewhere(records.number_at(key), key[12:], value)
        for uuid in gone:
            self._writers.forget(uuid)
            session = self._sessions.pop(uuid, None)
            if session is not None:
                self._swap_opens(session, Counter())

    def _belongs_to(self, uuid: bytes, server: bytes, number: int, now: float) -> None:
        session = self._sessions.get(uuid)
        if session is None:
            session = self._sessions[uuid] = _Session(server, None, now)
        if server != self._server:
            self._servers.setdefault(server, now)
            if session.connection is not None:
                self._by_connection.pop(session.connection, None)
                session.connection = None
        session.server, session.number = server, number

    def _opened_elsewhere(self, inode: int, uuid: bytes, value: bytes | None) -> None:
        session = self._sessions.get(uuid)
        if session is None:
            return
        self._writers.told(inode, uuid, value)
        if (inode in session.opens) == (value is not None):
            return
        if value is not None:
            session.opens[inode] = 1
            self._holders[inode] += 1
        else:
            del session.opens[inode]
            self._forget_holder(inode)

    def beat(self, tx: Tx, addresses: tuple[str, ...]) -> None:
        """Tells the other servers that this one is alive."""
        self._beats += 1
        record = ServerRecord(self._beats, addresses)
        tx.kv.put(records.server_key(self._server), records.encode(record))

    def goodbye(self, tx: Tx) -> None:
        """The server ends; its sessions go on elsewhere."""
        if self._recorded:
            tx.kv.delete(records.server_key(self._server))

    # --- connections

    def attach(self, tx: Tx, request: Attach) -> None:
        """Connection ``tx.connection``, the session's ``number``-th, speaks for the session from
        now on, exactly ``open_inodes`` are open, and it may write to ``written_inodes`` of them.
        Nothing happens if the session has gone
        on to a later connection: this request lay in a queue."""
        uuid, number = request.session, request.number
        session = self._sessions.get(uuid)
        if session is None:
            session = self._new(tx, uuid)
        if number < session.number:
            return
        if self._by_connection.get(tx.connection, uuid) != uuid:
            self.disconnected(tx.connection)  # it spoke for another session until now
        before = session.opens
        tx.undo.append(partial(self._restore, session, dataclasses.replace(session)))
        session.connection = tx.connection
        session.heard_at = self._clock.monotonic()
        session.name = request.name
        self._by_connection[tx.connection] = uuid
        if (session.server, session.number) != (self._server, number):
            session.server, session.number = self._server, number
            self._record(tx, uuid, session)
        opens = Counter(request.open_inodes)
        self._set_opens(tx, uuid, session, opens)
        self._writers.replace(tx, uuid, opens.keys() & set(request.written_inodes))
        released = [inode for inode in before if inode not in self._holders]
        if released:
            self._hold(tx, released)

    def _set_opens(self, tx: Tx, uuid: bytes, session: _Session, opens: Counter[int]) -> None:
        before = session.opens
        tx.undo.append(partial(self._swap_opens, session, before))
        self._swap_opens(session, opens)
        for inode in opens:
            if inode not in before:
                self._opened(tx, inode)
        if self._recorded:
            for inode in before.keys() - opens.keys():
                tx.kv.delete(records.open_key(inode, uuid))
            for inode in opens.keys() - before.keys():
                tx.kv.put(records.open_key(inode, uuid), b"")

    def _hold(self, tx: Tx, released: list[int]) -> None:
        """The answer that said one of these is open may be lost, and the request that opens it be
        repeated. Until then, for the grace period, a session that nobody speaks for has them."""
        self._held += 1
        uuid = self._server + b"held" + records.u64(self._held)
        session = self._new(tx, uuid)
        session.connection = None
        self._set_opens(tx, uuid, session, Counter(released))

    def _new(self, tx: Tx, uuid: bytes) -> _Session:
        if len(self._sessions) >= SESSIONS_MAX:
            raise ServerBusy(detail=f"{SESSIONS_MAX} sessions")
        session = _Session(self._server, tx.connection, self._clock.monotonic())
        self._sessions[uuid] = session
        tx.undo.append(partial(self._forget, uuid))
        self._record(tx, uuid, session)
        return session

    def _record(self, tx: Tx, uuid: bytes, session: _Session) -> None:
        if self._recorded:
            value = records.pack_session(session.server, session.number)
            tx.kv.put(records.session_key(uuid), value)

    def _forget(self, uuid: bytes) -> None:
        del self._sessions[uuid]

    def _restore(self, session: _Session, before: _Session) -> None:
        if session.connection is not None and session.connection != before.connection:
            self._by_connection.pop(session.connection, None)
        session.server, session.number = before.server, before.number
        session.connection = before.connection

    def _swap_opens(self, session: _Session, opens: Counter[int]) -> None:
        for inode in session.opens:
            self._forget_holder(inode)
        session.opens = opens
        self._holders.update(opens.keys())

    def _forget_holder(self, inode: int) -> None:
        left = self._holders.pop(inode, 0) - 1
        if left > 0:
            self._holders[inode] = left

    def heard(self, connection: int) -> None:
        """Something came over a connection."""
        uuid = self._by_connection.get(connection)
        session = self._sessions.get(uuid) if uuid is not None else None
        if session is not None:
            session.heard_at = self._clock.monotonic()

    def stood_still(self, seconds: float) -> None:
        """This server did nothing for so long: it cannot tell who was silent."""
        now = self._clock.monotonic()
        self._started_at = min(now, self._started_at + seconds)
        for session in self._sessions.values():
            session.heard_at = min(now, session.heard_at + seconds)
        for server, heard_at in self._servers.items():
            self._servers[server] = min(now, heard_at + seconds)

    def disconnected(self, connection: int) -> None:
        """The grace period of its session begins, unless it has a newer connection."""
        uuid = self._by_connection.pop(connection, None)
        session = self._sessions.get(uuid) if uuid is not None else None
        if session is not None and session.connection == connection:
            session.connection = None
            session.heard_at = self._clock.monotonic()

    def _late(self) -> list[bytes]:
        """Sessions whose grace is over."""
        now = self._clock.monotonic()
        oldest = now - SESSION_GRACE_SECONDS
        oldest_server = oldest - SERVER_LEASE_SECONDS
        return [
            uuid
            for uuid, session in self._sessions.items()
            if (
                session.heard_at <= oldest
                if session.server == self._server
                else self._servers.get(session.server, now) <= oldest_server
            )
        ]

    def has_late(self) -> bool:
        return bool(self._late()) or (bool(self._writers.expected) and not self.in_grace)

    def expire(self, tx: Tx) -> list[int]:
        """Drops sessions whose grace is over; answers with the inodes nobody has open now."""
        released: set[int] = set()
        if not self.in_grace:
            self._writers.expect_no_more(tx)
        for uuid in self._late():
            self._writers.gone(tx, uuid)
            session = self._sessions.pop(uuid)
            opens = session.opens
            released.update(opens)
            self._swap_opens(session, Counter())
            tx.undo.append(partial(self._sessions.__setitem__, uuid, session))
            tx.undo.append(partial(self._swap_opens, session, opens))
            if self._recorded:
                tx.kv.delete(records.session_key(uuid))
                for inode in opens:
                    tx.kv.delete(records.open_key(inode, uuid))
        return [inode for inode in released if inode not in self._holders]

    # --- files

    def open(self, tx: Tx, inode: int, *, writes: bool = False) -> None:
        """Counts one open for the connection's session; a connection that never attached has a
        session of its own that nobody can come back to. ``writes``: it may write to the file.
        Raises TailBusy."""
        uuid, session = self._session_of(tx)
        if session.connection != tx.connection:
            return  # nobody reads the answer: the session went on to another connection
        if len(session.opens) >= OPEN_INODES_MAX:
            raise LimitExceeded(detail="open files", limit=OPEN_INODES_MAX)
        if self._recorded and inode not in session.opens:
            tx.kv.put(records.open_key(inode, uuid), b"")
        if writes:
            self._writers.begin(tx, uuid, inode)
        self._reopen(session, inode)
        tx.undo.append(partial(self._drop, session, inode))
        self._opened(tx, inode)

    def close(self, tx: Tx, inode: int) -> bool:
        """Whether that was the last open of ``inode`` by anybody."""
        uuid, session = self._session_of(tx)
        if inode not in session.opens or session.connection != tx.connection:
            return False
        self._drop(session, inode)
        tx.undo.append(partial(self._reopen, session, inode))
        if inode not in session.opens:
            self._writers.end(tx, uuid, inode)
            if self._recorded:
                tx.kv.delete(records.open_key(inode, uuid))
        return inode not in self._holders

    def begin_cut(self, tx: Tx, inode: int) -> tuple[bool, bool]:
        """``may_cut`` and ``is_open`` of Tail, for the connection's session."""
        uuid, session = self._session_of(tx)
        if session.connection != tx.connection or not self._writers.may_write(uuid, inode):
            return False, False
        others = self._writers.others(uuid, inode)
        if any(self._is_living(self._sessions[other]) for other in others):
            return False, False
        if others or self._writers.expected:
            return False, True
        self._writers.begin_cut(tx, uuid, inode)
        return True, False

    def writes_alone(self, tx: Tx, inode: int) -> bool:
        """Whether the connection's session may write to the file, and nobody else for certain."""
        uuid, session = self._session_of(tx)
        writes = session.connection == tx.connection and self._writers.may_write(uuid, inode)
        return writes and not (self._writers.expected or self._writers.others(uuid, inode))

    def end_cut(self, tx: Tx, inode: int) -> None:
        uuid, session = self._session_of(tx)
        if session.connection == tx.connection:
            self._writers.end_cut(tx, uuid, inode)

    def _is_living(self, session: _Session) -> bool:
        """It was heard of lately. Of one at another server this is not known: so as long as that
        server is there."""
        if session.server != self._server:
            return self.is_alive(session.server)
        oldest = self._clock.monotonic() - SESSION_SILENT_SECONDS
        return session.connection is not None and session.heard_at > oldest

    def has_open(self, tx: Tx, inode: int) -> bool:
        """Whether the connection's session has it open."""
        return inode in self._session_of(tx)[1].opens

    def speaker(self, tx: Tx) -> bytes | None:
        """The session that the connection speaks for; None if it has gone on to another one, and
        nobody reads the answer."""
        uuid, session = self._session_of(tx)
        return uuid if session.connection == tx.connection else None

    def speaker_without(self, tx: Tx, inode: int) -> bytes | None:
        """The same, if that session does not have ``inode`` open."""
        uuid, session = self._session_of(tx)
        speaks = session.connection == tx.connection and inode not in session.opens
        return uuid if speaks else None

    def session_on(self, connection: int) -> bytes:
        """Its session without a transaction, for what changes nothing."""
        return self._by_connection.get(connection) or self._anonymous(connection)

    def is_known(self, uuid: bytes) -> bool:
        return uuid in self._sessions

    def _session_of(self, tx: Tx) -> tuple[bytes, _Session]:
        uuid = self._by_connection.get(tx.connection)
        if uuid is None:
            uuid = self._by_connection[tx.connection] = self._anonymous(tx.connection)
        return uuid, self._sessions.get(uuid) or self._new(tx, uuid)

    def _anonymous(self, connection: int) -> bytes:
        """Longer than the 16 bytes of every uuid that a client can send."""
        return self._server + records.u64(connection)

    def _drop(self, session: _Session, inode: int) -> None:
        left = session.opens.pop(inode, 0) - 1
        if left > 0:
            session.opens[inode] = left
        else:
            self._forget_holder(inode)

    def _reopen(self, session: _Session, inode: int) -> None:
        count = session.opens.get(inode, 0) + 1
        session.opens[inode] = count
        if count == 1:
            self._holders[inode] = self._holders.get(inode, 0) + 1

    def may_be_open(self, inode: int) -> bool:
        return self.in_grace or inode in self._holders

    def holders(self, inode: int, count_max: int) -> list[str]:
        """Who has a file open."""
        if inode not in self._holders:
            return []
        found = (
            session.name or f"session {uuid.hex()[:8]}"
            for uuid, session in self._sessions.items()
            if inode in session.opens
        )
        return list(itertools.islice(found, count_max))

    @property
    def in_grace(self) -> bool:
        """Just after the start clients may have files open that they have not told of yet."""
        if self._recorded:
            return False
        return self._clock.monotonic() - self._started_at < SESSION_GRACE_SECONDS

    def is_alive(self, server: bytes) -> bool:
        """Whether this is the server, or it was heard of within its lease."""
        oldest = self._clock.monotonic() - SERVER_LEASE_SECONDS
        return server == self._server or self._servers.get(server, oldest) > oldest

    def statistics(self) -> dict[str, int]:
        attached = sum(s.connection is not None for s in self._sessions.values())
        oldest = self._clock.monotonic() - SERVER_LEASE_SECONDS
        return {
            "sessions": len(self._sessions),
            "sessions_attached": attached,
            "open_inodes": len(self._holders),
            "servers": 1 + sum(heard_at > oldest for heard_at in self._servers.values()),
        }
