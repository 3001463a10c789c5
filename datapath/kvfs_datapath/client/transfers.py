"""Whole chunks over one connection: what a chunk client does with a portion of a batch.

Two ways lead to a target. Locally the server passes descriptors and this process reads and writes
O_DIRECT by itself: no byte passes through the server or the page cache. Otherwise the bytes come
over TCP, straight into the caller's memory. Either way nothing is returned that was not checked:
the chunk's attribute against what the caller expects (inode, which is the generation, key, length,
checksum), then the bytes against the checksum.
"""

from __future__ import annotations

import abc
import dataclasses
import errno
import functools
import os
from collections.abc import Sequence
from typing import Generic, TypeVar

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ConnectionLost,
    DiskFull,
    IntegrityError,
    InvalidRequest,
    KvfsError,
    TargetFailed,
)
from kvfs_base.limits import BLOCK_BYTES_MAX, CHECK_CHUNKS_PER_REQUEST
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.routes import Route
from kvfs_datapath.client.workers import Portions
from kvfs_datapath.connections import Ahead, Attempt, ConnectionPool, DataConnection, seconds_for
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import (
    CHAIN_CONNECT_SECONDS,
    PASS_CONNECT_SECONDS,
    READ_AGAIN_ATTEMPTS,
    READ_PIECE_BYTES,
)
from kvfs_datapath.wire import close_all


@dataclasses.dataclass(slots=True)
class _WholeChunk:
    """``view`` is page-aligned and holds at least ``size`` rounded up to whole pages."""

    chunk: ChunkId
    chain: int
    size: int
    crc32c: int
    key: bytes
    view: memoryview

    def problem(self) -> KvfsError | None:
        """What is wrong with the caller's arguments."""
        size, view = self.size, self.view
        if not 0 <= size <= BLOCK_BYTES_MAX:
            return InvalidRequest(detail=f"a chunk of {size} bytes")
        if view.nbytes < round_up(size) or view.itemsize != 1:
            return InvalidRequest(detail=f"{view.nbytes} bytes of memory for {size}")
        return None

    def message(self) -> m.WholeChunk:
        return m.WholeChunk(*self.chunk, self.size, self.crc32c, self.key)

    def pages(self) -> memoryview:
        return self.view[: round_up(self.size)]


@dataclasses.dataclass(slots=True)
class ChunkRead(_WholeChunk):
    """Bytes after ``size`` may be anything afterwards."""


@dataclasses.dataclass(slots=True)
class ChunkWrite(_WholeChunk):
    """Bytes after ``size`` may be anything."""

    version: int = 0
    """Set by the client: the version of the chain under which every member got it; 0 on chains of
    one copy."""


Chunk = TypeVar("Chunk", ChunkRead, ChunkWrite)
Results = list[KvfsError | None]


def read_portion(
    pool: ConnectionPool,
    route: Route,
    reads: Sequence[ChunkRead],
    attempt: Attempt | None = None,
    share: ReadShare | None = None,
) -> Results:
    """One result a chunk. Raises if the server could not be asked, or if ``attempt`` was broken
    off. Nothing is written to the views afterwards. ``share``: of which these are the portion that
    was taken last."""
    if route.local:
        return _read_local(pool, route, reads, attempt)
    return _RemoteRead(pool, route, reads, attempt, share).run()


def write_portion(
    pool: ConnectionPool,
    route: Route,
    writes: Sequence[ChunkWrite],
    passing: m.Passing | None = None,
) -> Results:
    """As read_portion; chunks without error are published. With ``passing`` all are of one chain,
    and are published at its hops, too; by descriptors there are none."""
    members = 1 if passing is None else 1 + len(passing.hops)
    size = members * sum(write.size for write in writes)
    write = _write_local if route.local and members == 1 else _write_remote
    return pool.run(
        route.address,
        lambda c: write(c, route, writes, passing),
        seconds=seconds_for(size),
        connect_seconds=PASS_CONNECT_SECONDS if passing is None else CHAIN_CONNECT_SECONDS,
        watch=True,
    )


