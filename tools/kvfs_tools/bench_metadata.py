"""``kvfs bench-metadata``: the metadata service alone, at several sizes, each figure beside a
limit.

Services, clients and the echo that the figures are held against are processes of their own, on
Unix sockets. As in ``kvfs bench`` every row is measured in rounds, limit and figure in turn, and
reported are medians. Every size starts with a new service; files and blocks are measured apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from kvfs_base.limits import GIB, MIB
from kvfs_base.types import KVLayout
from kvfs_metadata import messages as m
from kvfs_tools.bench import Row, interleave
from kvfs_tools.metadata_cluster import Done, MetadataCluster, MetadataProcess
from kvfs_tools.metadata_worker import keys_of
from kvfs_tools.tables import show

CLIENTS = 4
DEPTH = 32
"""Calls in one write where several are on their way at once."""
BATCH = 64
MATCH_KEYS = 1000
DIRECTORY_ENTRIES = 100_000
DIRECTORY_MODE = 0o040755
LOAD_DEPTH = 256
RECORD_BYTES = 80
"""Key and value of a block's record: what a block must at least cost on disk."""
STEPS = ("create", "stat", "rename", "unlink")


@dataclasses.dataclass(frozen=True)
class Figure:
    entries: int
    """Files or blocks in the store."""
    clients: int
    row: Row


