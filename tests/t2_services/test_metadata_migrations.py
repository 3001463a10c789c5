"""Stores of older versions are brought to this one's format; of newer ones they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfs_base.errors import InodeStale, VersionMismatch
from kvfs_base.os_env import os_env
from kvfs_metadata import messages as m
from kvfs_metadata import migrations, records
from kvfs_metadata.engine import Group, KVEngine, KVTransaction, scan_all
from kvfs_metadata.lmdb_engine import LmdbEngine
from kvfs_metadata.memory_engine import MemoryEngine
from kvfs_metadata.migrations import convert_all, migrate
from kvfs_metadata.stores import update
from t2_services.metadata_rig import ROOT, Rig, keys

FORMAT_1 = Path(__file__).with_name("metadata_format_1.json")
"""What version 1 wrote, taken down when it was current: directories, a file with two names and an
attribute, a symbolic link, an unlinked open file, a namespace with two blocks of three, a prepared
batch."""


def raw_format_1() -> dict[bytes, bytes]:
    return {
        bytes.fromhex(key): bytes.fromhex(value)
        for key, value in json.loads(FORMAT_1.read_text()).items()
    }


def fill(engine: KVEngine, items: dict[bytes, bytes]) -> None:
    def fn(txn: KVTransaction) -> None:
        for key, value in items.items():
            txn.put(key, value)

    update(engine, fn)


def content(engine: KVEngine) -> dict[bytes, bytes]:
    return engine.view(lambda read: dict(scan_all(read)))


def test_a_store_of_version_1_is_opened_with_everything_in_it() -> None:
    raw = raw_format_1()
    assert raw[records.FORMAT_KEY] == b"kvfs-metadata 1"
    rig = Rig()
    old = MemoryEngine()
    fill(old, raw)
    rig.engine = old
    rig.restart()
    assert content(old)[records.FORMAT_KEY] == records.FORMAT
    queued = [value for key, value in raw.items() if key.startswith(records.REMOVAL)]
    assert rig.statistics()["removals_pending"] == len(queued) > 0
    rig.advance(0)
    models, weights = rig.resolve(b"/models"), rig.resolve(b"/models/weights")
    assert rig.names(ROOT) == [b"kv", b"latest", b"models", b"second"]
    assert models.nlink == 2
    assert (weights.size, weights.uid, weights.gid, weights.nlink) == (70_000_000, 1000, 100, 2)
    assert rig.resolve(b"/second").inode == weights.inode
    assert rig.call(m.GetXattr(weights.inode, b"user.origin")) == b"somewhere"
    link = rig.resolve(b"/latest").inode
    assert rig.call(m.ReadLink(link)) == b"models/weights"
    namespace = rig.namespace()
    assert rig.stored(namespace, [1, 2, 3]) == [1, 3]
    # The prepared batch can still be committed; numbers go on where they were.
    rig.call(m.CommitBlocks(2, (0, 1)))
    assert rig.stored(namespace, [7, 8]) == [7, 8]
    assert rig.call(m.MatchBlocks(namespace, keys([1, 2]))) == 1
    known = {records.number_at(key) for key in raw if key.startswith(records.INODE)}
    assert rig.make(ROOT, b"new").inode not in known
    assert rig.removals() != []
    # The unlinked file goes with the session that had it open.
    (orphan,) = [records.number_at(key) for key in raw if key.startswith(records.ORPHAN)]
    rig.work(60)
    with pytest.raises(InodeStale):
        rig.attr(orphan)


def test_an_empty_store_stays_empty() -> None:
    engine = MemoryEngine()
    migrate(engine)
    assert content(engine) == {}


@pytest.mark.parametrize(
    "text",
    [b"kvfs-metadata 3", b"kvfs-metadata 0", b"kvfs-metadata ", b"else 1", b"kvfs-metadata 1x"],
)
def test_what_this_version_does_not_know_is_refused_and_left_alone(text: bytes) -> None:
    engine = MemoryEngine()
    fill(engine, raw_format_1() | {records.FORMAT_KEY: text})
    before = content(engine)
    with pytest.raises(VersionMismatch) as caught:
        migrate(engine, newest=2)
    assert caught.value.found == text.decode()
    assert content(engine) == before


# --- steps


def mark_inodes(txn: KVTransaction, key: bytes, value: bytes) -> None:
    if not value.startswith(b"two:"):
        txn.put(key, b"two:" + value)


def move_entries(txn: KVTransaction, key: bytes, value: bytes) -> None:
    txn.put(b"NAME" + key[4:], value)
    txn.delete(key)


STEPS: dict[int, Callable[[KVEngine], None]] = {
    1: lambda engine: convert_all(engine, 1, records.INODE, mark_inodes),
    2: lambda engine: convert_all(engine, 2, records.ENTRY, move_entries),
}


def old_store() -> dict[bytes, bytes]:
    items = {records.inode_key(number): b"%d" % number for number in range(2500)}
    items |= {records.entry_key(1, b"name %d" % number): b"%d" % number for number in range(1500)}
    return items | {records.FORMAT_KEY: b"kvfs-metadata 1", b"XATR1": b"untouched"}


def converted() -> dict[bytes, bytes]:
    items = {records.inode_key(number): b"two:%d" % number for number in range(2500)}
    items |= {
        b"NAME" + records.entry_key(1, b"name %d" % number)[4:]: b"%d" % number
        for number in range(1500)
    }
    return items | {records.FORMAT_KEY: b"kvfs-metadata 3", b"XATR1": b"untouched"}


def test_steps_run_one_after_the_other() -> None:
    engine = MemoryEngine()
    fill(engine, old_store())
    sizes: list[int] = []
    engine.before_commit = lambda writes: sizes.append(len(writes))
    migrate(engine, steps=STEPS, newest=3)
    assert content(engine) == converted()
    assert max(sizes) <= 2 * migrations.BATCH_ITEMS
    migrate(engine, steps=STEPS, newest=3)
    assert content(engine) == converted()


class Killed(BaseException):
    pass


def test_a_migration_may_be_cut_short_anywhere() -> None:
    """Killed at each of its commits in turn, and at the next ones of what comes after."""
    for kills_after in range(1, 12):
        engine = MemoryEngine()
        fill(engine, old_store())
        kills = 0
        while True:
            left = [kills_after + kills]

            def before_commit(writes: dict[bytes, bytes | None], left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed

            engine.before_commit = before_commit
            try:
                migrate(engine, steps=STEPS, newest=3)
            except Killed:
                kills += 1
                found = content(engine)[records.FORMAT_KEY]
                assert found in (b"kvfs-metadata 1", b"kvfs-metadata 2", b"kvfs-metadata 3")
                continue
            break
        assert content(engine) == converted()
        if kills == 0:
            break
    assert kills == 0, "the loop reached the end"


def test_a_version_is_written_only_once_its_step_is_durable(tmp_path: Path) -> None:
    class Recording(LmdbEngine):
        def sync(self) -> None:
            super().sync()
            events.append("sync")

        def commit(self, group: Group[object]) -> None:
            super().commit(group)
            events.append("format" if records.FORMAT_KEY in group.writes else "items")

    events: list[str] = []
    engine = Recording(os_env(), str(tmp_path))
    fill(engine, old_store())
    events.clear()
    migrate(engine, steps=STEPS, newest=3)
    for place, event in enumerate(events):
        if event == "format":
            assert events[place - 1] == events[place + 1] == "sync"
    assert events.count("format") == 2
    engine.close()
    again = LmdbEngine(os_env(), str(tmp_path))
    assert content(again) == converted()
    again.close()


def test_a_server_that_is_late_converts_nothing_again() -> None:
    """Another server went on to format 3 while this one was about to run step 1."""
    engine = MemoryEngine()
    fill(engine, old_store())

    def overtaken(engine: KVEngine) -> None:
        migrate(engine, steps=STEPS, newest=3)
        STEPS[1](engine)

    steps = {1: overtaken, 2: STEPS[2]}
    update(engine, lambda txn: txn.put(records.inode_key(9999), b"9999"))
    migrate(engine, steps=steps, newest=3)
    found = content(engine)
    assert found.pop(records.inode_key(9999)) == b"two:9999"
    assert found == converted()


def test_every_older_format_has_a_step() -> None:
    assert set(migrations.STEPS) == set(range(1, records.FORMAT_VERSION))
