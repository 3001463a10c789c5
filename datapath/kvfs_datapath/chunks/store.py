"""One target: a directory of chunk files.

The directory tree is the index. A look-up is one ``open`` of a path computed from the chunk's name
(ext4 hashes directory entries, 256 directories keep them small), the attribute lies in the inode
that ``open`` read anyway, and a crash leaves nothing that could disagree with the files. What an
index in memory would save (3 us a look-up) is little beside the read that follows, and it would
cost memory in proportion to the disk and a scan at every start. What was read lately is still open
(``kept.py``).

Three kinds of chunks share the format. Blocks are created whole: staging file, payload, attribute,
rename; they are SEALED from their first moment and never change. Chunks of ordinary files are
written in place (``inplace.py``), but on chains of several copies, where each change makes another
version (``versions.py``).

No file is ever recycled: a descriptor that was passed on may outlive everything, so chunk files are
only unlinked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from kvfs_base import threads
from kvfs_base.errors import (
    ChunkMismatch,
    Conflict,
    InvalidRequest,
    KvfsError,
    ServerBusy,
    TargetFailed,
)
from kvfs_base.seams import Disk, DiskFile
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chunks.inplace import InPlace
from kvfs_datapath.chunks.kept import KeptFile
from kvfs_datapath.chunks.versions import Versions
from kvfs_datapath.format import (
    ATTRIBUTE,
    CHAINS,
    DIRECTORIES,
    ChunkInfo,
    ChunkState,
    directory_of,
    pack,
    path_of,
    pending_directory_of,
    root_of,
    unpack,
)
from kvfs_datapath.limits import REMOVE_BY_NAME_MAX, STAGED_CHUNKS_MAX


class StagedChunk:
    """A file that is being filled; nobody can find it before it is published."""

    __slots__ = ("file", "path")

    def __init__(self, file: DiskFile, path: str) -> None:
        self.file = file
        self.path = path


Batch = Sequence[tuple[StagedChunk, ChunkInfo]]
Results = list[KvfsError | None]


@dataclasses.dataclass(slots=True)
class _Appearing:
    """A chunk that has its name, of which is not known yet whether it lasts."""

    is_new: bool
    """Nobody could find it before."""
    waiting: int = 0
    """Those who store it now, each the same bytes."""
    lasts: bool = False
    """For one of them it did."""


class ChunkStore(InPlace):
    """See ChunkTree."""

    def __init__(
        self,
        disk: Disk,
        uuid: str,
        *,
        buffers: BufferPool,
        strict: bool = False,
        kept_files: int = 0,
    ) -> None:
        """See ChunkTree."""
        super().__init__(disk, uuid, buffers=buffers, strict=strict, kept_files=kept_files)
        self._staging_slots = threads.semaphore(STAGED_CHUNKS_MAX)
        self._appearing: dict[ChunkId, _Appearing] = {}
        try:
            self.versions = Versions(self)
            """File chunks on chains of several copies."""
        except BaseException:
            self.close()
            raise

    # --- chunks that are created whole

    def stage(self) -> StagedChunk:
        """An empty file to fill, O_DIRECT where the file system has it. Must be published or
        discarded. Raises DiskFull, ServerBusy."""
        if not self._staging_slots.acquire(blocking=False):
            raise ServerBusy(detail="too many staged chunks")
        try:
            with self.io():
                file, path = self.create_draft(direct=True)
        except BaseException:
            self._staging_slots.release()
            raise
        return StagedChunk(file, path)

    def fill(self, staged: StagedChunk, piece: memoryview, offset: int) -> None:
        """Writes whole pages into a staged file; what is over the chunk's length is cut off when
        it is published. Raises DiskFull."""
        with self.io():
            staged.file.pwritev([piece], offset)

    def publish(self, staged: StagedChunk, info: ChunkInfo) -> None:
        """Gives a filled file its length, attribute and name, in this order: the chunk appears
        whole or not at all. The staged file is used up in any case. Publishing the same block again
        replaces it with itself. Raises Conflict over a chunk that is open, ChunkMismatch if fewer
        bytes were written than ``info.length``, DiskFull."""
        (error,) = self.publish_all([(staged, info)])
        if error is not None:
            raise error

    def publish_all(self, batch: Batch) -> Results:
        """As ``publish``, with what went wrong with each. In ``strict`` all files are synced
        together, then all directories: a batch costs about as much waiting as one chunk."""
        results: list[KvfsError | None] = [None] * len(batch)
        done = False
        try:
            self._each(batch, results, self._complete)
            if self.strict:
                self._sync_files(batch, results)
                self._make_places(batch, results)
            self._each(batch, results, self._name)
            if self.strict:
                self._make_last(batch, results)
            done = True
        finally:
            for (staged, _), error in zip(batch, results, strict=True):
                if done and error is None:
                    staged.file.close()
                    self._staging_slots.release()
                else:
                    self.discard(staged)
        return results

    def _each(
        self, batch: Batch, results: Results, act: Callable[[StagedChunk, ChunkInfo], None]
    ) -> None:
        """With those that nothing went wrong with so far."""
        for index, (staged, info) in enumerate(batch):
            if results[index] is None:
                try:
                    with self.io():
                        act(staged, info)
                except KvfsError as exc:
                    results[index] = exc

    def _complete(self, staged: StagedChunk, info: ChunkInfo) -> None:
        size = staged.file.size()
        if size < info.length:
            raise ChunkMismatch(*info.chunk, detail=f"{size} of {info.length} bytes were staged")
        if size > info.length:
            staged.file.truncate(info.length)
        staged.file.set_attribute(ATTRIBUTE, pack(info))

    def _sync_files(self, batch: Batch, results: Results) -> None:
        left = _left(results)
        files = [batch[index][0].file for index in left]
        syncs = [functools.partial(file.sync, attributes=True) for file in files]
        for index, error in zip(left, self.parallel(syncs), strict=True):
            results[index] = error

    def _make_places(self, batch: Batch, results: Results) -> None:
        """All directories that are missing, for one sync of what leads to them."""
        left = _left(results)
        chunks = [batch[index][1].chunk for index in left]
        for chain in sorted({chunk.chain for chunk in chunks}):
            try:
                with self.io():
                    own = {directory_of(c.inode, chain) for c in chunks if c.chain == chain}
                    self.make_directories(own, chain)
            except KvfsError as exc:
                for index, chunk in zip(left, chunks, strict=True):
                    if chunk.chain == chain:
                        results[index] = exc

    def _name(self, staged: StagedChunk, info: ChunkInfo) -> None:
        chunk = info.chunk
        with self.guard(chunk):
            is_new = not self._may_replace(chunk)
            self.incoming.arrived(chunk.inode)
            self.appear(staged.path, chunk)
            self.versions.damaged.gone(chunk)
            if self.strict:
                self._appearing.setdefault(chunk, _Appearing(is_new)).waiting += 1

    def _make_last(self, batch: Batch, results: Results) -> None:
        """The names of new chunks. A writer who is told that it failed is not to leave something
        that can be found, and not to take away what another one was told is there."""
        left = _left(results)
        places = {index: _place_of(batch[index][1]) for index in left}
        errors = self.sync_directories(places.values())
        for index, directory in places.items():
            chunk = batch[index][1].chunk
            results[index] = errors.get(directory)
            with self.guard(chunk):
                appearing = self._appearing[chunk]
                appearing.waiting -= 1
                appearing.lasts |= results[index] is None
                if not appearing.waiting:
                    del self._appearing[chunk]
                    if appearing.is_new and not appearing.lasts:
                        with contextlib.suppress(TargetFailed, FileNotFoundError):
                            self.vanish(chunk)

    def _may_replace(self, chunk: ChunkId) -> bool:
        """Whether there is a block of this name. Raises Conflict over anything else that is whole;
        what is damaged may be replaced."""
        if not self.disk.exists(path_of(chunk)):
            return False
        file = self.disk.open(path_of(chunk))
        try:
            info = unpack(file.get_attribute(ATTRIBUTE), chunk)
        except ChunkMismatch:
            return False
        finally:
            file.close()
        if info.is_damaged:
            return False
        if not info.is_sealed:
            raise Conflict(detail=f"chunk {chunk} is open for writing")
        if info.version:
            raise Conflict(detail=f"chunk {chunk} is a file's, at version {info.version}")
        return True

    def adopt(self, staged: StagedChunk, chunk: ChunkId) -> ChunkInfo:
        """Gives a staged file its name as the chunk of an ordinary file, as long as it is and
        marked OPEN: somebody has its descriptor and may write on. It is used up in any case. Raises
        Conflict where there is a chunk, DiskFull."""
        try:
            with self.io(chunk), self.guard(chunk):
                if self.disk.exists(path_of(chunk)):
                    raise Conflict(detail=f"chunk {tuple(chunk)} exists")
                info = ChunkInfo(*chunk, ChunkState.OPEN)
                staged.file.set_attribute(ATTRIBUTE, pack(info))
                self.incoming.arrived(chunk.inode)
                self.appear(staged.path, chunk)
                size = staged.file.size()
        except BaseException:
            self.discard(staged)
            raise
        staged.file.close()
        self._staging_slots.release()
        return msgspec.structs.replace(info, length=size)

    def discard(self, staged: StagedChunk) -> None:
        """Drops a staged file. Never raises: the staging directory is emptied at the next start."""
        staged.file.close()
        self._staging_slots.release()
        with contextlib.suppress(TargetFailed, FileNotFoundError):
            self.disk.unlink(staged.path)

    # --- reading

    def borrow(self, chunk: ChunkId, *, direct: bool = False) -> KeptFile:
        """For a reader: as ``open``, or ``Versions.open_settled`` on a chain of several copies. A
        chunk that is whole, and will not become another version, stays open for the next one."""
        self.require_healthy()
        (found,) = self.kept.borrow([chunk], direct=direct)
        if found is not None:
            return found
        ticket: int | None = self.kept.ticket(chunk)
        file, info = (self.versions.open_settled if chunk.chain else self.open)(
            chunk, direct=direct
        )
        if not info.is_sealed or info.version:
            ticket = None
        return self.kept.add(file, info, ticket, direct=direct)

    # --- syncing and removing

    def sync(self, chunk: ChunkId) -> None:
        """See InPlace. On a chain of several copies what is committed becomes durable."""
        if not chunk.chain:
            super().sync(chunk)
            return
        with self.versions.lock(chunk):
            self.versions.sync(chunk)

    def remove(self, chunk: ChunkId, *, unless: Collection[int] = ()) -> bool:
        """Whether there was one. Open descriptors keep showing the old bytes. What is pending for
        the chunk goes as well. Nothing happens if its inode is one of ``unless``."""
        with self.io(), self.guard(chunk):
            if chunk.inode in unless:
                return False
            self.forget_verified(chunk)
            pending = bool(chunk.chain) and self.versions.discard(chunk)
            self.versions.damaged.gone(chunk)
            try:
                self.vanish(chunk)
            except FileNotFoundError:
                return pending
            return True

    def remove_range(self, inode: int, first: int, end: int, chain: int = 0) -> int:
        """Removes the chunks ``first <= number < end`` of an inode, its copies on a chain if that
        is not 0; answers how many there were."""
        numbers: Iterable[int]
        if end - first <= REMOVE_BY_NAME_MAX:
            numbers = range(first, end)
            if not chain and end - first > 1:  # of a file: most were never written
                numbers = [n for n in numbers if self.is_there(ChunkId(inode, n))]
        else:
            found = self.list_directory(directory_of(inode, chain), chain)
            if chain:
                found += self.list_directory(pending_directory_of(chain), chain)
            numbers = {c.number for c in found if c.inode == inode and first <= c.number < end}
        return sum(self.remove(ChunkId(inode, number, chain)) for number in numbers)

    def sync_removals(self, inodes: Sequence[int], chain: int = 0) -> None:
        """After a power loss no removed chunk comes back."""
        if self.strict:
            directories = {directory_of(inode, chain) for inode in inodes}
            if chain and inodes:
                directories.add(pending_directory_of(chain))
            for error in self.sync_directories(directories).values():
                raise error

    def drop_chain(self, chain: int, *, stopping: Callable[[], bool] = lambda: False) -> int:
        """Removes everything that this target has of a chain of several copies that it has left;
        answers how many chunks. Gives up between two chunks once ``stopping``; what is left goes
        the next time. A chunk that comes meanwhile stays."""
        if not chain:
            raise InvalidRequest(detail="chunks that belong to no chain")
        removed = 0
        for chunk in itertools.chain(self.versions.pendings(chain), self.list(chain)):
            if stopping():
                return removed
            removed += self.remove(chunk)
        self.forget_directories(chain)
        with self.io():
            for number in range(DIRECTORIES):
                self.disk.remove_directory(f"{root_of(chain)}/{number:02x}")
            self.disk.remove_directory(pending_directory_of(chain))
            if self.disk.remove_directory(root_of(chain)) and self.strict:
                self.disk.sync_directory(CHAINS)
        return removed


def _left(results: Results) -> list[int]:
    """Items that nothing went wrong with so far."""
    return [index for index, error in enumerate(results) if error is None]


def _place_of(info: ChunkInfo) -> str:
    return directory_of(info.inode, info.chain)
