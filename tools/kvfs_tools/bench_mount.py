"""``kvfs bench-mount``: both front ends beside the file system that the chunks lie on.

One kvfs, mounted twice, and a plain directory on the same disk. A round measures the plain
directory, a mount, the plain directory: a figure is held against the better of its two neighbours.
Reported are medians over the rounds, and of the per-round ratios.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import kvfs
from kvfs import KVLayout
from kvfs_base.limits import KIB, MIB
from kvfs_tools.bench import interleave
from kvfs_tools.cluster import START_SECONDS, STOP_SECONDS, ClusterFailed, LocalCluster

FRONTENDS = ("direct", "pyfuse3")
PLAIN = "plain"
NAMESPACE = "bench/mount"
FORGOTTEN_SECONDS = 1.2
"""The kernel answers for names and attributes by itself for a second."""

Measure = Callable[[str], float]
"""A figure of one of FRONTENDS, or of PLAIN."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians over the rounds: each front end's figure, the plain directory's, and the ratios."""

    what: str
    unit: str
    plain: float
    figures: dict[str, float]
    ratios: dict[str, float]
    rounds: int


@contextlib.contextmanager
def mounted(cluster: LocalCluster, mountpoint: Path, frontend: str) -> Iterator[None]:
    """Raises ClusterFailed."""
    mountpoint.mkdir()
    log_path = mountpoint.with_suffix(".log")
    argv = [sys.executable, "-m", "kvfs", "mount", str(cluster.directory), str(mountpoint)]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [*argv, "--frontend", frontend],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not os.path.ismount(mountpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ClusterFailed(log_path.read_text(errors="replace")[-2000:])
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


class Bench:
    """The rows. ``root`` holds a plain directory and the mount points, by name."""

    def __init__(
        self, root: Path, frontends: Sequence[str], files: int, blocks: list[Path], rounds: int
    ) -> None:
        """``blocks`` are the files that chunks of KV blocks lie in; a mount has them by name."""
        self.rows: list[Row] = []
        self._root = root
        self._frontends = frontends
        self._files = files
        self._blocks = blocks
        self._names: dict[str, list[Path]] = {PLAIN: blocks}
        for frontend in frontends:
            folder = root / frontend / "kv" / NAMESPACE
            self._names[frontend] = sorted(folder.iterdir())
        self._rounds = rounds
        self._rng = random.Random(1)
        self._turns = itertools.count()

    def run(self) -> None:
        count = self._files
        self._add("create and close, new files", "/s", lambda name: count / self._create(name))
        for name in (PLAIN, *self._frontends):
            self._populate(name)
        self._add("stat, not asked for lately", "/s", lambda name: count / self._stat(name))
        self._add("open and close, for reading", "/s", lambda name: count / self._open(name))
        self._add("list with types and sizes", "entries/s", lambda name: count / self._list(name))
        self._add("unlink", "/s", lambda name: count / self._unlink(name))
        self._add("read of blocks, 4 KiB at random", "GB/s", self._read_small)
        self._add("read of blocks, 1 MiB in a row", "GB/s", self._read_large)
        self._add("read of blocks, O_DIRECT, 1 MiB", "GB/s", self._read_direct)
        self._add("block files, open, read, close", "/s", self._whole_blocks)

    def _add(self, what: str, unit: str, measure: Measure) -> None:
        figures, ratios, plain = {}, {}, []
        for name in self._frontends:
            measure(name)  # caches, and what is made on first use
            limit, figure = functools.partial(measure, PLAIN), functools.partial(measure, name)
            pairs = interleave(self._rounds, limit, figure)
            figures[name] = _median([value for value, _ in pairs])
            ratios[name] = _median([value / limit for value, limit in pairs])
            plain += [limit for _, limit in pairs]
        self.rows.append(Row(what, unit, _median(plain), figures, ratios, self._rounds))

    # --- names

    def _folder(self, name: str) -> Path:
        folder = self._root / name / "files"
        folder.mkdir(exist_ok=True)
        return folder

    def _populate(self, name: str) -> None:
        folder = self._folder(name)
        for number in range(self._files):
            (folder / f"{number:06d}").touch()

    def _paths(self, name: str) -> list[str]:
        folder = self._folder(name)
        return [f"{folder}/{number:06d}" for number in range(self._files)]

    def _create(self, name: str) -> float:
        folder = self._folder(name) / f"new-{next(self._turns)}"
        folder.mkdir()
        paths = [f"{folder}/{number}" for number in range(self._files)]
        begin = time.perf_counter()
        for path in paths:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        taken = time.perf_counter() - begin
        shutil.rmtree(folder)
        return taken

    def _stat(self, name: str) -> float:
        paths = self._paths(name)
        if name != PLAIN:
            time.sleep(FORGOTTEN_SECONDS)
        begin = time.perf_counter()
        for path in paths:
            os.stat(path)
        return time.perf_counter() - begin

    def _open(self, name: str) -> float:
        paths = self._paths(name)
        begin = time.perf_counter()
        for path in paths:
            os.close(os.open(path, os.O_RDONLY))
        return time.perf_counter() - begin

    def _list(self, name: str) -> float:
        folder = self._folder(name)
        begin = time.perf_counter()
        with os.scandir(folder) as entries:
            found = sum(entry.stat(follow_symlinks=False).st_size == 0 for entry in entries)
        taken = time.perf_counter() - begin
        if found < self._files:
            raise RuntimeError(f"{found} entries of {self._files} were listed")
        return taken

    def _unlink(self, name: str) -> float:
        paths = [f"{path}-gone" for path in self._paths(name)]
        for path in paths:
            Path(path).touch()
        begin = time.perf_counter()
        for path in paths:
            os.unlink(path)
        return time.perf_counter() - begin

    # --- blocks

    def _opened(self, name: str, flags: int = 0) -> list[int]:
        """Descriptors of all blocks, none of whose pages the mount has cached; the chunk files'
        own pages stay."""
        descriptors = [os.open(path, os.O_RDONLY | flags) for path in self._names[name]]
        if name != PLAIN:
            for descriptor in descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptors

    def _read(self, name: str, size: int, flags: int = 0) -> float:
        descriptors = self._opened(name, flags)
        block_bytes = os.fstat(descriptors[0]).st_size
        places = [(d, at) for d in descriptors for at in range(0, block_bytes, size)]
        if size < MIB:
            self._rng.shuffle(places)
        try:
            with mmap.mmap(-1, size) as room:
                begin = time.perf_counter()
                for descriptor, at in places:
                    if os.preadv(descriptor, [room], at) != min(size, block_bytes - at):
                        raise RuntimeError("a short read")
                taken = time.perf_counter() - begin
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return len(descriptors) * block_bytes / taken / 1e9

    def _read_small(self, name: str) -> float:
        return self._read(name, 4 * KIB)

    def _read_large(self, name: str) -> float:
        return self._read(name, MIB)

    def _read_direct(self, name: str) -> float:
        return self._read(name, MIB, os.O_DIRECT)

    def _whole_blocks(self, name: str) -> float:
        for descriptor in self._opened(name):
            os.close(descriptor)
        paths = self._names[name]
        room = bytearray(paths[0].stat().st_size)
        begin = time.perf_counter()
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            if os.readv(descriptor, [room]) != len(room):
                raise RuntimeError(f"a short read of {path}")
            os.close(descriptor)
        return len(paths) / (time.perf_counter() - begin)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def store_blocks(cluster: LocalCluster, count: int, block_bytes: int) -> list[Path]:
    """The files that the blocks lie in."""
    with kvfs.connect(cluster.endpoint("agent")) as client:
        layout = KVLayout(block_tokens=1)
        namespace = client.namespace(NAMESPACE, layout=layout, create=True)
        for number in range(count):
            keys = kvfs.block_keys(range(1), 1, salt=b"mount%d" % number)
            namespace.put(keys, [os.urandom(block_bytes)])
    found = cluster.directory.glob("targets/*/chunks/*/*")
    return [path for path in found if path.stat().st_size == block_bytes]


def table(rows: Sequence[Row], frontends: Sequence[str]) -> Table:
    out = Table("what", "unit", "backing")
    for name in frontends:
        out.add_column(name, justify="right")
        out.add_column("ratio", justify="right")
    for row in rows:
        cells = [row.what, row.unit, f"{row.plain:,.3g}"]
        for name in frontends:
            cells += [f"{row.figures[name]:,.3g}", f"{row.ratios[name]:.2f}"]
        out.add_row(*cells)
    return out


@click.command("bench-mount")
@click.option("--dir", "directory", help="Where to put the data; a temporary directory otherwise.")
@click.option("--files", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=64, show_default=True)
@click.option("--block-kib", type=click.IntRange(4), default=2048, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--frontend",
    "frontends",
    type=click.Choice(FRONTENDS),
    multiple=True,
    default=FRONTENDS,
    help="Which to measure; may be repeated. Both otherwise.",
)
@click.option("--json", "json_path", help="Write the rows here too.")
def bench_mount(
    *,
    directory: str | None,
    files: int,
    blocks: int,
    block_kib: int,
    rounds: int,
    frontends: Sequence[str],
    json_path: str | None,
) -> None:
    """Measure the mount on this machine against the file system below it."""
    with contextlib.ExitStack() as stack:
        root = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=directory))
        )
        cluster = stack.enter_context(LocalCluster(root / "kvfs", mount=False))
        chunk_files = store_blocks(cluster, blocks, block_kib * KIB)
        (root / PLAIN).mkdir()
        for name in frontends:
            stack.enter_context(mounted(cluster, root / name, name))
        bench = Bench(root, frontends, files, chunk_files, rounds)
        bench.run()
    Console().print(table(bench.rows, frontends))
    if json_path:
        rows = [dataclasses.asdict(row) for row in bench.rows]
        Path(json_path).write_text(json.dumps(rows, indent=1))


__all__ = ["Bench", "Row", "bench_mount"]
