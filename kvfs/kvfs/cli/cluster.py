"""kvfs up, kvfs down"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import click
import msgspec
import trio

from kvfs import settings
from kvfs.cli import logs
from kvfs.cli.exits import ExitCode
from kvfs.cli.options import size_option
from kvfs.supervisor import mounts, roles
from kvfs.supervisor.config import UpConfig
from kvfs.supervisor.home import Endpoints, Home
from kvfs.supervisor.supervise import Supervisor
from kvfs_base.errors import AlreadyRunning, DeadlineExceeded, NotRunning
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.os_handshake import read_secret

Overrides = dict[str, dict[str, str]]

KILL_SECONDS = 15.0
"""After the second signal the supervisor kills its children; this is ample for that."""


@click.command()
@click.argument("directory")
@click.option("--mount", "mountpoint", metavar="MNT", help="Mount it there as well.")
@click.option(
    "--chunk-servers", type=int, help="How many. [default: as many as DIR has; 3 for a new one]"
)
@size_option("--capacity", help="Blocks and files together. [default: what the disk holds]")
@size_option("--arena", help="Shared memory for blocks in use. [default: 1G]")
@click.option(
    "--durability",
    type=click.Choice(["cache", "strict"]),
    help="strict: acknowledged means on stable storage. [default: cache]",
)
@click.option(
    "--secret-file",
    metavar="FILE",
    help="The cluster's secret, for addresses that other machines reach.",
)
@click.option("--detach", is_flag=True, help="Return once it serves; stop it with kvfs down.")
@click.option("--ready-fd", type=int, hidden=True)
def up(
    directory: str,
    *,
    mountpoint: str | None,
    chunk_servers: int | None,
    capacity: int | None,
    arena: int | None,
    durability: str | None,
    secret_file: str | None,
    detach: bool,
    ready_fd: int | None,
) -> int | None:
    """Start a whole kvfs on this machine: a metadata service, chunk servers, a node agent and,
    with --mount, a mount.

    DIRECTORY keeps everything; it is made if it is missing. Runs in the foreground until Ctrl-C or
    SIGTERM, and then leaves no process and no mount behind. Logs are in DIRECTORY/log, settings in
    DIRECTORY/kvfs.toml.
    """
    if detach:
        return _detach(Home(directory))
    home = Home(directory)
    config = settings.load(
        UpConfig,
        "up",
        file=settings.read_file(home.settings_text(), str(home.settings_path)),
        environment=os.environ,
        flags={
            "directory": str(home.directory),
            "mountpoint": None if mountpoint is None else os.path.abspath(mountpoint),
            "chunk_servers": chunk_servers,
            "secret_file": None if secret_file is None else os.path.abspath(secret_file),
        },
    )
    if config.secret_file is not None:
        read_secret(config.secret_file)  # told here, and not by the first role that fails
    overrides = _overrides(capacity, arena, durability)
    _run(home, config, overrides, ready_fd)
    return None


def _overrides(capacity: int | None, arena: int | None, durability: str | None) -> Overrides:
    """The flags as settings of the services."""
    found: Overrides = {"metadata": {}, "chunks": {}, "agent": {}}
    if capacity is not None:
        found["metadata"]["capacity_bytes"] = str(capacity)
    if arena is not None:
        found["agent"]["arena_bytes"] = str(-(-arena // PAGE_BYTES) * PAGE_BYTES)
    if durability is not None:
        found["metadata"]["durability"] = found["chunks"]["durability"] = durability
    return found


def _run(home: Home, config: UpConfig, overrides: Overrides, ready_fd: int | None) -> None:
    pid = home.running_pid()
    if pid is not None:
        raise AlreadyRunning(directory=str(home.directory), pid=pid)
    os.umask(0o077)
    format_ = home.open_or_create(config.chunk_servers)
    with home.locked(config.mountpoint) as left_mount:
        if ready_fd is None:
            logs.set_up()
        logs.set_up(home.log / "supervisor.log", config.log_bytes)
        plan = roles.plan(home, config, format_.chunk_servers, overrides)
        supervisor = Supervisor(home, config, plan, left_mount)

        def ready(endpoints: Endpoints) -> None:
            if ready_fd is None:
                _tell(home, endpoints)
            else:
                _tell_parent(ready_fd, endpoints)

        trio.run(supervisor.run, ready)


def _tell(home: Home, endpoints: Endpoints) -> None:
    click.echo(f"kvfs is up in {home.directory} (pid {endpoints.supervisor_pid})")
    if endpoints.mount is not None:
        click.echo(f"  mounted at   {endpoints.mount}")
    click.echo(f"  from Python  kvfs.connect({str(home.directory)!r})")
    click.echo(f"  look at it   kvfs status {home.directory}; kvfs ls {home.directory} /kv")
    click.echo(f"  stop it      kvfs down {home.directory}")


def _tell_parent(ready_fd: int, endpoints: Endpoints) -> None:
    """From here on nobody reads what we print."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    with open(ready_fd, "wb") as pipe:
        pipe.write(msgspec.json.encode(endpoints))


def _detach(home: Home) -> int:
    """Runs the same command in a session of its own, until it is ready."""
    arguments = [word for word in sys.argv[1:] if word != "--detach"]
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "kvfs", *arguments, f"--ready-fd={write_end}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(write_end,),
        start_new_session=True,
    )
    os.close(write_end)
    try:
        with open(read_end, "rb") as pipe:
            answer = pipe.read()
        if answer:
            endpoints = msgspec.json.decode(answer, type=Endpoints)
            _tell(home, endpoints)
            return ExitCode.OK
        _, errors = child.communicate()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    click.echo(errors.decode(errors="replace"), err=True, nl=False)
    return child.returncode


@click.command()
@click.argument("directory")
@click.option(
    "--timeout",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds after which processes that have not stopped are killed.",
)
def down(directory: str, timeout: float) -> None:
    """Stop the kvfs in DIRECTORY: unmount, then stop every process, in order."""
    home = Home(directory)
    home.open()
    pid = home.running_pid()
    if pid is None:
        left_mount = home.noted_mount()
        if left_mount is not None:
            mounts.detach_dead(left_mount)
        raise NotRunning(directory=str(home.directory))
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not _wait(process, timeout):
            signal.pidfd_send_signal(process, signal.SIGTERM)
            if not _wait(process, KILL_SECONDS):
                raise DeadlineExceeded(operation=f"stop pid {pid}", seconds=timeout + KILL_SECONDS)
    finally:
        os.close(process)


def _wait(process: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
