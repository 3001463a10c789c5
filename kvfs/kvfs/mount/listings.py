"""Directories of which all names are known here, from a listing that the metadata service has
leased to this mount. docs/design/0007-name-leases.md says when it does.

Only a directory that was listed before, and is not too large, is asked for as a whole: walking once
through a large tree leases nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfs.mount.limits import MOUNT_LISTED_MAX, MOUNT_LISTED_NAMES_MAX, MOUNT_LISTING_NAMES_MAX
from kvfs.mount.remembered import Remembered
from kvfs_base.types import Attr


class Listing:
    """What a directory holds, as far as it has been fetched."""

    def __init__(self) -> None:
        self.names: list[bytes] = []
        """In the order of their bytes."""
        self.inodes: dict[bytes, int] = {}

    def add(self, entries: Sequence[tuple[bytes, Attr]]) -> None:
        self.names += [name for name, _ in entries]
        self.inodes.update([(name, attr.inode) for name, attr in entries])

    def __len__(self) -> int:
        return len(self.names)


class Listings:
    def __init__(self) -> None:
        self._listings: dict[int, Listing] = {}
        self._names = 0
        """In all of them."""
        self._small: Remembered[None] = Remembered(MOUNT_LISTED_MAX)

    def get(self, inode: int) -> Listing | None:
        return self._listings.get(inode)

    def keep(self, inode: int, listing: Listing) -> None:
        """The oldest go for it."""
        self.drop(inode)
        self._listings[inode] = listing
        self._names += len(listing)
        while self._names > MOUNT_LISTED_NAMES_MAX or len(self._listings) > MOUNT_LISTED_MAX:
            self.drop(next(iter(self._listings)))

    def drop(self, inode: int) -> None:
        listing = self._listings.pop(inode, None)
        if listing is not None:
            self._names -= len(listing)

    def clear(self) -> None:
        self._listings.clear()
        self._names = 0

    def ended(self, inode: int, names: int) -> None:
        """Somebody has listed all of it, or so much."""
        if names <= MOUNT_LISTING_NAMES_MAX:
            self._small.keep(inode, None)
        else:
            self._small.drop(inode)

    def is_small(self, inode: int) -> bool:
        """It was when it was listed."""
        return inode in self._small

    def __len__(self) -> int:
        return len(self._listings)
