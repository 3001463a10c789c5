"""Tables of benchmarks on a terminal, or in a file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show(table: Table) -> None:
    """No narrower than it is: a figure that is cut off is of no use, a line that is wrapped is."""
    console = Console()
    wanted = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if wanted > console.width:
        console = Console(width=wanted)
    console.print(table)


__all__ = ["show"]
