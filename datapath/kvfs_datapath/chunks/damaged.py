"""File chunks of chains whose bytes nobody has any more.

Their attribute says so (DAMAGED), which is what counts. A note beside the chunks names them, so
that a server that was started again still knows how many there are: it may be old, and is corrected
as chunks are looked at.
"""

from __future__ import annotations

import logging
from typing import Annotated

import msgspec

from kvfs_base import threads
from kvfs_base.errors import ChunkMismatch, KvfsError, NotPermitted
from kvfs_base.limits import CHAIN_CHUNK_BYTES
from kvfs_base.types import U32, U64, ChunkId
from kvfs_datapath.chunks.tree import ChunkTree
from kvfs_datapath.format import (
    ATTRIBUTE,
    VERSION_UNKNOWN,
    ChunkInfo,
    ChunkState,
    pack,
    path_of,
    unpack,
)
from kvfs_datapath.limits import DAMAGED_CHUNKS_MAX

log = logging.getLogger(__name__)

NOTE = "damaged.json"
_Names = Annotated[tuple[tuple[U64, U32, U32], ...], msgspec.Meta(max_length=DAMAGED_CHUNKS_MAX)]


class DamagedChunks:
    """Of one target. ``mark`` wants the chunk's lock."""

    def __init__(self, tree: ChunkTree) -> None:
        self._tree = tree
        self._lock = threads.lock()
        self._known: dict[ChunkId, None] = {}
        try:
            names = msgspec.json.decode(tree.read_note(NOTE), type=_Names)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            names = ()  # there is none, or the power went
        for name in names:
            self._recall(ChunkId(*name))

    def _recall(self, chunk: ChunkId) -> None:
        try:
            if self._tree.stat(chunk).is_damaged:
                self._known[chunk] = None
        except KvfsError:
            pass  # whoever looks for it finds out

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, chunk: ChunkId) -> bool:
        return chunk in self._known

    def found(self, info: ChunkInfo) -> None:
        """What the attribute of a chunk says now."""
        if info.is_damaged != (info.chunk in self._known):
            self._set(info.chunk, info.is_damaged)

    def gone(self, chunk: ChunkId) -> None:
        if chunk in self._known:
            self._set(chunk, False)

    def _set(self, chunk: ChunkId, damaged: bool) -> None:
        with self._lock:
            if not damaged:
                self._known.pop(chunk, None)
            elif len(self._known) < DAMAGED_CHUNKS_MAX:
                self._known[chunk] = None
            names = [tuple(known) for known in self._known]
            try:
                self._tree.write_note(NOTE, msgspec.json.encode(names))
            except KvfsError as exc:
                log.info("damaged chunks of target %d: %s", self._tree.target_id, exc)

    def mark(self, chunk: ChunkId) -> ChunkInfo:
        """From now on the chunk is known to be damaged: it is never served, until other bytes take
        its place. What is left of it stays where it is. Where the attribute is lost, too, the
        version is VERSION_UNKNOWN. Raises ChunkNotFound, NotPermitted for a block."""
        tree = self._tree
        with tree.io(chunk), tree.guard(chunk):
            file = tree.disk.open(path_of(chunk), write=True)
            try:
                try:
                    info = unpack(file.get_attribute(ATTRIBUTE), chunk)
                except ChunkMismatch:
                    size = min(file.size(), CHAIN_CHUNK_BYTES)
                    info = ChunkInfo(
                        *chunk, ChunkState.DAMAGED, length=size, version=VERSION_UNKNOWN
                    )
                if not info.version:
                    raise NotPermitted(reason="a block is given up, not recorded as damaged")
                info = msgspec.structs.replace(info, state=ChunkState.DAMAGED)
                file.set_attribute(ATTRIBUTE, pack(info))
                if tree.strict or info.durable:
                    file.sync(attributes=True)
            finally:
                file.close()
        tree.forget_verified(chunk)
        log.error("target %d: the bytes of chunk %s are lost", tree.target_id, tuple(chunk))
        self.found(info)
        return info


__all__ = ["DamagedChunks"]
