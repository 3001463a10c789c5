"""The direct front end's answers: requests of the kernel in, calls of the Filesystem, answers out.

There are three kinds of handlers. What is known here is answered at once (``now``). Most look-ups
and changes of names need one answer of the metadata service and nothing else (``soon``). Everything
may wait (``later``).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from fcntl import F_UNLCK

from msgspec.structs import replace

from kvfs.mount import fuse_wire as wire
from kvfs.mount import fuse_wire_ranges as ranges
from kvfs.mount.backend import NO_DESCRIPTOR
from kvfs.mount.config import MountConfig
from kvfs.mount.device import Device
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.frontend import DOT_ENTRIES, Space, StaleOpens, errno_of
from kvfs.mount.fuse_wire import Feature, Opcode, OpenFlag, Request, SetAttrValid
from kvfs.mount.fuse_wire_statx import statx_out
from kvfs.mount.lookout import Lookout
from kvfs.mount.passthrough import NO_BACKING, Backings
from kvfs.mount.requests import AttrChanges, Caller, Opened
from kvfs_base.errors import EntryNotFound, InodeStale, KvfsError, ProtocolError, ResultTooLarge
from kvfs_base.rpc import Done
from kvfs_base.seams import Buffer
from kvfs_base.types import Attr

Answer = Sequence[Buffer]
"""What follows the header. Valid until the next await."""
Now = Callable[[Request], Answer | None]
"""None: somebody has to be asked."""
Tell = Callable[[Request, Answer | None, KvfsError | None], None]
"""Neither: it has to be ``later``."""
Soon = Callable[[Request, Tell], int]
"""A number for ``Filesystem.give_up``; True: it is told of in any case, and cannot be given up; 0
or False: it has to be ``later``."""
Later = Callable[[Request], Awaitable[Answer]]

WANTED = (
    Feature.ASYNC_READ
    | Feature.ATOMIC_O_TRUNC
    | Feature.BIG_WRITES
    | Feature.DO_READDIRPLUS
    | Feature.ASYNC_DIO
    | Feature.PARALLEL_DIROPS
    | Feature.MAX_PAGES
    | Feature.CACHE_SYMLINKS  # an inode's target never changes
    | Feature.HANDLE_KILLPRIV_V2  # else the kernel asks for security.capability before each write
    | Feature.INIT_EXT
)
"""Without the write-back cache: sizes and times would be the kernel's, and no second mount could
have a say. OPENDIR is answered, as positions in a listing belong to its handle. Listings always
carry attributes (no READDIRPLUS_AUTO): the service sends them anyway, and ``ls -l`` lists first
and asks for each name afterwards, when it would be too late for the kernel to adapt."""

KEEP_CACHE, PASSTHROUGH = int(OpenFlag.KEEP_CACHE), int(OpenFlag.PASSTHROUGH)
DIRECT_IO, NOFLUSH = int(OpenFlag.DIRECT_IO), int(OpenFlag.NOFLUSH)
"""As numbers: to put flags together takes a microsecond each time."""
KILLS_PRIVILEGES = int(SetAttrValid.UID | SetAttrValid.GID | SetAttrValid.KILL_SUIDGID)

CAPABILITIES = b"security.capability"
"""The kernel asks for them once before the first write to a file that it has just met."""

LOCKING = Feature.POSIX_LOCKS | Feature.FLOCK_LOCKS
"""Without these the kernel keeps locks by itself, and they hold within this mount."""


class Handlers:
    """Of one mount."""

    def __init__(self, filesystem: Filesystem, config: MountConfig, device: Device) -> None:
        self._fs = filesystem
        self._config = config
        self._device = device
        self._locks = filesystem.locks
        self._locking = config.locks != "mount"
        self.lookout = Lookout(filesystem.clock, config.busy_wait_seconds)
        self._stale_opens = StaleOpens()
        self._backings: Backings | None = None
        """None where the kernel does not read by itself."""
        self._entry_times = wire.Times.of(config.entry_seconds)
        self._attr_times = wire.Times.of(config.attribute_seconds)
        self._packed = wire.PackedEntries(self._entry_times, self._attr_times)
        self._negative_times = wire.Times.of(config.negative_seconds)
        self.is_to_be_told: Callable[[int], bool] = lambda inode: False
        """Whether an inode has changed, and the kernel has not heard of it yet."""
        self.now = self._now_handlers()
        self.soon = self._soon_handlers()
        self.later = self._later_handlers()

    def errno_of(self, request: Request, error: Exception) -> int:
        """What the kernel is told of a request that failed."""
        code = errno_of(error, Opcode(request.opcode).name.lower())
        if request.opcode == Opcode.OPEN:
            return self._stale_opens.failed(request.thread, code)
        if request.opcode == Opcode.LOOKUP:
            self._stale_opens.over(request.thread)
        return code

    def take_back_now(self, request: Request, answer: Answer) -> None:
        """Nobody was there to take what was opened at once."""
        if request.opcode == Opcode.OPEN:
            self._release_now(_release_of(request, answer))
        elif request.opcode == Opcode.OPENDIR:
            self._fs.releasedir(wire.handle_of(answer[-1]))

    async def take_back(self, request: Request, answer: Answer) -> None:
        """Nobody was there to take what was opened."""
        if request.opcode in (Opcode.OPEN, Opcode.CREATE):
            release = _release_of(request, answer)
            if self._release_now(release) is None:
                await self._release(release)

    # --- answered on the spot

    def _now_handlers(self) -> dict[int, Now]:
        return {
            Opcode.INIT: self._init,
            Opcode.DESTROY: lambda _: (),
            Opcode.LOOKUP: self._lookup_now,
            Opcode.GETATTR: self._getattr_now,
            Opcode.STATX: self._getattr_now,
            Opcode.OPEN: self._open_now,
            Opcode.READ: self._read_now,
            Opcode.WRITE: self._write_now,
            Opcode.FLUSH: self._flush_now,
            Opcode.RELEASE: self._release_now,
            Opcode.OPENDIR: lambda r: (wire.open_out(self._fs.opendir(r.inode), 0),),
            Opcode.READDIR: self._readdir_now,
            Opcode.READDIRPLUS: self._readdir_now,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.GETXATTR: self._getxattr_now,
        }

    def _init(self, request: Request) -> Answer:
        init: wire.Init = request.arguments
        if init.major != wire.MAJOR or init.minor < wire.MINOR_MIN:
            raise ProtocolError(detail=f"the kernel speaks FUSE {init.major}.{init.minor}")
        features = int(WANTED | LOCKING if self._locking else WANTED) & init.features
        if os.geteuid() == 0 and init.features & Feature.PASSTHROUGH:
            features |= Feature.PASSTHROUGH
            self._backings = Backings(self._device)
            self._fs.pass_files_through(self._backings.let_go)
        return (wire.init_out(init, features, init.max_readahead),)

    def _lookup_now(self, request: Request) -> Answer | None:
        try:
            attr = self._fs.lookup_now(request.inode, *request.arguments)
        except EntryNotFound:
            if not self._config.negative_seconds:
                raise
            return self._missing(request)
        return None if attr is None else self._entry(attr)

    def _getattr_now(self, request: Request) -> Answer | None:
        attr = self._fs.getattr_now(request.inode)
        return None if attr is None else self._told(request, attr)

    def _open_now(self, request: Request) -> Answer | None:
        flags, kill = request.arguments
        if self.is_to_be_told(request.inode) and self._stale_opens.may_fail(request.thread):
            raise InodeStale(inode=request.inode)  # the name may be another file's by now
        opened = None if kill else self._fs.open_now(request.inode, flags)
        return None if opened is None else self._opened(request, opened)

    def _read_now(self, request: Request) -> Answer | None:
        data = self._fs.read_now(*request.arguments)
        return None if data is None else (data,)

    def _write_now(self, request: Request) -> Answer | None:
        handle, offset, data, kill = request.arguments
        if kill and self._fs.is_privileged(handle):
            return None
        return (wire.size_out(len(data)),) if self._fs.write_now(handle, offset, data) else None

    def _release_now(self, request: Request) -> Answer | None:
        (handle,) = request.arguments
        if self._locks.ends_with_release(request.inode, handle):
            return None
        if not self._fs.release_now(handle):
            return None
        self._released(request.inode, handle)
        return ()

    def _released(self, inode: int, handle: int) -> None:
        if self._backings is not None:
            is_kept = self._fs.keeps_backing(inode)
            self.lookout.expects |= self._backings.released(handle, is_kept=is_kept)

    def _flush_now(self, request: Request) -> Answer | None:
        handle, owner = request.arguments
        if self._locks.ends_with_flush(request.inode, owner):
            return None
        if not self._fs.flush_now(handle):
            return None
        if self._backings is not None:
            self.lookout.expects |= self._backings.reads(handle)
        return ()

    def _releasedir(self, request: Request) -> Answer:
        self._fs.releasedir(*request.arguments)
        return ()

    def _getxattr_now(self, request: Request) -> Answer | None:
        if request.arguments.name == CAPABILITIES:
            self._fs.write_begins.append(request.inode)
        self._fs.xattrs.check(request.arguments.name)
        return None

    # --- answered by one answer

    def _soon_handlers(self) -> dict[int, Soon]:
        return {
            Opcode.LOOKUP: self._lookup_soon,
            Opcode.GETATTR: self._getattr_soon,
            Opcode.STATX: self._getattr_soon,
            Opcode.SETATTR: self._setattr_soon,
            Opcode.OPEN: self._open_soon,
            Opcode.CREATE: self._create_soon,
            Opcode.FLUSH: self._flush_soon,
            Opcode.SYMLINK: self._symlink_soon,
            Opcode.MKNOD: self._mknod_soon,
            Opcode.MKDIR: self._mkdir_soon,
            Opcode.LINK: self._link_soon,
            Opcode.UNLINK: self._unlink_soon,
            Opcode.RMDIR: self._rmdir_soon,
            Opcode.RENAME: self._rename_soon,
            Opcode.RENAME2: self._rename_soon,
        }

    def _lookup_soon(self, request: Request, tell: Tell) -> int:
        def done(attr: Attr | None, error: KvfsError | None) -> None:
            if isinstance(error, EntryNotFound) and self._config.negative_seconds:
                tell(request, self._missing(request), None)
            else:
                tell(request, () if attr is None else self._entry(attr), error)

        (name,) = request.arguments
        return self._fs.lookup_soon(request.inode, name, done)

    def _getattr_soon(self, request: Request, tell: Tell) -> int:
        def done(attr: Attr | None, error: KvfsError | None) -> None:
            tell(request, () if attr is None else self._told(request, attr), error)

        return self._fs.getattr_soon(request.inode, done)

    def _setattr_soon(self, request: Request, tell: Tell) -> int:
        def done(attr: Attr | None, error: KvfsError | None) -> None:
            tell(request, () if attr is None else self._attr(attr), error)

        return self._fs.setattr_soon(request.inode, _changes(request.arguments), done)

    def _open_soon(self, request: Request, tell: Tell) -> int:
        flags, kill = request.arguments

        def done(opened: Opened | None, error: KvfsError | None) -> None:
            answer = None if opened is None else self._opened(request, opened)
            tell(request, answer, error)

        return not kill and self._fs.open_soon(request.inode, flags, done)

    def _create_soon(self, request: Request, tell: Tell) -> int:
        flags, mode, name = request.arguments

        def done(created: tuple[Attr, Opened] | None, error: KvfsError | None) -> None:
            tell(request, None if created is None else self._created(*created), error)

        entry = request.inode, name
        return self._fs.create_soon(entry, mode, flags, _caller(request), done)

    def _flush_soon(self, request: Request, tell: Tell) -> int:
        handle, owner = request.arguments

        def done(flushed: bool | None, error: KvfsError | None) -> None:
            tell(request, () if flushed else None, error)

        return not self._locks.ends_with_flush(request.inode, owner) and self._fs.flush_soon(
            handle, done
        )

    def _symlink_soon(self, request: Request, tell: Tell) -> int:
        name, target = request.arguments
        done = self._made(request, tell)
        return self._fs.symlink_soon(request.inode, name, target, _caller(request), done)

    def _mknod_soon(self, request: Request, tell: Tell) -> int:
        mode, rdev, name = request.arguments
        done = self._made(request, tell)
        entry = request.inode, name
        return self._fs.mknod_soon(entry, mode, rdev, _caller(request), done)

    def _mkdir_soon(self, request: Request, tell: Tell) -> int:
        mode, _, name = request.arguments
        done = self._made(request, tell)
        return self._fs.mkdir_soon(request.inode, name, mode, _caller(request), done)

    def _link_soon(self, request: Request, tell: Tell) -> int:
        inode, name = request.arguments
        return self._fs.link_soon(inode, request.inode, name, self._made(request, tell))

    def _unlink_soon(self, request: Request, tell: Tell) -> int:
        (name,) = request.arguments
        return self._fs.unlink_soon(request.inode, name, _changed(request, tell))

    def _rmdir_soon(self, request: Request, tell: Tell) -> int:
        (name,) = request.arguments
        return self._fs.rmdir_soon(request.inode, name, _changed(request, tell))

    def _rename_soon(self, request: Request, tell: Tell) -> int:
        new_parent, flags, name, new_name = request.arguments
        old, new = (request.inode, name), (new_parent, new_name)
        return self._fs.rename_soon(old, new, flags, _changed(request, tell))

    def _made(self, request: Request, tell: Tell) -> Done:
        """For what is answered with an entry."""

        def done(attr: Attr | None, error: KvfsError | None) -> None:
            tell(request, None if attr is None else self._entry(attr), error)

        return done

    # --- names

    def _later_handlers(self) -> dict[int, Later]:
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.STATX: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FLUSH: self._flush,
            Opcode.FSYNC: self._fsync,
            Opcode.RELEASE: self._release,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.GETLK: self._getlk,
            Opcode.SETLK: self._setlk,
            Opcode.SETLKW: self._setlk,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.FSYNCDIR: self._fsyncdir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.SETXATTR: self._setxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.REMOVEXATTR: self._removexattr,
        }

    def _told(self, request: Request, attr: Attr) -> Answer:
        if request.opcode == Opcode.STATX:
            return (statx_out(attr, self._attr_times),)
        return self._attr(attr)

    def _attr(self, attr: Attr) -> Answer:
        return (wire.attr_out(attr, self._attr_times),)

    def _entry(self, attr: Attr) -> Answer:
        return (wire.entry_out(attr, self._entry_times, self._attr_times),)

    def _missing(self, request: Request) -> Answer:
        self._stale_opens.over(request.thread)
        return (wire.missing_entry_out(self._negative_times),)

    async def _lookup(self, request: Request) -> Answer:
        try:
            return self._entry(await self._fs.lookup(request.inode, *request.arguments))
        except EntryNotFound:
            if not self._config.negative_seconds:
                raise
            return self._missing(request)

    async def _getattr(self, request: Request) -> Answer:
        return self._told(request, await self._fs.getattr(request.inode))

    async def _setattr(self, request: Request) -> Answer:
        return self._attr(await self._fs.setattr(request.inode, _changes(request.arguments)))

    async def _readlink(self, request: Request) -> Answer:
        return (await self._fs.readlink(request.inode),)

    async def _symlink(self, request: Request) -> Answer:
        name, target = request.arguments
        return self._entry(await self._fs.symlink(request.inode, name, target, _caller(request)))

    async def _mknod(self, request: Request) -> Answer:
        mode, rdev, name = request.arguments
        caller = _caller(request)
        return self._entry(await self._fs.mknod(request.inode, name, mode, rdev, caller))

    async def _mkdir(self, request: Request) -> Answer:
        mode, _, name = request.arguments
        return self._entry(await self._fs.mkdir(request.inode, name, mode, _caller(request)))

    async def _unlink(self, request: Request) -> Answer:
        await self._fs.unlink(request.inode, *request.arguments)
        return ()

    async def _rmdir(self, request: Request) -> Answer:
        await self._fs.rmdir(request.inode, *request.arguments)
        return ()

    async def _rename(self, request: Request) -> Answer:
        new_parent, flags, name, new_name = request.arguments
        await self._fs.rename(request.inode, name, new_parent, new_name, flags)
        return ()

    async def _link(self, request: Request) -> Answer:
        inode, name = request.arguments
        return self._entry(await self._fs.link(inode, request.inode, name))

    # --- files

    def _opened(self, request: Request, opened: Opened) -> Answer:
        self._stale_opens.over(request.thread)
        inode, backing_id = request.inode, NO_BACKING
        if self._backings is not None and opened.backing != NO_DESCRIPTOR:
            backing_id = self._backings.opened(
                opened.handle, inode, opened.backing, is_written=opened.passes_writes
            )
            if backing_id == NO_BACKING and opened.passes_writes:
                self._fs.refuse_backing(opened.handle)
        flags = KEEP_CACHE if opened.keep_cache else 0
        if not opened.keep_cache:
            # Open drops the pages; the size that the kernel has is as old as they are.
            self._device.notify(wire.inval_attributes(inode))
        if backing_id != NO_BACKING:
            # No pages to keep. Who writes goes through us: the file may outgrow its chunk.
            through_us = opened.writable and not opened.passes_writes
            flags = PASSTHROUGH | DIRECT_IO if through_us else PASSTHROUGH
            self.lookout.expects |= not opened.writable
        if not opened.writable and (opened.is_block or not self._locking):
            flags |= NOFLUSH  # elsewhere a close may end locks
        return (wire.open_out(opened.handle, flags, backing_id),)

    async def _open(self, request: Request) -> Answer:
        flags, kill = request.arguments
        opened = await self._fs.open(request.inode, flags)
        if kill and self._fs.is_privileged(opened.handle):
            await self._fs.setattr(request.inode, AttrChanges(drop_privileges=True))
        return self._opened(request, opened)

    async def _create(self, request: Request) -> Answer:
        flags, mode, name = request.arguments
        return self._created(
            *await self._fs.create(request.inode, name, mode, flags, _caller(request))
        )

    def _created(self, attr: Attr, opened: Opened) -> Answer:
        flags, backing_id = KEEP_CACHE, NO_BACKING
        if self._backings is not None and opened.backing != NO_DESCRIPTOR:
            backing_id = self._backings.opened(
                opened.handle, attr.inode, opened.backing, is_written=True
            )
            if backing_id != NO_BACKING:
                flags = PASSTHROUGH
            else:
                self._fs.refuse_backing(opened.handle)
        return (*self._entry(attr), wire.open_out(opened.handle, flags, backing_id))

    async def _read(self, request: Request) -> Answer:
        return (await self._fs.read(*request.arguments),)

    async def _write(self, request: Request) -> Answer:
        handle, offset, data, kill = request.arguments
        if kill and self._fs.is_privileged(handle):
            await self._fs.setattr(request.inode, AttrChanges(drop_privileges=True))
        return (wire.size_out(await self._fs.write(handle, offset, data)),)

    async def _flush(self, request: Request) -> Answer:
        handle, owner = request.arguments
        await self._locks.flushed(request.inode, owner)
        await self._fs.flush(handle)
        return ()

    async def _fsync(self, request: Request) -> Answer:
        await self._fs.fsync(*request.arguments)
        return ()

    async def _release(self, request: Request) -> Answer:
        (handle,) = request.arguments
        await self._locks.released(request.inode, handle)
        try:
            await self._fs.release(handle)
        finally:
            self._released(request.inode, handle)
        return ()

    # --- ranges

    async def _fallocate(self, request: Request) -> Answer:
        await self._fs.allocate(*request.arguments)
        return ()

    async def _lseek(self, request: Request) -> Answer:
        return (ranges.seek_out(await self._fs.seek(*request.arguments)),)

    async def _getlk(self, request: Request) -> Answer:
        return (ranges.lock_out(await self._locks.get(request.inode, request.arguments.lock)),)

    async def _setlk(self, request: Request) -> Answer:
        handle, kind, lock = request.arguments
        if kind == F_UNLCK:
            await self._locks.unlock(request.inode, lock)
        else:
            wait = request.opcode == Opcode.SETLKW
            await self._locks.lock(request.inode, handle, lock, wait=wait)
        return ()

    # --- directories

    def _readdir_now(self, request: Request) -> Answer | None:
        handle = request.arguments.handle
        listing = self._listing(request)
        while not listing.is_full:
            entries = self._fs.readdir_now(handle, listing.position - DOT_ENTRIES)
            if entries is None:
                return None
            if not entries:
                break
            listing.fill(entries)
        return (listing.answer(),)

    async def _readdir(self, request: Request) -> Answer:
        handle = request.arguments.handle
        listing = self._listing(request)
        while not listing.is_full:
            entries = await self._fs.readdir(handle, listing.position - DOT_ENTRIES)
            if not entries:
                break
            listing.fill(entries)
        return (listing.answer(),)

    def _listing(self, request: Request) -> wire.Listing:
        """With the entries that are not the file system's."""
        handle, position, size = request.arguments
        plus = self._packed if request.opcode == Opcode.READDIRPLUS else None
        listing = wire.Listing(position, size, plus)
        for name, attr in self._fs.dots(handle)[position:]:
            listing.add_dot(name, attr.inode)
        return listing

    async def _fsyncdir(self, request: Request) -> Answer:
        await self._fs.fsyncdir(*request.arguments)
        return ()

    async def _statfs(self, request: Request) -> Answer:
        return (wire.statfs_out(Space.of(await self._fs.statfs(request.inode))),)

    # --- extended attributes

    async def _getxattr(self, request: Request) -> Answer:
        size, name = request.arguments
        return _sized(await self._fs.xattrs.get(request.inode, name), size)

    async def _listxattr(self, request: Request) -> Answer:
        names = await self._fs.xattrs.list(request.inode)
        return _sized(b"".join(name + b"\0" for name in names), request.arguments.size)

    async def _setxattr(self, request: Request) -> Answer:
        await self._fs.xattrs.set(request.inode, *request.arguments)
        return ()

    async def _removexattr(self, request: Request) -> Answer:
        await self._fs.xattrs.remove(request.inode, *request.arguments)
        return ()


