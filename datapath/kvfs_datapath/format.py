"""How a chunk lies on disk: the names, and the attribute beside the payload.

A chunk file holds exactly its payload. Everything else is in its extended attribute ``user.kvfs``,
little-endian:

    offset  size  field
    0       4     magic    "KVFC"
    4       2     version  1; 2 for chunks of files on chains of several copies (below)
    6       1     state    1 OPEN (a writer may be at work, no checksum), 2 SEALED (below: 3, 4)
    7       1     flags    bit 0: somebody asked for durability (fsync); seals wait for the disk
    8       8     inode    of the file or block; for a block also its generation
    16      4     number   of the chunk in its file
    20      4     crc32c   of the payload; 0 while OPEN
    24      8     length   of the payload in bytes; 0 while OPEN, where the file's size counts
    32      32    key      of the block, zeros for chunks of ordinary files
    64      4     crc32c   of the 64 bytes before

In version 2 (docs/design/0004-chains.md) the state is SEALED, or 3 PENDING where the file was made
to be the chunk's next version: its place says whether it has become that. Or it is 4 DAMAGED: the
bytes of this version are lost, and whatever the file holds is not the chunk. In the place of the
key:

    32      4     version           of the chunk, from 1
    36      4     writer            who made this version
    40      4     sequence          and under which number of his
    44      4     pending_length    with an append that is not committed: the length then, else 0
    48      4     pending_crc32c    of everything up to there
    52      4     pending_writer
    56      4     pending_sequence
    60      4     0

68 bytes are the most that ext4 keeps inside a 256-byte inode beside its own fields: reading it
costs no disk access of its own, and a chunk takes no extra block (measured: 72 bytes take one).
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated, NamedTuple

import msgspec

from kvfs_base.errors import ChunkMismatch, InvalidRequest, VersionMismatch
from kvfs_base.limits import BLOCK_KEY_BYTES
from kvfs_base.types import U32, U64, ChunkId
from kvfs_datapath.checksum import crc32c

ATTRIBUTE = "kvfs"
MAGIC = b"KVFC"
WHOLE = 1
VERSIONED = 2
_BODY = struct.Struct("<4sHBBQIIQ32s")
_VERSION = struct.Struct("<7I4x")
_SUM = struct.Struct("<I")
ATTRIBUTE_BYTES = _BODY.size + _SUM.size

CHUNKS = "chunks"
CHAINS = "chains"
PENDING = "pending"
STAGING = "staging"
DIRECTORIES = 256

_FLAG_DURABLE = 1
_NO_KEY = bytes(BLOCK_KEY_BYTES)

BlockKey = Annotated[bytes, msgspec.Meta(max_length=BLOCK_KEY_BYTES)]
"""32 bytes, or none for chunks of ordinary files."""


class ChunkState(enum.IntEnum):
    OPEN = 1
    SEALED = 2
    PENDING = 3
    """The next version of a chunk of a chain, which is not committed yet."""
    DAMAGED = 4
    """A chunk of a chain whose bytes nobody has; length and checksum are what they were."""


SEALED = ChunkState.SEALED
VERSION_UNKNOWN = 1 << 31
"""The version of a damaged chunk whose attribute is lost as well: above all that others may have,
since nobody writes one chunk 2**31 times."""


class ChunkInfo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a chunk's attribute says; it travels in replies. ``length`` of an OPEN chunk is the size
    that its file had when it was looked at. ``version`` is 0 but for file chunks of chains."""

    inode: U64
    number: U32
    chain: U32
    state: ChunkState
    length: U64 = 0
    crc32c: U32 = 0
    key: BlockKey = b""
    durable: bool = False
    version: U32 = 0
    writer: U32 = 0
    """Who made this version, and under which number of his."""
    sequence: U32 = 0

    @property
    def chunk(self) -> ChunkId:
        return ChunkId(self.inode, self.number, self.chain)

    @property
    def is_sealed(self) -> bool:
        return self.state is ChunkState.SEALED

    @property
    def is_damaged(self) -> bool:
        return self.state is ChunkState.DAMAGED


_STATES = {
    WHOLE: (ChunkState.OPEN, ChunkState.SEALED),
    VERSIONED: (ChunkState.SEALED, ChunkState.PENDING, ChunkState.DAMAGED),
}


class Append(NamedTuple):
    """An append that is not committed: how the chunk is afterwards, and who makes it so."""

    length: int
    crc32c: int
    writer: int
    sequence: int


_NOTHING = Append(0, 0, 0, 0)


