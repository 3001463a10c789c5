"""The scrubber, step by step on a clock that stands still, and once as a thread."""

from __future__ import annotations

import json
import mmap
import os
import time
import uuid
from pathlib import Path

import pytest

from kvfs_base.counters import Counters
from kvfs_base.errors import Conflict, DiskFull, KvfsError, TargetFailed
from kvfs_base.limits import MIB
from kvfs_base.os_disk import OsDisk
from kvfs_base.os_env import os_env
from kvfs_base.seams import Disk, DiskFile, Env
from kvfs_base.testing import ManualClock, MemoryDisk, memory_env
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import BufferPool, round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo, ChunkState, path_of
from kvfs_datapath.limits import (
    SCRUB_CHUNK_BYTES,
    SCRUB_SAVE_SECONDS,
    SCRUB_START_SECONDS,
)
from kvfs_datapath.server import scrub
from kvfs_datapath.server.scrub import Repair, Scrubber
from t1_stores.chain_chunks import Faults, update

RATE = MIB
DAY = 86_400.0


def make_store(disk: Disk, number: int = 1) -> ChunkStore:
    name = str(uuid.UUID(int=number, version=4))
    store = ChunkStore(disk, name, buffers=BufferPool(2, 64 * 1024))
    store.set_target_id(number)
    return store


def put(store: ChunkStore, chunk: ChunkId, data: bytes) -> None:
    pages = memoryview(mmap.mmap(-1, max(4096, round_up(len(data)))))
    pages[: len(data)] = data
    staged = store.stage()
    store.fill(staged, pages, 0)
    key = bytes(range(32))
    store.publish(staged, ChunkInfo(*chunk, ChunkState.SEALED, len(data), crc32c(data), key))


def rot(disk: Disk, chunk: ChunkId) -> None:
    file = disk.open(path_of(chunk), write=True)
    os.pwrite(file.fileno(), b"rot", 100)
    file.close()


def new_counters() -> Counters:
    return Counters(
        "scrubbed_bytes",
        "scrubbed_chunks",
        "scrub_bad_chunks",
        "scrub_repaired_chunks",
        "scrub_rounds",
    )


class World:
    """Some targets and a scrubber."""

    def __init__(self, count: int = 1, **settings: object) -> None:
        self.env: Env
        self.clock: ManualClock
        self.env, self.clock = memory_env()
        self.disks = [MemoryDisk() for _ in range(count)]
        self.stores = [make_store(disk, n) for n, disk in enumerate(self.disks, 1)]
        self.settings: dict[str, object] = {"bytes_per_second": RATE, "days": 10.0} | settings
        self.scrubber = self.start()

    def start(self, repair: Repair | None = None) -> Scrubber:
        self.counters = new_counters()
        self.scrubber = Scrubber(
            self.env,
            self.stores,
            self.counters,
            repair=repair,
            **self.settings,  # type: ignore[arg-type]
        )
        return self.scrubber

    def restart(self, repair: Repair | None = None) -> None:
        """As the server is."""
        for store in self.stores:
            store.close()
        self.stores = [make_store(disk, n) for n, disk in enumerate(self.disks, 1)]
        self.start(repair)

    def figure(self, name: str) -> int:
        return self.counters.snapshot()[name]

    def run(self, *, rounds: int = 1, steps: int = 10**6) -> float:
        """Until so many rounds are over; answers how many seconds that took."""
        before = self.clock.monotonic()
        for _ in range(steps):
            pause = self.scrubber.step()
            if self.figure("scrub_rounds") >= rounds:
                break
            self.clock.advance(pause + 1e-6)
        return self.clock.monotonic() - before

    def close(self) -> None:
        self.scrubber.stop()
        for store in self.stores:
            store.close()


def fill(store: ChunkStore) -> int:
    """Blocks, file chunks of one copy and of chains; answers their bytes."""
    for inode in range(1, 9):
        put(store, ChunkId(inode, 0), os.urandom(200_000))
        put(store, ChunkId(inode, 0, 4), os.urandom(100_000))
        update(store, 0, os.urandom(100_000), chunk=ChunkId(100 + inode, 0, 5))
        store.patch(ChunkId(200 + inode, 0), 0, [os.urandom(100_000)])
        store.seal(ChunkId(200 + inode, 0))
    return 8 * 500_000


def test_everything_is_read_at_a_bounded_rate() -> None:
    world = World()
    total = fill(world.stores[0])
    world.stores[0].patch(ChunkId(300, 0), 0, [bytes(50_000)])  # open: it has no checksum
    took = world.run()
    assert world.figure("scrubbed_bytes") == total
    assert world.figure("scrubbed_chunks") == 32
    assert world.figure("scrub_bad_chunks") == 0
    assert took - SCRUB_START_SECONDS == pytest.approx((total + SCRUB_CHUNK_BYTES) / RATE, rel=0.01)
    world.close()


