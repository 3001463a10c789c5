"""How fast a member of chains that has lost everything is brought in step again.

A round stores data, kills one server, empties its disk, starts it again and waits until every chain
has all its copies. The data are blocks of one size, or files (chunks of CHAIN_CHUNK_BYTES, written
by appends). Beside it stands the rate at which a client stored them over TCP, on all copies. What
the other servers read of their disks meanwhile tells how evenly they shared the work.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import statistics
import time
from collections.abc import Callable

import click
from rich.table import Table

from kvfs.settings import format_size
from kvfs_base.limits import (
    CHAIN_CHUNK_BYTES,
    MIB,
    PAGE_BYTES,
    STRIPE_MAX,
)
from kvfs_base.types import Layout
from kvfs_datapath.client.files import StripedFile
from kvfs_tools.chunk_rig import ChunkRig, check

FILE_INODE = 1 << 41
FILE_BYTES = 16 * MIB


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """Medians of ``rounds``."""

    servers: int
    copies: int
    what: str
    chunk_bytes: int
    rounds: int
    lost_bytes: float
    seconds: float
    rate: float
    """GB/s."""
    write_rate: float
    """GB/s of payload, stored on all copies."""
    spread: float
    """The most that one of the other servers read, by what they read on average."""


@dataclasses.dataclass
class RebuildBench:
    rig: ChunkRig
    servers: int
    copies: int
    total: int
    rounds: int
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._source = memoryview(mmap.mmap(-1, -(-self.total // PAGE_BYTES) * PAGE_BYTES))
        for at in range(0, len(self._source), MIB):
            piece = self._source[at : at + MIB]
            piece[:] = os.urandom(len(piece))
        self._inodes = itertools.count(FILE_INODE)

    def blocks(self, size: int) -> Rebuild:
        def write() -> None:
            count = max(1, self.total // size)
            check(self.rig.remote.write_chunks(self.rig.fill(self._source, count, size)))

        return self._measure("blocks", size, write)

    def files(self) -> Rebuild:
        chains = tuple(chain.chain_id for chain in self.rig.chains)

        def write() -> None:
            for number, at in enumerate(range(0, self.total, FILE_BYTES)):
                first = number * STRIPE_MAX % len(chains)
                layout = Layout(CHAIN_CHUNK_BYTES, (chains[first:] + chains[:first])[:STRIPE_MAX])
                file = StripedFile(self.rig.remote, next(self._inodes), layout)
                file.write(0, self._source[at : at + FILE_BYTES][: self.total - at])
                file.close()

        return self._measure("files", CHAIN_CHUNK_BYTES, write)

    def _measure(self, what: str, size: int, write: Callable[[], None]) -> Rebuild:
        rounds: list[tuple[float, float, float, float, float]] = []
        for number in range(self.rounds):
            began = time.perf_counter()
            write()
            write_rate = self.total / (time.perf_counter() - began) / 1e9
            rounds.append((*self._round(number % self.servers), write_rate))
            self.rig.clear()
        lost, seconds, rate, spread, write_rate = map(statistics.median, zip(*rounds, strict=True))
        found = Rebuild(
            self.servers,
            self.copies,
            what,
            size,
            len(rounds),
            lost,
            seconds,
            rate,
            write_rate,
            spread,
        )
        self.log(f"{what} of {format_size(size)}: {rate:.3f} GB/s, written at {write_rate:.3f}")
        return found

    def _round(self, number: int) -> tuple[float, float, float, float]:
        """Bytes lost, seconds, GB/s and spread."""
        lost = self.rig.lose(number)
        before = self.rig.bytes_read(besides=number)
        seconds = self.rig.bring_back(number)
        after = self.rig.bytes_read(besides=number)
        if self.rig.held(number) != lost:
            raise click.ClickException(f"{self.rig.held(number)} of {lost} bytes came back")
        read = [a - b for a, b in zip(after, before, strict=True)]
        return lost, seconds, lost / seconds / 1e9, max(read) / statistics.mean(read)


def rebuild_table(found: list[Rebuild]) -> Table:
    out = Table(title="a member that lost everything is brought in step; medians, MB/s")
    for name in ("servers", "copies", "what", "lost", "seconds", "rebuilt", "written", "spread"):
        out.add_column(name, justify="left" if name == "what" else "right")
    for one in found:
        out.add_row(
            str(one.servers),
            str(one.copies),
            f"{one.what} of {format_size(one.chunk_bytes)}",
            f"{one.lost_bytes / 1e6:.0f} MB",
            f"{one.seconds:.2f}",
            f"{one.rate * 1e3:.0f}",
            f"{one.write_rate * 1e3:.0f}",
            f"{one.spread:.2f}",
        )
    return out
