"""Pinned rings, and blocks that are read from files without an agent: into pinned memory, or by a
device's own reader."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvfs_base.errors import InvalidRequest, TargetFailed
from kvfs_datapath.checksum import crc32c
from kvfs_gds import file_reads
from kvfs_gds.device import CpuDevice, CpuEvent
from kvfs_gds.direct import DirectSource, file_source
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from kvfs_gds.ring import PinnedRing
from kvfs_gds.sources import FileExtent, FileSource
from loader_fakes import MemoryReader

PAGE = 4096
BLOCKS, BLOCK_BYTES = 24, 3 * PAGE - 512


@pytest.fixture
def ring() -> Iterator[PinnedRing]:
    made = PinnedRing(CpuDevice(), 8 * PAGE)
    yield made
    made.close()


def test_slots_are_whole_pages_and_bounded(ring: PinnedRing) -> None:
    slots = [ring.take(PAGE + 1) for _ in range(4)]
    assert all(slot is not None and slot.offset % PAGE == 0 for slot in slots)
    assert ring.take(1, wait=False) is None
    assert ring.statistics() == {"ring_bytes": 8 * PAGE, "ring_used_bytes": 8 * PAGE}
    for slot in slots:
        assert slot is not None and slot.nbytes == PAGE + 1
        assert len(ring.view(slot.offset, 2 * PAGE)) == 2 * PAGE
        slot.release()
    assert ring.used_bytes == 0
    with pytest.raises(InvalidRequest):
        ring.take(8 * PAGE + 1)


def test_a_slot_is_free_only_after_its_event(ring: PinnedRing) -> None:
    slot, event = ring.take(8 * PAGE), CpuEvent()
    assert slot is not None
    slot.retain()
    slot.release(after=event)
    slot.release()
    assert ring.take(1, wait=False) is None
    with pytest.raises(InvalidRequest):
        slot.release()
    taken: list[Any] = []
    taker = threading.Thread(target=lambda: taken.append(ring.take(PAGE)))
    taker.start()
    event.happen()
    taker.join(60.0)
    assert taken[0].offset == 0
    taken[0].release()


def test_who_finds_no_room_waits_for_a_release(ring: PinnedRing) -> None:
    slot = ring.take(8 * PAGE)
    assert slot is not None
    taken: list[Any] = []
    taker = threading.Thread(target=lambda: taken.append(ring.take(PAGE)))
    taker.start()
    slot.release()
    taker.join(60.0)
    taken[0].release()


class Files:
    """Blocks in two files, each block on whole pages."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(4)
        self.blocks = rng.integers(0, 256, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.keys = [number.to_bytes(32, "little") for number in range(BLOCKS)]
        self.extents: dict[bytes, FileExtent] = {}
        self.descriptors = []
        for name in range(2):
            path = folder / f"{name}.bin"
            some = range(name, BLOCKS, 2)
            data = b"".join(self.blocks[n].tobytes().ljust(3 * PAGE, b"\0") for n in some)
            path.write_bytes(data)
            fd = os.open(path, os.O_RDONLY)
            self.descriptors.append(fd)
            for place, number in enumerate(some):
                checksum = crc32c(self.blocks[number].tobytes())
                self.extents[self.keys[number]] = FileExtent(
                    fd, place * 3 * PAGE, BLOCK_BYTES, checksum
                )

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["off", "on"], ids=["staged", "direct"])
def setting(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(
    files: Files, setting: str, keys: list[bytes], ring_pages: int = 32
) -> tuple[list[bool], Any]:
    device = CpuDevice()
    source = file_source(
        lambda names: [files.extents.get(name) for name in names],
        device=device,
        ring_bytes=ring_pages * PAGE,
        setting=setting,
        reader=MemoryReader(),
    )
    rows = np.zeros((len(keys), BLOCK_BYTES), dtype=np.uint8)
    table = np.arange(len(keys), dtype=np.int32).reshape(-1, 1)
    try:
        with Loader(source, device=device) as loader:
            hits = loader.load(keys, Pages(PagedLayout.rows(rows), table)).result()
    finally:
        source.close()
    return hits, rows


@pytest.mark.parametrize("ring_pages", [1024, 8])
@pytest.mark.parametrize("read_bytes", [1 << 20, 2 * PAGE], ids=["neighbours", "parts"])
def test_files_are_read_into_their_rows(
    files: Files, setting: str, ring_pages: int, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_reads, "READ_BYTES", read_bytes)
    monkeypatch.setattr(file_reads, "CACHED_READ_BYTES", read_bytes)
    hits, rows = load(files, setting, [*files.keys, bytes(32)[:31] + b"\1"], ring_pages)
    assert hits == [True] * BLOCKS + [False]
    assert (rows[:BLOCKS] == files.blocks).all()


@pytest.mark.parametrize(("flags", "reads"), [(0, 2), (os.O_DIRECT, 6)], ids=["cached", "direct"])
def test_the_page_cache_is_read_in_larger_parts(tmp_path: Path, flags: int, reads: int) -> None:
    """Each read is a copy then, and shorter than a thread's wait for its turn."""
    path = tmp_path / "blocks"
    path.write_bytes(bytes(3 << 20))
    try:
        fd = os.open(path, os.O_RDONLY | flags)
    except OSError:
        pytest.skip("no O_DIRECT here")
    view = memoryview(bytearray(3 << 20))
    blocks = [file_reads.Block(fd, 0, 3 << 20, None, view) for _ in range(2)]
    assert len(file_reads.Batch(blocks, lambda _: None)) == reads
    os.close(fd)


def test_wrong_or_missing_bytes_are_a_miss(files: Files, setting: str) -> None:
    good = files.extents[files.keys[3]]
    files.extents[files.keys[3]] = FileExtent(good.descriptor, good.offset, good.size, 1)
    files.extents[files.keys[4]] = FileExtent(good.descriptor, 1 << 30, good.size)
    hits, rows = load(files, setting, files.keys)
    assert [n for n, hit in enumerate(hits) if not hit] == [3, 4]
    assert not rows[3].any()


def test_a_failing_disk_fails_the_load(files: Files, setting: str, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a directory: reads fail
    files.extents[files.keys[0]] = FileExtent(fd, 0, BLOCK_BYTES)
    with pytest.raises(TargetFailed):
        load(files, setting, files.keys[:4])
    os.close(fd)


class TickingClock:
    """A second goes by from one look to the next, and what a reader says on top."""

    def __init__(self) -> None:
        self.now = 0.0

    def time_ns(self) -> int:
        return 0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


class TimedReader(MemoryReader):
    def __init__(self, clock: TickingClock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def read(self, *arguments: Any) -> list[int]:
        self.clock.now += self.seconds
        return super().read(*arguments)


@pytest.mark.parametrize("seconds", [-0.5, 0.5], ids=["faster", "slower"])
def test_auto_takes_what_is_faster_and_says_why(
    files: Files, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvfs_gds.direct")
    clock = TickingClock()
    reader = TimedReader(clock, seconds)
    source = file_source(
        lambda names: [files.extents[name] for name in names],
        device=CpuDevice(),
        ring_bytes=128 * PAGE,
        sample=files.keys,
        reader=reader,
        clock=clock,
    )
    assert isinstance(source, DirectSource if seconds < 0 else FileSource)
    assert reader.closed == (seconds > 0)
    word = "directly" if seconds < 0 else "through pinned memory"
    assert f"files are read {word}: " in caplog.text and "by a fake" in caplog.text
    source.close()


def test_devices_without_a_reader_are_read_for_and_say_so(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvfs_gds.direct")

    def open_source(setting: str, **settings: Any) -> FileSource | DirectSource:
        return file_source(
            lambda names: [files.extents[name] for name in names],
            device=CpuDevice(),
            ring_bytes=64 * PAGE,
            setting=setting,
            **settings,
        )

    source = open_source("auto")
    assert isinstance(source, FileSource)
    assert "cpu has none" in caplog.text
    source.close()
    unmeasured = open_source("auto", reader=MemoryReader())
    assert isinstance(unmeasured, FileSource)
    assert "no sample" in caplog.text
    unmeasured.close()
    with pytest.raises(InvalidRequest, match="cpu has none"):
        open_source("on")
    with pytest.raises(InvalidRequest):
        open_source("perhaps")
