"""The one error tree.

    KvfsError
    ├── NamespaceError             the request does not fit the namespace as it is
    │   ├── EntryNotFound          ENOENT
    │   ├── EntryExists            EEXIST
    │   ├── NotADirectory          ENOTDIR
    │   ├── IsADirectory           EISDIR
    │   ├── DirectoryNotEmpty      ENOTEMPTY
    │   ├── NameTooLong            ENAMETOOLONG
    │   ├── InvalidRename          EINVAL     (a directory into its own subtree)
    │   ├── NotPermitted           EPERM      (a block is read-only, a namespace is special)
    │   ├── AttributeMissing       ENODATA
    │   ├── TooManyLinks           EMLINK
    │   ├── LockHeld               EAGAIN     (somebody else has locked a part of the range)
    │   ├── LockDeadlock           EDEADLOCK  (who holds it waits for the one that asks)
    │   ├── TooManyLocks           ENOLCK
    │   ├── CrossesQuota           EXDEV      (a move or link from under one quota to another)
    │   └── InodeStale             ESTALE
    ├── InvalidRequest             EINVAL     the caller's arguments are wrong
    │   ├── LimitExceeded          E2BIG
    │   ├── ResultTooLarge         ERANGE     (it does not fit where the caller wants it)
    │   ├── LayoutMismatch         EINVAL
    │   ├── VersionMismatch        EPROTO
    │   ├── FileTooLarge           EFBIG
    │   ├── BehindTheEnd           ENXIO      (a file has nothing there to seek to)
    │   ├── NotSupported           ENOTSUP    (this file system does not do that)
    │   ├── MountFailed            ENODEV     (no FUSE here, or the mount point is not usable)
    │   │   ├── MountPointBusy     EBUSY      (something is mounted there, or lies in the directory)
    │   │   └── FuseMissing        ENODEV     (no /dev/fuse, no fusermount3 or no pyfuse3)
    │   ├── SecretUnusable         EACCES     (the secret file may be read by others, or is short)
    │   └── NotLoopback            EACCES     (no authentication is configured)
    ├── CapacityError              there is no room
    │   ├── CacheFull              ENOSPC
    │   ├── QuotaExceeded          EDQUOT     (of a directory above)
    │   ├── ArenaFull              ENOMEM     temporary
    │   └── DiskFull               ENOSPC
    ├── IntegrityError             the bytes are not what was written; for a cache, a miss
    │   ├── ChunkCorrupt           EIO
    │   ├── ChunkMismatch          EIO        (another chunk's bytes, or another generation's)
    │   └── BackupDamaged          EIO        (a backup of metadata that is cut or changed)
    ├── SetupError                 a person has to change something on this machine
    │   ├── NotKvfsDirectory       ENOTDIR
    │   ├── AlreadyRunning         EBUSY
    │   ├── NotRunning             ESRCH
    │   ├── RoleFailed             ECHILD     (a process of `kvfs up` did not get ready)
    │   ├── TargetInUse            EBUSY      (it cannot be removed: it still holds something)
    │   ├── TargetRemoved          ESTALE     (it was removed from the cluster and came back)
    │   └── TargetUnknown          ENXIO
    └── ServiceError               a server or a disk failed, the request may be fine
        ├── ChunkNotFound          EIO
        ├── ConnectionLost         EIO        temporary
        ├── DeadlineExceeded       ETIMEDOUT  temporary
        ├── Conflict               EAGAIN     temporary (a transaction lost its race)
        ├── StoreUnavailable       EIO        temporary (the metadata store cannot be reached)
        ├── PrepareExpired         ESTALE     (the writer was taken for dead, its batch collected)
        ├── NoTarget               EIO        temporary (no chunk server is serving)
        ├── TargetFailed           EIO        (its disk failed; it is out of service)
        ├── ServerBusy             EBUSY      temporary (a bound of the server is reached)
        ├── TailBusy               EBUSY      temporary (what lies behind a file's end is being cut)
        ├── StaleChain             EIO        temporary (asker and server know other chain versions)
        ├── TargetFenced           EIO        temporary (it lost its lease, or is not in step)
        ├── ChunkPending           EAGAIN     temporary (a write is on its way: ask the tail)
        ├── WriteUncertain         EIO        (whether a repeated write was carried out is unknown)
        ├── AuthenticationFailed   EACCES     (the peer has another secret, or none)
        ├── ProtocolError          EPROTO
        └── InternalError          EIO        (a bug; the server's log has the traceback)

Errors carry data, not prose: the fields of each class are what the caller can act on, and they
travel over the wire. ``posix_errno`` is what the mount answers; ``wire_code`` is what frames carry;
``temporary`` says whether the same request may succeed later without anybody's help.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import Any, ClassVar

WIRE_CODES: dict[str, type[KvfsError]] = {}


@dataclasses.dataclass(eq=False)
class KvfsError(Exception):
    """Root of the tree; never raised itself."""

    posix_errno: ClassVar[int] = errno.EIO
    wire_code: ClassVar[str] = "error"
    temporary: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "wire_code" in cls.__dict__:
            WIRE_CODES[cls.wire_code] = cls

    def __str__(self) -> str:
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self)]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(self, f.name) for f in dataclasses.fields(self))
        return (type(self), values)

    def wire_data(self) -> dict[str, Any]:
        """The fields, as plain msgpack values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bytes | str": (bytes, str),
}
"""What the fields of errors are, by annotation."""


