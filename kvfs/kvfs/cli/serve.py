"""kvfs serve metadata|chunks|agent, kvfs mount: one role as one process."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import click

from kvfs.agent.config import AgentConfig
from kvfs.cli.options import config_option, load_settings, setting_options
from kvfs.cli.process import begin_service, run_threaded, run_trio
from kvfs.cli.targets import SECRET_VARIABLE, env_of, metadata_addresses
from kvfs.mount.config import MountConfig
from kvfs.supervisor.home import Home
from kvfs_base.errors import InvalidRequest
from kvfs_base.os_env import os_env, raise_open_files_limit
from kvfs_base.seams import Env
from kvfs_base.types import Address
from kvfs_datapath.config import ChunkServerConfig
from kvfs_metadata.config import MetadataConfig


@click.group()
def serve() -> None:
    """Start one role in the foreground.

    Prints one JSON line with its addresses once it serves; SIGTERM and Ctrl-C stop it. Every option
    can also be set in the file given by --config and in the environment
    (KVFS_METADATA_DIRECTORY, KVFS_CHUNKS_SERVER_ID, ...); see docs/configuration.md.
    """


@serve.command()
@config_option
@setting_options(MetadataConfig, "metadata")
def metadata(config_path: Path | None, **flags: Any) -> None:
    """Serve the namespace: names, attributes, blocks, eviction, the cluster map."""
    begin_service()
    config = load_settings(MetadataConfig, "metadata", flags, config_path)
    env = _env(config.secret_file, config.tcp)
    from kvfs_metadata.service import serve_metadata

    run_trio("metadata", functools.partial(serve_metadata, env, config))


@serve.command()
@config_option
@setting_options(ChunkServerConfig, "chunks")
def chunks(config_path: Path | None, **flags: Any) -> None:
    """Serve chunks from directories, one target each.

    --directories is a list: /disk1/kvfs,/disk2/kvfs.
    """
    begin_service()
    raise_open_files_limit()
    config = load_settings(ChunkServerConfig, "chunks", flags, config_path)
    env = _env(config.secret_file, config.tcp)
    if config.tcp is not None and config.tcp.is_wildcard:
        raise InvalidRequest(
            detail=f"{config.tcp}: clients are told this address: name one that they can reach"
        )
    from kvfs_datapath.server.chunk_server import ChunkServer

    server = ChunkServer(env, config)
    run_threaded("chunks", server, lambda: server.addresses)


@serve.command()
@config_option
@setting_options(AgentConfig, "agent")
def agent(config_path: Path | None, **flags: Any) -> None:
    """Serve the Python clients of this machine from one shared arena."""
    begin_service()
    config = load_settings(AgentConfig, "agent", flags, config_path)
    env = _env(config.secret_file)
    from kvfs.agent.server import Agent

    run_threaded("agent", Agent(env, config), lambda: [config.unix])


@click.command()
@click.argument("target")
@click.argument("mountpoint")
@config_option
@setting_options(MountConfig, "mount", skip=("mountpoint", "metadata"))
def mount(target: str, mountpoint: str, config_path: Path | None, **flags: Any) -> None:
    """Mount TARGET at MOUNTPOINT, in the foreground.

    TARGET is the directory of a running `kvfs up`, or the address of a metadata service
    (unix:/path, tcp:host:port), or several with commas between. SIGTERM and Ctrl-C unmount.
    """
    begin_service()
    if config_path is None and Home(target).settings_path.exists():
        config_path = Home(target).settings_path
    flags |= {"mountpoint": os.path.abspath(mountpoint), "metadata": metadata_addresses(target)}
    config = load_settings(MountConfig, "mount", flags, config_path)
    env = env_of(target, config.secret_file)
    from kvfs.mount.main import run_mount

    run_trio("mount", functools.partial(run_mount, env, config))


def _env(secret_file: str | None, tcp: Address | None = None) -> Env:
    """Raises SecretUnusable, and NotLoopback before anything is made or opened."""
    secret_file = secret_file or os.environ.get(SECRET_VARIABLE) or None
    if tcp is not None and secret_file is None:
        tcp.require_loopback()
    return os_env(secret_file=secret_file)
