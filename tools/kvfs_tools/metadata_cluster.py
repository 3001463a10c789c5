"""Metadata services as processes, a target that is only a heartbeat, and client processes: what
``kvfs bench-metadata`` measures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.errors import KvfsError
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request
from kvfs_base.types import Address
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.messages import StatFs

START_SECONDS = 300.0
STOP_SECONDS = 60.0
HEARTBEAT_SECONDS = 0.5
CPU_CLOCK = 2
"""CPUCLOCK_SCHED of linux/posix-timers.h."""
CAPACITY_BYTES = 1 << 50
"""Of the target that is only a heartbeat: nothing is evicted."""


def _cpu_seconds(pid: int) -> float:
    """That all threads of a process have used: its clock is what clock_getcpuclockid(3) says."""
    return time.clock_gettime(~pid << 3 | CPU_CLOCK)


class MetadataProcess:
    """``kvfs serve metadata`` on ``directory``, and on ``store`` if one is given."""

    def __init__(self, directory: Path, sockets: Path, store: str = "") -> None:
        self.directory = directory
        self.socket = str(sockets / directory.name)
        self._log = directory.with_suffix(".log")
        self._argv = [sys.executable, "-m", "kvfs", "serve", "metadata"]
        self._argv += ["--directory", str(directory), "--unix", f"unix:{self.socket}"]
        if store:
            self._argv += ["--store", store]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, first: Request, check: Callable[[Any], bool] = lambda reply: True) -> float:
        """Seconds until ``first`` was answered as ``check`` wants it."""
        with self._log.open("ab") as log:
            begin = time.monotonic()
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
        client = BlockingMetadataClient(os_env(), Address.unix(self.socket), retry_seconds=0.0)
        with contextlib.closing(client):
            while True:
                try:
                    reply = client.call(first, START_SECONDS)
                    break
                except KvfsError as exc:
                    if not exc.temporary or time.monotonic() - begin > START_SECONDS:
                        raise
                if self._process.poll() is not None:
                    text = self._log.read_text(errors="replace")[-2000:]
                    raise click.ClickException(f"the metadata service ended:\n{text}")
                time.sleep(0.002)
        seconds = time.monotonic() - begin
        if not check(reply):
            raise RuntimeError(f"after a start {first} was answered with {reply}")
        return seconds

    def kill(self) -> None:
        """As the kernel does it when memory is short: at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def cpu_seconds(self) -> float:
        """That it has used since its start."""
        assert self._process is not None
        return _cpu_seconds(self._process.pid)

    def resident_bytes(self) -> int:
        """Memory of its own: pages of the store that it maps are the page cache's."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024


class Heart:
    """A target that takes every block and has removed what it was told to remove."""

    def __init__(self, socket: str) -> None:
        self._client = BlockingMetadataClient(os_env(), Address.unix(socket))
        self._removed = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.beat()
        self._thread.start()

    def beat(self) -> bool:
        """Whether there was something to remove."""
        with self._lock:
            report = TargetReport("bench", CAPACITY_BYTES, CAPACITY_BYTES, True, self._removed)
            reply = self._client.call(Heartbeat("bench", "bench", None, None, (report,)))
            removals = reply.targets[0].removals
            self._removed = max([self._removed] + [removal.seq for removal in removals])
            return bool(removals)

    def remove_everything(self) -> None:
        """Until the service has nothing more to be removed."""
        while self.beat():
            pass

    def _run(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(KvfsError):  # the service is being restarted
                self.beat()

    def stop(self) -> None:
        self._over.set()
        self._client.close()
        self._thread.join()


@dataclasses.dataclass(frozen=True)
class Done:
    """What the clients did together: from the first that began to the last that ended."""

    count: int
    seconds: float
    sent: int
    received: int
    """Bytes of one call of the first client."""

    @property
    def rate(self) -> float:
        return self.count / self.seconds


class Crew:
    """Client processes, spread over the services, and the echo."""

    def __init__(self, directory: Path, sockets: Sequence[str], clients: int) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        echo = str(directory / "echo.socket")
        self._start("echo", echo)
        while not os.path.exists(echo):
            time.sleep(0.01)
        for number in range(clients):
            self._start("client", sockets[number % len(sockets)], echo)

    def _start(self, *arguments: str) -> None:
        argv = [sys.executable, "-m", "kvfs_tools.metadata_worker", *arguments]
        pipe = subprocess.PIPE
        self._processes.append(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True))

    def do(self, orders: Sequence[dict[str, Any]]) -> Done:
        """One order a client, carried out at the same time."""
        workers = self._processes[1 : 1 + len(orders)]
        for worker, order in zip(workers, orders, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        answers = []
        for worker in workers:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise click.ClickException("a client process failed")
            answers.append(json.loads(line))
        return Done(
            count=sum(answer["count"] for answer in answers),
            seconds=max(a["end"] for a in answers) - min(a["begin"] for a in answers),
            sent=answers[0].get("sent", 0),
            received=answers[0].get("received", 0),
        )

    def echo_cpu_seconds(self) -> float:
        """That the echo has used since its start."""
        return _cpu_seconds(self._processes[0].pid)

    def stop(self) -> None:
        for process in self._processes:
            process.communicate()  # the end of their input is theirs
        self._processes.clear()


class MetadataCluster:
    """Services on a directory below ``directory`` each, a target and clients, for the length of a
    ``with`` block."""

    def __init__(self, directory: Path, *, store: str, servers: int, clients: int) -> None:
        directory.mkdir()
        self.directory = directory
        # A socket's path has room for 107 bytes, wherever the data is to lie.
        self._short = tempfile.TemporaryDirectory(prefix="kvfs-")
        self.sockets = Path(self._short.name)
        self.servers = [
            MetadataProcess(directory / f"server-{number}", self.sockets, store)
            for number in range(servers)
        ]
        self._clients = clients

    def __enter__(self) -> MetadataCluster:
        with contextlib.ExitStack() as stack:
            stack.callback(self._short.cleanup)
            for server in self.servers:
                stack.callback(server.stop)
                server.start(StatFs())
            self.heart = Heart(self.servers[0].socket)
            stack.callback(self.heart.stop)
            sockets = [server.socket for server in self.servers]
            self.crew = Crew(self.sockets, sockets, self._clients)
            stack.callback(self.crew.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def cpu_seconds(self) -> float:
        """That the services have used since their start."""
        return sum(server.cpu_seconds() for server in self.servers)

    def call(self, request: Request) -> Any:
        address = Address.unix(self.servers[0].socket)
        client = BlockingMetadataClient(os_env(), address)
        with contextlib.closing(client):
            return client.call(request)
