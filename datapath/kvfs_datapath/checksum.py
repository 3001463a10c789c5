"""CRC32C (Castagnoli), the checksum of every chunk.

It is what storage and network hardware, ext4 and iSCSI compute, so a peer or a tool can check a
chunk without us. The ``crc32c`` package reads memory at 15 GB/s a core with the instructions of
SSE 4.2 or ARMv8; ``awscrt`` (the extra ``fast``) folds with carry-less products of 512 bits, where
the processor has them, and gets 30 GB/s (measured together, blocks of 2 MiB that are in no cache).
Where it has to fold 128 bits at a time, ``awscrt`` is the slower one: 3.7 GB/s beside 7.8 of such
blocks, on a processor with other work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Sequence

import crc32c as _portable

from kvfs_base.os_cpu import cpu_flags
from kvfs_base.seams import Buffer

_FOLDS_512_BITS = {"avx512f", "avx512vl", "vpclmulqdq"}
_compute: Callable[[Buffer, int], int] = _portable.crc32c
_combine: Callable[[int, int, int], int] | None = None
with contextlib.suppress(ImportError):
    from awscrt.checksums import crc32c as _folding

    if cpu_flags() >= _FOLDS_512_BITS:
        _compute = _folding

    from awscrt.checksums import combine_crc32c as _combining  # not in old ones

    _combine = _combining


def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC32C of ``data``, continuing from ``value``. Releases the GIL for all but small pieces (32
    KiB, or 5 where ``awscrt`` computes it): there, giving it up costs more than computing."""
    return _compute(data, value)


crc32c_held = functools.partial(_portable.crc32c, gil_release_mode=0)
"""The same, and the GIL stays here: for one of many small pieces. A thread that finds the GIL taken
when it comes back sleeps for longer than the sum takes. ``awscrt`` gives it up in any case."""


def have_sums(views: Sequence[memoryview], sums: Sequence[int]) -> bool:
    """Whether writable ``views``, none of them empty, that lie one after the other in memory have
    these sums, by one sum over all of them: for eight threads with small chunks it is the GIL that
    limits them, which is given up once instead of for each. False also where this cannot be told so
    (there are gaps, or no ``awscrt``)."""
    run = None if _combine is None else _joined(views)
    if run is None or _combine is None:
        return False
    expected = 0
    for view, one in zip(views, sums, strict=True):
        expected = _combine(expected, one, len(view))
    return _compute(run, 0) == expected


def _joined(views: Sequence[memoryview]) -> memoryview | None:
    """All the memory, which is valid for as long as the views are; None if there are gaps."""
    char, address = ctypes.c_char, ctypes.addressof
    start = end = address(char.from_buffer(views[0]))
    for view in views:
        if address(char.from_buffer(view)) != end:
            return None
        end += len(view)
    return memoryview((char * (end - start)).from_address(start))
