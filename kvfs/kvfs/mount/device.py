"""The FUSE device: mounting, requests in, answers out, backing files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import select
import stat
from collections.abc import Sequence

from kvfs.mount import fuse_wire as wire
from kvfs.mount import fusermount, system
from kvfs_base.errors import MountFailed
from kvfs_base.seams import Buffer

log = logging.getLogger(__name__)

SOURCE = "kvfs"
SELECT_DESCRIPTORS_MAX = 1024
MS_NOSUID = 2
MS_NODEV = 4
GONE = frozenset({errno.ENODEV, errno.ECONNABORTED})
"""The file system was unmounted, or its connection cut off."""

_libc = ctypes.CDLL(None, use_errno=True)


class Device:
    """One mounted /dev/fuse."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)

    @classmethod
    def mount(cls, mountpoint: str, *, allow_other: bool) -> Device:
        """Raises MountFailed."""
        options = ["default_permissions"] + ["allow_other"] * allow_other
        if os.geteuid():
            named = [f"fsname={SOURCE}", f"subtype={system.FILE_SYSTEM_TYPE.partition('.')[2]}"]
            return cls(fusermount.mount(mountpoint, ",".join(options + named)))
        descriptor = os.open(system.FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            _mount_as_root(descriptor, mountpoint, options)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def receive(self, room: memoryview) -> int:
        """Bytes of the next request, 0 if there is none now. Raises OSError: one of GONE, or what
        nobody expects."""
        while True:
            try:
                return os.readv(self.descriptor, [room])
            except BlockingIOError:
                return 0
            except OSError as exc:
                if exc.errno not in (errno.EINTR, errno.ENOENT):  # interrupted, us or the caller
                    raise

    def wait(self, seconds: float, *others: int) -> Sequence[int]:
        """Blocks until there is a request, or something to read from ``others``: the descriptors of
        which that is so, none if it took too long. Less than a millisecond is what only select()
        can wait, which knows only the first descriptors of a process."""
        descriptors = (self.descriptor, *others)
        if max(descriptors) >= SELECT_DESCRIPTORS_MAX:
            return ()
        return select.select(descriptors, (), (), seconds)[0]

    def answer(self, unique: int, parts: Sequence[Buffer] = (), error: int = 0) -> bool:
        """False if nobody waits for it any more: the caller was killed, or all is unmounted."""
        size = wire.ANSWER_HEADER.size
        for part in parts:
            size += len(part)
        header = wire.ANSWER_HEADER.pack(size, -error, unique)
        try:
            if parts:
                os.writev(self.descriptor, [header, *parts])
            else:
                os.write(self.descriptor, header)
        except OSError as exc:
            if exc.errno == errno.ENOENT or exc.errno in GONE:
                return False
            log.error("an answer was refused: %s", exc.strerror)
            return bool(parts) and self.answer(unique, error=errno.EIO)
        return True

    def notify(self, notice: bytes) -> bool:
        """False if the kernel does not know the inode or name."""
        try:
            os.write(self.descriptor, notice)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, *GONE):
                raise
            return False
        return True

    def open_backing(self, descriptor: int) -> int:
        """An id under which the kernel reads the file itself. Raises OSError: EPERM without
        CAP_SYS_ADMIN, ELOOP for a file of a stacked file system."""
        request = bytearray(wire.BACKING_MAP.pack(descriptor, 0, 0))
        backing_id: int = fcntl.ioctl(self.descriptor, wire.IOC_BACKING_OPEN, request, True)
        return backing_id

    def close_backing(self, backing_id: int) -> None:
        """Files that are open go on."""
        try:
            fcntl.ioctl(self.descriptor, wire.IOC_BACKING_CLOSE, wire.BACKING_ID.pack(backing_id))
        except OSError as exc:  # with the connection all ids are gone
            log.debug("backing file %d: %s", backing_id, exc.strerror)

    def close(self) -> None:
        """Whoever still uses the file system gets ENOTCONN."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _mount_as_root(descriptor: int, mountpoint: str, options: list[str]) -> None:
    words = [
        f"fd={descriptor}",
        f"rootmode={stat.S_IFDIR:o}",
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        *options,
    ]
    done = _libc.mount(
        SOURCE.encode(),
        os.fsencode(mountpoint),
        system.FILE_SYSTEM_TYPE.encode(),
        MS_NOSUID | MS_NODEV,
        ",".join(words).encode(),
    )
    if done != 0:
        code = ctypes.get_errno()
        detail = f"mount: {os.strerror(code)}"
        if code == errno.EPERM:
            detail += " (in a container: --cap-add SYS_ADMIN)"
        raise MountFailed(detail=detail, mountpoint=mountpoint)
