"""``kvfs bench-gpu``: KV from the arena, the disk and files to a GPU, each beside its limit.

Everything runs against a ``kvfs up`` of its own, through the loader that users have. Each figure is
taken between two of its limit in the same run (as ``kvfs bench``), and the better of these counts.
Rows are {path, fragment_bytes, gbps, limit_gbps, ratio, limit_is, cpu_seconds_per_gb, rounds}.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvfs_base.limits import KIB, MIB
from kvfs_tools import gpu_plot
from kvfs_tools.gpu_rig import Rig, Row

SECTIONS = ("arena", "copies", "store", "processes", "devices", "disk", "files")


def _sections() -> dict[str, Callable[[Rig], list[Row]]]:
    from kvfs_tools import gpu_devices, gpu_disk, gpu_rows

    return {
        "arena": gpu_rows.arena,
        "copies": gpu_rows.copies,
        "store": gpu_rows.store,
        "processes": gpu_rows.processes,
        "devices": gpu_devices.devices,
        "disk": gpu_disk.disk,
        "files": gpu_disk.files,
    }


def show(row: Row) -> None:
    fragment = f"{row.fragment_bytes // KIB:7d} KiB" if row.fragment_bytes else " " * 11
    click.echo(
        f"{row.path:44s}{fragment} {row.gbps:6.2f} GB/s of {row.limit_gbps:6.2f} {row.ratio:5.2f}"
        f"  cpu {row.cpu_seconds_per_gb:5.3f} s/GB"
    )


def write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: a run that is ended keeps what it had."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, path)


@click.command("bench-gpu")
@click.option("--dir", "directory", help="Where the cluster lives; on the disk to be measured.")
@click.option("--total-mib", type=click.IntRange(64), default=2048, show_default=True)
@click.option("--block-mib", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--device", default="cuda", show_default=True, help="cuda, or cpu to try it out.")
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="Some sections alone.")
@click.option("--json", "json_path", help="Write the rows here too, after each section.")
@click.option("--plot", "plot_path", help="Draw them into this file (needs matplotlib).")
@click.option("--commit", default="", help="Recorded in the file: what was measured.")
def bench_gpu(
    *,
    directory: str | None,
    total_mib: int,
    block_mib: int,
    rounds: int,
    device: str,
    only: tuple[str, ...],
    json_path: str | None,
    plot_path: str | None,
    commit: str,
) -> None:
    """Measure loads and stores of paged KV on a CUDA device."""
    folder = Path(tempfile.mkdtemp(prefix="kvfs-bench-gpu-", dir=directory))
    rows: list[Row] = []
    failed: list[str] = []
    try:
        with Rig(folder, device, total_mib * MIB, block_mib * MIB, rounds) as rig:
            for name, section in _sections().items():
                if only and name not in only:
                    continue
                try:
                    found = section(rig)
                except Exception as exc:
                    failed.append(f"{name}: {type(exc).__name__}: {exc}")
                    click.echo(failed[-1], err=True)
                    continue
                rows += found
                for row in found:
                    show(row)
                if json_path:
                    write(Path(json_path), rig.report(commit, rows, failed))
        if plot_path:
            gpu_plot.loader(Path(plot_path), [row.as_dict() for row in rows])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise click.ClickException(f"{len(failed)} sections failed")


if __name__ == "__main__":
    bench_gpu()
