"""Writes and reads through the API and a mount while things break, and knows what may be found.

Every page of 4 KiB says which place it belongs to and which write made it, and no two writes have
the same bytes. What was acknowledged is kept here, outside the cluster. A read is checked to the
last byte, whatever is broken at the moment: it finds the last acknowledged write of each place, or
one after it whose outcome is not known, and never goes back from what was found before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kvfs
from kvfs_base.errors import KvfsError
from kvfs_base.types import KVLayout

PAGE = 4096
BLOCK_PAGES = 4
BLOCKS_PER_PUT = 4
FILE_PAGES = 512
"""Two chunks of a replicated chain."""
RUN_PAGES_MAX = 12
BATCH = 16
PACE_SECONDS = 0.05
STOP_SECONDS = 200.0
"""What is under way when a window ends waits for a chain no longer than this."""
PATIENCE_SECONDS = 120.0
_HEADER = struct.Struct("<8sQQQ")
_ZEROS = bytes(PAGE)
BLOCK, FILE = b"block   ", b"file    "


class Wrong(AssertionError):
    """Something was found that cannot be, or is missing."""


def page(kind: bytes, owner: int, index: int, generation: int) -> bytes:
    header = _HEADER.pack(kind, owner, index, generation)
    return header + hashlib.shake_128(header).digest(PAGE - len(header))


def generation_of(data: bytes, kind: bytes, owner: int, index: int) -> int:
    """Which write made a page; 0 for zeros. Raises Wrong unless every byte is of that write."""
    if data == _ZEROS:
        return 0
    found = _HEADER.unpack_from(data)
    if found[:3] != (kind, owner, index):
        raise Wrong(f"page {index} of {kind!r} {owner} has another place's bytes: {found}")
    if data != page(*found[:3], found[3]):
        raise Wrong(f"page {index} of {kind!r} {owner} is torn: {found}")
    generation: int = found[3]
    return generation


class Register:
    """What one place may hold: numbers that grow with every write, 0 before the first. Has one
    writer at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._history = [frozenset((0,))]

    @property
    def settled(self) -> bool:
        """Its value is known."""
        return len(self._history[-1]) == 1

    @property
    def last(self) -> int:
        return max(self._history[-1])

    def begin(self, value: int) -> None:
        with self._lock:
            self._history.append(self._history[-1] | {value})

    def acknowledge(self, value: int) -> None:
        with self._lock:
            self._history.append(frozenset((value,)))

    def mark(self) -> int:
        """To be taken before a read."""
        return len(self._history) - 1

    def possible(self, since: int) -> frozenset[int]:
        with self._lock:
            return frozenset().union(*self._history[since:])

    def saw(self, value: int, since: int, what: str) -> None:
        """A read that began at ``since`` found this. Nothing older is found from now on."""
        with self._lock:
            possible = frozenset[int]().union(*self._history[since:])
            if value not in possible:
                raise Wrong(f"{what}: found {value}, expected one of {sorted(possible)}")
            if since == len(self._history) - 1:
                self._history[-1] = frozenset(one for one in possible if one >= value)


