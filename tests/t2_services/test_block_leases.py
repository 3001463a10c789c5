"""Agents that answer for blocks by themselves: real metadata servers, chunks in memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfs
from agent_fakes import MemoryChunks
from kvfs.agent.config import AgentConfig
from kvfs.agent.server import Agent
from kvfs.agent.watching import Uses
from kvfs_base.limits import MIB, USED_KEYS_BYTES_MAX
from kvfs_base.os_env import os_env
from kvfs_base.types import Address, KVLayout
from kvfs_metadata import messages as m
from metadata_servers import Servers, Store, running
from t2_services.chunk_cluster import wait_until

KEYS = [bytes([n]) * 32 for n in range(1, 9)]
LAYOUT = KVLayout(block_tokens=16)


class World:
    """``agents`` of one metadata server, each with a client."""

    def __init__(self, directory: Path, servers: Servers, agents: int) -> None:
        self.servers = servers
        self.chunks = MemoryChunks()
        self.agents = [self._agent(directory / f"agent{n}.sock") for n in range(agents)]
        self.clients = [kvfs.connect(str(agent._config.unix)) for agent in self.agents]
        self.namespaces = [c.namespace("t/m", layout=LAYOUT, create=True) for c in self.clients]
        self.metadata = servers.client()

    def _agent(self, path: Path) -> Agent:
        config = AgentConfig(
            unix=Address.unix(str(path)),
            metadata=tuple(self.servers.addresses),
            arena_bytes=MIB,
            staging_bytes=MIB // 4,
        )
        agent = Agent(os_env(), config, chunks=self.chunks)
        agent.start()
        return agent

    def watched(self) -> None:
        """Until they may keep what they are told."""
        caches = [agent._cache for agent in self.agents]
        wait_until(lambda: None not in [cache.revocations for cache in caches])

    def put(self, number: int, key: bytes, value: bytes) -> None:
        self.namespaces[number].put([key], [value * 4096])

    def get(self, number: int, *keys: bytes) -> list[bytes | None]:
        with self.namespaces[number].get(keys) as blocks:
            return [None if block is None else bytes(block[:1]) for block in blocks]

    def leased(self, number: int) -> int:
        return self.agents[number].statistics()["blocks_leased"]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for agent in self.agents:
            agent.stop()
        self.metadata.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with running(tmp_path, Store("lmdb-cache")) as servers:
        made = World(tmp_path, servers, 2)
        try:
            made.watched()
            yield made
        finally:
            made.close()


def test_a_second_get_asks_nobody(world: World) -> None:
    world.put(0, KEYS[0], b"a")
    assert world.get(1, KEYS[0]) == [b"a"]
    before = world.metadata.call(m.Statistics())["lookup_hits"]
    assert [world.get(1, KEYS[0]) for _ in range(5)] == [[b"a"]] * 5
    assert world.leased(1) == 5
    # They are counted, and count as uses, once they are told.
    wait_until(lambda: world.metadata.call(m.Statistics())["lookup_hits"] == before + 5)


def test_a_batch_with_a_key_that_is_not_leased_is_asked_for(world: World) -> None:
    world.put(0, KEYS[0], b"a")
    world.get(1, KEYS[0])
    assert world.get(1, KEYS[0], KEYS[1]) == [b"a", None]
    world.put(0, KEYS[1], b"b")
    assert world.get(1, KEYS[0], KEYS[1]) == [b"a", b"b"]
    assert world.leased(1) == 0
    assert world.get(1, KEYS[0], KEYS[1]) == [b"a", b"b"]
    assert world.leased(1) == 2


def test_a_match_asks_for_what_is_behind_the_leased_prefix(world: World) -> None:
    for key in KEYS[:4]:
        world.put(0, key, b"x")
    world.get(1, *KEYS[:2])
    before = world.metadata.call(m.Statistics())
    assert world.namespaces[1].match(KEYS) == 4
    assert world.namespaces[1].match(KEYS[:2]) == 2

    def told() -> bool:
        after = world.metadata.call(m.Statistics())
        hits, misses = (after[name] - before[name] for name in ("match_hits", "match_misses"))
        assert misses == 4
        return hits == 6

    wait_until(told)


def test_what_is_removed_is_gone_when_that_is_answered(world: World) -> None:
    for turn in range(50):
        value = bytes([65 + turn % 26])
        world.put(0, KEYS[0], value)
        assert world.get(1, KEYS[0]) == [value]
        assert world.get(1, KEYS[0]) == [value]
        world.namespaces[0].remove([KEYS[0]])
        assert world.get(1, KEYS[0]) == [None]
    assert world.leased(1) == 50


def test_an_agent_is_told_of_its_own_removals(world: World) -> None:
    world.put(0, KEYS[0], b"a")
    assert [world.get(0, KEYS[0]) for _ in range(2)] == [[b"a"]] * 2
    world.namespaces[0].remove([KEYS[0]])
    assert world.get(0, KEYS[0]) == [None]


def test_nothing_is_given_while_the_service_is_away(world: World) -> None:
    """And after it has come back everything is asked for anew."""
    world.put(0, KEYS[0], b"a")
    assert [world.get(1, KEYS[0]) for _ in range(2)] == [[b"a"]] * 2
    world.servers.kill()
    cache = world.agents[1]._cache
    wait_until(lambda: cache.revocations is None)
    assert cache.leased_prefix(world.namespaces[1]._inode, [KEYS[0]], 0.0) == 0
    world.servers.start()
    world.watched()
    assert world.get(1, KEYS[0]) == [b"a"]
    assert world.leased(1) == 1
    world.namespaces[0].remove([KEYS[0]])
    assert world.get(1, KEYS[0]) == [None]


def test_blocks_that_are_used_by_lease_are_not_given_up_first(tmp_path: Path) -> None:
    with running(tmp_path, Store("lmdb-cache")) as servers:
        world = World(tmp_path, servers, 1)
        try:
            world.watched()
            for key in KEYS[:3]:
                world.put(0, key, b"x")
            world.get(0, KEYS[0])
            world.get(0, KEYS[1])
            world.get(0, KEYS[2])
            assert world.get(0, KEYS[0]) == [b"x"]
            assert world.leased(0) == 1
            namespace = world.metadata.call(m.Resolve(b"/kv/t/m"))
            world.metadata.call(m.SetQuota(namespace.inode, 3 * 4096))
            world.put(0, KEYS[3], b"y")
            assert world.get(0, KEYS[0]) == [b"x"]
        finally:
            world.close()


def test_many_clients_never_see_what_is_gone(world: World) -> None:
    """Each key has one thread that changes it, and that knows what everybody must see."""
    failures: list[BaseException] = []

    def change(number: int, key: bytes) -> None:
        rng = random.Random(number)
        try:
            for turn in range(60):
                value = bytes([rng.randrange(1, 256)])
                world.put(rng.randrange(2), key, value)
                for _ in range(3):
                    assert world.get(rng.randrange(2), key) == [value], turn
                world.namespaces[rng.randrange(2)].remove([key])
                assert world.get(rng.randrange(2), key) == [None], turn
        except BaseException as exc:
            failures.append(exc)

    threads = [
        threading.Thread(target=change, args=(number, key)) for number, key in enumerate(KEYS[:4])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert world.leased(0) + world.leased(1) > 100


# --- uses


def test_uses_are_told_in_order_in_few_requests() -> None:
    uses = Uses()
    uses.looked_up(1, KEYS[0])
    uses.matched(1, KEYS[1] + KEYS[2])
    uses.looked_up(1, KEYS[0])
    uses.matched(2, KEYS[3])
    assert uses.take() == [
        m.UseBlocks(1, KEYS[1] + KEYS[2] + KEYS[0], matched=2, looked_up=2),
        m.UseBlocks(2, KEYS[3], matched=1),
    ]
    assert uses.take() == []


def test_uses_that_nobody_takes_are_bounded() -> None:
    uses = Uses()
    batch = 4096
    for number in range(USED_KEYS_BYTES_MAX // (32 * batch) + 3):
        uses.looked_up(1, number.to_bytes(32, "big") * batch)
    told = uses.take()
    assert sum(len(use.keys) for use in told) == USED_KEYS_BYTES_MAX
    assert max(len(use.keys) for use in told) == 32 * batch
    assert told[0].keys[:32] == (3).to_bytes(32, "big")
