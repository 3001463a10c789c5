"""What the kernel is told without having asked: in a thread, and long after those who changed it
got their answer. The kernel takes a directory's lock for a notice; whoever has it may wait for us.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from kvfs.mount import fuse_wire as wire
from kvfs.mount.device import Device
from kvfs.mount.limits import MOUNT_NOTICES_MAX
from kvfs.mount.names import Entry

log = logging.getLogger(__name__)


class Notices:
    """Of one device. Those that find no room are left to the kernel's time-outs."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._waiting: list[bytes] = []
        self._changed: set[int] = set()
        """Inodes of which these tell."""
        self._changed_now: set[int] = set()
        """Of those that are being told."""
        self._any = trio.Event()
        self._telling = trio.CancelScope()

    def changed(self, inodes: Sequence[int], entries: Sequence[Entry]) -> None:
        """Names are to be looked up again, and attributes asked for."""
        # The attributes first: they wait for nobody.
        notices = [wire.inval_attributes(inode) for inode in inodes]
        notices += [wire.inval_entry(parent, name) for parent, name in entries]
        room = MOUNT_NOTICES_MAX - len(self._waiting)
        self._waiting += notices[:room]
        self._changed.update(inodes if room > 0 else ())
        self._any.set()

    def is_to_be_told(self, inode: int) -> bool:
        """It was changed, and the kernel may not know yet: nor perhaps that a name has gone."""
        return inode in self._changed or inode in self._changed_now

    def is_gone(self, parent: int, inode: int, name: bytes) -> None:
        """A name disappeared by itself."""
        if len(self._waiting) < MOUNT_NOTICES_MAX:
            self._waiting.append(wire.delete(parent, inode, name))
        self._any.set()

    async def tell(self) -> None:
        """Until stopped. A notice that waits for the kernel then is left to its thread."""
        with self._telling:
            while True:
                await self._any.wait()
                self._any = trio.Event()
                notices, self._waiting = self._waiting, []
                self._changed_now, self._changed = self._changed, set()
                await trio.to_thread.run_sync(self._write, notices, abandon_on_cancel=True)
                self._changed_now = set()

    def stop(self) -> None:
        self._telling.cancel()

    def _write(self, notices: list[bytes]) -> None:
        for notice in notices:
            try:
                self._device.notify(notice)
            except OSError as exc:
                log.info("the kernel was not told of a change: %s", exc.strerror)
