"""Random operations on a file of the mount, beside another file system and bytes in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from t4_mount.file_checker import Checker, Disagreement
from t4_mount.harness import Cluster, detach

OPERATIONS = int(os.environ.get("KVFS_FILE_OPERATIONS", "20000"))
SEED = int(os.environ.get("KVFS_FILE_SEED", "1"))


def test_a_file_is_what_was_written(work: Path, tmp_path: Path) -> None:
    checker = Checker(str(work / "file"), str(tmp_path / "file"), SEED)
    try:
        checker.run(OPERATIONS)
    finally:
        checker.close()


def test_a_file_of_another_host(cluster: Cluster, work: Path, tmp_path: Path) -> None:
    """Through chunk servers, which know nothing of descriptors."""
    mountpoint = cluster.directory / "mnt-checker"
    try:
        with cluster.mounted(mountpoint, "--transport=tcp"):
            path = mountpoint / work.name / "file"
            checker = Checker(str(path), str(tmp_path / "file"), SEED)
            try:
                checker.run(OPERATIONS // 50)
            finally:
                checker.close()
    finally:
        detach(mountpoint)


def test_the_checker_notices(tmp_path: Path) -> None:
    """One byte that somebody else changes."""
    checker = Checker(str(tmp_path / "one"), str(tmp_path / "other"), 1)
    try:
        checker.run(300)
        os.pwrite(checker.files[0].fd, bytes([checker.model.get(0, 1)[0] ^ 1]), 0)
        with pytest.raises(Disagreement):
            checker.check(0, 1)
    finally:
        checker.close()
