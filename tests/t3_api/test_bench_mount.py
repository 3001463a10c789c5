"""The benchmark of the mount runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfs_base.limits import KIB, MIB
from kvfs_tools import mount_systems
from kvfs_tools.bench_mount import bench_mount
from kvfs_tools.mount_fio import workloads
from kvfs_tools.mount_rows import Comparison, Row, Sample
from kvfs_tools.mount_systems import ClusterFailed, PeerMissing, System

TINY = ["--files", "10", "--blocks", "2", "--block-kib", "128", "--rounds", "1"]
NAMES = ["create and close", "stat", "open and close", "list with types and sizes", "rename"]
KV_ROWS = 4
FILE_ROWS = 2

pytestmark = pytest.mark.usefixtures("kept_caches")


def run(tmp_path: Path, *options: str) -> list[dict[str, object]]:
    out = tmp_path / "rows.json"
    argv = ["--dir", str(tmp_path), *TINY, "--json", str(out), *options]
    result = CliRunner().invoke(bench_mount, argv)
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]  # nothing else is left behind
    rows: list[dict[str, object]] = json.loads(out.read_text())
    return rows


def test_every_figure_is_measured_beside_the_backing_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_tools.bench_mount.SETTLED_SECONDS", 0)
    monkeypatch.setattr("kvfs_tools.mount_names.FORGOTTEN_SECONDS", 0)
    rows = run(tmp_path)
    whats = [str(row["what"]).split(",")[0] for row in rows]
    assert whats == [*NAMES, "unlink", *["KV blocks"] * KV_ROWS, *["block files"] * FILE_ROWS]
    for row in rows:
        assert row["plain"] > 0  # type: ignore[operator]
        for by_system in (row["figures"], row["ratios"]):
            assert set(by_system) == {"direct", "pyfuse3"}  # type: ignore[call-overload]
            assert min(by_system.values()) > 0  # type: ignore[attr-defined]
        assert set(row["lead"]) == {"pyfuse3"}  # type: ignore[call-overload]
        assert set(row["cpu"]) == {"direct", "pyfuse3"}  # type: ignore[call-overload]


def test_limits_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_tools.mount_names.FORGOTTEN_SECONDS", 0)
    peers = ["--peer", "memory", "--peer", "empty"]
    rows = run(tmp_path, "--part", "names", "--frontend", "direct", *peers)
    assert len(rows) == len(NAMES) + 1
    for row in rows:
        figures: dict[str, float] = row["figures"]  # type: ignore[assignment]
        assert set(figures) == {"direct", "memory", "empty"} and min(figures.values()) > 0


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_fio_reads_and_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_tools.bench_mount.SETTLED_SECONDS", 0)
    monkeypatch.setattr("kvfs_tools.mount_fio.WARM_SECONDS", 0.1)
    monkeypatch.setattr("kvfs_tools.mount_fio.NEW_BYTES_MIN", 2 * MIB)
    options = ["--part", "fio", "--frontend", "direct", "--sizes", "64", "--jobs", "2"]
    options += ["--peer", "again"]
    rows = run(tmp_path, *options, "--file-mib", "1")
    reads = [row for row in rows if str(row["what"]).startswith("fio, read, 64 KiB")]
    writes = [row for row in rows if str(row["what"]).startswith("fio, write, 64 KiB")]
    assert len(writes) == 2 and len(reads) in (2, 4) and len(rows) == len(reads) + len(writes)
    written = run(tmp_path, *options, "--file-mib", "1", "--kind", "write")
    assert [row["what"] for row in written] == ["fio, write, 64 KiB in a row, 2 jobs"]
    assert set(written[0]["figures"]) == {"direct", "again"}  # type: ignore[call-overload]


def test_what_is_not_a_number_is_refused() -> None:
    result = CliRunner().invoke(bench_mount, ["--sizes", "4,many"])
    assert result.exit_code == 2 and "many" in result.output


def test_workloads_have_names_of_their_own() -> None:
    chosen = list(workloads())
    assert len({str(work) for work in chosen}) == len(chosen)
    assert "fio, read, 4 KiB at random, 4 jobs, warm" in map(str, chosen)
    assert "fio, write, 4 MiB in a row, 1 job" in map(str, chosen)
    assert {work.request_bytes for work in chosen} == {4 * KIB, 64 * KIB, MIB, 4 * MIB}


def test_a_peer_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    for peer in (mount_systems.juicefs, mount_systems.moosefs):
        with pytest.raises(PeerMissing, match="install"), peer(tmp_path):
            pass


def test_a_peer_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n[ $1 = format ] || { echo broken; exit 1; }\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(
        mount_systems.shutil, "which", lambda n: str(program) if n == "juicefs" else None
    )
    with pytest.raises(ClusterFailed, match="broken"), mount_systems.juicefs(tmp_path):
        pass


def test_rounds_take_turns_and_medians_are_of_each_rounds_ratios(tmp_path: Path) -> None:
    plain, fast, slow = (System(name, tmp_path, tmp_path) for name in ("plain", "fast", "slow"))
    rates = {
        "plain": iter([2.0, 4.0, 2.0, 3.0, 2.0, 2.0, 2.0]),
        "fast": iter([1.0, 4.0, 9.0, 6.0]),
        "slow": iter([1.0, 1.0, 3.0, 1.0]),
    }
    comparison = Comparison(plain, 3)
    turns: list[str] = []

    def measure(system: System) -> Sample:
        turns.append(system.name)
        return Sample(next(rates[system.name]), 1.0, 0.5)

    comparison.add("w", "/s", [fast, slow], measure)
    (row,) = comparison.rows
    assert turns == ["fast", "slow", "plain", *["fast", "plain", "slow", "plain"] * 3]
    assert row.figures == {"fast": 6.0, "slow": 1.0}
    # Held against the mean of the neighbours: 3, 2.5, 2 and 3, 2.5, 2.
    assert row.ratios == {"fast": 3.0, "slow": 0.5}
    assert row.lead == {"slow": 4.0} and row.plain == 2.5
    assert row.cpu["fast"] == pytest.approx(1.5 / 19 * 1e6)


def test_bytes_are_told_in_gigabytes() -> None:
    row = Row.of("w", "GB/s", [{"a": Sample(2e9, 1.0, 3.0)}], [{"a": 4e9}])
    assert (row.plain, row.figures, row.ratios, row.cpu) == (
        4.0,
        {"a": 2.0},
        {"a": 0.5},
        {"a": 1.5},
    )
