"""Pinned rings, and blocks that are read from files without an agent."""

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
from kvfs_gds.device import CpuDevice, CpuEvent
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from kvfs_gds.ring import PinnedRing
from kvfs_gds.sources import FileExtent, FileSource

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
        assert slot is not None and len(slot.view) == 2 * PAGE
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


def load(files: Files, keys: list[bytes], ring_pages: int = 32) -> tuple[list[bool], Any]:
    device = CpuDevice()
    ring = PinnedRing(device, ring_pages * PAGE)
    source = FileSource(ring, lambda names: [files.extents.get(name) for name in names])
    rows = np.zeros((len(keys), BLOCK_BYTES), dtype=np.uint8)
    table = np.arange(len(keys), dtype=np.int32).reshape(-1, 1)
    try:
        with Loader(source, device=device) as loader:
            hits = loader.load(keys, Pages(PagedLayout.rows(rows), table)).result()
    finally:
        source.close()
        ring.close()
    return hits, rows


@pytest.mark.parametrize("ring_pages", [1024, 8])
def test_files_are_read_into_their_rows(files: Files, ring_pages: int) -> None:
    hits, rows = load(files, [*files.keys, bytes(32)[:31] + b"\1"], ring_pages)
    assert hits == [True] * BLOCKS + [False]
    assert (rows[:BLOCKS] == files.blocks).all()


def test_wrong_or_missing_bytes_are_a_miss(files: Files) -> None:
    good = files.extents[files.keys[3]]
    files.extents[files.keys[3]] = FileExtent(good.descriptor, good.offset, good.size, 1)
    files.extents[files.keys[4]] = FileExtent(good.descriptor, 1 << 30, good.size)
    hits, rows = load(files, files.keys)
    assert [n for n, hit in enumerate(hits) if not hit] == [3, 4]
    assert not rows[3].any()


def test_a_failing_disk_fails_the_load(files: Files, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a directory: reads fail
    files.extents[files.keys[0]] = FileExtent(fd, 0, BLOCK_BYTES)
    with pytest.raises(TargetFailed):
        load(files, files.keys[:4])
    os.close(fd)
