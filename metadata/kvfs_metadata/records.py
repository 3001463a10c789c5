"""Keys and values of the metadata store; docs/design/0001-metadata-format.md explains them.

A key is four letters and big-endian numbers, so that the order of the bytes is the order of the
numbers and everything of one kind, directory or namespace lies side by side. Values are msgpack
arrays (fields may be added at the end, with a default) or, where there are many, packed structs.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from kvfs_base.types import U32, U64, Address, Attr, KVLayout, Layout

FORMAT_KEY = b"METAformat"
FORMAT_PREFIX = b"kvfs-metadata "
FORMAT_VERSION = 4
"""Grows with every change that an older version would misread; ``migrations`` has the steps."""


def format_text(version: int) -> bytes:
    return FORMAT_PREFIX + b"%d" % version


FORMAT = format_text(FORMAT_VERSION)
COPYING_KEY = b"METAcopying"
WENT_BACK_KEY = b"METAwentback"
"""There once the store has forgotten commits that were acknowledged: numbers that it gave out then
must not be given again. Whoever opens it skips some, and takes the key away."""
"""There from the beginning of a copy into a store until it is whole, with a token of the copier."""

INODE = b"INOD"
ENTRY = b"DENT"
XATTR = b"XATR"
ORPHAN = b"ORPH"
NAMESPACE = b"NSPC"
BLOCK = b"BLCK"
PREPARED = b"PREP"
COMMITTED = b"DONE"
TARGET = b"TARG"
CHAIN = b"CHAN"
REMOVAL = b"RMVL"
MOVE = b"MOVE"
REMOVAL_STATE = b"RSEQ"
COUNTER = b"CNTR"
SESSION = b"SESS"
OPEN = b"OPEN"
WATCHER = b"WTCH"
WRITER = b"WRIT"
SERVER = b"SRVR"
BEAT = b"BEAT"
GONE = b"GONE"
ANSWER = b"RSLT"
LOCK = b"LOCK"
QUOTA = b"QUOT"
OPEN_WRITES = b"w"
OPEN_CUTS = b"c"
USAGE_KEY = b"STATusage"
SWEEP_KEY = b"STATsweep"
"""There, with an empty value, while something may refer to a target that was removed."""
MAP_KEY = b"STATmap"
"""Counts recorded changes of targets and chains, and starts of servers: the upper half of the
versions of cluster maps, the same for all servers of a store."""


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


def u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def number_at(key: bytes, offset: int = 4) -> int:
    """The 64-bit number in a key, by default the one after the four letters."""
    return int.from_bytes(key[offset : offset + 8], "big")


def inode_key(inode: int) -> bytes:
    return INODE + inode.to_bytes(8, "big")


def entry_key(parent: int, name: bytes) -> bytes:
    return ENTRY + parent.to_bytes(8, "big") + name


def xattr_key(inode: int, name: bytes) -> bytes:
    return XATTR + inode.to_bytes(8, "big") + name


def orphan_key(inode: int) -> bytes:
    return ORPHAN + inode.to_bytes(8, "big")


def namespace_key(inode: int) -> bytes:
    return NAMESPACE + inode.to_bytes(8, "big")


def block_key(inode: int) -> bytes:
    return BLOCK + inode.to_bytes(8, "big")


def prepared_key(batch_id: int) -> bytes:
    return PREPARED + batch_id.to_bytes(8, "big")


def committed_key(batch_id: int) -> bytes:
    return COMMITTED + batch_id.to_bytes(8, "big")


def target_key(uuid: str) -> bytes:
    return TARGET + uuid.encode()


def chain_key(chain_id: int) -> bytes:
    return CHAIN + chain_id.to_bytes(4, "big")


def removal_key(target_id: int, seq: int) -> bytes:
    return REMOVAL + target_id.to_bytes(4, "big") + seq.to_bytes(8, "big")


def move_key(inode: int) -> bytes:
    return MOVE + inode.to_bytes(8, "big")


def removal_state_key(target_id: int) -> bytes:
    return REMOVAL_STATE + target_id.to_bytes(4, "big")


def session_key(uuid: bytes) -> bytes:
    return SESSION + uuid


def watcher_key(session: bytes) -> bytes:
    """There, with an empty value, while the session may answer for names by itself (0007)."""
    return WATCHER + session


def writer_key(session: bytes) -> bytes:
    """On a store of its own: there while the session may write to files, with the numbers of those
    of which it cuts what lies behind the end (0009)."""
    return WRITER + session


def pack_cuts(inodes: Iterable[int]) -> bytes:
    return b"".join(map(u64, sorted(inodes)))


def unpack_cuts(value: bytes) -> list[int]:
    return [number_at(value, offset) for offset in range(0, len(value), 8)]


def open_key(inode: int, uuid: bytes) -> bytes:
    """With OPEN_WRITES if the session may write there, OPEN_CUTS if it cuts what lies behind the
    end, else empty."""
    return OPEN + inode.to_bytes(8, "big") + uuid


def lock_key(inode: int) -> bytes:
    return LOCK + inode.to_bytes(8, "big")


def quota_key(inode: int) -> bytes:
    return QUOTA + inode.to_bytes(8, "big")


def server_key(server: bytes) -> bytes:
    return SERVER + server


def beat_key(target_id: int) -> bytes:
    return BEAT + target_id.to_bytes(4, "big")


def gone_key(uuid: str) -> bytes:
    return GONE + uuid.encode()


def answer_key(client: bytes, slot: int) -> bytes:
    return ANSWER + client + slot.to_bytes(2, "big")


def counter_key(name: bytes) -> bytes:
    return COUNTER + name


class InodeRecord(msgspec.Struct, array_like=True):
    """``INOD`` + inode: the attributes, and what only the service itself needs. Attr has what is
    not explained here."""

    inode: U64
    mode: U32
    nlink: U32 = 1
    uid: U32 = 0
    gid: U32 = 0
    size: U64 = 0
    rdev: U32 = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    sparse: bool = False
    layout: Layout | None = None
    is_namespace: bool = False
    unused_key: bytes = b""
    unused_crc32c: U32 = 0
    parent: U64 = 0
    """Directories: where they lie. The root is its own parent."""
    target: bytes = b""
    """Symbolic links."""
    size_max: U64 = 0
    """Files: the largest size ever recorded. Chunks below it may exist although the file shrank."""
    copies: U32 = 0
    """Directories: how many copies there will be of what is made below. 0: as the service's setting
    says."""
    quota: U64 = 0
    """The directory whose ``QUOT`` counts this inode: itself, or the next above that has one."""
    born_ns: int = 0

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def attr(self) -> Attr:
        return Attr(
            inode=self.inode,
            mode=self.mode,
            nlink=self.nlink,
            uid=self.uid,
            gid=self.gid,
            size=self.size,
            rdev=self.rdev,
            atime_ns=self.atime_ns,
            mtime_ns=self.mtime_ns,
            ctime_ns=self.ctime_ns,
            sparse=self.sparse,
            layout=self.layout,
            is_namespace=self.is_namespace,
            quota=self.quota,
            born_ns=self.born_ns,
        )


class QuotaRecord(msgspec.Struct, array_like=True, frozen=True):
    """``QUOT`` + inode of a directory: what may be charged to it, and what is. The blocks below are
    not in it: the service knows them by heart."""

    bytes_max: U64
    """0: no bound; so with inodes."""
    inodes_max: U64
    file_bytes: U64 = 0
    inodes: U64 = 0


class NamespaceRecord(msgspec.Struct, array_like=True, frozen=True):
    """``NSPC`` + inode."""

    path: str
    """Below ``/kv``; directories there do not move, so it stays true."""
    layout: KVLayout


class BlockValue(NamedTuple):
    """``BLCK`` + inode: 68 bytes, little-endian.

    By inode, not by the block's key: the blocks of a batch then lie side by side, where their keys,
    which are hashes, would each change another page of the tree (measured: a put of 64 blocks wrote
    441 KB that way and 69 KB this way, and the file was eight times as large).
    """

    namespace: int
    size: int
    crc32c: int
    chain: int
    created_ns: int
    last_use_ns: int
    key: bytes


BlockFields = tuple[int, int, int, int, int, int, bytes]
"""A BlockValue, or its fields: making the named one takes as long as packing it."""

_BLOCK = struct.Struct("<QIIIQQ32s")


BLOCK_KEY = np.dtype([("prefix", "S4"), ("inode", ">u8")])
BLOCK_VALUE = np.dtype(
    [
        ("namespace", "<u8"),
        ("size", "<u4"),
        ("crc32c", "<u4"),
        ("chain", "<u4"),
        ("created_ns", "<u8"),
        ("last_use_ns", "<u8"),
        ("key", "V32"),
    ]
)
"""The same bytes, for many at once: a million are read in 20 ms this way."""


def pack_block(block: BlockFields) -> bytes:
    return _BLOCK.pack(*block)


def unpack_block(value: bytes) -> BlockValue:
    return BlockValue._make(_BLOCK.unpack(value))


class PreparedRecord(msgspec.Struct, array_like=True, frozen=True):
    """``PREP`` + batch id: block ``i`` has inode ``first_inode + i``."""

    namespace: U64
    expires_ns: int
    """Wall clock: it must mean something to the next process."""
    first_inode: U64
    keys: bytes
    sizes: tuple[U32, ...]
    chains: tuple[U32, ...]


class TargetRecord(msgspec.Struct, array_like=True, frozen=True):
    """``TARG`` + uuid."""

    target_id: U32
    server_id: str
    host_id: str
    unix: Address | None
    tcp: Address | None
    capacity_bytes: U64
    volume: str = ""
    draining: bool = False
    keep_blocks: bool = False
    """Draining: its blocks stay until they are evicted."""
    drained: bool = False
    """Draining: nothing refers to it any more, and nothing will while it drains."""
    host: str = ""
    """Failure domain; empty: ``host_id``."""
    rack: str = ""
    incarnation: U64 = 0
    candidate: U64 = 0
    """Another incarnation that a heartbeat named. It is the present one once it has shown that it
    knows the map ``challenge``: a process that is dead cannot."""
    challenge: U64 = 0
    leaving: bool = False
    """To be fenced, because its chains are whole without it."""
    suspected: bool = False
    """To be fenced, because another server cannot reach it."""
    suspicions: U32 = 0
    """How often in a row it went offline for that."""
    replaces: U32 = 0
    """The target whose places in chains it takes."""

    @property
    def is_to_be_fenced(self) -> bool:
        return self.leaving or self.suspected or self.candidate != 0

    @property
    def domain(self) -> str:
        return self.host or self.host_id


class GoneRecord(msgspec.Struct, array_like=True, frozen=True):
    """``GONE`` + uuid: a target that was removed from the cluster."""

    target_id: U32
    server_id: str
    removed_ns: int


class ChainRecord(msgspec.Struct, array_like=True, frozen=True):
    """``CHAN`` + chain id; as ``kvfs_base.cluster.Chain``."""

    version: U32
    targets: tuple[U32, ...]
    """Those that serve."""
    copies: U32 = 1
    syncing: tuple[U32, ...] = ()
    offline: tuple[U32, ...] = ()
    """The one that would be missed least stands last."""
    served: tuple[U32, ...] = ()
    """Those of the others that served once, and so had everything: the last one to do so first."""

    @property
    def is_replicated(self) -> bool:
        return self.copies > 1

    @property
    def everybody(self) -> tuple[int, ...]:
        return self.targets + self.syncing + self.offline


def pack_session(server: bytes, number: int) -> bytes:
    """``SESS`` + session: the server that has the session, and the number of its connection."""
    return server + number.to_bytes(8, "big")


def unpack_session(value: bytes) -> tuple[bytes, int]:
    return value[:-8], int.from_bytes(value[-8:], "big")


class HeldLock(msgspec.Struct, array_like=True, frozen=True):
    """``LOCK`` + inode has the list of them, in the order of the ranges; those of one owner do not
    overlap."""

    session: bytes
    owner: bytes
    start: U64
    end: U64
    """The last byte."""
    exclusive: bool
    flock: bool = False
    pid: U32 = 0
    """Of the process that locked it, as its mount's kernel counts."""


