"""One set of path operations over two trees: a directory of the kernel's (tmpfs) and the metadata
service. Model tests drive both and compare what they answer, errno included.

Paths are absolute bytes inside the tree (``/a/b``). Every operation returns plain data or an errno
as a negative number, so results compare with ``==``. Symbolic links lead nowhere (ENOENT).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable
from typing import Any

from kvfs_base.errors import KvfsError
from kvfs_base.rpc import Request
from kvfs_base.types import ROOT_INODE, Attr
from kvfs_metadata import messages as m

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_RENAMEAT2 = 316
_AT_FDCWD = -100

Answer = Any
"""Plain data, or a negative errno."""


def _view(mode: int, nlink: int, uid: int, gid: int, size: int, rdev: int) -> tuple[Any, ...]:
    """What both trees must agree on. Sizes and link counts of directories are a file system's own
    business, but the number of subdirectories that nlink tells is POSIX custom, so it is kept."""
    if stat.S_ISDIR(mode):
        size = 0
    return mode, nlink, uid, gid, size, rdev


class KernelTree:
    """``root`` on a tmpfs."""

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)
        os.umask(0)

    def _path(self, path: bytes) -> bytes:
        return self._root + path

    def _run(self, body: Callable[[], Any]) -> Answer:
        try:
            return body()
        except OSError as exc:
            return -(exc.errno or errno.EIO)

    def clear(self) -> None:
        for name in os.listdir(self._root):
            path = os.path.join(self._root, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def mkdir(self, path: bytes, mode: int) -> Answer:
        return self._run(lambda: os.mkdir(self._path(path), mode))

    def mkfifo(self, path: bytes, mode: int) -> Answer:
        return self._run(lambda: os.mkfifo(self._path(path), mode))

    def create(self, path: bytes, mode: int) -> Answer:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
        return self._run(lambda: os.close(os.open(self._path(path), flags, mode)))

    def symlink(self, path: bytes, target: bytes) -> Answer:
        return self._run(lambda: os.symlink(target, self._path(path)))

    def readlink(self, path: bytes) -> Answer:
        return self._run(lambda: os.readlink(self._path(path)))

    def link(self, path: bytes, new: bytes) -> Answer:
        return self._run(lambda: os.link(self._path(path), self._path(new), follow_symlinks=False))

    def unlink(self, path: bytes) -> Answer:
        return self._run(lambda: os.unlink(self._path(path)))

    def rmdir(self, path: bytes) -> Answer:
        return self._run(lambda: os.rmdir(self._path(path)))

    def rename(self, path: bytes, new: bytes, flags: int) -> Answer:
        done = _libc.syscall(
            _SYS_RENAMEAT2, _AT_FDCWD, self._path(path), _AT_FDCWD, self._path(new), flags
        )
        return None if done == 0 else -ctypes.get_errno()

    def stat(self, path: bytes) -> Answer:
        def body() -> tuple[Any, ...]:
            st = os.lstat(self._path(path))
            return _view(st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_size, st.st_rdev)

        return self._run(body)

    def listdir(self, path: bytes) -> Answer:
        return self._run(lambda: sorted(os.listdir(self._path(path))))

    def chmod(self, path: bytes, mode: int) -> Answer:
        def body() -> None:
            if stat.S_ISLNK(os.lstat(self._path(path)).st_mode):
                raise OSError(errno.EOPNOTSUPP, "")
            os.chmod(self._path(path), mode)

        return self._run(body)

    def chown(self, path: bytes, uid: int, gid: int) -> Answer:
        return self._run(lambda: os.chown(self._path(path), uid, gid, follow_symlinks=False))

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> Answer:
        def body() -> tuple[int, int]:
            os.utime(self._path(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)
            st = os.lstat(self._path(path))
            return st.st_atime_ns, st.st_mtime_ns

        return self._run(body)

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> Answer:
        return self._run(
            lambda: os.setxattr(self._path(path), name, value, flags, follow_symlinks=False)
        )

    def getxattr(self, path: bytes, name: bytes) -> Answer:
        return self._run(lambda: os.getxattr(self._path(path), name, follow_symlinks=False))

    def listxattr(self, path: bytes) -> Answer:
        return self._run(lambda: sorted(os.listxattr(self._path(path), follow_symlinks=False)))

    def removexattr(self, path: bytes, name: bytes) -> Answer:
        return self._run(lambda: os.removexattr(self._path(path), name, follow_symlinks=False))


class ServiceTree:
    """A subtree of the metadata service; ``call`` is a client's. What the kernel does before a FUSE
    file system is asked (walking the path, refusing a trailing type mismatch) is done here."""

    def __init__(self, call: Callable[[Request], Any], root: bytes) -> None:
        self._call = call
        self._base = call(
            m.Make(parent=ROOT_INODE, name=root, mode=stat.S_IFDIR | 0o777, exclusive=True)
        ).inode

    def _run(self, body: Callable[[], Any]) -> Answer:
        try:
            return body()
        except KvfsError as exc:
            return -exc.posix_errno

    def _walk(self, path: bytes) -> Attr:
        attr: Attr = self._call(m.GetAttr(inode=self._base))
        for name in path.split(b"/"):
            if name:
                attr = self._lookup(attr, name)
        return attr

    def _lookup(self, parent: Attr, name: bytes) -> Attr:
        if stat.S_ISLNK(parent.mode):
            raise OSErrorInKernel(errno.ENOENT)
        found: Attr = self._call(m.Lookup(parent=parent.inode, name=name))
        return found

    def _parent(self, path: bytes) -> tuple[Attr, bytes]:
        parent, name = self._folder(path)
        if len(name) > 255:
            raise OSErrorInKernel(errno.ENAMETOOLONG)
        return parent, name

    def _folder(self, path: bytes) -> tuple[Attr, bytes]:
        folder, _, name = path.rpartition(b"/")
        parent = self._walk(folder)
        if stat.S_ISLNK(parent.mode):
            raise OSErrorInKernel(errno.ENOENT)
        if not parent.is_dir:
            raise OSErrorInKernel(errno.ENOTDIR)
        return parent, name

    def clear(self) -> None:
        def remove_below(inode: int) -> None:
            for name, attr in self._call(m.ReadDir(inode=inode)).entries:
                if attr.is_dir:
                    remove_below(attr.inode)
                    self._call(m.Rmdir(parent=inode, name=name))
                else:
                    self._call(m.Unlink(parent=inode, name=name))

        remove_below(self._base)

    def _make(self, path: bytes, mode: int, target: bytes = b"") -> Answer:
        def body() -> None:
            parent, name = self._parent(path)
            self._call(m.Make(parent=parent.inode, name=name, mode=mode, target=target))

        return self._run(body)

    def mkdir(self, path: bytes, mode: int) -> Answer:
        return self._make(path, stat.S_IFDIR | mode & 0o1777)

    def mkfifo(self, path: bytes, mode: int) -> Answer:
        return self._make(path, stat.S_IFIFO | mode)

    def create(self, path: bytes, mode: int) -> Answer:
        return self._make(path, stat.S_IFREG | mode)

    def symlink(self, path: bytes, target: bytes) -> Answer:
        return self._make(path, stat.S_IFLNK | 0o777, target)

    def readlink(self, path: bytes) -> Answer:
        return self._run(lambda: self._call(m.ReadLink(inode=self._walk(path).inode)))

    def link(self, path: bytes, new: bytes) -> Answer:
        def body() -> None:
            attr = self._walk(path)
            parent, name = self._parent(new)
            self._call(m.Link(inode=attr.inode, parent=parent.inode, name=name))

        return self._run(body)

    def unlink(self, path: bytes) -> Answer:
        def body() -> None:
            parent, name = self._parent(path)
            self._call(m.Unlink(parent=parent.inode, name=name))

        return self._run(body)

    def rmdir(self, path: bytes) -> Answer:
        def body() -> None:
            parent, name = self._parent(path)
            self._call(m.Rmdir(parent=parent.inode, name=name))

        return self._run(body)

    def rename(self, path: bytes, new: bytes, flags: int) -> Answer:
        def body() -> None:
            # The kernel walks to both folders, then looks up the old name, then the new one.
            parent, name = self._folder(path)
            new_parent, new_name = self._folder(new)
            self._call(m.Lookup(parent=parent.inode, name=name))
            if len(new_name) > 255:
                raise OSErrorInKernel(errno.ENAMETOOLONG)
            self._call(
                m.Rename(
                    parent=parent.inode,
                    name=name,
                    new_parent=new_parent.inode,
                    new_name=new_name,
                    flags=flags,
                )
            )

        return self._run(body)

    def stat(self, path: bytes) -> Answer:
        def body() -> tuple[Any, ...]:
            attr = self._walk(path)
            return _view(attr.mode, attr.nlink, attr.uid, attr.gid, attr.size, attr.rdev)

        return self._run(body)

    def listdir(self, path: bytes) -> Answer:
        def body() -> list[bytes]:
            attr = self._walk(path)
            if stat.S_ISLNK(attr.mode):
                raise OSErrorInKernel(errno.ENOENT)
            names: list[bytes] = []
            more = True
            while more:
                after = names[-1] if names else b""
                page = self._call(m.ReadDir(inode=attr.inode, after=after, limit=7))
                names += [name for name, _ in page.entries]
                more = page.more
            return sorted(names)

        return self._run(body)

    def _set(self, path: bytes, **changes: Any) -> Attr:
        attr: Attr = self._call(m.SetAttr(inode=self._walk(path).inode, **changes))
        return attr

    def chmod(self, path: bytes, mode: int) -> Answer:
        def body() -> None:
            attr = self._walk(path)
            if stat.S_ISLNK(attr.mode):
                raise OSErrorInKernel(errno.EOPNOTSUPP)
            self._call(m.SetAttr(inode=attr.inode, mode=mode))

        return self._run(body)

    def chown(self, path: bytes, uid: int, gid: int) -> Answer:
        def body() -> None:
            attr = self._walk(path)
            changes: dict[str, int] = {"uid": uid, "gid": gid}
            # The kernel drops set-id bits of files itself, before it asks the file system.
            if not attr.is_dir:
                drop = stat.S_ISUID | (stat.S_ISGID if attr.mode & stat.S_IXGRP else 0)
                if attr.mode & drop:
                    changes["mode"] = stat.S_IMODE(attr.mode & ~drop)
            self._call(m.SetAttr(inode=attr.inode, **changes))

        return self._run(body)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> Answer:
        def body() -> tuple[int, int]:
            attr = self._set(path, atime_ns=atime_ns, mtime_ns=mtime_ns)
            return attr.atime_ns, attr.mtime_ns

        return self._run(body)

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> Answer:
        def body() -> None:
            inode = self._for_xattr(path)
            self._call(m.SetXattr(inode=inode, name=name, value=value, flags=flags))

        return self._run(body)

    def getxattr(self, path: bytes, name: bytes) -> Answer:
        def body() -> bytes:
            inode = self._for_xattr(path, errno.ENODATA)
            value: bytes = self._call(m.GetXattr(inode=inode, name=name))
            return value

        return self._run(body)

    def listxattr(self, path: bytes) -> Answer:
        def body() -> list[str]:
            names = self._call(m.ListXattr(inode=self._walk(path).inode))
            return sorted(os.fsdecode(name) for name in names)

        return self._run(body)

    def removexattr(self, path: bytes, name: bytes) -> Answer:
        def body() -> None:
            self._call(m.RemoveXattr(inode=self._for_xattr(path), name=name))

        return self._run(body)

    def _for_xattr(self, path: bytes, refusal: int = errno.EPERM) -> int:
        """user.* attributes exist on files and directories only; the kernel says so itself."""
        attr = self._walk(path)
        if not (attr.is_file or attr.is_dir):
            raise OSErrorInKernel(refusal)
        return attr.inode


class OSErrorInKernel(KvfsError):
    """A refusal that the kernel answers without asking the file system."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.posix_errno = number  # type: ignore[misc]
