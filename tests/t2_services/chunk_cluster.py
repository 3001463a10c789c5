"""Three chunk servers, a fake metadata service and clients in one process, for tests."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvfs_base.os_env import os_env
from kvfs_base.seams import Connection, Disk, Env
from kvfs_base.testing import memory_env
from kvfs_base.types import Address, ChunkId
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkRead, ChunkWrite
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.limits import GARBAGE_SECONDS
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_datapath.testing import FakeMetadata

SECONDS = 60.0
SERVERS = 3


class Cluster:
    """Servers 1 to 3 with one target each, which is also their chain."""

    def __init__(
        self,
        env: Env,
        root: str,
        prefer: str,
        durability: str = "cache",
        garbage_seconds: float = GARBAGE_SECONDS,
        sync_bytes_per_second: int = 0,
    ) -> None:
        self.env = env
        self.root = root
        self.prefer = prefer
        self.durability = durability
        self.garbage_seconds = garbage_seconds
        self.sync_bytes_per_second = sync_bytes_per_second
        self.metadata = FakeMetadata(env, Address.unix(f"{root}/metadata.sock"))
        self.servers: dict[int, ChunkServer] = {}
        self.clients: list[ChunkClient] = []

    def start(self) -> None:
        self.metadata.start()
        for number in range(1, SERVERS + 1):
            server = self.start_server(number)
            self.metadata.wait_for_targets(number)
            # The service knows it; it knows its own number when it has heard the answer.
            wait_until(lambda server=server: all(s.target_id for s in server._targets.stores))

    def start_server(self, number: int) -> ChunkServer:
        config = ChunkServerConfig(
            server_id=f"server-{number}",
            directories=(self.directory(number),),
            metadata=(self.metadata.address,),
            unix=Address.unix(f"{self.root}/server-{number}.sock"),
            tcp=Address.tcp("127.0.0.1", 0),
            durability=self.durability,
            garbage_seconds=self.garbage_seconds,
            sync_bytes_per_second=self.sync_bytes_per_second,
        )
        server = self.servers[number] = ChunkServer(self.env, config)
        server.start()
        return server

    def start_server_again(self, number: int) -> ChunkServer:
        """And waits until clients are told where it is now."""
        server = self.start_server(number)

        def is_known() -> bool:
            beat = self.metadata.beat(number)
            return {beat.unix, beat.tcp} == set(server.addresses)

        self.metadata.wait_for(is_known)
        return server

    def directory(self, number: int) -> str:
        return f"{self.root}/target-{number}"

    def disk(self, number: int) -> Disk:
        return self.env.open_disk(self.directory(number))

    def client(self, prefer: str | None = None) -> ChunkClient:
        client = ChunkClient(self.env, self.metadata, prefer=prefer or self.prefer)
        self.clients.append(client)
        return client

    def connection(self, number: int, kind: str | None = None) -> Connection:
        """A raw one, for what no client of ours would say."""
        wanted = kind or ("tcp" if self.prefer == "tcp" else "unix")
        (address,) = (a for a in self.servers[number].addresses if a.kind == wanted)
        connection = self.env.blocking_network.connect(address, SECONDS)
        connection.set_timeout(SECONDS)
        return connection

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for server in self.servers.values():
            server.stop()
        self.metadata.stop()


@contextlib.contextmanager
def running(kind: str, prefer: str, root: Path, **settings: Any) -> Iterator[Cluster]:
    env = os_env() if kind == "os" else memory_env()[0]
    cluster = Cluster(env, str(root), prefer, **settings)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def pages(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(4096, round_up(size))))


def make_writes(
    sizes: Sequence[int], first_inode: int = 1000, chains: Sequence[int] = (1, 2, 3)
) -> list[ChunkWrite]:
    writes = []
    for place, size in enumerate(sizes):
        view = pages(size)
        view[:size] = os.urandom(size)
        writes.append(
            ChunkWrite(
                chunk=ChunkId(first_inode + place, 0),
                chain=chains[place % len(chains)],
                size=size,
                crc32c=crc32c(view[:size]),
                key=(first_inode + place).to_bytes(32, "big"),
                view=view,
            )
        )
    return writes


def reads_of(writes: Sequence[ChunkWrite]) -> list[ChunkRead]:
    return [ChunkRead(w.chunk, w.chain, w.size, w.crc32c, w.key, pages(w.size)) for w in writes]


def assert_equal(reads: Sequence[ChunkRead], writes: Sequence[ChunkWrite]) -> None:
    for read, write in zip(reads, writes, strict=True):
        assert read.view[: read.size] == write.view[: write.size]


def wait_until(condition: object) -> None:
    """Polls: the other side is a thread that says nothing when it is done."""
    assert callable(condition)
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("waited in vain")