class ServerRecord(msgspec.Struct, array_like=True, frozen=True):
    """``SRVR`` + server: a metadata server on a shared store, written again with each beat.
    ``SESS`` + session names the server that has it, ``OPEN`` + inode + session what it has open."""

    beats: U64
    addresses: tuple[str, ...]


class BeatValue(NamedTuple):
    """``BEAT`` + target: 17 bytes, little-endian. The last heartbeat of a target on a shared store,
    for the servers that did not get it."""

    free_bytes: int
    healthy: bool
    number: int = 0
    """``Heartbeat.number``."""


_BEAT = struct.Struct("<Q?Q")


def pack_beat(beat: BeatValue) -> bytes:
    return _BEAT.pack(*beat)


def unpack_beat(value: bytes) -> BeatValue:
    return BeatValue._make(_BEAT.unpack(value))


class AnswerRecord(msgspec.Struct, array_like=True, frozen=True):
    """``RSLT`` + client + slot: the answer to the request ``number``, msgpack in msgpack."""

    number: U64
    time_ns: int
    reply: bytes
    failed: bool = False


class RemovalValue(NamedTuple):
    """``RMVL`` + target + sequence number: 28 bytes, little-endian."""

    inode: int
    first: int
    end: int
    size: int
    """Bytes the removal is expected to free, 0 if unknown."""
    chain: int = 0
    """If it has several copies."""


