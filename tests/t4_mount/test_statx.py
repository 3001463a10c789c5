"""statx(2): the time of birth, and that the rest is what stat says."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from t4_mount.harness import Cluster

pytestmark = pytest.mark.both_frontends

AT_FDCWD, AT_SYMLINK_NOFOLLOW = -100, 0x100
STATX_BASIC_STATS, STATX_BTIME = 0x7FF, 0x800


class Statx(NamedTuple):
    mask: int
    mode: int
    inode: int
    size: int
    nlink: int
    mtime_ns: int
    born_ns: int


def statx(path: Path) -> Statx:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    mask = STATX_BASIC_STATS | STATX_BTIME
    if libc.statx(AT_FDCWD, os.fsencode(path), AT_SYMLINK_NOFOLLOW, mask, buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    (found,) = struct.unpack_from("=I", buffer)
    (nlink, _, _, mode) = struct.unpack_from("=IIIH", buffer, 16)
    inode, size = struct.unpack_from("=QQ", buffer, 32)
    born, born_ns = struct.unpack_from("=qI", buffer, 80)
    mtime, mtime_ns = struct.unpack_from("=qI", buffer, 112)
    return Statx(found, mode, inode, size, nlink, mtime * 10**9 + mtime_ns, born * 10**9 + born_ns)


def same_as_stat(path: Path) -> Statx:
    found, usual = statx(path), path.lstat()
    assert found.mask & STATX_BASIC_STATS == STATX_BASIC_STATS
    assert found[1:6] == (
        usual.st_mode, usual.st_ino, usual.st_size, usual.st_nlink, usual.st_mtime_ns,
    )  # fmt: skip
    return found


def test_the_time_of_birth(work: Path, frontend: str) -> None:
    before = time.time_ns()
    (work / "file").write_bytes(b"x" * 5000)
    (work / "directory").mkdir()
    (work / "link").symlink_to("file")
    os.mkfifo(work / "fifo")
    after = time.time_ns()
    born = {}
    for name in ("file", "directory", "link", "fifo"):
        found = same_as_stat(work / name)
        if frontend == "pyfuse3":  # libfuse does not pass it on
            assert not found.mask & STATX_BTIME
            continue
        assert found.mask & STATX_BTIME
        assert before <= found.born_ns <= after
        born[name] = found.born_ns
    os.utime(work / "file", ns=(1, 1))
    with (work / "file").open("ab", buffering=0) as file:
        file.write(b"more")
        assert same_as_stat(work / "file").size == 5004
        if born:
            assert statx(work / "file").born_ns == born["file"]
    (work / "file").chmod(0o600)
    os.link(work / "file", work / "second")
    (work / "file").rename(work / "renamed")
    for name in ("renamed", "second"):
        found = same_as_stat(work / name)
        assert found.mtime_ns > before and stat.S_IMODE(found.mode) == 0o600
        assert not born or found.born_ns == born["file"]
    with pytest.raises(FileNotFoundError):
        statx(work / "file")


def test_a_block_is_born_when_it_is_stored(mounted: Path, cluster: Cluster, frontend: str) -> None:
    key = b"statx" + bytes(27)
    cluster.put_blocks(f"tenant-{frontend}/statx", {key: b"x" * 1000})
    found = same_as_stat(mounted / f"kv/tenant-{frontend}/statx" / key.hex())
    assert found.born_ns == (found.mtime_ns if frontend == "direct" else 0)
