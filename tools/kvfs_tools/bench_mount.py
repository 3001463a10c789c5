"""``kvfs bench-mount``: the mount, through both front ends, beside the file system that the chunks
lie on and beside other mounts.

A round measures the plain directory, one mount, the plain directory, the next mount: a figure is
held against the mean of its two neighbours. Reported are medians over the rounds, and of the
ratios of each round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from kvfs_base.limits import KIB, MIB
from kvfs_tools import mount_plot
from kvfs_tools.cluster import ClusterFailed, LocalCluster
from kvfs_tools.mount_blocks import BlockFiles, KvBlocks, store_blocks
from kvfs_tools.mount_fio import JOBS, KINDS, SIZES, Fio, workloads
from kvfs_tools.mount_names import Names
from kvfs_tools.mount_rows import Comparison, Row, table
from kvfs_tools.mount_systems import (
    FRONTENDS,
    PEERS,
    SYSTEMS,
    PeerMissing,
    kvfs_mount,
    plain,
)
from kvfs_tools.tables import show

PARTS = ("names", "blocks", "files", "fio")
SETTLED_SECONDS = 10.5
"""An ordinary file is passed through when it was not changed for ten seconds."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and how much of it."""

    frontends: Sequence[str]
    peers: Sequence[str]
    parts: Sequence[str]
    files: int
    blocks: int
    block_bytes: int
    file_bytes: int
    sizes: Sequence[int]
    jobs: Sequence[int]
    kinds: Sequence[str]
    rounds: int


def measure(root: Path, plan: Plan, console: Console) -> list[Row]:
    """Raises ClusterFailed, PeerMissing."""
    with contextlib.ExitStack() as stack:
        comparison = Comparison(
            stack.enter_context(plain(root)), plan.rounds, lambda what: console.print(f"… {what}")
        )
        cluster = stack.enter_context(LocalCluster(root / "kvfs", mount=False))
        chunk_files: list[Path] = []
        if "blocks" in plan.parts:
            chunk_files = store_blocks(cluster, plan.blocks, plan.block_bytes)
        own = [stack.enter_context(kvfs_mount(root, cluster, name)) for name in plan.frontends]
        systems = own + [stack.enter_context(SYSTEMS[name](root)) for name in plan.peers]
        full = [system for system in systems if system.has_bytes]
        files = BlockFiles(comparison, full, plan.blocks, plan.block_bytes)
        fio = Fio(comparison, full, plan.file_bytes, max(plan.jobs))
        if "files" in plan.parts:
            files.prepare()
        if "fio" in plan.parts:
            fio.prepare()
        if {"files", "fio"} & set(plan.parts):
            time.sleep(SETTLED_SECONDS)
        if "names" in plan.parts:
            Names(comparison, systems, plan.files).run()
        if "blocks" in plan.parts:
            KvBlocks(comparison, own, chunk_files).run()
        if "files" in plan.parts:
            files.run()
        if "fio" in plan.parts:
            on_disk = os.major(root.stat().st_dev) > 0  # in memory nothing is cold
            fio.run(list(workloads(plan.sizes, plan.jobs, plan.kinds, cold=on_disk)))
    return comparison.rows


@click.command("bench-mount")
@click.option("--dir", "directory", help="Where to put the data; a temporary directory otherwise.")
@click.option("--files", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=64, show_default=True)
@click.option("--block-kib", type=click.IntRange(4), default=2048, show_default=True)
@click.option(
    "--file-mib", type=click.IntRange(1), default=16, show_default=True, help="fio: bytes a job."
)
@click.option(
    "--sizes",
    default=",".join(f"{size // KIB}" for size in SIZES),
    show_default=True,
    help="fio: KiB a request, with commas.",
)
@click.option("--jobs", default=",".join(map(str, JOBS)), show_default=True, help="fio: jobs.")
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    default=KINDS,
    help="fio: only these; may be repeated.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--frontend",
    "frontends",
    type=click.Choice(FRONTENDS),
    multiple=True,
    default=FRONTENDS,
    help="Which to measure; may be repeated. Both otherwise.",
)
@click.option(
    "--peer",
    "peers",
    type=click.Choice(PEERS),
    multiple=True,
    help="Another file system to measure as well; may be repeated. again: the plain directory a "
    "second time, which shows what is noise. memory: kvfs with its namespace "
    "in the mount's process. empty: a loop that does next to nothing, names only. All need root.",
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    default=PARTS[:3],
    show_default=True,
    help="What to measure; may be repeated.",
)
@click.option("--json", "json_path", help="Write the rows here too.")
@click.option("--plot", "plot_path", help="Draw the ratios into this file (needs matplotlib).")
def bench_mount(
    *,
    directory: str | None,
    files: int,
    blocks: int,
    block_kib: int,
    file_mib: int,
    sizes: str,
    jobs: str,
    kinds: Sequence[str],
    rounds: int,
    frontends: Sequence[str],
    peers: Sequence[str],
    parts: Sequence[str],
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Measure the mount on this machine against the file system below it and other mounts."""
    if "fio" in parts and shutil.which("fio") is None:
        raise click.ClickException("fio is not installed (apt-get install fio)")
    try:
        plan = Plan(
            frontends=frontends,
            peers=peers,
            parts=parts,
            files=files,
            blocks=blocks,
            block_bytes=block_kib * KIB,
            file_bytes=file_mib * MIB,
            sizes=[int(size) * KIB for size in sizes.split(",")],
            jobs=[int(count) for count in jobs.split(",")],
            kinds=kinds,
            rounds=rounds,
        )
    except ValueError as exc:
        raise click.UsageError(f"--sizes and --jobs are numbers with commas: {exc}") from exc
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=directory) as root:
        try:
            rows = measure(Path(root), plan, console)
        except (ClusterFailed, PeerMissing) as exc:
            raise click.ClickException(str(exc)) from exc
    show(table(rows))
    found = [dataclasses.asdict(row) for row in rows]
    if json_path:
        Path(json_path).write_text(json.dumps(found, indent=1))
    if plot_path:
        mount_plot.ratios(Path(plot_path), found)


__all__ = ["Plan", "bench_mount", "measure"]