_REMOVAL = struct.Struct("<QIIQI")


def pack_removal(removal: RemovalValue) -> bytes:
    return _REMOVAL.pack(*removal)


def unpack_removal(value: bytes) -> RemovalValue:
    return RemovalValue._make(_REMOVAL.unpack(value))


class MoveValue(NamedTuple):
    """``MOVE`` + inode: 28 bytes, little-endian. A block or file of one copy that is on its way to
    another chain (docs/design/0006-moves.md)."""

    source: int
    """The target that it leaves."""
    chain: int
    """That target's."""
    to: int
    after: int
    """The last removal that was queued for the new target when the move began, 0 if none was."""
    ticket: int = 0
    """Under which the move may end; 0 while it may not."""


_MOVE = struct.Struct("<IIIQQ")


def pack_move(move: MoveValue) -> bytes:
    return _MOVE.pack(*move)


def unpack_move(value: bytes) -> MoveValue:
    return MoveValue._make(_MOVE.unpack(value))


class RemovalState(NamedTuple):
    """``RSEQ`` + target: 24 bytes, little-endian. Kept apart from the queue's entries: an empty one
    must not start from 1 again, and a full one need not be read to know its size."""

    next_seq: int
    waiting: int
    size: int


_REMOVAL_STATE = struct.Struct("<QQQ")


