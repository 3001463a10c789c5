"""The generator: repeatable, well-formed, and close to the trace it was fitted to."""

from __future__ import annotations

import dataclasses

import pytest

from kvfs_base.errors import InvalidRequest
from kvfs_tools.generator import REFERENCE, GeneratorConfig, comparison, generate
from kvfs_tools.traces import TRACE_BLOCK_TOKENS, trace_statistics


def test_a_seed_gives_one_trace() -> None:
    config = GeneratorConfig(requests=300, seed=5)
    assert generate(config) == generate(config)
    assert generate(config) != generate(dataclasses.replace(config, seed=6))


def test_requests_are_well_formed() -> None:
    trace = generate(GeneratorConfig(requests=500))
    assert len(trace) == 500
    before = 0.0
    for request in trace:
        assert request.timestamp >= before
        before = request.timestamp
        assert len(request.hash_ids) == -(-request.input_length // TRACE_BLOCK_TOKENS)
        assert len(set(request.hash_ids)) == len(request.hash_ids)
        assert request.hash_ids[0] == trace[0].hash_ids[0]


def test_an_id_always_has_the_same_prefix() -> None:
    parents: dict[int, int] = {}
    for request in generate(GeneratorConfig(requests=2000)):
        for parent, child in zip((-1, *request.hash_ids), request.hash_ids, strict=False):
            assert parents.setdefault(child, parent) == parent


@pytest.mark.parametrize("requests", [3_000, 12_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_reuse_resembles_the_reference_trace(requests: int, seed: int) -> None:
    """Tolerances: points of hit rate and shares, relative for sizes and distances; twice as wide
    for a quarter of the requests."""
    found = trace_statistics(generate(GeneratorConfig(requests=requests, seed=seed)))
    wide = 2 if requests < 6_000 else 1
    assert found.hit_rate == pytest.approx(REFERENCE.hit_rate, abs=0.03 * wide)
    assert found.mean_blocks == pytest.approx(REFERENCE.mean_blocks, rel=0.08 * wide)
    assert found.first_block_only == pytest.approx(REFERENCE.first_block_only, abs=0.07 * wide)
    for share, rate in REFERENCE.lru_hit_rates.items():
        assert found.lru_hit_rates[share] == pytest.approx(rate, abs=0.03 * wide), share
    for percent, blocks in REFERENCE.blocks_per_request.items():
        near = pytest.approx(blocks, rel=0.15 * wide, abs=1.5)
        assert found.blocks_per_request[percent] == near, percent
    for percent in (50, 75, 90):
        near = pytest.approx(REFERENCE.reuse_distance[percent], rel=0.20 * wide)
        assert found.reuse_distance[percent] == near, percent


def test_the_comparison_has_every_figure() -> None:
    rows = comparison(REFERENCE)
    assert all(len(row) == 3 and row[1] == row[2] for row in rows)
    assert len(rows) >= 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests": 0},
        {"requests_per_second": 0},
        {"edit_share": 1.5},
        {"opening_share": 0.0},
        {"continuation": ()},
        {"continuation": (0.5, 1.0)},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        GeneratorConfig(**wrong)  # type: ignore[arg-type]
