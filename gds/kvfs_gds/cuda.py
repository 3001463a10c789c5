"""Copies between host memory and a paged KV cache on a CUDA device (cupy), in one of three ways.

Long runs (contiguous on both sides) go by the copy engine, which costs no multiprocessor: a loop of
cudaMemcpyAsync reaches a third of the link at 64 KiB, cudaMemcpyBatchAsync (``cuda_batch``) all.

Shorter pieces are staged (``staging``): the engine takes what a block has of a layer in one piece
to memory of the GPU, and a kernel scatters it from there.

Where neither will do (stores, conversions, small blocks), a kernel reads registered host memory
over the link: every warp keeps 8 x 512 bytes in flight, so few multiprocessors fill it (55 GB/s x
2 us latency is 110 KB). It does not care about the size of a piece from 4 KiB up; what it gets of
the link is 0.92, with 4 multiprocessors or 64 (an H100: reads of 128 bytes are the cause).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import threading
from typing import Any

import cupy
import numpy as np

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import KIB, MIB
from kvfs_gds.cuda_batch import MemcpyBatch
from kvfs_gds.cuda_kernels import CONVERT_SOURCE, COPY_SOURCE, UNIT_BYTES
from kvfs_gds.device import Event
from kvfs_gds.limits import LAYOUTS_KEPT, STAGING_SLOT_BYTES
from kvfs_gds.paged import HostMemory, PagedLayout, Transfer
from kvfs_gds.registration import REGISTER_SLICE_BYTES, DeviceMemory, SharedRegistration
from kvfs_gds.staging import LAYER_BYTES_MIN, Filled, Source, Staging

log = logging.getLogger(__name__)

ENGINE_PIECE_BYTES = 16 * KIB
"""Pieces below this are never looked at for runs: there would be too many to look at."""

BATCH_RUN_BYTES = 128 * KIB
"""Contiguous runs of this size and more go through the copy engine in batches. Queueing one takes
0.5 to 1.1 us of a core, copying 64 KiB 1.2: nothing is left for a thread that does more than that,
and a load by the engine was slower there than one by the kernel."""

LOOP_RUN_BYTES = 4 * MIB
"""The same, one by one, where the runtime has no batches: from there on a loop of cudaMemcpyAsync
reaches more of the link than the kernel (docs/results/h200-loader.json)."""

STAGED_RUN_BYTES = 256 * KIB
"""Where runs can be staged, only those from here on go to their pages at once: shorter ones have
several descriptions where what is staged has one."""

GRID_BLOCKS = 8
GRID_THREADS = 512
STREAMS_KEPT = 64

SCATTER_BLOCKS = 2
"""A multiprocessor, where the kernel reads memory of the GPU."""


class Way(enum.Enum):
    """How a transfer is copied."""

    ENGINE = "long runs, by the copy engine"
    STAGED = "by the copy engine into memory of the GPU, by the kernel from there"
    KERNEL = "by the kernel, over the link"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A transfer and its tables: offsets, bases, strides, pages, scales."""

    transfer: Transfer
    way: Way
    tables: Any = None
    """Owns the memory that the addresses point into. The engine needs none."""
    ready: Any = None
    """The event behind their upload, if they were uploaded."""
    offsets: int = 0
    bases: int = 0
    strides: int = 0
    pages: int = 0
    scales: int = 0
    source: Source | None = None
    """What is staged."""


