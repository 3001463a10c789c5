"""``kvfs bench``: the paths that users take, each beside its limit in the same run.

Every row is measured in rounds: the limit, kvfs, the limit, kvfs, ..., the limit. A round's figure
is held against the better of the limits before and after it, so that a disk whose speed drifts does
not flatter. Reported are medians over the rounds, and of the per-round ratios.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import kvfs
from kvfs import KVLayout
from kvfs_base import large_pages
from kvfs_base.limits import (
    GIB,
    MIB,
    PAGE_BYTES,
)
from kvfs_tools.cluster import LocalCluster
from kvfs_tools.tables import show

BATCH = 32
MATCH_KEYS = 1000
READ_THREADS = 8
CACHES = Path("/proc/sys/vm/drop_caches")


@dataclasses.dataclass(frozen=True)
class Row:
    """One path: medians over ``rounds`` of its figure and of its limit, and of figure / limit."""

    path: str
    unit: str
    value: float
    limit: float
    ratio: float
    target: str
    limit_is: str
    rounds: int

    @classmethod
    def of(
        cls,
        path: str,
        unit: str,
        pairs: Sequence[tuple[float, float]],
        target: str,
        limit_is: str,
    ) -> Row:
        """``pairs`` holds (figure, limit) of each round."""
        return cls(
            path=path,
            unit=unit,
            value=statistics.median(v for v, _ in pairs),
            limit=statistics.median(limit for _, limit in pairs),
            ratio=statistics.median(v / limit for v, limit in pairs),
            target=target,
            limit_is=limit_is,
            rounds=len(pairs),
        )


def seconds(body: Callable[[], object], repeats: int = 1) -> float:
    """Wall-clock seconds of one run of ``body``."""
    start = time.perf_counter()
    for _ in range(repeats):
        body()
    return (time.perf_counter() - start) / repeats


def interleave(
    rounds: int,
    limit: Callable[[], float],
    figure: Callable[[], float],
    better: Callable[[float, float], float] = max,
) -> list[tuple[float, float]]:
    """(figure, limit) of each round."""
    pairs = []
    before = limit()
    for _ in range(rounds):
        value = figure()
        after = limit()
        pairs.append((value, better(before, after)))
        before = after
    return pairs


def drop_page_cache() -> None:
    os.sync()
    CACHES.write_text("1\n")


# --- limits


class Echo:
    """A thread that answers one byte string with another: the least that a call to another thread
    over a Unix socket can cost from Python."""

    def __init__(self, request_bytes: int, reply_bytes: int) -> None:
        self._near, far = socket.socketpair()
        self._request = bytes(request_bytes)
        self._reply_bytes = reply_bytes
        self._buffer = bytearray(reply_bytes)
        self._thread = threading.Thread(target=self._serve, args=(far, request_bytes), daemon=True)
        self._thread.start()

    def _serve(self, far: socket.socket, request_bytes: int) -> None:
        buffer = bytearray(request_bytes)
        reply = bytes(self._reply_bytes)
        with far:
            while far.recv_into(buffer, 0, socket.MSG_WAITALL) == request_bytes:
                far.sendall(reply)

    def call(self) -> None:
        self._near.sendall(self._request)
        self._near.recv_into(self._buffer, 0, socket.MSG_WAITALL)

    def close(self) -> None:
        self._near.close()
        self._thread.join()


def fio_environment() -> dict[str, str]:
    """In which fio's buffers lie in large pages, as kvfs's do, where the C library knows how."""
    return dict(os.environ, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def fio_read(folder: str, nbytes: int, block_bytes: int) -> float:
    """GB/s of fio's best O_DIRECT read of every file in ``folder`` once, of two queue depths."""
    best = 0.0
    for depth in (8, 32):
        argv = [
            "fio",
            "--name=limit",
            "--readonly",
            f"--opendir={folder}",
            "--file_service_type=sequential",
            f"--bs={min(block_bytes, MIB)}",
            "--rw=read",
            "--direct=1",
            "--ioengine=libaio",
            f"--iodepth={depth}",
            "--output-format=json",
        ]
        out = subprocess.run(
            argv, check=True, capture_output=True, text=True, env=fio_environment()
        ).stdout
        read = json.loads(out[out.index("{") :])["jobs"][0]["read"]
        if read["io_bytes"] != nbytes:
            raise RuntimeError(f"fio read {read['io_bytes']} bytes")
        best = max(best, float(read["bw_bytes"]) / 1e9)
    return best


