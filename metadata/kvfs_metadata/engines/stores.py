"""Where metadata lies: opening stores by name, reading one whole, filling an empty one.

A store's name is the URL of a PostgreSQL database (``postgresql://...``) or a directory, which
holds LMDB's files.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvfs_base.errors import Conflict, EntryNotFound, InvalidRequest, KvfsError, VersionMismatch
from kvfs_base.seams import Env
from kvfs_metadata import records
from kvfs_metadata.engines import checkpoint
from kvfs_metadata.engines.engine import KEYS_END, Item, KVEngine, KVRead, KVTransaction, scan_all
from kvfs_metadata.engines.lmdb_engine import STORE_FILES, LmdbEngine, read_environment
from kvfs_metadata.limits import COPY_BATCH_BYTES, POSTGRES_RETRIES

if TYPE_CHECKING:
    from kvfs_metadata.engines.postgres_engine import PostgresEngine

T = TypeVar("T")

WIPE_BATCH_ITEMS = 4096
"""Items of an unfinished copy that one transaction removes."""

URL_SCHEMES = ("postgresql://", "postgres://")


@dataclasses.dataclass
class Summary:
    """What a store or a backup holds."""

    format: str = ""
    items: int = 0
    bytes: int = 0
    """Of keys and values."""
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    """Items by the four letters that their keys begin with."""

    def count(self, items: Sequence[Item]) -> None:
        self.items += len(items)
        for key, value in items:
            self.bytes += len(key) + len(value)
            self.kinds[key[:4].decode("ascii", errors="replace")] += 1
            if key == records.FORMAT_KEY:
                self.format = value.decode("ascii", errors="replace")


def is_url(store: str) -> bool:
    """Raises InvalidRequest for a URL of something else than PostgreSQL."""
    if store.startswith(URL_SCHEMES):
        return True
    if "://" in store:
        scheme = store.partition("://")[0]
        raise InvalidRequest(detail=f"no such kind of store: {scheme} (there is postgresql://)")
    return False


def open_store(env: Env, store: str, *, durability: str = "cache", create: bool = True) -> KVEngine:
    """The engine over ``store``, made if it is missing. Raises Conflict if another process has the
    directory, EntryNotFound if it is missing and ``create`` is false, and as the engines do."""
    if is_url(store):
        return _postgres_engine()(env, store, durability=durability, create=create)
    if not create and not env.open_disk(store).exists(checkpoint.DATA_FILE):
        raise EntryNotFound(store)
    return LmdbEngine(env, store, durability=durability)


def _postgres_engine() -> type[PostgresEngine]:
    try:
        # Only those who use it have psycopg, and importing it takes 0.1 s.
        from kvfs_metadata.engines.postgres_engine import PostgresEngine
    except ImportError as exc:
        raise InvalidRequest(detail=f"PostgreSQL needs psycopg: {exc}; install kvfs[pg]") from exc
    return PostgresEngine


# --- whole stores


def read_store(env: Env, store: str, fn: Callable[[KVRead], T]) -> T:
    """Calls ``fn`` on one snapshot of ``store``, whether it is being served or not. Raises
    InvalidRequest if there is none, VersionMismatch if it is something else or not whole."""

    def checked(read: KVRead) -> T:
        if read.get(records.FORMAT_KEY) is None:
            raise _not_whole(read, store)
        return fn(read)

    try:
        engine = open_store(env, store, create=False)
    except EntryNotFound:
        raise _missing(store) from None
    except Conflict:
        # Served by another process: its lock is not needed to look on.
        with read_environment(store) as read:
            return checked(read)
    try:
        return engine.view(checked)
    finally:
        engine.close()


def _not_whole(read: KVRead, store: str) -> KvfsError:
    if read.range(b"", KEYS_END, 1):
        return VersionMismatch(
            detail=f"{display(store)} is {unfinished(read) or 'not a metadata store'}",
            found="none",
            expected=records.FORMAT.decode(),
        )
    return _missing(store)


def _missing(store: str) -> InvalidRequest:
    return InvalidRequest(detail=f"there is no metadata store in {display(store)}")


def unfinished(read: KVRead) -> str:
    """What is to be said of a store without a format, if a copy into it did not end."""
    return "an unfinished copy" if read.get(records.COPYING_KEY) is not None else ""


def batches_of(read: KVRead) -> Iterator[list[Item]]:
    return in_batches(scan_all(read))


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of about COPY_BATCH_BYTES."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[0]) + len(item[1])
        if size >= COPY_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def fill_store(
    env: Env, store: str, batches: Iterable[list[Item]], *, went_back: bool = False
) -> Summary:
    """Writes ``batches`` into the empty ``store``, durable when this returns. Until all of it is
    there the store has no format: nobody takes it for one. What a copy that was killed left is
    removed first. ``went_back`` if ``batches`` are an older state of something. Raises
    InvalidRequest if there is anything else in it, Conflict if it is in use or another copy into it
    began."""
    _require_directory_of_ours(env, store)
    engine = open_store(env, store)
    try:
        last = {records.WENT_BACK_KEY: b""} if went_back else {}
        return _fill(engine, env.rng.randbytes(16), store, batches, last)
    finally:
        engine.close()


def _require_directory_of_ours(env: Env, store: str) -> None:
    """A mistyped path is not littered with a database."""
    if is_url(store):
        return
    try:
        found = set(env.open_disk(store).list(""))
    except FileNotFoundError:
        return
    if found - STORE_FILES:
        raise InvalidRequest(detail=f"{store} is not empty, and not the directory of a store")


def _fill(
    engine: KVEngine,
    token: bytes,
    store: str,
    batches: Iterable[list[Item]],
    more: Mapping[bytes, bytes],
) -> Summary:
    def claim(txn: KVTransaction) -> None:
        if txn.get(records.COPYING_KEY) is None and txn.range(b"", KEYS_END, 1):
            raise InvalidRequest(detail=f"{display(store)} is not empty")
        txn.put(records.COPYING_KEY, token)

    def change(writes: Sequence[tuple[bytes, bytes | None]], txn: KVTransaction) -> None:
        if txn.get(records.COPYING_KEY) != token:
            raise Conflict(detail=f"another copy into {display(store)} began")
        for key, value in writes:
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)

    update(engine, claim)
    while left := [
        (key, None)
        for key, _ in engine.view(lambda read: read.range(b"", KEYS_END, WIPE_BATCH_ITEMS))
        if key != records.COPYING_KEY
    ]:
        update(engine, partial(change, left))
    summary = Summary()
    last: list[tuple[bytes, bytes | None]] = [(records.COPYING_KEY, None), *more.items()]
    for batch in batches:
        summary.count(batch)
        last += [item for item in batch if item[0] == records.FORMAT_KEY]
        update(engine, partial(change, [item for item in batch if item[0] != records.FORMAT_KEY]))
    # What was written must not be lost where the format is kept.
    engine.sync()
    update(engine, partial(change, last))
    engine.sync()
    return summary


def update(engine: KVEngine, fn: Callable[[KVTransaction], T]) -> T:
    """One transaction, decided anew if it lost a race. Raises what ``fn`` does."""
    for attempt in range(POSTGRES_RETRIES):
        group = engine.run([fn])
        try:
            engine.commit(group)
        except Conflict:
            engine.abandon(group)
            if attempt == POSTGRES_RETRIES - 1:
                raise
        else:
            break
    result: Any = group.results[0]
    if isinstance(result, KvfsError):
        raise result
    return result  # type: ignore[no-any-return]


def display(store: str) -> str:
    """The name without a password."""
    if not is_url(store):
        return store
    scheme, _, rest = store.partition("://")
    place = rest.partition("?")[0]
    return f"{scheme}://{place.rpartition('@')[2]}"


__all__ = ["Summary", "batches_of", "display", "fill_store", "open_store", "read_store", "update"]
