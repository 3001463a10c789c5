"""What clients did and saw, and whether it can have been."""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import linearizability
from kvfs_base.limits import PAGE_BYTES
from linearizability import UNANSWERED

STAMP = struct.Struct("<8sQQQ")
REPEATS = PAGE_BYTES // STAMP.size
MAGIC = b"kvfs-sim"


class WrongBytes(AssertionError):
    """Somebody was given bytes that nobody wrote there."""


class NotLinearizable(AssertionError):
    pass


def page(owner: int, index: int, value: int) -> bytes:
    """4 KiB that say whose they are (an inode, or the number of a put), where, and which value."""
    return STAMP.pack(MAGIC, owner, index, value) * REPEATS


def read_page(data: bytes | memoryview, owner: int, index: int) -> int:
    """The value; 0 for zeros. Raises WrongBytes for bytes that are torn, mixed, or of elsewhere."""
    data = bytes(data)
    first = data[: STAMP.size]
    whole, rest = divmod(len(data), STAMP.size)
    if data != first * whole + first[:rest]:
        raise WrongBytes(f"page {index} of {owner} is torn or mixed")
    if not any(first):
        return 0
    magic, whose, where, value = STAMP.unpack(first)
    if magic != MAGIC or (whose, where) != (owner, index):
        raise WrongBytes(f"page {index} of {owner} holds page {where} of {whose}, value {value}")
    return int(value)


@dataclasses.dataclass(eq=False)
class Entry:
    process: Hashable
    request: Any
    called: int
    answer: Any = UNANSWERED
    returned: int | None = None


LEASED = ("lookup", "leased")


class History:
    """Operations by the object that they are of. Moments are numbers that only grow."""

    def __init__(self) -> None:
        self.entries: defaultdict[Hashable, list[Entry]] = defaultdict(list)
        self._moment = 0

    def begin(self, thing: Hashable, process: Hashable, request: Any) -> Entry:
        self._moment += 1
        entry = Entry(process, request, self._moment)
        self.entries[thing].append(entry)
        return entry

    def end(self, entry: Entry, answer: Any) -> None:
        self._moment += 1
        entry.answer, entry.returned = answer, self._moment

    def forget(self, thing: Hashable, entry: Entry) -> None:
        """It did nothing, certainly."""
        self.entries[thing].remove(entry)

    @property
    def count(self) -> int:
        return sum(map(len, self.entries.values()))

    def answered(self) -> int:
        return sum(e.returned is not None for part in self.entries.values() for e in part)

    def operations(self, thing: Hashable) -> list[linearizability.Operation]:
        """An answer by lease may be older than what others see while a change is not answered yet:
        it counts from the last change that was. Of those that say the same since then the first
        one speaks for all."""
        found: list[linearizability.Operation] = []
        leased: dict[tuple[int, Any], Entry] = {}
        changed = [
            entry.returned
            for entry in self.entries[thing]
            if entry.request[0] != "lookup" and entry.returned is not None
        ]
        for entry in self.entries[thing]:
            called = entry.called
            if entry.request == LEASED:
                called = 1 + max([moment for moment in changed if moment < called], default=0)
                if leased.setdefault((called, entry.answer), entry) is not entry:
                    continue
            found.append(
                linearizability.Operation(
                    entry.process, entry.request, entry.answer, called, entry.returned
                )
            )
        return found


# --- registers whose written values are all different


def check_register(entries: Iterable[Entry]) -> None:
    """Raises NotLinearizable. Requests are ("write", value) and ("read",), answered by a value; 0
    is there from the beginning.

    With unique values this needs no search (Gibbons and Korach, "Testing shared memories", 1997):
    all operations of one value are together a zone from the first return to the last call. A zone
    that is one (forward: something had returned before something else was called) excludes others
    meanwhile.
    """
    writes: dict[int, tuple[float, float]] = {0: (-1.0, -1.0)}
    reads: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        returned = math.inf if entry.returned is None else float(entry.returned)
        if entry.request[0] == "write":
            writes[entry.request[1]] = (float(entry.called), returned)
        elif entry.returned is not None:
            reads[entry.answer].append((float(entry.called), returned))
    for value in reads:
        if value not in writes:
            raise NotLinearizable(f"value {value} was read and never written")
    forward, backward = [], []
    for value, (called, returned) in writes.items():
        if any(end < called for _, end in reads[value]):
            raise NotLinearizable(f"value {value} was read before it was written")
        first = min([returned, *(end for _, end in reads[value])])
        last = max([called, *(begin for begin, _ in reads[value])])
        if first < last:
            forward.append((first, last, value))
        elif first < math.inf:
            backward.append((last, first, value))
    forward.sort()
    for one, other in itertools.pairwise(forward):
        if other[0] < one[1]:
            raise NotLinearizable(f"values {one[2]} and {other[2]} take turns: {one}, {other}")
    for begin, end, value in backward:
        for first, last, around in forward:
            if first < begin and end < last:
                raise NotLinearizable(
                    f"value {value} at {begin} to {end}, while {around} was from {first} to {last}"
                )


# --- keys of blocks


class KeyModel:
    """What a namespace has under one key: the inode of a block, or None. Commits of a key that is
    there change nothing; a block may vanish if ``lossy``."""

    def __init__(self, *, lossy: bool) -> None:
        self._lossy = lossy

    def initial(self) -> Hashable:
        return None

    def step(self, state: Any, request: Any, answer: Any) -> Iterator[Hashable]:
        kind, *arguments = request
        states = {state, None} if self._lossy else {state}
        for before in sorted(states, key=lambda s: (s is None, s or 0)):
            if kind == "commit":
                yield arguments[0] if before is None else before
            elif kind == "lookup":
                if answer is UNANSWERED or answer == before:
                    yield before
            else:
                yield from self._remove(before, arguments[0], answer)

    @staticmethod
    def _remove(before: Any, inode: int | None, answer: Any) -> Iterator[Hashable]:
        gone = before is not None and inode in (None, before)
        if answer is UNANSWERED or answer == int(gone):
            yield None if gone else before


def check_key(operations: list[linearizability.Operation], *, lossy: bool) -> None:
    linearizability.check(operations, KeyModel(lossy=lossy))
