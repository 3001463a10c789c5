"""Files of one copy that a mover takes away from a target (docs/design/0006-moves.md).

Nobody has such a file open, so nobody writes to it; but a client that was silent for longer than
its session lasted does not know that it has nothing open any more. What it writes must not come
behind the mover's last look: it would be where nobody looks, and the client would be told that it
is done.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator

from kvfs_base import threads
from kvfs_base.errors import Conflict, InodeStale
from kvfs_datapath.limits import (
    CHUNK_LOCK_SECONDS,
    FILES_LEFT_MAX,
    STALL_SECONDS,
)


class Leaving:
    """Of one target, by inode number. Thread-safe."""

    def __init__(self) -> None:
        self._condition = threads.condition()
        self._changing: collections.Counter[int] = collections.Counter()
        self._held: dict[int, bool] = {}
        """And whether they were moved here again since."""
        self._left: collections.OrderedDict[int, object] = collections.OrderedDict()
        """And something that is another one for each time that it has left."""
        self.is_wanted: Callable[[int], bool] = lambda inode: False
        """Asks the metadata service whether the file has a chain of this target now. A place that
        has no chunks is given to a target without its being told."""

    @contextlib.contextmanager
    def changing(self, inode: int) -> Iterator[None]:
        """While a chunk of the file is changed, or opened for that. Waits while a mover ends its
        move. Raises InodeStale once it has left, Conflict if that takes long."""
        self.require_here(inode)
        with self._condition:
            if inode in self._held and not self._condition.wait_for(
                lambda: inode not in self._held, STALL_SECONDS
            ):
                raise Conflict(detail=f"inode {inode} is being moved")
            if inode in self._left:
                raise InodeStale(inode=inode)
            self._changing[inode] += 1
        try:
            yield
        finally:
            with self._condition:
                self._changing[inode] -= 1
                if not self._changing[inode]:
                    del self._changing[inode]
                    if inode in self._held:
                        self._condition.notify_all()

    def require_here(self, inode: int) -> None:
        """Raises InodeStale for a file that has left: its layout is another one now."""
        left = self._left.get(inode)
        if left is None:
            return
        if self.is_wanted(inode):
            with self._condition:
                if self._left.get(inode) is left:
                    del self._left[inode]
                    return
        raise InodeStale(inode=inode)

    def hold(self, inode: int) -> bool:
        """Nothing of the file changes here from now on, until ``decide``. False if somebody does
        not come to an end with it."""
        with self._condition:
            self._held[inode] = False
            if self._condition.wait_for(lambda: inode not in self._changing, CHUNK_LOCK_SECONDS):
                return True
            self._release(inode)
            return False

    def held(self) -> list[int]:
        """Files of which it is not known yet whether they have left."""
        with self._condition:
            return list(self._held)

    def decide(self, inode: int, *, left: bool) -> None:
        """One that came again since whoever decides it asked has not left."""
        with self._condition:
            if left and not self._held.get(inode):
                self._left[inode] = object()
                while len(self._left) > FILES_LEFT_MAX:
                    self._left.popitem(last=False)
            self._release(inode)

    def _release(self, inode: int) -> None:
        self._held.pop(inode, None)
        self._condition.notify_all()

    def came(self, inode: int) -> None:
        """The file is moved here, perhaps back again."""
        if inode in self._left or inode in self._held:
            with self._condition:
                self._left.pop(inode, None)
                if inode in self._held:
                    self._held[inode] = True


__all__ = ["Leaving"]
