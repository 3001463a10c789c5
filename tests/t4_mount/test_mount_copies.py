"""A real mount over servers that believe to be on hosts of their own: directories with several
copies, while servers go and come."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api_cluster import MIB, ApiCluster
from t4_mount.harness import Role, detach


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[ApiCluster]:
    cluster = ApiCluster(str(tmp_path), hosts=True)
    # Where the mount's role looks for it.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metadata.sock").symlink_to(tmp_path / "metadata.sock")
    yield cluster
    cluster.stop()


@contextlib.contextmanager
def mounted(cluster: ApiCluster, name: str) -> Iterator[Path]:
    directory = Path(cluster.directory)
    place: Any = SimpleNamespace(directory=directory)
    mountpoint = directory / name
    mountpoint.mkdir()
    role = Role(place, "mount", str(mountpoint)).start()
    try:
        yield mountpoint
    finally:
        detach(mountpoint)
        role.stop()


def copies_of(cluster: ApiCluster) -> set[int]:
    names = [os.path.basename(path) for path in cluster.chunk_files()]
    return {names.count(name) for name in set(names)}


def test_files_survive_each_of_their_servers(hosts: ApiCluster) -> None:
    data = os.urandom(7 * MIB + 123)
    with mounted(hosts, "one") as mount:
        safe = mount / "safe"
        safe.mkdir()
        os.setxattr(safe, "user.kvfs.copies", b"2")
        (safe / "below").mkdir()
        file = safe / "below" / "file"
        file.write_bytes(data[: 4 * MIB])
        with file.open("ab") as out:
            for start in range(4 * MIB, len(data), 300_000):
                out.write(data[start : start + 300_000])
            out.flush()
            os.fsync(out.fileno())
        assert copies_of(hosts) == {2}
        assert file.read_bytes() == data
        for number in (1, 2, 0):
            # Another mount: nothing of it is in a page cache.
            with hosts.without_server(number), mounted(hosts, f"without-{number}") as other:
                assert (other / "safe" / "below" / "file").read_bytes() == data


def test_programs_go_on_while_a_server_goes(hosts: ApiCluster) -> None:
    """A database, and a shell: overwrites, truncation, renames and fsync."""
    with mounted(hosts, "one") as mount:
        safe = mount / "safe"
        safe.mkdir()
        os.setxattr(safe, "user.kvfs.copies", b"3")
        with contextlib.closing(sqlite3.connect(safe / "base.db", timeout=60)) as base:
            base.execute("create table t (n integer primary key, b blob)")
            for n in range(20):
                if n == 7:
                    hosts.servers[1].stop()
                with base:
                    base.execute("insert into t values (?, ?)", (n, bytes([n]) * 3000))
            assert base.execute("pragma integrity_check").fetchone() == ("ok",)
        script = "seq 1 20000 > a; cp a b; truncate -s 1000 b; mv b c; cat a >> c; sync c"
        subprocess.run(["/bin/sh", "-ec", script], cwd=safe, check=True, timeout=120)
        expected = (safe / "a").read_bytes()
        with mounted(hosts, "two") as other:
            assert (other / "safe" / "c").read_bytes() == expected[:1000] + expected
            copy = Path(hosts.directory) / "copy.db"
            copy.write_bytes((other / "safe" / "base.db").read_bytes())
        with contextlib.closing(sqlite3.connect(copy)) as base:
            rows = base.execute("select n, b from t order by n").fetchall()
        assert rows == [(n, bytes([n]) * 3000) for n in range(20)]
