"""Requests of the node agent: the wire format, field by field.

They travel in frames (kvfs_base.frames) over a Unix socket. A *session* is one client: it owns
leases, a staging area and unfinished puts, and lives exactly as long as the connection that opened
it. Further connections join it by its secret. Requests that the metadata service can answer
(OpenNamespace, MatchBlocks) have its own structs and are passed on.
"""

from __future__ import annotations

import struct
from typing import Annotated, ClassVar

import msgspec

from kvfs_base.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_KEY_BYTES,
    DIRECTORY_PAGE_ENTRIES,
)
from kvfs_base.rpc import Request
from kvfs_base.types import U32, U64
from kvfs_metadata.messages import Done, Keys, MatchBlocks, OpenNamespace

SESSION_BYTES = 16

GRANTED = struct.Struct("<QQQ")
"""One block of a Granted reply: offset and size in the arena, generation. A miss is NO_BLOCK."""

NO_BLOCK = GRANTED.pack((1 << 64) - 1, 0, 0)

STAGED = struct.Struct("<IQ")
"""One block of a StageBlocks request: its place in the put's keys, its offset in staging."""


def split_keys(keys: bytes) -> list[bytes]:
    """The keys of a packed list; the last is shorter if the list was cut off."""
    return [keys[i : i + BLOCK_KEY_BYTES] for i in range(0, len(keys), BLOCK_KEY_BYTES)]


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    """Comes with three descriptors if it opens a session, memfds of sealed size: the arena
    (read-only), the session's staging area and its lease board.

    The board has one byte a lease. To give lease ``n`` back the client sets byte ``n - 1`` to 1,
    which costs no call; the agent looks at the board when it needs the room, at the latest.
    """

    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    arena_bytes: U64
    staging_bytes: U64


class Hello(Request, tag="hello"):
    """First request of every connection. ``session`` empty opens a session, else joins it. Raises
    EntryNotFound for a session that is over (or belonged to an agent that is), ServerBusy if the
    agent has too many connections."""

    Reply: ClassVar = Welcome
    session: Annotated[bytes, msgspec.Meta(max_length=SESSION_BYTES)] = b""


class Granted(msgspec.Struct, array_like=True, frozen=True):
    lease: U64
    """From 1; 0 if nothing was found: nothing to give back."""
    blocks: bytes
    """GRANTED for each key, end to end."""


class GetBlocks(Request, tag="get_blocks"):
    """Brings blocks into the arena and leases them; one lease for the batch. Raises ArenaFull when
    leases leave no room, or when the client holds as much as it may."""

    Reply: ClassVar = Granted
    namespace: U64
    keys: Keys


class CountResident(Request, tag="count_resident"):
    """Answers with the number of these blocks that lie in the arena: getting them reads no disk.
    A hint, given without asking the metadata service."""

    Reply: ClassVar = int
    namespace: U64
    keys: Keys


class PutPlan(msgspec.Struct, array_like=True, frozen=True):
    put: U64
    """0 if every key is stored already."""
    wanted: bytes
    """One byte a key: 1 if the block must be staged, 0 if it is stored already."""


class PreparePut(Request, tag="prepare_put"):
    """Opens a put. Keys must differ. Raises CacheFull, QuotaExceeded, NoTarget, LimitExceeded."""

    Reply: ClassVar = PutPlan
    namespace: U64
    keys: Keys
    sizes: Annotated[tuple[U32, ...], msgspec.Meta(max_length=BATCH_BLOCKS_MAX)]


class StageBlocks(Request, tag="stage_blocks"):
    """The staging area holds these blocks: the agent writes them. When it answers, the client may
    reuse the staging area. ``commit`` makes the whole put visible. Any error aborts the put."""

    Reply: ClassVar = Done
    put: U64
    blocks: Annotated[bytes, msgspec.Meta(max_length=BATCH_BLOCKS_MAX * STAGED.size)]
    """STAGED for each block, end to end."""
    commit: bool


class AbortPut(Request, tag="abort_put"):
    """Gives a put up; unknown ones are ignored."""

    Reply: ClassVar = Done
    put: U64


class DropBlocks(Request, tag="drop_blocks"):
    """Removes blocks. Answers with the number that were stored."""

    Reply: ClassVar = int
    namespace: U64
    keys: Keys


class KeysPage(msgspec.Struct, array_like=True, frozen=True):
    keys: Keys
    more: bool


class ListKeys(Request, tag="list_keys"):
    """Stored keys that sort after ``after``, in the order of their bytes."""

    Reply: ClassVar = KeysPage
    namespace: U64
    after: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    limit: Annotated[int, msgspec.Meta(ge=1, le=DIRECTORY_PAGE_ENTRIES)] = DIRECTORY_PAGE_ENTRIES


class AgentStatistics(Request, tag="agent_statistics"):
    """Counters and gauges of the agent by name."""

    Reply: ClassVar = dict[str, int]


AgentRequest = (
    Hello
    | OpenNamespace
    | MatchBlocks
    | GetBlocks
    | CountResident
    | PreparePut
    | StageBlocks
    | AbortPut
    | DropBlocks
    | ListKeys
    | AgentStatistics
)
