"""The chunk client: batches of whole chunks from and to many targets at once.

A batch is grouped by target and cut into portions of about ``limits.TRANSFER_BYTES``; portions of
one target go over several connections, from threads that give up the GIL in every call that takes
time (preadv, sendmsg, recvmsg_into, CRC32C). While one thread computes a checksum the others keep
the disk busy. A target that fails costs its own items only: the first failure is the answer for
everything that this batch still wanted from it.
"""

from __future__ import annotations

import collections
import functools
import resource
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkNotFound,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    IntegrityError,
    InternalError,
    InvalidRequest,
    KvfsError,
    NoTarget,
)
from kvfs_base.limits import (
    CLIENT_SPLIT_BYTES,
    CLIENT_THREADS,
    CLIENT_THREADS_PER_TARGET,
    FILE_DESCRIPTORS_MAX,
    ITEMS_PER_REQUEST_MAX,
    TRANSFER_BYTES,
)
from kvfs_base.seams import Env
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.connections import ConnectionPool
from kvfs_datapath.descriptors import DescriptorCache
from kvfs_datapath.routes import ClusterSource, Route, Router
from kvfs_datapath.transfers import (
    ChunkRead,
    ChunkWrite,
    Results,
    descriptor_count,
    read_portion,
    write_portion,
)
from kvfs_datapath.wire import close_all

_Chunk = TypeVar("_Chunk", ChunkRead, ChunkWrite)
_Transfer = Callable[[ConnectionPool, Route, Sequence[_Chunk]], Results]
_UNREACHABLE = (ConnectionLost, DeadlineExceeded, NoTarget)


