"""kvfs quota: how much may lie below a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import click
import msgspec

from kvfs import settings
from kvfs.cli.targets import env_of, metadata_addresses, target_argument
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.messages import GetQuota, QuotaInfo, Resolve, SetQuota

NO_BOUND = "none"


@click.group()
def quota() -> None:
    """Bound what may lie below a directory: bytes of files and blocks, and inodes."""


@contextmanager
def _inode(target: str, path: str) -> Iterator[tuple[BlockingMetadataClient, int]]:
    client = BlockingMetadataClient(env_of(target), metadata_addresses(target))
    try:
        yield client, client.call(Resolve(os.fsencode(path))).inode
    finally:
        client.close()


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None or value == NO_BOUND:
        return None if value is None else 0
    try:
        size = settings.parse_size(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc
    if size <= 0:
        raise click.BadParameter(f"a size above 0, or '{NO_BOUND}'", ctx, param)
    return size


@quota.command("set")
@target_argument
@click.argument("path")
@click.argument("size", metavar="SIZE", callback=_size)
@click.option("--inodes", metavar="COUNT", callback=_size, help="How many files and directories.")
def set_(target: str, path: str, size: int, inodes: int | None) -> None:
    """Give a directory a quota of SIZE (as 10G), or another one; 'none': no bound.

    What lies there already stays, and counts. Files cannot grow beyond it (EDQUOT); blocks give way
    to new ones of the same quota.
    """
    with _inode(target, path) as (client, inode):
        _show(client.call(SetQuota(inode, size, inodes)), as_json=False)


@quota.command()
@target_argument
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show(target: str, path: str, as_json: bool) -> None:
    """Show the quota that a directory, file or block counts for, and what is used of it."""
    with _inode(target, path) as (client, inode):
        _show(client.call(GetQuota(inode)), as_json)


def _show(found: QuotaInfo | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found and msgspec.structs.asdict(found)))
    elif found is None:
        click.echo("no quota")
    else:
        size = settings.format_size(found.bytes_max) if found.bytes_max else "no bound"
        count = str(found.inodes_max) if found.inodes_max else "no bound"
        click.echo(f"bytes   {settings.format_size(found.bytes_used)} of {size}")
        click.echo(f"inodes  {found.inodes} of {count}")
