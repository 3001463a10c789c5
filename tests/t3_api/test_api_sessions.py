"""How long leases and sessions live: threads, forks, kills, restarts, closed clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvfs
from api_cluster import MIB, WAIT_SECONDS, ApiCluster, wait_until
from kvfs import KVLayout, Namespace
from kvfs_base.limits import CLIENT_CONNECTIONS_MAX

SIZE = 100_000


def store(namespace: Namespace, count: int) -> tuple[list[bytes], list[bytes]]:
    keys = kvfs.block_keys(range(count), 1)
    data = [os.urandom(SIZE) for _ in keys]
    namespace.put(keys, data)
    return keys, data


def leased(cluster: ApiCluster) -> int:
    return cluster.statistics()["arena_leased_bytes"]


# --- the with block


def test_views_end_with_the_block(namespace: Namespace, cluster: ApiCluster) -> None:
    keys, data = store(namespace, 3)
    with namespace.get([*keys, bytes(32)]) as blocks:
        first, last = blocks[0], blocks[-1]
        assert first is not None and last is None
        assert blocks[0] is first and blocks[-4] is first
        assert first.readonly and bytes(first) == data[0]
        assert len(blocks) == 4 and blocks.hits == 3
        assert [view is None for view in blocks] == [False, False, False, True]
        assert [bytes(view or b"") for view in blocks[1:3]] == data[1:]
        extent = blocks.extents[1]
        assert extent is not None and blocks.extents[3] is None
        assert bytes(blocks.arena.view(*extent)) == data[1]
        for place in (4, -5):
            with pytest.raises(IndexError):
                blocks[place]
        assert leased(cluster) > 0
    with pytest.raises(ValueError):
        bytes(first)
    with pytest.raises(ValueError):
        blocks[0]
    blocks.release()
    assert leased(cluster) == 0


def test_an_array_that_outlives_the_block_keeps_its_bytes(
    start_cluster: Callable[..., ApiCluster],
) -> None:
    cluster = start_cluster(arena_bytes=MIB)
    with cluster.connect() as client:
        namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
        keys, data = store(namespace, 30)
        with namespace.get(keys[:1]) as blocks:
            array = np.frombuffer(blocks[0] or b"", np.uint8)
        for key in keys[1:]:
            with namespace.get([key]):
                pass
        assert array.tobytes() == data[0]
        assert leased(cluster) > 0
        del array
        assert leased(cluster) == 0


def test_blocks_that_are_dropped_are_released(namespace: Namespace, cluster: ApiCluster) -> None:
    keys, _ = store(namespace, 2)
    view = namespace.get(keys)[0]
    assert view is not None and leased(cluster) > 0
    del view
    assert leased(cluster) == 0


# --- closing, threads


def test_a_closed_client_holds_nothing(cluster: ApiCluster) -> None:
    client = cluster.connect()
    namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
    keys, _ = store(namespace, 2)
    blocks = namespace.get(keys)
    view = blocks[0]
    assert view is not None
    client.close()
    client.close()
    with pytest.raises(ValueError):
        bytes(view)
    with pytest.raises(kvfs.InvalidRequest):
        namespace.match(keys)
    wait_until(lambda: cluster.statistics()["connections"] == 0)
    assert cluster.statistics()["sessions"] == 0
    assert leased(cluster) == 0


def test_an_array_keeps_its_lease_even_from_a_closed_client(cluster: ApiCluster) -> None:
    client = cluster.connect()
    namespace = client.namespace("t/m", KVLayout(block_tokens=1), create=True)
    keys, data = store(namespace, 1)
    with namespace.get(keys) as blocks:
        array = np.frombuffer(blocks[0] or b"", np.uint8)
    client.close()
    del client, namespace, blocks
    assert cluster.statistics()["sessions"] == 1
    assert array.tobytes() == data[0]
    del array
    wait_until(lambda: cluster.statistics()["sessions"] == 0)


def test_many_threads_share_a_client(client: kvfs.Client, namespace: Namespace) -> None:
    def work(number: int) -> bool:
        keys = kvfs.block_keys(range(8), 1, b"%d" % number)
        data = [bytes([number]) * (SIZE + number)] * 8
        assert namespace.put(keys, data) == 8
        for _ in range(5):
            with namespace.get(keys) as blocks:
                if [bytes(view or b"") for view in blocks] != data:
                    return False
        return namespace.remove(keys) == 8

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(32)))
    assert client.statistics()["connections"] <= CLIENT_CONNECTIONS_MAX + 1


def test_a_block_that_many_want_is_read_once(
    cluster: ApiCluster, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, data = store(namespace, 4)
    cluster.restart_agent()
    real = cluster.agent._chunks.read_chunks
    gate = threading.Event()

    def slow(reads: object) -> object:
        assert gate.wait(WAIT_SECONDS)
        return real(reads)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster.agent._chunks, "read_chunks", slow)

    def get(_: int) -> list[bytes]:
        with namespace.get(keys) as blocks:
            return [bytes(view or b"") for view in blocks]

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(get, range(4))
        wait_until(lambda: leased(cluster) > 0)
        gate.set()
        assert list(answers) == [data] * 4
    assert cluster.statistics()["blocks_loaded"] == 4
    assert cluster.statistics()["arena_hits"] == 12


# --- the agent goes away


def test_a_restarted_agent_is_found_again_and_old_blocks_stay_readable(
    cluster: ApiCluster, namespace: Namespace
) -> None:
    keys, data = store(namespace, 3)
    with namespace.get(keys) as blocks:
        cluster.restart_agent()
        assert [bytes(view or b"") for view in blocks] == data
        with namespace.get(keys) as again:
            assert [bytes(view or b"") for view in again] == data
            assert again.arena is not blocks.arena
        assert [bytes(view or b"") for view in blocks] == data
    assert namespace.put(keys, data) == 0
    wait_until(lambda: leased(cluster) == 0)


def test_blocks_are_asked_for_first_and_taken_later(
    cluster: ApiCluster, namespace: Namespace
) -> None:
    keys, data = store(namespace, 4)
    answer = namespace.ask(keys)
    assert answer is not None
    assert namespace.ask(keys) is None  # no other connection was ever needed
    with ThreadPoolExecutor(1) as pool, pool.submit(answer.take).result() as blocks:
        assert [bytes(block or b"") for block in blocks] == data
    wait_until(lambda: cluster.statistics()["arena_leased_bytes"] == 0)
    assert namespace.ask(keys * 2048) is None  # more than one request
    with pytest.raises(kvfs.InvalidRequest):
        namespace.ask([b"short"])
    answer = namespace.ask(keys)
    assert answer is not None
    cluster.restart_agent()
    with answer.take() as blocks:
        assert [bytes(block or b"") for block in blocks] == data
    assert namespace.match(keys) == 4


def test_without_an_agent_calls_fail_at_once(cluster: ApiCluster, namespace: Namespace) -> None:
    keys, _ = store(namespace, 1)
    cluster.agent.stop()
    for call in (namespace.match, namespace.get, namespace.remove):
        with pytest.raises(kvfs.ConnectionLost) as caught:
            call(keys)
        assert type(caught.value) is kvfs.ConnectionLost
    with pytest.raises(kvfs.ConnectionLost):
        cluster.connect()
    cluster.agent = cluster._start_agent()
    assert namespace.match(keys) == 1


def test_a_put_whose_agent_stops_fails_and_stores_nothing(
    cluster: ApiCluster, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = kvfs.block_keys(range(3), 1)
    old = cluster.agent
    reached, gate = threading.Event(), threading.Event()

    def stuck(writes: object) -> list[object]:
        reached.set()
        assert gate.wait(WAIT_SECONDS)
        return [kvfs.ConnectionLost()] * len(writes)  # type: ignore[arg-type]

    monkeypatch.setattr(old._chunks, "write_chunks", stuck)
    with ThreadPoolExecutor(2) as pool:
        put = pool.submit(namespace.put, keys, [b"data"] * 3)
        assert reached.wait(WAIT_SECONDS)
        stopping = pool.submit(old.stop)
        with pytest.raises(kvfs.ConnectionLost):
            put.result()
        gate.set()
        stopping.result()
    cluster.agent = cluster._start_agent()
    assert namespace.match(keys) == 0
    assert namespace.put(keys, [b"data"] * 3) == 3


# --- the client goes away

HOLDER = """
import sys, os, kvfs
client = kvfs.connect(sys.argv[1])
namespace = client.namespace("tenant/model")
blocks = namespace.get([bytes.fromhex(k) for k in sys.argv[2:]])
print(blocks.hits, flush=True)
sys.stdin.read()
"""


def test_a_killed_client_loses_its_leases(cluster: ApiCluster, namespace: Namespace) -> None:
    keys, _ = store(namespace, 3)
    argv = [sys.executable, "-c", HOLDER, str(cluster.agent_address), *[k.hex() for k in keys]]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"3\n"
        assert leased(cluster) > 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: leased(cluster) == 0 and cluster.statistics()["sessions"] == 1)


def test_a_fork_gets_a_session_of_its_own(
    cluster: ApiCluster, namespace: Namespace, client: kvfs.Client
) -> None:
    keys, _ = store(namespace, 2)
    code = f"""
