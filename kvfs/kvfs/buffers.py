"""What users hand over as block contents, seen as plain bytes without a copy.

torch and numpy are never imported here: an object that needs them has brought them along.
"""

from __future__ import annotations

import sys
from typing import Any

from kvfs_base.errors import InvalidRequest


def byte_view(buffer: Any, *, writable: bool = False) -> memoryview:
    """The bytes of a contiguous buffer: bytes, bytearray, mmap, numpy arrays, CPU torch tensors of
    any dtype (bfloat16 too), and whatever else has the buffer protocol.

    Raises InvalidRequest if it is not contiguous, not in CPU memory, or read-only though
    ``writable`` is asked for.
    """
    try:
        view = memoryview(buffer)
    except TypeError:
        view = _tensor_view(buffer)
    except (BufferError, ValueError):  # a numpy dtype that the protocol has no letter for
        view = _odd_array_view(buffer)
    if not view.c_contiguous:
        raise InvalidRequest(detail=f"{_name(buffer)} is not contiguous")
    if writable and view.readonly:
        raise InvalidRequest(detail=f"{_name(buffer)} is read-only")
    if view.nbytes == 0:
        return memoryview(bytearray())
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def _name(buffer: Any) -> str:
    return type(buffer).__name__


def _tensor_view(tensor: Any) -> memoryview:
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(detail=f"{_name(tensor)} has no buffer")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InvalidRequest(detail=f"a tensor on {tensor.device}, {tuple(tensor.stride())}")
    try:
        # Not every dtype has a numpy twin, bytes have.
        return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    except (RuntimeError, TypeError) as exc:
        raise InvalidRequest(detail=f"a tensor of {tensor.dtype}: {exc}") from exc


def _odd_array_view(array: Any) -> memoryview:
    flags = getattr(array, "flags", None)
    if flags is None or not hasattr(array, "reshape"):
        raise InvalidRequest(detail=f"{_name(array)} has no contiguous buffer")
    if not flags.c_contiguous:
        raise InvalidRequest(detail=f"{_name(array)} is not contiguous")
    return memoryview(array.reshape(-1).view("u1"))


__all__ = ["byte_view"]
