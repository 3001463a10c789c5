"""The GPU benchmark runs, on the CPU device and at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfs_tools import gpu_disk
from kvfs_tools.bench_gpu import bench_gpu

pytestmark = pytest.mark.usefixtures("kept_caches")


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_every_row_is_measured_against_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_disk, "READ_THREADS", (8, 16))
    monkeypatch.setattr(gpu_disk, "FIO_DEPTHS", (("1M", 8, 1),))
    out = tmp_path / "rows.json"
    options = ["--dir", str(tmp_path), "--device", "cpu", "--total-mib", "64", "--rounds", "1"]
    options += ["--json", str(out), "--commit", "abc"]
    for section in ("arena", "copies", "store", "devices", "disk"):
        options += ["--only", section]
    result = CliRunner().invoke(bench_gpu, options)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["commit"], found["device"], found["failed"]) == ("abc", "cpu", [])
    paths = {row["path"] for row in found["rows"]}
    assert {"arena, bulk", "arena, paged", "store, pages to disk (put)"} <= paths
    assert "cold, disk to pages through the agent" in paths
    assert "cold, file to pages, 16 threads, verified" in paths
    assert "no direct reads: cpu has none" in found["notes"]
    assert all(row["gbps"] > 0 and row["limit_gbps"] > 0 for row in found["rows"])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
