"""Listing a target's chunks in order, and reading them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import ChunkCorrupt, ChunkNotFound
from kvfs_base.limits import LIST_CHUNKS_MAX
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.format import ATTRIBUTE, ChunkState, path_of
from t2_services.chunk_cluster import Cluster, make_writes, running


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running("os", "auto", tmp_path) as cluster:
        yield cluster


@pytest.fixture
def connection(cluster: Cluster) -> Iterator[DataConnection]:
    connection = DataConnection(cluster.connection(1, "unix"))
    yield connection
    connection.close()


def put(cluster: Cluster, sizes: list[int], first_inode: int = 1000) -> list[ChunkId]:
    writes = make_writes(sizes, first_inode, chains=(1,))
    assert cluster.client().write_chunks(writes) == [None] * len(sizes)
    return [write.chunk for write in writes]


def pages(connection: DataConnection, limit: int) -> Iterator[m.ChunkPage]:
    start: m.ChunkRef | None = m.ChunkRef(0, 0, 0)
    while start is not None:
        page: m.ChunkPage = connection.call(m.ListChunks(1, start, limit))
        yield page
        start = page.next


def patch(connection: DataConnection, chunk: ChunkId, data: bytes) -> None:
    piece = m.Piece(*chunk, 0, len(data))
    outcomes = connection.call(m.WritePieces(1, (piece,)), [data])
    assert outcomes.errors == {}


@pytest.mark.parametrize("limit", [1, 7, LIST_CHUNKS_MAX])
def test_all_chunks_come_in_order(cluster: Cluster, connection: DataConnection, limit: int) -> None:
    chunks = put(cluster, [100] * 40)
    for number in (3, 0, 1 << 31):  # chunks of a file, numbers of any size
        patch(connection, ChunkId(1010, number) if number else ChunkId(5, 0), b"data")
    expected = sorted([*chunks, ChunkId(5, 0), ChunkId(1010, 3), ChunkId(1010, 1 << 31)])
    found = list(pages(connection, limit))
    assert [chunk.chunk for page in found for chunk in page.chunks] == expected
    assert all(len(page.chunks) <= limit for page in found)
    infos = {chunk.chunk: chunk.info for page in found for chunk in page.chunks}
    sealed, opened = infos[chunks[0]], infos[ChunkId(5, 0)]
    assert sealed is not None and sealed.is_sealed and sealed.length == 100 and sealed.key
    assert opened is not None and opened.state is ChunkState.OPEN and opened.length == 4


def test_an_empty_target_has_an_empty_page(connection: DataConnection) -> None:
    assert list(pages(connection, 10)) == [m.ChunkPage((), None)]


def test_what_goes_is_left_out_and_the_rest_still_comes(
    cluster: Cluster, connection: DataConnection
) -> None:
    chunks = put(cluster, [10] * 20)
    found = []
    for place, page in enumerate(pages(connection, 4)):
        found += [chunk.chunk for chunk in page.chunks]
        if place == 0:
            for chunk in chunks[6:14]:
                connection.call(m.RemoveRange(1, chunk.inode, 0, 1))
            put(cluster, [10] * 2, first_inode=500)
    assert found == chunks[:6] + chunks[14:]


def test_two_listings_on_one_connection_begin_anew(
    cluster: Cluster, connection: DataConnection
) -> None:
    chunks = put(cluster, [10] * 6)
    first = connection.call(m.ListChunks(1, m.ChunkRef(0, 0, 0), 2))
    again = connection.call(m.ListChunks(1, m.ChunkRef(0, 0, 0), 2))
    assert first == again
    middle = connection.call(m.ListChunks(1, m.ChunkRef(*chunks[4]), 2))
    assert [chunk.chunk for chunk in middle.chunks] == chunks[4:]
    assert middle.next is None


def test_a_damaged_attribute_is_listed_as_such(
    cluster: Cluster, connection: DataConnection
) -> None:
    good, bad, cut = put(cluster, [10] * 3)
    disk = cluster.disk(1)
    file = disk.open(path_of(bad), write=True)
    file.set_attribute(ATTRIBUTE, b"KVFC\x01\x00nonsense")
    file.close()
    file = disk.open(path_of(cut), write=True)
    file.truncate(9)
    file.close()
    (page,) = pages(connection, 10)
    problems = {chunk.chunk: chunk.problem for chunk in page.chunks if chunk.info is None}
    assert problems == {
        bad: "chunk attribute is damaged",
        cut: "9 bytes on disk, 10 expected",
    }
    assert [chunk.chunk for chunk in page.chunks if chunk.info is not None] == [good]


@pytest.mark.parametrize("size", [10, 4096, (3 << 20) + 5])
def test_chunks_are_read_again_even_if_they_were_verified(
    cluster: Cluster, connection: DataConnection, size: int
) -> None:
    good, bad, gone = put(cluster, [size] * 3)
    refs = tuple(m.ChunkRef(*chunk) for chunk in (good, bad, gone))
    for chunk in (good, bad):
        view = memoryview(bytearray(10))
        request = m.ReadPieces(1, (m.Piece(*chunk, 0, 10),))
        connection.call(request, into=lambda _, v=view: [v])  # type: ignore[misc]
    assert connection.call(m.CheckChunks(1, refs)).errors == {}
    file = cluster.disk(1).open(path_of(bad), write=True)
    file.pwritev([b"\xff\x00\xff"], size - 3)
    file.close()
    connection.call(m.RemoveRange(1, gone.inode, 0, 1))
    outcomes = connection.call(m.CheckChunks(1, refs))
    assert isinstance(outcomes.error(1), ChunkCorrupt)
    assert isinstance(outcomes.error(2), ChunkNotFound)
    assert outcomes.error(0) is None and outcomes.infos[0].length == size


def test_an_open_chunk_has_nothing_to_compare_with(
    cluster: Cluster, connection: DataConnection
) -> None:
    patch(connection, ChunkId(7, 0), b"half of")
    outcomes = connection.call(m.CheckChunks(1, (m.ChunkRef(7, 0, 0),)))
    assert outcomes.errors == {}
    assert not outcomes.infos[0].is_sealed
