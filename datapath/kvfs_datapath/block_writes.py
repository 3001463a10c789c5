"""Whole chunks that come in over a connection, and go on to other members while they do."""

from __future__ import annotations

from collections.abc import Callable

from kvfs_base.counters import Counters
from kvfs_base.errors import ChunkCorrupt, KvfsError
from kvfs_base.seams import Buffer
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.store import ChunkStore, StagedChunk


def info_of(new: m.NewChunk) -> ChunkInfo:
    return ChunkInfo(*new.chunk, ChunkState.SEALED, length=new.size, crc32c=new.crc32c, key=new.key)


class BlockWriter:
    """``receive`` fills a view with the next bytes of the payload; ``relay`` gets them too."""

    def __init__(
        self,
        counters: Counters,
        receive: Callable[[memoryview], None],
        relay: Callable[[Buffer], None] | None = None,
    ) -> None:
        self._counters = counters
        self._receive = receive
        self._relay = relay

    def write(self, store: ChunkStore, new: m.NewChunk, buffer: memoryview) -> None:
        """Receives a chunk to its end in pieces as large as the buffer, and publishes it. Raises
        ChunkCorrupt, DiskFull, TargetFailed and what receiving raises."""
        try:
            staged = store.stage()
        except KvfsError:
            self._fill(store, new, None, buffer)
            raise
        try:
            self._fill(store, new, staged, buffer)
        except BaseException:
            store.discard(staged)
            raise
        store.publish(staged, info_of(new))
        self._counters.add(chunks_written=1, written_bytes=new.size)

    def _fill(
        self, store: ChunkStore, new: m.NewChunk, staged: StagedChunk | None, buffer: memoryview
    ) -> None:
        """Receives a chunk to its end even if it cannot be kept: the next one's bytes follow.
        Raises what went wrong."""
        error: KvfsError | None = None
        checksum = 0
        for offset in range(0, new.size, len(buffer)):
            piece = buffer[: min(len(buffer), new.size - offset)]
            self._receive(piece)
            if self._relay is not None:
                self._relay(piece)
            if staged is None or error is not None:
                continue
            checksum = crc32c(piece, checksum)
            try:
                # Whole pages, for O_DIRECT; publishing cuts the file to its length.
                store.fill(staged, buffer[: round_up(len(piece))], offset)
            except KvfsError as exc:
                error = exc
        if error is not None:
            raise error
        if staged is not None and checksum != new.crc32c:
            raise ChunkCorrupt(*new.chunk, expected_crc32c=new.crc32c, found_crc32c=checksum)
