"""What POSIX says of each call, on the mount and on a directory of another file system: both answer
what is written here.

A case prepares a directory as root, then acts as root or as another user, and says which errno (0:
none) comes. Cases are by call, in the order of the alphabet.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

USER, GROUP, OTHER = 1234, 1235, 2345
NAME_MAX, PATH_MAX = 255, 4096
LONG = "n" * NAME_MAX


class Case(NamedTuple):
    name: str
    act: Callable[[], Any]
    expected: Any = 0
    """An errno, or what ``act`` answers."""
    user: int = 0
    prepare: Callable[[], Any] = lambda: None


# --- things to prepare and to do; all in the present directory


def make(path: str = "f", mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
    Path(path).touch()
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def folder(path: str = "d", mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
    os.mkdir(path)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def both(*actions: Callable[[], Any]) -> Callable[[], Any]:
    def act() -> Any:
        result = None
        for action in actions:
            result = action()
        return result

    return act


def mode_of(path: str = "f") -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def loop() -> None:
    os.symlink("b", "a")
    os.symlink("a", "b")


def opened(path: str, flags: int, mode: int = 0o644) -> Callable[[], Any]:
    return lambda: os.close(os.open(path, flags, mode))


def write_as(path: str = "f") -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, b"x")
    os.close(descriptor)


def sticky(owner: int, file_owner: int) -> Callable[[], None]:
    """A directory that all may write, where only owners remove."""

    def prepare() -> None:
        folder("d", 0o1777, owner)
        make("d/f", 0o666, file_owner)
        folder("d/sub", 0o777, file_owner)

    return prepare


def path_of(length: int) -> str:
    """That many bytes, leading here again and again."""
    return "./" * (length // 2) + "." * (length % 2)


CALLS: dict[str, Callable[[str], Any]] = {
    "chmod": lambda p: os.chmod(p, 0o600),
    "chown": lambda p: os.chown(p, 0, 0),
    "create": lambda p: os.close(os.open(p, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "link from": lambda p: os.link(p, "new"),
    "link to": lambda p: os.link("f", p),
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "mknod": lambda p: os.mknod(p, stat.S_IFIFO | 0o644),
    "open": lambda p: os.close(os.open(p, os.O_RDONLY)),
    "rename from": lambda p: os.rename(p, "new"),
    "rename to": lambda p: os.rename("f", p),
    "rmdir": os.rmdir,
    "symlink": lambda p: os.symlink("f", p),
    "truncate": lambda p: os.truncate(p, 0),
    "unlink": os.unlink,
    "utimensat": lambda p: os.utime(p, ns=(1, 2)),
}
MAKING = {"create", "link to", "mkdir", "mkfifo", "mknod", "rename to", "symlink"}


def path_cases() -> Iterator[Case]:
    """What every call says of paths that cannot be."""
    for name, call in CALLS.items():
        missing = 0 if name in MAKING else errno.ENOENT
        for what, path, expected in [
            ("a name of 255 bytes", LONG, missing),
            ("a name of 256 bytes", LONG + "n", errno.ENAMETOOLONG),
            ("a path of 4,095 bytes", path_of(PATH_MAX - 1 - 4) + "/new", missing),
            ("a path of 4,096 bytes", path_of(PATH_MAX - 4) + "/new", errno.ENAMETOOLONG),
            ("a file on the way", "f/new", errno.ENOTDIR),
            ("nothing on the way", "none/new", errno.ENOENT),
            ("an empty path", "", errno.ENOENT),
            ("a loop on the way", "a/new", errno.ELOOP),
        ]:
            yield Case(
                f"{name}: {what}", lambda c=call, p=path: c(p), expected, prepare=both(make, loop)
            )
        if name in MAKING - {"rename to"}:
            yield Case(f"{name}: a name that exists", lambda c=call: c("g"), errno.EEXIST,
                       prepare=both(make, lambda: make("g")))  # fmt: skip
        # Search permission on the way, write permission for the directory.
        existing = "d/f" if name not in MAKING | {"rmdir"} else "d/new"
        if name == "rmdir":
            existing = "d/sub"
        for mode, way in ((0o600, "search"), (0o555, "write")):
            changes = name in MAKING | {"rename from", "rmdir", "unlink"}
            expected = errno.EACCES if way == "search" or changes else None
            if expected is None:
                continue
            yield Case(f"{name}: no permission to {way}", lambda c=call, p=existing: c(p), expected,
                       USER, both(lambda m=mode: folder("d", 0o755),
                                  lambda: make("d/f", 0o666, USER),
                                  lambda: folder("d/sub", 0o777, USER),
                                  lambda: make("f", 0o666, USER),
                                  lambda m=mode: os.chown("d", USER, USER),
                                  lambda m=mode: os.chmod("d", m)))  # fmt: skip


CHMOD = [
    Case("chmod: the bits", both(lambda: os.chmod("f", 0o7777), mode_of), 0o7777, prepare=make),
    Case("chmod: not the owner", lambda: os.chmod("f", 0o600), errno.EPERM, USER, make),
    Case(
        "chmod: the owner",
        both(lambda: os.chmod("f", 0o600), mode_of),
        0o600,
        USER,
        lambda: make(uid=USER),
    ),
    Case(
        "chmod: set-group-ID of a foreign group goes",
        both(lambda: os.chmod("f", 0o2755), mode_of),
        0o755,
        USER,
        lambda: make(uid=USER, gid=GROUP),
    ),
    Case(
        "chmod: set-group-ID of one's own group stays",
        both(lambda: os.chmod("f", 0o2755), mode_of),
        0o2755,
        USER,
        lambda: make(uid=USER, gid=USER),
    ),
    Case(
        "chmod: sticky of a directory",
        both(lambda: os.chmod("d", 0o1777), lambda: mode_of("d")),
        0o1777,
        USER,
        lambda: folder(uid=USER, gid=USER),
    ),
    Case("chmod: ctime", lambda: changes_ctime(lambda: os.chmod("f", 0o600)), True, prepare=make),
]

CHOWN = [
    Case(
        "chown: by a user",
        lambda: os.chown("f", OTHER, -1),
        errno.EPERM,
        USER,
        lambda: make(uid=USER),
    ),
    Case(
        "chown: to a group that one is not in",
        lambda: os.chown("f", -1, GROUP),
        errno.EPERM,
        USER,
        lambda: make(uid=USER),
    ),
    Case(
        "chown: to the group that one is in",
        both(lambda: os.chown("f", -1, USER), lambda: os.stat("f").st_gid),
        USER,
        USER,
        lambda: make(uid=USER),
    ),
    Case("chown: of another's file", lambda: os.chown("f", -1, USER), errno.EPERM, USER, make),
    Case(
        "chown: set-ID bits go, by a user",
        both(lambda: os.chown("f", -1, USER), mode_of),
        0o755,
        USER,
        lambda: make(mode=0o6755, uid=USER),
    ),
    Case(
        "chown: set-ID bits go, by root",
        both(lambda: os.chown("f", 1, 2), mode_of),
        0o755,
        prepare=lambda: make(mode=0o6755),
    ),
    Case(
        "chown: set-group-ID without execution stays",
        both(lambda: os.chown("f", 1, 2), mode_of),
        0o2644,
        prepare=lambda: make(mode=0o6644),
    ),
    Case(
        "chown: of directories leaves the bits",
        both(lambda: os.chown("d", 1, 2), lambda: mode_of("d")),
        0o6755,
        prepare=lambda: folder(mode=0o6755),
    ),
    Case(
        "chown: of a link",
        both(lambda: os.lchown("l", 7, 8), lambda: (os.lstat("l").st_uid, os.stat("f").st_uid)),
        (7, 0),
        prepare=both(make, lambda: os.symlink("f", "l")),
    ),
    Case(
        "chown: of nothing, ctime",
        lambda: changes_ctime(lambda: os.chown("f", 3, 4)),
        True,
        prepare=make,
    ),
]


def changes_ctime(action: Callable[[], Any], path: str = "f") -> bool:
    before = os.stat(path).st_ctime_ns
    while os.stat(path).st_ctime_ns == before:  # until the clock of the file system ticks
        action()
    return True


LINK = [
    Case("link: counts", both(lambda: os.link("f", "g"), lambda: os.stat("g").st_nlink), 2,
         prepare=make),
    Case("link: of a directory", lambda: os.link("d", "g"), errno.EPERM, prepare=folder),
    Case("link: of a symbolic link itself", both(
        lambda: os.link("l", "g", follow_symlinks=False), lambda: os.readlink("g")), "none",
         prepare=lambda: os.symlink("none", "l")),
    Case("link: ctime of the file", lambda: ctime_of_link(), True, prepare=make),
    Case("unlink: a directory", lambda: os.unlink("d"), errno.EISDIR, prepare=folder),
    Case("unlink: while open", lambda: unlink_open(), (0, b"data"), prepare=make),
]  # fmt: skip


def ctime_of_link() -> bool:
    names = iter(range(1_000_000))
    return changes_ctime(lambda: os.link("f", f"g{next(names)}"))


def unlink_open() -> tuple[int, bytes]:
    descriptor = os.open("f", os.O_RDWR)
    os.unlink("f")
    os.write(descriptor, b"data")
    found = os.fstat(descriptor).st_nlink, os.pread(descriptor, 10, 0)
    os.close(descriptor)
    return found


MAKE = [
    Case("mkdir: umask", both(lambda: os.umask(0o077), lambda: os.mkdir("d", 0o777),
         lambda: mode_of("d")), 0o700),
    Case("mkdir: set-group-ID is inherited", both(lambda: os.mkdir("d/e", 0o755),
         lambda: (mode_of("d/e"), os.stat("d/e").st_gid)), (0o2755, GROUP),
         prepare=lambda: folder(mode=0o2777, gid=GROUP)),
    Case("mkdir: link counts", both(lambda: os.mkdir("d/e"), lambda: (os.stat("d").st_nlink,
         os.stat("d/e").st_nlink)), (3, 2), prepare=folder),
    Case("create: the group of a set-group-ID directory", both(opened("d/f", os.O_CREAT),
         lambda: os.stat("d/f").st_gid), GROUP, USER, lambda: folder(mode=0o2777, gid=GROUP)),
    Case("mkfifo: what it is", both(lambda: os.mkfifo("p", 0o600),
         lambda: stat.S_ISFIFO(os.stat("p").st_mode)), True),
    Case("mknod: a device by a user", lambda: os.mknod("dev", stat.S_IFCHR | 0o600,
         os.makedev(1, 3)), errno.EPERM, USER, lambda: os.chmod(".", 0o777)),
    Case("mknod: a fifo by a user", lambda: os.mknod("p", stat.S_IFIFO | 0o600), 0, USER,
         lambda: os.chmod(".", 0o777)),
    Case("mknod: a device", both(lambda: os.mknod("dev", stat.S_IFCHR | 0o600, os.makedev(5, 77)),
         lambda: os.stat("dev").st_rdev), os.makedev(5, 77)),
    Case("symlink: an empty target", lambda: os.symlink("", "l"), errno.ENOENT),
    Case("symlink: a target of 4,095 bytes", both(lambda: os.symlink("t" * 4095, "l"),
         lambda: len(os.readlink("l"))), 4095),
    Case("symlink: a target of 4,096 bytes", lambda: os.symlink("t" * 4096, "l"),
         errno.ENAMETOOLONG),
    Case("symlink: its size", both(lambda: os.symlink("target", "l"),
         lambda: os.lstat("l").st_size), 6),
    Case("readlink: of a file", lambda: os.readlink("f"), errno.EINVAL, prepare=make),
]  # fmt: skip

OPEN = [
    Case("open: for reading without permission", opened("f", os.O_RDONLY), errno.EACCES, USER,
         lambda: make(mode=0o200)),
    Case("open: for writing without permission", opened("f", os.O_WRONLY), errno.EACCES, USER,
         lambda: make(mode=0o444)),
    Case("open: the owner's bits come first", opened("f", os.O_RDONLY), errno.EACCES, USER,
         lambda: make(mode=0o077, uid=USER)),
    Case("open: the group's bits come second", opened("f", os.O_RDONLY), errno.EACCES, USER,
         lambda: make(mode=0o707, gid=USER)),
    Case("open: truncates only with permission", opened("f", os.O_RDONLY | os.O_TRUNC),
         errno.EACCES, USER, lambda: make(mode=0o444)),
    Case("open: a directory for writing", opened("d", os.O_WRONLY), errno.EISDIR, prepare=folder),
    Case("open: a file as a directory", opened("f", os.O_RDONLY | os.O_DIRECTORY), errno.ENOTDIR,
         prepare=make),
    Case("open: a link that is not followed", opened("l", os.O_RDONLY | os.O_NOFOLLOW), errno.ELOOP,
         prepare=both(make, lambda: os.symlink("f", "l"))),
    Case("open: exclusively what a link leads to", opened("l", os.O_CREAT | os.O_EXCL | os.O_RDWR),
         errno.EEXIST, prepare=lambda: os.symlink("none", "l")),
    Case("open: creates what a link leads to", both(opened("l", os.O_CREAT | os.O_RDWR),
         lambda: os.path.exists("none")), True, prepare=lambda: os.symlink("none", "l")),
    Case("open: creates with a mode that forbids it", both(
        lambda: os.chmod(".", 0o777), opened("f", os.O_CREAT | os.O_RDWR, 0)), 0),
    Case("open: a fifo that nobody reads", opened("p", os.O_WRONLY | os.O_NONBLOCK), errno.ENXIO,
         prepare=lambda: os.mkfifo("p")),
    Case("open: a device that is none", opened("s", os.O_RDONLY), errno.ENXIO,
         prepare=lambda: os.mknod("s", stat.S_IFSOCK | 0o644)),
    Case("open: no update of a time that is not one's own", opened("f", os.O_RDONLY | os.O_NOATIME),
         errno.EPERM, USER, make),
    Case("open: a running program", opened("program", os.O_WRONLY), errno.ETXTBSY,
         prepare=lambda: run_program()),
]  # fmt: skip

RENAME = [
    Case("rename: over a file", both(lambda: os.rename("f", "g"), os.listdir), ["g"],
         prepare=both(make, lambda: make("g"))),
    Case("rename: over another name of the same file", both(lambda: os.rename("f", "g"),
         lambda: sorted(os.listdir())), ["f", "g"], prepare=both(make, lambda: os.link("f", "g"))),
    Case("rename: a file over a directory", lambda: os.rename("f", "d"), errno.EISDIR,
         prepare=both(make, folder)),
    Case("rename: a directory over a file", lambda: os.rename("d", "f"), errno.ENOTDIR,
         prepare=both(make, folder)),
    Case("rename: over an empty directory", lambda: os.rename("d", "e"), 0,
         prepare=both(folder, lambda: folder("e"))),
    Case("rename: over a directory with entries", lambda: os.rename("d", "e"), errno.ENOTEMPTY,
         prepare=both(folder, lambda: folder("e"), lambda: make("e/f"))),
    Case("rename: into itself", lambda: os.rename("d", "d/e"), errno.EINVAL, prepare=folder),
    Case("rename: over its parent", lambda: os.rename("d/e", "d"), errno.ENOTEMPTY,
         prepare=both(folder, lambda: folder("d/e"))),
    Case("rename: the dot", lambda: os.rename("d/.", "e"), errno.EBUSY, prepare=folder),
    Case("rename: a directory that one may not write to another parent",
         lambda: os.rename("d/e", "g"), errno.EACCES, USER,
         both(lambda: os.chmod(".", 0o777), lambda: folder(mode=0o777),
              lambda: folder("d/e", 0o755, OTHER))),
    Case("rename: link counts of parents", both(lambda: os.rename("d/sub", "e/sub"),
         lambda: (os.stat("d").st_nlink, os.stat("e").st_nlink)), (2, 3),
         prepare=both(folder, lambda: folder("e"), lambda: folder("d/sub"))),
    Case("rmdir: with entries", lambda: os.rmdir("d"), errno.ENOTEMPTY,
         prepare=both(folder, lambda: make("d/f"))),
    Case("rmdir: a file", lambda: os.rmdir("f"), errno.ENOTDIR, prepare=make),
    Case("rmdir: the dot", lambda: os.rmdir("d/."), errno.EINVAL, prepare=folder),
    Case("rmdir: the parent", lambda: os.rmdir("d/.."), errno.ENOTEMPTY, prepare=folder),
    Case("rmdir: through a link", lambda: os.rmdir("l"), errno.ENOTDIR,
         prepare=both(folder, lambda: os.symlink("d", "l"))),
]  # fmt: skip

STICKY = [
    Case(f"sticky: {name} of {what}", act, expected, USER, sticky(owner, file_owner))
    for what, owner, file_owner, allowed in [
        ("another's file in another's directory", OTHER, OTHER, False),
        ("one's own file in another's directory", OTHER, USER, True),
        ("another's file in one's own directory", USER, OTHER, True),
    ]
    for name, act, expected in [
        ("unlink", lambda: os.unlink("d/f"), 0 if allowed else errno.EPERM),
        ("rmdir", lambda: os.rmdir("d/sub"), 0 if allowed else errno.EPERM),
        ("rename", lambda: os.rename("d/f", "d/g"), 0 if allowed else errno.EPERM),
        ("rename over", both(lambda: os.close(os.open("d/own", os.O_CREAT)),
                             lambda: os.rename("d/own", "d/f")),
         0 if allowed else errno.EPERM),
    ]
]  # fmt: skip

TRUNCATE = [
    Case("truncate: longer", both(lambda: os.truncate("f", 5), lambda: Path("f").read_bytes()),
         bytes(5), prepare=make),
    Case("truncate: a directory", lambda: os.truncate("d", 0), errno.EISDIR, prepare=folder),
    Case("truncate: a negative size", lambda: os.truncate("f", -1), errno.EINVAL, prepare=make),
    Case("truncate: without permission", lambda: os.truncate("f", 0), errno.EACCES, USER,
         lambda: make(mode=0o444)),
    Case("truncate: a running program", lambda: os.truncate("program", 0), errno.ETXTBSY,
         prepare=lambda: run_program()),
    Case("ftruncate: a descriptor for reading", lambda: ftruncate_reader(), errno.EINVAL,
         prepare=make),
    Case("ftruncate: with permission once", lambda: ftruncate_writer(), 3, prepare=make),
    Case("truncate: times", lambda: changes_ctime(lambda: os.truncate("f", 7)), True, prepare=make),
    Case("truncate: set-ID bits go", both(lambda: os.truncate("f", 0), mode_of), 0o755, USER,
         lambda: make(mode=0o6755, uid=USER)),
    Case("write: set-ID bits go", both(write_as, mode_of), 0o777, USER,
         lambda: make(mode=0o6777)),
    Case("write: set-ID bits stay with root", both(write_as, mode_of), 0o6777,
         prepare=lambda: make(mode=0o6777)),
    Case("posix_fallocate: longer", lambda: allocate("f", 10, 20), 30, prepare=make),
    Case("posix_fallocate: no length", lambda: allocate("f", 0, 0), errno.EINVAL, prepare=make),
    Case("posix_fallocate: nothing gets lost", both(write_as, lambda: allocate("f", 0, 3),
         lambda: Path("f").read_bytes()), b"x\0\0", prepare=make),
]  # fmt: skip


def ftruncate_reader() -> None:
    descriptor = os.open("f", os.O_RDONLY)
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def ftruncate_writer() -> int:
    """What was asked when the file was opened counts."""
    descriptor = os.open("f", os.O_RDWR)
    os.chmod("f", 0)
    os.ftruncate(descriptor, 3)
    os.close(descriptor)
    return os.stat("f").st_size


def allocate(path: str, offset: int, length: int) -> int:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, offset, length)
    finally:
        os.close(descriptor)
    return os.stat(path).st_size


def run_program() -> None:
    """For as long as the case runs: it gets a signal when its parent ends."""
    import ctypes
    import signal

    shutil.copyfile("/bin/sleep", "program")
    os.chmod("program", 0o755)
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.execv("./program", ["program", "60"])  # closes the pipe
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


UTIMENSAT = [
    Case("utimensat: nanoseconds", both(lambda: os.utime("f", ns=(1_000_000_007, 2_000_000_009)),
         lambda: (os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns)),
         (1_000_000_007, 2_000_000_009), prepare=make),
    Case("utimensat: before 1970", both(lambda: os.utime("f", ns=(-5_000_000_001, -1)),
         lambda: os.stat("f").st_mtime_ns), -1, prepare=make),
    Case("utimensat: after 2038", both(lambda: os.utime("f", (2**32, 2**33)),
         lambda: os.stat("f").st_mtime), 2.0**33, prepare=make),
    Case("utimensat: of a link", both(lambda: os.utime("l", ns=(5, 6), follow_symlinks=False),
         lambda: os.lstat("l").st_mtime_ns), 6, prepare=lambda: os.symlink("none", "l")),
    Case("utimensat: some time without ownership", lambda: os.utime("f", (1, 2)), errno.EPERM, USER,
         lambda: make(mode=0o666)),
    Case("utimensat: now with write permission", lambda: os.utime("f"), 0, USER,
         lambda: make(mode=0o666)),
    Case("utimensat: now without it", lambda: os.utime("f"), errno.EACCES, USER,
         lambda: make(mode=0o444)),
    Case("utimensat: ctime", lambda: changes_ctime(lambda: os.utime("f", (1, 2))), True,
         prepare=make),
]  # fmt: skip

PATH_CASES = [*path_cases()]
CASES = [
    *PATH_CASES, *CHMOD, *CHOWN, *LINK, *MAKE, *OPEN, *RENAME, *STICKY, *TRUNCATE, *UTIMENSAT,
]  # fmt: skip


def answer(directory: Path, case: Case) -> Any:
    """In a child, which may become another user and leave things open."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            os.write(write, pickle.dumps(_answer(directory, case)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    return found