class Blocks:
    """Blocks of a namespace. Odd numbers are blocks, even ones say that there is none: blocks are
    put, removed and put again under the same key with other bytes."""

    def __init__(self, client: kvfs.Client, name: str, copies: int, seed: int) -> None:
        layout = KVLayout(block_tokens=16)
        self._namespace = client.namespace(name, layout, create=True, copies=copies)
        self._writes, self._reads = random.Random(seed), random.Random(seed + 1)
        self._registers: list[Register] = []
        self.acknowledged = 0
        self.evicting = False
        """A disk is full: blocks may be given up to make room, and are gone then."""
        self.evicted = 0

    @staticmethod
    def key(number: int) -> bytes:
        return hashlib.sha256(b"checker %d" % number).digest()

    @staticmethod
    def data(number: int, generation: int) -> bytes:
        return b"".join(page(BLOCK, number, i, generation) for i in range(BLOCK_PAGES))

    def write(self) -> bool:
        """Puts some, new ones or again; now and then removes some first."""
        numbers = [len(self._registers) + i for i in range(BLOCKS_PER_PUT)]
        if len(self._registers) > 40 and self._writes.random() < 0.25:
            drawn = self._writes.sample(range(len(self._registers)), BLOCKS_PER_PUT)
            # After an unclear removal a put may keep the old bytes, and would not say so.
            numbers = [n for n in drawn if self._registers[n].settled]
            self._remove([n for n in numbers if self._registers[n].last % 2])
        else:
            self._registers += [Register() for _ in numbers]
        if not numbers:
            return False
        registers = [self._registers[n] for n in numbers]
        values = [register.last + 1 for register in registers]
        for register, value in zip(registers, values, strict=True):
            register.begin(value)
        self._namespace.put(
            [self.key(n) for n in numbers],
            [self.data(n, value) for n, value in zip(numbers, values, strict=True)],
        )
        for register, value in zip(registers, values, strict=True):
            register.acknowledge(value)
        self.acknowledged += len(numbers)
        return True

    def _remove(self, numbers: Sequence[int]) -> None:
        registers = [self._registers[n] for n in numbers]
        values = [register.last + 1 for register in registers]
        for register, value in zip(registers, values, strict=True):
            register.begin(value)
        self._namespace.remove([self.key(n) for n in numbers])
        for register, value in zip(registers, values, strict=True):
            register.acknowledge(value)

    def read(self) -> bool:
        """Some that should be there; whether all of them were."""
        count = len(self._registers)
        numbers = sorted(self._reads.sample(range(count), min(count, BATCH)))
        return bool(numbers) and not self._away(numbers)

    def _away(self, numbers: Sequence[int]) -> list[int]:
        """Reads; those that were not there and should be."""
        registers = [self._registers[n] for n in numbers]
        marks = [register.mark() for register in registers]
        away = []
        with self._namespace.get([self.key(n) for n in numbers]) as blocks:
            for n, register, mark, view in zip(numbers, registers, marks, blocks, strict=True):
                if view is not None:
                    self._check(n, register, mark, bytes(view))
                elif all(value % 2 for value in register.possible(mark)):
                    away.append(n)
        if not self.evicting:
            return away
        for n in away:
            self._registers[n].begin(self._registers[n].last + 1)
        self.evicted += len(away)
        return []

    @staticmethod
    def _check(number: int, register: Register, mark: int, data: bytes) -> None:
        if len(data) != BLOCK_PAGES * PAGE:
            raise Wrong(f"block {number} has {len(data)} bytes")
        pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
        found = {generation_of(one, BLOCK, number, i) for i, one in enumerate(pages)}
        if len(found) != 1:
            raise Wrong(f"block {number} is mixed of {found}")
        register.saw(found.pop(), mark, f"block {number}")

    def verify(self) -> int:
        """Everything that was acknowledged; returns how many are away."""
        away = 0
        for start in range(0, len(self._registers), BATCH):
            numbers = range(start, min(start + BATCH, len(self._registers)))
            away += len(self._away(numbers))
        return away


