"""What only the LMDB engine has: files, a lock, disks that fill up."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvfs_base.errors import Conflict, DiskFull, TargetFailed, VersionMismatch
from kvfs_base.os_env import os_env
from kvfs_metadata.engine import KVEngine, KVTransaction
from kvfs_metadata.lmdb_engine import LmdbEngine


def put(key: bytes, value: bytes) -> object:
    def fn(txn: KVTransaction) -> None:
        txn.put(key, value)

    return fn


def get(engine: KVEngine, key: bytes) -> bytes | None:
    return engine.view(lambda read: read.get(key))


def test_state_outlives_the_engine(tmp_path: Path) -> None:
    directory = str(tmp_path / "a" / "b")
    engine = LmdbEngine(os_env(), directory)
    engine.update([put(b"k", b"v")])
    engine.close()
    again = LmdbEngine(os_env(), directory)
    assert get(again, b"k") == b"v"
    again.close()


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    LmdbEngine(os_env(), str(directory)).close()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_one_service_a_directory(tmp_path: Path) -> None:
    first = LmdbEngine(os_env(), str(tmp_path))
    with pytest.raises(Conflict) as caught:
        LmdbEngine(os_env(), str(tmp_path))
    assert str(tmp_path) in caught.value.detail
    first.close()
    LmdbEngine(os_env(), str(tmp_path)).close()


def test_files_that_are_not_lmdb_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(VersionMismatch):
        LmdbEngine(os_env(), str(tmp_path))


KILLED = """
import os, sys
from kvfs_base.os_env import os_env
from kvfs_metadata.lmdb_engine import LmdbEngine
engine = LmdbEngine(os_env(), sys.argv[1], durability=sys.argv[2])
number = 0
while True:
    engine.update([lambda t: t.put(b"last", b"%d" % number), lambda t: t.put(b"%d" % number, b"x")])
    os.write(1, b"%d\\n" % number)
    number += 1
"""


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_a_killed_process_loses_nothing_it_acknowledged(tmp_path: Path, durability: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), durability], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        for _ in range(50):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        for line in process.stdout:
            if line.endswith(b"\n"):
                acknowledged = int(line)
    process.wait()
    engine = LmdbEngine(os_env(), str(tmp_path))
    last = int(get(engine, b"last") or b"-1")
    assert last >= acknowledged
    assert all(get(engine, b"%d" % n) == b"x" for n in range(last + 1))
    engine.close()


def test_the_map_grows_while_others_read(tmp_path: Path) -> None:
    engine = LmdbEngine(os_env(), str(tmp_path), map_bytes=64 * 1024)
    failures: list[BaseException] = []
    stop = threading.Event()

    def reader() -> None:
        try:
            while not stop.is_set():
                assert get(engine, b"steady") == b"value"
        except BaseException as exc:
            failures.append(exc)

    engine.update([put(b"steady", b"value")])
    thread = threading.Thread(target=reader)
    thread.start()
    try:
        for number in range(300):
            engine.update([put(b"%d" % number, b"x" * 4000)])
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert get(engine, b"299") == b"x" * 4000
    engine.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_full_disk_refuses_the_group_and_nothing_else(small_disk: Path) -> None:
    engine = LmdbEngine(os_env(), str(small_disk))
    try:
        engine.update([put(b"first", b"1")])
        with pytest.raises(DiskFull):
            for number in range(1000):
                engine.update([put(b"%d" % number, b"x" * 4000)])
        stored = number - 1
        assert get(engine, b"first") == b"1"
        assert get(engine, b"%d" % stored) == b"x" * 4000
        assert get(engine, b"%d" % number) is None
        # Deleting needs no room that the free pages do not give.
        assert engine.update([lambda t: t.delete(b"0")]) == [None]
        assert engine.update([put(b"0", b"again")]) == [None]
        assert get(engine, b"0") == b"again"
    finally:
        engine.close()


@pytest.mark.logs_warnings
def test_a_failed_disk_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LmdbEngine(os_env(), str(tmp_path))
    engine.update([put(b"a", b"1")])
    real = engine._lmdb

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def sync(self, force: bool) -> None:
            raise lmdb.Error("mdb_env_sync: Input/output error")

    monkeypatch.setattr(engine, "_lmdb", Failing())
    with pytest.raises(TargetFailed):
        engine.sync()
    monkeypatch.undo()
    for _ in range(2):  # the disk would say yes now, with the old data on it
        with pytest.raises(TargetFailed):
            engine.sync()
        with pytest.raises(TargetFailed):
            engine.update([put(b"a", b"2")])
    assert get(engine, b"a") == b"1"
    engine.close()
