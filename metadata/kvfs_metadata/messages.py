"""Requests of the metadata service: the wire format, field by field.

Every request is one transaction: it happens whole or not at all. Requests that arrive together are
committed together.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from kvfs_base.cluster import EndMoves, FindUnwanted, GetClusterMap, Heartbeat, TakeMoves
from kvfs_base.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_KEY_BYTES,
    CLOSED_TOGETHER_MAX,
    COPIES_MAX,
    DIRECTORY_PAGE_ENTRIES,
    SYMLINK_BYTES_MAX,
    XATTR_NAME_BYTES_MAX,
    XATTR_VALUE_BYTES_MAX,
)
from kvfs_base.rpc import Request
from kvfs_base.types import U32, U64, Attr, BlockInfo, KVLayout, Name, ShortText
from kvfs_metadata.check.fixes import RepairRecords, ScanRecords
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    CountChunks,
    DescribeCluster,
    FindOpenFiles,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
)
from kvfs_metadata.limits import ONCE_SLOTS

Keys = Annotated[bytes, msgspec.Meta(max_length=BATCH_BLOCKS_MAX * BLOCK_KEY_BYTES)]
"""Block keys, 32 bytes each, end to end: slicing a string costs less than a msgpack list."""

XattrName = Annotated[bytes, msgspec.Meta(min_length=1, max_length=XATTR_NAME_BYTES_MAX)]
ClientUuid = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
LockOwner = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
SessionUuid = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Done(msgspec.Struct, array_like=True, frozen=True):
    """The answer of requests that have nothing else to say."""


# --- sessions


class Attach(Request, tag="attach"):
    """First request of a connection that opens files. After a reconnect it names the session again
    and declares what is open, so that nothing open is collected. ``number`` grows with each
    connection of the session: one that comes late, when the session has gone on to another
    connection, changes nothing."""

    Reply: ClassVar = Done
    session: SessionUuid
    open_inodes: Annotated[tuple[U64, ...], msgspec.Meta(max_length=100_000)] = ()
    number: U64 = 0
    name: ShortText = ""
    """Who it is, for people."""
    written_inodes: Annotated[tuple[U64, ...], msgspec.Meta(max_length=100_000)] = ()
    """Those of the open ones that it may write to."""


class Revoked(msgspec.Struct, array_like=True, frozen=True):
    """What a watcher must not answer for by itself any more."""

    number: U64
    """The next Watch says with it that all of this, and all before, has been dropped."""
    inodes: tuple[U64, ...] = ()
    entries: tuple[tuple[U64, bytes], ...] = ()
    """Parent and name. Without a name: not all names of the directory are known any more."""
    everything: bool = False


class Watch(Request, tag="watch"):
    """Answered when something is to be revoked, or after limits.WATCH_POLL_SECONDS. From the first
    one on (``seen`` is 0, answered at once) the service gives leases with what it answers on this
    connection (docs/design/0007). Raises NotSupported on a shared store."""

    Reply: ClassVar = Revoked
    session: SessionUuid
    seen: U64 = 0


class OpenInode(Request, tag="open"):
    """Counts one open of a file for this connection's session: while it lasts, an unlinked file
    keeps its data. Answers with fresh attributes. ``writes``: the session may write to it until it
    has taken back all of its opens (docs/design/0009). Raises InodeStale, and TailBusy."""

    Reply: ClassVar = Attr
    inode: U64
    writes: bool = False


class CloseInode(Request, tag="close"):
    """Takes back one open each of ``inode`` and ``others``."""

    Reply: ClassVar = Done
    inode: U64
    others: Annotated[tuple[U64, ...], msgspec.Meta(max_length=CLOSED_TOGETHER_MAX)] = ()


class Tail(msgspec.Struct, array_like=True, frozen=True):
    """What the service knows of what lies behind the end of a file, where a writer that died may
    have left something."""

    size: U64
    """The recorded end."""
    may_cut: bool = False
    """Nobody else writes there, and nobody else begins to until EndCut."""
    is_open: bool = False
    """Otherwise: whether it may be cut is not known yet, as somebody who may write there is not
    heard of. It is, once he is, or his session is over."""


class BeginCut(Request, tag="begin_cut"):
    """May this connection's session, which may write to the file, cut what lies behind its end?"""

    Reply: ClassVar = Tail
    inode: U64