def from_wire(code: str, data: dict[str, Any]) -> KvfsError:
    """The error that a peer sent. An unknown code (a newer peer) becomes ProtocolError, and so do
    fields of other types: callers compute with them."""
    cls = WIRE_CODES.get(code)
    if cls is None:
        return ProtocolError(detail=f"unknown error code {code!r}")
    types = {f.name: FIELD_TYPES[str(f.type)] for f in dataclasses.fields(cls)}
    known = {k: v for k, v in data.items() if k in types}
    if not all(isinstance(v, types[k]) for k, v in known.items()):
        return ProtocolError(detail=f"error {code!r} with fields of other types")
    try:
        return cls(**known)
    except TypeError:
        return ProtocolError(detail=f"error {code!r} lacks fields")


# --- namespace


class NamespaceError(KvfsError):
    """The request does not fit the namespace as it is."""


@dataclasses.dataclass(eq=False)
class EntryNotFound(NamespaceError, LookupError):
    name: bytes | str = b""
    posix_errno = errno.ENOENT
    wire_code = "entry_not_found"


@dataclasses.dataclass(eq=False)
class EntryExists(NamespaceError):
    name: bytes | str = b""
    posix_errno = errno.EEXIST
    wire_code = "entry_exists"


@dataclasses.dataclass(eq=False)
class NotADirectory(NamespaceError):
    name: bytes | str = b""
    posix_errno = errno.ENOTDIR
    wire_code = "not_a_directory"


@dataclasses.dataclass(eq=False)
class IsADirectory(NamespaceError):
    name: bytes | str = b""
    posix_errno = errno.EISDIR
    wire_code = "is_a_directory"


@dataclasses.dataclass(eq=False)
class DirectoryNotEmpty(NamespaceError):
    name: bytes | str = b""
    posix_errno = errno.ENOTEMPTY
    wire_code = "directory_not_empty"


@dataclasses.dataclass(eq=False)
class NameTooLong(NamespaceError):
    length: int = 0
    posix_errno = errno.ENAMETOOLONG
    wire_code = "name_too_long"


@dataclasses.dataclass(eq=False)
class InvalidRename(NamespaceError):
    name: bytes | str = b""
    posix_errno = errno.EINVAL
    wire_code = "invalid_rename"


