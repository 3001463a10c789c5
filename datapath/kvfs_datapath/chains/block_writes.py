"""Whole chunks that come in over a connection, and go on to other members while they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvfs_base.counters import Counters
from kvfs_base.errors import ChunkCorrupt, ConnectionLost, DeadlineExceeded, KvfsError
from kvfs_base.seams import Buffer
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore, StagedChunk
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.limits import PUBLISH_TOGETHER_MAX


def info_of(new: m.WholeChunk) -> ChunkInfo:
    return ChunkInfo(*new.chunk, ChunkState.SEALED, length=new.size, crc32c=new.crc32c, key=new.key)


def publish(
    store: ChunkStore, batch: Sequence[tuple[StagedChunk, ChunkInfo]], counters: Counters
) -> list[KvfsError | None]:
    """As ``publish_all``, and counts."""
    results = store.publish_all(batch)
    for (_, info), error in zip(batch, results, strict=True):
        if error is None:
            counters.add(chunks_written=1, written_bytes=info.length)
    return results


def raise_error(error: KvfsError | None) -> None:
    """What went wrong with an item, if anything did."""
    if error is not None:
        raise error


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

    def write(
        self, store: ChunkStore, chunks: Sequence[m.WholeChunk], buffer: memoryview
    ) -> list[KvfsError | None]:
        """Receives chunks in pieces as large as the buffer, and publishes those that came whole, in
        ``strict`` many together. What went wrong with each: ChunkCorrupt, DiskFull, TargetFailed.
        Raises what receiving raises."""
        results: list[KvfsError | None] = [None] * len(chunks)
        together = PUBLISH_TOGETHER_MAX if store.strict else 1
        staged: dict[int, StagedChunk] = {}
        try:
            for index, new in enumerate(chunks):
                try:
                    staged[index] = self.take(store, new, buffer)
                except (ConnectionLost, DeadlineExceeded):
                    raise
                except KvfsError as exc:
                    results[index] = exc
                if len(staged) == together:
                    self._publish(store, chunks, staged, results)
        except BaseException:
            for one in staged.values():
                store.discard(one)
            raise
        self._publish(store, chunks, staged, results)
        return results

    def _publish(
        self,
        store: ChunkStore,
        chunks: Sequence[m.WholeChunk],
        staged: dict[int, StagedChunk],
        results: list[KvfsError | None],
    ) -> None:
        """Empties ``staged``."""
        batch = {index: (one, info_of(chunks[index])) for index, one in staged.items()}
        staged.clear()
        outcomes = publish(store, list(batch.values()), self._counters)
        for index, error in zip(batch, outcomes, strict=True):
            results[index] = error

    def take(self, store: ChunkStore, new: m.WholeChunk, buffer: memoryview) -> StagedChunk:
        """Receives a chunk whole, for the caller to publish or discard."""
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
        return staged

    def _fill(
        self, store: ChunkStore, new: m.WholeChunk, staged: StagedChunk | None, buffer: memoryview
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
