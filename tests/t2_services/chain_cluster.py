"""Chunk servers whose targets are members of chains of several copies, and raw requests to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from kvfs_base.cluster import Chain, Synced
from kvfs_base.errors import ConnectionLost, KvfsError
from kvfs_base.frames import ErrorBody
from kvfs_base.rpc import Request
from kvfs_base.seams import Buffer
from kvfs_base.testing import ManualClock, MemoryBlockingNetwork, MemoryDisk, memory_env
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chains import replication as replication_module
from kvfs_datapath.chains.peers import Peers, Unreached
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.format import ChunkInfo, path_of
from kvfs_datapath.server.chunk_server import ChunkServer
from t2_services.chunk_cluster import SECONDS, Cluster, wait_until

CHAIN = 100


class ChainCluster(Cluster):
    """Servers 1 to 3; chain 100 is theirs as tests set it."""

    clock: ManualClock
    servers: dict[int, ChunkServer]

    def set_chain(
        self, targets: Sequence[int], syncing: Sequence[int] = (), offline: Sequence[int] = ()
    ) -> Chain:
        """And waits until every server knows it, those that are out of it now included: in truth
        they are waited for as well, or for the end of their lease."""
        chain = self.metadata.set_chain(CHAIN, targets, syncing, offline)
        for number in self.servers:
            wait_until(lambda n=number: self.knows(n, chain.version))
        return chain

    def knows(self, number: int, version: int, chain_id: int = CHAIN) -> bool:
        server = self.servers[number]
        server._chains.views.wake()
        chain = server._chains.views.chain(chain_id)
        return chain is not None and chain.version >= version

    def may_act(self, number: int) -> bool:
        """The server has a lease."""
        try:
            self.servers[number]._chains.views.place(self.store(number), CHAIN)
        except KvfsError:
            return False
        return True

    def chain(self) -> Chain:
        (chain,) = (c for c in self.metadata.current().chains if c.chain_id == CHAIN)
        return chain

    def store(self, number: int) -> ChunkStore:
        (store,) = self.servers[number]._targets.stores
        return store

    def memory_disk(self, number: int) -> MemoryDisk:
        disk = self.disk(number)
        assert isinstance(disk, MemoryDisk)
        return disk

    def stop_server(self, number: int) -> None:
        self.servers.pop(number).stop()

    # --- requests

    def call(
        self,
        number: int,
        request: Request,
        payload: Sequence[Buffer] = (),
        into: Any = None,
        kind: str | None = None,
    ) -> Any:
        connection = DataConnection(self.connection(number, kind))
        try:
            return connection.call(request, payload, into)
        finally:
            connection.close()

    def passing(self, *hops: int, version: int | None = None) -> m.Passing:
        return m.Passing(CHAIN, self.chain().version if version is None else version, hops)

    def update(
        self, head: int, *updates: m.Update, data: Sequence[bytes], version: int | None = None
    ) -> m.Outcomes:
        request = m.UpdateChunks(head, self.passing(version=version), updates)
        outcomes: m.Outcomes = self.call(head, request, list(data))
        return outcomes

    def write(
        self,
        head: int,
        data: bytes,
        *,
        inode: int = 7,
        number: int = 0,
        offset: int = 0,
        sequence: int = 0,
        writer: int = 1,
        again: bool = False,
        base: int | None = None,
        version: int | None = None,
    ) -> ChunkInfo:
        """One update. Raises what it is answered."""
        update = m.Update(
            inode, number, offset, len(data), crc32c(data), writer, sequence, False, again, base
        )
        return only(self.update(head, update, data=[data], version=version))

    def read(self, number: int, *, inode: int = 7, chunk: int = 0) -> bytes:
        """A whole file chunk, of one member. Raises what it answers."""
        ref = ChunkId(inode, chunk, CHAIN)
        memory = memoryview(bytearray(1 << 20))
        found: list[memoryview] = []

        def into(outcomes: m.Outcomes) -> list[memoryview]:
            (info,) = outcomes.infos
            found.extend([memory[: info.length]] if info is not None else [])
            return found

        request = m.ReadPieces(number, (m.Piece(*ref, 0, len(memory)),))
        only(self.call(number, request, into=into))
        return bytes(found[0])

    def stat(self, number: int, chunk: ChunkId) -> ChunkInfo:
        return only(self.call(number, m.StatChunks(number, (m.ChunkRef(*chunk),))))

    def committed(self, number: int, *, inode: int = 7, chunk: int = 0) -> ChunkInfo | None:
        """What lies on the disk, whoever may be asked for it."""
        return self.store(number).versions.committed(ChunkId(inode, chunk, CHAIN))

    def pending(self, number: int, *, inode: int = 7, chunk: int = 0) -> ChunkInfo | None:
        return self.store(number).versions.pending(ChunkId(inode, chunk, CHAIN))

    def put_blocks(
        self, first: int, hops: Sequence[int], blocks: dict[int, bytes], version: int | None = None
    ) -> list[KvfsError | None]:
        chunks = tuple(new_block(inode, data) for inode, data in blocks.items())
        request = m.WriteChunks(first, chunks, self.passing(*hops, version=version))
        outcomes: m.Outcomes = self.call(first, request, list(blocks.values()))
        return [outcomes.error(index) for index in range(len(blocks))]

    def get_block(self, number: int, inode: int, wanted: bytes) -> bytes:
        memory = bytearray(len(wanted))

        def into(outcomes: m.Outcomes) -> list[memoryview]:
            return [] if outcomes.errors else [memoryview(memory)]

        request = m.ReadChunks(number, (new_block(inode, wanted),))
        error = self.call(number, request, into=into).error(0)
        if error is not None:
            raise error.with_traceback(None)
        return bytes(memory)


def new_block(inode: int, data: bytes) -> m.WholeChunk:
    return m.WholeChunk(inode, 0, CHAIN, len(data), crc32c(data), inode.to_bytes(32, "big"))


def quiet(cluster: ChainCluster, *members: int) -> Callable[[], bool]:
    """Whether nothing is pending on any of these."""
    return lambda: all(cluster.pending(n) is None for n in members)


def only(outcomes: m.Outcomes) -> ChunkInfo:
    """The info of a request with one item. Raises its error."""
    error = outcomes.error(0)
    if error is not None:
        raise error.with_traceback(None)
    info = outcomes.infos[0]
    assert info is not None
    return info


class Cut:
    """Servers that cannot be reached, in a network in memory."""

    def __init__(self, network: MemoryBlockingNetwork) -> None:
        self._network = network
        self._gone: dict[Any, Any] = {}

    def off(self, server: ChunkServer) -> None:
        """Nobody connects to it any more; its threads and its own connections stay."""
        for address in server.addresses:
            self._gone[address] = self._network.listeners.pop(address)
        for connection in list(server._connections):
            connection.shutdown()

    def on(self, server: ChunkServer) -> None:
        for address in server.addresses:
            self._network.listeners[address] = self._gone.pop(address)


@contextlib.contextmanager
def answers_get_lost(cluster: ChainCluster, number: int) -> Iterator[None]:
    """What this server passes on arrives, but it does not hear of it."""
    peers = cluster.servers[number]._chains.peers
    call = peers.call

    def lose(target_id: int, request: Any, *args: Any, **named: Any) -> Any:
        answer = call(target_id, request, *args, **named)
        if isinstance(request, m.PassUpdate):
            raise Unreached(target_id, ConnectionLost(detail="lost by the test"))
        return answer

    peers.call = lose  # type: ignore[method-assign]
    try:
        yield
    finally:
        peers.call = call  # type: ignore[method-assign]


def wait_for_sync(cluster: ChainCluster, target: int) -> None:
    wanted = Synced(CHAIN, cluster.chain().version, target)
    cluster.metadata.wait_for(lambda: wanted in cluster.metadata.synced())


def rot(cluster: ChainCluster, number: int, chunk: ChunkId, offset: int = 0) -> None:
    file = cluster.disk(number).open(path_of(chunk), write=True)
    byte = memoryview(bytearray(1))
    file.preadv([byte], offset)
    file.pwritev([bytes([byte[0] ^ 1])], offset)
    file.close()


def payload(size: int) -> bytes:
    return os.urandom(size)


@contextlib.contextmanager
def patient_members() -> Iterator[None]:
    """Members wait for each other, and for chunks, as long as tests do: what they are told within
    four seconds depends on the machine."""
    assert Peers.call.__kwdefaults__ is not None
    with (
        mock.patch.dict(Peers.call.__kwdefaults__, seconds=SECONDS),
        mock.patch.object(replication_module, "CHUNK_LOCK_SECONDS", SECONDS),
    ):
        yield


@contextlib.contextmanager
def chains(root: Path, **settings: Any) -> Iterator[ChainCluster]:
    env, clock = memory_env()
    cluster = ChainCluster(env, str(root), "tcp", **settings)
    cluster.clock = clock
    with patient_members():
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


__all__ = [
    "CHAIN",
    "ChainCluster",
    "Cut",
    "ErrorBody",
    "answers_get_lost",
    "chains",
    "new_block",
    "only",
    "payload",
    "rot",
    "wait_for_sync",
]
