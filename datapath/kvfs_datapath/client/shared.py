"""What the parts of a chunk client have in common."""

from __future__ import annotations

import dataclasses

from kvfs_base.counters import Counters
from kvfs_base.seams import Env
from kvfs_base.threads import Event
from kvfs_datapath.client.health import Health
from kvfs_datapath.client.routes import Router
from kvfs_datapath.client.workers import Workers
from kvfs_datapath.connections import ConnectionPool


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    env: Env
    router: Router
    pool: ConnectionPool
    health: Health
    workers: Workers
    counters: Counters
    closed: Event
    """Set when the client is closed: nobody waits any longer."""


__all__ = ["Shared"]
