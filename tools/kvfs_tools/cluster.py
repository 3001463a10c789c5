"""A whole kvfs on this machine for the length of a ``with`` block: what the demo and the benchmarks
run against is the same ``kvfs up`` that users run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CPUCLOCK_SCHED = 2
"""Of clock_getcpuclockid(3): the id of a process's clock is made of its number and this."""
START_SECONDS = 60.0
STOP_SECONDS = 30.0


class ClusterFailed(RuntimeError):
    """``kvfs up`` ended, or did not get ready; the message holds the end of its output."""


class LocalCluster:
    """Runs ``kvfs up`` on ``directory``/data, mounted at ``directory``/mnt."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        arena_bytes: int = 0,
        capacity_bytes: int = 0,
        chunk_servers: int = 3,
        mount: bool = True,
    ) -> None:
        root = Path(directory).absolute()
        self.directory = root / "data"
        self.mountpoint = root / "mnt"
        self._log_path = root / "up.log"
        self._argv = [sys.executable, "-m", "kvfs", "up", str(self.directory)]
        self._argv += ["--chunk-servers", str(chunk_servers)]
        self._mount = mount
        if mount:
            self._argv += ["--mount", str(self.mountpoint)]
        if capacity_bytes:
            self._argv += ["--capacity", str(capacity_bytes)]
        if arena_bytes:
            self._argv += ["--arena", str(arena_bytes)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once every role is serving. Raises ClusterFailed."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        # A session of its own: Ctrl-C reaches us first, and we stop it in order.
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        ready = self.directory / "run" / "endpoints.json"
        while not (ready.exists() and (not self._mount or os.path.ismount(self.mountpoint))):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ClusterFailed(self._log_path.read_text(errors="replace")[-2000:])
            time.sleep(0.05)

    def endpoint(self, role: str) -> str:
        """The address of a role (``metadata``, ``agent``)."""
        return str(self._endpoints()[role])

    def _endpoints(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "run/endpoints.json").read_text())
        return found

    def cpu_seconds(self) -> float:
        """User and system time that the processes of the cluster have taken so far."""
        return sum(map(cpu_seconds, self._endpoints()["pids"].values()))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left after a while."""
        process = self._process
        if process is None:
            return
        self._process = None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def cpu_clock(pid: int) -> float:
    """The same by the process's own clock: nanoseconds instead of ticks of 10 ms. Raises OSError if
    it is gone."""
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
