"""The thread that finishes what connections had to leave: updates that stayed pending.

It is woken by every new map, and by whoever leaves something or gets no answer. It also asks
members that did not answer whether they are there again: only then is it known that they are not
for SUSPECT_SECONDS.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvfs_base import threads
from kvfs_base.errors import ChunkCorrupt, ChunkMismatch, Conflict, DiskFull, KvfsError
from kvfs_base.seams import Env
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chains.peers import Peers, Unreached
from kvfs_datapath.chains.repair import Repairer
from kvfs_datapath.chains.replication import Replicator, Unresolved
from kvfs_datapath.chains.views import Views
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.limits import RESOLVE_FULL_SECONDS, RESOLVE_SECONDS

log = logging.getLogger(__name__)


class Maintenance:
    def __init__(
        self,
        env: Env,
        stores: Sequence[ChunkStore],
        views: Views,
        peers: Peers,
        replicator: Replicator,
        *,
        repairer: Repairer,
    ) -> None:
        self._env = env
        self._stores = stores
        self._views = views
        self._peers = peers
        self._replicator = replicator
        self._repairer = repairer
        self._stopping = False
        self._wake = threads.event()
        self._searched: set[tuple[str, int]] = set()
        self._full: dict[tuple[ChunkStore, ChunkId], float] = {}
        """Since when they cannot be committed here."""
        self._thread = threads.thread(self._run, name="kvfs-chains")
        views.on_change(self._wake.set)
        replicator.wake = self._wake.set
        peers.reach.wake = self._wake.set

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                busy = self._replicator.unresolved() or self._peers.reach.doubtful()
                self._wake.wait(RESOLVE_SECONDS if busy else None)
                self._wake.clear()
                self._search()
                self._resolve()
                self._probe()
        except Exception:
            log.exception("the thread of the chains failed")

    def _search(self) -> None:
        """Once for each chain: what this server left on its disks when it ended. A member that is
        not serving will forget it."""
        for store in self._stores:
            for place in self._views.places(store.target_id):
                key = (store.uuid, place.chain.chain_id)
                if place.serving and key not in self._searched and not self._stopping:
                    try:
                        self._replicator.find_pendings(store, key[1])
                        self._searched.add(key)
                    except KvfsError as exc:
                        log.info("target %d: %s", store.target_id, exc)

    def _resolve(self) -> None:
        """Whoever does not answer is asked once in a round."""
        silent: set[int] = set()
        unresolved = self._replicator.unresolved()
        for key in [key for key in self._full if key not in unresolved]:
            del self._full[key]
        for store, chunk in unresolved:
            if self._stopping:
                return
            following = self._following(store, chunk.chain)
            if following in silent:
                continue
            try:
                self._replicator.resolve(store, chunk)
            except Unresolved as exc:
                if isinstance(exc.__cause__, DiskFull):
                    self._note_full(store, chunk)
                if isinstance(exc.__cause__, Unreached):
                    silent.add(exc.__cause__.target_id)
            except Conflict:
                pass  # somebody is at it
            except (ChunkCorrupt, ChunkMismatch):
                self._repair(store, chunk)
            except KvfsError as exc:
                log.info("chunk %s stays pending: %s", tuple(chunk), exc)

    def _repair(self, store: ChunkStore, chunk: ChunkId) -> None:
        """A chunk that is so damaged that nobody can tell what is pending of it. Readers are told
        that something is, so none of them reports the damage."""
        try:
            self._repairer.repair(store, chunk)
        except KvfsError as exc:
            log.info("chunk %s stays pending: %s", tuple(chunk), exc)

    def _note_full(self, store: ChunkStore, chunk: ChunkId) -> None:
        """A target that has no room to commit what others have committed leaves its chains, if
        somebody else is there: it is brought in step once it has room."""
        now = self._env.clock.monotonic()
        since = self._full.setdefault((store, chunk), now)
        chain = self._views.chain(chunk.chain)
        if now - since >= RESOLVE_FULL_SECONDS and chain is not None and len(chain.targets) > 1:
            log.error("target %d is full, and leaves its chains", store.target_id)
            self._full.clear()
            self._views.renounce(store.uuid)

    def _following(self, store: ChunkStore, chain_id: int) -> int | None:
        for place in self._views.places(store.target_id):
            if place.chain.chain_id == chain_id:
                return place.hops[0] if place.hops else None
        return None

    def _probe(self) -> None:
        members: set[int] = set()
        for store in self._stores:
            for place in self._views.places(store.target_id):
                members.update(place.chain.members)
        self._peers.reach.keep(members)
        for target_id in self._peers.reach.doubtful():
            if self._stopping:
                return
            try:
                self._peers.call(target_id, m.StatChunks(target_id, (m.ChunkRef(0, 0, 0),)))
            except (Unreached, KvfsError) as exc:
                log.debug("target %d: %s", target_id, exc)
