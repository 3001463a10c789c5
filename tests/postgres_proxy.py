"""A proxy in front of a PostgreSQL server that loses requests or answers when it is told to."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType

PIECE = 1 << 16


class Proxy:
    """``url`` instead of the server's. Connections are forwarded until ``lose_requests`` or
    ``lose_answers``: then the next one on which ``marker`` is sent is cut, before or after the
    server got it."""

    def __init__(self, url: str) -> None:
        base, _, directory = url.partition("?host=")
        self._server = f"{directory}/.s.PGSQL.5432"
        self._directory = Path(tempfile.mkdtemp(prefix="kvfs-proxy-"))
        self.url = f"{base}?host={self._directory}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / ".s.PGSQL.5432"))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = [self._listener]
        self._mode: str | None = None
        self._marker = b""
        self.cut = threading.Event()
        self._spawn(self._accept)

    def lose_requests(self, marker: bytes) -> None:
        self._marker, self._mode = marker, "request"
        self.cut.clear()

    def lose_answers(self, marker: bytes) -> None:
        self._marker, self._mode = marker, "answer"
        self.cut.clear()

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self._sockets += [client, server]
            try:
                server.connect(self._server)
            except OSError:
                client.close()
                server.close()
                continue
            self._spawn(self._forward, client, server)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if server in ready:
                    data = server.recv(PIECE)
                    if not data:
                        return
                    client.sendall(data)
                if client in ready:
                    data = client.recv(PIECE)
                    if not data:
                        return
                    if self._mode is None or self._marker not in data:
                        server.sendall(data)
                        continue
                    mode, self._mode = self._mode, None
                    if mode == "answer":
                        server.sendall(data)
                        server.recv(PIECE)  # so it was carried out
                    self.cut.set()
                    return

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # which wakes its thread
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()
        shutil.rmtree(self._directory)
