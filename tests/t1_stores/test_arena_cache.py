"""The block cache: a Hypothesis machine that holds it to its invariants, and cases one by one."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvfs_base.errors import ArenaFull
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.types import BlockInfo
from kvfs_gds.block_cache import BlockCache, Entry, Grant, State

PAGES = 8
KEYS = [bytes([n]) * 32 for n in range(6)]


def info(generation: int, pages: int = 1) -> BlockInfo:
    return BlockInfo(generation, pages * PAGE_BYTES, 0, 1)


def entries_of(grant: Grant) -> list[Entry]:
    return [entry for entry in grant.entries if entry is not None]


class Machine(RuleBasedStateMachine):
    """``contents`` stands for the arena's bytes: which generation was written where. ``asked`` are
    answers of the metadata service on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = BlockCache(PAGES * PAGE_BYTES)
        self.generation = dict.fromkeys(KEYS, 0)
        self.next_generation = 1
        self.pages: dict[int, int] = {}
        self.contents: list[int] = [0] * PAGES
        self.loading: list[Grant] = []
        self.leases: list[list[Entry]] = []
        self.asked: list[tuple[list[bytes], list[BlockInfo | None], int | None]] = []
        self.now = 0.0
        self.until = 0.0

    @rule(key=st.sampled_from(KEYS), pages=st.integers(1, 3))
    def store(self, key: bytes, pages: int) -> None:
        self.cache.revoke([self.generation[key]])  # before anybody is told
        self.generation[key] = self.next_generation
        self.pages[self.next_generation] = pages
        self.next_generation += 1

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4))
    def ask(self, keys: list[bytes]) -> None:
        revocations = self.cache.revocations
        infos = [
            info(self.generation[k], self.pages[self.generation[k]]) if self.generation[k] else None
            for k in keys
        ]
        self.asked.append((keys, infos, revocations))

    @precondition(lambda self: self.asked)
    @rule()
    def acquire(self) -> None:
        keys, infos, revocations = self.asked.pop(0)
        before = self.cache.usage()
        try:
            grant = self.cache.acquire(1, keys, infos, revocations)
        except ArenaFull:
            after = self.cache.usage()
            assert after.leased_bytes == before.leased_bytes
            return
        for key, found, entry in zip(keys, infos, grant.entries, strict=True):
            assert (found is None) == (entry is None)
            if entry is not None and found is not None:
                assert (entry.name, entry.generation, entry.size) == (
                    (1, key),
                    found.inode,
                    found.size,
                )
        if grant.load:
            self.loading.append(grant)
        else:
            self.leases.append(entries_of(grant))

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        grant = self.loading.pop(data.draw(st.integers(0, len(self.loading) - 1)))
        failed = set(data.draw(st.lists(st.sampled_from(grant.load))))
        for place in grant.load:
            entry = grant.entries[place]
            assert entry is not None and entry.state is State.LOADING
            if place not in failed:
                self.write(entry)
        self.cache.finish(grant, failed)
        self.leases.append(entries_of(grant))

    def write(self, entry: Entry) -> None:
        first = entry.offset // PAGE_BYTES
        count = entry.size // PAGE_BYTES
        self.contents[first : first + count] = [entry.generation] * count

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.cache.release(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True))
    def acquire_leased(self, keys: list[bytes]) -> None:
        """What is given without a question is what the service would have said."""
        count = self.cache.leased_prefix(1, keys, self.now)
        held = self.cache.acquire_leased(1, keys, self.now)
        if held is None:
            return
        assert self.now < self.until and count == len(keys)
        assert [entry.generation for entry in held] == [self.generation[key] for key in keys]
        assert {entry.state for entry in held} == {State.READY}
        self.leases.append(held)

    @rule()
    def watch(self) -> None:
        self.until = self.now + 4
        self.cache.watch(self.until)

    @rule(watching=st.booleans())
    def revoke_all(self, watching: bool) -> None:
        self.cache.revoke_all(watching=watching)
        assert self.cache.acquire_leased(1, KEYS[:1], self.now) is None

    @rule(seconds=st.sampled_from([1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        self.cache.revoke([self.generation[key]])
        self.generation[key] = 0
        self.cache.remove(1, [key])

    @invariant()
    def leased_bytes_are_what_was_loaded(self) -> None:
        held = {id(e): e for lease in self.leases for e in lease}
        for entry in held.values():
            if entry.state is State.READY:
                first = entry.offset // PAGE_BYTES
                there = self.contents[first : first + entry.size // PAGE_BYTES]
                assert set(there) == {entry.generation}

    @invariant()
    def usage_adds_up(self) -> None:
        held = {id(e): e for lease in self.leases for e in lease}
        held |= {id(e): e for grant in self.loading for e in entries_of(grant)}
        usage = self.cache.usage()
        assert usage.leased_bytes == sum(e.size for e in held.values())
        assert usage.leased_bytes <= usage.used_bytes <= PAGES * PAGE_BYTES


TestBlockCache = Machine.TestCase
TestBlockCache.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def loaded(cache: BlockCache, keys: list[bytes], generations: list[int]) -> Grant:
    grant = cache.acquire(1, keys, [info(g) for g in generations])
    cache.finish(grant)
    return grant


def test_a_block_is_loaded_once_and_others_wait() -> None:
    cache = BlockCache(PAGES * PAGE_BYTES)
    first = cache.acquire(1, KEYS[:2], [info(1), info(2)])
    second = cache.acquire(1, KEYS[1:3], [info(2), info(3)])
    assert (first.load, first.wait) == ([0, 1], [])
    assert (second.load, second.wait) == ([1], [0])
    waiting = second.entries[0]
    assert waiting is not None and waiting is first.entries[1]
    seen: list[State] = []

    def wait() -> None:
        assert waiting.finished.wait(60)
        seen.append(waiting.state)

    thread = threading.Thread(target=wait)
    thread.start()
    cache.finish(first)
    thread.join()
    assert seen == [State.READY]


def test_a_key_named_twice_has_two_references_and_one_extent() -> None:
    cache = BlockCache(PAGES * PAGE_BYTES)
    grant = cache.acquire(1, [KEYS[0]] * 2, [info(1)] * 2)
    assert (grant.load, grant.wait) == ([0], [1])
    assert grant.entries[0] is grant.entries[1]
    cache.finish(grant)
    entries = entries_of(grant)
    cache.release(entries[:1])
    assert cache.usage().leased_bytes == PAGE_BYTES
    cache.release(entries[1:])
    assert cache.usage().leased_bytes == 0


def test_the_least_recently_released_goes_first() -> None:
    cache = BlockCache(3 * PAGE_BYTES)
    for generation in (1, 2, 3):
        cache.release(entries_of(loaded(cache, [KEYS[generation]], [generation])))
    cache.release(entries_of(loaded(cache, [KEYS[1]], [1])))
    cache.release(entries_of(loaded(cache, [KEYS[4]], [4])))
    assert not cache.acquire(1, [KEYS[1], KEYS[3]], [info(1), info(3)]).load
    assert cache.usage().evictions == 1


def test_a_full_arena_takes_back_everything_it_gave() -> None:
    cache = BlockCache(3 * PAGE_BYTES)
    pinned = loaded(cache, KEYS[:1], [1])
    with pytest.raises(ArenaFull) as caught:
        cache.acquire(1, KEYS[:4], [info(g) for g in (1, 2, 3, 4)])
    assert caught.value.temporary
    assert cache.usage().leased_bytes == PAGE_BYTES
    assert cache.acquire(1, KEYS[1:3], [info(2), info(3)]).load == [0, 1]
    cache.release(entries_of(pinned))


def test_hits_of_a_batch_are_not_evicted_for_its_misses() -> None:
    cache = BlockCache(2 * PAGE_BYTES)
    cache.release(entries_of(loaded(cache, KEYS[:2], [1, 2])))
    grant = cache.acquire(1, [KEYS[5], KEYS[0]], [info(9), info(1)])
    hit = grant.entries[1]
    assert hit is not None and hit.state is State.READY
    assert grant.load == [0]


def test_another_generation_is_stale_and_its_extent_waits_for_its_readers() -> None:
    cache = BlockCache(2 * PAGE_BYTES)
    old = loaded(cache, KEYS[:1], [1])
    new = loaded(cache, KEYS[:1], [2])
    assert cache.usage().stale == 1
    assert entries_of(old)[0].offset != entries_of(new)[0].offset
    with pytest.raises(ArenaFull):
        cache.acquire(1, KEYS[1:2], [info(3)])
    cache.release(entries_of(old))
    assert cache.acquire(1, KEYS[1:2], [info(3)]).load == [0]


def test_a_failed_load_is_forgotten() -> None:
    cache = BlockCache(PAGES * PAGE_BYTES)
    grant = cache.acquire(1, KEYS[:2], [info(1), info(2)])
    cache.finish(grant, {1})
    cache.release(entries_of(grant))
    assert cache.usage().used_bytes == PAGE_BYTES
    assert cache.acquire(1, KEYS[:2], [info(1), info(2)]).load == [1]


def test_namespaces_do_not_see_each_other() -> None:
    cache = BlockCache(PAGES * PAGE_BYTES)
    loaded(cache, KEYS[:1], [1])
    assert cache.acquire(2, KEYS[:1], [info(2)]).load == [0]
    assert cache.usage().blocks == 2


def test_a_leased_block_is_given_until_it_is_revoked() -> None:
    cache = BlockCache(PAGES * PAGE_BYTES)
    cache.watch(10.0)
    for generation, key in enumerate(KEYS[:3], 1):
        grant = cache.acquire(1, [key], [info(generation)], cache.revocations)
        assert cache.acquire_leased(1, [key], 1.0) is None  # it is being loaded
        cache.finish(grant)
        cache.release(entries_of(grant))
    held = cache.acquire_leased(1, KEYS[:3], 9.9)
    assert held is not None and [entry.generation for entry in held] == [1, 2, 3]
    cache.release(held)
    assert cache.acquire_leased(1, KEYS[:3], 10.0) is None
    assert cache.acquire_leased(2, KEYS[:3], 1.0) is None
    cache.revoke([2])
    assert cache.leased_prefix(1, KEYS[:3], 1.0) == 1
    assert cache.acquire_leased(1, KEYS[:3], 1.0) is None
    cache.revoke_all(watching=False)
    assert cache.revocations is None and cache.leased_prefix(1, KEYS[:3], 1.0) == 0


def test_an_answer_that_a_revocation_overtook_is_not_kept() -> None:
    cache = BlockCache(PAGES * PAGE_BYTES)
    cache.watch(10.0)
    asked = cache.revocations
    cache.revoke([7])
    grant = cache.acquire(1, KEYS[:1], [info(7)], asked)
    cache.finish(grant)
    assert cache.acquire_leased(1, KEYS[:1], 1.0) is None
