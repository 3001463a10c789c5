"""Blocks that nobody has open any more: at hand while they are known to be there, and no longer."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.mount import blocks as blocks_module
from kvfs.mount.backend import NO_DESCRIPTOR
from kvfs.mount.blocks import Blocks
from kvfs.mount.limits import MOUNT_IDLE_SECONDS
from kvfs_base.errors import EntryNotFound, InodeStale, NoTarget
from kvfs_base.types import Attr, ChunkId, Layout
from kvfs_datapath.client.chunk_client import ChunkRead
from kvfs_metadata.messages import Lookup

NAMESPACE = 3
Test = Callable[[Blocks, "Backend"], Awaitable[None]]


class Backend:
    """One file is every chunk; counts who asks for what."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(10))
        self._path = path
        self.there = {1, 2, 3, 4}
        self.leased = self.leases = True
        self.opened: list[int] = []
        self.looked_up = 0
        self.chunks = self
        self.names = SimpleNamespace(attr=self._attr, drop=lambda inode: None)
        self.descriptors: list[int] = []
        self.scratch = memoryview(bytearray(4096))

    def _attr(self, inode: int) -> Attr | None:
        return attr_of(inode) if self.leased and inode in self.there else None

    def open_sealed(self, chunk: ChunkId, chain: int) -> int:
        self.opened.append(chunk.inode)
        self.descriptors.append(os.open(self._path, os.O_RDONLY))
        return self.descriptors[-1]

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    async def call(self, request: Any) -> Any:
        self.looked_up += 1
        assert isinstance(request, Lookup)
        inode = int(request.name, 16)
        if inode not in self.there:
            raise EntryNotFound(request.name)
        self.leased = self.leases
        return attr_of(inode)

    def are_open(self) -> list[int]:
        return [fd for fd in set(self.descriptors) if os.path.exists(f"/proc/self/fd/{fd}")]


async def turn(blocks: Blocks) -> None:
    while True:
        await trio.sleep(MOUNT_IDLE_SECONDS)
        blocks.idle.turn()


def attr_of(inode: int) -> Attr:
    return Attr(inode, 0o100444, size=10, layout=Layout(10, (7,)), key=bytes(31) + bytes([inode]))


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Test], None]:
    def body(test: Test) -> None:
        async def main() -> None:
            backend: Any = Backend(tmp_path / "chunk")
            blocks = Blocks(backend)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(turn, blocks)
                await test(blocks, backend)
                nursery.cancel_scope.cancel()
            blocks.idle.clear()
            assert backend.are_open() == []

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    return body


async def use(blocks: Blocks, inode: int) -> None:
    block = blocks.open_now(inode) or await blocks.open(NAMESPACE, attr_of(inode))
    assert os.pread(block.descriptor, 20, 0) == bytes(10)
    blocks.release(block)


def test_the_next_open_asks_nobody(run: Callable[[Test], None]) -> None:
    async def test(blocks: Blocks, backend: Backend) -> None:
        for _ in range(3):
            await use(blocks, 1)
        assert backend.opened == [1]
        assert backend.looked_up == 0
        assert len(blocks) == 0
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert backend.are_open() == []
        await use(blocks, 1)
        assert backend.opened == [1, 1]

    run(test)


def test_who_removes_one_has_its_space_at_once(run: Callable[[Test], None]) -> None:
    async def test(blocks: Blocks, backend: Backend) -> None:
        await use(blocks, 1)
        await use(blocks, 2)
        backend.there.discard(1)
        blocks.idle.drop((1, 77))
        assert len(backend.are_open()) == 1
        assert blocks.open_now(1) is None
        with pytest.raises(InodeStale):
            await blocks.open(NAMESPACE, attr_of(1))

    run(test)


def test_what_is_not_leased_is_not_kept(run: Callable[[Test], None]) -> None:
    async def test(blocks: Blocks, backend: Backend) -> None:
        await use(blocks, 1)
        backend.leased = backend.leases = False
        assert blocks.open_now(1) is None
        await use(blocks, 1)  # the service is asked whether it is still there
        assert (backend.looked_up, backend.opened) == (1, [1, 1])
        assert backend.are_open() == []

    run(test)