class EndCut(Request, tag="end_cut"):
    """It is over."""

    Reply: ClassVar = Done
    inode: U64


class WidenChunks(Request, tag="widen"):
    """The chunks of a file become FILE_WIDE_CHUNK_BYTES long: all that it has is in the first one,
    of one copy (docs/design/0010). For the session that alone may write to it; raises
    InvalidRequest where that is not certain, or where something lies behind the first chunk.
    Repeated it changes nothing."""

    Reply: ClassVar = Attr
    inode: U64


# --- locks


class FileLock(msgspec.Struct, array_like=True, frozen=True):
    """A range of a file, from its first to its last byte (2**63 - 1: to wherever the file ends),
    that ``owner`` locks: one process or open file of one mount. ``flock``: of the other kind of
    locks, which is always the whole file."""

    start: U64
    end: U64
    exclusive: bool
    owner: LockOwner
    flock: bool = False
    pid: U32 = 0
    """Of the process, where it means something to who is told; else 0."""


class SetLock(Request, tag="set_lock"):
    """Locks for the connection's session what nobody else has, and replaces what the owner had
    there. The answer is None, or the lock that is in the way. A request that comes from a
    connection that the session has left changes nothing, so it may be repeated. Raises InodeStale,
    TooManyLocks."""

    Reply: ClassVar = FileLock | None
    inode: U64
    lock: FileLock


class Unlock(Request, tag="unlock"):
    """``lock`` says whose and which range; it need not be locked."""

    Reply: ClassVar = Done
    inode: U64
    lock: FileLock


class GetLock(Request, tag="get_lock"):
    """What SetLock would answer. Changes nothing."""

    Reply: ClassVar = FileLock | None
    inode: U64
    lock: FileLock


class AwaitLock(Request, tag="await_lock"):
    """Answered once GetLock would say None, and after LOCK_WAIT_SECONDS in any case; what is asked
    after it on the same connection is answered meanwhile. Raises LockDeadlock (never for flock) if
    who holds the range waits for this owner at the same server, and ServerBusy."""

    Reply: ClassVar = Done
    inode: U64
    lock: FileLock


class StopAwaiting(Request, tag="stop_awaiting"):
    """The owner does not wait any more."""

    Reply: ClassVar = Done
    owner: LockOwner


# --- namespace


class Lookup(Request, tag="lookup"):
    """Raises EntryNotFound, NotADirectory, InodeStale. In a KV namespace the name is the block's
    key in lower-case hex."""

    Reply: ClassVar = Attr
    parent: U64
    name: Name


class Resolve(Request, tag="resolve"):
    """Walks a path of ``/``-separated names from the root; symbolic links are not followed."""

    Reply: ClassVar = Attr
    path: Annotated[bytes, msgspec.Meta(max_length=4096)]


class GetAttr(Request, tag="getattr"):
    Reply: ClassVar = Attr
    inode: U64


class SetAttr(Request, tag="setattr"):
    """Sets what is not None. ``size`` only records: the caller has changed the chunks before.
    ``grow_to`` raises the size to at least this and never lowers it (concurrent appenders).
    ``sparse`` can only be set. ctime becomes now."""

    Reply: ClassVar = Attr
    inode: U64
    mode: U32 | None = None
    uid: U32 | None = None
    gid: U32 | None = None
    size: U64 | None = None
    grow_to: U64 | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    sparse: bool = False


