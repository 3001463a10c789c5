"""The node agent's server: one thread a connection, blocking sockets.

Threads, because a call through an event loop costs more than the whole budget of a batch (160 us
against 23 us, measured on two cores), and because what a request waits for is disks and sockets,
where the interpreter's lock is free.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from kvfs.agent.backends import Chunks, MetadataCalls
from kvfs.agent.config import AgentConfig
from kvfs.agent.counters import COUNTERS
from kvfs.agent.messages import (
    AbortPut,
    AgentRequest,
    AgentStatistics,
    CountResident,
    DropBlocks,
    GetBlocks,
    Hello,
    KeysPage,
    ListKeys,
    PreparePut,
    StageBlocks,
    Welcome,
    split_keys,
)
from kvfs.agent.reads import BlockReader
from kvfs.agent.session import Session, Sessions
from kvfs.agent.space import Space
from kvfs.agent.watching import WATCHER_BYTES, Uses, Watching
from kvfs.agent.writes import BlockWriter
from kvfs_base import frames
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ConnectionLost,
    InvalidRequest,
    KvfsError,
    ProtocolError,
    ServerBusy,
)
from kvfs_base.frames import Frame, Kind
from kvfs_base.limits import BLOCK_KEY_BYTES
from kvfs_base.rpc import receive_frame
from kvfs_base.seams import Connection, Env, Listener
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_gds.arena import Arena
from kvfs_gds.block_cache import BlockCache
from kvfs_metadata.client import BlockingMetadataClient, ClusterView
from kvfs_metadata.messages import Done, MatchBlocks, OpenNamespace, ReadDir, RemoveBlocks

log = logging.getLogger(__name__)

REFUSED_KEPT = 16
"""Connections that were refused and whose clients have yet to read why."""

_decoder = msgspec.msgpack.Decoder(AgentRequest)


class Agent:
    """One arena and the socket that gives access to it."""

    def __init__(
        self,
        env: Env,
        config: AgentConfig,
        *,
        dial_metadata: Callable[[], MetadataCalls] | None = None,
        chunks: Chunks | None = None,
    ) -> None:
        """``dial_metadata`` and ``chunks`` stand in for the other roles; by default they are
        reached at ``config.metadata`` and through its cluster map."""
        self._env = env
        self._config = config
        self._cluster: ClusterView | None = None
        if chunks is None:
            self._cluster = ClusterView(env, config.metadata)
            chunks = ChunkClient(env, self._cluster)
        self._chunks = chunks
        self._dial_metadata = dial_metadata or (
            lambda: BlockingMetadataClient(env, config.metadata)
        )
        self._counters = Counters(*COUNTERS)
        self._arena = Arena.create(config.arena_bytes)
        self._cache = BlockCache(config.arena_bytes)
        self._sessions = Sessions(config, self._cache, env.rng.randbytes)
        self._space = Space(self._arena, self._cache, self._sessions.collect)
        self._uses = Uses()
        watcher = env.rng.randbytes(WATCHER_BYTES)
        self._watching: Watching | None = None
        if dial_metadata is None:  # who stands in for the service leases nothing
            self._watching = Watching(env, config.metadata, watcher, self._cache, self._uses)
        self._reader = BlockReader(
            env.clock, self._space, chunks, self._counters, uses=self._uses, watcher=watcher
        )
        self._writer = BlockWriter(config, self._space, chunks, self._counters)
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._refused: collections.deque[Connection] = collections.deque()
        self._listener: Listener | None = None
        self._accepting: threading.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        """Serves from now on, in threads of its own. Raises ConnectionLost if the address cannot
        be bound."""
        self._listener = self._env.blocking_network.listen(self._config.unix)
        if self._watching is not None:
            self._watching.start()
        self._accepting = threading.Thread(
            target=self._accept, args=(self._listener,), name="kvfs-agent-accept", daemon=True
        )
        self._accepting.start()

    def stop(self) -> None:
        """Closes every connection (their leases end) and waits for the threads."""
        with self._lock:
            self._stopping = True
        if self._listener is not None and self._accepting is not None:
            self._listener.close()
            self._accepting.join()
        with self._lock:
            threads = list(self._connections.values())
            for connection in self._connections:
                connection.shutdown()
        for thread in threads:
            thread.join()
        if self._watching is not None:
            self._watching.stop()
        for connection in self._refused:
            connection.close()
        self._writer.close()
        self._chunks.close()
        if self._cluster is not None:
            self._cluster.close()
        self._arena.close()

    def statistics(self) -> dict[str, int]:
        """Counters since the start and gauges of this moment, by name."""
        self._sessions.collect()
        usage = self._cache.usage()
        gauges = {"sessions": len(self._sessions), "connections": len(self._connections)}
        chunk_figures = {f"chunk_client_{k}": v for k, v in self._chunks.statistics().items()}
        return {
            **self._counters.snapshot(),
            **gauges,
            **chunk_figures,
            "arena_bytes": self._config.arena_bytes,
            "arena_blocks": usage.blocks,
            "arena_used_bytes": usage.used_bytes,
            "arena_leased_bytes": usage.leased_bytes,
            "arena_evictions": usage.evictions,
            "arena_stale": usage.stale,
        }

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = listener.accept()
            except ConnectionLost as exc:
                if not self._stopping:
                    log.error("the agent no longer accepts clients: %s", exc)
                return
            with self._lock:
                busy = self._stopping or len(self._connections) >= self._config.connections_max
                if not busy:
                    thread = threading.Thread(
                        target=self._serve, args=(connection,), name="kvfs-agent", daemon=True
                    )
                    self._connections[connection] = thread
                    thread.start()
            if busy:
                self._refuse(connection)

    def _refuse(self, connection: Connection) -> None:
        """Request 0 is no request: the error is about the connection. Closing now, with the
        client's hello unread, would reset the connection and lose the error."""
        try:
            connection.send([frames.encode_error(0, ServerBusy(detail="too many connections"))])
        except KvfsError:
            pass
        self._refused.append(connection)
        if len(self._refused) > REFUSED_KEPT:
            self._refused.popleft().close()

    def _serve(self, connection: Connection) -> None:
        try:
            handler = _ClientConnection(self, connection, self._dial_metadata())
            try:
                handler.run()
            finally:
                handler.close()
        except KvfsError as exc:
            log.debug("a connection ends: %s", exc)
        finally:
            connection.close()
            with self._lock:
                del self._connections[connection]


