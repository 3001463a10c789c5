"""Files straight into a device's memory, around the host's: where the hardware can, and where that
is faster.

    off    blocks are read into pinned memory (FileSource) and copied from there
    on     they are read by the device's reader into a ring on the device, and scattered from there
    auto   whichever brought a sample of blocks sooner; the log says which, and why

A reader that has no direct path still works, through host memory of its own (kvikio calls that
compatibility mode): it moves every byte once more, and what it costs is measured like the rest.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvfs_base.errors import InvalidRequest
from kvfs_base.os_env import os_env
from kvfs_base.seams import Clock
from kvfs_gds.device import Device
from kvfs_gds.extents import pages_of
from kvfs_gds.paged import HostMemory
from kvfs_gds.ring import PinnedRing, Ring
from kvfs_gds.sources import Extents, Fetched, FileExtent, FileSource, FromRing

log = logging.getLogger(__name__)

Locate = Callable[[Sequence[bytes]], Sequence[FileExtent | None]]

SAMPLE_ROUNDS = 3
"""Of each way, in turn: a disk that others use as well is not the same from one to the next."""


class DirectReader(Protocol):
    """Reads files into memory of a device. Thread-safe."""

    name: str
    """What it is, and in which mode it works."""

    def allocate(self, nbytes: int) -> HostMemory:
        """Memory of the device. Raises ArenaFull."""

    def read(self, extents: Sequence[FileExtent], memory: HostMemory, at: Sequence[int]) -> Any:
        """The bytes read of each extent, once all are in ``memory`` at offsets ``at``; fewer than
        its size at the end of a file. Raises TargetFailed."""

    def checksums(self, memory: HostMemory, at: Sequence[int], size: int) -> Sequence[int]:
        """CRC32C of ``size`` bytes at each offset, summed on the device."""

    def close(self) -> None: ...


class DirectSource:
    """Blocks that lie in files, read into a ring of the device's memory and verified there."""

    def __init__(
        self, reader: DirectReader, device: Device, ring_bytes: int, locate: Locate
    ) -> None:
        """``locate`` says where blocks lie; it must leave the descriptors open."""
        self.reader = reader
        self._locate = locate
        self._ring = Ring(device, reader.allocate(ring_bytes))

    def room_bytes(self) -> int:
        return self._ring.nbytes

    def close(self) -> None:
        self._ring.close()
        self.reader.close()

    def ask(self, keys: Sequence[bytes]) -> None:
        """Reads are begun by who waits for them."""

    def fetch(self, keys: Sequence[bytes]) -> Fetched:
        found = list(self._locate(keys))
        wanted = [(place, extent) for place, extent in enumerate(found) if extent is not None]
        if not wanted:
            return FromRing(self._ring.memory, None, [None] * len(keys))
        slot = self._ring.take(sum(pages_of(extent.size) for _, extent in wanted))
        assert slot is not None
        try:
            extents: Extents = [None] * len(keys)
            at, offset = [], slot.offset
            for _, extent in wanted:
                at.append(offset)
                offset += pages_of(extent.size)
            good = self._read([extent for _, extent in wanted], at)
            for (place, extent), offset, right in zip(wanted, at, good, strict=True):
                extents[place] = (offset, extent.size) if right else None
        except BaseException:
            slot.release()
            raise
        return FromRing(self._ring.memory, slot, extents)

    def _read(self, wanted: list[FileExtent], at: list[int]) -> list[bool]:
        """For each block, whether it is what it should be."""
        memory = self._ring.memory
        done = self.reader.read(wanted, memory, at)
        good = [count == extent.size for count, extent in zip(done, wanted, strict=True)]
        by_size: dict[int, list[int]] = {}
        for place, extent in enumerate(wanted):
            if good[place] and extent.crc32c is not None:
                by_size.setdefault(extent.size, []).append(place)
        for size, places in by_size.items():
            sums = self.reader.checksums(memory, [at[place] for place in places], size)
            for place, found in zip(places, sums, strict=True):
                good[place] = found == wanted[place].crc32c
        return good


def file_source(
    locate: Locate,
    *,
    device: Device,
    ring_bytes: int,
    setting: str = "auto",
    sample: Sequence[bytes] = (),
    reader: DirectReader | None = None,
    clock: Clock | None = None,
) -> FileSource | DirectSource:
    """A source of blocks in files, as ``setting`` (auto, on, off) says. ``sample`` are keys that
    ``auto`` may read, some MiB of them. ``reader`` is the device's own unless given. Raises
    InvalidRequest for ``on`` where the device has none."""
    if setting not in ("auto", "on", "off"):
        raise InvalidRequest(detail=f"direct reads {setting!r}: auto, on or off")
    if setting == "off":
        return _staged(locate, device, ring_bytes)
    if reader is None:
        reader, reason = open_reader(device)
        if reader is None and setting == "on":
            raise InvalidRequest(detail=f"no direct reads: {reason}")
        if reader is None:
            log.info("files are read through pinned memory: %s", reason)
            return _staged(locate, device, ring_bytes)
    direct = DirectSource(reader, device, ring_bytes, locate)
    if setting == "on":
        log.info("files are read by %s", reader.name)
        return direct
    return _faster(direct, _staged(locate, device, ring_bytes), sample, clock or os_env().clock)


def open_reader(device: Device) -> tuple[DirectReader | None, str]:
    """The device's reader, or None and why it has none."""
    if not device.name.startswith("cuda"):
        return None, f"{device.name} has none"
    try:
        from kvfs_gds.cufile import KvikioReader

        return KvikioReader(device), ""
    except (ImportError, OSError, RuntimeError) as exc:
        return None, f"kvikio: {exc}"


def _staged(locate: Locate, device: Device, ring_bytes: int) -> FileSource:
    return FileSource(PinnedRing(device, ring_bytes), locate, owns_ring=True)


def _faster(
    direct: DirectSource, staged: FileSource, sample: Sequence[bytes], clock: Clock
) -> FileSource | DirectSource:
    if not sample:
        log.info("files are read through pinned memory: no sample to measure others with")
        direct.close()
        return staged
    rates = {"direct": measure(direct, sample, clock), "staged": measure(staged, sample, clock)}
    wins = rates["direct"] > rates["staged"]
    chosen, other = (direct, staged) if wins else (staged, direct)
    log.info(
        "files are read %s: %.2f GB/s by %s, %.2f through pinned memory",
        "directly" if wins else "through pinned memory",
        rates["direct"] / 1e9,
        direct.reader.name,
        rates["staged"] / 1e9,
    )
    other.close()
    return chosen


def measure(source: FileSource | DirectSource, sample: Sequence[bytes], clock: Clock) -> float:
    """Bytes a second of fetches of ``sample``; the first one does not count."""
    rates = []
    for _ in range(SAMPLE_ROUNDS + 1):
        start = clock.monotonic()
        fetched = source.fetch(sample)
        seconds = max(clock.monotonic() - start, 1e-9)
        rates.append(sum(e[1] for e in fetched.extents if e is not None) / seconds)
        fetched.release()
    return statistics.median(rates[1:])


__all__ = ["DirectReader", "DirectSource", "file_source", "measure", "open_reader"]
