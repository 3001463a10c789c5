"""A chain's last serving member brings the first of those that are syncing in step.

One comparison after the other goes through the chunks of a chain in their order; several chains
have theirs at the same time, each in a thread that has one chunk on its way. Writes go on meanwhile
and pass the other one, so only what was there before has to be compared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from kvfs_base import threads
from kvfs_base.cluster import Synced
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ConnectionLost,
    KvfsError,
    ServerBusy,
)
from kvfs_base.limits import SYNCED_MAX
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.chains.peers import Peers, Relay, Unreached
from kvfs_datapath.chains.repair import Repairer
from kvfs_datapath.chains.replication import Replicator, Unresolved
from kvfs_datapath.chains.views import Place, Views, require_version
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.listing import ChunkListing
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import (
    CHUNK_LOCK_SECONDS,
    PASS_SECONDS,
    READ_ATTEMPTS,
    SYNC_CALL_SECONDS,
    SYNC_PAGE_CHUNKS,
    SYNC_RETRY_SECONDS,
    SYNC_THREADS,
)

log = logging.getLogger(__name__)

_Job = tuple[ChunkStore, Place]
_Send = Callable[[ChunkStore, Place, ChunkId], int]


class SyncSource:
    """``bytes_per_second`` bounds what all threads send together; 0 for no bound."""

    def __init__(
        self,
        stores: Sequence[ChunkStore],
        views: Views,
        peers: Peers,
        replicator: Replicator,
        *,
        repairer: Repairer,
        buffers: BufferPool,
        counters: Counters,
        bytes_per_second: int,
    ) -> None:
        self._stores = stores
        self._views = views
        self._peers = peers
        self._replicator = replicator
        self._repairer = repairer
        self._buffers = buffers
        self._counters = counters
        self._rate = bytes_per_second
        self._turn = threads.lock()
        self._stopping = threads.event()
        self._work = threads.condition()
        self._running: set[tuple[str, int]] = set()
        self._failed: set[tuple[str, int, int]] = set()
        self._done: dict[tuple[str, int], Synced] = {}
        self._threads = [
            threads.thread(self._run, name=f"kvfs-sync-{n}") for n in range(SYNC_THREADS)
        ]
        views.on_change(self._look_again)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._look_again()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def synced(self) -> tuple[Synced, ...]:
        """What is in step, while the version under which it came to be is the present one."""
        with self._work:
            for key, synced in list(self._done.items()):
                chain = self._views.chain(synced.chain_id)
                if chain is None or chain.version != synced.version:
                    del self._done[key]
            return tuple(self._done.values())[:SYNCED_MAX]

    def _look_again(self) -> None:
        with self._work:
            self._work.notify_all()

    # --- jobs

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                job = self._take()
                if job is not None:
                    self._try(*job)
        except Exception:
            log.exception("a thread that brings others in step failed")

    def _take(self) -> _Job | None:
        """The next one, or None after a while without any."""
        with self._work:
            for store in self._stores:
                for place in self._views.places(store.target_id):
                    key = (store.uuid, place.chain.chain_id)
                    done = self._done.get(key)
                    if (
                        place.is_source
                        and key not in self._running
                        and (*key, place.chain.version) not in self._failed
                        and (done is None or done.version != place.chain.version)
                    ):
                        self._running.add(key)
                        return store, place
            self._work.wait(SYNC_RETRY_SECONDS if self._failed else None)
            self._failed.clear()
            return None

    def _try(self, store: ChunkStore, place: Place) -> None:
        key = (store.uuid, place.chain.chain_id)
        synced = False
        try:
            self._bring_in_step(store, place)
            synced = True
        except (Unreached, Unresolved, KvfsError) as exc:
            log.info("chain %d is not in step: %s", place.chain.chain_id, exc)
        finally:
            with self._work:
                self._running.discard(key)
                if synced:
                    self._done[key] = Synced(
                        place.chain.chain_id, place.chain.version, place.chain.syncing[0]
                    )
                else:
                    self._failed.add((*key, place.chain.version))

    # --- one comparison

    def _bring_in_step(self, store: ChunkStore, place: Place) -> None:
        """Raises Unreached, Unresolved, and StaleChain as soon as the chain has changed."""
        sink, *rest = place.hops
        passing = place.passing(tuple(rest))
        if not self._views.wait_quiet(place, 2 * PASS_SECONDS):
            raise ServerBusy(detail=f"chain {place.chain.chain_id} is being written")
        self._peers.call(sink, m.SyncChain(sink, passing), seconds=SYNC_CALL_SECONDS)
        start = m.ChunkRef(0, 0, place.chain.chain_id)
        listing = ChunkListing(store, start.chunk)
        while True:
            page = listing.page(SYNC_PAGE_CHUNKS)
            held = self._held(store, place, page)
            request = m.CompareChunks(sink, passing, start, page.next, held)
            wanted: m.Wanted = self._peers.call(sink, request, seconds=SYNC_CALL_SECONDS)
            for index in wanted.places:
                if index < len(held):
                    self._require_present(store, place)
                    self._send(store, place, held[index])
            if page.next is None:
                return
            start = page.next

    def _require_present(self, store: ChunkStore, place: Place) -> None:
        if self._stopping.is_set():
            raise ServerBusy(detail="the server is stopping")
        require_version(self._views.place(store, place.chain.chain_id), place)

    def _held(self, store: ChunkStore, place: Place, page: m.ChunkPage) -> tuple[m.Held, ...]:
        """What to compare with. A chunk that cannot be used must not be left out, for then the
        other one, which may have it, would remove it. Raises as ``_mended``."""
        held = []
        for listed in page.chunks:
            info = listed.info
            if info is None:
                with contextlib.suppress(ChunkNotFound):  # removed meanwhile
                    info = self._mended(store, place, listed.chunk)
            if info is not None:
                numbers = (info.length, info.crc32c, info.version)
                held.append(m.Held(*info.chunk[:2], *numbers, info.is_damaged))
        return tuple(held)

    def _mended(self, store: ChunkStore, place: Place, chunk: ChunkId) -> ChunkInfo:
        """A damaged chunk, whole again from whoever has it, or recorded as damaged: then the other
        one is to know that as well. Raises what is wrong while that is not settled, ChunkNotFound,
        Unreached."""
        try:
            return self._repairer.repair(store, chunk)
        except (ChunkCorrupt, ChunkMismatch):
            info = store.versions.committed(chunk)
            if info is None or not info.is_damaged:
                raise
        return self._repairer.heal(store, place, place.hops[0], chunk)

    def _send(self, store: ChunkStore, place: Place, held: m.Held) -> None:
        chunk = ChunkId(held.inode, held.number, place.chain.chain_id)
        send = self._send_file if held.version else self._send_block
        try:
            sent = self._send_mended(send, store, place, chunk)
        except ChunkNotFound:
            return  # removed meanwhile: the other one has the order, too
        except ChunkCorrupt:
            if held.version:
                raise  # the other one must not serve without it, nor without knowing
            return  # whoever reads the block finds out
        self._counters.add(chunks_synced=1, synced_bytes=sent)
        if self._rate:
            with self._turn:
                self._stopping.wait(sent / self._rate)

    def _send_mended(self, send: _Send, store: ChunkStore, place: Place, chunk: ChunkId) -> int:
        """What is damaged is mended first; it may also be the way to the other one that is to
        blame. Raises as ``_mended``, Unreached."""
        for _ in range(READ_ATTEMPTS):
            try:
                return send(store, place, chunk)
            except ChunkCorrupt as exc:
                log.info("chunk %s is damaged: %s", tuple(chunk), exc)
                self._mended(store, place, chunk)
        raise Unreached(place.hops[0], ConnectionLost(detail="bytes change on their way"))

    def _send_file(self, store: ChunkStore, place: Place, chunk: ChunkId) -> int:
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(store, chunk.chain, lambda now: require_version(now, place)),
        ):
            self._replicator.settle(store, place, chunk)
            info = store.versions.committed(chunk)
            if info is None:
                raise ChunkNotFound(*chunk)
            if info.is_damaged:
                self._send_committed(place, info, memoryview(b""))
                return 0
            with self._buffers.lend(SYNC_CALL_SECONDS) as buffer:
                data = buffer[: info.length]
                file, _ = store.open(chunk)
                with contextlib.closing(file):
                    count = file.preadv([data], 0)
                found = crc32c(data[:count])
                if found != info.crc32c:
                    raise ChunkCorrupt(*chunk, expected_crc32c=info.crc32c, found_crc32c=found)
                self._send_committed(place, info, data)
            return info.length

    def _send_committed(self, place: Place, info: ChunkInfo, data: memoryview) -> None:
        if not self._replicator.send_committed(place, info, data):
            raise ChunkMismatch(*info.chunk, detail="the other one wants another")

    def _send_block(self, store: ChunkStore, place: Place, chunk: ChunkId) -> int:
        """The other one checks it. Raises ChunkCorrupt."""
        sink = place.hops[0]
        file, info = store.open(chunk, direct=True)
        new = m.WholeChunk(*chunk, info.length, info.crc32c, info.key)
        request = m.WriteChunks(sink, (new,), place.passing(()))
        with (
            contextlib.closing(file),
            contextlib.closing(Relay(self._peers, sink, request, info.length, 0)) as relay,
        ):
            with self._buffers.lend(SYNC_CALL_SECONDS) as buffer:
                for offset in range(0, info.length, len(buffer)):
                    piece = buffer[: min(len(buffer), info.length - offset)]
                    file.preadv([buffer[: round_up(len(piece))]], offset)
                    relay.send(piece)
            outcomes: m.Outcomes = relay.finish()
        error = outcomes.error(0)
        if error is not None:
            raise error
        return info.length
