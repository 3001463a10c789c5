"""What a PostgreSQL database holds for a metadata store, and how it gets there.

Everything lies in the schema ``kvfs_metadata``, so a database has one store beside whatever else it
holds. Standard SQL but for ``bytea``, ``unnest`` of two arrays and ``ON CONFLICT``.
"""

from __future__ import annotations

from kvfs_base.errors import EntryNotFound, VersionMismatch
from kvfs_metadata.engines.postgres_link import Command, Link, Statement, int8_of

FORMAT = 1

LOCK_KEY = 0x6B766673
"""Of the advisory lock under which the schema is made: ``kvfs``."""

TABLES = (
    "CREATE SCHEMA IF NOT EXISTS kvfs_metadata",
    # One row: the format of these tables (what the items mean has a format of its own).
    """CREATE TABLE IF NOT EXISTS kvfs_metadata.format (
        one smallint PRIMARY KEY CHECK (one = 1),
        format bigint NOT NULL)""",
    # The state. The order of bytea is that of its bytes.
    """CREATE TABLE IF NOT EXISTS kvfs_metadata.items (
        key bytea PRIMARY KEY,
        value bytea NOT NULL)""",
    # One row, which whoever commits has locked. It is never changed: while a backup keeps its
    # snapshot, every look at a row would pass all versions of it since (0.4 ms after 15,000).
    """CREATE TABLE IF NOT EXISTS kvfs_metadata.turn (
        one smallint PRIMARY KEY CHECK (one = 1))""",
    # The last commits. The newest row names the state: the version grows by one with each commit;
    # the token is random, so that both together name a state also after the database lost its last
    # commits and went on from an older one. When a row was written the log began at ``log_start``
    # and ``size`` summed up to ``log_bytes``. ``writes`` is a msgpack map of changed keys to values
    # (nil: deleted), ``size`` bytes; null where it would be too large to be told.
    """CREATE TABLE IF NOT EXISTS kvfs_metadata.log (
        version bigint PRIMARY KEY,
        token bytea NOT NULL,
        log_start bigint NOT NULL,
        log_bytes bigint NOT NULL,
        size bigint NOT NULL,
        writes bytea)""",
    # One row, changed to make everything before it durable.
    """CREATE TABLE IF NOT EXISTS kvfs_metadata.synced (
        one smallint PRIMARY KEY CHECK (one = 1),
        number bigint NOT NULL)""",
)

EXISTS = Statement(
    b"", b"SELECT 1 FROM pg_catalog.pg_tables WHERE schemaname = 'kvfs_metadata' "
    b"AND tablename = 'format'"
)  # fmt: skip
FIND_FORMAT = Statement(b"", b"SELECT format FROM kvfs_metadata.format")
# Once anything was committed the log has rows, but perhaps not this one any more.
FIRST_STATE = Statement(
    b"",
    b"INSERT INTO kvfs_metadata.log SELECT 0, $1::bytea, 0, 0, 0, ''::bytea "
    b"WHERE NOT EXISTS (SELECT 1 FROM kvfs_metadata.log)",
)


def prepare(link: Link, token: bytes, *, create: bool) -> None:
    """Makes what is missing; any number of servers at once. Raises VersionMismatch, and
    EntryNotFound if something is missing and may not be made."""
    if not link.round([Command(EXISTS)])[0]:
        if not create:
            raise EntryNotFound("kvfs_metadata")
        _create(link, token)
    formats = link.round([Command(FIND_FORMAT)])[0]
    found = int8_of(formats[0][0]) if formats else 0
    if found != FORMAT:
        raise VersionMismatch(
            detail="tables of the metadata store", found=str(found), expected=str(FORMAT)
        )


def _create(link: Link, token: bytes) -> None:
    plain = [f"SELECT pg_advisory_xact_lock({LOCK_KEY})", *TABLES]
    plain.append("INSERT INTO kvfs_metadata.turn VALUES (1) ON CONFLICT DO NOTHING")
    plain.append("INSERT INTO kvfs_metadata.synced VALUES (1, 0) ON CONFLICT DO NOTHING")
    plain.append(f"INSERT INTO kvfs_metadata.format VALUES (1, {FORMAT}) ON CONFLICT DO NOTHING")
    link.begin(Statement(b"", b"BEGIN ISOLATION LEVEL READ COMMITTED"), [])
    try:
        # One by one: each is parsed when those before it are done.
        for sql in plain:
            link.round([Command(Statement(b"", sql.encode()))])
        link.commit([Command(FIRST_STATE, (token,))])
    finally:
        link.end()
