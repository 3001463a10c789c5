"""Copies between host memory and a paged KV cache on a CUDA device (cupy).

Host memory is registered once (cudaHostRegister) and read by the kernel over PCIe: every warp keeps
8 x 512 bytes in flight, so few multiprocessors fill the link (55 GB/s x 2 us latency is 110 KB) and
the rest go on computing. A loop of cudaMemcpyAsync reaches a third of the link at 64 KiB pieces;
this kernel does not care about the size of a piece from 4 KiB up.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import cupy
import numpy as np

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import MIB
from kvfs_gds.paged import HostMemory, PagedLayout, Transfer

log = logging.getLogger(__name__)

REGISTER_SLICE_BYTES = 256 * MIB
"""One cudaHostRegister call pins this much: 0.05-0.2 s/GiB, in steps that do not stall for long."""

REGISTER_PORTABLE = 1
REGISTER_MAPPED = 2
REGISTER_READ_ONLY = 8

UNIT_BYTES = 4096
"""What one warp copies at a time: 8 vectors of 16 bytes a lane."""

_SOURCE = r"""
// One warp a unit. Units of a piece are adjacent and pieces follow the host block's order, so reads
// over PCIe are sequential; where they land does not matter to HBM at 512 bytes and more.
extern "C" __global__ void paged_copy(
    char* __restrict__ host, const long long* __restrict__ offsets,
    const long long* __restrict__ bases, const int* __restrict__ pages, long long units,
    int units_per_piece, int pages_per_block, int first_fragment, int fragments,
    long long piece_bytes, long long page_stride, int store)
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
            + (long long)pages[block * pages_per_block + page_index] * page_stride + at;
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


class Registration:
    """Host memory that this process's CUDA context may use, until ``close``."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self._slices: list[int] = []
        flags = REGISTER_PORTABLE | REGISTER_MAPPED
        flags |= REGISTER_READ_ONLY if memory.read_only else 0
        try:
            for start in range(0, memory.nbytes, REGISTER_SLICE_BYTES):
                size = min(REGISTER_SLICE_BYTES, memory.nbytes - start)
                cupy.cuda.runtime.hostRegister(memory.address + start, size, flags)
                self._slices.append(memory.address + start)
        except cupy.cuda.runtime.CUDARuntimeError as exc:
            self.close()
            raise InvalidRequest(detail=f"cudaHostRegister: {exc}") from exc

    def close(self) -> None:
        for address in self._slices:
            cupy.cuda.runtime.hostUnregister(address)
        self._slices.clear()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A transfer's tables on the device."""

    offsets: Any
    pages: Any
    bases: Any


class CudaCopier:
    """Paged copies on one device. ``blocks`` x ``threads`` is the persistent grid; the default
    leaves three quarters of an H100's multiprocessors alone."""

    def __init__(self, device: int = 0, *, blocks: int = 32, threads: int = 512) -> None:
        self.device = cupy.cuda.Device(device)
        self._grid = (blocks,)
        self._threads = (threads,)
        with self.device:
            self._kernel = cupy.RawKernel(_SOURCE, "paged_copy")
        self._bases: dict[PagedLayout, Any] = {}

    def plan(self, transfer: Transfer, stream: Any) -> _Plan:
        """Uploads the tables of a transfer; one plan serves all its layers."""
        with self.device, stream:
            bases = self._bases.get(transfer.layout)
            if bases is None:
                bases = cupy.asarray(np.array(transfer.layout.bases, dtype=np.int64))
                stream.synchronize()  # other streams will use it without asking
                self._bases[transfer.layout] = bases
            return _Plan(cupy.asarray(transfer.offsets), cupy.asarray(transfer.pages), bases)

    def copy(
        self,
        transfer: Transfer,
        plan: _Plan,
        first_layer: int,
        end_layer: int,
        stream: Any,
        *,
        store: bool = False,
    ) -> None:
        """Queues the copy of some layers on ``stream``. The host memory must be registered, and
        stay so until the stream has done it."""
        layout = transfer.layout
        fragments = (end_layer - first_layer) * layout.fragments_per_layer
        units_per_piece = -(-layout.piece_bytes // UNIT_BYTES)
        units = len(transfer.offsets) * fragments * transfer.pages_per_block * units_per_piece
        if not units:
            return
        with self.device, stream:
            self._kernel(
                self._grid,
                self._threads,
                (
                    np.uint64(transfer.host.address),
                    plan.offsets,
                    plan.bases,
                    plan.pages,
                    np.int64(units),
                    np.int32(units_per_piece),
                    np.int32(transfer.pages_per_block),
                    np.int32(first_layer * layout.fragments_per_layer),
                    np.int32(fragments),
                    np.int64(layout.piece_bytes),
                    np.int64(layout.page_stride_bytes),
                    np.int32(store),
                ),
            )
