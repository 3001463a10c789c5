"""Requests of the kernel through pyfuse3 (libfuse): translation only.

pyfuse3 sends the reply right after a handler returns, before another task runs; so a buffer that
is valid until the next await may be returned as it is. An exception other than FUSEError would end
the mount, so every handler goes through ``_handler``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileInfo,
    FUSEError,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from kvfs.mount.config import MountConfig
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.frontend import (
    BLOCK_SIZE,
    DOT_ENTRIES,
    Space,
    StaleOpens,
    errno_of,
    sectors,
)
from kvfs.mount.limits import MOUNT_TASKS
from kvfs.mount.names import Entry
from kvfs.mount.requests import AttrChanges, Caller, Opened
from kvfs_base.errors import EntryNotFound, MountFailed
from kvfs_base.limits import NAME_BYTES_MAX, PAGE_BYTES
from kvfs_base.types import Attr

P = ParamSpec("P")
R = TypeVar("R")


def _handler(
    function: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    @functools.wraps(function)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await function(*args, **kwargs)
        except Exception as exc:
            raise FUSEError(errno_of(exc, function.__name__)) from exc

    return wrapper


class _Operations(pyfuse3.Operations):
    supports_dot_lookup = False
    enable_writeback_cache = False  # sizes and times would be the kernel's: no second mount
    enable_acl = False

    def __init__(self, filesystem: Filesystem, config: MountConfig) -> None:
        super().__init__()
        self._fs = filesystem
        self._config = config
        self._stale_opens = StaleOpens()

    # --- translation

    def _entry(self, attr: Attr) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = attr.inode
        entry.entry_timeout = self._config.entry_seconds
        entry.attr_timeout = self._config.attribute_seconds
        entry.st_mode = attr.mode
        entry.st_nlink = attr.nlink
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_rdev = attr.rdev
        entry.st_size = attr.size
        entry.st_blksize = BLOCK_SIZE
        entry.st_blocks = sectors(attr)
        entry.st_atime_ns = attr.atime_ns
        entry.st_mtime_ns = attr.mtime_ns
        entry.st_ctime_ns = attr.ctime_ns
        return entry

    def _info(self, inode: int, opened: Opened) -> FileInfo:
        if not opened.keep_cache:
            # Open drops the pages; the size that the kernel has is as old as they are.
            pyfuse3.invalidate_inode(inode, attr_only=True)
        return FileInfo(fh=opened.handle, keep_cache=opened.keep_cache)

    # --- names

    @_handler
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            return self._entry(await self._fs.lookup(parent, name))
        except EntryNotFound:
            self._stale_opens.over(ctx.pid)
            if not self._config.negative_seconds:
                raise
            missing = EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = self._config.negative_seconds
            return missing

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self._fs.forget(inode for inode, _ in inode_list)

    @_handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._fs.getattr(inode))

    @_handler
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        changes = AttrChanges(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry(await self._fs.setattr(inode, changes))

    @_handler
    async def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._fs.mkdir(parent, name, mode, _caller(ctx)))

    @_handler
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._fs.mknod(parent, name, mode, rdev, _caller(ctx)))

    @_handler
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._fs.symlink(parent, name, target, _caller(ctx)))

    @_handler
    async def link(
        self, inode: int, parent: int, name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._fs.link(inode, parent, name))

    @_handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._fs.readlink(inode)

    @_handler
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.unlink(parent, name)

    @_handler
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.rmdir(parent, name)

    @_handler
    async def rename(  # noqa: PLR0917 (pyfuse3's signature)
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        await self._fs.rename(parent, name, new_parent, new_name, flags)

    # --- files

    @_handler
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        attr, opened = await self._fs.create(parent, name, mode, flags, _caller(ctx))
        return FileInfo(fh=opened.handle, keep_cache=True), self._entry(attr)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        try:
            opened = await self._fs.open(inode, flags)
        except Exception as exc:
            code = self._stale_opens.failed(ctx.pid, errno_of(exc, "open"))
            raise FUSEError(code) from exc
        self._stale_opens.over(ctx.pid)
        return self._info(inode, opened)

    @_handler
    async def read(self, fh: int, off: int, size: int) -> Any:  # anything with a buffer will do
        return await self._fs.read(fh, off, size)

    @_handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._fs.write(fh, off, buf)

    @_handler
    async def flush(self, fh: int) -> None:
        await self._fs.flush(fh)

    @_handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._fs.fsync(fh)

    @_handler
    async def release(self, fh: int) -> None:
        await self._fs.release(fh)

    # --- directories

    @_handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._fs.opendir(inode)

    @_handler
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        position = start_id
        while position < DOT_ENTRIES:
            name, attr = self._fs.dots(fh)[position]
            position += 1
            if not pyfuse3.readdir_reply(token, name, self._entry(attr), position):
                return
        while entries := await self._fs.readdir(fh, position - DOT_ENTRIES):
            for name, attr in entries:
                position += 1
                if not pyfuse3.readdir_reply(token, name, self._entry(attr), position):
                    return

    @_handler
    async def releasedir(self, fh: int) -> None:
        self._fs.releasedir(fh)

    @_handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._fs.fsyncdir(fh)

    @_handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = Space.of(await self._fs.statfs())
        result = StatvfsData()
        result.f_bsize = result.f_frsize = PAGE_BYTES
        result.f_blocks = space.blocks
        result.f_bfree = result.f_bavail = space.blocks_free
        result.f_files = space.files
        result.f_ffree = result.f_favail = space.files_free
        result.f_namemax = NAME_BYTES_MAX
        return result

    # --- extended attributes

    @_handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return await self._fs.xattrs.get(inode, name)

    @_handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        # pyfuse3 has dealt with XATTR_CREATE and XATTR_REPLACE.
        await self._fs.xattrs.set(inode, name, value)

    @_handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return await self._fs.xattrs.list(inode)

    @_handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.xattrs.remove(inode, name)


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid)


def _name_is_gone(parent: int, inode: int, name: bytes) -> None:
    pyfuse3.invalidate_entry_async(parent, name, deleted=inode, ignore_enoent=True)


def _changed(inodes: Sequence[int], entries: Sequence[Entry]) -> None:
    for inode in inodes:
        with contextlib.suppress(OSError):  # the kernel does not know it
            pyfuse3.invalidate_inode(inode, attr_only=True)
    for parent, name in entries:
        pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)


class Pyfuse3Frontend:
    def __init__(self, filesystem: Filesystem, config: MountConfig) -> None:
        self._filesystem = filesystem
        self._operations = _Operations(filesystem, config)
        self._config = config

    def mount(self) -> None:
        self._filesystem.when_gone(_name_is_gone)
        self._filesystem.when_changed(_changed)
        options = {"default_permissions", "fsname=kvfs", "subtype=kvfs"}
        if self._config.allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(self._operations, self._config.mountpoint, options)
        except RuntimeError as exc:  # libfuse has said why on stderr
            raise MountFailed(detail=str(exc), mountpoint=self._config.mountpoint) from exc

    async def serve(self) -> None:
        await pyfuse3.main(max_tasks=MOUNT_TASKS)

    def stop(self) -> None:
        pyfuse3.terminate()

    def close(self) -> None:
        pyfuse3.close(unmount=False)
