"""Which processes one kvfs consists of, and how each is called."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

from kvfs.supervisor.config import UpConfig
from kvfs.supervisor.home import Home
from kvfs_base.types import Address

METADATA = "metadata"
AGENT = "agent"
MOUNT = "mount"


@dataclasses.dataclass(frozen=True)
class Role:
    """``name`` is unique; ``argv`` is the whole command; ``address`` is where it serves."""

    name: str
    argv: tuple[str, ...]
    address: Address | None


@dataclasses.dataclass(frozen=True)
class Roles:
    """All processes of one kvfs, in the order in which they start."""

    metadata: Role
    chunk_servers: tuple[Role, ...]
    agent: Role
    mount: Role | None

    def in_stop_order(self) -> list[list[Role]]:
        """Each group stops together, once the groups before it are gone: what writes goes before
        what stores, so that nothing is cut off."""
        mount = [] if self.mount is None else [self.mount]
        return [mount, [self.agent], list(self.chunk_servers), [self.metadata]]


def plan(
    home: Home,
    config: UpConfig,
    chunk_servers: int,
    overrides: Mapping[str, Mapping[str, str]],
) -> Roles:
    """``overrides`` are settings by section that the command line of `kvfs up` gave; everything
    else the processes read from kvfs.toml and the environment themselves."""
    sockets = home.sockets()
    metadata = Address.unix(str(sockets / "metadata.sock"))

    def role(name: str, section: str, *words: str, address: Address | None, **flags: str) -> Role:
        if config.secret_file is not None:
            flags["secret_file"] = config.secret_file
        flags |= overrides.get(section, {})
        options = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
        if home.settings_path.exists():
            options.append(f"--config={home.settings_path}")
        argv = (sys.executable, "-m", "kvfs", *words, *options)
        return Role(name, argv, address)

    def chunk_server(number: int) -> Role:
        address = Address.unix(str(sockets / f"chunks-{number}.sock"))
        return role(
            f"chunks-{number}",
            "chunks",
            "serve",
            "chunks",
            address=address,
            server_id=f"chunks-{number}",
            directories=str(home.target(number)),
            metadata=str(metadata),
            unix=str(address),
        )

    agent = Address.unix(str(sockets / "agent.sock"))
    mount = None
    if config.mountpoint is not None:
        # Emptiness was checked before the first start. What somebody wrote there while the mount
        # was away must not keep it away.
        mount = role(
            MOUNT,
            "mount",
            "mount",
            str(metadata),
            str(Path(config.mountpoint)),
            "--allow-nonempty",
            address=None,
        )
    return Roles(
        metadata=role(
            METADATA,
            "metadata",
            "serve",
            "metadata",
            address=metadata,
            directory=str(home.metadata),
            unix=str(metadata),
        ),
        chunk_servers=tuple(map(chunk_server, range(chunk_servers))),
        agent=role(
            AGENT, "agent", "serve", "agent", address=agent, unix=str(agent), metadata=str(metadata)
        ),
        mount=mount,
    )
