"""Which blocks go first when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class CachePolicy(Protocol):
    """Knows blocks by inode number and size. Sequences are in the order of a prefix: a block
    restores nothing without those before it."""

    def inserted(self, blocks: Sequence[tuple[int, int]]) -> None:
        """New (inode, bytes), in the order of the prefix. Counts as a use."""

    def used(self, inodes: Sequence[int]) -> None:
        """Known inodes, in the order of the prefix."""

    def removed(self, inode: int) -> None: ...

    def victims(self, bytes_needed: int, count_max: int) -> list[int]:
        """Blocks to evict, first one first: at least ``bytes_needed`` bytes, unless there are no
        more blocks or ``count_max`` is reached. Does not remove them."""

    def __len__(self) -> int: ...


class LruPolicy:
    """Least recently used first. Within one request the end of the prefix counts as the older use:
    evicting from the tail shortens a prefix, evicting its head would make the rest worthless."""

    def __init__(self) -> None:
        # OrderedDict: linked, so that the first one is found at once whatever was removed before
        # it; a plain dict walks over its deleted entries each time.
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def inserted(self, blocks: Sequence[tuple[int, int]]) -> None:
        for inode, size in reversed(blocks):
            self._sizes[inode] = size

    def used(self, inodes: Sequence[int]) -> None:
        move = self._sizes.move_to_end
        for inode in reversed(inodes):
            move(inode)

    def removed(self, inode: int) -> None:
        del self._sizes[inode]

    def victims(self, bytes_needed: int, count_max: int) -> list[int]:
        chosen: list[int] = []
        freed = 0
        for inode, size in self._sizes.items():
            if freed >= bytes_needed or len(chosen) >= count_max:
                break
            chosen.append(inode)
            freed += size
        return chosen

    def __len__(self) -> int:
        return len(self._sizes)
