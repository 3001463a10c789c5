"""A namespace in memory for loaders: a real arena with real leases, whose freed memory is poisoned.

Whatever a copy reads after its lease was given back is therefore wrong, and seen.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvfs_base.answers import Answer
from kvfs_base.errors import ArenaFull, TargetFailed
from kvfs_datapath.checksum import crc32c
from kvfs_gds.arena import Arena, ArenaView
from kvfs_gds.extents import ExtentAllocator, pages_of
from kvfs_gds.paged import HostMemory
from kvfs_gds.sources import FileExtent

FREED = 0xDD


class MemoryBlocks:
    def __init__(self, owner: MemoryNamespace, extents: list[tuple[int, int] | None]) -> None:
        self.arena: ArenaView = owner.reader
        self.extents = extents
        self._owner = owner
        self._released = False

    def release(self) -> None:
        assert not self._released, "a lease was given back twice"
        self._released = True
        self._owner.give_back([e for e in self.extents if e is not None])


class MemoryNamespace:
    """As kvfs.Namespace: every get copies its blocks into fresh extents of the arena."""

    def __init__(self, arena_bytes: int) -> None:
        self.arena = Arena.create(arena_bytes)
        self.reader = ArenaView.open(os.dup(self.arena.fd))
        self.stored: dict[bytes, bytes] = {}
        self.lock = threading.Lock()
        self.gets = 0
        self.asked = 0
        self.answers_soon = True
        self.hold: threading.Event | None = None
        """Gets wait for it, if there is one."""
        self.error: Exception | None = None
        self._extents = ExtentAllocator(arena_bytes)

    @property
    def leased_bytes(self) -> int:
        with self.lock:
            return self._extents.used_bytes

    def match(self, keys: Sequence[bytes]) -> int:
        with self.lock:
            for count, key in enumerate(keys):
                if key not in self.stored:
                    return count
            return len(keys)

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        if self.error is not None:
            raise self.error
        copies = [bytes(buffer) for buffer in buffers]
        with self.lock:
            new = [key for key in keys if key not in self.stored]
            for key, data in zip(keys, copies, strict=True):
                self.stored.setdefault(key, data)
            return len(new)

    def get(self, keys: Sequence[bytes]) -> MemoryBlocks:
        if self.hold is not None:
            self.hold.wait()
        if self.error is not None:
            raise self.error
        found: list[tuple[int, int] | None] = []
        with self.lock:
            self.gets += 1
            for key in keys:
                data = self.stored.get(key)
                if data is None:
                    found.append(None)
                    continue
                offset = self._extents.allocate(len(data))
                if offset is None:
                    self._free([e for e in found if e is not None])
                    raise ArenaFull(needed_bytes=len(data))
                self.arena.view(offset, len(data))[:] = data
                found.append((offset, len(data)))
        return MemoryBlocks(self, found)

    def ask(self, keys: Sequence[bytes]) -> Answer[MemoryBlocks]:
        self.asked += 1
        return Answer(lambda: self.get(keys), lambda seconds: self.answers_soon)

    def give_back(self, extents: list[tuple[int, int]]) -> None:
        with self.lock:
            self._free(extents)

    def _free(self, extents: list[tuple[int, int]]) -> None:
        for offset, size in extents:
            np.frombuffer(self.arena.view(offset, pages_of(size)), dtype=np.uint8)[:] = FREED
            self._extents.free(offset)

    def close(self) -> None:
        self.reader.close()
        self.arena.close()


class MemoryReader:
    """A DirectReader of the CPU: its device memory is memory."""

    name = "a fake"

    def __init__(self) -> None:
        self.reads = 0
        self.closed = False
        self._memory = np.zeros(0, dtype=np.uint8)

    def allocate(self, nbytes: int) -> HostMemory:
        self._memory = np.zeros(nbytes, dtype=np.uint8)
        return HostMemory.of(self._memory)

    def read(
        self, extents: Sequence[FileExtent], memory: HostMemory, at: Sequence[int]
    ) -> list[int]:
        self.reads += 1
        done = []
        for extent, offset in zip(extents, at, strict=True):
            try:
                data = os.pread(extent.descriptor, extent.size, extent.offset)
            except OSError as exc:
                raise TargetFailed(detail=str(exc)) from exc
            self._memory[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
            done.append(len(data))
        return done

    def checksums(self, memory: HostMemory, at: Sequence[int], size: int) -> list[int]:
        return [crc32c(self._memory[offset : offset + size].tobytes()) for offset in at]

    def close(self) -> None:
        self.closed = True
