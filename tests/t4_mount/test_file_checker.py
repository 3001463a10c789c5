"""Random operations on files of the mount, beside another file system and bytes in memory.

The checkers are processes of their own. One that unmaps what it wrote through a mapping waits for
the mount with its address space locked: were a chunk server in the same process, it would wait for
that lock, and the mount for the chunk server, until a write ends in EIO.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t4_mount.file_checker import Checker, Disagreement
from t4_mount.harness import Cluster, detach

OPERATIONS = int(os.environ.get("KVFS_FILE_OPERATIONS", "50000"))
SEED = int(os.environ.get("KVFS_FILE_SEED", "1"))
FILES = 4
PROGRAM = Path(__file__).with_name("file_checker.py")

pytestmark = pytest.mark.timeout(600 + OPERATIONS // 25)


def check_files(directory: Path, beside: Path, operations: int) -> None:
    """So many operations on all files together, and all files at the same time."""
    with contextlib.ExitStack() as stack:
        checkers = []
        for number in range(FILES):
            files = [str(place / f"file-{number}") for place in (directory, beside)]
            numbers = [str(operations // FILES), str(FILES * SEED + number)]
            command = [sys.executable, str(PROGRAM), *files, *numbers]
            checker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            stack.enter_context(checker)
            stack.callback(checker.kill)
            checkers.append(checker)
        outputs = [checker.communicate()[0].decode() for checker in checkers]
    assert [checker.returncode for checker in checkers] == [0] * FILES, "\n".join(outputs)


@contextlib.contextmanager
def mounted(cluster: Cluster, *options: str) -> Iterator[Path]:
    mountpoint = cluster.directory / "mnt-checker"
    try:
        with cluster.mounted(mountpoint, *options):
            yield mountpoint
    finally:
        detach(mountpoint)


def test_files_are_what_was_written(work: Path, tmp_path: Path) -> None:
    check_files(work, tmp_path, OPERATIONS)


def test_files_of_another_host(cluster: Cluster, work: Path, tmp_path: Path) -> None:
    """Through chunk servers, which know nothing of descriptors."""
    with mounted(cluster, "--transport=tcp") as mountpoint:
        check_files(mountpoint / work.name, tmp_path, OPERATIONS // 20)


def test_files_of_two_copies(tmp_path: Path) -> None:
    (tmp_path / "kvfs").mkdir()
    cluster = Cluster(tmp_path / "kvfs", hosts=True)
    try:
        with mounted(cluster) as mountpoint:
            directory = mountpoint / "safe"
            directory.mkdir()
            os.setxattr(directory, "user.kvfs.copies", b"2")
            check_files(directory, tmp_path, OPERATIONS // 20)
            assert len(cluster.chunk_files((directory / "file-0").stat().st_ino)) >= 2
        assert not cluster.complaints()
    finally:
        cluster.stop()


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
