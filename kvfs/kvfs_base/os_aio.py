"""Reads of which many are under way at a time, begun and taken in by one thread: the asynchronous
I/O of Linux (io_submit(2)). Threads that wait for a read each take turns with each other in the
interpreter, and the disk has less to do meanwhile.

Files are to be O_DIRECT: what goes through the page cache is read before ``begin`` returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

QUEUE_DEPTH = 16
"""Reads under way, of 1 MiB: with 32 and 64 disks are no faster."""

_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
"""Of io_setup, io_destroy, io_submit and io_getevents, which the C library does not have."""

_IOCB = struct.Struct("<QIiHhIQQqQII")
"""struct iocb of linux/aio_abi.h."""
_EVENT = struct.Struct("<QQqq")
"""struct io_event."""
_VECTOR = struct.Struct("<QQ")
"""struct iovec of a machine with 64 bits."""
_PREADV = 7

_libc = ctypes.CDLL(None, use_errno=True)


class Read(NamedTuple):
    """``views`` are filled one after the other, from ``offset`` on. ``tag`` is the caller's."""

    descriptor: int
    offset: int
    views: Sequence[memoryview]
    tag: Any


class ReadQueue:
    """Of one thread at a time."""

    def __init__(self, depth: int = QUEUE_DEPTH) -> None:
        """Raises OSError: the kernel has none, or no more of them (fs.aio-max-nr)."""
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._setup, self._destroy, self._submit, self._get = numbers
        self._context = ctypes.c_ulong(0)
        self._call(self._setup, depth, ctypes.byref(self._context))
        self._depth = depth
        self._blocks = ctypes.create_string_buffer(_IOCB.size * depth)
        self._pointers = (ctypes.c_void_p * depth)()
        self._events = ctypes.create_string_buffer(_EVENT.size * depth)
        self._free = list(range(depth))
        self._under_way: dict[int, tuple[Read, Any]] = {}
        """By place among the blocks, a read, and what keeps its memory where it is."""
        self._refused: list[tuple[Read, int]] = []

    @property
    def room(self) -> int:
        """How many more can be begun."""
        return len(self._free)

    @property
    def is_idle(self) -> bool:
        return not (self._under_way or self._refused)

    def begin(self, reads: Sequence[Read]) -> None:
        """No more than there is room for. What is wrong with one of them ``wait`` says."""
        first = ctypes.addressof(self._blocks)
        places: list[int] = []
        for read in reads:
            place = self._free.pop()
            try:
                self._under_way[place] = read, self._describe(place, read)
            except (TypeError, ValueError, BufferError):  # no memory that can be written to
                self._under_way[place] = read, None
                self._refuse(place, errno.EINVAL)
                continue
            self._pointers[len(places)] = first + place * _IOCB.size
            places.append(place)
        done = 0
        while done < len(places):
            rest = ctypes.byref(self._pointers, done * ctypes.sizeof(ctypes.c_void_p))
            try:
                done += self._call(self._submit, self._context, len(places) - done, rest)
            except OSError as exc:
                self._refuse(places[done], exc.errno or errno.EIO)
                done += 1

    def _describe(self, place: int, read: Read) -> Any:
        starts = [ctypes.c_char.from_buffer(view) for view in read.views]
        vectors = ctypes.create_string_buffer(_VECTOR.size * len(starts))
        for number, (start, view) in enumerate(zip(starts, read.views, strict=True)):
            _VECTOR.pack_into(vectors, number * _VECTOR.size, ctypes.addressof(start), view.nbytes)
        address, count = ctypes.addressof(vectors), len(starts)
        fields = (place, 0, 0, _PREADV, 0, read.descriptor, address, count, read.offset, 0, 0, 0)
        _IOCB.pack_into(self._blocks, place * _IOCB.size, *fields)
        return vectors, starts

    def _refuse(self, place: int, code: int) -> None:
        read, _ = self._under_way.pop(place)
        self._free.append(place)
        self._refused.append((read, -code))

    def wait(self) -> list[tuple[Read, int]]:
        """Blocks until at least one is over: those that are, each with the bytes that were read
        (fewer than wanted at the end of the file) or an errno below zero. Nothing is written to
        their memory any more. Something has to be under way."""
        over, self._refused = self._refused, []
        if over:
            return over
        count = 0
        while not count:
            try:
                count = self._call(
                    self._get, self._context, 1, self._depth, self._events, ctypes.c_void_p()
                )
            except InterruptedError:
                continue
        for number in range(count):
            place, _, result, _ = _EVENT.unpack_from(self._events, number * _EVENT.size)
            read, _ = self._under_way.pop(place)
            self._free.append(place)
            over.append((read, result))
        return over

    def drain(self) -> None:
        """Nothing is under way afterwards."""
        while not self.is_idle:
            self.wait()

    def close(self) -> None:
        self.drain()
        if self._context:
            self._call(self._destroy, self._context)
            self._context = ctypes.c_ulong(0)

    def _call(self, number: int, *arguments: Any) -> int:
        result: int = _libc.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result


_lock = threading.Lock()
_spare: list[ReadQueue] = []
_refusal: OSError | None = None

os.register_at_fork(after_in_child=_spare.clear)  # they are the parent's


def open_queue() -> ReadQueue | None:
    """None where the kernel refuses, which is said once: then threads read."""
    global _refusal
    try:
        return ReadQueue()
    except OSError as exc:
        if _refusal is None:
            log.info("no asynchronous reads, threads read instead: %s", exc)
        _refusal = exc
        return None


@contextlib.contextmanager
def borrowed_queue() -> Iterator[ReadQueue | None]:
    """One for this thread, as ``open_queue``; it costs the kernel milliseconds to end one, so it is
    kept for the next who asks. It is idle afterwards, whatever happened."""
    with _lock:
        queue = _spare.pop() if _spare else None
    if queue is None and _refusal is None:
        queue = open_queue()
    try:
        yield queue
    finally:
        if queue is not None:
            queue.drain()
            with _lock:
                _spare.append(queue)


__all__ = ["QUEUE_DEPTH", "Read", "ReadQueue", "borrowed_queue", "open_queue"]
