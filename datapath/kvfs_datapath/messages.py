"""Requests of a chunk server: the wire format, field by field.

A data connection carries frames (``kvfs_base.frames``) whose payload, if any, follows the body: the
bytes of the request's items end to end, in order, without padding. A connection has one request on
its way at a time; clients open several. Every request names a target and a batch of items, and one
item's failure is its own: it stands in ``errors`` and contributes no payload to the answer.

Whoever may connect is trusted as far as the target goes (Unix sockets are 0600, TCP is loopback or
takes the cluster's secret): the requests are bounded so that no mistake exhausts the server. Names
of files are made by the server from numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from kvfs_base.errors import KvfsError, from_wire
from kvfs_base.frames import ErrorBody
from kvfs_base.limits import (
    BLOCK_BYTES_MAX,
    BLOCK_KEY_BYTES,
    CHECK_CHUNKS_PER_REQUEST,
    HOPS_MAX,
    ITEMS_PER_REQUEST_MAX,
    LIST_CHUNKS_MAX,
    STRIPE_MAX,
    TRANSFER_BYTES,
)
from kvfs_base.rpc import Request
from kvfs_base.types import U32, U64, ChunkId
from kvfs_datapath.format import SEALED, BlockKey, ChunkInfo
from kvfs_datapath.limits import RELAY_SECONDS_MAX, SYNC_PAGE_CHUNKS

ChunkBytes = Annotated[int, msgspec.Meta(ge=0, le=BLOCK_BYTES_MAX)]
TransferBytes = Annotated[int, msgspec.Meta(ge=0, le=TRANSFER_BYTES)]
_NO_KEY = bytes(BLOCK_KEY_BYTES)
_ITEMS = msgspec.Meta(min_length=1, max_length=ITEMS_PER_REQUEST_MAX)


class ChunkRef(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """As ChunkId. What there are hundreds of in a message is nothing for the garbage collector to
    look through: it holds numbers (``gc``)."""

    inode: U64
    number: U32
    chain: U32

    @property
    def chunk(self) -> ChunkId:
        return ChunkId(self.inode, self.number, self.chain)


class SizedChunk(ChunkRef, frozen=True):
    size: ChunkBytes


class WholeChunk(ChunkRef, frozen=True):
    """A sealed chunk and what it holds: for who writes it, and for who wants no other."""

    size: ChunkBytes
    crc32c: U32
    key: BlockKey

    def difference(self, info: ChunkInfo) -> str:
        """What is wrong if a chunk of which its attribute says ``info`` is to be this one."""
        if info.state is not SEALED:
            return "the chunk is open for writing"
        if info.inode != self.inode or info.number != self.number or info.chain != self.chain:
            return f"chunk {tuple(info.chunk)} is in its place"
        if (info.key or _NO_KEY) != (self.key or _NO_KEY):
            return "the chunk holds another key"
        if info.length != self.size:
            return f"{info.length} bytes, {self.size} expected"
        if info.crc32c != self.crc32c:
            return "the chunk was stored with another checksum"
        return ""


class Piece(ChunkRef, frozen=True):
    """``length`` bytes of a chunk from ``offset``."""

    offset: ChunkBytes
    length: TransferBytes


class StagedItem(msgspec.Struct, array_like=True, frozen=True):
    """``token`` is from the Staged answer to an earlier request of this connection."""

    token: U64
    chunk: WholeChunk


ChunkRefs = Annotated[tuple[ChunkRef, ...], _ITEMS]


class Outcomes(msgspec.Struct, array_like=True, frozen=True):
    """One info an item in order, None where ``errors`` (by item index) says why not. An item
    without info and without error is done, and has nothing to say."""

    infos: tuple[ChunkInfo | None, ...]
    errors: dict[int, ErrorBody]
    sums: tuple[U32, ...] = ()
    """CRC32C of each item's payload, where that was asked for; 0 where there is none."""
    incarnation: U64 = 0
    """Of WritePieces, TruncateChunks and SyncChunks on chains of one copy: another one than before
    means that what was written before, and not synced, may be gone."""

    def error(self, index: int) -> KvfsError | None:
        body = self.errors.get(index)
        return None if body is None else from_wire(body.code, body.data)


