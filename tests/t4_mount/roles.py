"""Runs one role of a kvfs for the mount's tests, as a process of its own so that it can be killed:

    metadata DIR [SESSION_SECONDS]
    chunks DIR COUNT [--hosts]
    mount DIR MOUNTPOINT [--allow-other] [--SETTING=...]

Prints ``ready`` once serving. SIGTERM ends it cleanly. Logs go to stderr, one line a record, level
first.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import trio

from kvfs_base.os_env import os_env
from kvfs_base.types import Address


def metadata_address(directory: str) -> Address:
    return Address.unix(f"{directory}/run/metadata.sock")


async def until_signal(serve: Any, *args: Any) -> None:
    """Runs ``serve`` until SIGTERM or SIGINT."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_on_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_on_signal)
            await nursery.start(serve, *args)
            print("ready", flush=True)


def run_metadata(directory: str, session_seconds: str = "") -> None:
    """``session_seconds``: sessions of mounts that were killed end after this, not after 30 s."""
    from kvfs_metadata import sessions
    from kvfs_metadata.config import MetadataConfig
    from kvfs_metadata.service import serve_metadata

    if session_seconds:
        sessions.SESSION_GRACE_SECONDS = float(session_seconds)
        sessions.SESSION_SILENT_SECONDS = float(session_seconds) / 3
    if not os.listdir(f"{directory}/metadata"):
        # Nobody has a file open in a store that is about to be made: it need not wait to hear.
        sessions.Sessions.in_grace = False  # type: ignore[assignment,method-assign]

    async def serve(*, task_status: Any) -> None:
        config = MetadataConfig(directory=f"{directory}/metadata", unix=metadata_address(directory))
        await serve_metadata(os_env(), config, task_status=task_status)

    trio.run(until_signal, serve)


def known_port(directory: str, number: int) -> int:
    """The port of an earlier start, so that a restarted server is found where it was."""
    path = Path(f"{directory}/run/port-{number}")
    return int(path.read_text()) if path.exists() else 0


def run_chunks(directory: str, count: int, *, hosts: bool) -> None:
    from kvfs_datapath.config import ChunkServerConfig
    from kvfs_datapath.server.chunk_server import ChunkServer

    servers = []
    for number in range(count):
        target = f"{directory}/targets/{number}"
        os.makedirs(target, mode=0o700, exist_ok=True)
        config = ChunkServerConfig(
            server_id=f"server-{number}",
            directories=(target,),
            metadata=(metadata_address(directory),),
            unix=Address.unix(f"{directory}/run/chunks-{number}.sock"),
            tcp=Address.tcp("127.0.0.1", known_port(directory, number)),
        )
        env = os_env()
        if hosts and number:
            env = dataclasses.replace(env, host_id=f"host-{number}")
        servers.append(ChunkServer(env, config))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for number, server in enumerate(servers):
        server.start()
        port = next(a.port for a in server.addresses if a.kind == "tcp")
        Path(f"{directory}/run/port-{number}").write_text(str(port))
    print("ready", flush=True)
    stop.wait()
    for server in servers:
        server.stop()


def run_mount_role(directory: str, mountpoint: str, options: dict[str, Any]) -> None:
    from kvfs.mount.config import MountConfig
    from kvfs.mount.main import run_mount

    config = MountConfig(mountpoint=mountpoint, metadata=(metadata_address(directory),), **options)

    async def serve(*, task_status: Any) -> None:
        await run_mount(os_env(), config, task_status=task_status)
        sys.stdout.write("unmounted\n")
        # Somebody else unmounted it: nothing is left to do.
        os.kill(os.getpid(), signal.SIGTERM)

    trio.run(until_signal, serve)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    role, directory, *rest = sys.argv[1:]
    if role == "metadata":
        run_metadata(directory, *rest)
    elif role == "chunks":
        run_chunks(directory, int(rest[0]), hosts="--hosts" in rest)
    else:
        options: dict[str, Any] = {"allow_other": "--allow-other" in rest}
        for option in rest[1:]:
            name, is_setting, value = option.partition("=")
            if is_setting:
                setting = name.removeprefix("--").replace("-", "_")
                options[setting] = float(value) if setting.endswith("_seconds") else value
        run_mount_role(directory, rest[0], options)
