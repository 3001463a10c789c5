"""The least that moving chunks over TCP costs from Python: `sendfile` on one side, `recv_into` on
the other, and nothing else. No look at an attribute, no checksum, files that are open already.

Run as a program it is the server: it prints its port and serves the files of a directory until its
standard input ends. A request is 17 bytes: `r`, first file, count, or `w`, 0, bytes that follow.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from kvfs_base.limits import TRANSFER_BYTES
from kvfs_base.os_network import set_buffers
from kvfs_tools.cluster import cpu_clock

REQUEST = struct.Struct("<cQQ")


def host_paces() -> bool:
    """Whether this host's TCP sends by a timer unless told otherwise."""
    with socket.socket() as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.startswith(b"bbr")


def _tuned(sock: socket.socket, *, unpaced: bool) -> socket.socket:
    set_buffers(sock)  # as kvfs does
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if unpaced:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return sock


# --- server


def serve(folder: str, *, unpaced: bool) -> None:
    files = [os.open(f"{folder}/{name}", os.O_RDONLY) for name in sorted(os.listdir(folder))]
    sizes = [os.fstat(fd).st_size for fd in files]
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            _tuned(sock, unpaced=unpaced)
            threading.Thread(target=_answer, args=(sock, files, sizes), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def _answer(sock: socket.socket, files: Sequence[int], sizes: Sequence[int]) -> None:
    request = bytearray(REQUEST.size)
    memory = memoryview(bytearray(TRANSFER_BYTES))
    out = sock.fileno()
    with sock:
        while sock.recv_into(request, 0, socket.MSG_WAITALL) == REQUEST.size:
            kind, first, count = REQUEST.unpack(request)
            if kind == b"w":
                while count:
                    count -= sock.recv_into(memory, min(count, TRANSFER_BYTES), socket.MSG_WAITALL)
                sock.sendall(b"!")
                continue
            for number in range(first, first + count):
                sent = 0
                while sent < sizes[number]:
                    sent += os.sendfile(out, files[number], sent, sizes[number] - sent)


# --- client


class Pair:
    """One server process a folder, and this process as their client, with as many connections a
    server as a chunk client has."""

    def __init__(self, folders: Sequence[Path], connections: int, *, unpaced: bool = False) -> None:
        """``unpaced``: by CUBIC, as chunk servers and clients do where the host would pace."""
        self._servers: list[subprocess.Popen[str]] = []
        self._sockets: list[list[socket.socket]] = []
        self._connections = connections
        try:
            for folder in folders:
                self._servers.append(_spawn(folder, unpaced))
                stdout = self._servers[-1].stdout
                assert stdout is not None
                peer = ("127.0.0.1", int(stdout.readline()))
                self._sockets.append([])
                for _ in range(connections):
                    sock = socket.create_connection(peer)
                    self._sockets[-1].append(_tuned(sock, unpaced=unpaced))
        except BaseException:
            self.close()
            raise
        self._pool = ThreadPoolExecutor(connections * len(folders))

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self.close()

    def close(self) -> None:
        for group in self._sockets:
            for sock in group:
                sock.close()
        for server in self._servers:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.close()
            server.wait()
            server.stdout.close()

    def cpu_seconds(self) -> float:
        """Of the servers."""
        return sum(cpu_clock(server.pid) for server in self._servers)

    def read(self, memory: memoryview, counts: Sequence[int], size: int) -> None:
        """``counts[i]`` files of ``size`` bytes from server i, one after the other in memory."""
        portion = max(1, TRANSFER_BYTES // size)

        def fetch(sock: socket.socket, first: int, count: int, at: int) -> None:
            sock.sendall(REQUEST.pack(b"r", first, count))
            if (
                sock.recv_into(memory[at : at + count * size], 0, socket.MSG_WAITALL)
                != count * size
            ):
                raise RuntimeError("the pair's server ended")

        self._share(counts, portion, size, fetch)

    def write(self, memory: memoryview, counts: Sequence[int], size: int) -> None:
        """The other way; the server forgets the bytes."""
        portion = max(1, TRANSFER_BYTES // size)

        def push(sock: socket.socket, first: int, count: int, at: int) -> None:
            sock.sendall(REQUEST.pack(b"w", 0, count * size))
            sock.sendall(memory[at : at + count * size])
            if sock.recv(1) != b"!":
                raise RuntimeError("the pair's server ended")

        self._share(counts, portion, size, push)

    def _share(
        self,
        counts: Sequence[int],
        portion: int,
        size: int,
        move: Callable[[socket.socket, int, int, int], None],
    ) -> None:
        at = 0
        jobs = []
        for group, count in zip(self._sockets, counts, strict=True):
            starts = range(0, count, portion)
            for lane, sock in enumerate(group):
                mine = [
                    (first, min(portion, count - first), at + first * size)
                    for first in starts[lane :: len(group)]
                ]
                if mine:
                    jobs.append(self._pool.submit(_run, move, sock, mine))
            at += count * size
        for job in jobs:
            job.result()


def _run(
    move: Callable[[socket.socket, int, int, int], None],
    sock: socket.socket,
    portions: Sequence[tuple[int, int, int]],
) -> None:
    for first, count, at in portions:
        move(sock, first, count, at)


def _spawn(folder: Path, unpaced: bool) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvfs_tools.chunk_pair", str(folder), *["unpaced"] * unpaced],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    serve(sys.argv[1], unpaced="unpaced" in sys.argv[2:])
