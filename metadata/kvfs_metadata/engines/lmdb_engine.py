"""The engine that keeps its state in one LMDB environment.

LMDB never writes a page that a committed state uses, so a process may die at any moment. With
``durability="strict"`` each commit is synced before it returns; with "cache" the kernel holds the
last writes until ``sync``, and checkpoints (``engines.checkpoint``) keep the store whole if
the machine dies.

Commits may come from a worker thread while views go on in another: LMDB allows one writer beside
any number of readers. Only growing the map needs quiet: views hold the lock of the map.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import itertools
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import lmdb

from kvfs_base.errors import Conflict, DiskFull, KvfsError, TargetFailed, VersionMismatch
from kvfs_base.limits import MIB, PAGE_BYTES
from kvfs_base.seams import Env
from kvfs_metadata import records
from kvfs_metadata.engines import checkpoint
from kvfs_metadata.engines.checkpoint import Checkpoint
from kvfs_metadata.engines.engine import (
    Group,
    Item,
    KVEngine,
    KVRead,
    KVTransaction,
    Listener,
    run_group,
)
from kvfs_metadata.limits import METADATA_MAP_BYTES, METADATA_MAP_BYTES_MAX

T = TypeVar("T")
log = logging.getLogger(__name__)

LOCK_FILE = "service.lock"
STORE_FILES = {LOCK_FILE, checkpoint.DATA_FILE, checkpoint.CHECKPOINT_FILE, "lock.mdb"}
READERS_MAX = 64
"""Reader slots: this process's threads, and tools that look on."""

COPY_BATCH_ITEMS = 4096
"""In one transaction of a copy: LMDB keeps changed pages in memory until its end."""
PART_ITEMS = 16
"""The first items that a range reads before it looks whether it is over."""


class _Snapshot:
    """KVRead over one LMDB read transaction."""

    __slots__ = ("_txn", "get")

    def __init__(self, txn: lmdb.Transaction[bytes]) -> None:
        self._txn = txn
        self.get: Callable[[bytes], bytes | None] = txn.get

    def end(self) -> None:
        """A transaction keeps its reader slot for as long as anybody refers to it, and errors that
        were raised under ``view`` refer to its frames until they are collected as garbage: so these
        are the only references."""
        self._txn.abort()
        del self._txn, self.get

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        # A loop of gets beats Cursor.getmulti (0.21 against 0.15 M/s measured).
        get = self.get
        return [get(key) for key in keys]

    def range(self, start: bytes, end: bytes, limit: int, reverse: bool = False) -> list[Item]:
        with self._txn.cursor() as cursor:
            return (
                _backward(cursor, start, end, limit)
                if reverse
                else _forward(cursor, start, end, limit)
            )


def _forward(cursor: lmdb.Cursor[bytes], start: bytes, end: bytes, limit: int) -> list[Item]:
    items: list[Item] = []
    if limit <= 0 or not cursor.set_range(start) or cursor.key() >= end:
        return items
    # A loop that looks at each key takes 0.5 us an item, this 0.2. Parts double, so that a short
    # range reads few items beyond its end.
    rest = cursor.iternext()
    while part := list(itertools.islice(rest, min(limit - len(items), PART_ITEMS + len(items)))):
        if part[-1][0] >= end:
            return items + part[: bisect.bisect_left(part, end, key=_key_of)]
        items += part
    return items


_key_of = operator.itemgetter(0)


def _backward(cursor: lmdb.Cursor[bytes], start: bytes, end: bytes, limit: int) -> list[Item]:
    items: list[Item] = []
    # set_range stops at the first key >= end, one after the last that is wanted.
    found = cursor.prev() if cursor.set_range(end) else cursor.last()
    while found and len(items) < limit and cursor.key() >= start:
        items.append(cursor.item())
        found = cursor.prev()
    return items