def read_files(paths: Sequence[str], threads: int, buffer: mmap.mmap, block_bytes: int) -> None:
    """Each file by open, one readv of the whole, close: what engines' file tiers do."""
    view = memoryview(buffer)

    def some(first: int) -> None:
        target = view[first * block_bytes : (first + 1) * block_bytes]
        for path in paths[first::threads]:
            fd = os.open(path, os.O_RDONLY)
            try:
                if os.readv(fd, [target]) != block_bytes:
                    raise RuntimeError(f"short read of {path}")
            finally:
                os.close(fd)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))


# --- rows


@dataclasses.dataclass
class Bench:
    """A running cluster with ``len(keys)`` blocks stored, and what the rows share."""

    cluster: LocalCluster
    client: kvfs.Client
    namespace: kvfs.Namespace
    keys: list[bytes]
    block_bytes: int
    arena_bytes: int
    rounds: int

    @property
    def total_bytes(self) -> int:
        return len(self.keys) * self.block_bytes

    def warm_get(self, batch: int) -> Row:
        hot = self.keys[-batch:]

        def get() -> None:
            with self.namespace.get(hot) as blocks:
                if blocks.hits != batch:
                    raise RuntimeError("a warm block was missing")

        get()
        echo = Echo(request_bytes=32 * batch + 64, reply_bytes=24 * batch + 64)
        pairs = interleave(
            self.rounds,
            lambda: seconds(echo.call, 200) * 1e6 / batch,
            lambda: seconds(get, 200) * 1e6 / batch,
            min,
        )
        echo.close()
        return Row.of(
            f"API get, warm arena, zero copy, batch {batch}",
            "us/block",
            pairs,
            "<= 10 us",
            "a bare socket round trip of the same bytes",
        )

    def match(self) -> Row:
        keys = kvfs.block_keys(range(MATCH_KEYS), 1, salt=b"bench")
        self.match_namespace().put(keys, [bytes(64)] * MATCH_KEYS)
        namespace = self.match_namespace()
        echo = Echo(request_bytes=32 * MATCH_KEYS + 64, reply_bytes=64)

        def match() -> None:
            if namespace.match(keys) != MATCH_KEYS:
                raise RuntimeError("a stored key did not match")

        match()
        pairs = interleave(
            self.rounds,
            lambda: seconds(echo.call, 20) * 1e3,
            lambda: seconds(match, 20) * 1e3,
            min,
        )
        echo.close()
        return Row.of(
            f"match of {MATCH_KEYS} keys at the client",
            "ms",
            pairs,
            "<= 2 ms",
            "a bare socket round trip of the same bytes",
        )

    def match_namespace(self) -> kvfs.Namespace:
        return self.client.namespace("bench/match", layout=KVLayout(block_tokens=1), create=True)

    def cold_get(self) -> Row:
        """Batches in storing order over more data than the arena holds: every block is read from
        disk, by O_DIRECT, from the same files as fio reads. Fails rather than measure a hit."""

        def cold() -> float:
            before = self.client.statistics()["arena_hits"]
            taken = seconds(self._get_everything)
            if self.client.statistics()["arena_hits"] != before:
                raise RuntimeError("a block came from the arena")
            return self.total_bytes / taken / 1e9

        return self._beside_fio("API get, cold from disk, verified", cold, ">= 0.95")

    def plain_reads(self) -> Row:
        """What anybody has of the disk who keeps what he reads: fio does not, and memory that it
        reads into over and over again stays in the processor's caches."""
        files = self._backing(self.keys[: GIB // self.block_bytes])
        room = large_pages.buffer(len(files) * self.block_bytes)

        def read(number: int) -> None:
            fd = os.open(files[number], os.O_RDONLY | os.O_DIRECT)
            start = number * self.block_bytes
            try:
                for at in range(0, self.block_bytes, MIB):
                    piece = room[start + at : start + min(at + MIB, self.block_bytes)]
                    if os.preadv(fd, [piece], at) != len(piece):
                        raise RuntimeError(f"a short read of {files[number]}")
            finally:
                os.close(fd)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return self._beside_fio(
                f"the same files by {READ_THREADS} threads, O_DIRECT",
                lambda: len(room) / seconds(lambda: list(pool.map(read, range(len(files))))) / 1e9,
            )

    def _beside_fio(self, path: str, body: Callable[[], float], target: str = "") -> Row:
        folder = Path(self.cluster.directory, "limit")
        folder.mkdir()
        try:
            for number, file in enumerate(self._backing(self.keys)):
                os.link(file, folder / str(number))
            limit = functools.partial(fio_read, str(folder), self.total_bytes, self.block_bytes)
            pairs = interleave(self.rounds, limit, body)
        finally:
            shutil.rmtree(folder)
        return Row.of(path, "GB/s", pairs, target, "fio O_DIRECT, same files")

    def _get_everything(self) -> None:
        for first in range(0, len(self.keys), BATCH):
            batch = self.keys[first : first + BATCH]
            with self.namespace.get(batch) as blocks:
                if blocks.hits != len(batch):
                    raise RuntimeError("a stored block was missing")

    def put(self) -> Row:
        """New blocks each round, removed afterwards; the limit writes the same bytes to the same
        disk with O_DIRECT into new files of the same size."""
        count = min(len(self.keys), 128)
        data = [os.urandom(self.block_bytes) for _ in range(8)]
        turns = itertools.count()

        def put() -> float:
            keys = kvfs.block_keys(range(count), 1, salt=b"put%d" % next(turns))

            def store() -> None:
                for first in range(0, count, BATCH):
                    batch = keys[first : first + BATCH]
                    self.namespace.put(batch, [data[i % 8] for i in range(len(batch))])

            taken = seconds(store)
            self.namespace.remove(keys)
            return count * self.block_bytes / taken / 1e9

        pairs = interleave(self.rounds, lambda: self._write_limit(count), put)
        return Row.of(
            "API put, whole blocks", "GB/s", pairs, "", f"O_DIRECT files, {READ_THREADS} threads"
        )

    def _write_limit(self, count: int) -> float:
        folder = Path(self.cluster.directory, "limit")
        folder.mkdir()
        source = large_pages.buffer(self.block_bytes)
        source[:] = os.urandom(self.block_bytes)

        def write(index: int) -> None:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT
            fd = os.open(folder / str(index), flags, 0o600)
            try:
                os.pwritev(fd, [source], 0)
            finally:
                os.close(fd)

        try:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                taken = seconds(lambda: list(pool.map(write, range(count))))
        finally:
            shutil.rmtree(folder)
        return count * self.block_bytes / taken / 1e9

    def mount_read(self, *, warm: bool) -> Row:
        keys = self.keys[: 256 * MIB // self.block_bytes]
        mounted, backing = self._mounted(keys), self._backing(keys)
        buffer = mmap.mmap(-1, 4 * self.block_bytes)
        size = len(keys) * self.block_bytes

        def read(paths: Sequence[str]) -> float:
            if not warm:
                drop_page_cache()
            return size / seconds(lambda: read_files(paths, 4, buffer, self.block_bytes)) / 1e9

        if warm:
            read(mounted)
            read(backing)
        pairs = interleave(self.rounds, lambda: read(backing), lambda: read(mounted))
        return Row.of(
            f"mount, read block files, {'warm' if warm else 'cold'}",
            "GB/s",
            pairs,
            ">= 0.90",
            "the same chunk files read directly",
        )

    def _mounted(self, keys: Sequence[bytes]) -> list[str]:
        folder = Path(self.cluster.mountpoint) / "kv" / "bench" / "blocks"
        return [str(folder / key.hex()) for key in keys]

    def _backing(self, keys: Sequence[bytes]) -> list[str]:
        """The chunk files of blocks, found by their inode numbers."""
        chunks = {
            path.name: str(path)
            for path in Path(self.cluster.directory).glob("targets/*/chunks/*/*")
        }
        return [chunks[f"{os.stat(path).st_ino:016x}.00000000"] for path in self._mounted(keys)]


def run(directory: str, block_bytes: int, total_bytes: int, rounds: int, log: Any) -> list[Row]:
    """All rows. ``directory`` must be on the disk to measure and have room for three times
    ``total_bytes``."""
    if block_bytes % PAGE_BYTES:
        raise click.BadParameter(f"block size must be a multiple of {PAGE_BYTES}")
    arena_bytes = max(total_bytes // 4, 2 * BATCH * block_bytes)
    count = max(total_bytes // block_bytes, 2 * arena_bytes // block_bytes)
    with LocalCluster(directory, arena_bytes=arena_bytes, capacity_bytes=0) as cluster:
        with kvfs.connect(cluster.directory) as client:
            layout = KVLayout(block_tokens=16, block_bytes=block_bytes)
            namespace = client.namespace("bench/blocks", layout=layout, create=True)
            keys = kvfs.block_keys(range(count), 1)
            log(f"storing {count} blocks of {block_bytes / MIB:g} MiB")
            data = os.urandom(block_bytes)
            for first in range(0, count, BATCH):
                batch = keys[first : first + BATCH]
                namespace.put(batch, [data] * len(batch))
            bench = Bench(cluster, client, namespace, keys, block_bytes, arena_bytes, rounds)
            rows = []
            measures: list[Callable[[], Row]] = [lambda: bench.warm_get(32)]
            if arena_bytes >= 256 * block_bytes:
                measures.append(lambda: bench.warm_get(128))
            measures += [bench.match, bench.cold_get, bench.plain_reads, bench.put]
            measures += [lambda: bench.mount_read(warm=False), lambda: bench.mount_read(warm=True)]
            for measure in measures:
                row = measure()
                log(f"{row.path}: {row.value:.3g} {row.unit}")
                rows.append(row)
            return rows


def table(rows: Sequence[Row]) -> Table:
    out = Table("path", "kvfs", "limit", "ratio", "target", "limit is", title="medians")
    for row in rows:
        out.add_row(
            row.path,
            f"{row.value:.3g} {row.unit}",
            f"{row.limit:.3g} {row.unit}",
            f"{row.ratio:.2f}",
            row.target,
            row.limit_is,
        )
    return out


@click.command()
@click.option("--dir", "directory", help="Where to put the data; a temporary directory otherwise.")
@click.option("--block-mib", type=float, default=2.0, show_default=True)
@click.option("--total-mib", type=int, default=1024, show_default=True, help="Data to store.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_path", help="Write the rows here too.")
def bench(
    directory: str | None, block_mib: float, total_mib: int, rounds: int, json_path: str | None
) -> None:
    """Measure kvfs on this machine against its limits."""
    if shutil.which("fio") is None:
        raise click.ClickException("fio is not installed (apt-get install fio)")
    with tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=directory) as folder:
        rows = run(
            folder,
            int(block_mib * MIB),
            min(total_mib * MIB, 64 * GIB),
            rounds,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    show(table(rows))
    if json_path:
        Path(json_path).write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
