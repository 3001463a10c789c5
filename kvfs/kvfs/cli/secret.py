"""kvfs secret"""

from __future__ import annotations

import os
import secrets

import click

from kvfs_base.limits import SECRET_BYTES_MIN


@click.command()
@click.argument("file")
def secret(file: str) -> None:
    """Make the secret of a cluster: a new FILE of 32 random bytes in hex, for you alone.

    Copy it to every host of the cluster (scp -p keeps its mode) and name it in `secret_file`.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="ascii") as out:
        os.fchmod(descriptor, 0o600)
        out.write(secrets.token_hex(SECRET_BYTES_MIN) + "\n")
        out.flush()
        os.fsync(descriptor)
