"""How a service lives as a process: ready line, signals, the tie to its supervisor."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio

from kvfs.cli import logs
from kvfs.cli.exits import ExitCode, exit_for
from kvfs.cli.notify import VARIABLE as NOTIFY_VARIABLE
from kvfs.cli.notify import notify
from kvfs.supervisor.child import PARENT_VARIABLE

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

STOP_SECONDS_MAX = 30
"""A service that is not gone so long after it was asked to stop ends at once: without this, one
that hangs would outlive a killed supervisor."""


def begin_service() -> None:
    """What every service does first: everything it makes is private, it ends with its supervisor,
    and it logs to standard error."""
    os.umask(0o077)
    _tie_to_supervisor()
    logs.set_up()


def _tie_to_supervisor() -> None:
    """If a supervisor started this process, the kernel sends it SIGTERM when the supervisor dies,
    however that happens."""
    supervisor = os.environ.pop(PARENT_VARIABLE, None)
    if supervisor is None:
        return
    os.environ.pop(NOTIFY_VARIABLE, None)  # that is for the supervisor
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(supervisor):  # it died before the kernel knew
        sys.exit(ExitCode.FAILED)


def announce_ready(role: str, addresses: Sequence[object]) -> None:
    """The one line on standard output: from now on requests are answered."""
    line = {
        "event": "ready",
        "role": role,
        "pid": os.getpid(),
        "addresses": [str(address) for address in addresses],
    }
    print(json.dumps(line), flush=True)
    notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={role} serves")


class ThreadedService(Protocol):
    """A service with threads of its own."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


def run_threaded(
    role: str, service: ThreadedService, addresses: Callable[[], Sequence[object]]
) -> None:
    """Runs a service until SIGINT or SIGTERM. ``addresses`` is asked once it is started."""
    wanted = threading.Event()

    def stop(number: int, frame: object) -> None:
        signal.alarm(STOP_SECONDS_MAX)
        notify("STOPPING=1")
        wanted.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with _logging_bugs():
        try:
            service.start()
            announce_ready(role, addresses())
            wanted.wait()
        finally:
            service.stop()
    signal.alarm(0)


def run_trio(role: str, serve: Callable[..., Awaitable[None]]) -> None:
    """Runs ``serve(task_status=...)`` until SIGINT, SIGTERM, or until it returns by itself."""

    async def watch(
        scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
            task_status.started()
            async for _ in received:
                signal.alarm(STOP_SECONDS_MAX)
                notify("STOPPING=1")
                scope.cancel()

    async def run_then_cancel(
        scope: trio.CancelScope, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await serve(task_status=task_status)
        scope.cancel()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watch, nursery.cancel_scope)
            addresses = await nursery.start(run_then_cancel, nursery.cancel_scope)
            announce_ready(role, addresses or ())

    with _logging_bugs():
        trio.run(main)
    signal.alarm(0)


class _logging_bugs:
    """Unexpected errors leave a traceback in the log; expected ones are one line at the end."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and exit_for(error)[0] is ExitCode.BUG:
            log.error("unexpected error", exc_info=error)
