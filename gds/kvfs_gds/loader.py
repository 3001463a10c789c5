"""The loader: blocks by key into the paged KV cache of a device, and back.

    loader = Loader.open(namespace)
    load = loader.load(keys, Pages(PagedLayout.vllm(kv_caches), block_table))
    for number, layer in enumerate(model.layers):
        load.wait_layer(number, stream)     # the stream waits, this thread does not
        hidden = layer(hidden)
    hits = load.result()

Layer ``n`` computes while layer ``n + 1`` is copied. For that everything would have to be fetched
before the first copy; for copies to hide behind a slow disk, they would have to start with the
first block. So: as long as blocks are being fetched, whole blocks are copied as they come, only as
many as keep the link busy; with the last one there, what is left goes layer by layer. A warm load
is nearly all layers, a cold one is done soon after its last read, and nothing is configured.

A block's lease is given back when the device has passed the event behind its last copy, never
before: until then nobody else can get its memory.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvfs_base.answers import Answer
from kvfs_base.errors import ArenaFull, InvalidRequest, KvfsError, LimitExceeded
from kvfs_base.os_env import os_env
from kvfs_base.seams import Clock
from kvfs_gds.device import Device, open_device
from kvfs_gds.lanes import Lane
from kvfs_gds.limits import (
    LOADER_ANSWER_SECONDS,
    LOADER_FAST_BYTES_PER_SECOND,
    LOADER_FAST_SECONDS,
    LOADER_FETCH_THREADS,
    LOADER_GROUP_BYTES,
    LOADER_JOBS_MAX,
    LOADER_WINDOW_SHARE,
    RING_BYTES,
)
from kvfs_gds.load import Load, Pages, Priority
from kvfs_gds.paged import HostMemory
from kvfs_gds.ring import PinnedRing
from kvfs_gds.sources import ArenaNamespace, ArenaSource, BlockSource, BlockStore, Fetched
from kvfs_gds.store import Store, StoreWorker

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Fetch:
    """Blocks ``first`` to ``end`` of a load. ``answer``, if they were asked for already, waits for
    them."""

    load: Load
    first: int
    end: int
    answer: Answer[Fetched] | None = None


@dataclasses.dataclass
class _Rest:
    """The layers of a load that are left to queue."""

    load: Load


class _Entry(NamedTuple):
    """Something to do. ``order`` is another one for each."""

    priority: int
    order: int
    what: Load | _Fetch | _Rest


class Loader:
    """Thread-safe. One for each namespace (or source) and device; several share an arena, also from
    several processes."""

    def __init__(
        self,
        source: BlockSource,
        *,
        device: Device,
        store: BlockStore | None = None,
        stream: Any = None,
        ring_bytes: int = RING_BYTES,
        clock: Clock | None = None,
    ) -> None:
        """``stream``, of the caller's, is what demand loads are copied on instead of one of the
        loader's own. ``ring_bytes`` of pinned memory are taken at the first store."""
        self.device = device
        self.from_memory = False
        """The last fetch was answered sooner than a disk is read."""
        self.clock = clock or os_env().clock
        self._source = source
        lock = threading.Lock()
        self._lock = threading.Condition(lock)
        """Notified of what is to be fetched."""
        self._released = threading.Condition(lock)
        """Of what was given back. Idle threads that wake up take turns with the one that loads."""
        self._held_bytes = 0
        self._releases = 0
        self._jobs: set[Load] = set()
        self._todo: list[_Entry] = []
        self._idle = 0
        """Threads that wait for something to do."""
        self._order = itertools.count()
        self._registered: dict[tuple[int, int], Any] = {}
        self._closed = False
        self._loaded_bytes = 0
        self._stores = StoreWorker(device, store, ring_bytes)
        self._lanes = {
            Priority.DEMAND: Lane(device, stream, urgent=True),
            Priority.PREFETCH: Lane(device, None, urgent=False),
        }
        self._threads = [
            threading.Thread(target=self._work, name=f"kvfs-fetch-{n}", daemon=True)
            for n in range(LOADER_FETCH_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(
        cls, namespace: ArenaNamespace, device: str | Device = "auto", **settings: Any
    ) -> Loader:
        """A loader of a ``kvfs.Namespace``, on the device that ``open_device`` names."""
        if isinstance(device, str):
            device = open_device(device)
        return cls(ArenaSource(namespace), device=device, store=namespace, **settings)

    # --- what users call

    def load(
        self,
        keys: Sequence[bytes],
        pages: Pages,
        *,
        priority: Priority = Priority.DEMAND,
        after: Any = None,
    ) -> Load:
        """Starts to load ``keys`` into ``pages``; returns at once. Nothing is written before the
        work queued so far on the stream ``after`` has happened. Pages of blocks that are missing
        keep what they hold. Raises InvalidRequest (shapes), LimitExceeded (too many loads)."""
        if len(pages.table) != len(keys):
            raise InvalidRequest(detail=f"{len(keys)} keys, pages {pages.table.shape}")
        event = None if after is None else self.device.record(self.device.wrap(after))
        return self._start(
            Load(self, keys, pages, self._lanes[priority], priority=priority, after=event)
        )

    def prefetch(self, keys: Sequence[bytes]) -> Load:
        """Brings blocks into the source's memory, where a later load finds them, behind all loads
        that somebody waits for."""
        lane = self._lanes[Priority.PREFETCH]
        return self._start(Load(self, keys, None, lane, priority=Priority.PREFETCH))

    def store(self, keys: Sequence[bytes], pages: Pages, *, after: Any = None) -> Store:
        """Starts to store the blocks that lie in ``pages`` once the work queued so far on the
        stream ``after`` has happened; returns at once. The pages must stay as they are until
        ``Store.wait_copied``. Keys that are stored already cost nothing if they are a prefix."""
        if len(pages.table) != len(keys):
            raise InvalidRequest(detail=f"{len(keys)} keys, pages {pages.table.shape}")
        event = None if after is None else self.device.record(self.device.wrap(after))
        return self._stores.start(list(keys), pages, event)

    def statistics(self) -> dict[str, int]:
        """Loads under way, bytes they hold leased, bytes loaded and stored, pinned bytes, memory of
        the device that copies pass through."""
        with self._lock:
            registered = sum(getattr(r, "registered_bytes", 0) for r in self._registered.values())
            figures = {
                "loads": len(self._jobs),
                "held_bytes": self._held_bytes,
                "loaded_bytes": self._loaded_bytes,
                "registered_bytes": registered,
                "staging_bytes": self.device.staging_bytes,
            }
        return {**figures, **self._stores.statistics()}

    def close(self) -> None:
        """Cancels what can be cancelled and waits for the copies under way."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs)
            self._lock.notify_all()
            self._released.notify_all()
        for job in jobs:
            job.cancel()
        for thread in self._threads:
            thread.join()
        for job in jobs:
            job.wait()
        self._stores.close()
        for lane in self._lanes.values():
            lane.close()
        with self._lock:
            registered, self._registered = self._registered, {}
        for registration in registered.values():
            registration.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what loads call

    @property
    def window_bytes(self) -> int:
        """What one load may hold."""
        room = self._source.room_bytes()
        return max(room // LOADER_WINDOW_SHARE, 1) if room else LOADER_GROUP_BYTES

    def registered(self, memory: HostMemory) -> Any:
        """The device's registration of ``memory``. The one of an arena that is no more is given up
        once nothing is held."""
        name = (memory.address, memory.nbytes)
        with self._lock:
            found = self._registered.get(name)
            if found is None:
                found = self._registered[name] = self.device.register(memory)
            return found

    def enqueue(self, load: Load) -> None:
        """``load`` has more to fetch. If a thread is idle, this one asks for it: the other wakes up
        while the source is at work, and not before."""
        what: Load | _Fetch = load
        if asks := self._idle > len(self._todo):
            fetch = self._ask(load)
            if fetch is None or self._serve_now(fetch):
                return
            what = fetch
        self._push(load, what)
        if asks and not self.from_memory:
            load.fetch_more()

    def _push(self, load: Load, what: Load | _Fetch | _Rest) -> None:
        with self._lock:
            heapq.heappush(self._todo, _Entry(int(load.priority), next(self._order), what))
            self._lock.notify()

    def holds(self, nbytes: int) -> None:
        """A load holds that much more (or less)."""
        with self._lock:
            self._held_bytes += nbytes
            if nbytes < 0:
                self._releases += 1
                self._released.notify_all()

    def settled(self, load: Load, loaded_bytes: int) -> None:
        with self._lock:
            self._jobs.discard(load)
            self._loaded_bytes += loaded_bytes
            if not self._jobs:
                while len(self._registered) > 1:  # of agents that are no more
                    self._registered.pop(next(iter(self._registered))).close()
            if self._closed:
                self._lock.notify_all()
            self._released.notify_all()

    # --- fetching

    def _start(self, load: Load) -> Load:
        with self._lock:
            if self._closed:
                raise InvalidRequest(detail="the loader is closed")
            if len(self._jobs) >= LOADER_JOBS_MAX:
                raise LimitExceeded(detail="loads under way", limit=LOADER_JOBS_MAX)
            self._jobs.add(load)
        load.begin()
        return load

    def _work(self) -> None:
        fetch: _Fetch | None = None
        while (fetch := fetch or self._next()) is not None:
            fetch = self._serve(fetch)

    def _next(self) -> _Fetch | None:
        while True:
            with self._lock:
                self._idle += 1
                while not self._todo:
                    if self._closed and not self._jobs:
                        return None
                    # A closed loader has cancelled its loads; the last to settle wakes everybody.
                    self._lock.wait()
                self._idle -= 1
                found = heapq.heappop(self._todo).what
            if isinstance(found, _Fetch):
                return found
            if isinstance(found, _Rest):
                found.load.finish()
                del found
                continue
            span = found.take_group()
            if span is not None:
                if not self.from_memory:
                    found.fetch_more()
                return _Fetch(found, *span)
            del found  # not until the next one comes

    def _ask(self, load: Load) -> _Fetch | None:
        """Asks for the next blocks of a load, if that is possible without waiting."""
        span = load.take_group()
        if span is None:
            return None
        try:
            answer = self._source.ask(load.keys[slice(*span)])
        except KvfsError:
            answer = None  # who fetches them meets it again
        return _Fetch(load, *span, answer)

    def _serve_now(self, fetch: _Fetch) -> bool:
        """Brings a load that lies in memory as a whole, if that can be done at once: other threads
        would take turns with the one that goes on to queue a model."""
        load, answer = fetch.load, fetch.answer
        if answer is None or not self.from_memory or fetch.end - fetch.first < len(load.keys):
            return False
        if not answer.within(LOADER_ANSWER_SECONDS):
            return False
        fetch.answer = None
        try:
            fetched = answer.take()
        except KvfsError:
            return False  # who fetches them meets it again, or waits for room
        self._deliver(fetch, lambda: fetched)
        if load.is_to_finish:  # else nobody need wake up
            self._push(load, _Rest(load))
        return True

    def _serve(self, fetch: _Fetch) -> _Fetch | None:
        """Brings what was or is to be asked for. From memory, one thread brings a whole load, and
        this returns its next blocks: requests side by side would only hold each other up."""
        load = fetch.load
        self._deliver(fetch, lambda: self._fetch(load, fetch.first, fetch.end, fetch.answer))
        load.finish()
        if self.from_memory:
            return self._ask(load)
        load.fetch_more()
        return None

    def _deliver(self, fetch: _Fetch, bring: Callable[[], Fetched | None]) -> None:
        load = fetch.load
        try:
            fetched = bring()
            if fetched is not None:
                load.arrived(np.arange(fetch.first, fetch.end), fetched)
        except KvfsError as exc:
            load.fail(exc)
        except Exception as exc:
            log.exception("a load failed")
            load.fail(exc)
        finally:
            load.group_done(fetch.first, fetch.end)

    def _fetch(
        self,
        load: Load,
        first: int,
        end: int,
        answer: Answer[Fetched] | None = None,
    ) -> Fetched | None:
        """Blocks ``first`` to ``end``. What is held by loads of this loader will be given back:
        wait for it. What others hold may not: then smaller groups, which have arrived by the time
        that this returns None, and at last the error."""
        while answer is not None or not load.stopping:
            with self._lock:
                held, releases = self._held_bytes, self._releases
            start = self.clock.monotonic()
            try:
                if answer is None:
                    fetched = self._source.fetch(load.keys[first:end])
                else:
                    taken, answer = answer, None
                    fetched = taken.take()
            except ArenaFull:
                if held:
                    self._wait_release(load, releases)
                    continue
                if end - first == 1:
                    raise
                break
            self._learn(fetched, self.clock.monotonic() - start)
            return fetched
        if load.stopping:
            return None
        middle = (first + end) // 2
        for start_block, end_block in ((first, middle), (middle, end)):
            part = self._fetch(load, start_block, end_block)
            if part is not None:
                load.arrived(np.arange(start_block, end_block), part)
            load.pump()
        return None

    def _learn(self, fetched: Fetched, seconds: float) -> None:
        """Blocks that come faster than a disk gives them were in memory: then a round trip costs
        more than what is hidden behind the next one, and later fetches ask for more at once."""
        nbytes = sum(extent[1] for extent in fetched.extents if extent is not None)
        allowed = LOADER_FAST_SECONDS + nbytes / LOADER_FAST_BYTES_PER_SECOND
        self.from_memory = seconds < allowed

    def _wait_release(self, load: Load, releases: int) -> None:
        with self._released:
            self._released.wait_for(lambda: self._releases != releases or load.stopping)


__all__ = ["Load", "Loader", "Pages", "PinnedRing", "Priority", "Store"]
