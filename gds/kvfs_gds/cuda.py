"""Copies between host memory and a paged KV cache on a CUDA device (cupy).

Host memory is registered (cudaHostRegister) and read by a kernel over PCIe: every warp keeps
8 x 512 bytes in flight, so few multiprocessors fill the link (55 GB/s x 2 us latency is 110 KB) and
the rest go on computing. This kernel does not care about the size of a piece from 4 KiB up; what it
gets of the link is 0.92, with 4 multiprocessors or 64 (an H100: reads of 128 bytes are the cause).

Longer runs go through the copy engine, which costs no multiprocessor: a loop of cudaMemcpyAsync
reaches a third of the link at 64 KiB, cudaMemcpyBatchAsync (``kvfs_gds.cuda_batch``) all of it.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import cupy
import numpy as np

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import KIB, MIB
from kvfs_gds.cuda_batch import MemcpyBatch
from kvfs_gds.device import Event
from kvfs_gds.paged import HostMemory, Transfer

REGISTER_SLICE_BYTES = 256 * MIB
"""One cudaHostRegister call pins this much: 0.05-0.2 s/GiB, in steps that do not stall for long."""

REGISTER_PORTABLE = 1
REGISTER_MAPPED = 2
REGISTER_READ_ONLY = 8

UNIT_BYTES = 4096
"""What one warp copies at a time: 8 vectors of 16 bytes a lane."""

ENGINE_PIECE_BYTES = 16 * KIB
"""Pieces below this are never looked at for runs: there would be too many to look at."""

BATCH_RUN_BYTES = 128 * KIB
"""Contiguous runs of this size and more go through the copy engine in batches. Queueing one takes
0.5 to 1.1 us of a core, copying 64 KiB 1.2: nothing is left for a thread that does more than that,
and a load by the engine was slower there than one by the kernel."""

LOOP_RUN_BYTES = 4 * MIB
"""The same, one by one, where the runtime has no batches: from there on a loop of cudaMemcpyAsync
reaches more of the link than the kernel (docs/results/h100-loader.json)."""

GRID_BLOCKS = 8
GRID_THREADS = 512

_SOURCE = r"""
// One warp a unit. Units of a piece are adjacent and pieces follow the host block's order, so reads
// over PCIe are sequential; where they land does not matter to HBM at 512 bytes and more.
extern "C" __global__ void paged_copy(
    char* __restrict__ host, const long long* __restrict__ offsets,
    const long long* __restrict__ bases, const long long* __restrict__ strides,
    const int* __restrict__ pages, long long units, int units_per_piece, int pages_per_block,
    int first_fragment, int fragments, long long piece_bytes, int store)
{
    const int lane = threadIdx.x & 31;
    const long long warps = (long long)gridDim.x * (blockDim.x >> 5);
    long long unit = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    for (; unit < units; unit += warps) {
        long long piece = unit / units_per_piece;
        const long long at = (unit % units_per_piece) * UNIT;
        const int page_index = (int)(piece % pages_per_block);
        piece /= pages_per_block;
        const int fragment = first_fragment + (int)(piece % fragments);
        const long long block = piece / fragments;
        char* near = host + offsets[block]
            + ((long long)fragment * pages_per_block + page_index) * piece_bytes + at;
        char* far = (char*)bases[fragment]
            + (long long)pages[block * pages_per_block + page_index] * strides[fragment] + at;
        const uint4* from = (const uint4*)(store ? far : near);
        uint4* to = (uint4*)(store ? near : far);
        const long long left = piece_bytes - at;
        const int vectors = (int)((left < UNIT ? left : UNIT) >> 4);
        if (vectors == UNIT / 16) {
            uint4 v[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) v[i] = __ldcs(from + lane + 32 * i);
            #pragma unroll
            for (int i = 0; i < 8; i++) to[lane + 32 * i] = v[i];
        } else {
            for (int i = lane; i < vectors; i += 32) to[i] = __ldcs(from + i);
        }
    }
}
""".replace("UNIT", str(UNIT_BYTES))


_CONVERT_SOURCE = r"""
// As paged_copy, with eight values a lane: E4M3 in host memory, bf16 in the pages.
__device__ float2 decode2(unsigned short e4m3x2)
{
    unsigned int halves;
    float2 v;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(e4m3x2));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(v.x), "=f"(v.y) : "r"(halves));
    return v;
}
__device__ unsigned int bf16(float v)
{
    const unsigned int bits = __float_as_uint(v);
    return v != v ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
extern "C" __global__ void paged_convert(
    char* __restrict__ host, const long long* __restrict__ offsets,
    const long long* __restrict__ bases, const long long* __restrict__ strides,
    const int* __restrict__ pages, const float* __restrict__ scales, long long pieces,
    int pages_per_block, int first_fragment, int fragments, long long stored_bytes, int store)
{
    const int lane = threadIdx.x & 31;
    const long long warps = (long long)gridDim.x * (blockDim.x >> 5);
    long long number = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    for (; number < pieces; number += warps) {
        const int page_index = (int)(number % pages_per_block);
        const long long rest = number / pages_per_block;
        const int fragment = first_fragment + (int)(rest % fragments);
        const long long block = rest / fragments;
        const float scale = scales[fragment];
        uint2* near = (uint2*)(host + offsets[block]
            + ((long long)fragment * pages_per_block + page_index) * stored_bytes);
        uint4* far = (uint4*)((char*)bases[fragment]
            + (long long)pages[block * pages_per_block + page_index] * strides[fragment]);
        for (long long i = lane; i < stored_bytes / 8; i += 32) {
            if (store) {
                const uint4 v = far[i];
                const unsigned int in[4] = {v.x, v.y, v.z, v.w};
                unsigned short out[4];
                for (int k = 0; k < 4; k++) {
                    const float low = __uint_as_float(in[k] << 16) / scale;
                    const float high = __uint_as_float(in[k] & 0xFFFF0000u) / scale;
                    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
                        : "=h"(out[k]) : "f"(high), "f"(low));
                }
                near[i] = make_uint2(out[0] | (unsigned int)out[1] << 16,
                                     out[2] | (unsigned int)out[3] << 16);
            } else {
                const uint2 v = __ldcs(near + i);
                const unsigned int in[2] = {v.x, v.y};
                unsigned int out[4];
                for (int k = 0; k < 4; k++) {
                    const float2 f = decode2((unsigned short)(in[k / 2] >> 16 * (k % 2)));
                    out[k] = bf16(f.x * scale) | bf16(f.y * scale) << 16;
                }
                far[i] = make_uint4(out[0], out[1], out[2], out[3]);
            }
        }
    }
}
"""


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

    @property
    def registered_bytes(self) -> int:
        """Pinned so far."""
        return sum(self._size(number) for number in list(self._slices))

    def ensure(self, transfer: Transfer) -> None:
        """As Registered.ensure."""
        if not len(transfer.offsets):
            return
        first = transfer.offsets // REGISTER_SLICE_BYTES
        last = (transfer.offsets + transfer.block_bytes - 1) // REGISTER_SLICE_BYTES
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
                try:
                    cupy.cuda.runtime.hostRegister(address, self._size(number), self._flags)
                except cupy.cuda.runtime.CUDARuntimeError as exc:
                    raise InvalidRequest(detail=f"cudaHostRegister: {exc}") from exc
                self._slices[number] = address

    def close(self) -> None:
        with self._lock:
            for address in self._slices.values():
                cupy.cuda.runtime.hostUnregister(address)
            self._slices.clear()


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A transfer and its tables on the device: offsets, bases, strides, pages, scales."""

    transfer: Transfer
    by_engine: bool
    """Its runs are long enough for the copy engine."""
    tables: Any = None
    """Owns the memory that the addresses point into. The engine needs none."""
    ready: Any = None
    """The event behind their upload."""
    offsets: int = 0
    bases: int = 0
    strides: int = 0
    pages: int = 0
    scales: int = 0


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
        self._run_bytes = LOOP_RUN_BYTES if self._batch is None else BATCH_RUN_BYTES
        with self.device:
            self._kernel = cupy.RawKernel(_SOURCE, "paged_copy")
            self._convert = cupy.RawKernel(_CONVERT_SOURCE, "paged_convert")
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
        with self.device:
            return cupy.cuda.Stream.from_external(_Stream(pointer))

    def plan(self, transfer: Transfer, *, by_engine: bool | None = None) -> Plan:
        """Uploads the tables, on a stream of their own that the kernel waits for: on the load's
        they would come after all that is queued there. What the engine is to copy needs none, and
        they would come after all that the engine was given. ``by_engine`` overrules the choice
        between the two."""
        if self._by_engine(transfer) if by_engine is None else by_engine:
            return Plan(transfer, True)
        layout = transfer.layout
        parts: list[Any] = [
            np.ascontiguousarray(transfer.offsets, dtype=np.int64),
            np.array(layout.bases, dtype=np.int64),
            np.array(layout.strides, dtype=np.int64),
            np.ascontiguousarray(transfer.pages, dtype=np.int32),
            np.array(() if transfer.convert is None else transfer.convert.scales, dtype=np.float32),
        ]
        packed = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
        with self._upload_lock, self.device, self._uploads:
            tables = cupy.asarray(packed)  # by way of pinned memory, without waiting for it
            ready = cupy.cuda.Event(disable_timing=True)
            ready.record(self._uploads)
        starts = np.cumsum([0, *(part.nbytes for part in parts[:-1])])
        addresses = [int(tables.data.ptr) + int(start) for start in starts]
        return Plan(transfer, False, tables, ready, *addresses)

    def _by_engine(self, transfer: Transfer) -> bool:
        piece = transfer.layout.piece_bytes
        if transfer.convert is not None or piece < ENGINE_PIECE_BYTES or not len(transfer.offsets):
            return False
        return piece >= self._run_bytes or transfer.run_bytes() >= self._run_bytes

    def copy(
        self, plan: Plan, first_layer: int, end_layer: int, stream: Any, *, store: bool = False
    ) -> None:
        """As Device.copy. The host memory must be registered, and stay so until it has happened."""
        transfer = plan.transfer
        if not len(transfer.offsets) or first_layer == end_layer:
            return
        if transfer.convert is not None:
            self._convert_pieces(plan, first_layer, end_layer, stream, store=store)
        elif plan.by_engine:
            self._copy_runs(transfer, first_layer, end_layer, stream, store=store)
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
        layout = transfer.layout
        fragments = (end_layer - first_layer) * layout.fragments_per_layer
        units_per_piece = -(-layout.piece_bytes // UNIT_BYTES)
        units = len(transfer.offsets) * fragments * transfer.pages_per_block * units_per_piece
        with self.device, stream:
            cupy.cuda.runtime.streamWaitEvent(stream.ptr, plan.ready.ptr)
            self._kernel(
                self._grid,
                self._threads,
                (
                    np.uint64(transfer.host.address),
                    np.uint64(plan.offsets),
                    np.uint64(plan.bases),
                    np.uint64(plan.strides),
                    np.uint64(plan.pages),
                    np.int64(units),
                    np.int32(units_per_piece),
                    np.int32(transfer.pages_per_block),
                    np.int32(first_layer * layout.fragments_per_layer),
                    np.int32(fragments),
                    np.int64(layout.piece_bytes),
                    np.int32(store),
                ),
            )

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


__all__ = ["CudaDevice", "CudaEvent", "DeviceMemory", "Plan", "Registration"]
