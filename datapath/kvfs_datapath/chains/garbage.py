"""Chunks that nothing refers to any more, found from their own side.

Removals are ordered; what slips through (docs/design/0004-chains.md) stays until somebody asks for
it. This thread does, slowly: it lists what each target has and asks the metadata service which of
it is unwanted. What was so in two rounds, one after the other, is removed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator, Sequence

from kvfs_base import threads
from kvfs_base.cluster import FindUnwanted
from kvfs_base.counters import Counters
from kvfs_base.errors import KvfsError
from kvfs_base.limits import TARGET_LEASE_SECONDS, UNWANTED_INODES_MAX
from kvfs_base.rpc import BlockingRpcClient
from kvfs_base.seams import Env
from kvfs_base.types import Address, ChunkId
from kvfs_datapath.chains.views import Views
from kvfs_datapath.chunks.listing import ChunkListing
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.limits import (
    CHUNK_LOCK_SECONDS,
    GARBAGE_PAUSE_SECONDS,
    UNWANTED_REMEMBERED_MAX,
)

log = logging.getLogger(__name__)

_Unwanted = tuple[str, int, int]
"""Target, chain and inode."""


class GarbageCollector:
    """``seconds`` lie between two rounds."""

    def __init__(
        self,
        env: Env,
        stores: Sequence[ChunkStore],
        views: Views,
        counters: Counters,
        *,
        metadata: Sequence[Address],
        seconds: float,
    ) -> None:
        self._stores = stores
        self._views = views
        self._counters = counters
        self._seconds = seconds
        self._rpc = BlockingRpcClient(env.blocking_network, metadata)
        self._stopping = threads.event()
        self._thread = threads.thread(self._run, name="kvfs-garbage")
        self._removing = threads.lock()
        self._before: frozenset[_Unwanted] = frozenset()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the thread has ended: at most a call's deadline."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait_past(self) -> None:
        """What this thread decides after this call it decides by the chains as they are known
        now."""
        with self._removing:
            pass

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._seconds):
                self._round()
        except Exception:
            log.exception("the garbage collector failed")
        finally:
            self._rpc.close()

    def _round(self) -> None:
        found: set[_Unwanted] = set()
        for store in self._stores:
            try:
                for chain in (0, *store.chains()):
                    found.update(self._look_through(store, chain))
                    self._drop_pending(store, chain)
            except KvfsError as exc:
                log.info("target %d was not looked through: %s", store.target_id, exc)
        self._before = frozenset(itertools.islice(sorted(found), UNWANTED_REMEMBERED_MAX))

    def _look_through(self, store: ChunkStore, chain: int) -> Iterator[_Unwanted]:
        """What is unwanted of a chain and was not so the last time, or could not be removed."""
        listing = ChunkListing(store, ChunkId(0, 0, chain))
        names = listing.names(ChunkId(0, 0, chain), None)
        inodes = (inode for inode, _ in itertools.groupby(names, key=lambda c: c.inode))
        while page := list(itertools.islice(inodes, UNWANTED_INODES_MAX)):
            if self._stopping.wait(GARBAGE_PAUSE_SECONDS) or not store.target_id:
                return
            version = self._version(chain)
            came = store.incoming.watch()
            request = FindUnwanted(store.target_id, chain, tuple(page))
            for index in self._rpc.call(request, TARGET_LEASE_SECONDS):
                if index >= len(page):
                    continue
                inode = page[index]
                known = (store.uuid, chain, inode) in self._before
                if not (known and self._remove(store, chain, inode, version, came)):
                    yield store.uuid, chain, inode

    def _drop_pending(self, store: ChunkStore, chain_id: int) -> None:
        """Of a chain that the target has left. It has no chunk's name, so nobody can be asked."""
        version = self._version(chain_id)
        if not self._views.has_left(store, chain_id):
            return
        for chunk in list(store.versions.pendings(chain_id)):
            with self._removing, store.versions.lock(chunk, CHUNK_LOCK_SECONDS):
                if self._version(chain_id) == version:
                    store.versions.drop(chunk)

    def _version(self, chain_id: int) -> int:
        chain = self._views.chain(chain_id)
        return 0 if chain is None else chain.version

    def _remove(
        self,
        store: ChunkStore,
        chain: int,
        inode: int,
        version: int,
        came: Collection[int] = (),
    ) -> bool:
        """Unless the target may have come (back) into the chain since the question was asked: then
        it has what others sent it, or were told that it has. What has one copy may have come as
        well (``came``): it may have been here before, and moved here again."""
        with self._removing:
            if self._version(chain) != version:
                return False
            listing = ChunkListing(store, ChunkId(inode, 0, chain))
            for chunk in listing.names(ChunkId(inode, 0, chain), ChunkId(inode + 1, 0, chain)):
                if chain:
                    with store.versions.lock(chunk, CHUNK_LOCK_SECONDS):
                        removed = store.remove(chunk)
                else:
                    removed = store.remove(chunk, unless=came)
                self._counters.add(chunks_removed=int(removed), garbage_removed=int(removed))
        return True
