"""cuFile by way of kvikio: files into a GPU's memory, and checksums summed there.

With nvidia-fs (or PCI P2P) the disk writes into the GPU's memory itself. Without, kvikio reads into
buffers of its own and copies from those: ``name`` says so, and ``file_source`` measures it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import cupy
import kvikio
import kvikio.cufile_driver
import kvikio.defaults
import numpy as np

from kvfs_base.errors import ArenaFull, TargetFailed
from kvfs_gds.crc import PIECE_BYTES, combine, tables
from kvfs_gds.device import Device
from kvfs_gds.limits import (
    DIRECT_FILES_MAX,
    READ_BYTES,
    READ_THREADS,
)
from kvfs_gds.paged import HostMemory
from kvfs_gds.sources import FileExtent

_SOURCE = r"""
// A piece of a block a thread, eight bytes at a time by tables that lie in shared memory.
extern "C" __global__ void crc32c_pieces(
    const unsigned char* __restrict__ memory, const long long* __restrict__ offsets,
    const unsigned int* __restrict__ tables, unsigned int* __restrict__ found,
    int blocks, long long size, int pieces)
{
    __shared__ unsigned int t[8 * 256];
    for (int i = threadIdx.x; i < 8 * 256; i += blockDim.x) t[i] = tables[i];
    __syncthreads();
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)blocks * pieces) return;
    const long long first = (index % pieces) * PIECE;
    const unsigned char* at = memory + offsets[index / pieces] + first;
    const int bytes = (int)(size - first < PIECE ? size - first : PIECE);
    unsigned int crc = 0xFFFFFFFFu;
    int i = 0;
    for (; i + 8 <= bytes; i += 8) {
        const uint2 v = *(const uint2*)(at + i);
        const unsigned int a = v.x ^ crc, b = v.y;
        crc = t[7 * 256 + (a & 0xFF)] ^ t[6 * 256 + (a >> 8 & 0xFF)]
            ^ t[5 * 256 + (a >> 16 & 0xFF)] ^ t[4 * 256 + (a >> 24)]
            ^ t[3 * 256 + (b & 0xFF)] ^ t[2 * 256 + (b >> 8 & 0xFF)]
            ^ t[1 * 256 + (b >> 16 & 0xFF)] ^ t[b >> 24];
    }
    for (; i < bytes; i++) crc = crc >> 8 ^ t[(crc ^ at[i]) & 0xFF];
    found[index] = ~crc;
}
""".replace("PIECE", str(PIECE_BYTES))

_THREADS = 128


class DeviceChecksums:
    """CRC32C of pieces of a GPU's memory. Thread-safe."""

    def __init__(self, number: int) -> None:
        self._device = cupy.cuda.Device(number)
        self._lock = threading.Lock()
        with self._device:
            self._kernel = cupy.RawKernel(_SOURCE, "crc32c_pieces")
            self._tables = cupy.asarray(tables())
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def of(self, address: int, at: Sequence[int], size: int) -> list[int]:
        """Of ``size`` bytes at each offset ``at`` (multiples of eight) from ``address``."""
        if not size:
            return [0] * len(at)
        pieces = -(-size // PIECE_BYTES)
        with self._lock, self._device, self._stream:
            found = cupy.empty((len(at), pieces), dtype=cupy.uint32)
            offsets = cupy.asarray(np.asarray(at, dtype=np.int64))
            arguments = (
                np.uint64(address),
                offsets,
                self._tables,
                found,
                np.int32(len(at)),
                np.int64(size),
                np.int32(pieces),
            )
            self._kernel((-(-len(at) * pieces // _THREADS),), (_THREADS,), arguments)
            return [int(crc) for crc in combine(found.get(), size)]


class KvikioReader:
    """DirectReader of a CUDA device. Its files are opened once more, by kvikio, and stay open, at
    most DIRECT_FILES_MAX of them."""

    def __init__(self, device: Device) -> None:
        number = int(device.name.partition(":")[2])
        self._device = cupy.cuda.Device(number)
        self._checksums = DeviceChecksums(number)
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[int, int], Any] = OrderedDict()
        kvikio.defaults.set(
            {"num_threads": READ_THREADS, "task_size": READ_BYTES, "auto_direct_io_read": True}
        )
        self.compatibility = bool(kvikio.defaults.is_compat_mode_preferred())
        mode = "compatibility mode: no nvidia-fs" if self.compatibility else "GPUDirect Storage"
        self.name = f"kvikio {kvikio.__version__} ({mode})"

    def allocate(self, nbytes: int) -> HostMemory:
        try:
            with self._device:
                memory = cupy.cuda.alloc(nbytes)
        except cupy.cuda.memory.OutOfMemoryError as exc:
            raise ArenaFull(needed_bytes=nbytes) from exc
        return HostMemory(int(memory.ptr), nbytes, owner=memory, on_device=True)

    def read(
        self, extents: Sequence[FileExtent], memory: HostMemory, at: Sequence[int]
    ) -> list[int]:
        """As DirectReader.read: all reads are in flight at once, in kvikio's threads. They ask for
        nothing behind the end of a file, which is an error to kvikio. Also if one fails none is
        under way afterwards."""
        error: Exception | None = None
        futures: list[Any] = []
        done: list[int] = []
        try:
            with self._device:
                for extent, offset in zip(extents, at, strict=True):
                    futures.append(self._begin(extent, memory, offset))
        except (OSError, RuntimeError) as exc:
            error = exc
        for future in futures:
            try:
                done.append(0 if future is None else int(future.get()))
            except (OSError, RuntimeError) as exc:
                error = error or exc
        if error is not None:
            raise TargetFailed(detail=str(error)) from error
        return done

    def _begin(self, extent: FileExtent, memory: HostMemory, offset: int) -> Any:
        """A read under way, None if the file ends before it."""
        end = os.fstat(extent.descriptor).st_size
        count = min(extent.size, end - extent.offset)
        if count <= 0:
            return None
        window = _window(memory, offset, count)
        return self._file(extent.descriptor).pread(window, count, extent.offset)

    def checksums(self, memory: HostMemory, at: Sequence[int], size: int) -> list[int]:
        return self._checksums.of(memory.address, at, size)

    def _file(self, descriptor: int) -> Any:
        """Descriptor numbers are used again for other files; an inode that is open is not."""
        status = os.fstat(descriptor)
        name = (status.st_dev, status.st_ino)
        with self._lock:
            found = self._files.get(name)
            if found is None:
                found = kvikio.CuFile(f"/proc/self/fd/{descriptor}", "r")
                self._files[name] = found
                if len(self._files) > DIRECT_FILES_MAX:
                    # Not closed here: a read of it may be under way, and the last reference does.
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return found

    def close(self) -> None:
        with self._lock:
            self._files.clear()


class _Window:
    """Bytes of a device, as kvikio takes them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def _window(memory: HostMemory, offset: int, nbytes: int) -> _Window:
    return _Window(memory.address + offset, nbytes)


__all__ = ["DeviceChecksums", "KvikioReader"]
