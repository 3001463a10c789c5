"""The Python API from end to end: real metadata service, chunk servers and agent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvfs
from api_cluster import MIB, ApiCluster, wait_until
from kvfs import KVLayout, Namespace
from kvfs_base.limits import BATCH_BLOCKS_MAX, PAGE_BYTES
from kvfs_base.os_env import os_env
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.messages import Resolve, SetQuota

SIZE = 3 * PAGE_BYTES + 17


def make_blocks(count: int, salt: bytes = b"", size: int = SIZE) -> tuple[list[bytes], list[bytes]]:
    keys = kvfs.block_keys(range(count), 1, salt)
    return keys, [os.urandom(size) for _ in keys]


def found(namespace: Namespace, keys: list[bytes]) -> list[bytes | None]:
    with namespace.get(keys) as blocks:
        return [None if view is None else bytes(view) for view in blocks]


# --- put, match, get, remove


def test_what_was_put_is_what_is_got(namespace: Namespace, cluster: ApiCluster) -> None:
    keys, data = make_blocks(20)
    assert namespace.match(keys) == 0
    assert found(namespace, keys) == [None] * 20
    assert namespace.put(keys, data) == 20
    assert namespace.match(keys) == 20
    assert found(namespace, keys) == data
    cluster.restart_agent()  # the arena is empty: now from disk
    assert found(namespace, keys) == data
    assert cluster.statistics()["blocks_loaded"] == 20


def test_blocks_in_the_arena_are_counted(namespace: Namespace, cluster: ApiCluster) -> None:
    keys, data = make_blocks(6)
    assert namespace.resident(keys) == 0
    namespace.put(keys, data)
    assert namespace.resident([*keys, bytes(32)]) == 6
    cluster.restart_agent()
    assert namespace.resident(keys) == 0
    assert found(namespace, keys[:2]) == data[:2]
    assert namespace.resident(keys) == 2
    namespace.remove(keys[:1])
    assert namespace.resident(keys) == 1


def test_without_keeping_puts_the_bytes_come_from_disk(
    start_cluster: Callable[..., ApiCluster],
) -> None:
    cluster = start_cluster(keep_puts=False)
    with cluster.connect() as client:
        namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = make_blocks(5)
        namespace.put(keys, data)
        assert cluster.statistics()["arena_blocks"] == 0
        assert found(namespace, keys) == data


def test_a_stored_key_keeps_its_bytes(namespace: Namespace, cluster: ApiCluster) -> None:
    keys, data = make_blocks(6)
    assert namespace.put(keys[:4], data[:4]) == 4
    assert namespace.put(keys, [bytes(SIZE)] * 4 + data[4:]) == 2
    assert namespace.put(keys, data) == 0
    assert found(namespace, keys) == data
    assert cluster.statistics()["put_duplicates"] == 4 + 6
    assert len(cluster.chunk_files()) == 6


def test_a_key_named_twice_keeps_its_first_bytes(namespace: Namespace) -> None:
    keys, data = make_blocks(2)
    assert namespace.put([keys[0], keys[1], keys[0]], [*data, bytes(SIZE)]) == 2
    assert found(namespace, [keys[0], keys[0], keys[1]]) == [data[0], data[0], data[1]]


def test_match_counts_to_the_first_gap(namespace: Namespace) -> None:
    keys, data = make_blocks(5)
    namespace.put(keys[:2] + keys[3:], data[:2] + data[3:])
    assert namespace.match(keys) == 2
    assert namespace.match(keys[3:]) == 2
    assert namespace.match(keys[2:]) == 0
    assert namespace.match([]) == 0
    assert found(namespace, keys) == [data[0], data[1], None, data[3], data[4]]


def test_removed_blocks_are_gone_even_from_the_arena(namespace: Namespace) -> None:
    keys, data = make_blocks(3)
    namespace.put(keys, data)
    with namespace.get(keys) as blocks:
        assert namespace.remove(keys[:2]) == 2
        assert bytes(blocks[0] or b"") == data[0], "who holds a block keeps its bytes"
    assert namespace.remove(keys[:2]) == 0
    assert found(namespace, keys) == [None, None, data[2]]


def test_a_key_that_is_stored_again_shows_its_new_bytes(
    namespace: Namespace, cluster: ApiCluster
) -> None:
    """Another client removed and stored it: this agent's arena still has the old generation."""
    keys, data = make_blocks(1)
    namespace.put(keys, data)
    with namespace.get(keys) as blocks:
        old = blocks.generations
        namespace.remove(keys)
        namespace.put(keys, [b"other bytes"])
        assert bytes(blocks[0] or b"") == data[0]
        with namespace.get(keys) as again:
            assert bytes(again[0] or b"") == b"other bytes"
            assert again.generations != old


