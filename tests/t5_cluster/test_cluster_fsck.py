"""`kvfs fsck` as people run it, on a `kvfs up` that runs, that was stopped, and that was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvfs
from kvfs.cli.exits import ExitCode
from kvfs.fsck import Fsck, online
from kvfs_base.limits import FSCK_SETTLE_SECONDS
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from t5_cluster.processes import Cluster, block, run, wait_until


def fsck(own: Cluster, *flags: str) -> tuple[int, dict[str, Any]]:
    done = run("fsck", own.directory, "--json", *flags)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def found(result: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    return sorted((one["kind"], one["path"], one["state"]) for one in result["findings"])


def removals_are_done(own: Cluster) -> None:
    wait_until(lambda: own.status()["metadata"]["removals_pending"] == 0, "the removals")


def chunk_file(own: Cluster, path: Path, number: int = 0) -> Path:
    inode = path.stat().st_ino
    (chunk,) = [c for c in own.chunk_files(inode) if c.name.endswith(f".{number:08x}")]
    return chunk


def test_online_then_offline(own: Cluster) -> None:
    own.up()
    with kvfs.connect(own.directory) as client:
        own.put(client, range(8))
    file = own.mountpoint / "directory" / "file"
    file.parent.mkdir()
    with file.open("ab") as appended:  # another new file would stay one chunk
        appended.write(os.urandom(17 << 20))
    assert fsck(own, "--verify")[0] == ExitCode.OK
    assert b"clean" in run("fsck", own.directory).stdout

    key, _ = block(3)
    name = f"/kv/tenant/model/{key.hex()}"
    chunk_file(own, own.block_path(key)).unlink()
    code, result = fsck(own)
    assert code == ExitCode.INCONSISTENT
    assert found(result) == [("block-lost", name, "found")]
    assert name[-20:] in run("fsck", own.directory).stdout.decode().replace("\n", "").replace(
        " ", ""
    )
    code, result = fsck(own, "--repair")
    assert code == ExitCode.REPAIRED
    assert found(result) == [("block-lost", name, "repaired")]
    assert fsck(own, "--verify")[0] == ExitCode.OK
    assert not own.block_path(key).exists()

    assert run("fsck", own.directory, "--offline").returncode == ExitCode.ALREADY_RUNNING
    second = chunk_file(own, file, 1)
    own.down()
    assert run("fsck", own.directory).returncode == ExitCode.NOT_RUNNING

    second.unlink()
    code, result = fsck(own, "--offline", "--verify", "--repair")
    assert code == ExitCode.INCONSISTENT
    assert found(result) == [("file-hole", "/directory/file", "found")]
    code, result = fsck(own, "--offline", "--repair", "--zero-holes")
    assert code == ExitCode.REPAIRED
    assert fsck(own, "--offline", "--verify")[0] == ExitCode.OK
    own.up()
    assert file.stat().st_size == 17 << 20
    assert file.read_bytes()[16 << 20 :] == bytes(1 << 20)
    with kvfs.connect(own.directory) as client:
        own.check_api(client, [0, 1, 2, 4, 5, 6, 7])
    own.down()


def test_wrong_uses_are_told(own: Cluster, tmp_path: Path) -> None:
    assert run("fsck", tmp_path / "nothing").returncode == ExitCode.NOT_KVFS
    assert run("fsck", tmp_path / "nothing", "--offline").returncode == ExitCode.NOT_KVFS
    assert run("fsck", own.directory, "--zero-holes").returncode == ExitCode.USAGE


def test_files_that_are_written_meanwhile_are_no_findings(own: Cluster) -> None:
    """Grown, cut short, made sparse, renamed and deleted through the mount."""
    own.up()
    stop = threading.Event()
    rounds = [0]
    errors: list[BaseException] = []

    def change() -> None:
        path = own.mountpoint / "file"
        try:
            while not stop.is_set():
                with path.open("wb") as file:
                    file.write(bytes(18 << 20))
                    file.truncate(17 << 20)
                    file.truncate(1 << 20)
                    file.seek(3 << 20)
                    file.write(b"behind a hole")
                    file.truncate(5)
                os.truncate(path, 20 << 20)
                os.truncate(path, 3)
                path.rename(own.mountpoint / "renamed")
                with (own.mountpoint / "renamed").open("ab") as file:
                    (own.mountpoint / "renamed").unlink()
                    file.write(bytes(1 << 20))
                rounds[0] += 1
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        metadata = Address.parse(own.endpoints()["metadata"])
        for _ in range(6):
            before = rounds[0]
            with online(os_env(), metadata) as (store, targets):
                run_ = Fsck(store, targets, verify=True, settle_seconds=FSCK_SETTLE_SECONDS)
                report = run_.check()
                assert [one.finding for one in report.outcomes] == []
            wait_until(lambda b=before: bool(errors) or rounds[0] > b, "a round")  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
    assert errors == []
    own.down()
    assert fsck(own, "--offline", "--verify")[0] == ExitCode.OK


def test_a_kill_of_everything_leaves_nothing_to_repair(own: Cluster) -> None:
    """In the middle of puts, removals and writes to files, again and again. What a killed writer
    leaves (prepared batches, chunks behind the end of a file) is no finding."""
    for round_ in range(2):
        own.up()
        stop = threading.Event()
        writers = [
            threading.Thread(target=until, args=(stop, work, own, round_))
            for work in (put_and_remove, write_files)
        ]
        for writer in writers:
            writer.start()
        wait_until(lambda: own.status()["metadata"]["committed_blocks"] >= 64, "blocks to lose")
        pids = list(own.pids().values())
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        stop.set()
        wait_until(lambda: own.remaining() == [], "the death of all")
        for writer in writers:
            writer.join()
        code, result = fsck(own, "--offline")
        assert (code, found(result)) == (ExitCode.OK, [])
    own.up()
    removals_are_done(own)
    code, result = fsck(own, "--verify")
    assert (code, found(result)) == (ExitCode.OK, [])
    own.down()


def until(
    stop: threading.Event, work: Callable[[Cluster, int], None], own: Cluster, round_: int
) -> None:
    """Repeats ``work`` until it fails because everything is dead."""
    try:
        while not stop.is_set():
            work(own, round_)
    except (kvfs.KvfsError, OSError):
        pass


def put_and_remove(own: Cluster, round_: int) -> None:
    with kvfs.connect(own.directory) as client:
        for start in range(0, 64, 16):
            numbers = range(1000 * round_ + start, 1000 * round_ + start + 16)
            own.put(client, numbers)
            keys = [block(number)[0] for number in numbers]
            client.namespace("tenant/model").remove(keys[::2])


def write_files(own: Cluster, round_: int) -> None:
    for number in range(8):
        path = own.mountpoint / f"file-{round_}-{number}"
        path.write_bytes(bytes(100_000 * number))
        if number % 2:
            path.rename(own.mountpoint / f"renamed-{number}")
        elif number:
            path.unlink()


def test_an_orphan_is_removed_by_its_chunk_server(own: Cluster) -> None:
    own.up()
    with kvfs.connect(own.directory) as client:
        own.put(client, range(4))
    key, _ = block(0)
    lost = chunk_file(own, own.block_path(key))
    own.down()
    # Hidden from the check under a name that is not a chunk's, back when its block is gone.
    hidden = lost.with_name("hidden")
    lost.rename(hidden)
    code, result = fsck(own, "--repair", "--offline")
    assert code == ExitCode.REPAIRED
    assert found(result) == [("block-lost", f"/kv/tenant/model/{key.hex()}", "repaired")]
    own.up()
    removals_are_done(own)
    own.down()

    hidden.rename(lost)
    code, result = fsck(own, "--repair", "--offline")
    assert code == ExitCode.REPAIRED
    assert found(result) == [("chunk-orphan", None, "repaired")]
    assert fsck(own, "--offline")[0] == ExitCode.OK
    assert lost.exists(), "its removal waits for the chunk server"
    own.up()
    wait_until(lambda: not lost.exists(), "the removal")
    with kvfs.connect(own.directory) as client:
        own.check_api(client, range(1, 4))
    assert fsck(own)[0] == ExitCode.OK
    own.down()
