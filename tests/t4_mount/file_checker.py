"""Random operations on one file of a mount, on one of another file system, and on bytes in memory:
after each, all three must agree.

    python -m t4_mount.file_checker FILE REFERENCE [OPERATIONS [SEED]]

The operations gather around the ends of chunks (16 MiB): there the offsets are random, elsewhere
the file has holes that operations may open, cross and close.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
CHUNK = 16 << 20
BASES = (0, 0, 0, 0, CHUNK, CHUNK, 2 * CHUNK)
SPREAD = 96 << 10
LENGTHS = (1, 7, 512, 4096, 4097, 16_384, 65_536)
WINDOW = 2 * SPREAD + (128 << 10)
"""Before a base, and behind it with the longest write."""
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(descriptor, mode, offset, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Model:
    """Bytes in memory: those in the windows that operations write to, all others are zeros."""

    def __init__(self) -> None:
        self.size = 0
        self._windows = [
            (max(0, base - SPREAD), bytearray(WINDOW if base else WINDOW - SPREAD))
            for base in sorted(set(BASES))
        ]

    def _parts(self, start: int, end: int) -> Iterator[tuple[bytearray, slice, slice]]:
        """Of each window: its bytes, where in it, and where in the range."""
        for base, data in self._windows:
            first, last = max(start, base), min(end, base + len(data))
            if first < last:
                yield data, slice(first - base, last - base), slice(first - start, last - start)

    def get(self, start: int, end: int) -> bytes:
        """Up to the end."""
        found = bytearray(max(0, min(end, self.size) - start))
        for data, inside, place in self._parts(start, min(end, self.size)):
            found[place] = data[inside]
        return bytes(found)

    def put(self, offset: int, new: bytes) -> None:
        parts = list(self._parts(offset, offset + len(new)))
        assert sum(len(range(*place.indices(len(new)))) for *_, place in parts) == len(new)
        for data, inside, place in parts:
            data[inside] = new[place]
        self.size = max(self.size, offset + len(new))

    def wipe(self, start: int, end: int) -> None:
        for data, inside, _ in self._parts(start, end):
            data[inside] = bytes(inside.stop - inside.start)

    def has_zeros(self, start: int, end: int) -> bool:
        return not any(data[inside].strip(b"\0") for data, inside, _ in self._parts(start, end))

    def may_grow(self, count: int) -> bool:
        """Whether the bytes behind the end are in a window."""
        return any(
            place == slice(0, count) for *_, place in self._parts(self.size, self.size + count)
        )

    def resize(self, size: int) -> None:
        self.wipe(size, self.size)
        self.size = size


class Disagreement(Exception):
    """``args``: what was done last, and what differs."""


class Checked:
    """One of the two files."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.append = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.append)

    def map_write(self, offset: int, data: bytes) -> None:
        with mapped(self.fd, offset, len(data)) as address:
            ctypes.memmove(address, data, len(data))

    def map_read(self, offset: int, length: int) -> bytes:
        room = ctypes.create_string_buffer(length)
        with mapped(self.fd, offset, length) as address:
            # Not string_at, which keeps the interpreter while the kernel asks the mount for pages.
            ctypes.memmove(room, address, length)
        return room.raw


@contextlib.contextmanager
def mapped(descriptor: int, offset: int, length: int) -> Iterator[int]:
    """The address of a shared mapping. Python's own keeps a copy of the descriptor, whose close
    would be one of the file."""
    before = offset % mmap.PAGESIZE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    size = before + length
    address = _libc.mmap(None, size, access, mmap.MAP_SHARED, descriptor, offset - before)
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        yield address + before
    finally:
        _libc.munmap(address, size)