def test_namespaces_are_apart(client: kvfs.Client) -> None:
    one = client.namespace("tenant/one", KVLayout(block_tokens=1), create=True)
    two = client.namespace("tenant/two", KVLayout(block_tokens=1), create=True)
    keys, data = make_blocks(2)
    one.put(keys, data)
    assert two.match(keys) == 0
    assert two.put(keys, [b"a", b"b"]) == 2
    assert found(one, keys) == data
    assert found(two, keys) == [b"a", b"b"]


def test_listing_is_complete_and_in_order(namespace: Namespace) -> None:
    keys, _ = make_blocks(1500)
    namespace.put(keys, [b"x"] * len(keys))
    assert list(namespace.keys()) == sorted(keys)


def test_longer_lists_than_a_request_takes(namespace: Namespace) -> None:
    keys, _ = make_blocks(BATCH_BLOCKS_MAX + 10)
    with pytest.raises(kvfs.LimitExceeded):
        namespace.put(keys, [b"x"] * len(keys))
    for part in (keys[:BATCH_BLOCKS_MAX], keys[BATCH_BLOCKS_MAX:]):
        namespace.put(part, [key[:9] for key in part])
    assert namespace.match(keys) == len(keys)
    with namespace.get(keys) as blocks:
        assert blocks.hits == len(keys)
        assert [bytes(view or b"") for view in blocks[-12:]] == [key[:9] for key in keys[-12:]]
    assert namespace.remove(keys) == len(keys)


# --- whole or not at all


