"""What a chunk server knows of its chains, and whether it may still act on it.

The heartbeat thread brings maps, leases and fences; the threads of connections ask. Everything here
is memory under one lock: no I/O, and time is a number that the caller read from the clock.

A target acts for a chain of several copies while three things hold: a heartbeat that named its
present incarnation was answered, and one less than FENCE_SECONDS ago; the maps that the answers
named are known; and no answer said ``fence`` to which no later one, to a heartbeat that said
``fenced``, has put an end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

from kvfs_base import threads
from kvfs_base.cluster import Chain, ClusterMap, HeartbeatReply, Target
from kvfs_base.errors import InvalidRequest, NoTarget, StaleChain, TargetFenced
from kvfs_base.seams import Clock
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.limits import FENCE_SECONDS, VIEW_WAIT_SECONDS
from kvfs_datapath.messages import Passing


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A target's place in a chain, under one version of it."""

    target_id: int
    chain: Chain

    @property
    def serving(self) -> bool:
        return self.target_id in self.chain.targets

    @property
    def hops(self) -> tuple[int, ...]:
        """The members behind this one, in order."""
        members = self.chain.members
        return members[members.index(self.target_id) + 1 :]

    @property
    def is_head(self) -> bool:
        return self.chain.targets[:1] == (self.target_id,)

    @property
    def is_source(self) -> bool:
        """Brings the first of those that are syncing in step."""
        return self.chain.targets[-1:] == (self.target_id,) and bool(self.chain.syncing)

    @property
    def is_sink(self) -> bool:
        """Is brought in step; others that are syncing wait for their turn."""
        return self.chain.syncing[:1] == (self.target_id,)

    def passing(self, hops: tuple[int, ...]) -> Passing:
        return Passing(self.chain.chain_id, self.chain.version, hops)


@dataclasses.dataclass(slots=True)
class _Standing:
    """Of one target. ``heard``: a heartbeat that named ``incarnation`` was answered, and the map
    that the answer named is known. ``fenced``: it was told to stop."""

    incarnation: int
    heard: bool = False
    fenced: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """What a heartbeat says, and when it was sent, or a little before."""

    number: int
    at: float
    incarnations: Mapping[str, int]
    fenced: frozenset[str]


