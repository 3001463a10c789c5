"""Conversion on the way: blocks that are stored as fp8 (E4M3) for pages of bf16. Half the bytes on
the disk, in the arena and on the link; the values are rounded once, when they are stored.

    page value = stored value * scale

with a scale a fragment (K and V of each layer), as engines keep for their own fp8 caches.

E4M3 as in "FP8 formats for deep learning" (2022) and in the ``cvt`` instructions of PTX: no
infinities, the largest value is 448, what is larger is stored as that, NaN stays NaN.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from kvfs_base.errors import InvalidRequest

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_NAN = 0x7F


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Stored as E4M3, bf16 in the pages. ``scales`` has one entry a fragment of the layout. Raises
    InvalidRequest."""

    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 < scale < float("inf") for scale in self.scales):
            raise InvalidRequest(detail="scales are positive numbers")

    @staticmethod
    def stored_bytes(page_bytes: int) -> int:
        return page_bytes // 2

    def decode(self, stored: Bytes, fragment: int) -> Bytes:
        """E4M3 to bf16."""
        scale = np.float32(self.scales[fragment])
        with np.errstate(all="ignore"):
            return _to_bf16(_values()[stored] * scale)

    def encode(self, pages: Bytes, fragment: int) -> Bytes:
        """bf16 to the nearest E4M3; of two that are as near the even one."""
        wide = pages.view(np.uint16).astype(np.uint32) << 16
        with np.errstate(all="ignore"):  # NaN and what is too large are values like others
            values = wide.view(np.float32) / np.float32(self.scales[fragment])
        size = np.abs(values)
        known = _values()[:_NAN]
        middles = (known[:-1] + known[1:]) / 2
        codes: Bytes = np.searchsorted(middles, size, side="left").astype(np.uint8)
        tie = size == middles[np.minimum(codes, len(middles) - 1)]
        codes += tie.astype(np.uint8) & codes & 1
        codes |= np.signbit(values).astype(np.uint8) << 7
        codes[np.isnan(values)] = _NAN
        return codes


@functools.cache
def _values() -> Floats:
    """[256]: what each byte stands for."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    size = np.where(
        exponent == 0,
        np.ldexp(fraction / 8, -6),
        np.ldexp(1 + fraction / 8, exponent - 7),
    )
    size[(code & _NAN) == _NAN] = np.nan
    return np.where(code >> 7, -size, size).astype(np.float32)


def _to_bf16(values: Floats) -> Bytes:
    """Rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded = np.where(np.isnan(values), 0x7FFF, rounded)
    return rounded.astype(np.uint16).view(np.uint8)


__all__ = ["Fp8"]
