"""The real disk: directories and files of the operating system."""

from __future__ import annotations

import array
import errno
import fcntl
import os
from collections.abc import Sequence

from kvfs_base import large_pages
from kvfs_base.errors import DiskFull, ServerBusy, TargetFailed
from kvfs_base.seams import Buffer, DiskFile, DiskUsage

IOV_MAX = 1024


def rest_of(buffers: Sequence[Buffer], done: int) -> list[Buffer]:
    """What is left of ``buffers`` after ``done`` bytes, at most IOV_MAX pieces."""
    if not done and len(buffers) <= IOV_MAX:
        return list(buffers)
    rest: list[Buffer] = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
            continue
        rest.append(memoryview(buffer)[done:] if done else buffer)
        done = 0
        if len(rest) == IOV_MAX:
            break
    return rest


def disk_error(exc: OSError, path: str) -> Exception:
    """Missing and existing paths are the caller's business; everything else is the disk's."""
    if isinstance(exc, FileNotFoundError | FileExistsError):
        return exc
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(path=path)
    if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ServerBusy(detail=os.strerror(exc.errno))  # this process's trouble, not the disk's
    return TargetFailed(detail=f"{path}: {os.strerror(exc.errno or 0)}")


FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_TOPDIR_FL = 0x00020000


class OsDiskFile:
    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path

    def fileno(self) -> int:
        return self._fd

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        wanted = sum(len(b) for b in buffers)
        done = 0
        try:
            while done < wanted:
                count = os.preadv(self._fd, rest_of(buffers, done), offset + done)
                if count == 0:
                    break
                done += count
        except OSError as exc:
            raise disk_error(exc, self._path) from exc
        return done

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        wanted = sum(len(b) for b in buffers)
        done = 0
        try:
            while done < wanted:
                done += os.pwritev(self._fd, rest_of(buffers, done), offset + done)
        except OSError as exc:
            raise disk_error(exc, self._path) from exc
        return done

    def will_need(self, offset: int, length: int) -> None:
        large_pages.will_need(self._fd, offset, length)

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as exc:
            raise disk_error(exc, self._path) from exc

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def get_attribute(self, name: str) -> bytes | None:
        try:
            return os.getxattr(self._fd, f"user.{name}")
        except OSError as exc:
            if exc.errno == errno.ENODATA:
                return None
            raise disk_error(exc, self._path) from exc

    def set_attribute(self, name: str, value: bytes) -> None:
        try:
            os.setxattr(self._fd, f"user.{name}", value)
        except OSError as exc:
            raise disk_error(exc, self._path) from exc

    def sync(self, *, attributes: bool = False) -> None:
        try:
            if attributes:
                os.fsync(self._fd)
            else:
                os.fdatasync(self._fd)
        except OSError as exc:
            raise TargetFailed(detail=f"sync {self._path}: {exc.strerror}") from exc

    def has_writer(self) -> bool:
        # The kernel grants a read lease only while no file description is open for writing, which
        # also sees descriptors that were passed to processes we know nothing of.
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as exc:
            if exc.errno == errno.EAGAIN:
                return True
            raise disk_error(exc, self._path) from exc
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False

    def lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise disk_error(exc, self._path) from exc
        return True

    def close(self) -> None:
        # The number may belong to another file by the time of a second close.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OsDisk:
    """Files below ``root``."""

    def __init__(self, root: str) -> None:
        self._root = root

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        direct: bool = False,
    ) -> DiskFile:
        flags = os.O_CLOEXEC | (os.O_RDWR if write else os.O_RDONLY)
        flags |= (os.O_CREAT if create else 0) | (os.O_EXCL if exclusive else 0)
        full = self._path(path)
        try:
            if direct:
                try:
                    return OsDiskFile(os.open(full, flags | os.O_DIRECT, 0o600), path)
                except OSError as exc:
                    if exc.errno != errno.EINVAL:
                        raise
            return OsDiskFile(os.open(full, flags & ~os.O_EXCL if direct else flags, 0o600), path)
        except OSError as exc:
            raise disk_error(exc, path) from exc

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(self._path(source), self._path(target))
        except OSError as exc:
            raise disk_error(exc, target) from exc

    def unlink(self, path: str) -> None:
        try:
            os.unlink(self._path(path))
        except OSError as exc:
            raise disk_error(exc, path) from exc

    def make_directory(self, path: str) -> None:
        try:
            os.makedirs(self._path(path), mode=0o700, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, path) from exc

    def spread(self, path: str) -> None:
        # What ext4 does with the directories of its root; others know no such flag.
        try:
            fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        flags = array.array("l", [0])
        try:
            fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
            flags[0] |= FS_TOPDIR_FL
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags)
        except OSError:
            pass
        finally:
            os.close(fd)

    def remove_directory(self, path: str) -> bool:
        try:
            os.rmdir(self._path(path))
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return False
            raise disk_error(exc, path) from exc
        return True

    def list(self, path: str) -> list[str]:
        try:
            return os.listdir(self._path(path))
        except OSError as exc:
            raise disk_error(exc, path) from exc

    def exists(self, path: str) -> bool:
        try:
            os.lstat(self._path(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as exc:  # a disk that fails has not said that it is missing
            raise disk_error(exc, path) from exc
        return True

    def sync_directory(self, path: str) -> None:
        try:
            fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise TargetFailed(detail=f"fsync {path}: {exc.strerror}") from exc

    def usage(self) -> DiskUsage:
        try:
            st = os.statvfs(self._root)
            device = os.stat(self._root).st_dev
        except OSError as exc:
            raise disk_error(exc, self._root) from exc
        return DiskUsage(st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize, f"dev{device:x}")


__all__ = ["OsDisk", "OsDiskFile", "disk_error", "rest_of"]
