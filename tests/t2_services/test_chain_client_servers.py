"""The chunk client and real chunk servers: blocks and files on a chain of three."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from kvfs_base.errors import ChunkNotFound, DeadlineExceeded, KvfsError
from kvfs_base.limits import MIB
from kvfs_base.seams import BlockingNetwork, Connection, Listener
from kvfs_base.types import Address, ChunkId, Layout
from kvfs_datapath.client import chain_reads as chain_reads_module
from kvfs_datapath.client import files as files_module
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkWrite
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.format import path_of
from t2_services.chain_cluster import CHAIN, ChainCluster, Cut, chains
from t2_services.chunk_cluster import SECONDS, assert_equal, make_writes, reads_of, wait_until
from t2_services.test_chunk_files import FileMachine

LAYOUT = Layout(1000, (CHAIN,))


@pytest.fixture(params=["tcp", "auto"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChainCluster]:
    with chains(tmp_path) as cluster:
        cluster.prefer = request.param
        cluster.set_chain([1, 2, 3])
        for number in cluster.servers:
            wait_until(lambda n=number: cluster.may_act(n))
        yield cluster


def assert_stored(cluster: ChainCluster, writes: list[ChunkWrite], members: list[int]) -> None:
    for write in writes:
        for number in members:
            chunk = ChunkId(write.chunk.inode, 0, CHAIN)
            file, info = cluster.store(number).open(chunk)
            view = memoryview(bytearray(info.length))
            file.preadv([view], 0)
            file.close()
            assert view == write.view[: write.size]
            assert info.key == write.key


def test_blocks_go_to_all_and_come_from_any(cluster: ChainCluster) -> None:
    client = cluster.client()
    writes = make_writes([MIB, 3 * MIB, 10, 0, 70_000] * 4, chains=[CHAIN])
    assert client.write_chunks(writes) == [None] * 20
    assert_stored(cluster, writes, [1, 2, 3])
    assert {w.version for w in writes} == {cluster.chain().version}
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * 20
    assert_equal(reads, writes)


def test_servers_stop_one_after_the_other(cluster: ChainCluster) -> None:
    client = cluster.client()
    writes = make_writes([20_000] * 12, chains=[CHAIN])
    assert client.write_chunks(writes) == [None] * 12
    for number in (2, 1):
        cluster.stop_server(number)
        reads = reads_of(writes)
        assert client.read_chunks(reads) == [None] * 12
        assert_equal(reads, writes)


def test_a_write_waits_for_the_chain_to_do_without(cluster: ChainCluster) -> None:
    client = cluster.client()
    cluster.stop_server(2)
    writes = make_writes([20_000] * 6, chains=[CHAIN])
    results: list[KvfsError | None] = []
    writer = threading.Thread(target=lambda: results.extend(client.write_chunks(writes)))
    writer.start()
    seen = cluster.metadata.refreshes
    wait_until(lambda: cluster.metadata.refreshes > seen + 1)
    cluster.set_chain([1, 3], offline=[2])
    writer.join(SECONDS)
    assert results == [None] * 6
    assert_stored(cluster, writes, [1, 3])


def new_file(client: ChunkClient, inode: int = 7) -> StripedFile:
    return StripedFile(client, inode, LAYOUT, retry_seconds=SECONDS)


def assert_in_step(cluster: ChainCluster, inode: int, chunks: int) -> None:
    """All members have the same versions of a file's chunks, and nothing pending."""
    for number in range(chunks):
        found = [cluster.committed(n, inode=inode, chunk=number) for n in cluster.servers]
        assert len({(i.version, i.crc32c, i.length) if i else None for i in found}) == 1
        assert not any(cluster.pending(n, inode=inode, chunk=number) for n in cluster.servers)


