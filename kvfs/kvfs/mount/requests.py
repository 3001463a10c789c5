"""What goes into a Filesystem and comes out of it."""

from __future__ import annotations

import dataclasses
import stat
from typing import NamedTuple

import msgspec

from kvfs.mount.backend import NO_DESCRIPTOR
from kvfs_base.types import Attr


class Caller(NamedTuple):
    uid: int
    gid: int


class Opened(msgspec.Struct, frozen=True, gc=False):
    handle: int
    keep_cache: bool
    """Pages that the kernel has of this file are current."""
    writable: bool
    backing: int = NO_DESCRIPTOR
    """A file that the kernel may read instead of asking: it has all bytes, verified."""
    passes_writes: bool = False
    """It may write there as well."""
    is_block: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class AttrChanges:
    """What is not None is set. Times are nanoseconds since 1970."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    drop_privileges: bool = False
    """Set-user-ID and set-group-ID bits of an ordinary file go: its contents or owner change."""


def without_privileges(attr: Attr) -> int | None:
    """The mode after a write or a new owner, as Linux has it; None if it stays. A set-group-ID bit
    without execute permission for the group means mandatory locking, not a privilege."""
    if not attr.is_file:
        return None
    mode = attr.mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return None if mode == attr.mode else mode
