"""The chunk server: targets, listeners, a thread a connection, and housekeeping.

Threads, not trio: a request moves megabytes with a handful of system calls that all give up the
GIL, and a blocking call costs 23 us a side where a trio task costs 160 us (measured).
"""

from __future__ import annotations

import logging
import resource
import uuid

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import ConnectionLost, KvfsError, TargetFailed
from kvfs_base.limits import (
    CONNECTIONS_MAX,
    SERVER_CHECK_BYTES,
    TRANSFER_BYTES,
)
from kvfs_base.seams import Connection, Env, Listener
from kvfs_base.types import Address
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains.service import ChainService
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.limits import (
    KEPT_FILES_MAX,
    SERVER_BUFFERS,
    SERVER_CHECK_BUFFERS,
)
from kvfs_datapath.server.heartbeat import Housekeeping
from kvfs_datapath.server.mover import Mover
from kvfs_datapath.server.scrub import Scrubber
from kvfs_datapath.server.session import DataSession
from kvfs_datapath.server.targets import Targets

log = logging.getLogger(__name__)

ACCEPT_PAUSE_SECONDS = 0.1
"""After a failed accept (no descriptors left): time for others to close some."""


class ChunkServer:
    """Serves its targets from ``start`` to ``stop``, from threads of its own."""

    def __init__(self, env: Env, config: ChunkServerConfig) -> None:
        """Takes over the target directories. Raises Conflict if another server has one,
        VersionMismatch, TargetFailed if no disk can be used."""
        self._env = env
        self._config = config
        self._counters = Counters(
            "bad_chunks",
            "chunks_moved",
            "chunks_read",
            "chunks_removed",
            "chunks_repaired",
            "chunks_synced",
            "chunks_written",
            "connections_refused",
            "descriptors_passed",
            "garbage_removed",
            "heartbeats",
            "heartbeats_failed",
            "moved_bytes",
            "moves_ended",
            "read_bytes",
            "requests",
            "requests_relayed",
            "synced_bytes",
            "updates",
            "scrub_bad_chunks",
            "scrub_repaired_chunks",
            "scrub_rounds",
            "scrubbed_bytes",
            "scrubbed_chunks",
            "written_bytes",
        )
        self._buffers = BufferPool(SERVER_BUFFERS, TRANSFER_BYTES)
        self._check_buffers = BufferPool(SERVER_CHECK_BUFFERS, SERVER_CHECK_BYTES)
        open_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._kept_files = min(KEPT_FILES_MAX, open_max // 4) // len(config.directories)
        self._never_opened = 0
        self._targets = Targets(
            self._open_stores(), env.host_id, lambda: env.rng.getrandbits(62) + 1
        )
        self._chains = ChainService(env, config, self._targets.stores, self._counters)
        self._mover = Mover(env, config, self._targets.stores, self._chains.peers, self._counters)
        self._housekeeping = Housekeeping(
            env, config, self._targets, self._chains, self._counters, moving=self._mover.order
        )
        self._scrubber = Scrubber(
            env,
            self._targets.stores,
            self._counters,
            bytes_per_second=config.scrub_bytes_per_second,
            days=config.scrub_days,
            repair=self._chains.repairer.repair,
        )
        self._listeners: list[Listener] = []
        self._stopping = threads.event()
        self._lock = threads.lock()
        self._connections: dict[Connection, threads.Thread] = {}
        self._acceptors: list[threads.Thread] = []

    def _open_stores(self) -> list[ChunkStore]:
        """One failed disk does not keep the others from being served."""
        stores: list[ChunkStore] = []
        try:
            for directory in self._config.directories:
                try:
                    stores.append(self._open_store(directory))
                except TargetFailed as exc:
                    log.error("target %s is out of service: %s", directory, exc.detail)
                    self._never_opened += 1
                    if self._never_opened == len(self._config.directories):
                        raise
        except BaseException:
            for store in stores:
                store.close()
            raise
        return stores

    def _open_store(self, directory: str) -> ChunkStore:
        return ChunkStore(
            self._env.open_disk(directory),
            str(uuid.UUID(int=self._env.rng.getrandbits(128), version=4)),
            buffers=self._check_buffers,
            strict=self._config.durability == "strict",
            kept_files=self._kept_files,
        )

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where the server listens, once started; a TCP port of 0 has become a real one."""
        return tuple(listener.address for listener in self._listeners)

    def start(self) -> None:
        """Binds and serves. The metadata service may come later. Raises ConnectionLost (the address
        is taken), NotLoopback."""
        try:
            for address in (self._config.unix, self._config.tcp):
                if address is not None:
                    self._listeners.append(self._env.blocking_network.listen(address))
        except BaseException:
            self.stop()
            raise
        for listener in self._listeners:
            thread = threads.thread(self._accept, listener, name="kvfs-accept")
            self._acceptors.append(thread)
            thread.start()
        self._chains.start()
        by_kind = {address.kind: address for address in self.addresses}
        self._housekeeping.start(by_kind.get("unix"), by_kind.get("tcp"))
        self._scrubber.start()
        self._mover.start()

    def stop(self) -> None:
        """Breaks off every connection, waits for the threads, gives the directories back."""
        self._stopping.set()
        for listener in self._listeners:
            listener.close()
        for thread in self._acceptors:
            thread.join()
        with self._lock:
            open_connections = dict(self._connections)
        self._chains.stop()
        self._mover.stop()
        for connection in open_connections:
            connection.shutdown()
        for thread in open_connections.values():
            thread.join()
        self._scrubber.stop()
        self._housekeeping.stop()
        self._targets.close()

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and gauges."""
        with self._lock:
            connections = len(self._connections)
        failed = self._never_opened + sum(not store.healthy for store in self._targets.stores)
        stores = self._targets.stores
        gauges = {
            "connections": connections,
            "damaged_chunks": sum(len(store.versions.damaged) for store in stores),
            "failed_targets": failed,
            "kept_files": sum(len(store.kept) for store in stores),
            "kept_files_used": sum(store.kept.hits for store in stores),
        }
        return self._counters.snapshot() | gauges

    # --- connections

    def _accept(self, listener: Listener) -> None:
        while not self._stopping.is_set():
            try:
                self._welcome(listener.accept())
            except ConnectionLost as exc:
                if not self._stopping.is_set():
                    log.warning("cannot accept a connection: %s", exc)
                    self._stopping.wait(ACCEPT_PAUSE_SECONDS)

    def _welcome(self, connection: Connection) -> None:
        thread = threads.thread(self._serve, connection, name="kvfs-data")
        with self._lock:
            full = len(self._connections) >= CONNECTIONS_MAX or self._stopping.is_set()
            if not full:
                self._connections[connection] = thread
                # Started under the lock: stop() must find only threads that can be joined.
                thread.start()
        if full:
            self._counters.add(connections_refused=1)
            connection.close()

    def _serve(self, connection: Connection) -> None:
        try:
            DataSession(
                connection,
                self._targets,
                self._buffers,
                self._counters,
                self._chains,
                statistics=self.statistics,
            ).run()
        except KvfsError:
            log.exception("a connection failed")
        finally:
            with self._lock:
                self._connections.pop(connection, None)
