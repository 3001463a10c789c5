"""Stores as a whole: copies between engines, backups, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from kvfs import cli
from kvfs.cli.exits import ExitCode
from kvfs.supervisor.home import Home
from kvfs_base.errors import (
    BackupDamaged,
    Conflict,
    DiskFull,
    InvalidRequest,
    KvfsError,
    VersionMismatch,
)
from kvfs_base.os_env import os_env
from kvfs_metadata import records
from kvfs_metadata.engines import backup, stores
from kvfs_metadata.engines.engine import Item, KVEngine, KVRead, KVTransaction, scan_all
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
from kvfs_metadata.engines.migrations import migrate
from kvfs_metadata.engines.stores import Summary
from postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.pathsep.join(str(ROOT / room) for room in ("kvfs", "metadata"))


@dataclasses.dataclass
class Places:
    """Makes names of stores."""

    directory: Path
    fresh_database: Callable[[], str]
    count: int = 0

    def new(self, kind: str) -> str:
        self.count += 1
        if kind == "postgres":
            return self.fresh_database()
        return str(self.directory / f"store-{self.count}")


@pytest.fixture
def places(tmp_path: Path, postgres_server: PostgresServer) -> Iterator[Places]:
    with contextlib.ExitStack() as stack:
        yield Places(tmp_path, lambda: stack.enter_context(postgres_server.fresh_database()))


def sample(seed: int, count: int = 3000) -> dict[bytes, bytes]:
    """Items as a store has them, of all sizes."""
    rng = random.Random(seed)
    items = {b"%s%s" % (rng.choice((b"INOD", b"DENT", b"BLCK")), rng.randbytes(12)): b""
             for _ in range(count)}  # fmt: skip
    sizes = (0, 10, 100, 4000)
    items = {key: rng.randbytes(rng.choice(sizes)) for key in items}
    items[b"AAAAbig"] = rng.randbytes(9_000_000)
    return items | {records.FORMAT_KEY: records.FORMAT}


def write(store: str, items: dict[bytes, bytes]) -> None:
    def fn(txn: KVTransaction) -> None:
        for key, value in items.items():
            txn.put(key, value)

    engine = stores.open_store(os_env(), store)
    assert engine.update([fn]) == [None]
    engine.close()


def content(store: str) -> dict[bytes, bytes]:
    return stores.read_store(os_env(), store, lambda read: dict(scan_all(read)))


def make_backup(store: str, path: Path) -> Summary:
    disk = os_env().open_disk(str(path.parent))
    return stores.read_store(
        os_env(),
        store,
        lambda read: backup.write_backup(disk, path.name, stores.batches_of(read)),
    )


def restore(path: Path, store: str) -> Summary:
    disk = os_env().open_disk(str(path.parent))
    backup.check_backup(disk, path.name)
    return stores.fill_store(os_env(), store, backup.read_backup(disk, path.name))


def copy(source: str, destination: str) -> Summary:
    def fill(read: KVRead) -> Summary:
        return stores.fill_store(os_env(), destination, stores.batches_of(read))

    return stores.read_store(os_env(), source, fill)


# --- round trips


@pytest.mark.parametrize("destination_kind", ["lmdb", "postgres"])
@pytest.mark.parametrize("source_kind", ["lmdb", "postgres"])
def test_copies_and_backups_are_whole(
    places: Places, tmp_path: Path, source_kind: str, destination_kind: str
) -> None:
    source, copied, restored = (
        places.new(source_kind),
        places.new(destination_kind),
        places.new(destination_kind),
    )
    items = sample(1)
    write(source, items)
    expected = (records.FORMAT.decode(), len(items), sum(map(len, items)) + sum(
        map(len, items.values())))  # fmt: skip
    for summary in (
        copy(source, copied),
        make_backup(source, tmp_path / "backup"),
        restore(tmp_path / "backup", restored),
    ):
        assert (summary.format, summary.items, summary.bytes) == expected
        assert summary.kinds["META"] == 1
        assert sum(summary.kinds.values()) == len(items)
    assert content(copied) == content(restored) == content(source) == items
    assert not (tmp_path / "backup.part").exists()
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600


def test_what_is_written_must_be_empty_and_free(places: Places, tmp_path: Path) -> None:
    source = places.new("lmdb")
    write(source, sample(2, 10))
    for kind in ("lmdb", "postgres"):
        taken = places.new(kind)
        write(taken, {b"x": b"somebody's"})
        with pytest.raises(InvalidRequest) as caught:
            copy(source, taken)
        assert "not empty" in caught.value.detail
        engine = stores.open_store(os_env(), taken)
        assert engine.view(lambda read: list(scan_all(read))) == [(b"x", b"somebody's")]
        engine.close()
    used = places.new("lmdb")
    engine = LmdbEngine(os_env(), used)
    with pytest.raises(Conflict):
        copy(source, used)
    engine.close()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(InvalidRequest):
        copy(source, str(home))
    assert os.listdir(home) == ["thesis.txt"]


def test_what_is_read_must_be_a_store(places: Places, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for name in (missing, places.new("postgres"), "mysql://there/db"):
        with pytest.raises(InvalidRequest):
            content(name)
    assert not os.path.exists(missing)
    for kind in ("lmdb", "postgres"):
        other = places.new(kind)
        write(other, {b"x": b"y"})
        with pytest.raises(VersionMismatch):
            content(other)


def test_reading_makes_no_tables(places: Places) -> None:
    url = places.new("postgres")
    with pytest.raises(InvalidRequest):
        content(url)
    with psycopg.connect(url) as admin:
        query = "SELECT count(*) FROM pg_namespace WHERE nspname = 'kvfs_metadata'"
        assert admin.execute(query).fetchone() == (0,)


def test_names_are_shown_without_passwords() -> None:
    shown = stores.display("postgresql://me:secret@host:5432/db?sslmode=require&password=secret")
    assert shown == "postgresql://host:5432/db"
    assert stores.display("/a/b") == "/a/b"


# --- interrupted


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["lmdb", "postgres"])
def test_an_interrupted_copy_is_no_store_and_can_be_repeated(places: Places, kind: str) -> None:
    source, destination = places.new("lmdb"), places.new(kind)
    first, second = sample(3), sample(4)
    write(source, first)

    def cut(batches: Iterator[list[Item]], after: int) -> Iterator[list[Item]]:
        for number, batch in enumerate(batches):
            if number == after:
                raise Interrupted
            yield batch

    def fill(after: int) -> None:
        stores.read_store(
            os_env(),
            source,
            lambda read: stores.fill_store(
                os_env(), destination, cut(stores.batches_of(read), after)
            ),
        )

    for after in (0, 1):
        with pytest.raises(Interrupted):
            fill(after)
        with pytest.raises(VersionMismatch) as caught:
            content(destination)
        assert "unfinished" in caught.value.detail
        engine = stores.open_store(os_env(), destination)
        with pytest.raises(VersionMismatch):
            migrate(engine)
        engine.close()
    other = places.new("lmdb")
    write(other, second)
    copy(other, destination)
    assert content(destination) == second


def test_of_two_copies_into_one_database_one_gives_up(places: Places) -> None:
    source, destination = places.new("lmdb"), places.new("postgres")
    items = sample(5)
    write(source, items)

    def batches(read: KVRead) -> Iterator[list[Item]]:
        found = list(stores.batches_of(read))
        yield found[0]
        stores.fill_store(os_env(), destination, found)
        yield from found[1:]

    with pytest.raises((Conflict, InvalidRequest)):
        stores.read_store(
            os_env(), source, lambda read: stores.fill_store(os_env(), destination, batches(read))
        )
    assert content(destination) == items


def test_a_backup_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    disk = os_env().open_disk(str(tmp_path))
    backup.write_backup(disk, "file", iter([[(b"a", b"1")]]))
    before = (tmp_path / "file").read_bytes()

    def failing() -> Iterator[list[Item]]:
        yield [(b"b", b"2")]
        raise DiskFull(path="file")

    with pytest.raises(DiskFull):
        backup.write_backup(disk, "file", failing())
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == before


# --- damage


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, dict[bytes, bytes]]:
    """A small backup of several frames."""
    items = {b"INOD%d" % number: b"value %d" % number for number in range(50)}
    items[records.FORMAT_KEY] = records.FORMAT
    pairs = sorted(items.items())
    path = tmp_path / "backup"
    disk = os_env().open_disk(str(tmp_path))
    backup.write_backup(disk, path.name, [pairs[:20], pairs[20:40], pairs[40:]])
    assert check(path).items == len(items)
    return path, items


def check(path: Path) -> Summary:
    return backup.check_backup(os_env().open_disk(str(path.parent)), path.name)


def test_every_flipped_bit_is_noticed(whole: tuple[Path, dict[bytes, bytes]]) -> None:
    path, _ = whole
    data = path.read_bytes()
    rng = random.Random(7)
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises((BackupDamaged, VersionMismatch)):
            check(path)


def test_every_cut_is_noticed(whole: tuple[Path, dict[bytes, bytes]]) -> None:
    path, _ = whole
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(BackupDamaged):
            check(path)
    path.write_bytes(data + b"\x00")
    with pytest.raises(BackupDamaged):
        check(path)


def test_frames_that_are_missing_repeated_or_exchanged_are_noticed(
    whole: tuple[Path, dict[bytes, bytes]],
) -> None:
    path, _ = whole
    data = path.read_bytes()
    places = [data.index(b"ITEM")]
    while (place := data.find(b"ITEM", places[-1] + 1)) > 0:
        places.append(place)
    places.append(data.index(b"TAIL"))
    start, one, two, three, tail = (
        data[a:b] for a, b in zip([0, *places], [*places, None], strict=True)
    )
    assert start + one + two + three + tail == data
    for wrong in (
        start + one + three + tail,
        start + one + three + two + tail,
        start + one + two + two + three + tail,
        start + tail,
        start + one + two + three + tail + tail,
        data + data,
    ):
        path.write_bytes(wrong)
        with pytest.raises(BackupDamaged):
            check(path)


def test_another_version_of_the_file_is_refused(whole: tuple[Path, dict[bytes, bytes]]) -> None:
    path, _ = whole
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(VersionMismatch) as caught:
        check(path)
    assert (caught.value.found, caught.value.expected) == ("2", "1")


# --- the command line, beside a store that is served


def kvfs_elsewhere(*arguments: str | Path) -> None:
    """``kvfs metadata`` in another process."""
    done = subprocess.run(
        [sys.executable, "-m", "kvfs", "metadata", *arguments],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def kvfs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """``kvfs metadata`` in this process: exit code and what it wrote."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kvfs", "metadata", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out + output.err

    return run


