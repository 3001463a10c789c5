"""How a range of a file lies in its chunks."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """``length`` bytes at ``offset`` of chunk ``number``, which are at ``position`` of the
    caller's buffer."""

    number: int
    offset: int
    length: int
    position: int


def segments(chunk_bytes: int, offset: int, length: int) -> list[Segment]:
    """The bytes ``offset <= x < offset + length``, chunk by chunk."""
    found = []
    position = 0
    while position < length:
        number, inside = divmod(offset + position, chunk_bytes)
        count = min(chunk_bytes - inside, length - position)
        found.append(Segment(number, inside, count, position))
        position += count
    return found


__all__ = ["Segment", "segments"]
