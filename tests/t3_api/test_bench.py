"""The benchmark runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfs_tools.bench import Row, bench

pytestmark = pytest.mark.usefixtures("kept_caches")


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_every_row_is_measured_against_its_limit(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--dir", str(tmp_path), "--block-mib", "0.125", "--total-mib", "16"]
    result = CliRunner().invoke(bench, [*options, "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert [row["path"].split(",")[0] for row in rows] == [
        "API get",
        "match of 1000 keys at the client",
        "API get",
        "the same files by 8 threads",
        "API put",
        "mount",
        "mount",
    ]
    assert all(row["value"] > 0 and row["limit"] > 0 for row in rows)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_keeps_medians_and_the_median_of_ratios() -> None:
    row = Row.of("p", "GB/s", [(1.0, 2.0), (3.0, 4.0), (2.0, 8.0)], "", "")
    assert (row.value, row.limit, row.ratio, row.rounds) == (2.0, 4.0, 0.5, 3)
