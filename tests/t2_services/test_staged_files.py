"""Empty files that servers pass ahead, and what becomes of them."""

from __future__ import annotations

import dataclasses
import errno
import os
import select
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvfs_base.errors import (
    Conflict,
    ConnectionLost,
    DiskFull,
    InvalidRequest,
    NotSupported,
)
from kvfs_base.types import ChunkId, Layout
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.chunks.tree import drafts
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.client.routes import Route
from kvfs_datapath.client.staging import StagedFile
from kvfs_datapath.connections import DataConnection
from kvfs_datapath.format import directory_of
from kvfs_datapath.limits import STAGED_AHEAD
from t2_services.chunk_cluster import Cluster, running, wait_until

LAYOUT = Layout(1000, (1, 2, 3))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running("os", "local", tmp_path) as cluster:
        yield cluster


def new_file(client: ChunkClient, inode: int) -> StripedFile:
    return StripedFile(client, inode, LAYOUT, retry_seconds=5)


def taken(file: StripedFile) -> StagedFile:
    """The first call of a target only begins to fetch some."""
    found: list[StagedFile] = []

    def take() -> bool:
        one = file.stage()
        if one is not None:
            found.append(one)
        return one is not None

    wait_until(take)
    return found[0]


def staging(cluster: Cluster, number: int) -> list[str]:
    return drafts(cluster.disk(number))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as exc:
        assert exc.errno == errno.EBADF
        return False
    return True


def test_what_was_written_is_the_chunk(cluster: Cluster) -> None:
    file = new_file(cluster.client(), 7)
    staged = taken(file)
    os.pwrite(staged.fd, b"before", 0)
    file.adopt(staged)
    os.pwrite(staged.fd, b" and after", 6)
    other = new_file(cluster.client(), 7)
    assert other.read(0, 100, 16, False) == b"before and after"
    file.flush()
    store = cluster.servers[1]._targets.stores[0]
    assert not store.stat(ChunkId(7, 0)).is_sealed  # this descriptor may still be written to
    os.close(staged.fd)
    file.flush()
    info = store.stat(ChunkId(7, 0))
    assert (info.is_sealed, info.crc32c) == (True, crc32c(b"before and after"))
    file.sync()
    assert store.stat(ChunkId(7, 0)).durable


def test_adopting_without_a_thread_that_waits(cluster: Cluster) -> None:
    client = cluster.client()
    file, other = new_file(client, 7), new_file(client, 10)
    staged, another = taken(file), taken(other)
    wait_until(lambda: not staged.lane.lock.locked())  # some are fetched ahead
    os.write(staged.fd, b"bytes")
    adoption = file.begin_adopt(staged)
    assert adoption is not None
    assert other.begin_adopt(another) is None  # one conversation at a time
    assert select.select([adoption], [], [], 10)[0] == [adoption]
    adoption.finish()
    assert new_file(cluster.client(), 7).read(0, 5, 5, False) == b"bytes"
    wait_until(lambda: not staged.lane.lock.locked())
    again = file.begin_adopt(another)
    assert again is not None
    with pytest.raises(Conflict):
        again.finish()
    wait_until(lambda: not staged.lane.lock.locked())
    third = taken(other)
    given_up = other.begin_adopt(third)
    assert given_up is not None
    given_up.give_up()  # its answer would be taken for the next one's
    with pytest.raises(ConnectionLost):
        other.adopt(third)
    for one in (staged, another, third):
        os.close(one.fd)


