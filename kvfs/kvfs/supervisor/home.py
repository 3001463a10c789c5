"""The directory of one kvfs on disk, and what a running one tells about itself.

    DIR/kvfs.json            format version, identity, number of chunk servers
    DIR/kvfs.toml            settings (optional, yours)
    DIR/metadata/            the metadata service's database
    DIR/targets/N/           chunks of chunk server N
    DIR/log/ROLE.log         one log a process
    DIR/run/endpoints.json   addresses and process ids, while it runs
    DIR/run/supervisor.lock  locked by the supervisor, holds its process id
    DIR/run/children.lock    locked by every process of this kvfs
    DIR/run/*.sock           sockets, unless DIR is too long a name for them

All directories are 0700: whoever can enter is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvfs.supervisor import locks
from kvfs.supervisor.config import NEW_CHUNK_SERVERS
from kvfs_base.errors import AlreadyRunning, InvalidRequest, NotKvfsDirectory, VersionMismatch

FORMAT_VERSION = 1
ENDPOINTS_FORMAT = 1

SOCKET_PATH_BYTES_MAX = 107
"""``sun_path`` of unix(7) has 108 bytes, one of them for the terminating zero."""

LONGEST_SOCKET_NAME = "chunks-00.sock"


class Format(msgspec.Struct, forbid_unknown_fields=False, kw_only=True):
    """kvfs.json. ``format`` is checked before anything else is believed."""

    format: int
    cluster_id: str = ""
    chunk_servers: int = 0


class RoleState(msgspec.Struct, kw_only=True):
    """One process of `kvfs up`. ``state`` is ``starting``, ``serving`` or ``restarting``."""

    pid: int | None = None
    state: str = "starting"
    restarts: int = 0
    address: str | None = None


class Endpoints(msgspec.Struct, kw_only=True):
    """endpoints.json: how to reach a running kvfs. Written once everything serves, and again at
    every change; ``format`` grows when a field changes its meaning."""

    format: int = ENDPOINTS_FORMAT
    metadata: str
    agent: str
    chunk_servers: list[str]
    mount: str | None
    supervisor_pid: int
    started_ns: int
    pids: dict[str, int]
    roles: dict[str, RoleState]
    secret_file: str | None = None


class Home:
    """Paths and files of one kvfs directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()
        self.run = self.directory / "run"
        self.log = self.directory / "log"
        self.metadata = self.directory / "metadata"
        self.settings_path = self.directory / "kvfs.toml"
        self._format_path = self.directory / "kvfs.json"
        self._endpoints_path = self.run / "endpoints.json"
        self._lock_path = self.run / "supervisor.lock"
        self.children_lock_path = self.run / "children.lock"

    def target(self, number: int) -> Path:
        return self.directory / "targets" / str(number)

    # --- format

    def open(self) -> Format:
        """Raises NotKvfsDirectory, or VersionMismatch for another format version."""
        try:
            text = self._format_path.read_bytes()
        except FileNotFoundError:
            detail = "no kvfs.json in it" if self.directory.is_dir() else "no such directory"
            raise NotKvfsDirectory(path=str(self.directory), detail=detail) from None
        except NotADirectoryError:
            raise NotKvfsDirectory(path=str(self.directory), detail="not a directory") from None
        try:
            found = msgspec.json.decode(text, type=Format)
        except msgspec.MsgspecError as exc:
            detail = f"kvfs.json is damaged: {exc}"
            raise NotKvfsDirectory(path=str(self.directory), detail=detail) from exc
        if found.format != FORMAT_VERSION:
            raise VersionMismatch(
                detail=str(self.directory), found=str(found.format), expected=str(FORMAT_VERSION)
            )
        return found

    def open_or_create(self, chunk_servers: int) -> Format:
        """Opens the directory, or makes a new kvfs of a missing or empty one. Raises as ``open``,
        and InvalidRequest if it holds more targets than ``chunk_servers`` (0: as many)."""
        if self._format_path.exists() or not self._is_empty():
            found = self.open()
            if 0 < chunk_servers < found.chunk_servers:
                raise InvalidRequest(
                    detail=f"{self.directory} has {found.chunk_servers} chunk servers; "
                    f"with {chunk_servers} the blocks of the others would be lost"
                )
            wanted = max(chunk_servers, found.chunk_servers)
        else:
            found = Format(format=FORMAT_VERSION, cluster_id=uuid.uuid4().hex)
            wanted = chunk_servers or NEW_CHUNK_SERVERS
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        if wanted != found.chunk_servers:
            # Before the targets exist: a start that is cut short is finished by the next one.
            found.chunk_servers = wanted
            write_atomically(self._format_path, msgspec.json.format(msgspec.json.encode(found)))
        targets = [self.target(number) for number in range(wanted)]
        for path in (self.run, self.log, self.metadata, self.directory / "targets", *targets):
            path.mkdir(mode=0o700, exist_ok=True)
        return found

    def _is_empty(self) -> bool:
        """Nothing there but, perhaps, settings for the kvfs that is about to be made."""
        try:
            return set(os.listdir(self.directory)) <= {"kvfs.toml"}
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            return False

    def settings_text(self) -> str:
        """Contents of kvfs.toml, empty if there is none."""
        try:
            return self.settings_path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return ""

    # --- sockets

    def sockets(self) -> Path:
        """The directory for sockets: ``run/``, or a short one where the name would not fit."""
        if len(os.fsencode(self.run / LONGEST_SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX:
            return self.run
        name = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        path = Path(runtime) / f"kvfs-{os.getuid()}-{name}"
        if len(os.fsencode(path / LONGEST_SOCKET_NAME)) > SOCKET_PATH_BYTES_MAX:
            path = Path("/tmp") / path.name
        path.mkdir(mode=0o700, exist_ok=True)
        owner = path.lstat()
        if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.getuid() or owner.st_mode & 0o077:
            raise NotKvfsDirectory(path=str(path), detail="not a directory of ours alone")
        return path

    def remove_sockets(self) -> None:
        """The directory for them, if it is not one of ours and nobody has a socket there."""
        path = self.sockets()
        if path != self.run:
            with contextlib.suppress(OSError):
                path.rmdir()

    # --- endpoints

    def write_endpoints(self, endpoints: Endpoints) -> None:
        write_atomically(
            self._endpoints_path, msgspec.json.format(msgspec.json.encode(endpoints)) + b"\n"
        )

    def remove_endpoints(self) -> None:
        self._endpoints_path.unlink(missing_ok=True)

    def read_endpoints(self) -> Endpoints | None:
        """What the running, or the last killed, supervisor wrote."""
        try:
            return msgspec.json.decode(self._endpoints_path.read_bytes(), type=Endpoints)
        except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
            return None

    # --- locks

    @contextlib.contextmanager
    def locked(self, mountpoint: str | None) -> Iterator[str | None]:
        """Holds the supervisor's lock; yields the mount point that a killed supervisor had noted.
        Raises AlreadyRunning."""
        with self._lock_path.open("a+b") as file:
            if not locks.acquire(file.fileno()):
                pid = _read_note(self._lock_path).get("pid", 0)
                raise AlreadyRunning(directory=str(self.directory), pid=pid)
            previous = self.noted_mount()
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "mount": mountpoint}).encode())
            file.flush()
            yield previous
            # A clean end leaves nothing to clean up behind it.
            file.truncate(0)

    def running_pid(self) -> int | None:
        """Process id of the supervisor, or None if no supervisor holds the lock."""
        try:
            with self._lock_path.open("rb") as file:
                if locks.is_held(file.fileno()):
                    return int(_read_note(self._lock_path).get("pid", 0))
        except (FileNotFoundError, NotADirectoryError):
            pass
        return None

    def noted_mount(self) -> str | None:
        """Mount point of a supervisor that runs or was killed."""
        mount = _read_note(self._lock_path).get("mount")
        return mount if isinstance(mount, str) else None


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old contents or the new, also after a crash."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