class Files:
    """Files in a directory: runs of pages are written anywhere in them, and over each other."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self._writes, self._reads = random.Random(seed), random.Random(seed + 1)
        self._files: list[list[Register]] = []
        self.acknowledged = 0

    def path(self, number: int) -> Path:
        return self.directory / f"file-{number}"

    def write(self) -> bool:
        """A run of pages of an old file or a new one. Acknowledged is what was synced."""
        number = self._writes.randrange(len(self._files) + 1)
        if number == len(self._files) and (not self._files or self._writes.random() < 0.3):
            self._files.append([Register() for _ in range(FILE_PAGES)])
        number = min(number, len(self._files) - 1)
        count = self._writes.randint(1, RUN_PAGES_MAX)
        first = self._writes.randrange(FILE_PAGES - count)
        registers = self._files[number][first : first + count]
        value = 1 + max(register.last for register in registers)
        for register in registers:
            register.begin(value)
        data = b"".join(page(FILE, number, i, value) for i in range(first, first + count))
        with _opened(self.path(number), os.O_RDWR | os.O_CREAT) as file:
            if os.pwrite(file, data, first * PAGE) != len(data):
                return False
            os.fsync(file)
        for register in registers:
            register.acknowledge(value)
        self.acknowledged += count
        return True

    def read(self) -> bool:
        if not self._files:
            return False
        number = self._reads.randrange(len(self._files))
        count = self._reads.randint(1, 4 * RUN_PAGES_MAX)
        first = self._reads.randrange(FILE_PAGES - count)
        return self._read(number, first, count)

    def _read(self, number: int, first: int, count: int) -> bool:
        registers = self._files[number][first : first + count]
        marks = [register.mark() for register in registers]
        try:
            with _opened(self.path(number), os.O_RDONLY) as file:
                # Not what the kernel remembers of this mount, but what the servers have.
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                data = os.pread(file, count * PAGE, first * PAGE)
        except FileNotFoundError:
            if all(0 in r.possible(m) for r, m in zip(registers, marks, strict=True)):
                return False
            raise Wrong(f"file {number} is gone") from None
        data = data.ljust(count * PAGE, b"\0")
        for i, (register, mark) in enumerate(zip(registers, marks, strict=True)):
            place = first + i
            found = generation_of(data[i * PAGE : (i + 1) * PAGE], FILE, number, place)
            register.saw(found, mark, f"page {place} of file {number}")
        return True

    def verify(self) -> None:
        for number in range(len(self._files)):
            self._read(number, 0, FILE_PAGES)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Errors of the close are errors."""
    file = os.open(path, flags, 0o600)
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(file)
        raise
    os.close(file)


@dataclasses.dataclass
class Activity:
    """How one of the four went during a window."""

    began: float
    done: int = 0
    gap: float = 0.0
    """The longest time without a success."""
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    last: float = 0.0

    def succeeded(self, now: float) -> None:
        self.gap = max(self.gap, now - (self.last or self.began))
        self.last = now
        self.done += 1


class Checker:
    """Four threads: blocks and files are written and read."""

    def __init__(self, blocks: Blocks, files: Files) -> None:
        self.blocks, self._files = blocks, files
        self._steps: dict[str, Callable[[], bool]] = {
            "put": blocks.write,
            "get": blocks.read,
            "write": files.write,
            "read": files.read,
        }
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._wrong: list[BaseException] = []
        self.window: dict[str, Activity] = {}

    @property
    def acknowledged(self) -> int:
        """Pages."""
        return self.blocks.acknowledged * BLOCK_PAGES + self._files.acknowledged

    def open_window(self) -> None:
        now = time.monotonic()
        self.window = {name: Activity(now) for name in self._steps}

    def start(self) -> None:
        self._stop.clear()
        self.open_window()
        for name, step in self._steps.items():
            thread = threading.Thread(target=self._run, args=(name, step), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, name: str, step: Callable[[], bool]) -> None:
        try:
            while not self._stop.wait(PACE_SECONDS):
                try:
                    if step():
                        self.window[name].succeeded(time.monotonic())
                    else:
                        self.window[name].errors["away"] += 1
                except (KvfsError, OSError) as exc:
                    self.window[name].errors[_name_of(exc)] += 1
        except BaseException as exc:
            self._wrong.append(exc)
            self._stop.set()

    def wait(self, seconds: float) -> None:
        """Goes on for so long, or until something is wrong, which is raised."""
        self._stop.wait(seconds)
        self.check()

    def check(self) -> None:
        if self._wrong:
            raise self._wrong[0]

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
            if thread.is_alive():
                raise Wrong("a read or write never ended")
        self._threads.clear()
        self.check()

    def verify(self) -> None:
        """All that was acknowledged is there. Whole chains answer at once, but a loaded machine may
        be late."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                away = self.blocks.verify()
                self._files.verify()
                if not away:
                    return
                problem = f"{away} acknowledged blocks are lost"
            except (KvfsError, OSError) as exc:
                problem = f"not readable: {_name_of(exc)}: {exc}"
            if time.monotonic() >= deadline:
                raise Wrong(problem)
            time.sleep(0.2)


def _name_of(exc: BaseException) -> str:
    if isinstance(exc, OSError) and exc.errno is not None and not isinstance(exc, KvfsError):
        import errno

        return errno.errorcode.get(exc.errno, str(exc.errno))
    return type(exc).__name__
