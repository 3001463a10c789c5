"""Stores of older versions are brought to this one's format; of newer ones they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfs_base.cluster import GetClusterMap
from kvfs_base.errors import InodeStale, VersionMismatch
from kvfs_base.os_env import os_env
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.engines import migrations
from kvfs_metadata.engines.engine import Group, KVEngine, KVTransaction, scan_all
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
from kvfs_metadata.engines.memory_engine import MemoryEngine, MemoryStore
from kvfs_metadata.engines.migrations import convert_all, migrate
from kvfs_metadata.engines.stores import update
from t2_services.metadata_rig import ROOT, Rig, keys

FORMAT_1 = Path(__file__).with_name("metadata_format_1.json")
"""What version 1 wrote, taken down when it was current: directories, a file with two names and an
attribute, a symbolic link, an unlinked open file, a namespace with two blocks of three, a prepared
batch."""


FORMAT_2 = Path(__file__).with_name("metadata_format_2.json")
"""What version 2 wrote on a shared store: three targets, one of them draining, with heartbeats and
a queue each, a file, a namespace with three blocks of four, a prepared batch."""


FORMAT_3 = Path(__file__).with_name("metadata_format_3.json")
"""What version 3 wrote: a directory with a number of copies, a file with two names, a symbolic
link, a namespace with two blocks of three, a prepared batch."""


def raw(path: Path) -> dict[bytes, bytes]:
    return {
        bytes.fromhex(key): bytes.fromhex(value)
        for key, value in json.loads(path.read_text()).items()
    }


def raw_format_1() -> dict[bytes, bytes]:
    return raw(FORMAT_1)


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


def test_a_store_of_version_2_is_opened_with_everything_in_it() -> None:
    old = raw(FORMAT_2)
    assert old[records.FORMAT_KEY] == b"kvfs-metadata 2"
    engine = MemoryEngine(MemoryStore())
    fill(engine, old)
    rig = Rig(engine=engine, server=b"B" * 16, targets=0, grace_over=False)
    now = content(engine)
    assert now[records.FORMAT_KEY] == records.FORMAT
    queued = [key for key in old if key.startswith(records.REMOVAL)]
    assert queued
    for key in queued:
        before, after = old[key], records.unpack_removal(now[key])
        assert (after.inode, after.size) == (
            int.from_bytes(before[:8], "little"),
            int.from_bytes(before[16:], "little"),
        )
        assert after.chain == 0
    beats = [key for key in old if key.startswith(records.BEAT)]
    assert len(beats) == 3
    for key in beats:
        assert records.unpack_beat(now[key]) == records.BeatValue(10**12, True, 0)
    found = rig.call(GetClusterMap())
    assert [c.targets for c in found.chains] == [(1,), (2,), (3,)]
    assert {(c.version, c.copies, c.syncing, c.offline) for c in found.chains} == {(1, 1, (), ())}
    assert [t.state for t in found.targets] == ["serving", "serving", "draining"]
    assert found.version > 1 << 32, "as many starts as there were, and this one"
    assert [r.chain for r in rig.heartbeat("target-2").targets[0].removals] != []
    namespace = rig.namespace()
    assert rig.stored(namespace, [1, 2, 3, 4]) == [1, 3, 4]
    (batch,) = [records.number_at(k) for k in old if k.startswith(records.PREPARED)]
    rig.call(m.CommitBlocks(batch, (0, 1)))
    assert rig.stored(namespace, [7, 8]) == [7, 8]
    assert rig.attr(rig.resolve(b"/models/weights").inode).size == 70_000_000
    migrate(engine)  # nothing is left to do
    assert rig.call(m.GetXattr(ROOT, b"user.kvfs.copies")) == b"1"


def test_a_store_of_version_3_is_opened_with_everything_in_it() -> None:
    old = raw(FORMAT_3)
    assert old[records.FORMAT_KEY] == b"kvfs-metadata 3"
    engine = MemoryEngine()
    fill(engine, old)
    rig = Rig(engine=engine, targets=3)
    assert content(engine)[records.FORMAT_KEY] == records.FORMAT
    models, weights = rig.resolve(b"/models").inode, rig.resolve(b"/models/weights")
    assert (weights.size, weights.nlink, weights.quota, weights.born_ns) == (70_000_000, 2, 0, 0)
    assert rig.call(m.GetXattr(models, b"user.kvfs.copies")) == b"1"
    namespace = rig.namespace()
    assert rig.stored(namespace, [1, 2, 3]) == [1, 3]
    assert rig.call(m.GetQuota(models)) is None
    rig.call(m.SetQuota(namespace, bytes_max=10_000))
    assert rig.call(m.GetQuota(namespace)).bytes_used == 4000  # two blocks, and two on their way
    rig.call(m.Unlink(ROOT, b"second"))
    assert rig.call(m.SetQuota(models, bytes_max=1)).bytes_used == 70_000_000
    rig.restart()
    assert rig.call(m.GetQuota(weights.inode)).directory == models
    assert rig.call(m.GetQuota(namespace)).bytes_used == 4000


def test_a_removal_and_a_heartbeat_are_converted_once() -> None:
    engine = MemoryEngine()
    fill(engine, raw(FORMAT_2))
    migrations.STEPS[2](engine)
    once = content(engine)
    migrations.STEPS[2](engine)
    assert content(engine) == once != raw(FORMAT_2)


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
