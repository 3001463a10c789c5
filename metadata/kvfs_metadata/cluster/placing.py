"""Chains for new chunks, and targets for copies that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvfs_base.cluster import TargetState
from kvfs_base.errors import CacheFull, NoTarget
from kvfs_base.limits import (
    CLIENT_SPLIT_BYTES,
    STRIPE_MAX,
    TRANSFER_BYTES,
)
from kvfs_metadata.cluster.chains import ChainTable, MapVersion
from kvfs_metadata.cluster.placement import Loads, Site, Spread, design, in_order, measure, runs
from kvfs_metadata.cluster.targets import TargetEntry, TargetTable, full_below_bytes
from kvfs_metadata.records import ChainRecord
from kvfs_metadata.transaction import Counters, Tx


class Placement:
    """Chains of one copy are made with their targets. Those of several copies are made, by whoever
    needs them first, for all targets that are there, and more of them when targets come."""

    def __init__(
        self, version: MapVersion, targets: TargetTable, chains: ChainTable, counters: Counters
    ) -> None:
        self._version = version
        self._targets = targets
        self._chains = chains
        self._counters = counters
        self._turn = 0
        self._found: dict[int, tuple[int, list[int]]] = {}
        self._plans: dict[int, _Plan] = {}

    # --- new chunks

    def place_file(self, tx: Tx, inode: int, copies: int) -> tuple[int, ...]:
        """The chains of a new file. Raises CacheFull if disks are full, and NoTarget."""
        try:
            usable = self._require(tx, copies)
        except NoTarget:
            if any(entry.state is TargetState.FULL for entry in self._targets):
                # Programs know what ENOSPC means, and that waiting does not help.
                raise CacheFull(capacity_bytes=self._targets.capacity_bytes()) from None
            raise
        return tuple(in_order(inode, usable, STRIPE_MAX))

    def place_blocks(self, tx: Tx, sizes: Sequence[int], copies: int) -> list[int]:
        """A chain for each block of a batch, in rotation. Blocks of a run are asked for together:
        a request goes to one target and, where there are several copies, to one chain, so there a
        run is not too small either. Raises NoTarget."""
        usable = self._require(tx, copies)
        run_bytes_min = CLIENT_SPLIT_BYTES if copies > 1 else 1
        run_of = runs(sizes, len(usable), run_bytes_min, TRANSFER_BYTES)
        turn = self._turn % len(usable)
        self._turn = turn + (run_of[-1] + 1 if run_of else 0)
        return [usable[(turn + run) % len(usable)] for run in run_of]

    def place_instead(self, inode: int, chains: Sequence[int]) -> int | None:
        """A chain for chunks to come of a file that is on ``chains``, if possible another one."""
        known = [chain for chain in map(self._chains.get, chains) if chain is not None]
        usable = self.usable(known[0].copies if known else 1)
        if not usable:
            return None
        order = in_order(inode, usable, len(usable))
        return next((chain for chain in order if chain not in chains), order[0])

    def room(self) -> Room:
        """For what is moved away from targets."""
        chains = {chain: self._targets[self._chains[chain].targets[0]] for chain in self.usable(1)}
        return Room(chains)

    def _require(self, tx: Tx, copies: int) -> list[int]:
        if copies > 1:
            self._grow(tx, copies)
        usable = self.usable(copies)
        if usable:
            return usable
        if copies > 1:
            self.require_hosts(copies)
            detail = f"no chain of {copies} copies is served by targets that take new chunks"
        else:
            detail = f"none of {len(self._targets)} targets is serving"
        raise NoTarget(detail=detail)

    def require_hosts(self, copies: int) -> None:
        """Raises NoTarget if there are fewer hosts than copies."""
        hosts = {entry.record.domain for entry in self._targets if entry.is_settled}
        if copies > max(1, len(hosts)):
            raise NoTarget(
                detail=f"{copies} copies need targets on {copies} hosts, there are {len(hosts)}"
            )

    def usable(self, copies: int) -> list[int]:
        """Chains of a class for new chunks: whole ones if there are any."""
        self._targets.expire()
        version = int(self._version)
        known = self._found.get(copies)
        if known is not None and known[0] == version:
            return known[1]
        found = self._find_usable(copies)
        self._found[copies] = version, found
        return found

    def _find_usable(self, copies: int) -> list[int]:
        good = [c for c in self._chains.of_copies(copies) if self._serves_well(self._chains[c])]
        whole = [c for c in good if len(self._chains[c].targets) >= copies]
        planned = set(self._plans[copies].chains) if copies in self._plans else set()
        return [c for c in whole if c in planned] or whole or good

    def _serves_well(self, chain: ChainRecord) -> bool:
        return all(self._state(target_id) is TargetState.SERVING for target_id in chain.targets)

    def _state(self, target_id: int) -> TargetState:
        entry = self._targets.get(target_id)
        return TargetState.OFFLINE if entry is None else entry.state

    # --- the table of a class

    def _grow(self, tx: Tx, copies: int) -> None:
        """Makes the chains that the table of a class lacks. One with a target that is away is made
        when it is back."""
        version = int(self._version)
        plan = self._plans.get(copies)
        if plan is not None and plan.version == version:
            return
        sites = self._sites()
        there = {site.target_id for site in sites if self._targets.is_alive(site.target_id)}
        basis = _Basis(sites, there, self._members(copies))
        planned = plan.chains if plan is not None else []
        if plan is None or not basis.is_covered_by(plan.basis):
            planned = self._make(tx, basis, copies)
            basis = _Basis(sites, there, self._members(copies))
        self._plans[copies] = _Plan(int(self._version), basis, planned)
        # What was made may be taken back.
        tx.undo.append(self._plans.clear)

    def _make(self, tx: Tx, basis: _Basis, copies: int) -> list[int]:
        planned: list[int] = []
        for known, members in design(basis.sites, copies, basis.members):
            if known is not None:
                planned.append(known)
            elif basis.there.issuperset(members):
                chain_id = self._counters.chain.take(tx)
                self._chains.put(tx, chain_id, ChainRecord(1, members, copies))
                planned.append(chain_id)
        return planned

    def _sites(self) -> tuple[Site, ...]:
        return tuple(site_of(entry) for entry in self._targets if entry.is_settled)

    def _members(self, copies: int) -> dict[int, frozenset[int]]:
        return {c: frozenset(self._chains[c].everybody) for c in self._chains.of_copies(copies)}

    # --- copies that are missing

    def loads(self, copies: int) -> Loads:
        return Loads(self._chains[c].everybody for c in self._chains.of_copies(copies))

    def stand_in(self, chain: ChainRecord, lost: int, loads: Loads) -> int | None:
        """A target for another copy beside those members that stay, in the place of ``lost`` (0:
        nobody's)."""
        sites = [
            site_of(entry)
            for entry in self._targets
            if entry.state is TargetState.SERVING
            and self._targets.may_return(entry.target_id)
            and entry.target_id not in chain.everybody
        ]
        members = [
            site_of(entry)
            for entry in map(self._targets.get, chain.everybody)
            if entry is not None and entry.is_settled and entry.target_id != lost
        ]
        meant = [site for site in sites if lost and self._targets[site[0]].record.replaces == lost]
        found = loads.best(meant, members)
        return loads.best(sites, members) if found is None else found

    def other_for(self, lost: TargetEntry) -> int:
        """A target for all places of another one: of the same server if there is one, and the one
        with the fewest chains. Raises NoTarget."""
        others = {
            member
            for chain_id in self._chains.replicated(lost.target_id)
            for member in self._chains[chain_id].everybody
            if member != lost.target_id
        }
        hosts = {self._targets[other].record.domain for other in others}

        def cost(entry: TargetEntry) -> tuple[bool, bool, int, int]:
            return (
                entry.record.server_id != lost.record.server_id,
                entry.record.domain in hosts,
                len(self._chains.of_target(entry.target_id)),
                entry.target_id,
            )

        usable = [
            entry
            for entry in self._targets
            if entry is not lost and entry.state is TargetState.SERVING
        ]
        if not usable:
            raise NoTarget(detail="no other target is serving")
        return min(usable, key=cost).target_id

    def spread(self, copies: int) -> Spread:
        """Of the chains of a class that take new chunks."""
        usable = self.usable(copies)
        return measure(self._sites(), [self._chains[chain_id].everybody for chain_id in usable])


class Room:
    """Targets that take chunks of one copy, and what they have left above their reserve. What was
    given out before the last heartbeats is not known here: a target that gets full says so."""

    def __init__(self, chains: Mapping[int, TargetEntry]) -> None:
        self._left = {
            chain: entry.free_bytes - full_below_bytes(entry.record.capacity_bytes)
            for chain, entry in chains.items()
        }

    def take(self, inode: int, size: int, beside: Sequence[int] = ()) -> int | None:
        """A chain with room for ``size`` bytes, if possible one that is not ``beside``."""
        found = [chain for chain, left in self._left.items() if left > size]
        apart = [chain for chain in found if chain not in beside]
        if not found:
            return None
        (chain,) = in_order(inode, apart or found, 1)
        self._left[chain] -= size
        return chain


class _Basis(NamedTuple):
    """What a table is made for."""

    sites: tuple[Site, ...]
    there: set[int]
    members: dict[int, frozenset[int]]

    def is_covered_by(self, other: _Basis) -> bool:
        """Whether the table made for ``other`` does. Who has gone away needs no other one."""
        same = self.sites == other.sites and self.members == other.members
        return same and self.there <= other.there


class _Plan(NamedTuple):
    version: int
    basis: _Basis
    chains: list[int]


def site_of(entry: TargetEntry) -> Site:
    return Site(entry.target_id, entry.record.domain, entry.record.rack)