class ChunkRequest(Request):
    """Base of all: raises NoTarget unless this server has ``target_id``, TargetFailed once its disk
    has failed. Where chunks of chains are concerned TargetFenced if it may not answer for one, and
    StaleChain if the request names another version of the chain than the server knows."""

    Reply: ClassVar[Any] = Outcomes
    target_id: U32


# --- whole chunks


class ReadChunks(ChunkRequest, tag="read"):
    """Payload of the answer: the chunks that have no error, which are all that the answer says
    (no infos). One that is not as it is asked for is ChunkMismatch. Any connection."""

    chunks: Annotated[tuple[WholeChunk, ...], _ITEMS]


class OpenChunks(ChunkRequest, tag="open"):
    """Passes a read-only descriptor for each chunk without error, in order (Unix connections).
    ``direct``: O_DIRECT where the file system has it. ``verify``: checks sealed chunks, once since
    the server started, for callers that cannot (a checksum covers the whole chunk). ``seal``: seals
    chunks first that are open and have no writer."""

    chunks: ChunkRefs
    direct: bool = False
    verify: bool = False
    seal: bool = False


class Passing(msgspec.Struct, array_like=True, frozen=True):
    """How a write goes along a chain: what every member compares with the chain as it knows it.
    All chunks of a request that has one are of this chain."""

    chain: U32
    version: U32
    hops: Annotated[tuple[U32, ...], msgspec.Meta(max_length=HOPS_MAX)] = ()
    """Targets that have yet to get it, in order, after the one that is asked."""


class Onward(msgspec.Struct, array_like=True, frozen=True):
    """For a member that is asked because the sender cannot reach the head: the request goes on to
    that, as it is but for this. What the member answers is what the head does, or ConnectionLost:
    the head may have carried it out, or may yet."""

    head: U32
    seconds: Annotated[int, msgspec.Meta(ge=1, le=RELAY_SECONDS_MAX)]
    """How long the sender waits."""


class WriteChunks(ChunkRequest, tag="write"):
    """Payload: the chunks. Each is checked against its checksum and published on its own.
    ``passing``: on a chain of several copies the bytes are passed on to ``hops`` while they come
    in; a chunk without error is published there, too. Any member may be the first to get it."""

    chunks: Annotated[tuple[WholeChunk, ...], _ITEMS]
    passing: Passing | None = None


class Staged(msgspec.Struct, array_like=True, frozen=True):
    tokens: tuple[U64, ...]


class StageChunks(ChunkRequest, tag="stage"):
    """Passes ``count`` descriptors of empty staging files, O_DIRECT where there is such a thing,
    for the caller to fill (Unix connections). They go with the connection, if not published."""

    Reply: ClassVar[Any] = Staged
    count: Annotated[int, msgspec.Meta(ge=1, le=ITEMS_PER_REQUEST_MAX)]


class PublishChunks(ChunkRequest, tag="publish"):
    """Publishes staged files and drops those in ``discard``. What the caller wrote is what it says
    it is: every reader checks."""

    chunks: Annotated[tuple[StagedItem, ...], msgspec.Meta(max_length=ITEMS_PER_REQUEST_MAX)]
    discard: Annotated[tuple[U64, ...], msgspec.Meta(max_length=ITEMS_PER_REQUEST_MAX)] = ()
    passing: Passing | None = None
    """Without hops: the caller sends the chunks to the other members itself."""


# --- chunks of ordinary files


class OpenForWrite(ChunkRequest, tag="open_for_write"):
    """Passes a read-write descriptor for each chunk, which is made if missing and marked open
    (Unix connections). The caller closes it before it asks to seal."""

    chunks: ChunkRefs