def test_who_has_only_listed_a_block_asks_once(run: Callable[[Test], None]) -> None:
    async def test(blocks: Blocks, backend: Backend) -> None:
        backend.leased = False
        for _ in range(3):
            await use(blocks, 1)
        assert (backend.looked_up, backend.opened) == (1, [1])

    run(test)


def test_few_are_kept(run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "MOUNT_IDLE_BLOCKS", 2)

    async def test(blocks: Blocks, backend: Backend) -> None:
        for inode in (1, 2, 1, 3):
            await use(blocks, inode)
        assert len(backend.are_open()) == 2
        for inode in (1, 3):
            await use(blocks, inode)
        assert backend.opened == [1, 2, 3]

    run(test)


def test_a_handle_keeps_what_others_let_go_of(run: Callable[[Test], None]) -> None:
    async def test(blocks: Blocks, backend: Backend) -> None:
        block = await blocks.open(NAMESPACE, attr_of(1))
        assert blocks.open_now(1) is block
        blocks.release(block)
        backend.there.discard(1)
        blocks.idle.drop((1,))
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert os.pread(block.descriptor, 20, 0) == bytes(10)
        blocks.release(block)
        assert backend.are_open() == []

    run(test)


# --- blocks of other hosts


class Elsewhere(Backend):
    """Nothing is on this host; each block is ten bytes of its inode number."""

    def open_sealed(self, chunk: ChunkId, chain: int) -> int:
        raise NoTarget(detail="not here")

    def read_chunks(self, reads: Sequence[ChunkRead]) -> list[None]:
        for read in reads:
            self.opened.append(read.chunk.inode)
            read.view[: read.size] = bytes([read.chunk.inode]) * read.size
        return [None] * len(reads)


def run_elsewhere(tmp_path: Path, test: Callable[[Blocks, Elsewhere], Awaitable[None]]) -> None:
    async def main() -> None:
        backend: Any = Elsewhere(tmp_path / "chunk")
        await test(Blocks(backend), backend)

    trio.run(main)


def holds(descriptor: int) -> tuple[bytes, int]:
    return os.pread(descriptor, 20, 0), os.fstat(descriptor).st_size


def test_the_kernel_reads_what_was_fetched(tmp_path: Path) -> None:
    async def test(blocks: Blocks, backend: Elsewhere) -> None:
        block = await blocks.open(NAMESPACE, attr_of(1))
        assert holds(block.backing) == (b"\1" * 10, 10)
        assert bytes(await blocks.read(block, 4, 100)) == b"\1" * 6
        blocks.release(block)
        again = blocks.open_now(1)
        assert again is block
        assert holds(again.backing) == (b"\1" * 10, 10)
        assert backend.opened == [1]

    run_elsewhere(tmp_path, test)


def test_memory_is_bounded_and_nobody_who_reads_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "MOUNT_BLOCK_BUFFER_BYTES", 25)

    async def test(blocks: Blocks, backend: Elsewhere) -> None:
        first, second, third = [await blocks.open(NAMESPACE, attr_of(i)) for i in (1, 2, 3)]
        # The kernel may keep one of ten bytes, of 25; the second made room for the third.
        assert [b.backing == NO_DESCRIPTOR for b in (first, second, third)] == [False, True, True]
        assert [b.descriptor == NO_DESCRIPTOR for b in (first, second, third)] == [
            False,
            True,
            False,
        ]
        assert bytes(await blocks.read(second, 0, 100)) == b"\2" * 10
        assert backend.opened == [1, 2, 3, 2]
        second.readers += 1
        with trio.move_on_after(5):
            assert bytes(await blocks.read(third, 0, 100)) == b"\3" * 10
        assert second.descriptor != NO_DESCRIPTOR
        second.readers -= 1
        blocks.release(first)
        fourth = await blocks.open(NAMESPACE, attr_of(4))
        assert first.descriptor == NO_DESCRIPTOR  # idle ones go before those that are open
        assert holds(fourth.backing) == (b"\4" * 10, 10)

    run_elsewhere(tmp_path, test)