def pack(info: ChunkInfo, append: Append | None = None) -> bytes:
    """The attribute of a chunk; an ``append`` only on one that has a version. Raises InvalidRequest
    for a key of another length."""
    if len(info.key) not in (0, BLOCK_KEY_BYTES):
        raise InvalidRequest(detail=f"a block key of {len(info.key)} bytes")
    rest = info.key or _NO_KEY
    if info.version:
        rest = _VERSION.pack(info.version, info.writer, info.sequence, *(append or _NOTHING))
    is_open = info.state is ChunkState.OPEN
    body = _BODY.pack(
        MAGIC,
        VERSIONED if info.version else WHOLE,
        info.state,
        _FLAG_DURABLE if info.durable else 0,
        info.inode,
        info.number,
        0 if is_open else info.crc32c,
        0 if is_open else info.length,
        rest,
    )
    return body + _SUM.pack(crc32c(body))


def unpack(data: bytes | None, chunk: ChunkId) -> ChunkInfo:
    """The attribute of the file at ``chunk``'s place. Raises ChunkMismatch if it is missing,
    damaged or another chunk's, VersionMismatch if a newer server wrote it."""
    return unpack_versioned(data, chunk)[0]


def unpack_versioned(data: bytes | None, chunk: ChunkId) -> tuple[ChunkInfo, Append | None]:
    """As ``unpack``, with the append that is not committed."""
    if data is None or len(data) < 6 or data[:4] != MAGIC:
        raise ChunkMismatch(*chunk, detail="no chunk attribute")
    version = int.from_bytes(data[4:6], "little")
    if version not in (WHOLE, VERSIONED):
        found, newest = str(version), str(VERSIONED)
        raise VersionMismatch(detail="chunk format", found=found, expected=newest)
    if len(data) != ATTRIBUTE_BYTES or _SUM.unpack_from(data, 64)[0] != crc32c(data[:64]):
        raise ChunkMismatch(*chunk, detail="chunk attribute is damaged")
    _, _, state, flags, inode, number, checksum, length, rest = _BODY.unpack_from(data)
    if (inode, number) != chunk[:2] or state not in _STATES[version]:
        raise ChunkMismatch(*chunk, detail=f"the file holds chunk {inode}.{number} state {state}")
    key, made, append = b"", (0, 0, 0), None
    if version == WHOLE:
        key = b"" if rest == _NO_KEY else rest
    else:
        *numbers, length_then, checksum_then, writer, sequence = _VERSION.unpack(rest)
        made = (numbers[0], numbers[1], numbers[2])
        if length_then:
            append = Append(length_then, checksum_then, writer, sequence)
        if not made[0] or not chunk.chain:
            raise ChunkMismatch(*chunk, detail=f"version {made[0]} of a chunk, chain {chunk.chain}")
    durable = bool(flags & _FLAG_DURABLE)
    state = ChunkState(state)
    info = ChunkInfo(inode, number, chunk.chain, state, length, checksum, key, durable, *made)
    return info, append


def root_of(chain: int) -> str:
    """The tree of a chain's chunks, or of those that belong to none."""
    return f"{CHAINS}/{chain:08x}" if chain else CHUNKS


def directory_of(inode: int, chain: int = 0) -> str:
    """All chunks that one target holds of one inode share a directory, so that removing a file
    needs no index: small ranges by name, large ones by listing it."""
    return f"{root_of(chain)}/{crc32c(inode.to_bytes(8, 'little')) & 0xFF:02x}"


def _name_of(chunk: ChunkId) -> str:
    return f"{chunk.inode:016x}.{chunk.number:08x}"


def path_of(chunk: ChunkId) -> str:
    return f"{directory_of(chunk.inode, chunk.chain)}/{_name_of(chunk)}"


def pending_directory_of(chain: int) -> str:
    return f"{root_of(chain)}/{PENDING}"


def pending_path_of(chunk: ChunkId) -> str:
    """Where the next version of a chunk lies until it is committed."""
    return f"{pending_directory_of(chunk.chain)}/{_name_of(chunk)}"


def chunk_of(name: str, chain: int = 0) -> ChunkId | None:
    """The chunk that a file name stands for, or None for a name that is not ours."""
    inode, dot, number = name.partition(".")
    if not dot or len(inode) != 16 or len(number) != 8:
        return None
    try:
        return ChunkId(int(inode, 16), int(number, 16), chain)
    except ValueError:
        return None


def chain_of(name: str) -> int | None:
    """The chain that a directory's name stands for, or None for a name that is not ours."""
    try:
        chain = int(name, 16)
    except ValueError:
        return None
    return chain if chain and name == f"{chain:08x}" else None
