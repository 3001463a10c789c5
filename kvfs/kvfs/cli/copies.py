"""kvfs copies: how many copies there will be of what is stored in a directory."""

from __future__ import annotations

import os

import click

from kvfs.cli.targets import env_of, metadata_addresses, target_argument
from kvfs_base.limits import COPIES_MAX
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.messages import GetXattr, Resolve, SetXattr
from kvfs_metadata.xattrs import COPIES


@click.command()
@target_argument
@click.argument("path")
@click.argument("number", type=click.IntRange(1, COPIES_MAX), required=False)
def copies(target: str, path: str, number: int | None) -> None:
    """Show how many copies there are of a file or block, or will be of what is stored in a
    directory. With NUMBER: set that for a directory.

    What is made in it from then on has so many, on as many hosts, and so have directories that are
    made there. What is stored already stays as it is.
    """
    client = BlockingMetadataClient(env_of(target), metadata_addresses(target))
    try:
        inode = client.call(Resolve(os.fsencode(path))).inode
        if number is not None:
            client.call(SetXattr(inode, COPIES, b"%d" % number))
        click.echo(client.call(GetXattr(inode, COPIES)).decode())
    finally:
        client.close()
