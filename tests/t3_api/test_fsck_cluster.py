"""fsck against real services and real chunk files: what was damaged is found, what is in use never
is, whatever goes on meanwhile."""

from __future__ import annotations

import functools
import hashlib
import mmap
import operator
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_cluster import ApiCluster, wait_until
from kvfs.fsck import Fsck, Report, State, check, offline, online
from kvfs.fsck.sources import LocalStore
from kvfs_base.cluster import ClusterMap, GetClusterMap
from kvfs_base.errors import Conflict
from kvfs_base.os_env import os_env
from kvfs_base.types import ChunkId, KVLayout
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkWrite
from kvfs_datapath.connections import ConnectionPool
from kvfs_datapath.format import path_of
from kvfs_metadata.check.findings import Kind
from kvfs_metadata.client import BlockingMetadataClient, ClusterView
from kvfs_metadata.messages import (
    AbortBlocks,
    Link,
    Make,
    OpenNamespace,
    PrepareBlocks,
    Rename,
    Rmdir,
    SetAttr,
    Statistics,
    Unlink,
)
from t2_services.metadata_rig import DIRECTORY, FILE, ROOT

LAYOUT = KVLayout(block_tokens=16)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ApiCluster]:
    made = ApiCluster(str(tmp_path))
    try:
        yield made
    finally:
        made.stop()


def block(number: int, size: int = 10_000) -> tuple[bytes, bytes]:
    return (
        hashlib.sha256(b"%d" % number).digest(),
        hashlib.shake_128(b"%d" % number).digest(size),
    )


def put(cluster: ApiCluster, numbers: range, namespace: str = "t/m") -> None:
    keys, buffers = zip(*map(block, numbers), strict=True)
    with cluster.connect() as client:
        client.namespace(namespace, LAYOUT, create=True).put(keys, buffers)


def check_blocks(cluster: ApiCluster, numbers: list[int], namespace: str = "t/m") -> None:
    keys, buffers = zip(*map(block, numbers), strict=True)
    with (
        cluster.connect() as client,
        client.namespace(namespace).get(keys) as found,
    ):
        assert [view is not None and bytes(view) for view in found] == list(buffers)


def run(cluster: ApiCluster, *, repair: bool = False, verify: bool = False) -> Report:
    with online(os_env(), cluster.metadata_address) as (store, targets):
        fsck = Fsck(store, targets, verify=verify)
        report = fsck.check()
        if repair:
            fsck.repair(report)
        return report


def kinds(report: Report) -> list[tuple[Kind, int]]:
    return sorted((one.finding.kind, one.finding.inode) for one in report.outcomes)


def removals_are_done(cluster: ApiCluster) -> None:
    client = BlockingMetadataClient(os_env(), cluster.metadata_address)
    try:
        wait_until(lambda: client.call(Statistics())["removals_pending"] == 0)
    finally:
        client.close()


def inode_of(path: str) -> int:
    return int(os.path.basename(path)[:16], 16)


def rename_chunk(path: str, inode: int) -> str:
    """A chunk file under the name of another one, at its place: its attribute tells."""
    target = path[: path.index("/chunks/")]
    new = f"{target}/{path_of(ChunkId(inode, 0))}"
    os.makedirs(os.path.dirname(new), exist_ok=True)
    os.rename(path, new)
    return new


def test_damaged_chunk_files_are_found_and_repaired(cluster: ApiCluster) -> None:
    put(cluster, range(12))
    assert run(cluster, verify=True).outcomes == []
    files = cluster.chunk_files()
    deleted, cut, flipped, moved = files[0], files[3], files[5], files[7]
    os.unlink(deleted)
    os.truncate(cut, 9_999)
    with open(flipped, "r+b") as file:
        file.write(b"other bytes")
    orphan = rename_chunk(moved, 5)

    expected = [
        (Kind.BLOCK_DAMAGED, inode_of(cut)),
        (Kind.BLOCK_LOST, inode_of(deleted)),
        (Kind.BLOCK_LOST, inode_of(moved)),
        (Kind.CHUNK_ORPHAN, 5),
    ]
    assert kinds(run(cluster)) == sorted(expected)
    assert os.path.exists(orphan)
    expected.append((Kind.BLOCK_DAMAGED, inode_of(flipped)))
    report = run(cluster, repair=True, verify=True)
    assert kinds(report) == sorted(expected)
    assert {one.state for one in report.outcomes} == {State.REPAIRED}
    assert run(cluster, verify=True).outcomes == []
    removals_are_done(cluster)
    bad = {deleted, cut, flipped, moved}
    assert cluster.chunk_files() == [file for file in files if file not in bad]
    assert run(cluster, verify=True).outcomes == []
    put(cluster, range(12))
    check_blocks(cluster, list(range(12)))


