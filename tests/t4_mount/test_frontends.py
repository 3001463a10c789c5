"""Which front end runs, how it mounts, and what only the direct one does."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from kvfs.mount import frontend as frontends
from kvfs.mount import fuse_wire as wire
from kvfs.mount import fusermount, system
from kvfs.mount.device import Device
from kvfs.mount.frontend import Choice, decide
from kvfs_base.errors import FuseMissing, MountFailed
from t4_mount.harness import Cluster, as_user, detach


@pytest.mark.parametrize(
    ("setting", "kernel", "is_root", "has_pyfuse3", "expected"),
    [
        ("auto", (6, 9), True, True, "direct"),
        ("auto", (7, 0), True, True, "direct"),
        ("auto", (6, 8), True, True, "pyfuse3"),
        ("auto", (6, 9), False, True, "pyfuse3"),
        ("auto", (6, 8), True, False, "direct"),
        ("auto", (6, 9), False, False, "direct"),
        ("auto", (5, 3), True, True, "pyfuse3"),
        ("auto", (5, 3), True, False, None),
        ("direct", (5, 4), False, True, "direct"),
        ("direct", (5, 3), True, True, None),
        ("pyfuse3", (6, 9), True, True, "pyfuse3"),
        ("pyfuse3", (6, 9), True, False, None),
    ],
)
def test_the_rule(
    setting: str, kernel: tuple[int, int], is_root: bool, has_pyfuse3: bool, expected: str | None
) -> None:
    choice = decide(setting, kernel, is_root=is_root, has_pyfuse3=has_pyfuse3)
    assert (choice and choice.name) == expected
    assert choice is None or choice.reason


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends, "DIRECT_KERNEL", (99, 0))
    with pytest.raises(FuseMissing, match=r"5\.4"):
        frontends.choose("direct")
    monkeypatch.setattr(frontends, "_find_pyfuse3", lambda: False)
    with pytest.raises(FuseMissing, match="pip install"):
        frontends.choose("auto")


def test_the_log_says_which_one_and_why(cluster: Cluster, tmp_path: Path) -> None:
    role = cluster.mount(tmp_path)
    try:
        choice: Choice = frontends.choose("auto")
        assert f"mounted at {tmp_path} ({choice.name}: {choice.reason})" in role.log.read_text()
    finally:
        role.stop()


@pytest.mark.skipif(not shutil.which("fusermount3"), reason="fusermount3 is not installed")
def test_fusermount3_mounts_and_passes_the_device(tmp_path: Path) -> None:
    device = Device(fusermount.mount(str(tmp_path), "fsname=kvfs,subtype=kvfs"))
    try:
        found = system.mounted_at(str(tmp_path))
        assert found is not None and found.type == system.FILE_SYSTEM_TYPE
        room = memoryview(bytearray(wire.REQUEST_BYTES_MAX))
        request = wire.parse(room[: device.receive(room)])
        assert request.opcode == wire.Opcode.INIT
        assert request.arguments.major == wire.MAJOR
    finally:
        device.close()
        detach(tmp_path)


def test_fusermount3_that_fails(tmp_path: Path) -> None:
    with pytest.raises(MountFailed) as caught:
        fusermount.mount(f"{tmp_path}/missing", "fsname=kvfs")
    assert "missing" in caught.value.detail


def test_fusermount3_that_passes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fusermount3"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(MountFailed, match="no descriptor"):
        fusermount.mount(str(tmp_path), "fsname=kvfs")


def test_set_id_bits_go_when_somebody_writes(work: Path) -> None:
    work.chmod(0o777)

    def is_set(path: Path) -> int:
        return path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)

    def append(name: str) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b"more")
        os.close(descriptor)

    def made(name: str) -> Path:
        path = work / name
        path.write_bytes(b"program")
        path.chmod(0o6777)
        return path

    path = made("written")
    assert as_user(4711, work, lambda: append("written")) == 0
    assert not is_set(path)
    path = made("cut")
    assert as_user(4711, work, lambda: os.truncate("cut", 1)) == 0
    assert not is_set(path)
    path = made("emptied")
    assert as_user(4711, work, lambda: os.close(os.open("emptied", os.O_RDWR | os.O_TRUNC))) == 0
    assert not is_set(path)
    path = made("given")
    os.chown(path, 4711, 4711)
    assert not is_set(path)
    path = made("roots")
    path.write_bytes(b"root may")
    assert is_set(path)
    directory = work / "directory"
    directory.mkdir()
    directory.chmod(0o2777)
    os.chown(directory, 4711, 4711)
    assert is_set(directory)


def test_a_read_that_waits_ends_with_a_signal(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    with own_cluster.mounted(mountpoint):
        (mountpoint / "file").touch()
        own_cluster.metadata.kill()
        # SIGTERM after the look-up was begun: without the interrupt, 10 s and an EIO.
        program = "import os, signal, sys\n" \
            "signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(SystemExit(7)))\n" \
            "signal.setitimer(signal.ITIMER_REAL, 0.3)\n" \
            "os.stat(sys.argv[1])\n"  # fmt: skip
        done = subprocess.run(["python3", "-c", program, mountpoint / "other"], check=False)
        assert done.returncode == 7
        own_cluster.metadata.start()
        assert (mountpoint / "file").exists()


def test_a_value_larger_than_the_room_for_it(work: Path) -> None:
    import ctypes

    path = work / "file"
    path.touch()
    os.setxattr(path, "user.long", b"x" * 1000)
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(10)
    assert libc.getxattr(os.fsencode(path), b"user.long", room, 10) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert os.getxattr(path, "user.long") == b"x" * 1000
