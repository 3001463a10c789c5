"""Where blocks come from: the node's arena, or files that are read without an agent.

A source answers a batch of keys with extents of some memory that the device can read, held until
``release``. It brings the bytes, verifies them, and knows nothing of pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from kvfs_base.answers import Answer
from kvfs_gds.arena import ArenaView
from kvfs_gds.extents import pages_of
from kvfs_gds.file_reads import Batch, Block
from kvfs_gds.limits import CHECK_THREADS, READ_THREADS
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

    def ask(self, keys: Sequence[bytes]) -> Answer[Fetched] | None:
        """``fetch`` in two steps: begins it and does not wait. The answer must be taken. None if
        that is not possible now."""

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

    def ask(self, keys: Sequence[bytes]) -> Answer[ArenaBlocks] | None: ...


class _FromArena:
    def __init__(self, blocks: ArenaBlocks, memory: HostMemory) -> None:
        self.memory = memory
        self.extents = blocks.extents
        self._blocks = blocks

    def release(self) -> None:
        self._blocks.release()


class ArenaSource:
    """The blocks of a namespace, in the arena of this node's agent: nothing is copied, and each is
    read from disk once for all processes of the node."""

    def __init__(self, namespace: ArenaNamespace) -> None:
        self._namespace = namespace
        self._mapped: tuple[ArenaView, HostMemory] | None = None

    def fetch(self, keys: Sequence[bytes]) -> Fetched:
        return self._fetched(self._namespace.get(keys))

    def ask(self, keys: Sequence[bytes]) -> Answer[Fetched] | None:
        answer = self._namespace.ask(keys)
        return None if answer is None else answer.then(self._fetched)

    def _fetched(self, blocks: ArenaBlocks) -> Fetched:
        arena = blocks.arena
        mapped = self._mapped
        if mapped is None or mapped[0] is not arena:
            # The view keeps the arena mapped: it is registered for longer than this client may
            # live.
            view = arena.view(0, arena.size_bytes)
            memory = HostMemory(arena.address, len(view), read_only=True, owner=view)
            mapped = self._mapped = arena, memory
        return _FromArena(blocks, mapped[1])

    def room_bytes(self) -> int:
        return 0 if self._mapped is None else self._mapped[1].nbytes


@dataclasses.dataclass(frozen=True)
class FileExtent:
    """A block in a file. ``offset`` and the file's length are whole pages if ``descriptor`` is
    O_DIRECT. ``crc32c`` None says that nobody knows it."""

    descriptor: int
    offset: int
    size: int
    crc32c: int | None = None


class FromRing:
    """Blocks in a slot of a ring, which is given back with them."""

    def __init__(self, memory: HostMemory, slot: Slot | None, extents: Extents) -> None:
        self.memory = memory
        self.extents = extents
        self._slot = slot

    def release(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()


class FileSource:
    """Blocks that lie in files, read into a pinned ring (``kvfs_gds.file_reads``). The reads of one
    fetch follow those of the one before without a gap."""

    def __init__(
        self,
        ring: PinnedRing,
        locate: Callable[[Sequence[bytes]], Sequence[FileExtent | None]],
        *,
        threads: int = READ_THREADS,
        owns_ring: bool = False,
    ) -> None:
        """``locate`` says where blocks lie; it must leave the descriptors open. With ``owns_ring``
        the ring is closed with the source."""
        self._ring = ring
        self._owns_ring = owns_ring
        self._locate = locate
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvfs-read")
        self._checks = ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="kvfs-check")

    def room_bytes(self) -> int:
        return self._ring.nbytes

    def close(self) -> None:
        self._pool.shutdown()
        self._checks.shutdown()
        if self._owns_ring:
            self._ring.close()

    def ask(self, keys: Sequence[bytes]) -> None:
        """Reads are begun by who waits for them."""

    def fetch(self, keys: Sequence[bytes]) -> Fetched:
        found = list(self._locate(keys))
        sizes = [pages_of(extent.size) if extent is not None else 0 for extent in found]
        total = sum(sizes)
        if not total:
            return FromRing(self._ring.memory, None, [None] * len(keys))
        slot = self._ring.take(total)
        assert slot is not None
        try:
            return self._fill(slot, found, sizes)
        except BaseException:
            slot.release()
            raise

    def _fill(self, slot: Slot, found: list[FileExtent | None], sizes: list[int]) -> Fetched:
        extents: Extents = []
        blocks: dict[int, Block] = {}
        at = slot.offset
        for place, (extent, size) in enumerate(zip(found, sizes, strict=True)):
            extents.append(None if extent is None else (at, extent.size))
            if extent is not None:
                view = self._ring.view(at, size)
                blocks[place] = Block(
                    extent.descriptor, extent.offset, extent.size, extent.crc32c, view
                )
            at += size
        self._read(list(blocks.values()))
        for place, block in blocks.items():
            if not block.good:
                extents[place] = None
        return FromRing(self._ring.memory, slot, extents)

    def _read(self, blocks: list[Block]) -> None:
        """Nothing writes to the blocks' memory any more afterwards, also if it raises."""
        checks: list[Future[None]] = []
        batch = Batch(blocks, lambda block: checks.append(self._checks.submit(block.verify)))
        reads = [self._pool.submit(batch.read) for _ in range(min(self._threads, len(batch)))]
        wait(reads)
        wait(checks)
        for future in (*reads, *checks):
            future.result()


__all__ = [
    "ArenaSource",
    "BlockSource",
    "BlockStore",
    "Extents",
    "Fetched",
    "FileExtent",
    "FileSource",
    "FromRing",
]
