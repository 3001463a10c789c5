"""Numbers of updates that a target has committed, to recognise those that come again."""

from __future__ import annotations

import collections

from kvfs_base import threads
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import UPDATES_REMEMBERED_MAX


class UpdateNumbers:
    """The last UPDATES_REMEMBERED_MAX. Thread-safe."""

    def __init__(self) -> None:
        self._versions: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._lock = threads.lock()

    def find(self, chunk: ChunkId, writer: int, sequence: int) -> int | None:
        """Which version of the chunk this update made."""
        with self._lock:
            return self._versions.get(_name(chunk, writer, sequence))

    def add(self, info: ChunkInfo) -> None:
        with self._lock:
            self._versions[_name(info.chunk, info.writer, info.sequence)] = info.version
            while len(self._versions) > UPDATES_REMEMBERED_MAX:
                self._versions.popitem(last=False)


def _name(chunk: ChunkId, writer: int, sequence: int) -> int:
    """One number takes half the memory that a tuple of them does."""
    name = (chunk.inode << 32 | chunk.number) << 32 | chunk.chain
    return (name << 32 | writer) << 32 | sequence


__all__ = ["UpdateNumbers"]