class Checker:
    def __init__(self, path: str, reference: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.model = Model()
        self.files = [Checked(path), Checked(reference)]
        self.trace: collections.deque[str] = collections.deque(maxlen=30)
        weighted: list[tuple[int, Callable[[], None]]] = [
            (20, self.write), (22, self.read), (8, self.map_write), (8, self.map_read),
            (5, self.append), (3, self.truncate), (5, self.punch), (3, self.zero),
            (3, self.allocate), (4, self.copy), (2, self.seek), (1, self.reopen),
            (1, self.sync), (1, self.forget), (1, self.punch_far),
        ]  # fmt: skip
        self.operations = [operation for _, operation in weighted]
        self.weights = [weight for weight, _ in weighted]

    def run(self, operations: int) -> None:
        for operation in self.rng.choices(self.operations, self.weights, k=operations):
            operation()
            self.check_size()
        self.reopen()
        self.check(0, self.model.size)

    def close(self) -> None:
        for file in self.files:
            file.close()

    # --- what it works on

    def place(self, *, inside: bool = False) -> tuple[int, int]:
        """Offset and length; within the file if ``inside`` (then the length may be 0)."""
        rng = self.rng
        offset = max(0, rng.choice(BASES) + rng.randrange(-SPREAD, SPREAD))
        if rng.random() < 0.3:
            offset -= offset % 4096
        length = rng.choice(LENGTHS)
        if inside:
            if offset >= self.model.size:
                offset = rng.randrange(min(self.model.size, SPREAD)) if self.model.size else 0
            length = min(length, self.model.size - offset)
        return offset, length

    def note(self, text: str) -> None:
        self.trace.append(text)

    def fail(self, text: str) -> None:
        raise Disagreement("\n".join(self.trace) + "\n" + text)

    def each(self, action: Callable[[Checked], Any]) -> None:
        for file in self.files:
            action(file)

    def check(self, offset: int, length: int) -> None:
        end = min(offset + length, self.model.size)
        for start in range(offset, end, 1 << 20):
            wanted = self.model.get(start, start + (1 << 20))
            for file in self.files:
                self.compare(file, start, os.pread(file.fd, len(wanted), start), wanted)

    def compare(self, file: Checked, offset: int, found: bytes, wanted: bytes) -> None:
        if found != wanted:
            pairs = zip(found, wanted, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(found))
            self.fail(f"{file.path} at {offset + at}: {len(found)} bytes, {found[at : at + 8]!r}")

    def check_size(self) -> None:
        for file in self.files:
            found = os.fstat(file.fd).st_size
            if found != self.model.size:
                self.fail(f"{file.path} has {found} bytes, not {self.model.size}")

    # --- operations

    def write(self) -> None:
        offset, length = self.place()
        data = self.rng.randbytes(length)
        self.note(f"write {offset} {length}")
        self.each(lambda file: os.pwrite(file.fd, data, offset))
        self.model.put(offset, data)

    def append(self) -> None:
        data = self.rng.randbytes(self.rng.choice(LENGTHS[:5]))
        if not self.model.may_grow(len(data)):
            return
        self.note(f"append {self.model.size} {len(data)}")
        self.each(lambda file: os.write(file.append, data))
        self.model.put(self.model.size, data)

    def read(self) -> None:
        offset, length = self.place()
        self.note(f"read {offset} {length}")
        wanted = self.model.get(offset, offset + length)
        self.each(lambda f: self.compare(f, offset, os.pread(f.fd, length, offset), wanted))

    def map_write(self) -> None:
        offset, length = self.place(inside=True)
        if not length:
            return
        data = self.rng.randbytes(length)
        self.note(f"map write {offset} {length}")
        self.each(lambda file: file.map_write(offset, data))
        self.model.put(offset, data)

    def map_read(self) -> None:
        offset, length = self.place(inside=True)
        if not length:
            return
        self.note(f"map read {offset} {length}")
        wanted = self.model.get(offset, offset + length)
        self.each(lambda f: self.compare(f, offset, f.map_read(offset, length), wanted))

    def truncate(self) -> None:
        size = self.place()[0]
        self.note(f"truncate {self.model.size} to {size}")
        self.each(lambda file: os.ftruncate(file.fd, size))
        self.model.resize(size)

    def punch(self) -> None:
        self.wipe(PUNCH_HOLE | KEEP_SIZE, *self.place())

    def punch_far(self) -> None:
        """Whole chunks, and parts of those beside them."""
        offset, length = self.place()
        self.wipe(PUNCH_HOLE | KEEP_SIZE, offset, length + CHUNK)

    def zero(self) -> None:
        keep = self.rng.choice([0, KEEP_SIZE])
        self.wipe(ZERO_RANGE | keep, *self.place())

    def wipe(self, mode: int, offset: int, length: int) -> None:
        self.note(f"fallocate {mode} {offset} {length}")
        for file in self.files:
            try:
                fallocate(file.fd, mode, offset, length)
            except OSError as exc:
                # Not every file system beside ext4 knows all of them.
                if exc.errno != errno.EOPNOTSUPP or file is self.files[0]:
                    raise
                count = min(offset + length, max(self.model.size, 0)) - offset
                os.pwrite(file.fd, bytes(max(0, count)), offset)
                if not mode & KEEP_SIZE and offset + length > self.model.size:
                    os.ftruncate(file.fd, offset + length)
        self.model.wipe(offset, offset + length)
        if not mode & KEEP_SIZE:
            self.model.size = max(self.model.size, offset + length)

    def allocate(self) -> None:
        offset, length = self.place()
        mode = self.rng.choice([0, KEEP_SIZE])
        self.note(f"fallocate {mode} {offset} {length}")
        self.each(lambda file: fallocate(file.fd, mode, offset, length))
        if not mode:
            self.model.size = max(self.model.size, offset + length)

    def copy(self) -> None:
        source, length = self.place(inside=True)
        target = self.place()[0]
        if not length or abs(source - target) < length:
            return
        self.note(f"copy {source} to {target} {length}")

        def copy(file: Checked) -> None:
            done = 0
            while done < length:
                left = length - done
                done += os.copy_file_range(file.fd, file.fd, left, source + done, target + done)

        self.each(copy)
        self.model.put(target, self.model.get(source, source + length))

    def seek(self) -> None:
        """What is said to be a hole has zeros; how large holes are is each file system's own."""
        offset = self.place(inside=True)[0]
        self.note(f"seek {offset}")
        for file in self.files:
            try:
                data = os.lseek(file.fd, offset, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                data = self.model.size
            if not self.model.has_zeros(offset, data):
                self.fail(f"{file.path}: a hole from {offset} to {data}")
            if offset < self.model.size:
                hole = os.lseek(file.fd, offset, os.SEEK_HOLE)
                if not offset <= hole <= self.model.size or (data == offset) != (hole > offset):
                    self.fail(f"{file.path}: data at {data}, hole at {hole} from {offset}")

    def reopen(self) -> None:
        self.note("reopen")
        self.each(Checked.close)
        self.each(Checked.open)

    def sync(self) -> None:
        self.note("fsync")
        self.each(lambda file: os.fsync(file.fd))

    def forget(self) -> None:
        """What is read next comes from the servers."""
        self.note("forget")
        os.fsync(self.files[0].fd)
        os.posix_fadvise(self.files[0].fd, 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: list[str]) -> None:
    path, reference, *rest = argv
    operations, seed = (*map(int, rest), 1_000_000, 1)[:2] if len(rest) < 2 else map(int, rest)
    checker = Checker(path, reference, seed)
    try:
        checker.run(operations)
    finally:
        checker.close()
    print(f"{operations} operations agree (seed {seed})")


if __name__ == "__main__":
    main(sys.argv[1:])
