"""A batch of blocks read from files into memory: threads take one read after the other until none
is left, and blocks whose last byte has come are verified meanwhile, by other threads.

A read is READ_BYTES at most, through the page cache CACHED_READ_BYTES. Small blocks that follow
each other in a file are one read; a block that is larger is several, so that all threads end at
about the same time.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Sequence

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
    """``read`` is to be called by several threads. Afterwards ``good`` says which blocks came."""

    def __init__(self, blocks: Sequence[Block], verify: Callable[[Block], object]) -> None:
        """``verify`` is called with each block whose bytes are there; it calls Block.verify, now or
        soon."""
        self._verify = verify
        self._lock = threading.Lock()
        self._reads = _reads(blocks)
        self._next = iter(self._reads)
        self._failed = False

    def __len__(self) -> int:
        """Reads."""
        return len(self._reads)

    def read(self) -> None:
        """Reads until nothing is left. Raises TargetFailed; other threads end then too."""
        while (read := self._take()) is not None:
            try:
                done = _read_fully(read)
            except BaseException:
                self._failed = True
                raise
            for block in self._account(read, done):
                self._verify(block)

    def _take(self) -> _Read | None:
        with self._lock:
            return None if self._failed else next(self._next, None)

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


def _reads(blocks: Sequence[Block]) -> list[_Read]:
    found: list[_Read] = []
    end = (-1, -1)
    most = {descriptor: _most(descriptor) for descriptor in {block.descriptor for block in blocks}}
    for block in blocks:
        done = 0
        while done < block.view.nbytes:
            here = (block.descriptor, block.offset + done)
            step = min(most[block.descriptor], block.view.nbytes - done)
            if here != end or found[-1].nbytes + step > most[block.descriptor]:
                found.append(_Read(*here))
            found[-1].add(block, block.view[done : done + step])
            done += step
            end = (block.descriptor, block.offset + done)
    return found


def _most(descriptor: int) -> int:
    """Bytes of one read."""
    try:
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    except OSError as exc:
        raise TargetFailed(detail=os.strerror(exc.errno or 0)) from exc
    return READ_BYTES if direct else CACHED_READ_BYTES


def _read_fully(read: _Read) -> int:
    """Bytes read; fewer than wanted at the end of the file. The descriptor is the caller's. Raises
    TargetFailed."""
    views = [view for _, view in read.parts]
    done = 0
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


__all__ = ["Batch", "Block"]