class _ClientConnection:
    """One connection of one client, in its own thread."""

    def __init__(self, agent: Agent, connection: Connection, metadata: MetadataCalls) -> None:
        self._agent = agent
        self._connection = connection
        self._metadata = metadata
        self._session: Session | None = None
        self._owns_session = False

    def run(self) -> None:
        """Answers requests until the client goes. Raises ConnectionLost then, and ProtocolError for
        what is no frame."""
        while True:
            frame = receive_frame(self._connection)
            if frame.kind is not Kind.REQUEST:
                raise ProtocolError(detail=f"a frame of kind {frame.kind} from a client")
            self._request(frame)

    def close(self) -> None:
        session = self._session
        if session is not None:
            if self._owns_session:
                for put in self._agent._sessions.end(session):
                    self._agent._writer.abort(self._metadata, put)
            session.leave(self._connection)
        self._metadata.close()

    def _request(self, frame: Frame) -> None:
        descriptors: tuple[int, ...] = ()
        try:
            try:
                request = _decoder.decode(frame.body)
            except frames.UNDECODABLE as exc:
                raise ProtocolError(detail=str(exc)) from exc
            if isinstance(request, Hello):
                reply, descriptors = self._hello(request)
            else:
                reply = self._handle(request)
            answer = frames.encode(Kind.REPLY, frame.request_id, reply)
        except KvfsError as exc:
            answer = frames.encode_error(frame.request_id, exc)
        except Exception as exc:
            log.exception("a request failed")
            answer = frames.encode_error(frame.request_id, exc)
        self._connection.send([answer], descriptors)

    def _hello(self, request: Hello) -> tuple[Welcome, tuple[int, ...]]:
        if self._session is not None:
            raise InvalidRequest(detail="a second hello")
        agent = self._agent
        self._owns_session = not request.session
        sessions = agent._sessions
        session = sessions.find(request.session) if request.session else sessions.open()
        self._session = session
        session.join(self._connection)
        config = agent._config
        welcome = Welcome(session.secret, config.arena_bytes, config.staging_bytes)
        if not self._owns_session:
            return welcome, ()
        return welcome, (agent._arena.fd, session.staging.fd, session.board.fd)

    def _handle(self, request: Any) -> Any:
        session = self._session
        if session is None:
            raise InvalidRequest(detail="hello first")
        if len(getattr(request, "keys", b"")) % BLOCK_KEY_BYTES:
            raise InvalidRequest(detail=f"keys have {BLOCK_KEY_BYTES} bytes each")
        agent, metadata = self._agent, self._metadata
        match request:
            case GetBlocks():
                return agent._reader.get(metadata, session, request)
            case CountResident():
                return agent._cache.resident(request.namespace, split_keys(request.keys))
            case OpenNamespace():
                return metadata.call(request)
            case MatchBlocks():
                return agent._reader.match(metadata, request)
            case PreparePut():
                # What is given up for room is what was not used for longest.
                agent._uses.tell(metadata)
                return agent._writer.prepare(metadata, session, request)
            case StageBlocks():
                return agent._writer.stage(metadata, session, request)
            case AbortPut():
                put = session.take_put(request.put)
                if put is not None:
                    agent._writer.abort(metadata, put)
                return Done()
            case DropBlocks():
                removed = metadata.call(RemoveBlocks(request.namespace, request.keys))
                agent._cache.remove(request.namespace, split_keys(request.keys))
                return removed
            case ListKeys():
                return self._list(request)
            case AgentStatistics():
                return agent.statistics()
        raise ProtocolError(detail=f"unexpected {type(request).__name__}")

    def _list(self, request: ListKeys) -> KeysPage:
        after = request.after.hex().encode("ascii")
        page = self._metadata.call(ReadDir(request.namespace, after, request.limit))
        try:
            keys = [bytes.fromhex(name.decode("ascii")) for name, _ in page.entries]
        except ValueError:
            keys = [b""]
        if any(len(key) != BLOCK_KEY_BYTES for key in keys):
            raise InvalidRequest(detail=f"inode {request.namespace} is not a namespace")
        return KeysPage(b"".join(keys), page.more)


__all__ = ["Agent"]
