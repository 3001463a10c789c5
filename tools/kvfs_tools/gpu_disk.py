"""Rows of ``kvfs bench-gpu`` that begin on the disk: the agent, files without an agent, and what
ordinary programs load tensors with."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvfs_base.limits import KIB, MIB, RING_BYTES
from kvfs_gds.loader import Loader
from kvfs_gds.ring import PinnedRing
from kvfs_gds.sources import FileExtent, FileSource
from kvfs_tools.gpu_rig import Rig, Row, make_row
from kvfs_tools.gpu_rows import LINK, PagedCache

FIO = "fio's best read, O_DIRECT"
READ_THREADS = (8, 16, 32)


def fio_read(path: Path, nbytes: int) -> float:
    """GB/s of fio's best O_DIRECT read of one file, of several depths and sizes."""
    best = 0.0
    for block, depth, jobs in (("1M", 8, 1), ("1M", 32, 1), ("4M", 16, 1), ("1M", 8, 4)):
        argv = ["fio", "--name=limit", "--readonly", f"--filename={path}", "--rw=read"]
        argv += [f"--bs={block}", "--direct=1", "--ioengine=libaio", f"--iodepth={depth}"]
        argv += [
            f"--numjobs={jobs}",
            f"--size={nbytes // jobs}",
            f"--offset_increment={nbytes // jobs}",
        ]
        argv += ["--group_reporting", "--output-format=json"]
        out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        read = json.loads(out[out.index("{") :])["jobs"][0]["read"]
        best = max(best, float(read["bw_bytes"]) / 1e9)
    return best


@contextmanager
def raw_file(rig: Rig) -> Iterator[Path]:
    """All bytes of the arena's blocks in one file, written around the page cache."""
    path = rig.folder / "raw.bin"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        with rig.namespace.get(rig.keys) as blocks:
            for number, (offset, size) in enumerate(rig.extents):
                # The arena's extents are page-aligned: they are written from where they lie.
                view = blocks.arena.view(offset, size)
                os.pwritev(fd, [view], number * size)
        os.fsync(fd)
        yield path
    finally:
        os.close(fd)
        path.unlink()


def disk(rig: Rig) -> list[Row]:
    """Blocks that are not in the arena: through an agent whose arena is smaller than they are, and
    through a pinned ring without an agent."""
    with raw_file(rig) as path:
        rig.drop_caches()
        limit = lambda: fio_read(path, rig.total_bytes)  # noqa: E731
        rows = [*_cold_agent(rig, limit)]
        for threads in READ_THREADS:
            rows.append(_from_file(rig, path, threads, limit, direct=True))
        link = rig.pinned_limit()
        rows.append(_from_file(rig, path, READ_THREADS[1], link, direct=False))
        return rows