ACCOUNTS = [b"INOD%02d" % number for number in range(40)]


class Bank:
    """A server's writer: money moves between accounts and never changes in all."""

    def __init__(self, engine: KVEngine) -> None:
        self.engine = engine
        self.moves = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _open(self, txn: KVTransaction) -> None:
        txn.put(records.FORMAT_KEY, records.FORMAT)
        for key in ACCOUNTS:
            txn.put(key, b"100")
        for number in range(4000):  # so that reading takes longer than moving
            txn.put(b"FILL%d" % number, b"%d" % number * 100)

    def _move(self, txn: KVTransaction) -> None:
        source, destination = random.sample(ACCOUNTS, 2)
        for key, change in ((source, -1), (destination, 1)):
            txn.put(key, b"%d" % (int(txn.get(key) or b"") + change))
        txn.put(b"INODmoves", b"%d" % (self.moves + 1))

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.engine.update([self._move])
                self.moves += 1
        except BaseException as exc:
            self.failure = exc

    def __enter__(self) -> Bank:
        self.engine.update([self._open])
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()
        self.engine.close()
        assert self.failure is None


@pytest.mark.parametrize("kind", ["lmdb", "postgres"])
def test_a_backup_beside_a_running_service_is_one_state(
    places: Places, tmp_path: Path, kind: str
) -> None:
    store = places.new(kind)
    with Bank(stores.open_store(os_env(), store)) as bank:
        for number in range(2):
            found = places.new("lmdb")
            before = bank.moves
            if number == 0:
                kvfs_elsewhere("backup", store, tmp_path / "backup")
                after = bank.moves + 1
                restore(tmp_path / "backup", found)
            else:
                kvfs_elsewhere("copy", store, found)
                after = bank.moves + 1
            state = content(found)
            assert sum(int(state[key]) for key in ACCOUNTS) == 100 * len(ACCOUNTS)
            assert len(state) == len(ACCOUNTS) + 4000 + 2
            assert before <= int(state[b"INODmoves"]) <= after, "one of this moment"
        assert bank.moves > before > 0


