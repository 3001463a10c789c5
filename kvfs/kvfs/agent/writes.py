"""The life of a write, inside the agent: prepared, staged in rounds, committed whole or not at all.

Bytes come from memory that the client can still write to. Where the arena has room they are copied
into it first, and everything after (checksum, chunk file, later reads) uses the copy. Otherwise
they are written from staging as they are: a client that changes them meanwhile ends up with a block
whose checksum is wrong, which is a miss for everyone.
"""

from __future__ import annotations

import logging
import os

from kvfs.agent.backends import Chunks, MetadataCalls
from kvfs.agent.config import AgentConfig
from kvfs.agent.counters import Counters
from kvfs.agent.messages import STAGED, PreparePut, PutPlan, StageBlocks, split_keys
from kvfs.agent.session import Put, Session
from kvfs.agent.space import Space
from kvfs_base.errors import ArenaFull, InvalidRequest, KvfsError, LimitExceeded
from kvfs_base.limits import BLOCK_BYTES_MAX
from kvfs_base.types import BlockInfo, ChunkId
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client import ChunkWrite
from kvfs_gds.extents import pages_of
from kvfs_metadata.messages import (
    AbortBlocks,
    CommitBlocks,
    Done,
    PrepareBlocks,
    PreparedBatch,
    PreparedBlock,
)

log = logging.getLogger(__name__)

KEPT_SHARE = 4
"""One put pins at most this fraction (1/4) of the arena until it commits."""


