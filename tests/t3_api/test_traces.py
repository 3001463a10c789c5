"""Traces: what the reader accepts, and figures that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfs_base.errors import InvalidRequest
from kvfs_tools.traces import (
    LINE_BYTES_MAX,
    TraceError,
    TraceRequest,
    lru_hit_rate,
    percentile,
    prefix_hits,
    read_trace,
    reuse_distances,
    trace_statistics,
    write_trace,
)

GOOD = b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'


def test_a_written_trace_reads_back(tmp_path: Path) -> None:
    requests = [TraceRequest(0, 600, 5, (0, 1)), TraceRequest(27.5, 10, 0, (7,))]
    assert write_trace(tmp_path / "trace", requests) == 2
    assert list(read_trace(tmp_path / "trace")) == requests
    assert list(read_trace(tmp_path / "trace", limit=1)) == requests[:1]
    assert list(read_trace(tmp_path / "trace", limit=0)) == []


def test_unknown_fields_and_empty_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\n" + GOOD.replace(b"{", b'{"chat_id": 3, ') + b"\n\n" + GOOD)
    assert len(list(read_trace(path))) == 2


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        GOOD.replace(b'"input_length": 600, ', b""),
        GOOD.replace(b"600", b"-1"),
        GOOD.replace(b"600", b'"many"'),
        GOOD.replace(b"[0, 1]", b"[0, -1]"),
        GOOD.replace(b"[0, 1]", b"[1, 1]"),
        GOOD.replace(b"[0, 1]", b"7"),
        b'{"timestamp": 0, "\xff": 1}',
        b" " * LINE_BYTES_MAX + b"{}",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(TraceError) as caught:
        list(read_trace(path))
    assert (caught.value.path, caught.value.line) == (str(path), 3)
    assert caught.value.detail.startswith(f"{path}:3: ")


def test_a_missing_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as caught:
        list(read_trace(tmp_path / "absent"))
    assert caught.value.line == 0


def test_tokens_of_a_partial_last_block() -> None:
    request = TraceRequest(0, 600, 5, (0, 1))
    assert [request.tokens(n) for n in (0, 1, 2)] == [0, 512, 600]


def test_hits_stop_at_the_first_gap() -> None:
    assert prefix_hits([(0, 1, 2), (0, 1, 3), (0, 4, 2), (5, 0, 1)]) == [0, 2, 1, 0]


def test_lru_evicts_what_was_not_used_longest() -> None:
    chains = [(0, 1), (0, 2), (0, 1)]
    assert lru_hit_rate(chains, 3) == 3 / 6
    assert lru_hit_rate(chains, 2) == 2 / 6  # 1 was evicted by 2
    assert lru_hit_rate(chains, 1) == 0
    assert lru_hit_rate([], 1) == 0


def test_reuse_distance_counts_distinct_blocks_between() -> None:
    # 0 comes back after {0, 1}, then after {0, 2}; 1 comes back after {1, 0, 2}.
    assert reuse_distances([(0, 1), (0, 2), (0, 1)]) == [1, 1, 2]
    assert reuse_distances([(0,), (0,)]) == [0]


def test_an_lru_that_holds_the_reuse_distance_hits() -> None:
    """Mattson: where no gap interferes, both count the same."""
    chains = [(i % 7,) for i in range(50)] + [(i % 3,) for i in range(20)]
    distances = reuse_distances(chains)
    for capacity in range(1, 9):
        hits = sum(d < capacity for d in distances)
        assert lru_hit_rate(chains, capacity) == pytest.approx(hits / 70)


def test_statistics_of_a_small_trace() -> None:
    requests = [TraceRequest(0, 1024, 1, (0, 1)), TraceRequest(1, 1024, 1, (0, 2))]
    found = trace_statistics(requests, shares=(1.0,))
    assert (found.requests, found.references, found.distinct) == (2, 4, 3)
    assert found.hit_rate == found.lru_hit_rates[1.0] == 1 / 4
    assert found.mean_blocks == 2 and found.first_block_only == 1
    with pytest.raises(InvalidRequest):
        trace_statistics([])


def test_percentiles() -> None:
    assert percentile([], 50) == 0
    assert [percentile(list(range(100)), p) for p in (0, 50, 99, 100)] == [0, 50, 99, 99]
