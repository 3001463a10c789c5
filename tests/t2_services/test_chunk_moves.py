"""What a chunk server does when chunks come that are moved (docs/design/0006-moves.md)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvfs_base.errors import ChunkCorrupt, Conflict, InodeStale, InvalidRequest
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.leaving import Leaving
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.connections import DataConnection
from t2_services.chunk_cluster import SECONDS, Cluster, running

SOURCE, INODE = 9, 70


@pytest.fixture(params=["cache", "strict"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with running("os", "auto", tmp_path, durability=request.param) as cluster:
        yield cluster


def call(cluster: Cluster, request: Any, payload: Sequence[bytes] = ()) -> Any:
    connection = cluster.connection(1)
    try:
        data = DataConnection(connection)
        data.set_timeout(SECONDS)
        return data.call(request, payload)
    finally:
        connection.close()


def store(cluster: Cluster) -> ChunkStore:
    (found,) = cluster.servers[1]._targets.stores
    return found


def place(
    cluster: Cluster, number: int, data: bytes, *, ticket: int = 5, **fields: Any
) -> m.Outcomes:
    new = m.WholeChunk(INODE, number, 0, len(data), fields.pop("crc32c", crc32c(data)), b"")
    outcomes: m.Outcomes = call(cluster, m.PlaceMoved(1, SOURCE, ticket, new, **fields), [data])
    return outcomes


def compare(
    cluster: Cluster,
    held: dict[int, bytes],
    *,
    ticket: int = 5,
    places: tuple[int, ...] = (0, 2),
    start: int = 0,
    end: int = 100,
) -> tuple[int, ...]:
    """With a file that is striped over three chains; the numbers that are wanted."""
    chunks = [m.HeldChunk(number, len(data), crc32c(data)) for number, data in held.items()]
    request = m.CompareMoved(1, SOURCE, ticket, INODE, 3, places, start, end, tuple(chunks))
    wanted: m.Wanted = call(cluster, request)
    return tuple(chunks[index].number for index in wanted.places)


def content(cluster: Cluster) -> dict[int, bytes]:
    found = {}
    for chunk in store(cluster).list():
        file, info = store(cluster).open(chunk)
        view = memoryview(bytearray(info.length))
        file.preadv([view], 0)
        file.close()
        found[chunk.number] = bytes(view)
    return found


def test_a_file_comes_chunk_by_chunk(cluster: Cluster) -> None:
    source = {0: b"zero", 2: b"", 3: b"three" * 50_000}
    assert compare(cluster, source) == (0, 2, 3)
    for number, data in source.items():
        assert place(cluster, number, data).errors == {}
    assert content(cluster) == source
    info = store(cluster).stat(ChunkId(INODE, 3))
    assert (info.is_sealed, info.key, info.durable) == (True, b"", False)
    assert compare(cluster, source) == ()


def test_what_the_source_does_not_have_goes(cluster: Cluster) -> None:
    """A left-over in the place of a hole would be other bytes. Chunks in other places are the
    file's own here, and those of another page are not spoken of."""
    for number in (0, 1, 2, 3, 6, 9):
        place(cluster, number, b"old")
    assert compare(cluster, {0: b"old", 3: b"new"}, start=0, end=9) == (3,)
    assert content(cluster).keys() == {0, 1, 9}
    assert compare(cluster, {}, start=9, end=10) == ()
    assert content(cluster).keys() == {0, 1}


def test_a_mover_that_was_overtaken_changes_nothing(cluster: Cluster) -> None:
    place(cluster, 0, b"new", ticket=7)
    with pytest.raises(Conflict):
        compare(cluster, {}, ticket=6)
    outcomes = place(cluster, 0, b"old", ticket=6)
    assert isinstance(outcomes.error(0), Conflict)
    assert content(cluster) == {0: b"new"}
    assert drafts(cluster.disk(1)) == []
    other = m.WholeChunk(INODE + 1, 0, 0, 3, crc32c(b"two"), b"")
    assert call(cluster, m.PlaceMoved(1, SOURCE + 1, 1, other), [b"two"]).errors == {}


def test_a_chunk_that_was_on_its_way_when_the_next_round_began(cluster: Cluster) -> None:
    """It came whole before, and would get its name after the comparison."""
    arrived, go_on = threading.Event(), threading.Event()
    round_ = store(cluster).incoming.round

    def wait(source: int, ticket: int) -> Any:
        if ticket == 5:
            arrived.set()
            assert go_on.wait(SECONDS)
        return round_(source, ticket)

    store(cluster).incoming.round = wait  # type: ignore[method-assign]
    late: list[m.Outcomes] = []
    thread = threading.Thread(target=lambda: late.append(place(cluster, 0, b"late")))
    thread.start()
    assert arrived.wait(SECONDS)
    assert compare(cluster, {}, ticket=6) == ()
    go_on.set()
    thread.join(SECONDS)
    assert isinstance(late[0].error(0), Conflict)
    assert content(cluster) == {}


def test_bytes_are_checked(cluster: Cluster) -> None:
    assert isinstance(place(cluster, 0, b"data", crc32c=1).error(0), ChunkCorrupt)
    assert content(cluster) == {}
    assert drafts(cluster.disk(1)) == []
    with pytest.raises(InvalidRequest):
        call(cluster, m.PlaceMoved(1, SOURCE, 5, m.WholeChunk(1, 0, 0, 9, 0, b"")), [b"short"])


def test_what_was_synced_there_is_durable_here(cluster: Cluster) -> None:
    place(cluster, 0, b"data", durable=True)
    assert store(cluster).stat(ChunkId(INODE, 0)).durable


