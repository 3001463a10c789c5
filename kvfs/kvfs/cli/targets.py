"""What TARGET on a command line stands for."""

from __future__ import annotations

from kvfs.supervisor.home import Endpoints, Home
from kvfs_base.errors import NotRunning
from kvfs_base.types import Address


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
    if target.startswith(("unix:", "tcp:")):
        return Address.parse_list(target)
    return Address.parse_list(running(Home(target)).metadata)
