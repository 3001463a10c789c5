"""Tables of benchmarks on a terminal, or in a file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kvfs_base.os_cpu import sleeps_at_once

IDLE_NOTE = (
    "Idle cores of this virtual machine go to its host at once (guest_halt_poll_ns is 0): small "
    "requests take up to twice as long as elsewhere (docs/benchmarks.md, Idle cores)."
)


def show(table: Table) -> None:
    """No narrower than it is: a figure that is cut off is of no use, a line that is wrapped is."""
    console = Console()
    wanted = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if wanted > console.width:
        console = Console(width=wanted)
    console.print(table)
    if sleeps_at_once():
        console.print(IDLE_NOTE)


__all__ = ["show"]