class Views:
    """One a server. ``wake`` asks for a heartbeat soon."""

    def __init__(self, clock: Clock, draw: Callable[[], int], uuids: Collection[str]) -> None:
        """``draw`` answers another number each time: the incarnation of a target."""
        self._clock = clock
        self._draw = draw
        self._map = ClusterMap(0, (), ())
        self._chains: dict[int, Chain] = {}
        self._targets: dict[int, Target] = {}
        self._standings = {uuid: _Standing(self._draw()) for uuid in uuids}
        self._leased_until = float("-inf")
        self._beats = 0
        self._changed = threads.condition()
        self._active: dict[tuple[int, int], dict[int, int]] = {}
        self._listeners: list[Callable[[], None]] = []
        self.wake: Callable[[], None] = lambda: None

    def on_change(self, listener: Callable[[], None]) -> None:
        """Called after every new map, from the heartbeat thread: it must not block."""
        self._listeners.append(listener)

    # --- what the heartbeat thread brings and takes

    @property
    def map_version(self) -> int:
        return self._map.version

    def say(self) -> Said:
        """What the next heartbeat says."""
        with self._changed:
            self._beats += 1
            return Said(
                self._beats,
                self._clock.monotonic(),
                {uuid: standing.incarnation for uuid, standing in self._standings.items()},
                frozenset(uuid for uuid, s in self._standings.items() if s.fenced),
            )

    def must_ask(self, reply: HeartbeatReply) -> bool:
        """Whether the map that an answer names is not known. The upper half of a version is what
        all metadata servers agree on: one that is lower comes from a store that has begun anew."""
        known = self._map.version
        return reply.map_version > known or reply.map_version >> 32 < known >> 32

    def learn(self, said: Said, reply: HeartbeatReply, cluster: ClusterMap | None) -> None:
        """The answer to a heartbeat, and the map, if that was asked for."""
        with self._changed:
            is_new = cluster is not None and self._take_map(cluster)
            is_known = self._map.version >= reply.map_version
            for orders in reply.targets:
                standing = self._standings.get(orders.uuid)
                if standing is None:
                    continue
                if orders.fence:
                    standing.fenced = True
                elif is_known and orders.uuid in said.fenced:
                    standing.fenced = False
                if said.incarnations.get(orders.uuid) == standing.incarnation:
                    standing.heard |= is_known
            if is_known:
                self._leased_until = max(self._leased_until, said.at + FENCE_SECONDS)
            self._changed.notify_all()
        if is_new:
            for listener in self._listeners:
                listener()

    def _take_map(self, cluster: ClusterMap) -> bool:
        """A chain never goes back: whoever knows the newer version may have acted on it."""
        if cluster == self._map:
            return False
        self._map = cluster
        self._chains = {
            chain.chain_id: self._newer(chain) for chain in cluster.chains if chain.is_replicated
        }
        self._targets = {target.target_id: target for target in cluster.targets}
        return True

    def _newer(self, chain: Chain) -> Chain:
        known = self._chains.get(chain.chain_id)
        return chain if known is None or known.version <= chain.version else known

    def renounce(self, uuid: str) -> None:
        """The target draws another incarnation: it is out of step, and answers for nothing until
        the metadata service has taken note of that."""
        with self._changed:
            standing = self._standings[uuid]
            standing.incarnation = self._draw()
            standing.heard = False
        self.wake()

    # --- what others ask

    def target(self, target_id: int) -> Target:
        """Raises NoTarget."""
        found = self._targets.get(target_id)
        if found is None:
            raise NoTarget(detail=f"target {target_id} is not in the map")
        return found

    def has_left(self, store: ChunkStore, chain_id: int) -> bool:
        """Whether what a target has of a chain is garbage: should it come back, it forgets what is
        pending before anything else."""
        chain = self.chain(chain_id)
        return chain is not None and store.target_id not in (*chain.members, *chain.offline)

    def chain(self, chain_id: int) -> Chain | None:
        return self._chains.get(chain_id)

    def places(self, target_id: int) -> list[Place]:
        """Every chain of several copies that the target is a member of."""
        return [
            Place(target_id, chain)
            for chain in list(self._chains.values())
            if target_id in chain.members
        ]

    def place(self, store: ChunkStore, chain_id: int) -> Place:
        """Raises StaleChain unless the target is a member, TargetFenced if it may not act."""
        with self._changed:
            return self._place(store, chain_id)

    def _place(self, store: ChunkStore, chain_id: int) -> Place:
        chain = self._chains.get(chain_id)
        if chain is None:
            raise StaleChain(chain=chain_id, version=0)
        if store.target_id not in chain.members:
            raise StaleChain(chain=chain_id, version=chain.version)
        standing = self._standings[store.uuid]
        if standing.fenced or not standing.heard:
            raise TargetFenced(target_id=store.target_id, detail="told to stop")
        if self._clock.monotonic() >= self._leased_until:
            raise TargetFenced(target_id=store.target_id, detail="its lease is over")
        return Place(store.target_id, chain)

    def require_read(self, store: ChunkStore, chain_id: int) -> Place:
        """Whoever may answer a read has everything that was acknowledged so far. Raises
        TargetFenced."""
        try:
            place = self.place(store, chain_id)
        except StaleChain as exc:
            self.wake()
            raise TargetFenced(target_id=store.target_id, detail="no member") from exc
        if not place.serving:
            self.wake()
            raise TargetFenced(target_id=store.target_id, detail="not in step")
        return place

    def catch_up(self, passing: Passing) -> None:
        """A sender who knows a newer version heard of it first: waits a little, and never with a
        chunk's lock. What follows compares again."""

        def known() -> bool:
            chain = self._chains.get(passing.chain)
            return chain is not None and chain.version >= passing.version

        if not known():
            self.wake()
            with self._changed:
                self._changed.wait_for(known, VIEW_WAIT_SECONDS)

    # --- writes that are under way

    @contextlib.contextmanager
    def writing(
        self, store: ChunkStore, chain_id: int, require: Callable[[Place], None] | None = None
    ) -> Iterator[Place]:
        """For as long as a write of files changes this target under one version: ``wait_quiet``
        waits for it. ``require`` compares what a request says. Raises what that raises, StaleChain,
        TargetFenced."""
        with self._changed:
            place = self._place(store, chain_id)
            if require is not None:
                require(place)
            key, version = (store.target_id, chain_id), place.chain.version
            counts = self._active.setdefault(key, {})
            counts[version] = counts.get(version, 0) + 1
        try:
            yield place
        finally:
            with self._changed:
                counts[version] -= 1
                if not counts[version]:
                    del counts[version]
                    if not counts:
                        self._active.pop(key, None)
                    self._changed.notify_all()

    def wait_quiet(self, place: Place, timeout: float) -> bool:
        """Until no write is at work under another version than the place's: it would not pass
        members that came since. False if one takes longer than ``timeout``."""
        key, version = (place.target_id, place.chain.chain_id), place.chain.version
        with self._changed:
            return bool(
                self._changed.wait_for(
                    lambda: not (self._active.get(key, {}).keys() - {version}), timeout
                )
            )


def require_head(place: Place, passing: Passing) -> None:
    """Clients send updates of files to the head, who knows the others. Raises StaleChain."""
    if passing.version != place.chain.version or not place.is_head:
        raise StaleChain(chain=passing.chain, version=place.chain.version)


def require_relay(chain: Chain | None, target_id: int, passing: Passing, head: int) -> Chain:
    """A member passes on to the head what clients ask of that. Raises StaleChain."""
    if chain is None or passing.version != chain.version:
        raise StaleChain(chain=passing.chain, version=0 if chain is None else chain.version)
    if chain.targets[:1] != (head,) or target_id == head or target_id not in chain.members:
        raise StaleChain(chain=passing.chain, version=chain.version)
    return chain


def require_hops(place: Place, passing: Passing) -> None:
    """From member to member: who follows must be the same for both. Raises StaleChain."""
    if passing.version != place.chain.version or passing.hops != place.hops:
        raise StaleChain(chain=passing.chain, version=place.chain.version)


def require_block(place: Place, passing: Passing) -> None:
    """A block may go to the members in any order, and in several requests. Raises StaleChain,
    InvalidRequest."""
    if passing.version != place.chain.version:
        raise StaleChain(chain=passing.chain, version=place.chain.version)
    others = set(place.chain.members) - {place.target_id}
    if len(set(passing.hops)) != len(passing.hops) or not others.issuperset(passing.hops):
        raise InvalidRequest(detail=f"hops {passing.hops} of members {place.chain.members}")


def require_syncing(place: Place, passing: Passing) -> None:
    """Between the source and who is brought in step. Raises StaleChain."""
    require_hops(place, passing)
    if place.serving:
        raise StaleChain(chain=passing.chain, version=place.chain.version)


def require_version(now: Place, place: Place) -> None:
    """Raises StaleChain once the chain has changed."""
    if now.chain.version != place.chain.version:
        raise StaleChain(chain=now.chain.chain_id, version=now.chain.version)
