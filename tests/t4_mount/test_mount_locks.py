"""flock and fcntl locks: within one mount, between two mounts, and when somebody dies."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs_metadata.limits import LOCK_WAIT_SECONDS
from t4_mount.harness import Cluster, Role, detach, wait_until

F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
FLOCK = struct.Struct("=hhxxxxqqixxxx")
"""struct flock on 64-bit Linux: type, whence, start, length, pid."""


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except BlockingIOError:
        return True
    return False


def flock_now(descriptor: int, how: int) -> bool:
    return not is_refused(lambda: fcntl.flock(descriptor, how | fcntl.LOCK_NB))


def lockf_now(descriptor: int, how: int = fcntl.LOCK_EX, length: int = 0, start: int = 0) -> bool:
    return not is_refused(lambda: fcntl.lockf(descriptor, how | fcntl.LOCK_NB, length, start))


def ofd(descriptor: int, command: int, kind: int, start: int = 0, length: int = 0) -> int:
    """The type that comes back. Raises OSError."""
    wanted = FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    return FLOCK.unpack(fcntl.fcntl(descriptor, command, wanted))[0]


def get_lock(descriptor: int, kind: int = fcntl.F_WRLCK) -> tuple[int, int, int, int]:
    """Type, first byte, length and process of what is in the way."""
    found = fcntl.fcntl(descriptor, fcntl.F_GETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    kind, _, start, length, pid = FLOCK.unpack(found)
    return kind, start, length, pid


CHILD = """
import fcntl, os, signal, sys
kind, path, start, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
print("open", flush=True)
def hurry(*_):
    raise InterruptedError
signal.signal(signal.SIGINT, hurry)
try:
    if kind == "flock":
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX, length, start)
    print("locked", flush=True)
except InterruptedError:
    print("interrupted", flush=True)
sys.stdin.readline()
"""


class Locker:
    """A process that opens a file and then waits for its lock."""

    def __init__(self, kind: str, path: Path, start: int = 0, length: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, kind, str(path), str(start), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.says() == "open"

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def waits(self) -> bool:
        """It sits in the kernel, in the call that locks."""
        try:
            syscall = Path(f"/proc/{self.process.pid}/syscall").read_text().split()[0]
        except OSError:
            return False
        return syscall in ("72", "73")

    def end(self) -> None:
        self.process.communicate(b"\n", timeout=60)


@pytest.fixture
def lockers() -> Iterator[Callable[..., Locker]]:
    made: list[Locker] = []

    def make(*args: object) -> Locker:
        made.append(Locker(*args))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for locker in made:
        with contextlib.suppress(ProcessLookupError):
            locker.process.kill()
        locker.process.communicate()


@pytest.fixture(scope="module")
def second(cluster: Cluster) -> Iterator[Path]:
    """Another mount of the same kvfs."""
    mountpoint = cluster.directory / "mnt-second"
    try:
        with cluster.mounted(mountpoint, "--frontend=direct"):
            yield mountpoint
    finally:
        detach(mountpoint)


@pytest.fixture(params=["one mount", "two mounts"])
def places(request: pytest.FixtureRequest, work: Path, second: Path) -> tuple[Path, Path]:
    """The same file by two paths."""
    here = work / "file"
    here.touch()
    return here, here if request.param == "one mount" else second / work.name / "file"


# --- both kinds, within and between mounts


def test_flock(places: tuple[Path, Path]) -> None:
    with opened(places[0]) as one, opened(places[1]) as other:
        assert flock_now(one, fcntl.LOCK_SH) and flock_now(other, fcntl.LOCK_SH)
        assert not flock_now(one, fcntl.LOCK_EX)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert flock_now(one, fcntl.LOCK_EX)
        assert not flock_now(other, fcntl.LOCK_SH)
    with opened(places[1]) as other:
        # The close has ended it. The kernel tells a mount of it when close has returned.
        wait_until(lambda: flock_now(other, fcntl.LOCK_EX))


def test_flock_belongs_to_the_open_file(work: Path) -> None:
    with opened(work / "f") as one:
        assert flock_now(one, fcntl.LOCK_EX)
        copy = os.dup(one)
        os.close(copy)
        with opened(work / "f") as other:
            assert not flock_now(other, fcntl.LOCK_EX)


def test_posix_ranges_between_processes(
    places: tuple[Path, Path], lockers: Callable[..., Locker]
) -> None:
    with opened(places[0]) as one:
        assert lockf_now(one, length=10, start=0)
        other = lockers("lockf", places[1], 5, 10)
        wait_until(other.waits)
        free = lockers("lockf", places[1], 20, 10)
        assert free.says() == "locked"
        fcntl.lockf(one, fcntl.LOCK_UN, 10, 0)
        assert other.says() == "locked"
        assert not lockf_now(one, length=10, start=5)
        assert lockf_now(one, length=5, start=15)


def test_open_file_description_locks(places: tuple[Path, Path]) -> None:
    """Of one process, and still in each other's way."""
    with opened(places[0]) as one, opened(places[1]) as other:
        ofd(one, F_OFD_SETLK, fcntl.F_WRLCK, 0, 10)
        assert is_refused(lambda: ofd(other, F_OFD_SETLK, fcntl.F_WRLCK, 9, 1))
        assert ofd(other, F_OFD_GETLK, fcntl.F_RDLCK, 9, 1) == fcntl.F_WRLCK
        ofd(other, F_OFD_SETLK, fcntl.F_WRLCK, 10, 1)
        copy = os.dup(one)
        os.close(copy)
        assert is_refused(lambda: ofd(other, F_OFD_SETLK, fcntl.F_WRLCK, 9, 1))
    with opened(places[1]) as other:
        ofd(other, F_OFD_SETLKW, fcntl.F_WRLCK)


