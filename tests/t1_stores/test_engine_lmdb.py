"""What only the LMDB engine has: files, a lock, disks that fill up."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvfs_base.errors import Conflict, DiskFull, EntryNotFound, TargetFailed, VersionMismatch
from kvfs_base.os_env import os_env
from kvfs_base.seams import Disk
from kvfs_metadata import records
from kvfs_metadata.engines import checkpoint
from kvfs_metadata.engines.engine import Group, KVEngine, KVTransaction
from kvfs_metadata.engines.lmdb_engine import READERS_MAX, LmdbEngine


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
from kvfs_base.seams import Disk
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
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
        # A checkpoint gives the pages free that the one before held on to.
        engine.sync()
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


# --- the machine goes down


class Scribe:
    """Writes random groups and knows what the store holds."""

    def __init__(self, engine: LmdbEngine, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng
        self.state: dict[bytes, bytes] = {}

    def write(self, groups: int) -> None:
        for _ in range(groups):
            writes: dict[bytes, bytes | None] = {}
            for _ in range(self.rng.randrange(1, 12)):
                key = b"%d" % self.rng.randrange(400)
                size = self.rng.choice((3, 200, 9000))
                gone = self.rng.random() < 0.3
                writes[key] = None if gone else self.rng.randbytes(size)
            self.engine.commit(Group([], writes))
            for key, value in writes.items():
                if value is None:
                    self.state.pop(key, None)
                else:
                    self.state[key] = value


def everything(engine: LmdbEngine) -> dict[bytes, bytes]:
    return dict(engine.view(lambda read: read.range(b"", b"\xff", 100_000)))


def after_power_loss(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """The data file as it may be found: of what was written since ``old`` was synced, each page is
    there, not there, or half of it is something else."""
    page = 4096
    found = bytearray()
    for start in range(0, len(new), page):
        before, after = old[start : start + page].ljust(page, b"\x00"), new[start : start + page]
        if before != after:
            torn = after[: page // 2] + rng.randbytes(page // 2)
            after = rng.choice((before, after, torn, rng.randbytes(page)))
        found += after
    return bytes(found)


class PowerMeter:
    """What was safe at the last checkpoint: the data file and the state. Growing the map makes
    one too."""

    def __init__(self, directory: Path, scribe: Scribe, patch: pytest.MonkeyPatch) -> None:
        self.checkpoints = 0

        def save_and_look(disk: Disk, made: checkpoint.Checkpoint) -> None:
            save(disk, made)
            self.look(directory, scribe)

        save = checkpoint.save
        patch.setattr(checkpoint, "save", save_and_look)
        self.look(directory, scribe)

    def look(self, directory: Path, scribe: Scribe) -> None:
        self.data = (directory / checkpoint.DATA_FILE).read_bytes()
        self.state = dict(scribe.state)
        self.checkpoints += 1


@pytest.mark.parametrize("map_bytes", [1 << 30, 1 << 19], ids=["roomy", "growing"])
@pytest.mark.parametrize("seed", range(8))
def test_after_a_power_loss_the_store_is_as_at_the_last_checkpoint(
    tmp_path: Path, seed: int, map_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    directory, crashed = tmp_path / "store", tmp_path / "crashed"
    crashed.mkdir()
    engine = LmdbEngine(os_env(), str(directory), boot_id="first boot", map_bytes=map_bytes)
    scribe = Scribe(engine, rng)
    meter = PowerMeter(directory, scribe, monkeypatch)
    synced = seed % 4
    for _ in range(synced):
        scribe.write(rng.randrange(60))
        engine.sync()
    # Long enough for free pages to be used again and again.
    scribe.write(rng.randrange(100, 300))
    grown = meter.checkpoints - 1 - synced
    assert (grown > 0) == (map_bytes < 1 << 20)
    new = (directory / checkpoint.DATA_FILE).read_bytes()
    (crashed / checkpoint.DATA_FILE).write_bytes(after_power_loss(meter.data, new, rng))
    shutil.copy(directory / checkpoint.CHECKPOINT_FILE, crashed)
    monkeypatch.undo()
    engine.close()

    again = LmdbEngine(os_env(), str(crashed), boot_id="second boot")
    told = {records.WENT_BACK_KEY: b""} if meter.state else {}
    assert everything(again) == meter.state | told
    # And it goes on from there.
    scribe = Scribe(again, rng)
    scribe.state = meter.state | told
    scribe.write(50)
    again.sync()
    assert everything(again) == scribe.state
    again.close()
    third = LmdbEngine(os_env(), str(crashed), boot_id="third boot")
    assert everything(third) == scribe.state, "a clean stop needs no restoring"
    third.close()


def test_a_checkpoint_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    directory, crashed = tmp_path / "store", tmp_path / "crashed"
    rng = random.Random(1)
    engine = LmdbEngine(os_env(), str(directory), boot_id="first boot")
    scribe = Scribe(engine, rng)
    scribe.write(30)
    engine.sync()
    side_file = directory / checkpoint.CHECKPOINT_FILE
    before = side_file.read_bytes()
    scribe.write(30)
    engine.sync()
    after = side_file.read_bytes()
    slots = {n for n in (0, 4096) if before[n : n + 4096] != after[n : n + 4096]}
    assert len(slots) == 1, "the slots are written in turn"
    crashed.mkdir()
    torn = bytearray(after)
    torn[slots.pop() + 40] ^= 1
    (crashed / checkpoint.CHECKPOINT_FILE).write_bytes(torn)
    shutil.copy(directory / checkpoint.DATA_FILE, crashed)
    engine.close()
    found = checkpoint.load(os_env().open_disk(str(crashed)))
    assert found is not None and found.number == 2


def test_the_death_of_the_process_restores_nothing(tmp_path: Path) -> None:
    """A copy of the files is what another process finds after a kill."""
    engine = LmdbEngine(os_env(), str(tmp_path / "store"), boot_id="same boot")
    scribe = Scribe(engine, random.Random(2))
    scribe.write(40)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "store", killed)
    engine.close()
    again = LmdbEngine(os_env(), str(killed), boot_id="same boot")
    assert everything(again) == scribe.state
    again.close()


def test_a_clean_stop_leaves_no_checkpoint(tmp_path: Path) -> None:
    engine = LmdbEngine(os_env(), str(tmp_path))
    assert (tmp_path / checkpoint.CHECKPOINT_FILE).exists()
    engine.close()
    assert not (tmp_path / checkpoint.CHECKPOINT_FILE).exists()


def test_strict_stores_need_none_but_honour_one(tmp_path: Path) -> None:
    engine = LmdbEngine(os_env(), str(tmp_path / "store"), boot_id="first boot")
    engine.update([put(b"a", b"1")])
    engine.sync()
    engine.update([put(b"a", b"2")])
    crashed = tmp_path / "crashed"
    shutil.copytree(tmp_path / "store", crashed)
    engine.close()
    strict = LmdbEngine(os_env(), str(crashed), durability="strict", boot_id="second boot")
    assert get(strict, b"a") == b"1"
    assert not (crashed / checkpoint.CHECKPOINT_FILE).exists()
    strict.update([put(b"a", b"3")])
    after = tmp_path / "after"
    shutil.copytree(crashed, after)
    strict.close()
    again = LmdbEngine(os_env(), str(after), boot_id="third boot")
    assert get(again, b"a") == b"3"
    again.close()


def test_errors_keep_no_reader_slots(tmp_path: Path) -> None:
    """An error refers to the frames that it passed, and in a group they to it: only the garbage
    collector finds them, and in a large service that may take for ever."""

    def fail(tx: KVTransaction) -> None:
        tx.get(b"k")
        raise EntryNotFound(b"k")

    engine = LmdbEngine(os_env(), str(tmp_path))
    gc.disable()
    try:
        for _ in range(2 * READERS_MAX):
            assert isinstance(engine.update([fail])[0], EntryNotFound)
    finally:
        gc.enable()
        engine.close()
