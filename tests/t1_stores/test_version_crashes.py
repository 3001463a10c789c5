"""The process is killed, or the power goes, before each disk operation of a change in turn: whoever
opens the target afterwards finds the old version or the new one, whole."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable

import pytest

from kvfs_base.errors import ChunkCorrupt, ChunkMismatch, ChunkNotFound
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from t1_stores.chain_chunks import (
    CHUNK,
    commit,
    cut,
    open_store,
    pending,
    prepare,
    read,
    update,
    whole,
)
from t1_stores.power_disk import PowerDisk

OLD = random.Random(1).randbytes(20_000)
MORE = random.Random(2).randbytes(9_000)
NEIGHBOUR = ChunkId(78, 0, CHUNK.chain)
POWER_LOSSES = 24
"""How many of the ways in which power can be lost are tried at each operation."""


class Killed(BaseException):
    """Nothing of ours runs afterwards."""


@dataclasses.dataclass(frozen=True)
class Case:
    """``setup`` leaves OLD (or nothing, if ``first``) committed; ``make`` prepares what becomes
    ``new`` as version 2 (1)."""

    name: str
    new: bytes
    make: Callable[[ChunkStore], object]
    setup: Callable[[ChunkStore], object] = lambda store: update(store, 0, OLD)
    first: bool = False
    waits: bool = False
    """A version is pending before, and must not be lost."""

    @property
    def old(self) -> bytes | None:
        return None if self.first else OLD


def _cut(store: ChunkStore) -> None:
    with store.versions.lock(CHUNK):
        store.versions.prepare(CHUNK, cut(4_097, 2), [])


def _whole(store: ChunkStore) -> None:
    with store.versions.lock(CHUNK):
        store.versions.prepare_whole(CHUNK, whole(MORE, 2), [MORE[:5_000], MORE[5_000:]])


def _with_pending(offset: int) -> Callable[[ChunkStore], None]:
    def setup(store: ChunkStore) -> None:
        update(store, 0, OLD)
        prepare(store, offset, b"other", 7)

    return setup


def _overwritten(offset: int) -> bytes:
    return OLD[:offset] + MORE + OLD[offset + len(MORE) :]


CASES = [
    Case("first", MORE, lambda s: prepare(s, 0, MORE, 2), lambda s: None, first=True),
    Case("append", OLD + MORE, lambda s: prepare(s, 20_000, MORE, 2)),
    Case("gap", OLD + bytes(5_000) + MORE, lambda s: prepare(s, 25_000, MORE, 2)),
    Case("overwrite", _overwritten(5_000), lambda s: prepare(s, 5_000, MORE, 2)),
    Case("cut", OLD[:4_097], _cut),
    Case("whole", MORE, _whole),
    Case(
        "append for append",
        OLD + MORE,
        lambda s: prepare(s, 20_000, MORE, 2),
        _with_pending(20_000),
        waits=True,
    ),
    Case(
        "append for copy",
        OLD + MORE,
        lambda s: prepare(s, 20_000, MORE, 2),
        _with_pending(3),
        waits=True,
    ),
    Case(
        "copy for append",
        _overwritten(5_000),
        lambda s: prepare(s, 5_000, MORE, 2),
        _with_pending(20_000),
        waits=True,
    ),
]
_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
_durabilities = pytest.mark.parametrize("strict", [False, True], ids=["cache", "strict"])


def prepared_disk(disk: MemoryDisk, case: Case, strict: bool) -> ChunkStore:
    store = open_store(disk, strict=strict)
    # The directories are there: but for the first write, making them is not what is looked at.
    update(store, 0, b"neighbour", chunk=NEIGHBOUR)
    case.setup(store)
    return store


def crash(disk: MemoryDisk, store: ChunkStore, at: int, act: Callable[[], object]) -> bool:
    """Ends the process before the ``at``-th operation; False if there are not so many."""
    seen = 0

    def before(operation: str, path: str) -> None:
        nonlocal seen
        seen += 1
        if seen >= at:
            raise Killed

    disk.before = before
    try:
        act()
    except Killed:
        return True
    finally:
        disk.before = lambda operation, path: None
        store.close()
    return False


def content(store: ChunkStore) -> bytes | None:
    try:
        return read(store)
    except ChunkNotFound:
        return None


def check(disk: MemoryDisk, case: Case, done: list[str], *, strict: bool) -> None:
    """What a server finds when it opens the target."""
    store = open_store(disk, strict=strict)
    found = content(store)
    waiting = pending(store)
    assert read(store, NEIGHBOUR) == b"neighbour"
    assert found in (case.old, case.new)
    if "committed" in done:
        assert found == case.new and waiting is None
    elif found == case.new:
        assert "prepared" in done and waiting is None
    else:
        if waiting is None:
            assert "prepared" not in done and not case.waits
        else:
            assert waiting.version == (1 if case.first else 2)
            assert waiting.sequence in ((0, 2) if "prepared" in done else (0, 2, 7))
            commit(store)
            assert read(store) in (case.new, OLD + b"other", OLD[:3] + b"other" + OLD[8:])
    # And life goes on.
    before = content(store) or b""
    update(store, len(before), b"later", 8)
    update(store, 0, b"L", 9)
    assert read(store) == (b"L" + before[1:] + b"later" if before else b"Later")
    assert drafts(disk) == disk.list("chains/00000005/pending") == []
    store.close()


def change(case: Case, store: ChunkStore, done: list[str]) -> None:
    case.make(store)
    done.append("prepared")
    commit(store)
    done.append("committed")


@_durabilities
@_cases
def test_a_killed_process_leaves_the_old_version_or_the_new_one(case: Case, strict: bool) -> None:
    at = 0
    while True:
        at += 1
        disk = MemoryDisk()
        store = prepared_disk(disk, case, strict)
        done: list[str] = []
        crashed = crash(disk, store, at, lambda s=store, d=done: change(case, s, d))  # type: ignore[misc]
        check(disk, case, done, strict=strict)
        if not crashed:
            break
    assert done == ["prepared", "committed"] and at > 6


@_cases
def test_lost_power_leaves_the_old_version_or_the_new_one(case: Case) -> None:
    """With ``strict``, what was answered before is there: prepared, or committed."""
    at = 0
    while True:
        at += 1
        disk = PowerDisk()
        store = prepared_disk(disk, case, True)
        disk.settle()
        done: list[str] = []
        crashed = crash(disk, store, at, lambda s=store, d=done: change(case, s, d))  # type: ignore[misc]
        for seed in range(POWER_LOSSES):
            check(disk.after_power_loss(random.Random(f"{at} {seed}")), case, done, strict=True)
        if not crashed:
            break
    assert done == ["prepared", "committed"] and at > 8


@_cases
def test_without_strict_lost_power_is_noticed(case: Case) -> None:
    """Never other bytes: the old version, the new one, or one that its checksum gives away."""
    at, outcomes = 0, set()
    while True:
        at += 1
        disk = PowerDisk()
        store = prepared_disk(disk, case, False)
        disk.settle()
        crashed = crash(disk, store, at, lambda s=store: change(case, s, []))  # type: ignore[misc]
        for seed in range(POWER_LOSSES):
            store = open_store(disk.after_power_loss(random.Random(f"{at} {seed}")))
            assert read(store, NEIGHBOUR) == b"neighbour"
            outcomes.add(_look(store, case))
            store.close()
        if not crashed:
            break
    assert {"old", "new"} <= outcomes


def _look(store: ChunkStore, case: Case) -> str:
    try:
        store.recheck(CHUNK)
        found = content(store)
    except ChunkNotFound:
        found = None
    except (ChunkMismatch, ChunkCorrupt):
        return "noticed"
    assert found in (case.old, case.new)
    try:
        waiting = pending(store)
    except ChunkCorrupt:
        return "noticed"
    if waiting is not None:
        commit(store)
        assert read(store) in (case.new, OLD + b"other", OLD[:3] + b"other" + OLD[8:])
    return "new" if found == case.new else "old"


@_durabilities
@pytest.mark.parametrize("offset", [20_000, 3], ids=["append", "copy"])
def test_dropping_is_done_or_not(offset: int, strict: bool) -> None:
    for power in (False, True) if strict else (False,):
        at, crashed = 0, True
        while crashed:
            at += 1
            disk = PowerDisk()
            store = open_store(disk, strict=strict)
            update(store, 0, OLD)
            made = prepare(store, offset, b"dropped", 2)
            disk.settle()

            def drop(store: ChunkStore = store) -> None:
                with store.versions.lock(CHUNK):
                    store.versions.drop(CHUNK)

            crashed = crash(disk, store, at, drop)
            for seed in range(POWER_LOSSES if power else 1):
                found = disk.after_power_loss(random.Random(seed)) if power else disk
                store = open_store(found)
                waiting = pending(store)
                assert waiting in ((None, made) if crashed else (None,))
                assert read(store) == OLD
                store.close()


@_durabilities
def test_a_repair_leaves_damaged_bytes_or_whole_ones(strict: bool) -> None:
    at, crashed = 0, True
    while crashed:
        at += 1
        disk = PowerDisk()
        store = open_store(disk, strict=strict)
        info = update(store, 0, OLD)
        file = store.versions.open(CHUNK)[0]
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)
        os.pwrite(fd, b"rot", 7_000)
        os.close(fd)
        file.close()
        disk.settle()

        def repair(store: ChunkStore = store, info: object = info) -> None:
            with store.versions.lock(CHUNK):
                store.versions.replace(CHUNK, info, [OLD])  # type: ignore[arg-type]

        crashed = crash(disk, store, at, repair)
        found = disk.after_power_loss(random.Random(at)) if strict else disk
        store = open_store(found)
        try:
            assert store.recheck(CHUNK) == info
            assert read(store) == OLD
        except ChunkCorrupt:
            assert crashed
        store.close()


def test_the_first_chunk_of_a_chain_outlives_power_as_well() -> None:
    """The directories that lead to it are synced, too."""
    chunk = ChunkId(77, 3, 6)
    at, crashed = 0, True
    while crashed:
        at += 1
        disk = PowerDisk()
        store = open_store(disk, strict=True)
        disk.settle()
        done: list[str] = []

        def act(store: ChunkStore = store, done: list[str] = done) -> None:
            prepare(store, 0, MORE, 1, chunk)
            done.append("prepared")
            commit(store, chunk)
            done.append("committed")

        crashed = crash(disk, store, at, act)
        for seed in range(POWER_LOSSES):
            store = open_store(disk.after_power_loss(random.Random(f"{at} {seed}")))
            waiting = pending(store, chunk)
            if "prepared" in done and waiting is not None:
                assert commit(store, chunk).length == len(MORE)
            if "prepared" in done:
                assert read(store, chunk) == MORE
            assert not ("committed" in done and waiting)
            store.close()
    assert done == ["prepared", "committed"]