class Adopted(ChunkRef, frozen=True):
    """``token`` is from the Staged answer to an earlier request of this connection."""

    token: U64


class AdoptChunks(ChunkRequest, tag="adopt"):
    """Gives staged files their names as chunks that are open for writing, with what is in them:
    their descriptors are then as those of OpenForWrite. Conflict where there is a chunk. A staged
    file that is named here is used up, also where that fails (Unix connections)."""

    chunks: Annotated[tuple[Adopted, ...], _ITEMS]


class ReadPieces(ChunkRequest, tag="read_pieces"):
    """Payload of the answer: the pieces without error. A piece is shorter where the chunk ends;
    ``infos[i].length`` says how long the chunk is. Any connection. ``summed``: with a checksum of
    each piece, for which the server has to read them (TRANSFER_BYTES in all): the chunk's is of no
    use for a part of it."""

    pieces: Annotated[tuple[Piece, ...], _ITEMS]
    summed: bool = False
    passing: Passing | None = None
    """From the source of a chain to the member that it brings in step, which does not serve: the
    source's own copy is damaged."""


class WritePieces(ChunkRequest, tag="write_pieces"):
    """Payload: the pieces. Chunks are made if missing and marked open. The connection counts as
    their writer until they are sealed."""

    pieces: Annotated[tuple[Piece, ...], _ITEMS]


class SealChunks(ChunkRequest, tag="seal"):
    """The caller has finished writing. ``infos`` tell which chunks have another writer and stay
    open. A missing chunk is ChunkNotFound."""

    chunks: ChunkRefs


class TruncateChunks(ChunkRequest, tag="truncate"):
    """Cuts each chunk to ``size`` bytes; missing and shorter ones stay as they are."""

    chunks: Annotated[tuple[SizedChunk, ...], _ITEMS]


class SyncChunks(ChunkRequest, tag="sync"):
    """Answered once everything written to the chunks is on stable storage, of every member of
    ``passing``: it goes to the head."""

    chunks: ChunkRefs
    passing: Passing | None = None
    onward: Onward | None = None


class RemoveRange(ChunkRequest, tag="remove"):
    """Removes the chunks ``first <= number < end`` of an inode that this target has. With
    ``passing`` it goes to the head, and they are cut to nothing on every member."""

    inode: U64
    first: U32
    end: U32
    writer: U32 = 0
    passing: Passing | None = None
    sequence: U32 = 0
    """With ``writer``: as in Update. One that comes late would take away what was written since."""
    onward: Onward | None = None


class StatChunks(ChunkRequest, tag="stat"):
    chunks: ChunkRefs


# --- chunks of ordinary files on chains of several copies


