"""What the answers of a batch say."""

from __future__ import annotations

from kvfs_base.errors import ChunkCorrupt, KvfsError
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c


def raise_first(outcomes: m.Outcomes, *, besides: type[KvfsError] | None = None) -> None:
    """The first item's error that is not ``besides``."""
    for index in outcomes.errors:
        error = outcomes.error(index)
        if error is not None and (besides is None or not isinstance(error, besides)):
            raise error


def wrong_piece(piece: m.Piece, outcomes: m.Outcomes, data: memoryview) -> ChunkCorrupt | None:
    """What is wrong with the bytes of the only piece that was asked for with its sum."""
    (expected,) = outcomes.sums
    found = crc32c(data)
    if found == expected:
        return None
    return ChunkCorrupt(*piece.chunk, expected_crc32c=expected, found_crc32c=found)


__all__ = ["raise_first", "wrong_piece"]
