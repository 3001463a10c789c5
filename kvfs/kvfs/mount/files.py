"""Ordinary files that are open in this mount.

One OpenFile for each inode, however many handles. While a file is open for writing, its size and
times live here and are recorded at the metadata service on flush, fsync and release, every
MOUNT_WRITE_BACK_SECONDS, and when it grew by MOUNT_UNPUSHED_BYTES.

Concurrency. Reads and writes hold ``lock`` shared; what makes the file shorter, opens a hole or
sets times holds it exclusive. So ``size`` never falls under a write at work, and a recorded size
cannot overtake a truncate.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from kvfs.mount.backend import NO_DESCRIPTOR, Backend, Backing
from kvfs.mount.file_state import FileState
from kvfs.mount.limits import (
    FILE_BYTES_MAX,
    MOUNT_PASSED_BYTES_MIN,
    MOUNT_PASSED_SETTLED_SECONDS,
)
from kvfs.mount.locks import SharedLock
from kvfs.mount.passed_writes import PassedWrites
from kvfs.mount.requests import without_privileges
from kvfs.mount.tails import asked_to_cut
from kvfs_base.errors import (
    BehindTheEnd,
    FileTooLarge,
    InodeStale,
    InternalError,
    KvfsError,
    NotSupported,
    QuotaExceeded,
)
from kvfs_base.limits import MOUNT_IO_BYTES, MOUNT_UNPUSHED_BYTES
from kvfs_base.rpc import Done
from kvfs_base.seams import Buffer
from kvfs_base.types import Attr
from kvfs_datapath.client import holes
from kvfs_datapath.client.files import StripedFile
from kvfs_metadata.messages import GetAttr, SetAttr, WidenChunks

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
ALLOCATE_MODES = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE


class OpenFile(FileState):
    """Shared by the handles of one inode."""

    def __init__(self, backend: Backend, attr: Attr) -> None:
        super().__init__(backend, attr)
        self.handles = 0
        self.lock = SharedLock()
        self.pages = self.recorded
        """Size and mtime of the contents that the kernel may have cached."""
        self._cut = False
        """The file was made shorter, and that is not recorded yet."""
        self._tail_clean = False
        self._is_decided = False
        self._finished: tuple[int, int] | None = None
        """Size and mtime when who had written it closed it, if that is what ``backing`` is."""
        self._deciding: trio.Lock | None = None
        """Held by who finds out what ``backing`` is to be."""

    # --- passthrough

    async def decide(self, *, reads_only: bool) -> None:
        """At each open, after it was counted: the first one says whether the kernel reads the file
        by itself (``backing``), since all opens of an inode must be alike."""
        if self.decide_now(reads_only=reads_only):
            return
        self._deciding = self._deciding or trio.Lock()
        async with self._deciding, self.lock.shared():
            if not self._is_decided and reads_only and self._may_pass():
                try:
                    self.backing = await self._backend.in_thread(self._data.open_whole, self.size)
                except KvfsError as exc:  # a read will tell what is wrong, if anything is
                    log.debug("inode %d is not passed through: %s", self.inode, exc)
            self._is_decided = True

    def decide_now(self, *, reads_only: bool, known: Backing | None = None) -> bool:
        """The same if nothing need be waited for, else nothing. ``known`` is what the last one who
        had it open has left; it is taken over if nothing has changed since."""
        if not (self._is_decided or (self._deciding is not None and self._deciding.locked())):
            if known is not None and not self._is_of_now(known):
                known = None
            is_finished = known is not None and known.is_finished
            may_pass = reads_only and self._may_pass(is_finished=is_finished)
            if may_pass and known is not None:
                self.backing = known.descriptor
                self._finished = (known.size, known.mtime_ns) if is_finished else None
            self._is_decided = self.backing != NO_DESCRIPTOR or not may_pass
        return self._is_decided

    def _is_of_now(self, known: Backing) -> bool:
        """A chunk that was replaced has no name any more."""
        is_same = (known.size, known.mtime_ns) == (self.size, self.mtime_ns)
        return is_same and os.fstat(known.descriptor).st_nlink > 0

    def give_up_backing(self) -> Backing | None:
        """What the kernel has read by itself, if it may again: the caller closes it."""
        if self._passed is not None:
            return self._written(self._passed)
        if self.backing == NO_DESCRIPTOR or self._unflushed:
            return None
        descriptor, self.backing = self.backing, NO_DESCRIPTOR
        is_finished = self._finished == (self.size, self.mtime_ns)
        return Backing(descriptor, self.size, self.mtime_ns, is_finished)

    def _written(self, passed: PassedWrites) -> Backing | None:
        """What the kernel has written, for who reads it next: often soon, as a file tier does."""
        if self.size < MOUNT_PASSED_BYTES_MIN or self.dirty or self.sparse or not passed.is_whole:
            return None
        try:
            return Backing(passed.reopen(), self.size, self.mtime_ns, is_finished=True)
        except OSError as exc:
            log.debug("inode %d is not kept open: %s", self.inode, exc)
            return None

    def _may_pass(self, *, is_finished: bool = False) -> bool:
        """Nobody else has it open, and it looks finished."""
        age_ns = self._backend.env.clock.time_ns() - self.mtime_ns
        return (
            self.handles == 1
            and not self.sparse
            and not self._dirty
            and self.size >= MOUNT_PASSED_BYTES_MIN
            and (is_finished or age_ns >= MOUNT_PASSED_SETTLED_SECONDS * 1e9)
        )

    def pass_writes(self) -> None:
        """The kernel writes an empty file by itself from its first open on, if it has no chunks and
        there is a staged file for it."""
        is_first = not self._is_decided and self.handles <= 1
        has_chunks = self.size or not self._tail_clean
        # The kernel would not take set-ID bits away, and each write has to ask for a quota.
        through_us = self.attr.quota or without_privileges(self.attr) is not None
        staged = self._data.stage() if is_first and not (has_chunks or through_us) else None
        if staged is not None:
            self._passed = PassedWrites(self._backend, self._data, staged, self._widen)
            self.backing = staged.fd
            self._is_decided = True

    async def _widen(self) -> None:
        """What the kernel writes by itself may all lie in the first chunk. Raises InvalidRequest if
        others may write to the file."""
        epoch = self._backend.epoch
        attr: Attr = await self._backend.call(WidenChunks(self.inode))
        self._follow(attr)
        self.absorb(attr, epoch)

    @property
    def passes_writes(self) -> bool:
        return self._passed is not None

    def passes_writes_of(self, flags: int) -> bool:
        """The kernel writes by itself for who opens it with ``flags`` as in open(2). It would not
        tell us of a write that is to be recorded before it returns, nor take set-ID bits away that
        the file has got since it was made."""
        through_us = flags & os.O_DSYNC or without_privileges(self.attr) is not None
        return self._passed is not None and not through_us

    @property
    def is_blank(self) -> bool:
        """Empty, without chunks, as far as this mount knows."""
        self._look()
        return self._tail_clean and not (self.size or self._unflushed)

    def refuse_backing(self) -> None:
        """The kernel does not take what ``pass_writes`` had for it."""
        if self._passed is not None:
            self._passed.close()
            self._passed, self.backing = None, NO_DESCRIPTOR

    async def let_write(self) -> None:
        """Before somebody gets a file that the kernel reads by itself for writing: a shared mapping
        writes into the chunk without asking us, so it is marked as open now."""
        if self._passed is not None:
            return
        async with self.lock.exclusive():
            await self._grow(self.size)

    async def _grow(self, size: int) -> None:
        """Who reads the chunk itself finds it long enough for ``size`` bytes of the file. It never
        gets shorter: another mount may have written behind that. Holds the lock exclusive."""
        self._unflushed = True
        if self._passed is not None:
            await self._backend.in_thread(self._passed.grow, size)
        else:
            await self._backend.in_thread(self._data.grow_in_place, size)

    async def _truncate(self, end: int, size: int) -> None:
        """Nothing lies behind ``size`` afterwards. Holds the lock exclusive."""
        self._unflushed = True
        if self._passed is not None:
            await self._backend.in_thread(self._passed.truncate, end, size)
        elif self.backing != NO_DESCRIPTOR:
            await self._backend.in_thread(self._data.truncate_in_place, end, size)
        else:
            await self._on_chunks(StripedFile.truncate, end, size)

    # --- data

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """What ``read`` would answer, if nothing need be waited for."""
        if not self.lock.try_shared():
            return None
        try:
            return self._read_now(offset, length)
        finally:
            self.lock.release_shared()

    def _read_now(self, offset: int, length: int) -> Buffer | None:
        if self._passed is not None:
            view = self._backend.scratch[: min(length, MOUNT_IO_BYTES)]
            return view[: self._passed.read_into(offset, view)]
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        if length <= MOUNT_IO_BYTES:
            view = self._backend.scratch[:length]
            if self._data.read_into_now(offset, view):
                return view
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        """The result is valid until the caller's next await."""
        if not self.lock.try_shared():
            async with self.lock.shared():
                return await self._read(offset, length)
        try:
            return await self._read(offset, length)
        finally:
            self.lock.release_shared()

    async def _read(self, offset: int, length: int) -> Buffer:
        found = self._read_now(offset, length)
        if found is not None:
            return found
        length = min(length, self.size - offset)
        return await self._on_chunks(StripedFile.read, offset, length, self.size, self.sparse)

    async def _on_chunks(self, action: Callable[..., _Result], *arguments: Any) -> _Result:
        """``action`` of the file's chunks, in a thread. A server may say that the file has moved
        away from it, and do nothing: this mount was not heard of for too long. Then once more where
        the file is now; what was written before may be lost, which the next flush says."""
        try:
            return await self._backend.in_thread(action, self._data, *arguments)
        except InodeStale:
            epoch = self._backend.epoch
            self.absorb(await self._backend.call(GetAttr(self.inode)), epoch)
            return await self._backend.in_thread(action, self._data, *arguments)

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Does what ``write`` would, if nothing need be waited for; else nothing."""
        if self._passed is not None:
            return False
        end = offset + len(data)
        if offset > self.size or end - self.recorded[0] >= self._unpushed_max:
            return False
        if not self.lock.try_shared():
            return False
        try:
            if not self._data.write_now(offset, data):
                return False
            self._wrote(end)
        finally:
            self.lock.release_shared()
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        """All of ``data``. Raises FileTooLarge, CapacityError, ServiceError."""
        end = offset + len(data)
        if end > FILE_BYTES_MAX:
            raise FileTooLarge(limit=FILE_BYTES_MAX)
        if self._passed is not None:
            async with self.lock.shared():
                await self._backend.in_thread(self._passed.write, offset, data)
            self._look()
            return
        try:
            await self._write_anywhere(offset, data)
        except QuotaExceeded:
            # The chunks have it already.
            async with self.lock.exclusive():
                await self._cut_refused()
            raise
        if self.size - self.recorded[0] >= MOUNT_UNPUSHED_BYTES:
            await self.push()

    async def _write_anywhere(self, offset: int, data: Buffer) -> None:
        # What is recorded along with one write must not cut what another one has just recorded.
        alone = self._cut and self.attr.quota
        if offset > self.size or alone:
            async with self.lock.exclusive():
                await self._open_hole(offset)
                await self._write(offset, data)
        elif self.lock.try_shared():
            try:
                await self._write(offset, data)
            finally:
                self.lock.release_shared()
        else:
            await self._write_waiting(offset, data)

    async def _write_waiting(self, offset: int, data: Buffer) -> None:
        async with self.lock.shared():
            if offset <= self.size:
                await self._write(offset, data)
                return
        # A truncate came first: what was an overwrite now leaves a hole.
        async with self.lock.exclusive():
            await self._open_hole(offset)
            await self._write(offset, data)

    async def _write(self, offset: int, data: Buffer) -> None:
        self._unflushed = True
        if not self._data.write_now(offset, data):
            await self._on_chunks(StripedFile.write, offset, data)
        end = offset + len(data)
        if self.attr.quota and end > self.recorded[0]:
            # After the bytes, as always: a mount that dies leaves no zeros.
            await self._record(SetAttr(self.inode, grow_to=end))
        self._wrote(end)

    @property
    def _unpushed_max(self) -> int:
        """By how much the file may grow before the service hears of it. What counts for a quota is
        recorded with each write: only the service knows what is left of it."""
        return 1 if self.attr.quota else MOUNT_UNPUSHED_BYTES

    def _wrote(self, end: int) -> None:
        self._unflushed = True
        self.size = max(self.size, end)
        self.mtime_ns = self._backend.env.clock.time_ns()
        self._dirty = True
        self._count_change()

    async def _open_hole(self, offset: int) -> None:
        """The bytes from the end to ``offset`` will read as zeros. Holds the lock exclusive."""
        if offset <= self.size:
            return
        await self._cut_tail()
        if offset <= self.size:
            return
        self.sparse = True
        if self.backing != NO_DESCRIPTOR:
            # Who reads the chunk itself sees zeros there only if the chunk has them.
            await self._grow(offset)

    async def _cut_tail(self, *, wait: bool = True) -> None:
        """A mount that was killed may have written behind the recorded end: once for each open,
        before a hole would show those bytes. Not while a living one may be writing there."""
        if self._tail_clean:
            return
        async with asked_to_cut(self._backend, self.inode, wait=wait) as tail:
            # It may be longer by now. Nobody makes it shorter while we may cut.
            self.size = max(self.size, tail.size)
            if tail.may_cut:
                unrecorded = MOUNT_UNPUSHED_BYTES + MOUNT_IO_BYTES
                await self._truncate(self.size + unrecorded, self.size)
                self._tail_clean = True

    async def _cut_refused(self) -> None:
        """What a quota refused lies behind the end already. If it is not to be cut now, it is as
        what a killed mount left there. Holds the lock exclusive."""
        self._tail_clean = False
        await self._cut_tail(wait=False)

    def is_new(self) -> None:
        """The inode was just made, or nobody has written to it since: nothing can lie behind its
        end."""
        self._tail_clean = True

    # --- recording

    async def change(self, request: SetAttr) -> None:
        """Applies a SetAttr: sizes change the chunks, times replace those that writes left."""
        if request.size is None and request.mtime_ns is None:
            epoch = self._backend.epoch
            attr = await self._backend.call(request)
            self.absorb(attr, epoch)
            return
        await self._store_passed()
        async with self.lock.exclusive():
            if request.mtime_ns is None:
                request.mtime_ns = self._backend.env.clock.time_ns()
            if request.size is None:
                await self._record(request)
            elif request.size > self.size:
                await self._lengthen(request, request.size)
            else:
                await self._shorten(request.size)
                await self._record(request)

    async def _shorten(self, size: int) -> None:
        if size == self.size:
            return
        tail = 0 if self._tail_clean else MOUNT_UNPUSHED_BYTES + MOUNT_IO_BYTES
        await self._truncate(self.size + tail, size)
        self._tail_clean = True
        # The chunks are cut: should the service not answer now, a later push tells it.
        self.size = size
        self._dirty = self._cut = True
        self._count_change()

    async def _lengthen(self, request: SetAttr, size: int) -> None:
        """Sends ``request`` with the new size. Holds the lock exclusive."""
        if size > FILE_BYTES_MAX:
            raise FileTooLarge(limit=FILE_BYTES_MAX)
        await self._open_hole(size)
        if self._cut:
            request.size = size
        else:  # another mount may just have made it longer than that
            request.size, request.grow_to = None, size
        try:
            await self._record(request)
        except QuotaExceeded:
            if self.backing != NO_DESCRIPTOR:  # whose length is what the kernel's readers see
                await self._cut_refused()
            raise

    async def allocate(self, offset: int, length: int, mode: int) -> None:
        """As fallocate(2). What is allocated is not reserved: it is a hole that may be written."""
        if mode & ~ALLOCATE_MODES:
            raise NotSupported(detail=f"fallocate mode {mode:#x}")
        end = offset + length
        if end > FILE_BYTES_MAX:
            raise FileTooLarge(limit=FILE_BYTES_MAX)
        await self._store_passed()
        async with self.lock.exclusive():
            self._look()
            request = SetAttr(self.inode, mtime_ns=self._backend.env.clock.time_ns())
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                await self._zero(offset, min(end, self.size), request)
            if end > self.size and not mode & FALLOC_FL_KEEP_SIZE:
                await self._backend.check_space(end - self.size)
                await self._lengthen(request, end)
            else:
                await self._record(request)

    async def _zero(self, start: int, end: int, request: SetAttr) -> None:
        if start >= end:
            return
        if not self.sparse:
            # First: chunks that are missing are damage anywhere else.
            self.sparse = True
            await self._record(SetAttr(self.inode, mtime_ns=request.mtime_ns))
        self._unflushed = True
        if self._passed is not None:
            await self._backend.in_thread(self._passed.zero, start, end)
            return
        passed = self.backing != NO_DESCRIPTOR
        zero = functools.partial(holes.zero, self._data, start, end, keep_first=passed)
        await self._backend.in_thread(zero)

    async def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE, as lseek(2). Raises BehindTheEnd."""
        async with self.lock.shared():
            self._look()
            if offset >= self.size:
                raise BehindTheEnd(size=self.size)
            if self._passed is not None:
                return self._passed.seek(offset, whence)
            find = holes.next_data if whence == os.SEEK_DATA else holes.next_hole
            if not self.sparse:
                return offset if whence == os.SEEK_DATA else self.size
            found = await self._backend.in_thread(find, self._data, offset, self.size)
            if whence == os.SEEK_DATA and found >= self.size:
                raise BehindTheEnd(size=self.size)
            return found

    async def push(self) -> None:
        """Records size and times if they changed here."""
        await self._store_passed()
        async with self.lock.shared():
            if self._dirty and self.attr.nlink:
                await self._record(SetAttr(self.inode, mtime_ns=self.mtime_ns))

    async def _record(self, request: SetAttr) -> None:
        """Sends ``request`` along with what is not recorded yet."""
        self._add_unrecorded(request)
        epoch = self._backend.epoch
        self._recorded(await self._backend.call(request), epoch)

    def _add_unrecorded(self, request: SetAttr) -> None:
        if request.size is None and self._dirty:
            if self._cut:
                request.size = self.size
            else:
                request.grow_to = max(self.size, request.grow_to or 0)
        request.sparse = self.sparse

    def _recorded(self, attr: Attr, epoch: int) -> None:
        """The answer to what was sent at ``epoch``."""
        self._follow(attr)
        # If others have made it longer, what the kernel has of it is not that.
        follows = self.pages == self.recorded and attr.size <= self.size
        self.recorded = (attr.size, attr.mtime_ns)
        if follows:
            self.pages = self.recorded
        if (
            self._changed_at <= epoch
        ):  # else a write went on meanwhile: still dirty, its size is newer
            self._dirty = self._cut = False
            self.absorb(attr, epoch)
            self._count_change()

    async def _store_passed(self) -> None:
        """No size is recorded before the chunks have what lies there."""
        self._look()
        if self._passed is not None and not self._passed.is_stored and self.attr.nlink:
            await self._passed.store(self._record_growth)
            self._look()

    async def _record_growth(self, size: int) -> None:
        await self._backend.call(SetAttr(self.inode, grow_to=size, sparse=self.sparse))

    @property
    def flushed(self) -> bool:
        """``flush`` would do nothing."""
        self._look()
        unflushed = self._unflushed if self._passed is None else not self._passed.is_stored
        return not (unflushed or self._dirty or self.error is not None)

    async def flush(self) -> None:
        """Everything written is with the servers, size and times are recorded."""
        self._tell_error()
        if self._unflushed and self._passed is None:
            self._unflushed = False
            try:
                await self._backend.in_thread(self._data.flush)
            except BaseException:
                self._unflushed = True
                raise
            # The kernel may hold the chunk open for writing: whoever closes last seals it.
            self._unflushed = self._unflushed or self.backing != NO_DESCRIPTOR
        await self.push()
        self._tell_error()

    def write_begins(self) -> None:
        """The kernel is about to write."""
        if self._passed is not None and self.attr.nlink:
            self._passed.write_begins()

    def flush_soon(self, done: Done) -> bool:
        """As ``flush`` of what the kernel has written by itself, without a task that waits; what
        it has to wait for is the backend's. ``done`` is told None, and no error, if ``flush`` has
        to be used after all. False if it has to be at once."""
        self._look()
        if self._passed is None or self.error is not None or not self.attr.nlink:
            return False
        return self._passed.store_soon(
            functools.partial(self._backend.guard, self._push_soon, done)
        )

    def _push_soon(self, done: Done) -> None:
        self._look()
        passed = self._passed
        if passed is None or not (passed.has_chunks and self._dirty and self.lock.try_shared()):
            done(None, None)
            return
        request = SetAttr(self.inode, mtime_ns=self.mtime_ns)
        self._add_unrecorded(request)
        epoch = self._backend.epoch

        def tell(attr: Attr | None, error: KvfsError | None) -> None:
            try:
                if attr is not None:
                    self._recorded(attr, epoch)
            finally:
                self.lock.release_shared()
            if error is None:
                error, self.error = self.error, None
            done(True, error)

        if not self._backend.call_soon(request, tell):
            self.lock.release_shared()
            done(None, None)

    async def sync(self) -> None:
        """Data on stable storage at the chunk servers; size and times are recorded."""
        self._tell_error()
        await self._store_passed()
        if self._passed is not None:
            self._passed.touch()
        await self._backend.in_thread(self._data.sync)
        await self.push()
        self._tell_error()

    def _tell_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    async def write_back(self) -> None:
        """A push that nobody waits for."""
        if self._passed is not None and not self._passed.is_worth_storing:
            return
        try:
            await self.push()
        except KvfsError as exc:
            self.error = exc
        except Exception as exc:  # a bug; the mount lives on
            log.exception("inode %d was not written back", self.inode)
            self.error = InternalError(detail=type(exc).__name__)

    def close_now(self) -> bool:
        """Lets go of descriptors, if nothing need be waited for."""
        if self._passed is not None:
            if not self._passed.close_now():
                return False
            self._tail_clean = not self._passed.has_chunks
            self._passed, self._striped, self.backing = None, None, NO_DESCRIPTOR
            self._unflushed = False
        elif self._unflushed:
            return False
        self._close_backing()
        if self._striped is not None:
            self._striped.close()
        return True

    async def close(self) -> None:
        """The same in any case."""
        if self._passed is not None:
            passed, self._passed, self.backing = self._passed, None, NO_DESCRIPTOR
            async with passed.lock.exclusive():
                self._unflushed = await self._backend.in_thread(passed.close)
        if not self.close_now():
            self._close_backing()
            await self._backend.in_thread(self._data.close)

    def _close_backing(self) -> None:
        if self.backing != NO_DESCRIPTOR:
            os.close(self.backing)
            self.backing = NO_DESCRIPTOR
