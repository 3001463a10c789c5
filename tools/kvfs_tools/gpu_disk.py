"""Rows of ``kvfs bench-gpu`` that begin on the disk: the agent, files without an agent, and what
ordinary programs load tensors with."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvfs_base import large_pages
from kvfs_base.limits import KIB, MIB
from kvfs_datapath.checksum import crc32c
from kvfs_gds.direct import DirectSource, file_source, open_reader
from kvfs_gds.limits import RING_BYTES
from kvfs_gds.loader import Loader
from kvfs_gds.ring import PinnedRing
from kvfs_gds.sources import FileExtent, FileSource
from kvfs_tools.bench import fio_environment
from kvfs_tools.gpu_rig import Measured, Rig, Row, make_row, seconds
from kvfs_tools.gpu_rows import LINK, PagedCache

FIO = "fio, O_DIRECT, at the best of four depths"
FIO_DEPTHS = (("1M", 8, 1), ("1M", 32, 1), ("4M", 16, 1), ("1M", 8, 4))
READ_THREADS = (8, 16, 32)
SAMPLE_BLOCKS = 32
FIO_MEMORY_BYTES = 8 * MIB
"""What fio reads into, over and over again, at the least of its depths: it stays in the caches of
who copies it there. A load needs memory for all that it reads."""


class FioRead:
    """GB/s of fio's O_DIRECT read of one file, all of it, at the depth and size that were best when
    the first of a rig was made: the best of several at each look would be the luck of a disk that
    drifts."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self._path, self._nbytes = path, rig.total_bytes
        if rig.fio_depth is None:
            rig.fio_depth = max(
                FIO_DEPTHS, key=lambda depth: max(self._read(*depth) for _ in range(2))
            )
            rig.notes.append(f"fio: {rig.fio_depth}")
        self.depth = rig.fio_depth

    def __call__(self) -> float:
        return self._read(*self.depth)

    def _read(self, block: str, depth: int, jobs: int) -> float:
        share = self._nbytes // jobs
        argv = ["fio", "--name=limit", "--readonly", f"--filename={self._path}", "--rw=read"]
        argv += [f"--bs={block}", "--direct=1", "--ioengine=libaio", f"--iodepth={depth}"]
        argv += [f"--numjobs={jobs}", f"--size={share}", f"--offset_increment={share}"]
        argv += ["--group_reporting", "--output-format=json"]
        out = subprocess.run(
            argv, check=True, capture_output=True, text=True, env=fio_environment()
        ).stdout
        return float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["bw_bytes"]) / 1e9


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


@dataclasses.dataclass
class _Way:
    """One way of bringing all bytes from the disk."""

    path: str
    body: Callable[[], object]
    fragment: int = 0
    note: str = ""


