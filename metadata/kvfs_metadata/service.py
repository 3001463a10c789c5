"""The metadata service: RpcServer in front of MetadataCore, group commits, background work.

Requests that only read are answered at once. Everything that writes goes through one queue:

* durability "cache": a commit costs about 20 us (no disk is waited for), less than handing it to
  another task; so what one read of a connection brought is one group, committed on the spot.
* durability "strict": a commit waits for the disk, in a worker thread. What arrives meanwhile, from
  all connections, forms the next group.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import trio

from kvfs_base.errors import DiskFull, InternalError, KvfsError
from kvfs_base.limits import (
    EVICT_SECONDS,
    HEARTBEAT_SECONDS,
    LAST_USE_SECONDS,
    SYNC_SECONDS,
    WRITE_GROUP_REQUESTS,
)
from kvfs_base.rpc import RpcServer
from kvfs_base.seams import Env
from kvfs_base.types import Address
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.core import MetadataCore, Operation
from kvfs_metadata.engine import KVEngine
from kvfs_metadata.lmdb_engine import LmdbEngine
from kvfs_metadata.messages import Done, MetadataRequest, Sync

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Waiting:
    """A submitter of the strict queue: ``results`` are set, then ``done``."""

    operations: list[Operation]
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    results: list[Any] = dataclasses.field(default_factory=list)


class MetadataService:
    """Serves one engine, which stays the caller's to close."""

    def __init__(self, env: Env, config: MetadataConfig, engine: KVEngine) -> None:
        self._env = env
        self._config = config
        self._strict = config.durability == "strict"
        self.core = MetadataCore(engine, env.clock, config)
        self._queue: list[_Waiting] = []
        self._arrived = trio.Event()
        self._evict_wanted = trio.Event()
        self._blocks_size = 0
        self._unsynced = False
        self._sync_lock = trio.Lock()
        self._syncs_begun = 0

    async def serve(
        self, *, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Runs until cancelled; reports the bound addresses."""
        server = RpcServer(self._env.network, MetadataRequest, self)
        try:
            async with trio.open_nursery() as nursery:
                if self._strict:
                    nursery.start_soon(self._write_groups)
                else:
                    nursery.start_soon(self._sync_now_and_then)
                for work in (self._evict, self._watch_disks, self._expire, self._record_uses):
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

    def disconnected(self, session_id: int) -> None:
        self.core.disconnected(session_id)

    async def handle(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        if self.core.only_reads(requests):
            return self.core.answer(requests)
        syncs = [place for place, request in enumerate(requests) if type(request) is Sync]
        results: list[Any] = []
        for start in range(0, len(requests), WRITE_GROUP_REQUESTS):
            batch = requests[start : start + WRITE_GROUP_REQUESTS]
            results += await self._write(
                [
                    _nothing if type(request) is Sync else self.core.operation(session_id, request)
                    for request in batch
                ]
            )
        if syncs:
            answer = await self._answer_sync()
            for place in syncs:
                results[place] = answer
        return results

    async def _answer_sync(self) -> Done | KvfsError:
        try:
            await self._sync()
        except KvfsError as exc:
            return exc
        return Done()

    # --- writing

    async def _write(self, operations: list[Operation]) -> list[Any]:
        """A result or KvfsError for each operation, once they are as durable as configured."""
        if not self._strict:
            return self._write_now(operations)
        waiting = _Waiting(operations)
        self._queue.append(waiting)
        self._arrived.set()
        await waiting.done.wait()
        return waiting.results

    def _write_now(self, operations: list[Operation]) -> list[Any]:
        self._unsynced = True
        try:
            results = self.core.update(operations)
        except Exception as exc:
            results = [_commit_error(exc)] * len(operations)
        self._after_commit()
        return results

    async def _write_groups(self) -> None:
        """The only writer of durability "strict"."""
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._queue:
                await self._write_group(self._take_group())

    def _take_group(self) -> list[_Waiting]:
        """As many as fit, at least one."""
        count = size = 0
        for waiting in self._queue:
            size += len(waiting.operations)
            if count and size > WRITE_GROUP_REQUESTS:
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group

    async def _write_group(self, group: list[_Waiting]) -> None:
        decision = self.core.decide([op for waiting in group for op in waiting.operations])
        results = iter(decision.group.results)
        try:
            # Nobody else decides while this waits: this task is the only one that does.
            await trio.to_thread.run_sync(self.core.commit, decision)
        except Exception as exc:
            self.core.take_back(decision)
            error = _commit_error(exc)
            results = iter([error] * len(decision.group.results))
        for waiting in group:
            waiting.results = [next(results) for _ in waiting.operations]
            waiting.done.set()
        self._after_commit()

    # --- syncing

    async def _sync(self) -> None:
        """Returns once everything acknowledged so far is on stable storage."""
        if self._strict:
            return
        begun = self._syncs_begun
        async with self._sync_lock:
            if self._syncs_begun > begun:
                return  # one that began after this was asked for has ended
            self._syncs_begun += 1
            self._unsynced = False
            await trio.to_thread.run_sync(self.core.sync)

    async def _sync_now_and_then(self) -> None:
        while True:
            await trio.sleep(SYNC_SECONDS)
            if not self._unsynced:
                continue
            try:
                await self._sync()
            except DiskFull as exc:
                self._unsynced = True
                log.warning("metadata is not synced: %s", exc)
            except KvfsError as exc:
                # The engine refuses every further write itself; reads go on.
                log.error("metadata cannot be synced: %s", exc)
                return

    # --- background work

    def _after_commit(self) -> None:
        # The whole question costs 20 us. Files may grow too: _watch_disks asks every second.
        size = self.core.blocks_size()
        if size > self._blocks_size:
            self._want_eviction()
        self._blocks_size = size

    def _want_eviction(self) -> None:
        if self.core.excess_bytes() > 0:
            self._evict_wanted.set()

    async def _evict(self) -> None:
        while True:
            await self._evict_wanted.wait()
            self._evict_wanted = trio.Event()
            left = self.core.excess_bytes()
            while left > 0:
                freed = (await self._write([self.core.eviction(left)]))[0]
                if isinstance(freed, KvfsError) or freed == 0:
                    break
                left -= freed
                # Requests come first: eviction keeps pace with them, it does not race them.
                await trio.lowlevel.checkpoint()

    async def _watch_disks(self) -> None:
        while True:
            await trio.sleep(EVICT_SECONDS)
            self._want_eviction()

    async def _expire(self) -> None:
        while True:
            await trio.sleep(HEARTBEAT_SECONDS)
            operations = self.core.due()
            if operations:
                _log_failures(await self._write(operations))

    async def _record_uses(self) -> None:
        while True:
            await trio.sleep(LAST_USE_SECONDS)
            left = self.core.unrecorded_uses
            while left > 0:
                result = (await self._write([self.core.persist_uses]))[0]
                if isinstance(result, KvfsError):
                    _log_failures([result])
                    break
                # What is used meanwhile waits for the next round.
                left = min(result, left - 1)
                await trio.lowlevel.checkpoint()

    def _record_all_uses(self) -> None:
        """At a clean end recency is recorded whole."""
        while self.core.unrecorded_uses:
            result = self._write_now([self.core.persist_uses])[0]
            if isinstance(result, KvfsError):
                _log_failures([result])
                return


def _nothing(tx: Any) -> None:
    """Holds the place of a request that is answered later."""


def _commit_error(exc: Exception) -> KvfsError:
    if isinstance(exc, KvfsError):
        return exc
    log.error("a commit failed", exc_info=exc)
    return InternalError(detail=type(exc).__name__)


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
    """Serves the LMDB store in ``config.directory`` until cancelled, then closes it cleanly.
    Reports the bound addresses. Raises Conflict if another service has the directory,
    VersionMismatch, NotLoopback, ConnectionLost (an address is taken)."""
    engine = LmdbEngine(env, config.directory, durability=config.durability)
    try:
        await MetadataService(env, config, engine).serve(task_status=task_status)
    finally:
        engine.close()
