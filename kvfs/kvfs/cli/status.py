"""kvfs status"""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from kvfs.cli.exits import ExitCode
from kvfs.cli.figures import ANSWER_SECONDS, chunk_server_figures, told
from kvfs.cli.targets import running
from kvfs.client import connect
from kvfs.settings import format_size
from kvfs.supervisor.home import Endpoints, Home, RoleState
from kvfs_base.cluster import GetClusterMap, Target, TargetState
from kvfs_base.errors import KvfsError
from kvfs_base.os_env import os_env
from kvfs_base.rpc import BlockingRpcClient, Request
from kvfs_base.types import Address
from kvfs_metadata.messages import StatFs, Statistics


class Status(msgspec.Struct, kw_only=True):
    """What ``--json`` prints. Figures of a service that does not answer are missing."""

    directory: str
    healthy: bool
    supervisor_pid: int
    uptime_seconds: float
    mount: str | None
    roles: dict[str, RoleState]
    targets: list[dict[str, Any]]
    capacity_bytes: int | None = None
    used_bytes: int | None = None
    metadata: dict[str, int] = {}
    agent: dict[str, int] = {}
    chunk_servers: dict[str, dict[str, int]] = {}
    errors: list[str] = []


@click.command()
@click.argument("directory")
@click.option("--json", "as_json", is_flag=True, help="For programs; documented in docs/cli.md.")
def status(directory: str, as_json: bool) -> int:
    """Show what runs in DIRECTORY, how it is, and what is stored.

    The exit code is 0 if everything serves, 10 if something does not, 6 if nothing runs.
    """
    home = Home(directory)
    found = gather(home, running(home))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        _show(found)
    return ExitCode.OK if found.healthy else ExitCode.ROLE_FAILED


def gather(home: Home, endpoints: Endpoints) -> Status:
    """Asks the services; never raises because one of them does not answer."""
    errors: list[str] = []

    def ask(address: str, requests: list[Request]) -> list[Any]:
        client = BlockingRpcClient(os_env().blocking_network, Address.parse_list(address))
        try:
            return client.call_many(requests, ANSWER_SECONDS)
        except KvfsError as exc:
            errors.append(f"{address}: {exc}")
            return [None] * len(requests)
        finally:
            client.close()

    cluster, space, figures = ask(endpoints.metadata, [GetClusterMap(), StatFs(), Statistics()])
    agent: dict[str, int] = {}
    try:
        with connect(endpoints.agent) as client:
            agent = client.statistics()
    except KvfsError as exc:
        errors.append(f"{endpoints.agent}: {exc}")
    targets = () if cluster is None else cluster.targets
    chunk_servers, silent = chunk_server_figures(os_env(), targets)
    errors += silent
    return Status(
        directory=str(home.directory),
        healthy=not errors
        and all(role.state == "serving" for role in endpoints.roles.values())
        and all(target.state is not TargetState.OFFLINE for target in targets),
        supervisor_pid=endpoints.supervisor_pid,
        uptime_seconds=round((time.time_ns() - endpoints.started_ns) / 1e9, 1),
        mount=endpoints.mount,
        roles=endpoints.roles,
        targets=[_target(target) for target in targets],
        capacity_bytes=None if space is None else space.capacity_bytes,
        used_bytes=None if space is None else space.used_bytes,
        metadata=figures or {},
        agent=agent,
        chunk_servers=chunk_servers,
        errors=errors,
    )


def _target(target: Target) -> dict[str, Any]:
    return {
        "target_id": target.target_id,
        "server": target.server_id,
        "state": target.state.value,
        "capacity_bytes": target.capacity_bytes,
        "free_bytes": target.free_bytes,
    }


def _show(found: Status) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    health = "healthy" if found.healthy else "NOT HEALTHY"
    console.print(
        f"[bold]{found.directory}[/]  {health}, up {found.uptime_seconds:.0f} s, "
        f"mount {found.mount or 'none'}"
    )
    if found.capacity_bytes is not None and found.used_bytes is not None:
        used, capacity = format_size(found.used_bytes), format_size(found.capacity_bytes)
        console.print(f"{used} of {capacity} in use")
    table = Table("role", "state", "pid", "restarts", box=None, header_style="dim")
    table.add_column("address", overflow="fold")
    for name, role in found.roles.items():
        pid = "" if role.pid is None else str(role.pid)
        table.add_row(name, role.state, pid, str(role.restarts), role.address or "")
    console.print(table)
    table = Table("target", "server", "state", "capacity", "free", box=None, header_style="dim")
    for target in found.targets:
        sizes = [format_size(target[key]) for key in ("capacity_bytes", "free_bytes")]
        table.add_row(str(target["target_id"]), target["server"], target["state"], *sizes)
    console.print(table)
    services = {"metadata": found.metadata, "agent": found.agent} | found.chunk_servers
    for title, figures in services.items():
        console.print(f"[dim]{title}[/]  {told(figures)}", soft_wrap=True)
    for error in found.errors:
        console.print(f"no answer from {error}", soft_wrap=True)
