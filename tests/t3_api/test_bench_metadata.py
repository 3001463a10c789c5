"""The metadata benchmark runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfs_tools.bench_metadata import bench_metadata


def test_every_figure_is_measured_against_its_limit(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--dir", str(tmp_path), "--scale", "300", "--operations", "4", "--rounds", "1"]
    result = CliRunner().invoke(bench_metadata, [*options, "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    ways = ("one at a time", "32 in one write")
    steps = [f"{step}, {way}" for way in ways for step in ("create", "stat", "rename", "unlink")]
    put = "put (prepare, commit) of 64 blocks"
    assert [(row["path"], row["clients"]) for row in rows] == [
        ("service memory, files", 0),
        *((step, 1) for step in steps[:4]),
        *((f"{step}, CPU", 1) for step in ("create", "stat", "rename", "unlink")),
        *((step, 1) for step in steps[4:]),
        *((step, 4) for step in steps),
        ("readdir of 300 entries", 1),
        ("restart after kill -9, files", 1),
        ("restart after kill -9, files, CPU", 1),
        ("service memory, blocks", 0),
        ("service memory a block, as stored", 0),
        ("store, its file, a block", 0),
        ("store, pages in use, a block", 0),
        ("match of 300 keys", 1),
        ("names matched", 4),
        (put, 1),
        (put, 4),
        ("restart after kill -9, blocks", 1),
        ("restart after kill -9, blocks, CPU", 1),
        ("service memory a block, after a restart", 0),
    ]
    assert all(row["entries"] == 300 for row in rows)
    measured = [row for row in rows if "memory" not in row["path"]]  # at 300 blocks it is noise
    assert all(row["value"] > 0 and row["limit"] > 0 for row in measured)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    "options",
    [["--scale", "ten"], ["--scale", "0"], ["--servers", "2"], ["--store", "x", "--scale", "1,2"]],
)
def test_what_cannot_be_measured_is_refused(options: list[str]) -> None:
    result = CliRunner().invoke(bench_metadata, options)
    assert result.exit_code == 2, result.output
