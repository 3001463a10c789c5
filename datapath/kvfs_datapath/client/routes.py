"""From a chain to the targets that have its chunks, and how to get there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

from kvfs_base.cluster import Chain, ClusterMap, Target, TargetState
from kvfs_base.errors import KvfsError, NoTarget, StaleChain, TargetFailed
from kvfs_base.types import Address, ChunkId


class ClusterSource(Protocol):
    """Who knows the cluster map (kvfs_metadata.client.ClusterView)."""

    def current(self) -> ClusterMap:
        """The map as last seen."""

    def refresh(self) -> ClusterMap:
        """The map as it is now."""


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """``local``: over the Unix socket, where descriptors can be passed."""

    target_id: int
    address: Address
    local: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ChainRoutes:
    """A chain of which somebody can be asked. Members that cannot be reached have no route."""

    chain_id: int
    version: int
    is_replicated: bool
    serving: tuple[Route, ...]
    """In write order, never empty."""
    others: tuple[Route, ...]
    """Members that are being brought in step: written to, not asked."""
    members: tuple[int, ...]
    """All whom a write passes, in order, routes or not."""
    head: int
    tail: int

    def find(self, target_id: int) -> Route | None:
        for route in self.serving + self.others:
            if route.target_id == target_id:
                return route
        return None

    def in_order(self, chunk: ChunkId, avoided: set[int]) -> list[Route]:
        """Whom to ask for a chunk: one of this host, then the others, each chunk beginning at its
        own; ``avoided`` ones last. A chunk is always asked of the same ones first, whose memory may
        hold it."""
        routes = self.serving
        if len(routes) == 1:
            return list(routes)
        first = _mix(chunk.inode, chunk.number) % len(routes)
        turned = routes[first:] + routes[:first]
        return sorted(turned, key=lambda r: (r.target_id in avoided, not r.local))


def _mix(inode: int, number: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): neighbours get far apart."""
    x = (inode * 0x9E3779B97F4A7C15 + number) & 0xFFFF_FFFF_FFFF_FFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFF_FFFF_FFFF_FFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFF_FFFF_FFFF_FFFF
    return x ^ (x >> 31)


class Router:
    """``prefer``: ``local`` and ``tcp`` refuse the other way, ``auto`` takes the local one where
    there is one."""

    def __init__(self, cluster: ClusterSource, host_id: str, prefer: str) -> None:
        self._cluster = cluster
        self._host_id = host_id
        self._prefer = prefer
        self._table: tuple[ClusterMap | None, dict[int, ChainRoutes]] = (None, {})
        self._doubtful = False
        self._current = False
        """The last attempt to get the map succeeded."""

    def doubt(self) -> None:
        """A server did not answer where the map has it: it may have moved."""
        self._doubtful = True

    def chains(self, chains: Iterable[int], *, fresh: bool = False) -> dict[int, ChainRoutes]:
        """The routes of each chain that has one. Asks for the map again, once, if a chain has none,
        the map is in doubt, or with ``fresh``."""
        wanted = set(chains)
        routes = self._routes(self._cluster.current())
        if fresh or self._doubtful or wanted - routes.keys():
            try:
                routes = self._routes(self._cluster.refresh())
                self._doubtful = False
                self._current = True
            except KvfsError:
                self._current = False  # what is known will do; the rest has no target
        return {chain: routes[chain] for chain in wanted if chain in routes}

    def chain(self, chain: int, *, fresh: bool = False) -> ChainRoutes:
        """Raises NoTarget; TargetFailed if the chain was removed from the cluster, for which nobody
        need wait."""
        found = self.chains((chain,), fresh=fresh).get(chain)
        if found is None:
            known = self._table[0]
            if self._current and known is not None and _find(known, chain) is None:
                raise TargetFailed(detail=f"chain {chain} was removed")
            raise NoTarget(detail=f"chain {chain}")
        return found

    def route(self, chain: int) -> Route:
        """To the target of a chain of one copy. Raises as ``chain``, and StaleChain for another
        one: its chunks have other names and are written by other requests."""
        found = self.chain(chain)
        if found.is_replicated:
            raise StaleChain(chain=chain, version=found.version)
        return found.serving[0]

    def is_replicated(self, chain: int) -> bool | None:
        """Also of a chain that nobody serves; None if there is no such chain. Never changes. Raises
        what kept the map from being fetched."""
        known = _find(self._cluster.current(), chain) or _find(self._cluster.refresh(), chain)
        return None if known is None else known.is_replicated

    def here(self) -> list[int]:
        """Chains of one copy that are served on this host. Raises as ``is_replicated``."""
        routes = self._routes(self._cluster.current())
        return [
            chain
            for chain, found in routes.items()
            if not found.is_replicated and found.serving[0].local
        ]

    def _routes(self, cluster: ClusterMap) -> dict[int, ChainRoutes]:
        known, table = self._table
        if known is not cluster:
            targets = {target.target_id: target for target in cluster.targets}
            table = {}
            for chain in cluster.chains:
                routes = self._routes_of(chain, targets)
                if routes is not None:
                    table[chain.chain_id] = routes
            self._table = (cluster, table)
        return table

    def _routes_of(self, chain: Chain, targets: dict[int, Target]) -> ChainRoutes | None:
        serving = self._reachable(chain.targets, targets)
        if not serving:
            return None
        return ChainRoutes(
            chain_id=chain.chain_id,
            version=chain.version,
            is_replicated=chain.is_replicated,
            serving=serving,
            others=self._reachable(chain.syncing, targets),
            members=chain.members,
            head=chain.targets[0],
            tail=chain.targets[-1],
        )

    def _reachable(
        self, target_ids: tuple[int, ...], targets: dict[int, Target]
    ) -> tuple[Route, ...]:
        found = [targets.get(target_id) for target_id in target_ids]
        routes = [self._route_to(target) for target in found if target is not None]
        return tuple(route for route in routes if route is not None)

    def _route_to(self, target: Target) -> Route | None:
        if target.state == TargetState.OFFLINE:
            return None
        if self._prefer != "tcp" and target.unix is not None and target.host_id == self._host_id:
            return Route(target.target_id, target.unix, local=True)
        if self._prefer != "local" and target.tcp is not None:
            return Route(target.target_id, target.tcp, local=False)
        return None


def _find(cluster: ClusterMap, chain: int) -> Chain | None:
    return next((known for known in cluster.chains if known.chain_id == chain), None)
