"""What only the PostgreSQL engine has: other servers, a network, a database that goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from kvfs_base.errors import (
    Conflict,
    DiskFull,
    EntryNotFound,
    StoreUnavailable,
    TargetFailed,
)
from kvfs_base.os_env import os_env
from kvfs_metadata.engines import postgres_engine
from kvfs_metadata.engines.engine import KVRead, KVTransaction, Writes
from kvfs_metadata.engines.postgres_engine import PostgresEngine
from kvfs_metadata.engines.postgres_link import error_for
from kvfs_metadata.engines.value_cache import UNKNOWN, ValueCache
from postgres_server import NOBODY, PostgresServer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.pathsep.join(str(ROOT / room) for room in ("kvfs", "metadata"))


def put(**items: bytes) -> Callable[[KVTransaction], None]:
    def fn(txn: KVTransaction) -> None:
        for key, value in items.items():
            txn.put(key.encode(), value)

    return fn


def increment(txn: KVTransaction) -> int:
    number = int(txn.get(b"counter") or b"0") + 1
    txn.put(b"counter", b"%d" % number)
    return number


def get(engine: PostgresEngine, key: bytes) -> bytes | None:
    return engine.view(lambda read: read.get(key))


class Follower:
    """Keeps a copy of the store in memory, as a server does."""

    def __init__(self, engine: PostgresEngine) -> None:
        self.engine = engine
        self.state: dict[bytes, bytes] = {}
        self.heard: list[Writes | None] = []
        engine.listen(self)
        self.state = self.store()

    def __call__(self, read: KVRead, writes: Writes | None) -> None:
        self.heard.append(writes)
        if writes is None:
            self.state = dict(read.range(b"", b"\xff", 10_000))
            return
        for key, value in writes.items():
            self.state.pop(key, None)
            if value is not None:
                self.state[key] = value

    def store(self) -> dict[bytes, bytes]:
        return self.engine.view(lambda read: dict(read.range(b"", b"\xff", 10_000)))


# --- many servers


def test_servers_that_start_at_once(engines: Callable[..., PostgresEngine]) -> None:
    failures: list[BaseException] = []
    opened: list[PostgresEngine] = []

    def start() -> None:
        try:
            opened.append(engines())
            opened[-1].update([increment])
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [get(engine, b"counter") for engine in opened] == [b"6"] * 6


COUNTING = """
import json, sys
from kvfs_base.os_env import os_env
from kvfs_metadata.engines.postgres_engine import PostgresEngine
engine = PostgresEngine(os_env(), sys.argv[1])
own, heard = [], []
first = engine.view(lambda read: int(read.get(b"counter") or 0))
engine.listen(lambda read, writes: heard.append(int(writes[b"counter"])))
loaded = engine.view(lambda read: int(read.get(b"counter") or 0))
def increment(txn):
    number = int(txn.get(b"counter") or b"0") + 1
    # Memory and store are in one state: what was heard and done last is what the store says.
    assert number - 1 == max([loaded, *own[-1:], *heard[-1:]])
    txn.put(b"counter", b"%d" % number)
    return number
for _ in range(int(sys.argv[2])):
    own += engine.update([increment])
