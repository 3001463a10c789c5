"""KV blocks as read-only files.

Local blocks are read from a descriptor that the chunk server passed: it verified the chunk before.
Blocks of other hosts are fetched whole into memory files and verified there, because a part of a
block cannot be checked. Either way the kernel may read the descriptor by itself. Memory is bounded:
the least recently opened goes first, and is fetched again if somebody still reads it.

One that nobody has open any more stays at hand for a moment (*idle*): while its attributes are
leased it is there, and the next open asks nobody. It is let go of as soon as somebody removes it.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from kvfs.mount.backend import NO_DESCRIPTOR, Backend
from kvfs.mount.idle import Idle
from kvfs.mount.limits import (
    MOUNT_BLOCK_BUFFER_BYTES,
    MOUNT_IDLE_BLOCKS,
    MOUNT_IDLE_SECONDS,
    MOUNT_THREADS,
    MOUNT_USES_MAX,
)
from kvfs_base import large_pages
from kvfs_base.errors import (
    BehindTheEnd,
    ChunkNotFound,
    EntryNotFound,
    InodeStale,
    IntegrityError,
    KvfsError,
    NoTarget,
    TargetFailed,
)
from kvfs_base.limits import MOUNT_IO_BYTES, TRANSFER_BYTES
from kvfs_base.seams import Buffer
from kvfs_base.types import Attr, ChunkId
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.client.chunk_client import ChunkRead
from kvfs_metadata.messages import GetAttr, Lookup, LookupBlocks, RemoveBlocks

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class OpenBlock:
    """Shared by the handles of one block."""

    def __init__(self, attr: Attr, namespace: int) -> None:
        self.attr = attr
        self.inode = attr.inode
        self.namespace = namespace
        """Inode of its directory, or 0 if the kernel remembered the block longer than we did."""
        self.handles = 0
        self.readers = 0
        """Reads that wait: the descriptor stays meanwhile."""
        self.descriptor = NO_DESCRIPTOR
        """Of all bytes, verified; of a block of another host only while it is in memory."""
        self.backing = NO_DESCRIPTOR
        """What the kernel may read by itself: decided when the first handle is made."""
        self.fetching = trio.Lock()

    @property
    def chain(self) -> int:
        assert self.attr.layout is not None
        return self.attr.layout.chains[0]

    async def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE: a block has no holes. Raises BehindTheEnd."""
        if offset >= self.attr.size:
            raise BehindTheEnd(size=self.attr.size)
        return offset if whence == os.SEEK_DATA else self.attr.size


