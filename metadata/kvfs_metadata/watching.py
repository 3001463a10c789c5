"""The service's side of watches: answers that wait (``leases`` decides, this waits)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from kvfs_base.errors import KvfsError, NotSupported
from kvfs_base.rpc import Later
from kvfs_base.seams import Clock
from kvfs_metadata import messages as m
from kvfs_metadata.check.fixes import RepairRecords
from kvfs_metadata.core import MetadataCore
from kvfs_metadata.leases import Revocation
from kvfs_metadata.limits import WATCH_POLL_SECONDS
from kvfs_metadata.turns import SharedTurns, Turns

CHANGES: frozenset[type] = frozenset({m.Once, m.CommitBlocks, m.OpenNamespace, RepairRecords})
"""Requests whose answers wait for watchers. The others change nothing that anybody is shown."""


class Watching:
    def __init__(self, clock: Clock, core: MetadataCore, turns: Turns) -> None:
        self._clock = clock
        self._leases = core.leases
        self._turns = turns

    def disconnected(self, connection: int, *, by_peer: bool) -> None:
        """Who closes a connection has dropped what he remembered. One that merely broke may still
        be used at its other end."""
        if by_peer:
            self._leases.end(connection)

    async def hear(self, connection: int, request: m.Watch) -> Any:
        """The answer."""
        if isinstance(self._turns, SharedTurns):
            return NotSupported(detail="leases on names, on a shared store")
        if self._leases.hear(connection, request):
            recorded = await self._turns.write([self._leases.record(request.session)])
            if isinstance(recorded[0], KvfsError):
                self._leases.end(connection)
                return recorded[0]
            return self._leases.take(connection)

        async def wait() -> m.Revoked:
            if not self._leases.has_news(connection):
                news = trio.Event()
                self._leases.when_news(connection, news.set)
                with trio.move_on_after(WATCH_POLL_SECONDS):
                    await news.wait()
            return self._leases.take(connection)

        return Later(wait)

    async def hold(
        self, connection: int, results: Sequence[Any], revocations: Sequence[Revocation]
    ) -> Sequence[Any]:
        """``results``, to be answered when all ``revocations`` are over. A watcher's connection
        goes on meanwhile: what it has to say may be what others wait for. Who waits for a lock has
        changed nothing, and is answered later anyway."""
        if self._leases.watches(connection):
            return [
                result
                if isinstance(result, Later)
                else Later(partial(self._later, result, revocations))
                for result in results
            ]
        await self._over(revocations)
        return results

    async def _later(self, result: Any, revocations: Sequence[Revocation]) -> Any:
        await self._over(revocations)
        return result

    async def _over(self, revocations: Sequence[Revocation]) -> None:
        for revocation in revocations:
            if revocation.is_over:
                continue
            over = trio.Event()
            revocation.then(over.set)
            while not over.is_set():
                left = self._leases.next_end() - self._clock.monotonic()
                with trio.move_on_after(max(left, 0)):
                    await over.wait()
                if not over.is_set():
                    self._leases.expire()
