"""A cluster of chunk servers in memory that keeps the rules of chains and goes wrong on request.

Each server speaks the wire format over MemoryBlockingNetwork. Before it answers it asks its
``script``, which may name a fault: wait, break off in the middle of a payload, send other bytes,
answer with an error, do it and lose the answer. Passing is a call: what a client can see of a chain
is the same.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from kvfs_base import frames
from kvfs_base.cluster import Chain, ClusterMap, Target, TargetState
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ConnectionLost,
    InvalidRequest,
    KvfsError,
    StaleChain,
    TargetFenced,
    WriteUncertain,
)
from kvfs_base.frames import ErrorBody, Kind
from kvfs_base.os_env import SystemClock
from kvfs_base.seams import Connection, Env, Listener
from kvfs_base.testing import memory_env
from kvfs_base.types import Address, ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client import health as health_module
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.wire import receive_body, receive_header, send_message

SECONDS = 60.0
NEVER = 1e6
"""Seconds."""
HERE = "host-a"


@dataclasses.dataclass
class Fault:
    """What a server does with one request instead of answering it as it should."""

    error: KvfsError | None = None
    """The answer."""
    wait: threading.Event | None = None
    """For this first (or the end of the server)."""
    lose: bool = False
    """Breaks off before the request is carried out."""
    lose_answer: bool = False
    """Breaks off afterwards."""
    cut: int | None = None
    """Breaks off after so many bytes of the payload."""
    flip: bool = False
    """The payload is wrong in one bit."""


Script = Callable[[m.ChunkRequest], Fault | None]


@dataclasses.dataclass
class Stored:
    data: bytes
    info: ChunkInfo


class FakeServer:
    """One target. ``requests`` lists what was asked, ``chunks`` is what it has."""

    def __init__(self, cluster: FakeCluster, target_id: int, host: str) -> None:
        self.cluster = cluster
        self.target_id = target_id
        self.host = host
        self.chunks: dict[ChunkId, Stored] = {}
        self.requests: list[m.ChunkRequest] = []
        self.script: Script = lambda request: None
        self.remembered: dict[tuple[ChunkId, int, int], ChunkInfo] = {}
        self.state = TargetState.SERVING
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []

    # --- life

    def start(self) -> None:
        self.stopping.clear()
        network = self.cluster.env.blocking_network
        for address in (self.tcp, self.unix):
            listener = network.listen(address)
            self._listeners.append(listener)
            self._spawn(self._accept, listener)

    def stop(self) -> None:
        self.stopping.set()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        with self._lock:
            connections, self._connections = self._connections, []
            running, self._threads = self._threads, []
        for connection in connections:
            connection.shutdown()
        for thread in running:
            thread.join(SECONDS)
            assert not thread.is_alive()

    @property
    def tcp(self) -> Address:
        return Address.tcp("127.0.0.1", 6000 + self.target_id)

    @property
    def unix(self) -> Address:
        return Address.unix(f"/fake/{self.target_id}.sock")

    def _spawn(self, target: Callable[[Any], None], argument: object) -> None:
        thread = threading.Thread(target=target, args=(argument,), daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = listener.accept()
            except ConnectionLost:
                return
            with self._lock:
                self._connections.append(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        decoder = msgspec.msgpack.Decoder(m.DataRequest)
        staged: dict[int, int] = {}
        try:
            while not self.stopping.is_set():
                header = receive_header(connection)
                request = decoder.decode(receive_body(connection, header))
                payload = bytearray(header.payload_bytes)
                if payload:
                    connection.receive_into([memoryview(payload)])
                self._answer(connection, header.request_id, request, bytes(payload), staged)
        except KvfsError:
            pass
        finally:
            connection.close()
            for descriptor in staged.values():
                os.close(descriptor)

    def _answer(
        self,
        connection: Connection,
        number: int,
        request: m.ChunkRequest,
        payload: bytes,
        staged: dict[int, int],
    ) -> None:
        with self._lock:
            self.requests.append(request)
        fault = self.script(request) or Fault()
        if fault.wait is not None:
            while not fault.wait.wait(0.01) and not self.stopping.is_set():
                pass
        if fault.lose:
            raise ConnectionLost
        try:
            if fault.error is not None:
                raise fault.error
            with self.cluster.lock:
                reply, out, descriptors = self._do(request, payload, staged)
        except KvfsError as exc:
            connection.send([frames.encode_error(number, exc)])
            return
        if fault.lose_answer:
            raise ConnectionLost
        if fault.flip and out:
            out = bytes([out[0] ^ 1]) + out[1:]
        sent = out if fault.cut is None else out[: fault.cut]
        send_message(
            connection, Kind.REPLY, number, reply, payload_bytes=len(out), descriptors=descriptors
        )
        for descriptor in descriptors:
            if descriptor not in staged.values():
                os.close(descriptor)
        if sent:
            connection.send([sent])
        if fault.cut is not None:
            raise ConnectionLost

    def named(self, kind: type[m.ChunkRequest]) -> list[Any]:
        """The requests of one kind so far."""
        with self._lock:
            return [request for request in self.requests if isinstance(request, kind)]

    # --- requests

    def _do(
        self, request: Any, payload: bytes, staged: dict[int, int]
    ) -> tuple[Any, bytes, list[int]]:
        onward = getattr(request, "onward", None)
        if onward is not None:
            head = self.cluster.servers[onward.head].reached()
            asked = msgspec.structs.replace(request, target_id=onward.head, onward=None)
            return head._do(asked, payload, staged)
        match request:
            case m.ReadChunks():
                return *self._read_whole(request), []
            case m.ReadPieces():
                reply, out = self._read([(p.chunk, p.offset, p.length) for p in request.pieces])
                if request.summed:
                    (_,) = request.pieces
                    reply = msgspec.structs.replace(reply, sums=(crc32c(out),))
                return reply, out, []
            case m.OpenChunks():
                return self._open(request)
            case m.WriteChunks():
                return self._write(request, payload), b"", []
            case m.StageChunks():
                made = {len(staged) + n + 1: os.memfd_create("fake") for n in range(request.count)}
                staged.update(made)
                return m.Staged(tuple(made)), b"", list(made.values())
            case m.PublishChunks():
                return self._publish(request, staged), b"", []
            case m.StatChunks():
                reply, _ = self._read([(c.chunk, 0, 0) for c in request.chunks])
                return reply, b"", []
            case m.UpdateChunks():
                return self._update(request, payload), b"", []
            case m.RemoveRange():
                return self._remove(request), b"", []
            case m.SyncChunks():
                self._check(request.passing)
                return m.Outcomes((None,) * len(request.chunks), {}), b"", []
            case m.RepairChunks():
                return self._repair(request), b"", []
            case m.CheckChunks():
                return self._each(request.chunks, self._recheck), b"", []
        raise InvalidRequest(detail=type(request).__name__)

    def _check(self, passing: m.Passing | None) -> Chain | None:
        """As every member does: version, membership, hops."""
        if passing is None:
            return None
        chain = self.cluster.chain(passing.chain)
        if passing.version != chain.version:
            raise StaleChain(chain=chain.chain_id, version=chain.version)
        if not {self.target_id, *passing.hops} <= set(chain.members):
            raise InvalidRequest(detail="not a member")
        return chain

    def _each(self, items: Sequence[Any], act: Callable[[Any], ChunkInfo | None]) -> m.Outcomes:
        infos: list[ChunkInfo | None] = []
        errors: dict[int, ErrorBody] = {}
        for index, item in enumerate(items):
            try:
                infos.append(act(item))
            except KvfsError as exc:
                infos.append(None)
                errors[index] = ErrorBody(exc.wire_code, exc.wire_data())
        return m.Outcomes(tuple(infos), errors)

    def find(self, chunk: ChunkId) -> Stored:
        chain = self.cluster.chains.get(chunk.chain)
        if chunk.chain and chain is not None and self.target_id not in chain.targets:
            raise TargetFenced(target_id=self.target_id)
        found = self.chunks.get(chunk)
        if found is None:
            raise ChunkNotFound(*chunk)
        return found

    def _recheck(self, ref: m.ChunkRef) -> ChunkInfo:
        stored = self.find(ref.chunk)
        if crc32c(stored.data) != stored.info.crc32c:
            raise ChunkCorrupt(*ref.chunk)
        return stored.info

    def _read(self, pieces: Sequence[tuple[ChunkId, int, int]]) -> tuple[m.Outcomes, bytes]:
        parts: list[bytes] = []

        def read(piece: tuple[ChunkId, int, int]) -> ChunkInfo:
            chunk, offset, length = piece
            stored = self.find(chunk)
            parts.append(stored.data[offset : offset + length])
            return stored.info

        return self._each(pieces, read), b"".join(parts)

    def _read_whole(self, request: m.ReadChunks) -> tuple[m.Outcomes, bytes]:
        parts: list[bytes] = []

        def read(wanted: m.WholeChunk) -> None:
            stored = self.find(wanted.chunk)
            difference = wanted.difference(stored.info)
            if difference:
                raise ChunkMismatch(*wanted.chunk, detail=difference)
            parts.append(stored.data[: wanted.size])

        errors = self._each(request.chunks, read).errors
        return m.Outcomes((), errors), b"".join(parts)

    def _open(self, request: m.OpenChunks) -> tuple[Any, bytes, list[int]]:
        descriptors: list[int] = []

        def open_one(ref: m.ChunkRef) -> ChunkInfo:
            stored = self.find(ref.chunk)
            if request.verify and crc32c(stored.data) != stored.info.crc32c:
                raise ChunkCorrupt(*ref.chunk)
            writable = os.memfd_create("fake")
            os.write(writable, stored.data)
            descriptors.append(os.open(f"/proc/self/fd/{writable}", os.O_RDONLY))
            os.close(writable)
            return stored.info

        return self._each(request.chunks, open_one), b"", descriptors

    def _write(self, request: m.WriteChunks, payload: bytes) -> m.Outcomes:
        self._check(request.passing)
        hops = () if request.passing is None else request.passing.hops
        offset = 0

        def write(new: m.WholeChunk) -> None:
            nonlocal offset
            data = payload[offset : offset + new.size]
            offset += new.size
            self.take(new, data)
            for hop in hops:
                self.cluster.servers[hop].reached().take(new, data)

        return self._each(request.chunks, write)

    def reached(self) -> FakeServer:
        """By another server."""
        if self.stopping.is_set():
            raise ConnectionLost(address=str(self.tcp))
        return self

    def take(self, new: m.WholeChunk, data: bytes) -> None:
        if crc32c(data) != new.crc32c:
            raise ChunkCorrupt(*new.chunk)
        self.chunks[new.chunk] = Stored(data, _info(new))

    def _publish(self, request: m.PublishChunks, staged: dict[int, int]) -> m.Outcomes:
        self._check(request.passing)

        def publish(item: m.StagedItem) -> None:
            descriptor = staged.pop(item.token)
            data = os.pread(descriptor, item.chunk.size, 0)
            os.close(descriptor)
            self.chunks[item.chunk.chunk] = Stored(data, _info(item.chunk))

        for token in request.discard:
            os.close(staged.pop(token))
        return self._each(request.chunks, publish)

    def _update(self, request: m.UpdateChunks, payload: bytes) -> m.Outcomes:
        chain = self._check(request.passing)
        assert chain is not None
        if chain.targets[0] != self.target_id:
            raise StaleChain(chain=chain.chain_id, version=chain.version)
        offset = 0

        def update(item: m.Update) -> ChunkInfo:
            nonlocal offset
            data = payload[offset : offset + item.length]
            offset += item.length
            if crc32c(data) != item.crc32c:
                raise ChunkCorrupt(item.inode, item.number, chain.chain_id)
            return self.apply(chain, item, data)

        return self._each(request.updates, update)

    def apply(self, chain: Chain, item: m.Update, data: bytes) -> ChunkInfo:
        """One update, at every member; refused if one cannot be reached."""
        chunk = ChunkId(item.inode, item.number, chain.chain_id)
        known = self.remembered.get((chunk, item.writer, item.sequence))
        if known is not None:
            return known
        before = self.chunks.get(chunk)
        version = 0 if before is None else before.info.version
        if item.again and item.base != version:
            raise WriteUncertain(*chunk)
        old = b"" if before is None else before.data
        if item.cut:
            new = old[: item.offset]
        else:
            new = old.ljust(item.offset, b"\0")
            new = new[: item.offset] + data + new[item.offset + len(data) :]
        info = ChunkInfo(
            *chunk,
            state=ChunkState.SEALED,
            length=len(new),
            crc32c=crc32c(new),
            version=version + 1,
            writer=item.writer,
            sequence=item.sequence,
        )
        for target_id in reversed(chain.members):
            server = self.cluster.servers[target_id].reached()
            server.chunks[chunk] = Stored(new, info)
            server.remembered[chunk, item.writer, item.sequence] = info
        return info

    def _remove(self, request: m.RemoveRange) -> m.Outcomes:
        chain = self._check(request.passing)
        assert chain is not None
        for chunk in list(self.chunks):
            inside = request.first <= chunk.number < request.end
            if chunk.inode == request.inode and chunk.chain == chain.chain_id and inside:
                number = (request.writer, request.sequence)
                self.apply(chain, m.Update(*chunk[:2], 0, 0, 0, *number, cut=True), b"")
        return m.Outcomes((), {})

    def _repair(self, request: m.RepairChunks) -> m.Outcomes:
        def repair(ref: m.ChunkRef) -> ChunkInfo | None:
            for target_id in self.cluster.chain(ref.chain).targets:
                stored = self.cluster.servers[target_id].chunks.get(ref.chunk)
                if stored is not None and crc32c(stored.data) == stored.info.crc32c:
                    self.chunks[ref.chunk] = stored
                    return stored.info
            raise ChunkMismatch(*ref.chunk)

        return self._each(request.chunks, repair)


def _info(new: m.WholeChunk) -> ChunkInfo:
    return ChunkInfo(
        *new.chunk, state=ChunkState.SEALED, length=new.size, crc32c=new.crc32c, key=new.key
    )


class FakeCluster:
    """Targets 1 to ``count``, and the chains that tests make. Is the ClusterSource of its clients:
    ``current`` is the map as it was at the last ``refresh``."""

    def __init__(self, count: int = 3, local: Sequence[int] = ()) -> None:
        """``local``: targets on the clients' host."""
        env, _ = memory_env(seed=5, host_id=HERE)
        self.env: Env = dataclasses.replace(env, clock=SystemClock())
        self.lock = threading.Lock()
        self.servers = {
            n: FakeServer(self, n, HERE if n in local else f"host-{n}") for n in range(1, count + 1)
        }
        self.chains: dict[int, Chain] = {}
        self.version = 1
        self.refreshes = 0
        self._seen: ClusterMap | None = None
        self.clients: list[ChunkClient] = []

    def start(self) -> None:
        for server in self.servers.values():
            server.start()

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for server in self.servers.values():
            server.stop()

    def client(self, prefer: str = "auto", *, hedges: bool = False) -> ChunkClient:
        """Without ``hedges`` it waits for the server that it asked: which ones are asked, and how
        often, does not depend on how busy the machine is."""
        client = ChunkClient(self.env, self, prefer=prefer)
        if not hedges:
            client.shared.health.bound = lambda *_: NEVER  # type: ignore[method-assign]
        self.clients.append(client)
        return client

    def set_chain(
        self, chain_id: int, targets: Sequence[int], syncing: Sequence[int] = (), copies: int = 0
    ) -> Chain:
        """Makes the chain, or changes its members: one version more."""
        before = self.chains.get(chain_id)
        version = 1 if before is None else before.version + 1
        copies = copies or (len(targets) if before is None else before.copies)
        chain = Chain(chain_id, version, tuple(targets), copies, tuple(syncing))
        self.chains[chain_id] = chain
        self.version += 1
        return chain

    def chain(self, chain_id: int) -> Chain:
        return self.chains[chain_id]

    # --- the cluster's map

    def current(self) -> ClusterMap:
        return self.refresh() if self._seen is None else self._seen

    def refresh(self) -> ClusterMap:
        self.refreshes += 1
        targets = tuple(
            Target(n, f"server-{n}", s.host, s.unix, s.tcp, s.state, 1 << 40, 1 << 39)
            for n, s in self.servers.items()
        )
        self._seen = ClusterMap(self.version, targets, tuple(self.chains.values()))
        return self._seen

    # --- what tests look at

    def everywhere(self, chunk: ChunkId) -> Iterator[tuple[int, Stored | None]]:
        """What each member of the chunk's chain has."""
        for target_id in self.chain(chunk.chain).members:
            yield target_id, self.servers[target_id].chunks.get(chunk)


def first(times: int, fault: Fault, kind: type[m.ChunkRequest] = m.ChunkRequest) -> Script:
    """``fault`` for the first requests of a kind."""
    left = [times]

    def script(request: m.ChunkRequest) -> Fault | None:
        if not isinstance(request, kind) or left[0] <= 0:
            return None
        left[0] -= 1
        return fault

    return script


def always(fault: Fault, kind: type[m.ChunkRequest] = m.ChunkRequest) -> Script:
    return lambda request: fault if isinstance(request, kind) else None


def avoid_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that failed is asked last, however long the test takes."""
    for name in ("AVOID_SECONDS", "AVOID_SECONDS_MAX"):
        monkeypatch.setattr(health_module, name, NEVER)