class _Lane:
    """What a batch wants from one target: portions of item indexes, or the failure that ended
    it."""

    def __init__(self, route: Route, portions: collections.deque[list[int]]) -> None:
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
        self.pool = ConnectionPool(env.blocking_network)
        open_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.descriptors = DescriptorCache(min(FILE_DESCRIPTORS_MAX, open_max // 4))
        self._threads = threads.pool(CLIENT_THREADS, "kvfs-chunks")
        self._counters = Counters(
            "bad_chunks",
            "chunks_read",
            "chunks_written",
            "failed_reads",
            "failed_writes",
            "missing_chunks",
            "read_bytes",
            "written_bytes",
        )

    def read_chunks(self, reads: Sequence[ChunkRead]) -> list[KvfsError | None]:
        """Reads sealed chunks into the callers' views. One result an item: None, and its bytes are
        the ones that were stored; or ChunkNotFound, ChunkCorrupt, ChunkMismatch, NoTarget,
        ConnectionLost, DeadlineExceeded, TargetFailed, InvalidRequest."""
        results = self._transfer(reads, read_portion)
        self._count_reads(reads, results)
        return results

    def write_chunks(self, writes: Sequence[ChunkWrite]) -> list[KvfsError | None]:
        """Publishes whole sealed chunks; one result an item. A chunk with a result of None is
        there, the others are not (unless the answer was lost on its way: ConnectionLost,
        DeadlineExceeded). ``crc32c`` is the caller's word for the bytes: local servers take it,
        remote ones check it, readers always do. Also DiskFull, Conflict."""
        results = self._transfer(writes, write_portion)
        good = [w for w, error in zip(writes, results, strict=True) if error is None]
        self._counters.add(
            chunks_written=len(good),
            written_bytes=sum(w.size for w in good),
            failed_writes=len(writes) - len(good),
        )
        return results

    def open_sealed(self, chunk: ChunkId, chain: int) -> int:
        """A read-only descriptor of a chunk of this host, verified once since its server started;
        the caller closes it. An open chunk without a writer is sealed first. Raises NoTarget (also
        for a chunk of another host), TargetFailed, ChunkNotFound, ChunkCorrupt, ChunkMismatch,
        Conflict (somebody is writing to it)."""
        route = self.router.route(chain)
        if not route.local:
            raise NoTarget(detail=f"chain {chain} is not on this host")
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
        self.pool.close()
        self._threads.shutdown(wait=True)
        self.descriptors.clear()

    # --- batches

    def _transfer(self, chunks: Sequence[_Chunk], transfer: _Transfer[_Chunk]) -> Results:
        results: Results = [chunk.problem() for chunk in chunks]
        lanes = self._lanes(chunks, results)

        self.parallel(
            [
                functools.partial(self._drive, lane, chunks, results, transfer)
                for lane in lanes
                for _ in range(min(len(lane.portions), CLIENT_THREADS_PER_TARGET))
            ]
        )
        return results

    def parallel(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Runs all jobs and returns when all have ended; the caller's thread takes one. Raises the
        first error."""
        if not jobs:
            return
        others: list[threads.Future] = []
        error: BaseException | None = None
        try:
            others.extend(self._threads.submit(job) for job in jobs[1:])
            jobs[0]()
        except RuntimeError:
            error = ConnectionLost(detail="the client is closed")
        except BaseException as exc:
            error = exc
        for future in others:
            error = future.exception() or error
        if error is not None:
            raise error

    def _lanes(self, chunks: Sequence[_Chunk], results: Results) -> list[_Lane]:
        chains = {chunk.chain for chunk, e in zip(chunks, results, strict=True) if e is None}
        routes = self.router.routes(chains)
        by_route: dict[Route, list[int]] = {}
        for index, chunk in enumerate(chunks):
            if results[index] is not None:
                continue
            route = routes.get(chunk.chain)
            if route is None:
                results[index] = NoTarget(detail=f"chain {chunk.chain}")
            else:
                by_route.setdefault(route, []).append(index)
        return [
            _Lane(route, _portions(indexes, [chunks[i].size for i in indexes]))
            for route, indexes in by_route.items()
        ]

    def _drive(
        self,
        lane: _Lane,
        chunks: Sequence[_Chunk],
        results: Results,
        transfer: _Transfer[_Chunk],
    ) -> None:
        """One thread's share of a lane."""
        while True:
            try:
                indexes = lane.portions.popleft()
            except IndexError:
                return
            portion = [chunks[i] for i in indexes]
            answers: Results
            if lane.failure is not None:
                answers = [lane.failure] * len(portion)
            else:
                try:
                    answers = transfer(self.pool, lane.route, portion)
                except KvfsError as exc:
                    if isinstance(exc, _UNREACHABLE):
                        lane.failure = exc
                        self.router.doubt()
                    answers = [exc] * len(portion)
            for index, answer in zip(indexes, answers, strict=True):
                results[index] = answer

    def _count_reads(self, reads: Sequence[ChunkRead], results: Results) -> None:
        good = [r for r, error in zip(reads, results, strict=True) if error is None]
        bad = [error for error in results if error is not None]
        self._counters.add(
            chunks_read=len(good),
            read_bytes=sum(r.size for r in good),
            failed_reads=len(bad),
            bad_chunks=sum(isinstance(e, IntegrityError) for e in bad),
            missing_chunks=sum(isinstance(e, ChunkNotFound) for e in bad),
        )


def _portions(indexes: Sequence[int], sizes: Sequence[int]) -> collections.deque[list[int]]:
    """Cuts one target's items: large enough that a request's cost does not show, small enough that
    all threads get something."""
    share = sum(sizes) // CLIENT_THREADS_PER_TARGET
    limit = max(CLIENT_SPLIT_BYTES, min(share, TRANSFER_BYTES))
    portions: collections.deque[list[int]] = collections.deque()
    room = 0
    for index, size in zip(indexes, sizes, strict=True):
        if room <= 0 or len(portions[-1]) == ITEMS_PER_REQUEST_MAX:
            portions.append([])
            room = limit
        portions[-1].append(index)
        room -= max(size, 1)
    return portions


__all__ = ["ChunkClient", "ChunkRead", "ChunkWrite", "ClusterSource"]