class Make(Request, tag="make"):
    """Creates a file, directory, symbolic link or special file by the type bits of ``mode``.
    Raises EntryExists; with ``exclusive`` false an existing regular file is returned as it is.
    ``open`` counts one open as well, as OpenInode that ``writes`` would: one call less for each new
    file."""

    Reply: ClassVar = Attr
    parent: U64
    name: Name
    mode: U32
    uid: U32 = 0
    gid: U32 = 0
    rdev: U32 = 0
    target: Annotated[bytes, msgspec.Meta(max_length=SYMLINK_BYTES_MAX)] = b""
    exclusive: bool = True
    open: bool = False


class Link(Request, tag="link"):
    Reply: ClassVar = Attr
    inode: U64
    parent: U64
    name: Name


class Unlink(Request, tag="unlink"):
    """Also removes a block from a KV namespace. Answers with the inode as it is now: nlink 0 means
    that its data goes as soon as no session has it open."""

    Reply: ClassVar = Attr
    parent: U64
    name: Name


class Touched(msgspec.Struct, array_like=True, frozen=True):
    """Inodes that a request changed, and that its author did not name."""

    inodes: tuple[U64, ...] = ()
    at_ns: int = 0
    """Their ctime now, and mtime and ctime of the directories."""


class Rmdir(Request, tag="rmdir"):
    Reply: ClassVar = Touched
    parent: U64
    name: Name


class Rename(Request, tag="rename"):
    """``flags``: 1 RENAME_NOREPLACE, 2 RENAME_EXCHANGE (Linux's renameat2). Blocks and namespace
    directories do not move: NotPermitted."""

    Reply: ClassVar = Touched
    parent: U64
    name: Name
    new_parent: U64
    new_name: Name
    flags: U32 = 0


class DirectoryPage(msgspec.Struct, array_like=True, frozen=True):
    entries: tuple[tuple[bytes, Attr], ...]
    """In the order of the names' bytes. ``.`` and ``..`` are the front end's."""
    more: bool


class ReadDir(Request, tag="readdir"):
    """Entries whose names sort after ``after``. Names are the cookie, so a listing is stable while
    entries come and go. ``keeps``: a watcher wants leases on the inodes in the answer, and with the
    first page one on knowing all entries; ``is_kept`` says whether it gets them."""

    Reply: ClassVar = DirectoryPage
    inode: U64
    after: Annotated[bytes, msgspec.Meta(max_length=255)] = b""
    limit: Annotated[int, msgspec.Meta(ge=1, le=DIRECTORY_PAGE_ENTRIES)] = DIRECTORY_PAGE_ENTRIES
    keeps: bool = False

    def is_kept(self, page: DirectoryPage) -> bool:
        """Of blocks the absence of names is leased, not a listing."""
        return self.keeps and not any(attr.is_block for _, attr in page.entries[:1])


class ReadLink(Request, tag="readlink"):
    Reply: ClassVar = bytes
    inode: U64


class GetXattr(Request, tag="getxattr"):
    """Raises AttributeMissing. KV namespaces and blocks show ``user.kvfs.*`` attributes
    (key, generation, crc32c, last_use_ns, layout), and everything that has data or entries
    ``user.kvfs.copies``."""

    Reply: ClassVar = bytes
    inode: U64
    name: XattrName


class SetXattr(Request, tag="setxattr"):
    """``flags``: 1 XATTR_CREATE, 2 XATTR_REPLACE. ``user.kvfs.copies`` of a directory says how many
    copies there will be of what is made in it, and in directories that are made there: NoTarget if
    there are not so many hosts."""

    Reply: ClassVar = Done
    inode: U64
    name: XattrName
    value: Annotated[bytes, msgspec.Meta(max_length=XATTR_VALUE_BYTES_MAX)]
    flags: U32 = 0


class ListXattr(Request, tag="listxattr"):
    Reply: ClassVar = tuple[bytes, ...]
    inode: U64


class RemoveXattr(Request, tag="removexattr"):
    Reply: ClassVar = Done
    inode: U64
    name: XattrName


class FilesystemStats(msgspec.Struct, array_like=True, frozen=True):
    capacity_bytes: U64
    """The cache's capacity, or what the disks hold if that is less."""
    used_bytes: U64
    inodes: U64
    inodes_max: U64 = 0
    """By a quota; 0: they do not run out."""


