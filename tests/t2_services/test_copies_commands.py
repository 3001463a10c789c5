"""kvfs copies, and what kvfs cluster shows and does about chains of several copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest

from kvfs.cli.administration import cluster
from kvfs.cli.copies import copies
from kvfs_base import errors as e
from kvfs_base.cluster import Heartbeat, TargetReport
from t2_services.metadata_rig import ROOT, TERABYTE
from t2_services.metadata_stage import BlockingStage, blocking_stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[BlockingStage]:
    with blocking_stage(tmp_path, targets=0) as found:
        for number in (1, 2, 3):
            beat(found, f"disk-{number}")
        yield found


def beat(stage: BlockingStage, name: str, host: str = "") -> None:
    report = TargetReport(name, TERABYTE, TERABYTE, True, 0)
    beat = Heartbeat(name, "machine", None, None, (report,), host=host or f"host of {name}")
    stage.rig.call(beat)


def run(command: click.Command, *words: object) -> str:
    result = click.testing.CliRunner().invoke(command, list(map(str, words)))
    if result.exception is not None:
        raise result.exception
    return result.output


def test_copies_of_a_directory(stage: BlockingStage) -> None:
    stage.rig.mkdir(ROOT, b"d")
    assert run(copies, stage.address, "/d") == "1\n"
    assert run(copies, stage.address, "/d", 2) == "2\n"
    assert run(copies, stage.address, "/d") == "2\n"
    with pytest.raises(SystemExit):
        run(copies, stage.address, "/d", 4)
    with pytest.raises(e.EntryNotFound):
        run(copies, stage.address, "/nothing")


def chains(stage: BlockingStage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(cluster, "chains", stage.address, "--json", "--quick"))
    return found


def test_members_are_shown_and_a_lost_disk_is_replaced(stage: BlockingStage) -> None:
    directory = stage.rig.mkdir(ROOT, b"d")
    run(copies, stage.address, "/d", 2)
    stage.rig.make(directory, b"f")
    found = chains(stage)
    several = [chain for chain in found["chains"] if chain["copies"] == 2]
    assert len(several) == found["spreads"][0]["chains"] == 18
    assert found["spreads"][0] == {
        "copies": 2,
        "chains": 18,
        "pairs": 1.0,
        "rebuild": 1.0,
        "heads": 1.0,
    }
    text = run(cluster, "chains", stage.address)
    assert text.count("whole") == 18 and "shared by two targets 1.00" in text

    stage.rig.clock.advance(6)
    for name in ("disk-2", "disk-3"):
        beat(stage, name)
    stage.rig.work()
    text = run(cluster, "chains", stage.address)
    assert text.count("short") == text.count("1 (offline)") == 12
    with pytest.raises(e.TargetInUse):
        run(cluster, "replace", stage.address, "disk-2")
    beat(stage, "new", "host of disk-1")
    assert run(cluster, "replace", stage.address, 1) == "target 4 takes the places of target 1\n"
    text = run(cluster, "chains", stage.address)
    assert text.count("4 (syncing)") == 12 and "offline)" not in text
    (new,) = (
        target
        for target in json.loads(run(cluster, "targets", stage.address, "--json", "--quick"))
        if target["target_id"] == 4
    )
    assert (new["host"], new["rack"], len(new["chains"])) == ("host of disk-1", "", 13)
    node = json.loads(run(cluster, "nodes", stage.address, "--json"))["chunk_servers"][0]
    assert (node["host"], node["rack"]) == ("host of disk-1", "")


def test_force_lists_only_what_nobody_else_has(stage: BlockingStage) -> None:
    directory = stage.rig.mkdir(ROOT, b"d")
    run(copies, stage.address, "/d", 2)
    stage.rig.make(directory, b"f")
    stage.rig.clock.advance(6)
    for name in ("disk-2", "disk-3"):
        beat(stage, name)
    stage.rig.work()
    found = json.loads(run(cluster, "remove", stage.address, 1, "--force", "--json"))
    assert found == {"removed": [1], "lost_files": []}
    assert {chain["copies"] for chain in chains(stage)["chains"] if not chain["targets"]} == set()
