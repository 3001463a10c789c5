"""Chunks that nothing refers to, found by asking for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import ConnectionLost
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from t2_services.chain_cluster import CHAIN, ChainCluster, Cut, chains, wait_for_sync
from t2_services.chunk_cluster import wait_until

FOREVER = 1e6


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ChainCluster]:
    """Rounds come when a test wants them."""
    with chains(tmp_path, garbage_seconds=FOREVER) as cluster:
        yield cluster


def look(cluster: ChainCluster, number: int) -> None:
    cluster.servers[number]._chains._garbage._round()


def test_what_is_unwanted_twice_is_removed(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    for inode in (7, 8):
        for number in range(3):
            cluster.write(1, b"x", inode=inode, number=number, sequence=10 * inode + number)
    alone = m.WholeChunk(50, 0, 0, 1, crc32c(b"x"), bytes([1] * 32))
    kept = m.WholeChunk(51, 0, 0, 1, crc32c(b"x"), bytes([1] * 32))
    assert cluster.call(1, m.WriteChunks(1, (alone, kept)), [b"xx"]).errors == {}
    cluster.metadata.call_unwanted(CHAIN, 7)
    cluster.metadata.call_unwanted(0, 50)
    look(cluster, 1)
    assert len(list(cluster.store(1).list(CHAIN))) == 6
    look(cluster, 1)
    assert {c.inode for c in cluster.store(1).list(CHAIN)} == {8}
    assert [c.inode for c in cluster.store(1).list()] == [51]
    assert cluster.servers[1].statistics()["garbage_removed"] == 4
    assert len(list(cluster.store(2).list(CHAIN))) == 6, "each looks for itself"


def test_what_is_wanted_again_is_not(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    cluster.write(1, b"x", inode=7, sequence=1)
    cluster.metadata.call_unwanted(CHAIN, 7)
    look(cluster, 1)
    cluster.metadata._unwanted.clear()
    look(cluster, 1)
    cluster.metadata.call_unwanted(CHAIN, 7)
    look(cluster, 1)
    assert cluster.committed(1) is not None


def test_nothing_is_removed_of_a_chain_that_has_changed_meanwhile(cluster: ChainCluster) -> None:
    """The target was no member when it asked, and is brought in step now."""
    cluster.set_chain([1], offline=[2])
    cluster.set_chain([1, 2])
    cluster.write(1, b"x", sequence=1)
    garbage = cluster.servers[2]._chains._garbage
    store = cluster.store(2)
    garbage._remove(store, CHAIN, 7, version=1)
    assert store.stat(ChunkId(7, 0, CHAIN)).version == 1
    garbage._remove(store, CHAIN, 7, version=2)
    assert list(store.list(CHAIN)) == []


def test_rounds_come_by_themselves_and_survive_a_metadata_service_that_is_away(
    tmp_path: Path,
) -> None:
    with chains(tmp_path, garbage_seconds=0.02) as cluster:
        cluster.set_chain([1, 2])
        cluster.write(1, b"x", sequence=1)
        cluster.metadata.stop()
        cluster.metadata.call_unwanted(CHAIN, 7)
        cluster.metadata.start()
        for number in (1, 2):
            wait_until(lambda n=number: cluster.committed(n) is None)


def test_what_was_pending_of_a_chain_that_a_target_has_left_goes(cluster: ChainCluster) -> None:
    """Also what another process left: it has no chunk that could be found."""
    cluster.set_chain([1, 2])
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    cut.off(cluster.servers[2])
    with pytest.raises(ConnectionLost):
        cluster.write(1, b"never", sequence=1)
    cluster.stop_server(1)
    cut.on(cluster.servers[2])
    cluster.set_chain([2])
    cluster.start_server(1)
    assert list(cluster.store(1).versions.pendings(CHAIN)) == [ChunkId(7, 0, CHAIN)]
    wait_until(lambda: cluster.servers[1]._chains.views.has_left(cluster.store(1), CHAIN))
    look(cluster, 1)
    assert not list(cluster.store(1).versions.pendings(CHAIN))
    cluster.set_chain([2], syncing=[1])
    wait_for_sync(cluster, 1)
