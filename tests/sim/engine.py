"""The metadata store: in memory, with what a disk would have of it after the power is gone.

As LMDB does it (``engines/lmdb_engine.py``): with ``strict`` every commit is durable
before it returns; with ``cache`` a killed process loses nothing, and a machine that lost its power
goes back to the last sync, which is noted in the store. Engines of one store that is ``shared``
take turns, as servers on one PostgreSQL do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvfs_base.errors import StoreUnavailable
from kvfs_metadata import records
from kvfs_metadata.engines.engine import (
    Group,
    KVEngine,
    KVRead,
    KVTransaction,
    Listener,
    Writes,
    run_group,
)
from kvfs_metadata.engines.memory_engine import _State
from sim.hub import Hub, Process
from sim.sim_threads import SimLock

T = TypeVar("T")

SYNC_SECONDS = 0.004


class SimStore:
    """What outlives processes."""

    def __init__(self, hub: Hub, *, shared: bool, strict: bool) -> None:
        self.hub = hub
        self.shared = shared
        self.strict = strict
        self.state = _State()
        self.lock = SimLock(hub)
        self.holder: SimEngine | None = None
        self.log: list[tuple[SimEngine, Writes]] = []
        self._durable: dict[bytes, bytes] = {}
        self.watch: Callable[[KVRead, Writes], None] = lambda before, writes: None
        """Called before each commit with what it changes."""

    def sync(self) -> None:
        self._durable = dict(self.state.values)

    def lose_power(self) -> bool:
        """Whether anything was lost. Nobody may be at work on it."""
        if self.strict or self._durable == self.state.values:
            return False
        self.state = _State()
        self.state.apply(dict(self._durable))
        if self._durable:
            self.state.apply({records.WENT_BACK_KEY: b""})
        self.sync()
        return True


class SimEngine(KVEngine):
    """One process's way to the store. Does nothing once the process is dead."""

    def __init__(self, store: SimStore, process: Process) -> None:
        self._store = store
        self._process = process
        self.shared = store.shared
        self._seen = len(store.log)
        self._listener: Listener | None = None
        process.at_death.append(self._give_up_turn)

    def _require_alive(self) -> None:
        if not self._process.alive:
            raise StoreUnavailable(detail="the process is dead")

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        self._seen = len(self._store.log)

    def _catch_up(self) -> None:
        missed = self._store.log[self._seen :]
        self._seen = len(self._store.log)
        if self._listener is not None:
            for author, writes in missed:
                if author is not self:
                    self._listener(self._store.state, writes)

    def view(self, fn: Callable[[KVRead], T]) -> T:
        self._require_alive()
        self._catch_up()
        return fn(self._store.state)

    def run(self, fns: Sequence[Callable[[KVTransaction], T]]) -> Group[T]:
        self._require_alive()
        if self.shared:
            self._store.lock.acquire()
            self._store.holder = self
            self._require_alive()
        try:
            self._catch_up()
            return run_group(self._store.state, fns)
        except BaseException:
            self._give_up_turn()
            raise

    def _give_up_turn(self) -> None:
        if self._store.holder is self:
            self._store.holder = None
            self._store.lock.release()

    def commit(self, group: Group[T]) -> None:
        self._require_alive()
        store = self._store
        if store.strict or store.shared:
            # These wait for a disk or a database, in a thread of their own.
            store.hub.sleep(SYNC_SECONDS * store.hub.rng.random())
            self._require_alive()
        store.watch(store.state, group.writes)
        store.state.apply(group.writes)
        if store.shared and group.writes:
            store.log.append((self, group.writes))
        self._give_up_turn()

    def abandon(self, group: Group[T]) -> None:
        self._give_up_turn()

    def sync(self) -> None:
        self._require_alive()
        store = self._store
        found = dict(store.state.values)
        store.hub.sleep(SYNC_SECONDS * store.hub.rng.random())
        self._require_alive()
        store._durable = found

    def copy_to(self, path: str) -> None:
        raise NotImplementedError("backups are not simulated")

    def close(self) -> None:
        self._give_up_turn()