def _sized(value: bytes, size: int) -> Answer:
    """What fits, or the size if that was the question. Raises ResultTooLarge."""
    if not size:
        return (wire.size_out(len(value)),)
    if len(value) > size:
        raise ResultTooLarge(limit=size)
    return (value,)


def _changed(request: Request, tell: Tell) -> Done:
    """For what is answered with nothing but success."""

    def done(_: None, error: KvfsError | None) -> None:
        tell(request, (), error)

    return done


def _changes(args: wire.SetAttrs) -> AttrChanges:
    valid = args.valid
    return AttrChanges(
        mode=args.mode if valid & SetAttrValid.MODE else None,
        uid=args.uid if valid & SetAttrValid.UID else None,
        gid=args.gid if valid & SetAttrValid.GID else None,
        size=args.size if valid & SetAttrValid.SIZE else None,
        atime_ns=args.atime_ns if valid & SetAttrValid.ATIME else None,
        mtime_ns=args.mtime_ns if valid & SetAttrValid.MTIME else None,
        drop_privileges=bool(valid & KILLS_PRIVILEGES),
    )


def _release_of(request: Request, answer: Answer) -> Request:
    return replace(request, arguments=(wire.handle_of(answer[-1]),))


def _caller(request: Request) -> Caller:
    return Caller(request.uid, request.gid)
