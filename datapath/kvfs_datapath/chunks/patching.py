"""What an update does to the bytes of a chunk, and to their checksum.

Bytes are copied by the kernel, through one buffer; Python sees lengths and checksums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from kvfs_base.limits import CALL_SECONDS, KIB
from kvfs_base.seams import Buffer, DiskFile
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.checksum import crc32c

_ZEROS = bytes(64 * KIB)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A chunk of ``before`` bytes becomes one of ``after``: its first ``head`` bytes stay, zeros
    follow up to ``offset``, then ``data`` of ``count`` bytes, then what was from ``tail`` on."""

    before: int
    head: int
    offset: int
    data: Sequence[Buffer]
    count: int
    tail: int
    after: int

    @classmethod
    def write(cls, before: int, offset: int, data: Sequence[Buffer]) -> Change:
        count = sum(map(len, data))
        if not count:
            return cls.cut(before, before)
        end = offset + count
        head, tail = min(before, offset), min(before, end)
        return cls(before, head, offset, data, count, tail, max(before, end))

    @classmethod
    def cut(cls, before: int, end: int) -> Change:
        """A chunk that does not reach ``end`` stays as it is."""
        end = min(before, end)
        return cls(before, end, end, (), 0, before, end)

    @property
    def keeps_all(self) -> bool:
        """Nothing changes before the chunk's end."""
        return self.head == self.before

    @property
    def keeps_nothing(self) -> bool:
        """No byte of the chunk is left afterwards, so it does not matter what they are."""
        return not self.head and self.tail >= self.before

    def from_nothing(self) -> Change:
        """The same where ``keeps_nothing``, of a chunk without bytes."""
        return dataclasses.replace(self, before=0, tail=0)

    def append(self, file: DiskFile) -> None:
        """Writes behind the end of a file that is ``before`` bytes long."""
        if self.count:
            file.pwritev(self.data, self.offset)

    def extend_crc32c(self, value: int) -> int:
        """The checksum up to the end of ``data``, if ``value`` is the one of the first ``head``
        bytes: where ``keeps_all``, of the chunk."""
        gap = self.offset - self.head
        for start in range(0, gap, len(_ZEROS)):
            value = crc32c(memoryview(_ZEROS)[: gap - start], value)
        for piece in self.data:
            value = crc32c(piece, value)
        return value

    def copy(self, file: DiskFile | None, draft: DiskFile, buffers: BufferPool) -> tuple[int, int]:
        """Writes what the chunk (``file``, or None where there is none yet) becomes into the empty
        ``draft``; answers the checksum that the chunk turned out to have, and the new one. Who
        copies bytes without comparing the first would give damaged ones a right checksum."""
        with buffers.lend(CALL_SECONDS) as buffer:
            old = 0
            for piece, offset in _pieces(file, 0, self.head, buffer):
                old = crc32c(piece, old)
                draft.pwritev([piece], offset)
            new = self.extend_crc32c(old)
            if self.count:
                draft.pwritev(self.data, self.offset)
            for piece, _ in _pieces(file, self.head, self.tail, buffer):
                old = crc32c(piece, old)
            for piece, offset in _pieces(file, self.tail, self.before, buffer):
                old, new = crc32c(piece, old), crc32c(piece, new)
                draft.pwritev([piece], offset)
        return old, new


def _pieces(
    file: DiskFile | None, start: int, end: int, buffer: memoryview
) -> Iterator[tuple[memoryview, int]]:
    """The bytes ``start <= place < end`` of a file, those that are there, in ``buffer``."""
    for offset in range(start, end, len(buffer)):
        assert file is not None
        piece = buffer[: min(len(buffer), end - offset)]
        yield piece[: file.preadv([piece], offset)], offset
