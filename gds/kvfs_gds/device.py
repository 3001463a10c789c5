"""Where KV lives while a model computes: the seam between the loader and a device.

A device copies pieces of registered host memory to pages and back, in streams: what is queued on a
stream happens in order, and a call returns before the copy does. ``CpuDevice`` is such a device,
made of memory and threads; ``kvfs_gds.cuda.CudaDevice`` is a GPU. The loader cannot tell.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from kvfs_base.errors import InvalidRequest
from kvfs_gds.paged import HostMemory, Transfer, copy_on_cpu

log = logging.getLogger(__name__)


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether everything queued before it has happened."""

    def wait(self) -> None:
        """Blocks this thread until ``done``."""


class Registered(Protocol):
    """Host memory that a device may use."""

    @property
    def registered_bytes(self) -> int:
        """What is pinned for the device."""

    def ensure(self, transfer: Transfer) -> None:
        """Makes the blocks of a transfer usable. Raises InvalidRequest if that is not possible."""

    def close(self) -> None:
        """No copy may be queued any more. Twice does no harm."""


class Device(Protocol):
    """Thread-safe. A stream is an object of the device's own, or what a caller has (``wrap``)."""

    name: str

    @property
    def staging_bytes(self) -> int:
        """Memory of the device that copies pass through."""

    def register(self, memory: HostMemory) -> Registered: ...

    def stream(self, *, urgent: bool) -> Any:
        """A new stream. Copies on an urgent one go before those on others, where the device can."""

    def wrap(self, stream: Any) -> Any:
        """A caller's stream (of torch, of cupy, a pointer) as one of this device."""

    def plan(self, transfer: Transfer, *, store: bool) -> Any:
        """What several copies of one transfer share, all of them loads, or stores. To be kept until
        they have happened."""

    def copy(
        self, plan: Any, first_layer: int, end_layer: int, stream: Any, *, store: bool
    ) -> None:
        """Queues the copy of some layers: host memory to pages or, with ``store``, back."""

    def record(self, stream: Any) -> Event:
        """The point that ``stream`` has been queued up to."""

    def wait_for(self, stream: Any, event: Event) -> None:
        """Queues a wait: what is queued on ``stream`` from here on happens after ``event``."""

    def close_stream(self, stream: Any) -> None:
        """Everything queued on a stream of this device has happened."""


class CpuEvent:
    def __init__(self) -> None:
        self._happened = threading.Event()

    @classmethod
    def happened(cls) -> CpuEvent:
        event = cls()
        event.happen()
        return event

    def happen(self) -> None:
        self._happened.set()

    def done(self) -> bool:
        return self._happened.is_set()

    def wait(self) -> None:
        self._happened.wait()


class CpuStream:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvfs-stream", daemon=True)
        self._thread.start()

    def queue(self, step: Callable[[], None]) -> None:
        """``step`` must not raise."""
        self._todo.put(step)

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._todo.get()) is not None:
            step()
            del step  # it holds what it copied from: not until the next one comes


class _CpuRegistered:
    registered_bytes = 0

    def ensure(self, transfer: Transfer) -> None:
        pass  # memory is memory

    def close(self) -> None:
        pass


class CpuDevice:
    """The CPU's own memory: engines without a GPU, and tests."""

    name = "cpu"
    staging_bytes = 0

    def register(self, memory: HostMemory) -> Registered:
        return _CpuRegistered()

    def stream(self, *, urgent: bool) -> CpuStream:
        return CpuStream()

    def wrap(self, stream: Any) -> CpuStream:
        if not isinstance(stream, CpuStream):
            raise InvalidRequest(detail=f"not a stream of the CPU: {type(stream).__name__}")
        return stream

    def plan(self, transfer: Transfer, *, store: bool) -> Transfer:
        return transfer

    def copy(
        self, plan: Transfer, first_layer: int, end_layer: int, stream: CpuStream, *, store: bool
    ) -> None:
        stream.queue(lambda: copy_on_cpu(plan, first_layer, end_layer, store=store))

    def record(self, stream: CpuStream) -> CpuEvent:
        event = CpuEvent()
        stream.queue(event.happen)
        return event

    def wait_for(self, stream: CpuStream, event: Event) -> None:
        stream.queue(event.wait)

    def close_stream(self, stream: CpuStream) -> None:
        stream.close()


def open_device(setting: str = "auto", number: int = 0) -> Device:
    """``cpu``, ``cuda`` (raises InvalidRequest where there is none), or ``auto``: a GPU if there is
    one, else the CPU, and the log says why."""
    if setting not in ("auto", "cpu", "cuda"):
        raise InvalidRequest(detail=f"device {setting!r}: auto, cpu or cuda")
    if setting == "cpu":
        return CpuDevice()
    reason = _no_cuda(number)
    if not reason:
        from kvfs_gds.cuda import CudaDevice

        return CudaDevice(number)
    if setting == "cuda":
        raise InvalidRequest(detail=f"no CUDA device: {reason}")
    log.info("KV is loaded into the CPU's memory: %s", reason)
    return CpuDevice()


def _no_cuda(number: int) -> str:
    """Why CUDA device ``number`` cannot be used; empty if it can."""
    try:
        import cupy
    except ImportError as exc:
        return f"cupy is not installed ({exc})"
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        return str(exc)
    return "" if number < count else f"device {number} of {count}"


__all__ = ["CpuDevice", "CpuEvent", "CpuStream", "Device", "Event", "Registered", "open_device"]
