"""kvfs version"""

from __future__ import annotations

import importlib.metadata
import platform

import click

from kvfs.supervisor.home import FORMAT_VERSION
from kvfs_base import frames


@click.command()
def version() -> None:
    """Show the versions of kvfs, its on-disk format, its wire format and what it runs on."""
    click.echo(f"kvfs {importlib.metadata.version('kvfs')}")
    click.echo(f"on-disk format {FORMAT_VERSION}, wire format {frames.VERSION}")
    click.echo(f"Python {platform.python_version()}, Linux {platform.release()}")
    for name in ("trio", "lmdb", "pyfuse3", "torch"):
        try:
            click.echo(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            click.echo(f"{name} not installed")
