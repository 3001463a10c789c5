"""Files on chains of several copies.

Reads ask any serving member; writes go to the head of the chunk's chain and are answered when all
members have them. A chunk is never open and never without its checksum, so there is nothing to seal
and no descriptor to keep. Pieces of different chunks go side by side, over several connections.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from kvfs_base import threads
from kvfs_base.errors import ChunkNotFound, ConnectionLost, KvfsError, WriteUncertain
from kvfs_base.limits import (
    CALL_SECONDS,
    ITEMS_PER_REQUEST_MAX,
    TRANSFER_BYTES,
)
from kvfs_base.types import ChunkId, Layout
from kvfs_datapath import messages as m
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.outcomes import raise_first, wrong_piece
from kvfs_datapath.client.patience import Patience
from kvfs_datapath.client.routes import Route
from kvfs_datapath.client.segments import Segment
from kvfs_datapath.client.updates import Change, Way
from kvfs_datapath.client.workers import cut, portion_bytes
from kvfs_datapath.connections import Attempt, seconds_for
from kvfs_datapath.limits import (
    CHAIN_CONNECT_SECONDS,
    CHAIN_WRITE_SECONDS,
    READ_ATTEMPTS,
    STAT_AHEAD_CHUNKS,
    VERSIONS_KEPT_MAX,
)

_Result = TypeVar("_Result")


class ChainedFile:
    """One inode, for StripedFile: its methods have the same names and meanings. Whatever was
    answered is with all members and has its checksum: there is no flush. Thread-safe."""

    def __init__(
        self,
        client: ChunkClient,
        inode: int,
        layout: Layout,
        patience: Callable[[float], Patience],
    ) -> None:
        """``patience``: for how long to wait where that many seconds are usual."""
        self._shared = client.shared
        self._reader = client.chain_reader
        self._updater = client.updater
        self._inode = inode
        self._layout = layout
        self._patience = patience
        self._condition = threads.condition()
        self._busy: set[int] = set()
        """Chunks that a write of this file is under way to."""
        self._versions: dict[int, int] = {}
        """Of chunks, as last heard of: never newer than they are."""
        self._unsynced: set[int] = set()

    # --- reading

    def read(self, wanted: Sequence[Segment], sparse: bool) -> bytes:
        buffer = bytearray(sum(s.length for s in wanted))
        view = memoryview(buffer)
        self._shared.workers.parallel(
            [
                functools.partial(
                    self._read_into, s, view[s.position : s.position + s.length], sparse
                )
                for s in wanted
            ]
        )
        return bytes(buffer)

    def _read_into(self, segment: Segment, view: memoryview, sparse: bool) -> None:
        done = 0
        try:
            while done < segment.length:
                part = view[done : done + TRANSFER_BYTES]
                count = self._patiently(self._read_part, segment, segment.offset + done, part)
                done += count
                if count < len(part):
                    break
        except ChunkNotFound:
            view[done:] = bytes(segment.length - done)  # what a transfer left that broke off
        if done < segment.length and not sparse:
            raise ChunkNotFound(self._inode, segment.number)

    def _read_part(self, segment: Segment, offset: int, view: memoryview) -> int:
        """Bytes read: fewer than asked where the chunk ends."""
        chunk = self._chunk(segment.number)

        def ask(route: Route, attempt: Attempt, buffer: memoryview | None) -> tuple[int, int]:
            target = view if buffer is None else buffer[: len(view)]
            return self._fetch(route, attempt, m.Piece(*chunk, offset, len(view)), target)

        def take(buffer: memoryview) -> None:
            view[:] = buffer[: len(view)]

        received, version = self._reader.ask(chunk, len(view), ask, take)
        with self._condition:
            self._know(segment.number, version)
        if received < len(view):
            view[received:] = bytes(len(view) - received)
        return received

    def _fetch(
        self, route: Route, attempt: Attempt, piece: m.Piece, view: memoryview
    ) -> tuple[int, int]:
        """How many bytes there were, and of which version of the chunk."""
        received = version = 0

        def into(outcomes: m.Outcomes) -> list[memoryview]:
            nonlocal received, version
            (info,) = outcomes.infos
            if info is not None:
                version = info.version
                received = max(0, min(len(view), info.length - piece.offset))
            return [view[:received]] if received else []

        request = m.ReadPieces(route.target_id, (piece,), summed=True)
        error: ConnectionLost | None = None
        for number in range(READ_ATTEMPTS):
            outcomes = self._shared.pool.run(
                route.address,
                lambda c: c.call(request, into=into),
                seconds=seconds_for(0),
                attempt=attempt,
                fresh=number > 0,
                watch=True,  # while a chunk is being written only the tail can be asked
            )
            raise_first(outcomes)
            error = wrong_piece(piece, outcomes, view[:received])
            if error is None:
                return received, version
        assert error is not None
        raise error

    # --- writing

    def write(self, wanted: Sequence[Segment], view: memoryview) -> None:
        by_chain: dict[int, list[Segment]] = {}
        for segment in wanted:
            by_chain.setdefault(self._layout.chain_of(segment.number), []).append(segment)
        with self._writing([s.number for s in wanted]):
            for chain, group in by_chain.items():
                self._learn_versions(chain, [s.number for s in group])
            jobs: list[Callable[[], None]] = []
            for chain, group in by_chain.items():
                changes = [self._change(s, view, at) for s in group for at in _parts(s.length)]
                sizes = [len(change.data) for change in changes]
                for portion in cut(range(len(changes)), sizes, portion_bytes(sum(sizes))):
                    part = [changes[i] for i in portion]
                    jobs.append(functools.partial(self._send, chain, part))
            self._shared.workers.parallel(jobs)

    @contextlib.contextmanager
    def _writing(self, numbers: Sequence[int]) -> Iterator[None]:
        """Has these chunks to itself among the writers of this file. The head would take turns
        with them as well, but then ``base`` would be older than what was there before."""
        with self._condition:
            self._condition.wait_for(lambda: self._busy.isdisjoint(numbers))
            self._busy.update(numbers)
            # Before it is done: a sync that comes between does no harm.
            self._unsynced.update(numbers)
        try:
            yield
        finally:
            with self._condition:
                self._busy.difference_update(numbers)
                self._condition.notify_all()

    def _change(self, segment: Segment, view: memoryview, at: int) -> Change:
        start = segment.position + at
        end = min(start + TRANSFER_BYTES, segment.position + segment.length)
        return Change(
            inode=self._inode,
            number=segment.number,
            offset=segment.offset + at,
            data=view[start:end],
            base=self._versions.get(segment.number, 0),
        )

    def _send(self, chain: int, changes: Sequence[Change]) -> None:
        try:
            infos = self._updater.update(chain, changes, self._patience(CHAIN_WRITE_SECONDS))
        except WriteUncertain:
            self._forget({change.number for change in changes})
            raise
        with self._condition:
            for info in infos:
                if info is not None:
                    self._know(info.number, info.version)

    def _forget(self, numbers: Collection[int]) -> None:
        """Others have changed these chunks, or nobody said what became of them."""
        with self._condition:
            for number in numbers:
                self._versions.pop(number, None)

    def _know(self, number: int, version: int) -> None:
        """Holds the lock."""
        self._versions[number] = max(version, self._versions.pop(number, 0))
        if len(self._versions) > VERSIONS_KEPT_MAX:
            del self._versions[next(iter(self._versions))]

    def _learn_versions(self, chain: int, numbers: Sequence[int]) -> None:
        """Asks what versions chunks have of which nothing is known, and those after them on the
        same chain. Without it a write whose answer is lost could not be repeated when its head is
        lost, too. Nothing depends on the answer: 0 is always true enough."""
        unknown = [number for number in numbers if number not in self._versions]
        if not unknown:
            return
        step = len(self._layout.chains)
        ahead = {unknown[-1] + step * n for n in range(STAT_AHEAD_CHUNKS)}
        wanted = sorted({*unknown, *ahead})[:ITEMS_PER_REQUEST_MAX]
        with contextlib.suppress(KvfsError):  # the write tells what is wrong
            self._stat(chain, wanted)

    def _stat(self, chain: int, numbers: Sequence[int]) -> None:
        refs = self._updater.refs(self._inode, numbers, chain)

        def ask(route: Route, attempt: Attempt, buffer: memoryview | None) -> m.Outcomes:
            request = m.StatChunks(route.target_id, refs)
            found: m.Outcomes = self._shared.pool.run(
                route.address,
                lambda c: c.call(request),
                seconds=seconds_for(0),
                attempt=attempt,
                watch=True,
            )
            raise_first(found, besides=ChunkNotFound)
            return found

        outcomes = self._reader.ask(self._chunk(numbers[0]), 0, ask, lambda buffer: None)
        with self._condition:
            for number, info in zip(numbers, outcomes.infos, strict=True):
                self._know(number, 0 if info is None else info.version)

    def truncate(self, old_size: int, new_size: int) -> None:
        if new_size >= old_size:
            return
        chunk_bytes = self._layout.chunk_bytes
        first, end = -(-new_size // chunk_bytes), -(-old_size // chunk_bytes)
        if first < end:
            with self._condition:
                known = [n for n in self._versions if first <= n < end]
            with self._writing(known):
                self._remove(first, end)
                self._forget(known)
        number, inside = divmod(new_size, chunk_bytes)
        if inside:
            with self._writing([number]):
                chain = self._layout.chain_of(number)
                self._learn_versions(chain, [number])
                base = self._versions.get(number, 0)
                cut = Change(self._inode, number, inside, memoryview(b""), base, cut=True)
                self._send(chain, [cut])

    def _remove(self, first: int, end: int) -> None:
        """Every head looks for the whole range, and cuts what it finds to nothing. The number makes
        known what comes again, chunk by chunk: it must not take away what was written since."""
        writer, sequence = self._updater.number()

        def remove(chain: int) -> None:
            def act(way: Way) -> None:
                request = m.RemoveRange(
                    target_id=way.target_id,
                    inode=self._inode,
                    first=first,
                    end=end,
                    writer=writer,
                    passing=way.passing,
                    sequence=sequence,
                    onward=way.onward(CALL_SECONDS),
                )
                raise_first(self._ask(way, request))

            self._updater.at_head(chain, act, self._patience(CHAIN_WRITE_SECONDS))

        chains = sorted(set(self._layout.chains))
        self._shared.workers.parallel([functools.partial(remove, chain) for chain in chains])

    # --- finishing

    def sync(self) -> None:
        with self._condition:
            numbers, self._unsynced = self._unsynced, set()
        by_chain: dict[int, list[int]] = {}
        for number in sorted(numbers):
            by_chain.setdefault(self._layout.chain_of(number), []).append(number)
        jobs = [
            functools.partial(self._sync, chain, group[start : start + ITEMS_PER_REQUEST_MAX])
            for chain, group in by_chain.items()
            for start in range(0, len(group), ITEMS_PER_REQUEST_MAX)
        ]
        try:
            self._shared.workers.parallel(jobs)
        except BaseException:
            with self._condition:
                self._unsynced |= numbers
            raise

    def _sync(self, chain: int, numbers: Sequence[int]) -> None:
        refs = self._updater.refs(self._inode, numbers, chain)

        def act(way: Way) -> None:
            onward = way.onward(CALL_SECONDS)
            request = m.SyncChunks(way.target_id, refs, way.passing, onward)
            raise_first(self._ask(way, request), besides=ChunkNotFound)  # cut off since

        self._updater.at_head(chain, act, self._patience(CHAIN_WRITE_SECONDS))

    # --- helpers

    def _ask(self, way: Way, request: m.ChunkRequest) -> m.Outcomes:
        outcomes: m.Outcomes = self._shared.pool.run(
            way.address,
            lambda c: c.call(request),
            connect_seconds=CHAIN_CONNECT_SECONDS,
            watch=True,
        )
        return outcomes

    def _chunk(self, number: int) -> ChunkId:
        return ChunkId(self._inode, number, self._layout.chain_of(number))

    def _patiently(self, action: Callable[..., _Result], *arguments: object) -> _Result:
        """``action(*arguments)`` again and again while nobody serves the chain."""
        patience = self._patience(0)
        while True:
            try:
                return action(*arguments)
            except KvfsError as exc:
                if not exc.temporary or not patience.wait():
                    raise


def _parts(length: int) -> range:
    return range(0, length, TRANSFER_BYTES)


__all__ = ["ChainedFile"]