class _Stream:
    """Somebody's stream, as CUDA's stream protocol hands it over."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class CudaEvent:
    """Made without timing, and its waiters sleep: a waiting thread costs no core."""

    def __init__(self, device: Any, stream: Any) -> None:
        with device:
            self._event = cupy.cuda.Event(block=True, disable_timing=True)
            self._event.record(stream)
        self.ptr = self._event.ptr

    def done(self) -> bool:
        return bool(self._event.done)

    def wait(self) -> None:
        self._event.synchronize()


class CudaDevice:
    """One GPU. ``blocks`` x ``threads`` is the persistent grid of the copy kernel: the default
    fills the link and leaves fifteen sixteenths of an H100's multiprocessors alone."""

    def __init__(
        self, number: int = 0, *, blocks: int = GRID_BLOCKS, threads: int = GRID_THREADS
    ) -> None:
        self.name = f"cuda:{number}"
        self.device = cupy.cuda.Device(number)
        self._grid = (blocks,)
        self._threads = (threads,)
        self._upload_lock = threading.Lock()
        self._batch = MemcpyBatch.find()
        self._staging: Staging | None = None
        self._staging_failed = False
        self._layouts: dict[int, tuple[PagedLayout, Any]] = {}
        """Tables by the number of their layout, the one that was used last at the end."""
        # A model wraps its stream for every layer. What is kept is a pointer and nothing else.
        self._external = functools.lru_cache(STREAMS_KEPT)(self._external_stream)
        with self.device:
            processors = self.device.attributes["MultiProcessorCount"]
            self._wide_grid = (SCATTER_BLOCKS * int(processors),)
            self._kernel = cupy.RawKernel(COPY_SOURCE, "paged_copy")
            self._convert = cupy.RawKernel(CONVERT_SOURCE, "paged_convert")
            self._uploads = cupy.cuda.Stream(non_blocking=True)

    def register(self, memory: HostMemory) -> SharedRegistration | DeviceMemory:
        return DeviceMemory() if memory.on_device else SharedRegistration(memory)

    def stream(self, *, urgent: bool) -> Any:
        with self.device:
            return cupy.cuda.Stream(non_blocking=True, priority=-1 if urgent else 0)

    def wrap(self, stream: Any) -> Any:
        pointer = getattr(stream, "cuda_stream", None)
        if pointer is None:
            pointer = getattr(stream, "ptr", stream)
        if not isinstance(pointer, int):
            raise InvalidRequest(detail=f"not a CUDA stream: {type(stream).__name__}")
        return self._external(pointer)

    def _external_stream(self, pointer: int) -> Any:
        with self.device:
            return cupy.cuda.Stream.from_external(_Stream(pointer))

    def plan(self, transfer: Transfer, *, store: bool = False, way: Way | None = None) -> Plan:
        """``way`` overrules the choice between the three."""
        way = way or self._way(transfer, store=store)
        if way is Way.ENGINE:
            return Plan(transfer, way)
        layout, bases, strides = self._layout_tables(transfer.layout)
        pages = np.ascontiguousarray(transfer.pages, dtype=np.int32)
        if way is Way.STAGED:
            # A few thousand numbers that the kernel reads over the link: no upload to wait for.
            pinned = cupy.cuda.alloc_pinned_memory(pages.nbytes)
            np.frombuffer(pinned, dtype=np.int32, count=pages.size)[:] = pages.ravel()
            return Plan(
                transfer,
                way,
                (layout, pinned),
                bases=bases,
                strides=strides,
                pages=int(pinned.ptr),
                source=Source.of(transfer, REGISTER_SLICE_BYTES),
            )
        scales = () if transfer.convert is None else transfer.convert.scales
        return self._upload(transfer, pages, np.array(scales, dtype=np.float32))

    def _upload(self, transfer: Transfer, pages: Any, scales: Any) -> Plan:
        """Tables on the device, by a stream of their own that the kernel waits for: on the load's
        they would come after all that is queued there."""
        layout, bases, strides = self._layout_tables(transfer.layout)
        parts: list[Any] = [np.ascontiguousarray(transfer.offsets, dtype=np.int64), pages, scales]
        packed = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
        with self._upload_lock, self.device, self._uploads:
            tables = cupy.asarray(packed)  # by way of pinned memory, without waiting for it
            ready = cupy.cuda.Event(disable_timing=True)
            ready.record(self._uploads)
        at, offsets_bytes = int(tables.data.ptr), parts[0].nbytes
        return Plan(
            transfer,
            Way.KERNEL,
            (layout, tables),
            ready,
            offsets=at,
            bases=bases,
            strides=strides,
            pages=at + offsets_bytes,
            scales=at + offsets_bytes + pages.nbytes,
        )

    def _layout_tables(self, layout: PagedLayout) -> tuple[Any, int, int]:
        """(owner, address of the bases, of the strides) on the device: caches stay where they are,
        so what was uploaded once is kept for the next load."""
        with self._upload_lock:
            kept = self._layouts.pop(id(layout), None)
            if kept is None:
                packed = np.array((*layout.bases, *layout.strides), dtype=np.int64)
                with self.device, self._uploads:
                    table = cupy.asarray(packed)
                    self._uploads.synchronize()
                kept = layout, table  # the layout, too: its number is not another's meanwhile
            self._layouts[id(layout)] = kept
            while len(self._layouts) > LAYOUTS_KEPT:
                del self._layouts[next(iter(self._layouts))]
        address = int(kept[1].data.ptr)
        return kept, address, address + 8 * len(layout.bases)

    def _way(self, transfer: Transfer, *, store: bool) -> Way:
        piece = transfer.layout.piece_bytes
        if transfer.convert is not None or not len(transfer.offsets):
            return Way.KERNEL
        staged = self._can_stage(transfer) and not store
        run_bytes = LOOP_RUN_BYTES if self._batch is None else BATCH_RUN_BYTES
        run_bytes = max(run_bytes, STAGED_RUN_BYTES) if staged else run_bytes
        if piece >= run_bytes:
            return Way.ENGINE
        short = piece < ENGINE_PIECE_BYTES or transfer.run_bytes_max() < run_bytes
        if not short and transfer.run_bytes() >= run_bytes:
            return Way.ENGINE
        return Way.STAGED if staged else Way.KERNEL

    def _can_stage(self, transfer: Transfer) -> bool:
        if self._batch is None or transfer.host.on_device:
            return False
        if not LAYER_BYTES_MIN <= transfer.layer_bytes <= STAGING_SLOT_BYTES:
            return False
        with self._upload_lock:
            if self._staging is None and not self._staging_failed:
                try:
                    self._staging = Staging(self.device, self._batch)
                except cupy.cuda.memory.OutOfMemoryError as exc:
                    self._staging_failed = True
                    log.info("no memory to stage copies in: %s", exc)
        return self._staging is not None

    @property
    def staging_bytes(self) -> int:
        """Memory of the GPU that copies pass through; none before the first load that needs it."""
        return 0 if self._staging is None else self._staging.nbytes

    def copy(
        self, plan: Plan, first_layer: int, end_layer: int, stream: Any, *, store: bool = False
    ) -> None:
        """As Device.copy. The host memory must be registered, and stay so until it has happened."""
        transfer = plan.transfer
        if not len(transfer.offsets) or first_layer == end_layer:
            return
        if transfer.convert is not None:
            self._convert_pieces(plan, first_layer, end_layer, stream, store=store)
        elif plan.way is Way.ENGINE:
            self._copy_runs(transfer, first_layer, end_layer, stream, store=store)
        elif plan.source is not None:
            if store or self._staging is None:
                raise InvalidRequest(detail="a plan for loads")
            scatter = functools.partial(self._scatter, plan, stream)
            self._staging.copy(plan.source, (first_layer, end_layer), stream, scatter)
        else:
            self._copy_pieces(plan, first_layer, end_layer, stream, store=store)

    def _copy_runs(
        self, transfer: Transfer, first_layer: int, end_layer: int, stream: Any, *, store: bool
    ) -> None:
        """By the copy engine, and no copy across two registrations: it takes none that begins in
        one and ends in another."""
        host = transfer.host
        near, far, sizes = transfer.runs(first_layer, end_layer, seam_bytes=REGISTER_SLICE_BYTES)
        to, source = (near, far) if store else (far, near)
        with self.device:
            if self._batch is not None:
                # Pages are read when earlier work on the stream is done; leased blocks any time.
                self._batch.copy(to, source, sizes, stream.ptr, in_order=store or host.on_device)
                return
            memcpy = cupy.cuda.runtime.memcpyAsync
            kind = 3 if host.on_device else 2 if store else 1  # cudaMemcpyKind
            for a, b, size in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
                memcpy(a, b, size, kind, stream.ptr)

    def _copy_pieces(
        self, plan: Plan, first_layer: int, end_layer: int, stream: Any, *, store: bool
    ) -> None:
        transfer = plan.transfer
        with self.device:
            cupy.cuda.runtime.streamWaitEvent(stream.ptr, plan.ready.ptr)
            self._launch(
                plan,
                self._grid,
                stream,
                host=transfer.host.address,
                blocks=(0, len(transfer.offsets)),
                layers=(first_layer, end_layer),
                store=store,
            )

    def _scatter(self, plan: Plan, stream: Any, filled: Filled) -> None:
        """From memory of the GPU: all multiprocessors, for a moment."""
        self._launch(
            plan,
            self._wide_grid,
            stream,
            host=filled.address,
            block_stride=filled.block_stride,
            blocks=filled.blocks,
            layers=filled.layers,
        )

    def _launch(
        self,
        plan: Plan,
        grid: tuple[int],
        stream: Any,
        *,
        host: int,
        blocks: tuple[int, int],
        layers: tuple[int, int],
        block_stride: int = 0,
        store: bool = False,
    ) -> None:
        """The copy kernel on the current device. Without a ``block_stride`` blocks lie at the
        plan's offsets."""
        transfer = plan.transfer
        layout = transfer.layout
        fragments = (layers[1] - layers[0]) * layout.fragments_per_layer
        units_per_piece = -(-layout.piece_bytes // UNIT_BYTES)
        pieces = (blocks[1] - blocks[0]) * fragments * transfer.pages_per_block
        arguments = (
            np.uint64(host),
            np.uint64(0 if block_stride else plan.offsets),
            np.int64(block_stride),
            np.uint64(plan.bases),
            np.uint64(plan.strides),
            np.uint64(plan.pages + 4 * blocks[0] * transfer.pages_per_block),
            np.int64(pieces * units_per_piece),
            np.int32(units_per_piece),
            np.int32(transfer.pages_per_block),
            np.int32(layers[0] * layout.fragments_per_layer),
            np.int32(fragments),
            np.int64(layout.piece_bytes),
            np.int32(store),
        )
        self._kernel(grid, self._threads, arguments, stream=stream)

    def _convert_pieces(
        self, plan: Plan, first_layer: int, end_layer: int, stream: Any, *, store: bool
    ) -> None:
        """A warp a piece. Needs a GPU that knows E4M3 (Ada, Hopper): raises InvalidRequest else."""
        transfer = plan.transfer
        per_layer = transfer.layout.fragments_per_layer
        fragments = (end_layer - first_layer) * per_layer
        arguments = (
            np.uint64(transfer.host.address),
            np.uint64(plan.offsets),
            np.uint64(plan.bases),
            np.uint64(plan.strides),
            np.uint64(plan.pages),
            np.uint64(plan.scales),
            np.int64(len(transfer.offsets) * fragments * transfer.pages_per_block),
            np.int32(transfer.pages_per_block),
            np.int32(first_layer * per_layer),
            np.int32(fragments),
            np.int64(transfer.piece_bytes),
            np.int32(store),
        )
        try:
            with self.device, stream:
                cupy.cuda.runtime.streamWaitEvent(stream.ptr, plan.ready.ptr)
                self._convert(self._grid, self._threads, arguments)
        except cupy.cuda.compiler.CompileException as exc:
            raise InvalidRequest(detail=f"this GPU does not know fp8: {exc}") from exc

    def record(self, stream: Any) -> CudaEvent:
        return CudaEvent(self.device, stream)

    def wait_for(self, stream: Any, event: Event) -> None:
        if isinstance(event, CudaEvent):
            with self.device:
                cupy.cuda.runtime.streamWaitEvent(stream.ptr, event.ptr)
        else:
            event.wait()

    def close_stream(self, stream: Any) -> None:
        stream.synchronize()


__all__ = ["CudaDevice", "CudaEvent", "Plan", "Way"]
