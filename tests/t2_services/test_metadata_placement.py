"""Tables of chains: how evenly they load targets, and which chains a file takes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs_metadata.cluster.placement import (
    Loads,
    Site,
    chains_per_target,
    design,
    in_order,
    measure,
    runs,
    splitmix64,
)


def sites(count: int, hosts: int = 0, racks: int = 0) -> list[Site]:
    return [
        Site(n + 1, f"h{n % hosts if hosts else n}", f"r{n % racks}" if racks else "")
        for n in range(count)
    ]


def table(places: list[Site], copies: int) -> list[tuple[int, ...]]:
    return [chain.members for chain in design(places, copies)]


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 10, 13, 16, 25, 31, 50])
def test_the_spread_of_a_table(count: int, copies: int) -> None:
    """Pairs cannot share fractions of chains: the most is the mean, rounded up, or one more."""
    places = sites(count)
    chains = table(places, copies)
    assert all(len(set(chain)) == copies for chain in chains)
    shared = dict.fromkeys(itertools.combinations(range(1, count + 1), 2), 0)
    for chain in chains:
        for pair in itertools.combinations(sorted(chain), 2):
            shared[pair] += 1
    assert max(shared.values()) - min(shared.values()) <= (0 if copies == 2 else 3)
    spread = measure(places, chains)
    if copies == 2:
        assert spread.pairs == spread.rebuild == 1.0
    assert spread.pairs <= 2.0 and spread.rebuild <= 2.0 and spread.heads <= 1.3
    degrees = [sum(n in chain for chain in chains) for n in range(1, count + 1)]
    assert min(degrees) >= chains_per_target(count - 1, copies)
    assert max(degrees) <= min(degrees) + copies


@pytest.mark.parametrize("copies", [2, 3])
def test_a_table_that_grows_is_as_even_and_keeps_what_is_as_good(copies: int) -> None:
    existing: dict[int, tuple[int, ...]] = {}
    for count in range(copies, 21):
        places = sites(count)
        plan = design(places, copies, existing)
        made = [chain.members for chain in plan if chain.chain_id is None]
        for members in made:
            existing[len(existing) + 1] = members
        spread = measure(places, [chain.members for chain in plan])
        fresh = measure(places, table(places, copies))
        assert spread.pairs <= max(1.5, fresh.pairs * 1.35), count
        # Chains of the new target, and of those that took fewer of the old ones.
        assert len(made) <= 2.5 * chains_per_target(count - 1, copies), count
    assert design(sites(20), copies, existing) == design(sites(20), copies, existing)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 4), st.integers(2, 3))
def test_copies_are_on_different_hosts_and_racks(
    count: int, hosts: int, racks: int, copies: int
) -> None:
    places = sites(count, hosts, racks)
    known = {site.target_id: site for site in places}
    chains = table(places, copies)
    for chain in chains:
        assert len({known[member].host for member in chain}) == copies
    there = len({site.host for site in places})
    assert bool(chains) == (there >= copies)


def test_racks_are_mixed_only_where_there_are_too_few() -> None:
    places = sites(12, racks=3)
    for chain in table(places, 3):
        assert {(member - 1) % 3 for member in chain} == {0, 1, 2}
    assert table(sites(12, racks=2), 3)


def test_a_place_goes_to_whoever_shares_least() -> None:
    places = sites(4)
    loads = Loads([(1, 2), (1, 3), (1, 3), (1, 4)])
    assert loads.best(places[1:], places[:1]) == 2
    loads.joined((1,), 2)
    loads.joined((1,), 2)
    assert loads.best(places[1:], places[:1]) == 4
    assert loads.best([Site(9, "h0")], places[:1]) is None, "on the same host"
    two = [Site(5, "h5", "a"), Site(6, "h6", "b")]
    assert Loads().best(two, [Site(1, "h0", "a")]) == 6, "in another rack"


# --- files


def test_splitmix64() -> None:
    """The first numbers that the generator draws from 1234567 (Vigna's reference)."""
    state, drawn = 1234567, []
    for _ in range(3):
        drawn.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert drawn == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(1, 2**63), st.lists(st.integers(1, 2**32 - 1), unique=True, max_size=40))
def test_anybody_can_compute_the_order(inode: int, chains: list[int]) -> None:
    expected = sorted(chains, key=lambda chain: splitmix64((inode * 2**32 + chain) % 2**64))
    assert in_order(inode, chains, 16) == expected[:16]


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(1, 10))
def test_runs(sizes: list[int], chains: int) -> None:
    found = runs(sizes, chains, 50, 200)
    assert found[0] == 0 and all(b - a in (0, 1) for a, b in itertools.pairwise(found))
    for run in set(found):
        assert sum(size for size, r in zip(sizes, found, strict=True) if r == run) <= 200
