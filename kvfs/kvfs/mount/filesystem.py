"""The file system as a mount shows it: all semantics, no words of any front end.

A front end turns requests of the kernel into calls of one ``Filesystem`` and KvfsErrors into errno.
Names live at the metadata service; this mount keeps what is open (``open_files``, ``blocks``) and
what was leased to it (``names``).

Methods in ``_now`` answer what is known here without a turn of the event loop, and None or False
when somebody has to be asked: the method of the same name then does.

All methods run in one trio task at a time between awaits; none holds state across an await other
than under the lock of the inode (see ``files``).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trio

from kvfs.mount.backend import NO_DESCRIPTOR, Backend
from kvfs.mount.blocks import Blocks, OpenBlock
from kvfs.mount.changes import (
    attr_change,
    check_name,
    check_target,
    make_request,
    rename_request,
)
from kvfs.mount.directory import OpenDirectory
from kvfs.mount.file_locks import FileLocks
from kvfs.mount.files import OpenFile
from kvfs.mount.limits import (
    MOUNT_IDLE_SECONDS,
    MOUNT_OPEN_FILES,
    MOUNT_REMEMBERED_INODES,
    MOUNT_WRITE_BACK_SECONDS,
)
from kvfs.mount.names import MISSING, Entry
from kvfs.mount.open_files import OpenFiles
from kvfs.mount.remembered import Remembered
from kvfs.mount.requests import AttrChanges, Caller, Opened, without_privileges
from kvfs.mount.xattrs import Xattrs
from kvfs_base.errors import (
    EntryExists,
    EntryNotFound,
    InodeStale,
    KvfsError,
    LimitExceeded,
    NotPermitted,
)
from kvfs_base.rpc import Done, Request
from kvfs_base.seams import Buffer
from kvfs_base.types import Attr
from kvfs_metadata.messages import (
    FilesystemStats,
    GetAttr,
    Link,
    Lookup,
    Make,
    ReadLink,
    Rmdir,
    SetAttr,
    StatFs,
    Sync,
    Touched,
    Unlink,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Handle:
    file: OpenFile
    writable: bool
    synced: bool = False
    """Each write is to be on stable storage, and the kernel does not ask for that by itself."""


class Filesystem:
    """Every method raises KvfsErrors only, apart from bugs."""

    def __init__(self, backend: Backend, *, attribute_seconds: float = 1.0) -> None:
        self._backend = backend
        self.clock = backend.env.clock
        self._attribute_seconds = attribute_seconds
        self._blocks = Blocks(backend)
        self._files = OpenFiles(backend)
        self.write_begins: list[int] = []
        """Inodes that the kernel is about to write to; ``send_soon`` sees to them."""
        self.adoptions = backend.adoptions
        self._handles: dict[int, Handle | OpenBlock | OpenDirectory] = {}
        self._next_handle = 1
        self._seen_blocks: Remembered[tuple[int, Attr]] = Remembered(MOUNT_REMEMBERED_INODES)
        self.locks = FileLocks(backend)
        self.xattrs = Xattrs(backend)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {
            "blocks_damaged": 0,
            **self._backend.statistics,
            **self._backend.names.statistics(),
            "handles": len(self._handles),
            "open_blocks": len(self._blocks),
            "idle_blocks": len(self._blocks.idle),
            "idle_files": len(self._files.opens),
            "open_files": len(self._files),
        }

    def when_gone(self, tell: Callable[[int, int, bytes], None]) -> None:
        """``tell`` is called with parent, inode and name of what disappears by itself; it does not
        wait for the kernel."""
        self._backend.name_is_gone = tell

    def when_changed(self, tell: Callable[[Sequence[int], Sequence[Entry]], None]) -> None:
        """``tell`` is called with inodes and entries that somebody else changed; it does not wait
        for the kernel."""

        def changed(inodes: Sequence[int], entries: Sequence[Entry]) -> None:
            self._files.changed(inodes)
            self._blocks.idle.drop(inodes)
            tell(inodes, entries)

        self._backend.names.tell_kernel = changed

    def pass_files_through(self, let_go: Callable[[int], None]) -> None:
        """The kernel reads by itself what Opened has as ``backing``: ordinary files, too.
        ``let_go`` is told each inode for which ``keeps_backing`` ends without an open."""
        self._files.pass_through = True
        self._backend.chunks.staged.prepare()
        self._files.idle_backings.when_closed = self._blocks.idle.when_closed = let_go

    def keeps_backing(self, inode: int) -> bool:
        """What it had as ``backing`` stays at hand though nobody has it open."""
        return inode in self._blocks.idle or inode in self._files.idle_backings

    # --- look-ups

    def lookup_soon(self, parent: int, name: bytes, done: Done) -> int:
        """As ``lookup``, without a task that waits: see Backend.ask_soon."""
        check_name(name)
        return self._ask_soon(Lookup(parent, name), done, parent)

    def getattr_soon(self, inode: int, done: Done) -> int:
        """As ``getattr`` of what is not open here."""
        return 0 if inode in self._files else self._ask_soon(GetAttr(inode), done)

    def _ask_soon(self, request: Request, done: Done, parent: int = 0) -> int:
        epoch = self._backend.epoch

        def tell(attr: Attr | None, error: KvfsError | None) -> None:
            done(None if attr is None else self._tell(attr, epoch, parent), error)

        return self._backend.ask_soon(request, tell)

    def give_up(self, number: int) -> None:
        """Of what was asked ``soon`` nothing will be told any more."""
        self._backend.metadata.give_up(number)

    def send_soon(self) -> None:
        """Whoever has called methods in ``_soon`` calls this in the end: questions leave now."""
        self._backend.metadata.send_soon()
        if self.write_begins:
            self._files.write_begins(self.write_begins)
            self.write_begins.clear()

    @property
    def answers_descriptor(self) -> int:
        """Readable when ``receive_now`` may have something to tell; -1 if there is none."""
        return self._backend.metadata.descriptor

    def receive_now(self) -> bool:
        """Tells what was answered. False if the event loop has to go on."""
        return self._backend.metadata.receive_now()

    def lookup_now(self, parent: int, name: bytes) -> Attr | None:
        """Raises EntryNotFound."""
        check_name(name)
        inode = self._backend.names.entry(parent, name)
        if inode is None:
            return None
        if inode == MISSING:
            self._backend.names.answered_here += 1
            raise EntryNotFound(name)
        file = self._files.get(inode)
        return self._leased(inode, parent) if file is None else self._fresh_now(file)

    def _leased(self, inode: int, parent: int = 0) -> Attr | None:
        """Of what is not open here."""
        attr = self._backend.names.attr(inode)
        if attr is None:
            return None
        self._backend.names.answered_here += 1
        return self._tell(attr, self._backend.epoch, parent)

    def _fresh_now(self, file: OpenFile) -> Attr | None:
        return file.fresh_now(self._attribute_seconds)

    async def lookup(self, parent: int, name: bytes) -> Attr:
        known = self.lookup_now(parent, name)
        if known is not None:
            return known
        epoch = self._backend.epoch
        return self._tell(await self._backend.call(Lookup(parent, name)), epoch, parent)

    def forget(self, inodes: Iterable[int]) -> None:
        """The kernel dropped what it knew of these inodes."""
        for inode in inodes:
            self._files.forget(inode)
            self._seen_blocks.drop(inode)

    def getattr_now(self, inode: int) -> Attr | None:
        file = self._files.get(inode)
        if file is not None:
            return self._fresh_now(file)
        block = self._blocks.get(inode)
        return self._leased(inode) if block is None else block.attr

    async def getattr(self, inode: int) -> Attr:
        file = self._files.get(inode)
        if file is not None:
            return await file.fresh(self._attribute_seconds)
        known = self.getattr_now(inode)
        if known is not None:
            return known
        epoch = self._backend.epoch
        return self._tell(await self._backend.call(GetAttr(inode)), epoch)

    def _tell(self, attr: Attr, epoch: int, parent: int = 0) -> Attr:
        """The attributes that the kernel gets, from the answer to a request that was sent at
        ``epoch``; remembers what the kernel was told."""
        if attr.is_block:
            known = self._seen_blocks.get(attr.inode)
            self._seen_blocks.keep(attr.inode, (parent or (known[0] if known else 0), attr))
        elif attr.is_file:
            file = self._files.get(attr.inode)
            if file is not None:
                file.absorb(attr, epoch)
                return file.view()
            self._files.told(attr.inode)
        return attr

    async def setattr(self, inode: int, changes: AttrChanges) -> Attr:
        mode = changes.mode
        if changes.drop_privileges and mode is None:
            mode = without_privileges(await self.getattr(inode))
        request = attr_change(inode, changes, mode)
        if changes.size is None and inode not in self._files:
            epoch = self._backend.epoch
            return self._tell(await self._backend.call(request), epoch)
        async with self._files.held(inode, writes=changes.size is not None) as file:
            await file.change(request)
            if changes.size is not None:
                await file.flush()
            return file.view()

    def setattr_soon(self, inode: int, changes: AttrChanges, done: Done) -> bool:
        """As ``setattr`` of what concerns no chunks and no writes, without a task that waits."""
        with_writes = changes.mtime_ns is not None and inode in self._files
        if changes.size is not None or with_writes:
            return False
        mode = changes.mode
        if changes.drop_privileges and mode is None:
            attr = self.getattr_now(inode)
            if attr is None:
                return False
            mode = without_privileges(attr)
        return self._change_soon(attr_change(inode, changes, mode), done)

    def _change_soon(self, request: SetAttr | Make, done: Done, parent: int = 0) -> bool:
        epoch = self._backend.epoch
        return self._call_soon(request, lambda attr: self._tell(attr, epoch, parent), done)

    # --- names

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attr:
        return await self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), caller)

    def mkdir_soon(self, parent: int, name: bytes, mode: int, caller: Caller, done: Done) -> bool:
        """As ``mkdir``, without a task that waits."""
        request = make_request(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), caller)
        return self._change_soon(request, done, parent)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attr:
        return await self._make(parent, name, mode, caller, rdev=rdev)

    def mknod_soon(self, entry: Entry, mode: int, rdev: int, caller: Caller, done: Done) -> bool:
        """As ``mknod``, in the same way."""
        return self._change_soon(make_request(*entry, mode, caller, rdev=rdev), done, entry[0])

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attr:
        check_target(target)
        return await self._make(parent, name, stat.S_IFLNK | 0o777, caller, target=target)

    def symlink_soon(
        self, parent: int, name: bytes, target: bytes, caller: Caller, done: Done
    ) -> bool:
        """As ``symlink``, in the same way."""
        check_target(target)
        request = make_request(parent, name, stat.S_IFLNK | 0o777, caller, target=target)
        return self._change_soon(request, done, parent)

    async def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Attr:
        request = make_request(parent, name, mode, caller, rdev=rdev, target=target)
        epoch = self._backend.epoch
        return self._tell(await self._backend.call(request), epoch, parent)

    async def link(self, inode: int, parent: int, name: bytes) -> Attr:
        check_name(name)
        return self._changed_by_name(await self._backend.call(Link(inode, parent, name)))

    def link_soon(self, inode: int, parent: int, name: bytes, done: Done) -> bool:
        """As ``link``, in the same way."""
        check_name(name)
        return self._call_soon(Link(inode, parent, name), self._changed_by_name, done)

    async def unlink(self, parent: int, name: bytes) -> None:
        check_name(name)
        self._unlinked(await self._backend.call(Unlink(parent, name)))

    def unlink_soon(self, parent: int, name: bytes, done: Done) -> bool:
        """As ``unlink``, without a task that waits: see Backend.call_soon."""
        check_name(name)
        return self._call_soon(Unlink(parent, name), self._unlinked, done)

    def _call_soon(self, request: Request, then: Callable[[Any], Any], done: Done) -> bool:
        """``done`` is told what ``then`` makes of the reply."""

        def tell(reply: Any, error: KvfsError | None) -> None:
            done(then(reply) if error is None else None, error)

        return self._backend.call_soon(request, tell)

    def _unlinked(self, attr: Attr) -> None:
        self._changed_by_name(attr)
        if attr.is_block:
            self._blocks.idle.drop((attr.inode,))
        elif not attr.nlink:
            self._files.gone((attr.inode,))

    async def rmdir(self, parent: int, name: bytes) -> None:
        check_name(name)
        await self._backend.call(Rmdir(parent, name))

    def rmdir_soon(self, parent: int, name: bytes, done: Done) -> bool:
        """As ``rmdir``, without a task that waits."""
        check_name(name)
        return self._call_soon(Rmdir(parent, name), lambda _: None, done)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """``flags`` as in renameat2."""
        self._renamed(
            await self._backend.call(rename_request(parent, name, new_parent, new_name, flags))
        )

    def rename_soon(self, old: Entry, new: Entry, flags: int, done: Done) -> bool:
        """As ``rename``, without a task that waits."""
        return self._call_soon(rename_request(*old, *new, flags), self._renamed, done)

    def _renamed(self, touched: Touched) -> None:
        self._files.gone(touched.inodes[1:])  # what was replaced

    def _changed_by_name(self, attr: Attr) -> Attr:
        """Link counts of open files follow."""
        file = self._files.get(attr.inode)
        if file is None:
            return attr
        file.attr.nlink, file.attr.ctime_ns = attr.nlink, attr.ctime_ns
        return file.view()

    async def readlink(self, inode: int) -> bytes:
        target: bytes = await self._backend.call(ReadLink(inode))
        return target

    # --- files

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Attr, Opened]:
        """``flags`` as in open(2). Raises InodeStale if the file exists and O_EXCL was not asked
        for: the caller looks again and opens it, which checks permissions."""
        request = self._creation(parent, name, mode, caller)
        try:
            attr: Attr = await self._backend.call(request)
        except EntryExists:
            raise _exists(flags) from None
        return self._created(attr, flags)

    def create_soon(self, entry: Entry, mode: int, flags: int, caller: Caller, done: Done) -> bool:
        """As ``create``, without a task that waits."""

        def tell(attr: Attr | None, error: KvfsError | None) -> None:
            if isinstance(error, EntryExists):
                error = _exists(flags)
            done(None if attr is None else self._created(attr, flags), error)

        return self._backend.call_soon(self._creation(*entry, mode, caller), tell)

    def _creation(self, parent: int, name: bytes, mode: int, caller: Caller) -> Make:
        self._check_room()
        return make_request(parent, name, stat.S_IFREG | stat.S_IMODE(mode), caller, open=True)

    def _created(self, attr: Attr, flags: int) -> tuple[Attr, Opened]:
        file, is_first = self._files.made(attr, flags)
        return attr if is_first else file.view(), self._opened(file, True, flags)

    def open_now(self, inode: int, flags: int) -> Opened | None:
        if inode in self._seen_blocks:
            return self._open_block_now(inode, flags)
        found = self._files.open_now(inode, flags)
        return None if found is None else self._opened(*found, flags)

    def open_soon(self, inode: int, flags: int, done: Done) -> bool:
        """As ``open`` of a file that nobody had open lately. ``done`` is told None if more has to
        be waited for: then ``open`` does."""
        if flags & os.O_TRUNC or inode in self._seen_blocks or not self._files.is_known(inode):
            return False
        self._check_room()

        def tell(_: None, error: KvfsError | None) -> None:
            done(self.open_now(inode, flags) if error is None else None, error)

        writable = flags & os.O_ACCMODE != os.O_RDONLY
        return self._files.opens.count_soon(inode, tell, writes=writable)

    async def open(self, inode: int, flags: int) -> Opened:
        """``flags`` as in open(2), O_TRUNC included. Answers from fresh attributes."""
        self._check_room()
        opened = self.open_now(inode, flags)
        if opened is not None:
            return opened
        seen = self._seen_blocks.get(inode)
        if seen is not None:
            return await self._open_block(*seen, flags)
        if not self._files.is_known(inode):
            attr: Attr = await self._backend.call(GetAttr(inode))
            if attr.is_block:
                return await self._open_block(0, attr, flags)
        return self._opened(*await self._files.open(inode, flags), flags)

    def _check_room(self) -> None:
        if len(self._files) + len(self._blocks) >= MOUNT_OPEN_FILES:
            raise LimitExceeded(detail="open files", limit=MOUNT_OPEN_FILES)

    def _add(self, opened: Handle | OpenBlock | OpenDirectory) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = opened
        return handle

    def _opened(self, file: OpenFile, current: bool, flags: int) -> Opened:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        synced = writable and bool(flags & os.O_DSYNC) and file.backing != NO_DESCRIPTOR
        handle = self._add(Handle(file, writable, synced))
        return Opened(handle, current, writable, file.backing, file.passes_writes_of(flags))

    def refuse_backing(self, handle: int) -> None:
        """The kernel did not take what a file that was just made had as ``backing``."""
        self._files.pass_through = False
        self._handle(handle).file.refuse_backing()

    async def _open_block(self, namespace: int, attr: Attr, flags: int) -> Opened:
        """A use of the block, as eviction sees it. Raises InodeStale if it was removed."""
        _check_read_only(flags)
        try:
            return self._opened_block(await self._blocks.open(namespace, attr))
        except InodeStale:
            self._seen_blocks.drop(attr.inode)
            raise

    def _open_block_now(self, inode: int, flags: int) -> Opened | None:
        _check_read_only(flags)
        self._check_room()
        block = self._blocks.open_now(inode)
        return None if block is None else self._opened_block(block)

    def _opened_block(self, block: OpenBlock) -> Opened:
        return Opened(self._add(block), True, False, backing=block.backing, is_block=True)

    def read_now(self, handle: int, offset: int, length: int) -> Buffer | None:
        opened = self._handles[handle]
        if isinstance(opened, Handle):
            return opened.file.read_now(offset, length)
        assert isinstance(opened, OpenBlock)
        return self._blocks.read_now(opened, offset, length)

    async def read(self, handle: int, offset: int, length: int) -> Buffer:
        """Fewer bytes than asked only at the end. The result is valid until the next await."""
        opened = self._handles[handle]
        if isinstance(opened, Handle):
            return await opened.file.read(offset, length)
        assert isinstance(opened, OpenBlock)
        return await self._blocks.read(opened, offset, length)

    def write_now(self, handle: int, offset: int, data: Buffer) -> bool:
        opened = self._handle(handle)
        return not opened.synced and opened.file.write_now(offset, data)

    async def write(self, handle: int, offset: int, data: Buffer) -> int:
        opened = self._handle(handle)
        await opened.file.write(offset, data)
        if opened.synced:
            await self.fsync(handle)
        return len(data)

    # As fallocate(2), and SEEK_DATA and SEEK_HOLE of lseek(2).

    async def allocate(self, handle: int, offset: int, length: int, mode: int) -> None:
        await self._handle(handle).file.allocate(offset, length, mode)

    async def seek(self, handle: int, offset: int, whence: int) -> int:
        opened = self._handles[handle]
        assert not isinstance(opened, OpenDirectory)
        return await (opened.file if isinstance(opened, Handle) else opened).seek(offset, whence)

    def is_privileged(self, handle: int) -> bool:
        """A write by somebody who is not root has to drop the set-ID bits first."""
        return without_privileges(self._handle(handle).file.attr) is not None

    def _handle(self, handle: int) -> Handle:
        opened = self._handles[handle]
        if not isinstance(opened, Handle):
            raise NotPermitted(reason="a block is read-only")
        return opened

    def flush_now(self, handle: int) -> bool:
        opened = self._handles[handle]
        return not (isinstance(opened, Handle) and opened.writable) or opened.file.flushed

    def flush_soon(self, handle: int, done: Done) -> bool:
        """As ``flush`` of a new file that the kernel writes: see OpenFile.flush_soon."""
        opened = self._handles[handle]
        return isinstance(opened, Handle) and opened.writable and opened.file.flush_soon(done)

    async def flush(self, handle: int) -> None:
        """One close(2) of the handle. Raises what a write-back nobody waited for met."""
        opened = self._handles[handle]
        if isinstance(opened, Handle) and opened.writable:
            await opened.file.flush()

    async def fsync(self, handle: int) -> None:
        """On stable storage: data, size and times, and the names that lead here."""
        opened = self._handles[handle]
        if isinstance(opened, Handle):
            await opened.file.sync()
            await self._backend.call(Sync())

    def release_now(self, handle: int) -> bool:
        opened = self._handles[handle]
        if isinstance(opened, Handle) and not self._files.let_go_now(opened.file):
            return False
        del self._handles[handle]
        if isinstance(opened, OpenBlock):
            self._blocks.release(opened)
        return True

    async def release(self, handle: int) -> None:
        if not self.release_now(handle):
            opened = self._handle(handle)
            del self._handles[handle]
            await self._files.let_go(opened.file)
        await self._files.opens.close_unwanted()

    # --- directories

    def opendir(self, inode: int) -> int:
        return self._add(OpenDirectory(self._backend, inode))

    def dots(self, handle: int) -> tuple[tuple[bytes, Attr], ...]:
        """What a listing begins with. The kernel takes only types and numbers, and finds ``..`` by
        itself."""
        attr = Attr(self._directory(handle).inode, mode=stat.S_IFDIR | 0o755)
        return (b".", attr), (b"..", attr)

    def readdir_now(self, handle: int, position: int) -> list[tuple[bytes, Attr]] | None:
        """The next entries after ``position`` (0: from the start), none at the end. What is leased
        need not be remembered as told to the kernel."""
        entries = self._directory(handle).read_now(position)
        if entries is None or not self._files.any_of(attr.inode for _, attr in entries):
            return entries
        for number, (name, leased) in enumerate(entries):
            file = self._files.get(leased.inode)
            attr = leased if file is None else self._fresh_now(file)
            if attr is None:
                return None
            entries[number] = name, attr
        return entries

    async def readdir(self, handle: int, position: int) -> list[tuple[bytes, Attr]]:
        """The same in any case."""
        known = self.readdir_now(handle, position)
        if known is not None:
            return known
        directory = self._directory(handle)
        epoch = self._backend.epoch
        entries = await directory.read(position)
        return [(name, self._tell(attr, epoch, directory.inode)) for name, attr in entries]

    def _directory(self, handle: int) -> OpenDirectory:
        opened = self._handles[handle]
        assert isinstance(opened, OpenDirectory)
        return opened

    def releasedir(self, handle: int) -> None:
        del self._handles[handle]

    async def fsyncdir(self, handle: int) -> None:
        await self._backend.call(Sync())

    async def statfs(self, inode: int = 0) -> FilesystemStats:
        """Of the whole, or of what the quota that an inode counts for leaves of it."""
        statistics: FilesystemStats = await self._backend.call(StatFs(inode))
        return statistics

    # --- the whole

    async def write_back_forever(self) -> None:
        """Records what changed in files that stay open."""
        while True:
            await trio.sleep(MOUNT_WRITE_BACK_SECONDS)
            for file in [f for f in self._files if f.dirty]:
                await file.write_back()

    async def tidy_forever(self) -> None:
        """Does what can wait: closes files and blocks, tells the service of uses."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._files.opens.close_idle)
            nursery.start_soon(self._blocks.tell_uses)
            nursery.start_soon(self._close_idle)

    async def _close_idle(self) -> None:
        while True:
            await trio.sleep(MOUNT_IDLE_SECONDS)
            self._blocks.idle.turn()
            self._files.idle_backings.turn()

    async def close(self) -> None:
        """Records everything, after the last request."""
        for handle in list(self._handles):
            await self.release(handle)
        self._blocks.idle.clear()
        self._files.idle_backings.clear()
        await self._files.opens.close_all()


def _exists(flags: int) -> KvfsError:
    return EntryExists() if flags & os.O_EXCL else InodeStale()


def _check_read_only(flags: int) -> None:
    if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
        raise NotPermitted(reason="a block is read-only")