def test_pages_that_a_killed_backup_held_are_used_again(tmp_path: Path) -> None:
    engine = LmdbEngine(os_env(), str(tmp_path))
    engine.update([lambda txn: txn.put(b"a", b"1")])
    holding = (
        "import os, signal, sys\n"
        "from kvfs_metadata.engines.lmdb_engine import read_environment\n"
        "with read_environment(sys.argv[1]) as read:\n"
        "    assert read.get(b'a') == b'1'\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", holding, tmp_path], env=os.environ | {"PYTHONPATH": SOURCES}
    )
    assert done.returncode == -signal.SIGKILL
    assert len(strangers(engine)) == 1
    engine.sync()
    assert strangers(engine) == []
    engine.close()


def strangers(engine: LmdbEngine) -> list[str]:
    """Processes that look on, as LMDB's table of readers has them."""
    lines = engine._lmdb.readers().splitlines()[1:]
    return [line for line in lines if line.split()[0] != str(os.getpid())]


def test_the_command_line(
    kvfs: Callable[..., tuple[int, str]],
    places: Places,
    tmp_path: Path,
    whole: tuple[Path, dict[bytes, bytes]],
) -> None:
    path, items = whole
    items = items | {records.WENT_BACK_KEY: b""}  # numbers given out since the backup are skipped
    store, url = tmp_path / "one", places.new("postgres")
    assert kvfs("restore", path, store)[0] == 0
    assert kvfs("copy", store, url)[0] == 0
    assert kvfs("backup", url, tmp_path / "again")[0] == 0
    code, told = kvfs("info", url, "--json")
    assert code == 0
    assert json.loads(told) == {
        "format": records.FORMAT.decode(),
        "items": 52,
        "bytes": sum(map(len, items)) + sum(map(len, items.values())),
        "kinds": {"INOD": 50, "META": 2},
    }
    assert "51 items" in kvfs("info", path)[1]
    for source in (store, tmp_path / "again"):
        assert "52 items" in kvfs("info", source)[1]
    for destination in (store, url):
        code, told = kvfs("restore", path, destination)
        assert code == ExitCode.USAGE
        assert "is not empty" in told
    code, told = kvfs("backup", tmp_path / "missing", tmp_path / "b")
    assert code == ExitCode.USAGE
    assert "there is no metadata store in" in told
    engine = LmdbEngine(os_env(), str(tmp_path / "used"))
    code, told = kvfs("restore", path, tmp_path / "used")
    assert code == ExitCode.FAILED
    assert "in use by another metadata service" in told
    engine.close()
    assert kvfs("info", tmp_path / "absent")[0] == ExitCode.USAGE
    assert kvfs("restore", tmp_path / "absent", url)[0] == ExitCode.NOT_FOUND


