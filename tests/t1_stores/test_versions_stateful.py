"""Versions against a model, in whatever order: two chunks, one target, restarts in between."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfs_base.errors import ChunkNotFound, ChunkPending
from kvfs_base.testing import MemoryDisk
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.format import ChunkInfo, ChunkState
from t1_stores.chain_chunks import commit, open_store, pending, read

CHUNKS = [ChunkId(77, 3, 5), ChunkId(77, 3, 6)]
chunks = st.sampled_from(CHUNKS)
# Around the pieces that a copy is read in (8 KiB).
offsets = st.sampled_from([0, 1, 5, 4_096, 8_191, 8_192, 9_000, 16_384, 20_000])
pieces = st.builds(lambda size, byte: bytes([byte]) * size, offsets, st.integers(1, 255))


@dataclasses.dataclass
class Version:
    number: int
    data: bytes
    sequence: int


class VersionsMachine(RuleBasedStateMachine):
    @initialize(strict=st.booleans())
    def start(self, strict: bool) -> None:
        self.disk = MemoryDisk()
        self.strict = strict
        self.store = open_store(self.disk, strict=strict)
        self.committed: dict[ChunkId, Version | None] = dict.fromkeys(CHUNKS)
        self.pending: dict[ChunkId, Version | None] = dict.fromkeys(CHUNKS)
        self.done: dict[tuple[ChunkId, int], int] = {}
        self.sequence = 0

    def _make(self, chunk: ChunkId, data: bytes, update: m.Update, parts: list[bytes]) -> None:
        before = self.committed[chunk]
        number = before.number + 1 if before else 1
        with self.store.versions.lock(chunk):
            made = self.store.versions.prepare(chunk, update, parts, number)
        self.pending[chunk] = Version(number, data, update.sequence)
        assert (made.version, made.length, made.crc32c) == (number, len(data), crc32c(data))

    @rule(chunk=chunks, offset=offsets, data=pieces, at_end=st.booleans())
    def write(self, chunk: ChunkId, offset: int, data: bytes, at_end: bool) -> None:
        before = self.committed[chunk]
        old = before.data if before else b""
        if at_end:
            offset = len(old)
        new = bytearray(old.ljust(offset if data else 0, b"\0"))
        new[offset : offset + len(data)] = data
        self.sequence += 1
        update = m.Update(
            chunk.inode, chunk.number, offset, len(data), crc32c(data), 9, self.sequence
        )
        self._make(chunk, bytes(new), update, [data[:100], data[100:]])

    @rule(chunk=chunks, end=offsets)
    def cut(self, chunk: ChunkId, end: int) -> None:
        before = self.committed[chunk]
        self.sequence += 1
        update = m.Update(chunk.inode, chunk.number, end, 0, 0, 9, self.sequence, cut=True)
        self._make(chunk, (before.data if before else b"")[:end], update, [])

    @rule(chunk=chunks, data=pieces, ahead=st.integers(1, 3))
    def whole(self, chunk: ChunkId, data: bytes, ahead: int) -> None:
        before = self.committed[chunk]
        number = (before.number if before else 0) + ahead
        self.sequence += 1
        info = ChunkInfo(
            *chunk,
            ChunkState.SEALED,
            len(data),
            crc32c(data),
            version=number,
            writer=9,
            sequence=self.sequence,
        )
        with self.store.versions.lock(chunk):
            self.store.versions.prepare_whole(chunk, info, [data[:7], data[7:]])
        self.pending[chunk] = Version(number, data, self.sequence)

    @rule(chunk=chunks)
    def commit(self, chunk: ChunkId) -> None:
        waiting = self.pending[chunk]
        if waiting is None:
            with pytest.raises(ChunkNotFound):
                commit(self.store, chunk)
            return
        assert commit(self.store, chunk).version == waiting.number
        self.committed[chunk], self.pending[chunk] = waiting, None
        self.done[chunk, waiting.sequence] = waiting.number

    @rule(chunk=chunks)
    def drop(self, chunk: ChunkId) -> None:
        with self.store.versions.lock(chunk):
            self.store.versions.drop(chunk)
        self.pending[chunk] = None

    @rule(chunk=chunks)
    def forget(self, chunk: ChunkId) -> None:
        count = self.store.versions.forget_pending(chunk.chain)
        assert count == (self.pending[chunk] is not None)
        self.pending[chunk] = None

    @rule(chunk=chunks)
    def repair(self, chunk: ChunkId) -> None:
        before = self.committed[chunk]
        if before is None or self.pending[chunk] is not None:
            return
        with self.store.versions.lock(chunk):
            info = self.store.versions.committed(chunk)
            assert info is not None
            self.store.versions.replace(chunk, info, [before.data])

    @rule(chunk=chunks)
    def remove(self, chunk: ChunkId) -> None:
        there = self.committed[chunk] or self.pending[chunk]
        assert self.store.remove_range(77, 0, 10, chunk.chain) == (there is not None)
        self.committed[chunk] = self.pending[chunk] = None
        self.done = {key: number for key, number in self.done.items() if key[0] != chunk}

    @rule(chunk=chunks)
    def sync(self, chunk: ChunkId) -> None:
        self.store.sync(chunk)
        assert self.committed[chunk] is None or self.store.stat(chunk).durable

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = open_store(self.disk, strict=self.strict)
        self.done = {}

    @invariant()
    def reads_show_what_is_committed(self) -> None:
        if not hasattr(self, "store"):
            return
        for chunk, version in self.committed.items():
            if version is None:
                assert self.store.versions.committed(chunk) is None
                continue
            assert read(self.store, chunk) == version.data
            info = self.store.recheck(chunk)
            assert (info.version, info.sequence) == (version.number, version.sequence)
            assert self.store.versions.seen(chunk, 9, version.sequence) == version.number
        for (chunk, sequence), number in self.done.items():
            assert self.store.versions.seen(chunk, 9, sequence) == number
        assert drafts(self.disk) == []

    @invariant()
    def what_is_pending_is_known(self) -> None:
        if not hasattr(self, "store"):
            return
        for chunk, version in self.pending.items():
            if version is not None:
                with pytest.raises(ChunkPending):
                    self.store.versions.open_settled(chunk)
            found = pending(self.store, chunk)
            assert (found is None) == (version is None)
            if found is not None and version is not None:
                assert (found.version, found.crc32c) == (version.number, crc32c(version.data))
                assert chunk in set(self.store.versions.pendings(chunk.chain))
            elif self.committed[chunk] is not None:
                self.store.versions.open_settled(chunk)[0].close()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


VersionsMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestVersions = VersionsMachine.TestCase
