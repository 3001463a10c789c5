"""New files that the kernel writes by itself, into a staged chunk file.

Where it gets longer than a chunk, the file's chunks are made longer (docs/design/0010), if nobody
else may write to it: then all of it stays where it is, up to FILE_WIDE_CHUNK_BYTES.

The chunk gets its name when the file is flushed: other mounts see the file's bytes from then on,
as close-to-open promises. Until the last handle is gone the kernel may write on, which nobody tells
us: size and mtime are the chunk file's. What lies behind the end of the first chunk (the *rest*) is
copied to where it belongs at each flush, and cut off the first one at the end.

A server that was restarted has forgotten what was staged, and another mount may have made the
chunk first, or taken it away (O_TRUNC). The kernel still writes to our file, so each flush then
copies all of it.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Awaitable, Callable

import trio

from kvfs.mount.adoptions import Answered
from kvfs.mount.backend import NO_DESCRIPTOR, Backend
from kvfs.mount.limits import PASSED_SETTLED_SECONDS
from kvfs.mount.locks import SharedLock
from kvfs_base.errors import (
    BehindTheEnd,
    Conflict,
    ConnectionLost,
    FileTooLarge,
    InvalidRequest,
    KvfsError,
)
from kvfs_base.limits import CALL_SECONDS, MOUNT_UNPUSHED_BYTES
from kvfs_base.seams import Buffer
from kvfs_datapath.client import holes
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.client.staging import Adoption, StagedFile
from kvfs_datapath.client.transfers import disk_error, lengthen

log = logging.getLogger(__name__)


class PassedWrites:
    """Of one open inode. ``lock`` is held by whoever stores what the kernel wrote."""

    def __init__(
        self,
        backend: Backend,
        data: StripedFile,
        staged: StagedFile,
        widen: Callable[[], Awaitable[None]],
    ) -> None:
        """``widen`` makes the chunks of the file longer; raises InvalidRequest if it may not."""
        self.descriptor = staged.fd
        self.size = 0
        self.mtime_ns = 0
        self.lock = SharedLock()
        self.unstored = False
        """The kernel wrote what ``store`` has not seen."""
        self._backend = backend
        self._data = data
        self._staged = staged
        self._widen = widen
        self._may_widen = True
        self._adopted = False
        self._adopting: list[Callable[[], None]] = []
        """Who is told when the chunk server has answered ``store_soon``; empty if it was not
        asked."""
        self._asked = NO_DESCRIPTOR
        """What its answer comes from."""
        self._orphaned = False
        self._copied_end = 0
        """Up to where the rest was copied: there may be chunks besides the first one."""
        self.look()
        self.unstored = False

    def look(self) -> bool:
        """Whether the kernel has changed the file since the last look."""
        found = os.fstat(self.descriptor)
        changed = (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns)
        self.size, self.mtime_ns = found.st_size, found.st_mtime_ns
        self.unstored |= changed
        return changed

    @property
    def is_stored(self) -> bool:
        """The kernel wrote nothing that ``store`` has not seen, and no ``store`` is at work."""
        return self.lock.is_free and not self.unstored

    @property
    def sparse(self) -> bool:
        """Whether chunks may be missing behind the first one."""
        found = os.fstat(self.descriptor)
        return found.st_size > self._own_bytes and found.st_blocks * 512 < found.st_size

    @property
    def _own_bytes(self) -> int:
        """What the first chunk holds of the file."""
        return 0 if self._orphaned else self._data.chunk_bytes

    @property
    def is_worth_storing(self) -> bool:
        """For who is not asked to: a rest is copied when it has doubled. A file that grows all day
        would be copied all day."""
        copied = max(0, self._copied_end - self._own_bytes)
        return self.size <= self._own_bytes or self.size - self._own_bytes >= 2 * copied

    async def store(self, record: Callable[[int], Awaitable[None]]) -> None:
        """What was written so far is with the chunk servers. ``record``: the file is this long, at
        least; called every now and then while much is copied. Raises DiskFull."""
        async with self.lock.exclusive():
            if not self.unstored:
                return
            self.unstored = False
            try:
                if not (self._adopted or self._orphaned):
                    await self._adopt()
                elif self._adopted and not os.fstat(self.descriptor).st_nlink:
                    log.info("a new file is copied: somebody has removed its chunk")
                    self._adopted, self._orphaned, self._copied_end = False, True, 0
                if self.size > self._own_bytes and self._adopted and not self._copied_end:
                    await self._widen_chunks()
                if self.size > self._own_bytes:
                    await self._copy(record)
            except BaseException:
                self.unstored = True
                raise

    def store_soon(self, done: Callable[[], None]) -> bool:
        """``store`` of what one chunk holds, without a task that waits: see Backend.adoptions. It
        went well if the file then ``has_chunks``; else ``store`` has to be used. False, and nothing
        was done, if it has to be at once."""
        if self._orphaned or self.size > self._own_bytes:
            return False
        if self._adopting:
            self._backend.adoptions.collect()
        if self._adopting:
            self.unstored = False
            self._adopting.append(done)
            self._backend.adoptions.need(self._asked)
            return True
        if not self.lock.is_free:
            return False
        if self._adopted:
            if not os.fstat(self.descriptor).st_nlink:
                return False
            self.unstored = False
            done()
            return True
        return self._begin_adopt(done, self._backend.adoptions.wait)

    def write_begins(self) -> None:
        """The kernel is about to write for the first time: the chunk gets its name meanwhile, as
        sooner or later it has to."""
        if not (self.has_chunks or self._adopting) and self.lock.is_free:
            self._begin_adopt(lambda: None, self._backend.adoptions.leave)

    def _begin_adopt(self, done: Callable[[], None], then: Callable[[int, Answered], None]) -> bool:
        # Somebody else's answer may be all that keeps the connection.
        self._backend.adoptions.collect()
        try:
            adoption = self._data.begin_adopt(self._staged)
        except ConnectionLost:
            return False
        if adoption is None:
            return False
        self.lock.try_exclusive()
        self.unstored = False
        self._adopting.append(done)
        self._asked = adoption.fileno()

        def answered(readable: bool) -> None:
            try:
                if readable:
                    adoption.finish()
                    self._adopted = True
                else:
                    adoption.give_up()
            except KvfsError as exc:  # ``store`` finds out
                log.debug("a new file was not adopted at once: %s", exc)
            self.unstored |= not self._adopted
            self.lock.release_exclusive()
            waiting, self._adopting = self._adopting, []
            for tell in waiting:
                tell()

        then(self._asked, answered)
        return True

    async def _adopt(self) -> None:
        self._backend.adoptions.collect()
        try:
            adoption = self._data.begin_adopt(self._staged)
            if adoption is None:
                await self._backend.in_thread(self._data.adopt, self._staged)
            else:
                await _finish(adoption)
            self._adopted = True
        except (Conflict, ConnectionLost, InvalidRequest) as exc:
            # There is a chunk; or it is forgotten, or used up by a full disk. The answer alone may
            # be lost: copying the file onto itself could undo later writes.
            self._adopted = await self._backend.in_thread(self._data.is_first, self.descriptor)
            self._orphaned = not self._adopted
            if self._orphaned:
                log.info("a new file is copied: its chunk server does not have it (%s)", exc)

    async def _widen_chunks(self) -> None:
        if self._may_widen:
            self._may_widen = False
            try:
                await self._widen()
            except InvalidRequest as exc:
                log.info("what is behind the first chunk of a new file is copied: %s", exc)

    async def _copy(self, record: Callable[[int], Awaitable[None]]) -> None:
        # Writes after this may leave the clock's tick, and so the mtime, as it was: unless the last
        # one is older than that, the next flush looks at all of it again.
        age = self._backend.env.clock.time_ns() - self.mtime_ns
        self.unstored = age < PASSED_SETTLED_SECONDS * 1e9
        offset, end, known_end = self._own_bytes, self.size, self._copied_end
        self._copied_end = max(known_end, end)
        while offset < end:
            copy = functools.partial(self._data.copy_from, known_end=known_end)
            offset = await self._backend.in_thread(
                copy, self.descriptor, offset, end, MOUNT_UNPUSHED_BYTES
            )
            await record(min(offset, end))

    def truncate(self, end: int, size: int) -> None:
        """Blocking. The file was ``end`` bytes long, at most, and is ``size`` bytes long. Raises
        FileTooLarge for what the file system below does not hold in one file."""
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as exc:
            raise self._refused(exc) from exc
        if self._copied_end:
            self._data.truncate(end, max(size, self._own_bytes))
            self._copied_end = min(self._copied_end, size)

    def read_into(self, offset: int, view: memoryview) -> int:
        """How many bytes there were. What was just written is in the page cache. Raises
        TargetFailed."""
        try:
            return os.preadv(self.descriptor, [view], offset)
        except OSError as exc:
            raise disk_error(exc, 0) from exc

    def write(self, offset: int, data: Buffer) -> None:
        """Blocking. For those whose writes come to us although the kernel could do them. Raises as
        ``truncate``."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self.descriptor, view[done:], offset + done)
        except OSError as exc:
            raise self._refused(exc) from exc
        finally:  # a ``store`` that comes between may not have seen all of it
            self.unstored = True

    def grow(self, size: int) -> None:
        """Blocking. The file is at least ``size`` bytes long. Raises as ``truncate``."""
        try:
            lengthen(self.descriptor, size)
        except OSError as exc:
            raise self._refused(exc) from exc

    def _refused(self, exc: OSError) -> KvfsError:
        return FileTooLarge(limit=self.size) if exc.errno == errno.EFBIG else disk_error(exc, 0)

    def zero(self, start: int, end: int) -> None:
        """Blocking. The bytes ``start <= x < end`` of the file, which is recorded as sparse, are
        zeros."""
        self.unstored = True
        holes.punch(self.descriptor, start, end)
        first, last = max(start, self._own_bytes), min(end, self._copied_end)
        if first < last:  # holes are not copied
            holes.zero(self._data, first, last)

    def seek(self, offset: int, whence: int) -> int:
        """As lseek(2): here the file is one, and its file system knows its holes."""
        try:
            return os.lseek(self.descriptor, offset, whence)
        except OSError:
            raise BehindTheEnd(size=self.size) from None

    def touch(self) -> None:
        """For a sync: nobody told us of the last writes."""
        if self._adopted:
            self._data.touched()

    @property
    def has_chunks(self) -> bool:
        """Of what was written something is with the chunk servers."""
        return self._adopted or self._orphaned

    @property
    def is_whole(self) -> bool:
        """The first chunk is all that there is of the file, and stored."""
        return self._adopted and self.is_stored and self.size <= self._own_bytes

    def reopen(self) -> int:
        """The chunk file for reading: whoever has it open for writing keeps it from being sealed.
        Raises OSError."""
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close_now(self) -> bool:
        """``close``, with what follows on it, if nothing need be waited for; else nothing."""
        if not self.is_stored:
            return False
        if self._adopted and not self._copied_end and self._data.close_soon(self._staged):
            os.close(self.descriptor)
            return True
        untouched = not (self.has_chunks or self.size)
        return untouched and self._data.unstage_now(self._staged)

    def close(self) -> bool:
        """Blocking: nobody has the file open any more. True if its chunks are to be sealed."""
        if self._adopted:
            if os.fstat(self.descriptor).st_size > self._data.chunk_bytes:
                os.ftruncate(self.descriptor, self._data.chunk_bytes)
            os.close(self.descriptor)
        else:
            self._data.unstage(self._staged)
        return self.has_chunks


async def _finish(adoption: Adoption) -> None:
    """A thread that waits costs the mount more than all else of it."""
    try:
        with trio.fail_after(CALL_SECONDS):
            await trio.lowlevel.wait_readable(adoption.fileno())
    except trio.TooSlowError:
        adoption.give_up()
        raise ConnectionLost(detail=f"no answer within {CALL_SECONDS} s") from None
    except BaseException:
        adoption.give_up()
        raise
    adoption.finish()
