"""One child process: its ready line, its log, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import trio

from kvfs_base.errors import RoleFailed

PARENT_VARIABLE = "KVFS_SUPERVISOR_PID"
"""Tells a child who its supervisor is: it ends when that process does."""

PUMP_BYTES = 64 * 1024
LAST_LINE_BYTES = 4096


class RotatingLog:
    """An append-only file of at most ``limit`` bytes, plus one predecessor of the same size."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._file: BinaryIO = path.open("ab", buffering=0)
        self.tail = b""
        """The end of what was written: the reason, if the process is about to die."""

    def write(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-LAST_LINE_BYTES:]
        try:
            if self._file.tell() + len(data) > self._limit:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file = self._path.open("ab", buffering=0)
            self._file.write(data)
        except OSError:
            pass  # a full disk must not stop the process that logs

    def last_line(self) -> str:
        lines = self.tail.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        self._file.close()


class Child:
    """A running process. Its output is copied to ``log`` until it ends.

    ``started`` is set by its ready line, ``ended`` by its exit.
    """

    def __init__(self, role: str, argv: Sequence[str], log: RotatingLog, lock: int) -> None:
        self.role = role
        self.ended = trio.Event()
        self.exit_code: int | None = None
        self._log = log
        self._ready: dict[str, object] | None = None
        self._ready_or_ended = trio.Event()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            # From the main thread, which lives as long as the process does: the kernel signals the
            # end of the parent *thread*, so a worker thread's end would stop the child. A session
            # of its own, so that Ctrl-C reaches the supervisor alone, which stops all in order.
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out_write,
                stderr=err_write,
                pass_fds=(lock,),
                start_new_session=True,
                env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
            )
            # Now: to signal a process that has ended takes its number away.
            self._end = os.pidfd_open(self._process.pid)
        except BaseException:
            os.close(out_read)
            os.close(err_read)
            raise
        finally:
            os.close(out_write)
            os.close(err_write)
        self.pid = self._process.pid
        self._stdout = trio.lowlevel.FdStream(out_read)
        self._stderr = trio.lowlevel.FdStream(err_read)

    async def run(self) -> None:
        """Returns once the process has ended and all it wrote is in the log."""
        async with self._stdout, self._stderr, trio.open_nursery() as nursery:
            nursery.start_soon(self._read_ready_line)
            nursery.start_soon(self._pump, self._stderr)
            await self._wait()
            # A grandchild may hold the pipes open; what the process itself wrote is there by now.
            nursery.cancel_scope.deadline = trio.current_time() + 1.0
        self._ready_or_ended.set()
        self.ended.set()

    async def wait_ready(self, seconds: float) -> dict[str, object]:
        """The ready line. Raises RoleFailed if the process ends first, or takes too long."""
        with trio.move_on_after(seconds):
            await self._ready_or_ended.wait()
        if self._ready is not None:
            return self._ready
        if self.exit_code is None:
            raise RoleFailed(role=self.role, detail=f"not ready after {seconds:g} s")
        raise RoleFailed(role=self.role, exit_code=self.exit_code, detail=self._log.last_line())

    async def stop(self, seconds: float) -> bool:
        """SIGTERM, and after ``seconds`` SIGKILL; False if it came to that."""
        self.signal(signal.SIGTERM)
        with trio.move_on_after(seconds) as scope:
            await self.ended.wait()
        if scope.cancelled_caught:
            self.signal(signal.SIGKILL)
            await self.ended.wait()
        return not scope.cancelled_caught

    def signal(self, number: signal.Signals) -> None:
        """Does nothing once the process has ended (its id may be another's by then)."""
        if self.exit_code is None:
            self._process.send_signal(number)

    async def _wait(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._end)
        finally:
            os.close(self._end)
        self.exit_code = self._process.wait()

    async def _read_ready_line(self) -> None:
        buffer = b""
        while b"\n" not in buffer and len(buffer) < PUMP_BYTES:
            data = await self._stdout.receive_some(PUMP_BYTES)
            if not data:
                return
            buffer += data
        line, _, rest = buffer.partition(b"\n")
        try:
            ready = json.loads(line)
        except ValueError:
            self._log.write(buffer)
        else:
            self._log.write(rest)
            self._ready = ready
            self._ready_or_ended.set()
        await self._pump(self._stdout)

    async def _pump(self, stream: trio.lowlevel.FdStream) -> None:
        while data := await stream.receive_some(PUMP_BYTES):
            self._log.write(data)
