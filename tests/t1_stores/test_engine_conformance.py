"""What every engine of the metadata service does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import EntryExists, EntryNotFound, KvfsError
from kvfs_base.os_env import os_env
from kvfs_metadata.engines.engine import (
    KVEngine,
    KVRead,
    KVTransaction,
    Writes,
    prefix_end,
    scan,
    scan_all,
)
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.engines.postgres_engine import PostgresEngine

KINDS = ("memory", "lmdb-cache", "lmdb-strict", "postgres-cache", "postgres-strict")


def make_engine(request: pytest.FixtureRequest, kind: str, directory: Path) -> KVEngine:
    if kind == "memory":
        return MemoryEngine()
    if kind.startswith("postgres"):
        url = request.getfixturevalue("postgres_url")
        return PostgresEngine(os_env(), url, durability=kind.removeprefix("postgres-"))
    return LmdbEngine(
        os_env(), str(directory / kind), durability=kind.removeprefix("lmdb-"), map_bytes=1 << 20
    )


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVEngine]:
    engine = make_engine(request, request.param, tmp_path)
    try:
        yield engine
    finally:
        engine.close()


def putting(**items: bytes) -> Callable[[KVTransaction], None]:
    def fn(txn: KVTransaction) -> None:
        for key, value in items.items():
            txn.put(key.encode(), value)

    return fn


def everything(engine: KVEngine) -> dict[bytes, bytes]:
    return dict(engine.view(lambda read: read.range(b"", b"\xff", 10_000)))


def test_a_new_engine_is_empty(engine: KVEngine) -> None:
    assert everything(engine) == {}
    assert engine.view(lambda read: read.get(b"absent")) is None


def test_what_was_put_is_read_back(engine: KVEngine) -> None:
    assert engine.update([putting(a=b"1", b=b""), putting(c=b"3" * 5000)]) == [None, None]
    assert everything(engine) == {b"a": b"1", b"b": b"", b"c": b"3" * 5000}
    wanted = [b"c", b"absent", b"a"]
    assert engine.view(lambda read: read.get_many(wanted)) == [b"3" * 5000, None, b"1"]


def test_deleting_is_fine_whether_or_not_the_key_is_there(engine: KVEngine) -> None:
    engine.update([putting(a=b"1", b=b"2")])

    def fn(txn: KVTransaction) -> None:
        txn.delete(b"a")
        txn.delete(b"never there")

    assert engine.update([fn]) == [None]
    assert everything(engine) == {b"b": b"2"}


RANGES = [
    (b"", b"\xff", 100, False, [b"a", b"aa", b"b", b"c", b"c\x00"]),
    (b"a", b"c", 100, False, [b"a", b"aa", b"b"]),
    (b"a\x00", b"c\x00", 100, False, [b"aa", b"b", b"c"]),
    (b"", b"\xff", 2, False, [b"a", b"aa"]),
    (b"", b"\xff", 2, True, [b"c\x00", b"c"]),
    (b"a", b"c", 100, True, [b"b", b"aa", b"a"]),
    (b"b", b"b", 100, False, []),
    (b"c", b"a", 100, False, []),
    (b"c", b"a", 100, True, []),
    (b"x", b"y", 100, True, []),
    (b"", b"\xff", 0, False, []),
    (b"", b"\xff", 0, True, []),
]


@pytest.mark.parametrize(("start", "end", "limit", "reverse", "expected"), RANGES)
@pytest.mark.parametrize("inside", [False, True], ids=["committed", "in the transaction"])
def test_ranges(
    engine: KVEngine,
    start: bytes,
    end: bytes,
    limit: int,
    reverse: bool,
    expected: list[bytes],
    inside: bool,
) -> None:
    """The same answers from the committed state and through overlays that hold half of it."""

    def some(txn: KVTransaction) -> None:
        for key in (b"aa", b"c", b"bb", b"d"):
            txn.put(key, b"v" + key)

    def rest(txn: KVTransaction) -> list[tuple[bytes, bytes]]:
        for key in (b"a", b"b", b"c\x00"):
            txn.put(key, b"v" + key)
        for key in (b"bb", b"d"):
            txn.delete(key)
        return txn.range(start, end, limit, reverse)

    engine.update([some])
    found = engine.update([rest])[0]
    if not inside:
        found = engine.view(lambda read: read.range(start, end, limit, reverse))
    assert found == [(key, b"v" + key) for key in expected]


def test_a_group_sees_its_earlier_writes_and_the_store_does_not_until_commit(
    engine: KVEngine,
) -> None:
    engine.update([putting(a=b"old")])

    def second(txn: KVTransaction) -> tuple[bytes | None, list[bytes | None]]:
        return txn.get(b"a"), txn.get_many([b"b", b"a"])

    group = engine.run([putting(a=b"new", b=b"2"), second])
    assert group.results == [None, (b"new", [b"2", b"new"])]
    assert everything(engine) == {b"a": b"old"}
    engine.commit(group)
    assert everything(engine) == {b"a": b"new", b"b": b"2"}


def test_a_refused_function_leaves_nothing_and_disturbs_nobody(engine: KVEngine) -> None:
    def refused(txn: KVTransaction) -> None:
        txn.put(b"a", b"wrong")
        txn.delete(b"b")
        raise EntryExists(b"a")

    def reader(txn: KVTransaction) -> bytes | None:
        return txn.get(b"a")

    results = engine.update([putting(a=b"1", b=b"2"), refused, reader, putting(c=b"3")])
    assert isinstance(results[1], EntryExists)
    assert results[2] == b"1"
    assert everything(engine) == {b"a": b"1", b"b": b"2", b"c": b"3"}


def test_a_function_takes_back_what_it_wrote_since_a_mark(engine: KVEngine) -> None:
    def fn(txn: KVTransaction) -> list[tuple[bytes, bytes]]:
        putting(a=b"kept", b=b"kept")(txn)
        mark = txn.mark()
        putting(a=b"wrong", c=b"wrong", d=b"wrong")(txn)
        inner = txn.mark()
        txn.delete(b"d")
        txn.roll_back(inner)
        assert txn.get(b"d") == b"wrong"
        for key in (b"b", b"c", b"stored"):
            txn.delete(key)
        txn.roll_back(mark)
        return txn.range(b"", b"z", 10)

    engine.update([putting(stored=b"before")])
    expected = {b"a": b"kept", b"b": b"kept", b"stored": b"before"}
    assert engine.update([fn]) == [list(expected.items())]
    assert everything(engine) == expected


def test_another_exception_ends_the_group_and_nothing_is_written(engine: KVEngine) -> None:
    def broken(txn: KVTransaction) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        engine.update([putting(a=b"1"), broken])
    assert everything(engine) == {}


def test_a_view_is_one_state(engine: KVEngine) -> None:
    engine.update([putting(a=b"1")])
    group = engine.run([putting(a=b"2")])

    def view(read: KVRead) -> tuple[bytes | None, bytes | None]:
        before = read.get(b"a")
        thread = threading.Thread(target=engine.commit, args=(group,))
        thread.start()
        thread.join(0.05)  # an engine may make the commit wait for the view, or not
        threads.append(thread)
        return before, read.get(b"a")

    threads: list[threading.Thread] = []
    assert engine.view(view) == (b"1", b"1")
    threads[0].join()
    assert everything(engine) == {b"a": b"2"}


def test_errors_of_views_pass_through(engine: KVEngine) -> None:
    def view(read: KVRead) -> None:
        raise EntryNotFound(b"x")

    with pytest.raises(EntryNotFound):
        engine.view(view)
    assert everything(engine) == {}


def test_a_group_of_thousands_with_large_values(engine: KVEngine) -> None:
    """The LMDB engines start with a map of 1 MiB here, so this grows it several times."""

    def put(number: int) -> Callable[[KVTransaction], int]:
        def fn(txn: KVTransaction) -> int:
            called.append(number)
            txn.put(number.to_bytes(4, "big"), bytes([number % 251]) * 4000)
            return number

        return fn

    called: list[int] = []
    count = 3000
    assert engine.update([put(n) for n in range(count)]) == list(range(count))
    assert called == list(range(count)), "each function runs once, also when the map grows"
    found = engine.view(lambda read: list(scan(read, b"\x00")))
    assert [int.from_bytes(k, "big") for k, _ in found] == list(range(count))
    assert all(v == bytes([n % 251]) * 4000 for n, (_, v) in enumerate(found))


def test_sync_and_an_empty_group(engine: KVEngine) -> None:
    assert engine.update([]) == []
    engine.sync()
    engine.update([putting(a=b"1")])
    engine.sync()
    assert everything(engine) == {b"a": b"1"}


def test_a_copy_is_the_committed_state(engine: KVEngine, tmp_path: Path) -> None:
    engine.update([putting(a=b"1", b=b"2")])
    copy_path = tmp_path / "copy"
    copy_path.mkdir()
    engine.copy_to(str(copy_path))
    engine.update([putting(a=b"later")])
    copy = LmdbEngine(os_env(), str(copy_path))
    try:
        assert everything(copy) == {b"a": b"1", b"b": b"2"}
    finally:
        copy.close()


def test_commits_from_many_threads(engine: KVEngine) -> None:
    """Groups are decided one after the other here, as the service does, and written elsewhere."""
    failures: list[BaseException] = []

    def reader() -> None:
        try:
            while not stop.is_set():
                state = everything(engine)
                assert len(set(state.values())) <= 1, "a group was seen half"
        except BaseException as exc:
            failures.append(exc)

    stop = threading.Event()
    thread = threading.Thread(target=reader)
    thread.start()
    try:
        for number in range(50):
            value = b"%d" % number * 2000
            group = engine.run([putting(a=value), putting(b=value, c=value)])
            writer = threading.Thread(target=engine.commit, args=(group,))
            writer.start()
            writer.join()
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_prefix_end() -> None:
    assert prefix_end(b"ab") == b"ac"
    assert prefix_end(b"a\xff\xff") == b"b"


def test_results_are_typed_errors(engine: KVEngine) -> None:
    def refused(txn: KVTransaction) -> None:
        raise EntryExists(b"a")

    assert all(isinstance(r, KvfsError) for r in engine.update([refused, refused]))


def test_an_abandoned_group_leaves_nothing_and_the_next_goes_on(engine: KVEngine) -> None:
    engine.update([putting(a=b"1")])
    group = engine.run([putting(a=b"2", b=b"2")])
    engine.abandon(group)
    engine.abandon(group)
    assert everything(engine) == {b"a": b"1"}
    seen = engine.update([lambda txn: txn.get(b"a"), putting(c=b"3")])
    assert seen == [b"1", None]
    assert everything(engine) == {b"a": b"1", b"c": b"3"}


def test_a_group_that_failed_leaves_the_engine_usable(engine: KVEngine) -> None:
    def broken(txn: KVTransaction) -> None:
        raise RuntimeError("a bug")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            engine.run([putting(a=b"1"), broken])
    assert engine.update([putting(b=b"2")]) == [None]
    assert everything(engine) == {b"b": b"2"}


def test_a_group_that_only_reads(engine: KVEngine) -> None:
    engine.update([putting(a=b"1")])
    for _ in range(3):
        assert engine.update([lambda txn: txn.get(b"a")]) == [b"1"]
    assert engine.update([putting(a=b"2")]) == [None]


def test_the_listener_hears_nothing_of_its_own_process(engine: KVEngine) -> None:
    def listener(read: KVRead, writes: Writes | None) -> None:
        heard.append(writes)

    heard: list[Writes | None] = []
    engine.update([putting(a=b"1")])
    engine.listen(listener)
    assert everything(engine) == {b"a": b"1"}
    engine.update([putting(a=b"2")])
    engine.abandon(engine.run([putting(a=b"3")]))
    group = engine.run([putting(a=b"4")])
    assert everything(engine) == {b"a": b"2"}
    engine.commit(group)
    assert everything(engine) == {b"a": b"4"}
    assert heard == []


def test_what_is_absent_is_found_once_it_is_there(engine: KVEngine) -> None:
    """Engines may remember that there was nothing."""
    for round_ in range(3):
        assert engine.view(lambda read: (read.get(b"a"), read.get_many([b"a"]))) == (None, [None])
        engine.update([putting(a=b"%d" % round_)])
        assert engine.view(lambda read: read.get(b"a")) == b"%d" % round_
        engine.update([lambda txn: txn.delete(b"a")])


def test_keys_of_any_bytes(engine: KVEngine) -> None:
    keys = [bytes([first, 0, 255, first]) for first in range(255)] + [b"k" * 511]
    engine.update([lambda txn, key=key: txn.put(key, key[::-1]) for key in keys])
    found = engine.view(lambda read: list(scan_all(read, page=100)))
    assert found == sorted((key, key[::-1]) for key in keys)
    assert engine.view(lambda read: read.get_many(keys)) == [key[::-1] for key in keys]
