"""Cluster state as every role sees it, and the heartbeat that keeps it.

Chunk servers push heartbeats; the replies carry what the server is to remove, so the metadata
service never dials a chunk server and a removal survives restarts on either side.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec

from kvfs_base.limits import (
    MOVES_AT_ONCE,
    REMOVALS_PER_HEARTBEAT,
    STRIPE_MAX,
    SUSPECTS_MAX,
    SYNCED_MAX,
    UNWANTED_INODES_MAX,
)
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
    """Who has the chunks of a chain (docs/design/0004-chains.md). ``version`` grows with every
    change of the members."""

    chain_id: U32
    version: U32
    targets: tuple[U32, ...]
    """Members that serve, in write order, head first."""
    copies: U32 = 1
    """How many there should be. Chains of one copy know no versions of chunks."""
    syncing: tuple[U32, ...] = ()
    """Members that are being brought in step: writes pass them after those that serve."""
    offline: tuple[U32, ...] = ()
    """Members that are away and may come back."""

    @property
    def is_replicated(self) -> bool:
        """Also while one copy is left."""
        return self.copies > 1

    @property
    def members(self) -> tuple[int, ...]:
        """Those that writes pass, in order."""
        return self.targets + self.syncing


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
    incarnation: U64 = 0
    """Drawn when the server opened the target. Another one, once it has shown that it is not an old
    one (docs/design/0004-chains.md), means that the target may have lost what was not synced: it
    must be brought in step again."""
    fenced: bool = False
    """It does not answer for any chain of several copies until it sees a newer map."""


class Removal(msgspec.Struct, array_like=True, frozen=True):
    """Remove the chunks ``first <= index < end`` of ``inode`` that this target may hold; as a
    member of ``chain`` if that has several copies, else 0."""

    seq: U64
    inode: U64
    first: U32
    end: U32
    chain: U32 = 0


class TargetOrders(msgspec.Struct, array_like=True, frozen=True):
    uuid: ShortText
    target_id: U32
    removals: Annotated[tuple[Removal, ...], msgspec.Meta(max_length=REMOVALS_PER_HEARTBEAT)]
    fence: bool = False
    """The target is to stop answering for its chains, and to say so: it is about to be taken out of
    them. The lease is not renewed."""
    moving: bool = False
    """The target is being drained: what has one copy is to be moved (``TakeMoves``)."""


class HeartbeatReply(msgspec.Struct, array_like=True, frozen=True):
    map_version: U64
    targets: tuple[TargetOrders, ...]
    refused: tuple[ShortText, ...] = ()
    """Uuids of targets that were removed from the cluster. The server's others are not affected."""


class Synced(msgspec.Struct, array_like=True, frozen=True):
    """The chain's last serving member has brought ``target_id`` in step under ``version``."""

    chain_id: U32
    version: U32
    target_id: U32


class Heartbeat(Request, tag="heartbeat"):
    """A server lives by its replies: from the moment at which it sent the heartbeat that was
    answered, and once it knows the map that the answer names, it has FENCE_SECONDS."""

    Reply: ClassVar = HeartbeatReply
    server_id: ShortText
    host_id: ShortText
    unix: Address | None
    tcp: Address | None
    targets: Annotated[tuple[TargetReport, ...], msgspec.Meta(max_length=64)]
    suspects: Annotated[tuple[U32, ...], msgspec.Meta(max_length=SUSPECTS_MAX)] = ()
    """Targets that could not be reached for SUSPECT_SECONDS to pass a write or a copy on."""
    synced: Annotated[tuple[Synced, ...], msgspec.Meta(max_length=SYNCED_MAX)] = ()
    host: ShortText = ""
    """Failure domain: copies of a chain are on different hosts. Empty: ``host_id``."""
    rack: ShortText = ""
    """Failure domain above: copies are in different racks where there are enough of them."""
    number: U64 = 0
    """Grows with each heartbeat of the process (a repetition keeps it): one that was long on its
    way must not be taken for news. 0: not counted."""
    map_version: U64 = 0
    """The map that the server knew when it sent this. ``fenced``, and another incarnation than the
    one that is known, count only if it is new enough: they may have been long on their way."""


class GetClusterMap(Request, tag="get_cluster_map"):
    Reply: ClassVar = ClusterMap


class FindUnwanted(Request, tag="find_unwanted"):
    """Which chunks of a target nothing refers to, and nothing ever will: indexes into ``inodes``.
    ``chain`` 0: chunks of its chains of one copy."""

    Reply: ClassVar = tuple[U32, ...]
    target_id: U32
    chain: U32
    inodes: Annotated[tuple[U64, ...], msgspec.Meta(max_length=UNWANTED_INODES_MAX)]


# --- moves (docs/design/0006-moves.md)


class Move(msgspec.Struct, array_like=True, frozen=True):
    """A block, or what a file has on the target's chain of one copy, is to be on another one."""

    inode: U64
    to: U32
    """The chain."""
    target_id: U32
    """Who has it."""
    size: U64 = 0
    crc32c: U32 = 0
    """Of a block."""
    width: U32 = 0
    """Of a file: how many chains it is striped over. 0: a block."""
    places: Annotated[tuple[U32, ...], msgspec.Meta(max_length=STRIPE_MAX)] = ()
    """Of these, which are to move: chunks with ``number % width`` in ``places``."""
    end: U32 = 1
    """The number after the last chunk that there may be."""

    @property
    def is_block(self) -> bool:
        return self.width == 0


MoveInodes = Annotated[tuple[U64, ...], msgspec.Meta(max_length=MOVES_AT_ONCE)]


class Moves(msgspec.Struct, array_like=True, frozen=True):
    ticket: U64
    """Of this round: higher than those of all before."""
    moves: Annotated[tuple[Move, ...], msgspec.Meta(max_length=MOVES_AT_ONCE)]


class TakeMoves(Request, tag="take_moves"):
    """What a target that is being drained is to move now. What it was told before and has not ended
    is over: the answer names it again. Raises TargetUnknown."""

    Reply: ClassVar = Moves
    target_id: U32


class EndMoves(Request, tag="end_moves"):
    """``done``: the chunks are on the other chain. ``failed``: they cannot be brought there.
    ``lost``: blocks that are damaged here. Answers with the moves of ``done`` that are carried out;
    the others are off, or go on under another ticket. Raises TargetUnknown."""

    Reply: ClassVar = MoveInodes
    target_id: U32
    ticket: U64
    done: MoveInodes = ()
    failed: MoveInodes = ()
    lost: MoveInodes = ()
