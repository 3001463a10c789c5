"""Updates that stay pending at a member: it cannot know whether those behind have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvfs_base.errors import ChunkPending, ConnectionLost
from kvfs_base.seams import Connection
from kvfs_base.types import Address, ChunkId
from kvfs_datapath.limits import SUSPECT_SECONDS
from t2_services.chain_cluster import CHAIN, ChainCluster, Cut, answers_get_lost, chains, quiet
from t2_services.chunk_cluster import wait_until

CHUNK = ChunkId(7, 0, CHAIN)


@pytest.fixture(params=["cache", "strict"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path, durability=request.param) as cluster:
        yield cluster


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path) as cluster:
        yield cluster


def everywhere(cluster: ChainCluster, *members: int) -> set[bytes]:
    return {cluster.read(number) for number in members}


def test_a_reader_never_sees_what_is_not_committed_everywhere_behind(
    cluster: ChainCluster,
) -> None:
    cluster.set_chain([1, 2, 3])
    cluster.write(1, b"old", sequence=1)
    with answers_get_lost(cluster, 1):
        with pytest.raises(ConnectionLost):
            cluster.write(1, b"new", sequence=2)
        assert cluster.read(2) == cluster.read(3) == b"new"
        with pytest.raises(ChunkPending):
            cluster.read(1)
        with pytest.raises(ChunkPending):
            cluster.stat(1, CHUNK)
        # It stays pending however often it is tried, and holds up others of this chunk only.
        with pytest.raises(ConnectionLost):
            cluster.write(1, b"other", writer=2, sequence=1)
    wait_until(quiet(cluster, 1, 2, 3))
    assert everywhere(cluster, 1, 2, 3) == {b"new"}
    assert cluster.write(1, b"new", sequence=2, again=True, base=1).version == 2


def test_the_first_version_of_a_chunk_is_pending_too(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2])
    with answers_get_lost(lazy, 1):
        with pytest.raises(ConnectionLost):
            lazy.write(1, b"new", sequence=1)
        with pytest.raises(ChunkPending):
            lazy.read(1)
    wait_until(quiet(lazy, 1, 2))
    assert lazy.read(1) == b"new"


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("gone", [2, 3])
def test_a_member_that_is_lost_behind(cluster: ChainCluster, gone: int, offset: int) -> None:
    cluster.set_chain([1, 2, 3])
    cluster.write(1, b"old", sequence=1)
    cluster.stop_server(gone)
    with pytest.raises(ConnectionLost):
        cluster.write(1, b"new", offset=offset, sequence=2)
    rest = [n for n in (1, 2, 3) if n != gone]
    with pytest.raises(ChunkPending):
        cluster.read(1)
    cluster.set_chain(rest, offline=[gone])
    wait_until(quiet(cluster, *rest))
    expected = b"new" if offset == 0 else b"oldnew"
    assert everywhere(cluster, *rest) == {expected}
    assert cluster.write(1, b"new", offset=offset, sequence=2, again=True, base=1).version == 2


@pytest.mark.parametrize("lost", [1, 2])
def test_the_head_is_lost_before_it_hears_that_the_others_have_it(
    cluster: ChainCluster, lost: int
) -> None:
    """``lost``: whose answers from behind get lost, too."""
    cluster.set_chain([1, 2, 3])
    cluster.write(1, b"old", sequence=1)
    with answers_get_lost(cluster, lost), pytest.raises(ConnectionLost):
        cluster.write(1, b"new", sequence=2)
    cluster.stop_server(1)
    cluster.set_chain([2, 3], offline=[1])
    wait_until(quiet(cluster, 2, 3))
    assert everywhere(cluster, 2, 3) == {b"new"}
    assert cluster.write(2, b"new", sequence=2, again=True, base=1).version == 2


def test_an_update_that_nobody_passed_on_survives_its_head_alone(lazy: ChainCluster) -> None:
    """The head is gone, and nobody else has it: it never was. The client repeats it."""
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"old", sequence=1)
    cut = Cut(lazy.env.blocking_network)  # type: ignore[arg-type]
    cut.off(lazy.servers[2])
    with pytest.raises(ConnectionLost):
        lazy.write(1, b"new", sequence=2)
    lazy.stop_server(1)
    cut.on(lazy.servers[2])
    lazy.set_chain([2, 3], offline=[1])
    assert everywhere(lazy, 2, 3) == {b"old"}
    assert lazy.write(2, b"new", sequence=2, again=True, base=1).version == 2


def test_pendings_are_passed_on_once_the_next_one_is_back(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    cut = Cut(lazy.env.blocking_network)  # type: ignore[arg-type]
    cut.off(lazy.servers[2])
    for number in range(5):
        with pytest.raises(ConnectionLost):
            lazy.write(1, b"new", number=number, sequence=number)
    cut.on(lazy.servers[2])
    for number in range(5):
        wait_until(lambda n=number: lazy.pending(1, chunk=n) is None)
        assert [lazy.read(n, chunk=number) for n in (1, 2, 3)] == [b"new"] * 3


def test_a_successor_that_is_silent_is_a_suspect(lazy: ChainCluster) -> None:
    lazy.set_chain([1, 2, 3])
    cut = Cut(lazy.env.blocking_network)  # type: ignore[arg-type]
    cut.off(lazy.servers[2])
    with pytest.raises(ConnectionLost):
        lazy.write(1, b"new", sequence=1)
    lazy.metadata.wait_for_beats(1)
    assert lazy.metadata.suspects() == set()
    lazy.clock.advance(SUSPECT_SECONDS)
    lazy.metadata.wait_for(lambda: lazy.metadata.suspects() == {2})
    cut.on(lazy.servers[2])
    lazy.metadata.wait_for(lambda: lazy.metadata.suspects() == set())


def test_a_lost_connection_is_not_held_against_a_member_for_good(lazy: ChainCluster) -> None:
    """Nothing is pending because of it (it was a block, or a page of a comparison), nothing else is
    sent there, and all the same somebody asks whether it is there again."""
    lazy.set_chain([1, 2])
    reach = lazy.servers[1]._chains.peers.reach
    for _ in range(5):
        reach.failed(2, lazy.clock.monotonic())
        wait_until(lambda: reach.doubtful() == [])


# --- answers that change on their way


class Answers:
    """What comes to a server from the next member: once armed, the next header has a wrong bit."""

    def __init__(self, cluster: ChainCluster, number: int) -> None:
        self.wrong_byte: int | None = None
        pool = cluster.servers[number]._chains.peers._pool
        self._connect = pool._network.connect
        pool._network = self  # type: ignore[assignment]

    def connect(self, address: Address, timeout: float) -> Connection:
        connection = self._connect(address, timeout)
        receive_into = connection.receive_into

        def changed(views: Sequence[memoryview]) -> None:
            receive_into(views)
            if self.wrong_byte is not None:
                views[0][self.wrong_byte] ^= 1
                self.wrong_byte = None

        connection.receive_into = changed  # type: ignore[method-assign]
        return connection


@pytest.mark.parametrize(
    "wrong_byte", [0, 2, 3, 8, 16, 24], ids=["magic", "version", "kind", "number", "payload", "sum"]
)
def test_an_answer_that_cannot_be_read_says_nothing(lazy: ChainCluster, wrong_byte: int) -> None:
    """Least of all that the update is nowhere: all behind have committed it."""
    answers = Answers(lazy, 1)
    lazy.set_chain([1, 2, 3])
    lazy.write(1, b"old", sequence=1)
    answers.wrong_byte = wrong_byte
    with pytest.raises(ConnectionLost):
        lazy.write(1, b"new", sequence=2)
    wait_until(quiet(lazy, 1, 2, 3))
    assert everywhere(lazy, 1, 2, 3) == {b"new"}
