"""io_uring and Linux AIO as engines use them, by system calls: no library is needed.

Each call submits a batch of reads or writes and waits for all of it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import pytest

IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427
IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES = 0, 0x8000000, 0x10000000
IORING_ENTER_GETEVENTS = 1
IORING_REGISTER_BUFFERS = 0
IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, IORING_OP_READ, IORING_OP_WRITE = 4, 5, 22, 23
IO_SETUP, IO_DESTROY, IO_GETEVENTS, IO_SUBMIT = 206, 207, 208, 209  # x86-64
IOCB_CMD_PREAD, IOCB_CMD_PWRITE = 0, 1
SQE_BYTES, CQE_BYTES, IOCB_BYTES, EVENT_BYTES = 64, 16, 64, 32

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Transfer:
    """``length`` bytes between ``offset`` of a file and ``at`` of the engine's buffer."""

    descriptor: int
    at: int
    length: int
    offset: int


class AsyncIO(Protocol):
    buffer: mmap.mmap

    def read(self, transfers: Sequence[Transfer]) -> list[int]:
        """What each returned: bytes, or -errno."""

    def write(self, transfers: Sequence[Transfer]) -> list[int]: ...


def system_call(number: int, *args: int | ctypes.Array[ctypes.c_char] | None) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result: int = libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Uring:
    """One ring; with ``fixed`` its buffer is registered, as Mooncake does it."""

    def __init__(self, buffer: mmap.mmap, entries: int, fixed: bool) -> None:
        self.buffer = buffer
        self._base = address_of(buffer)
        self._fixed = fixed
        parameters = ctypes.create_string_buffer(120)
        self._ring = system_call(IO_URING_SETUP, entries, parameters)
        words = struct.unpack("<30I", parameters.raw)
        sq_entries, cq_entries = words[0], words[1]
        # Of struct io_sqring_offsets and io_cqring_offsets.
        self._sq_tail, self._sq_mask, self._sq_array = words[11], words[12], words[16]
        self._cq_head, self._cq_tail, self._cq_mask, self._cqes = (
            words[20], words[21], words[22], words[25],
        )  # fmt: skip
        self._sq = mmap.mmap(self._ring, self._sq_array + 4 * sq_entries, offset=IORING_OFF_SQ_RING)
        self._cq = mmap.mmap(
            self._ring, self._cqes + CQE_BYTES * cq_entries, offset=IORING_OFF_CQ_RING
        )
        self._sqes = mmap.mmap(self._ring, SQE_BYTES * sq_entries, offset=IORING_OFF_SQES)
        if fixed:
            vector = ctypes.create_string_buffer(struct.pack("<QQ", self._base, len(buffer)), 16)
            system_call(IO_URING_REGISTER, self._ring, IORING_REGISTER_BUFFERS, vector, 1)

    def read(self, transfers: Sequence[Transfer]) -> list[int]:
        return self._do(IORING_OP_READ_FIXED if self._fixed else IORING_OP_READ, transfers)

    def write(self, transfers: Sequence[Transfer]) -> list[int]:
        return self._do(IORING_OP_WRITE_FIXED if self._fixed else IORING_OP_WRITE, transfers)

    def _do(self, operation: int, transfers: Sequence[Transfer]) -> list[int]:
        tail = self._word(self._sq, self._sq_tail)
        mask = self._word(self._sq, self._sq_mask)
        for number, t in enumerate(transfers):
            slot = (tail + number) & mask
            struct.pack_into(
                "<BBHiQQIIQ24x", self._sqes, SQE_BYTES * slot,
                operation, 0, 0, t.descriptor, t.offset, self._base + t.at, t.length, 0, number,
            )  # fmt: skip
            struct.pack_into("<I", self._sq, self._sq_array + 4 * slot, slot)
        struct.pack_into("<I", self._sq, self._sq_tail, (tail + len(transfers)) & 0xFFFFFFFF)
        count = len(transfers)
        submitted = system_call(
            IO_URING_ENTER, self._ring, count, count, IORING_ENTER_GETEVENTS, None, 0
        )
        assert submitted == count
        return self._results(count)

    def _results(self, count: int) -> list[int]:
        head = self._word(self._cq, self._cq_head)
        assert self._word(self._cq, self._cq_tail) - head == count
        mask = self._word(self._cq, self._cq_mask)
        results = [0] * count
        for number in range(head, head + count):
            at = self._cqes + CQE_BYTES * (number & mask)
            which, result = struct.unpack_from("<Qi", self._cq, at)
            results[which] = result
        struct.pack_into("<I", self._cq, self._cq_head, head + count)
        return results

    @staticmethod
    def _word(ring: mmap.mmap, at: int) -> int:
        word: int = struct.unpack_from("<I", ring, at)[0]
        return word

    def close(self) -> None:
        for ring in (self._sq, self._cq, self._sqes):
            ring.close()
        os.close(self._ring)


class LinuxAIO:
    def __init__(self, buffer: mmap.mmap, entries: int) -> None:
        self.buffer = buffer
        self._base = address_of(buffer)
        context = ctypes.create_string_buffer(8)
        system_call(IO_SETUP, entries, context)
        self._context = int.from_bytes(context.raw, "little")

    def read(self, transfers: Sequence[Transfer]) -> list[int]:
        return self._do(IOCB_CMD_PREAD, transfers)

    def write(self, transfers: Sequence[Transfer]) -> list[int]:
        return self._do(IOCB_CMD_PWRITE, transfers)

    def _do(self, command: int, transfers: Sequence[Transfer]) -> list[int]:
        count = len(transfers)
        blocks = ctypes.create_string_buffer(IOCB_BYTES * count)
        pointers = ctypes.create_string_buffer(8 * count)
        for number, t in enumerate(transfers):
            struct.pack_into(
                "<QIIHhIQQqQII", blocks, IOCB_BYTES * number,
                number, 0, 0, command, 0, t.descriptor, self._base + t.at, t.length, t.offset,
                0, 0, 0,
            )  # fmt: skip
            at = ctypes.addressof(blocks) + IOCB_BYTES * number
            struct.pack_into("<Q", pointers, 8 * number, at)
        assert system_call(IO_SUBMIT, self._context, count, pointers) == count
        events = ctypes.create_string_buffer(EVENT_BYTES * count)
        got = system_call(IO_GETEVENTS, self._context, count, count, events, None)
        assert got == count
        results = [0] * count
        for number in range(count):
            which, _, result, _ = struct.unpack_from("<QQqq", events, EVENT_BYTES * number)
            results[which] = result
        return results

    def close(self) -> None:
        system_call(IO_DESTROY, self._context)


@contextmanager
def async_io(kind: str, buffer_bytes: int, entries: int = 64) -> Iterator[AsyncIO]:
    """``uring``, ``uring-fixed`` or ``aio``; skips the test where the kernel refuses."""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the system calls are those of x86-64")
    buffer = mmap.mmap(-1, buffer_bytes)
    try:
        engine = (
            LinuxAIO(buffer, entries) if kind == "aio" else Uring(buffer, entries, "fixed" in kind)
        )
    except OSError as exc:
        if exc.errno in (errno.ENOSYS, errno.EPERM, errno.ENOMEM):
            pytest.skip(f"the kernel refuses {kind}: {exc}")
        raise
    try:
        yield engine
    finally:
        engine.close()