class StatFs(Request, tag="statfs"):
    """Of the whole, or of what the quota that ``inode`` counts for leaves of it."""

    Reply: ClassVar = FilesystemStats
    inode: U64 = 0


class QuotaInfo(msgspec.Struct, array_like=True, frozen=True):
    directory: U64
    bytes_max: U64
    """0: no bound; so with inodes."""
    inodes_max: U64
    bytes_used: U64
    """Sizes of files, and of blocks, those that are being written included."""
    inodes: U64
    """Files, directories and the like; not blocks."""


class GetQuota(Request, tag="get_quota"):
    """What the inode counts for, None if for nothing."""

    Reply: ClassVar = QuotaInfo | None
    inode: U64


class SetQuota(Request, tag="set_quota"):
    """Of a directory; 0: no bound, None: as it is. What lies there already stays, and counts.
    Raises NotADirectory; the first time LimitExceeded if there is too much below, and
    InvalidRequest for files that have names elsewhere as well."""

    Reply: ClassVar = QuotaInfo
    inode: U64
    bytes_max: U64 | None = None
    inodes_max: U64 | None = None


class Sync(Request, tag="sync"):
    """Answered once everything acknowledged before it is on stable storage (fsync)."""

    Reply: ClassVar = Done


# --- blocks


class NamespaceInfo(msgspec.Struct, array_like=True, frozen=True):
    inode: U64
    layout: KVLayout


class OpenNamespace(Request, tag="open_namespace"):
    """``path`` is ``TENANT/MODEL`` below ``/kv``. Raises EntryNotFound without ``create``, and
    LayoutMismatch if it exists with another layout (``layout`` None accepts any)."""

    Reply: ClassVar = NamespaceInfo
    path: ShortText
    layout: KVLayout | None = None
    create: bool = False
    copies: Annotated[int, msgspec.Meta(ge=0, le=COPIES_MAX)] = 0
    """Of the blocks of a namespace that is made. 0: as the directory above it says."""


class MatchBlocks(Request, tag="match_blocks"):
    """How many of ``keys``, counted from the first without a gap, are stored. Counts as a use."""

    Reply: ClassVar = int
    namespace: U64
    keys: Keys


class LookupBlocks(Request, tag="lookup_blocks"):
    """BlockInfo or None for each key. Counts as a use. What is stored is leased to the session
    ``watcher``, if it watches (docs/design/0011)."""

    Reply: ClassVar = tuple[BlockInfo | None, ...]
    namespace: U64
    keys: Keys
    watcher: SessionUuid | None = None


class UseBlocks(Request, tag="use_blocks"):
    """A watcher has answered for blocks by itself: counts as a use of those that are still stored.
    ``matched`` and ``looked_up`` say how many times they were found by either."""

    Reply: ClassVar = Done
    namespace: U64
    keys: Keys
    matched: U32 = 0
    looked_up: U32 = 0


class PreparedBlock(msgspec.Struct, array_like=True, frozen=True):
    inode: U64
    chain: U32


class PreparedBatch(msgspec.Struct, array_like=True, frozen=True):
    batch_id: U64
    """0 if every key is stored already: nothing to write, nothing to commit."""
    blocks: tuple[PreparedBlock | None, ...]
    """None where the key is stored already."""


class PrepareBlocks(Request, tag="prepare_blocks"):
    """Gives each absent key an inode number and a chain. Nothing becomes visible. The batch expires
    after limits.PREPARE_SECONDS_MAX. Raises CacheFull, NoTarget."""

    Reply: ClassVar = PreparedBatch
    namespace: U64
    keys: Keys
    sizes: Annotated[tuple[U32, ...], msgspec.Meta(max_length=BATCH_BLOCKS_MAX)]


