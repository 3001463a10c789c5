"""Blocks: the ones of a KV namespace beside the chunk files that they lie in, and block-sized
ordinary files as engines' file tiers write and read them."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import kvfs
from kvfs import KVLayout
from kvfs_base.limits import KIB, MIB
from kvfs_tools.cluster import LocalCluster
from kvfs_tools.mount_rows import Comparison, Sample, have_memory, timed
from kvfs_tools.mount_systems import System

NAMESPACE = "bench/mount"


def store_blocks(cluster: LocalCluster, count: int, block_bytes: int) -> list[Path]:
    """The files that the blocks lie in."""
    with kvfs.connect(cluster.endpoint("agent")) as client:
        layout = KVLayout(block_tokens=1)
        namespace = client.namespace(NAMESPACE, layout=layout, create=True)
        for number in range(count):
            keys = kvfs.block_keys(range(1), 1, salt=b"mount%d" % number)
            namespace.put(keys, [os.urandom(block_bytes)])
    found = cluster.directory.glob("targets/*/chunks/*/*")
    return [path for path in found if path.stat().st_size == block_bytes]


class KvBlocks:
    """Blocks of a namespace through each front end of kvfs; the limit are their chunk files."""

    def __init__(
        self, comparison: Comparison, systems: Sequence[System], chunk_files: list[Path]
    ) -> None:
        self._comparison = comparison
        self._systems = systems
        self._names = {s.name: sorted((s.mountpoint / "kv" / NAMESPACE).iterdir()) for s in systems}
        self._names[comparison.plain.name] = chunk_files
        self._rng = random.Random(1)

    def run(self) -> None:
        add, systems = self._comparison.add, self._systems
        add("KV blocks, read, 4 KiB at random", "GB/s", systems, lambda s: self._read(s, 4 * KIB))
        add("KV blocks, read, 1 MiB in a row", "GB/s", systems, lambda s: self._read(s, MIB))
        add(
            "KV blocks, read, O_DIRECT, 1 MiB",
            "GB/s",
            systems,
            lambda s: self._read(s, MIB, os.O_DIRECT),
        )
        add("KV blocks, open, read, close", "/s", systems, self._whole)

    def _opened(self, system: System, flags: int = 0) -> list[int]:
        """Descriptors of all blocks, none of whose pages the mount has cached; the chunk files'
        own pages stay."""
        descriptors = [os.open(path, os.O_RDONLY | flags) for path in self._names[system.name]]
        if system is not self._comparison.plain:
            for descriptor in descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptors

    def _read(self, system: System, size: int, flags: int = 0) -> Sample:
        descriptors = self._opened(system, flags)
        block_bytes = os.fstat(descriptors[0]).st_size
        places = [(d, at) for d in descriptors for at in range(0, block_bytes, size)]
        if size < MIB:
            self._rng.shuffle(places)
        try:
            with mmap.mmap(-1, size) as room, timed(system) as timer:
                for descriptor, at in places:
                    if os.preadv(descriptor, [room], at) != min(size, block_bytes - at):
                        raise RuntimeError("a short read")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return Sample.of(len(descriptors) * block_bytes, timer)

    def _whole(self, system: System) -> Sample:
        for descriptor in self._opened(system):
            os.close(descriptor)
        paths = self._names[system.name]
        room = bytearray(paths[0].stat().st_size)
        with timed(system) as timer:
            for path in paths:
                read_whole(path, room)
        return Sample.of(len(paths), timer)


class BlockFiles:
    """Ordinary files of the size of a block: written under another name and renamed, read whole."""

    def __init__(
        self, comparison: Comparison, systems: Sequence[System], count: int, block_bytes: int
    ) -> None:
        self._comparison = comparison
        self._systems = systems
        self._count = count
        self._data = os.urandom(block_bytes)
        self._turns = itertools.count()

    def prepare(self) -> None:
        """The files that are read."""
        for system in (self._comparison.plain, *self._systems):
            self._write_to(system.path / "blocks")

    def run(self) -> None:
        add, systems = self._comparison.add, self._systems
        add("block files, create, write, rename", "/s", systems, self._write)
        add("block files, open, read, close", "/s", systems, self._read)

    def _write(self, system: System) -> Sample:
        folder = system.path / f"blocks-{next(self._turns)}"
        have_memory(2 * self._count * len(self._data))
        with timed(system) as timer:
            self._write_to(folder)
        shutil.rmtree(folder)
        return Sample.of(self._count, timer)

    def _write_to(self, folder: Path) -> None:
        folder.mkdir()
        for number in range(self._count):
            path = f"{folder}/{number:06d}"
            descriptor = os.open(f"{path}.tmp", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            if os.write(descriptor, self._data) != len(self._data):
                raise RuntimeError(f"a short write of {path}")
            os.close(descriptor)
            os.rename(f"{path}.tmp", path)

    def _read(self, system: System) -> Sample:
        room = bytearray(len(self._data))
        paths = [system.path / "blocks" / f"{number:06d}" for number in range(self._count)]
        with timed(system) as timer:
            for path in paths:
                read_whole(path, room)
        return Sample.of(self._count, timer)


def read_whole(path: Path, room: bytearray) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.readv(descriptor, [room]) != len(room):
            raise RuntimeError(f"a short read of {path}")
    finally:
        os.close(descriptor)


__all__ = ["BlockFiles", "KvBlocks", "store_blocks"]
