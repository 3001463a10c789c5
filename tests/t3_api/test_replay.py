"""The replay against a store in memory: counts that follow from the trace, and wrong bytes that
are found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from kvfs_base.errors import CacheFull, InvalidRequest
from kvfs_base.limits import KIB, PAGE_BYTES
from kvfs_base.seams import Buffer
from kvfs_tools.generator import GeneratorConfig, generate
from kvfs_tools.replay import BlockPattern, Replay, ReplayConfig, ReplayReport, trace_keys
from kvfs_tools.traces import TraceRequest, prefix_hits

SIZE = 8 * KIB


class MemoryStore:
    """Keeps everything; ``damage`` and ``vanish`` change what get answers."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.damage: dict[bytes, bytes] = {}
        self.vanish: set[bytes] = set()
        self.full = False
        self.leases = 0

    def match(self, keys: Sequence[bytes]) -> int:
        return next((i for i, k in enumerate(keys) if k not in self.blocks), len(keys))

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> int:
        if self.full:
            raise CacheFull()
        new = [(k, bytes(b)) for k, b in zip(keys, buffers, strict=True) if k not in self.blocks]
        self.blocks.update(new)
        return len(new)

    @contextlib.contextmanager
    def get(self, keys: Sequence[bytes]) -> Iterator[list[memoryview | None]]:
        self.leases += 1
        stored = [self.damage.get(k, self.blocks.get(k)) for k in keys]
        gone = [k in self.vanish for k in keys]
        yield [None if v or b is None else memoryview(b) for b, v in zip(stored, gone, strict=True)]
        self.leases -= 1


def request(*ids: int) -> TraceRequest:
    return TraceRequest(0, 512 * len(ids) - 100, 10, ids)


def run(store: MemoryStore, *requests: TraceRequest, salt: bytes = b"") -> ReplayReport:
    report = Replay(store, ReplayConfig(SIZE, salt=salt)).run(requests)
    assert store.leases == 0
    return report


def test_counts_follow_from_the_trace() -> None:
    trace = generate(GeneratorConfig(requests=120))
    seen: list[int] = []
    store = MemoryStore()
    replay = Replay(store, ReplayConfig(PAGE_BYTES))
    report = replay.run(trace, lambda r: seen.append(r.requests))
    hits = prefix_hits([r.hash_ids for r in trace])
    assert seen == list(range(1, 121))
    assert report.hit_blocks == sum(hits) > 0
    assert report.hit_tokens == sum(r.tokens(h) for r, h in zip(trace, hits, strict=True))
    assert report.references == report.hit_blocks + report.stored_blocks
    assert report.bytes_in == report.stored_blocks * PAGE_BYTES
    assert report.bytes_out == report.hit_blocks * PAGE_BYTES
    assert report.wrong_blocks == report.vanished_blocks == report.refused_blocks == 0
    assert report.hit_rate == report.hit_blocks / report.references
    assert report.gigabytes_in_per_second > 0 and report.gigabytes_out_per_second > 0
    assert report.recent_keys[-1] in store.blocks


def test_a_request_longer_than_a_batch() -> None:
    store = MemoryStore()
    replay = Replay(store, ReplayConfig(SIZE))
    replay.batch = 4
    report = replay.run([request(*range(10)), request(*range(10))])
    assert (report.stored_blocks, report.hit_blocks) == (10, 10)


@pytest.mark.parametrize("page", [0, 1])
@pytest.mark.parametrize("offset", [0, 33, 40, 100, PAGE_BYTES - 1])
def test_one_wrong_byte_is_a_wrong_block(page: int, offset: int) -> None:
    store = MemoryStore()
    run(store, request(0, 1))
    key = trace_keys([1])[0]
    block = bytearray(store.blocks[key])
    block[page * PAGE_BYTES + offset] ^= 1
    store.damage[key] = bytes(block)
    report = run(store, request(0, 1))
    assert report.wrong_blocks == 1 and report.wrong_keys == [key]


@pytest.mark.parametrize("what", ["foreign", "torn", "swapped pages", "short"])
def test_pages_of_another_block_or_place_are_wrong(what: str) -> None:
    store = MemoryStore()
    run(store, request(0, 1))
    mine, other = (store.blocks[k] for k in trace_keys([1, 0]))
    wrong = {
        "foreign": other,
        "torn": mine[: SIZE - 512] + other[SIZE - 512 :],
        "swapped pages": mine[PAGE_BYTES:] + mine[:PAGE_BYTES],
        "short": mine[:PAGE_BYTES],
    }
    store.damage[trace_keys([1])[0]] = wrong[what]
    assert run(store, request(0, 1)).wrong_blocks == 1


def test_every_8_bytes_tell_whose_they_are() -> None:
    pattern = BlockPattern(SIZE)
    one, two = bytearray(SIZE), bytearray(SIZE)
    first, second = trace_keys([1, 2])
    pattern.fill(first, memoryview(one))
    pattern.fill(second, memoryview(two))
    assert pattern.wrong_pages(first, one) == []
    assert pattern.wrong_pages(first, two) == [0, 1]
    for word in range(48, PAGE_BYTES, 8):
        assert one[word : word + 8] != two[word : word + 8]


def test_what_vanishes_between_match_and_get_is_a_miss() -> None:
    store = MemoryStore()
    run(store, request(0, 1, 2))
    store.vanish.add(trace_keys([1])[0])
    report = run(store, request(0, 1, 2))
    assert (report.hit_blocks, report.vanished_blocks) == (1, 2)
    assert (report.known_blocks, report.wrong_blocks) == (2, 0)


def test_a_full_store_is_no_failure() -> None:
    store = MemoryStore()
    store.full = True
    report = run(store, request(0, 1))
    assert (report.refused_blocks, report.stored_blocks) == (2, 0)


def test_salts_do_not_meet() -> None:
    store = MemoryStore()
    run(store, request(0, 1), salt=b"a")
    assert run(store, request(0, 1), salt=b"b").hit_blocks == 0
    assert len(set(trace_keys(range(100)) + trace_keys(range(100), b"a"))) == 200


def test_a_deadline_stops_between_requests() -> None:
    report = Replay(MemoryStore(), ReplayConfig(SIZE, seconds=1e-9)).run([request(0)] * 3)
    assert report.stopped_early and report.requests < 3


@pytest.mark.parametrize("size", [0, -4096, 100, 1 << 40])
def test_block_sizes_are_whole_pages(size: int) -> None:
    with pytest.raises(InvalidRequest):
        BlockPattern(size)
    with pytest.raises(InvalidRequest):
        ReplayConfig(seconds=0)
