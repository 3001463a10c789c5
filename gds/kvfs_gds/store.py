"""Stores: pages of a device are gathered into pinned memory and put into a block store.

While one group is being put (copied to the agent, written to disk) the next one is gathered, so the
ring holds two groups of every store at work.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvfs_base.errors import InvalidRequest, LimitExceeded
from kvfs_base.limits import BATCH_BLOCKS_MAX
from kvfs_gds.device import Device, Event
from kvfs_gds.extents import pages_of
from kvfs_gds.limits import LOADER_GROUP_BYTES, LOADER_JOBS_MAX
from kvfs_gds.load import Pages
from kvfs_gds.ring import PinnedRing, Slot
from kvfs_gds.sources import BlockStore

log = logging.getLogger(__name__)

STORE_THREADS = 2


class Store:
    """The handle of a store. Thread-safe."""

    def __init__(self, keys: list[bytes], pages: Pages, after: Event | None) -> None:
        self.keys = keys
        self.pages = pages
        self.after = after
        self._lock = threading.Condition()
        self._copied = False
        self._ended = False
        self._cancelled = False
        self._error: BaseException | None = None
        self._stored = 0

    def wait_copied(self) -> None:
        """Until the pages have been read: they may be written again. Raises what the store failed
        with."""
        with self._lock:
            self._lock.wait_for(lambda: self._copied or self._ended)
            if self._error is not None:
                raise self._error

    def result(self) -> int:
        """Waits for the end; how many blocks were new. Raises what a put raised: groups of blocks
        that were put before stay stored."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._stored

    def wait(self) -> None:
        """Until nothing of this store is under way, however it ended."""
        with self._lock:
            self._lock.wait_for(lambda: self._ended)

    def cancel(self) -> bool:
        """Gathers and puts no further group; what was put stays. False if it has ended."""
        with self._lock:
            self._cancelled = True
            return not self._ended

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def copied(self) -> None:
        with self._lock:
            self._copied = True
            self._lock.notify_all()

    def end(self, stored: int, error: BaseException | None) -> None:
        with self._lock:
            self._stored, self._error, self._ended = stored, error, True
            self._lock.notify_all()


@dataclasses.dataclass
class _Gathered:
    """A group in the ring, once ``event`` has happened. ``plan`` must outlive the copy."""

    first: int
    end: int
    slot: Slot
    offsets: list[int]
    event: Event
    plan: Any


class StoreWorker:
    """The stores of one loader."""

    def __init__(self, device: Device, store: BlockStore | None, ring_bytes: int) -> None:
        self._device = device
        self._store = store
        self._ring_bytes = ring_bytes
        self._lock = threading.Lock()
        self._ring: PinnedRing | None = None
        self._stream: Any = None
        self._jobs: set[Store] = set()
        self._stored_bytes = 0
        self._pool = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="kvfs-store")
        self._closed = False

    def start(self, keys: list[bytes], pages: Pages, after: Event | None) -> Store:
        if self._store is None:
            raise InvalidRequest(detail="this loader has nothing to store into")
        if keys and pages_of(pages.block_bytes) > self._ring_bytes:
            detail = f"blocks of {pages.block_bytes} bytes, a ring of {self._ring_bytes}"
            raise InvalidRequest(detail=detail)
        job = Store(keys, pages, after)
        with self._lock:
            if self._closed:
                raise InvalidRequest(detail="the loader is closed")
            if len(self._jobs) >= LOADER_JOBS_MAX:
                raise LimitExceeded(detail="stores under way", limit=LOADER_JOBS_MAX)
            self._jobs.add(job)
            if self._ring is None:
                self._ring = PinnedRing(self._device, self._ring_bytes)
                self._stream = self._device.stream(urgent=False)
        self._pool.submit(self._run, job, self._store, self._ring)
        return job

    def statistics(self) -> dict[str, int]:
        with self._lock:
            ring = self._ring
            figures = {"stores": len(self._jobs), "stored_bytes": self._stored_bytes}
        used = {"ring_bytes": 0, "ring_used_bytes": 0} if ring is None else ring.statistics()
        return {**figures, **used}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        self._pool.shutdown()
        if self._ring is not None:
            self._ring.close()
            self._device.close_stream(self._stream)

    def _run(self, job: Store, store: BlockStore, ring: PinnedRing) -> None:
        stored, error = 0, None
        try:
            for new in self._puts(job, store, ring):
                stored += new
        except Exception as exc:
            error = exc
        with self._lock:
            self._jobs.discard(job)
            self._stored_bytes += stored * (job.pages.block_bytes if job.keys else 0)
        job.end(stored, error)

    def _puts(self, job: Store, store: BlockStore, ring: PinnedRing) -> Iterator[int]:
        """How many blocks of each group were new."""
        if not job.keys:
            return
        first = store.match(job.keys)
        step = self._group_blocks(job.pages.block_bytes)
        waiting: _Gathered | None = None
        try:
            while first < len(job.keys) and not job.cancelled:
                end = min(len(job.keys), first + step)
                gathered = self._gather(job, ring, first, end, wait=waiting is None)
                if waiting is not None:
                    put, waiting = waiting, None
                    yield self._put(job, store, ring, put)
                if gathered is not None:  # else the ring was full: it has room now
                    waiting, first = gathered, end
                    if end == len(job.keys):
                        gathered.event.wait()
                        job.copied()
            if waiting is not None and not job.cancelled:
                put, waiting = waiting, None
                yield self._put(job, store, ring, put)
        finally:
            if waiting is not None:
                waiting.slot.release(after=waiting.event)

    def _group_blocks(self, block_bytes: int) -> int:
        blocks = min(LOADER_GROUP_BYTES, self._ring_bytes // 2) // pages_of(block_bytes)
        return max(1, min(blocks, BATCH_BLOCKS_MAX))

    def _gather(
        self, job: Store, ring: PinnedRing, first: int, end: int, *, wait: bool
    ) -> _Gathered | None:
        size = pages_of(job.pages.block_bytes)
        slot = ring.take(size * (end - first), wait=wait)
        if slot is None:
            return None
        try:
            offsets = slot.offset + size * np.arange(end - first, dtype=np.int64)
            transfer = job.pages.transfer(ring.memory, offsets, slice(first, end))
            ring.registered.ensure(transfer)
            plan = self._device.plan(transfer, store=True)
            if job.after is not None:
                self._device.wait_for(self._stream, job.after)
            self._device.copy(plan, 0, job.pages.layout.layers, self._stream, store=True)
            event = self._device.record(self._stream)
        except BaseException:
            slot.release()
            raise
        return _Gathered(first, end, slot, offsets.tolist(), event, plan)

    def _put(self, job: Store, store: BlockStore, ring: PinnedRing, group: _Gathered) -> int:
        try:
            group.event.wait()
            size = job.pages.block_bytes
            views = [ring.view(offset, size) for offset in group.offsets]
            return store.put(job.keys[group.first : group.end], views)
        finally:
            group.slot.release(after=group.event)


__all__ = ["Store", "StoreWorker"]
