"""Cluster state as every role sees it, and the heartbeat that keeps it.

Chunk servers push heartbeats; the replies carry what the server is to remove, so the metadata
service never dials a chunk server and a removal survives restarts on either side.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec

from kvfs_base.limits import REMOVALS_PER_HEARTBEAT
from kvfs_base.rpc import Request
from kvfs_base.types import U32, U64, Address, ShortText


class TargetState(enum.StrEnum):
    SERVING = "serving"
    FULL = "full"
    """Serves reads; new chunks go elsewhere."""
    DRAINING = "draining"
    """As FULL, because somebody wants it so."""
    OFFLINE = "offline"


class Target(msgspec.Struct, array_like=True, frozen=True):
    """One directory on one disk of one chunk server."""

    target_id: U32
    server_id: ShortText
    host_id: ShortText
    """Boot id of the host and its network namespace: equal means that descriptors can be passed."""
    unix: Address | None
    tcp: Address | None
    state: TargetState
    capacity_bytes: U64
    free_bytes: U64


class Chain(msgspec.Struct, array_like=True, frozen=True):
    """Replicas in write order, head first. One target a chain until replication arrives."""

    chain_id: U32
    version: U32
    targets: tuple[U32, ...]


class ClusterMap(msgspec.Struct, array_like=True, frozen=True):
    version: U64
    targets: tuple[Target, ...]
    chains: tuple[Chain, ...]


class TargetReport(msgspec.Struct, array_like=True, frozen=True):
    """What a server says of one of its targets. ``uuid`` is made once, when the directory is
    initialised, and stays with the disk; the metadata service gives it a small ``target_id``."""

    uuid: ShortText
    capacity_bytes: U64
    free_bytes: U64
    healthy: bool
    removed_seq: U64
    """Removals up to and including this number are done."""
    volume: ShortText = ""
    """Targets of one host with the same volume share its space, which counts once; empty where the
    target has a share of its own."""


class Removal(msgspec.Struct, array_like=True, frozen=True):
    """Remove the chunks ``first <= index < end`` of ``inode`` that this target may hold."""

    seq: U64
    inode: U64
    first: U32
    end: U32


class TargetOrders(msgspec.Struct, array_like=True, frozen=True):
    uuid: ShortText
    target_id: U32
    removals: Annotated[tuple[Removal, ...], msgspec.Meta(max_length=REMOVALS_PER_HEARTBEAT)]


class HeartbeatReply(msgspec.Struct, array_like=True, frozen=True):
    map_version: U64
    targets: tuple[TargetOrders, ...]
    refused: tuple[ShortText, ...] = ()
    """Uuids of targets that were removed from the cluster. The server's others are not affected."""


class Heartbeat(Request, tag="heartbeat"):
    Reply: ClassVar = HeartbeatReply
    server_id: ShortText
    host_id: ShortText
    unix: Address | None
    tcp: Address | None
    targets: Annotated[tuple[TargetReport, ...], msgspec.Meta(max_length=64)]


class GetClusterMap(Request, tag="get_cluster_map"):
    Reply: ClassVar = ClusterMap
