"""The metadata service: RpcServer in front of MetadataCore, turns, background work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from kvfs_base.errors import DiskFull, KvfsError
from kvfs_base.limits import HEARTBEAT_SECONDS
from kvfs_base.rpc import Later, RpcServer
from kvfs_base.seams import Env
from kvfs_base.types import Address
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.core import MetadataCore, Operation
from kvfs_metadata.engines.engine import KVEngine
from kvfs_metadata.engines.stores import open_store
from kvfs_metadata.leases import Revocation
from kvfs_metadata.limits import (
    DRAIN_PAUSE,
    EVICT_SECONDS,
    LAST_USE_SECONDS,
    SERVER_BEAT_SECONDS,
    SYNC_SECONDS,
    WRITE_GROUP_REQUESTS,
)
from kvfs_metadata.lock_waiters import LockWaiters
from kvfs_metadata.messages import AwaitLock, Done, MetadataRequest, Sync, Watch
from kvfs_metadata.turns import CacheTurns, SharedTurns, StrictTurns, Turns, update
from kvfs_metadata.watching import CHANGES, Watching

log = logging.getLogger(__name__)

SERVER_NUMBER_BYTES = 16
NO_TRANSACTIONS: frozenset[type] = frozenset({Sync, AwaitLock})


class MetadataService:
    """Serves one engine, which stays the caller's to close."""

    def __init__(self, env: Env, config: MetadataConfig, engine: KVEngine) -> None:
        self._env = env
        self._config = config
        self._shared = engine.shared
        self._strict = config.durability == "strict"
        server = env.rng.randbytes(SERVER_NUMBER_BYTES)
        self.core = MetadataCore(engine, env.clock, config, server=server)
        kind = SharedTurns if self._shared else StrictTurns if self._strict else CacheTurns
        self._turns: Turns = kind(self.core, self._committed)
        self._lock_waiters = LockWaiters(self.core.locks, self._turns, shared=self._shared)
        self._watching = Watching(env.clock, self.core, self._turns)
        self._evict_wanted = trio.Event()
        self._blocks_size = 0
        self._unsynced = False
        self._sync_lock = trio.Lock()
        self._syncs_begun = 0
        self._sync_failed = False
        self._stood_still = 0.0
        """Seconds that are to be given back to everybody whose time they were."""
        self._heard: set[int] = set()
        self._gone: set[int] = set()

    async def serve(
        self, *, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Runs until cancelled; reports the bound addresses."""
        server = RpcServer(self._env.network, MetadataRequest, self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._turns.run)
                if not self._strict:
                    nursery.start_soon(self._sync_now_and_then)
                if self._shared:
                    nursery.start_soon(self._beat)
                for work in (
                    self._evict,
                    self._watch_disks,
                    self._expire,
                    self._record_uses,
                    self._drain,
                ):
                    nursery.start_soon(work)
                addresses = [await nursery.start(server.serve, self._config.unix)]
                if self._config.tcp is not None:
                    addresses.append(await nursery.start(server.serve, self._config.tcp))
                task_status.started(addresses)
        finally:
            self._record_all_uses()

    # --- requests (RpcServer's Handler)

    def connected(self, session_id: int) -> None:
        pass

    def disconnected(self, session_id: int, *, by_peer: bool) -> None:
        self._watching.disconnected(session_id, by_peer=by_peer)
        if self._shared:
            self._gone.add(session_id)  # a thread may be at work on the sessions
        else:
            self.core.disconnected(session_id)

    async def handle(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        self._heard.add(session_id)
        if Watch in map(type, requests):
            return await self._answer_watcher(session_id, requests)
        return await self._answer(session_id, requests)

    async def _answer_watcher(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        """Watches come first: what else arrived with one was asked by a watcher."""
        watches = [place for place, request in enumerate(requests) if type(request) is Watch]
        late = {place: await self._watching.hear(session_id, requests[place]) for place in watches}
        rest = [request for place, request in enumerate(requests) if place not in late]
        answers = iter(await self._answer(session_id, rest) if rest else ())
        return [late[place] if place in late else next(answers) for place in range(len(requests))]

    async def _answer(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        if self.core.only_reads(requests):
            return await self._turns.read(session_id, requests)
        results: list[Any] = []
        revocations: list[Revocation] = []
        for start in range(0, len(requests), WRITE_GROUP_REQUESTS):
            batch = requests[start : start + WRITE_GROUP_REQUESTS]
            operations = [self.core.operation(session_id, request) for request in batch]
            part, revocation = await self._turns.change(session_id, operations)
            results += part
            if revocation is not None:
                revocations.append(revocation)
        if not NO_TRANSACTIONS.isdisjoint(map(type, requests)):
            await self._answer_special(session_id, requests, results)
        if revocations and not CHANGES.isdisjoint(map(type, requests)):
            return await self._watching.hold(session_id, results, revocations)
        return results

    async def _answer_special(
        self, session_id: int, requests: Sequence[Any], results: list[Any]
    ) -> None:
        """What is no transaction."""
        synced: Done | KvfsError | None = None
        for place, request in enumerate(requests):
            if isinstance(request, AwaitLock):
                results[place] = Later(partial(self._lock_waiters.wait, session_id, request))
            elif isinstance(request, Sync):
                synced = synced or await self._answer_sync()
                results[place] = synced

    async def _answer_sync(self) -> Done | KvfsError:
        try:
            await self._sync()
        except KvfsError as exc:
            return exc
        return Done()

    # --- syncing

    async def _sync(self) -> None:
        """Returns once everything acknowledged so far is on stable storage."""
        if self._strict:
            return
        begun = self._syncs_begun
        async with self._sync_lock:
            if self._syncs_begun > begun and not self._sync_failed:
                return  # one that began after this was asked for has ended well
            self._syncs_begun += 1
            self._sync_failed = True
            self._unsynced = False
            if self._shared:
                await self._turns.ask(self.core.sync)
            else:
                await trio.to_thread.run_sync(self.core.sync)
            self._sync_failed = False

    async def _sync_now_and_then(self) -> None:
        while True:
            await trio.sleep(SYNC_SECONDS)
            if not self._unsynced:
                continue
            try:
                await self._sync()
            except KvfsError as exc:
                self._unsynced = True
                if isinstance(exc, DiskFull) or exc.temporary:
                    log.warning("metadata is not synced yet: %s", exc)
                    continue
                # The engine refuses every further write itself; reads go on.
                log.error("metadata cannot be synced: %s", exc)
                return

    # --- background work

    def _committed(self) -> None:
        self._unsynced = True
        self._lock_waiters.look()
        # The whole question costs 20 us. Files may grow too: _watch_disks asks every second.
        size = self.core.blocks_size()
        if size > self._blocks_size and (self._shared or self.core.excess_bytes() > 0):
            self._evict_wanted.set()
        self._blocks_size = size

    async def _evict(self) -> None:
        while True:
            await self._evict_wanted.wait()
            self._evict_wanted = trio.Event()
            try:
                left = await self._turns.ask(self.core.excess_bytes)
            except KvfsError as exc:
                _log_failures([exc])
                continue
            while left > 0:
                freed = (await self._turns.write([self.core.eviction(left)]))[0]
                if isinstance(freed, KvfsError) or freed == 0:
                    break
                left -= freed
                # Requests come first: eviction keeps pace with them, it does not race them.
                await trio.lowlevel.checkpoint()

    async def _watch_disks(self) -> None:
        while True:
            await trio.sleep(EVICT_SECONDS)
            self._evict_wanted.set()

    async def _expire(self) -> None:
        clock = self._env.clock
        while True:
            begun = clock.monotonic()
            await trio.sleep(HEARTBEAT_SECONDS)
            stood_still = clock.monotonic() - begun - HEARTBEAT_SECONDS
            if stood_still > HEARTBEAT_SECONDS:
                self._stood_still += stood_still
            try:
                operations = await self._turns.ask(self._due)
            except KvfsError as exc:
                _log_failures([exc])
                continue
            if operations:
                _log_failures(await self._turns.write(operations))

    async def _drain(self) -> None:
        """Empties targets that are to leave."""
        pause = HEARTBEAT_SECONDS
        while True:
            await trio.sleep(pause)
            begun = trio.current_time()
            more = await self._ask_departures()
            while more:
                more = (await self._turns.write([self.core.drain]))[0]
                if isinstance(more, KvfsError):
                    _log_failures([more])
                    break
                # Requests come first, as with evictions.
                await trio.lowlevel.checkpoint()
            pause = max(HEARTBEAT_SECONDS, DRAIN_PAUSE * (trio.current_time() - begun))

    async def _ask_departures(self) -> bool:
        try:
            return await self._turns.ask(self.core.has_departures)
        except KvfsError as exc:
            _log_failures([exc])
            return False

    def _due(self) -> list[Operation]:
        heard, self._heard = self._heard, set()
        gone, self._gone = self._gone, set()
        for connection in heard - gone:
            self.core.sessions.heard(connection)
        for connection in gone:
            self.core.disconnected(connection)
        if self._shared:
            self.core.catch_up()
        if self._stood_still:
            self.core.stood_still(self._stood_still)
            self._stood_still = 0.0
        return self.core.due()

    async def _beat(self) -> None:
        while True:
            _log_failures(await self._turns.write([self.core.beat]))
            await trio.sleep(SERVER_BEAT_SECONDS)

    async def _record_uses(self) -> None:
        while True:
            await trio.sleep(LAST_USE_SECONDS)
            _log_failures(await self._turns.write([self.core.answers.collect]))
            left = await self._turns.ask(lambda: self.core.unrecorded_uses)
            while left > 0:
                result = (await self._turns.write([self.core.persist_uses]))[0]
                if isinstance(result, KvfsError):
                    _log_failures([result])
                    break
                # What is used meanwhile waits for the next round.
                left = min(result, left - 1)
                await trio.lowlevel.checkpoint()

    def _record_all_uses(self) -> None:
        """At a clean end recency is recorded whole."""
        while self.core.unrecorded_uses:
            result = update(self.core, [self.core.persist_uses])[0][0]
            if isinstance(result, KvfsError):
                _log_failures([result])
                return
        if self._shared:
            _log_failures(update(self.core, [self.core.goodbye])[0])


def _log_failures(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, KvfsError):
            log.warning("background work failed and will be repeated: %s", result)


async def serve_metadata(
    env: Env,
    config: MetadataConfig,
    *,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves the store that ``config`` names until cancelled, then closes it cleanly. Reports the
    bound addresses. Raises as ``open_store``, and NotLoopback, ConnectionLost (an address is
    taken)."""
    store = config.store or config.directory
    engine = open_store(env, store, durability=config.durability)
    try:
        await MetadataService(env, config, engine).serve(task_status=task_status)
    finally:
        engine.close()