def test_garbage_that_has_come_again_is_not_removed(cluster: Cluster) -> None:
    """The question was asked before its move began."""
    garbage = cluster.servers[1]._chains._garbage
    place(cluster, 0, b"left over")
    came = store(cluster).incoming.watch()
    assert compare(cluster, {0: b"left over"}, ticket=8) == ()
    garbage._remove(store(cluster), 0, INODE, 0, came)
    assert content(cluster) == {0: b"left over"}
    came = store(cluster).incoming.watch()
    place(cluster, 0, b"other", ticket=8)
    garbage._remove(store(cluster), 0, INODE, 0, came)
    assert content(cluster) == {0: b"other"}
    garbage._remove(store(cluster), 0, INODE, 0, store(cluster).incoming.watch())
    assert content(cluster) == {}


@pytest.mark.parametrize("again", [False, True])
def test_rounds_of_the_collector_watch(cluster: Cluster, again: bool) -> None:
    garbage = cluster.servers[1]._chains._garbage
    place(cluster, 0, b"left over")
    cluster.metadata.call_unwanted(0, INODE)
    garbage._round()
    call_metadata = garbage._rpc.call

    def call_slowly(*arguments: Any) -> Any:
        answer = call_metadata(*arguments)
        if again:
            place(cluster, 0, b"moved here", ticket=8)
        return answer

    garbage._rpc.call = call_slowly  # type: ignore[method-assign]
    garbage._round()
    assert content(cluster) == ({0: b"moved here"} if again else {})


# --- files that leave


def outcome(cluster: Cluster, request: Any, payload: Sequence[bytes] = ()) -> Any:
    """The error of a request for one item, or None."""
    found: m.Outcomes = call(cluster, request, payload)
    return found.error(0)


def test_what_has_left_is_neither_written_nor_taken_for_a_hole(cluster: Cluster) -> None:
    """By a client that does not know that its session is over."""
    place(cluster, 0, b"here")
    leaving = store(cluster).leaving
    leaving.is_wanted = lambda inode: False
    assert leaving.hold(INODE)
    leaving.decide(INODE, left=True)
    store(cluster).remove(ChunkId(INODE, 0))
    piece = m.Piece(INODE, 0, 0, 0, 3)
    assert isinstance(outcome(cluster, m.WritePieces(1, (piece,)), [b"new"]), InodeStale)
    cut = m.TruncateChunks(1, (m.SizedChunk(INODE, 0, 0, 1),))
    assert isinstance(outcome(cluster, cut), InodeStale)
    for summed in (False, True):
        assert isinstance(outcome(cluster, m.ReadPieces(1, (piece,), summed=summed)), InodeStale)
    for request in (m.FindChunks(1, INODE, 0, 9), m.RemoveRange(1, INODE, 0, 9)):
        with pytest.raises(InodeStale):
            call(cluster, request)
    for opening in (m.OpenForWrite, m.OpenChunks):
        assert isinstance(outcome(cluster, opening(1, (m.ChunkRef(INODE, 0, 0),))), InodeStale)
    assert content(cluster) == {}
    assert compare(cluster, {0: b"back"}) == (0,), "it may come back"
    place(cluster, 0, b"back")
    assert outcome(cluster, m.WritePieces(1, (piece,)), [b"new"]) is None
    assert content(cluster) == {0: b"newk"}


@pytest.mark.parametrize("left", [False, True])
def test_a_write_waits_while_a_move_ends(cluster: Cluster, left: bool) -> None:
    place(cluster, 0, b"here")
    leaving = store(cluster).leaving
    leaving.is_wanted = lambda inode: False
    assert leaving.hold(INODE)
    errors: list[Any] = []
    piece = m.Piece(INODE, 0, 0, 0, 3)
    writer = threading.Thread(
        target=lambda: errors.append(outcome(cluster, m.WritePieces(1, (piece,)), [b"new"]))
    )
    writer.start()
    writer.join(0.1)
    assert writer.is_alive() and content(cluster) == {0: b"here"}
    assert leaving.held() == [INODE]
    leaving.decide(INODE, left=left)
    writer.join(SECONDS)
    assert [type(error) for error in errors] == [InodeStale if left else type(None)]
    assert content(cluster) == {0: b"here" if left else b"newe"}


def test_a_move_does_not_end_while_a_write_is_at_work(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_datapath.chunks.leaving.CHUNK_LOCK_SECONDS", 0.01)
    leaving = store(cluster).leaving
    with leaving.changing(INODE):
        assert not leaving.hold(INODE)
    assert leaving.held() == [] and leaving.hold(INODE)


def test_what_came_again_before_it_was_known_to_have_left(cluster: Cluster) -> None:
    leaving = store(cluster).leaving
    assert leaving.hold(INODE)
    place(cluster, 0, b"back")
    assert compare(cluster, {0: b"back"}) == ()
    leaving.decide(INODE, left=True)
    piece = m.Piece(INODE, 0, 0, 0, 3)
    assert outcome(cluster, m.WritePieces(1, (piece,)), [b"new"]) is None


def test_a_file_that_came_back_without_a_chunk_is_taken() -> None:
    """The metadata service gives places without chunks to other targets by itself."""
    leaving = Leaving()
    asked: list[int] = []
    assert leaving.hold(7)
    leaving.decide(7, left=True)
    with pytest.raises(InodeStale), leaving.changing(7):
        pass

    def came_back(inode: int) -> bool:
        asked.append(inode)
        return True

    leaving.is_wanted = came_back
    with leaving.changing(7):
        pass
    leaving.require_here(7)
    assert asked == [7], "it is asked once"
    assert leaving.hold(7)
    leaving.decide(7, left=True)

    def leaves_again(inode: int) -> bool:
        assert leaving.hold(inode)
        leaving.decide(inode, left=True)
        return True

    leaving.is_wanted = leaves_again
    with pytest.raises(InodeStale):
        leaving.require_here(7)
