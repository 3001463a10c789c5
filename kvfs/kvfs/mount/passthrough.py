"""Files that the kernel reads by itself: which inodes are open that way.

The kernel wants one backing file an inode for as long as it is open that way, and refuses (EIO) to
open an inode both through its page cache and through a backing file. So the first open of an inode
decides, and every further one gets the same until the last is released.

The kernel looks an id up when it carries an open out, which is after our answer; so an id is kept
until the release, though open files hold the backing file themselves. If the descriptor stays at
hand after that, the next open gets the same id.
"""

from __future__ import annotations

import dataclasses
import logging
import os

from kvfs.mount.device import Device

log = logging.getLogger(__name__)

NO_BACKING = 0
NO_FILE = (0, 0)


@dataclasses.dataclass(slots=True)
class _Inode:
    backing_id: int
    """NO_BACKING: through the page cache."""
    file: tuple[int, int]
    """Device and inode of what the kernel reads. An id holds it: nothing else is called that.
    NO_FILE of what it writes."""
    is_written: bool = False
    """It holds it open for writing."""
    handles: int = 0


class Backings:
    """Of one mount."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._inodes: dict[int, _Inode] = {}
        self._idle: dict[int, _Inode] = {}
        """Those that nobody has open, and whose descriptors are at hand."""
        self._handles: dict[int, int] = {}
        self._refusals: set[int | None] = set()

    def opened(self, handle: int, inode: int, descriptor: int, *, is_written: bool = False) -> int:
        """The id for the answer to an open, or NO_BACKING. ``descriptor`` is what the kernel may
        read, and write if it ``is_written``; only the first one of an inode counts."""
        known = self._inodes.get(inode)
        if known is None:
            known = self._first(inode, descriptor, is_written=is_written)
            self._inodes[inode] = known
        known.handles += 1
        self._handles[handle] = inode
        return known.backing_id

    def _first(self, inode: int, descriptor: int, *, is_written: bool) -> _Inode:
        file = NO_FILE
        if not is_written:  # else the id is let go with the last handle
            status = os.fstat(descriptor)
            file = status.st_dev, status.st_ino
        idle = self._idle.pop(inode, None)
        if idle is not None and idle.file == file:
            return idle
        if idle is not None:
            self._device.close_backing(idle.backing_id)
        return _Inode(self._register(descriptor), file, is_written)

    def released(self, handle: int, *, is_kept: bool) -> bool:
        """Whether the kernel read it by itself. ``is_kept``: if nobody else has it open, its
        descriptor is at hand until ``let_go``."""
        inode = self._handles.pop(handle, None)
        if inode is None:
            return False
        known = self._inodes[inode]
        known.handles -= 1
        is_passed = known.backing_id != NO_BACKING
        if known.handles:
            return is_passed
        del self._inodes[inode]
        if is_passed:
            self._idle[inode] = known
            if known.is_written or not is_kept:
                self.let_go(inode)
        return is_passed

    def reads(self, handle: int) -> bool:
        """Whether the kernel reads it by itself."""
        inode = self._handles.get(handle)
        return inode is not None and self._inodes[inode].backing_id != NO_BACKING

    def let_go(self, inode: int) -> None:
        """The descriptor is not at hand any more: what the file takes is free once the id is."""
        idle = self._idle.pop(inode, None)
        if idle is not None:
            self._device.close_backing(idle.backing_id)

    def _register(self, descriptor: int) -> int:
        try:
            return self._device.open_backing(descriptor)
        except OSError as exc:
            # EPERM without CAP_SYS_ADMIN, ELOOP for a file on overlayfs: said once, not each time.
            if exc.errno not in self._refusals:
                self._refusals.add(exc.errno)
                log.info("no passthrough: %s", exc.strerror)
            return NO_BACKING

    def __len__(self) -> int:
        """Inodes that the kernel reads by itself."""
        return sum(known.backing_id != NO_BACKING for known in self._inodes.values())
