"""From a chain to the target that serves it, and how to get there."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from kvfs_base.cluster import ClusterMap, Target, TargetState
from kvfs_base.errors import KvfsError, NoTarget, TargetFailed
from kvfs_base.types import Address


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


class Router:
    """``prefer``: ``local`` and ``tcp`` refuse the other way, ``auto`` takes the local one where
    there is one."""

    def __init__(self, cluster: ClusterSource, host_id: str, prefer: str) -> None:
        self._cluster = cluster
        self._host_id = host_id
        self._prefer = prefer
        self._table: tuple[ClusterMap | None, dict[int, Route]] = (None, {})
        self._doubtful = False
        self._current = False
        """The last attempt to get the map succeeded."""

    def doubt(self) -> None:
        """A server did not answer where the map has it: it may have moved."""
        self._doubtful = True

    def routes(self, chains: set[int]) -> dict[int, Route]:
        """A route for each chain that has one. Asks for the map again, once, if one has none or
        the map is in doubt."""
        routes = self._routes(self._cluster.current())
        if self._doubtful or chains - routes.keys():
            try:
                routes = self._routes(self._cluster.refresh())
                self._doubtful = False
                self._current = True
            except KvfsError:
                self._current = False  # what is known will do; the rest has no target
        return {chain: routes[chain] for chain in chains if chain in routes}

    def route(self, chain: int) -> Route:
        """Raises NoTarget; TargetFailed if the chain was removed from the cluster, for which nobody
        need wait."""
        found = self.routes({chain}).get(chain)
        if found is None:
            known = self._table[0]
            if self._current and known is not None and not _has_chain(known, chain):
                raise TargetFailed(detail=f"chain {chain} was removed")
            raise NoTarget(detail=f"chain {chain}")
        return found

    def _routes(self, cluster: ClusterMap) -> dict[int, Route]:
        known, table = self._table
        if known is not cluster:
            targets = {target.target_id: target for target in cluster.targets}
            table = {}
            for chain in cluster.chains:
                head = targets.get(chain.targets[0]) if chain.targets else None
                route = None if head is None else self._route_to(head)
                if route is not None:
                    table[chain.chain_id] = route
            self._table = (cluster, table)
        return table

    def _route_to(self, target: Target) -> Route | None:
        if target.state == TargetState.OFFLINE:
            return None
        if self._prefer != "tcp" and target.unix is not None and target.host_id == self._host_id:
            return Route(target.target_id, target.unix, local=True)
        if self._prefer != "local" and target.tcp is not None:
            return Route(target.target_id, target.tcp, local=False)
        return None


def _has_chain(cluster: ClusterMap, chain: int) -> bool:
    return any(known.chain_id == chain for known in cluster.chains)