class LmdbEngine(KVEngine):
    """Owns ``directory`` (created if missing) while it lives. Raises Conflict if another service
    does, VersionMismatch if the files are another LMDB's, DiskFull, TargetFailed."""

    shared = False

    def __init__(
        self,
        env: Env,
        directory: str,
        *,
        durability: str = "cache",
        map_bytes: int = METADATA_MAP_BYTES,
        boot_id: str | None = None,
    ) -> None:
        self._path = directory
        self._boot_id = boot_id or _boot_id()
        self._pin: lmdb.Transaction[bytes] | None = None
        self._sync_lock = threading.Lock()
        self._failed: TargetFailed | None = None
        self._map_lock = threading.RLock()
        self._write_lock = threading.Lock()
        self._disk = env.open_disk(directory)
        self._disk.make_directory("")
        self._lock_file = self._disk.open(LOCK_FILE, write=True, create=True)
        try:
            self._take_lock()
            went_back = checkpoint.restore(self._disk, self._boot_id)
            if went_back:
                log.info("%s: the machine went down, back to the last checkpoint", directory)
            self._lmdb = _open_environment(directory, map_bytes, strict=durability == "strict")
            if went_back and self._lmdb.stat()["entries"]:
                # Before the checkpoint of this boot: a kill in between must not forget it.
                with self._lmdb.begin(write=True) as txn:
                    txn.put(records.WENT_BACK_KEY, b"")
        except BaseException:
            self._lock_file.close()
            raise
        self._lmdb.reader_check()
        previous = checkpoint.load(self._disk)
        self._checkpoint_number = previous.number if previous is not None else 0
        # A memory disk has no part in LMDB's file, and strict commits need no checkpoints.
        self._checkpoints = durability != "strict" and self._disk.exists(checkpoint.DATA_FILE)
        self.sync()
        if not self._checkpoints:
            checkpoint.remove(self._disk)

    def _take_lock(self) -> None:
        # flock dies with its process, however that ended: a lock file's mere presence says nothing.
        try:
            fcntl.flock(self._lock_file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            detail = f"{self._path} is in use by another metadata service"
            raise Conflict(detail=detail) from None

    def listen(self, listener: Listener) -> None:
        pass  # nobody else commits

    def view(self, fn: Callable[[KVRead], T]) -> T:
        with self._map_lock:
            snapshot = _Snapshot(self._lmdb.begin())
            try:
                return fn(snapshot)
            finally:
                snapshot.end()

    def run(self, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
        return self.view(partial(run_group, fns=fns))

    def commit(self, group: Group[T]) -> None:
        if not group.writes:
            return
        # In key order, neighbours land in the page that is already at hand.
        writes = sorted(group.writes.items())
        while not self._write(writes):
            self._grow()

    def _write(self, writes: list[tuple[bytes, bytes | None]]) -> bool:
        """False if the map is full; then nothing was written."""
        with self._write_lock:
            if self._failed is not None:
                raise self._failed
            try:
                with self._lmdb.begin(write=True) as txn:
                    for key, value in writes:
                        if value is None:
                            txn.delete(key)
                        else:
                            txn.put(key, value)
            except lmdb.MapFullError:
                return False
            except lmdb.Error as exc:
                # Each key may touch a page on every level of the tree.
                raise self._failure(exc, size=len(writes) * 64 * PAGE_BYTES + MIB) from exc
        return True

    def _failure(self, exc: lmdb.Error, size: int) -> KvfsError:
        # LMDB says EIO for a write of several pages of which only some found room.
        room = self._disk.usage().free_bytes
        if _is_disk_full(exc) or ("Input/output error" in str(exc) and room < size):
            return DiskFull(path=self._path)
        self._failed = TargetFailed(detail=f"{self._path}: {exc}")
        log.error("the metadata store failed: %s", exc)
        return self._failed

    def _grow(self) -> None:
        size = min(2 * self._lmdb.info()["map_size"], METADATA_MAP_BYTES_MAX)
        if size <= self._lmdb.info()["map_size"]:
            raise DiskFull(path=self._path)
        self._lmdb.reader_check()
        with self._sync_lock, self._write_lock:
            # Nobody may read through the old map while it is replaced.
            with self._map_lock:
                self._lmdb.set_mapsize(size)
            # That ended every transaction, the pin too. Before anything is written again, and its
            # pages with it, another state must have been made safe.
            self._pin = None
            if self._checkpoints:
                self._checkpoint_after_growth()
        log.info("grew the map of %s to %d bytes", self._path, size)

    def abandon(self, group: Group[T]) -> None:
        pass  # nothing is held between run and commit

    def sync(self) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            # Of a backup that was killed nothing is left but the pages that it keeps from reuse.
            self._lmdb.reader_check()
            if self._checkpoints:
                self._make_checkpoint()
            else:
                self._lmdb.sync(True)
        except (lmdb.Error, TargetFailed) as exc:
            # Linux reports a lost write once: a repeated sync would succeed with old data on disk.
            self._failed = TargetFailed(detail=f"{self._path}: {exc}")
            raise self._failed from exc

    def _make_checkpoint(self) -> None:
        with self._sync_lock:
            with self._write_lock:  # the pinned state is the newest, so its meta page is at hand
                pin, made = self._pin_newest()
            self._save_checkpoint(pin, made)

    def _checkpoint_after_growth(self) -> None:
        try:
            self._save_checkpoint(*self._pin_newest())
        except (lmdb.Error, KvfsError) as exc:
            self._failed = TargetFailed(detail=f"{self._path}: {exc}")
            raise self._failed from exc

    def _pin_newest(self) -> tuple[lmdb.Transaction[bytes], Checkpoint]:
        pin = self._lmdb.begin()
        page_bytes = self._lmdb.stat()["psize"]
        meta = checkpoint.read_meta(self._disk, page_bytes, pin.id())
        number = self._checkpoint_number + 1
        return pin, Checkpoint(number, self._boot_id, page_bytes, meta)

    def _save_checkpoint(self, pin: lmdb.Transaction[bytes], made: Checkpoint) -> None:
        try:
            self._lmdb.sync(True)
            checkpoint.save(self._disk, made)
        except BaseException:
            pin.abort()  # the one before still holds
            raise
        if self._pin is not None:
            self._pin.abort()
        self._pin = pin
        self._checkpoint_number = made.number

    def copy_to(self, path: str) -> None:
        self.view(lambda read: None)  # raises here rather than in C if the engine is closed
        self._lmdb.copy(path, compact=True)

    def close(self) -> None:
        """Syncs if it can, and gives the directory back."""
        try:
            if self._failed is None:
                self._lmdb.sync(True)
                checkpoint.remove(self._disk)
        finally:
            if self._pin is not None:
                self._pin.abort()
            self._lmdb.close()
            self._lock_file.close()


def _boot_id() -> str:
    """Changes whenever the machine starts, not with containers or network namespaces."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _is_disk_full(exc: lmdb.Error) -> bool:
    # The binding has no class of its own for it, only the text of strerror.
    return "No space left on device" in str(exc) or "Disk quota exceeded" in str(exc)


def _open_environment(
    path: str, map_bytes: int, *, strict: bool, readonly: bool = False
) -> lmdb.Environment:
    try:
        return lmdb.open(
            path,
            map_size=map_bytes,
            sync=strict,
            metasync=strict,
            mode=0o600,
            readahead=False,  # lookups are random
            max_readers=READERS_MAX,
            readonly=readonly,
            create=not readonly,
            max_spare_txns=2,
        )
    except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError) as exc:
        raise VersionMismatch(
            detail=f"{path} is not a metadata store: {exc}", found="unknown", expected="LMDB 0.9"
        ) from exc
    except lmdb.Error as exc:
        if _is_disk_full(exc):
            raise DiskFull(path=path) from exc
        raise TargetFailed(detail=f"{path}: {exc}") from exc


@contextlib.contextmanager
def read_environment(path: str) -> Iterator[KVRead]:
    """One snapshot of the LMDB environment in ``path``, beside the process that serves it: the
    pages of the snapshot stay until the end of this, or of its process (``LmdbEngine.sync``)."""
    environment = _open_environment(path, METADATA_MAP_BYTES_MAX, strict=False, readonly=True)
    try:
        with environment.begin() as txn:
            yield _Snapshot(txn)
    finally:
        environment.close()


def write_environment(path: str, items: Iterable[Item]) -> None:
    """A new LMDB environment in the directory ``path`` that holds ``items``, synced."""
    # The map is address space only. What does not fit is refused, as by a disk of that size.
    environment = _open_environment(path, METADATA_MAP_BYTES_MAX, strict=False)
    rest = iter(items)
    try:
        while batch := list(itertools.islice(rest, COPY_BATCH_ITEMS)):
            with environment.begin(write=True) as txn:
                for key, value in batch:
                    txn.put(key, value)
        environment.sync(True)
    except lmdb.Error as exc:
        if _is_disk_full(exc) or isinstance(exc, lmdb.MapFullError):
            raise DiskFull(path=path) from exc
        raise TargetFailed(detail=f"{path}: {exc}") from exc
    finally:
        environment.close()


__all__ = ["LmdbEngine", "read_environment", "write_environment"]
