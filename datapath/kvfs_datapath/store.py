"""One target: a directory of chunk files.

The directory tree is the index. A look-up is one ``open`` of a path computed from the chunk's name
(ext4 hashes directory entries, 256 directories keep them small), the attribute lies in the inode
that ``open`` read anyway, and a crash leaves nothing that could disagree with the files. What an
index in memory would save (3 us a look-up) is little beside the read that follows, and it would
cost memory in proportion to the disk and a scan at every start.

Two kinds of chunks share the format. Blocks are created whole: staging file, payload, attribute,
rename; they are SEALED from their first moment and never change. Chunks of ordinary files are
written in place: they are marked OPEN before the first byte changes and get their checksum back
when they are sealed. Whether somebody may still write is not a matter of counting: the kernel knows
every descriptor that is open for writing, also those passed to other processes, also after this
server was restarted (``DiskFile.has_writer``). Patches through the server take the chunk's lock and
mark it OPEN again, so a seal between two of them is never wrong, only early.

No file is ever recycled: a descriptor that was passed on may outlive everything, so chunk files are
only unlinked.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence

import msgspec

from kvfs_base import threads
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    Conflict,
    KvfsError,
    NotPermitted,
    ServerBusy,
    TargetFailed,
)
from kvfs_base.limits import (
    CALL_SECONDS,
    REMOVE_BY_NAME_MAX,
    STAGED_CHUNKS_MAX,
    VERIFIED_CHUNKS_MAX,
)
from kvfs_base.seams import Buffer, Disk, DiskFile, DiskUsage
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.format import (
    ATTRIBUTE,
    CHUNKS,
    DIRECTORIES,
    STAGING,
    ChunkInfo,
    ChunkState,
    chunk_of,
    directory_of,
    pack,
    path_of,
    unpack,
)
from kvfs_datapath.target import load_identity, lock_target, save_identity

log = logging.getLogger(__name__)

LOCKS = 256


class StagedChunk:
    """A file that is being filled; nobody can find it before it is published."""

    __slots__ = ("file", "path")

    def __init__(self, file: DiskFile, path: str) -> None:
        self.file = file
        self.path = path


class ChunkStore:
    """All operations raise TargetFailed once the disk has failed: a disk that lost one write is not
    asked again. They may be called from any number of threads."""

    def __init__(self, disk: Disk, uuid: str, *, buffers: BufferPool, strict: bool = False) -> None:
        """Takes over the directory: ``uuid`` becomes its name if it has none yet. Raises Conflict
        if another server has it, VersionMismatch, TargetFailed."""
        self._disk = disk
        self._strict = strict
        self._buffers = buffers
        self._lock_file = lock_target(disk)
        try:
            self._identity = load_identity(disk, uuid)
            disk.make_directory(CHUNKS)
            disk.make_directory(STAGING)
            for name in disk.list(STAGING):
                disk.unlink(f"{STAGING}/{name}")
        except BaseException:
            self._lock_file.close()
            raise
        self._failure: TargetFailed | None = None
        self._staging_names = itertools.count(1)
        self._staging_slots = threads.semaphore(STAGED_CHUNKS_MAX)
        self._locks = [threads.lock() for _ in range(LOCKS)]
        self._verified: collections.OrderedDict[ChunkId, int] = collections.OrderedDict()
        self._verified_lock = threads.lock()

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
            with self._io():
                save_identity(self._disk, identity)
            self._identity = identity

    @property
    def healthy(self) -> bool:
        return self._failure is None

    def usage(self) -> DiskUsage:
        with self._io():
            return self._disk.usage()

    def fail(self, failure: TargetFailed) -> None:
        """Takes the target out of service for good: only a restart, after somebody has looked at
        the disk, brings it back."""
        if self._failure is None:
            log.error("target %s is out of service: %s", self.uuid, failure.detail)
            self._failure = TargetFailed(target_id=self.target_id, detail=failure.detail)

    def close(self) -> None:
        self._lock_file.close()

    @contextlib.contextmanager
    def _io(self, chunk: ChunkId | None = None) -> Iterator[None]:
        """Every use of the disk: refuses once it has failed, notices when it does, and names the
        chunk that is missing."""
        if self._failure is not None:
            raise self._failure
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

    def _lock(self, chunk: ChunkId) -> threads.Lock:
        return self._locks[hash(chunk) % LOCKS]

    # --- chunks that are created whole

    def stage(self) -> StagedChunk:
        """An empty file to fill, O_DIRECT where the file system has it. Must be published or
        discarded. Raises DiskFull, ServerBusy."""
        if not self._staging_slots.acquire(blocking=False):
            raise ServerBusy(detail="too many staged chunks")
        path = f"{STAGING}/{next(self._staging_names):016x}"
        try:
            with self._io():
                file = self._disk.open(path, write=True, create=True, exclusive=True, direct=True)
        except BaseException:
            self._staging_slots.release()
            raise
        return StagedChunk(file, path)

    def fill(self, staged: StagedChunk, piece: memoryview, offset: int) -> None:
        """Writes whole pages into a staged file; what is over the chunk's length is cut off when
        it is published. Raises DiskFull."""
        with self._io():
            staged.file.pwritev([piece], offset)

    def publish(self, staged: StagedChunk, info: ChunkInfo) -> None:
        """Gives a filled file its length, attribute and name, in this order: the chunk appears
        whole or not at all. The staged file is used up in any case. Publishing the same block again
        replaces it with itself. Raises Conflict over a chunk that is open, ChunkMismatch if fewer
        bytes were written than ``info.length``, DiskFull."""
        published = False
        try:
            with self._io(), self._lock(info.chunk):
                self._refuse_to_replace_open(info.chunk)
                self._publish(staged, info)
                published = True
                self._sync_directory_or_take_back(info.chunk)
        finally:
            if published:
                staged.file.close()
                self._staging_slots.release()
            else:
                self.discard(staged)

    def _publish(self, staged: StagedChunk, info: ChunkInfo) -> None:
        size = staged.file.size()
        if size < info.length:
            raise ChunkMismatch(*info.chunk, detail=f"{size} of {info.length} bytes were staged")
        if size > info.length:
            staged.file.truncate(info.length)
        staged.file.set_attribute(ATTRIBUTE, pack(info))
        if self._strict:
            staged.file.sync(attributes=True)
        self._appear(staged.path, info.chunk)

    def _appear(self, path: str, chunk: ChunkId) -> None:
        """Gives a complete file its final name."""
        try:
            self._disk.rename(path, path_of(chunk))
        except FileNotFoundError:  # the first chunk in its directory
            self._disk.make_directory(directory_of(chunk.inode, chunk.chain))
            if self._strict:
                self._disk.sync_directory(CHUNKS)
            self._disk.rename(path, path_of(chunk))

    def _sync_directory_or_take_back(self, chunk: ChunkId) -> None:
        if not self._strict:
            return
        try:
            self._disk.sync_directory(directory_of(chunk.inode, chunk.chain))
        except KvfsError:
            # The writer will be told that it failed: nobody may find it.
            with contextlib.suppress(TargetFailed, FileNotFoundError):
                self._disk.unlink(path_of(chunk))
            raise

    def _refuse_to_replace_open(self, chunk: ChunkId) -> None:
        if not self._disk.exists(path_of(chunk)):
            return
        file = self._disk.open(path_of(chunk))
        try:
            with contextlib.suppress(ChunkMismatch):  # what is damaged may be replaced
                info = unpack(file.get_attribute(ATTRIBUTE), chunk)
                if not info.is_sealed:
                    raise Conflict(detail=f"chunk {chunk} is open for writing")
        finally:
            file.close()

    def discard(self, staged: StagedChunk) -> None:
        """Drops a staged file. Never raises: the staging directory is emptied at the next start."""
        staged.file.close()
        self._staging_slots.release()
        with contextlib.suppress(TargetFailed, FileNotFoundError):
            self._disk.unlink(staged.path)

    # --- reading

    def open(self, chunk: ChunkId, *, direct: bool = False) -> tuple[DiskFile, ChunkInfo]:
        """The chunk's file, read-only, and what its attribute says. The caller closes the file.
        Raises ChunkNotFound, ChunkMismatch."""
        with self._io(chunk):
            file = self._disk.open(path_of(chunk), direct=direct)
            try:
                try:
                    return file, self._info(file, chunk)
                except ChunkMismatch:
                    # Or it was opened for writing between the look at its attribute and its size.
                    with self._lock(chunk):
                        return file, self._info(file, chunk)
            except BaseException:
                file.close()
                raise

    def _info(self, file: DiskFile, chunk: ChunkId) -> ChunkInfo:
        info = unpack(file.get_attribute(ATTRIBUTE), chunk)
        size = file.size()
        if not info.is_sealed:
            return msgspec.structs.replace(info, length=size)
        if size != info.length:
            raise ChunkMismatch(*chunk, detail=f"{size} bytes on disk, {info.length} expected")
        return info

    def stat(self, chunk: ChunkId) -> ChunkInfo:
        file, info = self.open(chunk)
        file.close()
        return info

    def verify(self, file: DiskFile, info: ChunkInfo) -> None:
        """Checks a sealed chunk's bytes, once since the server started: whoever gets a descriptor
        reads without us. OPEN chunks have nothing to check. ``file`` must be buffered, which also
        brings the chunk into the page cache. Raises ChunkCorrupt."""
        if not info.is_sealed or self._verified.get(info.chunk) == info.crc32c:
            return
        with self._io(info.chunk):
            found = self._checksum(file, info.length)
            if found != info.crc32c:
                # Or a writer came meanwhile; under the lock none can.
                with self._lock(info.chunk):
                    info = self._info(file, info.chunk)
                    if not info.is_sealed:
                        return
                    found = self._checksum(file, info.length)
        if found != info.crc32c:
            raise ChunkCorrupt(*info.chunk, expected_crc32c=info.crc32c, found_crc32c=found)
        self._remember_verified(info.chunk, found)

    def recheck(self, chunk: ChunkId) -> ChunkInfo:
        """Reads a sealed chunk again, past the page cache where that is possible, whether it was
        verified before or not. Raises ChunkNotFound, ChunkMismatch, ChunkCorrupt."""
        file, info = self.open(chunk, direct=True)
        try:
            with self._io(chunk):
                found = self._checksum(file, info.length) if info.is_sealed else info.crc32c
                if found != info.crc32c:
                    # Or a writer came meanwhile; under the lock none can.
                    with self._lock(chunk):
                        info = self._info(file, chunk)
                        found = self._checksum(file, info.length) if info.is_sealed else 0
        finally:
            file.close()
        if found != info.crc32c:
            self._forget_verified(chunk)
            raise ChunkCorrupt(*chunk, expected_crc32c=info.crc32c, found_crc32c=found)
        return info

    def _checksum(self, file: DiskFile, length: int) -> int:
        value = 0
        with self._buffers.lend(CALL_SECONDS) as buffer:
            for offset in range(0, length, len(buffer)):
                wanted = min(len(buffer), length - offset)
                # Whole pages, for O_DIRECT; the file ends where it ends.
                count = file.preadv([buffer[: round_up(wanted)]], offset)
                value = crc32c(buffer[: min(count, wanted)], value)
        return value

    def _remember_verified(self, chunk: ChunkId, checksum: int) -> None:
        with self._verified_lock:
            self._verified[chunk] = checksum
            self._verified.move_to_end(chunk)
            while len(self._verified) > VERIFIED_CHUNKS_MAX:
                self._verified.popitem(last=False)

    def _forget_verified(self, chunk: ChunkId) -> None:
        with self._verified_lock:
            self._verified.pop(chunk, None)

    # --- chunks of ordinary files

    def open_for_write(self, chunk: ChunkId, *, create: bool = True) -> tuple[DiskFile, ChunkInfo]:
        """The chunk's file, buffered, for writing in place, marked OPEN. Raises ChunkNotFound
        without ``create``, NotPermitted for a block."""
        with self._io(chunk), self._lock(chunk):
            return self._open_for_write(chunk, create)

    def _open_for_write(self, chunk: ChunkId, create: bool) -> tuple[DiskFile, ChunkInfo]:
        try:
            file = self._disk.open(path_of(chunk), write=True)
        except FileNotFoundError:
            if not create:
                raise
            self._create_open(chunk)
            file = self._disk.open(path_of(chunk), write=True)
        try:
            return file, self._mark_open(file, chunk)
        except BaseException:
            file.close()
            raise

    def _create_open(self, chunk: ChunkId) -> None:
        """By rename, as no chunk file is ever seen without its attribute."""
        path = f"{STAGING}/{next(self._staging_names):016x}"
        file = self._disk.open(path, write=True, create=True, exclusive=True)
        try:
            file.set_attribute(ATTRIBUTE, pack(ChunkInfo(*chunk, ChunkState.OPEN)))
            self._appear(path, chunk)
        except BaseException:
            with contextlib.suppress(TargetFailed, FileNotFoundError):
                self._disk.unlink(path)
            raise
        finally:
            file.close()

    def _mark_open(self, file: DiskFile, chunk: ChunkId) -> ChunkInfo:
        info = unpack(file.get_attribute(ATTRIBUTE), chunk)
        if info.key:
            raise NotPermitted(reason="a block is never written again")
        if not info.is_sealed:
            return msgspec.structs.replace(info, length=file.size())
        size = file.size()
        info = msgspec.structs.replace(info, state=ChunkState.OPEN, length=size, crc32c=0)
        file.set_attribute(ATTRIBUTE, pack(info))
        if info.durable or self._strict:
            # Else a power loss could leave changed bytes under the old checksum.
            file.sync(attributes=True)
        self._forget_verified(chunk)
        return info

    def patch(self, chunk: ChunkId, offset: int, data: Sequence[Buffer]) -> None:
        """Writes into a chunk in place; the chunk is made if it is missing. Raises DiskFull."""
        with self._io(chunk), self._lock(chunk):
            file, _ = self._open_for_write(chunk, create=True)
            try:
                file.pwritev(data, offset)
            finally:
                file.close()

    def truncate(self, chunk: ChunkId, length: int) -> None:
        """Cuts a chunk to ``length`` bytes; a shorter one stays as it is, a missing one missing."""
        with self._io(chunk), self._lock(chunk):
            try:
                file, info = self._open_for_write(chunk, create=False)
            except FileNotFoundError:
                return
            try:
                if info.length > length:
                    file.truncate(length)
            finally:
                file.close()

    def seal(self, chunk: ChunkId) -> ChunkInfo:
        """Computes the checksum of a chunk that nobody has open for writing; otherwise it stays
        OPEN, which the answer says. Raises ChunkNotFound."""
        with self._io(chunk), self._lock(chunk):
            file = self._disk.open(path_of(chunk))
            try:
                info = self._info(file, chunk)
                if info.is_sealed or file.has_writer():
                    return info
                return self._seal(file, info)
            finally:
                file.close()

    def _seal(self, file: DiskFile, info: ChunkInfo) -> ChunkInfo:
        if info.durable or self._strict:
            # What was made durable once must not become unreadable by losing power now.
            file.sync()
        info = msgspec.structs.replace(
            info, state=ChunkState.SEALED, crc32c=self._checksum(file, info.length)
        )
        file.set_attribute(ATTRIBUTE, pack(info))
        self._remember_verified(info.chunk, info.crc32c)
        return info

    def sync(self, chunk: ChunkId) -> None:
        """Makes everything written to the chunk so far durable, and marks it so that later changes
        never endanger it. A missing chunk (a hole) is fine."""
        with self._io(chunk), self._lock(chunk):
            try:
                file = self._disk.open(path_of(chunk))
            except FileNotFoundError:
                return
            try:
                info = unpack(file.get_attribute(ATTRIBUTE), chunk)
                if not info.durable:
                    durable = msgspec.structs.replace(info, durable=True)
                    file.set_attribute(ATTRIBUTE, pack(durable))
                file.sync(attributes=True)
            finally:
                file.close()
            if not info.durable:
                self._disk.sync_directory(directory_of(chunk.inode, chunk.chain))
                self._disk.sync_directory(CHUNKS)

    # --- removing and listing

    def remove(self, chunk: ChunkId) -> bool:
        """Whether there was one. Open descriptors keep showing the old bytes."""
        with self._io(), self._lock(chunk):
            self._forget_verified(chunk)
            try:
                self._disk.unlink(path_of(chunk))
            except FileNotFoundError:
                return False
            return True

    def remove_range(self, inode: int, first: int, end: int) -> int:
        """Removes the chunks ``first <= number < end`` of an inode; answers how many there were."""
        if end - first <= REMOVE_BY_NAME_MAX:
            numbers: Sequence[int] = range(first, end)
        else:
            found = self.list_directory(directory_of(inode))
            numbers = [c.number for c in found if c.inode == inode and first <= c.number < end]
        return sum(self.remove(ChunkId(inode, number)) for number in numbers)

    def sync_removals(self, inodes: Sequence[int]) -> None:
        """After a power loss no removed chunk comes back."""
        if self._strict:
            with self._io():
                for directory in {directory_of(inode) for inode in inodes}:
                    if self._disk.exists(directory):
                        self._disk.sync_directory(directory)

    def list_directory(self, directory: str) -> list[ChunkId]:
        with self._io():
            names = self._disk.list(directory) if self._disk.exists(directory) else []
        return [chunk for chunk in map(chunk_of, names) if chunk is not None]

    def list(self) -> Iterator[ChunkId]:
        """Every chunk of the target, one directory after the other, in no order."""
        for number in range(DIRECTORIES):
            yield from self.list_directory(f"{CHUNKS}/{number:02x}")
