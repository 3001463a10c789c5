"""One server, several targets: a disk that fails does not take the others with it."""

from __future__ import annotations

import os

import pytest

from kvfs_base.errors import DiskFull, NoTarget, TargetFailed
from kvfs_base.os_disk import disk_error
from kvfs_base.seams import Env
from kvfs_base.testing import MemoryDisk, memory_env
from kvfs_base.types import Address
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkWrite
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_datapath.testing import FakeMetadata
from t2_services.chunk_cluster import make_writes, reads_of, wait_until

DIRECTORIES = ("/disk-1", "/disk-2", "/disk-3")
FAULTS: dict[str, Exception] = {
    "eio": TargetFailed(detail="Input/output error"),
    "read-only": disk_error(OSError(30, os.strerror(30)), "chunks"),
    "full": DiskFull(path="chunks"),
}


class World:
    def __init__(self) -> None:
        self.env: Env = memory_env()[0]
        self.metadata = FakeMetadata(self.env, Address.unix("/metadata"))
        self.metadata.start()
        self.client = ChunkClient(self.env, self.metadata, prefer="tcp")
        self.server: ChunkServer | None = None

    def start(self) -> ChunkServer:
        config = ChunkServerConfig(
            server_id="server",
            directories=DIRECTORIES,
            metadata=(self.metadata.address,),
            unix=None,
            tcp=Address.tcp("127.0.0.1", 0),
        )
        self.server = server = ChunkServer(self.env, config)
        server.start()
        self.metadata.wait_for_targets(3)
        wait_until(lambda: server.statistics()["heartbeats"] >= 1)
        return server

    def disk(self, number: int) -> MemoryDisk:
        disk = self.env.open_disk(DIRECTORIES[number - 1])
        assert isinstance(disk, MemoryDisk)
        return disk

    def break_disk(self, number: int, error: Exception) -> None:
        """Whatever writes fails."""

        def before(operation: str, path: str) -> None:
            if operation in ("pwritev", "set_attribute", "truncate", "make_directory", "sync"):
                raise error.with_traceback(None)

        self.disk(number).before = before

    def mend(self, number: int) -> None:
        self.disk(number).before = lambda operation, path: None

    def write(self, first_inode: int) -> tuple[list[ChunkWrite], list[type]]:
        """One block on each target."""
        writes = make_writes([5_000] * 3, first_inode=first_inode)
        return writes, [type(result) for result in self.client.write_chunks(writes)]

    def read(self, writes: list[ChunkWrite]) -> list[type]:
        return [type(result) for result in self.client.read_chunks(reads_of(writes))]

    def close(self) -> None:
        self.client.close()
        if self.server is not None:
            self.server.stop()
        self.metadata.stop()


FINE = type(None)


@pytest.mark.logs_warnings
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_fails_at_work(fault: str) -> None:
    world = World()
    try:
        server = world.start()
        before, results = world.write(100)
        assert results == [FINE] * 3
        world.break_disk(2, FAULTS[fault])
        lost, results = world.write(200)
        wanted = DiskFull if fault == "full" else TargetFailed
        assert results == [FINE, wanted, FINE]
        world.mend(2)  # a later success would mean nothing
        if fault == "full":
            assert world.read(before) == [FINE] * 3
            assert world.read(lost)[1] is not FINE
            assert world.write(300)[1] == [FINE] * 3
            assert server.statistics()["failed_targets"] == 0
            return
        world.metadata.wait_until_unhealthy(2)
        assert world.read(before) == [FINE, NoTarget, FINE]
        assert world.write(300)[1] == [FINE, NoTarget, FINE]
        assert server.statistics()["failed_targets"] == 1
    finally:
        world.close()


@pytest.mark.logs_warnings
@pytest.mark.parametrize("fault", ["eio", "read-only"])
def test_a_disk_has_failed_before_the_server_starts(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its server starts, says so, and serves the other targets."""
    world = World()
    try:
        world.start()
        before, _ = world.write(100)
        assert world.server is not None
        world.server.stop()
        world.metadata.take_offline(2)  # what the real service does once its lease is over
        world.break_disk(2, FAULTS[fault])
        server = world.start()
        assert "target /disk-2 is out of service" in caplog.text
        assert str(FAULTS[fault].detail) in caplog.text  # type: ignore[attr-defined]
        assert server.statistics()["failed_targets"] == 1
        assert world.read(before) == [FINE, NoTarget, FINE]
        world.server.stop()
        world.mend(2)
        world.metadata.take_offline()
        server = world.start()
        assert world.read(before) == [FINE] * 3
        assert server.statistics()["failed_targets"] == 0
    finally:
        world.close()


@pytest.mark.logs_warnings
def test_a_server_without_any_disk_does_not_start() -> None:
    world = World()
    try:
        for number in (1, 2, 3):
            world.break_disk(number, FAULTS["eio"])
        with pytest.raises(TargetFailed):
            world.start()
    finally:
        world.close()


def test_a_full_disk_of_an_older_server_can_still_be_opened() -> None:
    """Its new format cannot be written down yet."""
    world = World()
    try:
        world.start()
        before, _ = world.write(100)
        assert world.server is not None
        world.server.stop()
        disk = world.disk(2)
        file = disk.open("target.json", write=True)
        view = memoryview(bytearray(file.size()))
        file.preadv([view], 0)
        file.pwritev([bytes(view).replace(b'"format":2', b'"format":1')], 0)
        file.close()
        disk.before = _refuse_to_write
        world.start()
        assert world.read(before) == [FINE] * 3
        assert world.write(200)[1] == [FINE, DiskFull, FINE]
    finally:
        world.close()


def _refuse_to_write(operation: str, path: str) -> None:
    if operation == "pwritev":
        raise DiskFull(path=path)
