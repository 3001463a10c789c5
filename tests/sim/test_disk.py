"""What the simulated disk forgets when the power goes, and what it must not."""

from __future__ import annotations

import random

import pytest

from kvfs_base.errors import DiskFull, TargetFailed
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.seams import DiskFile
from sim.disk import DiskKnobs, SimDisk

SEEDS = range(60)


def make(disk: SimDisk, path: str, data: bytes = b"") -> DiskFile:
    file = disk.open(path, write=True, create=True)
    if data:
        file.pwritev([data], 0)
    return file


def contents(disk: SimDisk, path: str) -> bytes:
    node = disk.entries[path]
    assert node is not None
    return bytes(node.data)


def test_what_was_synced_survives() -> None:
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        disk.make_directory("a/b")
        disk.sync_directory("")
        disk.sync_directory("a")
        file = make(disk, "a/b/f", b"x" * 10_000)
        file.set_attribute("kvfs", b"1")
        file.sync(attributes=True)
        disk.sync_directory("a/b")
        disk.lose_power()
        assert contents(disk, "a/b/f") == b"x" * 10_000
        assert disk.open("a/b/f").get_attribute("kvfs") == b"1"


def test_what_was_not_synced_is_kept_lost_or_torn() -> None:
    seen = set()
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        file = make(disk, "f", b"o" * PAGE_BYTES)
        file.sync()
        disk.sync_directory("")
        file.pwritev([b"n" * PAGE_BYTES], 0)
        disk.lose_power()
        found = contents(disk, "f")
        assert set(found) <= set(b"on") and len(found) == PAGE_BYTES
        assert found.rstrip(b"o").count(b"o") == 0  # torn between two sectors, new bytes first
        seen.add("torn" if len(set(found)) == 2 else chr(found[0]))
    assert seen == {"o", "n", "torn"}


def test_a_name_needs_its_directory_synced() -> None:
    found = set()
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        file = make(disk, "f", b"bytes")
        file.sync(attributes=True)
        disk.lose_power()
        found.add(disk.exists("f"))
    assert found == {True, False}


def test_a_rename_is_one_step_and_changes_keep_their_order() -> None:
    found = set()
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        for directory in ("s", "d"):
            disk.make_directory(directory)
        make(disk, "d/f", b"old").sync()
        make(disk, "s/f", b"new").sync()
        for directory in ("", "s", "d"):
            disk.sync_directory(directory)
        disk.rename("s/f", "d/f")
        disk.unlink("d/f")
        disk.lose_power()
        names = (disk.exists("s/f"), contents(disk, "d/f") if disk.exists("d/f") else None)
        assert names in {(True, b"old"), (False, b"new"), (False, None)}
        found.add(names)
    assert len(found) == 3


def test_a_directory_that_is_lost_takes_its_files_along() -> None:
    lost = 0
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        disk.make_directory("d")
        make(disk, "d/f", b"bytes").sync()
        disk.sync_directory("d")
        disk.lose_power()
        assert disk.exists("d/f") <= disk.exists("d")
        lost += not disk.exists("d")
    assert lost


def test_attributes_need_more_than_fdatasync() -> None:
    found = set()
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        file = make(disk, "f")
        disk.sync_directory("")
        file.set_attribute("kvfs", b"1")
        file.sync()
        disk.lose_power()
        found.add(disk.open("f").get_attribute("kvfs"))
    assert found == {None, b"1"}


def test_a_process_that_dies_loses_its_locks_and_nothing_else() -> None:
    disk = SimDisk()
    file = make(disk, "f", b"bytes")
    assert file.lock()
    disk.process_died()
    assert contents(disk, "f") == b"bytes"
    again = disk.open("f", write=True)
    assert again.lock()
    assert again.has_writer()
    disk.process_died()
    assert not disk.open("f").has_writer()


def test_a_failure_is_final() -> None:
    disk = SimDisk(random.Random(1), DiskKnobs(failure_chance=1.0))
    for _ in range(2):
        with pytest.raises(TargetFailed):
            disk.open("f", create=True, write=True)
        disk.knobs.failure_chance = 0.0


def test_a_full_disk_says_so() -> None:
    disk = SimDisk(capacity_bytes=10_000)
    file = make(disk, "f", bytes(9_000))
    with pytest.raises(DiskFull):
        file.pwritev([bytes(2_000)], 9_000)
    disk.reserved_bytes = 9_000
    with pytest.raises(DiskFull):
        make(disk, "g", b"1" * 500)
    file.pwritev([b"again"], 0)  # what has its place stays writable


def test_bits_rot_below_every_sync() -> None:
    disk = SimDisk(random.Random(3))
    make(disk, "f", b"x" * 5000).sync()
    disk.sync_directory("")
    assert disk.rot(lambda node: True)
    disk.lose_power()
    assert sum(a != ord("x") for a in contents(disk, "f")) == 1
    assert not disk.rot(lambda node: False)


def test_lying_writes() -> None:
    disk = SimDisk(random.Random(3), DiskKnobs(lost_write_chance=1.0))
    disk.make_directory("d")
    make(disk, "d/f", b"x" * 100)
    assert contents(disk, "d/f") == bytes(100)
    make(disk, "f", b"x" * 100)
    assert contents(disk, "f") == b"x" * 100
    disk.knobs = DiskKnobs()
    make(disk, "d/g", b"y" * PAGE_BYTES)
    disk.knobs = DiskKnobs(misdirected_chance=1.0)
    make(disk, "d/h", b"z" * PAGE_BYTES)
    assert contents(disk, "d/g") == contents(disk, "d/h") == b"z" * PAGE_BYTES
