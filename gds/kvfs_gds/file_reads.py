"""A batch of blocks read from files into memory. Blocks whose last byte has come are verified
meanwhile, by other threads.

What is O_DIRECT is read by one thread (DiskReader), which keeps many reads under way. Through the
page cache a read is a copy: threads take one after the other until none is left.

A read is READ_BYTES at most, through the page cache CACHED_READ_BYTES. Small blocks that follow
each other in a file are one read; a block that is larger is several, so that all end at about the
same time.
"""

from __future__ import annotations

import collections
import fcntl
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from kvfs_base import os_aio
from kvfs_base.errors import TargetFailed
from kvfs_datapath.checksum import crc32c
from kvfs_gds.limits import CACHED_READ_BYTES, READ_BYTES


class Block:
    """``view`` is where ``size`` bytes at ``offset`` of a file go, in whole pages."""

    def __init__(
        self, descriptor: int, offset: int, size: int, crc: int | None, view: memoryview
    ) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.size = size
        self.crc32c = crc
        self.view = view
        self.good = False
        self.reads = 0
        """Those that are not done."""
        self.got = 0
        """Bytes that were read."""

    def verify(self) -> None:
        self.good = self.crc32c is None or crc32c(self.view[: self.size]) == self.crc32c


class _Read:
    """One system call: neighbours in a file, or a part of one block."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.nbytes = 0
        self.parts: list[tuple[Block, memoryview]] = []

    def add(self, block: Block, view: memoryview) -> None:
        self.parts.append((block, view))
        self.nbytes += view.nbytes
        block.reads += 1


class Batch:
    """``read`` is to be called by several threads, or all of it given to a DiskReader. Afterwards
    ``good`` says which blocks came."""

    def __init__(self, blocks: Sequence[Block], verify: Callable[[Block], object]) -> None:
        """``verify`` is called with each block whose bytes are there; it calls Block.verify, now or
        soon."""
        self._verify = verify
        self._lock = threading.Lock()
        direct = {fd: _is_direct(fd) for fd in {block.descriptor for block in blocks}}
        self.is_direct = all(direct.values())
        """Nothing of it goes through the page cache."""
        self._reads = _reads(blocks, direct)
        self._next = iter(self._reads)
        self._failed = False

    def __len__(self) -> int:
        """Reads."""
        return len(self._reads)

    def read(self) -> None:
        """Reads until nothing is left. Raises TargetFailed; other threads end then too."""
        while (read := self.take()) is not None:
            self.came(read, 0)

    def take(self) -> _Read | None:
        """The next one; None if there are no more."""
        with self._lock:
            return None if self._failed else next(self._next, None)

    def came(self, read: _Read, done: int) -> None:
        """So many bytes of it are there; the others are read here. Raises TargetFailed; nothing
        more is taken then."""
        try:
            done = _read_fully(read, done)
        except BaseException:
            self._failed = True
            raise
        for block in self._account(read, done):
            self._verify(block)

    def _account(self, read: _Read, done: int) -> list[Block]:
        """Blocks that are complete with this read."""
        complete = []
        with self._lock:
            for block, view in read.parts:
                block.got += max(0, min(done, view.nbytes))
                done -= view.nbytes
                block.reads -= 1
                if not block.reads and block.got >= block.size:
                    complete.append(block)
        return complete


def _reads(blocks: Sequence[Block], direct: dict[int, bool]) -> list[_Read]:
    found: list[_Read] = []
    end = (-1, -1)
    for block in blocks:
        done = 0
        most = READ_BYTES if direct[block.descriptor] else CACHED_READ_BYTES
        while done < block.view.nbytes:
            here = (block.descriptor, block.offset + done)
            step = min(most, block.view.nbytes - done)
            if here != end or found[-1].nbytes + step > most:
                found.append(_Read(*here))
            found[-1].add(block, block.view[done : done + step])
            done += step
            end = (block.descriptor, block.offset + done)
    return found


def _is_direct(descriptor: int) -> bool:
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
    except OSError as exc:
        raise TargetFailed(detail=os.strerror(exc.errno or 0)) from exc


def _read_fully(read: _Read, done: int) -> int:
    """Bytes read, with the ``done`` ones; fewer than wanted at the end of the file. The descriptor
    is the caller's. Raises TargetFailed."""
    views = [view for _, view in read.parts]
    try:
        while done < read.nbytes:
            count = os.preadv(read.descriptor, _rest(views, done), read.offset + done)
            if count == 0:
                break
            done += count
    except OSError as exc:
        raise TargetFailed(detail=os.strerror(exc.errno or 0)) from exc
    return done


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    left = []
    for view in views:
        if done < view.nbytes:
            left.append(view[done:])
        done = max(0, done - view.nbytes)
    return left


class DiskReader:
    """One thread that reads batches in their order, with as many reads under way as the queue
    holds: those of the next batch begin while the last ones of this one are."""

    def __init__(self, queue: os_aio.ReadQueue) -> None:
        """``queue`` is closed with it."""
        self._queue = queue
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Reading] = collections.deque()
        """Batches of which reads are to be begun."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvfs-read", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls) -> DiskReader | None:
        """None where the kernel has no asynchronous reads for us."""
        queue = os_aio.open_queue()
        return None if queue is None else cls(queue)

    def read(self, batch: Batch) -> Future[None]:
        """Done when nothing is written to the batch's memory any more; says TargetFailed."""
        reading = _Reading(batch)
        with self._changed:
            self._waiting.append(reading)
            self._changed.notify()
        return reading.future

    def close(self) -> None:
        """After what was begun."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._queue.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._queue.is_idle and not (self._waiting or self._closing):
                    self._changed.wait()
            self._begin()
            if not self._queue.is_idle:
                for read, nbytes in self._queue.wait():
                    reading, part = read.tag
                    reading.came(part, nbytes)
            elif self._closing and not self._waiting:
                return

    def _begin(self) -> None:
        reads: list[os_aio.Read] = []
        while self._waiting and len(reads) < self._queue.room:
            reading = self._waiting[0]
            part = reading.take()
            if part is None:
                self._waiting.popleft()
                reading.end_if_over()
            else:
                views = [view for _, view in part.parts]
                reads.append(os_aio.Read(part.descriptor, part.offset, views, (reading, part)))
        self._queue.begin(reads)


class _Reading:
    """A batch, and what is under way of it."""

    def __init__(self, batch: Batch) -> None:
        self.future: Future[None] = Future()
        self._batch = batch
        self._under_way = 0
        self._is_taken = False
        self._error: BaseException | None = None

    def take(self) -> _Read | None:
        read = self._batch.take()
        self._is_taken = read is None
        self._under_way += read is not None
        return read

    def came(self, read: _Read, nbytes: int) -> None:
        self._under_way -= 1
        try:
            self._batch.came(read, max(0, nbytes))
        except BaseException as exc:
            self._error = exc
        self.end_if_over()

    def end_if_over(self) -> None:
        if not self._is_taken or self._under_way:
            return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)


__all__ = ["Batch", "Block", "DiskReader"]
