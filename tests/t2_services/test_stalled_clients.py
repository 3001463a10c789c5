"""A thousand clients that stand still cost a chunk server little memory, and others nothing.

KVFS_STALLED_CLIENTS: how many; 300 by default, 1,000 are as many as a server takes beside others.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs_base import frames
from kvfs_base.frames import Kind
from kvfs_base.limits import (
    CONNECTIONS_MAX,
    KIB,
    MIB,
)
from kvfs_base.types import Address
from kvfs_datapath import messages as m
from kvfs_datapath.client.chunk_client import ChunkWrite
from kvfs_datapath.limits import SERVER_BUFFERS, STALL_SECONDS
from t2_services.chunk_cluster import (
    SECONDS,
    Cluster,
    assert_equal,
    make_writes,
    reads_of,
    running,
    wait_until,
)

STALLED = min(int(os.environ.get("KVFS_STALLED_CLIENTS", "300")), CONNECTIONS_MAX - 24)
GROWTH_BYTES_EACH = 64 * KIB
"""What a thread touches of its stack, and its objects; measured: 30 KiB."""
BLOCK_BYTES = 4 * MIB

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running("os", "tcp", tmp_path) as cluster:
        yield cluster


def resident_bytes() -> int:
    """Of this process, where the servers are threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def dial(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
    sock.settimeout(SECONDS)
    sock.connect((address.host, address.port))
    return sock


def silent(sock: socket.socket, block: ChunkWrite) -> None:
    """Connected, and nothing else."""


def half_a_request(sock: socket.socket, block: ChunkWrite) -> None:
    request = m.ReadChunks(1, (block.message(),) * 50)
    frame = frames.encode(Kind.REQUEST, 1, request)
    sock.sendall(frame[: len(frame) // 2])


def answer_unread(sock: socket.socket, block: ChunkWrite) -> None:
    """More than what fits into the sockets' buffers."""
    request = m.ReadChunks(1, (block.message(),) * 20)
    sock.sendall(frames.encode(Kind.REQUEST, 1, request))


def half_a_payload(sock: socket.socket, block: ChunkWrite) -> None:
    request = m.WriteChunks(1, (m.WholeChunk(99, 0, 0, 8 * MIB, 0, bytes(32)),))
    sock.sendall(frames.encode(Kind.REQUEST, 1, request, 8 * MIB) + bytes(1000))


KINDS: tuple[Callable[[socket.socket, ChunkWrite], None], ...] = (
    silent,
    half_a_request,
    answer_unread,
)


def test_stalled_clients_cost_little_and_nobody_waits_for_them(cluster: Cluster) -> None:
    client = cluster.client()
    (block,) = make_writes([BLOCK_BYTES], chains=[1])
    assert client.write_chunks([block]) == [None]

    def work(first_inode: int) -> None:
        """What others do meanwhile: nobody is to wait until one of the stalled is given up."""
        writes = make_writes([64 * KIB, MIB], first_inode=first_inode, chains=[1])
        done = threading.Event()

        def run() -> None:
            assert client.write_chunks(writes) == [None] * 2
            reads = reads_of([*writes, block])
            assert client.read_chunks(reads) == [None] * 3
            assert_equal(reads, [*writes, block])
            done.set()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(STALL_SECONDS - 2)
        assert done.is_set()

    server = cluster.servers[1]
    (address,) = (a for a in server.addresses if a.kind == "tcp")
    for round_number in range(3):
        work(10_000 + 10 * round_number)
    before = resident_bytes()
    with contextlib.ExitStack() as stack:
        for number in range(STALLED):
            sock = stack.enter_context(contextlib.closing(dial(address)))
            KINDS[number % len(KINDS)](sock, block)
        for _ in range(SERVER_BUFFERS // 2):
            half_a_payload(stack.enter_context(contextlib.closing(dial(address))), block)
        wait_until(lambda: server.statistics()["connections"] >= STALLED)
        for round_number in range(3):
            work(20_000 + 10 * round_number)
        growth = resident_bytes() - before
        # Buffers are kept once they were made: as many as there may be at most.
        buffers = SERVER_BUFFERS * 8 * MIB
        assert growth < STALLED * GROWTH_BYTES_EACH + buffers
        assert server.statistics()["connections_refused"] == 0
    wait_until(lambda: server.statistics()["connections"] < STALLED // 2)
    work(30_000)
    print(f"{STALLED} stalled clients: {growth / MIB:.1f} MiB more")
