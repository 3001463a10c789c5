"""The engine that many servers share: one PostgreSQL database.

The tables are described in ``engines.postgres_schema``, the argument why this is correct in
``docs/design/0003-many-servers.md``. In short: whoever commits has locked the row of ``turn``, so
the commits of all servers have one order; each leaves its writes in ``log``; before ``run`` and
``view`` call anything they read the log from the last commit seen.

Locks: ``_memory`` is held while what this process keeps beside the store (the listener's memory,
the cache, the state seen) is looked at or changed, so from the snapshot of a view to its end, and
in ``run`` from when the row is locked to the last function. It is never held while the row is
waited for. A commit of this process becomes visible to its own views before its answer arrives:
its token is known as pending, so it is not taken for somebody else's. From ``run`` on memory has
what a group changed. If the row was lost (this process stood still, the database went down) others
may commit although the group is neither written nor taken back: views then fail until it is, since
memory can follow the others only from the state before the group.

Round trips: ``view`` one, ``run`` one, ``commit`` one, and one for each question that the cache
cannot answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from kvfs_base.errors import Conflict, InternalError, KvfsError, StoreUnavailable
from kvfs_base.seams import Env
from kvfs_metadata.engines import postgres_schema
from kvfs_metadata.engines.engine import (
    Group,
    Item,
    KVEngine,
    KVRead,
    KVTransaction,
    Listener,
    Writes,
    run_group,
    scan_all,
)
from kvfs_metadata.engines.lmdb_engine import write_environment
from kvfs_metadata.engines.postgres_link import (
    Command,
    Link,
    Lost,
    Patience,
    Rows,
    Statement,
    bytea_array,
    int8,
    int8_of,
)
from kvfs_metadata.engines.value_cache import UNKNOWN, ValueCache
from kvfs_metadata.limits import (
    POSTGRES_CACHE_BYTES,
    POSTGRES_LOG_BYTES_MAX,
    POSTGRES_LOG_ENTRY_BYTES_MAX,
    POSTGRES_LOG_VERSIONS_MAX,
    POSTGRES_RETRIES,
    POSTGRES_ROUND_BYTES,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_PAUSE_SECONDS = 0.05
TOKEN_BYTES = 16

# What is read after the row is locked must be newer than the wait for it.
BEGIN_WRITE = Statement(b"begin_write", b"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
BEGIN_READ = Statement(b"begin_read", b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
LOCK = Statement(b"lock", b"SELECT one FROM kvfs_metadata.turn WHERE one = 1 FOR UPDATE")
LOOK = Statement(
    b"look",
    b"SELECT version, token, log_start, log_bytes FROM kvfs_metadata.log "
    b"ORDER BY version DESC LIMIT 1",
)
# From the state seen on, or nothing if the log does not have that any more.
READ_LOG = Statement(
    b"read_log",
    b"SELECT version, token, CASE WHEN version > $1::bigint THEN writes END "
    b"FROM kvfs_metadata.log WHERE version >= $1::bigint AND EXISTS "
    b"(SELECT 1 FROM kvfs_metadata.log WHERE version = $1::bigint AND token = $2::bytea) "
    b"ORDER BY version",
)
FIND_COMMIT = Statement(
    b"find_commit",
    b"SELECT 1 FROM kvfs_metadata.log WHERE version = $1::bigint AND token = $2::bytea",
)
GET = Statement(b"get", b"SELECT value FROM kvfs_metadata.items WHERE key = $1::bytea")
GET_MANY = Statement(
    b"get_many", b"SELECT key, value FROM kvfs_metadata.items WHERE key = ANY($1::bytea[])"
)
RANGE_SQL = (
    b"SELECT key, value FROM kvfs_metadata.items WHERE key >= $1::bytea AND key < $2::bytea "
    b"ORDER BY key "
)
RANGE_UP = Statement(b"range_up", RANGE_SQL + b"LIMIT $3::bigint")
RANGE_DOWN = Statement(b"range_down", RANGE_SQL + b"DESC LIMIT $3::bigint")
PUT = Statement(
    b"put",
    b"INSERT INTO kvfs_metadata.items (key, value) "
    b"SELECT key, value FROM unnest($1::bytea[], $2::bytea[]) AS new (key, value) "
    b"ON CONFLICT (key) DO UPDATE SET value = excluded.value",
)
DELETE = Statement(b"delete", b"DELETE FROM kvfs_metadata.items WHERE key = ANY($1::bytea[])")
ADD_LOG = Statement(
    b"add_log",
    b"INSERT INTO kvfs_metadata.log (version, token, log_start, log_bytes, size, writes) "
    b"VALUES ($1::bigint, $2::bytea, $3::bigint, $4::bigint, $5::bigint, $6::bytea)",
)
# From which version on the log holds at most so many commits and bytes.
FIND_CUT = Statement(
    b"find_cut",
    b"SELECT coalesce(min(version), 0)::bigint, coalesce(sum(size), 0)::bigint FROM "
    b"(SELECT version, size, sum(size) OVER (ORDER BY version DESC) AS newer "
    b"FROM kvfs_metadata.log WHERE version > $1::bigint) AS sums WHERE newer <= $2::bigint",
)
CUT_LOG = Statement(b"cut_log", b"DELETE FROM kvfs_metadata.log WHERE version < $1::bigint")
COMMIT_SYNCED = Statement(b"commit_synced", b"SELECT set_config('synchronous_commit', 'on', true)")
SYNC = Statement(b"sync", b"UPDATE kvfs_metadata.synced SET number = number + 1 WHERE one = 1")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[bytes, bytes | None]).decode


class State(NamedTuple):
    """Names one state of the store."""

    version: int
    token: bytes


class Head(NamedTuple):
    state: State
    log_start: int
    log_bytes: int


class Entry(NamedTuple):
    state: State
    writes: bytes | None


class Step(NamedTuple):
    state: State
    writes: Writes


class Reads:
    """KVRead inside one transaction. What the database could not answer raises StoreUnavailable,
    here and again in ``check``: the function that asked may have taken it for its own result."""

    __slots__ = ("_cache", "_failure", "_link")

    def __init__(self, link: Link, cache: ValueCache) -> None:
        self._link = link
        self._cache = cache
        self._failure: KvfsError | None = None

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _ask(self, command: Command) -> Rows:
        self.check()
        try:
            return self._link.round([command])[0]
        except Lost as exc:
            self._failure = StoreUnavailable(detail=str(exc))
        except KvfsError as exc:
            self._failure = exc
        raise self._failure

    def get(self, key: bytes) -> bytes | None:
        found = self._cache.get(key)
        if found is None or isinstance(found, bytes):
            return found
        rows = self._ask(Command(GET, (key,)))
        value = rows[0][0] if rows else None
        self._cache.put(key, value)
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found = {key: self._cache.get(key) for key in keys}
        missing = [key for key, value in found.items() if value is UNKNOWN]
        if missing:
            rows = self._ask(Command(GET_MANY, (bytea_array(missing),)))
            values = dict.fromkeys(missing) | dict(_items(rows))
            for key in missing:
                self._cache.put(key, values[key])
            found.update(values)
        return [value if isinstance(value, bytes) else None for value in map(found.get, keys)]

    def range(self, start: bytes, end: bytes, limit: int, reverse: bool = False) -> list[Item]:
        if limit <= 0 or start >= end:
            return []
        statement = RANGE_DOWN if reverse else RANGE_UP
        return _items(self._ask(Command(statement, (start, end, int8(limit)))))


def _items(rows: Rows) -> list[Item]:
    return [(key or b"", value or b"") for key, value in rows]


class PostgresEngine(KVEngine):
    """A share of the store in the database ``url`` (libpq's URL or ``key=value`` form; several
    hosts are tried in turn), which is made if it is missing. ``durability``: with "strict" a commit
    is on the database's stable storage before it returns; with "cache" that takes until ``sync``.

    Raises InvalidRequest for a malformed URL, StoreUnavailable if the database cannot be reached
    for ``patience.patience_seconds``, VersionMismatch if its tables are another version's,
    EntryNotFound if it has none and ``create`` is false."""

    shared = True

    def __init__(
        self,
        env: Env,
        url: str,
        *,
        durability: str = "cache",
        create: bool = True,
        patience: Patience | None = None,
        cache_bytes: int = POSTGRES_CACHE_BYTES,
        log_versions_max: int = POSTGRES_LOG_VERSIONS_MAX,
    ) -> None:
        patience = patience or Patience()
        self._clock = env.clock
        self._rng = env.rng
        self._patience_seconds = patience.patience_seconds
        self._log_versions_max = log_versions_max
        writing = {
            "synchronous_commit": "on" if durability == "strict" else "off",
            "idle_in_transaction_session_timeout": f"{patience.idle_seconds:g}s",
            "transaction_timeout": f"{patience.transaction_seconds:g}s",
        }
        reading = {"idle_in_transaction_session_timeout": f"{patience.snapshot_seconds:g}s"}
        self._writer = Link(env.clock, url, patience, writing)
        self._reader = Link(env.clock, url, patience, reading)
        self._syncer = Link(env.clock, url, patience, {"synchronous_commit": "on"})
        self._sync_lock = threading.Lock()
        self._memory = threading.Lock()
        self._closed = threading.Event()
        self._listener: Listener | None = None
        self._cache = ValueCache(cache_bytes)
        self._seen: State | None = None
        self._turn: Head | None = None
        self._undecided = False
        self._pending: State | None = None
        self._pending_seen = False
        try:
            self._again(lambda: self._prepare(create))
        except BaseException:
            self.close()
            raise

    def _prepare(self, create: bool) -> None:
        if not self._writer.connected:
            self._writer.connect()
        postgres_schema.prepare(self._writer, self._rng.randbytes(TOKEN_BYTES), create=create)

    def _again(self, attempt: Callable[[], T]) -> T:
        """The result of ``attempt``, which has no effect when it fails: lost connections and lost
        races are tried again, for a bounded time and number."""
        deadline = self._clock.monotonic() + self._patience_seconds
        conflicts = 0
        while True:
            try:
                return attempt()
            except Lost as exc:
                # Only events can be waited for here, and this one ends the wait at the right time.
                if self._clock.monotonic() >= deadline or self._closed.wait(RETRY_PAUSE_SECONDS):
                    raise StoreUnavailable(detail=str(exc)) from exc
            except Conflict:
                conflicts += 1
                if conflicts == POSTGRES_RETRIES:
                    raise

    # --- following the others

    def listen(self, listener: Listener) -> None:
        with self._memory:
            self._listener = listener
            self._forget()

    def _forget(self) -> None:
        self._seen = None
        self._cache.clear()

    def _look(self, link: Link, begin: Statement, *locks: Command) -> tuple[Head, list[Entry]]:
        """Begins a transaction and takes ``locks``; its head, and the log from the state seen."""
        commands = [*locks, Command(LOOK)]
        seen = self._seen
        if seen is not None:
            commands.append(Command(READ_LOG, (int8(seen.version), seen.token)))
        (head,), *logs = link.begin(begin, commands)[len(locks) :]
        entries = [
            Entry(State(int8_of(version), token or b""), writes)
            for rows in logs
            for version, token, writes in rows
        ]
        state = State(int8_of(head[0]), head[1] or b"")
        return Head(state, int8_of(head[2]), int8_of(head[3])), entries

    def _catch_up(self, head: Head, entries: list[Entry], read: KVRead) -> None:
        """Brings cache and listener to the state of ``head``; with the memory lock."""
        if self._seen is None:
            self._seen = head.state
            return
        steps = self._steps(entries)
        if self._undecided and (steps is None or (steps and steps[0].state != self._pending)):
            raise StoreUnavailable(detail="a group lost its turn and is not taken back yet")
        if steps is None:
            self._reload(head, read)
            return
        # All of them before anybody reads: what is kept and the snapshot are of the newest state.
        for entry in steps:
            self._cache.apply(entry.writes, own=entry.state == self._pending)
        for entry in steps:
            own = entry.state == self._pending
            if not own and self._listener is not None:
                self._listener(read, entry.writes)
            self._seen = entry.state
            if own:
                self._pending_seen, self._undecided = True, False

    def _steps(self, entries: list[Entry]) -> list[Step] | None:
        """What was committed since the state seen, or None if the log does not tell: it was cut,
        or the database lost that state (a crash without syncs, a failover) and went on."""
        assert self._seen is not None
        # Views may have caught up while the row was waited for.
        since = [entry for entry in entries if entry.state.version >= self._seen.version]
        if not since or since[0].state != self._seen:
            return None
        steps = [Step(state, _decode(writes)) for state, writes in since[1:] if writes is not None]
        return steps if len(steps) == len(since) - 1 else None

    def _reload(self, head: Head, read: KVRead) -> None:
        self._cache.clear()
        if self._listener is not None:
            log.info("everything is loaded anew: the log does not tell what happened")
            self._listener(read, None)
        self._seen = head.state

    # --- reading

    def view(self, fn: Callable[[KVRead], T]) -> T:
        with self._memory:
            try:
                head, entries = self._again(lambda: self._look(self._reader, BEGIN_READ))
                reads = Reads(self._reader, self._cache)
                self._catch_up(head, entries, reads)
                result = fn(reads)
                reads.check()
                return result
            finally:
                self._reader.end()

    # --- writing

    def run(self, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
        self._undecided = False  # whoever begins another group is done with the one before
        try:
            head, entries = self._take_turn()
            with self._memory:
                reads = Reads(self._writer, self._cache)
                self._catch_up(head, entries, reads)
                group = run_group(reads, fns)
                self._undecided = True
            reads.check()
        except BaseException:
            self.abandon(None)
            raise
        self._turn = head
        return group

    def _take_turn(self) -> tuple[Head, list[Entry]]:
        """Locks the row, with the state seen not far behind it."""
        for attempt in range(POSTGRES_RETRIES):
            turn = self._again(lambda: self._look(self._writer, BEGIN_WRITE, Command(LOCK)))
            if attempt == POSTGRES_RETRIES - 1 or not self._far_behind(turn[1]):
                return turn
            # Loading everything takes seconds: not while everybody waits for the row.
            self._writer.end()
            self.view(lambda read: None)
        raise AssertionError("unreachable")

    def _far_behind(self, entries: list[Entry]) -> bool:
        with self._memory:
            return self._seen is not None and self._steps(entries) is None

    def commit(self, group: Group[T]) -> None:
        turn, self._turn = self._turn, None
        if not group.writes:
            self.abandon(group)
            return
        if turn is None:
            raise InternalError(detail="a commit without a run")
        made = State(turn.state.version + 1, self._rng.randbytes(TOKEN_BYTES))
        with self._memory:
            self._pending, self._pending_seen = made, False
        try:
            self._write(turn, made, group)
        except Lost as exc:
            self._look_up(made, exc)
        except BaseException:
            self._writer.end()
            self._done_with_pending()
            raise
        with self._memory:
            self._pending, self._undecided = None, False
            if self._seen == turn.state:
                self._cache.apply(group.writes, own=True)
                self._seen = made

    def _write(self, turn: Head, made: State, group: Group[Any]) -> None:
        told: bytes | None = _encode(group.writes)
        assert told is not None
        size = len(told)
        if size > POSTGRES_LOG_ENTRY_BYTES_MAX:
            told, size = None, 0
        start, log_bytes = self._cut(turn)
        last: list[Command] = [Command(COMMIT_SYNCED)] if group.urgent else []
        if start != turn.log_start:
            last.append(Command(CUT_LOG, (int8(start),)))
        numbers = (int8(start), int8(log_bytes + size), int8(size))
        last.append(Command(ADD_LOG, (int8(made.version), made.token, *numbers, told)))
        *rounds, final = _rounds(group.writes)
        for commands in rounds:
            self._writer.round(commands)
        self._writer.commit(final + last)

    def _cut(self, turn: Head) -> tuple[int, int]:
        """Where the log is to begin and what it holds then. It is cut to a half now and then, so
        that this costs a round trip once in thousands of commits."""
        held = turn.state.version - turn.log_start
        if held < self._log_versions_max and turn.log_bytes <= POSTGRES_LOG_BYTES_MAX:
            return turn.log_start, turn.log_bytes
        oldest = max(turn.log_start, turn.state.version - self._log_versions_max // 2)
        limits = (int8(oldest - 1), int8(POSTGRES_LOG_BYTES_MAX // 2))
        row = self._writer.round([Command(FIND_CUT, limits)])[0][0]
        return max(oldest, int8_of(row[0])), int8_of(row[1])

    def _look_up(self, made: State, lost: Lost) -> None:
        """Returns if the commit happened although its answer was lost. Raises Conflict if it did
        not and cannot any more, StoreUnavailable if that is not known: if it happened, it will be
        told as if it were somebody else's."""
        log.info("a commit has no answer (%s), looking for it", lost)
        find = Command(FIND_COMMIT, (int8(made.version), made.token))

        def attempt() -> list[Rows]:
            # Locking the row waits for the transaction that is looked for, if it still goes on.
            try:
                return self._writer.begin(BEGIN_WRITE, [Command(LOCK), Command(LOOK), find])
            finally:
                self._writer.end()

        try:
            _, (head,), found = self._again(attempt)
        except KvfsError as exc:
            if self._done_with_pending():
                return
            raise StoreUnavailable(detail=f"a commit without an answer: {exc}") from exc
        if found or self._done_with_pending():
            return
        if made.version < int8_of(head[2]):
            raise StoreUnavailable(detail="a commit without an answer, and the log was cut")
        raise Conflict(detail=f"a commit was lost: {lost}")

    def _done_with_pending(self) -> bool:
        """A view may have seen the commit that is being asked for."""
        with self._memory:
            self._pending = None
            return self._pending_seen

    def abandon(self, group: Group[T] | None) -> None:
        self._turn = None
        self._writer.end()
        with self._memory:
            self._undecided = False

    # --- the rest

    def sync(self) -> None:
        """The log of the database is written in order: this commit's sync is everybody's."""

        def attempt() -> None:
            if not self._syncer.connected:
                self._syncer.connect()
            self._syncer.round([Command(SYNC)])

        with self._sync_lock:
            self._again(attempt)

    def copy_to(self, path: str) -> None:
        self.view(lambda read: write_environment(path, scan_all(read)))

    def close(self) -> None:
        self._closed.set()
        for link in (self._writer, self._reader, self._syncer):
            link.close()


def _rounds(writes: Writes) -> Iterator[list[Command]]:
    """Statements for the writes; each list is one round trip."""
    puts: list[Item] = []
    size = 0
    # In the order of keys, neighbours land in the page that is already at hand.
    for key in sorted(writes):
        value = writes[key]
        if value is None:
            continue
        puts.append((key, value))
        size += len(key) + len(value)
        if size >= POSTGRES_ROUND_BYTES:
            yield [_put(puts)]
            puts, size = [], 0
    last = [_put(puts)] if puts else []
    deletions = [key for key, value in writes.items() if value is None]
    if deletions:
        last.append(Command(DELETE, (bytea_array(deletions),)))
    yield last


def _put(items: list[Item]) -> Command:
    keys, values = zip(*items, strict=True)
    return Command(PUT, (bytea_array(keys), bytea_array(values)))


__all__ = ["PostgresEngine"]
