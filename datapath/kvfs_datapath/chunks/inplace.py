"""Chunks that are written in place: ordinary files on chains of one copy.

They are marked OPEN before the first byte changes and get their checksum back when they are sealed.
Whether somebody may still write is not a matter of counting: the kernel knows every descriptor that
is open for writing, also those passed to other processes, also after this server was restarted
(``DiskFile.has_writer``). Patches through the server take the chunk's lock and mark it OPEN again,
so a seal between two of them is never wrong, only early.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvfs_base.errors import NotPermitted
from kvfs_base.seams import Buffer, DiskFile
from kvfs_base.types import ChunkId
from kvfs_datapath.chunks.tree import ChunkTree
from kvfs_datapath.format import (
    ATTRIBUTE,
    CHUNKS,
    ChunkInfo,
    ChunkState,
    directory_of,
    pack,
    path_of,
    unpack,
)


class InPlace(ChunkTree):
    def open_for_write(self, chunk: ChunkId, *, create: bool = True) -> tuple[DiskFile, ChunkInfo]:
        """The chunk's file, buffered, for writing in place, marked OPEN. Raises ChunkNotFound
        without ``create``, NotPermitted for a block, and on a chain of several copies."""
        with self.io(chunk), self.guard(chunk):
            return self._open_for_write(chunk, create)

    def _open_for_write(self, chunk: ChunkId, create: bool) -> tuple[DiskFile, ChunkInfo]:
        if chunk.chain:
            raise NotPermitted(reason="the other copies would not hear of it")
        try:
            file = self.disk.open(path_of(chunk), write=True)
        except FileNotFoundError:
            if not create:
                raise
            self._create_open(chunk)
            file = self.disk.open(path_of(chunk), write=True)
        try:
            return file, self._mark_open(file, chunk)
        except BaseException:
            file.close()
            raise

    def _create_open(self, chunk: ChunkId) -> None:
        """By rename, as no chunk file is ever seen without its attribute."""
        file, path = self.create_draft()
        try:
            file.set_attribute(ATTRIBUTE, pack(ChunkInfo(*chunk, ChunkState.OPEN)))
            self.incoming.arrived(chunk.inode)
            self.appear(path, chunk)
        except BaseException:
            self.discard_draft(path)
            raise
        finally:
            file.close()

    def _mark_open(self, file: DiskFile, chunk: ChunkId) -> ChunkInfo:
        info = unpack(file.get_attribute(ATTRIBUTE), chunk)
        if info.key:
            raise NotPermitted(reason="a block is never written again")
        if not info.is_sealed:
            return msgspec.structs.replace(info, length=file.size())
        size = file.size()
        info = msgspec.structs.replace(info, state=ChunkState.OPEN, length=size, crc32c=0)
        self.mark(file, info)
        if info.durable or self.strict:
            # Else a power loss could leave changed bytes under the old checksum.
            file.sync(attributes=True)
        self.forget_verified(chunk)
        return info

    def patch(self, chunk: ChunkId, offset: int, data: Sequence[Buffer]) -> None:
        """Writes into a chunk in place; the chunk is made if it is missing. Raises DiskFull."""
        with self.io(chunk), self.guard(chunk):
            file, _ = self._open_for_write(chunk, create=True)
            try:
                file.pwritev(data, offset)
            finally:
                file.close()

    def truncate(self, chunk: ChunkId, length: int) -> None:
        """Cuts a chunk to ``length`` bytes; a shorter one stays as it is, a missing one missing."""
        with self.io(chunk), self.guard(chunk):
            try:
                file, info = self._open_for_write(chunk, create=False)
            except FileNotFoundError:
                return
            try:
                if info.length > length:
                    file.truncate(length)
            finally:
                file.close()

    def seal(self, chunk: ChunkId) -> ChunkInfo:
        """Computes the checksum of a chunk that nobody has open for writing; otherwise it stays
        OPEN, which the answer says. Raises ChunkNotFound."""
        with self.io(chunk), self.guard(chunk):
            file = self.disk.open(path_of(chunk))
            try:
                info = self.look(file, chunk)[0]
                if info.is_sealed or file.has_writer():
                    return info
                return self._seal(file, info)
            finally:
                file.close()

    def _seal(self, file: DiskFile, info: ChunkInfo) -> ChunkInfo:
        if info.durable or self.strict:
            # What was made durable once must not become unreadable by losing power now.
            file.sync()
        info = msgspec.structs.replace(
            info, state=ChunkState.SEALED, crc32c=self.checksum(file, info.length)
        )
        self.mark(file, info)
        self.remember_verified(info.chunk, info.crc32c)
        return info

    def sync(self, chunk: ChunkId) -> None:
        """Makes everything written to the chunk so far durable, and marks it so that later changes
        never endanger it. A missing chunk (a hole) is fine."""
        with self.io(chunk), self.guard(chunk):
            try:
                file = self.disk.open(path_of(chunk))
            except FileNotFoundError:
                return
            try:
                info = unpack(file.get_attribute(ATTRIBUTE), chunk)
                if not info.durable:
                    self.mark(file, msgspec.structs.replace(info, durable=True))
                file.sync(attributes=True)
            finally:
                file.close()
            if not info.durable:
                self._sync_names(chunk)

    def make_last(self, chunk: ChunkId) -> None:
        """Makes a sealed chunk durable as it is now. Raises ChunkNotFound."""
        with self.io(chunk), self.guard(chunk):
            file = self.disk.open(path_of(chunk))
            try:
                file.sync(attributes=True)
            finally:
                file.close()
            self._sync_names(chunk)

    def _sync_names(self, chunk: ChunkId) -> None:
        self.disk.sync_directory(directory_of(chunk.inode, chunk.chain))
        self.disk.sync_directory(CHUNKS)