def pack_removal_state(state: RemovalState) -> bytes:
    return _REMOVAL_STATE.pack(*state)


def unpack_removal_state(value: bytes) -> RemovalState:
    return RemovalState._make(_REMOVAL_STATE.unpack(value))


class Usage(NamedTuple):
    """``STATusage``: 16 bytes, kept by every transaction that changes it."""

    inodes: int
    file_bytes: int


UsageFields = tuple[int, int]
"""A Usage, or its fields."""

_USAGE = struct.Struct("<QQ")


def pack_usage(usage: UsageFields) -> bytes:
    return _USAGE.pack(*usage)


def unpack_usage(value: bytes | None) -> Usage:
    return Usage(0, 0) if value is None else Usage._make(_USAGE.unpack(value))


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_inode = msgspec.msgpack.Decoder(InodeRecord).decode
decode_namespace = msgspec.msgpack.Decoder(NamespaceRecord).decode
decode_prepared = msgspec.msgpack.Decoder(PreparedRecord).decode
decode_target = msgspec.msgpack.Decoder(TargetRecord).decode
decode_gone = msgspec.msgpack.Decoder(GoneRecord).decode
decode_server = msgspec.msgpack.Decoder(ServerRecord).decode
decode_quota = msgspec.msgpack.Decoder(QuotaRecord).decode
decode_locks = msgspec.msgpack.Decoder(list[HeldLock]).decode
decode_answer = msgspec.msgpack.Decoder(AnswerRecord).decode
decode_chain = msgspec.msgpack.Decoder(ChainRecord).decode
