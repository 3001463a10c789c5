"""Chunks that lie damaged on a disk, fetched again from another member of their chain."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import msgspec

from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ChunkPending,
    ConnectionLost,
    IntegrityError,
    KvfsError,
    NotPermitted,
    ServerBusy,
    VersionMismatch,
)
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.chains.peers import Peers, Unreached
from kvfs_datapath.chains.replication import Replicator, Unresolved
from kvfs_datapath.chains.views import Place, Views, require_version
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import VERSION_UNKNOWN, ChunkInfo, ChunkState
from kvfs_datapath.limits import CHUNK_LOCK_SECONDS, SYNC_CALL_SECONDS

log = logging.getLogger(__name__)

DAMAGE = (ChunkCorrupt, ChunkMismatch, ChunkNotFound, VersionMismatch)


class Repairer:
    """Of all targets of a server. ``buffers`` hold what is fetched."""

    def __init__(
        self,
        views: Views,
        peers: Peers,
        replicator: Replicator,
        buffers: BufferPool,
        counters: Counters,
    ) -> None:
        self._views = views
        self._peers = peers
        self._replicator = replicator
        self._buffers = buffers
        self._counters = counters

    def repair(self, store: ChunkStore, chunk: ChunkId) -> ChunkInfo:
        """Reads the chunk again, and gets it from another member if it is damaged or missing. A
        target that others do not agree with about a file's chunk is brought in step as a whole.
        Raises what is wrong with the chunk if it cannot be had, TargetFenced, StaleChain; if
        nobody who serves has it, it is recorded as damaged. ChunkNotFound says that nobody who
        serves knows of it, ServerBusy that somebody may."""
        try:
            return store.recheck(chunk)
        except DAMAGE as exc:
            if not chunk.chain:
                raise
            damage = exc
        place = self._views.place(store, chunk.chain)
        others = [t for t in place.chain.targets if t != place.target_id] if place.serving else []
        is_lost = place.serving and isinstance(damage, ChunkCorrupt | ChunkMismatch)
        is_missing = place.serving
        for other in others:
            try:
                info = self._look(other, chunk)
                if info.version:
                    repaired = self._file(store, place, other, chunk)
                else:
                    repaired = self._block(store, other, info)
            except (Unreached, Unresolved, KvfsError) as exc:
                log.info("chunk %s cannot be had of target %d: %s", tuple(chunk), other, exc)
                is_lost &= isinstance(exc, ChunkCorrupt)
                is_missing &= isinstance(exc, ChunkNotFound)
                continue
            self._counters.add(chunks_repaired=1)
            log.info("chunk %s was damaged, and is whole again", tuple(chunk))
            return repaired
        if is_lost:
            self._give_up(store, place, chunk)
        if isinstance(damage, ChunkNotFound) and not is_missing:
            raise ServerBusy(detail=f"others may have chunk {tuple(chunk)}")
        raise damage

    def _give_up(self, store: ChunkStore, place: Place, chunk: ChunkId) -> None:
        """Records that a file's chunk is damaged, unless somebody has written it meanwhile."""
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(store, chunk.chain) as now,
        ):
            require_version(now, place)
            try:
                store.recheck(chunk)
            except (ChunkCorrupt, ChunkMismatch) as exc:
                alone = now.chain.targets == (now.target_id,)
                # Where others serve this target can learn the version from them, as a whole.
                if alone or isinstance(exc, ChunkCorrupt):
                    with contextlib.suppress(NotPermitted):
                        store.versions.drop(chunk)
                        store.versions.damaged.mark(chunk)

    def heal(self, store: ChunkStore, place: Place, sink: int, chunk: ChunkId) -> ChunkInfo:
        """Gets a chunk that is recorded as damaged from a member that is brought in step, which may
        have the very version. Answers what is here then. Raises Unreached, StaleChain."""
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(store, chunk.chain) as now,
        ):
            require_version(now, place)
            own = store.versions.committed(chunk)
            if own is None:
                raise ChunkNotFound(*chunk)
            if not own.is_damaged or own.version == VERSION_UNKNOWN:
                return own
            passing = place.passing(place.hops[1:])
            info = msgspec.structs.replace(own, state=ChunkState.SEALED)
            try:
                pieces = (piece for _, piece, _ in self._pieces(sink, info, passing))
                store.versions.replace(chunk, info, pieces)
            except (ChunkNotFound, ChunkPending, IntegrityError) as exc:
                log.info("chunk %s stays damaged: target %d: %s", tuple(chunk), sink, exc)
                return own
        self._counters.add(chunks_repaired=1)
        log.info("chunk %s was lost, and target %d had it", tuple(chunk), sink)
        return info

    def _look(self, other: int, chunk: ChunkId) -> ChunkInfo:
        """What another member has. Raises ChunkPending, ChunkNotFound."""
        outcomes: m.Outcomes = self._peers.call(
            other, m.StatChunks(other, (m.ChunkRef(*chunk),)), seconds=SYNC_CALL_SECONDS
        )
        error = outcomes.error(0)
        if error is not None:
            raise error
        info = outcomes.infos[0]
        if info is None or info.chunk != chunk:
            raise ChunkMismatch(*chunk, detail="another chunk's attribute")
        return info

    def _block(self, store: ChunkStore, other: int, info: ChunkInfo) -> ChunkInfo:
        staged = store.stage()
        try:
            for offset, _, pages in self._pieces(other, info):
                store.fill(staged, pages, offset)
        except BaseException:
            store.discard(staged)
            raise
        store.publish(staged, info)
        return info

    def _file(self, store: ChunkStore, place: Place, other: int, chunk: ChunkId) -> ChunkInfo:
        """The version that this target has, or had: nothing is under way while its lock is held."""
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(store, chunk.chain) as now,
        ):
            require_version(now, place)
            own = self._own(store, now, chunk)
            # Again, now that nothing changes here: what was looked at before may be old.
            info = self._look(other, chunk)
            if own is not None and _version(own) != _version(info):
                self._out_of_step(store, chunk, f"version {own.version}, not {info.version}")
            pieces = (piece for _, piece, _ in self._pieces(other, info))
            store.versions.replace(chunk, info, pieces)
            return info

    def _own(self, store: ChunkStore, place: Place, chunk: ChunkId) -> ChunkInfo | None:
        """What is committed here, once nothing is pending. None if the chunk is missing."""
        try:
            self._replicator.settle(store, place, chunk)
            return store.versions.committed(chunk)
        except (ChunkCorrupt, ChunkMismatch) as exc:
            # Whether there is a pending version, which others may have committed, is unknown.
            self._out_of_step(store, chunk, str(exc))
            raise

    def _out_of_step(self, store: ChunkStore, chunk: ChunkId, why: str) -> None:
        log.error("target %d is out of step: chunk %s: %s", store.target_id, tuple(chunk), why)
        self._views.renounce(store.uuid)
        raise ChunkMismatch(*chunk, detail=why)

    def _pieces(
        self, other: int, info: ChunkInfo, passing: m.Passing | None = None
    ) -> Iterator[tuple[int, memoryview, memoryview]]:
        """The chunk's bytes: offset, piece, and the whole pages that hold it. Raises ChunkMismatch
        if the other one has another version, Unreached if other bytes come."""

        def is_it(found: ChunkInfo | None) -> bool:
            return found is not None and _version(found) == _version(info)

        checksum = 0
        with self._buffers.lend(SYNC_CALL_SECONDS) as buffer:
            for offset in range(0, info.length, len(buffer)):
                piece = buffer[: min(len(buffer), info.length - offset)]
                wanted = (m.Piece(*info.chunk, offset, len(piece)),)
                request = m.ReadPieces(other, wanted, passing=passing)

                def into(
                    outcomes: m.Outcomes, piece: memoryview = piece, offset: int = offset
                ) -> list[memoryview]:
                    # As many as the other one sends, whatever it has.
                    (found,) = outcomes.infos
                    length = 0 if found is None else min(len(piece), found.length - offset)
                    return [piece[:length]] if length > 0 else []

                outcomes: m.Outcomes = self._peers.call(
                    other, request, into=into, seconds=SYNC_CALL_SECONDS
                )
                error = outcomes.error(0)
                if error is not None:
                    raise error
                if not is_it(outcomes.infos[0]):
                    raise ChunkMismatch(*info.chunk, detail="it has changed meanwhile")
                checksum = crc32c(piece, checksum)
                if offset + len(piece) == info.length and checksum != info.crc32c:
                    # What its disk has it has looked at; nobody is to take this for damage.
                    lost = ConnectionLost(detail="bytes changed on their way")
                    raise Unreached(other, lost)
                yield offset, piece, buffer[: round_up(len(piece))]


def _version(info: ChunkInfo) -> tuple[int, int, int]:
    return info.version, info.length, info.crc32c
