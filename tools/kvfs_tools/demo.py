"""`kvfs demo`: conversations on a real kvfs, on this machine, in under a minute."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfs.cli.options import size_option
from kvfs_base.limits import GIB, MIB

if TYPE_CHECKING:
    from kvfs import Namespace
    from kvfs_tools.replay import Replay, ReplayReport
    from kvfs_tools.stage import Stage, Teller
    from kvfs_tools.traces import TraceRequest

NAMESPACE = "demo/conversations"
ARENA_BYTES = 512 * MIB
BLOCKS_BY_MOUNT = 32
"""Blocks that are read back with ordinary file calls."""

LISTED = 4
LOOK_SECONDS = 10.0
"""What ls and du may take each: they ask for the attributes of every block."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    trace: str | None
    requests: int
    seconds: float
    block_bytes: int
    capacity_bytes: int
    keep: bool
    seed: int


@click.command()
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False),
    help="A Mooncake-format trace. [default: generated conversations]",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    help="How many requests at most. [default: 400; all of a --trace]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=20.0,
    show_default=True,
    help="Stop the replay after so long; 0: at its end.",
)
@size_option("--block-size", help="Bytes of a block, whole pages of 4K. [default: 1M]")
@size_option("--capacity", help="What the cache may hold. [default: 2G]")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the generator.")
@click.option("--keep", is_flag=True, help="Leave it running, to look around.")
def demo(
    *,
    trace: str | None,
    requests: int | None,
    seconds: float,
    block_size: int | None,
    capacity: int | None,
    seed: int,
    keep: bool,
) -> int:
    """Replay conversations against a kvfs on a temporary directory.

    Starts what `kvfs up` starts, stores and loads KV-shaped blocks as an inference server would,
    checks every byte, reads some blocks back through the mount, and says what it saw. Exits with 1
    if any byte was wrong.
    """
    every = 1 << 62 if trace else 400
    config = DemoConfig(
        trace=trace,
        requests=requests or every,
        seconds=seconds,
        block_bytes=block_size or MIB,
        capacity_bytes=capacity or 2 * GIB,
        keep=keep,
        seed=seed,
    )
    return run_demo(config)


def run_demo(config: DemoConfig) -> int:
    """The exit code: 0 if every byte was right."""
    from rich.console import Console

    from kvfs_tools.stage import Stage, Teller

    teller = Teller(Console())
    requests = _requests(config, teller)
    capacity = _affordable(config.capacity_bytes)
    teller.say(
        "Starting kvfs: a metadata service, three chunk servers, a node agent and a mount "
        f"(capacity {_size(capacity)}) ..."
    )
    with Stage(capacity_bytes=capacity, arena_bytes=ARENA_BYTES, keep=config.keep) as stage:
        teller.say(f"Serving from {stage.directory}, mounted at {stage.mountpoint}.")
        wrong = _show(config, stage, requests, capacity, teller)
    if config.keep:
        _invite(stage, teller)
    return 1 if wrong else 0


def _requests(config: DemoConfig, teller: Teller) -> list[TraceRequest]:
    from kvfs_tools.generator import GeneratorConfig, generate
    from kvfs_tools.replay import BlockPattern
    from kvfs_tools.traces import read_trace

    BlockPattern(config.block_bytes)  # refuses impossible sizes before anything starts
    if config.trace is None:
        teller.say(f"Making {config.requests:,} requests of multi-turn conversations ...")
        return generate(GeneratorConfig(requests=config.requests, seed=config.seed))
    found = list(read_trace(config.trace, config.requests))
    teller.say(f"Read {len(found):,} requests from {config.trace}.")
    return found


