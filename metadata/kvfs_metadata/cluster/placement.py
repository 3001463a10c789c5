"""Which targets make up the chains of several copies, and which chains new chunks go to.

Each pair of targets shall share about equally many chains: when one is lost, all others have the
same part of what it held, and read and write its new copies alike. That is a balanced incomplete
block design. Ours is searched greedily (the target with the fewest chains takes those with which
it shares the fewest), one chain after the other, so it grows when targets come, and no old chain
changes. Everything here is deterministic: any server of a store would make the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHAINS_PER_TARGET = 12
"""At least: a file is striped over several chains, and a rebuild works on several at a time."""

CHAINS_PER_TARGET_MAX = 64
"""More than 64 (copies - 1) targets do not all share a chain with each other: some 20,000 chains
for 1,000 targets are enough of a map."""

MASK = (1 << 64) - 1


class Site(NamedTuple):
    """A target and its failure domains; an empty rack is none."""

    target_id: int
    host: str
    rack: str = ""


class Spread(NamedTuple):
    """How evenly a table of chains loads its targets: 1.0 is best, 0.0 says nothing."""

    pairs: float
    """Chains that a pair of targets shares, the most over the mean."""
    rebuild: float
    """Chains that one target has to read for a lost one, the most over the mean, for the worst
    one lost."""
    heads: float
    """Chains of which a target is the head: where writes of files go first."""


# --- the table


def chains_per_target(partners: int, copies: int) -> int:
    """So many that with each of ``partners`` it can share equally many."""
    if partners <= 0:
        return 0
    for count in range(CHAINS_PER_TARGET, CHAINS_PER_TARGET_MAX + 1):
        if count * (copies - 1) % partners == 0:
            return count
    return min(CHAINS_PER_TARGET_MAX, max(CHAINS_PER_TARGET, -(-partners // (copies - 1))))


class _Table:
    """A table while it grows. Places are indexes of sites."""

    def __init__(self, sites: Sequence[Site], copies: int) -> None:
        self.sites = sites
        self.copies = copies
        count = len(sites)
        self.pairs: NDArray[np.int64] = np.zeros((count, count), np.int64)
        self.degree: NDArray[np.int64] = np.zeros(count, np.int64)
        self.heads: NDArray[np.int64] = np.zeros(count, np.int64)
        self.reads: NDArray[np.int64] = np.zeros((count, count), np.int64)
        self.hosts = _numbers([site.host for site in sites])
        racks = [site.rack for site in sites]
        # Targets that do not say where they are count as one rack.
        self._racks = _numbers(racks)
        self._by_rack = len(set(racks)) >= copies

    def count(self, places: Sequence[int]) -> None:
        """A chain with these members, in order."""
        for place in places:
            self.degree[place] += 1
        for one, other in itertools.permutations(places, 2):
            self.pairs[one, other] += 1
        if places:
            self.heads[places[0]] += 1
        for place in places:
            source = _source(places, place)
            if source is not None:
                self.reads[place, source] += 1

    def next(self, first: int) -> list[int] | None:
        """Members of the next chain of ``first``. None if there are not enough domains."""
        return (self._pick(first, by_rack=True) if self._by_rack else None) or self._pick(
            first, by_rack=False
        )

    def _pick(self, first: int, *, by_rack: bool) -> list[int] | None:
        chosen = [first]
        usable = np.ones(len(self.sites), bool)
        # A pair more counts for more than all chains that a target has.
        factor = int(self.degree.max()) + 1
        while True:
            last = chosen[-1]
            usable &= self.hosts != self.hosts[last]
            if by_rack:
                usable &= self._racks != self._racks[last]
            if len(chosen) == self.copies:
                return chosen
            left = np.flatnonzero(usable)
            if not len(left):
                return None
            shared = self.pairs[chosen][:, left].sum(axis=0)
            chosen.append(int(left[np.argmin(shared * factor + self.degree[left])]))

    def shared(self, places: Sequence[int]) -> int:
        """Chains that pairs of these members share already."""
        return sum(int(self.pairs[one, other]) for one, other in itertools.combinations(places, 2))

    def ordered(self, places: Sequence[int]) -> tuple[int, ...]:
        """The order in which heads, and those that are read when one is lost, are as even as they
        can be."""
        return min(itertools.permutations(sorted(places)), key=self._cost)

    def _cost(self, places: tuple[int, ...]) -> int:
        reads = 0
        for place in places:
            source = _source(places, place)
            if source is not None:
                reads += 2 * int(self.reads[place, source]) + 1
        return reads + 2 * int(self.heads[places[0]])


def _numbers(names: Sequence[str]) -> NDArray[Any]:
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def _source(members: Sequence[int], lost: int) -> int | None:
    """Who brings a new member in step: the last one that is left."""
    left = [member for member in members if member != lost]
    return left[-1] if left else None


class Planned(NamedTuple):
    """A chain of a table: one that exists, or None and its members."""

    chain_id: int | None
    members: tuple[int, ...]


def design(
    sites: Sequence[Site], copies: int, existing: Mapping[int, Collection[int]] | None = None
) -> list[Planned]:
    """A table for ``sites``, made of ``existing`` chains (members by chain) as far as they do as
    well as new ones: those that do not take no new chunks."""
    if not sites:
        return []
    table = _Table(sites, copies)
    unused = _Unused(sites, copies, existing or {})
    wanted = np.array(
        [chains_per_target(int((table.hosts != host).sum()), copies) for host in table.hosts]
    )
    made: list[Planned] = []
    while True:
        short = np.flatnonzero(table.degree < wanted)
        if not len(short):
            return made
        first = int(short[np.argmin(table.degree[short])])
        chosen = table.next(first)
        if chosen is None:
            return made
        found = unused.take(table, first, table.shared(chosen))
        places = table.ordered(chosen) if found is None else found[1]
        table.count(places)
        members = tuple(sites[place].target_id for place in places)
        made.append(Planned(None if found is None else found[0], members))


class _Unused:
    """Whole chains that exist and are not in the table yet."""

    def __init__(
        self, sites: Sequence[Site], copies: int, existing: Mapping[int, Collection[int]]
    ) -> None:
        places = {site.target_id: place for place, site in enumerate(sites)}
        self._places: dict[int, tuple[int, ...]] = {}
        self._of: dict[int, list[int]] = {}
        for chain_id in sorted(existing):
            members = tuple(sorted(places[m] for m in existing[chain_id] if m in places))
            if len(members) == copies:
                self._places[chain_id] = members
                for place in members:
                    self._of.setdefault(place, []).append(chain_id)

    def take(
        self, table: _Table, first: int, shared_max: int
    ) -> tuple[int, tuple[int, ...]] | None:
        """One of ``first`` whose members share at most so many chains."""
        best: tuple[int, int] | None = None
        for chain_id in self._of.get(first, ()):
            members = self._places.get(chain_id)
            if members is not None:
                shared = table.shared(members)
                if shared <= shared_max and (best is None or shared < best[0]):
                    best = shared, chain_id
        return None if best is None else (best[1], self._places.pop(best[1]))


def measure(sites: Sequence[Site], chains: Sequence[Sequence[int]]) -> Spread:
    """Of a table. Pairs on one host share nothing and are left out."""
    table = _Table(sites, 1)
    places = {site.target_id: place for place, site in enumerate(sites)}
    for members in chains:
        table.count([places[member] for member in members if member in places])
    if not sites:
        return Spread(0.0, 0.0, 0.0)
    apart = table.hosts[:, None] != table.hosts[None, :]
    reads = [_uneven(table.reads[place][apart[place]]) for place in range(len(sites))]
    return Spread(_uneven(table.pairs[apart]), max(reads), _uneven(table.heads))


def _uneven(counts: NDArray[Any]) -> float:
    mean = float(counts.mean()) if len(counts) else 0.0
    return float(counts.max()) / mean if mean else 0.0


class Loads:
    """How many chains targets have, and share with each other."""

    def __init__(self, chains: Iterable[Sequence[int]] = ()) -> None:
        self._shared: Counter[tuple[int, int]] = Counter()
        self._load: Counter[int] = Counter()
        for members in chains:
            self.add(members)

    def add(self, members: Sequence[int]) -> None:
        self._load.update(members)
        self._shared.update(itertools.permutations(members, 2))

    def joined(self, members: Sequence[int], other: int) -> None:
        """``other`` has become one of a chain's members."""
        self._load[other] += 1
        self._shared.update(pair for m in members for pair in ((m, other), (other, m)))

    def best(self, sites: Sequence[Site], members: Sequence[Site]) -> int | None:
        """The target of ``sites`` for a place beside ``members``: on another host, in another rack
        if there is one, sharing the fewest chains with them."""
        hosts = {member.host for member in members}
        racks = {member.rack for member in members}

        def cost(site: Site) -> tuple[bool, int, int, int]:
            shared = sum(self._shared[site.target_id, member.target_id] for member in members)
            return site.rack in racks, shared, self._load[site.target_id], site.target_id

        usable = [site for site in sites if site.host not in hosts]
        return min(usable, key=cost).target_id if usable else None


