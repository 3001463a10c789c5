"""The chunk client: batches of whole chunks from and to many targets at once.

A batch is grouped by target and cut into portions of about ``limits.TRANSFER_BYTES``; portions of
one target go over several connections, from threads that give up the GIL in every call that takes
time (preadv, sendmsg, recvmsg_into, CRC32C). While one thread computes a checksum the others keep
the disk busy. A target that fails costs its own items only: the first failure is the answer for
everything that this batch still wanted from it. What lies on chains of several copies is read and
written by ``chain_reads`` and ``chain_writes``, which know what to do then.
"""

from __future__ import annotations

import functools
import resource
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkNotFound,
    Conflict,
    IntegrityError,
    InternalError,
    InvalidRequest,
    KvfsError,
    NoTarget,
)
from kvfs_base.seams import Env
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.client.chain_reads import UNREACHABLE, ChainReader
from kvfs_datapath.client.chain_writes import ChainWriter
from kvfs_datapath.client.descriptors import DescriptorCache
from kvfs_datapath.client.health import Health
from kvfs_datapath.client.routes import ChainRoutes, ClusterSource, Route, Router
from kvfs_datapath.client.shared import Shared
from kvfs_datapath.client.staging import StagedFiles
from kvfs_datapath.client.transfers import (
    Chunk,
    ChunkRead,
    ChunkWrite,
    ReadShare,
    Results,
    Share,
    WriteShare,
    descriptor_count,
)
from kvfs_datapath.client.updates import Updater
from kvfs_datapath.client.workers import Portions, Workers, cut, portion_bytes
from kvfs_datapath.connections import ConnectionPool
from kvfs_datapath.limits import FILE_DESCRIPTORS_MAX
from kvfs_datapath.wire import close_all

_Sharing = Callable[[ConnectionPool, Route, Portions, Sequence[Chunk]], Share[Chunk]]


COUNTERS = (
    "bad_chunks",
    "chunks_read",
    "chunks_written",
    "failed_reads",
    "failed_writes",
    "hedged_reads",
    "hedges_won",
    "missing_chunks",
    "read_bytes",
    "repairs_asked",
    "replica_retries",
    "written_bytes",
)


class _Lane:
    """What a batch wants from one target: portions of item indexes, or the failure that ended
    it."""

    def __init__(self, route: Route, portions: Portions) -> None:
        self.route = route
        self.portions = portions
        self.failure: KvfsError | None = None


