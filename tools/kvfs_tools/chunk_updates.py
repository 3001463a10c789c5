"""What a request of several updates costs on chains of several copies.

A round writes new chunks of one file over TCP, UPDATES of them a request and one request after the
other, so that all that goes on at the same time is within a request; then syncs as many a request,
and then cuts the file to nothing, with one request a chain.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence

from rich.table import Table

from kvfs.settings import format_size
from kvfs_base import threads
from kvfs_base.limits import CHAIN_CHUNK_BYTES
from kvfs_base.os_env import os_env
from kvfs_datapath import messages as m
from kvfs_datapath.client.outcomes import raise_first
from kvfs_datapath.client.patience import Patience
from kvfs_datapath.client.updates import Change, Way
from kvfs_tools.chunk_rig import ChunkRig

UPDATES = 8
"""Of a request: what the client sends of 1 MiB chunks in one."""
FIRST_INODE = 1 << 42


@dataclasses.dataclass(frozen=True)
class Updates:
    """Medians of ``rounds``."""

    copies: int
    what: str
    chunk_bytes: int
    rounds: int
    milliseconds: float
    """For UPDATES chunks."""
    cpu_milliseconds: float
    """Of all servers."""


@dataclasses.dataclass
class UpdateBench:
    rig: ChunkRig
    copies: int
    total: int
    rounds: int
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._updater = self.rig.remote.updater
        self._inodes = itertools.count(FIRST_INODE)
        self._patience = Patience(os_env(), threads.event(), 30.0)

    def run(self, size: int) -> list[Updates]:
        size = min(size, CHAIN_CHUNK_BYTES)
        requests = max(1, min(self.total // size, 1024) // UPDATES)
        memory = memoryview(mmap.mmap(-1, UPDATES * size))
        memory[:] = os.urandom(len(memory))
        data = [memory[n * size : (n + 1) * size] for n in range(UPDATES)]
        rounds: dict[str, list[tuple[float, float]]] = {}
        for number in range(self.rounds):
            chain = self.rig.chains[number % len(self.rig.chains)].chain_id
            inode = next(self._inodes)
            groups = [range(n * UPDATES, (n + 1) * UPDATES) for n in range(requests)]
            steps: dict[str, Callable[[range], None]] = {
                "written": functools.partial(self._write, chain, inode, data),
                "synced": functools.partial(self._sync, chain, inode),
            }
            for what, step in steps.items():
                sample = self._timed(functools.partial(_each, step, groups), requests)
                rounds.setdefault(what, []).append(sample)
            whole = range(requests * UPDATES)
            cut = self._timed(functools.partial(self._cut, chain, inode, whole), requests)
            rounds.setdefault("cut", []).append(cut)
            self.rig.clear()
        found = [
            Updates(
                self.copies,
                what,
                size,
                self.rounds,
                statistics.median(wall for wall, _ in samples) * 1e3,
                statistics.median(cpu for _, cpu in samples) * 1e3,
            )
            for what, samples in rounds.items()
        ]
        for one in found:
            self.log(f"{one.what}, {format_size(size)}: {one.milliseconds:.2f} ms")
        return found

    def _timed(self, body: Callable[[], None], requests: int) -> tuple[float, float]:
        """Seconds, and CPU seconds of the servers, for UPDATES chunks."""
        server, began = self.rig.server_seconds(), time.perf_counter()
        body()
        wall = time.perf_counter() - began
        return wall / requests, (self.rig.server_seconds() - server) / requests

    def _write(self, chain: int, inode: int, data: Sequence[memoryview], numbers: range) -> None:
        changes = [
            Change(inode, number, 0, piece, base=0)
            for number, piece in zip(numbers, data, strict=True)
        ]
        self._updater.update(chain, changes, self._patience)

    def _sync(self, chain: int, inode: int, numbers: range) -> None:
        refs = self._updater.refs(inode, numbers, chain)
        self._ask(chain, lambda target, passing: m.SyncChunks(target, refs, passing))

    def _cut(self, chain: int, inode: int, numbers: range) -> None:
        writer, sequence = self._updater.number()
        self._ask(
            chain,
            lambda target, passing: m.RemoveRange(
                target, inode, 0, numbers.stop, writer, passing, sequence
            ),
        )

    def _ask(self, chain: int, request: Callable[[int, m.Passing], m.ChunkRequest]) -> None:
        def act(way: Way) -> None:
            asked = request(way.target_id, m.Passing(way.routes.chain_id, way.routes.version))
            pool = self.rig.remote.shared.pool
            raise_first(pool.run(way.route.address, lambda c: c.call(asked), seconds=60.0))

        self._updater.at_head(chain, act, self._patience)


def _each(step: Callable[[range], None], groups: Sequence[range]) -> None:
    for group in groups:
        step(group)


def updates_table(found: Sequence[Updates]) -> Table:
    out = Table(title=f"{UPDATES} chunks of a file, ms; medians")
    for name in ("copies", "chunk", "what", "ms", "CPU, all servers"):
        out.add_column(name, justify="left" if name == "what" else "right")
    for one in found:
        out.add_row(
            str(one.copies),
            format_size(one.chunk_bytes),
            one.what,
            f"{one.milliseconds:.2f}",
            f"{one.cpu_milliseconds:.2f}",
        )
    return out
