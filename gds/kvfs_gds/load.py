"""One load: what was fetched, what is queued on the device, what has been copied.

    take_group ──► (fetch) ──► arrived ──► gathered ──┬─ more to come ─► queued whole, a bit ahead
                                                      └─ all there ────► queued layer by layer
                                          queued ──► event has happened ──► copied, lease given back

Invariants, guarded by the load's lock:

- A group's lease is given back exactly once: when its last copy has happened, or when it is dropped
  without one.
- After ``stopping`` nothing more is queued. The load settles when what was queued has happened and
  no fetch is under way: from then on nobody writes to its pages.
- When the last copies have happened, the lane's thread or one that waits for the load says so,
  whichever is first; the other finds nothing left to do.
- Layers are queued by one thread at a time (``issuing``), without the lock: ``events`` grows. The
  first run is queued by who has fetched the last block, the others by who waits for them, or by a
  thread of the loader's once nobody has come for a while.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import BATCH_BLOCKS_MAX
from kvfs_gds.convert import Fp8
from kvfs_gds.device import CpuEvent, Event
from kvfs_gds.lanes import Lane
from kvfs_gds.limits import (
    LOADER_ANSWER_BLOCKS,
    LOADER_AT_ONCE_BYTES,
    LOADER_FIRST_RUN_BYTES,
    LOADER_FIRST_RUN_LAYERS,
    LOADER_GROUP_BYTES,
    LOADER_MEMORY_FIRST_BYTES,
    LOADER_MEMORY_GROUP_BYTES,
    LOADER_QUEUED_BYTES,
    LOADER_QUEUED_FACTOR,
    LOADER_QUIET_SECONDS,
    LOADER_RUN_BYTES,
    LOADER_RUN_LAYERS,
    LOADER_WINDOW_GROUPS,
)
from kvfs_gds.paged import HostMemory, Int32s, Int64s, PagedLayout, Transfer
from kvfs_gds.sources import Fetched

if TYPE_CHECKING:
    from kvfs_gds.loader import Loader

log = logging.getLogger(__name__)

_ALL = 1 << 32
"""More layers than anything has."""

PREFETCH_BLOCKS = 64
"""Blocks of unknown size that one fetch brings."""


class Priority(enum.IntEnum):
    DEMAND = 0
    PREFETCH = 1


@dataclasses.dataclass(frozen=True)
class Pages:
    """Where blocks go, or come from: ``table`` [blocks, pages of one block] are page numbers of
    ``layout``. With ``convert`` blocks are stored in another type. Raises InvalidRequest."""

    layout: PagedLayout
    table: Int32s
    convert: Fp8 | None = None

    def __post_init__(self) -> None:
        if self.table.ndim != 2:
            raise InvalidRequest(detail=f"a block table of shape {self.table.shape}")
        if (
            self.table.size
            and not 0 <= self.table.min() <= self.table.max() < self.layout.num_pages
        ):
            raise InvalidRequest(detail=f"page outside 0..{self.layout.num_pages - 1}")

    @property
    def block_bytes(self) -> int:
        """As it is stored."""
        page_bytes = self.layout.block_bytes(int(self.table.shape[1]))
        return page_bytes if self.convert is None else self.convert.stored_bytes(page_bytes)

    def transfer(self, memory: HostMemory, offsets: Int64s, places: Any) -> Transfer:
        """Of some blocks (an index of ``table``), which lie at ``offsets``."""
        return Transfer(memory, offsets, self.layout, self.table[places], self.convert)


class _Group:
    """Blocks of one fetch, under one lease."""

    def __init__(
        self,
        fetched: Fetched,
        memory: HostMemory,
        places: Int64s,
        offsets: Int64s,
        block_bytes: int,
    ) -> None:
        self.fetched = fetched
        self.memory = memory
        self.places = places
        self.offsets = offsets
        self.nbytes = len(places) * block_bytes
        self.copying = 0
        self.given = 0
        """Blocks that were queued."""

    @property
    def left(self) -> int:
        return len(self.places) - self.given


@dataclasses.dataclass
class _Part:
    """Some blocks of a group on their way to the device."""

    group: _Group
    places: Int64s
    offsets: Int64s


class Load:
    """The handle of a load. Thread-safe."""

    def __init__(
        self,
        loader: Loader,
        keys: Sequence[bytes],
        pages: Pages | None,
        lane: Lane,
        *,
        priority: Priority,
        after: Event | None = None,
    ) -> None:
        self.keys = list(keys)
        self.priority = priority
        self._loader = loader
        self._pages = pages
        self._block_bytes = 0 if pages is None or not keys else pages.block_bytes
        self._lane = lane
        self._after = after
        self._lock = threading.Condition()
        self._next = 0
        self._groups = 0
        """Fetches begun."""
        self._fetching = 0
        self._listed = False
        self._gathered: list[_Group] = []
        self._held_bytes = 0
        self._asked_bytes = 0
        """Of the fetches under way."""
        self._queued_bytes = 0
        self._copies = 0
        """Steps that the lane has yet to take."""
        self._events: list[Event] = []
        self._turns = 0
        """How often somebody has waited for a layer."""
        self._waited: tuple[Any, Event] | None = None
        """The stream that was told last to wait for an event."""
        self._last_step: tuple[Event, Callable[[], None]] | None = None
        """What is left to do when the last copies have happened."""
        self._fetched = False
        self._rest: list[_Part] = []
        """What is queued layer by layer."""
        self._plans: list[Any] | None = None
        """How, once that is known."""
        self._issuing = False
        self._issued = False
        self._found = np.zeros(len(keys), dtype=bool)
        self._hits = np.zeros(len(keys), dtype=bool)
        self._error: BaseException | None = None
        self._cancelled = False
        self._settled = False

    # --- what users call

    def wait_layer(self, layer: int, stream: Any = None) -> None:
        """What is queued on ``stream`` from here on sees layer ``layer`` of every block; without a
        stream this thread waits. Blocks the thread until all blocks are fetched, not until they are
        copied. Raises what the load failed with, InvalidRequest if it was cancelled."""
        if self._settled and not self.stopping:
            return  # everything has been copied
        self._turns += 1
        # Behind the first layer the device has something to do: then everything is queued, before
        # the link has nothing to do.
        wanted = _ALL if layer else len(self._events) + 1
        self._issue(wanted)
        while not self._there(layer):
            with self._lock:
                self._lock.wait_for(lambda: self._there(layer) or self._can_issue())
            self._issue(wanted)
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._cancelled:
                raise InvalidRequest(detail="the load was cancelled")
            if not self._events:
                return
            event = self._events[layer]
        if stream is None:
            event.wait()
            return
        device = self._lane.device
        wrapped = device.wrap(stream)
        # Layers of one run have one event, which a stream needs to wait for once.
        if self._waited != (wrapped, event):
            device.wait_for(wrapped, event)
            self._waited = wrapped, event

    def _there(self, layer: int) -> bool:
        return len(self._events) > layer or self._issued or self._settled

    def layer_done(self, layer: int) -> bool:
        """Whether all copies of the layer have happened."""
        with self._lock:
            if len(self._events) > layer:
                return self._events[layer].done()
            return (self._issued or self._settled) and not self._events

    def found(self) -> list[bool]:
        """For each key, whether its block was found: known once all are fetched, before the copies
        are done. Raises as ``wait_layer``."""
        with self._lock:
            self._lock.wait_for(lambda: self._fetched or self._settled)
            if self._error is not None:
                raise self._error
        return cast(list[bool], self._found.tolist())

    def result(self) -> list[bool]:
        """Waits for the copies; for each key, whether its whole block lies in its pages. Raises
        what the load failed with: then some blocks may, and none is being written any more."""
        self.wait()
        if self._error is not None:
            raise self._error
        return cast(list[bool], self._hits.tolist())

    def wait(self) -> None:
        """Until nothing of this load is under way, however it ended."""
        last = None
        while last is None and not self._settled:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._last_step is not None or self._settled or self._can_issue()
                )
            self._issue(_ALL)
            last = self._last_step
        if last is not None and not self._settled:
            # To be woken by the lane's thread, which is woken by the device, takes 0.3 ms more.
            event, step = last
            try:
                event.wait()
            except Exception:
                pass  # the lane's thread says so, and goes on
            else:
                step()
        with self._lock:
            self._lock.wait_for(lambda: self._settled)

    def cancel(self) -> bool:
        """Fetches and queues nothing more; what is queued already still happens (``wait``). False
        if everything was queued: then the load is as good as done."""
        with self._lock:
            if self._settled or self._fetched:
                return False
            self._cancelled = True
            self._lock.notify_all()
        self.pump()
        return True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    # --- what the loader calls

    @property
    def stopping(self) -> bool:
        return self._cancelled or self._error is not None

    def begin(self) -> None:
        self.fetch_more()
        if not self.keys:
            self.pump()

    def take_group(self) -> tuple[int, int] | None:
        """The blocks to be fetched next; ``group_done`` must follow, and somebody must go on with
        the next ones then. None if there are none now."""
        with self._lock:
            self._listed = False
            count = self._group_blocks()
            if self.stopping or self._next == len(self.keys) or not count:
                return None  # without room: listed again when there is some
            first = self._next
            self._next = min(len(self.keys), first + count)
            self._groups += 1
            self._fetching += 1
            self._asked_bytes += (self._next - first) * self._block_bytes
            return first, self._next

    def _group_blocks(self) -> int:
        """How many blocks the next fetch is for; 0 if it has to wait for room."""
        if not self._block_bytes:
            return PREFETCH_BLOCKS
        left_bytes = (len(self.keys) - self._next) * self._block_bytes
        window = self._loader.window_bytes
        used = self._held_bytes + self._asked_bytes
        wanted = LOADER_GROUP_BYTES
        if self._loader.from_memory:
            wanted = LOADER_MEMORY_FIRST_BYTES
            # The link has that while it waits for the rest.
            if self._groups or len(self.keys) <= LOADER_ANSWER_BLOCKS:
                part = left_bytes if left_bytes <= window - used else window // LOADER_WINDOW_GROUPS
                wanted = max(LOADER_GROUP_BYTES, min(part, LOADER_MEMORY_GROUP_BYTES))
        wanted = min(wanted, window - used)
        blocks = wanted // self._block_bytes
        return min(max(blocks, 0 if used else 1), BATCH_BLOCKS_MAX)

    def arrived(self, places: Int64s, fetched: Fetched) -> None:
        """Blocks are in memory; ``pump`` or ``group_done`` goes on with them. Takes over
        ``fetched``."""
        try:
            group = self._group(places, fetched)
        except BaseException:
            fetched.release()
            raise
        with self._lock:
            if self._pages is None or self.stopping or not len(group.places):
                if self._pages is None:
                    self._hits[group.places] = True
                fetched.release()
            else:
                self._gathered.append(group)
                self._hold(group.nbytes)

    def _group(self, places: Int64s, fetched: Fetched) -> _Group:
        extents = fetched.extents
        if None in extents:
            places = places[[extent is not None for extent in extents]]
        here = [extent for extent in extents if extent is not None]
        self._found[places] = True
        if self._block_bytes:
            wrong = {size for _, size in here} - {self._block_bytes}
            if wrong:
                detail = f"a block of {wrong.pop()} bytes for {self._block_bytes}"
                raise InvalidRequest(detail=detail)
        offsets = np.array([offset for offset, _ in here], dtype=np.int64)
        return _Group(fetched, fetched.memory, places, offsets, self._block_bytes)

    def group_done(self, first: int, end: int) -> None:
        """The fetch that ``take_group`` asked for is over, one way or the other. ``finish`` must
        follow if it ``is_to_finish``."""
        with self._lock:
            self._fetching -= 1
            self._asked_bytes -= (end - first) * self._block_bytes
        self.pump()
        layers = 0 if self._pages is None else self._pages.layout.layers
        self._issue(1 + LOADER_AT_ONCE_BYTES * layers // max(1, self._rest_bytes))

    @property
    def is_to_finish(self) -> bool:
        """All blocks are there, and not all layers are queued."""
        return self._fetched and not self._issued

    def finish(self) -> None:
        """Queues the layers that are left, if all blocks are there, and unless who waits for them
        does."""
        with self._lock:
            turns = -1
            while self._fetched and not self._issued and turns != self._turns:
                turns = self._turns
                self._lock.wait_for(lambda: self._issued, LOADER_QUIET_SECONDS)
        self._issue(_ALL)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    # --- queueing

    def fetch_more(self) -> None:
        """Has the next blocks fetched, if there are any. From memory, who fetches others goes on
        with them."""
        with self._lock:
            if self._listed or self.stopping or self._next == len(self.keys):
                return
            if self._fetching and self._loader.from_memory:
                return
            self._listed = True
        self._loader.enqueue(self)

    def pump(self) -> None:
        """Queues what can be queued now, in whole blocks."""
        with self._lock:
            if self._settled or self._fetched:
                return
            if not self.stopping:
                try:
                    self._queue()
                except Exception as exc:
                    self._error = exc
            if self.stopping:
                self._drop_gathered()
                if not self._fetching and not self._copies:
                    self._settle()

    def _queue(self) -> None:
        """Queues whole blocks; once all are fetched, leaves them to ``_issue``."""
        if self._next == len(self.keys) and not self._fetching:
            self._rest = [self._part(group, group.left) for group in self._gathered]
            self._gathered.clear()
            self._fetched = True
            self._lock.notify_all()
            return
        ahead = LOADER_QUEUED_BYTES
        if self._next < len(self.keys):
            ahead *= LOADER_QUEUED_FACTOR
        while self._gathered and self._queued_bytes < ahead:
            self._queue_whole(self._gathered[0], ahead - self._queued_bytes)

    def _queue_whole(self, group: _Group, room_bytes: int) -> None:
        """All layers of some blocks."""
        assert self._pages is not None
        part = self._part(group, min(group.left, max(1, room_bytes // self._block_bytes)))
        plan = self._plan(group.memory, part.offsets, part.places)
        self._device.copy(plan, 0, self._pages.layout.layers, self._lane.stream, store=False)
        nbytes = len(part.places) * self._block_bytes
        self._queued_bytes += nbytes
        self._then(self._device.record(self._lane.stream), [part], [plan], nbytes)
        if not group.left:
            self._gathered.remove(group)

    def _can_issue(self) -> bool:
        return self._fetched and not self._issuing and not self._issued

    def _issue(self, until: int) -> None:
        """Queues layers, with events behind them, until there are ``until``: unless some blocks are
        on their way, or another thread is at it."""
        layers = 0 if self._pages is None else self._pages.layout.layers
        if self._issued or (len(self._events) >= until and until < layers):
            return
        with self._lock:
            if not self._can_issue():
                return
            self._issuing = True
        error: Exception | None = None
        try:
            while len(self._events) < min(until, layers):
                self._queue_run(layers)
        except Exception as exc:
            error = exc
        with self._lock:
            self._issuing = False
            self._error = self._error or error
            if error is not None or len(self._events) == layers:
                self._issued = True
                if self._rest:
                    last = self._last(error)
                    self._last_step = self._then(last, self._rest, self._plans or [], 0)
                if not self._copies:
                    self._settle()
            self._lock.notify_all()

    def _last(self, error: Exception | None) -> Event:
        """Behind everything that was queued."""
        if error is None:
            return self._events[-1]
        try:
            return cast(Event, self._device.record(self._lane.stream))
        except Exception:
            log.exception("a device failed")
            return CpuEvent.happened()

    def _queue_run(self, layers: int) -> None:
        """The next few layers, and an event."""
        stream, first = self._lane.stream, len(self._events)
        if self._plans is None:
            self._plans = [self._plan_of(some) for some in _by_memory(self._rest)]
        # Without any, everything went as whole blocks, or nothing was found.
        end = layers
        if self._plans:
            nbytes = self._rest_bytes
            shortest, run_bytes = LOADER_RUN_LAYERS, LOADER_RUN_BYTES
            if not first:
                shortest, run_bytes = LOADER_FIRST_RUN_LAYERS, LOADER_FIRST_RUN_BYTES
            end = first + max(shortest, run_bytes * layers // nbytes)
            if (layers - end) * nbytes < LOADER_FIRST_RUN_BYTES * layers:
                end = layers  # too little for another run
        for plan in self._plans:
            self._device.copy(plan, first, end, stream, store=False)
        event = self._device.record(stream)
        with self._lock:
            self._events += [event] * (end - first)
            self._lock.notify_all()

    @property
    def _rest_bytes(self) -> int:
        return sum(len(part.places) for part in self._rest) * self._block_bytes

    def _plan_of(self, parts: list[_Part]) -> Any:
        offsets = np.concatenate([part.offsets for part in parts])
        places = np.concatenate([part.places for part in parts])
        return self._plan(parts[0].group.memory, offsets, places)

    def _plan(self, memory: HostMemory, offsets: Int64s, places: Int64s) -> Any:
        assert self._pages is not None
        transfer = self._pages.transfer(memory, offsets, places)
        self._loader.registered(memory).ensure(transfer)
        if self._after is not None:
            self._device.wait_for(self._lane.stream, self._after)
            self._after = None
        return self._device.plan(transfer, store=False)

    @property
    def _device(self) -> Any:
        return self._lane.device

    def _part(self, group: _Group, count: int) -> _Part:
        some = slice(group.given, group.given + count)
        part = _Part(group, group.places[some], group.offsets[some])
        group.given += count
        group.copying += 1
        return part

    def _then(
        self, event: Event, parts: list[_Part], plans: list[Any], queued: int
    ) -> tuple[Event, Callable[[], None]]:
        self._copies += 1
        step = functools.partial(self._copied, parts, plans, queued)
        self._lane.then(event, step)
        return event, step

    def _copied(self, parts: list[_Part], plans: list[Any], queued: int) -> None:
        """The copies of ``parts`` have happened. Of the last ones two threads may say so."""
        with self._lock:
            if not parts:
                return
            self._copies -= 1
            self._queued_bytes -= queued
            for part in parts:
                self._hits[part.places] = True
                part.group.copying -= 1
                if not part.group.copying and not part.group.left:
                    self._give_back(part.group)
            parts.clear()
            plans.clear()
            if self._issued and not self._copies:
                self._settle()
        self.pump()
        self.fetch_more()

    # --- ending

    def _drop_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for group in gathered:
            group.places = group.places[: group.given]  # nothing of it is left to queue
            if not group.copying:
                self._give_back(group)

    def _give_back(self, group: _Group) -> None:
        group.fetched.release()
        self._hold(-group.nbytes)

    def _hold(self, nbytes: int) -> None:
        self._held_bytes += nbytes
        self._loader.holds(nbytes)

    def _settle(self) -> None:
        if self._settled:
            return
        self._settled = True
        self._last_step = None
        self._loader.settled(self, int(self._hits.sum()) * self._block_bytes)
        self._lock.notify_all()


def _by_memory(parts: Sequence[_Part]) -> list[list[_Part]]:
    """An agent that was restarted has another arena than before."""
    found: dict[tuple[int, int], list[_Part]] = {}
    for part in parts:
        memory = part.group.memory
        found.setdefault((memory.address, memory.nbytes), []).append(part)
    return list(found.values())


__all__ = ["Load", "Pages", "Priority"]