class Share(abc.ABC, Generic[Chunk]):
    """What one thread moves from or to one target, out of the portions that its threads share. It
    is made by the thread, when it begins."""

    def __init__(
        self,
        pool: ConnectionPool,
        route: Route,
        portions: Portions,
        chunks: Sequence[Chunk],
    ) -> None:
        self._pool = pool
        self._route = route
        self._portions = portions
        portions.begin()
        self._chunks: Sequence[Chunk] = chunks

    def take(self) -> list[int] | None:
        """Indexes of the next portion; None if there are no more."""
        return self._portions.take()

    @abc.abstractmethod
    def transfer(self, portion: Sequence[Chunk]) -> Results:
        """The portion that was taken last. Raises as ``read_portion`` and ``write_portion``."""

    def leave(self) -> None:
        """Nothing more of it is wanted."""


class WriteShare(Share[ChunkWrite]):
    def transfer(self, portion: Sequence[ChunkWrite]) -> Results:
        return write_portion(self._pool, self._route, portion)


class ReadShare(Share[ChunkRead]):
    """Over TCP the next portion is taken, and asked for, when the last bytes of the one before are
    on their way: no sooner, since another thread may have nothing to do by then."""

    _taken: list[int] | None = None
    _request: m.ReadChunks | None = None
    """Of what is taken ahead."""

    @functools.cached_property
    def ahead(self) -> Ahead:
        return Ahead(self._following)

    def take(self) -> list[int] | None:
        taken, self._taken = self._taken, None
        return super().take() if taken is None else taken

    def _following(self) -> m.ReadChunks | None:
        if self._taken is None:  # else it was chosen, and then the connection was lost
            self._taken = self._portions.take_ahead()
            if self._taken is not None:
                self._request = _request(self._route, [self._chunks[i] for i in self._taken])
        return self._request

    def request(self, reads: Sequence[ChunkRead]) -> m.ReadChunks:
        """For the portion that was taken last: the one that it was asked for with, if it was."""
        request, self._request = self._request, None
        return _request(self._route, reads) if request is None else request

    def transfer(self, portion: Sequence[ChunkRead], attempt: Attempt | None = None) -> Results:
        return read_portion(self._pool, self._route, portion, attempt, self)

    def leave(self) -> None:
        self._request = None
        self._pool.leave(self.ahead)


def _corrupt(read: ChunkRead, found: int) -> ChunkCorrupt:
    return ChunkCorrupt(*read.chunk, expected_crc32c=read.crc32c, found_crc32c=found)


# --- local


def descriptor_count(outcomes: m.Outcomes) -> int:
    """How many descriptors come with an answer: one for each item that has an info."""
    return sum(info is not None for info in outcomes.infos)


def _refs(reads: Sequence[ChunkRead]) -> tuple[m.ChunkRef, ...]:
    return tuple(m.ChunkRef(*read.chunk) for read in reads)


def _read_local(
    pool: ConnectionPool, route: Route, reads: Sequence[ChunkRead], attempt: Attempt | None
) -> Results:
    request = m.OpenChunks(route.target_id, _refs(reads), direct=True)
    outcomes, descriptors = pool.run(
        route.address,
        lambda c: c.call_for_descriptors(request, descriptor_count),
        seconds=seconds_for(0),
        attempt=attempt,
    )
    results: Results = []
    try:
        remaining = iter(descriptors)
        for index, (read, info) in enumerate(zip(reads, outcomes.infos, strict=True)):
            if info is None:
                results.append(outcomes.error(index))
                continue
            if attempt is not None:
                attempt.check()
            results.append(_read_descriptor(next(remaining), read, info, route))
    finally:
        close_all(descriptors)
    failed = [r for r, e in zip(reads, results, strict=True) if isinstance(e, TargetFailed)]
    if failed:
        _report(pool, route, failed)
    return results


