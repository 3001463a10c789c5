"""Tells a server that is slow from one that cannot be reached any more.

A write may take long for good reasons: a disk, members behind. A host that is gone, or a way that
is cut, looks the same from here: nothing comes. So whoever waits longer than WATCHDOG_SECONDS has
the address dialled once more. A kernel accepts a connection however busy its disks and processes
are; if it does not, the one that is waited for is broken off, and the caller goes on with another
member at once instead of at the end of its deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from kvfs_base import threads
from kvfs_base.errors import KvfsError
from kvfs_base.seams import BlockingNetwork, Clock
from kvfs_base.types import Address
from kvfs_datapath.limits import (
    HELPER_IDLE_SECONDS,
    WATCHDOG_CONNECT_SECONDS,
    WATCHDOG_SECONDS,
)


@dataclasses.dataclass(eq=False, slots=True)
class Watched:
    """Somebody who waits."""

    address: Address
    break_off: Callable[[], None]
    since: float
    due: float


class Watchdog:
    """Thread-safe. Has a thread once it is needed."""

    def __init__(self, network: BlockingNetwork, clock: Clock) -> None:
        self._network = network
        self._clock = clock
        self._condition = threads.condition()
        self._watched: dict[Watched, None] = {}
        self._thread: threads.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def watch(self, address: Address, break_off: Callable[[], None]) -> Iterator[None]:
        """For as long as something is waited for that comes from there."""
        now = self._clock.monotonic()
        watched = Watched(address, break_off, since=now, due=now + WATCHDOG_SECONDS)
        with self._condition:
            self._watched[watched] = None
            if self._thread is None and not self._closed:
                self._thread = threads.thread(self._run, name="kvfs-watchdog")
                self._thread.start()
            elif len(self._watched) == 1:
                self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                self._watched.pop(watched, None)

    def _run(self) -> None:
        while True:
            with self._condition:
                address = self._wait()
                if address is None:
                    self._thread = None
                    return
            asked = self._clock.monotonic()
            reached = self._is_reached(address)
            with self._condition:
                for watched in list(self._watched):
                    if watched.address == address and watched.since <= asked:
                        self._judge(watched, reached)

    def _wait(self) -> Address | None:
        """Whose server somebody has waited long for; None when it is time to end."""
        while not self._closed:
            now = self._clock.monotonic()
            first = min(self._watched, key=lambda w: w.due, default=None)
            if first is None:
                if not self._condition.wait(HELPER_IDLE_SECONDS) and not self._watched:
                    return None
            elif first.due <= now:
                return first.address
            else:
                self._condition.wait(first.due - now)
        return None

    def _judge(self, watched: Watched, reached: bool) -> None:
        if reached:
            watched.due = self._clock.monotonic() + WATCHDOG_SECONDS
        else:
            del self._watched[watched]
            watched.break_off()

    def _is_reached(self, address: Address) -> bool:
        try:
            self._network.connect(address, WATCHDOG_CONNECT_SECONDS).close()
        except KvfsError:
            return False
        return True

    def close(self) -> None:
        """Those who wait must be about to end."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None:
            thread.join()


__all__ = ["Watchdog"]