class BlockWriter:
    """Thread-safe."""

    def __init__(
        self,
        config: AgentConfig,
        space: Space,
        chunks: Chunks,
        counters: Counters,
    ) -> None:
        self._keep = config.keep_puts
        self._block_bytes_max = min(config.staging_bytes, BLOCK_BYTES_MAX)
        self._space = space
        self._cache = space.cache
        self._chunks = chunks
        self._counters = counters

    def prepare(self, metadata: MetadataCalls, session: Session, request: PreparePut) -> PutPlan:
        """Raises InvalidRequest, LimitExceeded and what the metadata service raised."""
        keys = split_keys(request.keys)
        self._check(request, keys)
        batch: PreparedBatch = metadata.call(
            PrepareBlocks(request.namespace, request.keys, request.sizes)
        )
        wanted = bytes(block is not None for block in batch.blocks)
        self._counters.add(put_duplicates=wanted.count(0))
        if not batch.batch_id:
            return PutPlan(0, wanted)
        put = Put(
            namespace=request.namespace,
            batch_id=batch.batch_id,
            keys=keys,
            sizes=request.sizes,
            blocks=batch.blocks,
            crc32c=[None] * len(keys),
        )
        try:
            return PutPlan(session.add_put(put), wanted)
        except KvfsError:
            self.abort(metadata, put)
            raise

    def _check(self, request: PreparePut, keys: list[bytes]) -> None:
        if len(keys) != len(request.sizes):
            raise InvalidRequest(detail="keys and sizes do not match")
        if len(set(keys)) != len(keys):
            raise InvalidRequest(detail="a key is named twice")
        if request.sizes and min(request.sizes) == 0:
            raise InvalidRequest(detail="an empty block")
        if request.sizes and max(request.sizes) > self._block_bytes_max:
            raise LimitExceeded(detail="block size", limit=self._block_bytes_max)

    def stage(self, metadata: MetadataCalls, session: Session, request: StageBlocks) -> Done:
        """Writes what the client staged; any error aborts the put. Raises InvalidRequest,
        PrepareExpired, and what chunk servers or the metadata service raised."""
        put = session.take_put(request.put)
        if put is None:
            raise InvalidRequest(detail=f"no put {request.put}")
        try:
            staged = _staged_places(put, request.blocks)
            if staged:
                self._write(session, put, staged)
            if request.commit:
                self._commit(metadata, put)
            else:
                session.return_put(request.put, put)
        except BaseException:
            self.abort(metadata, put)
            raise
        return Done()

    def abort(self, metadata: MetadataCalls, put: Put) -> None:
        """Drops a put; what it wrote is collected."""
        self._counters.add(puts_aborted=1)
        self._settle(put, committed=False)
        try:
            metadata.call(AbortBlocks(put.batch_id))
        except KvfsError as exc:
            log.info("an aborted put has to expire: %s", exc)

    def _write(self, session: Session, put: Put, staged: dict[int, int]) -> None:
        """``staged``: offset in the staging area by place in the put."""
        views = self._keep_copies(session, put, staged)
        if views is None:
            views = [
                session.staged(offset, pages_of(put.sizes[place]))
                for place, offset in staged.items()
            ]
        writes = []
        for place, view in zip(staged, views, strict=True):
            block = put.blocks[place]
            assert block is not None
            size = put.sizes[place]
            checksum = crc32c(view[:size])
            put.crc32c[place] = checksum
            chunk = ChunkId(block.inode, 0)
            writes.append(ChunkWrite(chunk, block.chain, size, checksum, put.keys[place], view))
        for error in self._chunks.write_chunks(writes):
            if error is not None:
                raise error

    def _keep_copies(
        self, session: Session, put: Put, staged: dict[int, int]
    ) -> list[memoryview] | None:
        """Copies a round into extents of the arena, or returns None if it is not to hold it."""
        size_bytes = sum(pages_of(put.sizes[place]) for place in staged)
        if (
            not self._keep
            or put.kept_bytes + size_bytes > self._space.arena.size_bytes // KEPT_SHARE
        ):
            return None
        for place, offset in staged.items():
            session.staged(offset, put.sizes[place])  # in bounds, or nothing happens
        try:
            grant = self._space.acquire(
                put.namespace,
                [put.keys[place] for place in staged],
                [_future_info(put.blocks[place], put.sizes[place]) for place in staged],
            )
        except ArenaFull:
            return None
        put.grants.append(grant)
        put.kept_bytes += size_bytes
        views = []
        for entry, offset in zip(grant.entries, staged.values(), strict=True):
            assert entry is not None
            view = self._space.extent(entry)
            _read_exactly(session.staging.fd, view[: entry.size], offset)
            views.append(view)
        return views

    def _commit(self, metadata: MetadataCalls, put: Put) -> None:
        needed = [place for place, block in enumerate(put.blocks) if block is not None]
        checksums = [value for place in needed if (value := put.crc32c[place]) is not None]
        if len(checksums) != len(needed):
            raise InvalidRequest(detail="commit before every block was staged")
        metadata.call(CommitBlocks(put.batch_id, tuple(checksums)))
        self._settle(put, committed=True)
        size_bytes = sum(put.sizes[place] for place in needed)
        self._counters.add(put_blocks=len(needed), put_bytes=size_bytes)

    def _settle(self, put: Put, *, committed: bool) -> None:
        grants, put.grants = put.grants, []
        for grant in grants:
            self._cache.finish(grant, () if committed else set(grant.load))
            self._cache.release(entry for entry in grant.entries if entry is not None)


def _staged_places(put: Put, blocks: bytes) -> dict[int, int]:
    """Staging offset by place, checked: each place is one that is wanted and still missing."""
    if len(blocks) % STAGED.size:
        raise InvalidRequest(detail="cut off list of blocks")
    staged: dict[int, int] = {}
    for place, offset in STAGED.iter_unpack(blocks):
        if place >= len(put.keys) or put.blocks[place] is None:
            raise InvalidRequest(detail=f"block {place} is not wanted")
        if put.crc32c[place] is not None or place in staged:
            raise InvalidRequest(detail=f"block {place} was staged already")
        staged[place] = offset
    return staged


def _future_info(block: PreparedBlock | None, size: int) -> BlockInfo:
    """What the metadata service will say of a block once it is committed."""
    assert block is not None
    return BlockInfo(block.inode, size, 0, block.chain)


def _read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """From a memfd of sealed size: memory to memory, copied by the kernel without the GIL."""
    done = 0
    while done < len(view):
        done += os.preadv(fd, [view[done:]], offset + done)


__all__ = ["BlockWriter"]
