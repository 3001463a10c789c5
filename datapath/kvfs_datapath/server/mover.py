"""Empties targets that are being drained: what has one copy is brought to others.

The copying side of docs/design/0006-moves.md. The metadata service says what to move, in rounds of
which each has a number, and hears what was moved. Nothing is remembered from one round to the next:
the next one compares.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
from collections.abc import Iterator, Sequence

from kvfs_base import threads
from kvfs_base.cluster import EndMoves, FindUnwanted, Move, Moves, TakeMoves
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    Conflict,
    DiskFull,
    KvfsError,
    TargetFailed,
    VersionMismatch,
)
from kvfs_base.limits import (
    CALL_SECONDS,
    TARGET_LEASE_SECONDS,
    TRANSFER_BYTES,
)
from kvfs_base.rpc import BlockingRpcClient
from kvfs_base.seams import Env
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.chains.peers import Peers, Relay, Unreached
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.format import ChunkInfo, directory_of
from kvfs_datapath.limits import (
    MOVE_END_TOGETHER,
    MOVE_PAUSE_SECONDS,
    MOVE_THREADS,
    SYNC_CALL_SECONDS,
    SYNC_PAGE_CHUNKS,
)

log = logging.getLogger(__name__)

DAMAGE = (ChunkCorrupt, ChunkMismatch, ChunkNotFound, VersionMismatch)


class Outcome(enum.Enum):
    DONE = "done"
    FAILED = "failed"
    """The other target does not take it."""
    LOST = "lost"
    """A block that is damaged here."""
    LATER = "later"


class Mover:
    """Works from ``start`` to ``stop`` on the targets that ``order`` names."""

    def __init__(
        self,
        env: Env,
        config: ChunkServerConfig,
        stores: Sequence[ChunkStore],
        peers: Peers,
        counters: Counters,
    ) -> None:
        self._stores = stores
        self._peers = peers
        self._counters = counters
        self._rpc = BlockingRpcClient(env.blocking_network, config.metadata)
        self._asking = threads.lock()
        self._asking_rpc = BlockingRpcClient(env.blocking_network, config.metadata)
        for store in stores:
            store.leaving.is_wanted = functools.partial(self._is_wanted, store)
        self._buffers = BufferPool(MOVE_THREADS, TRANSFER_BYTES)
        self._rate = config.sync_bytes_per_second
        self._turn = threads.lock()
        self._stopping = threads.event()
        self._work = threads.condition()
        self._moving: frozenset[str] = frozenset()
        self._pool = threads.pool(MOVE_THREADS, "kvfs-move")
        self._thread = threads.thread(self._run, name="kvfs-mover")

    def order(self, uuids: frozenset[str]) -> None:
        """The targets that are being drained."""
        if uuids != self._moving:
            with self._work:
                self._moving = uuids
                self._work.notify_all()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the threads have ended: at most a call's deadline."""
        self._stopping.set()
        with self._work:
            self._work.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown(wait=True)
        with self._asking:
            self._asking_rpc.close()

    def _is_wanted(self, store: ChunkStore, inode: int) -> bool:
        """Asked by sessions, of files that have left."""
        try:
            with self._asking:
                request = FindUnwanted(store.target_id, 0, (inode,))
                return not self._asking_rpc.call(request, CALL_SECONDS)
        except KvfsError as exc:
            log.info("inode %d: whether it came back is not known: %s", inode, exc)
            return False

    # --- rounds

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                with self._work:
                    while not self._busy() and not self._stopping.is_set():
                        self._work.wait()
                    stores = self._busy()
                moved = [self._round(store) for store in stores]
                if not any(moved):
                    self._stopping.wait(MOVE_PAUSE_SECONDS)
        except Exception:
            log.exception("the mover failed")
        finally:
            self._rpc.close()

    def _busy(self) -> list[ChunkStore]:
        """Targets with something to move, or with a move that may have ended."""
        return [s for s in self._stores if s.uuid in self._moving or s.leaving.held()]

    def _round(self, store: ChunkStore) -> bool:
        """Whether anything was moved."""
        if self._stopping.is_set() or not store.target_id or not store.healthy:
            return False
        try:
            self._settle(store)
            taken: Moves = self._rpc.call(TakeMoves(store.target_id), TARGET_LEASE_SECONDS)
            jobs = [self._pool.submit(self._try, store, move, taken.ticket) for move in taken.moves]
            # The next round begins when nobody is at work in this one.
            outcomes = [(move, job.result()) for move, job in zip(taken.moves, jobs, strict=True)]
            del jobs
            return self._report(store, taken.ticket, outcomes)
        except KvfsError as exc:
            log.info("target %d: nothing is moved for now: %s", store.target_id, exc)
            return False

    def _settle(self, store: ChunkStore) -> None:
        """Of what was held for a move's end, whether it has left: the end may not have counted, or
        not have been answered; and a file may have another chain of this target."""
        held = store.leaving.held()
        if held:
            request = FindUnwanted(store.target_id, 0, tuple(held))
            unwanted = set(self._rpc.call(request, TARGET_LEASE_SECONDS))
            for place, inode in enumerate(held):
                store.leaving.decide(inode, left=place in unwanted)

    def _report(
        self, store: ChunkStore, ticket: int, outcomes: Sequence[tuple[Move, Outcome]]
    ) -> bool:
        ended: set[int] = set()
        for start in range(0, len(outcomes), MOVE_END_TOGETHER):
            part = outcomes[start : start + MOVE_END_TOGETHER]
            named = {
                outcome.value: tuple(move.inode for move, found in part if found is outcome)
                for outcome in (Outcome.DONE, Outcome.FAILED, Outcome.LOST)
            }
            if any(named.values()):
                request = EndMoves(store.target_id, ticket, **named)
                ended.update(self._rpc.call(request, CALL_SECONDS))
        self._settle(store)
        self._counters.add(moves_ended=len(ended))
        return bool(ended)

    # --- one move

    def _try(self, store: ChunkStore, move: Move, ticket: int) -> Outcome:
        if self._stopping.is_set():
            return Outcome.LATER
        try:
            if move.is_block:
                return self._move_block(store, move)
            return self._move_file(store, move, ticket)
        except (Unreached, KvfsError) as exc:
            log.info("inode %d is not moved for now: %s", move.inode, exc)
            return Outcome.LATER
        except Exception:
            log.exception("inode %d is not moved", move.inode)
            return Outcome.LATER

    def _move_block(self, store: ChunkStore, move: Move) -> Outcome:
        chunk = ChunkId(move.inode, 0)
        try:
            info = store.stat(chunk)
        except DAMAGE as exc:
            log.warning("block %d is lost: %s", move.inode, exc)
            return Outcome.LOST
        if (info.length, info.crc32c) != (move.size, move.crc32c) or not info.is_sealed:
            return Outcome.LOST
        new = m.WholeChunk(*chunk, info.length, info.crc32c, info.key)
        request = m.WriteChunks(move.target_id, (new,))
        error = self._send(store, info, move.target_id, request)
        if isinstance(error, ChunkCorrupt):
            # On the way, or on the disk?
            try:
                store.recheck(chunk)
            except DAMAGE as exc:
                log.warning("block %d is lost: %s", move.inode, exc)
                return Outcome.LOST
            return Outcome.LATER
        return _outcome(move, error)

    def _move_file(self, store: ChunkStore, move: Move, ticket: int) -> Outcome:
        infos = self._sealed(store, move)
        if infos is None:
            return Outcome.LATER
        for start, end, page in _pages(infos, move.end):
            held = tuple(m.HeldChunk(i.number, i.length, i.crc32c) for i in page)
            request = m.CompareMoved(
                move.target_id,
                store.target_id,
                ticket,
                move.inode,
                move.width,
                move.places,
                start,
                end,
                held,
            )
            wanted: m.Wanted = self._peers.call(move.target_id, request, seconds=SYNC_CALL_SECONDS)
            for index in wanted.places:
                error = self._place(store, move, ticket, page[index])
                if error is not None:
                    return _outcome(move, error)
        # Nobody has had it open meanwhile, or the end does not count; but a client that was given
        # up may write all the same, and must not from the last look on.
        if not store.leaving.hold(move.inode):
            return Outcome.LATER
        outcome = Outcome.LATER
        try:
            if self._sealed(store, move) == infos:
                outcome = Outcome.DONE
        finally:
            if outcome is not Outcome.DONE:
                store.leaving.decide(move.inode, left=False)
        return outcome

    def _sealed(self, store: ChunkStore, move: Move) -> list[ChunkInfo] | None:
        """The chunks of a file that are to move, in order; None if somebody has one open."""
        found: list[ChunkInfo] = []
        for chunk in sorted(store.list_directory(directory_of(move.inode))):
            if chunk.inode != move.inode or chunk.number >= move.end:
                continue
            if chunk.number % move.width in move.places:
                info = store.seal(chunk)
                if not info.is_sealed:
                    return None
                found.append(info)
        return found

    def _place(
        self, store: ChunkStore, move: Move, ticket: int, info: ChunkInfo
    ) -> KvfsError | None:
        if self._stopping.is_set():
            return Conflict(detail="the server is stopping")
        new = m.WholeChunk(*info.chunk, info.length, info.crc32c, b"")
        request = m.PlaceMoved(move.target_id, store.target_id, ticket, new, info.durable)
        error = self._send(store, info, move.target_id, request)
        if isinstance(error, ChunkCorrupt):
            store.recheck(info.chunk)  # tells whose fault it is
        return error

    def _send(
        self,
        store: ChunkStore,
        info: ChunkInfo,
        target_id: int,
        request: m.WriteChunks | m.PlaceMoved,
    ) -> KvfsError | None:
        """What the other target said was wrong; it checks the bytes. Raises Unreached."""
        file, _ = store.open(info.chunk, direct=True)
        with (
            contextlib.closing(file),
            contextlib.closing(Relay(self._peers, target_id, request, info.length, 0)) as relay,
            self._buffers.lend(SYNC_CALL_SECONDS) as buffer,
        ):
            for offset in range(0, info.length, len(buffer)):
                piece = buffer[: min(len(buffer), info.length - offset)]
                with store.io(info.chunk):
                    file.preadv([buffer[: round_up(len(piece))]], offset)
                relay.send(piece)
            try:
                outcomes: m.Outcomes = relay.finish()
            except KvfsError as exc:
                return exc
        error = outcomes.error(0)
        if error is None:
            self._counters.add(chunks_moved=1, moved_bytes=info.length)
            if self._rate:
                with self._turn:
                    self._stopping.wait(info.length / self._rate)
        return error


def _outcome(move: Move, error: KvfsError | None) -> Outcome:
    if error is None:
        return Outcome.DONE
    log.info("inode %d is not moved to target %d: %s", move.inode, move.target_id, error)
    return Outcome.FAILED if isinstance(error, DiskFull | TargetFailed) else Outcome.LATER


def _pages(infos: Sequence[ChunkInfo], end: int) -> Iterator[tuple[int, int, Sequence[ChunkInfo]]]:
    """Chunks in pages, with the numbers that each covers: all up to ``end`` together."""
    start = 0
    for first in range(0, max(1, len(infos)), SYNC_PAGE_CHUNKS):
        page = infos[first : first + SYNC_PAGE_CHUNKS]
        is_last = first + SYNC_PAGE_CHUNKS >= len(infos)
        stop = end if is_last else page[-1].number + 1
        yield start, stop, page
        start = stop


__all__ = ["Mover"]