def disk(rig: Rig) -> list[Row]:
    """Blocks that are not in the arena: through an agent whose arena is smaller than they are, and
    through a pinned ring without an agent. All take turns, with fio before each: a disk that others
    use is another one a minute later."""
    with raw_file(rig) as path, ExitStack() as stack:
        rig.drop_caches()
        limit = FioRead(rig, path)
        cache = PagedCache(rig, min(64 * KIB, rig.block_bytes // 2))
        ways = [
            _plain_reads(rig, path, stack, READ_THREADS[1], rig.total_bytes),
            _plain_reads(rig, path, stack, READ_THREADS[0], FIO_MEMORY_BYTES),
            *_cold_agent(rig, cache, stack),
            *(_from_file(rig, cache, path, (n, "direct"), stack) for n in READ_THREADS),
            _from_file(rig, cache, path, (READ_THREADS[1], "verified"), stack),
            *_from_device(rig, cache, path, stack),
        ]
        rows = _in_turns(rig, ways, limit)
        cached = _from_file(rig, cache, path, (READ_THREADS[1], "page cache"), stack)
        taken = rig.rounds_of(cached.body, rig.total_bytes, rig.pinned_limit())
        rows.append(make_row(cached.path, cached.fragment, LINK, taken))
        cache.check(rig, [0, rig.count // 2, rig.count - 1])
        return rows


def _in_turns(rig: Rig, ways: list[_Way], limit: Callable[[], float]) -> list[Row]:
    """Each way against the median of all reads by fio: the better of two neighbours, as for limits
    that stand still, would be the luck of a disk that does not."""
    for way in ways:
        way.body()
    limits: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {way.path: [] for way in ways}
    gb = rig.total_bytes / 1e9
    for turn in range(rig.rounds):
        first = turn * len(ways) // rig.rounds
        for way in ways[first:] + ways[:first]:
            limits.append(limit())
            cpu = rig.cpu_seconds()
            took = seconds(way.body)
            taken[way.path].append((gb / took, (rig.cpu_seconds() - cpu) / gb))
    middle = statistics.median(limits)
    rig.notes.append(f"fio's {len(limits)} reads: {min(limits):.2f} to {max(limits):.2f} GB/s")
    return [
        make_row(
            way.path,
            way.fragment,
            FIO,
            [Measured(rate, middle, cpu) for rate, cpu in taken[way.path]],
            way.note,
        )
        for way in ways
    ]


def _plain_reads(rig: Rig, path: Path, stack: ExitStack, threads: int, memory_bytes: int) -> _Way:
    """Threads that read the file, and nothing else: what Python makes of the disk. Into so much
    memory, over and over again."""
    fd, view = _open_direct(path, stack), large_pages.buffer(memory_bytes)
    pool = stack.enter_context(ThreadPoolExecutor(threads))
    free = collections.deque(range(0, memory_bytes, MIB))

    def read(at: int) -> None:
        to = free.popleft()
        done = os.preadv(fd, [view[to : to + MIB]], at)
        free.append(to)
        if done != min(MIB, rig.total_bytes - at):
            raise RuntimeError("a short read")

    def body() -> None:
        for _ in pool.map(read, range(0, rig.total_bytes, MIB)):
            pass

    name = f"cold, plain reads by {threads} threads"
    if memory_bytes < rig.total_bytes:
        name += f", into the same {memory_bytes // MIB} MiB"
    return _Way(name, body)


def _open_direct(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    stack.callback(os.close, fd)
    return fd


def _cold_agent(rig: Rig, cache: PagedCache, stack: ExitStack) -> Iterator[_Way]:
    arena_bytes = max(rig.total_bytes // 4, 4 * rig.block_bytes)
    client = stack.enter_context(rig.small_agent(arena_bytes))
    namespace = client.namespace("bench/gpu")
    step = max(1, min(64 * MIB, arena_bytes // 4) // rig.block_bytes)

    def fetch() -> None:
        for start in range(0, rig.count, step):
            keys = rig.keys[start : start + step]
            with namespace.get(keys) as blocks:
                if blocks.hits != len(keys):
                    raise RuntimeError("a block was missing")

    loader = stack.enter_context(Loader.open(namespace, rig.device))

    def load() -> None:
        before = client.statistics()["blocks_loaded"]
        if not all(loader.load(rig.keys, cache.pages).result()):
            raise RuntimeError("a block was missing")
        read = client.statistics()["blocks_loaded"] - before
        way.note = f"{read} of {rig.count} blocks read"

    way = _Way("cold, disk to pages through the agent", load, cache.fragment)
    yield _Way("cold, disk to arena alone (get)", fetch)
    yield way


def _extents(rig: Rig, path: Path, fd: int, *, verified: bool) -> dict[bytes, FileExtent]:
    size = rig.block_bytes
    checksums: list[int | None] = [None] * rig.count
    if verified:
        with path.open("rb") as file:
            checksums = [crc32c(file.read(size)) for _ in range(rig.count)]
    places = enumerate(zip(rig.keys, checksums, strict=True))
    return {key: FileExtent(fd, n * size, size, checksum) for n, (key, checksum) in places}


def _from_file(
    rig: Rig, cache: PagedCache, path: Path, how: tuple[int, str], stack: ExitStack
) -> _Way:
    """``how``: threads, and direct, verified (the same with checksums) or page cache."""
    threads, kind = how
    cached = kind == "page cache"
    fd = os.open(path, os.O_RDONLY | (0 if cached else os.O_DIRECT))
    stack.callback(os.close, fd)
    extents = _extents(rig, path, fd, verified=kind == "verified")
    ring = PinnedRing(rig.device, _ring_bytes(rig))
    source = FileSource(
        ring, lambda keys: [extents[key] for key in keys], threads=threads, owns_ring=True
    )
    body = _loads(rig, source, cache, stack)
    if cached:
        return _Way(f"page cache to pages, {threads} threads", body, cache.fragment)
    note = ", verified" if kind == "verified" else ""
    return _Way(f"cold, file to pages, {threads} threads{note}", body, cache.fragment)


def _ring_bytes(rig: Rig) -> int:
    return min(RING_BYTES, max(rig.total_bytes // 2, 2 * rig.block_bytes))


def _loads(
    rig: Rig, source: FileSource | DirectSource, cache: PagedCache, stack: ExitStack
) -> Callable[[], None]:
    """A load of everything from ``source``, which is closed with ``stack``."""
    stack.callback(source.close)
    loader = stack.enter_context(Loader(source, device=rig.device))

    def load() -> None:
        if not all(loader.load(rig.keys, cache.pages).result()):
            raise RuntimeError("a block was missing")

    return load


def _from_device(rig: Rig, cache: PagedCache, path: Path, stack: ExitStack) -> list[_Way]:
    """By the device's own reader, verified there; and which way ``auto`` would take."""
    reader, reason = open_reader(rig.device)
    if reader is None:
        rig.notes.append(f"no direct reads: {reason}")
        return []
    extents = _extents(rig, path, _open_direct(path, stack), verified=True)
    settings: dict[str, Any] = {
        "locate": lambda keys: [extents[key] for key in keys],
        "device": rig.device,
        "ring_bytes": _ring_bytes(rig),
    }
    chosen = file_source(setting="auto", sample=rig.keys[:SAMPLE_BLOCKS], **settings)
    took = "takes it" if isinstance(chosen, DirectSource) else "takes pinned memory instead"
    chosen.close()
    direct = file_source(setting="on", reader=reader, **settings)
    path_name = "cold, file to pages, cuFile, verified"
    note = f"{reader.name}; auto {took}"
    return [_Way(path_name, _loads(rig, direct, cache, stack), cache.fragment, note)]


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
    disk_limit = FioRead(rig, path)()
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


__all__ = ["FioRead", "disk", "files", "raw_file"]
