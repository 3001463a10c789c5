"""``kvfs bench-mount``: both front ends beside the file system that the chunks lie on.

One kvfs, mounted twice, and a plain directory on the same disk. A round measures the plain
directory, one mount, the plain directory, the other mount: a figure is held against the better of
its two neighbours. Reported are medians over the rounds, and of the per-round ratios.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import statistics
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
from kvfs_tools.cluster import (
    START_SECONDS,
    STOP_SECONDS,
    ClusterFailed,
    LocalCluster,
    cpu_seconds,
)

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
    """To the plain directory."""
    first_to_last: float
    """The first front end's figure to the last one's."""
    cpu: dict[str, float]
    """CPU time of the mount's process: microseconds an operation, or seconds a GB. What others on
    the machine do changes it less than the rates."""
    rounds: int

    @classmethod
    def of(
        cls,
        what: str,
        unit: str,
        rounds: Sequence[dict[str, float]],
        limits: Sequence[dict[str, float]],
        cpu: dict[str, float],
    ) -> Row:
        """By front end, ``rounds`` has its figure and ``limits`` what it is held against."""
        names = list(rounds[0])
        return cls(
            what=what,
            unit=unit,
            plain=statistics.median(limit[n] for limit in limits for n in names),
            figures={n: statistics.median(r[n] for r in rounds) for n in names},
            ratios={
                n: statistics.median(
                    r[n] / limit[n] for r, limit in zip(rounds, limits, strict=True)
                )
                for n in names
            },
            first_to_last=statistics.median(r[names[0]] / r[names[-1]] for r in rounds),
            cpu=cpu,
            rounds=len(rounds),
        )


@contextlib.contextmanager
def mounted(cluster: LocalCluster, mountpoint: Path, frontend: str) -> Iterator[int]:
    """The process. Raises ClusterFailed."""
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
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


@dataclasses.dataclass
class _Timer:
    seconds: float = 0.0


class Bench:
    """The rows. ``root`` holds a plain directory and the mount points, by name."""

    def __init__(
        self, root: Path, frontends: dict[str, int], files: int, blocks: list[Path], rounds: int
    ) -> None:
        """``frontends`` has the process of each.

        ``blocks`` are the files that chunks of KV blocks lie in; a mount has them by name."""
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
        self._cpu: dict[str, float] = {}

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
        self._add("block files, open, read, close", "blocks/s", self._whole_blocks)

    def _add(self, what: str, unit: str, measure: Measure) -> None:
        for name in self._frontends:
            measure(name)  # caches, and what is made on first use
        rounds: list[dict[str, float]] = []
        limits: list[dict[str, float]] = []
        self._cpu = dict.fromkeys(self._frontends, 0.0)
        before = measure(PLAIN)
        for _ in range(self._rounds):
            rounds.append({})
            limits.append({})
            for name in self._frontends:
                rounds[-1][name] = measure(name)
                after = measure(PLAIN)
                limits[-1][name] = max(before, after)
                before = after
        amount = self._rounds * self._amount(unit)
        cpu = {name: seconds / amount for name, seconds in self._cpu.items()}
        self.rows.append(Row.of(what, unit, rounds, limits, cpu))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[_Timer]:
        timer = _Timer()
        process = self._frontends.get(name)
        used = 0.0 if process is None else cpu_seconds(process)
        begin = time.perf_counter()
        yield timer
        timer.seconds = time.perf_counter() - begin
        if process is not None and name in self._cpu:
            self._cpu[name] += cpu_seconds(process) - used

    def _amount(self, unit: str) -> float:
        """What a round handles: in millions, which makes microseconds of seconds, or in GB."""
        if unit == "GB/s":
            return sum(path.stat().st_size for path in self._blocks) / 1e9
        return (len(self._blocks) if unit == "blocks/s" else self._files) / 1e6

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
        with self._timed(name) as timer:
            for path in paths:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        shutil.rmtree(folder)
        return timer.seconds

    def _stat(self, name: str) -> float:
        paths = self._paths(name)
        if name != PLAIN:
            time.sleep(FORGOTTEN_SECONDS)
        with self._timed(name) as timer:
            for path in paths:
                os.stat(path)
        return timer.seconds

    def _open(self, name: str) -> float:
        paths = self._paths(name)
        with self._timed(name) as timer:
            for path in paths:
                os.close(os.open(path, os.O_RDONLY))
        return timer.seconds

    def _list(self, name: str) -> float:
        folder = self._folder(name)
        with self._timed(name) as timer, os.scandir(folder) as entries:
            found = sum(entry.stat(follow_symlinks=False).st_size == 0 for entry in entries)
        if found < self._files:
            raise RuntimeError(f"{found} entries of {self._files} were listed")
        return timer.seconds

    def _unlink(self, name: str) -> float:
        paths = [f"{path}-gone" for path in self._paths(name)]
        for path in paths:
            Path(path).touch()
        with self._timed(name) as timer:
            for path in paths:
                os.unlink(path)
        return timer.seconds

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
            with mmap.mmap(-1, size) as room, self._timed(name) as timer:
                for descriptor, at in places:
                    if os.preadv(descriptor, [room], at) != min(size, block_bytes - at):
                        raise RuntimeError("a short read")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return len(descriptors) * block_bytes / timer.seconds / 1e9

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
        with self._timed(name) as timer:
            for path in paths:
                descriptor = os.open(path, os.O_RDONLY)
                if os.readv(descriptor, [room]) != len(room):
                    raise RuntimeError(f"a short read of {path}")
                os.close(descriptor)
        return len(paths) / timer.seconds


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
        out.add_column("CPU", justify="right")
    if len(frontends) > 1:
        out.add_column(f"{frontends[0]} to {frontends[-1]}", justify="right")
    for row in rows:
        cells = [row.what, row.unit, f"{row.plain:,.3g}"]
        for name in frontends:
            cpu = f"{row.cpu[name]:.2g} s/GB" if row.unit == "GB/s" else f"{row.cpu[name]:.0f} us"
            cells += [f"{row.figures[name]:,.4g}", f"{row.ratios[name]:.2f}", cpu]
        if len(frontends) > 1:
            cells.append(f"{row.first_to_last:.2f}")
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
        processes = {
            name: stack.enter_context(mounted(cluster, root / name, name)) for name in frontends
        }
        bench = Bench(root, processes, files, chunk_files, rounds)
        bench.run()
    Console().print(table(bench.rows, frontends))
    if json_path:
        rows = [dataclasses.asdict(row) for row in bench.rows]
        Path(json_path).write_text(json.dumps(rows, indent=1))


__all__ = ["Bench", "Row", "bench_mount"]
