"""What nobody has open any more and may be opened again soon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Idle(Generic[T]):
    """By inode number; a bounded number, the longest go first. ``close`` is called with each that
    is not taken, and ``when_closed`` with its number then."""

    def __init__(self, entries_max: int, close: Callable[[T], None]) -> None:
        self.when_closed: Callable[[int], None] = lambda _: None
        self._entries_max = entries_max
        self._close = close
        self._values: dict[int, T] = {}
        self._before: set[int] = set()
        """Those that were here in the last turn, and since."""

    def keep(self, inode: int, value: T) -> None:
        if inode in self._values:
            self.drop((inode,))
        self._values[inode] = value
        if len(self._values) > self._entries_max:
            self.drop((next(iter(self._values)),))

    def take(self, inode: int) -> T | None:
        self._before.discard(inode)
        return self._values.pop(inode, None)

    def drop(self, inodes: Iterable[int]) -> None:
        for inode in inodes:
            value = self.take(inode)
            if value is not None:
                self.close(inode, value)

    def close(self, inode: int, value: T) -> None:
        """Of one that was taken and is not wanted after all."""
        self._close(value)
        self.when_closed(inode)

    def turn(self) -> None:
        """What is here since before the last turn goes."""
        self.drop(list(self._before))
        self._before = set(self._values)

    def clear(self) -> None:
        self.drop(list(self._values))

    def __contains__(self, inode: int) -> bool:
        return inode in self._values

    def __len__(self) -> int:
        return len(self._values)