@dataclasses.dataclass
class Bench:
    directory: Path
    store: str
    servers: int
    operations: int
    """Calls of each client in each round."""
    rounds: int
    log: Callable[[str], None]
    figures: list[Figure] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._turns = itertools.count()

    def add(self, entries: int, clients: int, row: Row) -> None:
        text = f"{row.value:.4g} {row.unit}, limit {row.limit:.4g}"
        self.log(f"{entries} {row.path}, {clients} clients: {text}")
        self.figures.append(Figure(entries, clients, row))

    def cluster(self, kind: str, entries: int) -> MetadataCluster:
        folder = self.directory / f"{kind}-{entries}"
        return MetadataCluster(folder, store=self.store, servers=self.servers, clients=CLIENTS)

    def echo_rate(self, cluster: MetadataCluster, clients: int, like: Done, depth: int) -> float:
        """Exchanges a second of the same bytes as the calls of ``like``, by as many clients."""
        count = max(depth, self.operations // depth * depth)
        order = {"do": "echo", "sent": like.sent, "received": like.received}
        return cluster.crew.do([{**order, "count": count, "depth": depth}] * clients).rate

    # --- files

    def files(self, entries: int) -> None:
        with self.cluster("files", entries) as cluster:
            empty = cluster.servers[0].resident_bytes()
            root = cluster.call(m.Make(1, f"bench-{entries}".encode(), DIRECTORY_MODE)).inode
            parent = self._load_files(cluster, root, entries)
            self._memory(cluster, "files", entries, empty)
            for clients in (1, CLIENTS):
                for depth in (1, DEPTH):
                    self._steps(cluster, parent, entries, clients, depth)
            self._readdir(cluster, parent, entries)
            first = m.Lookup(parent, b"file-%08d" % 0)
            self._restart(cluster, "files", entries, first, lambda reply: reply.inode > 0)

    def _load_files(self, cluster: MetadataCluster, root: int, entries: int) -> int:
        """Answers the first directory of at most DIRECTORY_ENTRIES files."""
        begin = time.monotonic()
        parents: list[int] = []
        for number in range(-(-entries // DIRECTORY_ENTRIES)):
            parent = cluster.call(m.Make(root, b"%04d" % number, DIRECTORY_MODE)).inode
            size = min(DIRECTORY_ENTRIES, entries - number * DIRECTORY_ENTRIES)
            order = {"do": "create", "parent": parent, "prefix": "file-", "depth": LOAD_DEPTH}
            cluster.crew.do([{**order, **share} for share in _shares(size)])
            parents.append(parent)
        self.log(f"{entries} files loaded in {time.monotonic() - begin:.1f} s")
        return parents[0]

    def _steps(
        self, cluster: MetadataCluster, parent: int, entries: int, clients: int, depth: int
    ) -> None:
        """A round creates, stats, renames and unlinks the same names, each client its own."""
        pairs: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
        cpu: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
        like: dict[str, Done] = {}
        for turn in range(-1, self.rounds):  # the first warms up and tells how many bytes travel
            before = 0.0
            for step in STEPS:
                if turn >= 0:
                    before = before or self.echo_rate(cluster, clients, like[step], depth)
                order = {"do": step, "parent": parent, "first": 0, "count": self.operations}
                begun = cluster.cpu_seconds()
                done = cluster.crew.do(
                    [{**order, "prefix": f"new-{n}-", "depth": depth} for n in range(clients)]
                )
                used = cluster.cpu_seconds() - begun
                like[step] = done
                if turn >= 0:
                    begun = cluster.crew.echo_cpu_seconds()
                    after = self.echo_rate(cluster, clients, done, depth)
                    echo = cluster.crew.echo_cpu_seconds() - begun
                    pairs[step].append((done.rate, max(before, after)))
                    cpu[step].append((1e6 * used / done.count, 1e6 * echo / done.count))
                    before = after
        how = "one at a time" if depth == 1 else f"{depth} in one write"
        for step in STEPS:
            limit = "a bare socket round trip of the same bytes"
            self.add(entries, clients, Row.of(f"{step}, {how}", "/s", pairs[step], "", limit))
        if clients == depth == 1:
            for step in STEPS:
                limit = "the echo's"
                self.add(entries, clients, Row.of(f"{step}, CPU", "us", cpu[step], "", limit))

    def _readdir(self, cluster: MetadataCluster, parent: int, entries: int) -> None:
        def listing() -> Done:
            return cluster.crew.do([{"do": "readdir", "inode": parent}])

        like = listing()
        pages = -(-like.count // 4096)
        order = {"do": "echo", "sent": like.sent, "received": like.received}

        def echo() -> float:
            done = cluster.crew.do([{**order, "count": pages, "depth": 1}])
            return like.count / done.seconds

        pairs = interleave(self.rounds, echo, lambda: listing().rate)
        path = f"readdir of {like.count} entries"
        self.add(entries, 1, Row.of(path, "entries/s", pairs, "", "the same bytes in pages"))

    # --- blocks

    def blocks(self, entries: int) -> None:
        with self.cluster("blocks", entries) as cluster:
            empty = cluster.servers[0].resident_bytes()
            request = m.OpenNamespace(f"bench/{entries}", KVLayout(block_tokens=16), create=True)
            namespace = cluster.call(request).inode
            self._load_blocks(cluster, namespace, entries)
            self._memory(cluster, "blocks", entries, empty)
            self._memory_a_block(cluster, entries, empty, "as stored")
            if not self.store:
                self._store_size(cluster.servers[0], entries)
            self._match(cluster, namespace, entries)
            for clients in (1, CLIENTS):
                self._put(cluster, namespace, entries, clients)
            size = min(entries, MATCH_KEYS)
            first = m.MatchBlocks(namespace, keys_of("stored", 0, size))
            self._restart(cluster, "blocks", entries, first, lambda reply: reply == size)
            self._memory_a_block(cluster, entries, empty, "after a restart")

    def _load_blocks(self, cluster: MetadataCluster, namespace: int, entries: int) -> None:
        begin = time.monotonic()
        order = {"do": "put", "namespace": namespace, "tag": "stored", "batch": BATCH}
        cluster.crew.do([{**order, **share, "depth": 8} for share in _shares(entries)])
        self.log(f"{entries} blocks loaded in {time.monotonic() - begin:.1f} s")

    def _match(self, cluster: MetadataCluster, namespace: int, entries: int) -> None:
        order = {"do": "match", "namespace": namespace, "tag": "stored", "stored": entries}
        size = min(entries, MATCH_KEYS)
        count = max(1, self.operations // 10)

        def match(clients: int) -> Done:
            orders = [
                {**order, "size": size, "count": count, "seed": next(self._turns)}
                for _ in range(clients)
            ]
            return cluster.crew.do(orders)

        like = match(1)
        limit = "a bare socket round trip of the same bytes"
        pairs = interleave(
            self.rounds,
            lambda: 1e3 / self.echo_rate(cluster, 1, like, 1),
            lambda: 1e3 * size / match(1).rate,
            min,
        )
        self.add(entries, 1, Row.of(f"match of {size} keys", "ms", pairs, "<= 2 ms", limit))
        pairs = interleave(
            self.rounds,
            lambda: size * self.echo_rate(cluster, CLIENTS, like, 1),
            lambda: match(CLIENTS).rate,
        )
        self.add(entries, CLIENTS, Row.of("names matched", "names/s", pairs, ">= 300,000", limit))

    def _put(self, cluster: MetadataCluster, namespace: int, entries: int, clients: int) -> None:
        """New blocks each round, removed afterwards."""
        count = max(BATCH, self.operations // 10 * BATCH)
        limit = _LmdbPuts(cluster.directory / f"limit-{clients}")

        def put() -> float:
            turn = next(self._turns)
            orders = [
                {"namespace": namespace, "tag": f"new-{turn}-{n}", "first": 0, "count": count}
                for n in range(clients)
            ]
            done = cluster.crew.do([{"do": "put", **o, "batch": BATCH, "depth": 1} for o in orders])
            cluster.crew.do([{"do": "remove", **order} for order in orders])
            return done.rate

        put()
        pairs = interleave(self.rounds, lambda: limit.rate(count), put)
        limit.close()
        path = f"put (prepare, commit) of {BATCH} blocks"
        row = Row.of(
            path, "blocks/s", pairs, ">= 20,000", "LMDB: the same records, as many a commit"
        )
        self.add(entries, clients, row)

    def _store_size(self, server: MetadataProcess, entries: int) -> None:
        size = os.stat(server.directory / "data.mdb").st_size
        import lmdb

        # A second process may look on: it takes a reader's slot of its own.
        with lmdb.open(str(server.directory), readonly=True) as environment:
            stat = environment.stat()
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        live = pages * stat["psize"]
        for path, value in (("store, its file", size), ("store, pages in use", live)):
            pairs = [(value / entries, float(RECORD_BYTES))]
            row = Row.of(f"{path}, a block", "bytes", pairs, "", "key and value of its record")
            self.add(entries, 0, row)

    # --- both

    def _memory(self, cluster: MetadataCluster, kind: str, entries: int, empty: int) -> None:
        pairs = [(cluster.servers[0].resident_bytes() / MIB, empty / MIB)]
        path = f"service memory, {kind}"
        self.add(entries, 0, Row.of(path, "MiB", pairs, "", "the same service, empty"))

    def _memory_a_block(
        self, cluster: MetadataCluster, entries: int, empty: int, when: str
    ) -> None:
        taken = (cluster.servers[0].resident_bytes() - empty) / entries
        path, limit = f"service memory a block, {when}", "key and value of its record"
        row = Row.of(path, "bytes", [(taken, float(RECORD_BYTES))], "<= 300", limit)
        self.add(entries, 0, row)

    def _restart(
        self,
        cluster: MetadataCluster,
        kind: str,
        entries: int,
        first: Any,
        check: Callable[[Any], bool],
    ) -> None:
        """kill -9, start, first answer; the limit is a service that has nothing to load. Where
        others use the machine too, the processor's time says more than the clock's."""
        cluster.heart.remove_everything()  # or what the rounds before left is loaded as well
        server = cluster.servers[0]
        nothing = MetadataProcess(cluster.directory / "nothing", cluster.sockets)
        used: list[float] = []

        def restart() -> float:
            server.kill()
            seconds = server.start(first, check)
            used.append(server.cpu_seconds())
            return seconds

        def start_empty() -> float:
            seconds = nothing.start(m.StatFs())
            used.append(nothing.cpu_seconds())
            nothing.stop()
            return seconds

        try:
            pairs = interleave(self.rounds, start_empty, restart, min)
        finally:
            nothing.stop()
        path, limit = f"restart after kill -9, {kind}", "an empty service's start"
        self.add(entries, 1, Row.of(path, "s", pairs, "< 1 s", limit))
        pairs = list(zip(used[1::2], used[2::2], strict=True))
        self.add(entries, 1, Row.of(f"{path}, CPU", "s", pairs, "", limit))


class _LmdbPuts:
    """A bare environment that gets the records of a put, as many a transaction."""

    def __init__(self, path: Path) -> None:
        import lmdb

        self._lmdb = lmdb.open(str(path), map_size=8 * GIB, sync=False, metasync=False)
        self._next = itertools.count()

    def rate(self, count: int) -> float:
        """Blocks a second."""
        value = bytes(RECORD_BYTES - 12)
        begin = time.perf_counter()
        for _ in range(count // BATCH):
            with self._lmdb.begin(write=True) as txn:
                for _ in range(BATCH):
                    txn.put(b"BLCK" + next(self._next).to_bytes(8, "big"), value)
        return count / (time.perf_counter() - begin)

    def close(self) -> None:
        self._lmdb.close()


def _shares(count: int) -> list[dict[str, int]]:
    """``count`` things in a row, one part a client."""
    bounds = [count * part // CLIENTS for part in range(CLIENTS + 1)]
    return [
        {"first": first, "count": end - first}
        for first, end in itertools.pairwise(bounds)
        if end > first
    ]


def table(figures: Sequence[Figure]) -> Table:
    out = Table("entries", "clients", "what", "kvfs", "limit", "ratio", "target", "limit is")
    for figure in figures:
        row = figure.row
        out.add_row(
            f"{figure.entries:,}",
            str(figure.clients or ""),
            row.path,
            f"{row.value:,.4g} {row.unit}",
            f"{row.limit:,.4g}",
            f"{row.ratio:.2f}",
            row.target,
            row.limit_is,
        )
    return out


def as_json(figures: Sequence[Figure]) -> str:
    rows = [
        {"entries": f.entries, "clients": f.clients, **dataclasses.asdict(f.row)} for f in figures
    ]
    return json.dumps(rows, indent=1)


def _scales(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    try:
        scales = [int(part) for part in value.split(",")]
    except ValueError:
        scales = []
    if not scales or min(scales) < 1:
        raise click.BadParameter("numbers with commas between them")
    return scales


@click.command("bench-metadata")
@click.option("--dir", "directory", help="Where to put the data; a temporary directory otherwise.")
@click.option(
    "--scale",
    default="10000",
    show_default=True,
    callback=_scales,
    metavar="N,N,...",
    help="Files, and blocks, in the store; each size is measured.",
)
@click.option(
    "--operations",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Calls of each client in each round.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--store", default="", help="Passed on to `kvfs serve metadata`. It must be empty.")
@click.option(
    "--servers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Services on that store; the clients are spread over them.",
)
@click.option("--json", "json_path", help="Write the rows here too.")
def bench_metadata(
    *,
    directory: str | None,
    scale: list[int],
    operations: int,
    rounds: int,
    store: str,
    servers: int,
    json_path: str | None,
) -> None:
    """Measure the metadata service on this machine against its limits.

    With --store give one scale: the store is filled, and not emptied between sizes.
    """
    if servers > 1 and not store:
        raise click.UsageError("several servers need a --store that they share")
    if store and len(scale) > 1:
        raise click.UsageError("one --scale for a --store: it is not emptied in between")
    with tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=directory) as folder:
        bench = Bench(
            Path(folder),
            store,
            servers,
            operations,
            rounds,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        for entries in scale:
            bench.files(entries)
            bench.blocks(entries)
    show(table(bench.figures))
    if json_path:
        Path(json_path).write_text(as_json(bench.figures))


__all__ = ["Bench", "Figure", "bench_metadata"]