def test_what_is_closed_together_is_sealed_with_one_request(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = cluster.client()
    begun: list[Callable[[], None]] = []
    sealed: list[int] = []
    seal_batch = client.staged._seal_batch

    def noted(route: Route, chunks: Sequence[ChunkId]) -> None:
        sealed.append(len(chunks))
        seal_batch(route, chunks)

    monkeypatch.setattr(client.staged, "_seal_batch", noted)
    monkeypatch.setattr(client.staged._sealer, "submit", begun.append)
    store = cluster.servers[1]._targets.stores[0]
    for inode in range(7, 10):
        file = new_file(client, inode)
        staged = taken(file)
        os.write(staged.fd, b"bytes")
        file.adopt(staged)
        assert file.close_soon(staged)
        os.close(staged.fd)
    assert not store.stat(ChunkId(7, 0)).is_sealed
    (seal,) = begun
    seal()
    assert sealed == [3]
    for inode in range(7, 10):
        assert store.stat(ChunkId(inode, 0)).crc32c == crc32c(b"bytes")


@pytest.mark.parametrize(("latest", "batches"), [(60.0, [3]), (0.0, [1])])
def test_sealing_waits_for_who_closes_more_for_a_while(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, latest: float, batches: list[int]
) -> None:
    client = cluster.client()
    staged = taken(new_file(client, 7))
    begun: list[Callable[[], None]] = []
    sealed: list[int] = []
    closed_meanwhile = iter((8, 9))

    def wait(seconds: float) -> bool:
        for inode in closed_meanwhile:
            client.staged.seal_soon(staged, ChunkId(inode, 0))
            break
        return False

    shared = dataclasses.replace(client.staged._shared, closed=SimpleNamespace(wait=wait))
    monkeypatch.setattr(client.staged, "_shared", shared)
    monkeypatch.setattr(client.staged, "_seal_batch", lambda _, chunks: sealed.append(len(chunks)))
    monkeypatch.setattr(client.staged._sealer, "submit", begun.append)
    monkeypatch.setattr("kvfs_datapath.client.staging.SEAL_LATEST_SECONDS", latest)
    client.staged.seal_soon(staged, ChunkId(7, 0))
    (seal,) = begun
    seal()
    assert sealed == batches


def test_a_file_of_more_chunks_is_not_closed_soon(cluster: Cluster) -> None:
    file = new_file(cluster.client(), 7)
    staged = taken(file)
    os.write(staged.fd, b"x" * 1500)
    file.adopt(staged)
    file.copy_from(staged.fd, 1000, 1500, 1 << 20)
    assert not file.close_soon(staged)
    os.close(staged.fd)
    file.close()
    store = cluster.servers[1]._targets.stores[0]
    assert store.stat(ChunkId(7, 0)).is_sealed


def test_more_are_fetched_before_they_run_out(cluster: Cluster) -> None:
    file = new_file(cluster.client(), 7)
    first = taken(file)
    rest = [taken(file) for _ in range(2 * STAGED_AHEAD)]
    assert len({os.fstat(one.fd).st_ino for one in (first, *rest)}) == 1 + len(rest)
    for one in (first, *rest):
        file.unstage(one)
    # No more are kept than are fetched ahead, and the others' files are gone.
    wait_until(lambda: len(staging(cluster, 1)) <= STAGED_AHEAD)
    assert sum(is_open(one.fd) for one in (first, *rest)) <= STAGED_AHEAD


def test_more_are_fetched_after_an_adoption(cluster: Cluster) -> None:
    """Not before it: who makes files one after the other would wait for them."""
    file = new_file(cluster.client(), 7)
    staged = taken(file)
    lane = staged.lane
    wait_until(lambda: not lane.filling and len(lane.ready) >= STAGED_AHEAD - 1)
    others = [taken(file) for _ in range(len(lane.ready) - STAGED_AHEAD // 4)]
    assert not lane.filling and len(lane.ready) == STAGED_AHEAD // 4
    file.adopt(staged)
    wait_until(lambda: len(lane.ready) == STAGED_AHEAD)
    for one in (staged, *others):
        os.close(one.fd)


def test_only_what_stayed_empty_is_used_again(cluster: Cluster) -> None:
    file = new_file(cluster.client(), 7)
    written, reserved, cut, clean = (taken(file) for _ in range(4))
    os.write(written.fd, b"x")
    os.posix_fallocate(reserved.fd, 0, 4096)
    os.write(cut.fd, b"x")
    os.ftruncate(cut.fd, 0)
    for one in (written, reserved, cut, clean):
        file.unstage(one)
    # What was cut off again has left nothing.
    assert [is_open(one.fd) for one in (written, reserved, cut, clean)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_server_that_was_restarted_has_forgotten_them(cluster: Cluster) -> None:
    client = cluster.client()
    file = new_file(client, 7)
    staged, kept = taken(file), taken(file)
    os.write(staged.fd, b"bytes")
    cluster.servers[1].stop()
    cluster.start_server(1)
    with pytest.raises(ConnectionLost):
        file.adopt(staged)
    assert not file.is_first(staged.fd)
    # Its descriptor is the caller's, who may copy.
    assert file.copy_from(staged.fd, 0, 5, 1 << 20) == 5
    assert new_file(cluster.client(), 7).read(0, 5, 5, False) == b"bytes"
    for one in (staged, kept):
        file.unstage(one)
        assert not is_open(one.fd)


def test_an_answer_that_was_lost_is_told_from_one_that_never_came(cluster: Cluster) -> None:
    file = new_file(cluster.client(), 7)
    staged = taken(file)
    file.adopt(staged)
    assert file.is_first(staged.fd)
    another = taken(file)
    assert not file.is_first(another.fd)
    with pytest.raises(Conflict):
        file.adopt(another)


def test_what_a_full_disk_has_used_up_is_copied_later(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = new_file(cluster.client(), 7)
    staged = taken(file)
    os.write(staged.fd, b"bytes")
    store = cluster.servers[1]._targets.stores[0]

    def full(*_: object) -> None:
        raise DiskFull(path="x")

    with monkeypatch.context() as patch:
        patch.setattr(store, "appear", full)
        with pytest.raises(DiskFull):
            file.adopt(staged)
    with pytest.raises(InvalidRequest):
        file.adopt(staged)
    assert not file.is_first(staged.fd)
    assert file.copy_from(staged.fd, 0, 5, 1 << 20) == 5
    assert file.read(0, 5, 5, False) == b"bytes"
    file.unstage(staged)


def test_chains_of_one_target_share_what_is_staged(cluster: Cluster) -> None:
    lane = taken(new_file(cluster.client(), 7)).lane
    wait_until(lambda: not lane.filling)
    for _ in range(2):  # nothing is asked for where all are there
        lane.fill()
        assert lane.usable and len(lane.ready) == STAGED_AHEAD


def test_there_are_none_where_descriptors_do_not_go(tmp_path: Path) -> None:
    with running("os", "tcp", tmp_path) as cluster:
        file = new_file(cluster.client(), 7)
        assert file.stage() is None
        lanes = cluster.clients[-1].staged
        lanes._pool.shutdown(wait=True)
        assert file.stage() is None and staging(cluster, 1) == []


def test_they_go_with_their_client(cluster: Cluster) -> None:
    client = cluster.client()
    taken(new_file(client, 7))
    assert staging(cluster, 1)
    client.close()
    wait_until(lambda: not staging(cluster, 1))


def test_a_copy_keeps_holes_and_stops_where_it_was_told(cluster: Cluster, tmp_path: Path) -> None:
    file = new_file(cluster.client(), 7)
    source = os.open(tmp_path / "source", os.O_CREAT | os.O_RDWR)
    os.pwrite(source, b"x" * 4096, 3 * 4096)
    os.ftruncate(source, 1 << 30)
    assert file.copy_from(source, 0, 1 << 30, 1 << 20) == 1 << 30
    assert file.read(3 * 4096 - 2, 6, 1 << 30, True) == b"\0\0xxxx"
    stored = [name for n in (1, 2, 3) for name in cluster.disk(n).list(directory_of(7))]
    assert len(stored) == 5  # bytes 12,288 to 16,383, in chunks of 1,000
    os.pwrite(source, b"y" * (5 << 20), 0)
    assert file.copy_from(source, 0, 5 << 20, 1 << 20) == 1 << 20
    os.close(source)


def test_a_second_copy_writes_what_differs_or_is_gone(cluster: Cluster, tmp_path: Path) -> None:
    file = new_file(cluster.client(), 7)
    source = os.open(tmp_path / "source", os.O_CREAT | os.O_RDWR)
    os.write(source, b"a" * 2500)

    def copy(known_end: int) -> list[tuple[int, int]]:
        written: list[tuple[int, int]] = []
        write = file.write

        def noted(offset: int, data: bytes) -> None:
            written.append((offset, len(data)))
            write(offset, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file, "write", noted)
            assert file.copy_from(source, 0, 2500, 1000, known_end=known_end) == 1000
            assert file.copy_from(source, 1000, 2500, 1 << 20, known_end=known_end) == 2500
        return written

    everything = [(0, 1000), (1000, 1500)]
    assert copy(0) == everything and copy(2500) == []
    os.pwrite(source, b"b", 1999)
    assert copy(2500) == [(1000, 1500)]
    file.truncate(2500, 500)  # by somebody else
    assert copy(2500) == everything and copy(2500) == []
    os.close(source)


def test_what_cannot_be_adopted(cluster: Cluster) -> None:
    connection = DataConnection(cluster.connection(1))
    reply, descriptors = connection.call_for_descriptors(m.StageChunks(1, 1), lambda _: 1)
    (token,) = reply.tokens
    with pytest.raises(NotSupported):
        connection.call(m.AdoptChunks(1, (m.Adopted(7, 0, 5, token),)))
    chunks = (m.Adopted(7, 0, 0, token), m.Adopted(8, 0, 0, token), m.Adopted(9, 0, 0, 4711))
    outcomes = connection.call(m.AdoptChunks(1, chunks))
    assert outcomes.infos[0].length == 0
    assert [type(outcomes.error(n)) for n in (1, 2)] == [InvalidRequest, InvalidRequest]
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)
