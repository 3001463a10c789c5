"""Where a check reads: services that run, or the files that they left."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from kvfs_base.cluster import ClusterMap, GetClusterMap, Target, TargetState
from kvfs_base.errors import ConnectionLost, KvfsError, NoTarget, TargetFailed, VersionMismatch
from kvfs_base.limits import (
    FSCK_CHAIN_PAGE_CHUNKS,
    ITEMS_PER_REQUEST_MAX,
    LIST_CHUNKS_MAX,
    SERVER_CHECK_BYTES,
)
from kvfs_base.seams import Env
from kvfs_base.types import Address, ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chunks.listing import ChunkListing, look_at
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.target import IDENTITY
from kvfs_datapath.connections import ConnectionPool
from kvfs_datapath.format import ChunkInfo
from kvfs_metadata import records
from kvfs_metadata.check.fixes import Fix, RecordPage, RepairRecords, ScanRecords, Verdict
from kvfs_metadata.check.fsck import RecordReader, read_sound
from kvfs_metadata.check.repair import NoMemory, Repairer
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.engines.engine import Item, KVEngine, KVTransaction
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
from kvfs_metadata.transaction import ANY_CONNECTION, Counters, Tx

NEW_UUID = "00000000-0000-0000-0000-000000000000"
"""Never used: only directories that are targets already are opened."""

FIRST = ChunkId(0, 0)


class Store(RecordReader, Protocol):
    """The metadata: its records, and who repairs them."""

    def repair(self, fixes: Sequence[Fix], *, dry: bool) -> Sequence[Verdict]:
        """At most FIXES_PER_REQUEST of them, in one transaction."""


class Targets(Protocol):
    """The chunks. Methods raise what kept them from an answer."""

    @property
    def unreachable(self) -> Mapping[str, str]:
        """Targets that cannot be looked at, and why."""

    def listings(self) -> dict[int, Iterator[m.ListedChunk]]:
        """All chunks of each target, in order."""

    def look(self, target_id: int, chunks: Sequence[ChunkId]) -> list[m.ListedChunk]:
        """Those of ``chunks`` that exist."""

    def recheck(
        self, target_id: int, chunks: Sequence[ChunkId]
    ) -> list[KvfsError | ChunkInfo | None]:
        """Reads each again; its attribute, or what is wrong. At most CHECK_CHUNKS_PER_REQUEST."""

    def repair(self, target_id: int, chunks: Sequence[ChunkId]) -> bool:
        """Has a target get copies from other members. Whether all are whole now."""


# --- a service that runs


class RemoteStore:
    def __init__(self, client: BlockingMetadataClient) -> None:
        self._client = client

    def range(self, start: bytes, end: bytes, limit: int) -> list[Item]:
        items: list[Item] = []
        while len(items) < limit:
            page: RecordPage = self._client.call(ScanRecords(start, end, limit - len(items)))
            items += page.items
            if not page.more:
                break
            start = items[-1][0] + b"\x00"
        return items

    def repair(self, fixes: Sequence[Fix], *, dry: bool) -> Sequence[Verdict]:
        found: Sequence[Verdict] = self._client.call(RepairRecords(tuple(fixes), dry))
        return found


class RemoteTargets:
    """The targets of a cluster map, each over one connection at a time."""

    def __init__(self, env: Env, client: BlockingMetadataClient) -> None:
        self.unreachable: dict[str, str] = {}
        self._pool = ConnectionPool(env.blocking_network, env.clock)
        self._addresses: dict[int, Address] = {}
        cluster: ClusterMap = client.call(GetClusterMap())
        for target in cluster.targets:
            address = _address_of(target, env.host_id)
            if target.state is TargetState.OFFLINE or address is None:
                self.unreachable[_name_of(target)] = target.state.value
            else:
                self._addresses[target.target_id] = address
        self._names = {target.target_id: _name_of(target) for target in cluster.targets}
        self._chains = {
            target_id: [
                chain.chain_id
                for chain in cluster.chains
                if chain.is_replicated and target_id in chain.members + chain.offline
            ]
            for target_id in self._addresses
        }

    def listings(self) -> dict[int, Iterator[m.ListedChunk]]:
        found: dict[int, Iterator[m.ListedChunk]] = {}
        for target_id, address in self._addresses.items():
            try:
                first = self._page(target_id, address, FIRST)
            except (ConnectionLost, NoTarget, TargetFailed) as exc:
                self.unreachable[self._names[target_id]] = str(exc)
            else:
                streams = [self._list(target_id, address, first)]
                streams += [
                    self._list_chain(target_id, address, chain) for chain in self._chains[target_id]
                ]
                found[target_id] = heapq.merge(*streams, key=_order)
        return found

    def _list_chain(self, target_id: int, address: Address, chain: int) -> Iterator[m.ListedChunk]:
        first = self._page(target_id, address, ChunkId(0, 0, chain), FSCK_CHAIN_PAGE_CHUNKS)
        yield from self._list(target_id, address, first, FSCK_CHAIN_PAGE_CHUNKS)

    def _list(
        self, target_id: int, address: Address, page: m.ChunkPage, limit: int = LIST_CHUNKS_MAX
    ) -> Iterator[m.ListedChunk]:
        yield from page.chunks
        while page.next is not None:
            page = self._page(target_id, address, page.next.chunk, limit)
            yield from page.chunks

    def _page(
        self, target_id: int, address: Address, start: ChunkId, limit: int = LIST_CHUNKS_MAX
    ) -> m.ChunkPage:
        request = m.ListChunks(target_id, m.ChunkRef(*start), limit)
        page: m.ChunkPage = self._pool.run(address, lambda c: c.call(request))
        return page

    def look(self, target_id: int, chunks: Sequence[ChunkId]) -> list[m.ListedChunk]:
        found: list[m.ListedChunk] = []
        for start in range(0, len(chunks), ITEMS_PER_REQUEST_MAX):
            part = chunks[start : start + ITEMS_PER_REQUEST_MAX]
            outcomes = self._ask(m.StatChunks(target_id, _refs(part)))
            found += _listed(part, outcomes)
        return found

    def recheck(
        self, target_id: int, chunks: Sequence[ChunkId]
    ) -> list[KvfsError | ChunkInfo | None]:
        outcomes = self._ask(m.CheckChunks(target_id, _refs(chunks)))
        return [outcomes.error(place) or info for place, info in enumerate(outcomes.infos)]

    def repair(self, target_id: int, chunks: Sequence[ChunkId]) -> bool:
        try:
            outcomes = self._ask(m.RepairChunks(target_id, _refs(chunks)))
        except KvfsError:
            return False
        return not outcomes.errors

    def _ask(self, request: m.ChunkRequest) -> m.Outcomes:
        address = self._addresses[request.target_id]
        outcomes: m.Outcomes = self._pool.run(address, lambda c: c.call(request))
        return outcomes

    def close(self) -> None:
        self._pool.close()


def _name_of(target: Target) -> str:
    return f"{target.target_id} ({target.server_id})"


def _address_of(target: Target, host_id: str) -> Address | None:
    if target.unix is not None and target.host_id == host_id:
        return target.unix
    return target.tcp


def _refs(chunks: Sequence[ChunkId]) -> tuple[m.ChunkRef, ...]:
    return tuple(m.ChunkRef(*chunk) for chunk in chunks)


def _listed(chunks: Sequence[ChunkId], outcomes: m.Outcomes) -> Iterator[m.ListedChunk]:
    for place, (chunk, info) in enumerate(zip(chunks, outcomes.infos, strict=True)):
        error = outcomes.errors.get(place)
        if error is None:
            yield m.ListedChunk(*chunk, info=info)
        elif error.code != "chunk_not_found":
            yield m.ListedChunk(*chunk, info=None, problem=str(outcomes.error(place)))


# --- the files of services that do not run


class LocalStore:
    """An engine that nobody else has open."""

    def __init__(self, env: Env, engine: KVEngine) -> None:
        """Raises VersionMismatch."""
        found = engine.view(lambda kv: kv.get(records.FORMAT_KEY))
        if found != records.FORMAT:
            raise VersionMismatch(
                detail="metadata store",
                found="none" if found is None else found.decode(errors="replace"),
                expected=records.FORMAT.decode(),
            )
        self._env = env
        self._engine = engine

    def range(self, start: bytes, end: bytes, limit: int) -> list[Item]:
        return self._engine.view(lambda kv: kv.range(start, end, limit))

    def repair(self, fixes: Sequence[Fix], *, dry: bool) -> Sequence[Verdict]:
        def run(kv: KVTransaction) -> Sequence[Verdict]:
            repairer = Repairer(counters=Counters(kv.get), removals=Removals(kv), memory=NoMemory())
            tx = Tx(kv, self._env.clock.time_ns(), ANY_CONNECTION, [])
            return repairer.repair(tx, RepairRecords(tuple(fixes), dry))

        (result,) = self._engine.update([run])
        if isinstance(result, KvfsError):
            raise result
        return result


class LocalTargets:
    """Target directories that nobody else has open. Raises Conflict where a server has one."""

    def __init__(self, env: Env, reader: RecordReader, directories: Sequence[str]) -> None:
        self.unreachable: dict[str, str] = {}
        self._stores: dict[int, ChunkStore] = {}
        self._chains: dict[int, list[int]] = {}
        for key, value in read_sound(reader, records.CHAIN):
            chain = records.decode_chain(value)
            for target_id in chain.everybody if chain.is_replicated else ():
                self._chains.setdefault(target_id, []).append(int.from_bytes(key[4:8], "big"))
        by_uuid = {
            key[4:].decode(): records.decode_target(value)
            for key, value in read_sound(reader, records.TARGET)
        }
        buffers = BufferPool(1, SERVER_CHECK_BYTES)
        try:
            for directory in directories:
                disk = env.open_disk(directory)
                if not disk.exists(IDENTITY):
                    self.unreachable[directory] = "no target"
                    continue
                store = ChunkStore(disk, NEW_UUID, buffers=buffers)
                record = by_uuid.pop(store.uuid, None)
                if record is None:
                    store.close()
                    self.unreachable[directory] = "not a target of this metadata store"
                else:
                    self._stores[record.target_id] = store
        except BaseException:
            self.close()
            raise
        for record in by_uuid.values():
            self.unreachable[f"{record.target_id} ({record.server_id})"] = "no directory"

    def listings(self) -> dict[int, Iterator[m.ListedChunk]]:
        return {
            target_id: heapq.merge(
                *(_all_chunks(store, chain) for chain in (0, *self._chains.get(target_id, ()))),
                key=_order,
            )
            for target_id, store in self._stores.items()
        }

    def look(self, target_id: int, chunks: Sequence[ChunkId]) -> list[m.ListedChunk]:
        return list(look_at(self._stores[target_id], list(chunks)))

    def recheck(
        self, target_id: int, chunks: Sequence[ChunkId]
    ) -> list[KvfsError | ChunkInfo | None]:
        found: list[KvfsError | ChunkInfo | None] = []
        for chunk in chunks:
            try:
                found.append(self._stores[target_id].recheck(chunk))
            except KvfsError as exc:
                found.append(exc)
        return found

    def repair(self, target_id: int, chunks: Sequence[ChunkId]) -> bool:
        """Servers do that."""
        return False

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


def _order(chunk: m.ListedChunk) -> tuple[int, int]:
    return chunk.inode, chunk.number


def _all_chunks(store: ChunkStore, chain: int) -> Iterator[m.ListedChunk]:
    listing = ChunkListing(store, ChunkId(0, 0, chain))
    while listing.next is not None:
        yield from listing.page(LIST_CHUNKS_MAX).chunks


@contextlib.contextmanager
def online(env: Env, metadata: Address | Sequence[Address]) -> Iterator[tuple[Store, Targets]]:
    """A kvfs that runs, by the addresses of its metadata service."""
    client = BlockingMetadataClient(env, metadata)
    try:
        targets = RemoteTargets(env, client)
        try:
            yield RemoteStore(client), targets
        finally:
            targets.close()
    finally:
        client.close()


@contextlib.contextmanager
def offline(env: Env, metadata: str, directories: Sequence[str]) -> Iterator[tuple[Store, Targets]]:
    """The directories of a kvfs that does not run: of its metadata store and of its targets. Takes
    all of their locks. Raises Conflict."""
    engine = LmdbEngine(env, metadata)
    try:
        store = LocalStore(env, engine)
        targets = LocalTargets(env, store, directories)
        try:
            yield store, targets
        finally:
            targets.close()
    finally:
        engine.close()


__all__ = ["LocalStore", "LocalTargets", "RemoteStore", "RemoteTargets", "Store", "Targets"]
