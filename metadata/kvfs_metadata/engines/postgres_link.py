"""One connection to PostgreSQL: statements go out together, and no wait for an answer is endless.

Several statements are sent in libpq's pipeline mode and cost one round trip. They are prepared when
a connection first uses them, in the same round trip. The last one of a transaction may be sent
without waiting (``end``): its answer is read before the next.

libpq is used through ``psycopg.pq`` rather than cursors: keys and values are bytes and there is
nothing to convert, and cursors wait for every answer.

Every error of the database becomes one of ours here, or ``Lost``: then the connection is closed,
and what became of the last transaction is unknown.
"""

from __future__ import annotations

import dataclasses
import select
import struct
from collections.abc import Sequence
from typing import NamedTuple

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from kvfs_base.errors import (
    Conflict,
    DiskFull,
    InternalError,
    InvalidRequest,
    KvfsError,
    StoreUnavailable,
    TargetFailed,
)
from kvfs_base.seams import Clock
from kvfs_metadata.limits import (
    POSTGRES_ANSWER_SECONDS,
    POSTGRES_CONNECT_SECONDS,
    POSTGRES_IDLE_SECONDS,
    POSTGRES_LOCK_SECONDS,
    POSTGRES_PATIENCE_SECONDS,
    POSTGRES_SNAPSHOT_SECONDS,
    POSTGRES_STATEMENT_SECONDS,
    POSTGRES_TRANSACTION_SECONDS,
)

Row = tuple[bytes | None, ...]
Rows = list[Row]

BINARY = pq.Format.BINARY
BYTEA_OID = 17


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long the database may take for what; see kvfs_base/limits.py."""

    lock_seconds: float = POSTGRES_LOCK_SECONDS
    statement_seconds: float = POSTGRES_STATEMENT_SECONDS
    idle_seconds: float = POSTGRES_IDLE_SECONDS
    snapshot_seconds: float = POSTGRES_SNAPSHOT_SECONDS
    transaction_seconds: float = POSTGRES_TRANSACTION_SECONDS
    answer_seconds: float = POSTGRES_ANSWER_SECONDS
    connect_seconds: float = POSTGRES_CONNECT_SECONDS
    patience_seconds: float = POSTGRES_PATIENCE_SECONDS


class Statement(NamedTuple):
    name: bytes
    sql: bytes


class Command(NamedTuple):
    statement: Statement
    parameters: tuple[bytes | None, ...] = ()


class Lost(Exception):
    """The connection is gone, and with it the transaction, if it was not committed."""


def int8(number: int) -> bytes:
    return number.to_bytes(8, "big", signed=True)


def int8_of(value: bytes | None) -> int:
    assert value is not None
    return int.from_bytes(value, "big", signed=True)


def bytea_array(values: Sequence[bytes]) -> bytes:
    """PostgreSQL's binary form of a ``bytea[]``."""
    parts = [struct.pack(">iiiii", 1, 0, BYTEA_OID, len(values), 1)]
    for value in values:
        parts.append(len(value).to_bytes(4, "big"))
        parts.append(value)
    return b"".join(parts)


