"""A TCP proxy that keeps bytes back: what one peer sends reaches the other later. Bytes of one
connection stay in order, as TCP's do; those of different connections overtake each other."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

PIECE = 64 << 10
PIECES_MAX = 64
SO_ORIGINAL_DST = 80
"""netfilter: where a redirected connection was going."""


class SlowLink:
    """Takes connections that nftables redirected to ``port`` and passes them on to where they were
    going, each piece of bytes ``delay()`` seconds late. Made by a thread inside the network
    namespace in which it is to listen and dial."""

    def __init__(self, delay: Callable[[], float]) -> None:
        self._delay = delay
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("0.0.0.0", 0))
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)

    @classmethod
    def jittering(cls, seconds: float, jitter: float, seed: int) -> SlowLink:
        """From ``seconds`` to ``seconds + jitter``, drawn anew for each piece."""
        rng = random.Random(seed)
        return cls(lambda: seconds + jitter * rng.random())

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        # New threads are in the namespace of the thread that starts them.
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _keep(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.append(sock)
            if self._closed.is_set():
                sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._keep(near)
                self._spawn(self._dial, near)

    def _dial(self, near: socket.socket) -> None:
        try:
            raw = near.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
            port, address = struct.unpack_from("!2xH4s", raw)
            far = socket.create_connection((socket.inet_ntoa(address), port))
        except OSError:
            near.close()
            return
        self._keep(far)
        for source, sink in ((near, far), (far, near)):
            pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(PIECES_MAX)
            self._spawn(self._receive, source, pieces)
            self._spawn(self._send, pieces, sink)

    def _receive(self, source: socket.socket, pieces: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            pieces.put((time.monotonic() + self._delay(), data))

    def _send(self, pieces: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        while True:
            due, data = pieces.get()
            self._closed.wait(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                if data:
                    sink.sendall(data)
                else:
                    sink.shutdown(socket.SHUT_WR)
            if not data:
                return

    def close(self) -> None:
        """Every connection breaks."""
        self._closed.set()
        with self._lock:
            sockets, threads = [self._listener, *self._sockets], list(self._threads)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in threads:
            thread.join()