def test_getlk_tells_the_holder(places: tuple[Path, Path], lockers: Callable[..., Locker]) -> None:
    holder = lockers("lockf", places[0], 100, 11)
    assert holder.says() == "locked"
    with opened(places[1]) as descriptor:
        kind, start, length, pid = get_lock(descriptor)
        assert (kind, start, length) == (fcntl.F_WRLCK, 100, 11)
        # Of another mount there is no number that means anything here.
        assert pid == (holder.process.pid if places[0] == places[1] else 0)
        holder.end()
        assert get_lock(descriptor)[0] == fcntl.F_UNLCK


def test_any_close_ends_the_locks_of_a_process(places: tuple[Path, Path]) -> None:
    """As POSIX says, surprising as it is: also that of a descriptor that was only read from."""
    with opened(places[0]) as one:
        assert lockf_now(one)
        with opened(places[0], os.O_RDONLY):
            child = os.fork()
            if not child:
                with opened(places[1]) as descriptor:
                    os._exit(0 if not lockf_now(descriptor) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = os.fork()
        if not child:
            with opened(places[1]) as descriptor:
                os._exit(0 if lockf_now(descriptor) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


COUNT = """
import fcntl, sys
lock, counter = sys.argv[1:]
for _ in range(15):
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with open(counter, "r+") as file:
            value = int(file.read()) + 1
            file.seek(0)
            file.write(str(value))
"""


def test_what_is_changed_under_a_lock_is_changed_once(work: Path, second: Path) -> None:
    """Close-to-open is enough for those who open what they change once they have the lock."""
    (work / "counter").write_text("0")
    places = [work, second / work.name] * 2
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNT, place / "lock", place / "counter"])
        for place in places
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (work / "counter").read_text() == str(15 * len(places))


# --- waiting


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_waiter_is_woken(
    kind: str, places: tuple[Path, Path], lockers: Callable[..., Locker]
) -> None:
    took = []
    for _ in range(2):  # this machine may be busy with something else once
        holder = lockers(kind, places[0])
        assert holder.says() == "locked"
        waiter = lockers(kind, places[1])
        wait_until(waiter.waits)
        begun = time.monotonic()
        holder.end()
        assert waiter.says() == "locked"
        took.append(time.monotonic() - begun)
        waiter.end()
    assert min(took) < LOCK_WAIT_SECONDS - 1  # it was told


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_waiter_can_be_interrupted(
    kind: str, places: tuple[Path, Path], lockers: Callable[..., Locker]
) -> None:
    holder = lockers(kind, places[0])
    assert holder.says() == "locked"
    waiter, third = lockers(kind, places[1]), lockers(kind, places[1])
    wait_until(waiter.waits)
    wait_until(third.waits)
    waiter.process.send_signal(signal.SIGINT)
    assert waiter.says() == "interrupted"
    third.process.kill()
    third.process.wait(timeout=60)
    holder.end()
    # Neither of them has it.
    with opened(places[0]) as descriptor:
        wait_until(lambda: flock_now(descriptor, fcntl.LOCK_EX))
        wait_until(lambda: lockf_now(descriptor))


