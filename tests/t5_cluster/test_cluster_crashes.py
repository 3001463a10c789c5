"""Signals and kills: nothing is left behind, no committed block is lost, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

import kvfs
from kvfs.cli.exits import ExitCode
from t5_cluster.processes import DEADLINE_SECONDS, KVFS, Cluster, run, wait_until


def kill(pids: Iterable[int]) -> None:
    """All at once: stopped first, so that none sees another one die."""
    pids = list(pids)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)


def test_sigterm_and_ctrl_c_leave_nothing_behind(own: Cluster) -> None:
    process = own.up_in_foreground()
    with kvfs.connect(own.directory) as client:
        own.put(client, range(4))
    (own.mountpoint / "file").write_text("hello")
    pids = own.pids()
    assert process.pid == pids["supervisor"]
    assert sorted(own.remaining()) == sorted(pids.values())
    process.terminate()
    assert process.wait(DEADLINE_SECONDS) == 0
    own.assert_gone()
    own.clean_up()

    process = own.up_in_foreground()
    assert (own.mountpoint / "file").read_text() == "hello"
    own.check_mount(range(4))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    assert process.wait(DEADLINE_SECONDS) == 0
    own.assert_gone()


def test_a_signal_during_the_start_leaves_nothing_behind(own: Cluster) -> None:
    own.process = process = subprocess.Popen(
        [*KVFS, *own.arguments()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    wait_until((own.directory / "run/metadata.sock").exists, "the first role")
    process.terminate()
    assert process.wait(DEADLINE_SECONDS) == 0
    own.assert_gone()


def test_a_busy_mount_goes_too(own: Cluster) -> None:
    process = own.up_in_foreground()
    with (own.mountpoint / "file").open("w") as file:
        file.write("still open")
        file.flush()
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 0
        own.assert_gone()
        try:
            file.close()
        except OSError:
            pass  # its file system is gone


def test_after_a_kill_of_everything_all_committed_blocks_are_there(own: Cluster) -> None:
    own.up()
    with kvfs.connect(own.directory) as client:
        own.put(client, range(16))
        own.put(client, range(16, 64))
    (own.mountpoint / "file").write_text("hello")
    kill(own.pids().values())
    wait_until(lambda: own.remaining() == [], "the death of all")
    assert own.is_mounted(), "a dead mount is what a kill leaves"
    assert run("status", own.directory).returncode == ExitCode.NOT_RUNNING

    own.up()
    with kvfs.connect(own.directory) as client:
        own.check_api(client, range(64))
        own.put(client, range(64, 80))
        own.check_api(client, range(80))
    own.check_mount(range(0, 80, 8))
    assert (own.mountpoint / "file").read_text() == "hello"

    # The supervisor alone: its processes follow it, the mount with them.
    kill([own.pids()["supervisor"]])
    wait_until(lambda: own.remaining() == [], "the end of the orphans")
    down = run("down", own.directory)
    assert down.returncode == ExitCode.NOT_RUNNING
    assert not own.is_mounted()
    own.up()
    with kvfs.connect(own.directory) as client:
        own.check_api(client, range(80))
    own.down()
    own.assert_gone()


def test_up_does_not_wait_for_people_to_notice_orphans(own: Cluster) -> None:
    """Started right after the kill, with the orphans still there."""
    own.up()
    with kvfs.connect(own.directory) as client:
        own.put(client, range(4))
    kill([own.pids()["supervisor"]])
    own.up()
    with kvfs.connect(own.directory) as client:
        own.check_api(client, range(4))
    own.check_mount(range(4))
    own.down()
    own.assert_gone()


def test_each_role_comes_back_alone_and_users_go_on(own: Cluster) -> None:
    own.up()
    with kvfs.connect(own.directory) as client:
        own.put(client, range(8))
        for step, role in enumerate(("metadata", "chunks-1", "agent", "mount"), start=1):
            before = own.pids()
            kill([before[role]])
            wait_until(lambda role=role: restarts(own, role) == 1, f"{role} again")  # type: ignore[misc]
            after = own.pids()
            assert {name for name in after if after[name] != before[name]} == {role}
            numbers = range(8 * step, 8 * step + 8)
            own.put(client, numbers)
            own.check_api(client, range(8 * step + 8))
            own.check_mount(numbers)
    log = (own.directory / "log/supervisor.log").read_text()
    assert "metadata ended with -9, starting it again in 0.1 s" in log
    own.down()
    own.assert_gone()


def restarts(own: Cluster, role: str) -> int:
    """Once everything is healthy again."""
    found = own.status()
    return found["roles"][role]["restarts"] if found["healthy"] else -1


def test_while_the_mount_is_away_writers_get_errors(own: Cluster) -> None:
    """They must not write into the directory below without noticing."""
    own.up_in_foreground()
    (own.mountpoint / "file").write_text("kept")
    new = own.mountpoint / "new"
    refused = []

    def written() -> bool:
        try:
            new.write_text("x")
        except OSError as exc:
            refused.append(exc.errno)
            return False
        return os.path.ismount(own.mountpoint) and new.exists()

    os.kill(own.pids()["mount"], signal.SIGKILL)
    wait_until(written, "the mount")
    assert refused
    assert (own.mountpoint / "file").read_text() == "kept"


def test_a_mount_comes_back_over_files(own: Cluster) -> None:
    own.up_in_foreground()
    (own.mountpoint / "file").write_text("kept")
    os.kill(own.pids()["mount"], signal.SIGKILL)
    subprocess.run(["umount", "--lazy", str(own.mountpoint)], check=True)
    stray = own.mountpoint / "stray"
    stray.write_text("below")
    wait_until(lambda: os.path.ismount(own.mountpoint), "the mount")
    wait_until((own.mountpoint / "file").exists, "its files")
    assert not stray.exists()


@pytest.mark.parametrize("depth", [120])
def test_a_directory_with_a_long_name(tmp_path: Path, depth: int) -> None:
    """Sockets have 107 bytes for their names."""
    own = Cluster(tmp_path / ("d" * depth))
    try:
        own.up("--chunk-servers", "1")
        with kvfs.connect(own.directory) as client:
            own.put(client, [1])
        own.check_mount([1])
        sockets = Path(own.endpoints()["agent"].removeprefix("unix:")).parent
        own.down()
        own.assert_gone()
        assert not sockets.exists()
    finally:
        own.clean_up()
