"""What the answers of a batch say."""

from __future__ import annotations

from kvfs_base.errors import ConnectionLost, KvfsError
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c


def raise_first(outcomes: m.Outcomes, *, besides: type[KvfsError] | None = None) -> None:
    """The first item's error that is not ``besides``."""
    for index in outcomes.errors:
        error = outcomes.error(index)
        if error is not None and (besides is None or not isinstance(error, besides)):
            raise error


def wrong_piece(piece: m.Piece, outcomes: m.Outcomes, data: memoryview) -> ConnectionLost | None:
    """What is wrong with the bytes of the only piece that was asked for with its sum. They were
    summed when they were sent: it is not the chunk that is damaged."""
    (expected,) = outcomes.sums
    found = crc32c(data)
    if found == expected:
        return None
    detail = f"bytes of chunk {tuple(piece.chunk)} changed on their way"
    return ConnectionLost(detail=detail)


__all__ = ["raise_first", "wrong_piece"]