def test_nothing_in_use_is_ever_found_while_blocks_come_and_go(cluster: ApiCluster) -> None:
    """Writers put, remove, and put again; every run of the check and of the repair finds nothing
    but the orphan that was planted."""
    put(cluster, range(1000, 1040))
    put(cluster, range(5000, 5001), "t/other")
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = [0, 0]

    def write(writer: int) -> None:
        try:
            with cluster.connect() as client:
                namespace = client.namespace("t/m")
                while not stop.is_set():
                    numbers = range(writer * 100, writer * 100 + 30)
                    keys, buffers = zip(*map(block, numbers), strict=True)
                    namespace.put(keys, buffers)
                    with namespace.get(keys) as found:
                        assert [bytes(view or b"") for view in found] == list(buffers)
                    namespace.remove(keys[::2])
                    rounds[writer] += 1
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            before = list(rounds)
            assert kinds(run(cluster, repair=True, verify=True)) == []
            wait_until(functools.partial(all_went_on, rounds, before, errors))
        (planted,) = [file for file in cluster.chunk_files() if is_of(file, block(5000)[1])]
        lost = inode_of(planted)
        rename_chunk(planted, 7)
        report = run(cluster, repair=True)
        assert kinds(report) == [(Kind.BLOCK_LOST, lost), (Kind.CHUNK_ORPHAN, 7)]
        assert report.remaining == []
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    removals_are_done(cluster)
    assert run(cluster, verify=True).outcomes == []
    check_blocks(cluster, list(range(1000, 1040)))


def all_went_on(rounds: list[int], before: list[int], errors: list[BaseException]) -> bool:
    return bool(errors) or all(now > was for now, was in zip(rounds, before, strict=True))


def is_of(path: str, data: bytes) -> bool:
    try:
        return Path(path).read_bytes() == data
    except FileNotFoundError:
        return False


def test_files_that_come_and_go_are_no_findings(cluster: ApiCluster) -> None:
    """Names, links and renames under the check's feet: each count is of one state."""
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = [0]
    setup = BlockingMetadataClient(os_env(), cluster.metadata_address)
    # More than a page, so that what moves can be missed or met twice.
    setup.call_many([Make(ROOT, b"m%04d" % n, FILE) for n in range(1500)])
    setup.close()

    def change() -> None:
        client = BlockingMetadataClient(os_env(), cluster.metadata_address)
        try:
            while not stop.is_set():
                directory = client.call(Make(ROOT, b"z", DIRECTORY)).inode
                file = client.call(Make(directory, b"f", FILE)).inode
                client.call(Link(file, ROOT, b"a"))
                client.call(Rename(ROOT, b"z", ROOT, b"b"))
                client.call(Rename(ROOT, b"a", ROOT, b"zz"))
                client.call(Unlink(directory, b"f"))
                client.call(Unlink(ROOT, b"zz"))
                client.call(Rmdir(ROOT, b"b"))
                rounds[0] += 1
        except BaseException as exc:
            errors.append(exc)
        finally:
            client.close()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(10):
            before = rounds[0]
            assert kinds(run(cluster, repair=True)) == []
            wait_until(functools.partial(all_went_on, rounds, [before], errors))
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert run(cluster).outcomes == []


def test_a_lost_chunk_of_a_file_is_told(cluster: ApiCluster) -> None:
    client = BlockingMetadataClient(os_env(), cluster.metadata_address)
    try:
        attr = client.call(Make(ROOT, b"file", FILE))
        client.call(SetAttr(attr.inode, size=40_000_000))  # and no chunk at all
        report = run(cluster, repair=True)
        assert kinds(report) == [(Kind.FILE_HOLE, attr.inode)]
        assert [one.state for one in report.outcomes] == [State.FOUND]
    finally:
        client.close()


@pytest.mark.logs_warnings
def test_a_server_that_is_away_makes_no_findings(cluster: ApiCluster) -> None:
    put(cluster, range(12))
    server = cluster.servers.pop()
    server.stop()
    report = run(cluster, repair=True)
    assert report.outcomes == []
    assert len(report.unreachable) == 1
    assert report.unchecked > 0
    cluster.servers.append(cluster._start_server(2))
    cluster._wait_for_targets(3)
    assert run(cluster).unreachable == {}
    check_blocks(cluster, list(range(12)))


