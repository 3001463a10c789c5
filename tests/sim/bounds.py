"""Memory is bounded: what tables and queues of production processes hold, against their limits.

Limits are looked up in the modules that use them, where ``tiny`` may have changed them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvfs_datapath.chains import garbage, replication, sync_sink
from kvfs_datapath.chunks import numbers, tree
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.client import health, hedges, repairs
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.server import chunk_server, scrub, targets
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_metadata import blocks, sessions
from kvfs_metadata.cluster import departures
from kvfs_metadata.core import MetadataCore

if TYPE_CHECKING:
    from sim.world import World

_Held = tuple[str, int, int]
"""What it is, how much of it there is, and how much there may be."""


def exceeded(world: World) -> list[str]:
    """What is over its bound now. One line each."""
    return [
        f"{process}: {count} {what}, {most} at most"
        for process, held in _everything(world)
        for what, count, most in held
        if count > most
    ]


def _everything(world: World) -> Iterator[tuple[str, Iterator[_Held]]]:
    for host in world.metadata_hosts:
        if host.is_running and host.service is not None:
            yield host.name, _of_metadata(host.service.core)
    for chunk_host in world.chunk_hosts:
        if chunk_host.is_running and chunk_host.server is not None:
            yield chunk_host.name, _of_server(chunk_host.server)
    for client in world.clients:
        if client.process.alive:
            yield client.name, _of_client(client.chunks)


def _of_metadata(core: MetadataCore) -> Iterator[_Held]:
    yield "prepared batches", len(core.blocks._prepared), blocks.PREPARED_BATCHES_MAX
    yield "committed batches", len(core.blocks._committed), blocks.COMMITTED_BATCHES_MAX
    yield "sessions", len(core.sessions._sessions), sessions.SESSIONS_MAX
    opens = max((len(s.opens) for s in core.sessions._sessions.values()), default=0)
    yield "open files of a session", opens, sessions.OPEN_INODES_MAX
    yield "removed targets", len(core.cluster.departures.gone), departures.REMOVED_TARGETS_MAX


def _of_server(server: ChunkServer) -> Iterator[_Held]:
    chains = server._chains
    yield "connections", len(server._connections), chunk_server.CONNECTIONS_MAX
    removed = len(chains.replicator._removed)
    yield "remembered ranges", removed, replication.UPDATES_REMEMBERED_MAX
    comparisons = chains.sinks._comparisons.values()
    came = max((len(comparison.came) for comparison in comparisons), default=0)
    yield "chunks that came meanwhile", came, sync_sink.SYNC_CAME_MAX
    unwanted = len(chains._garbage._before)
    yield "unwanted inodes", unwanted, garbage.UNWANTED_REMEMBERED_MAX
    yield "unsealed chunks", len(server._targets._unsettled), targets.UNSEALED_CHUNKS_MAX
    yield "bad chunks", len(server._scrubber._told), scrub.SCRUB_BAD_REMEMBERED_MAX
    for store in server._targets.stores:
        yield (
            "remembered updates",
            len(store.versions._numbers._versions),
            numbers.UPDATES_REMEMBERED_MAX,
        )
        yield "verified chunks", len(store._verified), tree.VERIFIED_CHUNKS_MAX


def _of_client(client: ChunkClient) -> Iterator[_Held]:
    reader = client.chain_reader
    yield "queued repairs", len(reader._repairs._queue), repairs.REPAIRS_QUEUED_MAX
    yield "asked repairs", len(reader._repairs._asked), repairs.REPAIRS_REMEMBERED_MAX
    known = client.shared.health._targets.values()
    times = max((len(target.times) for target in known), default=0)
    yield "times of a target", times, health.LATENCIES_KEPT
    yield "saved hedges", int(reader._hedger._saved), int(hedges.HEDGES_SAVED_MAX)


# --- what is held for an operation


def kept(world: World) -> list[str]:
    """What servers still hold for operations, though nobody is at one. One line each."""
    found: list[str] = []
    for host in world.chunk_hosts:
        assert host.server is not None
        for what, count in _at_work(host.server):
            if count:
                found.append(f"{host.name}: {count} {what}")
    return found


def _at_work(server: ChunkServer) -> Iterator[tuple[str, int]]:
    chains = server._chains
    yield "updates that stay pending", len(chains.replicator.unresolved())
    yield "writes under way", len(chains.views._active)
    # One of a version that is past may come to be when the map has changed: until it changes again.
    comparisons = chains.sinks._comparisons.items()
    yield "comparisons", sum(c.version == _version(server, key[1]) for key, c in comparisons)
    yield "listings", len(chains.sinks._listings)
    yield "doubtful members", len(chains.peers.reach.doubtful())
    for store in server._targets.stores:
        yield from _of_store(store)


def _version(server: ChunkServer, chain_id: int) -> int:
    chain = server._chains.views.chain(chain_id)
    return 0 if chain is None else chain.version


def _of_store(store: ChunkStore) -> Iterator[tuple[str, int]]:
    yield "pending versions", len(store.versions._pending) + len(store.versions._left)
    yield "locks of chunks", len(store.versions.locks)
    yield "chunks that appear", len(store._appearing)
