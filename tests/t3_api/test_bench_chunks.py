"""The benchmark of the data path runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfs_tools.bench_chunks import Sample, bench_chunks, measure
from kvfs_tools.chunk_rig import ChunkRig, check

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")


@needs_fio
def test_every_path_is_measured_against_its_limits(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--dir", str(tmp_path), "--sizes", "64K", "--total-mib", "1", "--servers", "2"]
    result = CliRunner().invoke(bench_chunks, [*options, "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    paths = ["local read", "remote read", "local write", "remote write"]
    assert [(row["chunk_bytes"], row["path"]) for row in rows] == [
        (64 << 10, path) for path in paths
    ]
    for row in rows:
        assert row["rate"] > 0
        assert row["client_cpu"] > 0
        assert row["server_cpu"] > 0
        assert (row["fio"] is not None) == (row["path"] != "remote read")
        assert (row["pair"] is not None) == row["path"].startswith("remote")
        limit = row["pair"] or row["fio"]
        assert limit > 0
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_chunks_of_several_copies_are_on_as_many_servers(tmp_path: Path) -> None:
    memory = memoryview(mmap.mmap(-1, 8 * mmap.PAGESIZE))
    memory[:] = os.urandom(len(memory))
    with ChunkRig(tmp_path / "rig", 2, 2) as rig:
        writes = rig.fill(memory, 8, mmap.PAGESIZE)
        check(rig.remote.write_chunks(writes))
        assert [len(rig.files_of(writes, number)) for number in (0, 1)] == [8, 8]
        found = memoryview(bytearray(len(memory)))
        check(rig.remote.read_chunks(rig.reads_of(writes, found)))
        assert found == memory
        rig.remove(writes)
        assert rig.files_of(writes, 0) == []
        assert rig.server_seconds() > 0


def test_a_server_that_lost_everything_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--rebuild", "--dir", str(tmp_path), "--sizes", "64K", "--total-mib", "1"]
    options += ["--servers", "3", "--replicas", "2", "--rounds", "1", "--json", str(out)]
    result = CliRunner().invoke(bench_chunks, options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert [(row["what"], row["chunk_bytes"]) for row in rows] == [
        ("blocks", 64 << 10),
        ("files", 1 << 20),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["rate"] > 0
        assert row["write_rate"] > 0
        assert 1 <= row["spread"] <= 2
    assert 0 < rows[0]["lost_bytes"] <= 1 << 20


def test_requests_of_several_updates_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--updates", "--dir", str(tmp_path), "--sizes", "64K", "--total-mib", "1"]
    options += ["--servers", "2", "--replicas", "2", "--rounds", "1", "--json", str(out)]
    result = CliRunner().invoke(bench_chunks, options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert [(row["what"], row["chunk_bytes"]) for row in rows] == [
        (what, 64 << 10) for what in ("written", "synced", "cut")
    ]
    assert all(row["milliseconds"] > 0 and row["cpu_milliseconds"] > 0 for row in rows)


def test_a_limit_is_the_better_of_both_sides() -> None:
    limits = iter([Sample(3.0), Sample(1.0), Sample(2.0)])
    figures, best = measure(2, {"disk": lambda: next(limits)}, lambda: Sample(0.5))
    assert [sample.rate for sample in figures] == [0.5, 0.5]
    assert [sample.rate for sample in best["disk"]] == [3.0, 2.0]


@needs_fio
@pytest.mark.parametrize(
    "options",
    [
        ["--sizes", "ten"],
        ["--sizes", "1000"],
        ["--servers", "0"],
        ["--replicas", "4"],
        ["--rebuild"],
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str]) -> None:
    result = CliRunner().invoke(bench_chunks, options)
    assert result.exit_code == 2, result.output