@dataclasses.dataclass(eq=False)
class NotPermitted(NamespaceError, PermissionError):
    reason: str = ""
    posix_errno = errno.EPERM
    wire_code = "not_permitted"


@dataclasses.dataclass(eq=False)
class AttributeMissing(NamespaceError):
    name: bytes | str = b""
    posix_errno = errno.ENODATA
    wire_code = "attribute_missing"


@dataclasses.dataclass(eq=False)
class TooManyLinks(NamespaceError):
    inode: int = 0
    posix_errno = errno.EMLINK
    wire_code = "too_many_links"


@dataclasses.dataclass(eq=False)
class LockHeld(NamespaceError):
    inode: int = 0
    posix_errno = errno.EAGAIN
    wire_code = "lock_held"


@dataclasses.dataclass(eq=False)
class LockDeadlock(NamespaceError):
    inode: int = 0
    posix_errno = errno.EDEADLK
    wire_code = "lock_deadlock"


@dataclasses.dataclass(eq=False)
class TooManyLocks(NamespaceError):
    limit: int = 0
    posix_errno = errno.ENOLCK
    wire_code = "too_many_locks"


@dataclasses.dataclass(eq=False)
class CrossesQuota(NamespaceError):
    quota: int = 0
    posix_errno = errno.EXDEV
    wire_code = "crosses_quota"


@dataclasses.dataclass(eq=False)
class InodeStale(NamespaceError):
    inode: int = 0
    posix_errno = errno.ESTALE
    wire_code = "inode_stale"


# --- the caller's arguments


@dataclasses.dataclass(eq=False)
class InvalidRequest(KvfsError, ValueError):
    detail: str = ""
    posix_errno = errno.EINVAL
    wire_code = "invalid_request"


@dataclasses.dataclass(eq=False)
class LimitExceeded(InvalidRequest):
    limit: int = 0
    posix_errno = errno.E2BIG
    wire_code = "limit_exceeded"


@dataclasses.dataclass(eq=False)
class ResultTooLarge(InvalidRequest):
    limit: int = 0
    posix_errno = errno.ERANGE
    wire_code = "result_too_large"


@dataclasses.dataclass(eq=False)
class LayoutMismatch(InvalidRequest):
    """A namespace exists with another layout than the one asked for."""

    wire_code = "layout_mismatch"


@dataclasses.dataclass(eq=False)
class VersionMismatch(InvalidRequest):
    found: str = ""
    expected: str = ""
    posix_errno = errno.EPROTO
    wire_code = "version_mismatch"


@dataclasses.dataclass(eq=False)
class FileTooLarge(InvalidRequest):
    limit: int = 0
    posix_errno = errno.EFBIG
    wire_code = "file_too_large"


@dataclasses.dataclass(eq=False)
class BehindTheEnd(InvalidRequest):
    size: int = 0
    posix_errno = errno.ENXIO
    wire_code = "behind_the_end"


@dataclasses.dataclass(eq=False)
class NotSupported(InvalidRequest):
    posix_errno = errno.ENOTSUP
    wire_code = "not_supported"


@dataclasses.dataclass(eq=False)
class MountFailed(InvalidRequest):
    """``detail`` is for people: what is wrong and what to do about it."""

    mountpoint: str = ""
    posix_errno = errno.ENODEV
    wire_code = "mount_failed"


@dataclasses.dataclass(eq=False)
class MountPointBusy(MountFailed):
    posix_errno = errno.EBUSY
    wire_code = "mount_point_busy"


@dataclasses.dataclass(eq=False)
class FuseMissing(MountFailed):
    posix_errno = errno.ENODEV
    wire_code = "fuse_missing"


@dataclasses.dataclass(eq=False)
class SecretUnusable(InvalidRequest):
    """``detail`` is for people: what is wrong with the file at ``path``."""

    path: str = ""
    posix_errno = errno.EACCES
    wire_code = "secret_unusable"


