"""File chunks that come from a target that is being drained (docs/design/0006-moves.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from kvfs_base.counters import Counters
from kvfs_base.errors import ChunkMismatch, ChunkNotFound, VersionMismatch
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains.block_writes import BlockWriter, info_of, publish, raise_error
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import directory_of
from kvfs_datapath.limits import STALL_SECONDS


def compare(store: ChunkStore, request: m.CompareMoved) -> m.Wanted:
    """Removes what the source does not have, or has otherwise; the rest is on stable storage
    afterwards. Raises Conflict in a round that is over."""
    held = {chunk.number: chunk for chunk in request.held}
    with store.incoming.round(request.source, request.ticket):
        store.incoming.arrived(request.inode)
        store.leaving.came(request.inode)
        same: set[int] = set()
        for chunk in store.list_directory(directory_of(request.inode)):
            number = chunk.number
            if chunk.inode != request.inode or number % request.width not in request.places:
                continue
            if not request.start <= number < request.end:
                continue
            if number in held and _is_same(store, chunk, held[number]):
                same.add(number)
            else:
                store.remove(chunk)
    for number in sorted(same):
        store.make_last(ChunkId(request.inode, number))
    return m.Wanted(tuple(i for i, one in enumerate(request.held) if one.number not in same))


def _is_same(store: ChunkStore, chunk: ChunkId, held: m.HeldChunk) -> bool:
    try:
        info = store.stat(chunk)
    except (ChunkNotFound, ChunkMismatch, VersionMismatch):
        return False
    return info.is_sealed and (info.length, info.crc32c) == (held.length, held.crc32c)


def place(
    store: ChunkStore,
    request: m.PlaceMoved,
    receive: Callable[[memoryview], None],
    buffers: BufferPool,
    counters: Counters,
) -> None:
    """On stable storage afterwards. Raises ChunkCorrupt, DiskFull, and Conflict in a round that is
    over."""
    with buffers.lend(STALL_SECONDS) as buffer:
        staged = BlockWriter(counters, receive).take(store, request.chunk, buffer)
    info = msgspec.structs.replace(info_of(request.chunk), durable=request.durable)
    with contextlib.ExitStack() as stack:
        not_published = stack.enter_context(contextlib.ExitStack())
        not_published.callback(store.discard, staged)
        stack.enter_context(store.incoming.round(request.source, request.ticket))
        not_published.pop_all()
        (error,) = publish(store, [(staged, info)], counters)
    raise_error(error)
    store.make_last(info.chunk)


__all__ = ["compare", "place"]