def test_many_wait_and_the_mount_goes_on(work: Path, lockers: Callable[..., Locker]) -> None:
    """More than MOUNT_TASKS, from threads of one process: an open file each."""
    program = f"""
import fcntl, os, sys, threading
path = {str(work / "f")!r}
def wait():
    fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX)
for _ in range(100):
    threading.Thread(target=wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
os._exit(0)
"""
    with opened(work / "f") as descriptor:
        assert flock_now(descriptor, fcntl.LOCK_EX)
        waiter = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert waiter.stdout is not None and waiter.stdout.readline() == b"ready\n"
            tasks = Path(f"/proc/{waiter.pid}/task")
            wait_until(
                lambda: (
                    sum((t / "syscall").read_text().startswith("73 ") for t in tasks.iterdir())
                    == 100
                ),
                30,
            )
            (work / "other").write_bytes(b"still served")
            assert (work / "other").read_bytes() == b"still served"
        finally:
            waiter.communicate(b"\n", timeout=60)


DEADLOCK = """
import fcntl, os, sys
own, other = int(sys.argv[2]), int(sys.argv[3])
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, own)
print("has one", flush=True)
sys.stdin.readline()
try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, other)
    print("has both", flush=True)
except OSError as exc:
    print(exc.errno, flush=True)
"""


@pytest.mark.parametrize("mounts", [1, 2])
def test_a_deadlock_is_refused(mounts: int, work: Path, second: Path) -> None:
    """One of two is told so, lets go by its end, and the other one goes on."""
    (work / "f").touch()
    places = [work / "f", (work if mounts == 1 else second / work.name) / "f"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DEADLOCK, str(place), str(own), str(1 - own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for own, place in enumerate(places)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"has one\n"
        said = [process.communicate(b"\n", timeout=60)[0] for process in start_all(processes)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(said) == [b"%d\n" % errno.EDEADLK, b"has both\n"]


def start_all(processes: list[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    return processes


# --- who dies


def test_a_killed_process_lets_go(
    places: tuple[Path, Path], lockers: Callable[..., Locker]
) -> None:
    holder, waiter = lockers("lockf", places[0]), None
    assert holder.says() == "locked"
    waiter = lockers("lockf", places[1])
    wait_until(waiter.waits)
    holder.process.kill()
    assert waiter.says() == "locked"


def test_locks_outlive_a_restart_of_the_metadata_service(
    own_cluster: Cluster, tmp_path: Path
) -> None:
    with own_cluster.mounted(tmp_path / "mnt"):
        path = tmp_path / "mnt" / "f"
        with opened(path) as kept, opened(path) as other:
            assert flock_now(kept, fcntl.LOCK_EX)
            own_cluster.metadata.kill()
            own_cluster.metadata.start()
            assert not flock_now(other, fcntl.LOCK_SH)
            fcntl.flock(kept, fcntl.LOCK_UN)
            assert flock_now(other, fcntl.LOCK_SH)


@pytest.mark.skipif("KVFS_MOUNT_LONG" not in os.environ, reason="waits 30 s for a session's end")
def test_locks_of_a_killed_mount_end_with_its_session(
    own_cluster: Cluster, tmp_path: Path, lockers: Callable[..., Locker]
) -> None:
    dying, living = tmp_path / "dying", tmp_path / "mnt"
    role: Role = own_cluster.mount(dying)
    try:
        with own_cluster.mounted(living):
            (living / "f").touch()
            holder = lockers("flock", dying / "f")
            assert holder.says() == "locked"
            waiter = lockers("flock", living / "f")
            wait_until(waiter.waits)
            role.kill()
            assert waiter.says() == "locked"  # after SESSION_GRACE_SECONDS
    finally:
        detach(dying)


# --- locks of one mount only


def test_locks_can_be_kept_in_the_mount(cluster: Cluster, work: Path) -> None:
    (work / "f").touch()
    mountpoint = cluster.directory / "mnt-private"
    try:
        with cluster.mounted(mountpoint, "--locks=mount"):
            path = mountpoint / work.name / "f"
            with opened(path) as one, opened(path) as other, opened(work / "f") as third:
                assert flock_now(one, fcntl.LOCK_EX)
                assert not flock_now(other, fcntl.LOCK_EX)
                assert flock_now(third, fcntl.LOCK_EX)
    finally:
        detach(mountpoint)


@pytest.mark.both_frontends
def test_directories_are_locked_within_a_mount(work: Path) -> None:
    with opened(work, os.O_RDONLY) as one, opened(work, os.O_RDONLY) as other:
        assert flock_now(one, fcntl.LOCK_EX)
        assert not flock_now(other, fcntl.LOCK_EX)


assert ctypes.sizeof(ctypes.c_void_p) == 8, "FLOCK is that of 64-bit machines"