def test_no_second_sees_more_than_the_rate() -> None:
    world = World()
    fill(world.stores[0])
    world.clock.advance(SCRUB_START_SECONDS)
    started = world.clock.monotonic()
    while not world.figure("scrub_rounds"):
        pause = world.scrubber.step()
        elapsed = world.clock.monotonic() - started
        assert world.figure("scrubbed_bytes") <= elapsed * RATE + 64 * 1024
        world.clock.advance(pause + 1e-6)
    world.close()


def test_what_was_missed_is_not_made_up_for() -> None:
    world = World()
    fill(world.stores[0])
    world.clock.advance(SCRUB_START_SECONDS)
    world.run(steps=5)
    read = world.figure("scrubbed_bytes")
    world.clock.advance(3_600)  # the disk was busy, or the machine asleep
    world.scrubber.step()
    assert world.scrubber.step() > 0
    assert world.figure("scrubbed_bytes") - read <= 2 * 64 * 1024
    world.close()


def test_small_chunks_cost_an_access() -> None:
    world = World()
    for inode in range(1, 101):
        put(world.stores[0], ChunkId(inode, 0), b"small")
    took = world.run() - SCRUB_START_SECONDS
    assert took == pytest.approx(100 * SCRUB_CHUNK_BYTES / RATE, rel=0.01)
    world.close()


def test_targets_take_turns_each_at_the_full_rate() -> None:
    world = World(count=3)
    totals = [fill(store) for store in world.stores]
    took = world.run(rounds=3) - SCRUB_START_SECONDS
    assert world.figure("scrubbed_bytes") == sum(totals)
    assert took == pytest.approx(totals[0] / RATE, rel=0.05)
    world.close()


def test_rate_zero_switches_it_off() -> None:
    world = World(bytes_per_second=0)
    rot_of = ChunkId(1, 0)
    put(world.stores[0], rot_of, bytes(1000))
    world.scrubber.start()
    world.clock.advance(10**6)
    assert world.scrubber.step() > 60
    world.scrubber.stop()
    assert set(world.counters.snapshot().values()) == {0}
    assert not world.disks[0].exists("scrub.json")
    world.close()


# --- what it finds


@pytest.mark.logs_warnings
def test_a_bad_single_copy_is_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    world = World(days=0.0)
    fill(world.stores[0])
    rot(world.disks[0], ChunkId(3, 0))
    file = world.disks[0].open(path_of(ChunkId(4, 0)), write=True)
    file.truncate(17)
    file.close()
    world.run(rounds=3)
    assert world.figure("scrub_bad_chunks") == 6
    assert caplog.text.count("bad chunk on target 1") == 2
    assert "ChunkCorrupt(inode=3" in caplog.text and "ChunkMismatch(inode=4" in caplog.text
    assert world.stores[0].healthy
    world.close()


@pytest.mark.parametrize("outcome", ["repaired", "error"])
def test_bad_copies_of_chains_are_handed_on(outcome: str) -> None:
    asked: list[tuple[int, ChunkId]] = []

    def repair(store: ChunkStore, chunk: ChunkId) -> None:
        asked.append((store.target_id, chunk))
        if outcome == "error":
            raise Conflict(detail="no other member serves")

    world = World(count=2)
    world.start(repair)
    for store in world.stores:
        fill(store)
    rot(world.disks[0], ChunkId(3, 0, 4))
    rot(world.disks[1], ChunkId(103, 0, 5))
    world.run(rounds=2)
    assert sorted(asked) == [(1, ChunkId(3, 0, 4)), (2, ChunkId(103, 0, 5))]
    assert world.figure("scrub_bad_chunks") == 2
    assert world.figure("scrub_repaired_chunks") == (2 if outcome == "repaired" else 0)
    world.close()


def test_the_disk_is_asked_not_the_page_cache() -> None:
    class Watched(MemoryDisk):
        direct = 0

        def open(
            self,
            path: str,
            *,
            write: bool = False,
            create: bool = False,
            exclusive: bool = False,
            direct: bool = False,
        ) -> DiskFile:
            self.direct += direct
            return super().open(path, write=write, create=create, exclusive=exclusive)

    world = World()
    world.disks[0] = disk = Watched()
    world.restart()
    total = fill(world.stores[0])
    disk.direct = 0
    world.run()
    assert world.figure("scrubbed_bytes") == total and disk.direct == 32
    world.close()


def test_chunks_that_go_meanwhile() -> None:
    world = World()
    fill(world.stores[0])
    world.run(steps=10)
    for inode in range(1, 9):
        world.stores[0].remove(ChunkId(inode, 0))
        world.stores[0].remove(ChunkId(inode, 0, 4))
    world.run()
    assert world.figure("scrub_bad_chunks") == 0
    assert 16 <= world.figure("scrubbed_chunks") < 32
    world.close()


