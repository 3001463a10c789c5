"""Blocks on chains of several copies: one pass from member to member."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    ConnectionLost,
    DiskFull,
    InvalidRequest,
    StaleChain,
    TargetFenced,
)
from kvfs_base.limits import MIB
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.chains import views as views_module
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.limits import FENCE_SECONDS
from t2_services.chain_cluster import CHAIN, ChainCluster, chains, new_block, only, payload
from t2_services.chunk_cluster import SECONDS, wait_until


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path) as cluster:
        yield cluster


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_a_block_that_goes_to_any_member_is_on_all(
    cluster: ChainCluster, order: tuple[int, ...]
) -> None:
    cluster.set_chain([1, 2, 3])
    blocks = {50: payload(3 * MIB + 17), 51: b"", 52: payload(4096)}
    assert cluster.put_blocks(order[0], order[1:], blocks) == [None] * 3
    for number in (1, 2, 3):
        for inode, data in blocks.items():
            assert cluster.get_block(number, inode, data) == data
        assert drafts(cluster.disk(number)) == []


def test_one_hop_and_none(cluster: ChainCluster) -> None:
    """As a writer does who has one member on his host and tells the others himself."""
    cluster.set_chain([1, 2, 3])
    data = payload(100_000)
    assert cluster.put_blocks(2, [], {50: data}) == [None]
    with pytest.raises(ChunkNotFound):
        cluster.get_block(1, 50, data)
    assert cluster.put_blocks(1, [3], {50: data}) == [None]
    assert [cluster.get_block(n, 50, data) for n in (1, 2, 3)] == [data] * 3


def test_a_syncing_member_gets_blocks_and_is_not_read(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2], syncing=[3])
    assert cluster.put_blocks(1, [2, 3], {50: b"bytes"}) == [None]
    assert cluster.store(3).stat(ChunkId(50, 0, CHAIN)).length == 5
    with pytest.raises(TargetFenced):
        cluster.get_block(3, 50, b"bytes")


@pytest.mark.parametrize("gone", [2, 3])
def test_a_hop_that_is_gone_is_an_error_of_every_block(cluster: ChainCluster, gone: int) -> None:
    cluster.set_chain([1, 2, 3])
    cluster.stop_server(gone)
    errors = cluster.put_blocks(1, [2, 3], {50: payload(2 * MIB), 51: b"x"})
    assert all(isinstance(error, ConnectionLost) for error in errors)
    assert cluster.store(1).stat(ChunkId(50, 0, CHAIN)).length == 2 * MIB


@pytest.mark.parametrize("full", [1, 2, 3])
def test_a_full_disk_anywhere_fails_the_blocks_that_do_not_fit(
    cluster: ChainCluster, full: int
) -> None:
    cluster.set_chain([1, 2, 3])
    disk = cluster.memory_disk(full)

    def refuse(operation: str, path: str) -> None:
        if operation == "pwritev" and path.startswith("staging/"):
            raise DiskFull(path=path)

    disk.before = refuse
    errors = cluster.put_blocks(1, [2, 3], {50: payload(MIB), 51: b""})
    disk.before = lambda operation, path: None
    assert isinstance(errors[0], DiskFull) and errors[1] is None
    assert cluster.put_blocks(1, [2, 3], {50: payload(MIB)}) == [None]


def test_a_byte_that_changes_on_the_way_is_found_by_every_member(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2, 3])
    data = payload(MIB)
    request = m.WriteChunks(1, (new_block(50, data),), cluster.passing(2, 3))
    outcomes = cluster.call(1, request, [data[:-1] + bytes([data[-1] ^ 1])])
    assert isinstance(outcomes.error(0), ChunkCorrupt)
    for number in (1, 2, 3):
        with pytest.raises(ChunkNotFound):
            cluster.get_block(number, 50, data)


def test_only_the_present_version_and_members_are_written_to(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    cluster.set_chain([1, 2, 3])
    with pytest.raises(StaleChain) as old:
        cluster.put_blocks(1, [2], {50: b"x"}, version=1)
    assert old.value.version == 2
    with pytest.raises(StaleChain):
        cluster.put_blocks(1, [2], {50: b"x"}, version=9)
    for hops in ([1], [2, 2], [4]):
        with pytest.raises(InvalidRequest):
            cluster.put_blocks(1, hops, {50: b"x"})
    with pytest.raises(InvalidRequest):
        cluster.call(1, m.WriteChunks(1, (new_block(50, b"x"),)), [b"x"])
    other = m.WholeChunk(50, 0, CHAIN + 1, 1, crc32c(b"x"), bytes(32))
    with pytest.raises(InvalidRequest):
        cluster.call(1, m.WriteChunks(1, (other,), cluster.passing(2, 3)), [b"x"])
    cluster.set_chain([1, 2])
    with pytest.raises(StaleChain):
        cluster.put_blocks(3, [1, 2], {50: b"x"})


def test_a_hop_that_knows_another_version_fails_the_block(cluster: ChainCluster) -> None:
    """The first one has not heard of it yet: its heartbeats go astray."""
    cluster.set_chain([1, 2, 3])
    views = cluster.servers[1]._chains.views
    learn, views.learn = views.learn, lambda *args: None  # type: ignore[method-assign]
    try:
        chain = cluster.metadata.set_chain(CHAIN, [1, 2])
        wait_until(lambda: cluster.knows(2, chain.version))
        errors = cluster.put_blocks(1, [2], {50: b"x"}, version=1)
        assert isinstance(errors[0], StaleChain)
    finally:
        views.learn = learn  # type: ignore[method-assign]


def test_a_newer_version_is_waited_for(
    cluster: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views_module, "VIEW_WAIT_SECONDS", SECONDS)
    cluster.set_chain([1, 2, 3])
    chain = cluster.metadata.set_chain(CHAIN, [1, 2])
    assert cluster.put_blocks(1, [2], {50: b"x"}, version=chain.version) == [None]


def test_without_a_lease_nothing_is_served(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2, 3])
    assert cluster.put_blocks(1, [2, 3], {50: b"bytes"}) == [None]
    cluster.metadata.stop()
    cluster.clock.advance(FENCE_SECONDS + 0.1)
    with pytest.raises(TargetFenced):
        cluster.get_block(1, 50, b"bytes")
    with pytest.raises(TargetFenced):
        cluster.put_blocks(1, [2, 3], {51: b"bytes"})
    cluster.metadata.start()
    wait_until(lambda: cluster.may_act(1))
    assert cluster.get_block(1, 50, b"bytes") == b"bytes"


def test_staged_files_are_published_on_their_chain(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    with pytest.raises(StaleChain):
        cluster.call(1, m.PublishChunks(1, (), (), cluster.passing(version=9)), kind="unix")
    item = m.StagedItem(1, new_block(50, b"x"))
    outcomes = cluster.call(1, m.PublishChunks(1, (item,), (), cluster.passing()), kind="unix")
    assert isinstance(outcomes.error(0), InvalidRequest), "nothing is staged as 1"


def test_chunks_of_chains_are_not_written_in_place(cluster: ChainCluster) -> None:
    cluster.set_chain([1, 2])
    ref = m.ChunkRef(7, 0, CHAIN)
    with pytest.raises(InvalidRequest):
        cluster.call(1, m.WritePieces(1, (m.Piece(*ref.chunk, 0, 1),)), [b"x"])
    with pytest.raises(InvalidRequest):
        cluster.call(1, m.SealChunks(1, (ref,)))
    with pytest.raises(InvalidRequest):
        cluster.call(1, m.TruncateChunks(1, (m.SizedChunk(*ref.chunk, 0),)))
    with pytest.raises(InvalidRequest):
        cluster.call(1, m.OpenForWrite(1, (ref,)), kind="unix")


def test_chunks_of_one_copy_need_no_lease(cluster: ChainCluster) -> None:
    new = m.WholeChunk(50, 0, 0, 5, crc32c(b"bytes"), bytes([1] * 32))
    cluster.metadata.stop()
    cluster.clock.advance(FENCE_SECONDS + 0.1)
    assert cluster.call(1, m.WriteChunks(1, (new,)), [b"bytes"]).error(0) is None
    assert only(cluster.call(1, m.StatChunks(1, (m.ChunkRef(50, 0, 0),)))).length == 5
    cluster.metadata.start()
