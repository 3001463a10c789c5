"""Whoever waits for a server that cannot be reached any more goes on soon; who waits for a slow one
waits."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import pytest

from chain_fakes import NEVER, SECONDS, FakeCluster, Fault, always, avoid_for_good, first
from kvfs_base.errors import ChunkPending, ConnectionLost, DeadlineExceeded, KvfsError
from kvfs_base.os_env import SystemClock
from kvfs_base.seams import Connection
from kvfs_base.testing import MemoryBlockingNetwork
from kvfs_base.types import Address, ChunkId, Layout
from kvfs_datapath import connections as connections_module
from kvfs_datapath import messages as m
from kvfs_datapath import watchdog as watchdog_module
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.files import StripedFile
from t2_services.chunk_cluster import make_writes, wait_until

CHAIN = 7


class Blackhole:
    """A network in memory in which addresses stop to answer: connections that are there stay, and
    nothing comes over them."""

    def __init__(self, network: MemoryBlockingNetwork) -> None:
        self._network = network
        self.gone: set[Address] = set()
        self.dialled: list[Address] = []

    def connect(self, address: Address, timeout: float) -> Connection:
        self.dialled.append(address)
        if address in self.gone:
            raise DeadlineExceeded(operation="connect", seconds=timeout)
        return self._network.connect(address, timeout)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    # Only the watchdog ends a wait: the deadlines are longer than any test.
    monkeypatch.setattr(connections_module, "DATA_SECONDS", 4 * SECONDS)
    monkeypatch.setattr(connections_module, "CALL_SECONDS", 4 * SECONDS)


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    cluster = FakeCluster(3)
    cluster.start()
    cluster.set_chain(CHAIN, [1, 2, 3])
    cluster.set_chain(4, [1], copies=1)
    yield cluster
    cluster.stop()


def client_of(cluster: FakeCluster) -> tuple[ChunkClient, Blackhole]:
    network = Blackhole(cluster.env.blocking_network)  # type: ignore[arg-type]
    client = ChunkClient(dataclasses.replace(cluster.env, blocking_network=network), cluster)
    cluster.clients.append(client)
    return client, network


def in_background(action: object) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(action())  # type: ignore[operator]
        except KvfsError as exc:
            results.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


@pytest.mark.parametrize("chain", [CHAIN, 4])
def test_a_put_does_not_wait_for_a_server_that_is_gone(cluster: FakeCluster, chain: int) -> None:
    client, network = client_of(cluster)
    silent = threading.Event()
    gone = cluster.servers[1]
    gone.script = always(Fault(wait=silent))
    writes = make_writes([5000] * 20, chains=[chain])
    thread, results = in_background(lambda: client.write_chunks(writes))
    wait_until(lambda: gone.requests)
    network.gone.add(gone.tcp)
    if chain == CHAIN:
        cluster.set_chain(CHAIN, [2, 3])
    thread.join(SECONDS)
    assert not thread.is_alive()
    (found,) = results
    if chain == CHAIN:
        assert found == [None] * 20
    else:
        assert {type(error) for error in found} == {ConnectionLost}  # type: ignore[attr-defined]
    silent.set()


def test_a_slow_disk_is_waited_for(cluster: FakeCluster) -> None:
    client, network = client_of(cluster)
    slow = cluster.servers[1]
    disk = threading.Event()
    slow.script = first(1, Fault(wait=disk), m.WriteChunks)
    writes = make_writes([5000], chains=[4])
    thread, results = in_background(lambda: client.write_chunks(writes))
    wait_until(lambda: network.dialled.count(slow.tcp) >= 4)  # it was looked after
    disk.set()
    thread.join(SECONDS)
    assert results == [[None]]
    assert len(slow.named(m.WriteChunks)) == 1


def test_a_write_to_a_head_that_is_gone_takes_another_way(cluster: FakeCluster) -> None:
    client, network = client_of(cluster)
    file = StripedFile(client, 9, Layout(1000, (CHAIN,)))
    file.write(0, b"x")
    head, silent = cluster.servers[1], threading.Event()
    head.script = always(Fault(wait=silent), m.UpdateChunks)
    network.gone.add(head.tcp)
    thread, results = in_background(lambda: file.write(0, b"y"))
    thread.join(SECONDS)
    assert results == [None]
    assert cluster.servers[3].chunks[ChunkId(9, 0, CHAIN)].data == b"y"
    silent.set()


def test_a_reader_does_not_wait_for_a_tail_that_is_gone(cluster: FakeCluster) -> None:
    """While the chunk is being written the others send him there, and he asks nobody else."""
    client, network = client_of(cluster)
    file = StripedFile(client, 9, Layout(1000, (CHAIN,)))
    file.write(0, b"x")
    tail, silent = cluster.servers[3], threading.Event()
    for number in (1, 2):
        cluster.servers[number].script = first(1, Fault(error=ChunkPending()), m.ReadPieces)
    tail.script = always(Fault(wait=silent), m.ReadPieces)
    thread, results = in_background(lambda: file.read(0, 1, 1, False))
    wait_until(lambda: tail.named(m.ReadPieces))
    network.gone.add(tail.tcp)
    thread.join(SECONDS)
    assert results == [b"x"]
    silent.set()


def test_nobody_is_looked_after_who_is_answered(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", NEVER)
    client, network = client_of(cluster)
    assert client.write_chunks(make_writes([5000] * 20, chains=[CHAIN])) == [None] * 20
    dialled = len(network.dialled)
    assert not client.pool._watchdog._watched
    assert client.write_chunks(make_writes([5000] * 20, chains=[CHAIN])) == [None] * 20
    assert len(network.dialled) <= dialled + 3
    client.close()
    assert client.pool._watchdog._thread is None


def test_one_that_is_gone_is_passed_over_by_the_next_put(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    avoid_for_good(monkeypatch)
    client, network = client_of(cluster)
    network.gone.add(cluster.servers[1].tcp)
    assert client.write_chunks(make_writes([5000] * 10, chains=[CHAIN])) == [None] * 10
    before = network.dialled.count(cluster.servers[1].tcp)
    for _ in range(5):
        assert client.write_chunks(make_writes([5000] * 10, chains=[CHAIN])) == [None] * 10
    assert network.dialled.count(cluster.servers[1].tcp) <= before + 2


def test_what_is_given_up_is_not_tried_on_another_connection(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was kept and is dead is tried once more; not one that cannot be reached."""
    network = Blackhole(cluster.env.blocking_network)  # type: ignore[arg-type]
    pool = connections_module.ConnectionPool(network, SystemClock())
    address = cluster.servers[1].tcp
    request = m.StatChunks(1, (m.ChunkRef(1, 0, CHAIN),))
    with contextlib.closing(pool):
        pool.run(address, lambda c: c.call(request))
        silent = threading.Event()
        cluster.servers[1].script = always(Fault(wait=silent))
        network.gone.add(address)
        with pytest.raises(ConnectionLost):
            pool.run(address, lambda c: c.call(request), watch=True)
        assert network.dialled.count(address) == 2, "the first one, and a look"
        silent.set()
