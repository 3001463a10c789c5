"""mount -t kvfs, /etc/fstab, systemd: the helper's options, readiness, who keeps a mount busy."""

from __future__ import annotations

import configparser
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kvfs.cli
from kvfs.cli.mount_helper import FAILED, USAGE, UsageError, parse
from kvfs.cli.notify import notify
from kvfs.mount import system
from t4_mount.harness import Cluster, detach, wait_until

HELPER = [sys.executable, "-m", "kvfs.cli.mount_helper"]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("", ()),
        ("-o rw,_netdev,nofail,x-systemd.automount,defaults", ()),
        ("-o allow_other", ("--allow-other", "true")),
        ("-o allow-other=false", ("--allow-other", "false")),
        ("-o locks=mount -o attribute_seconds=2.5",
         ("--locks", "mount", "--attribute-seconds", "2.5")),
        ("-olocks=mount -s -v", ("--locks", "mount")),
        ("-o config=/etc/kvfs.toml", ("--config", "/etc/kvfs.toml")),
        ("-t kvfs -o secret_file=/etc/secret", ("--secret-file", "/etc/secret")),
    ],
)  # fmt: skip
def test_options_are_settings(words: str, arguments: tuple[str, ...]) -> None:
    call = parse(["tcp:127.0.0.1:7000", "/mnt", *shlex.split(words)])
    assert call.arguments == arguments
    assert (call.target, call.directory, call.is_real) == ("tcp:127.0.0.1:7000", "/mnt", True)


@pytest.mark.parametrize(
    "words",
    ["/only-one", "one two three", "a b -x", "a b -o", "a b -o ro", "a b -o noexec",
     "a b -o sync", "a b -o locks2=mount", "a b -o mountpoint=/x", "a b -o log="],
)  # fmt: skip
def test_what_is_not_known_is_an_error(words: str) -> None:
    with pytest.raises(UsageError):
        parse(shlex.split(words))


def test_a_trial_mounts_nothing() -> None:
    assert not parse(["a", "b", "-fn"]).is_real
    assert subprocess.run([*HELPER, "a", "b", "-f"], check=False).returncode == 0
    done = subprocess.run([*HELPER, "a", "b", "-o", "ro"], capture_output=True, check=False)
    assert done.returncode == USAGE and b"'ro'" in done.stderr


def test_a_line_in_fstab(cluster: Cluster, tmp_path: Path) -> None:
    """Returns once the mount is there, and leaves a process behind that ends with the mount."""
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    mountpoint.mkdir()
    command = [*HELPER, str(cluster.address), str(mountpoint), "-o", f"rw,_netdev,log={log}"]
    try:
        subprocess.run(command, check=True, timeout=60)
        assert os.path.ismount(mountpoint)
        (mountpoint / "by-helper").write_bytes(b"x")
        os.unlink(mountpoint / "by-helper")
        again = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert again.returncode == FAILED and b"is mounted there" in again.stderr
        subprocess.run(["umount", mountpoint], check=True)
        wait_until(lambda: "unmounted from" in log.read_text())
    finally:
        detach(mountpoint)


def test_a_failure_is_told(tmp_path: Path) -> None:
    options = f"log={tmp_path / 'log'}"
    command = [*HELPER, "unix:/nowhere", str(tmp_path / "none"), "-o", options]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == FAILED
    assert b"mount point does not exist" in done.stderr


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_systemd_is_told(
    kind: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(tmp_path / "notify") if kind == "file" else f"@kvfs-test-{os.getpid()}"
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name if kind == "file" else "\0" + name[1:])
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        service = subprocess.Popen(
            [sys.executable, "-m", "kvfs", "mount", str(cluster.address), str(mountpoint)],
            stdout=subprocess.DEVNULL,
        )
        try:
            told = systemd.recv(4096).decode().splitlines()
            assert told[:2] == ["READY=1", f"MAINPID={service.pid}"]
            assert os.path.ismount(mountpoint)
            service.send_signal(signal.SIGTERM)
            assert systemd.recv(4096) == b"STOPPING=1"
            assert service.wait(60) == 0
        finally:
            service.kill()
            service.wait()
            detach(mountpoint)


def test_nobody_is_told_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("", "relative", "/none/of/these"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not notify("READY=1")


def test_the_unit_is_one() -> None:
    path = Path(kvfs.cli.__file__).with_name("kvfs-mount@.service")
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(path)
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["ExecStart"].endswith("kvfs mount ${KVFS_TARGET} %f")
    assert float(unit["Service"]["TimeoutStopSec"]) > 30  # STOP_SECONDS_MAX


def test_who_keeps_a_mount_busy(cluster: Cluster, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    role = cluster.mount(mountpoint)
    file = (mountpoint / "busy").open("wb")
    sleeper = subprocess.Popen(["sleep", "60"], cwd=mountpoint)
    try:
        found = system.users_of(str(mountpoint))
        assert f"sleep ({sleeper.pid}): {mountpoint}" in found
        assert any(line.endswith(f"({os.getpid()}): {mountpoint}/busy") for line in found)
        assert system.users_of(str(tmp_path / "none")) == []
        role.stop()
        text = role.log.read_text()
        assert f"sleep ({sleeper.pid}): {mountpoint}" in text
    finally:
        sleeper.kill()
        sleeper.wait()
        with contextlib.suppress(OSError):  # it was detached
            file.close()
        detach(mountpoint)
