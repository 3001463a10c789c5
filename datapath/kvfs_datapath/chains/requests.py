"""What a connection asks of chains of several copies: checks, payloads, and who does the work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    KvfsError,
    NotSupported,
    TargetFailed,
    TargetFenced,
)
from kvfs_base.frames import ErrorBody
from kvfs_base.seams import DiskFile
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chains.block_writes import BlockWriter, raise_error
from kvfs_datapath.chains.crew import Job
from kvfs_datapath.chains.peers import Relay, Unreached
from kvfs_datapath.chains.replication import Unresolved
from kvfs_datapath.chains.service import ChainService
from kvfs_datapath.chains.views import (
    Place,
    require_block,
    require_head,
    require_hops,
    require_relay,
    require_syncing,
)
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.kept import KeptFile
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import (
    CHUNK_LOCK_SECONDS,
    PASS_PIECE_BYTES,
    STALL_SECONDS,
)


def error_body(error: Exception) -> ErrorBody:
    """What the asker is told of an item, or of every item, that failed."""
    if isinstance(error, Unresolved):
        return error.body()
    if isinstance(error, Unreached):
        error = ConnectionLost(detail=str(error))
    assert isinstance(error, KvfsError)
    return ErrorBody(error.wire_code, error.wire_data())


def refuse_versioned(chunks: Sequence[m.ChunkRef]) -> None:
    """Raises NotSupported for chunks that are changed in versions, along their chain."""
    for ref in chunks:
        if ref.chain:
            raise NotSupported(detail=f"chunk {tuple(ref.chunk)}: UpdateChunks at the chain's head")


_Result = ChunkInfo | ErrorBody | None


def _outcomes(results: Sequence[_Result]) -> m.Outcomes:
    errors = {i: result for i, result in enumerate(results) if isinstance(result, ErrorBody)}
    return m.Outcomes(tuple(None if isinstance(r, ErrorBody) else r for r in results), errors)


def side_by_side(updates: Sequence[m.Update], room: int) -> Iterator[range]:
    """Consecutive updates of different chunks whose bytes fit into ``room``: those of one chunk
    keep their order."""
    first = used = 0
    chunks: set[tuple[int, int]] = set()
    for index, update in enumerate(updates):
        chunk = (update.inode, update.number)
        if chunk in chunks or used + update.payload_bytes > room:
            yield range(first, index)
            first, used = index, 0
            chunks.clear()
        chunks.add(chunk)
        used += update.payload_bytes
    yield range(first, len(updates))


def _check(update: m.Update, data: memoryview, chain: int, chunk_bytes: int) -> None:
    """Raises ChunkCorrupt, InvalidRequest for what would make a chunk of more than
    ``chunk_bytes``."""
    if update.offset + len(data) > chunk_bytes:
        raise InvalidRequest(detail=f"a chunk of {update.offset + len(data)} bytes")
    found = crc32c(data)
    if found != update.crc32c:
        raise ChunkCorrupt(
            update.inode,
            update.number,
            chain,
            expected_crc32c=update.crc32c,
            found_crc32c=found,
        )


class ChainSession:
    """``receive`` fills a view with the next bytes of the request's payload."""

    def __init__(self, service: ChainService, receive: Callable[[memoryview], None]) -> None:
        self._service = service
        self._receive = receive
        self.handlers: dict[type[Any], Callable[[ChunkStore, Any], Any]] = {
            m.UpdateChunks: self._update_chunks,
            m.PassUpdate: self._pass_update,
            m.DropUpdate: self._drop_update,
            m.SyncChain: self._sync_chain,
            m.CompareChunks: self._compare_chunks,
            m.RepairChunks: self._repair_chunks,
        }

    # --- reading

    def open(
        self, store: ChunkStore, chunk: ChunkId, *, direct: bool = False
    ) -> tuple[DiskFile, ChunkInfo]:
        """For a reader: what was acknowledged last. Raises TargetFenced, ChunkPending, and as
        ChunkStore.open."""
        if not chunk.chain:
            return store.open(chunk, direct=direct)
        # The lease first: what is opened after that is not older than this moment.
        self._service.views.require_read(store, chunk.chain)
        return store.versions.open_settled(chunk, direct=direct)

    def open_for(
        self, store: ChunkStore, chunk: ChunkId, passing: m.Passing | None
    ) -> tuple[DiskFile, ChunkInfo]:
        """As ``open``. With ``passing`` for the source that brings this member in step: what it
        has, if it still is of that chain's version."""
        if passing is None or not chunk.chain:
            return self.open(store, chunk)
        if chunk.chain != passing.chain:
            raise InvalidRequest(detail=f"chunk {tuple(chunk)} passing chain {passing.chain}")
        require_syncing(self._place(store, passing), passing)
        with store.versions.lock(chunk, CHUNK_LOCK_SECONDS):
            try:
                store.recheck(chunk)
            except ChunkCorrupt:  # so nobody has it, and both are to know
                store.versions.damaged.mark(chunk)
                raise
            return store.versions.open_settled(chunk)

    def borrow(self, store: ChunkStore, chunk: ChunkId, *, direct: bool = False) -> KeptFile:
        """As ``open``, of a file that may stay open."""
        if chunk.chain:
            self._service.views.require_read(store, chunk.chain)
        return store.borrow(chunk, direct=direct)

    def borrow_kept(
        self, store: ChunkStore, chunks: Sequence[tuple[int, int, int]], *, direct: bool = False
    ) -> list[KeptFile | None]:
        """Those that are open already, all at the cost of one, by what ChunkIds hold. ``borrow``
        opens the others, or says what is wrong with them."""
        try:
            store.require_healthy()
            for chain in {chain for _, _, chain in chunks}:
                if chain:
                    self._service.views.require_read(store, chain)
        except (TargetFailed, TargetFenced):
            return [None] * len(chunks)
        return store.kept.borrow(chunks, direct=direct)

    # --- blocks

    def check_block(
        self, store: ChunkStore, chunks: Sequence[m.ChunkRef], passing: m.Passing | None
    ) -> None:
        """Raises StaleChain, TargetFenced, InvalidRequest unless these chunks may be stored."""
        chain = 0 if passing is None else passing.chain
        for ref in chunks:
            if ref.chain != chain:
                raise InvalidRequest(detail=f"chunk {tuple(ref.chunk)} passing chain {chain}")
        if passing is not None:
            require_block(self._place(store, passing), passing)

    def write_chunks(self, store: ChunkStore, request: m.WriteChunks) -> m.Outcomes:
        """With ``passing``."""
        passing = request.passing
        assert passing is not None
        self.check_block(store, request.chunks, passing)
        service = self._service
        hops = passing.hops
        with service.buffers(len(hops)).lend(STALL_SECONDS) as buffer, contextlib.ExitStack() as on:
            relay: Relay | None = None
            if hops:
                behind = m.Passing(passing.chain, passing.version, hops[1:])
                onward = m.WriteChunks(hops[0], request.chunks, behind)
                total = m.payload_bytes(request)
                relay = on.enter_context(
                    contextlib.closing(Relay(service.peers, hops[0], onward, total, len(hops) - 1))
                )
            writer = BlockWriter(
                service.counters, self._receive, None if relay is None else relay.send
            )
            piece = buffer[:PASS_PIECE_BYTES]
            results = writer.write(store, request.chunks, piece)
            errors = self._each(results, raise_error).errors
            if relay is not None:
                errors = self._errors_behind(relay, len(request.chunks)) | errors
        for index, new in enumerate(request.chunks):
            if index not in errors:
                service.sinks.arrived(store.target_id, new.chunk)
        return m.Outcomes((None,) * len(request.chunks), errors)

    def _errors_behind(self, relay: Relay, count: int) -> dict[int, ErrorBody]:
        try:
            outcomes: m.Outcomes = relay.finish()
        except (Unreached, KvfsError) as exc:
            return dict.fromkeys(range(count), error_body(exc))
        return outcomes.errors

    def _each(self, items: Sequence[Any], act: Callable[[Any], ChunkInfo | None]) -> m.Outcomes:
        """One item's failure is its own; the connection's is everybody's."""
        return _outcomes([self._try(functools.partial(act, item)) for item in items])

    def _try(self, act: Callable[[], ChunkInfo | None]) -> _Result:
        try:
            return act()
        except Unresolved as exc:
            return exc.body()
        except (ConnectionLost, DeadlineExceeded):
            raise  # of the asker: those of others are Unreached
        except KvfsError as exc:
            if isinstance(exc, ChunkCorrupt | ChunkMismatch):
                self._service.counters.add(bad_chunks=1)
            return error_body(exc)

    # --- files

    def _update_chunks(self, store: ChunkStore, request: m.UpdateChunks) -> m.Outcomes:
        """Updates of different chunks go down the chain side by side."""
        passing = request.passing
        if request.onward is not None:
            return self._relay(store, request, passing, request.onward, len(request.updates))
        service = self._service
        place = self._place(store, passing)
        require_head(place, passing)
        updates = request.updates
        results: list[_Result] = [None] * len(updates)

        def update(item: m.Update, data: memoryview) -> ChunkInfo:
            _check(item, data, passing.chain, service.buffer_bytes)
            try:
                return service.replicator.update(store, passing, item, data)
            except (ChunkCorrupt, ChunkMismatch):
                # What lies here is damaged, or was.
                service.repairer.repair(store, ChunkId(item.inode, item.number, passing.chain))
                return service.replicator.update(store, passing, item, data)

        def attempt(index: int, data: memoryview) -> None:
            results[index] = self._try(lambda: update(updates[index], data))

        def receive_all(indexes: range, room: memoryview) -> Iterator[Job]:
            for index in indexes:
                data = room[: updates[index].payload_bytes]
                room = room[len(data) :]
                self._receive(data)
                yield functools.partial(attempt, index, data)

        with service.buffers(len(place.hops)).lend(STALL_SECONDS) as buffer:
            for indexes in side_by_side(updates, len(buffer)):
                service.crew.work(receive_all(indexes, buffer))
        return _outcomes(results)

    def _take(self, update: m.Update, chain: int, buffer: memoryview) -> memoryview:
        """The bytes of an update. Raises ChunkCorrupt, InvalidRequest."""
        data = buffer[: update.payload_bytes]
        self._receive(data)
        _check(update, data, chain, len(buffer))
        return data

    def _pass_update(self, store: ChunkStore, request: m.PassUpdate) -> m.Outcomes:
        service = self._service
        require_hops(self._place(store, request.passing), request.passing)

        def receive(item: m.Update) -> ChunkInfo:
            data = self._take(item, request.passing.chain, buffer)
            return service.replicator.receive(store, request, data)

        with service.buffers(len(request.passing.hops)).lend(STALL_SECONDS) as buffer:
            return self._each([request.update], receive)

    def _drop_update(self, store: ChunkStore, request: m.DropUpdate) -> m.Outcomes:
        require_hops(self._place(store, request.passing), request.passing)
        return self._each([request], lambda item: self._service.replicator.drop_update(store, item))

    def sync_chunks(self, store: ChunkStore, request: m.SyncChunks) -> m.Outcomes:
        """Here and on all members behind, side by side: all wait for their disks together."""
        passing = request.passing
        place = None
        if passing is not None and request.onward is not None:
            return self._relay(store, request, passing, request.onward, len(request.chunks))
        if passing is not None:
            place = self._place(store, passing)
            # Clients do not know who follows the head.
            (require_head if place.is_head else require_hops)(place, passing)
        for ref in request.chunks:
            if ref.chain != (0 if passing is None else passing.chain):
                raise InvalidRequest(detail=f"chunk {tuple(ref.chunk)} of another chain")
        results: list[_Result] = [None] * len(request.chunks)
        behind: dict[int, ErrorBody] = {}

        def sync(index: int) -> None:
            results[index] = self._try(lambda: store.sync(request.chunks[index].chunk))

        def jobs() -> Iterator[Job]:
            if place is not None and place.hops:
                yield lambda: behind.update(self._sync_behind(place, request.chunks))
            for index in range(len(request.chunks)):
                yield functools.partial(sync, index)

        self._service.crew.work(jobs())
        outcomes = _outcomes(results)
        return m.Outcomes(outcomes.infos, behind | outcomes.errors)

    def _sync_behind(self, place: Place, chunks: tuple[m.ChunkRef, ...]) -> dict[int, ErrorBody]:
        following, *rest = place.hops
        onward = m.SyncChunks(following, chunks, place.passing(tuple(rest)))
        try:
            outcomes: m.Outcomes = self._service.peers.call(following, onward, hops=len(rest))
        except (Unreached, KvfsError) as exc:
            return dict.fromkeys(range(len(chunks)), error_body(exc))
        return outcomes.errors

    def remove_range(self, store: ChunkStore, request: m.RemoveRange) -> m.Outcomes:
        """On a chain: nothing is left of the chunks but their versions, on every member."""
        passing = request.passing
        assert passing is not None
        if request.onward is not None:
            return self._relay(store, request, passing, request.onward, 1)
        require_head(self._place(store, passing), passing)
        outcomes = self._each(
            [request], lambda r: self._service.replicator.cut_range(store, r, passing)
        )
        return m.Outcomes((), outcomes.errors)

    def _relay(
        self,
        store: ChunkStore,
        request: m.UpdateChunks | m.SyncChunks | m.RemoveRange,
        passing: m.Passing,
        onward: m.Onward,
        count: int,
    ) -> m.Outcomes:
        """Asks the head. What it answers for the whole request is raised; if it does not answer,
        nobody knows of any of the ``count`` items."""
        service = self._service
        service.views.catch_up(passing)
        chain = require_relay(
            service.views.chain(passing.chain), store.target_id, passing, onward.head
        )
        # One more than the head has behind it: whoever waits here waits for those with fewer.
        hops = len(chain.members)
        asked = msgspec.structs.replace(request, target_id=onward.head, onward=None)
        left = m.payload_bytes(request)
        with contextlib.ExitStack() as on:
            piece = memoryview(b"")
            if left:
                buffer = on.enter_context(service.buffers(hops).lend(STALL_SECONDS))
                piece = buffer[:PASS_PIECE_BYTES]
            relay = Relay(service.peers, onward.head, asked, left, hops - 1, seconds=onward.seconds)
            on.enter_context(contextlib.closing(relay))
            while left:
                part = piece[:left]
                self._receive(part)
                relay.send(part)
                left -= len(part)
            try:
                outcomes: m.Outcomes = relay.finish()
            except Unreached as exc:
                errors = dict.fromkeys(range(count), error_body(exc))
                return m.Outcomes((None,) * count, errors)
        service.counters.add(requests_relayed=1)
        return outcomes

    # --- coming back in step

    def _place(self, store: ChunkStore, passing: m.Passing) -> Place:
        self._service.views.catch_up(passing)
        return self._service.views.place(store, passing.chain)

    def _sync_chain(self, store: ChunkStore, request: m.SyncChain) -> m.Outcomes:
        place = self._place(store, request.passing)
        require_syncing(place, request.passing)
        self._service.sinks.begin(store, place)
        return m.Outcomes((), {})

    def _compare_chunks(self, store: ChunkStore, request: m.CompareChunks) -> m.Wanted:
        place = self._place(store, request.passing)
        require_syncing(place, request.passing)
        return m.Wanted(tuple(self._service.sinks.compare(store, place, request)))

    def _repair_chunks(self, store: ChunkStore, request: m.RepairChunks) -> m.Outcomes:
        return self._each(
            request.chunks, lambda ref: self._service.repairer.repair(store, ref.chunk)
        )
