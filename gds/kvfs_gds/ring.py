"""Memory with slots: what stores gather into, and what files are read into without an agent.

A slot is page-aligned (O_DIRECT), counted, and given back *after an event*: the copy that was
queued from it may still be under way when its user lets go. The ring never grows: who
finds no room waits for the copies that hold it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from kvfs_base.errors import ArenaFull, InvalidRequest
from kvfs_base.large_pages import SharedMapping
from kvfs_gds.device import Device, Event
from kvfs_gds.extents import ExtentAllocator, pages_of
from kvfs_gds.paged import HostMemory


class Slot:
    """``nbytes`` at ``offset`` of a ring. Starts with one reference."""

    def __init__(self, ring: Ring, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self._ring = ring
        self._references = 1
        self._events: list[Event] = []

    def retain(self) -> None:
        with self._ring.lock:
            self._references += 1

    def release(self, after: Event | None = None) -> None:
        """Drops a reference; with the last one the memory is free once ``after``, and what earlier
        releases named, have happened."""
        with self._ring.lock:
            if not self._references:
                raise InvalidRequest(detail="a slot was released twice")
            if after is not None:
                self._events.append(after)
            self._references -= 1
            if not self._references:
                self._ring._give_back(self, self._events)


class Ring:
    """Thread-safe. Slots of ``memory``, which is page-aligned and usable by ``device``."""

    def __init__(self, device: Device, memory: HostMemory) -> None:
        """``memory`` is whole pages."""
        self.nbytes = memory.nbytes
        self.memory = memory
        self.lock = threading.Condition()
        self._extents = ExtentAllocator(memory.nbytes)
        self.registered = device.register(memory)
        self._leaving: list[tuple[Slot, list[Event]]] = []
        """Without references, and perhaps still read or written by the device; oldest first."""

    @property
    def used_bytes(self) -> int:
        """Bytes of slots that are held or not yet free."""
        with self.lock:
            self._reap()
            return self._extents.used_bytes

    def take(self, nbytes: int, *, wait: bool = True) -> Slot | None:
        """A slot of at least ``nbytes``. Without room: waits for somebody to release one, or gives
        None if not to ``wait``. Raises InvalidRequest if the ring could never hold it."""
        if pages_of(nbytes) > self.nbytes:
            raise InvalidRequest(detail=f"{nbytes} bytes of a ring of {self.nbytes}")
        while True:
            with self.lock:
                self._reap()
                offset = self._extents.allocate(nbytes)
                if offset is not None:
                    return Slot(self, offset, nbytes)
                if not wait:
                    return None
                if not self._leaving:
                    self.lock.wait()
                    continue
                events = self._leaving[0][1]
            for event in events:
                event.wait()

    def _reap(self) -> None:
        still = []
        for slot, events in self._leaving:
            if all(event.done() for event in events):
                self._extents.free(slot.offset)
            else:
                still.append((slot, events))
        self._leaving = still

    def _give_back(self, slot: Slot, events: list[Event]) -> None:
        self._leaving.append((slot, events))
        self.lock.notify_all()

    def close(self) -> None:
        """Waits for the copies of released slots. No slot may be held."""
        with self.lock:
            leaving, self._leaving = self._leaving, []
        for _, events in leaving:
            for event in events:
                event.wait()
        self.registered.close()

    def statistics(self) -> dict[str, int]:
        return {"ring_bytes": self.nbytes, "ring_used_bytes": self.used_bytes}


class PinnedRing(Ring):
    """A ring of this process's memory, pinned."""

    def __init__(self, device: Device, nbytes: int) -> None:
        """Whole pages. Raises ArenaFull if the system does not give them."""
        try:
            self._memory = SharedMapping.create(nbytes)
        except OSError as exc:
            raise ArenaFull(needed_bytes=nbytes) from exc
        view = self._memory.view
        super().__init__(device, HostMemory(self._memory.address, nbytes, owner=view))

    def take(self, nbytes: int, *, wait: bool = True) -> Slot | None:
        """As Ring.take."""
        slot = super().take(nbytes, wait=wait)
        if slot is not None:
            self._memory.make_large(slot.offset, slot.nbytes)
        return slot

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of a slot, writable. Not to be kept beyond its ``release``."""
        return self._memory.view[offset : offset + nbytes]

    def close(self) -> None:
        """As Ring.close."""
        super().close()
        with contextlib.suppress(BufferError):  # arrays of it: unmapped with the last one
            self._memory.view.release()


__all__: list[Any] = ["PinnedRing", "Ring", "Slot"]