# --- where it was


def test_a_restarted_server_goes_on_where_it_was() -> None:
    world = World()
    fill(world.stores[0])
    read = 0
    while not world.figure("scrub_rounds"):
        world.run(steps=25)
        read += world.figure("scrubbed_chunks")
        if not world.figure("scrub_rounds"):
            world.scrubber.stop()
            world.restart()
    assert read == 32  # one that was not read to its end is read again, and counts once
    world.close()


def test_a_killed_server_reads_little_again() -> None:
    world = World(bytes_per_second=20_000)
    fill(world.stores[0])
    world.run(steps=40)
    position = json.loads(world.stores[0].read_note("scrub.json"))
    assert position["done"] is False
    read = world.figure("scrubbed_bytes")
    world.restart()  # without a stop
    world.run()
    again = read + world.figure("scrubbed_bytes") - 8 * 500_000
    assert 0 <= again <= SCRUB_SAVE_SECONDS * 20_000 + 300_000
    world.close()


def test_the_next_round_begins_when_it_is_time() -> None:
    world = World(days=10.0)
    fill(world.stores[0])
    first = world.run()
    world.scrubber.stop()
    world.restart()
    took = world.run()  # the first round began SCRUB_START_SECONDS after the start
    assert took + first - SCRUB_START_SECONDS == pytest.approx(10 * DAY + first - 300, rel=0.01)
    assert world.figure("scrubbed_chunks") == 32
    world.close()


def test_a_clock_that_was_set_back_does_not_stop_it() -> None:
    world = World(days=10.0)
    fill(world.stores[0])
    world.run()
    world.scrubber.stop()
    note = json.loads(world.stores[0].read_note("scrub.json"))
    note["began_ns"] += int(50 * DAY * 1e9)
    world.stores[0].write_note("scrub.json", json.dumps(note).encode())
    world.restart()
    assert world.run() < DAY
    world.close()


@pytest.mark.parametrize("text", [b"", b"{", b'{"began_ns": "x"}', b"\xff\xfe", b"[1, 2]"])
def test_a_lost_position_costs_a_round(text: bytes) -> None:
    world = World()
    fill(world.stores[0])
    world.run()
    world.scrubber.stop()
    world.stores[0].write_note("scrub.json", text)
    world.restart()
    assert world.run() < DAY
    assert world.figure("scrubbed_chunks") == 32
    world.close()


# --- disks that fail


@pytest.mark.logs_warnings
def test_one_target_fails_the_others_go_on() -> None:
    world = World(count=3)
    for store in world.stores:
        fill(store)
    world.run(steps=20)
    Faults(world.disks[1]).arm_operation("preadv", TargetFailed(detail="EIO"))
    world.run(rounds=2)
    assert [store.healthy for store in world.stores] == [True, False, True]
    assert 64 <= world.figure("scrubbed_chunks") < 96
    assert world.scrubber.step() > 0
    world.close()


@pytest.mark.parametrize("operation", ["truncate", "pwritev", "rename"])
def test_a_full_disk_is_scrubbed_as_well(operation: str) -> None:
    world = World()
    fill(world.stores[0])
    error: KvfsError = DiskFull(path="scrub.json.new")
    Faults(world.disks[0]).arm_operation(operation, error)
    world.run()
    assert world.figure("scrubbed_chunks") == 32 and world.stores[0].healthy
    world.close()


# --- as a thread


def test_the_thread_reads_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "SCRUB_START_SECONDS", 0.0)
    disk = OsDisk(str(tmp_path))
    store = make_store(disk)
    for inode in range(1, 5):
        put(store, ChunkId(inode, 0), os.urandom(100_000))
    repaired: list[ChunkId] = []
    put(store, ChunkId(9, 0, 2), bytes(10_000))
    rot(disk, ChunkId(9, 0, 2))
    counters = new_counters()
    scrubber = Scrubber(
        os_env(),
        [store],
        counters,
        bytes_per_second=1 << 40,
        days=1.0,
        repair=lambda store, chunk: repaired.append(chunk),
    )
    scrubber.start()
    deadline = time.monotonic() + 60
    while not counters.snapshot()["scrub_rounds"] and time.monotonic() < deadline:
        time.sleep(0.01)
    scrubber.stop()
    assert counters.snapshot() == {
        "scrubbed_bytes": 410_000,
        "scrubbed_chunks": 5,
        "scrub_bad_chunks": 1,
        "scrub_repaired_chunks": 1,
        "scrub_rounds": 1,
    }
    assert repaired == [ChunkId(9, 0, 2)]
    assert json.loads(store.read_note("scrub.json"))["done"] is True
    store.close()
