"""kvfs metadata backup|restore|copy|info: the metadata store as a whole."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from kvfs import settings
from kvfs.supervisor.home import Home
from kvfs_base.os_env import os_env
from kvfs_base.seams import Disk
from kvfs_metadata.engines import backup as backups
from kvfs_metadata.engines import stores
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.engines.migrations import check_format
from kvfs_metadata.engines.stores import Summary


@click.group()
def metadata() -> None:
    """Back up, restore, copy and inspect the metadata store.

    A store is the directory of a `kvfs up`, the directory of a metadata service, or the
    postgresql:// URL of a database. What is read may be in use, what is written may not.
    """


@metadata.command()
@click.argument("source")
@click.argument("file")
def backup(source: str, file: str) -> None:
    """Write one consistent state of SOURCE into FILE, also while it is being served.

    FILE is replaced once the backup is whole and on the disk.
    """
    env = os_env()
    disk, name = _file(file)

    def write(read: KVRead) -> Summary:
        return backups.write_backup(disk, name, stores.batches_of(read))

    _report(stores.read_store(env, _store(source), write), source, file)


@metadata.command()
@click.argument("file")
@click.argument("destination")
def restore(file: str, destination: str) -> None:
    """Fill the empty store DESTINATION from FILE.

    The file is checked from end to end before anything is written. A restore that was interrupted
    can be repeated.
    """
    disk, name = _file(file)
    check_format(backups.check_backup(disk, name).format.encode())
    store = _store(destination)
    _report(
        stores.fill_store(os_env(), store, backups.read_backup(disk, name), went_back=True),
        file,
        destination,
    )


@metadata.command()
@click.argument("source")
@click.argument("destination")
def copy(source: str, destination: str) -> None:
    """Copy one consistent state of SOURCE into the empty store DESTINATION."""
    env = os_env()
    store = _store(destination)

    def write(read: KVRead) -> Summary:
        return stores.fill_store(env, store, stores.batches_of(read))

    _report(stores.read_store(env, _store(source), write), source, destination)


@metadata.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def info(source: str, as_json: bool) -> None:
    """Show what SOURCE holds: a store, or a backup, which is checked from end to end."""
    if os.path.isfile(source):
        summary = backups.check_backup(*_file(source))
    else:
        summary = stores.read_store(os_env(), _store(source), _count)
    told: dict[str, Any] = {
        "format": summary.format,
        "items": summary.items,
        "bytes": summary.bytes,
        "kinds": dict(sorted(summary.kinds.items())),
    }
    if as_json:
        click.echo(json.dumps(told))
        return
    click.echo(f"{summary.format}, {_amount(summary)}")
    for kind, count in told["kinds"].items():
        click.echo(f"  {kind} {count}")


def _count(read: KVRead) -> Summary:
    summary = Summary()
    for batch in stores.batches_of(read):
        summary.count(batch)
    return summary


def _store(name: str) -> str:
    """The store that a command line names."""
    if stores.is_url(name):
        return name
    if not os.path.exists(os.path.join(name, "kvfs.json")):
        return os.path.abspath(name)  # a metadata service's own directory, or a new one
    home = Home(name)
    home.open()
    sections = settings.read_file(home.settings_text(), str(home.settings_path))
    store = str(sections.get("metadata", {}).get("store", ""))
    return store or str(home.metadata)


def _file(path: str) -> tuple[Disk, str]:
    directory, name = os.path.split(os.path.abspath(path))
    return os_env().open_disk(directory), name


def _amount(summary: Summary) -> str:
    return f"{summary.items} items, {settings.format_size(summary.bytes)}"


def _report(summary: Summary, source: str, destination: str) -> None:
    click.echo(f"{stores.display(source)} -> {stores.display(destination)}: {_amount(summary)}")
