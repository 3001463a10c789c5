"""Figures of several mounts, each held against the file system below in the same round."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from kvfs_tools.cluster import cpu_clock
from kvfs_tools.mount_systems import System

GB = 1e9

MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23
"""Of linux/mman.h; the second one since Linux 5.14."""


def have_memory(nbytes: int) -> None:
    """The machine has so much free memory afterwards that it can use at once. A virtual one gives
    what is free back to its host after a while, and gets it anew page by page, which takes ten
    times as long as to write to it: whoever comes first would pay for the others. Large pages are
    what the kernel takes for a file's."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        try:
            room.madvise(MADV_HUGEPAGE)
            room.madvise(MADV_POPULATE_WRITE)
        except OSError:
            for at in range(0, nbytes, mmap.PAGESIZE):
                room[at] = 1


@dataclasses.dataclass
class Timer:
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextlib.contextmanager
def timed(system: System) -> Iterator[Timer]:
    """How long the block takes, and the CPU time of the system's own processes meanwhile."""
    timer = Timer()
    used = sum(map(cpu_clock, system.processes))
    begin = time.perf_counter()
    yield timer
    timer.seconds = time.perf_counter() - begin
    timer.cpu_seconds = sum(map(cpu_clock, system.processes)) - used


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one measurement gave. ``amount``: operations or bytes."""

    amount: float
    seconds: float
    cpu_seconds: float = 0.0

    @classmethod
    def of(cls, amount: float, timer: Timer) -> Sample:
        return cls(amount, timer.seconds, timer.cpu_seconds)

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


Measure = Callable[[System], Sample]


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians over the rounds: the rate of each system and of the file system below (``plain``),
    and of the ratios of every round. Units: operations a second, or GB/s."""

    what: str
    unit: str
    plain: float
    figures: dict[str, float]
    ratios: dict[str, float]
    """To the file system below: the mean of what it did before and after. (The better of the two
    holds a file system against itself at 0.88 to 1.0, for what it differs from turn to turn.)"""
    lead: dict[str, float]
    """The first system's figure to each other's."""
    cpu: dict[str, float]
    """CPU time of a system's mount: microseconds an operation, or seconds for 10^9 bytes. What
    others on the machine do changes it less than the rates."""
    rounds: int

    @classmethod
    def of(
        cls,
        what: str,
        unit: str,
        rounds: Sequence[dict[str, Sample]],
        limits: Sequence[dict[str, float]],
    ) -> Row:
        """By system, ``rounds`` has its samples and ``limits`` the rates to hold them against."""
        names = list(rounds[0])
        scale = GB if unit == "GB/s" else 1.0
        median = statistics.median
        pairs = list(zip(rounds, limits, strict=True))
        amounts = {n: sum(r[n].amount for r in rounds) for n in names}
        spent = {n: sum(r[n].cpu_seconds for r in rounds) for n in names}
        return cls(
            what=what,
            unit=unit,
            plain=median(limit[n] for limit in limits for n in names) / scale,
            figures={n: median(r[n].rate for r in rounds) / scale for n in names},
            ratios={n: median(r[n].rate / limit[n] for r, limit in pairs) for n in names},
            lead={n: median(r[names[0]].rate / r[n].rate for r in rounds) for n in names[1:]},
            cpu={n: spent[n] / amounts[n] * (GB if unit == "GB/s" else 1e6) for n in names},
            rounds=len(rounds),
        )


class Comparison:
    """Adds rows: ``plain``, one system, ``plain``, the next system, and so on, ``rounds`` times."""

    def __init__(
        self, plain: System, rounds: int, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.rows: list[Row] = []
        self.plain = plain
        self._rounds = rounds
        self._progress = progress

    def add(
        self,
        what: str,
        unit: str,
        systems: Sequence[System],
        measure: Measure,
        *,
        warm_up: bool = True,
    ) -> None:
        """``unit``: "/s" or "GB/s". With ``warm_up`` each is measured once before, for what is made
        on first use."""
        self._progress(what)
        if warm_up:
            for system in systems:
                measure(system)
        rounds: list[dict[str, Sample]] = []
        limits: list[dict[str, float]] = []
        before = measure(self.plain).rate
        for _ in range(self._rounds):
            rounds.append({})
            limits.append({})
            for system in systems:
                rounds[-1][system.name] = measure(system)
                after = measure(self.plain).rate
                limits[-1][system.name] = (before + after) / 2
                before = after
        self.rows.append(Row.of(what, unit, rounds, limits))


def table(rows: Sequence[Row]) -> Table:
    out = Table("what", "unit", "backing")
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    for name in names:
        out.add_column(name, justify="right")
        out.add_column("ratio", justify="right")
        out.add_column("CPU", justify="right")
    for row in rows:
        cells = [row.what, row.unit, f"{row.plain:,.3g}"]
        for name in names:
            if name not in row.figures:
                cells += ["", "", ""]
                continue
            cpu = f"{row.cpu[name]:.2g} s/GB" if row.unit == "GB/s" else f"{row.cpu[name]:.0f} us"
            cells += [f"{row.figures[name]:,.4g}", f"{row.ratios[name]:.2f}", cpu]
        out.add_row(*cells)
    return out


__all__ = ["Comparison", "Measure", "Row", "Sample", "Timer", "table", "timed"]
