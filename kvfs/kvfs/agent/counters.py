"""Counters of the node agent."""

from __future__ import annotations

import threading

COUNTERS = (
    "blocks_requested",
    "arena_hits",
    "blocks_loaded",
    "blocks_unknown",
    "blocks_corrupt",
    "blocks_missing",
    "load_failures",
    "loaded_bytes",
    "put_blocks",
    "put_bytes",
    "put_duplicates",
    "puts_aborted",
)
"""``blocks_requested`` = ``arena_hits`` (in the arena, or being loaded by somebody else)
+ ``blocks_loaded`` + ``blocks_unknown`` (the metadata service has no such key)
+ ``blocks_corrupt`` (wrong bytes: checksum, key or generation) + ``blocks_missing`` (no chunk)
+ ``load_failures`` (a server could not be asked, or a load that a get waited for failed)."""


class Counters:
    """Named numbers that only grow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(COUNTERS, 0)

    def add(self, **amounts: int) -> None:
        """Adds to the counters named."""
        values = self._values
        with self._lock:
            for name, amount in amounts.items():
                values[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)