def _cold_agent(rig: Rig, limit: Callable[[], float]) -> Iterator[Row]:
    cache = PagedCache(rig, min(64 * KIB, rig.block_bytes // 2))
    arena_bytes = max(rig.total_bytes // 4, 4 * rig.block_bytes)
    with rig.small_agent(arena_bytes) as client:
        namespace = client.namespace("bench/gpu")
        step = max(1, min(64 * MIB, arena_bytes // 4) // rig.block_bytes)

        def fetch() -> None:
            for start in range(0, rig.count, step):
                keys = rig.keys[start : start + step]
                with namespace.get(keys) as blocks:
                    if blocks.hits != len(keys):
                        raise RuntimeError("a block was missing")

        taken = rig.rounds_of(fetch, rig.total_bytes, limit)
        yield make_row("cold, disk to arena alone (get)", 0, FIO, taken)
        with Loader.open(namespace, rig.device) as loader:

            def load() -> None:
                if not all(loader.load(rig.keys, cache.pages).result()):
                    raise RuntimeError("a block was missing")

            before = client.statistics()
            taken = rig.rounds_of(load, rig.total_bytes, limit)
            after = client.statistics()
        cache.check(rig, [0, rig.count // 2, rig.count - 1])
        names = ("blocks_loaded", "arena_hits")
        note = ", ".join(f"{name} {after[name] - before[name]}" for name in names)
        yield make_row("cold, disk to pages through the agent", cache.fragment, FIO, taken, note)


def _from_file(
    rig: Rig, path: Path, threads: int, limit: Callable[[], float], *, direct: bool
) -> Row:
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    cache = PagedCache(rig, min(64 * KIB, rig.block_bytes // 2))
    places = {key: number for number, key in enumerate(rig.keys)}
    size = rig.block_bytes

    def locate(keys: Sequence[bytes]) -> list[FileExtent | None]:
        return [FileExtent(fd, places[key] * size, size) for key in keys]

    ring = PinnedRing(rig.device, min(RING_BYTES, max(rig.total_bytes // 2, 2 * size)))
    source = FileSource(ring, locate, threads=threads)
    try:
        with Loader(source, device=rig.device) as loader:

            def load() -> None:
                if not all(loader.load(rig.keys, cache.pages).result()):
                    raise RuntimeError("a block was missing")

            taken = rig.rounds_of(load, rig.total_bytes, limit)
        cache.check(rig, [0, rig.count - 1])
    finally:
        source.close()
        ring.close()
        os.close(fd)
    if direct:
        return make_row(f"cold, file to pages, {threads} threads", cache.fragment, FIO, taken)
    return make_row(f"page cache to pages, {threads} threads", cache.fragment, LINK, taken)


# --- what others do


def files(rig: Rig) -> list[Row]:
    """The same bytes in files, loaded into device memory by ordinary means."""
    if not rig.on_gpu:
        return []
    link = rig.pinned_limit()
    rows: list[Row] = []
    with raw_file(rig) as path:
        for name, load in _ordinary(rig, path).items():
            try:
                rows += _ordinary_rows(rig, name, load, path, link)
            except Exception as exc:
                rig.notes.append(f"{name}: {type(exc).__name__}: {exc}")
    return rows


def _ordinary_rows(
    rig: Rig, name: str, load: Callable[[], Any], path: Path, link: Callable[[], float]
) -> list[Row]:
    import torch

    def body() -> None:
        found = load()
        torch.cuda.synchronize()
        del found

    taken = rig.rounds_of(body, rig.total_bytes, link)
    rows = [make_row(f"{name}, page cache", 0, LINK, taken)]
    disk_limit = fio_read(path, rig.total_bytes)
    rounds, rig.rounds = rig.rounds, min(rig.rounds, 2)
    taken = rig.rounds_of(
        body, rig.total_bytes, lambda: disk_limit, before=rig.drop_caches, warm_up=False
    )
    rig.rounds = rounds
    return [*rows, make_row(f"{name}, cold", 0, FIO, taken)]


def _ordinary(rig: Rig, path: Path) -> dict[str, Callable[[], Any]]:
    """Functions that bring all bytes to the device, by name."""
    import torch
    from safetensors.torch import load_file, save_file

    data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    tensors = str(rig.folder / "kv.safetensors")
    saved = str(rig.folder / "kv.pt")
    save_file({"kv": data}, tensors)
    torch.save(data, saved)
    # torch.load is what is measured here, on a file that this process has just written.
    reader = getattr(torch, "load")  # noqa: B009
    found: dict[str, Callable[[], Any]] = {
        "np.fromfile": lambda: torch.from_numpy(np.fromfile(path, dtype=np.uint8)).cuda(),
        "torch.load": lambda: reader(saved, weights_only=True).cuda(),
        "torch.load, mmap": lambda: reader(saved, mmap=True, weights_only=True).cuda(),
        "safetensors load_file": lambda: load_file(tensors, device="cuda"),
    }
    try:
        found |= _kvikio(rig, path)
    except Exception as exc:
        rig.notes.append(f"kvikio: {type(exc).__name__}: {exc}")
    return found


def _kvikio(rig: Rig, path: Path) -> dict[str, Callable[[], Any]]:
    """Reads by kvikio into device memory: cuFile, or its own compatibility mode."""
    import kvikio
    import kvikio.defaults

    target = rig.empty(rig.total_bytes)
    kvikio.defaults.set({"num_threads": 16, "task_size": 4 * MIB})
    mode = kvikio.defaults.get("compat_mode")
    rig.notes.append(f"kvikio {kvikio.__version__}: compat_mode {mode}")

    def read() -> Any:
        with kvikio.CuFile(str(path), "r") as file:
            if file.read(target) != rig.total_bytes:
                raise RuntimeError("a short read")
        return target

    return {"kvikio": read}


__all__ = ["disk", "files", "fio_read", "raw_file"]
