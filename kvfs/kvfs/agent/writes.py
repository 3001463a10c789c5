"""The life of a write, inside the agent: prepared, staged in rounds, committed whole or not at all.

Bytes come from memory that the client can still write to. Where the arena has room they are copied
into it first, and everything after (checksum, chunk file, later reads) uses the copy. Otherwise
they are written from staging as they are: a client that changes them meanwhile ends up with a block
whose checksum is wrong, which is a miss for everyone.

Blocks on chains of several copies are committed together with the chains' versions. If one has
changed since, a new member may lack them: they are written again, from what another member has, and
committed again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
from typing import TypeVar

from kvfs.agent.backends import Chunks, MetadataCalls
from kvfs.agent.config import AgentConfig
from kvfs.agent.messages import STAGED, PreparePut, PutPlan, StageBlocks, split_keys
from kvfs.agent.session import Put, Session
from kvfs.agent.space import Space
from kvfs_base import large_pages
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ArenaFull,
    InvalidRequest,
    KvfsError,
    LimitExceeded,
    StaleChain,
)
from kvfs_base.limits import (
    AGENT_WRITE_THREADS,
    BLOCK_BYTES_MAX,
    COMMIT_ATTEMPTS_MAX,
    TRANSFER_BYTES,
)
from kvfs_base.types import BlockInfo, ChunkId
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkRead, ChunkWrite
from kvfs_gds.block_cache import Grant
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

_Item = TypeVar("_Item")

KEPT_SHARE = 4
"""One put pins at most this fraction (1/4) of the arena until it commits."""


@dataclasses.dataclass(slots=True)
class _Staged:
    """One block of a round."""

    place: int
    offset: int
    size: int
    block: PreparedBlock
    view: memoryview
    """Whole pages: of the staging area, or of the extent that keeps the block."""
    kept: bool


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
        self._pool = concurrent.futures.ThreadPoolExecutor(
            AGENT_WRITE_THREADS, thread_name_prefix="kvfs-agent-write"
        )

    def close(self) -> None:
        """No put may be in progress."""
        self._pool.shutdown()

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
        """``staged``: offset in the staging area by place in the put. Portions go side by side, so
        that one is copied and summed while the disk writes another."""
        blocks = self._staged_blocks(session, put, staged)
        portions = _cut(blocks, [block.size for block in blocks])
        others = [self._pool.submit(self._write_portion, session, put, p) for p in portions[1:]]
        try:
            self._write_portion(session, put, portions[0])
        finally:
            # They use the staging area and the arena: nobody goes on before they are done.
            concurrent.futures.wait(others)
        for other in others:
            other.result()

    def _write_portion(self, session: Session, put: Put, blocks: list[_Staged]) -> None:
        """Raises what the first failed chunk raised."""
        writes = []
        for staged in blocks:
            if staged.kept:
                _read_exactly(session.staging.fd, staged.view[: staged.size], staged.offset)
            checksum = crc32c(staged.view[: staged.size])
            put.crc32c[staged.place] = checksum
            key, chunk = put.keys[staged.place], ChunkId(staged.block.inode, 0)
            writes.append(
                ChunkWrite(chunk, staged.block.chain, staged.size, checksum, key, staged.view)
            )
        self._write_chunks(put, [staged.place for staged in blocks], writes)

    def _write_chunks(self, put: Put, places: list[int], writes: list[ChunkWrite]) -> None:
        for error in self._chunks.write_chunks(writes):
            if error is not None:
                raise error
        put.versions.update(
            (p, w.version) for p, w in zip(places, writes, strict=True) if w.version
        )

    def _staged_blocks(self, session: Session, put: Put, staged: dict[int, int]) -> list[_Staged]:
        """What a round consists of. Raises InvalidRequest before anything is copied if a block
        does not lie in the staging area."""
        blocks = []
        for place, offset in staged.items():
            size, block = put.sizes[place], put.blocks[place]
            assert block is not None
            view = session.staged(offset, pages_of(size))
            blocks.append(_Staged(place, offset, size, block, view, kept=False))
        grant = self._room_to_keep(put, blocks)
        if grant is not None:
            for kept, entry in zip(blocks, grant.entries, strict=True):
                assert entry is not None
                kept.view = self._space.extent(entry)
                kept.kept = True
        return blocks

    def _room_to_keep(self, put: Put, blocks: list[_Staged]) -> Grant | None:
        """Extents of the arena for a round, or None if it is not to hold it."""
        size_bytes = sum(len(block.view) for block in blocks)
        if (
            not self._keep
            or put.kept_bytes + size_bytes > self._space.arena.size_bytes // KEPT_SHARE
        ):
            return None
        keys = [put.keys[block.place] for block in blocks]
        # What the metadata service will say of them once they are committed.
        infos = [BlockInfo(b.block.inode, b.size, 0, b.block.chain) for b in blocks]
        try:
            grant = self._space.acquire(put.namespace, keys, infos)
        except ArenaFull:
            return None
        put.grants.append(grant)
        put.kept_bytes += size_bytes
        return grant

    def _commit(self, metadata: MetadataCalls, put: Put) -> None:
        needed = [place for place, block in enumerate(put.blocks) if block is not None]
        checksums = [value for place in needed if (value := put.crc32c[place]) is not None]
        if len(checksums) != len(needed):
            raise InvalidRequest(detail="commit before every block was staged")
        for attempt in range(1, COMMIT_ATTEMPTS_MAX + 1):
            try:
                metadata.call(CommitBlocks(put.batch_id, tuple(checksums), _chain_versions(put)))
                break
            except StaleChain as exc:
                if attempt == COMMIT_ATTEMPTS_MAX:
                    raise
                self._write_again(put, exc.chain)
        self._settle(put, committed=True)
        size_bytes = sum(put.sizes[place] for place in needed)
        self._counters.add(put_blocks=len(needed), put_bytes=size_bytes)

    def _write_again(self, put: Put, stale: int) -> None:
        """The blocks of all chains that have changed, ``stale`` for one, to their present members.
        The staging area may hold other blocks by now: another member has the bytes, and they are
        checked on the way."""
        by_chain: dict[int, list[int]] = {}
        for place in put.versions:
            block = put.blocks[place]
            assert block is not None
            by_chain.setdefault(block.chain, []).append(place)
        now = self._chunks.versions(by_chain)
        again = [
            place
            for chain, places in by_chain.items()
            for place in places
            if chain == stale or put.versions[place] != now.get(chain)
        ]
        log.info("chains changed during a put: %d blocks are written again", len(again))
        for portion in _cut(again, [put.sizes[place] for place in again]):
            self._copy(put, portion)

    def _copy(self, put: Put, places: list[int]) -> None:
        reads = []
        for place in places:
            block, checksum = put.blocks[place], put.crc32c[place]
            assert block is not None and checksum is not None
            size = put.sizes[place]
            view = large_pages.buffer(pages_of(size))
            chunk = ChunkId(block.inode, 0)
            reads.append(ChunkRead(chunk, block.chain, size, checksum, put.keys[place], view))
        for error in self._chunks.read_chunks(reads):
            if error is not None:
                raise error
        writes = [ChunkWrite(r.chunk, r.chain, r.size, r.crc32c, r.key, r.view) for r in reads]
        self._write_chunks(put, places, writes)

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


def _cut(items: list[_Item], sizes: list[int]) -> list[list[_Item]]:
    """Cuts what is to be written into portions of about TRANSFER_BYTES."""
    portions: list[list[_Item]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if room <= 0:
            portions.append([])
            room = TRANSFER_BYTES
        portions[-1].append(item)
        room -= size
    return portions


def _chain_versions(put: Put) -> tuple[tuple[int, int], ...]:
    """Each chain of several copies with the oldest version under which one of its blocks was
    written."""
    oldest: dict[int, int] = {}
    for place, version in put.versions.items():
        block = put.blocks[place]
        assert block is not None
        oldest[block.chain] = min(version, oldest.get(block.chain, version))
    return tuple(oldest.items())


def _read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """From a memfd of sealed size: memory to memory, copied by the kernel without the GIL."""
    done = 0
    while done < len(view):
        done += os.preadv(fd, [view[done:]], offset + done)


__all__ = ["BlockWriter"]
