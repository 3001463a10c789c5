"""The direct front end: requests of the kernel from /dev/fuse itself.

Each time that the device has something, all requests that are there are read before another task
gets its turn: an event-loop turn a request is what costs most of a small call. What can be answered
from what is known here (attributes of open files, cached pages, most closes) is answered on the
spot; the rest becomes a task.

A request that its caller gave up (a signal) is left to end by itself for MOUNT_INTERRUPT_SECONDS.
Then those that change nothing end with EINTR. Those that change something always end as they do:
who is told EINTR takes them for not done.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from kvfs.mount import fuse_wire as wire
from kvfs.mount.backend import NO_DESCRIPTOR
from kvfs.mount.config import MountConfig
from kvfs.mount.device import GONE, Device
from kvfs.mount.filesystem import AttrChanges, Caller, Filesystem, Opened
from kvfs.mount.frontend import DOT_ENTRIES, Space, errno_of
from kvfs.mount.fuse_wire import Feature, Opcode, OpenFlag, Request, SetAttrValid
from kvfs.mount.passthrough import NO_BACKING, Backings
from kvfs_base.errors import EntryNotFound, ProtocolError, ResultTooLarge
from kvfs_base.limits import (
    MOUNT_DRAIN_REQUESTS,
    MOUNT_INTERRUPT_SECONDS,
    MOUNT_TASKS,
    PAGE_BYTES,
)
from kvfs_base.seams import Buffer
from kvfs_base.types import Attr

log = logging.getLogger(__name__)

Answer = Sequence[Buffer]
"""What follows the header. Valid until the next await."""
Now = Callable[[Request], Answer | None]
"""None: somebody has to be asked."""
Later = Callable[[Request], Awaitable[Answer]]

WANTED = (
    Feature.ASYNC_READ
    | Feature.ATOMIC_O_TRUNC
    | Feature.BIG_WRITES
    | Feature.DO_READDIRPLUS
    | Feature.READDIRPLUS_AUTO
    | Feature.ASYNC_DIO
    | Feature.PARALLEL_DIROPS
    | Feature.MAX_PAGES
    | Feature.CACHE_SYMLINKS  # an inode's target never changes
    | Feature.HANDLE_KILLPRIV_V2  # else the kernel asks for security.capability before each write
    | Feature.INIT_EXT
)
"""Without the write-back cache: sizes and times would be the kernel's, and no second mount could
have a say. OPENDIR is answered, as positions in a listing belong to its handle."""

INTERRUPTIBLE = frozenset(
    {
        Opcode.LOOKUP,
        Opcode.GETATTR,
        Opcode.READ,
        Opcode.READDIR,
        Opcode.READDIRPLUS,
        Opcode.READLINK,
        Opcode.GETXATTR,
        Opcode.LISTXATTR,
        Opcode.STATFS,
    }
)


class DirectFrontend:
    def __init__(self, filesystem: Filesystem, config: MountConfig) -> None:
        self._fs = filesystem
        self._config = config
        self._device: Device | None = None
        self._backings: Backings | None = None
        """None where the kernel does not read by itself."""
        self._entry_times = wire.Times.of(config.entry_seconds)
        self._attr_times = wire.Times.of(config.attribute_seconds)
        self._negative_times = wire.Times.of(config.negative_seconds)
        self._nursery: trio.Nursery | None = None
        self._reading = trio.CancelScope()
        self._running: dict[int, tuple[int, trio.CancelScope]] = {}
        """Opcode and scope by number, which the kernel uses again only after the answer."""
        self._room = trio.Event()
        # The payload of a write begins on a page.
        before = wire.REQUEST_HEADER.size + wire.WRITE_ARGUMENTS.size
        size = PAGE_BYTES - before + wire.REQUEST_BYTES_MAX
        self._buffer = memoryview(mmap.mmap(-1, size))[PAGE_BYTES - before :]
        self._now = self._now_handlers()
        self._later = self._later_handlers()

    # --- the mount

    def mount(self) -> None:
        config = self._config
        self.attach(Device.mount(config.mountpoint, allow_other=config.allow_other))

    def attach(self, device: Device) -> None:
        """Serves a device that is mounted already."""
        self._device = device

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._fs.when_gone(self._name_is_gone)
            with self._reading:
                await self._read_requests()

    def stop(self) -> None:
        self._reading.cancel()

    def close(self) -> None:
        if self._device is not None:
            self._device.close()

    # --- the loop

    async def _read_requests(self) -> None:
        assert self._device is not None
        while True:
            await trio.lowlevel.wait_readable(self._device.descriptor)
            try:
                self._drain(self._device)
            except OSError as exc:
                if exc.errno in GONE:
                    return
                raise
            while len(self._running) >= MOUNT_TASKS:
                self._room = trio.Event()
                await self._room.wait()

    def _drain(self, device: Device) -> None:
        for _ in range(MOUNT_DRAIN_REQUESTS):
            length = device.receive(self._buffer)
            if not length:
                return
            self._accept(device, self._buffer[:length])
            if len(self._running) >= MOUNT_TASKS:
                return

    def _accept(self, device: Device, view: memoryview) -> None:
        try:
            request = wire.parse(view)
        except ProtocolError as exc:
            log.error("%s", exc)
            unique = wire.unique_of(view)
            if unique is not None:
                device.answer(unique, error=errno.EIO)
            return
        if request.opcode in wire.UNANSWERED:
            self._listen(request)
            return
        now = self._now.get(request.opcode)
        try:
            answer = None if now is None else now(request)
        except Exception as exc:
            device.answer(request.unique, error=errno_of(exc, _name(request)))
            return
        if answer is not None:
            if not device.answer(request.unique, answer):
                self._take_back_now(request, answer)
            return
        later = self._later.get(request.opcode)
        if later is None:
            device.answer(request.unique, error=errno.ENOSYS)
            return
        if request.opcode == Opcode.WRITE:  # the buffer is for the next request
            data = memoryview(bytes(request.arguments.data))
            request = request._replace(arguments=request.arguments._replace(data=data))
        scope = trio.CancelScope()
        self._running[request.unique] = (request.opcode, scope)
        assert self._nursery is not None
        self._nursery.start_soon(self._carry_out, device, request, later, scope)

    async def _carry_out(
        self, device: Device, request: Request, handler: Later, scope: trio.CancelScope
    ) -> None:
        answer: Answer = ()
        error = errno.EINTR
        try:
            with scope:
                try:
                    answer = await handler(request)
                    error = 0
                except Exception as exc:
                    error = errno_of(exc, _name(request))
            # Nothing waits between the handler's return and this: ``answer`` is still valid.
            if error:
                device.answer(request.unique, error=error)
            elif not device.answer(request.unique, answer):
                await self._take_back(request, answer)
        finally:
            del self._running[request.unique]
            self._room.set()

    def _take_back_now(self, request: Request, answer: Answer) -> None:
        if request.opcode == Opcode.OPEN:
            self._release_now(_release_of(request, answer))
        elif request.opcode == Opcode.OPENDIR:
            self._fs.releasedir(wire.handle_of(answer[-1]))

    async def _take_back(self, request: Request, answer: Answer) -> None:
        """Nobody was there to take what was opened."""
        if request.opcode in (Opcode.OPEN, Opcode.CREATE):
            release = _release_of(request, answer)
            if self._release_now(release) is None:
                await self._release(release)

    def _listen(self, request: Request) -> None:
        """What needs no answer."""
        if request.opcode == Opcode.INTERRUPT:
            self._interrupt(request.arguments.unique)
        elif request.opcode == Opcode.FORGET:
            self._fs.forget([request.inode])
        else:
            self._fs.forget(request.arguments.inodes)

    def _interrupt(self, unique: int) -> None:
        opcode, scope = self._running.get(unique, (0, None))
        if scope is not None and opcode in INTERRUPTIBLE:
            scope.deadline = min(scope.deadline, trio.current_time() + MOUNT_INTERRUPT_SECONDS)

    def _name_is_gone(self, parent: int, inode: int, name: bytes) -> None:
        """In a thread: the kernel waits for changes of the directory, which may wait for us."""
        assert self._device is not None and self._nursery is not None
        notice = wire.delete(parent, inode, name)
        self._nursery.start_soon(_notify, self._device, notice)

    # --- answered on the spot

    def _now_handlers(self) -> dict[int, Now]:
        return {
            Opcode.INIT: self._init,
            Opcode.DESTROY: lambda _: (),
            Opcode.GETATTR: self._getattr_now,
            Opcode.OPEN: self._open_now,
            Opcode.READ: self._read_now,
            Opcode.WRITE: self._write_now,
            Opcode.FLUSH: lambda r: () if self._fs.flush_now(r.arguments.handle) else None,
            Opcode.RELEASE: self._release_now,
            Opcode.OPENDIR: lambda r: (wire.open_out(self._fs.opendir(r.inode), 0),),
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.GETXATTR: self._getxattr_now,
        }

    def _init(self, request: Request) -> Answer:
        init: wire.Init = request.arguments
        if init.major != wire.MAJOR or init.minor < wire.MINOR_MIN:
            raise ProtocolError(detail=f"the kernel speaks FUSE {init.major}.{init.minor}")
        features = int(WANTED) & init.features
        if os.geteuid() == 0 and init.features & Feature.PASSTHROUGH:
            assert self._device is not None
            features |= Feature.PASSTHROUGH
            self._backings = Backings(self._device)
            self._fs.pass_files_through()
        return (wire.init_out(init, features, init.max_readahead),)

    def _getattr_now(self, request: Request) -> Answer | None:
        attr = self._fs.getattr_now(request.inode)
        return None if attr is None else self._attr(attr)

    def _open_now(self, request: Request) -> Answer | None:
        opened = self._fs.open_now(request.inode, request.arguments.flags)
        return None if opened is None else self._opened(request.inode, opened)

    def _read_now(self, request: Request) -> Answer | None:
        data = self._fs.read_now(*request.arguments)
        return None if data is None else (data,)

    def _write_now(self, request: Request) -> Answer | None:
        handle, offset, data, kill = request.arguments
        if kill and self._fs.is_privileged(handle):
            return None
        return (wire.size_out(len(data)),) if self._fs.write_now(handle, offset, data) else None

    def _release_now(self, request: Request) -> Answer | None:
        handle = request.arguments.handle
        if self._backings is not None:
            self._backings.released(handle)
        return () if self._fs.release_now(handle) else None

    def _releasedir(self, request: Request) -> Answer:
        self._fs.releasedir(request.arguments.handle)
        return ()

    def _getxattr_now(self, request: Request) -> Answer | None:
        self._fs.check_xattr(request.arguments.name)
        return None

    # --- names

    def _later_handlers(self) -> dict[int, Later]:
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
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
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.FSYNCDIR: self._fsyncdir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.SETXATTR: self._setxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.REMOVEXATTR: self._removexattr,
        }

    def _attr(self, attr: Attr) -> Answer:
        return (wire.attr_out(attr, self._attr_times),)

    def _entry(self, attr: Attr) -> Answer:
        return (wire.entry_out(attr, self._entry_times, self._attr_times),)

    async def _lookup(self, request: Request) -> Answer:
        try:
            return self._entry(await self._fs.lookup(request.inode, request.arguments.name))
        except EntryNotFound:
            if not self._config.negative_seconds:
                raise
            return (wire.missing_entry_out(self._negative_times),)

    async def _getattr(self, request: Request) -> Answer:
        return self._attr(await self._fs.getattr(request.inode))

    async def _setattr(self, request: Request) -> Answer:
        args: wire.SetAttrs = request.arguments
        valid = args.valid
        changes = AttrChanges(
            mode=args.mode if valid & SetAttrValid.MODE else None,
            uid=args.uid if valid & SetAttrValid.UID else None,
            gid=args.gid if valid & SetAttrValid.GID else None,
            size=args.size if valid & SetAttrValid.SIZE else None,
            atime_ns=args.atime_ns if valid & SetAttrValid.ATIME else None,
            mtime_ns=args.mtime_ns if valid & SetAttrValid.MTIME else None,
            drop_privileges=bool(
                valid & (SetAttrValid.UID | SetAttrValid.GID | SetAttrValid.KILL_SUIDGID)
            ),
        )
        return self._attr(await self._fs.setattr(request.inode, changes))

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
        await self._fs.unlink(request.inode, request.arguments.name)
        return ()

    async def _rmdir(self, request: Request) -> Answer:
        await self._fs.rmdir(request.inode, request.arguments.name)
        return ()

    async def _rename(self, request: Request) -> Answer:
        new_parent, flags, name, new_name = request.arguments
        await self._fs.rename(request.inode, name, new_parent, new_name, flags)
        return ()

    async def _link(self, request: Request) -> Answer:
        inode, name = request.arguments
        return self._entry(await self._fs.link(inode, request.inode, name))

    # --- files

    def _opened(self, inode: int, opened: Opened) -> Answer:
        backing_id = NO_BACKING
        if self._backings is not None and opened.backing != NO_DESCRIPTOR:
            backing_id = self._backings.opened(opened.handle, inode, opened.backing)
        flags = OpenFlag.KEEP_CACHE if opened.keep_cache else OpenFlag(0)
        if not opened.keep_cache:
            # Open drops the pages; the size that the kernel has is as old as they are.
            assert self._device is not None
            self._device.notify(wire.inval_attributes(inode))
        if backing_id != NO_BACKING:
            # No pages to keep. Who writes goes through us: the file may outgrow its chunk.
            flags = OpenFlag.PASSTHROUGH | (OpenFlag.DIRECT_IO if opened.writable else 0)
        if not opened.writable:
            flags |= OpenFlag.NOFLUSH
        return (wire.open_out(opened.handle, flags, backing_id),)

    async def _open(self, request: Request) -> Answer:
        flags, kill = request.arguments
        opened = await self._fs.open(request.inode, flags)
        if kill and self._fs.is_privileged(opened.handle):
            await self._fs.setattr(request.inode, AttrChanges(drop_privileges=True))
        return self._opened(request.inode, opened)

    async def _create(self, request: Request) -> Answer:
        flags, mode, name = request.arguments
        attr, opened = await self._fs.create(request.inode, name, mode, flags, _caller(request))
        return (*self._entry(attr), wire.open_out(opened.handle, OpenFlag.KEEP_CACHE))

    async def _read(self, request: Request) -> Answer:
        return (await self._fs.read(*request.arguments),)

    async def _write(self, request: Request) -> Answer:
        handle, offset, data, kill = request.arguments
        if kill and self._fs.is_privileged(handle):
            await self._fs.setattr(request.inode, AttrChanges(drop_privileges=True))
        return (wire.size_out(await self._fs.write(handle, offset, data)),)

    async def _flush(self, request: Request) -> Answer:
        await self._fs.flush(request.arguments.handle)
        return ()

    async def _fsync(self, request: Request) -> Answer:
        await self._fs.fsync(request.arguments.handle)
        return ()

    async def _release(self, request: Request) -> Answer:
        await self._fs.release(request.arguments.handle)
        return ()

    # --- directories

    async def _readdir(self, request: Request) -> Answer:
        handle, position, size = request.arguments
        plus = request.opcode == Opcode.READDIRPLUS
        listing = wire.Listing(size, plus, self._entry_times, self._attr_times)
        for number, (name, attr) in enumerate(self._fs.dots(handle)[position:], position + 1):
            listing.add_dot(name, attr, number)
            position = number
        while entries := await self._fs.readdir(handle, position - DOT_ENTRIES):
            for entry in entries:
                position = entry.position + DOT_ENTRIES
                if not listing.add(entry.name, entry.attr, position):
                    return (listing.answer(),)
        return (listing.answer(),)

    async def _fsyncdir(self, request: Request) -> Answer:
        await self._fs.fsyncdir(request.arguments.handle)
        return ()

    async def _statfs(self, request: Request) -> Answer:
        return (wire.statfs_out(Space.of(await self._fs.statfs())),)

    # --- extended attributes

    async def _getxattr(self, request: Request) -> Answer:
        size, name = request.arguments
        return _sized(await self._fs.getxattr(request.inode, name), size)

    async def _listxattr(self, request: Request) -> Answer:
        names = await self._fs.listxattr(request.inode)
        return _sized(b"".join(name + b"\0" for name in names), request.arguments.size)

    async def _setxattr(self, request: Request) -> Answer:
        await self._fs.setxattr(request.inode, *request.arguments)
        return ()

    async def _removexattr(self, request: Request) -> Answer:
        await self._fs.removexattr(request.inode, request.arguments.name)
        return ()


def _sized(value: bytes, size: int) -> Answer:
    """What fits, or the size if that was the question. Raises ResultTooLarge."""
    if not size:
        return (wire.size_out(len(value)),)
    if len(value) > size:
        raise ResultTooLarge(limit=size)
    return (value,)


def _release_of(request: Request, answer: Answer) -> Request:
    return request._replace(arguments=wire.OfHandle(wire.handle_of(answer[-1])))


def _caller(request: Request) -> Caller:
    return Caller(request.uid, request.gid)


def _name(request: Request) -> str:
    return Opcode(request.opcode).name.lower()


async def _notify(device: Device, notice: bytes) -> None:
    try:
        await trio.to_thread.run_sync(device.notify, notice, abandon_on_cancel=True)
    except OSError as exc:
        log.info("the kernel was not told that a name is gone: %s", exc.strerror)