engine.view(lambda read: None)
engine.close()
print(json.dumps([loaded, own, heard]))
"""


def test_two_processes_lose_no_update_and_hear_each_other_in_order(postgres_url: str) -> None:
    count = 1000
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTING, postgres_url, str(count)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": SOURCES},
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    results = [json.loads(output) for output in outputs]
    owned = results[0][1] + results[1][1]
    assert sorted(owned) == list(range(1, 2 * count + 1))
    for mine, others in (results, results[::-1]):
        loaded, own, heard = mine
        assert heard == [n for n in others[1] if loaded < n <= heard[-1]] if heard else True
        # Everything up to the last own one was either done or heard, and nothing twice.
        assert sorted(heard + [n for n in own if n > loaded])[: own[-1] - loaded] == list(
            range(loaded + 1, own[-1] + 1)
        )


def test_a_group_waits_for_the_one_before_it(engines: Callable[..., PostgresEngine]) -> None:
    first, second = engines(), engines()
    group = first.run([increment])
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(second.update([increment])))
    thread.start()
    # Neither views of its own server nor of others wait.
    assert get(first, b"counter") is None
    assert get(engines(), b"counter") is None
    assert found == []
    first.commit(group)
    thread.join()
    assert found == [2]
    assert get(first, b"counter") == b"2"


def test_groups_that_write_nothing_make_no_version(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    engine = engines()
    engine.update([increment])
    with psycopg.connect(postgres_url) as admin:
        query = "SELECT max(version) FROM kvfs_metadata.log"
        before = admin.execute(query).fetchone()
        engine.update([lambda txn: txn.get(b"counter")])
        engine.abandon(engine.run([increment]))
        engine.view(lambda read: None)
        assert admin.execute(query).fetchone() == before == (1,)
    assert engines().update([increment]) == [2], "the row is free"


def test_the_row_that_is_locked_does_not_change(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    """Otherwise its versions would pile up while somebody has a snapshot."""
    engine = engines()
    with psycopg.connect(postgres_url) as admin:
        query = "SELECT ctid::text FROM kvfs_metadata.turn"
        before = admin.execute(query).fetchone()
        for _ in range(5):
            engine.update([increment])
        assert admin.execute(query).fetchone() == before


def test_versions_are_unique_even_if_locks_are_not(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    """Somebody else makes the version that was decided: one of the two loses the race."""
    engine, other = Follower(engines()), engines()
    other.update([increment])
    group = engine.engine.run([increment])
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(
            "INSERT INTO kvfs_metadata.log SELECT version + 1, 'other', 0, 0, 0, '\\x80' "
            "FROM kvfs_metadata.log ORDER BY version DESC LIMIT 1"
        )
    with pytest.raises(Conflict):
        engine.engine.commit(group)
    engine.engine.abandon(group)
    assert engine.engine.update([increment]) == [2]
    assert engine.heard[-1] == {}


def test_views_bring_memory_to_the_state_they_show(
    engines: Callable[..., PostgresEngine],
) -> None:
    follower, other = Follower(engines()), engines()
    for number in range(5):
        other.update([put(a=b"%d" % number), put(**{f"k{number}": b"x"})])
        if number % 2:
            other.update([lambda txn: txn.delete(b"k0")])
    assert follower.heard == []
    assert follower.store() == follower.state
    assert len(follower.heard) == 7
    follower.engine.update([put(mine=b"1")])
    assert len(follower.heard) == 7


def test_the_cache_follows_the_others(engines: Callable[..., PostgresEngine]) -> None:
    first, second = engines(), engines()
    first.update([put(a=b"1")])
    keys = [b"a", b"b"]
    for engine in (first, second):
        assert engine.view(lambda read: read.get_many(keys)) == [b"1", None]
    second.update([put(b=b"2"), lambda txn: txn.delete(b"a")])
    assert first.view(lambda read: read.get_many(keys)) == [None, b"2"]
    assert first.view(lambda read: read.get(b"b")) == b"2"
    # A group that was decided and given up leaves nothing in it.
    second.abandon(second.run([put(a=b"wrong")]))
    assert get(second, b"a") is None


def test_a_server_that_was_away_for_long_loads_anew(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    follower, other = Follower(engines(log_versions_max=8)), engines(log_versions_max=8)
    for number in range(20):
        other.update([put(**{f"k{number}": b"x"})])
    assert follower.store() == follower.state
    assert follower.heard == [None]
    for number in range(3):
        other.update([put(**{f"k{number}": b"y"})])
    # Also before a group, which then finds both in one state.
    assert follower.engine.update([lambda txn: txn.get(b"k2")]) == [b"y"]
    assert follower.store() == follower.state
    assert len(follower.heard) == 4
    for number in range(20):
        other.update([put(**{f"k{number}": b"z"})])
    assert follower.engine.update([lambda txn: txn.get(b"k19")]) == [b"z"]
    assert follower.heard[4:] == [None]
    assert follower.state == follower.store()
    with psycopg.connect(postgres_url) as admin:
        row = admin.execute(
            "SELECT count(*), min(version), max(version), sum(size) FROM kvfs_metadata.log"
        ).fetchone()
        head = admin.execute(
            "SELECT version - log_start + 1, log_start, version, log_bytes "
            "FROM kvfs_metadata.log ORDER BY version DESC LIMIT 1"
        ).fetchone()
    assert row == head
    assert row is not None and row[0] <= 9


def test_the_log_is_bounded_in_bytes_too(
    engines: Callable[..., PostgresEngine], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_engine, "POSTGRES_LOG_BYTES_MAX", 20_000)
    engine = engines()
    for number in range(30):
        engine.update([put(**{f"k{number % 7}": bytes(3000)})])
        with psycopg.connect(postgres_url) as admin:
            row = admin.execute(
                "SELECT min(version), max(version), sum(size) FROM kvfs_metadata.log"
            ).fetchone()
            head = admin.execute(
                "SELECT log_start, version, log_bytes FROM kvfs_metadata.log "
                "ORDER BY version DESC LIMIT 1"
            ).fetchone()
        assert row == head
        assert row is not None and row[2] < 20_000 + 4000
    assert row[0] > 20


def test_a_commit_too_large_for_the_log(engines: Callable[..., PostgresEngine]) -> None:
    follower, other = Follower(engines()), engines()
    big = {f"k{number}": bytes([number]) * 3_000_000 for number in range(8)}
    assert sum(map(len, big.values())) > postgres_engine.POSTGRES_ROUND_BYTES
    other.update([put(**big)])
    other.update([put(a=b"after")])
    assert follower.store() == follower.state
    assert follower.heard == [None]
    assert len(follower.state) == 9


# --- disks


def flushed(admin: psycopg.Connection[tuple[object, ...]]) -> tuple[object, object]:
    row = admin.execute("SELECT pg_current_wal_insert_lsn(), pg_current_wal_flush_lsn()").fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_what_was_synced_is_in_the_files(
    engines: Callable[..., PostgresEngine], postgres_url: str, durability: str
) -> None:
    engine = engines(durability=durability)
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        for number in range(20):
            before, _ = flushed(admin)
            engine.update([put(a=b"%d" % number * 1000)])
            if durability == "cache":
                before, _ = flushed(admin)
                engine.sync()
            _, after = flushed(admin)
            assert admin.execute("SELECT %s::pg_lsn < %s::pg_lsn", [before, after]).fetchone() == (
                True,
            )


def test_cache_does_not_wait_for_the_disk(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    behind = 0
    engine = engines()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        for number in range(200):
            engine.update([put(a=b"%d" % number)])
            inserted, flush = flushed(admin)
            behind += inserted != flush
    assert behind > 0


def test_what_is_urgent_is_in_the_files_before_anybody_sees_it(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    engine = engines()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        for number in range(20):
            before, _ = flushed(admin)
            group = engine.run([put(a=b"%d" % number * 1000)])
            group.urgent = True
            engine.commit(group)
            _, after = flushed(admin)
            assert admin.execute("SELECT %s::pg_lsn < %s::pg_lsn", [before, after]).fetchone() == (
                True,
            )
            assert get(engine, b"a") == b"%d" % number * 1000
        behind = 0
        for number in range(200):
            engine.update([put(a=b"%d" % number)])
            inserted, flush = flushed(admin)
            behind += inserted != flush
    assert behind > 0, "only for that one"


@pytest.fixture
def small_tablespace(postgres_server: PostgresServer) -> Iterator[str]:
    """A tablespace of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path = postgres_server.directory / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True)
    os.chown(path, NOBODY, NOBODY)
    try:
        with postgres_server.connect() as admin:
            admin.execute(f"CREATE TABLESPACE small LOCATION '{path}'")
            try:
                yield "small"
            finally:
                admin.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()


