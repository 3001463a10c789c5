"""Chunks of files on chains of several copies: each change makes the next version of a chunk.

A version is *pending* until the rest of the chain has it, then it is committed
(docs/design/0004-chains.md). An update from the chunk's end on is written behind the end of the
committed bytes, and one attribute says that it is there; any other makes a new file in
``pending/``. Committing is one ``setxattr`` or one ``rename``: readers have the old version or the
new one, whole, and whoever has the old one open keeps it.

What is pending on disk outlives the process. Copies are found when the target is opened, appends
when their chunk is next touched (finding them all means to read every attribute). What another
process left is used only if its checksum is right: it may have been cut short. Where both an append
and a copy are pending, the copy counts: that is how one replaces the other in one step.

Only ``open``, ``open_settled`` and ``seen`` may be called without the chunk's lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ChunkPending,
    Conflict,
    DiskFull,
    InvalidRequest,
    KvfsError,
    NotPermitted,
    TargetFailed,
)
from kvfs_base.seams import Buffer, DiskFile
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.damaged import DamagedChunks
from kvfs_datapath.chunks.locks import ChunkLocks
from kvfs_datapath.chunks.numbers import UpdateNumbers
from kvfs_datapath.chunks.patching import Change
from kvfs_datapath.chunks.tree import ChunkTree, refuse_damaged
from kvfs_datapath.format import (
    ATTRIBUTE,
    Append,
    ChunkInfo,
    ChunkState,
    directory_of,
    pack,
    path_of,
    pending_directory_of,
    pending_path_of,
    unpack,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Pending:
    info: ChunkInfo
    is_copy: bool


class Versions:
    """The file chunks of one target. Every operation raises TargetFailed once the disk has failed;
    those that write raise DiskFull, and have then changed nothing that anybody can see."""

    def __init__(self, tree: ChunkTree) -> None:
        self._tree = tree
        self.locks = ChunkLocks()
        self._pending: dict[ChunkId, _Pending] = {}
        """What was made pending, or found to be whole, since the start."""
        self._left: set[ChunkId] = set()
        """Copies of a former process that nobody has looked at yet."""
        for chain in tree.chains():
            self._left.update(tree.list_directory(pending_directory_of(chain), chain))
        self._numbers = UpdateNumbers()
        self.damaged = DamagedChunks(tree)

    # --- locks and numbers

    def lock(
        self, chunk: ChunkId, seconds: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Held by whoever changes a chunk. Raises Conflict after ``seconds`` of waiting."""
        return self.locks.hold(chunk, seconds)

    def seen(self, chunk: ChunkId, writer: int, sequence: int) -> int | None:
        """Which version of the chunk this update made, as far as that is remembered: the last
        UPDATES_REMEMBERED_MAX, and the one that made the committed version."""
        version = self._numbers.find(chunk, writer, sequence)
        if version is None:
            committed = self.committed(chunk)
            if committed is not None and (committed.writer, committed.sequence) == (
                writer,
                sequence,
            ):
                return committed.version
        return version

    # --- looking

    def open(self, chunk: ChunkId, *, direct: bool = False) -> tuple[DiskFile, ChunkInfo]:
        """The committed version, read-only: the first ``length`` bytes of the file, which stay as
        they are. Raises ChunkNotFound, ChunkMismatch."""
        return self._tree.open(chunk, direct=direct)

    def open_settled(self, chunk: ChunkId, *, direct: bool = False) -> tuple[DiskFile, ChunkInfo]:
        """As ``open``. Raises ChunkPending if another version is on its way, or was when the server
        ended (what remained of it may turn out to be useless: ``pending`` finds out); ChunkCorrupt
        for one that is known to be damaged."""
        tree = self._tree
        if chunk in self._pending or chunk in self._left:
            raise ChunkPending(*chunk)
        with tree.io(chunk):
            file = tree.disk.open(path_of(chunk), direct=direct)
            try:
                info, append = tree.look(file, chunk)
                if append is not None:
                    raise ChunkPending(*chunk)
                refuse_damaged(info)
            except BaseException:
                file.close()
                raise
        return file, info

    def committed(self, chunk: ChunkId) -> ChunkInfo | None:
        """It may be known to be damaged. Raises ChunkMismatch if what is there cannot be used."""
        try:
            info = self._tree.stat(chunk)
        except ChunkNotFound:
            return None
        self.damaged.found(info)
        return info

    def pending(self, chunk: ChunkId) -> ChunkInfo | None:
        """The version that is pending. Raises ChunkCorrupt, ChunkMismatch if the committed one is
        damaged, so that it is not known whether there is one."""
        found = self._pending.get(chunk)
        if found is None and chunk in self._left:
            found = self._find_copy(chunk)
        if found is None:
            found = self._find_append(chunk)
        return None if found is None else found.info

    def open_pending(self, chunk: ChunkId) -> tuple[DiskFile, ChunkInfo]:
        """The file that has the pending version, read-only: its first ``length`` bytes. Raises
        ChunkNotFound if none is pending, and as ``pending``."""
        info = self.pending(chunk)
        found = self._pending.get(chunk)
        if info is None or found is None:
            raise ChunkNotFound(*chunk)
        with self._tree.io(chunk):
            path = pending_path_of(chunk) if found.is_copy else path_of(chunk)
            return self._tree.disk.open(path), info

    def pendings(self, chain: int, *, scan: bool = False) -> Iterator[ChunkId]:
        """Chunks that may have a pending version: what this process made and what it knows of.
        Appends of a former one are among them if their chunk was touched since, or with ``scan``,
        which reads every attribute of the chain (some 20 us each)."""
        known = {c for c in (*self._pending, *self._left) if c.chain == chain}
        yield from known
        if scan:
            for chunk in self._tree.list(chain):
                if chunk not in known and self._has_append(chunk):
                    yield chunk

    def _has_append(self, chunk: ChunkId) -> bool:
        try:
            file, _, append = self._open(chunk)
        except (ChunkNotFound, ChunkMismatch):
            return False
        file.close()
        return append is not None

    def _open(
        self, chunk: ChunkId, *, write: bool = False
    ) -> tuple[DiskFile, ChunkInfo, Append | None]:
        """The committed file. Raises NotPermitted if it is a block and is to be written."""
        with self._tree.io(chunk):
            file = self._tree.disk.open(path_of(chunk), write=write)
            try:
                info, append = self._tree.look(file, chunk)
                if write and not info.version:
                    raise NotPermitted(reason="a block is never written again")
            except BaseException:
                file.close()
                raise
            return file, info, append

    # --- what a former process left

    def _find_copy(self, chunk: ChunkId) -> _Pending | None:
        """Checks a file in ``pending/``. One that is damaged, or not newer than what is committed
        (its removal was lost), is dropped."""
        before = self.committed(chunk)
        tree = self._tree
        info: ChunkInfo | None = None
        with tree.io():
            with contextlib.suppress(FileNotFoundError, ChunkMismatch):
                file = tree.disk.open(pending_path_of(chunk))
                try:
                    info = unpack(file.get_attribute(ATTRIBUTE), chunk)
                    whole = file.size() == info.length and not info.is_damaged
                    if not whole or tree.checksum(file, info.length) != info.crc32c:
                        info = None
                finally:
                    file.close()
            if info is None or info.version <= (before.version if before else 0):
                log.info("what was pending for chunk %s cannot be used", tuple(chunk))
                self.discard(chunk)
                return None
        self._left.discard(chunk)
        found = self._pending[chunk] = _Pending(info, is_copy=True)
        return found

    def _find_append(self, chunk: ChunkId) -> _Pending | None:
        """Checks the bytes behind the committed end that an attribute speaks of."""
        try:
            file, info, append = self._open(chunk)
        except ChunkNotFound:
            return None
        try:
            if append is None:
                return None
            tree = self._tree
            with tree.io(chunk):
                value = tree.checksum(file, info.length)
                if value != info.crc32c:
                    raise ChunkCorrupt(*chunk, expected_crc32c=info.crc32c, found_crc32c=value)
                count = append.length - info.length
                if (
                    count >= 0
                    and file.size() >= append.length
                    and tree.checksum(file, count, info.length, value) == append.crc32c
                ):
                    found = self._pending[chunk] = _Pending(_after(info, append), is_copy=False)
                    return found
        finally:
            file.close()
        log.info("what was pending for chunk %s cannot be used", tuple(chunk))
        self._clear_append(chunk)
        return None

    # --- making a version

    def prepare(
        self,
        chunk: ChunkId,
        update: m.Update,
        data: Sequence[Buffer],
        version: int | None = None,
    ) -> ChunkInfo:
        """Makes the version after the committed one pending, in the place of one that is; the same
        update again changes nothing. What lies between the chunk's end and the offset is zeros; a
        chunk that does not reach a cut keeps its bytes, a missing one becomes an empty one.
        ``data`` was checked by the caller. Raises Conflict if the next version is not ``version``,
        ChunkCorrupt or ChunkMismatch if what is committed is damaged, NotPermitted for a block."""
        if sum(map(len, data)) != (0 if update.cut else update.length):
            raise InvalidRequest(detail=f"not the {update.length} bytes of the update")
        file, before, append = self._open_to_change(chunk)
        try:
            known: ChunkInfo | None = None
            if append is not None or chunk in self._pending or chunk in self._left:
                known = self.pending(chunk)
            if version not in (None, before.version + 1):
                raise Conflict(detail=f"chunk {tuple(chunk)} has version {before.version}")
            made = msgspec.structs.replace(
                before,
                state=ChunkState.PENDING,
                version=before.version + 1,
                writer=update.writer,
                sequence=update.sequence,
            )
            if known is not None and _number(known) == _number(made):
                return known
            if update.cut:
                change = Change.cut(before.length, update.offset)
            else:
                change = Change.write(before.length, update.offset, data)
            if update.offset or not change.keeps_nothing:
                refuse_damaged(before)  # no zeros for what was there
            elif before.is_damaged:
                return self._copy(None, before, made, change.from_nothing())
            if file is not None and known is None and change.keeps_all and change.after:
                return self._append(file, before, made, change)
            return self._copy(file, before, made, change)
        finally:
            if file is not None:
                file.close()

    def _open_to_change(self, chunk: ChunkId) -> tuple[DiskFile | None, ChunkInfo, Append | None]:
        try:
            return self._open(chunk, write=True)
        except ChunkNotFound:
            return None, ChunkInfo(*chunk, ChunkState.SEALED), None

    def _append(
        self, file: DiskFile, before: ChunkInfo, made: ChunkInfo, change: Change
    ) -> ChunkInfo:
        chunk, tree = before.chunk, self._tree
        made = msgspec.structs.replace(
            made, length=change.after, crc32c=change.extend_crc32c(before.crc32c)
        )
        with tree.io(chunk):
            if file.size() > before.length:  # left by an update that did not happen
                file.truncate(before.length)
            try:
                change.append(file)
                # Readers may see it a little early, but never the attribute without it.
                self._pending[chunk] = _Pending(made, is_copy=False)
                append = Append(made.length, made.crc32c, made.writer, made.sequence)
                file.set_attribute(ATTRIBUTE, pack(before, append))
                if tree.strict or before.durable:
                    file.sync(attributes=True)
            except TargetFailed:
                raise  # a restart will find out what is there
            except BaseException:
                self._pending.pop(chunk, None)
                with contextlib.suppress(DiskFull):
                    file.set_attribute(ATTRIBUTE, pack(before))
                    file.truncate(before.length)
                raise
        return made

    def _copy(
        self, file: DiskFile | None, before: ChunkInfo, made: ChunkInfo, change: Change
    ) -> ChunkInfo:
        def fill(draft: DiskFile) -> ChunkInfo:
            if change.keeps_nothing:
                _, checksum = change.from_nothing().copy(None, draft, self._tree.buffers)
                return msgspec.structs.replace(made, length=change.after, crc32c=checksum)
            found, checksum = change.copy(file, draft, self._tree.buffers)
            if found != before.crc32c:
                raise ChunkCorrupt(*before.chunk, expected_crc32c=before.crc32c, found_crc32c=found)
            return msgspec.structs.replace(made, length=change.after, crc32c=checksum)

        return self._put_aside(before.chunk, fill)

    def prepare_whole(self, chunk: ChunkId, info: ChunkInfo, pieces: Iterable[Buffer]) -> ChunkInfo:
        """Makes what another member has pending here, whatever this one has: version, number,
        length and checksum are ``info``'s, and the bytes come piece by piece; none if it is
        damaged there. One that is not newer than what is committed is forgotten with the process,
        and a damaged one. Raises ChunkMismatch, ChunkCorrupt if other bytes came."""
        state = ChunkState.DAMAGED if info.is_damaged else ChunkState.PENDING
        return self._put_aside(chunk, self._filling(chunk, info, pieces, state))

    def _filling(
        self, chunk: ChunkId, info: ChunkInfo, pieces: Iterable[Buffer], state: ChunkState
    ) -> Callable[[DiskFile], ChunkInfo]:
        if not chunk.chain or info.chunk != chunk or not info.version:
            raise InvalidRequest(detail=f"version {info.version} of chunk {tuple(info.chunk)}")
        durable = info.durable
        with contextlib.suppress(ChunkMismatch):
            before = self.committed(chunk)
            # Somebody asked for that here; the other member may never have been asked.
            durable |= before is not None and before.durable

        def fill(draft: DiskFile) -> ChunkInfo:
            if not info.is_damaged:
                _write_whole(draft, chunk, info, pieces)
            return msgspec.structs.replace(info, state=state, durable=durable)

        return fill

    def _put_aside(self, chunk: ChunkId, fill: Callable[[DiskFile], ChunkInfo]) -> ChunkInfo:
        """A file that is complete gets its place in ``pending/``."""
        tree = self._tree
        with tree.io(), self._draft(fill) as (path, made), tree.guard(chunk):
            tree.move(path, pending_path_of(chunk), chunk.chain)
            before = self._pending.get(chunk)
            self._pending[chunk] = _Pending(made, is_copy=True)
            self._left.discard(chunk)
            if tree.strict:
                try:
                    tree.disk.sync_directory(pending_directory_of(chunk.chain))
                except KvfsError:
                    self._take_back(chunk, before)
                    raise
        return made

    def _take_back(self, chunk: ChunkId, before: _Pending | None) -> None:
        """Whoever asked for a version will be told that there is none."""
        self._tree.discard_draft(pending_path_of(chunk))
        del self._pending[chunk]
        if before is not None and not before.is_copy:
            self._pending[chunk] = before

    @contextlib.contextmanager
    def _draft(self, fill: Callable[[DiskFile], ChunkInfo]) -> Iterator[tuple[str, ChunkInfo]]:
        """A file with all that belongs to it, for as long as it takes to give it a place."""
        tree = self._tree
        file, path = tree.create_draft()
        try:
            try:
                info = fill(file)
                file.set_attribute(ATTRIBUTE, pack(info))
                if tree.strict or info.durable:
                    file.sync(attributes=True)
            finally:
                file.close()
            yield path, info
        except BaseException:
            tree.discard_draft(path)
            raise

    # --- committing and dropping

    def commit(self, chunk: ChunkId) -> ChunkInfo:
        """The pending version becomes the committed one. Raises ChunkNotFound if none is pending:
        the chunk was removed meanwhile."""
        pending = self.pending(chunk)
        found = self._pending.get(chunk)
        if pending is None or found is None:
            raise ChunkNotFound(*chunk)
        info = pending
        if not pending.is_damaged:
            info = msgspec.structs.replace(pending, state=ChunkState.SEALED)
        try:
            (self._commit_copy if found.is_copy else self._commit_append)(chunk, info)
        except ChunkNotFound:
            self._pending.pop(chunk, None)
            raise
        self._numbers.add(info)
        self.damaged.found(info)
        return info

    def _commit_copy(self, chunk: ChunkId, info: ChunkInfo) -> None:
        tree = self._tree
        with tree.io(chunk):
            with tree.guard(chunk):
                tree.appear(pending_path_of(chunk), chunk)
                self._pending.pop(chunk, None)
            if info.is_damaged:
                tree.forget_verified(chunk)
            else:
                tree.remember_verified(chunk, info.crc32c)
            if tree.strict:
                tree.disk.sync_directory(directory_of(chunk.inode, chunk.chain))

    def _commit_append(self, chunk: ChunkId, info: ChunkInfo) -> None:
        tree = self._tree
        file, before, _ = self._open(chunk, write=True)
        try:
            with tree.io(chunk):
                file.set_attribute(ATTRIBUTE, pack(info))
                self._pending.pop(chunk, None)
                if tree.was_verified(before):
                    tree.remember_verified(chunk, info.crc32c)
                if tree.strict:
                    file.sync(attributes=True)
        finally:
            file.close()

    def drop(self, chunk: ChunkId) -> None:
        """Forgets what is pending, if anything is. It stays pending if this fails."""
        with self._tree.io():
            # First the record that a copy may hide: a crash in between leaves the copy.
            self._clear_append(chunk)
            with self._tree.guard(chunk):
                dropped = self.discard(chunk)
            if dropped and self._tree.strict:
                self._tree.disk.sync_directory(pending_directory_of(chunk.chain))

    def _clear_append(self, chunk: ChunkId) -> None:
        try:
            file, info, append = self._open(chunk, write=True)
        except (ChunkNotFound, ChunkMismatch, NotPermitted):
            return  # nothing there that could be committed
        try:
            if append is not None:
                file.set_attribute(ATTRIBUTE, pack(info))
                if self._tree.strict:
                    file.sync(attributes=True)
                file.truncate(info.length)
        finally:
            file.close()

    def discard(self, chunk: ChunkId) -> bool:
        """Removes the file in ``pending/``, if there is one, for those who remove the chunk as
        well. Answers whether there was one."""
        if chunk not in self._pending and chunk not in self._left:
            return False
        found = self._pending.get(chunk)
        removed = False
        if found is None or found.is_copy:
            with contextlib.suppress(FileNotFoundError):
                self._tree.disk.unlink(pending_path_of(chunk))
                removed = True
        self._pending.pop(chunk, None)
        self._left.discard(chunk)
        return removed

    def forget_pending(self, chain: int) -> int:
        """Drops everything that is pending on a chain, also what nobody has touched since a former
        process: reads every attribute of the chain. Waits for chunks that are being written, so
        the caller holds no lock. Answers how many there were."""
        count = 0
        for chunk in self.pendings(chain, scan=True):
            with self.lock(chunk):
                self.drop(chunk)
                count += 1
        return count

    # --- other

    def replace(self, chunk: ChunkId, info: ChunkInfo, pieces: Iterable[Buffer]) -> None:
        """Puts the bytes that another member has of the committed version ``info`` in the place of
        damaged ones. Raises Conflict while a version is pending, ChunkMismatch, ChunkCorrupt if
        other bytes came."""
        if chunk in self._pending:
            raise Conflict(detail=f"chunk {tuple(chunk)} has a pending version")

        fill = self._filling(chunk, info, pieces, ChunkState.SEALED)
        tree = self._tree
        with tree.io(), self._draft(fill) as (path, made):
            tree.forget_verified(chunk)
            tree.appear(path, chunk)
            self.damaged.found(made)
            if tree.strict:
                tree.disk.sync_directory(directory_of(chunk.inode, chunk.chain))

    def sync(self, chunk: ChunkId) -> None:
        """What is committed is durable from here on, and later versions are synced before they can
        take its place. A missing chunk (a hole) is fine."""
        tree = self._tree
        self.pending(chunk)  # a former process may have left one
        try:
            file, info, append = self._open(chunk)
        except ChunkNotFound:
            return
        with tree.io(chunk):
            try:
                if not info.durable and info.version:
                    durable = msgspec.structs.replace(info, durable=True)
                    file.set_attribute(ATTRIBUTE, pack(durable, append))
                file.sync(attributes=True)
            finally:
                file.close()
            directory = directory_of(chunk.inode, chunk.chain)
            tree.make_directories([directory], chunk.chain)
            tree.disk.sync_directory(directory)
            self._sync_pending(chunk)

    def _sync_pending(self, chunk: ChunkId) -> None:
        """It was prepared when nobody had asked for durability, and is not to take that away. An
        append is in the file that was synced."""
        found = self._pending.get(chunk)
        if found is None or found.info.durable:
            return
        info = msgspec.structs.replace(found.info, durable=True)
        if found.is_copy:
            file = self._tree.disk.open(pending_path_of(chunk), write=True)
            try:
                file.set_attribute(ATTRIBUTE, pack(info))
                file.sync(attributes=True)
            finally:
                file.close()
        found.info = info


def _number(info: ChunkInfo) -> tuple[int, int, int]:
    return info.version, info.writer, info.sequence


def _after(info: ChunkInfo, append: Append) -> ChunkInfo:
    """The version that an append makes."""
    return msgspec.structs.replace(
        info,
        state=ChunkState.PENDING,
        version=info.version + 1,
        length=append.length,
        crc32c=append.crc32c,
        writer=append.writer,
        sequence=append.sequence,
    )


def _write_whole(
    draft: DiskFile, chunk: ChunkId, info: ChunkInfo, pieces: Iterable[Buffer]
) -> None:
    length = checksum = 0
    for piece in pieces:
        checksum = crc32c(piece, checksum)
        length += draft.pwritev([piece], length)
    if length != info.length:
        raise ChunkMismatch(*chunk, detail=f"{length} of {info.length} bytes came")
    if checksum != info.crc32c:
        raise ChunkCorrupt(*chunk, expected_crc32c=info.crc32c, found_crc32c=checksum)
