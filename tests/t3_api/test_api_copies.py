"""Namespaces and directories with several copies, through the API and the mount's file system,
while servers go and come."""

from __future__ import annotations

import io
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

import kvfs
from api_cluster import MIB, ApiCluster, wait_until
from kvfs.cli.tree import Tree, open_tree
from kvfs.keys import block_keys
from kvfs.mount.filesystem import Caller
from kvfs_base.errors import InvalidRequest, NoTarget
from kvfs_base.os_env import os_env
from kvfs_base.types import ROOT_INODE
from kvfs_datapath.client.health import Health

LAYOUT = kvfs.KVLayout(block_tokens=1)
KEYS = block_keys(range(24), 1)
BLOCKS = [bytes([n]) * (n * 4000 + 1) for n in range(24)]


@pytest.fixture
def cluster(start_cluster: Callable[..., ApiCluster]) -> ApiCluster:
    return start_cluster(hosts=True, keep_puts=False)


def copies_of(cluster: ApiCluster) -> list[int]:
    """How often each chunk is there, by name."""
    names = [os.path.basename(path) for path in cluster.chunk_files()]
    return sorted(names.count(name) for name in set(names))


def assert_stored(namespace: kvfs.Namespace) -> None:
    with namespace.get(KEYS) as blocks:
        assert [None if b is None else bytes(b) for b in blocks] == BLOCKS


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_blocks_have_as_many_copies_as_was_said(cluster: ApiCluster, copies: int) -> None:
    with cluster.connect() as client:
        namespace = client.namespace("tenant/model", LAYOUT, create=True, copies=copies)
        assert namespace.put(KEYS, BLOCKS) == 24
        assert copies_of(cluster) == [copies] * 24
        assert_stored(namespace)
        # What it was made with stays, whatever is said later.
        again = client.namespace("tenant/model", LAYOUT, create=True, copies=3)
        assert again.put(block_keys(range(100, 101), 1), [b"one more"]) == 1
        assert copies_of(cluster) == [copies] * 25


def test_copies_that_cannot_be(start_cluster: Callable[..., ApiCluster]) -> None:
    cluster = start_cluster(servers=1, hosts=True)
    with cluster.connect() as client:
        for wrong in (4, -1):
            with pytest.raises(InvalidRequest):
                client.namespace("tenant/model", LAYOUT, create=True, copies=wrong)
        with pytest.raises(InvalidRequest):
            client.namespace("tenant/model", LAYOUT, copies=2)
        with pytest.raises(NoTarget):
            client.namespace("tenant/model", LAYOUT, create=True, copies=2)


def test_any_server_may_stop(cluster: ApiCluster) -> None:
    with cluster.connect() as client:
        namespace = client.namespace("tenant/model", LAYOUT, create=True, copies=2)
        namespace.put(KEYS, BLOCKS)
        for number in range(3):
            cluster.restart_agent()  # nothing is in its arena
            with cluster.without_server(number):
                assert_stored(namespace)
        assert cluster.statistics()["load_failures"] == 0


def test_a_put_outlives_a_member(cluster: ApiCluster) -> None:
    """It waits until the chain does without, and stores whole what it stores."""
    with cluster.connect() as client:
        namespace = client.namespace("tenant/model", LAYOUT, create=True, copies=2)
        namespace.put(KEYS[:1], BLOCKS[:1])
        with cluster.without_server(2):
            assert namespace.put(KEYS, BLOCKS) == 23
            assert_stored(namespace)
        assert copies_of(cluster) == [2] * 24
        cluster.restart_agent()
        cluster.servers[1].stop()
        assert_stored(namespace)


@pytest.mark.logs_warnings
def test_a_damaged_copy_is_not_noticed(
    cluster: ApiCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine another replica may win before the damaged one has answered.
    monkeypatch.setattr(Health, "bound", lambda *_: 60.0)
    with cluster.connect() as client:
        namespace = client.namespace("tenant/model", LAYOUT, create=True, copies=2)
        namespace.put(KEYS, BLOCKS)
        # The agent's own host is asked first.
        bad = [p for p in cluster.chunk_files() if p.startswith(cluster.target(0))]
        assert bad
        for path in bad:
            with open(path, "r+b") as file:
                file.write(b"\xff")
        cluster.restart_agent()
        assert_stored(namespace)
        statistics = cluster.statistics()
        assert statistics["blocks_corrupt"] == 0
        assert statistics["chunk_client_replica_retries"] == len(bad)
        wait_until(lambda: all(Path(path).read_bytes()[0] != 0xFF for path in bad))
        assert cluster.statistics()["chunk_client_repairs_asked"] == len(bad)


# --- files


def in_tree(cluster: ApiCluster, action: Callable[[Tree], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_tree(os_env(), (cluster.metadata_address,)) as tree:
            await action(tree)

    trio.run(main)


async def make_directory(tree: Tree, name: bytes, copies: int) -> None:
    filesystem = tree._filesystem
    made = await filesystem.mkdir(ROOT_INODE, name, 0o755, Caller(os.getuid(), os.getgid()))
    await filesystem.xattrs.set(made.inode, b"user.kvfs.copies", str(copies).encode())


async def read(tree: Tree, path: bytes) -> bytes:
    out = io.BytesIO()
    await tree.read_to(path, out)
    return out.getvalue()


def test_files_of_a_directory_with_copies(cluster: ApiCluster) -> None:
    data = os.urandom(5 * MIB + 7)

    async def write(tree: Tree) -> None:
        await make_directory(tree, b"safe", 2)
        await tree.write_from(b"safe/file", io.BytesIO(data))
        assert await read(tree, b"safe/file") == data

    async def read_again(tree: Tree) -> None:
        assert await read(tree, b"safe/file") == data

    in_tree(cluster, write)
    assert copies_of(cluster) == [2] * 6
    for number in (2, 0):
        with cluster.without_server(number):
            in_tree(cluster, read_again)


def test_a_file_is_written_while_its_servers_go(cluster: ApiCluster) -> None:
    first, second = os.urandom(3 * MIB), os.urandom(3 * MIB)

    async def work(tree: Tree) -> None:
        await make_directory(tree, b"safe", 3)
        filesystem = tree._filesystem
        parent = (await tree.resolve(b"safe")).inode
        await tree.write_from(b"safe/file", io.BytesIO(first))
        attr = await filesystem.lookup(parent, b"file")
        opened = await filesystem.open(attr.inode, os.O_RDWR)
        await trio.to_thread.run_sync(cluster.servers[1].stop)
        await filesystem.write(opened.handle, 3 * MIB - 10, second)
        await filesystem.fsync(opened.handle)
        await filesystem.release(opened.handle)
        assert await read(tree, b"safe/file") == first[:-10] + second

    in_tree(cluster, work)
