"""Pieces that are too short for the copy engine, by the copy engine: what a block has of a layer
comes in one piece into memory of the GPU, and a kernel scatters it from there.

A piece of a page is 4 to 64 KiB, but all that a block has of one layer lie side by side in host
memory, and layers do, too. The engine takes those whole, at the rate of the link, and the kernel,
which reads memory of 4 TB/s instead of a link of 55 GB/s, is done in a twentieth of the time. A
kernel that reads the link itself holds on to its multiprocessors for as long as the load lasts; who
computes meanwhile with a kernel that counts on all of them waits for it again and again.

    feeder    fill 0 | fill 1 | fill 2 | fill 3 | fill 0 ...     the copy engine, its own stream
    stream             scatter 0 | scatter 1 | ...               whose slot is free afterwards

What waits for what follows the order in which it was queued, under one lock: no circle can form.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from kvfs_base.limits import KIB
from kvfs_gds.cuda_batch import MemcpyBatch
from kvfs_gds.limits import STAGING_SLOT_BYTES, STAGING_SLOTS
from kvfs_gds.paged import Int64s, Transfer, cut

LAYER_BYTES_MIN = 32 * KIB
"""What a block has of a layer must be this long: layers are copied alone at first, and then four at
a time, and the engine is at its best from 64 KiB on."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Blocks in host memory, as the engine is told of them."""

    base: int
    addresses: Int64s
    layer_bytes: int
    seam_bytes: int
    """No copy may cross a multiple of it behind ``base``; 0 if none would."""

    @classmethod
    def of(cls, transfer: Transfer, seam_bytes: int) -> Source:
        offsets = np.ascontiguousarray(transfer.offsets, dtype=np.int64)
        crosses = (offsets % seam_bytes > seam_bytes - transfer.block_bytes).any()
        base = transfer.host.address
        return cls(base, base + offsets, transfer.layer_bytes, seam_bytes if crosses else 0)


@dataclasses.dataclass(frozen=True)
class Filled:
    """Some layers of some blocks of a transfer, in memory of the GPU."""

    address: int
    """Where layer 0 of the first of these blocks would lie."""
    block_stride: int
    blocks: tuple[int, int]
    layers: tuple[int, int]


Scatter = Callable[[Filled], None]
"""Queues the kernel."""


@dataclasses.dataclass
class _Slot:
    address: int
    filled: Any
    free: Any
    used: bool = False


class Staging:
    """STAGING_SLOTS x STAGING_SLOT_BYTES of one GPU. Thread-safe."""

    def __init__(self, device: Any, batch: MemcpyBatch) -> None:
        """Raises cupy's OutOfMemoryError."""
        self._device = device
        self._batch = batch
        self._lock = threading.Lock()
        self._next = 0
        self.nbytes = STAGING_SLOTS * STAGING_SLOT_BYTES
        with device:
            self._memory = cupy.cuda.alloc(self.nbytes)
            self._feeder = cupy.cuda.Stream(non_blocking=True, priority=-1)
            self._slots = [
                _Slot(
                    int(self._memory.ptr) + number * STAGING_SLOT_BYTES,
                    cupy.cuda.Event(disable_timing=True),
                    cupy.cuda.Event(disable_timing=True),
                )
                for number in range(STAGING_SLOTS)
            ]

    def copy(self, source: Source, layers: tuple[int, int], stream: Any, scatter: Scatter) -> None:
        """Queues the load of some layers, of which each has to fit into a slot."""
        step = STAGING_SLOT_BYTES // source.layer_bytes
        count = len(source.addresses)
        with self._lock, self._device:
            for first in range(*layers, step):
                end = min(layers[1], first + step)
                blocks = STAGING_SLOT_BYTES // ((end - first) * source.layer_bytes)
                for at in range(0, count, blocks):
                    some = (at, min(count, at + blocks))
                    self._step(source, some, (first, end), stream, scatter)

    def _step(
        self,
        source: Source,
        blocks: tuple[int, int],
        layers: tuple[int, int],
        stream: Any,
        scatter: Scatter,
    ) -> None:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        wait, feeder = cupy.cuda.runtime.streamWaitEvent, self._feeder
        if slot.used:
            wait(feeder.ptr, slot.free.ptr)
        slot.used = True
        skipped = layers[0] * source.layer_bytes
        size = layers[1] * source.layer_bytes - skipped
        near = source.addresses[blocks[0] : blocks[1]] + skipped
        far = np.arange(slot.address, slot.address + size * len(near), size, dtype=np.int64)
        sizes = np.full(len(near), size, dtype=np.int64)
        if source.seam_bytes:
            near, far, sizes = cut(near, far, sizes, source.base, source.seam_bytes)
        # Leased blocks do not change: they may be read before what was queued earlier has happened.
        self._batch.copy(far, near, sizes, feeder.ptr, in_order=False)
        slot.filled.record(feeder)
        wait(stream.ptr, slot.filled.ptr)
        scatter(Filled(slot.address - skipped, size, blocks, layers))
        slot.free.record(stream)


__all__ = ["LAYER_BYTES_MIN", "Filled", "Source", "Staging"]
