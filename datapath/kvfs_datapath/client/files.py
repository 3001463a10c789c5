"""Ordinary files: bytes cut into chunks and striped over chains.

On this host the chunk server passes descriptors and this process reads and writes the chunk files
itself, through the page cache; what lies there is read without waiting and without any server
(``read_now``). Elsewhere each piece is a request over TCP.

All this is for chains of one copy. Files on replicated chains are ChainedFile's: what a file is is
decided when the first of its chains is looked up, and never changes.

The server marks a chunk OPEN before it lets anybody write. ``flush`` gives up the writable
descriptors and asks to seal; a chunk that somebody else still writes to stays open, and whoever
flushes last seals it. A writer that dies is noticed by the server.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

from kvfs_base import threads
from kvfs_base.errors import (
    ChunkNotFound,
    ConnectionLost,
    InvalidRequest,
    KvfsError,
    NoTarget,
)
from kvfs_base.limits import ITEMS_PER_REQUEST_MAX, TRANSFER_BYTES
from kvfs_base.seams import Buffer
from kvfs_base.types import ChunkId, Layout
from kvfs_datapath import messages as m
from kvfs_datapath.client.chain_files import ChainedFile
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.descriptors import Descriptor
from kvfs_datapath.client.outcomes import raise_first, wrong_piece
from kvfs_datapath.client.patience import Closed, Patience
from kvfs_datapath.client.routes import Route
from kvfs_datapath.client.segments import Segment, segments
from kvfs_datapath.client.staging import Adoption, StagedFile
from kvfs_datapath.client.transfers import descriptor_count, disk_error, lengthen
from kvfs_datapath.client.unsynced import Unsynced
from kvfs_datapath.limits import (
    FILE_RETRY_PAUSE_SECONDS,
    FILE_RETRY_SECONDS,
    READ_ATTEMPTS,
    SEAL_CHUNKS_PER_REQUEST,
)

STAT_CHUNKS_MAX = 64
"""More chunks than this are looked for in their directories: their names may not even be there."""

_Result = TypeVar("_Result")


class StripedFile:
    """One for each open inode of a mount, shared by its handles; thread-safe. Every method may
    raise NoTarget, ConnectionLost, DeadlineExceeded and TargetFailed, unless it is one that does
    not wait. A read that overlaps a concurrent write may see a part of it, as in any page cache."""

    def __init__(
        self,
        client: ChunkClient,
        inode: int,
        layout: Layout,
        *,
        retry_seconds: float = FILE_RETRY_SECONDS,
    ) -> None:
        """``retry_seconds``: how long to wait for a chunk server that went away."""
        if not layout.chains or not layout.chunk_bytes:
            raise InvalidRequest(detail="a layout without chains or chunk size")
        self._client = client
        self._inode = inode
        self._layout = layout
        self._retry_seconds = retry_seconds
        self._tries = 1 + int(retry_seconds / FILE_RETRY_PAUSE_SECONDS)
        self._decided = False
        self._chained: ChainedFile | None = None
        self._lock = threads.lock()
        self._closed = Closed(self._lock)
        self._unsealed: set[int] = set()
        self._unsynced = Unsynced()

    @property
    def chunk_bytes(self) -> int:
        return self._layout.chunk_bytes

    def widen(self, layout: Layout) -> None:
        """Chunks are longer now, and nothing was ever behind the first one, which has one copy."""
        self._layout = layout

    # --- reading

    def read(self, offset: int, length: int, size: int, sparse: bool) -> bytes:
        """The bytes ``offset <= x < min(offset + length, size)``. Where a chunk is missing or too
        short, zeros if the file is ``sparse``, else ChunkNotFound. Raises ChunkCorrupt."""
        wanted = self._segments(offset, min(offset + length, size) - offset)
        if len(wanted) == 1:
            whole = self._read_one(wanted[0])
            if whole is not None:
                return whole
        if (several := self._several()) is not None:
            return several.read(wanted, sparse)
        buffer = bytearray(sum(s.length for s in wanted))
        view = memoryview(buffer)
        jobs = [
            functools.partial(self._read_into, s, view[s.position : s.position + s.length], sparse)
            for s in wanted
        ]
        self._client.parallel(jobs)
        return bytes(buffer)

    def _read_one(self, segment: Segment) -> bytes | None:
        """The usual case, without a copy: one local chunk that has all the bytes."""
        chunk = self._chunk(segment.number)
        kept = self._client.descriptors.borrow(chunk, writable=False)
        if kept is None:
            return None
        try:
            data = os.pread(kept.fd, segment.length, segment.offset)
        except OSError:
            return None  # the long way tells what is wrong
        finally:
            self._client.descriptors.give_back(kept)
        return data if len(data) == segment.length else None

    def _read_into(self, segment: Segment, view: memoryview, sparse: bool) -> None:
        try:
            count = self._patiently(segment.number, self._read_piece, segment, view)
        except ChunkNotFound:
            count = 0
        if count < segment.length and not sparse:
            raise ChunkNotFound(self._inode, segment.number)

    def _read_piece(self, route: Route, segment: Segment, view: memoryview) -> int:
        """Bytes read: fewer than asked where the chunk ends."""
        if not route.local:
            return self._read_remote(route, segment, view)
        descriptor = self._descriptor(route, segment.number, writable=False)
        done = 0
        try:
            while done < segment.length:
                count = os.preadv(descriptor.fd, [view[done:]], segment.offset + done)
                if count == 0:
                    break
                done += count
        except OSError as exc:
            raise disk_error(exc, route.target_id) from exc
        finally:
            self._client.descriptors.give_back(descriptor)
        return done

    def _read_remote(self, route: Route, segment: Segment, view: memoryview) -> int:
        done = 0
        while done < segment.length:
            wanted = min(TRANSFER_BYTES, segment.length - done)
            count = self._fetch(route, segment, view[done : done + wanted], done)
            done += count
            if count < wanted:
                break
        return done

    def _fetch(self, route: Route, segment: Segment, view: memoryview, done: int) -> int:
        offset = segment.offset + done
        piece = m.Piece(*self._chunk(segment.number), offset, len(view))
        received = 0

        def into(outcomes: m.Outcomes) -> list[memoryview]:
            nonlocal received
            (info,) = outcomes.infos
            received = 0 if info is None else max(0, min(len(view), info.length - offset))
            return [view[:received]] if received else []

        request = m.ReadPieces(route.target_id, (piece,), summed=True)
        error: ConnectionLost | None = None
        for number in range(READ_ATTEMPTS):
            outcomes = self._client.pool.run(
                route.address, lambda c: c.call(request, into=into), fresh=number > 0
            )
            raise_first(outcomes)
            error = wrong_piece(piece, outcomes, view[:received])
            if error is None:
                return received
        assert error is not None
        raise error

    def read_now(self, offset: int, length: int, size: int, sparse: bool) -> bytes | None:
        """As ``read``, but only if no disk and no server need be waited for; else None."""
        buffer = bytearray(max(0, min(offset + length, size) - offset))
        return bytes(buffer) if self.read_into_now(offset, memoryview(buffer)) else None

    def read_into_now(self, offset: int, view: memoryview) -> bool:
        """Fills ``view``, which ends within the file, if no disk and no server need be waited for;
        else False. For buffers that are used again and again: the page faults of a new one cost as
        much as the copy."""
        return all(
            self._read_cached(s, view[s.position : s.position + s.length])
            for s in self._segments(offset, len(view))
        )

    def _read_cached(self, segment: Segment, view: memoryview) -> bool:
        kept = self._client.descriptors.borrow(self._chunk(segment.number), writable=False)
        if kept is None:
            return False
        try:
            count = os.preadv(kept.fd, [view], segment.offset, os.RWF_NOWAIT)
        except OSError:  # not in the page cache, or a file system that cannot tell
            return False
        finally:
            self._client.descriptors.give_back(kept)
        # A short count is the end of the cached part or of the chunk: the long way knows which.
        return count == segment.length

    # --- writing

    def write(self, offset: int, data: Buffer) -> None:
        """All of ``data``; on an error any part of it may have been written. Raises DiskFull, and
        WriteUncertain on chains of several copies."""
        view = memoryview(data).cast("B")
        wanted = self._segments(offset, len(view))
        if (several := self._several()) is not None:
            several.write(wanted, view)
            return
        self._client.parallel(
            [
                functools.partial(
                    self._patiently,
                    s.number,
                    self._write_piece,
                    s,
                    view[s.position : s.position + s.length],
                )
                for s in wanted
            ]
        )

    def write_now(self, offset: int, data: Buffer) -> bool:
        """As ``write``, if all of it goes to chunks that are open for writing here: into the page
        cache, without asking a server. Otherwise does nothing and answers False."""
        view = memoryview(data).cast("B")
        held: list[tuple[Segment, Descriptor]] = []
        try:
            for segment in self._segments(offset, len(view)):
                chunk = self._chunk(segment.number)
                descriptor = self._client.descriptors.borrow(chunk, writable=True)
                if descriptor is None:
                    return False
                held.append((segment, descriptor))
            for segment, descriptor in held:
                piece = view[segment.position : segment.position + segment.length]
                self._write_descriptor(descriptor, segment, piece)
        finally:
            for _, descriptor in held:
                self._client.descriptors.give_back(descriptor)
        return True

    def _write_piece(self, route: Route, segment: Segment, view: memoryview) -> None:
        if not route.local:
            self._write_remote(route, segment, view)
            return
        descriptor = self._descriptor(route, segment.number, writable=True)
        try:
            self._write_descriptor(descriptor, segment, view)
        finally:
            self._client.descriptors.give_back(descriptor)

    def _write_descriptor(self, descriptor: Descriptor, segment: Segment, view: memoryview) -> None:
        # A flush that comes between finds the descriptor in use, and keeps this in mind.
        self._note_write(segment.number)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(descriptor.fd, view[done:], segment.offset + done)
        except OSError as exc:
            raise disk_error(exc, 0) from exc

    def _write_remote(self, route: Route, segment: Segment, view: memoryview) -> None:
        try:
            for done in range(0, len(view), TRANSFER_BYTES):
                part = view[done : done + TRANSFER_BYTES]
                piece = m.Piece(*self._chunk(segment.number), segment.offset + done, len(part))
                incarnation = self._send_piece(
                    route, m.WritePieces(route.target_id, (piece,)), part
                )
                with self._lock:
                    self._unsynced.add(segment.number, incarnation)
        finally:
            # Afterwards: a flush that came between has sealed what was there before.
            self._note_write(segment.number)

    def _send_piece(self, route: Route, request: m.WritePieces, part: memoryview) -> int:
        """Of which incarnation of the target it was taken."""
        pool = self._client.pool
        outcomes: m.Outcomes = pool.run(
            route.address, lambda c: c.call(request, [part]), watch=True
        )
        raise_first(outcomes)
        return outcomes.incarnation

    def _note_write(self, number: int) -> None:
        with self._lock:
            self._unsealed.add(number)
            self._unsynced.add(number)

    def truncate(self, old_size: int, new_size: int) -> None:
        """Makes a file of ``old_size`` bytes shorter: cuts the chunk at the new end and removes
        those after it. Growing does nothing: what lies between reads as zeros (``sparse``)."""
        if new_size >= old_size:
            return
        if (several := self._several()) is not None:
            several.truncate(old_size, new_size)
            return
        chunk_bytes = self._layout.chunk_bytes
        first, end = -(-new_size // chunk_bytes), -(-old_size // chunk_bytes)
        if first < end:
            self._remove(first, end)
        if new_size % chunk_bytes:
            number = new_size // chunk_bytes
            try:
                self._patiently(number, self._cut, number, new_size % chunk_bytes)
            finally:
                self._note_write(number)

    def truncate_in_place(self, old_size: int, new_size: int) -> None:
        """As ``truncate``, for a file that somebody reads through its first chunk's descriptor on
        this host: that chunk stays the same file, and becomes as long as the whole (or a chunk),
        also if it grows. It is open for writing from then on, until ``flush``."""
        chunk_bytes = self._layout.chunk_bytes
        self.truncate(old_size, max(new_size, chunk_bytes))
        self._patiently(0, self._fit, min(new_size, chunk_bytes))

    def grow_in_place(self, size: int) -> None:
        """Such a file's first chunk is long enough for ``size`` bytes of the file, and open for
        writing. What is longer stays as it is."""
        self._patiently(0, self._fit, min(size, self._layout.chunk_bytes), lengthen)

    def _fit(
        self, route: Route, length: int, fit: Callable[[int, int], None] = os.ftruncate
    ) -> None:
        descriptor = self._descriptor(route, 0, writable=True)
        self._note_write(0)
        try:
            fit(descriptor.fd, length)
        except OSError as exc:
            raise disk_error(exc, route.target_id) from exc
        finally:
            self._client.descriptors.give_back(descriptor)

    def open_whole(self, size: int) -> int:
        """A read-only descriptor of the file's only chunk, verified, for the caller to close.
        Raises NoTarget unless that is on this host, its only copy, and ``size`` bytes long; and
        what ChunkClient.open_sealed raises."""
        chain = self._layout.chain_of(0)
        is_alone = self._client.router.is_replicated(chain) is False
        if size > self._layout.chunk_bytes or not is_alone:
            raise NoTarget(detail=f"inode {self._inode} is not one file")
        descriptor = self._client.open_sealed(self._chunk(0), chain)
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            raise NoTarget(detail=f"inode {self._inode} is not one file of {size} bytes")
        return descriptor

    def stage(self) -> StagedFile | None:
        """An empty file on this host that can be this file's first chunk, if there is one at hand.
        Never waits."""
        return self._client.staged.take(self._layout.chain_of(0))

    def adopt(self, staged: StagedFile) -> None:
        """What is in ``staged`` is the first chunk from now on: who has its descriptor writes to
        it. Raises ConnectionLost if its server has forgotten it, DiskFull."""
        self._note_write(0)
        self._client.staged.adopt(staged, self._chunk(0))

    def begin_adopt(self, staged: StagedFile) -> Adoption | None:
        """``adopt``, as far as it does not wait: see there. None if ``adopt`` has to be used."""
        self._note_write(0)
        return self._client.staged.begin_adopt(staged, self._chunk(0))

    def unstage(self, staged: StagedFile) -> None:
        """Nobody has ``staged`` open any more, and what was written to it is not wanted."""
        if not self.unstage_now(staged):
            self._client.staged.discard(staged)

    def unstage_now(self, staged: StagedFile) -> bool:
        """``unstage``, if its server need not be asked, as for what is empty; else nothing."""
        found = os.fstat(staged.fd)
        empty = not (found.st_size or found.st_blocks)
        return empty and self._client.staged.give_back(staged)

    def close_soon(self, staged: StagedFile) -> bool:
        """``close`` of a file whose only chunk was ``staged``, by one who closes its descriptor at
        once: the chunk is sealed a moment later. Never waits. False, and nothing was done, if there
        is more to seal."""
        with self._lock:
            if self._unsealed - {0}:
                return False
            self._unsealed.clear()
        self._client.descriptors.drop(self._chunk(0))
        self._client.staged.seal_soon(staged, self._chunk(0))
        return True

    def is_first(self, fd: int) -> bool:
        """Whether ``fd`` is the first chunk's. Waits for its server."""
        try:
            return self._patiently(0, self._is_chunk, 0, fd)
        except ChunkNotFound:
            return False

    def _is_chunk(self, route: Route, number: int, fd: int) -> bool:
        descriptor = self._descriptor(route, number, writable=False)
        try:
            return os.path.sameopenfile(descriptor.fd, fd)
        finally:
            self._client.descriptors.give_back(descriptor)

    def touched(self) -> None:
        """Somebody wrote to the first chunk who does not tell."""
        self._note_write(0)

    def copy_from(
        self, descriptor: int, offset: int, end: int, bytes_max: int, *, known_end: int = 0
    ) -> int:
        """Copies bytes of another file from ``offset`` to ``end`` to the same places here, but for
        holes, and no more than ``bytes_max`` of them. What lies before ``known_end`` was copied
        before: it is written only where it differs, as a program that syncs its file again and
        again changes little of it. Where it got to; ``end`` if there is nothing left."""
        copied = 0
        while (offset := _next_data(descriptor, offset, end)) < end and copied < bytes_max:
            wanted = min(end, os.lseek(descriptor, offset, os.SEEK_HOLE)) - offset
            data = os.pread(descriptor, min(TRANSFER_BYTES, bytes_max - copied, wanted), offset)
            if not data:  # it was made shorter meanwhile
                return end
            if not (offset < known_end and self._has(offset, data)):
                self.write(offset, data)
            offset += len(data)
            copied += len(data)
        return offset

    def _has(self, offset: int, data: bytes) -> bool:
        try:
            return self.read(offset, len(data), offset + len(data), False) == data
        except ChunkNotFound:
            return False

    def _cut(self, route: Route, number: int, length: int) -> None:
        sized = m.SizedChunk(*self._chunk(number), length)
        request = m.TruncateChunks(route.target_id, (sized,))
        outcomes: m.Outcomes = self._client.pool.run(route.address, lambda c: c.call(request))
        raise_first(outcomes)
        if not route.local:
            with self._lock:
                self._unsynced.add(number, outcomes.incarnation)

    def _remove(self, first: int, end: int) -> None:
        """Each target looks for the whole range: chunks of one inode share a directory there."""
        with self._lock:
            self._unsealed -= {n for n in self._unsealed if first <= n < end}
            self._unsynced.drop(first, end)
        self._client.descriptors.drop_range(self._inode, first, end)
        one_of_each_chain = range(first, min(end, first + len(self._layout.chains)))
        self._client.parallel(
            [
                functools.partial(self._patiently, number, self._remove_range, first, end)
                for number in one_of_each_chain
            ]
        )

    def _remove_range(self, route: Route, first: int, end: int) -> None:
        request = m.RemoveRange(route.target_id, self._inode, first, end)
        self._client.pool.run(route.address, lambda c: c.call(request))

    # --- holes

    def drop_chunks(self, first: int, end: int) -> None:
        """The chunks ``first <= number < end`` are gone: they read as zeros (``sparse``)."""
        if (several := self._several()) is not None:
            size = self._layout.chunk_bytes
            several.truncate(end * size, first * size)
        else:
            self._remove(first, end)

    def lengths(self, first: int, end: int) -> dict[int, int] | None:
        """Of those of the chunks ``first <= number < end`` that there are. None on chains of
        several copies, where it is not asked for."""
        if self._several() is not None:
            return None
        found: dict[int, int] = {}

        def stat(route: Route, numbers: list[int]) -> set[int]:
            request = m.StatChunks(route.target_id, self._refs(numbers))
            outcomes = self._client.pool.run(route.address, lambda c: c.call(request))
            raise_first(outcomes, besides=ChunkNotFound)
            found.update((info.number, info.length) for info in outcomes.infos if info is not None)
            return set()

        def find(route: Route, start: int = first) -> None:
            request = m.FindChunks(route.target_id, self._inode, start, end)
            page: m.ChunkPage = self._client.pool.run(route.address, lambda c: c.call(request))
            found.update((c.number, c.info.length) for c in page.chunks if c.info is not None)
            if page.next is not None:
                find(route, page.next.number)

        if end - first <= STAT_CHUNKS_MAX:
            self._each_chunk(set(range(first, end)), stat, ITEMS_PER_REQUEST_MAX)
        else:
            one_of_each_chain = range(first, min(end, first + len(self._layout.chains)))
            self._client.parallel(
                [functools.partial(self._patiently, n, find) for n in one_of_each_chain]
            )
        return found

    # --- finishing

    def flush(self) -> None:
        """Seals what was written: its checksums are computed, unless somebody else still writes
        there. Everything written is then on the servers. Cheap if nothing was written."""
        with self._lock:
            numbers, self._unsealed = self._unsealed, set()
        if not numbers:
            return
        try:
            still_open = self._each_chunk(numbers, self._seal, SEAL_CHUNKS_PER_REQUEST)
        except BaseException:
            with self._lock:
                self._unsealed |= numbers
            raise
        with self._lock:
            self._unsealed |= still_open

    def _seal(self, route: Route, numbers: list[int]) -> set[int]:
        """The numbers that stay open."""
        for number in numbers:
            self._client.descriptors.drop(self._chunk(number), only_writable=True)
        request = m.SealChunks(route.target_id, self._refs(numbers))
        outcomes = self._client.pool.run(route.address, lambda c: c.call(request))
        raise_first(outcomes, besides=ChunkNotFound)  # somebody removed the file's end
        return {
            number
            for number, info in zip(numbers, outcomes.infos, strict=True)
            if info is not None and not info.is_sealed
        }

    def sync(self) -> None:
        """Everything written here is on stable storage afterwards. It is not sealed for that: a
        database that syncs after each page would compute a checksum of the whole chunk each
        time. Raises TargetFailed, from then on each time, if a server that was written to may have
        lost that since: it was killed, or its machine started again."""
        if self._chained is not None:
            self._chained.sync()
            return
        with self._lock:
            syncing, self._unsynced = self._unsynced, Unsynced()

        def sync(route: Route, numbers: list[int]) -> set[int]:
            request = m.SyncChunks(route.target_id, self._refs(numbers))
            pool = self._client.pool
            outcomes: m.Outcomes = pool.run(route.address, lambda c: c.call(request), watch=True)
            raise_first(outcomes)
            with self._lock:
                syncing.compare(numbers, outcomes.incarnation)
            return set()

        try:
            self._each_chunk(syncing.numbers, sync, ITEMS_PER_REQUEST_MAX)
            syncing.raise_lost()
        except BaseException:
            with self._lock:
                self._unsynced.take_back(syncing)
            raise

    def close(self) -> None:
        """``flush``, and gives up the descriptors in any case."""
        self._closed.set()
        try:
            self.flush()
        finally:
            self._client.descriptors.drop_inode(self._inode)

    # --- helpers

    def _chunk(self, number: int) -> ChunkId:
        return ChunkId(self._inode, number)

    def _refs(self, numbers: Iterable[int]) -> tuple[m.ChunkRef, ...]:
        return tuple(m.ChunkRef(*self._chunk(number)) for number in numbers)

    def _segments(self, offset: int, length: int) -> list[Segment]:
        return segments(self._layout.chunk_bytes, offset, length)

    def _several(self) -> ChainedFile | None:
        """What does the work if the file's chains have several copies."""
        if self._decided:
            return self._chained
        client = self._client
        for tries_left in reversed(range(self._tries)):
            try:
                found = {client.router.is_replicated(chain) for chain in self._layout.chains}
                break
            except KvfsError:
                if not tries_left or self._closed.wait(FILE_RETRY_PAUSE_SECONDS):
                    raise
        if True in found:
            self._chained = ChainedFile(client, self._inode, self._layout, self._patience)
        self._decided = found != {None}
        return self._chained

    def _patience(self, seconds: float) -> Patience:
        """``seconds``: at least, if this file waits at all."""
        wait = self._retry_seconds and max(self._retry_seconds, seconds)
        return Patience(self._client.shared.env, self._closed, wait)

    def _descriptor(self, route: Route, number: int, *, writable: bool) -> Descriptor:
        """One for ``give_back``. Raises ChunkNotFound unless ``writable``, ChunkCorrupt."""
        cache = self._client.descriptors
        chunk = self._chunk(number)
        kept = cache.borrow(chunk, writable=writable)
        if kept is not None:
            return kept
        refs = self._refs([number])
        request: m.ChunkRequest = (
            m.OpenForWrite(route.target_id, refs)
            if writable
            else m.OpenChunks(route.target_id, refs, verify=True)
        )
        if writable:
            self._note_write(number)  # the server marks it open
        outcomes, descriptors = self._client.pool.run(
            route.address, lambda c: c.call_for_descriptors(request, descriptor_count)
        )
        raise_first(outcomes)
        return cache.add(chunk, descriptors[0], writable=writable)

    def _patiently(
        self, number: int, action: Callable[..., _Result], *arguments: object
    ) -> _Result:
        """``action(route, *arguments)`` on the target of a chunk, again and again while its server
        is away."""
        chain = self._layout.chain_of(number)
        for _ in range(self._tries - 1):
            try:
                return action(self._client.router.route(chain), *arguments)
            except (NoTarget, ConnectionLost):
                self._client.router.doubt()
                self._closed.wait(FILE_RETRY_PAUSE_SECONDS)
        return action(self._client.router.route(chain), *arguments)

    def _each_chunk(
        self, numbers: set[int], action: Callable[[Route, list[int]], set[int]], at_once: int
    ) -> set[int]:
        """``action`` on batches of chunks of one chain each; the union of its answers."""
        by_chain: dict[int, list[int]] = {}
        for number in sorted(numbers):
            by_chain.setdefault(self._layout.chain_of(number), []).append(number)
        answers: list[set[int]] = []

        def run(batch: list[int]) -> None:
            answers.append(self._patiently(batch[0], action, batch))

        self._client.parallel(
            [
                functools.partial(run, group[start : start + at_once])
                for group in by_chain.values()
                for start in range(0, len(group), at_once)
            ]
        )
        return set().union(*answers)


def _next_data(descriptor: int, offset: int, end: int) -> int:
    """Where the next bytes are that are not a hole; ``end`` if there are none before it."""
    try:
        return min(end, os.lseek(descriptor, offset, os.SEEK_DATA))
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return end
        raise disk_error(exc, 0) from exc
