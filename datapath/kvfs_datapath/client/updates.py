"""Updates of file chunks on chains of several copies, as a client sends them.

Each update has a number that no other one of any client has, and keeps it when it is sent again, so
that the head knows it (docs/design/0004-chains.md). ``base`` is the version that the chunk had as
far as this client knows. It may be too low: then a repetition that nobody remembers is refused,
which is always safe. 0 says that the chunk was never there, and is therefore safe of every chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvfs_base import threads
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    IntegrityError,
    KvfsError,
    NoTarget,
    TargetFailed,
)
from kvfs_base.types import Address, ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chain_reads import UNREACHABLE
from kvfs_datapath.client.chain_writes import PASSING_ERRORS
from kvfs_datapath.client.health import Health
from kvfs_datapath.client.patience import Patience
from kvfs_datapath.client.routes import ChainRoutes, Route
from kvfs_datapath.client.shared import Shared
from kvfs_datapath.connections import DataConnection, seconds_for
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import CHAIN_CONNECT_SECONDS, WRITE_ATTEMPTS_BAD
from kvfs_datapath.rules import NOWHERE

_Result = TypeVar("_Result")

_DROPPED = (*NOWHERE, ChunkCorrupt, ChunkMismatch, TargetFailed)
"""What a head answers of an update that it has not begun, or of which nothing is left: it may come
for the first time again. All else may mean that it is on its way."""
_AGAIN = (*PASSING_ERRORS, ChunkCorrupt, ChunkMismatch)
"""Worth another attempt. The last two: bytes that broke on their way, or a head whose copy is
damaged and may be repaired meanwhile."""


@dataclasses.dataclass(slots=True)
class Change:
    """One update. ``sent``: an attempt may have been carried out."""

    inode: int
    number: int
    offset: int
    data: memoryview
    base: int
    cut: bool = False
    writer: int = 0
    sequence: int = 0
    crc32c: int = 0
    sent: bool = False

    def message(self) -> m.Update:
        return m.Update(
            inode=self.inode,
            number=self.number,
            offset=self.offset,
            length=len(self.data),
            crc32c=self.crc32c,
            writer=self.writer,
            sequence=self.sequence,
            cut=self.cut,
            again=self.sent,
            base=self.base,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """To the head of a chain: ``route`` is to itself, or to a member that passes on what it is
    asked."""

    route: Route
    routes: ChainRoutes

    @property
    def is_relay(self) -> bool:
        return self.route.target_id != self.routes.head

    @property
    def target_id(self) -> int:
        return self.route.target_id

    @property
    def address(self) -> Address:
        return self.route.address

    @property
    def passing(self) -> m.Passing:
        return m.Passing(self.routes.chain_id, self.routes.version)

    @property
    def hops(self) -> int:
        """How many have to get what is sent, one after the other."""
        return len(self.routes.members) + self.is_relay

    def onward(self, seconds: float) -> m.Onward | None:
        return m.Onward(self.routes.head, math.ceil(seconds)) if self.is_relay else None


def _way(routes: ChainRoutes, health: Health, relay: bool | None, relays: int) -> Way:
    """``relay``: whether to ask another member, one after the other; None: if the head failed
    lately. Raises NoTarget."""
    head = routes.find(routes.head)
    if head is None:
        raise NoTarget(detail=f"the head of chain {routes.chain_id} cannot be reached")
    others = [r for r in (*routes.serving, *routes.others) if r is not head]
    if relay is None:
        relay = bool(health.avoided([routes.head]))
    if not others or not relay:
        return Way(head, routes)
    return Way(others[relays % len(others)], routes)


class Updater:
    """One a client; thread-safe."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._lock = threads.lock()
        self._writer = 0
        self._sequence = 0

    def number(self) -> tuple[int, int]:
        """Writer and sequence, never the same again."""
        with self._lock:
            if not self._writer or self._sequence == 0xFFFF_FFFF:
                self._writer = self._shared.env.rng.randrange(1, 1 << 32)
                self._sequence = 0
            self._sequence += 1
            return self._writer, self._sequence

    def update(
        self, chain: int, changes: Sequence[Change], patience: Patience
    ) -> list[ChunkInfo | None]:
        """Done at every member when it returns: each chunk as it is afterwards. Changes of one
        request are of different chunks. Raises DiskFull, WriteUncertain, TargetFailed (the chain
        was removed), and when ``patience`` is over what was wrong last; then any of the changes may
        have been done."""
        infos: list[ChunkInfo | None] = [None] * len(changes)
        for change in changes:
            change.writer, change.sequence = self.number()
            change.crc32c = crc32c(change.data)
        left = list(range(len(changes)))

        def send(way: Way) -> None:
            nonlocal left
            outcomes = self._send(way, [changes[i] for i in left])
            failed: dict[int, KvfsError] = {}
            for place, index in enumerate(left):
                error = outcomes.error(place)
                if error is None:
                    infos[index] = outcomes.infos[place]
                else:
                    failed[index] = error
            left = list(failed)
            for error in sorted(failed.values(), key=lambda e: isinstance(e, _AGAIN)):
                raise error

        self.at_head(chain, send, patience)
        return infos

    def _send(self, way: Way, changes: Sequence[Change]) -> m.Outcomes:
        payload = [change.data for change in changes if len(change.data)]
        seconds = seconds_for(way.hops * sum(map(len, payload)))

        def act(connection: DataConnection) -> m.Outcomes:
            # May run twice, on two connections: what was sent on the first may arrive yet.
            before = [change.sent for change in changes]
            messages = tuple(change.message() for change in changes)
            for change in changes:
                change.sent = True
            onward = way.onward(seconds)
            request = m.UpdateChunks(way.target_id, way.passing, messages, onward)
            try:
                outcomes: m.Outcomes = connection.call(request, payload)
            except NOWHERE:
                for change, sent in zip(changes, before, strict=True):
                    change.sent = sent
                raise
            for index, change in enumerate(changes):
                if isinstance(outcomes.error(index), _DROPPED):
                    change.sent = before[index]
            return outcomes

        return self._shared.pool.run(
            way.address, act, seconds=seconds, connect_seconds=CHAIN_CONNECT_SECONDS, watch=True
        )

    def at_head(self, chain: int, action: Callable[[Way], _Result], patience: Patience) -> _Result:
        """``action`` at the head of a chain, again and again while the chain is changing. If the
        head cannot be reached from here, every other attempt goes through another member."""
        health = self._shared.health
        fresh = False
        relay: bool | None = None
        relays = bad = 0
        while True:
            way: Way | None = None
            try:
                routes = self._shared.router.chain(chain, fresh=fresh)
                way = _way(routes, health, relay, relays)
                result = action(way)
                if not way.is_relay:
                    health.answered(routes.head)
                return result
            except KvfsError as exc:
                # A chain that was removed has no head, and will have none.
                if not isinstance(exc, _AGAIN) or (way is None and not exc.temporary):
                    raise
                bad += isinstance(exc, IntegrityError)
                if bad > WRITE_ATTEMPTS_BAD:
                    raise  # what is there is damaged, and nobody has it
                relay = None
                if way is not None and isinstance(exc, UNREACHABLE):
                    relay = not way.is_relay
                    relays += way.is_relay
                    if not way.is_relay:
                        health.failed(routes.head)
                # The map may be old: the second attempt is made at once.
                if fresh and not patience.wait():
                    raise
            fresh = True

    def refs(self, inode: int, numbers: Sequence[int], chain: int) -> tuple[m.ChunkRef, ...]:
        return tuple(m.ChunkRef(*ChunkId(inode, number, chain)) for number in numbers)


__all__ = ["Change", "Updater", "Way"]
