"""cudaMemcpyBatchAsync, which cupy has no name for: many copies by the copy engine in one call.

One call with all copies of a large load would let the engine wait until the last one is described
(0.75 of the link at 32,768 copies of 64 KiB); calls of a few hundred overlap with the copies
(0.93 to 1.0). The call runs without the interpreter's lock.
"""

from __future__ import annotations

import ctypes

import numpy as np

from kvfs_base.errors import TargetFailed
from kvfs_gds.paged import Int64s

CALL_COPIES = 256

RUNTIMES = ("libcudart.so.13",)
"""The call has another signature in CUDA 12 (and one more argument in 12.8): not tried there."""

_ORDER_STREAM = 1
_ORDER_ANY = 3


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes: when the source may be read, and hints that are left out."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    ]


_STREAM_ORDER = ctypes.pointer(_Attributes(order=_ORDER_STREAM))
_ANY_ORDER = ctypes.pointer(_Attributes(order=_ORDER_ANY))
_FIRST = ctypes.pointer(ctypes.c_size_t(0))
"""The attributes hold from the first copy of a call on."""


class MemcpyBatch:
    """Thread-safe."""

    def __init__(self, call: ctypes._NamedFuncPointer) -> None:
        self._call = call
        call.restype = ctypes.c_int
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        call.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]

    @classmethod
    def find(cls) -> MemcpyBatch | None:
        """None where the runtime has no such call."""
        for name in RUNTIMES:
            try:
                return cls(ctypes.CDLL(name).cudaMemcpyBatchAsync)
            except (OSError, AttributeError):
                continue
        return None

    def copy(
        self,
        to: Int64s,
        source: Int64s,
        sizes: Int64s,
        stream: int,
        *,
        in_order: bool,
        call_copies: int = CALL_COPIES,
    ) -> None:
        """Queues copies of ``sizes`` bytes between addresses, on the current device. Unless
        ``in_order`` the sources may be read before earlier work on ``stream`` has happened. Raises
        TargetFailed."""
        attributes = _STREAM_ORDER if in_order else _ANY_ORDER
        arrays = [np.ascontiguousarray(a, dtype=np.int64) for a in (to, source, sizes)]
        starts = [int(array.__array_interface__["data"][0]) for array in arrays]
        for first in range(0, len(to), call_copies):
            error = self._call(
                *(start + 8 * first for start in starts),
                min(call_copies, len(to) - first),
                attributes,
                _FIRST,
                1,
                stream,
            )
            if error:
                raise TargetFailed(detail=f"cudaMemcpyBatchAsync: error {error}")


__all__ = ["MemcpyBatch"]
