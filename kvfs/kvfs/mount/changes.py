"""What is asked of the metadata service to change names and attributes, checked before."""

from __future__ import annotations

import stat

from kvfs.mount.requests import AttrChanges, Caller
from kvfs_base.errors import NameTooLong
from kvfs_base.limits import NAME_BYTES_MAX, SYMLINK_BYTES_MAX
from kvfs_metadata.messages import Make, Rename, SetAttr


def make_request(
    parent: int,
    name: bytes,
    mode: int,
    caller: Caller,
    *,
    rdev: int = 0,
    target: bytes = b"",
    open: bool = False,
) -> Make:
    check_name(name)
    return Make(parent, name, mode, caller.uid, caller.gid, rdev, target, open=open)


def attr_change(inode: int, changes: AttrChanges, mode: int | None) -> SetAttr:
    return SetAttr(
        inode,
        mode=None if mode is None else stat.S_IMODE(mode),
        uid=changes.uid,
        gid=changes.gid,
        size=changes.size,
        atime_ns=changes.atime_ns,
        mtime_ns=changes.mtime_ns,
    )


def rename_request(
    parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
) -> Rename:
    check_name(name)
    check_name(new_name)
    return Rename(parent, name, new_parent, new_name, flags)


def check_name(name: bytes) -> None:
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(length=len(name))


def check_target(target: bytes) -> None:
    if len(target) > SYMLINK_BYTES_MAX:
        raise NameTooLong(length=len(target))
