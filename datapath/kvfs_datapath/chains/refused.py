"""Updates that were given up because a member had no room: none that comes late is taken."""

from __future__ import annotations

import collections

from kvfs_base import threads
from kvfs_base.errors import DiskFull, ServerBusy
from kvfs_datapath import messages as m
from kvfs_datapath.chains.views import Place
from kvfs_datapath.format import ChunkInfo
from kvfs_datapath.limits import UPDATES_REFUSED_MAX

_Name = tuple[int, int, int, int, int]
"""Inode, number, version, writer, sequence."""


class Refused:
    """Of all targets of a server. Thread-safe. A request of another version of the chain is refused
    for that, so only those of the present one are remembered."""

    def __init__(self) -> None:
        self._lock = threads.lock()
        self._names: dict[tuple[int, int], tuple[int, set[_Name]]] = collections.defaultdict(
            lambda: (0, set())
        )
        """By target and chain: the chain's version, and what is refused under it."""

    def add(self, place: Place, made: ChunkInfo) -> None:
        """Raises ServerBusy if there are too many, or it has no number of its own; then it may
        still be taken."""
        key = (place.target_id, place.chain.chain_id)
        if not made.writer:
            raise ServerBusy(detail="an update without a number")
        with self._lock:
            version, names = self._names[key]
            if version != place.chain.version:
                names = set()
            if len(names) >= UPDATES_REFUSED_MAX:
                raise ServerBusy(detail="too many updates were given up")
            names.add((made.inode, made.number, made.version, made.writer, made.sequence))
            self._names[key] = (place.chain.version, names)

    def check(self, place: Place, request: m.PassUpdate) -> None:
        """Raises DiskFull, which it was refused for."""
        key = (place.target_id, place.chain.chain_id)
        with self._lock:
            if key not in self._names:
                return
            version, names = self._names[key]
        update = request.update
        name = (update.inode, update.number, request.version, update.writer, update.sequence)
        if version == place.chain.version and name in names:
            raise DiskFull(path=f"target {place.target_id}")


__all__ = ["Refused"]
