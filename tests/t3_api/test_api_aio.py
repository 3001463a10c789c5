"""The trio API: the same answers as the synchronous one, and what is particular to it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

import kvfs
import kvfs.aio
import kvfs.client
from api_cluster import ApiCluster
from kvfs import KVLayout

LAYOUT = KVLayout(block_tokens=1)


def run(cluster: ApiCluster, body: Callable[[kvfs.aio.Namespace], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with await kvfs.aio.connect(str(cluster.agent_address)) as client:
                assert (await client.statistics())["sessions"] == 1
                await body(await client.namespace("t/m", LAYOUT, create=True))

    trio.run(main)


def test_everything_once(cluster: ApiCluster) -> None:
    keys = kvfs.block_keys(range(5), 1)
    data = [key * 10 for key in keys]

    async def body(namespace: kvfs.aio.Namespace) -> None:
        assert namespace.layout == LAYOUT
        assert await namespace.put(keys[:4], data[:4]) == 4
        assert await namespace.match(keys) == 4
        async with await namespace.get(keys) as blocks:
            assert [view and bytes(view) for view in blocks] == [*data[:4], None]
        buffer = bytearray(320)
        assert await namespace.get_into(keys[:1], [buffer]) == [True]
        assert bytes(buffer) == data[0]
        listed = namespace.keys()
        assert [key async for key in listed] == sorted(keys[:4])
        assert await namespace.remove(keys) == 4
        with pytest.raises(kvfs.InvalidRequest):
            await namespace.match([b"short"])

    run(cluster, body)


def test_tasks_run_side_by_side(cluster: ApiCluster) -> None:
    async def one(namespace: kvfs.aio.Namespace, number: int) -> None:
        keys = kvfs.block_keys(range(4), 1, b"%d" % number)
        assert await namespace.put(keys, keys) == 4
        async with await namespace.get(keys) as blocks:
            assert [bytes(view or b"") for view in blocks] == keys

    async def body(namespace: kvfs.aio.Namespace) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, namespace, number)

    run(cluster, body)


def test_blocks_of_a_cancelled_get_are_released(cluster: ApiCluster) -> None:
    keys = kvfs.block_keys(range(4), 1)

    async def body(namespace: kvfs.aio.Namespace) -> None:
        await namespace.put(keys, keys)
        with trio.CancelScope() as scope:
            scope.cancel()
            await namespace.get(keys)
        assert scope.cancelled_caught
        assert await namespace.match(keys) == 4
        assert cluster.statistics()["arena_leased_bytes"] == 0

    run(cluster, body)


@pytest.mark.parametrize("name", ["Client", "Namespace"])
def test_both_apis_have_the_same_methods_and_parameters(name: str) -> None:
    def methods(module: Any) -> dict[str, list[str]]:
        found = inspect.getmembers(getattr(module, name), inspect.isfunction)
        return {
            method: list(inspect.signature(function).parameters)
            for method, function in found
            if not method.startswith("_") and method not in ("keys_page", "ask")
        }

    assert methods(kvfs.aio) == methods(kvfs.client)