@dataclasses.dataclass(eq=False)
class NotLoopback(InvalidRequest):
    address: str = ""
    posix_errno = errno.EACCES
    wire_code = "not_loopback"


# --- no room


class CapacityError(KvfsError):
    """There is no room."""


@dataclasses.dataclass(eq=False)
class CacheFull(CapacityError):
    needed_bytes: int = 0
    capacity_bytes: int = 0
    posix_errno = errno.ENOSPC
    wire_code = "cache_full"


@dataclasses.dataclass(eq=False)
class QuotaExceeded(CapacityError):
    """``what`` is ``bytes`` or ``inodes``; ``directory`` is the inode that has the quota."""

    what: str = "bytes"
    needed: int = 0
    used: int = 0
    limit: int = 0
    directory: int = 0
    posix_errno = errno.EDQUOT
    wire_code = "quota_exceeded"


@dataclasses.dataclass(eq=False)
class ArenaFull(CapacityError, MemoryError):
    needed_bytes: int = 0
    leased_bytes: int = 0
    posix_errno = errno.ENOMEM
    wire_code = "arena_full"
    temporary = True


@dataclasses.dataclass(eq=False)
class DiskFull(CapacityError):
    path: str = ""
    posix_errno = errno.ENOSPC
    wire_code = "disk_full"


# --- wrong bytes


class IntegrityError(KvfsError):
    """The bytes are not what was written."""


@dataclasses.dataclass(eq=False)
class ChunkCorrupt(IntegrityError):
    inode: int = 0
    number: int = 0
    chain: int = 0
    expected_crc32c: int = 0
    found_crc32c: int = 0
    wire_code = "chunk_corrupt"


@dataclasses.dataclass(eq=False)
class ChunkMismatch(IntegrityError):
    inode: int = 0
    number: int = 0
    chain: int = 0
    detail: str = ""
    wire_code = "chunk_mismatch"


@dataclasses.dataclass(eq=False)
class BackupDamaged(IntegrityError):
    """``offset``: where the first frame begins that is not as it was written."""

    path: str = ""
    offset: int = 0
    detail: str = ""
    wire_code = "backup_damaged"


# --- this machine's setup


class SetupError(KvfsError):
    """A person has to change something on this machine."""


@dataclasses.dataclass(eq=False)
class NotKvfsDirectory(SetupError):
    path: str = ""
    detail: str = ""
    posix_errno = errno.ENOTDIR
    wire_code = "not_kvfs_directory"


@dataclasses.dataclass(eq=False)
class AlreadyRunning(SetupError):
    directory: str = ""
    pid: int = 0
    posix_errno = errno.EBUSY
    wire_code = "already_running"


@dataclasses.dataclass(eq=False)
class NotRunning(SetupError):
    directory: str = ""
    posix_errno = errno.ESRCH
    wire_code = "not_running"


@dataclasses.dataclass(eq=False)
class RoleFailed(SetupError):
    """``exit_code`` is negative for a signal, as in ``subprocess``, and 0 if the process ran but
    was not ready in time; ``detail`` is the last line that it wrote."""

    role: str = ""
    exit_code: int = 0
    detail: str = ""
    posix_errno = errno.ECHILD
    wire_code = "role_failed"


@dataclasses.dataclass(eq=False)
class TargetInUse(SetupError):
    """``blocks``, ``files`` and ``removals`` are what was found on it; they may be out of date, and
    0 if nobody has looked yet."""

    target_id: int = 0
    blocks: int = 0
    files: int = 0
    removals: int = 0
    detail: str = ""
    posix_errno = errno.EBUSY
    wire_code = "target_in_use"


@dataclasses.dataclass(eq=False)
class TargetRemoved(SetupError):
    uuid: str = ""
    posix_errno = errno.ESTALE
    wire_code = "target_removed"


@dataclasses.dataclass(eq=False)
class TargetUnknown(SetupError, LookupError):
    name: str = ""
    posix_errno = errno.ENXIO
    wire_code = "target_unknown"


