"""``kvfs bench-chunks``: the data path alone, chunk servers and a chunk client, against the disk
and against the network.

Local means descriptors and O_DIRECT, remote means bytes over TCP (loopback). Every path is
measured in rounds, its limits before and after each of them: fio with O_DIRECT on the same disk
(the same files for reads, new ones for writes), and over TCP also a plain `sendfile` / `recv_into`
pair (see ``chunk_pair``); where this host's TCP paces (BBR), one more of which it does not, as in
kvfs. Remote reads come from the page cache on both sides, so that the disk is not what is
compared. Writes of several copies have one copy of the same bytes on the same servers beside them.
A round's figure is held against the better of the limits around it; reported are medians. CPU is
that of all processes of a side for 10^9 bytes; the client's covers the checksum of every byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
from rich.table import Table

from kvfs.settings import format_size, parse_size
from kvfs_base import large_pages
from kvfs_base.cluster import Chain
from kvfs_base.limits import (
    BLOCK_BYTES_MAX,
    GIB,
    MIB,
    PAGE_BYTES,
)
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkWrite
from kvfs_datapath.limits import CLIENT_THREADS_PER_TARGET
from kvfs_tools.bench import fio_environment, fio_read
from kvfs_tools.chunk_pair import Pair, host_paces
from kvfs_tools.chunk_rebuild import Rebuild, RebuildBench, rebuild_table
from kvfs_tools.chunk_rig import ChunkRig, check, write_json
from kvfs_tools.chunk_updates import UpdateBench, Updates, updates_table
from kvfs_tools.tables import show

FIO_JOBS = (1, 8, 32)
FIO_DEPTH = 32
"""Of all jobs together."""
CHUNKS_MAX = 2048
"""Of one size: an unlink costs up to a millisecond, and all of a round's chunks are removed."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run: GB/s, and CPU seconds a GB on both sides."""

    rate: float
    client: float = 0.0
    server: float = 0.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """Medians. What was not measured is None."""

    servers: int
    copies: int
    path: str
    chunk_bytes: int
    rounds: int
    rate: float
    client_cpu: float
    server_cpu: float
    fio: float | None = None
    fio_ratio: float | None = None
    pair: float | None = None
    pair_ratio: float | None = None
    pair_client_cpu: float | None = None
    pair_server_cpu: float | None = None
    unpaced: float | None = None
    unpaced_ratio: float | None = None
    unpaced_client_cpu: float | None = None
    unpaced_server_cpu: float | None = None
    one_copy: float | None = None
    one_copy_ratio: float | None = None


