"""Every engine against the memory engine under random groups, failures and reopenings."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfs_base.errors import Conflict
from kvfs_base.os_env import os_env
from kvfs_metadata.engines.engine import KVEngine, KVRead, KVTransaction, Writes
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.engines.postgres_engine import PostgresEngine
from postgres_server import PostgresServer

KEYS = st.binary(min_size=1, max_size=3).map(lambda b: b[:1].replace(b"\xff", b"a") + b[1:])
VALUES = st.one_of(st.binary(max_size=8), st.binary(min_size=1, max_size=1).map(lambda b: b * 9000))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, VALUES),
        st.tuples(st.just("delete"), KEYS, st.just(b"")),
        st.tuples(st.just("range"), KEYS, KEYS),
        st.tuples(st.just("back"), KEYS, KEYS),
        st.tuples(st.just("get"), KEYS, st.just(b"")),
        st.tuples(st.just("fail"), st.just(b""), st.just(b"")),
    ),
    max_size=8,
)


class Steps:
    """One function of a group; raises at "fail"."""

    def __init__(self, steps: list[tuple[str, bytes, bytes]]) -> None:
        self.steps = steps

    def __call__(self, txn: KVTransaction) -> list[object]:
        seen: list[object] = []
        for kind, key, value in self.steps:
            if kind == "put":
                txn.put(key, value)
            elif kind == "delete":
                txn.delete(key)
            elif kind == "get":
                seen.append(txn.get(key))
            elif kind == "fail":
                raise Conflict(detail="asked for")
            else:
                seen.append(txn.range(key, value, 5, reverse=kind == "back"))
        return seen


class Engines(RuleBasedStateMachine):
    """``open`` gives the engine that is compared; it may be called again after a close."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryEngine()
        self.engine = self.open()

    def open(self) -> KVEngine:
        raise NotImplementedError

    @rule(group=st.lists(STEPS, max_size=6))
    def update(self, group: list[list[tuple[str, bytes, bytes]]]) -> None:
        fns = [Steps(steps) for steps in group]
        expected, found = self.memory.update(fns), self.engine.update(fns)
        assert list(map(comparable, expected)) == list(map(comparable, found))

    @rule(group=st.lists(STEPS, max_size=6))
    def abandon(self, group: list[list[tuple[str, bytes, bytes]]]) -> None:
        fns = [Steps(steps) for steps in group]
        expected, found = self.memory.run(fns), self.engine.run(fns)
        assert list(map(comparable, expected.results)) == list(map(comparable, found.results))
        self.engine.abandon(found)

    @rule(start=KEYS, end=KEYS, limit=st.integers(0, 6), reverse=st.booleans())
    def compare_range(self, start: bytes, end: bytes, limit: int, reverse: bool) -> None:
        expected, found = (
            engine.view(lambda read: read.range(start, end, limit, reverse))
            for engine in (self.memory, self.engine)
        )
        assert expected == found

    @rule(keys=st.lists(KEYS, max_size=5))
    def compare_keys(self, keys: list[bytes]) -> None:
        expected, found = (
            engine.view(lambda read: (read.get_many(keys), [read.get(key) for key in keys]))
            for engine in (self.memory, self.engine)
        )
        assert expected == found

    @rule()
    def reopen(self) -> None:
        self.engine.close()
        self.engine = self.open()

    @rule()
    def sync(self) -> None:
        self.engine.sync()

    @invariant()
    def same_state(self) -> None:
        expected, found = (
            engine.view(lambda read: read.range(b"", b"\xff\xff", 1000))
            for engine in (self.memory, self.engine)
        )
        assert expected == found

    def teardown(self) -> None:
        self.engine.close()


class LmdbEngines(Engines):
    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="kvfs-engine-")
        super().__init__()

    def open(self) -> KVEngine:
        # Small enough to be grown by what the rules write.
        return LmdbEngine(os_env(), self.directory, map_bytes=128 * 1024)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.directory)


class PostgresEngines(Engines):
    """And a second server of the same store, which writes too; what each hears of the other must
    add up to the state."""

    server: PostgresServer

    def __init__(self) -> None:
        self.resources = contextlib.ExitStack()
        self.url = self.resources.enter_context(self.server.fresh_database())
        self.heard: dict[bytes, bytes] = {}
        super().__init__()
        # Small bounds, so that values are dropped from the cache and commits from the log.
        self.other = PostgresEngine(os_env(), self.url, cache_bytes=4000, log_versions_max=6)
        self.heard = self.load(self.other)
        self.other.listen(self.listener)
        assert self.load(self.other) == self.heard

    def open(self) -> KVEngine:
        return PostgresEngine(os_env(), self.url, cache_bytes=4000, log_versions_max=6)

    def load(self, engine: KVEngine) -> dict[bytes, bytes]:
        return dict(engine.view(lambda read: read.range(b"", b"\xff\xff", 1000)))

    def listener(self, read: KVRead, writes: Writes | None) -> None:
        if writes is None:
            self.heard = dict(read.range(b"", b"\xff\xff", 1000))
            return
        for key, value in writes.items():
            self.heard.pop(key, None)
            if value is not None:
                self.heard[key] = value

    @rule(group=st.lists(STEPS, max_size=6))
    def update_elsewhere(self, group: list[list[tuple[str, bytes, bytes]]]) -> None:
        fns = [Steps(steps) for steps in group]
        expected, decided = self.memory.update(fns), self.other.run(fns)
        assert list(map(comparable, expected)) == list(map(comparable, decided.results))
        self.other.commit(decided)
        self.listener(self.memory._store.state, decided.writes)

    @rule(keys=st.lists(KEYS, max_size=5))
    def look_elsewhere(self, keys: list[bytes]) -> None:
        state = self.load(self.other)
        assert self.heard == state == self.load(self.memory)
        found = self.other.view(lambda read: [read.get(key) for key in keys])
        assert found == [state.get(key) for key in keys]

    def teardown(self) -> None:
        super().teardown()
        self.other.close()
        self.resources.close()


def comparable(result: object) -> object:
    return type(result) if isinstance(result, Exception) else result


@pytest.fixture(autouse=True, scope="module")
def server(postgres_server: PostgresServer) -> Iterator[None]:
    PostgresEngines.server = postgres_server
    yield
    del PostgresEngines.server


TestLmdb = LmdbEngines.TestCase
TestLmdb.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestPostgres = PostgresEngines.TestCase
TestPostgres.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
