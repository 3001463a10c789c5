"""What members of a chain do with updates of files: decisions without I/O, one table each.

docs/design/0004-chains.md argues them. Words: a member *carries* an update when it has prepared it
and passes it on; *nowhere* is an answer which says that neither the one who answers nor anybody
behind it has the update.
"""

from __future__ import annotations

import enum

from kvfs_base.errors import (
    ChunkMismatch,
    Conflict,
    DiskFull,
    InvalidRequest,
    NoTarget,
    ServerBusy,
    StaleChain,
    TargetFenced,
    WriteUncertain,
)
from kvfs_base.types import ChunkId
from kvfs_datapath.format import VERSION_UNKNOWN, ChunkInfo, ChunkState
from kvfs_datapath.messages import Held, PassUpdate, Update

NOWHERE = (StaleChain, TargetFenced, NoTarget, DiskFull, InvalidRequest, ServerBusy, Conflict)
"""A member answers with these only before it has prepared anything, or after it has dropped what
it prepared because it was answered so itself."""


class Receipt(enum.Enum):
    """What a member does with an update that comes from the one before it."""

    ANSWER = enum.auto()
    """It has committed this very version."""
    CARRY = enum.auto()
    """It has prepared this very version: on with it."""
    PREPARE = enum.auto()
    ASK_WHOLE = enum.auto()
    """What it has is not what the update was made for: it says so, and is sent the whole chunk."""


def is_version(info: ChunkInfo | None, request: PassUpdate) -> bool:
    """Whether ``info`` is what the request makes of the chunk."""
    update = request.update
    return info is not None and (
        (info.version, info.length, info.crc32c, info.writer, info.sequence)
        == (request.version, request.length, request.crc32c, update.writer, update.sequence)
    )


def same_version(one: ChunkInfo | None, other: ChunkInfo) -> bool:
    return one is not None and (
        (one.version, one.length, one.crc32c, one.writer, one.sequence)
        == (other.version, other.length, other.crc32c, other.writer, other.sequence)
    )


def receive(
    committed: ChunkInfo | None, pending: ChunkInfo | None, request: PassUpdate, in_step: bool
) -> Receipt:
    """``in_step``: what the member has is what the others have. A member that is brought in step
    takes whatever comes whole, until it has got a chunk. What is damaged here is
    replaced by bytes of the same version. Raises Conflict for what comes too late,
    ChunkMismatch for another update under the same version, which nobody ever makes."""
    have = 0 if committed is None else committed.version
    if committed is not None and is_version(committed, request):
        if request.damaged or not committed.is_damaged:
            return Receipt.ANSWER
        return Receipt.PREPARE if request.whole else Receipt.ASK_WHOLE
    if in_step and have >= request.version:
        if have > request.version:
            raise Conflict(detail=f"version {request.version} comes after {have}")
        raise ChunkMismatch(
            request.update.inode,
            request.update.number,
            request.passing.chain,
            detail=f"two updates are called version {have}",
        )
    if (
        pending is not None
        and is_version(pending, request)
        and pending.is_damaged == request.damaged
    ):
        return Receipt.CARRY
    if request.whole or have == request.version - 1:
        return Receipt.PREPARE
    return Receipt.ASK_WHOLE


def nothing(chunk: ChunkId) -> ChunkInfo:
    """The answer of a member that does not have a chunk: version 0."""
    return ChunkInfo(*chunk, ChunkState.SEALED)


def is_repeated(update: Update, committed: ChunkInfo | None, seen: bool) -> bool:
    """Whether a head has done this update before: then it is answered, not done. ``seen``: its
    number is one of those that the target remembers. Raises WriteUncertain for one that may have
    been done, by a head that is gone, and overwritten since."""
    if not update.writer:
        return False  # one of the servers' own, which say the same however often they come
    if committed is not None and (committed.writer, committed.sequence) == (
        update.writer,
        update.sequence,
    ):
        return not committed.is_damaged  # nothing came since: what is lost comes again
    if seen:
        return True
    if update.again and committed is not None and committed.version != update.base:
        raise WriteUncertain(*committed.chunk)
    return False


def is_wanted(held: Held, own: ChunkInfo | None, in_step: bool) -> bool:
    """Whether a member that is brought in step needs a chunk that the source has. ``own`` is None
    for one that is missing or cannot be used; ``in_step`` for one that came meanwhile, which may be
    newer than what the source says."""
    if own is None:
        return True
    is_same = (own.version, own.length, own.crc32c) == (held.version, held.length, held.crc32c)
    if held.version == 0:
        return not is_same
    if held.damaged and held.version == VERSION_UNKNOWN and own.version == 0:
        return False  # a block, and so the right one: there is no other of this name
    if is_same:
        return own.is_damaged and not held.damaged
    return not in_step
