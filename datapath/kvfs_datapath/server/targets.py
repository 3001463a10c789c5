"""The targets of one server: finding a store by its number, and sealing what writers left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvfs_base import threads
from kvfs_base.errors import KvfsError, NoTarget
from kvfs_base.limits import TARGET_LEASE_SECONDS
from kvfs_base.types import ChunkId
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.limits import UNSEALED_CHUNKS_MAX
from kvfs_datapath.server import incarnations


class Targets:
    def __init__(
        self, stores: Sequence[ChunkStore], host_id: str = "", draw: Callable[[], int] = lambda: 1
    ) -> None:
        """``draw`` answers another number each time."""
        self.stores = tuple(stores)
        self._host_id = host_id
        self._incarnations = {s: incarnations.begin(s, host_id, draw) for s in self.stores}
        self._unsettled: dict[tuple[ChunkStore, ChunkId], None] = {}
        self._lock = threads.lock()
        self._numbered = threads.condition()
        self._unnumbered = {store for store in self.stores if not store.target_id}
        """New ones, of which the metadata service has not said anything yet."""

    def incarnation(self, store: ChunkStore) -> int:
        return self._incarnations[store]

    def find(self, target_id: int) -> ChunkStore:
        """Raises NoTarget. A client may hear of a new target before this server hears what its
        number is: the answer to the first heartbeat is waited for, as long as the target counts as
        one that serves."""
        found = self._find(target_id)
        if found is None:
            with self._numbered:
                self._numbered.wait_for(
                    lambda: self._find(target_id) or not self._unnumbered, TARGET_LEASE_SECONDS
                )
            found = self._find(target_id)
        if found is None:
            raise NoTarget(detail=f"target {target_id} is not on this server")
        return found

    def _find(self, target_id: int) -> ChunkStore | None:
        for store in self.stores:
            if store.target_id == target_id and target_id:
                return store
        return None

    def number(self, store: ChunkStore, target_id: int) -> None:
        """The metadata service's name for a target; 0 for one that it does not want."""
        store.set_target_id(target_id)
        if self._unnumbered:
            with self._numbered:
                self._unnumbered.discard(store)
                self._numbered.notify_all()

    def settle(self, store: ChunkStore, chunk: ChunkId) -> None:
        """Seals a chunk whose writer has gone. If another one is still there, which may be the
        dying process itself (the kernel closes its descriptors one by one), ``retry`` tries
        again."""
        try:
            sealed = store.seal(chunk).is_sealed
        except KvfsError:
            sealed = True  # removed meanwhile, or nothing that trying again would change
        with self._lock:
            self._unsettled.pop((store, chunk), None)
            if not sealed:
                self._unsettled[store, chunk] = None
                while len(self._unsettled) > UNSEALED_CHUNKS_MAX:
                    # It stays open, which is allowed: its next writer or reader seals it.
                    del self._unsettled[next(iter(self._unsettled))]

    def retry(self) -> None:
        with self._lock:
            waiting = list(self._unsettled)
        for store, chunk in waiting:
            self.settle(store, chunk)

    def close(self) -> None:
        for store in self.stores:
            incarnations.end(store, self._host_id, self._incarnations[store])
            store.close()