# --- servers and disks


class ServiceError(KvfsError):
    """A server or a disk failed."""


@dataclasses.dataclass(eq=False)
class ChunkNotFound(ServiceError, LookupError):
    inode: int = 0
    number: int = 0
    chain: int = 0
    wire_code = "chunk_not_found"


@dataclasses.dataclass(eq=False)
class ConnectionLost(ServiceError):
    address: str = ""
    detail: str = ""
    wire_code = "connection_lost"
    temporary = True


@dataclasses.dataclass(eq=False)
class DeadlineExceeded(ServiceError):
    operation: str = ""
    seconds: float = 0.0
    posix_errno = errno.ETIMEDOUT
    wire_code = "deadline_exceeded"
    temporary = True


@dataclasses.dataclass(eq=False)
class Conflict(ServiceError):
    detail: str = ""
    posix_errno = errno.EAGAIN
    wire_code = "conflict"
    temporary = True


@dataclasses.dataclass(eq=False)
class StoreUnavailable(ServiceError):
    """Whether a request that ends with it was carried out is unknown: clients repeat it under the
    same number, of any server."""

    detail: str = ""
    wire_code = "store_unavailable"
    temporary = True


@dataclasses.dataclass(eq=False)
class PrepareExpired(ServiceError):
    batch_id: int = 0
    posix_errno = errno.ESTALE
    wire_code = "prepare_expired"


@dataclasses.dataclass(eq=False)
class NoTarget(ServiceError):
    detail: str = ""
    wire_code = "no_target"
    temporary = True


@dataclasses.dataclass(eq=False)
class TargetFailed(ServiceError):
    target_id: int = 0
    detail: str = ""
    wire_code = "target_failed"


@dataclasses.dataclass(eq=False)
class ServerBusy(ServiceError):
    detail: str = ""
    posix_errno = errno.EBUSY
    wire_code = "server_busy"
    temporary = True


@dataclasses.dataclass(eq=False)
class TailBusy(ServiceError):
    """Until that is over nobody else begins to write to the file (docs/design/0009)."""

    inode: int = 0
    posix_errno = errno.EBUSY
    wire_code = "tail_busy"
    temporary = True


@dataclasses.dataclass(eq=False)
class StaleChain(ServiceError):
    """``version`` is the server's; whoever knows a lower one asks for the map again."""

    chain: int = 0
    version: int = 0
    wire_code = "stale_chain"
    temporary = True


@dataclasses.dataclass(eq=False)
class TargetFenced(ServiceError):
    """The target may not answer for a chain: its lease is over, or it is no serving member."""

    target_id: int = 0
    detail: str = ""
    wire_code = "target_fenced"
    temporary = True


@dataclasses.dataclass(eq=False)
class ChunkPending(ServiceError):
    """A write has come this far along the chain and is not committed here yet."""

    inode: int = 0
    number: int = 0
    chain: int = 0
    posix_errno = errno.EAGAIN
    wire_code = "chunk_pending"
    temporary = True


@dataclasses.dataclass(eq=False)
class WriteUncertain(ServiceError):
    """Others have written since, and nobody remembers whether the first attempt was carried out:
    doing it now could bring old bytes back."""

    inode: int = 0
    number: int = 0
    chain: int = 0
    wire_code = "write_uncertain"


@dataclasses.dataclass(eq=False)
class AuthenticationFailed(ServiceError):
    """Which side lacks the right secret: ``detail`` says it as far as it can be known."""

    address: str = ""
    detail: str = ""
    posix_errno = errno.EACCES
    wire_code = "authentication_failed"


@dataclasses.dataclass(eq=False)
class ProtocolError(ServiceError):
    detail: str = ""
    posix_errno = errno.EPROTO
    wire_code = "protocol_error"


@dataclasses.dataclass(eq=False)
class InternalError(ServiceError):
    detail: str = ""
    wire_code = "internal_error"
