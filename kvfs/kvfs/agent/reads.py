"""The life of a read, inside the agent: keys in, leased entries of the arena out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvfs.agent.backends import Chunks, MetadataCalls
from kvfs.agent.messages import GRANTED, NO_BLOCK, GetBlocks, Granted, split_keys
from kvfs.agent.session import Session
from kvfs.agent.space import Space
from kvfs.agent.watching import Uses
from kvfs_base.counters import Counters
from kvfs_base.errors import ChunkNotFound, IntegrityError, KvfsError
from kvfs_base.limits import BLOCK_KEY_BYTES, LOAD_WAIT_SECONDS, PAGE_BYTES
from kvfs_base.seams import Clock
from kvfs_base.types import BlockInfo, ChunkId
from kvfs_datapath.client.chunk_client import ChunkRead
from kvfs_gds.block_cache import Entry, Grant, State
from kvfs_metadata.messages import LookupBlocks, MatchBlocks, RemoveBlocks

log = logging.getLogger(__name__)

_PAD = PAGE_BYTES - 1


class BlockReader:
    """Thread-safe."""

    def __init__(
        self,
        clock: Clock,
        space: Space,
        chunks: Chunks,
        counters: Counters,
        *,
        uses: Uses,
        watcher: bytes,
    ) -> None:
        """``watcher`` is the session that the metadata service leases blocks to."""
        self._clock = clock
        self._uses = uses
        self._watcher = watcher
        self._space = space
        self._cache = space.cache
        self._chunks = chunks
        self._counters = counters

    def get(self, metadata: MetadataCalls, session: Session, request: GetBlocks) -> Granted:
        """Leases what is stored of a batch. Raises ArenaFull, or what the metadata service raised;
        blocks that cannot be had are misses. What is leased costs no call."""
        keys = split_keys(request.keys)
        entries = self._cache.acquire_leased(request.namespace, keys, self._clock.monotonic())
        if entries:
            return self._give(session, request, entries)
        revocations = self._cache.revocations
        watcher = None if revocations is None else self._watcher
        infos = list(metadata.call(LookupBlocks(request.namespace, request.keys, watcher)))
        size_bytes = sum([info.size + _PAD & ~_PAD for info in infos if info is not None])
        if not size_bytes:
            self._counters.add(blocks_requested=len(infos), blocks_unknown=len(infos))
            return Granted(0, NO_BLOCK * len(infos))
        session.reserve(size_bytes)
        try:
            grant = self._space.acquire(request.namespace, keys, infos, revocations)
        except BaseException:
            session.unreserve(size_bytes)
            raise
        try:
            self._fill(metadata, request, infos, grant)
            held = [entry for entry in grant.entries if entry is not None]
            if not held:
                session.unreserve(size_bytes)
                return Granted(0, NO_BLOCK * len(infos))
            lease = session.add_lease(held, size_bytes)
        except BaseException:
            self._cache.release(e for e in grant.entries if e is not None)
            session.unreserve(size_bytes)
            raise
        return Granted(lease, _packed(grant.entries))

    def match(self, metadata: MetadataCalls, request: MatchBlocks) -> int:
        """How many of the keys are stored, counted from the first without a gap. The metadata
        service is asked for those behind the ones that are leased."""
        keys = split_keys(request.keys)
        count = self._cache.leased_prefix(request.namespace, keys, self._clock.monotonic())
        if not count:
            found: int = metadata.call(request)
            return found
        known = count * BLOCK_KEY_BYTES
        if count < len(keys):
            rest = MatchBlocks(request.namespace, request.keys[known:])
            count += metadata.call(rest)
        self._uses.matched(request.namespace, request.keys[:known])
        return count

    def _give(self, session: Session, request: GetBlocks, entries: list[Entry]) -> Granted:
        size_bytes = sum([entry.extent_bytes for entry in entries])
        reserved = False
        try:
            session.reserve(size_bytes)
            reserved = True
            lease = session.add_lease(entries, size_bytes)
        except BaseException:
            self._cache.release(entries)
            if reserved:
                session.unreserve(size_bytes)
            raise
        self._counters.add(
            blocks_requested=len(entries), arena_hits=len(entries), blocks_leased=len(entries)
        )
        self._uses.looked_up(request.namespace, request.keys)
        return Granted(lease, _packed(entries))

    def _fill(
        self,
        metadata: MetadataCalls,
        request: GetBlocks,
        infos: list[BlockInfo | None],
        grant: Grant,
    ) -> None:
        """Loads and waits until every entry of the grant is ready; the others become None."""
        unknown = infos.count(None)
        hits = len(infos) - unknown - len(grant.load)
        failures: dict[int, KvfsError] = {}
        if grant.load:
            failures = self._load(metadata, request, infos, grant)
        waited_for_nothing = self._wait(grant)
        self._counters.add(
            blocks_requested=len(infos),
            blocks_unknown=unknown,
            arena_hits=hits - waited_for_nothing,
            load_failures=waited_for_nothing,
        )
        if failures:
            self._forget(metadata, request, infos, failures)

    def _load(
        self,
        metadata: MetadataCalls,
        request: GetBlocks,
        infos: list[BlockInfo | None],
        grant: Grant,
    ) -> dict[int, KvfsError]:
        """Reads all blocks of ``grant.load``; those that failed, by place, are None in the grant
        afterwards. ``infos`` follows where blocks have moved."""
        failed: dict[int, KvfsError] | None = None
        try:
            found = self._read(infos, grant, grant.load)
            if found:
                moved = self._look_again(metadata, request, infos, list(found))
                for place in moved:
                    del found[place]
                found |= self._read(infos, grant, moved)
            failed = found
        finally:
            # Whatever happened: others wait for these entries.
            self._cache.finish(grant, set(grant.load) if failed is None else failed)
        self._give_back(grant, failed)
        loaded = [info for p in grant.load if p not in failed and (info := infos[p]) is not None]
        self._counters.add(
            blocks_loaded=len(loaded), loaded_bytes=sum(info.size for info in loaded)
        )
        return failed

    def _read(
        self, infos: Sequence[BlockInfo | None], grant: Grant, places: Sequence[int]
    ) -> dict[int, KvfsError]:
        """What went wrong, by place."""
        loading = [_present(infos, grant, place) for place in places]
        reads = [
            ChunkRead(
                chunk=ChunkId(info.inode, 0),
                chain=info.chain,
                size=info.size,
                crc32c=info.crc32c,
                key=entry.name[1],
                view=self._space.extent(entry),
            )
            for info, entry in loading
        ]
        results = self._chunks.read_chunks(reads) if reads else []
        return {p: error for p, error in zip(places, results, strict=True) if error is not None}

    def _look_again(
        self,
        metadata: MetadataCalls,
        request: GetBlocks,
        infos: list[BlockInfo | None],
        places: Sequence[int],
    ) -> list[int]:
        """Which of the blocks that could not be read are on another chain by now."""
        keys = split_keys(request.keys)
        look_up = LookupBlocks(request.namespace, b"".join(keys[place] for place in places))
        try:
            now = metadata.call(look_up)
        except KvfsError:
            return []  # then the next get finds them
        moved: list[int] = []
        for place, info in zip(places, now, strict=True):
            before = infos[place]
            if info is None or before is None or info.inode != before.inode:
                continue
            if info.chain != before.chain:
                infos[place] = info
                moved.append(place)
        return moved

    def _wait(self, grant: Grant) -> int:
        """Waits for entries that others load. Returns how many did not come; they are None in the
        grant afterwards."""
        if not grant.wait:
            return 0
        deadline = self._clock.monotonic() + LOAD_WAIT_SECONDS
        lost = []
        for place in grant.wait:
            entry = grant.entry_at(place)
            entry.finished.wait(max(0.0, deadline - self._clock.monotonic()))
            if entry.state is not State.READY:
                lost.append(place)
        self._give_back(grant, lost)
        return len(lost)

    def _give_back(self, grant: Grant, places: Sequence[int] | dict[int, KvfsError]) -> None:
        self._cache.release([e for e in map(grant.entries.__getitem__, places) if e is not None])
        for place in places:
            grant.entries[place] = None

    def _forget(
        self,
        metadata: MetadataCalls,
        request: GetBlocks,
        infos: Sequence[BlockInfo | None],
        failures: dict[int, KvfsError],
    ) -> None:
        """Counts failed reads, and removes the blocks that are lost for good. A server that could
        not be asked says nothing about its blocks: they stay."""
        corrupt = [p for p, error in failures.items() if isinstance(error, IntegrityError)]
        missing = [p for p, error in failures.items() if isinstance(error, ChunkNotFound)]
        self._counters.add(
            blocks_corrupt=len(corrupt),
            blocks_missing=len(missing),
            load_failures=len(failures) - len(corrupt) - len(missing),
        )
        for error in failures.values():
            log.log(logging.WARNING if error.temporary is False else logging.INFO, "%s", error)
        lost = corrupt + missing
        if not lost:
            return
        keys = split_keys(request.keys)
        gone = [(keys[p], info) for p in lost if (info := infos[p]) is not None]
        removal = RemoveBlocks(
            request.namespace,
            b"".join(key for key, _ in gone),
            tuple(info.inode for _, info in gone),
            tuple(info.chain for _, info in gone),
        )
        try:
            metadata.call(removal)
        except KvfsError as exc:
            # Not this reader's trouble: the next get of these keys tries again.
            log.info("lost blocks stay in the namespace for now: %s", exc)


def _present(
    infos: Sequence[BlockInfo | None], grant: Grant, place: int
) -> tuple[BlockInfo, Entry]:
    info, entry = infos[place], grant.entries[place]
    assert info is not None and entry is not None
    return info, entry


def _packed(entries: Sequence[Entry | None]) -> bytes:
    pack = GRANTED.pack
    return b"".join(
        [NO_BLOCK if e is None else pack(e.offset, e.size, e.generation) for e in entries]
    )
