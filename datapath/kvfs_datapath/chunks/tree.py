"""The files of one target: where a chunk lies, what its attribute says, what its bytes sum up to.

What all kinds of chunks have in common. The kinds themselves are made in ``store.py`` (created
whole), ``inplace.py`` (written in place) and ``versions.py`` (changed in versions, on chains of
several copies).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import msgspec

from kvfs_base import threads
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    KvfsError,
    TargetFailed,
)
from kvfs_base.limits import CALL_SECONDS
from kvfs_base.seams import Disk, DiskFile, DiskUsage
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.incoming import Incoming
from kvfs_datapath.chunks.kept import KeptFiles
from kvfs_datapath.chunks.leaving import Leaving
from kvfs_datapath.chunks.target import (
    load_identity,
    lock_target,
    read_small,
    save_identity,
    write_small,
)
from kvfs_datapath.format import (
    ATTRIBUTE,
    CHAINS,
    CHUNKS,
    DIRECTORIES,
    STAGING,
    Append,
    ChunkInfo,
    ChunkState,
    chain_of,
    chunk_of,
    pack,
    path_of,
    root_of,
    unpack_versioned,
)
from kvfs_datapath.limits import (
    BATCH_SYNC_THREADS,
    STAGING_DIRECTORIES,
    STAGING_IN_A_ROW,
    VERIFIED_CHUNKS_MAX,
)

log = logging.getLogger(__name__)

LOCKS = 256


class ChunkTree:
    """All operations raise TargetFailed once the disk has failed: a disk that lost one write is not
    asked again. They may be called from any number of threads."""

    def __init__(
        self,
        disk: Disk,
        uuid: str,
        *,
        buffers: BufferPool,
        strict: bool = False,
        kept_files: int = 0,
    ) -> None:
        """Takes over the directory: ``uuid`` becomes its name if it has none yet. So many
        ``kept_files`` stay open between readers. Raises Conflict if another server has it,
        VersionMismatch, TargetFailed."""
        self.disk = disk
        self.strict = strict
        self.buffers = buffers
        self._lock_file = lock_target(disk)
        try:
            self._identity = load_identity(disk, uuid)
            disk.make_directory(CHUNKS)
            disk.make_directory(STAGING)
            disk.spread(STAGING)
            for path in drafts(disk):
                disk.unlink(path)
        except BaseException:
            self._lock_file.close()
            raise
        self.incoming = Incoming()
        self.leaving = Leaving()
        self._failure: TargetFailed | None = None
        self.kept = KeptFiles(kept_files)
        """What readers borrow (``ChunkStore.borrow``)."""
        self._staging_names = itertools.count(1)
        self._locks = [threads.lock() for _ in range(LOCKS)]
        self._verified: collections.OrderedDict[ChunkId, int] = collections.OrderedDict()
        self._verified_lock = threads.lock()
        self._lasting: set[str] = set()
        """Directories whose names last, as far as that is known since the start."""
        self._threads = threads.pool(BATCH_SYNC_THREADS, "kvfs-sync")
        """Of this target alone: a disk that hangs holds up nobody else."""

    # --- the target itself

    @property
    def uuid(self) -> str:
        return self._identity.uuid

    @property
    def target_id(self) -> int:
        """The number that the metadata service gave; 0 before the first heartbeat of all."""
        return self._identity.target_id

    def set_target_id(self, target_id: int) -> None:
        """Remembered on disk, so that a restarted server serves before its first heartbeat."""
        if target_id != self._identity.target_id:
            identity = msgspec.structs.replace(self._identity, target_id=target_id)
            with self.io():
                save_identity(self.disk, identity)
            self._identity = identity

    @property
    def healthy(self) -> bool:
        return self._failure is None

    def require_healthy(self) -> None:
        if self._failure is not None:
            raise self._failure

    def usage(self) -> DiskUsage:
        with self.io():
            return self.disk.usage()

    def fail(self, failure: TargetFailed) -> None:
        """Takes the target out of service for good: only a restart, after somebody has looked at
        the disk, brings it back."""
        if self._failure is None:
            log.error("target %s is out of service: %s", self.uuid, failure.detail)
            self._failure = TargetFailed(target_id=self.target_id, detail=failure.detail)
            self.kept.clear()

    def close(self) -> None:
        self.kept.clear()
        self._threads.shutdown(wait=True)
        self._lock_file.close()

    def read_note(self, name: str) -> bytes:
        """A small file beside the chunks; empty if there is none."""
        with self.io():
            try:
                return read_small(self.disk, name)
            except FileNotFoundError:
                return b""

    def write_note(self, name: str, data: bytes) -> None:
        """It may be lost with the power."""
        with self.io():
            write_small(self.disk, name, data, sync=False)

    @contextlib.contextmanager
    def io(self, chunk: ChunkId | None = None) -> Iterator[None]:
        """Every use of the disk: refuses once it has failed, notices when it does, and names the
        chunk that is missing."""
        self.require_healthy()
        try:
            yield
        except TargetFailed as exc:
            self.fail(exc)
            assert self._failure is not None
            raise self._failure from exc
        except FileNotFoundError as exc:
            if chunk is not None:
                raise ChunkNotFound(*chunk) from None
            self.fail(TargetFailed(detail=f"vanished: {exc}"))
            assert self._failure is not None
            raise self._failure from exc

    def guard(self, chunk: ChunkId) -> threads.Lock:
        """For a few operations on the disk: other chunks have the same one."""
        return self._locks[hash(chunk) % LOCKS]

    # --- places

    def create_draft(self, *, direct: bool = False) -> tuple[DiskFile, str]:
        """A new file, and its path, in one of the staging directories, which are emptied at every
        start. A few in a row are in the same one: syncs that wait together write less."""
        number = next(self._staging_names)
        directory = f"{STAGING}/{number // STAGING_IN_A_ROW % STAGING_DIRECTORIES:02x}"
        path = f"{directory}/{number:016x}"
        try:
            file = self.disk.open(path, write=True, create=True, exclusive=True, direct=direct)
        except FileNotFoundError:
            if not self.disk.exists(STAGING):  # nor is the target
                raise
            self.disk.make_directory(directory)
            file = self.disk.open(path, write=True, create=True, exclusive=True, direct=direct)
        return file, path

    def discard_draft(self, path: str) -> None:
        """Never raises."""
        with contextlib.suppress(TargetFailed, FileNotFoundError):
            self.disk.unlink(path)

    def appear(self, path: str, chunk: ChunkId) -> None:
        """Gives a complete file its final name."""
        try:
            self.move(path, path_of(chunk), chunk.chain)
        finally:
            self.kept.drop(chunk)

    def is_there(self, chunk: ChunkId) -> bool:
        """Whether a file has its name. Taking the name away costs more, though there is none."""
        with self.io():
            return self.disk.exists(path_of(chunk))

    def vanish(self, chunk: ChunkId) -> None:
        """Takes a file's name away. Raises FileNotFoundError."""
        try:
            self.disk.unlink(path_of(chunk))
        finally:
            self.kept.drop(chunk)

    def mark(self, file: DiskFile, info: ChunkInfo) -> None:
        """Changes what the attribute of a chunk's file says."""
        try:
            file.set_attribute(ATTRIBUTE, pack(info))
        finally:
            self.kept.drop(info.chunk)

    def move(self, path: str, target: str, chain: int) -> None:
        """A rename into a directory that may not be there yet. In ``strict`` the directory lasts
        before that; that the name does is the caller's to see to."""
        directory = target.rpartition("/")[0]
        if self.strict:
            self.make_directories([directory], chain)
        try:
            self.disk.rename(path, target)
        except FileNotFoundError:  # the first file in its directory
            self.disk.make_directory(directory)
            if self.strict:
                self._sync_root(chain)
            self.disk.rename(path, target)

    def make_directories(self, directories: Iterable[str], chain: int) -> None:
        """They are there, and last. What leads to them is synced once since the start, whoever made
        them: a killed process may not have come to it."""
        known = self._lasting
        unsure = sorted(set(directories) - known)
        if unsure:
            for directory in unsure:
                self.disk.make_directory(directory)
            self._sync_root(chain)
            known.update(unsure)

    def _sync_root(self, chain: int) -> None:
        root = root_of(chain)
        known = self._lasting
        self._sync_directory(root)
        if root not in known:
            if chain:
                self.disk.sync_directory(CHAINS)
            self.disk.sync_directory("")
            known.add(root)

    def forget_directories(self, chain: int) -> None:
        """They are about to be removed: who makes them again syncs them again. Whoever is syncing
        them now will note that where nobody looks any more."""
        root = root_of(chain)
        known = self._lasting.copy()
        self._lasting = {d for d in known if d != root and not d.startswith(f"{root}/")}

    # --- syncing

    def parallel(self, jobs: Sequence[Callable[[], None]]) -> list[KvfsError | None]:
        """Uses of the disk, all at the same time, with what went wrong with each. Syncs that wait
        together wait for the same commit of the journal and the same flush of the disk."""

        def attempt(job: Callable[[], None]) -> KvfsError | None:
            try:
                with self.io():
                    job()
            except KvfsError as exc:
                return exc
            return None

        others = [self._threads.submit(attempt, job) for job in jobs[1:]]
        outcomes = [attempt(job) for job in jobs[:1]]
        return outcomes + [future.result() for future in others]

    def sync_directories(self, directories: Iterable[str]) -> dict[str, KvfsError]:
        """What went wrong, by directory."""
        wanted = sorted(set(directories))
        outcomes = self.parallel([functools.partial(self._sync_directory, d) for d in wanted])
        return {d: exc for d, exc in zip(wanted, outcomes, strict=True) if exc is not None}

    def _sync_directory(self, directory: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # nothing of it is wanted any more
            self.disk.sync_directory(directory)

    # --- reading

    def open(self, chunk: ChunkId, *, direct: bool = False) -> tuple[DiskFile, ChunkInfo]:
        """The chunk's file, read-only, and what its attribute says; only the first ``length`` bytes
        of the file are the chunk. The caller closes the file. Raises ChunkNotFound,
        ChunkMismatch."""
        with self.io(chunk):
            file = self.disk.open(path_of(chunk), direct=direct)
            try:
                try:
                    return file, self.look(file, chunk)[0]
                except ChunkMismatch:
                    # Or it was opened for writing between the look at its attribute and its size.
                    with self.guard(chunk):
                        return file, self.look(file, chunk)[0]
            except BaseException:
                file.close()
                raise

    def look(self, file: DiskFile, chunk: ChunkId) -> tuple[ChunkInfo, Append | None]:
        """What the attribute of a chunk's file says, compared with the file's size."""
        info, append = unpack_versioned(file.get_attribute(ATTRIBUTE), chunk)
        if info.is_damaged:
            return info, None
        size = file.size()
        if info.state is ChunkState.OPEN:
            return msgspec.structs.replace(info, length=size), append
        if info.version and size > info.length:
            size = info.length  # an update that is not committed, or never will be
        if size != info.length:
            raise ChunkMismatch(*chunk, detail=f"{size} bytes on disk, {info.length} expected")
        if info.state is ChunkState.PENDING:  # it is not any more, or it were in another place
            info = msgspec.structs.replace(info, state=ChunkState.SEALED)
        return info, append

    def stat(self, chunk: ChunkId) -> ChunkInfo:
        file, info = self.open(chunk)
        file.close()
        return info

    def verify(self, file: DiskFile, info: ChunkInfo) -> None:
        """Checks a sealed chunk's bytes, once since the server started: whoever gets a descriptor
        reads without us. OPEN chunks have nothing to check. ``file`` must be buffered, which also
        brings the chunk into the page cache. Raises ChunkCorrupt."""
        if not info.is_sealed or self.was_verified(info):
            return
        with self.io(info.chunk):
            file.will_need(0, info.length)
            found = self.checksum(file, info.length)
            if found != info.crc32c:
                # Or a writer came meanwhile; under the lock none can.
                with self.guard(info.chunk):
                    info, _ = self.look(file, info.chunk)
                    refuse_damaged(info)
                    if not info.is_sealed:
                        return
                    found = self.checksum(file, info.length)
        if found != info.crc32c:
            raise ChunkCorrupt(*info.chunk, expected_crc32c=info.crc32c, found_crc32c=found)
        self.remember_verified(info.chunk, found)

    def recheck(self, chunk: ChunkId) -> ChunkInfo:
        """Reads a sealed chunk again, past the page cache where that is possible, whether it was
        verified before or not. Raises ChunkNotFound, ChunkMismatch, ChunkCorrupt (also of one that
        is known to be damaged)."""
        check = self.recheck_in_pieces(chunk)
        while True:
            try:
                next(check)
            except StopIteration as stop:
                found: ChunkInfo = stop.value
                return found

    def recheck_in_pieces(self, chunk: ChunkId) -> Generator[int, None, ChunkInfo]:
        """As ``recheck``, for those who take their time: yields the bytes it has just read, and
        holds nothing but the open file meanwhile."""
        file, info = self.open(chunk, direct=True)
        try:
            refuse_damaged(info)
            found = info.crc32c
            if info.is_sealed:
                found = 0
                for offset in range(0, info.length, self.buffers.size):
                    wanted = min(self.buffers.size, info.length - offset)
                    with self.io(chunk):
                        found = self.checksum(file, wanted, offset, found)
                    yield wanted
            if found != info.crc32c:
                # Or a writer came meanwhile; under the lock none can.
                with self.io(chunk), self.guard(chunk):
                    info, _ = self.look(file, chunk)
                    found = self.checksum(file, info.length) if info.is_sealed else 0
        finally:
            file.close()
        if found != info.crc32c:
            self.forget_verified(chunk)
            raise ChunkCorrupt(*chunk, expected_crc32c=info.crc32c, found_crc32c=found)
        return info

    def checksum(self, file: DiskFile, length: int, start: int = 0, value: int = 0) -> int:
        """Of ``length`` bytes from ``start``, continuing from ``value``; of those that are there,
        if the file is shorter."""
        with self.buffers.lend(CALL_SECONDS) as buffer:
            for offset in range(start, start + length, len(buffer)):
                wanted = min(len(buffer), start + length - offset)
                # Whole pages, for O_DIRECT; the file ends where it ends.
                count = file.preadv([buffer[: round_up(wanted)]], offset)
                value = crc32c(buffer[: min(count, wanted)], value)
        return value

    def was_verified(self, info: ChunkInfo) -> bool:
        return self._verified.get(info.chunk) == info.crc32c

    def remember_verified(self, chunk: ChunkId, checksum: int) -> None:
        with self._verified_lock:
            self._verified[chunk] = checksum
            self._verified.move_to_end(chunk)
            while len(self._verified) > VERIFIED_CHUNKS_MAX:
                self._verified.popitem(last=False)

    def forget_verified(self, chunk: ChunkId) -> None:
        with self._verified_lock:
            self._verified.pop(chunk, None)

    # --- listing

    def list_directory(self, directory: str, chain: int = 0) -> list[ChunkId]:
        with self.io():
            names = self.disk.list(directory) if self.disk.exists(directory) else []
        return [chunk for name in names if (chunk := chunk_of(name, chain)) is not None]

    def chains(self) -> list[int]:
        """The chains of several copies that this target has, or had, chunks of."""
        with self.io():
            names = self.disk.list(CHAINS) if self.disk.exists(CHAINS) else []
        return sorted(chain for name in names if (chain := chain_of(name)) is not None)

    def list(self, chain: int = 0) -> Iterator[ChunkId]:
        """Every chunk of a chain, 0 for those that belong to none: one directory after the other,
        in no order."""
        root = root_of(chain)
        with self.io():
            present = set(self.disk.list(root)) if self.disk.exists(root) else set()
        for number in range(DIRECTORIES):
            if f"{number:02x}" in present:
                yield from self.list_directory(f"{root}/{number:02x}", chain)


def refuse_damaged(info: ChunkInfo) -> None:
    """Raises ChunkCorrupt for a chunk that is recorded as damaged."""
    if info.is_damaged:
        raise ChunkCorrupt(*info.chunk, expected_crc32c=info.crc32c, found_crc32c=0)


def drafts(disk: Disk) -> list[str]:
    """Files that are being filled, or were."""
    found: list[str] = []
    for name in disk.list(STAGING):
        path = f"{STAGING}/{name}"
        # A file in the directory itself is of a former version.
        found += [path] if len(name) != 2 else [f"{path}/{draft}" for draft in disk.list(path)]
    return found