class Update(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """``length`` bytes at ``offset``, or with ``cut`` nothing but an end at ``offset``. A chunk
    that is cut to nothing keeps its version. ``writer`` and ``sequence`` make it known when it
    comes again (``again``); ``base`` is then the version that the chunk had, as far as the writer
    knows, when he tried for the first time, or None."""

    inode: U64
    number: U32
    offset: ChunkBytes
    length: TransferBytes
    crc32c: U32
    """Of the bytes."""
    writer: U32
    sequence: U32
    cut: bool = False
    again: bool = False
    base: U32 | None = None

    @property
    def payload_bytes(self) -> int:
        return 0 if self.cut else self.length


class UpdateChunks(ChunkRequest, tag="update"):
    """To the head of a chain. Payload: the bytes of the updates. Each is answered, by the chunk as
    it is afterwards, once every member has it. ``passing`` has no hops: the head knows them. Also
    raises WriteUncertain, DiskFull (then it is nowhere), Conflict (temporary)."""

    passing: Passing
    updates: Annotated[tuple[Update, ...], _ITEMS]
    onward: Onward | None = None


class PassUpdate(ChunkRequest, tag="pass_update"):
    """From a member to the next. Payload: the bytes of ``update``. The chunk has ``version`` and
    ``crc32c`` and ``length`` afterwards. With ``whole`` the payload is the whole chunk (``offset``
    is 0) and what the next has is replaced; else it must have ``version`` - 1, or answers with
    what it has (an info, no error) and wants the whole chunk. Answered when every member after
    the sender has it. The same version may come again."""

    passing: Passing
    update: Update
    version: U32
    crc32c: U32
    length: ChunkBytes
    whole: bool = False
    durable: bool = False
    """Of a whole chunk: somebody asked for that, and the next one may never have been asked."""
    damaged: bool = False
    """With ``whole``, and a ``cut`` without payload: nobody has the bytes of this version any more,
    and the next one must not serve what it has instead."""


class DropUpdate(ChunkRequest, tag="drop_update"):
    """From a member to the next, which has no room for an update that it was sent before, and may
    still get: ``made`` is the pending version. The answer is the chunk as it is there. Unless it is
    that very version, nobody behind the sender has it, and under this version of the chain nobody
    takes it any more: DiskFull."""

    passing: Passing
    made: ChunkInfo


class SyncChain(ChunkRequest, tag="sync_chain"):
    """From the last serving member to one that is syncing: forget what is pending, a comparison
    begins."""

    passing: Passing


class Held(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What the serving member has."""

    inode: U64
    number: U32
    length: U64
    crc32c: U32
    version: U32
    """0 for a block."""
    damaged: bool = False
    """The bytes are lost there."""


class Wanted(msgspec.Struct, array_like=True, frozen=True):
    places: tuple[U32, ...]
    """Indexes of the chunks that the syncing member lacks, or has otherwise."""


class CompareChunks(ChunkRequest, tag="compare"):
    """One page, in the order of (inode, number): all chunks of the chain that the serving member
    has from ``start`` up to, not including, ``end`` (None: to the last). File chunks that only the
    other has are removed there, unless they came during this comparison."""

    Reply: ClassVar[Any] = Wanted
    passing: Passing
    start: ChunkRef
    end: ChunkRef | None
    held: Annotated[tuple[Held, ...], msgspec.Meta(max_length=SYNC_PAGE_CHUNKS)]


class HeldChunk(msgspec.Struct, array_like=True, frozen=True):
    """A sealed chunk of a file, at the target that it leaves."""

    number: U32
    length: U64
    crc32c: U32


class CompareMoved(ChunkRequest, tag="compare_moved"):
    """From the server of target ``source``, which a file leaves: what it has of the chunks
    ``start <= number < end`` with ``number % width`` in ``places``. Of those the other one removes
    what it has besides, or otherwise; it answers with what it lacks, and the rest is on stable
    storage. Raises Conflict if ``ticket`` is lower than one that this source has named before."""

    Reply: ClassVar = Wanted
    source: U32
    ticket: U64
    inode: U64
    width: Annotated[int, msgspec.Meta(ge=1, le=STRIPE_MAX)]
    places: Annotated[tuple[U32, ...], msgspec.Meta(max_length=STRIPE_MAX)]
    start: U32
    end: U32
    held: Annotated[tuple[HeldChunk, ...], msgspec.Meta(max_length=SYNC_PAGE_CHUNKS)]


class PlaceMoved(ChunkRequest, tag="place_moved"):
    """Payload: a chunk of a file that leaves target ``source``. It is checked, and on stable
    storage when this is answered. ``ticket`` as in CompareMoved."""

    source: U32
    ticket: U64
    chunk: WholeChunk
    durable: bool = False
    """Somebody asked for that where it comes from."""


class RepairChunks(ChunkRequest, tag="repair"):
    """A reader could not use these chunks of a chain, another member had them: look, and get them
    from there. Infos are of chunks that are whole again, or were."""

    chunks: ChunkRefs


# --- checking


class ListedChunk(ChunkRef, frozen=True):
    """``info`` is None for a chunk that cannot be used; ``problem`` says why."""

    info: ChunkInfo | None
    problem: str = ""


class ChunkPage(msgspec.Struct, array_like=True, frozen=True):
    chunks: tuple[ListedChunk, ...]
    next: ChunkRef | None
    """Where the next page begins, or None after the last one."""


class ListChunks(ChunkRequest, tag="list"):
    """The chunks of the target from ``start`` on, in the order of inode and number. The first
    request of a connection reads all names; the pages that follow, in order, show what it found.
    Chunks that went meanwhile are left out, so a page may be short."""

    Reply: ClassVar[Any] = ChunkPage
    start: ChunkRef
    """Its chain is the one that is listed, 0 for the chunks that belong to none."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_CHUNKS_MAX)] = LIST_CHUNKS_MAX


class FindChunks(ChunkRequest, tag="find"):
    """The chunks ``first <= number < end`` of an inode that this target has, in their order: what
    of a file is no hole. Only chunks of one copy."""

    Reply: ClassVar[Any] = ChunkPage
    inode: U64
    first: U32
    end: U32


class CheckChunks(ChunkRequest, tag="check"):
    """Reads sealed chunks again, from the disk where it can be asked to, and compares with their
    checksums: ChunkCorrupt. Open chunks have nothing to compare with."""

    chunks: Annotated[
        tuple[ChunkRef, ...], msgspec.Meta(min_length=1, max_length=CHECK_CHUNKS_PER_REQUEST)
    ]


class Statistics(Request, tag="statistics"):
    """Counters and gauges of the server by name (docs/metrics.md). The only request that names no
    target: it is answered when none can be used, too. Any connection."""

    Reply: ClassVar[Any] = dict[str, int]


DataRequest = (
    ReadChunks
    | OpenChunks
    | WriteChunks
    | StageChunks
    | PublishChunks
    | OpenForWrite
    | AdoptChunks
    | ReadPieces
    | WritePieces
    | SealChunks
    | TruncateChunks
    | SyncChunks
    | RemoveRange
    | StatChunks
    | UpdateChunks
    | PassUpdate
    | DropUpdate
    | SyncChain
    | CompareChunks
    | CompareMoved
    | PlaceMoved
    | RepairChunks
    | ListChunks
    | FindChunks
    | CheckChunks
    | Statistics
)


def payload_bytes(request: Request) -> int:
    """How long the payload of a request is: what its items say."""
    match request:
        case WriteChunks():
            return sum(chunk.size for chunk in request.chunks)
        case WritePieces():
            return sum(piece.length for piece in request.pieces)
        case UpdateChunks():
            return sum(update.payload_bytes for update in request.updates)
        case PassUpdate():
            return request.update.payload_bytes
        case PlaceMoved():
            return request.chunk.size
    return 0


def reply_problem(request: Request, reply: Any) -> str:
    """What is wrong with an answer whose fields are right one by one, or nothing. Callers go by the
    places of their items: each that is asked about has an info or an error."""
    count = 0
    match request:
        case ReadChunks():
            fits = not reply.infos and all(index < len(request.chunks) for index in reply.errors)
            return "" if fits else f"{len(reply.infos)} infos, errors of {list(reply.errors)}"
        case OpenChunks() | OpenForWrite() | StatChunks() | SealChunks():
            count = len(request.chunks)
        case ReadPieces():
            count = len(request.pieces)
            if request.summed and len(reply.sums) != count:
                return f"{len(reply.sums)} sums of {count} pieces"
        case UpdateChunks():
            count = len(request.updates)
        case PassUpdate() | DropUpdate():
            count = 1
        case StageChunks():
            fits = len(reply.tokens) == request.count
            return "" if fits else f"{len(reply.tokens)} of {request.count} tokens"
        case CompareChunks() | CompareMoved():
            return "" if all(p < len(request.held) for p in reply.places) else "another page"
        case _:
            return ""
    fits = len(reply.infos) == count and all(
        (info is None) == (index in reply.errors) for index, info in enumerate(reply.infos)
    )
    return "" if fits else f"{len(reply.infos)} infos, {len(reply.errors)} errors, {count} items"