def _read_descriptor(fd: int, read: ChunkRead, info: ChunkInfo, route: Route) -> KvfsError | None:
    """The descriptor was passed to us for this: it is not a file of our own."""
    difference = read.message().difference(info)
    if difference:
        return ChunkMismatch(*read.chunk, detail=difference)
    done = 0
    try:
        while done < read.size:
            piece = read.pages()[done : done + READ_PIECE_BYTES]
            count = os.preadv(fd, [piece], done)
            if count == 0:
                detail = f"{done} bytes on disk, {read.size} expected"
                return ChunkMismatch(*read.chunk, detail=detail)
            done += count
    except OSError as exc:
        return disk_error(exc, route.target_id)
    found = crc32c(read.view[: read.size])
    return None if found == read.crc32c else _corrupt(read, found)


def disk_error(exc: OSError, target_id: int) -> KvfsError:
    """An error of a descriptor that a server passed."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(path=f"target {target_id}")
    if exc.errno == errno.EINVAL:
        return InvalidRequest(detail="memory, offset or length is not page-aligned")
    return TargetFailed(target_id=target_id, detail=os.strerror(exc.errno or 0))


def _report(pool: ConnectionPool, route: Route, failed: Sequence[ChunkRead]) -> None:
    """Lets the server look at what this process could not read, so that it sees the disk fail by
    itself and goes out of service."""
    request = m.OpenChunks(route.target_id, _refs(failed), verify=True)
    try:
        _, descriptors = pool.run(
            route.address, lambda c: c.call_for_descriptors(request, descriptor_count)
        )
    except KvfsError:
        return
    close_all(descriptors)


def _write_local(
    connection: DataConnection,
    route: Route,
    writes: Sequence[ChunkWrite],
    passing: m.Passing | None,
) -> Results:
    request = m.StageChunks(route.target_id, len(writes))
    staged, descriptors = connection.call_for_descriptors(request, lambda s: len(s.tokens))
    try:
        results = [
            _fill_descriptor(fd, write, route)
            for fd, write in zip(descriptors, writes, strict=True)
        ]
    finally:
        # Before publishing: nobody may be able to change a chunk that others can see.
        close_all(descriptors)
    filled = [i for i, error in enumerate(results) if error is None]
    outcomes = connection.call(
        m.PublishChunks(
            route.target_id,
            tuple(m.StagedItem(staged.tokens[i], writes[i].message()) for i in filled),
            tuple(staged.tokens[i] for i, error in enumerate(results) if error is not None),
            passing,
        )
    )
    for place, index in enumerate(filled):
        results[index] = outcomes.error(place)
    return results


def _fill_descriptor(fd: int, write: ChunkWrite, route: Route) -> KvfsError | None:
    pages = write.pages()
    done = 0
    try:
        while done < len(pages):
            done += os.pwritev(fd, [pages[done:]], done)
    except OSError as exc:
        return disk_error(exc, route.target_id)
    return None


# --- remote


def _request(route: Route, reads: Sequence[ChunkRead]) -> m.ReadChunks:
    return m.ReadChunks(route.target_id, tuple([read.message() for read in reads]))


class _RemoteRead:
    """Bytes that are wrong here may be right there: then the way is to blame, and no block must be
    taken for lost. The server looks at its disk, and is asked again over another connection."""

    def __init__(
        self,
        pool: ConnectionPool,
        route: Route,
        reads: Sequence[ChunkRead],
        attempt: Attempt | None,
        share: ReadShare | None,
    ) -> None:
        self._pool = pool
        self._route = route
        self._reads = reads
        self._attempt = attempt
        self._share = share
        self._results: Results = [None] * len(reads)

    def run(self) -> Results:
        results = self._results
        left = self._fetch(range(len(self._reads)))
        for _ in range(READ_AGAIN_ATTEMPTS):
            left = self._recheck(left)
            if not left:
                return results
            before = list(results)
            try:
                doubtful = self._fetch(left, fresh=True)
            except KvfsError as exc:
                self._check_attempt()
                for index in left:
                    results[index] = exc
                return results
            # What the server says of a chunk twice it means; bytes say nothing.
            left = [
                i
                for i in doubtful
                if isinstance(results[i], ChunkCorrupt) or str(results[i]) != str(before[i])
            ]
        for index in left:
            detail = "bytes change on their way"
            results[index] = ConnectionLost(address=str(self._route.address), detail=detail)
        return results

    def _check_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.check()

    def _fetch(self, indexes: Sequence[int], *, fresh: bool = False) -> list[int]:
        """Results of some of the reads; answers which of them this side found wrong."""
        wanted = [self._reads[i] for i in indexes]
        share = None if fresh else self._share
        request = _request(self._route, wanted) if share is None else share.request(wanted)
        ahead = None if share is None else share.ahead

        def into(outcomes: m.Outcomes) -> list[memoryview]:
            there = wanted
            if outcomes.errors:
                there = [r for place, r in enumerate(wanted) if place not in outcomes.errors]
            return [r.view if len(r.view) == r.size else r.view[: r.size] for r in there]

        expected = [read.crc32c for read in wanted]
        outcomes, sums = self._pool.run(
            self._route.address,
            lambda c: c.call_summed(request, into, ahead, expected),
            seconds=seconds_for(0),
            attempt=self._attempt,
            fresh=fresh,
            ahead=ahead,
        )
        if not outcomes.errors and sums == expected:
            for index in indexes:
                self._results[index] = None
            return []
        doubtful: list[int] = []
        found = iter(sums)
        for place, (index, read) in enumerate(zip(indexes, wanted, strict=True)):
            if place in outcomes.errors:
                self._results[index] = outcomes.error(place)
                continue
            checksum = next(found)
            if checksum == read.crc32c:
                self._results[index] = None
            else:
                self._results[index] = _corrupt(read, checksum)
                doubtful.append(index)
        return doubtful

    def _recheck(self, indexes: Sequence[int]) -> list[int]:
        """Lets the server read chunks again from its disk. Those that are bad there have that as
        their result; answers the others."""
        left: list[int] = []
        for start in range(0, len(indexes), CHECK_CHUNKS_PER_REQUEST):
            group = indexes[start : start + CHECK_CHUNKS_PER_REQUEST]
            for index, error in zip(group, self._look(group), strict=True):
                if isinstance(error, IntegrityError | ChunkNotFound):
                    self._results[index] = error
                else:
                    left.append(index)
        return left

    def _look(self, indexes: Sequence[int]) -> Results:
        """What the server finds on its disk. Nothing, if it cannot be asked: it is asked again."""
        refs = _refs([self._reads[i] for i in indexes])
        request = m.CheckChunks(self._route.target_id, refs)
        try:
            outcomes: m.Outcomes = self._pool.run(
                self._route.address, lambda c: c.call(request), attempt=self._attempt, fresh=True
            )
        except KvfsError:
            self._check_attempt()
            return [None] * len(indexes)
        return [outcomes.error(place) for place in range(len(indexes))]


def _write_remote(
    connection: DataConnection,
    route: Route,
    writes: Sequence[ChunkWrite],
    passing: m.Passing | None,
) -> Results:
    messages = tuple(write.message() for write in writes)
    request = m.WriteChunks(route.target_id, messages, passing)
    outcomes = connection.call(request, [write.view[: write.size] for write in writes])
    return [outcomes.error(index) for index in range(len(writes))]


def lengthen(descriptor: int, size: int) -> None:
    """The file is at least ``size`` bytes long, and what it has stays as it is, whoever else writes
    to it meanwhile: ftruncate could make it shorter. Takes at most a block of the disk. Raises
    OSError."""
    if os.fstat(descriptor).st_size >= size:
        return
    try:
        os.posix_fallocate(descriptor, size - 1, 1)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        os.ftruncate(descriptor, size)
