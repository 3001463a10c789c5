"""Processes that find imported what they need: they are forked from one that has done that.

A role of a kvfs takes 0.3 s of CPU time to start, nearly all of it for imports, and tests start
hundreds. One that is forked has a process id, a standard output and an exit code like any other,
and is killed like any other.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import IO, Any

REQUEST_BYTES_MAX = 1 << 16

MODULES = (
    "kvfs.cli.serve",
    "kvfs.mount.main",
    "kvfs_datapath.server.chunk_server",
    "kvfs_metadata.engines.lmdb_engine",
    "kvfs_metadata.engines.postgres_engine",
    "kvfs_metadata.service",
)


class Forked:
    """A process that calls ``function`` ("module:name") with ``arguments`` in ``sys.argv``. It has
    as much of ``subprocess.Popen`` as tests use."""

    def __init__(self, function: str, *arguments: object, stderr: IO[Any] | None = None) -> None:
        request = json.dumps([function, [*map(str, arguments)], os.getcwd(), dict(os.environ)])
        output, its_output = os.pipe()
        told, its_told = os.pipe()
        errors = 2 if stderr is None else stderr.fileno()
        socket.send_fds(_forker(), [request.encode()], [its_told, its_output, errors])
        os.close(its_output)
        os.close(its_told)
        self.stdout = os.fdopen(output, "rb")
        self._told = os.fdopen(told, "rb", 0)
        self.pid = int(self._told.readline())
        self._code: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Until it is gone."""
        if self._code is None:
            poll = select.poll()  # select() takes no descriptor above 1,023
            poll.register(self._told, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self._code = int(self._told.readline())
            self._told.close()
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _forker() -> socket.socket:
    """Where this process asks for others. The one that forks ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=theirs,
            start_new_session=True,  # Ctrl-C is for the tests
        )

    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _fork_on_request(requests: socket.socket) -> bytes:
    """Returns in each process that was asked for, with the request, and with none at the end."""
    gc.freeze()
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not request:
            return b""
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    told, output, errors = descriptors
    if child := os.fork():
        # In between, for its exit code: it is nobody's child whom a test could wait for.
        os.close(output)
        os.write(told, b"%d\n" % child)
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(BrokenPipeError):
            os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.close(told)
    requests.close()
    os.setsid()
    return request


def _run(request: bytes) -> None:
    function, arguments, directory, environment = json.loads(request)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()


if __name__ == "__main__":
    for each in MODULES:
        importlib.import_module(each)
    if asked := _fork_on_request(socket.socket(fileno=os.dup(0))):
        _run(asked)
