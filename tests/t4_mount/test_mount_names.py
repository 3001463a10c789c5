"""Names, directories, links and extended attributes, through a real mount."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from kvfs_metadata.messages import Make
from t4_mount.harness import Cluster

pytestmark = pytest.mark.both_frontends

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100


def rename_with_flags(source: Path, target: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fails_with(code: int, function, *args) -> None:
    with pytest.raises(OSError) as caught:
        function(*args)
    assert caught.value.errno == code, caught.value


def test_directories(work: Path) -> None:
    (work / "a/b/c").mkdir(parents=True)
    assert work.stat().st_nlink == 3
    assert sorted(os.listdir(work / "a")) == ["b"]
    fails_with(errno.ENOTEMPTY, os.rmdir, work / "a")
    fails_with(errno.EEXIST, os.mkdir, work / "a")
    fails_with(errno.ENOENT, os.mkdir, work / "x/y")
    (work / "a/b/c").rmdir()
    (work / "a/b").rmdir()
    fails_with(errno.ENOENT, os.rmdir, work / "a/b")
    (work / "file").touch()
    fails_with(errno.ENOTDIR, os.rmdir, work / "file")
    fails_with(errno.ENOTDIR, os.listdir, work / "file")
    fails_with(errno.EISDIR, os.unlink, work / "a")
    fails_with(errno.ENOTDIR, os.stat, work / "file/below")


def test_listing_has_types_and_dots(work: Path) -> None:
    (work / "directory").mkdir()
    (work / "file").touch()
    (work / "link").symlink_to("file")
    with os.scandir(work) as entries:
        kinds = {e.name: (e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries}
    assert kinds == {"directory": (True, False), "file": (False, False), "link": (False, True)}
    inodes = {e.name: e.inode() for e in os.scandir(work)}
    assert inodes["file"] == (work / "file").stat().st_ino
    libc = ctypes.CDLL(None)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.c_void_p
    libc.readdir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
    stream = libc.opendir(os.fsencode(work))
    names = []
    while entry := libc.readdir(stream):
        names.append(ctypes.string_at(entry + 19).decode())
    libc.closedir(stream)
    assert names == [".", "..", "directory", "file", "link"]


def test_a_large_directory_while_entries_change(work: Path, cluster: Cluster) -> None:
    stay = [f"stay-{n:05d}" for n in range(5000)]
    parent = work.stat().st_ino
    with cluster.client() as client:
        client.call_many([Make(parent, name.encode(), stat.S_IFREG | 0o644) for name in stay])
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            path = work / f"come-and-go-{number % 7}-{number}"
            path.touch()
            (work / f"zz-{number}").touch()
            path.unlink()
            number += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(5):
            names = os.listdir(work)
            assert len(set(names)) == len(names)
            assert [n for n in names if n.startswith("stay")] == stay
    finally:
        stop.set()
        thread.join()


def test_removing_while_listing(work: Path) -> None:
    for n in range(700):
        (work / f"{n:04d}").touch()
    seen = []
    with os.scandir(work) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(entry.path)
    assert seen == [f"{n:04d}" for n in range(700)]
    assert os.listdir(work) == []


def test_positions_in_a_directory_stay_valid(work: Path) -> None:
    for n in range(600):
        (work / f"{n:04d}").touch()
    libc = ctypes.CDLL(None)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
    for function in (libc.readdir, libc.telldir, libc.closedir, libc.rewinddir):
        function.argtypes = [ctypes.c_void_p]
    stream = libc.opendir(os.fsencode(work))

    def rest() -> list[str]:
        names = []
        while entry := libc.readdir(stream):
            names.append(ctypes.string_at(entry + 19).decode())
        return names

    try:
        for _ in range(302):
            libc.readdir(stream)
        position = libc.telldir(stream)
        expected = rest()
        assert expected[0] == "0300"
        (work / "0100").unlink()
        (work / "0000a").touch()
        libc.seekdir(stream, position)
        assert rest() == expected
        libc.rewinddir(stream)
        assert rest()[:4] == [".", "..", "0000", "0000a"]
    finally:
        libc.closedir(stream)


def test_rename(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    (work / "b").write_bytes(b"b")
    (work / "a").rename(work / "c")
    assert sorted(os.listdir(work)) == ["b", "c"]
    (work / "c").rename(work / "b")
    assert (work / "b").read_bytes() == b"a"
    (work / "d").mkdir()
    (work / "b").rename(work / "d/b")
    assert (work / "d/b").read_bytes() == b"a"
    fails_with(errno.EINVAL, os.rename, work / "d", work / "d/e")
    fails_with(errno.ENOENT, os.rename, work / "x", work / "y")
    (work / "f").touch()
    fails_with(errno.EISDIR, os.rename, work / "f", work / "d")
    fails_with(errno.ENOTDIR, os.rename, work / "d", work / "f")
    (work / "e").mkdir()
    (work / "e").rename(work / "g")
    fails_with(errno.ENOTEMPTY, os.rename, work / "g", work / "d")
    (work / "d").rename(work / "g")
    assert os.listdir(work / "g") == ["b"]


def test_rename_flags(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    (work / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        rename_with_flags(work / "a", work / "b", RENAME_NOREPLACE)
    rename_with_flags(work / "a", work / "b", RENAME_EXCHANGE)
    assert ((work / "a").read_bytes(), (work / "b").read_bytes()) == (b"b", b"a")
    rename_with_flags(work / "a", work / "c", RENAME_NOREPLACE)
    with pytest.raises(FileNotFoundError):
        rename_with_flags(work / "b", work / "nothing", RENAME_EXCHANGE)


def test_hard_links(work: Path) -> None:
    (work / "a").write_bytes(b"shared")
    os.link(work / "a", work / "b")
    assert (work / "a").stat().st_ino == (work / "b").stat().st_ino
    assert (work / "b").stat().st_nlink == 2
    with (work / "b").open("ab") as file:
        file.write(b" data")
    assert (work / "a").read_bytes() == b"shared data"
    (work / "a").unlink()
    assert (work / "b").stat().st_nlink == 1
    assert (work / "b").read_bytes() == b"shared data"
    fails_with(errno.EEXIST, os.link, work / "b", work / "b")
    (work / "d").mkdir()
    fails_with(errno.EPERM, os.link, work / "d", work / "e")


def test_symbolic_links(work: Path) -> None:
    (work / "target").write_bytes(b"x")
    (work / "link").symlink_to("target")
    assert os.readlink(work / "link") == "target"
    assert (work / "link").read_bytes() == b"x"
    assert stat.S_ISLNK((work / "link").lstat().st_mode)
    assert (work / "link").lstat().st_size == len("target")
    (work / "dangling").symlink_to("nowhere")
    fails_with(errno.ENOENT, os.stat, work / "dangling")
    (work / "loop").symlink_to("loop")
    fails_with(errno.ELOOP, os.stat, work / "loop")
    long = "x/" * 2000
    (work / "long").symlink_to(long)
    assert os.readlink(work / "long") == long


def test_long_names(work: Path) -> None:
    longest = "n" * 255
    (work / longest).write_bytes(b"x")
    assert os.listdir(work) == [longest]
    assert (work / longest).read_bytes() == b"x"
    long = "n" * 256
    fails_with(errno.ENAMETOOLONG, os.stat, work / long)
    fails_with(errno.ENAMETOOLONG, os.mkdir, work / long)
    fails_with(errno.ENAMETOOLONG, (work / long).touch)
    fails_with(errno.ENAMETOOLONG, os.rename, work / longest, work / long)
    fails_with(errno.ENAMETOOLONG, os.symlink, "x", work / long)


def test_names_are_bytes(work: Path) -> None:
    name = b"caf\xe9 \n\x01"
    path = os.fsencode(work) + b"/" + name
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    assert os.listdir(os.fsencode(work)) == [name]


def test_special_files(work: Path) -> None:
    os.mkfifo(work / "fifo", 0o640)
    assert stat.S_ISFIFO((work / "fifo").stat().st_mode)
    os.mknod(work / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    found = (work / "device").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (1, 3)
    os.mknod(work / "plain", stat.S_IFREG | 0o600)
    (work / "plain").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(work)  # socket paths are short
        try:
            server.bind("socket")
        finally:
            os.chdir("/")
        assert stat.S_ISSOCK((work / "socket").stat().st_mode)
    reader = os.open(work / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(work / "fifo", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 10) == b"through"
    os.close(reader)
    os.close(writer)


def test_statfs(mounted: Path) -> None:
    found = os.statvfs(mounted)
    assert found.f_namemax == 255
    assert found.f_blocks * found.f_frsize > 1 << 30
    assert 0 < found.f_bavail <= found.f_blocks
    assert found.f_ffree > 0


def test_extended_attributes(work: Path) -> None:
    path = work / "file"
    path.touch()
    os.setxattr(path, "user.one", b"1")
    os.setxattr(path, "user.two", bytes(range(256)) * 16)
    os.setxattr(path, "user.empty", b"")
    assert os.getxattr(path, "user.one") == b"1"
    assert os.getxattr(path, "user.two") == bytes(range(256)) * 16
    assert os.getxattr(path, "user.empty") == b""
    assert sorted(os.listxattr(path)) == ["user.empty", "user.one", "user.two"]
    fails_with(errno.EEXIST, os.setxattr, path, "user.one", b"2", os.XATTR_CREATE)
    fails_with(errno.ENODATA, os.setxattr, path, "user.new", b"2", os.XATTR_REPLACE)
    os.setxattr(path, "user.one", b"2", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.one") == b"2"
    os.removexattr(path, "user.one")
    fails_with(errno.ENODATA, os.getxattr, path, "user.one")
    fails_with(errno.ENODATA, os.removexattr, path, "user.one")
    os.setxattr(work, "user.on-directory", b"yes")
    assert os.listxattr(work) == ["user.on-directory"]
    fails_with(errno.ENOTSUP, os.setxattr, path, "security.selinux", b"label")
    fails_with(errno.ENODATA, os.getxattr, path, "security.capability")


def test_a_removed_directory_in_use(work: Path) -> None:
    (work / "d").mkdir()
    descriptor = os.open(work / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (work / "d").rmdir()
        fails_with(errno.ENOENT, lambda: os.open("x", os.O_CREAT, dir_fd=descriptor))
    finally:
        os.close(descriptor)
