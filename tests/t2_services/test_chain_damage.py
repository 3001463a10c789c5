"""File chunks of which no serving member has the bytes any more: known to be damaged, never served,
and no reason for a chain to stay short."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import ChunkCorrupt, ChunkNotFound, Conflict, ConnectionLost, KvfsError
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.format import ATTRIBUTE, VERSION_UNKNOWN, path_of, pending_path_of
from t2_services.chain_cluster import (
    CHAIN,
    ChainCluster,
    Cut,
    answers_get_lost,
    chains,
    payload,
    rot,
    wait_for_sync,
)
from t2_services.chunk_cluster import wait_until

CHUNK = ChunkId(7, 0, CHAIN)

pytestmark = pytest.mark.logs_warnings


@pytest.fixture(params=["cache", "strict"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path, durability=request.param) as cluster:
        yield cluster


def lose_attribute(cluster: ChainCluster, number: int, chunk: ChunkId) -> None:
    file = cluster.disk(number).open(path_of(chunk), write=True)
    file.set_attribute(ATTRIBUTE, b"no attribute")
    file.close()


def damaged(cluster: ChainCluster, number: int) -> int:
    return cluster.servers[number].statistics()["damaged_chunks"]


def read_error(cluster: ChainCluster, number: int, chunk: int = 0) -> KvfsError:
    with pytest.raises(KvfsError) as caught:
        cluster.read(number, chunk=chunk)
    return caught.value


def only_on(cluster: ChainCluster, number: int, data: bytes) -> None:
    """Version 2 is on this member alone; the others have an older one, and are away."""
    others = [other for other in (1, 2, 3) if other != number]
    cluster.set_chain([number, *others])
    cluster.write(number, b"old", sequence=1)
    cluster.set_chain([number], offline=others)
    cluster.write(number, data, sequence=2)
    cluster.write(number, b"good", number=1, sequence=3)


def ruin_and_sync(cluster: ChainCluster, how: str = "bytes") -> None:
    """Chunk 0 is damaged on 1, its only holder, when 2 comes back."""
    only_on(cluster, 1, b"newer bytes")
    if how == "bytes":
        rot(cluster, 1, CHUNK)
    else:
        lose_attribute(cluster, 1, CHUNK)
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])


@pytest.mark.parametrize("how", ["bytes", "attribute"])
def test_a_chunk_that_nobody_has_keeps_no_chain_short(cluster: ChainCluster, how: str) -> None:
    ruin_and_sync(cluster, how)
    assert [cluster.read(n, chunk=1) for n in (1, 2)] == [b"good"] * 2, "all else came"
    for number in (1, 2):
        assert isinstance(read_error(cluster, number), ChunkCorrupt), "no zeros, nothing old"
        assert damaged(cluster, number) == 1
        page = cluster.call(number, m.ListChunks(number, m.ChunkRef(0, 0, CHAIN)))
        assert [(c.number, c.info is None) for c in page.chunks] == [(0, True), (1, False)]
        assert "lost" in page.chunks[0].problem


@pytest.mark.parametrize("how", ["bytes", "attribute"])
def test_an_overwrite_of_the_whole_chunk_heals_it(cluster: ChainCluster, how: str) -> None:
    ruin_and_sync(cluster, how)
    for offset, data in ((0, b"part"), (11, b"behind"), (20, b"far")):
        with pytest.raises(ChunkCorrupt):
            cluster.write(1, data, offset=offset, sequence=10 + offset)
    info = cluster.write(1, b"now whole again", sequence=50)
    assert info.version > (VERSION_UNKNOWN if how == "attribute" else 2)
    assert [cluster.read(n) for n in (1, 2)] == [b"now whole again"] * 2
    assert [damaged(cluster, n) for n in (1, 2)] == [0, 0]
    cluster.write(1, b" + more", offset=15, sequence=51)
    assert [cluster.read(n) for n in (1, 2)] == [b"now whole again + more"] * 2


def test_a_cut_to_nothing_heals_it_and_no_other(cluster: ChainCluster) -> None:
    ruin_and_sync(cluster)
    cut = m.Update(7, 0, 5, 0, 0, 1, 20, cut=True)
    assert isinstance(cluster.update(1, cut, data=[]).error(0), ChunkCorrupt)
    request = m.RemoveRange(1, 7, 0, 1, 1, cluster.passing(), 21)
    assert cluster.call(1, request).errors == {}
    assert [cluster.read(n) for n in (1, 2)] == [b"", b""]
    assert [damaged(cluster, n) for n in (1, 2)] == [0, 0]
    cluster.write(1, b"anew", sequence=22)
    assert [cluster.read(n) for n in (1, 2)] == [b"anew"] * 2


def test_a_removal_ends_it(cluster: ChainCluster) -> None:
    ruin_and_sync(cluster)
    for number in (1, 2):
        seq = cluster.metadata.order_removals(number, [(7, 0, 1)], CHAIN)
        cluster.metadata.wait_for_removals(number, seq)
        assert damaged(cluster, number) == 0
        assert isinstance(read_error(cluster, number), ChunkNotFound)


def test_it_is_known_after_a_restart(cluster: ChainCluster) -> None:
    ruin_and_sync(cluster)
    cluster.stop_server(2)
    cluster.start_server(2)
    assert damaged(cluster, 2) == 1
    found = cluster.committed(2)
    assert found is not None and found.is_damaged
    assert (found.version, found.length) == (2, len(b"newer bytes"))


def test_a_member_that_has_the_version_heals_the_source(cluster: ChainCluster) -> None:
    data = payload(5000)
    cluster.set_chain([1, 2, 3])
    cluster.write(1, data, sequence=1)
    cluster.set_chain([1], offline=[2, 3])
    rot(cluster, 1, CHUNK, 4999)
    cluster.store(3).remove(CHUNK)
    cluster.set_chain([1], syncing=[3], offline=[2])
    wait_for_sync(cluster, 3)
    cluster.set_chain([1, 3], offline=[2])
    assert [damaged(cluster, n) for n in (1, 3)] == [1, 1]
    cluster.set_chain([3], offline=[1, 2])
    cluster.set_chain([3], syncing=[2], offline=[1])
    wait_for_sync(cluster, 2)
    cluster.set_chain([3, 2], offline=[1])
    assert [cluster.read(n) for n in (2, 3)] == [data] * 2
    cluster.set_chain([3, 2], syncing=[1])
    wait_for_sync(cluster, 1)
    cluster.set_chain([3, 2, 1])
    assert cluster.read(1) == data
    assert [damaged(cluster, n) for n in (1, 2, 3)] == [0] * 3


def test_a_copy_of_another_version_heals_nothing(cluster: ChainCluster) -> None:
    """Also one that was damaged, too, but does not know."""
    data = payload(5000)
    cluster.set_chain([1, 2])
    cluster.write(1, data, sequence=1)
    cluster.set_chain([1], offline=[2])
    for number in (1, 2):
        rot(cluster, number, CHUNK)
    outcomes = cluster.call(1, m.RepairChunks(1, (m.ChunkRef(*CHUNK),)))
    assert isinstance(outcomes.error(0), ChunkCorrupt)
    assert damaged(cluster, 1) == 1
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])
    assert {type(read_error(cluster, n)) for n in (1, 2)} == {ChunkCorrupt}
    assert [damaged(cluster, n) for n in (1, 2)] == [1, 1]


def test_serving_members_heal_what_was_recorded(cluster: ChainCluster) -> None:
    """The chunk was equal by its attribute, so nobody asked for it while 2 came back."""
    data = payload(5000)
    cluster.set_chain([1, 2])
    cluster.write(1, data, sequence=1)
    cluster.set_chain([1], offline=[2])
    rot(cluster, 1, CHUNK)
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])
    cluster.store(1).versions.damaged.mark(CHUNK)
    assert cluster.call(1, m.RepairChunks(1, (m.ChunkRef(*CHUNK),))).errors == {}
    assert cluster.read(1) == data and damaged(cluster, 1) == 0


def test_bytes_that_others_may_have_are_not_given_up(cluster: ChainCluster) -> None:
    """A serving member that does not answer now may have them."""
    cluster.set_chain([1, 2])
    cluster.write(1, b"bytes", sequence=1)
    rot(cluster, 1, CHUNK)
    cluster.stop_server(2)
    outcomes = cluster.call(1, m.RepairChunks(1, (m.ChunkRef(*CHUNK),)))
    assert isinstance(outcomes.error(0), ChunkCorrupt)
    assert damaged(cluster, 1) == 0


def test_a_damaged_attribute_of_a_block_does_not_cost_the_good_copy(
    cluster: ChainCluster,
) -> None:
    """Nobody can tell any more that it was a block: its name can."""
    block, chunk = payload(6000), ChunkId(100, 0, CHAIN)
    cluster.set_chain([1, 2])
    assert cluster.put_blocks(1, [2], {100: block}) == [None]
    cluster.set_chain([1], offline=[2])
    lose_attribute(cluster, 1, chunk)
    cluster.set_chain([1], syncing=[2])
    wait_for_sync(cluster, 2)
    cluster.set_chain([1, 2])
    assert cluster.get_block(2, 100, block) == block
    assert cluster.call(1, m.RepairChunks(1, (m.ChunkRef(*chunk),))).errors == {}
    assert cluster.get_block(1, 100, block) == block and damaged(cluster, 1) == 0


def test_what_comes_late_does_not_bring_old_bytes_back(cluster: ChainCluster) -> None:
    """A member that knows of the damage takes the same version from one that has it, and no older
    one."""
    ruin_and_sync(cluster)
    cluster.set_chain([1, 2])
    for version, data in ((1, b"old"), (2, b"newer bytes")):
        update = m.Update(7, 0, 0, len(data), crc32c(data), 1, version)
        passing = cluster.passing()
        whole = m.PassUpdate(2, passing, update, version, crc32c(data), len(data), True)
        error = cluster.call(2, whole, [data]).error(0)
        assert (error is None) == (version == 2)
    assert cluster.read(2) == b"newer bytes"


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after a lost answer"])
def test_an_append_to_what_nobody_has_does_not_stay_pending(
    cluster: ChainCluster, again: bool
) -> None:
    """The next member wants the whole chunk, which is spoilt here: so it is nowhere."""
    cluster.set_chain([1, 2])
    cluster.write(1, b"base", sequence=1)
    if again:
        cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
        cut.off(cluster.servers[2])
        with pytest.raises(ConnectionLost):
            cluster.write(1, b" and more", offset=4, sequence=2)
        assert cluster.pending(1) is not None
    rot(cluster, 1, CHUNK)
    if again:
        rot(cluster, 2, CHUNK)
        cut.on(cluster.servers[2])
        wait_until(lambda: cluster.pending(1) is None)
    else:
        lose_attribute(cluster, 2, CHUNK)
        with pytest.raises(ChunkCorrupt):
            cluster.write(1, b" and more", offset=4, sequence=2)
        assert cluster.pending(1) is None
    cluster.write(1, b"now whole again", sequence=3)
    assert [cluster.read(n) for n in (1, 2)] == [b"now whole again"] * 2


def test_damage_that_hides_what_is_pending_is_found_without_a_reader(
    cluster: ChainCluster,
) -> None:
    """After a restart: readers are told that something is pending, so none of them reports it."""
    cluster.set_chain([1, 2])
    cluster.write(1, b"base", sequence=1)
    cluster.stop_server(2)
    with pytest.raises(ConnectionLost):
        cluster.write(1, b" and more", offset=4, sequence=2)
    cluster.stop_server(1)
    rot(cluster, 1, CHUNK)
    cluster.metadata.set_chain(CHAIN, [1], offline=[2])
    cluster.start_server(1)
    wait_until(lambda: cluster.may_act(1) and damaged(cluster, 1) == 1)
    assert isinstance(read_error(cluster, 1), ChunkCorrupt)
    wait_until(lambda: not cluster.servers[1]._chains.replicator.unresolved())
    cluster.write(1, b"now whole again", sequence=3)
    assert cluster.read(1) == b"now whole again"


def spoil_pending(cluster: ChainCluster, number: int, offset: int) -> None:
    """An append is behind the committed bytes, anything else in a file of its own."""
    path = path_of(CHUNK) if offset else pending_path_of(CHUNK)
    file = cluster.disk(number).open(path, write=True)
    file.pwritev([b"?"], offset)
    file.close()


@contextlib.contextmanager
def nothing_resolved(cluster: ChainCluster, number: int) -> Iterator[None]:
    """Nor has it read, when this is over, what it is to pass on."""
    replicator = cluster.servers[number]._chains.replicator
    resolve = replicator.resolve
    replicator.resolve = lambda *args: (_ for _ in ()).throw(Conflict())  # type: ignore
    try:
        yield
    finally:
        replicator.resolve = resolve  # type: ignore[method-assign]


def left_pending(cluster: ChainCluster, offset: int, unreached: int) -> None:
    """Version 2 is pending on 1, and before ``unreached``, which knows nothing of it."""
    cluster.write(1, b"base", sequence=1)
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    cut.off(cluster.servers[unreached])
    with nothing_resolved(cluster, 1):
        with pytest.raises(ConnectionLost):
            cluster.write(1, b" and more", offset=offset, sequence=2)
        for number in range(1, unreached):
            assert cluster.pending(number) is not None
        spoil_pending(cluster, 1, offset)
        lose_attribute(cluster, unreached, CHUNK)
        cut.on(cluster.servers[unreached])


@pytest.mark.parametrize("offset", [0, 4], ids=["copy", "append"])
def test_a_tail_that_cannot_tell_what_it_has_keeps_nothing_pending(
    cluster: ChainCluster, offset: int
) -> None:
    """It may have shown version 2 to a reader, and nobody has its bytes."""
    cluster.set_chain([1, 2])
    left_pending(cluster, offset, 2)
    wait_until(lambda: cluster.pending(1) is None)
    for number in (1, 2):
        assert isinstance(read_error(cluster, number), ChunkCorrupt)
        found = cluster.committed(number)
        assert found is not None and found.is_damaged and found.version == 2
    # Its writer, who was told nothing, says it again: of the whole chunk that is enough.
    if offset:
        with pytest.raises(ChunkCorrupt):
            cluster.write(1, b" and more", offset=4, sequence=2, again=True, base=1)
        cluster.write(1, b"all of it and more", sequence=3)
    else:
        assert cluster.write(1, b" and more", sequence=2, again=True, base=1).version == 3
    assert len({cluster.read(n) for n in (1, 2)}) == 1
    assert [damaged(cluster, n) for n in (1, 2)] == [0, 0]


def test_a_member_that_cannot_tell_what_it_has_asks_those_behind_it(cluster: ChainCluster) -> None:
    """They have never heard of version 2, so it has never been read."""
    cluster.set_chain([1, 2, 3])
    left_pending(cluster, 0, 2)
    wait_until(lambda: cluster.pending(1) is None)
    assert cluster.read(1) == cluster.read(3) == b"base"
    assert cluster.write(1, b"next", sequence=3).version == 2
    assert [cluster.read(n) for n in (1, 2, 3)] == [b"next"] * 3


def test_what_those_behind_have_heals_who_has_it_spoilt_or_cannot_tell(
    cluster: ChainCluster,
) -> None:
    cluster.set_chain([1, 2, 3])
    cluster.write(1, b"base", sequence=1)
    with nothing_resolved(cluster, 1):
        with answers_get_lost(cluster, 1), pytest.raises(ConnectionLost):
            cluster.write(1, b"newer", sequence=2)
        spoil_pending(cluster, 1, 0)
        lose_attribute(cluster, 2, CHUNK)
    wait_until(lambda: cluster.pending(1) is None)
    for number in (1, 2):
        assert isinstance(read_error(cluster, number), ChunkCorrupt), "not what is spoilt"
        assert cluster.call(number, m.RepairChunks(number, (m.ChunkRef(*CHUNK),))).errors == {}
    assert [cluster.read(n) for n in (1, 2, 3)] == [b"newer"] * 3
    assert [damaged(cluster, n) for n in (1, 2, 3)] == [0] * 3