class Link:
    """Connects when it is first used and again after it was lost. One thread at a time."""

    def __init__(
        self, clock: Clock, url: str, patience: Patience, settings: dict[str, str]
    ) -> None:
        self._clock = clock
        self._patience = patience
        self._settings = {
            "statement_timeout": _milliseconds(patience.statement_seconds),
            "lock_timeout": _milliseconds(patience.lock_seconds),
            **settings,
        }
        self._target = _conninfo(url, patience)
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        self._prepared: set[bytes] = set()
        self._owed: list[list[bytes | None]] = []
        self.in_transaction = False

    @property
    def connected(self) -> bool:
        return self._connection is not None

    # --- connecting

    def connect(self) -> None:
        """Raises Lost."""
        try:
            self._connection = psycopg.Connection.connect(self._target, autocommit=True)
        except psycopg.Error as exc:
            raise Lost(_one_line(exc)) from exc
        self._connection.pgconn.nonblocking = 1
        self._connection.pgconn.enter_pipeline_mode()
        settings = dict(self._settings)
        if self._connection.info.server_version < 170000:
            settings.pop("transaction_timeout", None)
        commands = [Command(SET, (k.encode(), v.encode())) for k, v in settings.items()]
        try:
            self.round(commands)
        except KvfsError:
            self.close()
            raise

    def close(self) -> None:
        connection, self._connection = self._connection, None
        self._prepared.clear()
        self._owed.clear()
        self.in_transaction = False
        if connection is not None:
            connection.close()

    # --- statements

    def round(self, commands: Sequence[Command]) -> list[Rows]:
        """The rows of each command. If one fails those after it are not carried out, and its error
        is raised. Raises Lost."""
        try:
            self._read_owed()
            return self._collect(self._send(commands))
        except KvfsError:
            raise
        except psycopg.Error as exc:
            self.close()
            raise Lost(_one_line(exc)) from exc
        except BaseException:
            self.close()  # also an interrupt: answers that nobody read would be taken for others
            raise

    def begin(self, statement: Statement, commands: Sequence[Command]) -> list[Rows]:
        """``round`` at the start of a transaction. If it raises there is none."""
        if not self.connected:
            self.connect()
        self.in_transaction = True
        try:
            return self.round([Command(statement), *commands])[1:]
        except KvfsError:
            self.end()
            raise

    def commit(self, commands: Sequence[Command] = ()) -> None:
        """The last ``commands`` of a transaction and its end. If it raises, nothing was written,
        except that after Lost nobody knows."""
        try:
            self.round([*commands, Command(COMMIT)])
        except KvfsError:
            self.end()
            raise
        self.in_transaction = False

    def end(self) -> None:
        """Rolls a transaction back, without waiting: nobody needs the answer."""
        if not self.in_transaction:
            return
        self.in_transaction = False
        try:
            self._owed.append(self._send([Command(ROLLBACK)]))
            self._pgconn.flush()
        except (psycopg.Error, Lost):
            self.close()  # which rolls back as well

    @property
    def _pgconn(self) -> pq.abc.PGconn:
        if self._connection is None:
            raise Lost("not connected")
        return self._connection.pgconn

    def _read_owed(self) -> None:
        while self._owed:
            try:
                self._collect(self._owed.pop(0))
            except KvfsError:
                pass  # without a transaction there is nothing to roll back

    def _send(self, commands: Sequence[Command]) -> list[bytes | None]:
        """What the answers will be for: a statement to be prepared, or None."""
        pgconn = self._pgconn
        sent: list[bytes | None] = []
        for (name, sql), parameters in commands:
            formats = [BINARY] * len(parameters)
            if name == b"":
                pgconn.send_query_params(sql, parameters, None, formats, BINARY)
                sent.append(None)
                continue
            if name not in self._prepared and name not in sent:
                pgconn.send_prepare(name, sql)
                sent.append(name)
            pgconn.send_query_prepared(name, parameters, formats, BINARY)
            sent.append(None)
        pgconn.pipeline_sync()
        return sent

    def _collect(self, sent: Sequence[bytes | None]) -> list[Rows]:
        pgconn = self._pgconn
        deadline = self._clock.monotonic() + self._patience.answer_seconds
        found: list[Rows] = []
        error: KvfsError | None = None
        place = 0
        while True:
            self._wait(pgconn, deadline)
            result = pgconn.get_result()
            if result is None:
                if pgconn.status == pq.ConnStatus.BAD:
                    raise Lost(_text(pgconn.error_message))
                continue  # the end of one answer
            status = result.status
            if status == pq.ExecStatus.PIPELINE_SYNC:
                break
            if status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                name = sent[place]
                if name is None:
                    found.append(_rows(result))
                else:
                    self._prepared.add(name)
            elif status != pq.ExecStatus.PIPELINE_ABORTED:
                error = _error(result)
            place += 1
        if error is not None:
            raise error
        return found

    def _wait(self, pgconn: pq.abc.PGconn, deadline: float) -> None:
        """Returns when ``get_result`` would not block."""
        while True:
            unsent = pgconn.flush()
            if not pgconn.is_busy():
                return
            poll = select.poll()
            poll.register(pgconn.socket, select.POLLIN | (select.POLLOUT if unsent else 0))
            left = max(0.0, deadline - self._clock.monotonic())
            ready = poll.poll(left * 1000)
            if not ready and self._clock.monotonic() >= deadline:
                raise Lost(f"no answer for {self._patience.answer_seconds:g} s")
            pgconn.consume_input()


COMMIT = Statement(b"commit", b"COMMIT")
ROLLBACK = Statement(b"rollback", b"ROLLBACK")
SET = Statement(b"", b"SELECT set_config($1, $2, false)")


def _conninfo(url: str, patience: Patience) -> str:
    """Raises InvalidRequest."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.Error as exc:
        raise InvalidRequest(detail=f"not the URL of a database: {_one_line(exc)}") from exc
    parameters = {
        "application_name": "kvfs",
        # Of several hosts the one that takes writes; after a failover it is another one.
        "target_session_attrs": "read-write",
        "connect_timeout": max(2, round(patience.connect_seconds)),
        "tcp_user_timeout": _milliseconds(patience.answer_seconds),
        "keepalives_idle": max(1, round(patience.idle_seconds)),
        "keepalives_interval": max(1, round(patience.idle_seconds)),
        "keepalives_count": 2,
        **{name: value for name, value in given.items() if value is not None},
    }
    return make_conninfo("", **parameters)


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


def _rows(result: pq.abc.PGresult) -> Rows:
    get = result.get_value
    columns = range(result.nfields)
    return [tuple([get(row, column) for column in columns]) for row in range(result.ntuples)]


def _error(result: pq.abc.PGresult) -> KvfsError:
    """Raises Lost for what ends the connection."""
    state = _text(result.error_field(pq.DiagnosticField.SQLSTATE))
    message = _text(result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
    severity = result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED)
    detail = f"{message or _text(result.error_message)} ({state or 'no answer'})"
    # 25006: this host was made read-only, another one is the primary now.
    if severity in (b"FATAL", b"PANIC") or not state or state[:2] == "08" or state == "25006":
        raise Lost(detail)
    return error_for(state, detail)


def error_for(state: str, detail: str) -> KvfsError:
    """The error for an SQLSTATE of PostgreSQL (appendix A of its manual)."""
    # 23505: somebody else made this version; only where locks do not hold what they promise.
    if state in ("40001", "40P01", "23505"):
        return Conflict(detail=detail)
    if state == "53100":
        return DiskFull(path=f"PostgreSQL: {detail}")
    if state[:2] == "58" or state in ("XX001", "XX002"):
        return TargetFailed(detail=f"PostgreSQL: {detail}")
    # Too slow, too busy, shutting down, or a transaction that failed before.
    if state[:2] in ("53", "55", "57") or state in ("25P02", "25P03"):
        return StoreUnavailable(detail=detail)
    return InternalError(detail=f"PostgreSQL: {detail}")


def _text(value: bytes | None) -> str:
    return "" if value is None else " ".join(value.decode(errors="replace").split())


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())


__all__ = [
    "Command",
    "Link",
    "Lost",
    "Patience",
    "Rows",
    "Statement",
    "bytea_array",
    "error_for",
    "int8",
    "int8_of",
]
