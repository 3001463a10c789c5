"""What the GPU benchmarks share: a cluster with blocks in it, a device, limits, and rows."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import kvfs
from kvfs_base.limits import GIB, MIB
from kvfs_gds.arena import address_of
from kvfs_gds.device import Device, open_device
from kvfs_gds.paged import HostMemory
from kvfs_tools.bench import drop_page_cache
from kvfs_tools.cluster import LocalCluster, cpu_seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """One path: medians over its rounds of figure, limit, and figure / limit."""

    path: str
    fragment_bytes: int
    gbps: float
    limit_gbps: float
    ratio: float
    limit_is: str
    cpu_seconds_per_gb: float
    """Of this process and of the cluster's."""
    rounds: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(self).items()}


@dataclasses.dataclass
class Measured:
    gbps: float
    limit_gbps: float
    cpu_seconds_per_gb: float


def make_row(
    path: str, fragment: int, limit_is: str, taken: Sequence[Measured], note: str = ""
) -> Row:
    return Row(
        path=path,
        fragment_bytes=fragment,
        gbps=statistics.median(m.gbps for m in taken),
        limit_gbps=statistics.median(m.limit_gbps for m in taken),
        ratio=statistics.median(m.gbps / m.limit_gbps for m in taken),
        limit_is=limit_is,
        cpu_seconds_per_gb=statistics.median(m.cpu_seconds_per_gb for m in taken),
        rounds=len(taken),
        note=note,
    )