def measure(
    rounds: int, limits: Mapping[str, Callable[[], Sample]], figure: Callable[[], Sample]
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """The figure of each round, and by name the better one of the limits around it."""
    figures: list[Sample] = []
    best: dict[str, list[Sample]] = {name: [] for name in limits}
    before = {name: limit() for name, limit in limits.items()}
    for _ in range(rounds):
        figures.append(figure())
        for name, limit in limits.items():
            after = limit()
            best[name].append(max(before[name], after, key=lambda sample: sample.rate))
            before[name] = after
    return figures, best


def median(samples: Sequence[Sample], what: Callable[[Sample], float]) -> float:
    return statistics.median(map(what, samples))


@dataclasses.dataclass
class Bench:
    """Chunks of one size on a rig."""

    rig: ChunkRig
    servers: int
    copies: int
    size: int
    count: int
    rounds: int
    folder: Path
    log: Callable[[str], None]
    figures: list[Figure] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        room = -(-self.size // PAGE_BYTES) * PAGE_BYTES
        # In large pages, as the arena of an agent.
        self._source = large_pages.buffer(self.count * room)
        self._sink = large_pages.buffer(self.count * room)
        for at in range(0, len(self._source), MIB):
            piece = self._source[at : at + MIB]
            piece[:] = os.urandom(len(piece))
        self._sink[:] = bytes(len(self._sink))  # touched: no page faults in the first round
        self._pair: Pair | None = None

    @property
    def total(self) -> int:
        return self.count * self.size

    def run(self) -> list[Figure]:
        stored = self.rig.fill(self._source, self.count, self.size)
        check(self.rig.remote.write_chunks(stored))
        folders = [self._links(stored, number) for number in range(self.servers)]
        whole = self._links(stored, None)
        try:
            disk = {"fio": lambda: Sample(fio_read(str(whole), self._linked(whole), self.size))}
            self._add("local read", disk, lambda: self._read(self.rig.local, stored))
            with contextlib.ExitStack() as stack:
                pairs = {"pair": stack.enter_context(Pair(folders, CLIENT_THREADS_PER_TARGET))}
                if host_paces():
                    unpaced = Pair(folders, CLIENT_THREADS_PER_TARGET, unpaced=True)
                    pairs["unpaced"] = stack.enter_context(unpaced)
                counts = [len(os.listdir(folder)) for folder in folders]
                self._read(self.rig.remote, stored)  # into the page cache
                self._add(
                    "remote read",
                    {
                        name: functools.partial(self._through, pair, pair.read, counts)
                        for name, pair in pairs.items()
                    },
                    lambda: self._read(self.rig.remote, stored),
                )
                disk = {"fio": lambda: Sample(fio_write(self.folder, self.count, self.size))}
                self._add(
                    "local write",
                    disk | self._one_copy(self.rig.local),
                    lambda: self._write(self.rig.local, self.rig.chains),
                )
                self._add(
                    "remote write",
                    disk
                    | {
                        name: functools.partial(self._through, pair, pair.write, counts)
                        for name, pair in pairs.items()
                    }
                    | self._one_copy(self.rig.remote),
                    lambda: self._write(self.rig.remote, self.rig.chains),
                )
        finally:
            for path in (*folders, whole):
                shutil.rmtree(path)
            self.rig.remove(stored)
        return self.figures

    def _add(
        self, path: str, limits: Mapping[str, Callable[[], Sample]], figure: Callable[[], Sample]
    ) -> None:
        figures, best = measure(self.rounds, limits, figure)
        fields: dict[str, float] = {}
        for name, samples in best.items():
            pairs = zip(figures, samples, strict=True)
            fields[name] = median(samples, lambda s: s.rate)
            fields[f"{name}_ratio"] = statistics.median(f.rate / s.rate for f, s in pairs)
        for name in best.keys() & {"pair", "unpaced"}:
            fields[f"{name}_client_cpu"] = median(best[name], lambda s: s.client)
            fields[f"{name}_server_cpu"] = median(best[name], lambda s: s.server)
        found = Figure(
            servers=self.servers,
            copies=self.copies,
            path=path,
            chunk_bytes=self.size,
            rounds=len(figures),
            rate=median(figures, lambda s: s.rate),
            client_cpu=median(figures, lambda s: s.client),
            server_cpu=median(figures, lambda s: s.server),
            **fields,
        )
        self.figures.append(found)
        self.log(f"{self.servers} servers, {format_size(self.size)}, {path}: {found.rate:.2f} GB/s")

    def _timed(
        self, servers: Callable[[], float], body: Callable[[], object], nbytes: int
    ) -> Sample:
        server, client, began = servers(), time.process_time(), time.perf_counter()
        body()
        wall = time.perf_counter() - began
        client, server = time.process_time() - client, servers() - server
        scale = 1e9 / nbytes
        return Sample(nbytes / wall / 1e9, client * scale, server * scale)

    def _read(self, client: ChunkClient, stored: Sequence[ChunkWrite]) -> Sample:
        reads = self.rig.reads_of(stored, self._sink)
        return self._timed(
            self.rig.server_seconds, lambda: check(client.read_chunks(reads)), self.total
        )

    def _one_copy(self, client: ChunkClient) -> dict[str, Callable[[], Sample]]:
        if self.copies == 1:
            return {}
        return {"one_copy": lambda: self._write(client, self.rig.single_chains)}

    def _write(self, client: ChunkClient, chains: Sequence[Chain]) -> Sample:
        writes = self.rig.fill(self._source, self.count, self.size, chains)
        sample = self._timed(
            self.rig.server_seconds, lambda: check(client.write_chunks(writes)), self.total
        )
        self.rig.remove(writes)
        return sample

    def _through(
        self,
        pair: Pair,
        move: Callable[[memoryview, Sequence[int], int], None],
        counts: Sequence[int],
    ) -> Sample:
        """As many bytes over the pair. Where chunks have several copies, those of each server are
        still moved once: the folders hold them all, and the counts are cut to what one copy is."""
        wanted = [count // self.copies for count in counts]
        nbytes = sum(wanted) * self.size
        return self._timed(pair.cpu_seconds, lambda: move(self._sink, wanted, self.size), nbytes)

    def _links(self, stored: Sequence[ChunkWrite], number: int | None) -> Path:
        """A folder with links to the chunk files of one server, or of all."""
        folder = self.folder / f"links-{number}"
        folder.mkdir()
        for one in range(self.servers) if number is None else (number,):
            for path in self.rig.files_of(stored, one):
                os.link(path, folder / f"{one}-{path.name}")
        return folder

    @staticmethod
    def _linked(folder: Path) -> int:
        return sum(entry.stat().st_size for entry in os.scandir(folder))


def fio_write(directory: Path, count: int, size: int) -> float:
    """GB/s of fio's best O_DIRECT write of ``count`` new files: by one job, or by several at once
    that have a folder each, as chunk servers have many (in one, ext4 is slower to find inodes)."""
    best = 0.0
    for jobs in FIO_JOBS:
        if count % jobs:
            continue
        folder = Path(tempfile.mkdtemp(prefix="fio-", dir=directory))
        for number in range(jobs):
            (folder / str(number)).mkdir()
        argv = [
            "fio",
            "--name=limit",
            f"--directory={folder}",
            "--filename_format=$jobnum/$filenum",
            f"--numjobs={jobs}",
            f"--nrfiles={count // jobs}",
            f"--filesize={size}",
            "--openfiles=64",
            "--create_on_open=1",
            "--fallocate=none",
            "--file_service_type=sequential",
            f"--bs={min(size, MIB)}",
            "--rw=write",
            "--direct=1",
            "--ioengine=libaio",
            f"--iodepth={FIO_DEPTH // jobs}",
            "--thread",
            "--group_reporting",
            "--output-format=json",
        ]
        try:
            out = subprocess.run(
                argv, check=True, capture_output=True, text=True, env=fio_environment()
            ).stdout
        finally:
            shutil.rmtree(folder)
        wrote = json.loads(out[out.index("{") :])["jobs"][0]["write"]
        if wrote["io_bytes"] != count * size:
            raise RuntimeError(f"fio wrote {wrote['io_bytes']} bytes")
        best = max(best, float(wrote["bw_bytes"]) / 1e9)
    return best


def table(figures: Sequence[Figure]) -> Table:
    """Without the columns that have nothing in them."""
    out = Table(title="medians; GB/s and CPU seconds a GB (client + server)")
    columns: dict[str, list[str]] = {}

    def add(name: str, value: str | float | None) -> None:
        text = f"{value:.2f}" if isinstance(value, float) else value or ""
        columns.setdefault(name, []).append(text)

    for one in figures:
        add("servers", str(one.servers))
        add("copies", str(one.copies))
        add("chunk", format_size(one.chunk_bytes))
        add("path", one.path)
        add("kvfs", one.rate)
        add("fio", one.fio)
        add("to fio", one.fio_ratio)
        add("pair", one.pair)
        add("to pair", one.pair_ratio)
        add("unpaced", one.unpaced)
        add("to unpaced", one.unpaced_ratio)
        add("one copy", one.one_copy)
        add("to one", one.one_copy_ratio)
        add("CPU", _cpu(one.client_cpu, one.server_cpu))
        add("pair's CPU", _cpu(one.pair_client_cpu, one.pair_server_cpu))
        add("unpaced CPU", _cpu(one.unpaced_client_cpu, one.unpaced_server_cpu))
    filled = {name: values for name, values in columns.items() if any(values)}
    for name in filled:
        out.add_column(name, justify="left" if name == "path" else "right", no_wrap=True)
    for row in zip(*filled.values(), strict=True):
        out.add_row(*row)
    return out


def _cpu(client: float | None, server: float | None) -> str | None:
    return None if client is None or server is None else f"{client:.2f} + {server:.2f}"


def _numbers(text: str, parse: Callable[[str], int], low: int, high: int) -> list[int]:
    try:
        found = [parse(part) for part in text.split(",")]
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc
    if not all(low <= number <= high for number in found):
        raise click.BadParameter(f"{text}: each between {low} and {high}")
    return found


@click.command("bench-chunks")
@click.option("--dir", "directory", help="Where to put the data; a temporary directory otherwise.")
@click.option("--sizes", default="64K,512K,2M,8M", show_default=True, help="Of chunks.")
@click.option("--total-mib", type=click.IntRange(1), default=256, show_default=True)
@click.option("--servers", default="1", show_default=True, help="How many, with commas: 1,2,4.")
@click.option("--replicas", type=click.IntRange(1, 3), default=1, show_default=True)
@click.option(
    "--durability", type=click.Choice(["cache", "strict"]), default="cache", show_default=True
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--rebuild",
    is_flag=True,
    help="Measure only how fast a member that lost its data gets it back.",
)
@click.option(
    "--updates",
    is_flag=True,
    help="Measure only requests of several updates of files: written, synced, cut.",
)
@click.option("--json", "json_path", help="Write the figures here too.")
def bench_chunks(
    *,
    directory: str | None,
    sizes: str,
    total_mib: int,
    servers: str,
    replicas: int,
    durability: str,
    rounds: int,
    rebuild: bool,
    updates: bool,
    json_path: str | None,
) -> None:
    """Measure chunk servers and a chunk client against fio and a plain socket pair.

    A size's data is --total-mib, but at most 2,048 chunks.
    """
    if shutil.which("fio") is None and not rebuild and not updates:
        raise click.ClickException("fio is not installed (apt-get install fio)")
    chunk_sizes = _numbers(sizes, parse_size, 1, BLOCK_BYTES_MAX)
    if any(size % PAGE_BYTES for size in chunk_sizes):
        raise click.BadParameter(f"sizes are multiples of {PAGE_BYTES} bytes")
    if (rebuild or updates) and replicas < 2:
        raise click.BadParameter("--rebuild and --updates take --replicas of 2 or 3")
    figures: list[Figure] = []
    rebuilds: list[Rebuild] = []
    updated: list[Updates] = []
    with tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=directory) as name:
        for number in _numbers(servers, int, 1, 16):
            folder = Path(name, str(number))
            folder.mkdir()
            with ChunkRig(folder / "rig", number, replicas, durability) as rig:
                if rebuild:
                    again = RebuildBench(rig, number, replicas, total_mib * MIB, rounds, _tell)
                    rebuilds += [*map(again.blocks, chunk_sizes), again.files()]
                    continue
                if updates:
                    requests = UpdateBench(rig, replicas, total_mib * MIB, rounds, _tell)
                    for size in chunk_sizes:
                        updated += requests.run(size)
                    continue
                for size in chunk_sizes:
                    total = min(total_mib * MIB, 16 * GIB)
                    count = max(8, min(CHUNKS_MAX, total // size))
                    bench = Bench(rig, number, replicas, size, count, rounds, folder, _tell)
                    figures += bench.run()
    if rebuild:
        show(rebuild_table(rebuilds))
    elif updates:
        show(updates_table(updated))
    else:
        show(table(figures))
    if json_path:
        rows: list[Figure | Rebuild | Updates] = [*figures, *rebuilds, *updated]
        write_json(json_path, [dataclasses.asdict(row) for row in rows])


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