class CommitBlocks(Request, tag="commit_blocks"):
    """Makes the written blocks of a batch visible, all in one transaction. ``crc32c`` has one value
    for each prepared (not None) block, in order. A key that somebody else stored meanwhile keeps
    its first value; the later chunk is collected. Raises PrepareExpired, and StaleChain if a chain
    of several copies has another version than the one under which its members were written to (or
    is not named): nothing is committed then, and the batch can be committed later."""

    Reply: ClassVar = Done
    batch_id: U64
    crc32c: Annotated[tuple[U32, ...], msgspec.Meta(max_length=BATCH_BLOCKS_MAX)]
    versions: Annotated[tuple[tuple[U32, U32], ...], msgspec.Meta(max_length=BATCH_BLOCKS_MAX)] = ()
    """(chain, version) of each chain of several copies that has blocks of the batch."""


class AbortBlocks(Request, tag="abort_blocks"):
    """Drops a prepared batch; its chunks are collected."""

    Reply: ClassVar = Done
    batch_id: U64


class RemoveBlocks(Request, tag="remove_blocks"):
    """Answers with the number of keys that were stored. ``inodes``, if given, has one generation a
    key: a block that was replaced since is left alone (used to drop blocks found corrupt). So have
    ``chains``: one that was moved since is left alone, since it was not found there."""

    Reply: ClassVar = int
    namespace: U64
    keys: Keys
    inodes: Annotated[tuple[U64, ...], msgspec.Meta(max_length=BATCH_BLOCKS_MAX)] = ()
    chains: Annotated[tuple[U32, ...], msgspec.Meta(max_length=BATCH_BLOCKS_MAX)] = ()


# --- requests that are repeated

Changing = (
    SetAttr
    | Make
    | Link
    | Unlink
    | Rmdir
    | Rename
    | SetXattr
    | RemoveXattr
    | SetQuota
    | PrepareBlocks
    | RemoveBlocks
    | SetDraining
    | RemoveTarget
    | AdmitTarget
    | ReplaceTarget
)
"""Requests for which twice is not as good as once."""


class Once(Request, tag="once"):
    """Carries ``request`` out unless that was done already, and then gives the first answer again:
    a client that got no answer may repeat it, of any server of the same store.

    ``client`` made the pair of ``slot`` and ``number``. The answer to the newest number of a slot
    is kept (with what the request did, in one transaction), so a client uses a slot for one request
    at a time, with growing numbers. Raises InvalidRequest for a number below the slot's newest.

    An error is not kept, since a request that failed did nothing, unless the request was sent
    ``again``. Then an earlier copy may still be on its way (in the queue of a server that lost its
    client), and must not succeed after the client was told that it failed."""

    client: ClientUuid
    slot: Annotated[int, msgspec.Meta(ge=0, lt=ONCE_SLOTS)]
    number: U64
    request: Changing
    again: bool = False

    def reply_type(self) -> Any:
        return self.request.Reply


# --- service


class Statistics(Request, tag="statistics"):
    """Counters and gauges by name (docs/metrics)."""

    Reply: ClassVar = dict[str, int]


MetadataRequest = (
    Attach
    | Watch
    | OpenInode
    | CloseInode
    | BeginCut
    | EndCut
    | WidenChunks
    | SetLock
    | Unlock
    | GetLock
    | AwaitLock
    | StopAwaiting
    | Lookup
    | Resolve
    | GetAttr
    | SetAttr
    | Make
    | Link
    | Unlink
    | Rmdir
    | Rename
    | ReadDir
    | ReadLink
    | GetXattr
    | SetXattr
    | ListXattr
    | RemoveXattr
    | StatFs
    | GetQuota
    | SetQuota
    | Sync
    | OpenNamespace
    | MatchBlocks
    | LookupBlocks
    | UseBlocks
    | PrepareBlocks
    | CommitBlocks
    | AbortBlocks
    | RemoveBlocks
    | Once
    | Statistics
    | ScanRecords
    | RepairRecords
    | Heartbeat
    | GetClusterMap
    | FindUnwanted
    | TakeMoves
    | EndMoves
    | DescribeCluster
    | CountChunks
    | FindOpenFiles
    | SetDraining
    | RemoveTarget
    | AdmitTarget
    | ReplaceTarget
)
