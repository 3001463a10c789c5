"""Disks, stores and engines for tests; a module may have its own instead."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs_base.os_disk import OsDisk
from kvfs_base.os_env import os_env
from kvfs_base.seams import Disk
from kvfs_base.testing import MemoryDisk
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_gds import load as load_module
from kvfs_metadata.engines.postgres_engine import PostgresEngine
from loader_rig import Rig
from t1_stores.chain_chunks import open_store


@pytest.fixture(params=["os-disk", "os-tmpfs", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "memory":
        yield MemoryDisk()
    elif request.param == "os-disk":
        (tmp_path / "target").mkdir()
        yield OsDisk(str(tmp_path / "target"))
    else:
        directory = tempfile.mkdtemp(dir="/dev/shm")
        yield OsDisk(directory)
        shutil.rmtree(directory)


@pytest.fixture
def store(disk: Disk, tmp_path: Path) -> Iterator[ChunkStore]:
    """Strict where syncing costs nothing."""
    store = open_store(disk, strict=not (tmp_path / "target").exists())
    yield store
    store.close()


@pytest.fixture
def engines(postgres_url: str) -> Iterator[Callable[..., PostgresEngine]]:
    """Makes engines of one store."""
    made: list[PostgresEngine] = []

    def make(url: str = postgres_url, **options: object) -> PostgresEngine:
        made.append(PostgresEngine(os_env(), url, **options))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for engine in made:
            engine.close()


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader queues layers of a few KiB as if they were long."""
    monkeypatch.setattr(load_module, "LOADER_AT_ONCE_BYTES", 0)
    monkeypatch.setattr(load_module, "LOADER_FIRST_RUN_BYTES", 0)
    monkeypatch.setattr(load_module, "LOADER_RUN_BYTES", 0)


@pytest.fixture
def rig(short_runs: None) -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()
    assert made.namespace.leased_bytes == 0