def _answer(directory: Path, case: Case) -> Any:
    os.umask(0o022)
    os.chdir(directory)
    try:
        case.prepare()
    except OSError as exc:
        return f"not prepared: {exc}"
    os.setgroups([])
    os.setresgid(case.user, case.user, case.user)
    os.setresuid(case.user, case.user, case.user)
    try:
        result = case.act()
    except OSError as exc:
        return exc.errno
    return 0 if result is None else result


@pytest.fixture(scope="module")
def reference() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory)


def group_of(case: Case) -> str:
    return case.name.partition(":")[0].partition(" ")[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")
@pytest.mark.both_frontends
@pytest.mark.parametrize("group", sorted({group_of(case) for case in CASES}))
def test_rules(group: str, work: Path, reference: Path, frontend: str) -> None:
    wrong = []
    # What paths are is the kernel's knowledge, and names are the service's: once will do.
    chosen = CASES if frontend == "direct" else CASES[len(PATH_CASES) :]
    cases = [case for case in chosen if group_of(case) == group]
    beside = reference / f"{group}-{frontend}"
    beside.mkdir()
    for number, case in enumerate(cases):
        found = []
        for root in (work, beside):
            (root / str(number)).mkdir()
            os.chmod(root / str(number), 0o777 if case.user else 0o755)
            found.append(answer(root / str(number), case))
        if found != [case.expected] * 2:
            wrong.append((case.name, case.expected, *found))
    assert not wrong, "\n".join(
        f"{name}: {expected} expected, {mount} on the mount, {other} beside it"
        for name, expected, mount, other in wrong
    )


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) > 200
