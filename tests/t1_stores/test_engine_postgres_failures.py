"""The engine on PostgreSQL when the database goes away: nothing is lost, nothing happens twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from kvfs_base.errors import (
    Conflict,
    InvalidRequest,
    StoreUnavailable,
    VersionMismatch,
)
from kvfs_base.os_env import os_env
from kvfs_metadata.engines.engine import Group, KVRead
from kvfs_metadata.engines.postgres_engine import PostgresEngine
from kvfs_metadata.engines.postgres_link import Patience
from postgres_proxy import Proxy
from postgres_server import PostgresServer
from t1_stores.test_engine_postgres import SOURCES, Follower, get, increment, put


def backends(admin: psycopg.Connection[tuple[object, ...]], url: str) -> list[object]:
    name = url.partition("?")[0].rpartition("/")[2]
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'kvfs'"
    return [pid for (pid,) in admin.execute(query, [name]).fetchall()]


def terminate(server: PostgresServer, url: str) -> None:
    """Ends every connection of the engines, and waits until they are gone."""
    with server.connect() as admin:
        for pid in backends(admin, url):
            admin.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


def test_a_commit_whose_connection_is_gone_did_not_happen(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer, postgres_url: str
) -> None:
    engine = engines()
    engine.update([increment])
    group = engine.run([increment])
    terminate(postgres_server, postgres_url)
    with pytest.raises(Conflict):
        engine.commit(group)
    engine.abandon(group)
    assert engine.update([increment]) == [2]
    assert get(engines(), b"counter") == b"2"


def test_others_are_followed_only_once_a_lost_group_is_taken_back(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer, postgres_url: str
) -> None:
    """Its functions changed memory: what others did since would be applied to the wrong state."""
    engine, other = engines(), engines()
    follower = Follower(engine)
    group = engine.run([increment])
    terminate(postgres_server, postgres_url)
    assert get(engine, b"counter") is None, "nobody committed"
    other.update([increment, increment])
    with pytest.raises(StoreUnavailable):
        follower.store()
    with pytest.raises(Conflict):
        engine.commit(group)
    with pytest.raises(StoreUnavailable):
        follower.store()
    assert follower.heard == []
    engine.abandon(group)
    assert follower.store() == {b"counter": b"2"} == follower.state
    # The same where the store cannot tell what happened.
    group = engine.run([increment])
    terminate(postgres_server, postgres_url)
    other.update([put(big=bytes(9_000_000))])
    with pytest.raises(StoreUnavailable):
        follower.store()
    with pytest.raises(Conflict):
        engine.commit(group)
    engine.abandon(group)
    assert follower.store() == follower.state
    assert len(follower.state) == 2


@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "answer lost"])
def test_a_commit_without_an_answer_is_looked_up(
    engines: Callable[..., PostgresEngine], postgres_url: str, answered: bool
) -> None:
    with Proxy(postgres_url) as proxy:
        engine = engines(proxy.url)
        follower = Follower(engine)
        engine.update([increment])
        group = engine.run([increment, put(marker=b"this one")])
        (proxy.lose_answers if answered else proxy.lose_requests)(b"this one")
        if answered:
            engine.commit(group)
        else:
            with pytest.raises(Conflict):
                engine.commit(group)
        assert proxy.cut.is_set()
        expected = 2 if answered else 1
        assert get(engine, b"counter") == b"%d" % expected
        assert engine.update([increment]) == [expected + 1]
        assert follower.heard == [], "it was its own"
        engine.close()


def test_a_view_that_saw_the_commit_has_decided_its_fate(
    engines: Callable[..., PostgresEngine],
    postgres_server: PostgresServer,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is known to have happened, although the database then goes away before it is looked up;
    and it is no news to this server's memory."""
    with Proxy(postgres_url) as proxy:
        engine = engines(proxy.url, patience=Patience(patience_seconds=0.1))
        follower = Follower(engine)
        look_up = engine._look_up

        def later(*arguments: object) -> None:
            assert get(engine, b"marker") == b"this one"
            postgres_server.stop()
            look_up(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(engine, "_look_up", later)
        proxy.lose_answers(b"this one")
        try:
            engine.update([put(marker=b"this one")])
        finally:
            postgres_server.start()
        assert get(engine, b"marker") == b"this one"
        assert follower.heard == []
        assert engine.update([increment]) == [1]
        engine.close()


def test_a_commit_of_unknown_fate_is_told_later(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer, postgres_url: str
) -> None:
    """The caller took it back; so if it did happen it is news."""
    with Proxy(postgres_url) as proxy:
        engine = engines(proxy.url, patience=Patience(lock_seconds=0.1))
        other = engines()
        follower = Follower(engine)
        group = engine.run([put(marker=b"this one")])
        proxy.lose_answers(b"this one")
        # Another server gets the row next, and has it for as long as the lookup has patience.
        waiting: list[Group[int]] = []
        thread = threading.Thread(target=lambda: waiting.append(other.run([increment])))
        thread.start()
        with postgres_server.connect() as admin:
            query = "SELECT 1 FROM pg_locks WHERE NOT granted"
            while admin.execute(query).fetchone() is None:
                thread.join(0.01)
        with pytest.raises(StoreUnavailable):
            engine.commit(group)
        engine.abandon(group)
        thread.join()
        other.commit(waiting[0])
        assert follower.store() == {b"marker": b"this one", b"counter": b"1"} == follower.state
        assert follower.heard == [{b"marker": b"this one"}, {b"counter": b"1"}]
        engine.close()


def test_every_acknowledged_increment_happens_once_while_backends_are_ended(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer, postgres_url: str
) -> None:
    counts = [0, 0]
    failures: list[BaseException] = []
    stop = threading.Event()

    def count(place: int) -> None:
        try:
            engine = engines()
            follower = Follower(engine)
            while not stop.is_set():
                try:
                    group = engine.run([increment])
                except StoreUnavailable:
                    continue
                try:
                    engine.commit(group)
                except Conflict:
                    engine.abandon(group)
                else:
                    counts[place] += 1
                    follower.state[b"counter"] = b"%d" % group.results[0]  # type: ignore[str-bytes-safe]
            with contextlib.suppress(StoreUnavailable):
                assert follower.store() == follower.state
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=count, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        terminate(postgres_server, postgres_url)
        reached = sum(counts) + 10
        while sum(counts) < reached and not failures:
            threads[0].join(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert get(engines(), b"counter") == b"%d" % sum(counts)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_database_restarts(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer, how: str
) -> None:
    engine = engines(durability="strict")
    engine.update([increment])
    for number in range(2, 5):
        getattr(postgres_server, how)()
        postgres_server.start()
        assert get(engine, b"counter") == b"%d" % (number - 1)
        assert engine.update([increment]) == [number]
        engine.sync()
    group = engine.run([increment])
    getattr(postgres_server, how)()
    postgres_server.start()
    with pytest.raises(Conflict):
        engine.commit(group)
    assert engine.update([increment]) == [5]


def test_commits_that_the_database_lost_in_a_crash_are_forgotten(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer
) -> None:
    """With durability "cache" a crash of the database takes the last commits with it; memory that
    has them must not stay."""
    follower, other = Follower(engines()), Follower(engines())
    follower.engine.update([put(safe=b"1")])
    follower.engine.sync()
    follower.engine.update([put(last=b"1")])
    follower.state |= {b"safe": b"1", b"last": b"1"}
    assert other.store() == follower.state
    postgres_server.restart()
    other.engine.update([put(other=b"2")])
    other.state[b"other"] = b"2"
    assert follower.store() == follower.state
    assert other.store() == other.state == follower.state
    assert follower.state[b"safe"] == b"1"


def test_a_history_that_was_rewritten_is_noticed(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    """What a failover to a host that lags looks like: other commits have the same versions."""
    follower, other = Follower(engines()), engines()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        other.update([put(a=b"1")])
        old = admin.execute("SELECT max(version) FROM kvfs_metadata.log").fetchone()
        assert old is not None
        other.update([put(b=b"2"), put(a=b"2")])
        assert follower.store() == follower.state
        admin.execute("DELETE FROM kvfs_metadata.log WHERE version > %s", old)
        admin.execute("DELETE FROM kvfs_metadata.items")
        admin.execute("INSERT INTO kvfs_metadata.items VALUES ('a', '1')")
        assert follower.store() == follower.state == {b"a": b"1"}
        third = engines()
        third.update([put(c=b"3")])
        third.update([put(d=b"4")])
    assert follower.store() == follower.state == {b"a": b"1", b"c": b"3", b"d": b"4"}
    assert get(follower.engine, b"b") is None
    assert follower.heard[2] is None
    # The other one has seen a version that there is again, with another token.
    assert other.view(lambda read: read.get_many([b"a", b"b", b"c"])) == [b"1", None, b"3"]


STOPPED = """
import os, signal, sys
from kvfs_base.errors import Conflict
from kvfs_base.os_env import os_env
from kvfs_metadata.engines.postgres_engine import PostgresEngine
from kvfs_metadata.engines.postgres_link import Patience
engine = PostgresEngine(os_env(), sys.argv[1], patience=Patience(idle_seconds=2))
group = engine.run([lambda txn: txn.put(b"a", b"stopped")])
os.kill(os.getpid(), signal.SIGSTOP)
try:
    engine.commit(group)
except Conflict:
    engine.abandon(group)
    print(engine.update([lambda txn: txn.get(b"a")]))
engine.close()
"""


def test_a_stopped_server_holds_nobody_up_for_long(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    engine = engines()
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, postgres_url],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )
    with process:
        try:
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            engine.update([put(a=b"other")])
            process.send_signal(signal.SIGCONT)
            output, _ = process.communicate()
        finally:
            process.kill()
    assert output == "[b'other']\n"
    assert get(engine, b"a") == b"other"


def test_a_database_that_does_not_answer_is_given_up(
    engines: Callable[..., PostgresEngine],
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engines(patience=Patience(connect_seconds=2))
    engine.update([increment])
    group = engine.run([increment])
    postgres_server.pause()
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(engine, "_patience_seconds", 0.1)
            for link in (engine._writer, engine._reader):
                impatient.setattr(link, "_patience", Patience(answer_seconds=0.3))
            with pytest.raises(StoreUnavailable):
                engine.commit(group)
            with pytest.raises(StoreUnavailable):
                engine.view(lambda read: None)
    finally:
        postgres_server.resume()
    engine.abandon(group)
    # Whether the commit happened was unknown; a reader may still come before it. It is one or the
    # other, and known to the next writer, who waits until the last one is gone.
    (number,) = engine.update([increment])
    assert number in (2, 3)
    assert get(engine, b"counter") == b"%d" % number
    assert engine.update([increment]) == [number + 1]


def test_a_connection_lost_in_the_middle(
    engines: Callable[..., PostgresEngine], postgres_server: PostgresServer, postgres_url: str
) -> None:
    engine = engines()
    engine.update([put(a=b"1")])

    def reading(read: KVRead) -> object:
        terminate(postgres_server, postgres_url)
        try:
            return read.range(b"", b"\xff", 10)
        except StoreUnavailable:
            return "swallowed"

    with pytest.raises(StoreUnavailable):
        engine.view(reading)
    with pytest.raises(StoreUnavailable):
        engine.run([put(a=b"2"), reading])
    assert get(engine, b"a") == b"1"
    assert engine.update([put(a=b"3")]) == [None]


def test_the_row_is_waited_for_a_bounded_time(engines: Callable[..., PostgresEngine]) -> None:
    holder, engine = engines(), engines(patience=Patience(lock_seconds=0.1))
    group = holder.run([increment])
    with pytest.raises(StoreUnavailable) as caught:
        engine.run([increment])
    assert "lock timeout" in caught.value.detail
    holder.commit(group)
    assert engine.update([increment]) == [2]


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    patience = Patience(patience_seconds=0.2)
    with pytest.raises(StoreUnavailable) as caught:
        PostgresEngine(os_env(), f"postgresql://x@/x?host={tmp_path}", patience=patience)
    assert str(tmp_path) in caught.value.detail
    with pytest.raises(InvalidRequest):
        PostgresEngine(os_env(), "postgresql://x@/x?nonsense=1")


def test_tables_of_another_version_are_refused(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    engines().close()
    with psycopg.connect(postgres_url) as admin:
        admin.execute("UPDATE kvfs_metadata.format SET format = 2")
    with pytest.raises(VersionMismatch) as caught:
        engines()
    assert (caught.value.found, caught.value.expected) == ("2", "1")


def test_a_user_who_may_not_create_uses_what_is_there(
    engines: Callable[..., PostgresEngine], postgres_url: str
) -> None:
    engines().update([increment])
    with psycopg.connect(postgres_url) as admin:
        admin.execute("CREATE ROLE kvfs_plain LOGIN")
        admin.execute("GRANT USAGE ON SCHEMA kvfs_metadata TO kvfs_plain")
        admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA kvfs_metadata TO kvfs_plain")
    try:
        engine = engines(postgres_url.replace("postgres@", "kvfs_plain@"))
        assert engine.update([increment]) == [2]
    finally:
        with psycopg.connect(postgres_url) as admin:
            admin.execute("DROP OWNED BY kvfs_plain")
            admin.execute("DROP ROLE kvfs_plain")
