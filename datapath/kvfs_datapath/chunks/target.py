"""Whose directory it is: ``target.json`` and the lock against a second server."""

from __future__ import annotations

import contextlib
import uuid as uuids
from typing import Annotated

import msgspec

from kvfs_base.errors import Conflict, DiskFull, TargetFailed, VersionMismatch
from kvfs_base.seams import Disk, DiskFile
from kvfs_base.types import U32

FORMAT = 2
FORMATS_READ = (1, 2)
"""Directories of format 1 have no chains of several copies."""
IDENTITY = "target.json"
LOCK = "lock"
SMALL_FILE_BYTES_MAX = 4096


class TargetIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of ``target.json``. ``uuid`` is made once and stays with the disk; ``target_id`` is
    the number that the metadata service last gave it, 0 before that."""

    format: int
    uuid: Annotated[str, msgspec.Meta(max_length=64)]
    target_id: U32 = 0


class _Format(msgspec.Struct):
    """The one field that every version has."""

    format: int


def lock_target(disk: Disk) -> DiskFile:
    """The locked file: closing it, or dying, gives the target back. Raises Conflict."""
    disk.make_directory("")
    file = disk.open(LOCK, write=True, create=True)
    try:
        if not file.lock():
            raise Conflict(detail="the target directory is in use by another chunk server")
    except BaseException:
        file.close()
        raise
    return file


def load_identity(disk: Disk, uuid: str) -> TargetIdentity:
    """What the directory says it is; an empty one becomes ``uuid``. Raises VersionMismatch,
    TargetFailed if the file is damaged."""
    if not disk.exists(IDENTITY):
        identity = TargetIdentity(format=FORMAT, uuid=str(uuids.UUID(uuid)))
        save_identity(disk, identity)
        return identity
    data = read_small(disk, IDENTITY)
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found not in FORMATS_READ:
            raise VersionMismatch(detail="target directory", found=str(found), expected=str(FORMAT))
        identity = msgspec.json.decode(data, type=TargetIdentity)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise TargetFailed(detail=f"{IDENTITY}: {exc}") from exc
    if identity.format != FORMAT:
        # An older server would take no notice of what this one will write.
        identity = msgspec.structs.replace(identity, format=FORMAT)
        with contextlib.suppress(DiskFull):  # it serves what it has; the next start tries again
            save_identity(disk, identity)
    return identity


def save_identity(disk: Disk, identity: TargetIdentity) -> None:
    """Whole or not at all."""
    write_small(disk, IDENTITY, msgspec.json.encode(identity) + b"\n", sync=True)


def read_small(disk: Disk, path: str) -> bytes:
    """The first SMALL_FILE_BYTES_MAX bytes of a file. Raises FileNotFoundError."""
    file = disk.open(path)
    try:
        view = memoryview(bytearray(SMALL_FILE_BYTES_MAX))
        return bytes(view[: file.preadv([view], 0)])
    finally:
        file.close()


def write_small(disk: Disk, path: str, data: bytes, *, sync: bool) -> None:
    """Replaces a file whole or not at all; without ``sync`` that holds while there is power."""
    draft = f"{path}.new"
    file = disk.open(draft, write=True, create=True)
    try:
        file.truncate(0)
        file.pwritev([data], 0)
        if sync:
            file.sync()
    finally:
        file.close()
    disk.rename(draft, path)
    if sync:
        disk.sync_directory("")
