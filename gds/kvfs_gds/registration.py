"""Host memory that CUDA devices may read and write: registered (pinned), once a process."""

from __future__ import annotations

import threading

import cupy
import numpy as np

from kvfs_base import large_pages
from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import MIB
from kvfs_gds.paged import HostMemory, Transfer

REGISTER_SLICE_BYTES = 256 * MIB
"""One cudaHostRegister call pins this much: 0.05-0.2 s/GiB, in steps that do not stall for long."""

REGISTER_PORTABLE = 1
REGISTER_MAPPED = 2
REGISTER_READ_ONLY = 8


class Registration:
    """Host memory that every CUDA context of this process may use, until ``close``: portable,
    mapped, and registered in slices as copies touch them. Nothing waits for an arena of hundreds of
    GiB to be pinned, and pages that hold no block are never allocated. Thread-safe."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self._flags = REGISTER_PORTABLE | REGISTER_MAPPED
        self._flags |= REGISTER_READ_ONLY if memory.read_only else 0
        self._lock = threading.Lock()
        self._slices: dict[int, int] = {}
        """Address by slice number."""
        self._done = np.zeros(-(-memory.nbytes // REGISTER_SLICE_BYTES), dtype=bool)
        """The same, for many at once."""

    @property
    def registered_bytes(self) -> int:
        """Pinned so far."""
        return sum(self._size(number) for number in list(self._slices))

    def ensure(self, transfer: Transfer) -> None:
        """As Registered.ensure."""
        if not len(transfer.offsets):
            return
        lowest = int(transfer.offsets.min()) // REGISTER_SLICE_BYTES
        highest = (int(transfer.offsets.max()) + transfer.block_bytes - 1) // REGISTER_SLICE_BYTES
        if self._done[lowest : highest + 1].all():
            return  # of an arena in use, nearly always
        first = transfer.offsets // REGISTER_SLICE_BYTES
        last = (transfer.offsets + transfer.block_bytes - 1) // REGISTER_SLICE_BYTES
        if (last - first).max() <= 1 and self._done[first].all() and self._done[last].all():
            return
        numbers = {
            n
            for a, b in {*zip(first.tolist(), last.tolist(), strict=True)}
            for n in range(a, b + 1)
        }
        self._register(sorted(numbers))

    def register_all(self) -> None:
        """Everything at once: 0.2 s/GiB now, and no copy waits for it later."""
        self._register(list(range(-(-self.memory.nbytes // REGISTER_SLICE_BYTES))))

    def _size(self, number: int) -> int:
        return min(REGISTER_SLICE_BYTES, self.memory.nbytes - number * REGISTER_SLICE_BYTES)

    def _register(self, numbers: list[int]) -> None:
        with self._lock:
            for number in numbers:
                if number in self._slices:
                    continue
                address = self.memory.address + number * REGISTER_SLICE_BYTES
                large_pages.make_large(address, self._size(number))
                try:
                    cupy.cuda.runtime.hostRegister(address, self._size(number), self._flags)
                except cupy.cuda.runtime.CUDARuntimeError as exc:
                    raise InvalidRequest(detail=f"cudaHostRegister: {exc}") from exc
                self._slices[number] = address
                self._done[number] = True

    def close(self) -> None:
        with self._lock:
            for address in self._slices.values():
                cupy.cuda.runtime.hostUnregister(address)
            self._slices.clear()
            self._done[:] = False


_shared: dict[tuple[int, int], tuple[Registration, int]] = {}
_shared_lock = threading.Lock()
"""Memory may be registered once a process: loaders and GPUs use the same registration."""


class SharedRegistration:
    """A Registration that lasts as long as somebody uses it."""

    def __init__(self, memory: HostMemory) -> None:
        self._name = (memory.address, memory.nbytes)
        with _shared_lock:
            found, users = _shared.get(self._name) or (Registration(memory), 0)
            _shared[self._name] = found, users + 1
        self.registration = found
        self.ensure = found.ensure
        self._closed = False

    @property
    def registered_bytes(self) -> int:
        return self.registration.registered_bytes

    def close(self) -> None:
        with _shared_lock:
            if self._closed:
                return
            self._closed = True
            users = _shared[self._name][1] - 1
            if users:
                _shared[self._name] = self.registration, users
                return
            del _shared[self._name]
        self.registration.close()


class DeviceMemory:
    """Memory of the GPU in the place of registered host memory (what cuFile reads into)."""

    registered_bytes = 0

    def ensure(self, transfer: Transfer) -> None:
        pass

    def close(self) -> None:
        pass


__all__ = ["REGISTER_SLICE_BYTES", "DeviceMemory", "Registration", "SharedRegistration"]
