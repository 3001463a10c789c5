"""Where blocks come from: the node's arena, or files that are read without an agent.

A source answers a batch of keys with extents of some memory that the device can read, held until
``release``. It brings the bytes, verifies them, and knows nothing of pages.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from kvfs_base.errors import TargetFailed
from kvfs_base.limits import READ_BYTES, READ_THREADS
from kvfs_datapath.checksum import crc32c
from kvfs_gds.arena import ArenaView
from kvfs_gds.extents import pages_of
from kvfs_gds.paged import HostMemory
from kvfs_gds.ring import PinnedRing, Slot

Extents = list[tuple[int, int] | None]


class Fetched(Protocol):
    """Blocks in memory. The bytes do not change before ``release``."""

    @property
    def memory(self) -> HostMemory: ...

    @property
    def extents(self) -> Extents:
        """Offset and size in ``memory`` of each key's block, None for a miss."""

    def release(self) -> None: ...


class BlockSource(Protocol):
    """Thread-safe."""

    def fetch(self, keys: Sequence[bytes]) -> Fetched:
        """Blocks until all are there, or known not to be. Raises ArenaFull (temporary) if what is
        held leaves no room, and what its services raise."""

    def room_bytes(self) -> int:
        """The size of the memory it fetches into; 0 while that is unknown."""


class BlockStore(Protocol):
    """What a store needs of ``kvfs.Namespace``."""

    def match(self, keys: Sequence[bytes]) -> int: ...

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int: ...


class ArenaBlocks(Protocol):
    """What is needed of ``kvfs.Blocks``."""

    @property
    def arena(self) -> ArenaView: ...

    @property
    def extents(self) -> Extents: ...

    def release(self) -> None: ...


class ArenaNamespace(BlockStore, Protocol):
    """What is needed of ``kvfs.Namespace``."""

    def get(self, keys: Sequence[bytes]) -> ArenaBlocks: ...


class _FromArena:
    def __init__(self, blocks: ArenaBlocks) -> None:
        arena = blocks.arena
        # The view keeps the arena mapped: it is registered for longer than this client may live.
        self.memory = HostMemory(
            arena.address, arena.size_bytes, read_only=True, owner=arena.view(0, arena.size_bytes)
        )
        self.extents = blocks.extents
        self._blocks = blocks

    def release(self) -> None:
        self._blocks.release()


class ArenaSource:
    """The blocks of a namespace, in the arena of this node's agent: nothing is copied, and each is
    read from disk once for all processes of the node."""

    def __init__(self, namespace: ArenaNamespace) -> None:
        self._namespace = namespace
        self._room = 0

    def fetch(self, keys: Sequence[bytes]) -> Fetched:
        found = _FromArena(self._namespace.get(keys))
        self._room = found.memory.nbytes
        return found

    def room_bytes(self) -> int:
        return self._room


@dataclasses.dataclass(frozen=True)
class FileExtent:
    """A block in a file. ``offset`` and the file's length are whole pages if ``descriptor`` is
    O_DIRECT. ``crc32c`` None says that nobody knows it."""

    descriptor: int
    offset: int
    size: int
    crc32c: int | None = None


class _FromRing:
    def __init__(self, memory: HostMemory, slot: Slot | None, extents: Extents) -> None:
        self.memory = memory
        self.extents = extents
        self._slot = slot

    def release(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()


class FileSource:
    """Blocks that lie in files, read into a pinned ring by threads that take whole batches. One
    reads up to READ_BYTES a call; neighbours in a file are one call."""

    def __init__(
        self,
        ring: PinnedRing,
        locate: Callable[[Sequence[bytes]], Sequence[FileExtent | None]],
        *,
        threads: int = READ_THREADS,
    ) -> None:
        """``locate`` says where blocks lie; it must leave the descriptors open."""
        self._ring = ring
        self._locate = locate
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvfs-read")

    def room_bytes(self) -> int:
        return self._ring.nbytes

    def close(self) -> None:
        self._pool.shutdown()

    def fetch(self, keys: Sequence[bytes]) -> Fetched:
        found = list(self._locate(keys))
        sizes = [pages_of(extent.size) if extent is not None else 0 for extent in found]
        total = sum(sizes)
        if not total:
            return _FromRing(self._ring.memory, None, [None] * len(keys))
        slot = self._ring.take(total)
        assert slot is not None
        try:
            return self._fill(slot, found, sizes)
        except BaseException:
            slot.release()
            raise

    def _fill(self, slot: Slot, found: list[FileExtent | None], sizes: list[int]) -> Fetched:
        extents: Extents = []
        reads: list[_Read] = []
        at = slot.offset
        for place, (extent, size) in enumerate(zip(found, sizes, strict=True)):
            extents.append(None if extent is None else (at, extent.size))
            if extent is not None:
                reads.append(_Read(place, extent, self._ring.view(at, size)))
            at += size
        portions = _portions(reads, min(self._threads, -(-sum(sizes) // READ_BYTES)))
        for failed in self._pool.map(_read_portion, portions):
            for place in failed:
                extents[place] = None
        return _FromRing(self._ring.memory, slot, extents)


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    place: int
    extent: FileExtent
    view: memoryview


def _portions(reads: list[_Read], count: int) -> list[list[_Read]]:
    """Runs of neighbours: a thread gets what lies together."""
    step = -(-len(reads) // max(count, 1))
    return [reads[i : i + step] for i in range(0, len(reads), step)]


def _read_portion(reads: list[_Read]) -> list[int]:
    """Places of the blocks that are not what they should be."""
    failed = []
    for run in _neighbours(reads):
        first = run[0].extent
        done = _read_fully(first.descriptor, [read.view for read in run], first.offset)
        for read in run:
            if done < read.extent.size:
                failed.append(read.place)
            elif read.extent.crc32c is not None:
                found = crc32c(read.view[: read.extent.size])
                if found != read.extent.crc32c:
                    failed.append(read.place)
            done -= read.view.nbytes
    return failed


def _neighbours(reads: list[_Read]) -> list[list[_Read]]:
    """Reads that follow each other in one file and together stay below READ_BYTES."""
    runs: list[list[_Read]] = []
    end, room = (-1, -1), 0
    for read in reads:
        here = (read.extent.descriptor, read.extent.offset)
        if here != end or read.view.nbytes > room:
            runs.append([])
            room = READ_BYTES
        runs[-1].append(read)
        room -= read.view.nbytes
        end = (read.extent.descriptor, read.extent.offset + read.view.nbytes)
    return runs


def _read_fully(fd: int, views: list[memoryview], offset: int) -> int:
    """Bytes read; fewer than the views hold at the end of the file. The descriptor is the
    caller's. Raises TargetFailed."""
    total = sum(view.nbytes for view in views)
    done = 0
    try:
        while done < total:
            count = os.preadv(fd, _rest(views, done), offset + done)
            if count == 0:
                break
            done += count
    except OSError as exc:
        raise TargetFailed(detail=os.strerror(exc.errno or 0)) from exc
    return done


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    left = []
    for view in views:
        if done < view.nbytes:
            left.append(view[done:])
        done = max(0, done - view.nbytes)
    return left


__all__ = [
    "ArenaSource",
    "BlockSource",
    "BlockStore",
    "Extents",
    "Fetched",
    "FileExtent",
    "FileSource",
]