class Blocks:
    """Opens, reads and closes blocks."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._open: dict[int, OpenBlock] = {}
        self.idle: Idle[OpenBlock] = Idle(MOUNT_IDLE_BLOCKS, self._close)
        self._buffers = BufferPool(MOUNT_THREADS, TRANSFER_BYTES)
        self._in_memory: collections.OrderedDict[OpenBlock, None] = collections.OrderedDict()
        self._memory_bytes = 0
        self._passed_bytes = 0
        """Of these, what the kernel reads by itself: it would keep what we let go of."""
        self._uses: dict[int, dict[bytes, None]] = {}
        """Keys by namespace."""
        self._uses_count = 0
        self._many_uses = trio.Event()

    def __len__(self) -> int:
        """Open ones."""
        return len(self._open)

    def get(self, inode: int) -> OpenBlock | None:
        """One that is open."""
        return self._open.get(inode)

    # --- uses, as eviction sees them

    def _use(self, block: OpenBlock) -> None:
        """Of a block that is known to be there. Told to the service some time later."""
        if not block.namespace:
            return
        self._uses.setdefault(block.namespace, {})[block.attr.key] = None
        self._uses_count += 1
        if self._uses_count >= MOUNT_USES_MAX:
            self._many_uses.set()

    async def tell_uses(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_after(MOUNT_IDLE_SECONDS):
                await self._many_uses.wait()
            self._many_uses = trio.Event()
            uses, self._uses, self._uses_count = self._uses, {}, 0
            for namespace, keys in uses.items():
                with contextlib.suppress(KvfsError):  # the blocks look older than they are
                    await self._backend.call(LookupBlocks(namespace, b"".join(keys)))

    # --- opening and closing

    def open_now(self, inode: int) -> OpenBlock | None:
        """One more handle of a block that is at hand and still there."""
        block = self._open.get(inode)
        if block is None:
            known_to_be_there = self._backend.names.attr(inode) is not None
            block = self.idle.take(inode) if known_to_be_there else None
            if block is None:
                return None
            self._begin(block)
        block.handles += 1
        return block

    def _begin(self, block: OpenBlock) -> None:
        """Somebody opens a block that nobody had open."""
        self._open[block.inode] = block
        self._use(block)
        block.backing = block.descriptor
        if block in self._in_memory:
            self._in_memory.move_to_end(block)
            if self._passed_bytes + block.attr.size > MOUNT_BLOCK_BUFFER_BYTES // 2:
                block.backing = NO_DESCRIPTOR
            else:
                self._passed_bytes += block.attr.size

    async def open(self, namespace: int, attr: Attr) -> OpenBlock:
        """The same in any case. Raises IntegrityError or ChunkNotFound for a damaged block,
        InodeStale for one that was removed, ServiceError else."""
        if namespace and self._backend.names.attr(attr.inode) is None:
            attr = await self._look_up(namespace, attr)
        known = self.open_now(attr.inode)
        if known is not None:
            return known
        block = OpenBlock(attr, namespace)
        await self._patiently(block, self._take)
        other = self._open.get(attr.inode)
        if other is not None:  # opened twice at the same time
            self._close(block)
            block = other
        else:
            self.idle.drop((attr.inode,))
            self._begin(block)
        block.handles += 1
        return block

    async def _look_up(self, namespace: int, attr: Attr) -> Attr:
        """As it is now: it may have moved. The answer is leased, so that whoever has listed blocks
        opens each of them with one call, once."""
        try:
            found: Attr = await self._backend.call(Lookup(namespace, attr.key.hex().encode()))
        except EntryNotFound:
            raise InodeStale(inode=attr.inode) from None
        if found.inode != attr.inode:
            raise InodeStale(inode=attr.inode)
        return found

    def release(self, block: OpenBlock) -> None:
        """Gives back one handle."""
        block.handles -= 1
        if block.handles:
            return
        del self._open[block.inode]
        if block.backing != NO_DESCRIPTOR and block in self._in_memory:
            self._passed_bytes -= block.attr.size
        block.backing = NO_DESCRIPTOR
        if self._backend.names.attr(block.inode) is None:
            self._close(block)
        else:
            self.idle.keep(block.inode, block)

    def _close(self, block: OpenBlock) -> None:
        """Lets go of the bytes. Handles there may be then have to fetch them again."""
        if block.descriptor == NO_DESCRIPTOR:
            return
        os.close(block.descriptor)
        block.descriptor = NO_DESCRIPTOR
        if block in self._in_memory:
            del self._in_memory[block]
            self._memory_bytes -= block.attr.size

    async def _take(self, block: OpenBlock) -> None:
        try:
            block.descriptor = await self._backend.in_thread(
                self._open_local, ChunkId(block.inode, 0), block
            )
        except NoTarget:
            # Not on this host. Fetched now, so that damage is told by open, not by a later read.
            await self._fetch(block)

    async def _patiently(
        self, block: OpenBlock, action: Callable[[OpenBlock], Awaitable[_Result]]
    ) -> _Result:
        """Once more if the block has moved meanwhile; what is then damaged is removed."""
        try:
            return await action(block)
        except KvfsError as exc:
            if not await self._has_moved(block):
                await self._damaged(block, exc)
                raise
        try:
            return await action(block)
        except KvfsError as exc:
            await self._damaged(block, exc)
            raise

    async def _has_moved(self, block: OpenBlock) -> bool:
        """Whether it is on another chain than it was; it is looked for there from now on. Raises
        InodeStale if it is gone, and nobody has it open."""
        try:
            attr: Attr = await self._backend.call(GetAttr(block.inode))
        except KvfsError as exc:
            if isinstance(exc, InodeStale) and not block.handles:
                raise
            return False
        if attr.layout == block.attr.layout:
            return False
        block.attr = attr
        self._backend.names.drop(block.inode)
        return True

    def _open_local(self, chunk: ChunkId, block: OpenBlock) -> int:
        descriptor = self._backend.chunks.open_sealed(chunk, block.chain)
        large_pages.will_need(descriptor, 0, block.attr.size)  # who opens a block reads all of it
        return descriptor

    # --- reading

    def read_now(self, block: OpenBlock, offset: int, length: int) -> Buffer | None:
        """What ``read`` would answer, if nothing need be waited for."""
        length = min(length, block.attr.size - offset)
        if length <= 0:
            return b""
        if block.descriptor != NO_DESCRIPTOR and length <= MOUNT_IO_BYTES:
            view = self._backend.scratch[:length]
            flags = 0 if block in self._in_memory else os.RWF_NOWAIT
            try:
                if os.preadv(block.descriptor, [view], offset, flags) == length:
                    return view
            except OSError:
                pass  # not cached, or a file system that cannot tell: the thread finds out
        return None

    async def read(self, block: OpenBlock, offset: int, length: int) -> Buffer:
        """The result is valid until the caller's next await."""
        found = self.read_now(block, offset, length)
        if found is not None:
            return found
        length = min(length, block.attr.size - offset)
        block.readers += 1
        try:
            if block.descriptor == NO_DESCRIPTOR:
                await self._patiently(block, self._fetch)
            return await self._backend.in_thread(_read_all, block, offset, length)
        finally:
            block.readers -= 1

    async def _fetch(self, block: OpenBlock) -> None:
        """All bytes of a block of another host, verified, into a memory file."""
        async with block.fetching:
            if block.descriptor != NO_DESCRIPTOR:
                return
            self._make_room(block.attr.size)
            block.descriptor = await self._backend.in_thread(self._fetched, block)
            self._in_memory[block] = None
            self._memory_bytes += block.attr.size

    def _fetched(self, block: OpenBlock) -> int:
        size = block.attr.size
        descriptor = os.memfd_create("kvfs-block", os.MFD_CLOEXEC)
        try:
            if size <= self._buffers.size:
                # A page of a buffer that is there is copied faster than a new one is mapped.
                with self._buffers.lend(0) as buffer:
                    self._receive(block, buffer[: round_up(size)])
                    written = 0
                    while written < size:
                        written += os.pwrite(descriptor, buffer[written:size], written)
            else:
                os.ftruncate(descriptor, round_up(size))
                memory = large_pages.SharedMapping(descriptor, round_up(size), writable=True)
                memory.make_large(0, size)
                self._receive(block, memory.view)
                os.ftruncate(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _receive(self, block: OpenBlock, view: memoryview) -> None:
        read = ChunkRead(
            chunk=ChunkId(block.inode, 0),
            chain=block.chain,
            size=block.attr.size,
            crc32c=block.attr.crc32c,
            key=block.attr.key,
            view=view,
        )
        (error,) = self._backend.chunks.read_chunks([read])
        if error is not None:
            raise error

    def _make_room(self, size: int) -> None:
        """What nobody has open goes first; what the kernel reads by itself stays."""
        for block in sorted(self._in_memory, key=lambda block: block.handles > 0):
            if self._memory_bytes + size <= MOUNT_BLOCK_BUFFER_BYTES:
                return
            if block.backing == NO_DESCRIPTOR and not block.readers:
                if block.handles:
                    self._close(block)
                else:
                    self.idle.drop((block.inode,))

    async def _damaged(self, block: OpenBlock, error: KvfsError) -> None:
        """Counts it, and removes the block from its namespace: the next look-up is a miss."""
        if not isinstance(error, IntegrityError | ChunkNotFound):
            return
        self._backend.count("blocks_damaged")
        log.warning("block %s: %s", block.attr.key.hex(), error)
        if not block.namespace:
            return
        request = RemoveBlocks(block.namespace, block.attr.key, (block.inode,), (block.chain,))
        try:
            await self._backend.call(request)
        except KvfsError as exc:
            log.info("block %s was not removed: %s", block.attr.key.hex(), exc)
            return
        name = block.attr.key.hex().encode()
        self._backend.name_is_gone(block.namespace, block.inode, name)


def _read_all(block: OpenBlock, offset: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        try:
            part = os.pread(block.descriptor, length, offset)
        except OSError as exc:
            raise TargetFailed(detail=f"block {block.inode}: {exc.strerror}") from exc
        if not part:
            raise ChunkNotFound(inode=block.inode)
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
