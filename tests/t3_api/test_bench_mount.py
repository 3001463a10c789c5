"""The benchmark of the mount runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from kvfs_tools.bench_mount import Row, bench_mount


def test_every_figure_is_measured_beside_the_backing_file_system(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--dir", str(tmp_path), "--files", "10", "--blocks", "2", "--block-kib", "128"]
    result = CliRunner().invoke(bench_mount, [*options, "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert [row["what"].split(",")[0] for row in rows] == [
        "create and close",
        "stat",
        "open and close",
        "list with types and sizes",
        "unlink",
        "read of blocks",
        "read of blocks",
        "read of blocks",
        "block files",
    ]
    for row in rows:
        assert row["plain"] > 0
        assert set(row["figures"]) == set(row["ratios"]) == {"direct", "pyfuse3"}
        assert min(*row["figures"].values(), *row["ratios"].values()) > 0
        assert row["first_to_last"] > 0
        assert set(row["cpu"]) == {"direct", "pyfuse3"}
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_medians_of_the_rounds_and_of_their_ratios() -> None:
    rounds = [{"direct": 4.0, "pyfuse3": 1.0}, {"direct": 9.0, "pyfuse3": 3.0},
              {"direct": 6.0, "pyfuse3": 1.0}]  # fmt: skip
    limits = [{"direct": 4.0, "pyfuse3": 2.0}] * 3
    row = Row.of("w", "/s", rounds, limits, {})
    assert (row.plain, row.figures) == (3.0, {"direct": 6.0, "pyfuse3": 1.0})
    assert (row.ratios, row.first_to_last) == ({"direct": 1.5, "pyfuse3": 0.5}, 4.0)
