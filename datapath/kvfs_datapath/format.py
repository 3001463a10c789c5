"""How a chunk lies on disk: the names, and the attribute beside the payload.

A chunk file holds exactly its payload. Everything else is in its extended attribute ``user.kvfs``,
little-endian:

    offset  size  field
    0       4     magic    "KVFC"
    4       2     version  1
    6       1     state    1 OPEN (a writer may be at work, no checksum), 2 SEALED
    7       1     flags    bit 0: somebody asked for durability (fsync); seals wait for the disk
    8       8     inode    of the file or block; for a block also its generation
    16      4     number   of the chunk in its file
    20      4     crc32c   of the payload; 0 while OPEN
    24      8     length   of the payload in bytes; 0 while OPEN, where the file's size counts
    32      32    key      of the block, zeros for chunks of ordinary files
    64      4     crc32c   of the 64 bytes before

68 bytes are the most that ext4 keeps inside a 256-byte inode beside its own fields: reading it
costs no disk access of its own, and a chunk takes no extra block (measured: 72 bytes take one).
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated

import msgspec

from kvfs_base.errors import ChunkMismatch, InvalidRequest, VersionMismatch
from kvfs_base.limits import BLOCK_KEY_BYTES
from kvfs_base.types import U32, U64, ChunkId
from kvfs_datapath.checksum import crc32c

ATTRIBUTE = "kvfs"
MAGIC = b"KVFC"
VERSION = 1
_BODY = struct.Struct("<4sHBBQIIQ32s")
_SUM = struct.Struct("<I")
ATTRIBUTE_BYTES = _BODY.size + _SUM.size

CHUNKS = "chunks"
CHAINS = "chains"
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


class ChunkInfo(msgspec.Struct, array_like=True, frozen=True):
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


def pack(info: ChunkInfo) -> bytes:
    """The attribute of a chunk. Raises InvalidRequest for a key of another length."""
    if len(info.key) not in (0, BLOCK_KEY_BYTES):
        raise InvalidRequest(detail=f"a block key of {len(info.key)} bytes")
    sealed = info.is_sealed
    body = _BODY.pack(
        MAGIC,
        VERSION,
        info.state,
        _FLAG_DURABLE if info.durable else 0,
        info.inode,
        info.number,
        info.crc32c if sealed else 0,
        info.length if sealed else 0,
        info.key or _NO_KEY,
    )
    return body + _SUM.pack(crc32c(body))


def unpack(data: bytes | None, chunk: ChunkId) -> ChunkInfo:
    """The attribute of the file at ``chunk``'s place. Raises ChunkMismatch if it is missing,
    damaged or another chunk's, VersionMismatch if a newer server wrote it."""
    if data is None or len(data) < 6 or data[:4] != MAGIC:
        raise ChunkMismatch(*chunk, detail="no chunk attribute")
    version = int.from_bytes(data[4:6], "little")
    if version != VERSION:
        raise VersionMismatch(detail="chunk format", found=str(version), expected=str(VERSION))
    if len(data) != ATTRIBUTE_BYTES or _SUM.unpack_from(data, 64)[0] != crc32c(data[:64]):
        raise ChunkMismatch(*chunk, detail="chunk attribute is damaged")
    _, _, state, flags, inode, number, checksum, length, key = _BODY.unpack_from(data)
    if (inode, number) != chunk[:2] or state not in (ChunkState.OPEN, ChunkState.SEALED):
        raise ChunkMismatch(*chunk, detail=f"the file holds chunk {inode}.{number} state {state}")
    return ChunkInfo(
        inode=inode,
        number=number,
        chain=chunk.chain,
        state=ChunkState(state),
        length=length,
        crc32c=checksum,
        key=b"" if key == _NO_KEY else key,
        durable=bool(flags & _FLAG_DURABLE),
    )


def root_of(chain: int) -> str:
    """The tree of a chain's chunks, or of those that belong to none."""
    return f"{CHAINS}/{chain:08x}" if chain else CHUNKS


def directory_of(inode: int, chain: int = 0) -> str:
    """All chunks that one target holds of one inode share a directory, so that removing a file
    needs no index: small ranges by name, large ones by listing it."""
    return f"{root_of(chain)}/{crc32c(inode.to_bytes(8, 'little')) & 0xFF:02x}"


def path_of(chunk: ChunkId) -> str:
    directory = directory_of(chunk.inode, chunk.chain)
    return f"{directory}/{chunk.inode:016x}.{chunk.number:08x}"


def chunk_of(name: str, chain: int = 0) -> ChunkId | None:
    """The chunk that a file name stands for, or None for a name that is not ours."""
    inode, dot, number = name.partition(".")
    if not dot or len(inode) != 16 or len(number) != 8:
        return None
    try:
        return ChunkId(int(inode, 16), int(number, 16), chain)
    except ValueError:
        return None
