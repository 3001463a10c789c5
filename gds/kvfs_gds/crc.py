"""CRC32C (Castagnoli) from the checksums of pieces: what a GPU computes, a piece a thread, is put
together here.

For checksums as they are stored (started and ended with all ones), a shift by n bytes is linear:

    crc(a + b) = shift(crc(a), len(b)) xor crc(b)        (zlib's crc32_combine)

A shift is a 32 x 32 matrix over GF(2); shifts by n and by m bytes one after the other are one by
n + m. As tables, one for each byte of a checksum, it is applied to whole arrays at once.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

POLYNOMIAL = 0x82F63B78
"""Castagnoli's, reflected."""

PIECE_BYTES = 1024
"""What one thread of a GPU sums: 64 MiB are 65,536 threads."""

Crcs = npt.NDArray[np.uint32]


@functools.cache
def tables(count: int = 8) -> Crcs:
    """[count, 256]: entry [k, b] is what byte ``b`` does to the checksum k bytes later."""
    found = np.zeros((count, 256), dtype=np.uint32)
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(POLYNOMIAL), crc >> 1).astype(np.uint32)
    found[0] = crc
    for k in range(1, count):
        found[k] = (found[k - 1] >> 8) ^ found[0][found[k - 1] & 0xFF]
    return found


@functools.lru_cache(64)
def _shift_tables(nbytes: int) -> Crcs:
    """[4, 256]: what each byte of a checksum becomes after ``nbytes`` further bytes."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if nbytes:
        half = _shift_tables(nbytes // 2)
        columns = _apply(half, _apply(half, columns))
        if nbytes % 2:
            columns = (columns >> 8) ^ tables()[0][columns & 0xFF]
    found = np.zeros((4, 256), dtype=np.uint32)
    values = np.arange(256)
    for part in range(4):
        for bit in range(8):
            found[part] ^= np.where(values >> bit & 1, columns[8 * part + bit], 0).astype(np.uint32)
    return found


def _apply(shift: Crcs, crcs: Crcs) -> Crcs:
    found: Crcs = shift[0][crcs & 0xFF]
    for part in range(1, 4):
        found = found ^ shift[part][crcs >> np.uint32(8 * part) & 0xFF]
    return found


def combine(pieces: Crcs, size: int, piece_bytes: int = PIECE_BYTES) -> Crcs:
    """Checksums [blocks] of blocks of ``size`` bytes from those of their pieces [blocks, pieces],
    of which the last may be short."""
    last_bytes = size % piece_bytes
    whole = pieces[:, :-1] if last_bytes else pieces
    length = piece_bytes
    while whole.shape[1] > 1:
        if whole.shape[1] % 2:  # nothing in front of a block changes nothing
            whole = np.concatenate([np.zeros((len(whole), 1), dtype=np.uint32), whole], axis=1)
        whole = _apply(_shift_tables(length), whole[:, 0::2]) ^ whole[:, 1::2]
        length *= 2
    if not last_bytes:
        return whole[:, 0]
    if not whole.shape[1]:
        return pieces[:, 0]
    return _apply(_shift_tables(last_bytes), whole[:, 0]) ^ pieces[:, -1]


__all__ = ["PIECE_BYTES", "combine", "tables"]