def test_random_operations_against_the_model(
    cluster: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients, and a chain whose head changes."""

    class Machine(FileMachine):
        @rule(first=st.integers(0, 2))
        def turn(self, first: int) -> None:
            members = [1, 2, 3]
            cluster.set_chain(members[first:] + members[:first])

        def teardown(self) -> None:
            if hasattr(self, "files"):
                if self.model:
                    assert cluster.committed(1, inode=self.inode) is not None or self.sparse
                assert_in_step(cluster, self.inode, 1 + len(self.model) // 1000)
                for client in self.clients:
                    client.close()
                    cluster.clients.remove(client)

    monkeypatch.setattr("t2_services.test_chunk_files.new_file", new_file)
    Machine.cluster = cluster
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_file_survives_its_head(cluster: ChainCluster) -> None:
    """Written to while the head goes; whatever was answered is read back."""
    file = new_file(cluster.client())
    data = os.urandom(30_000)
    for at in range(0, 15_000, 700):
        file.write(at, data[at : min(at + 700, 15_000)])
    cluster.stop_server(1)

    def leave_out() -> None:
        cluster.set_chain([2, 3], offline=[1])

    seen = cluster.metadata.refreshes
    changing = threading.Thread(target=leave_out)
    written = threading.Thread(target=lambda: file.write(15_000, data[15_000:]))
    written.start()
    wait_until(lambda: cluster.metadata.refreshes > seen)
    changing.start()
    written.join(SECONDS)
    changing.join(SECONDS)
    assert file.read(0, len(data), len(data), False) == data
    file.sync()
    assert_in_step(cluster, 7, 30)


def test_truncate_and_grow_again(cluster: ChainCluster) -> None:
    file = new_file(cluster.client())
    data = os.urandom(9_500)
    file.write(0, data)
    file.truncate(9_500, 2_300)
    assert file.read(0, 9_500, 9_500, True) == data[:2_300] + bytes(7_200)
    with pytest.raises(ChunkNotFound):
        file.read(0, 9_500, 9_500, False)
    file.write(6_000, b"again")
    assert file.read(0, 6_005, 6_005, True) == data[:2_300] + bytes(3_700) + b"again"
    # Nothing is made of what was never there.
    file.truncate(1 << 40, 6_005)
    assert cluster.committed(1, chunk=20) is None


@pytest.mark.logs_warnings
def test_a_damaged_copy_is_read_elsewhere_and_repaired(cluster: ChainCluster) -> None:
    client = cluster.client()
    writes = make_writes([5_000] * 4, chains=[CHAIN])
    assert client.write_chunks(writes) == [None] * 4
    for write in writes:
        chunk = ChunkId(write.chunk.inode, 0, CHAIN)
        first = client.router.chain(CHAIN).in_order(chunk, set())[0].target_id
        writable = cluster.disk(first).open(path_of(chunk), write=True)
        writable.pwritev([b"\0\0\0\0"], 100)
        writable.close()
    reads = reads_of(writes)
    assert client.read_chunks(reads) == [None] * 4
    assert_equal(reads, writes)
    wait_until(lambda: client.statistics()["repairs_asked"] == 4)
    wait_until(
        lambda: sum(s.statistics()["chunks_repaired"] for s in cluster.servers.values()) == 4
    )
    assert_stored(cluster, writes, [1, 2, 3])


def test_the_kind_of_a_file_is_decided_once(cluster: ChainCluster) -> None:
    file = new_file(cluster.client())
    file.write(0, b"x")
    assert isinstance(file._several(), files_module.ChainedFile)
    assert not file.write_now(0, b"y")


class CutOff:
    """A client's network in which some addresses cannot be reached."""

    def __init__(self, network: BlockingNetwork) -> None:
        self._network = network
        self.gone: set[Address] = set()

    def connect(self, address: Address, timeout: float) -> Connection:
        if address in self.gone:
            raise DeadlineExceeded(operation="connect", seconds=timeout)
        return self._network.connect(address, timeout)

    def listen(self, address: Address) -> Listener:
        return self._network.listen(address)


def client_without(cluster: ChainCluster, number: int) -> ChunkClient:
    network = CutOff(cluster.env.blocking_network)
    network.gone.update(cluster.servers[number].addresses)
    env = dataclasses.replace(cluster.env, blocking_network=network)
    client = ChunkClient(env, cluster.metadata, prefer=cluster.prefer)
    cluster.clients.append(client)
    return client


@pytest.mark.parametrize("number", [1, 3])
def test_a_hole_is_read_though_a_member_cannot_be_reached(
    cluster: ChainCluster, number: int
) -> None:
    """From here: those that can be asked whether it has the chunk."""
    new_file(cluster.client()).write(4500, b"end")
    file = new_file(client_without(cluster, number))
    for chunk in range(4):
        assert file.read(1000 * chunk, 1000, 4503, True) == bytes(1000)
    assert file.read(4000, 503, 4503, True) == bytes(500) + b"end"


def test_a_chunk_that_only_the_unreachable_one_has_is_no_hole(cluster: ChainCluster) -> None:
    new_file(cluster.client()).write(0, b"bytes")
    for number in (1, 2):
        cluster.store(number).remove(ChunkId(7, 0, CHAIN))
    file = new_file(client_without(cluster, 3))
    assert file.read(0, 5, 5, True) == b"bytes"


def test_what_nobody_else_can_say_is_waited_for(
    cluster: ChainCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_reads_module, "CHAIN_READ_SECONDS", 0.1)
    new_file(cluster.client()).write(0, b"bytes")
    for number in (1, 2):
        cluster.store(number).remove(ChunkId(7, 0, CHAIN))
    cut = Cut(cluster.env.blocking_network)  # type: ignore[arg-type]
    server = cluster.servers[3]
    cut.off(server)
    file = StripedFile(cluster.client(), 7, LAYOUT, retry_seconds=0.1)
    with pytest.raises(KvfsError) as caught:
        file.read(0, 5, 5, True)
    assert caught.value.temporary
    cut.on(server)
    assert new_file(cluster.client()).read(0, 5, 5, True) == b"bytes"