def test_a_full_disk_refuses_the_group_and_nothing_else(
    small_tablespace: str, postgres_server: PostgresServer
) -> None:
    with postgres_server.fresh_database() as url:
        engine = PostgresEngine(os_env(), url)
        try:
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute(f"ALTER TABLE kvfs_metadata.items SET TABLESPACE {small_tablespace}")
            engine.update([put(first=b"1")])
            with pytest.raises(DiskFull):
                for number in range(2000):
                    engine.update([put(**{f"k{number}": os.urandom(1900)})])
            assert number > 100
            assert get(engine, b"first") == b"1"
            assert get(engine, b"k%d" % (number - 1)) is not None
            assert get(engine, b"k%d" % number) is None
            assert engine.update([lambda txn: txn.delete(b"k0")]) == [None]
            assert get(engine, b"k0") is None
        finally:
            engine.close()


# --- small things


def test_errors_of_the_database() -> None:
    assert isinstance(error_for("40001", ""), Conflict)
    assert isinstance(error_for("40P01", ""), Conflict)
    assert isinstance(error_for("23505", ""), Conflict)
    assert isinstance(error_for("53100", ""), DiskFull)
    for state in ("53200", "53300", "55P03", "57014", "25P02"):
        assert isinstance(error_for(state, ""), StoreUnavailable)
    assert isinstance(error_for("58030", ""), TargetFailed)


def test_errors_of_functions_pass_through_and_free_the_row(
    engines: Callable[..., PostgresEngine],
) -> None:
    engine = engines()

    def missing(read: KVRead) -> None:
        raise EntryNotFound(b"x")

    def broken(txn: KVTransaction) -> None:
        raise ZeroDivisionError

    with pytest.raises(EntryNotFound):
        engine.view(missing)
    with pytest.raises(ZeroDivisionError):
        engine.run([increment, broken])
    assert engines().update([increment]) == [1]


def test_the_cache_is_bounded_and_drops_what_was_not_used() -> None:
    cache = ValueCache(16 * 300)
    for number in range(100):
        cache.put(b"%d" % number, bytes(90))
        assert cache.size_bytes <= 16 * 300
        assert cache.get(b"0") == bytes(90)
    assert 10 < len(cache) < 17
    assert cache.get(b"50") is UNKNOWN
    cache.put(b"99", None)
    assert cache.get(b"99") is None
    cache.put(b"huge", bytes(1000))
    assert cache.get(b"huge") is UNKNOWN
    cache.apply({b"0": None, b"unknown": b"x"}, own=False)
    assert cache.get(b"0") is None
    assert cache.get(b"unknown") is UNKNOWN
    cache.apply({b"unknown": b"x"}, own=True)
    assert cache.get(b"unknown") == b"x"
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)
