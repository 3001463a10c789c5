"""What a mount knows of an open file: its attributes, and what of them is not recorded yet.

Replies of the service may be older than a local change that was made while they were on their way:
the backend's ``epoch`` counts the local changes of all files, and a reply to a request that was
sent before the file's last change is not used.
"""

from __future__ import annotations

import logging
import math

import msgspec

from kvfs.mount.backend import NO_DESCRIPTOR, Backend
from kvfs.mount.passed_writes import PassedWrites
from kvfs_base.errors import KvfsError, WriteUncertain
from kvfs_base.types import Attr
from kvfs_datapath.client.files import StripedFile
from kvfs_metadata.messages import GetAttr

log = logging.getLogger(__name__)


class FileState:
    def __init__(self, backend: Backend, attr: Attr) -> None:
        assert attr.layout is not None
        self.inode = attr.inode
        self.attr = attr
        self.size = attr.size
        self.mtime_ns = attr.mtime_ns
        self.sparse = attr.sparse
        self.recorded = (attr.size, attr.mtime_ns)
        """Size and mtime as the metadata service has them."""
        self.error: KvfsError | None = None
        """Of a write-back that nobody waited for; told by the next flush or fsync."""
        self.backing = NO_DESCRIPTOR
        """The chunk that the kernel may read by itself."""
        self._passed: PassedWrites | None = None
        """It may write there as well."""
        self._backend = backend
        self._layout = attr.layout
        self._striped: StripedFile | None = None
        self._changed_at = backend.epoch
        self._fetched = backend.env.clock.monotonic()
        self._dirty = False
        self._unflushed = False

    @property
    def _data(self) -> StripedFile:
        """Made when it is needed: not for a file that is only opened."""
        if self._striped is None:
            self._striped = StripedFile(self._backend.chunks, self.inode, self._layout)
        return self._striped

    @property
    def dirty(self) -> bool:
        self._look()
        return self._dirty

    def _look(self) -> None:
        """What the kernel has written by itself counts as written here."""
        if self._passed is not None and self._passed.look():
            self.size, self.mtime_ns = self._passed.size, self._passed.mtime_ns
            self.sparse = self.sparse or self._passed.sparse
            self._dirty = self._unflushed = True
            self._count_change()

    def view(self) -> Attr:
        """The attributes as this mount sees them."""
        self._look()
        return msgspec.structs.replace(
            self.attr,
            size=self.size,
            mtime_ns=self.mtime_ns,
            ctime_ns=max(self.attr.ctime_ns, self.mtime_ns) if self._dirty else self.attr.ctime_ns,
            sparse=self.sparse,
        )

    def absorb(self, attr: Attr, epoch: int) -> None:
        """Takes over what the service answered to a request that was sent at ``epoch``."""
        if self._changed_at > epoch:
            return
        self._fetched = self._backend.env.clock.monotonic()
        self._follow(attr)
        self.attr = attr
        self.sparse = self.sparse or attr.sparse
        self.recorded = (attr.size, attr.mtime_ns)
        if self._dirty:
            self.size = max(self.size, attr.size)
        else:
            self.size, self.mtime_ns = attr.size, attr.mtime_ns

    def _follow(self, attr: Attr) -> None:
        """A file that somebody has open stays where it is, unless the service has given our session
        up: then what was written meanwhile may be in chunks that nobody looks at. Its chunks may
        get longer, while all that there is is in the first one."""
        layout, before = attr.layout, self._layout
        if layout is None or layout == before:
            return
        if layout.chains == before.chains:
            if layout.chunk_bytes > before.chunk_bytes:  # else an older answer
                self._layout = layout
                if self._striped is not None:
                    self._striped.widen(layout)
            return
        self._layout = layout
        log.warning("inode %d has moved: this mount was not heard of for too long", self.inode)
        if self._dirty or self._unflushed:
            self.error = WriteUncertain(inode=self.inode)
        if self.backing == NO_DESCRIPTOR:  # else the kernel goes on with the chunk that it has
            self._backend.chunks.descriptors.drop_inode(self.inode)
            self._striped = None

    def distrust(self) -> None:
        """Somebody else changed it."""
        self._fetched = -math.inf

    def fresh_now(self, seconds: float) -> Attr | None:
        """The attributes, if they are leased or not older than ``seconds`` where they are the
        service's."""
        if self._backend.names.attr(self.inode) is self.attr:
            return self.view()
        age = self._backend.env.clock.monotonic() - self._fetched
        return None if age > seconds else self.view()

    async def fresh(self, seconds: float) -> Attr:
        """The same; asks the service if need be."""
        if self.fresh_now(seconds) is None:
            epoch = self._backend.epoch
            self.absorb(await self._backend.call(GetAttr(self.inode)), epoch)
        return self.view()

    def _count_change(self) -> None:
        self._backend.epoch += 1
        self._changed_at = self._backend.epoch


__all__ = ["FileState"]
