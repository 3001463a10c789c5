"""A dictionary by inode number that forgets the oldest entries when it is full."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """For knowledge that can be had again at a cost."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._values: dict[int, T] = {}

    def keep(self, inode: int, value: T) -> None:
        if inode not in self._values and len(self._values) >= self._entries_max:
            del self._values[next(iter(self._values))]
        self._values[inode] = value

    def get(self, inode: int) -> T | None:
        return self._values.get(inode)

    def drop(self, inode: int) -> None:
        self._values.pop(inode, None)

    def __contains__(self, inode: int) -> bool:
        return inode in self._values

    def __len__(self) -> int:
        return len(self._values)
