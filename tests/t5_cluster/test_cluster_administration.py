"""Servers that leave and come back, while everything else stays what it is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from typing import Any

import pytest

import kvfs
from kvfs.cli.exits import ExitCode
from t5_cluster.processes import Cluster, block, run, told, wait_until

KIB64 = 64 * 1024


def listed(cluster: Cluster, what: str) -> Any:
    return told("cluster", what, cluster.directory)


def target_of(cluster: Cluster, server: str) -> dict[str, Any]:
    (found,) = (t for t in listed(cluster, "targets") if t["server"] == server)
    return found


def stored(client: kvfs.Client, numbers: Sequence[int]) -> list[int]:
    """Which blocks are there; those that are have the right bytes."""
    keys, buffers = zip(*map(block, numbers), strict=True)
    with client.namespace("tenant/model").get(keys) as blocks:
        assert all(view in (None, data) for view, data in zip(blocks, buffers, strict=True))
        return [n for n, view in zip(numbers, blocks, strict=True) if view is not None]


def test_a_server_is_drained_removed_and_comes_back(own: Cluster) -> None:
    own.up()
    kv = own.directory
    with kvfs.connect(kv) as client:
        own.put(client, range(30))
        before = {t["server"]: t for t in listed(own, "targets")}
        assert {t["blocks"] for t in before.values()} == {10}
        assert {t["block_bytes"] for t in before.values()} == {10 * KIB64}
        refused = run("cluster", "remove", kv, "chunks-1")
        assert refused.returncode == ExitCode.IN_USE
        assert b"10 blocks" in refused.stderr and b"--force" in refused.stderr

        done = run("cluster", "drain", kv, "chunks-1")
        assert (done.returncode, b"takes nothing new" in done.stdout) == (ExitCode.OK, True)
        assert target_of(own, "chunks-1")["state"] == "draining"
        own.put(client, range(30, 60))
        own.check_api(client, range(30, 60))
        wait_until(lambda: bool(target_of(own, "chunks-1")["drained"]), "drained")
        own.check_api(client, range(60))
        own.check_mount(range(60))
        blocks = {t["server"]: t["blocks"] for t in listed(own, "targets")}
        assert (blocks["chunks-1"], sum(blocks.values())) == (0, 60)
        assert own.status()["healthy"]

        wait_until(lambda: target_of(own, "chunks-1")["removals"] == 0, "its disk is empty")
        assert list((kv / "targets/1/chunks").glob("*/*")) == []
        done = run("cluster", "remove", kv, "chunks-1")
        assert done.returncode == ExitCode.OK, done.stderr
        (gone,) = listed(own, "nodes")["removed"]
        assert gone["uuid"] == before["chunks-1"]["uuid"]
        log = kv / "log/chunks-1.log"
        wait_until(lambda: "TargetRemoved" in log.read_text(), "its server says so")
        assert len(listed(own, "targets")) == 2
        assert stored(client, range(60)) == list(range(60))

        done = run("cluster", "add", kv, gone["uuid"])
        assert done.returncode == ExitCode.OK, done.stderr
        wait_until(lambda: len(listed(own, "targets")) == 3, "it registers")
        assert target_of(own, "chunks-1")["target_id"] == 4
        own.put(client, range(60, 90))
        own.check_api(client, range(90))
        assert target_of(own, "chunks-1")["blocks"] == 10
    own.down()
    own.assert_gone()


def test_a_server_that_is_removed_by_force(own: Cluster) -> None:
    own.up()
    kv = own.directory
    contents = {name: os.urandom(100_000) for name in "abcdefghijkl"}
    (own.mountpoint / "files").mkdir()
    for name, content in contents.items():
        (own.mountpoint / "files" / name).write_bytes(content)
    with kvfs.connect(kv) as client:
        own.put(client, range(30))
    target = target_of(own, "chunks-1")
    held = {c["chain"]: c for c in listed(own, "chains")["chains"]}[target["chains"][0]]
    assert (held["blocks"], held["copies"], held["targets"]) == (10, 1, [target["target_id"]])
    assert 0 < held["files"] == held["file_chunks"] < len(contents)

    done = run("cluster", "remove", kv, target["target_id"], "--force", "--json")
    assert done.returncode == ExitCode.OK, done.stderr
    report = json.loads(done.stdout)
    assert report["removed"] == [target["target_id"]]
    assert [file["lost_chunks"] for file in report["lost_files"]] == [1] * held["files"]
    lost = {file["path"].removeprefix("/files/") for file in report["lost_files"]}
    assert lost < contents.keys()
    assert b"removed" in run("cluster", "chains", kv).stdout
    assert b"chunks-1" in run("cluster", "nodes", kv).stdout

    wait_until(lambda: own.status()["metadata"]["blocks"] == 20, "its blocks are dropped")
    own.down()
    own.up()  # its server is still one of those that are started
    with kvfs.connect(kv) as client:
        left = stored(client, range(30))
        own.put(client, range(30))
        own.check_api(client, range(30))
        assert len(left) == 20
    for name, content in contents.items():
        path = own.mountpoint / "files" / name
        if name in lost:
            shown = run("cat", kv, f"/files/{name}")
            assert path.stat().st_size == len(content)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                path.read_bytes()
            assert (shown.returncode, shown.stdout) == (ExitCode.FAILED, b"")
            assert b"removed" in shown.stderr
            path.unlink()
        else:
            assert path.read_bytes() == content
    assert os.statvfs(own.mountpoint).f_bfree > 0
    for name, content in contents.items():
        (own.mountpoint / f"new {name}").write_bytes(content)
        assert (own.mountpoint / f"new {name}").read_bytes() == content
    assert own.status()["healthy"]
    own.down()
    own.assert_gone()


def test_names_that_nobody_has(running: Cluster) -> None:
    for command in ("drain", "remove", "add"):
        done = run("cluster", command, running.directory, "nobody")
        assert done.returncode == ExitCode.NOT_FOUND
        assert b"kvfs serve chunks" in done.stderr


def test_lists_for_people(running: Cluster) -> None:
    for what, words in (
        ("nodes", (b"metadata", b"chunks-2", b"metadata.sock")),
        ("targets", (b"chunks-2", b"serving", b"GiB")),
        ("chains", (b"chain", b"serving")),
    ):
        done = run("cluster", what, running.directory)
        assert done.returncode == ExitCode.OK
        assert all(word in done.stdout for word in words), done.stdout
    done = run("cluster", "nodes", running.directory, "--metrics")
    assert b"heartbeats" in done.stdout and not done.stderr
    metadata = running.endpoints()["metadata"]
    nodes = json.loads(run("cluster", "nodes", metadata, "--metrics", "--json").stdout)
    assert all(server["metrics"]["connections"] >= 1 for server in nodes["chunk_servers"])
    quick = run("cluster", "targets", running.endpoints()["metadata"], "--quick", "--json")
    assert all("blocks" not in target for target in json.loads(quick.stdout))
