"""Clients that cannot reach a chain's head, or members that cannot reach each other: others can."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chain_fakes import FakeCluster, Fault, always
from kvfs_base.errors import ConnectionLost, StaleChain
from kvfs_base.seams import Connection
from kvfs_base.testing import MemoryBlockingNetwork
from kvfs_base.types import Address, ChunkId, Layout
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.files import StripedFile
from t2_services.chain_cluster import CHAIN, ChainCluster, Cut, chains, only, payload
from t2_services.chunk_cluster import make_writes, wait_until

LAYOUT = Layout(1000, (CHAIN,))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path) as cluster:
        cluster.set_chain([1, 2, 3])
        for number in cluster.servers:
            wait_until(lambda n=number: cluster.may_act(n))
        yield cluster


class PartlyCut:
    """A network in memory without the way to some addresses, for one client."""

    def __init__(self, network: MemoryBlockingNetwork) -> None:
        self._network = network
        self.cut: set[Address] = set()

    def connect(self, address: Address, timeout: float) -> Connection:
        if address in self.cut:
            raise ConnectionLost(address=str(address), detail="cut")
        return self._network.connect(address, timeout)


def cut_off_client(cluster: ChainCluster, *numbers: int) -> tuple[Any, PartlyCut]:
    """A client that cannot reach the targets; everybody else can."""
    client = cluster.client("tcp")
    network = PartlyCut(cluster.env.blocking_network)  # type: ignore[arg-type]
    for number in numbers:
        network.cut.update(cluster.servers[number].addresses)
    client.pool._network = network  # type: ignore[assignment]
    return client, network


def relayed(cluster: ChainCluster) -> int:
    return sum(s.statistics()["requests_relayed"] for s in cluster.servers.values())


def test_a_client_that_cannot_reach_the_head_writes_all_the_same(cluster: ChainCluster) -> None:
    client, network = cut_off_client(cluster, 1)
    with contextlib.closing(StripedFile(client, 7, LAYOUT)) as file:
        data = os.urandom(2500)
        file.write(0, data)
        file.sync()
        assert all(info.durable for n in (1, 2, 3) if (info := cluster.committed(n)) is not None)
        file.write(100, b"over")
        file.truncate(2500, 1800)
        want = data[:100] + b"over" + data[104:1800]
        assert file.read(0, 1800, 1800, False) == want
        for number in (1, 2, 3):
            assert cluster.read(number, chunk=0) == want[:1000]
            assert cluster.read(number, chunk=1) == want[1000:]
            assert cluster.read(number, chunk=2) == b""
        before = relayed(cluster)
        assert before >= 4
        network.cut.clear()
        client.shared.health.answered(1)
        file.write(0, b"direct")
        assert relayed(cluster) == before


def test_a_head_that_failed_lately_is_not_asked_first(cluster: ChainCluster) -> None:
    """Or each write waited for it anew."""
    client, network = cut_off_client(cluster, 1)
    dialled: list[Address] = []
    connect = network.connect

    def counting(address: Address, timeout: float) -> Connection:
        dialled.append(address)
        return connect(address, timeout)

    network.connect = counting  # type: ignore[method-assign]
    with contextlib.closing(StripedFile(client, 7, LAYOUT)) as file:
        for number in range(10):
            file.write(number, b"x")
    assert sum(address in network.cut for address in dialled) <= 2


def test_a_relayed_update_is_done_once(cluster: ChainCluster) -> None:
    """The direct way lost the answer only: the head knows the number."""
    update = m.Update(7, 0, 0, 3, crc32c(b"one"), 5, 1, base=0)
    assert only(cluster.update(1, update, data=[b"one"])).version == 1
    again = m.Update(7, 0, 0, 3, crc32c(b"one"), 5, 1, again=True, base=0)
    for through in (2, 3):
        request = m.UpdateChunks(through, cluster.passing(), (again,), m.Onward(1, 20))
        assert only(cluster.call(through, request, [b"one"])).version == 1
    assert cluster.read(1) == b"one"


def test_only_members_relay_and_only_to_the_head(cluster: ChainCluster) -> None:
    """And once: what was passed on is not passed on again."""
    update = m.Update(7, 0, 0, 3, crc32c(b"one"), 5, 1, base=0)
    for asked, head, version in ((2, 3, None), (1, 1, None), (2, 1, 0)):
        passing = cluster.passing(version=version)
        request = m.UpdateChunks(asked, passing, (update,), m.Onward(head, 20))
        with pytest.raises(StaleChain):
            cluster.call(asked, request, [b"one"])
    cluster.set_chain([1, 2])
    request = m.UpdateChunks(3, cluster.passing(), (update,), m.Onward(1, 20))
    with pytest.raises(StaleChain):
        cluster.call(3, request, [b"one"])
    assert cluster.committed(1) is None


def test_a_head_that_nobody_reaches_is_not_known_to_have_done_anything(
    cluster: ChainCluster,
) -> None:
    data = payload(3)
    update = m.Update(7, 0, 0, 3, crc32c(data), 5, 1, base=0)
    Cut(cluster.env.blocking_network).off(cluster.servers[1])  # type: ignore[arg-type]
    requests: list[tuple[Any, list[bytes]]] = [
        (m.UpdateChunks(2, cluster.passing(), (update, update), m.Onward(1, 20)), [data, data]),
        (m.SyncChunks(2, (m.ChunkRef(7, 0, CHAIN),), cluster.passing(), m.Onward(1, 20)), []),
        (m.RemoveRange(2, 7, 0, 1, 1, cluster.passing(), 2, m.Onward(1, 20)), []),
    ]
    for request, sent in requests:
        outcomes = cluster.call(2, request, sent)
        assert outcomes.errors
        for index in outcomes.errors:
            assert isinstance(outcomes.error(index), ConnectionLost)


def test_members_that_cannot_reach_each_other_get_blocks_all_the_same() -> None:
    """Every order in which 1 passes to 3 fails, for as long as the cut lasts."""
    cluster = FakeCluster(3)
    cluster.start()
    try:
        cluster.set_chain(CHAIN, [1, 2, 3])
        servers = cluster.servers

        def cut(request: m.ChunkRequest) -> Fault | None:
            passing = getattr(request, "passing", None)
            return Fault(error=ConnectionLost()) if passing and passing.hops else None

        for number in (1, 2, 3):
            servers[number].script = cut
        writes = make_writes([5000] * 4, chains=[CHAIN])
        assert cluster.client().write_chunks(writes) == [None] * 4
        for write in writes:
            found = [
                stored for _, stored in cluster.everywhere(ChunkId(write.chunk.inode, 0, CHAIN))
            ]
            assert all(s is not None and s.data == write.view[: write.size] for s in found)
    finally:
        cluster.stop()


def test_a_block_finds_a_way_where_client_and_members_see_different_ones() -> None:
    """The client cannot reach 3, and 1 cannot: 2 can."""
    cluster = FakeCluster(3)
    cluster.start()
    try:
        cluster.set_chain(CHAIN, [1, 2, 3])
        servers = cluster.servers
        servers[3].script = always(Fault(lose=True))

        def only_by_two(request: m.ChunkRequest) -> Fault | None:
            hops = request.passing.hops
            return Fault(error=ConnectionLost()) if hops[:1] == (3,) else None

        servers[1].script = only_by_two
        writes = make_writes([5000] * 12, chains=[CHAIN])
        assert cluster.client().write_chunks(writes) == [None] * 12
    finally:
        cluster.stop()
