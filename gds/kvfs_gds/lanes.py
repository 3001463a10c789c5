"""A stream with a thread that follows it: what is to be done when a copy has happened."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from kvfs_gds.device import Device, Event

log = logging.getLogger(__name__)


class Lane:
    """Thread-safe. Steps run in the order in which they were given, one at a time."""

    def __init__(self, device: Device, stream: Any = None, *, urgent: bool) -> None:
        """``stream`` of a caller's, or a new one."""
        self.device = device
        self._own = stream is None
        self.stream = device.stream(urgent=urgent) if stream is None else device.wrap(stream)
        self._todo: queue.SimpleQueue[tuple[Event, Callable[[], None]] | None]
        self._todo = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvfs-lane", daemon=True)
        self._thread.start()

    def then(self, event: Event, step: Callable[[], None]) -> None:
        """Runs ``step`` in the lane's thread after ``event``, which lies on its stream."""
        self._todo.put((event, step))

    def close(self) -> None:
        """Waits for every step."""
        self._todo.put(None)
        self._thread.join()
        if self._own:
            self.device.close_stream(self.stream)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            event, step = item
            try:
                event.wait()
            except Exception:
                # The device is lost: nothing will be copied any more, and nobody may wait for it.
                log.exception("a device failed")
            step()
            del item, event, step


__all__ = ["Lane"]
