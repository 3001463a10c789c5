"""Updates of files along a chain: prepare, pass on, commit from the tail back.

Everything here runs under the chunk's lock, and as a write of one version of the chain. What an
answer means is decided in ``rules``; this module does it.

The invariants, in the order in which they are used:

- What a member has pending, all serving members before it have pending or committed.
- What a member has committed, all members behind it have committed.
- A pending update is dropped only if nobody behind has it, nor can get it from a request that is
  still on its way: whoever has no room for one is asked, and takes it no more. Else it stays until
  every member behind has it, or there is none behind.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkMismatch,
    Conflict,
    ConnectionLost,
    DiskFull,
    KvfsError,
    ServerBusy,
    StaleChain,
    TargetFenced,
)
from kvfs_base.frames import ErrorBody
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath import rules
from kvfs_datapath.buffers import BufferPool
from kvfs_datapath.chains.crew import Crew
from kvfs_datapath.chains.peers import Peers, Unreached
from kvfs_datapath.chains.refused import Refused
from kvfs_datapath.chains.views import Place, Views, require_head, require_hops
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import ChunkInfo, ChunkState, directory_of
from kvfs_datapath.limits import (
    CHUNK_LOCK_SECONDS,
    STALL_SECONDS,
    UPDATES_REMEMBERED_MAX,
)

log = logging.getLogger(__name__)

_Removal = tuple[int, int, int, int]
"""Inode, chain, writer and sequence."""


class Unresolved(Exception):
    """An update stays pending: it may be committed behind, so it is neither done nor refused. No
    KvfsError, since all of those may also mean that it is nowhere."""

    def body(self) -> ErrorBody:
        """What the one before, or the client, is told."""
        error = ConnectionLost(detail=f"the update is pending: {self}")
        return ErrorBody(error.wire_code, error.wire_data())


class _Spoilt(Exception):
    """What is pending here has other bytes than it should, so nobody can get it from here."""

    def __init__(self, error: ChunkCorrupt) -> None:
        super().__init__(str(error))
        self.error = error


class InStep(Protocol):
    """Which chunks of a syncing member are as the others have them (``sync_sink``)."""

    def has(self, place: Place, chunk: ChunkId) -> bool: ...

    def came(self, place: Place, chunk: ChunkId) -> None:
        """It is in step from now on. Raises ServerBusy."""

    def went(self, place: Place, chunk: ChunkId) -> None:
        """It is not: what came was dropped again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is passed on: an update and its bytes, or a whole chunk."""

    update: m.Update
    data: memoryview
    whole: bool = False


class Replicator:
    """The updates of all targets of a server. ``buffers`` are for whole chunks that are read to be
    passed on."""

    def __init__(
        self,
        views: Views,
        peers: Peers,
        in_step: InStep,
        buffers: BufferPool,
        counters: Counters,
        *,
        crew: Crew,
    ) -> None:
        self._views = views
        self._peers = peers
        self._in_step = in_step
        self._buffers = buffers
        self._counters = counters
        self._crew = crew
        self._unresolved: dict[tuple[ChunkStore, ChunkId], None] = {}
        self._removed: collections.OrderedDict[_Removal, None]
        self._removed = collections.OrderedDict()
        self._removing: set[_Removal] = set()
        self._refused = Refused()
        self._guard = threads.lock()
        self.wake: Callable[[], None] = lambda: None
        """Somebody is to call ``resolve`` soon."""

    # --- what clients and members before this one ask for

    def update(
        self, store: ChunkStore, passing: m.Passing, update: m.Update, data: memoryview
    ) -> ChunkInfo:
        """At the head. The chunk as it is afterwards. Raises Unresolved, WriteUncertain, and (then
        it is nowhere) rules.NOWHERE, ChunkCorrupt, ChunkMismatch, TargetFailed."""
        chunk = ChunkId(update.inode, update.number, passing.chain)
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(store, chunk.chain, lambda p: require_head(p, passing)) as place,
        ):
            self.settle(store, place, chunk)
            committed = store.versions.committed(chunk)
            seen = store.versions.seen(chunk, update.writer, update.sequence)
            if rules.is_repeated(update, committed, seen is not None):
                return committed or rules.nothing(chunk)
            info = store.versions.prepare(chunk, update, [data])
            return self._carry(store, place, info, Load(update, data), clean=True)

    def cut_range(self, store: ChunkStore, request: m.RemoveRange, passing: m.Passing) -> None:
        """At the head: cuts the chunks of a range to nothing, on all members. A request that was
        done, and comes late, is done once. Raises as ``update``."""
        # The client sends it to the heads of all chains of the file: some may be here.
        number = (request.inode, passing.chain, request.writer, request.sequence)
        with self._guard:
            if number in self._removed:
                return
            if number in self._removing:
                raise Conflict(detail=f"chunks of inode {request.inode} are being removed")
            if request.writer:
                self._removing.add(number)
        try:
            self._cut_range(store, request, passing)
            if request.writer:
                with self._guard:
                    self._removed[number] = None
                    while len(self._removed) > UPDATES_REMEMBERED_MAX:
                        self._removed.popitem(last=False)
        finally:
            with self._guard:
                self._removing.discard(number)

    def _cut_range(self, store: ChunkStore, request: m.RemoveRange, passing: m.Passing) -> None:
        chunks = store.list_directory(directory_of(request.inode, passing.chain), passing.chain)
        chunks += store.versions.pendings(passing.chain)
        wanted = range(request.first, request.end)

        def cut(chunk: ChunkId) -> None:
            update = m.Update(*chunk[:2], 0, 0, 0, request.writer, request.sequence, cut=True)
            self.update(store, passing, update, memoryview(b""))

        self._crew.work(
            functools.partial(cut, chunk)
            for chunk in sorted(set(chunks))
            if chunk.inode == request.inode and chunk.number in wanted
        )

    def receive(self, store: ChunkStore, request: m.PassUpdate, data: memoryview) -> ChunkInfo:
        """At any other member: the chunk as it is afterwards, or another version of it, which asks
        for the whole chunk. Raises as ``update``."""
        chunk = ChunkId(request.update.inode, request.update.number, request.passing.chain)
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(
                store, chunk.chain, lambda p: require_hops(p, request.passing)
            ) as place,
        ):
            self._refused.check(place, request)
            committed, pending, known = self._look(store, chunk)
            in_step = place.serving or self._in_step.has(place, chunk)
            receipt = rules.receive(committed, pending, request, in_step)
            info: ChunkInfo | None = None
            if receipt is rules.Receipt.ANSWER:
                info = committed
                if pending is not None and not in_step:
                    # From before: the chunk is in step from now on, and nobody would forget it.
                    store.versions.drop(chunk)
            elif receipt is rules.Receipt.CARRY:
                info = pending
            elif receipt is rules.Receipt.PREPARE:
                info = self._prepare(store, chunk, request, data)
            if info is None:
                return committed or rules.nothing(chunk)
            if not place.serving:
                try:
                    self._in_step.came(place, chunk)
                except ServerBusy as exc:
                    if receipt is rules.Receipt.PREPARE and not self._drop(store, chunk):
                        raise self._remember(store, chunk, exc) from exc
                    raise
            if receipt is rules.Receipt.ANSWER:
                return info
            load = Load(request.update, data, request.whole)
            try:
                return self._carry(store, place, info, load, clean=known and pending is None)
            except rules.NOWHERE:
                # Dropped: what is here now is what was here before, which the source has to send.
                if not in_step:
                    self._in_step.went(place, chunk)
                raise

    def _look(
        self, store: ChunkStore, chunk: ChunkId
    ) -> tuple[ChunkInfo | None, ChunkInfo | None, bool]:
        """What is committed, what is pending, and whether that is known. A chunk that cannot be
        used is none: it will be replaced by a whole one."""
        try:
            return store.versions.committed(chunk), store.versions.pending(chunk), True
        except (ChunkCorrupt, ChunkMismatch):
            return None, None, False

    def _prepare(
        self, store: ChunkStore, chunk: ChunkId, request: m.PassUpdate, data: memoryview
    ) -> ChunkInfo | None:
        """None if this member's chunk is not what the update was made for."""
        if request.whole:
            info = ChunkInfo(
                *chunk,
                ChunkState.DAMAGED if request.damaged else ChunkState.PENDING,
                length=request.length,
                crc32c=request.crc32c,
                version=request.version,
                writer=request.update.writer,
                sequence=request.update.sequence,
                durable=request.durable,
            )
            return store.versions.prepare_whole(chunk, info, [data])
        try:
            info = store.versions.prepare(chunk, request.update, [data], request.version)
        except (ChunkCorrupt, ChunkMismatch):
            return None
        if rules.is_version(info, request):
            return info
        store.versions.drop(chunk)
        return None

    # --- passing on, and committing

    def settle(self, store: ChunkStore, place: Place, chunk: ChunkId) -> None:
        """Finishes what is pending of a chunk, whose lock is held, if there is something. Raises
        Unresolved, and ChunkCorrupt or ChunkMismatch if that cannot be known."""
        pending = store.versions.pending(chunk)
        if pending is None:
            self._forget(store, chunk)
        else:
            try:
                self._carry(store, place, pending, None, clean=False)
            except DiskFull:
                pass  # then it is nowhere, and will not be
            except ChunkCorrupt:  # nor is it then
                if store.versions.pending(chunk) is not None:
                    raise

    def _carry(
        self, store: ChunkStore, place: Place, info: ChunkInfo, load: Load | None, *, clean: bool
    ) -> ChunkInfo:
        """Passes a pending version on and commits it. Without a ``load`` the whole chunk is read
        and passed. ``clean``: every attempt so far, if there was one, was answered."""
        chunk = info.chunk
        try:
            if place.hops:
                self._pass(store, place, info, load)
        except DiskFull as exc:
            self._give_up(store, place, info, exc, clean=clean)
        except _Spoilt as exc:
            self._give_up(store, place, info, exc.error, clean=clean)
            self._record_lost(store, info)
        except rules.NOWHERE as exc:
            if clean and self._drop(store, chunk):
                raise
            raise self._remember(store, chunk, exc) from exc
        except (Unreached, KvfsError) as exc:
            raise self._remember(store, chunk, exc) from exc
        except BaseException as exc:
            self._remember(store, chunk, exc)
            raise
        droppable = clean and not place.hops  # nobody has seen it
        return self._commit(store, chunk, droppable=droppable)

    def _commit(self, store: ChunkStore, chunk: ChunkId, *, droppable: bool = False) -> ChunkInfo:
        try:
            committed = store.versions.commit(chunk)
        except KvfsError as exc:
            if droppable and isinstance(exc, DiskFull) and self._drop(store, chunk):
                raise
            raise self._remember(store, chunk, exc) from exc
        self._forget(store, chunk)
        self._counters.add(updates=1)
        return committed

    def _give_up(
        self, store: ChunkStore, place: Place, info: ChunkInfo, error: KvfsError, *, clean: bool
    ) -> None:
        """The next member does not have a pending version, and cannot get it. Raises ``error`` once
        it is nowhere, and Unresolved; returns if an attempt that was not answered was carried
        out."""
        if not clean and self._is_done_behind(store, place, info):
            return
        if not self._drop(store, info.chunk):
            raise self._remember(store, info.chunk, error) from error
        self._forget(store, info.chunk)
        raise error

    def _is_done_behind(self, store: ChunkStore, place: Place, info: ChunkInfo) -> bool:
        """What became of a pending version for which the next member has no room now, or that
        cannot be passed on any more, though an earlier attempt may have succeeded. False: nobody
        behind has it, or takes it from such an attempt any more. Raises Unresolved."""
        following, *rest = place.hops
        request = m.DropUpdate(following, place.passing(tuple(rest)), info)
        try:
            outcomes: m.Outcomes = self._peers.call(following, request, hops=len(rest))
            error = outcomes.error(0)
            if error is not None:
                raise error
        except (Unreached, KvfsError) as exc:
            raise self._remember(store, info.chunk, exc) from exc
        return rules.same_version(outcomes.infos[0], info)

    def drop_update(self, store: ChunkStore, request: m.DropUpdate) -> ChunkInfo:
        """At a member that had no room for an update. Raises Unresolved, and as ``update``."""
        made = request.made
        chunk = ChunkId(made.inode, made.number, request.passing.chain)
        with (
            store.versions.lock(chunk, CHUNK_LOCK_SECONDS),
            self._views.writing(
                store, chunk.chain, lambda p: require_hops(p, request.passing)
            ) as place,
        ):
            committed, pending, known = self._look(store, chunk)
            if rules.same_version(committed, made):
                return committed or rules.nothing(chunk)
            if not known or rules.same_version(pending, made):
                is_done = place.hops and self._is_done_behind(store, place, made)
                if not known and (is_done or not place.hops):
                    # It may have been committed, and read, here: older bytes must not come back.
                    self._record_lost(store, made)
                    is_done = True
                if is_done:
                    return self._commit(store, chunk)
                store.versions.drop(chunk)
                self._forget(store, chunk)
                if not place.serving:
                    self._in_step.went(place, chunk)
            self._refused.add(place, made)
            return committed or rules.nothing(chunk)

    def _record_lost(self, store: ChunkStore, made: ChunkInfo) -> None:
        """Makes a version pending without its bytes, which this member has not. Raises
        Unresolved."""
        lost = msgspec.structs.replace(made, state=ChunkState.DAMAGED)
        try:
            store.versions.prepare_whole(made.chunk, lost, [])
        except KvfsError as exc:
            raise self._remember(store, made.chunk, exc) from exc

    def _drop(self, store: ChunkStore, chunk: ChunkId) -> bool:
        try:
            store.versions.drop(chunk)
        except KvfsError:
            return False
        return True

    def _pass(self, store: ChunkStore, place: Place, info: ChunkInfo, load: Load | None) -> None:
        """Returns once every member behind has the version. Raises Unreached and what the next
        member answers."""
        if load is not None:
            if self._ask(place, info, load):
                return
            if load.whole:
                raise ChunkMismatch(*info.chunk, detail=f"target {place.hops[0]} wants another")
        with self._whole(store, info) as whole:
            if not self._ask(place, info, whole):
                raise ChunkMismatch(*info.chunk, detail=f"target {place.hops[0]} wants another")

    def _ask(self, place: Place, info: ChunkInfo, load: Load) -> bool:
        """False if the next member wants the whole chunk."""
        following, *rest = place.hops
        request = m.PassUpdate(
            target_id=following,
            passing=place.passing(tuple(rest)),
            update=load.update,
            version=info.version,
            crc32c=info.crc32c,
            length=info.length,
            whole=load.whole,
            durable=info.durable,
            damaged=load.whole and info.is_damaged,
        )
        outcomes = self._peers.call(following, request, [load.data], hops=len(rest))
        error = outcomes.error(0)
        if error is not None:
            raise error
        (answer,) = outcomes.infos
        return rules.is_version(answer, request)

    @contextlib.contextmanager
    def _whole(self, store: ChunkStore, info: ChunkInfo) -> Iterator[Load]:
        """The pending version of a chunk. Raises _Spoilt."""
        file, found = store.versions.open_pending(info.chunk)
        try:
            with self._buffers.lend(STALL_SECONDS) as buffer:
                data = buffer[: found.length]
                count = file.preadv([data], 0)
                checksum = crc32c(data[:count])
                if count != info.length or checksum != info.crc32c:
                    raise _Spoilt(
                        ChunkCorrupt(
                            *info.chunk, expected_crc32c=info.crc32c, found_crc32c=checksum
                        )
                    )
                yield whole_load(info, data)
        finally:
            file.close()

    def send_committed(self, place: Place, info: ChunkInfo, data: memoryview) -> bool:
        """Passes a committed version on as a whole, the chunk's lock being held: ``data`` are its
        bytes, none if it is damaged. False if the next member wants another one. Raises Unreached
        and what that one answers."""
        return self._ask(place, info, whole_load(info, data))

    # --- what could not be finished

    def _remember(self, store: ChunkStore, chunk: ChunkId, exc: BaseException) -> Unresolved:
        with self._guard:
            is_new = (store, chunk) not in self._unresolved
            self._unresolved[store, chunk] = None
        if is_new:
            self.wake()
        log.info("chunk %s stays pending: %s", tuple(chunk), exc)
        return Unresolved(str(exc))

    def _forget(self, store: ChunkStore, chunk: ChunkId) -> None:
        if self._unresolved:
            with self._guard:
                self._unresolved.pop((store, chunk), None)

    def find_pendings(self, store: ChunkStore, chain_id: int) -> None:
        """What a server that was started again finds on its disk."""
        for chunk in store.versions.pendings(chain_id, scan=True):
            with self._guard:
                self._unresolved[store, chunk] = None

    def unresolved(self) -> list[tuple[ChunkStore, ChunkId]]:
        with self._guard:
            return list(self._unresolved)

    def resolve(self, store: ChunkStore, chunk: ChunkId) -> None:
        """Tries again what stayed pending, under the chain's present version. A member that is not
        serving has nothing to say: the others decide. Raises Unresolved, Conflict."""
        try:
            with (
                store.versions.lock(chunk, 0),
                self._views.writing(store, chunk.chain) as place,
            ):
                if place.serving:
                    self.settle(store, place, chunk)
        except (StaleChain, TargetFenced):
            with store.versions.lock(chunk, 0):
                if self._views.has_left(store, chunk.chain) and self._drop(store, chunk):
                    self._forget(store, chunk)


def whole_load(info: ChunkInfo, data: memoryview) -> Load:
    """A chunk as one update from nothing."""
    length, checksum, lost = info.length, info.crc32c, info.is_damaged
    if lost:
        length = checksum = 0
    update = m.Update(*info.chunk[:2], 0, length, checksum, info.writer, info.sequence, cut=lost)
    return Load(update, data, whole=True)