@pytest.mark.parametrize("keep_puts", [True, False])
def test_a_put_that_one_server_fails_stores_nothing(
    start_cluster: Callable[..., ApiCluster], keep_puts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_cluster(keep_puts=keep_puts)
    real = cluster.agent._chunks.write_chunks

    def failing(writes: Any) -> list[Any]:
        results = real(writes)
        return [*results[:-1], kvfs.DiskFull(path="injected")]

    with cluster.connect() as client:
        namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = make_blocks(9)
        monkeypatch.setattr(cluster.agent._chunks, "write_chunks", failing)
        with pytest.raises(kvfs.DiskFull):
            namespace.put(keys, data)
        assert found(namespace, keys) == [None] * 9
        assert list(namespace.keys()) == []
        assert cluster.statistics()["puts_aborted"] == 1
        monkeypatch.undo()
        assert namespace.put(keys, data) == 9
        assert found(namespace, keys) == data


def test_a_put_larger_than_its_staging_area_goes_in_rounds_and_appears_at_once(
    start_cluster: Callable[..., ApiCluster],
) -> None:
    cluster = start_cluster(staging_bytes=8 * PAGE_BYTES)
    with cluster.connect() as client:
        namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = make_blocks(25)
        assert namespace.put(keys, data) == 25
        assert found(namespace, keys) == data
        one, whole = make_blocks(1, b"whole", 8 * PAGE_BYTES)
        assert namespace.put(one, whole) == 1
        with pytest.raises(kvfs.LimitExceeded):
            namespace.put(*make_blocks(1, b"too large", 8 * PAGE_BYTES + 1))


# --- wrong bytes are misses


@pytest.mark.logs_warnings
def test_bytes_flipped_on_disk_are_a_miss_and_counted(
    namespace: Namespace, cluster: ApiCluster
) -> None:
    keys, data = make_blocks(4)
    namespace.put(keys, data)
    cluster.restart_agent()
    victim = cluster.chunk_files()[1]
    with open(victim, "r+b") as file:
        file.seek(PAGE_BYTES)
        byte = file.read(1)
        file.seek(PAGE_BYTES)
        file.write(bytes([byte[0] ^ 1]))
    assert found(namespace, keys) == [data[0], None, data[2], data[3]]
    assert cluster.statistics()["blocks_corrupt"] == 1
    assert namespace.match(keys) == 1, "it is no longer promised"
    assert namespace.put(keys, data) == 1
    assert found(namespace, keys) == data


@pytest.mark.logs_warnings
def test_a_chunk_that_is_gone_is_a_miss_and_counted(
    namespace: Namespace, cluster: ApiCluster
) -> None:
    keys, data = make_blocks(3)
    namespace.put(keys, data)
    cluster.restart_agent()
    os.unlink(cluster.chunk_files()[0])
    assert found(namespace, keys) == [None, *data[1:]]
    assert cluster.statistics()["blocks_missing"] == 1
    assert namespace.match(keys) == 0


@pytest.mark.logs_warnings
def test_another_blocks_bytes_are_never_returned(namespace: Namespace, cluster: ApiCluster) -> None:
    """Two chunk files change places, with everything that lies beside them: each is intact, but
    neither is what its name says."""
    keys, data = make_blocks(9)
    namespace.put(keys, data)
    cluster.restart_agent()
    files = cluster.chunk_files()
    a, b = files[0], files[3]
    assert os.path.getsize(a) == os.path.getsize(b)
    os.rename(a, a + ".x")
    os.rename(b, a)
    os.rename(a + ".x", b)
    assert found(namespace, keys) == [None, *data[1:3], None, *data[4:]]
    assert cluster.statistics()["blocks_corrupt"] == 2


def test_a_server_that_is_away_is_a_miss_but_its_blocks_stay(
    namespace: Namespace, cluster: ApiCluster
) -> None:
    keys, data = make_blocks(6)
    namespace.put(keys, data)
    cluster.restart_agent()
    cluster.servers[0].stop()
    there = found(namespace, keys)
    assert 0 < there.count(None) < 6
    assert all(view in (None, expected) for view, expected in zip(there, data, strict=True))
    assert cluster.statistics()["load_failures"] == there.count(None)
    cluster.servers[0] = cluster._start_server(0)
    wait_until(lambda: found(namespace, keys) == data)


# --- the arena


def test_data_larger_than_the_arena(start_cluster: Callable[..., ApiCluster]) -> None:
    cluster = start_cluster(arena_bytes=1 * MIB)
    with cluster.connect() as client:
        namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = make_blocks(40, size=100_000)
        namespace.put(keys, data)
        for first in range(0, 40, 5):
            assert found(namespace, keys[first : first + 5]) == data[first : first + 5]
        assert cluster.statistics()["arena_evictions"] > 0
        assert cluster.statistics()["arena_used_bytes"] <= MIB
        with pytest.raises(kvfs.ArenaFull):
            namespace.get(keys)
        buffers = [bytearray(100_000) for _ in keys]
        assert namespace.get_into(keys[:4], buffers[:4]) == [True] * 4


def test_leased_bytes_survive_eviction(start_cluster: Callable[..., ApiCluster]) -> None:
    cluster = start_cluster(arena_bytes=1 * MIB, client_leased_bytes=MIB)
    with cluster.connect() as client:
        namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = make_blocks(30, size=100_000)
        namespace.put(keys, data)
        with namespace.get(keys[:5]) as held:
            for key in keys[5:]:
                with namespace.get([key]):
                    pass
            assert cluster.statistics()["arena_evictions"] > 0
            assert [bytes(view or b"") for view in held] == data[:5]
            with pytest.raises(kvfs.ArenaFull):
                namespace.get(keys[5:12])
        assert found(namespace, keys[5:12]) == data[5:12]


def test_one_client_cannot_lease_everything(start_cluster: Callable[..., ApiCluster]) -> None:
    cluster = start_cluster(arena_bytes=1 * MIB)
    with cluster.connect() as greedy, cluster.connect() as other:
        namespace = greedy.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = make_blocks(9, size=100_000)
        namespace.put(keys, data)
        with namespace.get(keys[:7]) as blocks:
            assert blocks.hits == 7
            with pytest.raises(kvfs.ArenaFull):
                namespace.get(keys[7:])
            with other.namespace("t/m").get(keys[7:]) as blocks:
                assert blocks.hits == 2


def test_two_clients_share_one_copy(cluster: ApiCluster, namespace: Namespace) -> None:
    keys, data = make_blocks(8)
    namespace.put(keys, data)
    cluster.restart_agent()
    assert found(namespace, keys) == data
    with cluster.connect() as other:
        assert found(other.namespace("tenant/model"), keys) == data
    figures = cluster.statistics()
    assert (figures["blocks_loaded"], figures["arena_hits"]) == (8, 8)


# --- buffers


def test_numpy_arrays_of_any_dtype_and_shape(namespace: Namespace) -> None:
    arrays = [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.zeros((2, 2), dtype="f2"),
        np.array(["2024-01-01"], dtype="M8[s]"),
        memoryview(np.arange(5)),
        bytearray(b"bytearray"),
    ]
    keys, _ = make_blocks(len(arrays))
    namespace.put(keys, arrays)
    with namespace.get(keys) as blocks:
        first = blocks[0]
        assert first is not None
        assert np.array_equal(np.frombuffer(first, np.float32).reshape(3, 4), arrays[0])
        assert [len(view or b"") for view in blocks] == [48, 8, 8, 40, 9]


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4))[:, ::2],
        memoryview(b"abcdef")[::2],
        "text",
        17,
        None,
        b"",
        np.zeros((0, 3)),
    ],
    ids=["strided array", "strided view", "str", "int", "None", "empty", "empty array"],
)
def test_what_is_no_buffer_is_refused(namespace: Namespace, bad: Any) -> None:
    keys, data = make_blocks(2)
    with pytest.raises(kvfs.InvalidRequest):
        namespace.put(keys, [data[0], bad])
    assert namespace.match(keys) == 0


