"""One data connection of a chunk server: takes a request, does it, answers, and again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from kvfs_base import frames
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KvfsError,
    LimitExceeded,
    ProtocolError,
    TargetFailed,
    VersionMismatch,
)
from kvfs_base.frames import ErrorBody, Kind
from kvfs_base.limits import KIB
from kvfs_base.seams import Connection, DiskFile
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains.block_writes import BlockWriter, info_of, publish, raise_error
from kvfs_datapath.chains.requests import ChainSession, refuse_versioned
from kvfs_datapath.chains.service import ChainService
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.kept import KeptFile
from kvfs_datapath.chunks.listing import ChunkListing, find_chunks
from kvfs_datapath.chunks.store import ChunkStore, StagedChunk
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import STALL_SECONDS, UNSEALED_CHUNKS_MAX
from kvfs_datapath.server import placing
from kvfs_datapath.server.targets import Targets
from kvfs_datapath.wire import receive_body, receive_header, send_message

log = logging.getLogger(__name__)

_requests = msgspec.msgpack.Decoder(m.DataRequest)
_Item = TypeVar("_Item")
DRAIN_BYTES = 64 * KIB
SMALL_BYTES = 256 * KIB
"""A chunk of up to this size is read from the disk at once when its first byte is wanted."""


@dataclasses.dataclass(slots=True)
class _Answer:
    message: Any
    store: ChunkStore | None
    """Whose disk the answer comes from."""
    kept: list[KeptFile] = dataclasses.field(default_factory=list)
    """Given back once the answer is sent."""
    files: list[DiskFile] = dataclasses.field(default_factory=list)
    """Closed once the answer is sent."""
    passed: list[int] = dataclasses.field(default_factory=list)
    """Descriptors that the peer gets."""
    pieces: list[tuple[DiskFile, int, int]] = dataclasses.field(default_factory=list)
    """Payload: (file, offset, length)."""
    memory: list[memoryview] = dataclasses.field(default_factory=list)
    """Or bytes that were read already, in a buffer that goes back with ``lent``."""
    lent: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        for file in self.files:
            file.close()
        if self.kept:
            assert self.store is not None
            self.store.kept.give_back(self.kept)
        self.lent.close()


class DataSession:
    """Everything a connection holds (staged files, chunks it wrote to) goes with it."""

    def __init__(
        self,
        connection: Connection,
        targets: Targets,
        buffers: BufferPool,
        counters: Counters,
        chains: ChainService,
        *,
        statistics: Callable[[], dict[str, int]],
    ) -> None:
        self._connection = connection
        self._targets = targets
        self._buffers = buffers
        self._counters = counters
        self._statistics = statistics
        self._unread = 0
        self._staged: dict[int, tuple[ChunkStore, StagedChunk]] = {}
        self._next_token = 1
        self._unsealed: dict[tuple[ChunkStore, ChunkId], None] = {}
        self._listing: ChunkListing | None = None
        self._chains = ChainSession(chains, self._receive)
        self._handlers: dict[type[Any], Callable[[ChunkStore, Any], _Answer]] = {
            m.ReadChunks: self._read_chunks,
            m.OpenChunks: self._open_chunks,
            m.WriteChunks: self._write_chunks,
            m.StageChunks: self._stage_chunks,
            m.PublishChunks: self._publish_chunks,
            m.OpenForWrite: self._open_for_write,
            m.AdoptChunks: self._adopt_chunks,
            m.ReadPieces: self._read_pieces,
            m.WritePieces: self._write_pieces,
            m.SealChunks: self._seal_chunks,
            m.TruncateChunks: self._truncate_chunks,
            m.SyncChunks: self._sync_chunks,
            m.RemoveRange: self._remove_range,
            m.StatChunks: self._stat_chunks,
            m.ListChunks: self._list_chunks,
            m.FindChunks: self._find_chunks,
            m.CheckChunks: self._check_chunks,
            m.CompareMoved: lambda store, request: _Answer(placing.compare(store, request), store),
            m.PlaceMoved: self._place_moved,
        }

    def run(self) -> None:
        """Until the peer goes away or breaks the protocol. Closes the connection."""
        try:
            while True:
                self._serve_one()
        except (ConnectionLost, DeadlineExceeded) as exc:
            log.debug("connection ended: %s", exc)
        except (ProtocolError, VersionMismatch) as exc:
            log.info("closing connection: %s", exc)
        finally:
            self._connection.close()
            self._let_go()

    def _let_go(self) -> None:
        for store, staged in self._staged.values():
            store.discard(staged)
        for store, chunk in self._unsealed:
            self._targets.settle(store, chunk)

    # --- the conversation

    def _serve_one(self) -> None:
        connection = self._connection
        connection.set_timeout(None)  # an idle connection may stay
        header = receive_header(connection)
        if header.kind is not Kind.REQUEST:
            raise ProtocolError(detail=f"a frame of kind {header.kind.name} for a request")
        connection.set_timeout(STALL_SECONDS)
        self._unread = header.payload_bytes
        body = receive_body(connection, header)
        self._counters.add(requests=1)
        try:
            answer = self._handle(body)
        except (ConnectionLost, DeadlineExceeded):
            raise
        except KvfsError as exc:
            self._refuse(header.request_id, exc)
            return
        except Exception as exc:
            log.exception("a request failed")
            self._refuse(header.request_id, InternalError(detail=type(exc).__name__))
            return
        try:
            self._send(header.request_id, answer)
        finally:
            answer.close()

    def _handle(self, body: bytes) -> _Answer:
        try:
            request = _requests.decode(body)
        except frames.UNDECODABLE as exc:
            raise ProtocolError(detail=str(exc)) from exc
        # Before anything is begun, or passed on: the next member would wait for what never comes.
        expected = m.payload_bytes(request)
        if self._unread != expected:
            raise InvalidRequest(detail=f"{self._unread} bytes of payload, not {expected}")
        return self._answer(request)

    def _answer(self, request: m.DataRequest) -> _Answer:
        if isinstance(request, m.Statistics):
            return _Answer(self._statistics(), None)
        store = self._targets.find(request.target_id)
        handler = self._handlers.get(type(request))
        if handler is not None:
            return handler(store, request)
        return _Answer(self._chains.handlers[type(request)](store, request), store)

    def _send(self, request_id: int, answer: _Answer) -> None:
        sent = sum(map(len, answer.memory))
        total = sent + sum(length for _, _, length in answer.pieces)
        send_message(
            self._connection,
            Kind.REPLY,
            request_id,
            answer.message,
            answer.memory,
            payload_bytes=total,
            descriptors=answer.passed,
            more=total > sent,
        )
        try:
            self._connection.send_files(answer.pieces)
        except ConnectionLost:
            # If a file that was kept is shorter than it was, the next attempt opens it again.
            for kept in answer.kept:
                kept.drop()
            raise
        except TargetFailed as exc:
            # The answer is under way: only breaking off can still say that it went wrong.
            assert answer.store is not None
            answer.store.fail(exc)
            raise ConnectionLost(detail="the disk failed during a transfer") from exc
        self._counters.add(read_bytes=total, descriptors_passed=len(answer.passed))

    def _refuse(self, request_id: int, error: KvfsError) -> None:
        """Reads what is left of the payload, so that the peer, who is sending, gets to read."""
        scratch = memoryview(bytearray(min(DRAIN_BYTES, self._unread)))
        while self._unread:
            self._receive(scratch[: min(len(scratch), self._unread)])
        self._connection.send([frames.encode_error(request_id, error)])

    def _receive(self, view: memoryview) -> None:
        """The next payload bytes."""
        assert len(view) <= self._unread
        self._connection.receive_into([view])
        self._unread -= len(view)

    def _each(self, items: Sequence[_Item], act: Callable[[_Item], ChunkInfo | None]) -> m.Outcomes:
        """One item's failure is its own."""
        infos: list[ChunkInfo | None] = []
        errors: dict[int, ErrorBody] = {}
        for index, item in enumerate(items):
            try:
                infos.append(act(item))
            except KvfsError as exc:
                infos.append(None)
                errors[index] = self._error_of(exc)
        return m.Outcomes(tuple(infos), errors)

    def _error_of(self, exc: KvfsError) -> ErrorBody:
        """Of an item; others end the request, or the connection."""
        if isinstance(exc, ConnectionLost | DeadlineExceeded):
            raise exc
        if isinstance(exc, ChunkCorrupt | ChunkMismatch):
            self._counters.add(bad_chunks=1)
        return ErrorBody(exc.wire_code, exc.wire_data())

    def _require_descriptors(self) -> None:
        if not self._connection.can_pass_descriptors:
            raise InvalidRequest(detail="descriptors pass over Unix sockets only")

    # --- whole chunks

    def _borrow_kept(
        self, answer: _Answer, items: Sequence[m.ChunkRef], *, direct: bool = False
    ) -> list[KeptFile | None]:
        """Those that are open already, in the order of the items; ``_open_kept`` has the others."""
        assert answer.store is not None
        chunks = [(item.inode, item.number, item.chain) for item in items]
        found = self._chains.borrow_kept(answer.store, chunks, direct=direct)
        answer.kept += [kept for kept in found if kept is not None]
        return found

    def _open_kept(self, answer: _Answer, item: m.ChunkRef, *, direct: bool = False) -> KeptFile:
        assert answer.store is not None
        kept = self._chains.borrow(answer.store, item.chunk, direct=direct)
        answer.kept.append(kept)
        return kept

    def _read_chunks(self, store: ChunkStore, request: m.ReadChunks) -> _Answer:
        answer = _Answer(None, store)
        errors: dict[int, ErrorBody] = {}
        with _closing_on_error(answer):
            found = self._borrow_kept(answer, request.chunks)
            for index, (item, was_open) in enumerate(zip(request.chunks, found, strict=True)):
                try:
                    kept = was_open or self._open_kept(answer, item)
                    difference = item.difference(kept.info)
                    if difference:
                        raise ChunkMismatch(*item.chunk, detail=difference)
                except KvfsError as exc:
                    errors[index] = self._error_of(exc)
                    continue
                # The whole batch is on its way from the disk before the first byte is sent. What
                # was kept open was read lately: where it is small, to ask costs a tenth of sending.
                if kept.is_new or item.size > SMALL_BYTES:
                    kept.file.will_need(0, item.size)
                answer.pieces.append((kept.file, 0, item.size))
        answer.message = m.Outcomes((), errors)
        self._counters.add(chunks_read=len(answer.pieces))
        return answer

    def _open_chunks(self, store: ChunkStore, request: m.OpenChunks) -> _Answer:
        self._require_descriptors()
        answer = _Answer(None, store)

        def open_one(item: m.ChunkRef) -> ChunkInfo:
            _require_here(store, item.chunk)
            if request.verify:
                self._verify(store, item.chunk, request.seal)
            kept = next(open_already) or self._open_kept(answer, item, direct=request.direct)
            answer.passed.append(kept.file.fileno())
            return kept.info

        with _closing_on_error(answer):
            open_already = iter(self._borrow_kept(answer, request.chunks, direct=request.direct))
            answer.message = self._each(request.chunks, open_one)
        return answer

    def _verify(self, store: ChunkStore, chunk: ChunkId, seal: bool) -> None:
        if seal and not chunk.chain:
            store.seal(chunk)
        kept = self._chains.borrow(store, chunk)
        try:
            store.verify(kept.file, kept.info)
        finally:
            kept.close()

    def _write_chunks(self, store: ChunkStore, request: m.WriteChunks) -> _Answer:
        if request.passing is not None:
            return _Answer(self._chains.write_chunks(store, request), store)
        self._chains.check_block(store, request.chunks, None)
        writer = BlockWriter(self._counters, self._receive)
        with self._buffers.lend(STALL_SECONDS) as buffer:
            results = writer.write(store, request.chunks, buffer)
        return _Answer(self._each(results, raise_error), store)

    def _stage_chunks(self, store: ChunkStore, request: m.StageChunks) -> _Answer:
        self._require_descriptors()
        staged: list[StagedChunk] = []
        try:
            staged.extend(store.stage() for _ in range(request.count))
        except BaseException:
            for one in staged:
                store.discard(one)
            raise
        tokens = tuple(range(self._next_token, self._next_token + request.count))
        self._next_token += request.count
        self._staged.update(zip(tokens, ((store, one) for one in staged), strict=True))
        return _Answer(m.Staged(tokens), store, passed=[one.file.fileno() for one in staged])

    def _publish_chunks(self, store: ChunkStore, request: m.PublishChunks) -> _Answer:
        self._chains.check_block(store, [i.chunk for i in request.chunks], request.passing)

        for token in request.discard:
            dropped = self._staged.pop(token, None)
            if dropped is not None:
                dropped[0].discard(dropped[1])
        results: list[KvfsError | None] = [None] * len(request.chunks)
        batch: dict[int, tuple[StagedChunk, ChunkInfo]] = {}
        for index, item in enumerate(request.chunks):
            found = self._staged.get(item.token)
            if found is None or found[0] is not store:
                results[index] = InvalidRequest(detail=f"nothing is staged as {item.token}")
                continue
            del self._staged[item.token]
            batch[index] = (found[1], info_of(item.chunk))
        published = publish(store, list(batch.values()), self._counters)
        for index, error in zip(batch, published, strict=True):
            results[index] = error
        return _Answer(self._each(results, raise_error), store)

    # --- chunks of ordinary files

    def _writes_to(self, store: ChunkStore, chunk: ChunkId) -> None:
        self._unsealed[store, chunk] = None
        while len(self._unsealed) > UNSEALED_CHUNKS_MAX:
            oldest = next(iter(self._unsealed))
            del self._unsealed[oldest]
            self._targets.settle(*oldest)

    def _open_for_write(self, store: ChunkStore, request: m.OpenForWrite) -> _Answer:
        refuse_versioned(request.chunks)
        self._require_descriptors()
        answer = _Answer(None, store)

        def open_one(item: m.ChunkRef) -> ChunkInfo:
            self._writes_to(store, item.chunk)
            with store.leaving.changing(item.inode):
                file, info = store.open_for_write(item.chunk)
            answer.files.append(file)
            answer.passed.append(file.fileno())
            return info

        with _closing_on_error(answer):
            answer.message = self._each(request.chunks, open_one)
        return answer

    def _adopt_chunks(self, store: ChunkStore, request: m.AdoptChunks) -> _Answer:
        refuse_versioned(request.chunks)

        def adopt(item: m.Adopted) -> ChunkInfo:
            found = self._staged.get(item.token)
            if found is None or found[0] is not store:
                raise InvalidRequest(detail=f"nothing is staged as {item.token}")
            del self._staged[item.token]
            self._writes_to(store, item.chunk)
            return store.adopt(found[1], item.chunk)

        return _Answer(self._each(request.chunks, adopt), store)

    def _read_pieces(self, store: ChunkStore, request: m.ReadPieces) -> _Answer:
        if request.summed:
            return self._read_summed(store, request)
        answer = _Answer(None, store)

        def read(item: m.Piece) -> ChunkInfo:
            if request.passing is not None:
                file, info = self._chains.open_for(store, item.chunk, request.passing)
                answer.files.append(file)
            else:
                _require_here(store, item.chunk)
                kept = self._chains.borrow(store, item.chunk)
                answer.kept.append(kept)
                file, info = kept.file, kept.info
            store.verify(file, info)
            length = max(0, min(item.length, info.length - item.offset))
            if length > SMALL_BYTES:
                file.will_need(item.offset, length)
            answer.pieces.append((file, item.offset, length))
            return info

        with _closing_on_error(answer):
            answer.message = self._each(request.pieces, read)
        return answer

    def _read_summed(self, store: ChunkStore, request: m.ReadPieces) -> _Answer:
        """What was summed is what is sent: the file may be written to meanwhile."""
        answer = _Answer(None, store)
        sums: list[int] = []
        room = memoryview(b"")

        def read(item: m.Piece) -> ChunkInfo:
            nonlocal room
            sums.append(0)
            info, data = self._read_piece(store, item, room)
            sums[-1] = crc32c(data)
            answer.memory.append(data)
            room = room[len(data) :]
            return info

        with _closing_on_error(answer):
            room = answer.lent.enter_context(self._buffers.lend(STALL_SECONDS))
            outcomes = self._each(request.pieces, read)
            answer.message = msgspec.structs.replace(outcomes, sums=tuple(sums))
        return answer

    def _read_piece(
        self, store: ChunkStore, item: m.Piece, room: memoryview
    ) -> tuple[ChunkInfo, memoryview]:
        _require_here(store, item.chunk)
        kept = self._chains.borrow(store, item.chunk)
        file, info = kept.file, kept.info
        try:
            store.verify(file, info)
            wanted = max(0, min(item.length, info.length - item.offset))
            if wanted > len(room):
                raise LimitExceeded(detail="bytes of pieces with sums", limit=len(room))
            if wanted > SMALL_BYTES:
                file.will_need(item.offset, wanted)
            count = file.preadv([room[:wanted]], item.offset) if wanted else 0
        except TargetFailed as exc:
            store.fail(exc)
            raise
        finally:
            kept.close()
        if count < wanted:  # it was cut meanwhile
            info = msgspec.structs.replace(info, length=item.offset + count)
        return info, room[:count]

    def _write_pieces(self, store: ChunkStore, request: m.WritePieces) -> _Answer:
        refuse_versioned(request.pieces)

        def write(item: m.Piece) -> None:
            self._receive(buffer[: item.length])
            self._writes_to(store, item.chunk)
            with store.leaving.changing(item.inode):
                store.patch(item.chunk, item.offset, [buffer[: item.length]])
            self._counters.add(written_bytes=item.length)

        with self._buffers.lend(STALL_SECONDS) as buffer:
            return self._told(store, self._each(request.pieces, write))

    def _told(self, store: ChunkStore, outcomes: m.Outcomes) -> _Answer:
        """With the incarnation to which it was done."""
        incarnation = self._targets.incarnation(store)
        return _Answer(msgspec.structs.replace(outcomes, incarnation=incarnation), store)

    def _seal_chunks(self, store: ChunkStore, request: m.SealChunks) -> _Answer:
        refuse_versioned(request.chunks)

        def seal(item: m.ChunkRef) -> ChunkInfo:
            info = store.seal(item.chunk)
            if info.is_sealed:
                self._unsealed.pop((store, item.chunk), None)
            return info

        return _Answer(self._each(request.chunks, seal), store)

    def _truncate_chunks(self, store: ChunkStore, request: m.TruncateChunks) -> _Answer:
        refuse_versioned(request.chunks)

        def truncate(item: m.SizedChunk) -> None:
            self._writes_to(store, item.chunk)
            with store.leaving.changing(item.inode):
                store.truncate(item.chunk, item.size)

        return self._told(store, self._each(request.chunks, truncate))

    def _sync_chunks(self, store: ChunkStore, request: m.SyncChunks) -> _Answer:
        return self._told(store, self._chains.sync_chunks(store, request))

    def _remove_range(self, store: ChunkStore, request: m.RemoveRange) -> _Answer:
        if request.passing is not None:
            return _Answer(self._chains.remove_range(store, request), store)
        with store.leaving.changing(request.inode):
            removed = store.remove_range(request.inode, request.first, request.end)
        self._counters.add(chunks_removed=removed)
        return _Answer(m.Outcomes((), {}), store)

    def _stat_chunks(self, store: ChunkStore, request: m.StatChunks) -> _Answer:
        def stat(item: m.ChunkRef) -> ChunkInfo:
            file, info = self._chains.open(store, item.chunk)
            file.close()
            return info

        return _Answer(self._each(request.chunks, stat), store)

    def _place_moved(self, store: ChunkStore, request: m.PlaceMoved) -> _Answer:
        refuse_versioned([request.chunk])

        def place(moved: m.PlaceMoved) -> None:
            placing.place(store, moved, self._receive, self._buffers, self._counters)

        return _Answer(self._each([request], place), store)

    # --- checking

    def _list_chunks(self, store: ChunkStore, request: m.ListChunks) -> _Answer:
        listing = self._listing
        if listing is None or listing.store is not store or listing.next != request.start.chunk:
            listing = self._listing = ChunkListing(store, request.start.chunk)
        page = listing.page(request.limit)
        if page.next is None:
            self._listing = None
        return _Answer(page, store)

    def _find_chunks(self, store: ChunkStore, request: m.FindChunks) -> _Answer:
        store.leaving.require_here(request.inode)
        page = find_chunks(store, request.inode, request.first, request.end)
        return _Answer(page, store)

    def _check_chunks(self, store: ChunkStore, request: m.CheckChunks) -> _Answer:
        return _Answer(self._each(request.chunks, lambda item: store.recheck(item.chunk)), store)


def _require_here(store: ChunkStore, chunk: ChunkId) -> None:
    """A chunk that is not there may have moved away: then it is no hole. Raises InodeStale."""
    if not chunk.chain:
        store.leaving.require_here(chunk.inode)


@contextlib.contextmanager
def _closing_on_error(answer: _Answer) -> Iterator[None]:
    """Files that will not be sent after all."""
    try:
        yield
    except BaseException:
        answer.close()
        raise