class ChunkClient:
    """Blocking; may be used from any number of threads."""

    def __init__(self, env: Env, cluster: ClusterSource, *, prefer: str = "auto") -> None:
        """``prefer``: ``auto``, or ``local`` / ``tcp`` to use that way only."""
        if prefer not in ("auto", "local", "tcp"):
            raise InvalidRequest(detail=f"prefer={prefer!r}: auto, local or tcp")
        self.router = Router(cluster, env.host_id, prefer)
        self.pool = ConnectionPool(env.blocking_network, env.clock)
        open_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.descriptors = DescriptorCache(min(FILE_DESCRIPTORS_MAX, open_max // 4))
        self._workers = Workers()
        self.parallel = self._workers.parallel
        self._counters = Counters(*COUNTERS)
        self.shared = Shared(
            env=env,
            router=self.router,
            pool=self.pool,
            health=Health(env.clock),
            workers=self._workers,
            counters=self._counters,
            closed=threads.event(),
        )
        self.chain_reader = ChainReader(self.shared)
        self._chain_writer = ChainWriter(self.shared)
        self.updater = Updater(self.shared)
        self.staged = StagedFiles(self.shared)

    def read_chunks(self, reads: Sequence[ChunkRead]) -> list[KvfsError | None]:
        """Reads sealed chunks into the callers' views. One result an item: None, and its bytes are
        the ones that were stored; or ChunkNotFound, ChunkCorrupt, ChunkMismatch, NoTarget,
        ConnectionLost, DeadlineExceeded, TargetFailed, InvalidRequest. Of chains of several copies
        any replica will do: a chunk is ChunkNotFound, ChunkCorrupt or ChunkMismatch only if all
        that serve were asked and none has it."""
        results = self._transfer(reads, ReadShare, self.chain_reader.read_chunks)
        self._count_reads(reads, results)
        return results

    def write_chunks(self, writes: Sequence[ChunkWrite]) -> list[KvfsError | None]:
        """Publishes whole sealed chunks; one result an item. A chunk with a result of None is
        there, the others are not (unless the answer was lost on its way: ConnectionLost,
        DeadlineExceeded). ``crc32c`` is the caller's word for the bytes: local servers take it,
        remote ones check it, readers always do. Also DiskFull, Conflict. On a chain of several
        copies all members have a chunk whose result is None, under the chain's version that the
        item then names; StaleChain and TargetFenced are further failures."""
        results = self._transfer(writes, WriteShare, self._chain_writer.write_chunks)
        good = [w for w, error in zip(writes, results, strict=True) if error is None]
        self._counters.add(
            chunks_written=len(good),
            written_bytes=sum(w.size for w in good),
            failed_writes=len(writes) - len(good),
        )
        return results

    def versions(self, chains: Iterable[int]) -> dict[int, int]:
        """The versions that chains have now, as far as they have several copies."""
        routes = self.router.chains(chains, fresh=True)
        return {c: found.version for c, found in routes.items() if found.is_replicated}

    def open_sealed(self, chunk: ChunkId, chain: int) -> int:
        """A read-only descriptor of a chunk of this host, verified once since its server started;
        the caller closes it. An open chunk without a writer is sealed first. Raises NoTarget (also
        for a chunk of another host), TargetFailed, ChunkNotFound, ChunkCorrupt, ChunkMismatch,
        Conflict (somebody is writing to it). If the chain has several copies, this host's is not
        the only one: all failures are NoTarget, and ``read_chunks`` knows how to go on."""
        routes = self.router.chain(chain)
        route = next((r for r in routes.serving if r.local), None)
        if route is None:
            raise NoTarget(detail=f"chain {chain} is not on this host")
        if not routes.is_replicated:
            return self._open_sealed(route, chunk)
        try:
            return self._open_sealed(route, ChunkId(chunk.inode, chunk.number, chain))
        except KvfsError as exc:
            raise NoTarget(detail=f"chain {chain}: {exc}") from exc

    def _open_sealed(self, route: Route, chunk: ChunkId) -> int:
        request = m.OpenChunks(route.target_id, (m.ChunkRef(*chunk),), verify=True, seal=True)
        outcomes, descriptors = self.pool.run(
            route.address, lambda c: c.call_for_descriptors(request, descriptor_count)
        )
        (info,) = outcomes.infos
        if info is None:
            raise outcomes.error(0) or InternalError(detail="no descriptor and no reason")
        if not info.is_sealed:
            close_all(descriptors)
            raise Conflict(detail=f"chunk {tuple(chunk)} is open for writing")
        return int(descriptors[0])

    def statistics(self) -> dict[str, int]:
        return self._counters.snapshot()

    def close(self) -> None:
        """Breaks off what is under way in other threads; their items fail with ConnectionLost."""
        self.shared.closed.set()
        self.pool.close()
        self.staged.close()
        self._workers.close()
        self.chain_reader.close()
        self.descriptors.clear()

    # --- batches

    def _transfer(
        self,
        chunks: Sequence[Chunk],
        sharing: _Sharing[Chunk],
        replicated: Callable[[Sequence[Chunk]], Results],
    ) -> Results:
        results: Results = [chunk.problem() for chunk in chunks]
        by_chain: defaultdict[int, list[int]] = defaultdict(list)
        for index, (chunk, problem) in enumerate(zip(chunks, results, strict=True)):
            if problem is None:
                by_chain[chunk.chain].append(index)
        routes = self.router.chains(by_chain)
        lanes = self._lanes(chunks, by_chain, routes, results)
        self.parallel(
            [
                functools.partial(self._drive, lane, chunks, results, sharing)
                for lane in lanes
                for _ in range(lane.portions.threads)
            ]
        )
        several = [i for c, found in routes.items() if found.is_replicated for i in by_chain[c]]
        if several:
            answers = replicated([chunks[i] for i in several])
            for index, answer in zip(several, answers, strict=True):
                results[index] = answer
        return results

    def _lanes(
        self,
        chunks: Sequence[Chunk],
        by_chain: dict[int, list[int]],
        routes: dict[int, ChainRoutes],
        results: Results,
    ) -> list[_Lane]:
        by_route: defaultdict[Route, list[int]] = defaultdict(list)
        for chain, indexes in by_chain.items():
            found = routes.get(chain)
            if found is None:
                for index in indexes:
                    results[index] = NoTarget(detail=f"chain {chain}")
            elif not found.is_replicated:
                by_route[found.serving[0]] += indexes
        return [_Lane(route, _portions(chunks, indexes)) for route, indexes in by_route.items()]

    def _drive(
        self,
        lane: _Lane,
        chunks: Sequence[Chunk],
        results: Results,
        sharing: _Sharing[Chunk],
    ) -> None:
        """One thread's share of a lane."""
        share = sharing(self.pool, lane.route, lane.portions, chunks)
        try:
            while (indexes := share.take()) is not None:
                answers = self._portion(lane, share, [chunks[i] for i in indexes])
                for index, answer in zip(indexes, answers, strict=True):
                    results[index] = answer
        finally:
            share.leave()

    def _portion(self, lane: _Lane, share: Share[Chunk], portion: list[Chunk]) -> Results:
        if lane.failure is not None:
            share.leave()
            return [lane.failure] * len(portion)
        try:
            return share.transfer(portion)
        except KvfsError as exc:
            if isinstance(exc, UNREACHABLE):
                lane.failure = exc
                self.router.doubt()
            return [exc] * len(portion)

    def _count_reads(self, reads: Sequence[ChunkRead], results: Results) -> None:
        good = [r.size for r, error in zip(reads, results, strict=True) if error is None]
        bad = [error for error in results if error is not None]
        self._counters.add(
            chunks_read=len(good),
            read_bytes=sum(good),
            failed_reads=len(bad),
            bad_chunks=sum(isinstance(e, IntegrityError) for e in bad),
            missing_chunks=sum(isinstance(e, ChunkNotFound) for e in bad),
        )


def _portions(
    chunks: Sequence[ChunkRead] | Sequence[ChunkWrite], indexes: Sequence[int]
) -> Portions:
    sizes = [chunks[i].size for i in indexes]
    return Portions(cut(indexes, sizes, portion_bytes(sum(sizes))))


__all__ = ["ChunkClient", "ChunkRead", "ChunkWrite", "ClusterSource"]
