"""``kvfs bench-gpu``: paged loads from a registered arena beside the pinned copy limit.

Needs a CUDA device. Every round measures the limit (one copy of the whole arena by the copy engine)
right before and after the paths, so that clocks and neighbours move both.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvfs_base.limits import GIB, KIB, MIB
from kvfs_gds.paged import HostMemory, PagedLayout, Transfer

LAYERS = 32
PIECES = (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, 2 * MIB)
MEMCPY_LOOP_MAX = 20_000


def _arena(size: int) -> tuple[HostMemory, Any]:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, size)
    owner = mmap.mmap(fd, size)
    np.frombuffer(owner, dtype=np.uint64)[:] = np.arange(size // 8, dtype=np.uint64)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    mapping = mmap.mmap(reader, size, mmap.MAP_SHARED, mmap.PROT_READ)
    return HostMemory.of(mapping), owner


def device_name() -> str:
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(0)["name"]
    return name.decode()


def measure(size: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of {path, fragment_bytes, gbps, limit_gbps, ratio}: medians over ``rounds``."""
    import cupy

    from kvfs_gds.cuda import CudaCopier, Registration

    host, owner = _arena(size)
    started = time.perf_counter()
    registration = Registration(host)
    register_seconds = time.perf_counter() - started
    runtime = cupy.cuda.runtime
    stream = cupy.cuda.Stream(non_blocking=True)
    device_memory = cupy.empty(size, cupy.uint8)
    copier = CudaCopier()

    def gbps(body: Callable[[], object], nbytes: int) -> float:
        stream.synchronize()
        start = time.perf_counter()
        body()
        stream.synchronize()
        return nbytes / (time.perf_counter() - start) / 1e9

    def bulk() -> None:
        step = 256 * MIB
        for at in range(0, size, step):
            runtime.memcpyAsync(
                device_memory.data.ptr + at, host.address + at, min(step, size - at), 1, stream.ptr
            )

    def paths(piece: int) -> dict[str, tuple[Callable[[], object], int]]:
        block = piece * 2 * LAYERS
        pages = size // block
        per_layer = 2 * pages * piece
        tensors = [
            device_memory[i * per_layer : (i + 1) * per_layer].reshape(2, pages, piece)
            for i in range(LAYERS)
        ]
        layout = PagedLayout.vllm(tensors)
        rng = np.random.default_rng(piece)
        offsets = rng.permutation(pages).astype(np.int64) * block
        table = rng.permutation(pages).astype(np.int32).reshape(-1, 1)
        transfer = Transfer(host, offsets, layout, table)
        plan = copier.plan(transfer, stream)

        def layered() -> None:
            for layer in range(LAYERS):
                copier.copy(transfer, plan, layer, layer + 1, stream)

        def loop() -> None:
            for offset, page in zip(offsets.tolist(), table[:, 0].tolist(), strict=True):
                for i, base in enumerate(layout.bases):
                    runtime.memcpyAsync(
                        base + page * piece, host.address + offset + i * piece, piece, 1, stream.ptr
                    )

        out: dict[str, tuple[Callable[[], object], int]] = {
            "arena paged, whole": (
                lambda: copier.copy(transfer, plan, 0, LAYERS, stream),
                transfer.nbytes,
            ),
            "arena paged, layer by layer": (layered, transfer.nbytes),
        }
        if 2 * LAYERS * pages <= MEMCPY_LOOP_MAX:
            out["loop of cudaMemcpyAsync"] = (loop, transfer.nbytes)
        return out

    rows = []
    for piece in PIECES:
        todo = paths(piece)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
        for body, nbytes in todo.values():
            gbps(body, nbytes)
        for _ in range(rounds):
            for name, (body, nbytes) in todo.items():
                before = gbps(bulk, size)
                value = gbps(body, nbytes)
                taken[name].append((value, max(before, gbps(bulk, size))))
        for name, pairs in taken.items():
            rows.append(
                {
                    "path": name,
                    "fragment_bytes": piece,
                    "gbps": statistics.median(v for v, _ in pairs),
                    "limit_gbps": statistics.median(limit for _, limit in pairs),
                    "ratio": statistics.median(v / limit for v, limit in pairs),
                    "register_seconds_per_gib": register_seconds / (size / GIB),
                }
            )
    registration.close()
    del owner
    return rows


@click.command("bench-gpu")
@click.option("--arena-mib", type=click.IntRange(256), default=2048, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_path", help="Write the rows here too.")
@click.option("--commit", default="", help="Recorded in the file: what was measured.")
def bench_gpu(arena_mib: int, rounds: int, json_path: str | None, commit: str) -> None:
    """Measure loads from the arena into paged KV on a CUDA device."""
    rows = measure(arena_mib * MIB, rounds)
    for row in rows:
        print(
            f"{row['path']:30s} {row['fragment_bytes'] // KIB:6d} KiB {row['gbps']:6.1f} GB/s "
            f"of {row['limit_gbps']:5.1f}  {row['ratio']:.2f}",
            flush=True,
        )
    if json_path:
        found = {"commit": commit, "device": device_name(), "rounds": rounds, "rows": rows}
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    bench_gpu()
