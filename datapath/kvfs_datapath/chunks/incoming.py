"""What a target has to know of chunks that come to it although their numbers were here before.

Elsewhere inode numbers are never used again, so what comes late finds nothing. A chunk that is
moved (docs/design/0006-moves.md) may come back to a target that it has left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvfs_base import threads
from kvfs_base.errors import Conflict


class Incoming:
    def __init__(self) -> None:
        self._lock = threads.lock()
        self._rounds: dict[int, int] = {}
        self._watched: set[int] | None = None

    @contextlib.contextmanager
    def round(self, source: int, ticket: int) -> Iterator[None]:
        """For what a mover of target ``source`` changes here. Raises Conflict once a later round of
        it was heard of: whatever that one has compared stays as it was."""
        with self._lock:
            latest = self._rounds.get(source, 0)
            if ticket < latest:
                raise Conflict(detail=f"round {ticket} of target {source} is over")
            self._rounds[source] = ticket
            yield

    def watch(self) -> set[int]:
        """Inodes of which a chunk comes from now on, until the next call. Whoever removes by what
        was true at this call looks here, under the chunk's guard."""
        self._watched = set()
        return self._watched

    def arrived(self, inode: int) -> None:
        """Under the chunk's guard, or before anything is decided by its being here."""
        if self._watched is not None:
            self._watched.add(inode)


__all__ = ["Incoming"]