def _affordable(capacity: int) -> int:
    """No more than half of the free space: a demonstration should not fill a disk."""
    return min(capacity, shutil.disk_usage(tempfile.gettempdir()).free // 2)


def _show(
    config: DemoConfig,
    stage: Stage,
    requests: list[TraceRequest],
    capacity: int,
    teller: Teller,
) -> int:
    """Replays, reads back and reports; returns how many blocks were wrong."""
    import kvfs
    from kvfs_tools.replay import Replay, ReplayConfig

    layout = kvfs.KVLayout(
        block_tokens=512,
        block_bytes=config.block_bytes,
        dtype="bfloat16",
        order="opaque",
        model="self-describing pages",
    )
    with kvfs.connect(stage.directory) as client:
        namespace = client.namespace(NAMESPACE, layout, create=True)
        replay = Replay(namespace, ReplayConfig(config.block_bytes, seconds=config.seconds or None))

        def progress(report: ReplayReport) -> None:
            teller(lambda: _progress(report, len(requests)))

        report = replay.run(requests, progress)
        present = len(list(namespace.keys()))
        _tell_replay(report, requests, present, capacity // config.block_bytes, teller)
        wrong = _read_back(namespace, stage.mountpoint, report, replay, teller)
        agent = client.statistics()
        teller.say(
            f"Node agent       {agent['arena_hits']:,} blocks from the arena, "
            f"{agent['blocks_loaded']:,} from disk; {agent['blocks_corrupt']:,} corrupt"
        )
    _look(stage.mountpoint, teller)
    return wrong + report.wrong_blocks


def _progress(report: ReplayReport, total: int) -> str:
    return (
        f"  {report.requests:,}/{total:,} requests  {report.wall_seconds:.0f} s  "
        f"hits {report.hit_rate:.1%}  out {report.gigabytes_out_per_second:.2f} GB/s  "
        f"in {report.gigabytes_in_per_second:.2f} GB/s  wrong {report.wrong_blocks}"
    )


def _tell_replay(
    report: ReplayReport,
    requests: list[TraceRequest],
    present: int,
    capacity_blocks: int,
    teller: Teller,
) -> None:
    from kvfs_tools.traces import lru_hit_rate, prefix_hits

    chains = [request.hash_ids for request in requests[: report.requests]]
    ideal = sum(prefix_hits(chains)) / max(1, report.references)
    lru = lru_hit_rate(chains, capacity_blocks)
    early = ", the time was up" if report.stopped_early else ""
    say = teller.say
    say("")
    say(f"Requests         {report.requests:,} of {len(requests):,}{early}")
    say(
        f"Blocks stored    {report.stored_blocks:,} ({_size(report.bytes_in)}); "
        f"{present:,} are there now, {report.stored_blocks - present:,} were evicted"
    )
    say(
        f"Hits             {report.hit_blocks:,} of {report.references:,} blocks = "
        f"{report.hit_rate:.1%} (simulated LRU of {capacity_blocks:,} blocks: {lru:.1%}, "
        f"without bound: {ideal:.1%})"
    )
    share = report.hit_tokens / max(1, report.tokens)
    say(f"Hit tokens       {report.hit_tokens:,} of {report.tokens:,} = {share:.1%} of the prefill")
    say(
        f"Out (get)        {report.gigabytes_out_per_second:.2f} GB/s: {_size(report.bytes_out)} "
        f"in {report.get_seconds:.2f} s of calls"
    )
    say(
        f"In (put)         {report.gigabytes_in_per_second:.2f} GB/s: {_size(report.bytes_in)} "
        f"in {report.put_seconds:.2f} s of calls"
    )
    each = report.match_seconds / max(1, report.requests) * 1e3
    say(f"Match            {each:.2f} ms a request")
    say(
        f"Elsewhere        {report.data_seconds:.2f} s for making and checking the contents, "
        f"{report.wall_seconds:.1f} s in all"
    )
    if report.refused_blocks or report.vanished_blocks:
        say(
            f"No room for      {report.refused_blocks:,} blocks; "
            f"evicted between match and get: {report.vanished_blocks:,}"
        )
    say(f"Wrong blocks     {report.wrong_blocks}")


def _read_back(
    namespace: Namespace, mountpoint: Path, report: ReplayReport, replay: Replay, teller: Teller
) -> int:
    """Compares files of the mount with what the API gives and with what was stored."""
    wrong = compared = 0
    for key in report.recent_keys[-BLOCKS_BY_MOUNT:]:
        try:
            with open(mountpoint / "kv" / NAMESPACE / key.hex(), "rb") as file:
                content = file.read()
        except FileNotFoundError:
            continue  # evicted
        with namespace.get([key]) as blocks:
            same = blocks[0] is None or blocks[0] == content
        compared += 1
        wrong += not same or bool(replay.pattern.wrong_pages(key, content))
    teller.say(f"Through mount    {compared} blocks read as files, {wrong} differ")
    return wrong


def _look(mountpoint: Path, teller: Teller) -> None:
    """What ordinary tools show."""
    directory = mountpoint / "kv" / NAMESPACE
    teller.say("")
    listing = _output("ls", "-lh", str(directory))
    teller.say(f"$ ls -lh {directory}")
    for line in itertools.islice(listing, LISTED):
        teller.say(f"  {line}")
    if len(listing) > LISTED:
        teller.say(f"  ... {len(listing) - LISTED:,} more")
    for arguments in (["du", "-sh", str(mountpoint)], ["df", "-h", str(mountpoint)]):
        teller.say(f"$ {' '.join(arguments)}")
        for line in _output(*arguments):
            teller.say(f"  {line}")


def _output(*arguments: str) -> list[str]:
    """Lines that a command prints. It may stumble over files that are evicted meanwhile."""
    try:
        done = subprocess.run(
            arguments,
            env=os.environ | {"LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=LOOK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [f"(not done after {LOOK_SECONDS:.0f} s)"]
    return done.stdout.splitlines()


def _invite(stage: Stage, teller: Teller) -> None:
    directory, mountpoint = stage.directory, stage.mountpoint
    teller.say("")
    teller.say("It is still up. Look around:")
    teller.say(f"  kvfs status {directory}")
    teller.say(f"  ls -l {mountpoint}/kv/{NAMESPACE} | head")
    teller.say(f"  cp -r /etc/apt {mountpoint}/ && du -sh {mountpoint}/apt")
    teller.say(f"  python -c \"import kvfs; print(kvfs.connect('{directory}').statistics())\"")
    teller.say("and when you have seen enough:")
    teller.say(f"  kvfs down {directory} && rm -r {stage.root}")


def _size(count: int) -> str:
    from kvfs import settings

    return settings.format_size(count)


__all__ = ["DemoConfig", "demo", "run_demo"]
