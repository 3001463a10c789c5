"""Plots of what the GPU benchmarks measured (matplotlib, imported when it is needed)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGED = (
    "arena, paged",
    "kernel alone",
    "loop of cudaMemcpyAsync",
    "cudaMemcpyBatchAsync",
    "cudaMemcpyBatchAsync, 256 a call",
)


def _axes(count: int, width: float = 6.0) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvfs"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, 4.2), layout="constrained")
    return figure, axes


def loader(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """GB/s against the size of a fragment with the limit, and every other path as a bar."""
    figure, (left, right) = _axes(2)
    for name in PAGED:
        points = sorted((r["fragment_bytes"] / 1024, r["gbps"]) for r in rows if r["path"] == name)
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=name)
    limits = sorted(
        (r["fragment_bytes"] / 1024, r["limit_gbps"]) for r in rows if r["path"] == PAGED[0]
    )
    if limits:
        left.plot(*zip(*limits, strict=True), "k--", label="limit: pinned copy")
    left.set_xscale("log", base=2)
    left.set_ylim(bottom=0)
    left.set_xlabel("fragment, KiB")
    left.set_ylabel("GB/s")
    left.set_title("Host to paged KV on the GPU")
    left.legend(loc="lower right")
    others = [r for r in rows if r["path"] not in PAGED]
    names = [r["path"] for r in others]
    right.barh(names, [r["limit_gbps"] for r in others], color="0.85", label="limit")
    right.barh(names, [r["gbps"] for r in others], height=0.5, label="measured")
    right.invert_yaxis()
    right.set_xlabel("GB/s")
    right.set_title("Other paths")
    right.legend(loc="lower right")
    figure.savefig(path)


def first_token(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Time to first token by prompt length, a group of bars for each stored fraction."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = _axes(max(1, len(models)), 7.0)
    for axis, model in zip([axes] if len(models) < 2 else axes, models, strict=True):
        mine = [r for r in rows if r["model"] == model]
        bars = [
            (f"{r['tokens'] // 1024}k, {r['stored_fraction']:.0%}\n{r['path']}", r) for r in mine
        ]
        axis.bar(
            range(len(bars)), [r["recompute_s"] for _, r in bars], color="0.85", label="compute"
        )
        axis.bar(range(len(bars)), [r["ttft_s"] for _, r in bars], width=0.5, label="measured")
        axis.set_xticks(range(len(bars)), [name for name, _ in bars], rotation=90, fontsize=6)
        axis.set_yscale("log")
        axis.set_ylabel("time to first token, s")
        axis.set_title(model)
        axis.legend()
    figure.savefig(path)