class Rig:
    """A cluster with ``total_bytes`` in blocks of ``block_bytes``, all in the arena, and a device
    with as much memory."""

    def __init__(
        self, folder: Path, device: str, total_bytes: int, block_bytes: int, rounds: int
    ) -> None:
        self.folder = folder
        self.rounds = rounds
        self.block_bytes = block_bytes
        self.count = total_bytes // block_bytes
        self.total_bytes = self.count * block_bytes
        self.device: Device = open_device(device)
        self.on_gpu = device != "cpu"
        self.cluster = LocalCluster(
            folder,
            # One client may lease three quarters of it.
            arena_bytes=max(self.total_bytes + 512 * MIB, 3 * self.total_bytes // 2),
            mount=False,
        )
        self.keys = kvfs.block_keys(range(self.count), 1, salt=b"bench-gpu")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.register_seconds_per_gib = 0.0
        self.notes: list[str] = []
        self.fio_depth: tuple[str, int, int] | None = None
        """What fio reads this disk best with, once that is known."""
        self.started = time.time()

    def __enter__(self) -> Rig:
        self.cluster.start()
        try:
            self.client = kvfs.connect(self.cluster.directory)
            layout = kvfs.KVLayout(block_tokens=1, block_bytes=self.block_bytes)
            self.namespace = self.client.namespace("bench/gpu", layout, create=True)
            self._put()
            self._map_arena()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.terminate()
            process.wait()
        if hasattr(self, "registration"):
            self.registration.close()
        if hasattr(self, "client"):
            self.client.close()
        self.cluster.stop()

    def _put(self) -> None:
        rng = np.random.default_rng(1)
        step = max(1, 256 * MIB // self.block_bytes)
        for start in range(0, self.count, step):
            keys = self.keys[start : start + step]
            data = rng.integers(0, 256, (len(keys), self.block_bytes), dtype=np.uint8)
            self.namespace.put(keys, list(data))

    def _map_arena(self) -> None:
        """The client's view of the arena, registered: the memory that limits are measured on."""
        with self.namespace.get(self.keys) as blocks:
            arena = blocks.arena
            self.extents = [extent for extent in blocks.extents if extent is not None]
            if len(self.extents) != self.count:
                raise RuntimeError("the arena does not hold all blocks")
            view = arena.view(0, arena.size_bytes)
        self.arena = HostMemory(address_of(view), len(view), read_only=True, owner=view)
        start = time.perf_counter()
        self.registration = self.device.register(self.arena)
        shared: Any = self.registration
        if self.on_gpu:
            shared.registration.register_all()
        self.register_seconds_per_gib = (time.perf_counter() - start) / (len(view) / GIB)

    # --- memory and time

    def empty(self, *shape: int) -> Any:
        """Uninitialized bytes on the device."""
        if not self.on_gpu:
            return np.empty(shape, dtype=np.uint8)
        import cupy

        return cupy.empty(shape, dtype=cupy.uint8)

    def synchronize(self) -> None:
        if self.on_gpu:
            import cupy

            cupy.cuda.Device().synchronize()

    def cpu_seconds(self) -> float:
        return (
            time.process_time()
            + self.cluster.cpu_seconds()
            + sum(cpu_seconds(process.pid) for process in self.processes)
        )

    def pinned_limit(self, *, back: bool = False) -> Callable[[], float]:
        """GB/s of one copy of the whole total between registered memory and the device by the copy
        engine."""
        if not self.on_gpu:
            from_ = np.zeros(self.total_bytes, dtype=np.uint8)
            to = np.empty_like(from_)
            return lambda: self.total_bytes / 1e9 / seconds(lambda: np.copyto(to, from_))
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
        target = cupy.empty(self.total_bytes, cupy.uint8)
        host = self.arena.address
        if back:
            pinned = cupy.cuda.alloc_pinned_memory(self.total_bytes)
            host = pinned.ptr

        def copy() -> None:
            step = 256 * MIB
            for at in range(0, self.total_bytes, step):
                size = min(step, self.total_bytes - at)
                pair = (host + at, target.data.ptr + at)
                cupy.cuda.runtime.memcpyAsync(
                    *(pair if back else pair[::-1]), size, 2 if back else 1, stream.ptr
                )
            stream.synchronize()

        copy()
        if back:
            copy.pinned = pinned  # type: ignore[attr-defined]
        return lambda: self.total_bytes / 1e9 / seconds(copy)

    def rounds_of(
        self,
        body: Callable[[], object],
        nbytes: int,
        limit: Callable[[], float],
        *,
        before: Callable[[], object] = lambda: None,
        warm_up: bool = True,
    ) -> list[Measured]:
        """``body`` moves ``nbytes`` and waits for them; ``before`` is not counted."""
        if warm_up:
            before()
            body()
        taken = []
        low = limit()
        for _ in range(self.rounds):
            before()
            cpu = self.cpu_seconds()
            took = seconds(body)
            cpu = self.cpu_seconds() - cpu
            high = limit()
            gb = nbytes / 1e9
            taken.append(Measured(gb / took, max(low, high), cpu / gb))
            low = high
        return taken

    # --- other processes

    def small_agent(self, arena_bytes: int) -> AbstractContextManager[kvfs.Client]:
        """As the function of that name, its processor time counted."""
        return small_agent(self.cluster, self.folder / "agent.log", arena_bytes, self.processes)

    def chunk_folders(self) -> list[Path]:
        """Where the chunk servers keep the blocks."""
        return sorted({p.parent for p in self.chunk_files()})

    def chunk_files(self) -> list[Path]:
        found = [
            p
            for p in self.cluster.directory.rglob("*")
            if p.is_file() and "chunks" in p.parts and p.stat().st_size == self.block_bytes
        ]
        return sorted(found)

    def drop_caches(self) -> None:
        try:
            drop_page_cache()
        except PermissionError:
            pass  # not root: files stay warm, and O_DIRECT does not care

    def report(self, commit: str, rows: Sequence[Row], failed: Sequence[str]) -> dict[str, Any]:
        return {
            "commit": commit,
            "device": device_name() if self.on_gpu else "cpu",
            "cores": os.cpu_count(),
            "total_bytes": self.total_bytes,
            "block_bytes": self.block_bytes,
            "register_seconds_per_gib": round(self.register_seconds_per_gib, 4),
            "took_seconds": round(time.time() - self.started, 1),
            "rows": [row.as_dict() for row in rows],
            "notes": self.notes,
            "failed": list(failed),
        }


@contextmanager
def small_agent(
    cluster: LocalCluster,
    log_path: Path,
    arena_bytes: int,
    processes: list[subprocess.Popen[bytes]] | None = None,
) -> Iterator[kvfs.Client]:
    """A client of a further agent, whose arena holds little: what is loaded through it in turn
    always comes from disk. The agent is among ``processes`` while it runs."""
    # A directory of its own: a socket's path is at most 107 bytes long.
    folder = tempfile.mkdtemp(prefix="kvfs-")
    address = f"unix:{folder}/agent"
    argv = [sys.executable, "-m", "kvfs", "serve", "agent", "--unix", address]
    argv += ["--metadata", cluster.endpoint("metadata"), "--arena-bytes", str(arena_bytes)]
    with log_path.open("ab") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    if processes is not None:
        processes.append(process)
    try:
        with _connect(address, process) as client:
            yield client
    finally:
        if processes is not None:
            processes.remove(process)
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _connect(address: str, process: subprocess.Popen[bytes]) -> kvfs.Client:
    deadline = time.monotonic() + 60
    while True:
        try:
            return kvfs.connect(address)
        except kvfs.ConnectionLost:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def device_name() -> str:
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(0)["name"]
    return name.decode()


def seconds(body: Callable[[], object]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def batched(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


__all__ = ["Measured", "Rig", "Row", "batched", "make_row", "seconds"]