import os, sys, kvfs
client = kvfs.connect({str(cluster.agent_address)!r})
namespace = client.namespace("tenant/model")
keys = [bytes.fromhex(k) for k in sys.argv[1:]]
held = namespace.get(keys)
expected = [bytes(view) for view in held]
child = os.fork()
if child == 0:
    before = client.statistics()["sessions"]
    with namespace.get(keys) as blocks:
        good = [bytes(view) for view in blocks] == expected
    held.release()
    os._exit(0 if good and before == 3 else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert [bytes(view) for view in held] == expected
assert client.statistics()["arena_leased_bytes"] > 0, "the child released its parent's lease"
held.release()
client.close()
"""
    argv = [sys.executable, "-W", "error", "-c", code, *[k.hex() for k in keys]]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    wait_until(lambda: cluster.statistics()["sessions"] == 1)


# --- where to connect


def test_targets(cluster: ApiCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFS_TARGET", raising=False)
    for bad in (None, "tcp:127.0.0.1:1", "unix:relative"):
        with pytest.raises(kvfs.InvalidRequest):
            kvfs.connect(bad)
    for missing in ("unix:/nowhere/agent.sock", "/nowhere", cluster.directory):
        with pytest.raises(kvfs.ConnectionLost):
            kvfs.connect(missing)
    run = os.path.join(cluster.directory, "run")
    os.mkdir(run)
    endpoints = os.path.join(run, "endpoints.json")
    for text in ("{", "[]", '{"agent": 3}', '{"agent": "elsewhere"}'):
        with open(endpoints, "w", encoding="ascii") as file:
            file.write(text)
        with pytest.raises(kvfs.InvalidRequest):
            kvfs.connect(cluster.directory)
    with open(endpoints, "w", encoding="ascii") as file:
        json.dump({"format": 1, "agent": str(cluster.agent_address)}, file)
    monkeypatch.setenv("KVFS_TARGET", cluster.directory)
    with kvfs.connect() as client:
        assert client.statistics()["sessions"] == 1
