"""kvfs fsck"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import Any

import click
import msgspec

from kvfs.cli.exits import ExitCode
from kvfs.cli.targets import env_of, metadata_addresses, target_argument
from kvfs.fsck import Fsck, Report, State, offline, online
from kvfs.fsck.paths import paths_of
from kvfs.fsck.sources import Store, Targets
from kvfs.supervisor.home import Home
from kvfs_base.errors import AlreadyRunning, Conflict, NotKvfsDirectory
from kvfs_base.limits import FSCK_SETTLE_SECONDS
from kvfs_base.os_env import os_env
from kvfs_metadata.check.fixes import MarkSparse

PROGRESS_SECONDS = 5.0
SHOWN_MAX = 200
"""Findings in the table; --json has all of them."""


class Found(msgspec.Struct, kw_only=True):
    kind: str
    inode: int
    path: str | None
    detail: str
    state: str
    repair: str | None
    """The name of the repair, or None where there is none."""


class Result(msgspec.Struct, kw_only=True):
    """What ``--json`` prints."""

    target: str
    mode: str
    clean: bool
    inodes: int
    entries: int
    blocks: int
    chunks: int
    unchecked: int
    unreachable: dict[str, str]
    truncated: bool
    findings: list[Found]


@click.command()
@target_argument
@click.option("--repair", is_flag=True, help="Repair what can be repaired.")
@click.option(
    "--zero-holes",
    is_flag=True,
    help="With --repair: lost parts of files read as zeros, not as errors.",
)
@click.option("--verify", is_flag=True, help="Read every sealed chunk, and check its bytes.")
@click.option(
    "--offline", "is_offline", is_flag=True, help="TARGET is a directory that does not run."
)
@click.option("--json", "as_json", is_flag=True, help="For programs; documented in docs/fsck.md.")
def fsck(
    target: str,
    *,
    repair: bool,
    zero_holes: bool,
    verify: bool,
    is_offline: bool,
    as_json: bool,
) -> int:
    """Compare metadata with chunk servers, and repair.

    TARGET is the directory of a `kvfs up` that runs, or the address of its metadata service; with
    --offline, the directory of one that does not run. Without --repair nothing is changed.

    The exit code is 0 if everything is as it should be, 16 if everything that was wrong is
    repaired, 15 if something is not, and 12 if part of it could not be looked at.
    """
    if zero_holes and not repair:
        raise click.UsageError("--zero-holes goes with --repair")
    opened = (
        _offline(Home(target)) if is_offline else online(env_of(target), metadata_addresses(target))
    )
    progress = _Progress()
    with opened as (store, targets):
        run = Fsck(
            store,
            targets,
            verify=verify,
            zero_holes=zero_holes,
            settle_seconds=0.0 if is_offline else FSCK_SETTLE_SECONDS,
            progress=progress.tell,
        )
        report = run.check()
        paths = paths_of(store, (one.finding.inode for one in report.outcomes))
        if repair:
            run.repair(report)
    result = _result(target, "offline" if is_offline else "online", report, paths)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())
    else:
        _show(result)
    return exit_code(report)


@contextlib.contextmanager
def _offline(home: Home) -> Any:
    number = home.open().chunk_servers
    pid = home.running_pid()
    if pid is not None:
        raise AlreadyRunning(directory=str(home.directory), pid=pid)
    if not (home.metadata / "data.mdb").exists():
        raise NotKvfsDirectory(path=str(home.directory), detail="no metadata store in it")
    with contextlib.ExitStack() as stack:
        directories = [str(home.target(n)) for n in range(number)]
        opened: contextlib.AbstractContextManager[tuple[Store, Targets]]
        opened = offline(os_env(), str(home.metadata), directories)
        try:
            pair = stack.enter_context(opened)
        except Conflict as exc:
            # Its supervisor is gone, and some of its processes are not, or not yet.
            raise AlreadyRunning(directory=str(home.directory)) from exc
        yield pair


class _Progress:
    """A line on standard error now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, stage: str, count: int) -> None:
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            click.echo(f"{stage}: {count:,}", err=True)


def _result(target: str, mode: str, report: Report, paths: dict[int, str]) -> Result:
    return Result(
        target=target,
        mode=mode,
        clean=not report.outcomes,
        inodes=report.inodes,
        entries=report.entries,
        blocks=report.blocks,
        chunks=report.chunks,
        unchecked=report.unchecked,
        unreachable=report.unreachable,
        truncated=report.truncated,
        findings=[
            Found(
                kind=one.finding.kind,
                inode=one.finding.inode,
                path=paths.get(one.finding.inode),
                detail=one.finding.detail,
                state=one.state,
                repair=None if one.finding.fix is None else type(one.finding.fix).__name__,
            )
            for one in report.outcomes
        ],
    )


def exit_code(report: Report) -> ExitCode:
    if report.remaining or report.truncated:
        return ExitCode.INCONSISTENT
    if report.unreachable:
        return ExitCode.UNREACHABLE
    return ExitCode.REPAIRED if report.outcomes else ExitCode.OK


def _show(result: Result) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if result.findings:
        table = Table(box=None, header_style="dim")
        for name in ("finding", "inode", "what", "path", "state"):
            table.add_column(name, overflow="fold")
        for one in result.findings[:SHOWN_MAX]:
            state = one.state if one.repair or one.state != State.FOUND else "no repair"
            if one.repair == MarkSparse.__name__ and one.state == State.FOUND:
                state = "found (--zero-holes)"
            table.add_row(
                one.kind, str(one.inode), escape(one.detail), escape(one.path or ""), state
            )
        console.print(table)
        if len(result.findings) > SHOWN_MAX:
            console.print(f"... and {len(result.findings) - SHOWN_MAX:,} more (--json has all)")
    console.print(
        f"checked {result.inodes:,} inodes, {result.entries:,} entries, {result.blocks:,} blocks, "
        f"{result.chunks:,} chunks ({result.mode})",
        soft_wrap=True,
    )
    for name, reason in result.unreachable.items():
        console.print(escape(f"not looked at: target {name}: {reason}"), soft_wrap=True)
    if result.unchecked:
        console.print(f"{result.unchecked:,} blocks and files there were not checked")
    if result.truncated:
        console.print("there is more: repair this and run again")
    console.print(_summary(result), soft_wrap=True)


def _summary(result: Result) -> str:
    if result.clean:
        return "clean"
    states = Counter(one.state for one in result.findings)
    return f"{len(result.findings):,} findings: " + ", ".join(
        f"{count:,} {state}" for state, count in sorted(states.items())
    )
