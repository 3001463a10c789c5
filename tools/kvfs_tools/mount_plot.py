"""A plot of what ``kvfs bench-mount`` measured (matplotlib, imported when it is needed)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def ratios(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every row's ratio to the file system below, a bar for each system, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvfs"
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    figure, axis = pyplot.subplots(figsize=(9, 0.35 * len(rows) + 1.5), layout="constrained")
    height = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        mine = [(i, row["ratios"][name]) for i, row in enumerate(rows) if name in row["ratios"]]
        at = [index - 0.4 + height * (place + 0.5) for index, _ in mine]
        axis.barh(at, [ratio for _, ratio in mine], height=height, label=name)
    axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("rate, to that of the file system below")
    axis.legend(loc="upper left", fontsize=7)
    figure.savefig(path)


__all__ = ["ratios"]
