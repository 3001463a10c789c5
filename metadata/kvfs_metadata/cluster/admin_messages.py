"""Requests for those who look after a cluster: what it consists of, and changes of that."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from kvfs_base.cluster import Chain, TargetState
from kvfs_base.limits import TARGETS_PER_SERVER_MAX
from kvfs_base.rpc import Request
from kvfs_base.types import U32, U64, Address, ShortText
from kvfs_metadata.limits import OPEN_FILE_HOLDERS_MAX, OPEN_FILES_SHOWN_MAX


class TargetDetails(msgspec.Struct, array_like=True, frozen=True):
    """What GetClusterMap tells of a target, and what only people want to know."""

    target_id: U32
    uuid: ShortText
    server_id: ShortText
    unix: Address | None
    tcp: Address | None
    state: TargetState
    capacity_bytes: U64
    free_bytes: U64
    chains: tuple[U32, ...]
    draining: bool
    """Also while it is offline."""
    keep_blocks: bool
    drained: bool
    """Draining, and nothing refers to it any more."""
    removals: U64
    """Chunks that it has yet to remove."""
    heard_seconds: float
    """Since its last heartbeat, as far as the answering server knows."""
    host: ShortText = ""
    rack: ShortText = ""
    """Failure domains."""
    replaces: U32 = 0
    """The target whose places in chains it takes."""
    blocks_left: U64 = 0
    """Of one copy, and the next one, when the answering server last looked through a draining
    target's; 0 before that."""
    files_left: U64 = 0


class ServerDetails(msgspec.Struct, array_like=True, frozen=True):
    """A metadata server. ``beats`` counts since its start, 0 on a store of its own."""

    number: Annotated[bytes, msgspec.Meta(max_length=16)]
    addresses: tuple[str, ...]
    beats: U64
    alive: bool
    answering: bool


class RemovedTarget(msgspec.Struct, array_like=True, frozen=True):
    uuid: ShortText
    target_id: U32
    server_id: ShortText
    removed_ns: int


class SpreadDetails(msgspec.Struct, array_like=True, frozen=True):
    """How evenly the chains of a class that take new chunks load their targets: the most over the
    mean, so 1.0 is best."""

    copies: U32
    chains: U32
    pairs: float
    """Chains that two targets share."""
    rebuild: float
    """Chains that one target reads for a lost one, of the worst one lost."""
    heads: float
    """Chains of which a target is the head."""


class ClusterDetails(msgspec.Struct, array_like=True, frozen=True):
    targets: tuple[TargetDetails, ...]
    servers: tuple[ServerDetails, ...]
    removed: tuple[RemovedTarget, ...]
    chains: tuple[Chain, ...] = ()
    spreads: tuple[SpreadDetails, ...] = ()
    """Of each number of copies above one."""


class DescribeCluster(Request, tag="describe_cluster"):
    Reply: ClassVar = ClusterDetails


class OpenFile(msgspec.Struct, array_like=True, frozen=True):
    inode: U64
    holders: Annotated[tuple[ShortText, ...], msgspec.Meta(max_length=OPEN_FILE_HOLDERS_MAX)]
    """Who has it open. Nobody: the service was just started, and does not know."""


class FindOpenFiles(Request, tag="find_open_files"):
    """Files that keep a draining target from being empty because somebody has them open, some of
    them, as the answering server saw them last. Raises TargetUnknown."""

    Reply: ClassVar = Annotated[tuple[OpenFile, ...], msgspec.Meta(max_length=OPEN_FILES_SHOWN_MAX)]
    target_id: U32


class ChainCount(msgspec.Struct, array_like=True, frozen=True):
    chain: U32
    count: U64
    """Blocks or files."""
    chunks: U64
    bytes: U64
    """Of blocks; 0 for files."""


class ChunkCounts(msgspec.Struct, array_like=True, frozen=True):
    chains: tuple[ChainCount, ...]
    next: U64
    """Where to go on; 0 if that was all."""


class CountChunks(Request, tag="count_chunks"):
    """One page of a count of all blocks, or of all chunks of files, by chain. The caller adds the
    pages up. A sparse file counts with its holes."""

    Reply: ClassVar = ChunkCounts
    files: bool
    start: U64 = 0


class Changed(msgspec.Struct, array_like=True, frozen=True):
    """The answer of requests that have nothing else to say."""


Targets = Annotated[tuple[U32, ...], msgspec.Meta(max_length=TARGETS_PER_SERVER_MAX)]


class SetDraining(Request, tag="set_draining"):
    """With ``on`` nothing new is placed on the targets. Chains of several copies get another
    member, and leave the target once that has everything; blocks of one copy are given up in the
    background, unless ``keep_blocks``. Without, they are as any others again. Raises
    TargetUnknown."""

    Reply: ClassVar = Changed
    targets: Targets
    on: bool
    keep_blocks: bool = False


class RemoveTarget(Request, tag="remove_target"):
    """The targets are no part of the cluster any more, and refused if they come back. Raises
    TargetInUse unless they are drained; with ``force`` what is on them is lost. Raises
    TargetUnknown."""

    Reply: ClassVar = Changed
    targets: Targets
    force: bool = False


class ReplaceTarget(Request, tag="replace_target"):
    """``target_id`` takes the places of ``lost`` in its chains of several copies, one after the
    other as it is brought in step; 0: the emptiest target of the same server, or else of any host
    that has none of the copies. Raises TargetInUse if ``lost`` is there and not draining,
    TargetUnknown, NoTarget if there is none for its places. The answer is which one it is."""

    Reply: ClassVar = U32
    lost: U32
    target_id: U32 = 0


class AdmitTarget(Request, tag="admit_target"):
    """A target that was removed may register again; it counts as a new one. Raises
    TargetUnknown."""

    Reply: ClassVar = Changed
    uuid: ShortText
