"""Mounting and unmounting: clear errors, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from kvfs.mount import main, system
from kvfs.mount.config import MountConfig
from kvfs.mount.main import run_mount
from kvfs_base.errors import (
    ConnectionLost,
    FuseMissing,
    InvalidRequest,
    KvfsError,
    MountFailed,
    MountPointBusy,
)
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from t4_mount.harness import Cluster, wait_until


def attempt(config: MountConfig) -> KvfsError:
    """The error of a mount that must not work."""
    with pytest.raises(KvfsError) as caught:
        trio.run(run_mount, os_env(), config)
    return caught.value


def test_a_missing_mount_point(cluster: Cluster, tmp_path: Path) -> None:
    error = attempt(MountConfig(f"{tmp_path}/nothing", (cluster.address,)))
    assert isinstance(error, MountFailed)
    assert "does not exist" in error.detail
    assert error.mountpoint == f"{tmp_path}/nothing"


def test_a_mount_point_that_is_a_file(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = attempt(MountConfig(f"{tmp_path}/file", (cluster.address,)))
    assert isinstance(error, MountFailed)
    assert "not a directory" in error.detail


def test_a_mount_point_that_is_not_empty(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = attempt(MountConfig(str(tmp_path), (cluster.address,)))
    assert isinstance(error, MountPointBusy)
    assert "not empty" in error.detail


def test_a_mount_point_in_use(cluster: Cluster, mounted: Path) -> None:
    error = attempt(MountConfig(str(mounted), (cluster.address,)))
    assert isinstance(error, MountPointBusy)
    assert "fuse.kvfs" in error.detail


@pytest.mark.parametrize("found", ["missing", "forbidden"])
def test_no_fuse_device(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    device = tmp_path / "fuse"
    if found == "forbidden":
        device.mkdir()  # opening it for writing fails, whoever asks
    monkeypatch.setattr(system, "FUSE_DEVICE", str(device))
    error = attempt(MountConfig(str(tmp_path), (cluster.address,)))
    assert isinstance(error, FuseMissing)
    assert str(device) in error.detail


def test_without_pyfuse3(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    error = attempt(MountConfig(str(tmp_path), (cluster.address,), frontend="pyfuse3"))
    assert isinstance(error, FuseMissing)
    assert "kvfs[fuse]" in error.detail


def test_no_metadata_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "REACH_SECONDS", 0.3)
    error = attempt(MountConfig(str(tmp_path), (Address.unix(f"{tmp_path}.sock"),)))
    assert isinstance(error, ConnectionLost)
    assert not os.path.ismount(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"mountpoint": "relative"},
        {"attribute_seconds": -1.0},
        {"negative_seconds": 1e9},
        {"read_ahead_bytes": -1},
        {"busy_wait_seconds": 0.1},
        {"frontend": "libfuse"},
        {"transport": "pigeon"},
        {"metadata": ()},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        MountConfig(**{"mountpoint": "/mnt", "metadata": (Address.unix("/x"),), **settings})


def test_the_mount_table_with_blanks(cluster: Cluster, tmp_path: Path) -> None:
    mountpoint = tmp_path / "with blank"
    with cluster.mounted(mountpoint):
        found = system.mounted_at(str(mountpoint))
        assert found is not None and found.type == "fuse.kvfs"
        line = next(m for m in Path("/proc/mounts").read_text().splitlines() if "blank" in m)
        assert line.startswith("kvfs ")
        assert "default_permissions" in line and "allow_other" not in line
    assert system.mounted_at(str(mountpoint)) is None


def test_unmounted_by_somebody_else(cluster: Cluster, tmp_path: Path) -> None:
    role = cluster.mount(tmp_path)
    assert role.process is not None
    (tmp_path / "file-of-setup-test").touch()
    (tmp_path / "file-of-setup-test").unlink()
    subprocess.run(["umount", str(tmp_path)], check=True)
    assert role.process.wait(60) == 0
    role.stop()


def test_busy_at_sigterm(cluster: Cluster, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    role = cluster.mount(mountpoint)
    inside = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        role.stop()
        assert not os.path.ismount(mountpoint)
        with pytest.raises(OSError):
            os.listdir(inside)
    finally:
        os.close(inside)


def test_read_ahead_is_raised(cluster: Cluster, mounted: Path) -> None:
    found = system.mounted_at(str(mounted))
    assert found is not None
    path = Path(f"/sys/class/bdi/{found.device}/read_ahead_kb")
    wait_until(path.exists)
    assert int(path.read_text()) == 4096