# --- the order of a file's chains

FEW_CHAINS = 24
"""Up to here a loop takes no longer than numpy, which takes 9 us for a single one."""


def splitmix64(number: int) -> int:
    """Steele, Lea and Flood 2014: one step of the generator, as a hash of 64 bits."""
    z = (number + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def in_order(inode: int, chains: Sequence[int], count_max: int) -> list[int]:
    """The first of ``chains`` as a file with this inode number takes them: in the order of
    ``splitmix64(inode * 2^32 + chain)``."""
    if len(chains) <= FEW_CHAINS:
        start = inode << 32 & MASK
        return sorted(chains, key=lambda chain: splitmix64(start + chain))[:count_max]
    found = np.array(chains, np.uint64)
    order = np.argsort(_splitmix64(found + np.uint64(inode << 32 & MASK)), kind="stable")
    first: list[int] = found[order[:count_max]].tolist()
    return first


def _splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Of many at once: thousands of chains take some 50 us."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def runs(sizes: Sequence[int], chains: int, run_bytes_min: int, run_bytes_max: int) -> list[int]:
    """Which run each block of a batch belongs to: consecutive blocks, as many runs as there are
    chains, but none larger or (the last one apart) smaller than said."""
    wanted = -(-sum(sizes) // max(1, chains))
    limit = min(run_bytes_max, max(run_bytes_min, wanted))
    found: list[int] = []
    number = filled = 0
    for size in sizes:
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        found.append(number)
        filled += size
    return found
