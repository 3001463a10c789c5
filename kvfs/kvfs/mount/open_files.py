"""The ordinary files that are open in this mount, from their opens to their last close.

What is answered ``now`` needs nobody else: the service counts the file as open already (``opens``),
and its attributes are leased.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterable, Iterator

from kvfs.mount.backend import NO_DESCRIPTOR, Backend, Backing
from kvfs.mount.files import OpenFile
from kvfs.mount.idle import Idle
from kvfs.mount.limits import MOUNT_IDLE_BLOCKS, MOUNT_REMEMBERED_INODES
from kvfs.mount.opens import Opens
from kvfs.mount.remembered import Remembered
from kvfs_base.errors import KvfsError, NotPermitted
from kvfs_base.types import Attr
from kvfs_metadata.messages import SetAttr

log = logging.getLogger(__name__)

NO_PAGES = (-1, 0)
"""Size and mtime of contents that the kernel cannot have cached."""


class OpenFiles:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._files: dict[int, OpenFile] = {}
        self._pages: Remembered[tuple[int, int]] = Remembered(MOUNT_REMEMBERED_INODES)
        """By inode, size and mtime of the contents that the kernel may have cached."""
        self._blank: Remembered[bool] = Remembered(MOUNT_REMEMBERED_INODES)
        """Files that were empty and without chunks when they were closed here."""
        self.opens = Opens(backend)
        self.idle_backings: Idle[Backing] = Idle(MOUNT_IDLE_BLOCKS, Backing.close)
        self.pass_through = False
        """The kernel reads by itself what Opened has as ``backing``."""

    def get(self, inode: int) -> OpenFile | None:
        return self._files.get(inode)

    def __contains__(self, inode: int) -> bool:
        return inode in self._files

    def any_of(self, inodes: Iterable[int]) -> bool:
        """Whether at least one is open."""
        return bool(self._files) and not self._files.keys().isdisjoint(inodes)

    def __iter__(self) -> Iterator[OpenFile]:
        return iter(list(self._files.values()))

    def __len__(self) -> int:
        return len(self._files)

    # --- what the kernel knows

    def is_known(self, inode: int) -> bool:
        """To be an ordinary file."""
        if inode in self._files or inode in self._pages:
            return True
        attr = self._backend.names.attr(inode)
        return attr is not None and attr.is_file and not attr.is_block

    def told(self, inode: int) -> None:
        """The kernel was told of an ordinary file that is not open."""
        if inode not in self._pages:
            self._pages.keep(inode, NO_PAGES)

    def forget(self, inode: int) -> None:
        """The kernel dropped what it knew of it."""
        self._pages.drop(inode)
        self._blank.drop(inode)

    def changed(self, inodes: Iterable[int]) -> None:
        """Somebody else changed these."""
        for inode in inodes:
            self._blank.drop(inode)
            file = self._files.get(inode)
            if file is not None:
                file.distrust()
        self.gone(inodes)

    def gone(self, inodes: Iterable[int]) -> None:
        """Perhaps these were removed, or are to move: nothing of them is kept."""
        self.idle_backings.drop(inodes)
        self.opens.changed(inodes)

    # --- opening

    def made(self, attr: Attr, flags: int) -> tuple[OpenFile, bool]:
        """Of a file that was just made, and counted as open with that. True unless somebody has
        seen the name already and opened it."""
        self.opens.made(attr.inode)
        file = self._files.get(attr.inode)
        is_first = file is None
        if file is None:
            file = self._files[attr.inode] = OpenFile(self._backend, attr)
            file.is_new()
            self._stage(file, flags)
            file.decide_now(reads_only=False)
        file.handles += 1
        return file, is_first

    def open_now(self, inode: int, flags: int) -> tuple[OpenFile, bool] | None:
        """``flags`` as in open(2). True if the pages that the kernel has of it are current."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        attr = None if flags & os.O_TRUNC else self.opens.take_now(inode, writes=writable)
        if attr is None:
            return None
        file = self._files.get(inode) or (OpenFile(self._backend, attr) if attr.is_file else None)
        if file is None or not self._count_if_ready(file, flags):
            self.opens.give_back(inode)
            return None
        self._add(file, attr, None)
        return file, _is_current(file, attr)

    def _count_if_ready(self, file: OpenFile, flags: int) -> bool:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        file.handles += 1
        known = self.idle_backings.take(file.inode) if file.handles == 1 else None
        self._stage_blank(file, flags)
        is_decided = not self.pass_through or file.decide_now(reads_only=not writable, known=known)
        if known is not None and file.backing != known.descriptor:
            self.idle_backings.close(file.inode, known)
        may_write = file.backing == NO_DESCRIPTOR or file.passes_writes
        if is_decided and (may_write or not writable):
            return True
        file.handles -= 1
        return False

    def _stage_blank(self, file: OpenFile, flags: int) -> None:
        """For those who make a file first and open it for writing then."""
        if file.inode in self._blank:
            self._blank.drop(file.inode)
            if file.handles == 1 and not file.size:
                file.is_new()
                self._stage(file, flags)

    def _stage(self, file: OpenFile, flags: int) -> None:
        """What is synced write by write is not worth it, nor what is appended to, as logs are: each
        sync would have to name the chunk, and all that lies behind it is copied again and again."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if self.pass_through and writable and not flags & (os.O_APPEND | os.O_DSYNC):
            file.pass_writes()

    async def open(self, inode: int, flags: int) -> tuple[OpenFile, bool]:
        """The same in any case, O_TRUNC included."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        file, attr = await self._hold(inode, writes=writable or bool(flags & os.O_TRUNC))
        current = _is_current(file, attr)
        try:
            if flags & os.O_TRUNC:
                current = False
                await file.change(SetAttr(inode, size=0))
                self._stage(file, flags)
            else:
                self._stage_blank(file, flags)
            if self.pass_through:
                await file.decide(reads_only=not (writable or flags & os.O_TRUNC))
            if writable and file.backing != NO_DESCRIPTOR:
                await file.let_write()
        except BaseException:
            await self.let_go(file)
            raise
        return file, current

    @contextlib.asynccontextmanager
    async def held(self, inode: int, *, writes: bool) -> AsyncIterator[OpenFile]:
        """Open for a change of ours, of its chunks if it ``writes``; the kernel's pages are what
        they were."""
        file, _ = await self._hold(inode, writes=writes)
        try:
            yield file
        finally:
            await self.let_go(file)

    async def _hold(self, inode: int, *, writes: bool) -> tuple[OpenFile, Attr]:
        """Counts one open, and the attributes as they are now."""
        attr = self.opens.take_now(inode, writes=writes)
        asked_at = None if attr is not None else self._backend.epoch
        if attr is None:
            attr = await self.opens.take(inode, writes=writes)
        if attr.is_block or not attr.is_file:
            self.opens.give_back(inode, wanted=False)
            raise NotPermitted(reason="not an ordinary file")
        file = self._files.get(inode) or OpenFile(self._backend, attr)
        file.handles += 1
        self._add(file, attr, asked_at)
        return file, attr

    def _add(self, file: OpenFile, attr: Attr, asked_at: int | None) -> None:
        """``attr`` was asked for at the epoch ``asked_at``, or is leased."""
        if file.inode not in self._files:
            self._files[file.inode] = file
            file.pages = self._pages.get(file.inode) or NO_PAGES
        elif asked_at is not None:
            file.absorb(attr, asked_at)
        elif attr is not file.attr and not file.dirty:
            file.absorb(attr, self._backend.epoch)

    def write_begins(self, inodes: Iterable[int]) -> None:
        """The kernel is about to write to them."""
        for inode in inodes:
            file = self._files.get(inode)
            if file is not None:
                file.write_begins()

    # --- closing

    def let_go_now(self, file: OpenFile) -> bool:
        """``let_go``, if nothing need be waited for; else nothing."""
        if file.handles == 1:
            if not file.flushed:
                return False
            self._keep_backing(file)
            if not file.close_now():
                return False
            self._remove(file)
        file.handles -= 1
        self._give_back(file)
        return True

    async def let_go(self, file: OpenFile) -> None:
        """Gives back one open; the last one records what is left and forgets the file."""
        file.handles -= 1
        try:
            if not file.handles and file.attr.nlink:
                await file.flush()
        except KvfsError as exc:
            log.warning("inode %d was not written back: %s", file.inode, exc)
        # A handle that was opened during the flush keeps the file.
        if not file.handles and self._files.get(file.inode) is file:
            self._remove(file)
            try:
                await file.close()
            except KvfsError as exc:
                log.info("inode %d: its chunks stay open: %s", file.inode, exc)
        self._give_back(file)

    def _keep_backing(self, file: OpenFile) -> None:
        """For the next open, if nobody can change the file meanwhile without our hearing of it."""
        if file.attr.nlink and self._backend.names.attr(file.inode) is not None:
            backing = file.give_up_backing()
            if backing is not None:
                self.idle_backings.keep(file.inode, backing)

    def _remove(self, file: OpenFile) -> None:
        del self._files[file.inode]
        self._pages.keep(file.inode, file.pages)
        if file.is_blank:
            self._blank.keep(file.inode, True)

    def _give_back(self, file: OpenFile) -> None:
        self.opens.give_back(file.inode, wanted=file.attr.nlink > 0)


def _is_current(file: OpenFile, attr: Attr) -> bool:
    """Whether the kernel's pages are those of ``attr``. If not, it is told to drop them."""
    now = attr.size, attr.mtime_ns
    is_current = file.pages == now
    file.pages = now
    return is_current