def test_a_damaged_backup_touches_nothing(
    kvfs: Callable[..., tuple[int, str]], tmp_path: Path, whole: tuple[Path, dict[bytes, bytes]]
) -> None:
    path, _ = whole
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    code, told = kvfs("restore", path, tmp_path / "store")
    assert code == ExitCode.DAMAGED
    assert "is damaged at byte" in told
    assert not (tmp_path / "store").exists()


def test_a_backup_of_a_newer_format_touches_nothing(
    kvfs: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    disk = os_env().open_disk(str(tmp_path))
    backup.write_backup(disk, "new", [[(records.FORMAT_KEY, b"kvfs-metadata 999")]])
    code, told = kvfs("restore", tmp_path / "new", tmp_path / "store")
    assert code == ExitCode.VERSION
    assert "999" in told
    assert not (tmp_path / "store").exists()


def test_the_directory_of_a_whole_kvfs_stands_for_its_store(
    kvfs: Callable[..., tuple[int, str]],
    places: Places,
    tmp_path: Path,
    whole: tuple[Path, dict[bytes, bytes]],
) -> None:
    path, items = whole
    items = items | {records.WENT_BACK_KEY: b""}
    home = Home(tmp_path / "home")
    home.open_or_create(1)
    assert kvfs("restore", path, home.directory)[0] == 0
    assert content(str(home.metadata)) == items
    url = places.new("postgres")
    home.settings_path.write_text(f'[metadata]\nstore = "{url}"\n')
    assert kvfs("restore", path, home.directory)[0] == 0
    assert content(url) == items
    (home.directory / "kvfs.json").write_text("{}")
    assert kvfs("info", home.directory)[0] == ExitCode.NOT_KVFS


def test_errors_in_transactions_are_raised(tmp_path: Path) -> None:
    engine = LmdbEngine(os_env(), str(tmp_path))

    def refuse(txn: KVTransaction) -> None:
        raise Conflict(detail="always")

    with pytest.raises(KvfsError):
        stores.update(engine, refuse)
    engine.close()
