"""LMDB against the memory engine under random groups, failures and reopenings."""

from __future__ import annotations

import shutil
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfs_base.errors import Conflict
from kvfs_base.os_env import os_env
from kvfs_metadata.engine import KVTransaction
from kvfs_metadata.lmdb_engine import LmdbEngine
from kvfs_metadata.memory_engine import MemoryEngine

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
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="kvfs-engine-")
        self.memory = MemoryEngine()
        self.lmdb = self.open()

    def open(self) -> LmdbEngine:
        # Small enough to be grown by what the rules write.
        return LmdbEngine(os_env(), self.directory, map_bytes=128 * 1024)

    @rule(group=st.lists(STEPS, max_size=6))
    def update(self, group: list[list[tuple[str, bytes, bytes]]]) -> None:
        fns = [Steps(steps) for steps in group]
        expected, found = self.memory.update(fns), self.lmdb.update(fns)
        assert list(map(comparable, expected)) == list(map(comparable, found))

    @rule(start=KEYS, end=KEYS, limit=st.integers(0, 6), reverse=st.booleans())
    def compare_range(self, start: bytes, end: bytes, limit: int, reverse: bool) -> None:
        expected, found = (
            engine.view(lambda read: read.range(start, end, limit, reverse))
            for engine in (self.memory, self.lmdb)
        )
        assert expected == found

    @rule()
    def reopen(self) -> None:
        self.lmdb.close()
        self.lmdb = self.open()

    @rule()
    def sync(self) -> None:
        self.lmdb.sync()

    @invariant()
    def same_state(self) -> None:
        expected, found = (
            engine.view(lambda read: read.range(b"", b"\xff\xff", 1000))
            for engine in (self.memory, self.lmdb)
        )
        assert expected == found

    def teardown(self) -> None:
        self.lmdb.close()
        shutil.rmtree(self.directory)


def comparable(result: object) -> object:
    return type(result) if isinstance(result, Exception) else result


TestEngines = Engines.TestCase
TestEngines.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