def test_torch_tensors(namespace: Namespace) -> None:
    torch = pytest.importorskip("torch")
    tensors = [
        torch.randn(3, 5, dtype=torch.bfloat16),
        torch.randn(7),
        torch.randn(4, requires_grad=True),
        torch.arange(6, dtype=torch.int64),
    ]
    keys, _ = make_blocks(len(tensors))
    namespace.put(keys, tensors)
    copies = [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]
    assert namespace.get_into(keys, copies) == [True] * 4
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
    with pytest.raises(kvfs.InvalidRequest):
        namespace.put(keys[:1], [torch.zeros(4, 4).t()[1:]])


def test_a_layout_with_a_size_is_checked_before_anything_is_sent(client: kvfs.Client) -> None:
    layout = KVLayout(block_tokens=16, block_bytes=100)
    namespace = client.namespace("t/sized", layout, create=True)
    keys, _ = make_blocks(2)
    before = client.statistics()["connections"]
    for call in (namespace.put, namespace.get_into):
        with pytest.raises(kvfs.InvalidRequest):
            call(keys, [bytearray(100), bytearray(99)])
        with pytest.raises(kvfs.InvalidRequest):
            call(keys, [bytearray(100)])
    assert namespace.match(keys) == 0
    assert client.statistics()["connections"] == before
    assert client.namespace("t/sized").layout == layout
    with pytest.raises(kvfs.LayoutMismatch):
        client.namespace("t/sized", KVLayout(block_tokens=17))


def test_get_into_fills_what_is_there(namespace: Namespace) -> None:
    keys, data = make_blocks(3)
    namespace.put(keys[:2], data[:2])
    buffers = [bytearray(SIZE), np.zeros(SIZE, np.uint8), bytearray(SIZE)]
    assert namespace.get_into(keys, buffers) == [True, True, False]
    assert bytes(buffers[0]) == data[0]
    assert buffers[1].tobytes() == data[1]  # type: ignore[union-attr]
    assert bytes(buffers[2]) == bytes(SIZE)
    with pytest.raises(kvfs.InvalidRequest):
        namespace.get_into(keys[:1], [bytes(SIZE)])
    short = [bytearray(b"untouched"), bytearray(SIZE)]
    with pytest.raises(kvfs.InvalidRequest):
        namespace.get_into(keys[:2], short)
    assert short == [bytearray(b"untouched"), bytearray(SIZE)]


@pytest.mark.parametrize("keys", [[b"short"], ["a" * 32], [bytes(31), bytes(33)], [None]])
def test_keys_are_32_bytes(namespace: Namespace, keys: Any) -> None:
    for call in (namespace.match, namespace.get, namespace.remove):
        with pytest.raises(kvfs.InvalidRequest):
            call(keys)
    with pytest.raises(kvfs.InvalidRequest):
        namespace.put(keys, [b"x"] * len(keys))


def test_namespaces_that_are_not_there(client: kvfs.Client) -> None:
    with pytest.raises(kvfs.EntryNotFound):
        client.namespace("no/such")
    with pytest.raises(kvfs.InvalidRequest):
        client.namespace("t/new", create=True)


def test_a_quota_bounds_a_tenants_blocks(cluster: ApiCluster, namespace: Namespace) -> None:
    """Its own older blocks give way; what is more than all of it is refused."""
    keys, data = make_blocks(6)
    with contextlib.closing(BlockingMetadataClient(os_env(), cluster.metadata_address)) as metadata:
        tenant = metadata.call(Resolve(b"kv/tenant")).inode
        metadata.call(SetQuota(tenant, bytes_max=4 * SIZE))
    assert namespace.put(keys[:3], data[:3]) == 3
    with pytest.raises(kvfs.QuotaExceeded) as caught:
        namespace.put(keys[1:] + kvfs.block_keys(range(9), 1, b"more")[:2], [*data[1:], *data[:2]])
    assert caught.value.directory == tenant and caught.value.what == "bytes"
    assert namespace.match(keys) == 3
    assert namespace.put(keys[3:6], data[3:6]) == 3
    assert [bool(namespace.match([key])) for key in keys].count(True) == 4
    assert found(namespace, keys[3:]) == data[3:]
