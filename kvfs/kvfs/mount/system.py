"""The operating system's side of a mount: mount points, unmounting, the kernel's read-ahead.

Mount tables and sysfs are not data of kvfs, so they do not go through a Disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvfs_base.errors import FuseMissing, MountFailed, MountPointBusy
from kvfs_base.limits import KIB

FUSE_DEVICE = "/dev/fuse"
FILE_SYSTEM_TYPE = "fuse.kvfs"
MOUNT_TABLE = Path("/proc/self/mountinfo")
MNT_DETACH = 2
PROCESSES = Path("/proc")
USERS_TOLD = 10
LINKS_FOLLOWED_MAX = 40
"""As Linux."""

_libc = ctypes.CDLL(None, use_errno=True)


class Mounted(NamedTuple):
    device: str
    """``major:minor``"""
    type: str


def mounted_at(mountpoint: str) -> Mounted | None:
    """What is mounted there, the topmost if several are. Does not touch the mount itself, which may
    hang, be dead, or not be served yet."""
    wanted = os.fsencode(_resolve(mountpoint))
    found = None
    for line in MOUNT_TABLE.read_bytes().splitlines():
        fields = line.split(b" ")
        if _unescape(fields[4]) == wanted:
            after = fields[fields.index(b"-", 6) + 1 :]
            found = Mounted(fields[2].decode(), after[0].decode())
    return found


def _resolve(path: str) -> str:
    """As realpath, but never asks for the attributes of the last part: only readlink is sure not
    to reach a mounted file system."""
    for _ in range(LINKS_FOLLOWED_MAX):
        parent, name = os.path.split(os.path.abspath(path))
        path = os.path.join(os.path.realpath(parent), name)
        try:
            path = os.path.join(parent, os.readlink(path))
        except OSError:
            break
    return path


def _unescape(field: bytes) -> bytes:
    """Blanks, tabs, newlines and backslashes are written as three octal digits."""
    return field.decode("unicode_escape").encode("latin-1")


def is_dead(mountpoint: str) -> bool:
    """The server of the mount there is gone. Blocks as long as a hanging server does.

    Asked with statvfs, which the kernel never answers by itself; while attributes are cached, stat
    succeeds on a mount whose server was killed."""
    try:
        os.statvfs(mountpoint)
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def check_fuse() -> None:
    """Raises FuseMissing."""
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise FuseMissing(
            detail=f"{FUSE_DEVICE} does not exist: load the fuse module (modprobe fuse), or start "
            "the container with --device /dev/fuse --cap-add SYS_ADMIN"
        ) from None
    except OSError as exc:
        raise FuseMissing(detail=f"{FUSE_DEVICE} cannot be opened: {exc.strerror}") from exc
    if os.geteuid() and not shutil.which("fusermount3"):
        raise FuseMissing(detail="fusermount3 is missing: install fuse3, or mount as root")


def check_mountpoint(mountpoint: str, *, may_have_files: bool = False) -> None:
    """Nothing is mounted there. Raises MountFailed or MountPointBusy."""
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError:
        raise MountFailed(detail="mount point does not exist", mountpoint=mountpoint) from None
    except OSError as exc:
        detail = f"mount point cannot be used: {exc.strerror}"
        raise MountFailed(detail=detail, mountpoint=mountpoint) from exc
    if not stat.S_ISDIR(mode):
        raise MountFailed(detail="mount point is not a directory", mountpoint=mountpoint)
    try:
        names = os.listdir(mountpoint)
    except OSError as exc:
        detail = f"mount point cannot be read: {exc.strerror}"
        raise MountFailed(detail=detail, mountpoint=mountpoint) from exc
    if names and not may_have_files:
        raise MountPointBusy(detail="mount point is not empty", mountpoint=mountpoint)


def unmount(mountpoint: str, *, lazy: bool) -> bool:
    """False if it is busy. Raises MountFailed."""
    if os.geteuid():
        return _unmount_as_user(mountpoint, lazy)
    if _libc.umount2(os.fsencode(mountpoint), MNT_DETACH if lazy else 0) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        return False
    if code == errno.EINVAL and mounted_at(mountpoint) is None:
        return True  # somebody else was faster
    raise MountFailed(detail=f"unmount: {os.strerror(code)}", mountpoint=mountpoint)


def _unmount_as_user(mountpoint: str, lazy: bool) -> bool:
    options = ["-u", "-q", "-z"] if lazy else ["-u", "-q"]
    done = subprocess.run(["fusermount3", *options, "--", mountpoint], check=False)
    return done.returncode == 0 or mounted_at(mountpoint) is None


def users_of(mountpoint: str) -> list[str]:
    """Who has something open in the mount there, works in it or maps it: ``name (pid): path``, at
    most USERS_TOLD of them. Reads links only, so it never waits for the mount."""
    place = _resolve(mountpoint)
    found: list[str] = []
    for process in sorted(PROCESSES.glob("[0-9]*"), key=lambda path: int(path.name)):
        used = next((path for path in _paths_of(process) if _is_below(path, place)), None)
        if used is None:
            continue
        if len(found) == USERS_TOLD:
            return [*found, "others"]
        with contextlib.suppress(OSError):
            name = (process / "comm").read_text().strip()
            found.append(f"{name} ({process.name}): {used}")
    return found


def _paths_of(process: Path) -> Iterator[str]:
    """Processes of others, and such as end meanwhile, show less or nothing."""
    with contextlib.suppress(OSError):
        links = [process / "cwd", process / "root", process / "exe", *(process / "fd").iterdir()]
        for link in links:
            with contextlib.suppress(OSError):
                yield os.readlink(link)
    with contextlib.suppress(OSError):
        for line in (process / "maps").read_bytes().splitlines():
            yield os.fsdecode(line[line.find(b"/") :]) if b"/" in line else ""


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def set_read_ahead(mountpoint: str, size: int) -> bool:
    """The kernel starts with 128 KiB and lets a FUSE server only lower it; root may raise it."""
    found = mounted_at(mountpoint)
    if found is None:
        return False
    try:
        Path(f"/sys/class/bdi/{found.device}/read_ahead_kb").write_text(str(size // KIB))
    except OSError:
        return False
    return True
