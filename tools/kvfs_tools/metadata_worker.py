"""A process of ``kvfs bench-metadata``: a client of the metadata service, or the echo that the
client's figures are held against.

    python -m kvfs_tools.metadata_worker client SERVICE_SOCKET ECHO_SOCKET
    python -m kvfs_tools.metadata_worker echo ECHO_SOCKET

A client reads one JSON object a line from standard input, does what it says and answers with one:
begin and end (CLOCK_MONOTONIC, the same in every process), how many things were done, and the bytes
that one call sent and received. What is to be sent is made before the clock starts.
"""

from __future__ import annotations

import hashlib
import json
import random
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvfs_base import frames
from kvfs_base.frames import Kind
from kvfs_base.limits import BATCH_BLOCKS_MAX
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request
from kvfs_base.types import Address
from kvfs_metadata import messages as m
from kvfs_metadata.client import BlockingMetadataClient

FILE_MODE = 0o100644
BLOCK_BYTES = 1 << 20
ECHO_HEADER = struct.Struct("<II")
Prepared = tuple[Callable[[], int], Request | None]
"""What is timed, which answers how many things it did, and an example of its calls."""


def block_key(tag: str, number: int) -> bytes:
    return hashlib.sha256(f"{tag} {number}".encode()).digest()


def keys_of(tag: str, first: int, count: int) -> bytes:
    return b"".join(block_key(tag, number) for number in range(first, first + count))