def test_offline_sees_and_repairs_the_same(tmp_path: Path) -> None:
    cluster = ApiCluster(str(tmp_path))
    directories = [cluster.target(n) for n in range(3)]
    try:
        put(cluster, range(12))
        with (
            pytest.raises(Conflict),
            offline(os_env(), f"{tmp_path}/metadata", directories),
        ):
            raise AssertionError("opened beside a service")
    finally:
        cluster.stop()
    files = cluster.chunk_files()
    os.unlink(files[0])
    rename_chunk(files[1], 6)
    expected = [
        (Kind.BLOCK_LOST, inode_of(files[0])),
        (Kind.BLOCK_LOST, inode_of(files[1])),
        (Kind.CHUNK_ORPHAN, 6),
    ]
    with offline(os_env(), f"{tmp_path}/metadata", directories) as (store, targets):
        assert isinstance(store, LocalStore)
        found = check(store, targets.listings())
        assert sorted((one.kind, one.inode) for one in found) == expected
        fsck = Fsck(store, targets, verify=True)
        report = fsck.check()
        assert kinds(report) == expected
        fsck.repair(report)
        assert report.remaining == []
        assert fsck.check().outcomes == []
    cluster = ApiCluster(str(tmp_path))
    try:
        removals_are_done(cluster)
        assert cluster.chunk_files() == files[2:]
        assert run(cluster, verify=True).outcomes == []
        put(cluster, range(12))
        check_blocks(cluster, list(range(12)))
    finally:
        cluster.stop()


def test_a_listing_goes_on_over_another_connection(cluster: ApiCluster) -> None:
    """Each page may be asked for on a connection that knows nothing of the page before."""
    put(cluster, range(60))
    address = cluster.servers[0].addresses[0]
    (target,) = [target.target_id for target in _map(cluster).targets if target.unix == address]
    listed = {}
    for fresh in (False, True):
        found: list[tuple[int, int]] = []
        start: m.ChunkRef | None = m.ChunkRef(0, 0, 0)
        pool = ConnectionPool(os_env().blocking_network, os_env().clock)
        while start is not None:
            request = m.ListChunks(target, start, 3)
            page: m.ChunkPage = pool.run(address, operator.methodcaller("call", request))
            assert len(page.chunks) <= 3
            found += [(chunk.inode, chunk.number) for chunk in page.chunks]
            start = page.next
            if fresh:
                pool.close()
                pool = ConnectionPool(os_env().blocking_network, os_env().clock)
        pool.close()
        listed[fresh] = found
    assert listed[False] == listed[True] == sorted(listed[True])
    assert len(listed[True]) == len(
        [file for file in cluster.chunk_files() if file.startswith(cluster.target(0))]
    )


def _map(cluster: ApiCluster) -> ClusterMap:
    client = BlockingMetadataClient(os_env(), cluster.metadata_address)
    try:
        found: ClusterMap = client.call(GetClusterMap())
        return found
    finally:
        client.close()


def test_a_writer_that_is_late_leaves_an_orphan(cluster: ApiCluster) -> None:
    """Its batch was given up and its removal done before it published the chunk."""
    client = BlockingMetadataClient(os_env(), cluster.metadata_address)
    view = ClusterView(os_env(), cluster.metadata_address)
    chunks = ChunkClient(os_env(), view)
    try:
        namespace = client.call(OpenNamespace("t/m", LAYOUT, create=True)).inode
        key, data = block(1)
        batch = client.call(PrepareBlocks(namespace, key, (len(data),)))
        (place,) = batch.blocks
        pages = mmap.mmap(-1, 3 * mmap.PAGESIZE)
        pages.write(data)
        write = ChunkWrite(
            chunk=ChunkId(place.inode, 0),
            chain=place.chain,
            size=len(data),
            crc32c=crc32c(data),
            key=key,
            view=memoryview(pages),
        )
        assert chunks.write_chunks([write]) == [None]
        assert run(cluster).outcomes == [], "a prepared batch is no finding"
        client.call(AbortBlocks(batch.batch_id))
        removals_are_done(cluster)
        assert chunks.write_chunks([write]) == [None]
        report = run(cluster, repair=True)
        assert kinds(report) == [(Kind.CHUNK_ORPHAN, place.inode)]
        removals_are_done(cluster)
        assert cluster.chunk_files() == []
        assert run(cluster).outcomes == []
    finally:
        chunks.close()
        view.close()
        client.close()
