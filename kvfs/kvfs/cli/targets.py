"""What TARGET on a command line stands for, and the secret that opens it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from kvfs.supervisor.home import Endpoints, Home
from kvfs_base.errors import NotRunning
from kvfs_base.os_env import os_env
from kvfs_base.seams import Env
from kvfs_base.types import Address

F = TypeVar("F", bound=Callable[..., Any])

SECRET_VARIABLE = "KVFS_SECRET_FILE"
_SECRET = "kvfs.secret_file"


def target_argument(function: F) -> F:
    """Adds TARGET, and --secret-file for ``env_of``."""

    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        ctx.meta[_SECRET] = value

    option = click.option(
        "--secret-file",
        metavar="FILE",
        expose_value=False,
        callback=keep,
        help=f"The cluster's secret. [default: ${SECRET_VARIABLE}, or what `kvfs up` has]",
    )
    return click.argument("target")(option(function))


def env_of(target: str, secret_file: str | None = None) -> Env:
    """The world as ``target`` is reached: with the secret in ``secret_file``, or in that of the
    command line, of the environment, or of the `kvfs up` that runs. Raises SecretUnusable."""
    context = click.get_current_context(silent=True)
    if secret_file is None and context is not None:
        secret_file = context.meta.get(_SECRET)
    if secret_file is None:
        secret_file = os.environ.get(SECRET_VARIABLE) or None
    if secret_file is None and not _is_address(target):
        secret_file = running(Home(target)).secret_file
    return os_env(secret_file=secret_file)


def running(home: Home) -> Endpoints:
    """The endpoints of a running kvfs. Raises NotKvfsDirectory, VersionMismatch or NotRunning."""
    home.open()
    endpoints = home.read_endpoints()
    if endpoints is None or home.running_pid() is None:
        raise NotRunning(directory=str(home.directory))
    return endpoints


def metadata_addresses(target: str) -> tuple[Address, ...]:
    """The metadata service of a directory, or at the addresses (unix:/path, tcp:host:port, with
    commas between) that ``target`` is."""
    if _is_address(target):
        return Address.parse_list(target)
    return Address.parse_list(running(Home(target)).metadata)


def _is_address(target: str) -> bool:
    return target.startswith(("unix:", "tcp:"))