def slices(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


class Worker:
    """The things a client can be told to do, by name. Each prepares, and answers what to time."""

    def __init__(self, service: str, echo: str) -> None:
        self._client = BlockingMetadataClient(os_env(), Address.unix(service), retry_seconds=30.0)
        self._echo_address = echo
        self._echo_socket: socket.socket | None = None
        self.last_reply: Any = None

    def _calls(self, requests: Sequence[Request], depth: int) -> Prepared:
        """One call a request, ``depth`` of them at a time in one write."""
        groups = slices(requests, depth)

        def run() -> int:
            for group in groups:
                self.last_reply = self._client.call_many(group)[-1]
            return len(requests)

        return run, requests[0] if requests else None

    def create(self, parent: int, prefix: str, first: int, count: int, depth: int) -> Prepared:
        return self._calls(
            [m.Make(parent, n, FILE_MODE) for n in names(prefix, first, count)], depth
        )

    def stat(self, parent: int, prefix: str, first: int, count: int, depth: int) -> Prepared:
        return self._calls([m.Lookup(parent, name) for name in names(prefix, first, count)], depth)

    def rename(self, parent: int, prefix: str, first: int, count: int, depth: int) -> Prepared:
        pairs = zip(names(prefix, first, count), names(f"{prefix}to-", first, count), strict=True)
        return self._calls([m.Rename(parent, old, parent, new) for old, new in pairs], depth)

    def unlink(self, parent: int, prefix: str, first: int, count: int, depth: int) -> Prepared:
        """Under the names that ``rename`` gave."""
        chosen = names(f"{prefix}to-", first, count)
        return self._calls([m.Unlink(parent, name) for name in chosen], depth)

    def readdir(self, inode: int) -> Prepared:
        def run() -> int:
            count, after, more = 0, b"", True
            while more:
                page = self._client.call(m.ReadDir(inode, after))
                count += len(page.entries)
                after, more = page.entries[-1][0], page.more
                if count == len(page.entries):
                    self.last_reply = page
            return count

        return run, m.ReadDir(inode)

    def match(
        self, *, namespace: int, tag: str, stored: int, size: int, count: int, seed: int
    ) -> Prepared:
        """``count`` prefixes of ``size`` keys, anywhere among the ``stored`` ones."""
        chance = random.Random(seed)
        places = [chance.randrange(max(1, stored - size)) for _ in range(count)]
        requests = [m.MatchBlocks(namespace, keys_of(tag, place, size)) for place in places]

        def run() -> int:
            for request in requests:
                self.last_reply = self._client.call(request)
                if self.last_reply != size:
                    raise RuntimeError(f"{self.last_reply} of {size} stored keys matched")
            return count * size

        return run, requests[0]

    def put(
        self, *, namespace: int, tag: str, first: int, count: int, batch: int, depth: int
    ) -> Prepared:
        """Prepares and commits ``count`` blocks in batches, ``depth`` batches at a time."""
        requests = []
        for start in range(first, first + count, batch):
            size = min(batch, first + count - start)
            keys = keys_of(tag, start, size)
            requests.append(m.PrepareBlocks(namespace, keys, (BLOCK_BYTES,) * size))
        groups = slices(requests, depth)

        def run() -> int:
            stored = 0
            for group in groups:
                commits = []
                for prepared in self._client.call_many(group):
                    new = sum(block is not None for block in prepared.blocks)
                    commits.append(m.CommitBlocks(prepared.batch_id, tuple(range(new))))
                    stored += new
                    self.last_reply = prepared
                self._client.call_many(commits)
            return stored

        return run, requests[0] if requests else None

    def remove(self, namespace: int, tag: str, first: int, count: int) -> Prepared:
        starts = range(first, first + count, BATCH_BLOCKS_MAX)
        sizes = [min(BATCH_BLOCKS_MAX, first + count - start) for start in starts]
        parts = [keys_of(tag, start, size) for start, size in zip(starts, sizes, strict=True)]
        return self._calls([m.RemoveBlocks(namespace, part) for part in parts], 1)

    def echo(self, sent: int, received: int, count: int, depth: int) -> Prepared:
        """The same exchange of bytes with a process that only answers."""
        if self._echo_socket is None:
            self._echo_socket = socket.socket(socket.AF_UNIX)
            self._echo_socket.connect(self._echo_address)
        link = self._echo_socket
        message = ECHO_HEADER.pack(sent, received) + bytes(sent)
        buffer = bytearray(received * depth)

        def run() -> int:
            for _ in range(count // depth):
                link.sendall(message * depth)
                view = memoryview(buffer)
                while view:
                    got = link.recv_into(view)
                    if not got:
                        raise RuntimeError("the echo process is gone")
                    view = view[got:]
            return count // depth * depth

        return run, None

    def carry_out(self, order: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(order)
        run, example = WORK[arguments.pop("do")](self, **arguments)
        begin = time.monotonic()
        count = run()
        end = time.monotonic()
        answer: dict[str, Any] = {"begin": begin, "end": end, "count": count}
        if example is not None:
            answer["sent"] = len(frames.encode(Kind.REQUEST, 1, example))
            answer["received"] = len(frames.encode(Kind.REPLY, 1, self.last_reply))
        return answer


WORK: dict[str, Callable[..., Prepared]] = {
    work.__name__: work
    for work in (
        Worker.create,
        Worker.stat,
        Worker.rename,
        Worker.unlink,
        Worker.readdir,
        Worker.match,
        Worker.put,
        Worker.remove,
        Worker.echo,
    )
}


def names(prefix: str, first: int, count: int) -> list[bytes]:
    return [b"%s%08d" % (prefix.encode(), number) for number in range(first, first + count)]


class Answerer:
    """One connection of the echo: bytes in, as many as were asked for out."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._data = bytearray()

    def arrived(self) -> bool:
        """False when the connection is over."""
        got = self._link.recv(256 * 1024)
        if not got:
            self._link.close()
            return False
        self._data += got
        answer = 0
        while len(self._data) >= ECHO_HEADER.size:
            sent, received = ECHO_HEADER.unpack_from(self._data)
            if len(self._data) < ECHO_HEADER.size + sent:
                break
            del self._data[: ECHO_HEADER.size + sent]
            answer += received
        if answer:
            self._link.sendall(bytes(answer))
        return True


def serve_echo(path: str) -> None:
    """Until standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listener:
                    link = listener.accept()[0]
                    waiting.register(link, selectors.EVENT_READ, Answerer(link))
                elif not key.data.arrived():
                    waiting.unregister(key.fileobj)


def main(role: str, *paths: str) -> None:
    if role == "echo":
        serve_echo(*paths)
        return
    worker = Worker(*paths)
    for line in sys.stdin:
        print(json.dumps(worker.carry_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
