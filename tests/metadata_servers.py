"""Metadata services as processes of their own, on each kind of store, to race against and to kill.

A test that takes ``store`` runs on all of them. PostgreSQL takes part once there is an engine for
it (``engines.postgres_engine``), a setting ``store``, and the fixture ``postgres_url`` (in
``tests/postgres_server.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forks import Forked
from kvfs.settings import settings_of
from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.errors import ConnectionLost
from kvfs_base.limits import HEARTBEAT_SECONDS
from kvfs_base.os_env import os_env
from kvfs_base.seams import BlockingNetwork, Buffer, Connection, Env, Listener
from kvfs_base.types import Address, KVLayout
from kvfs_metadata import messages as m
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.config import MetadataConfig

HEARTBEAT = Heartbeat("server", "host", None, None, (TargetReport("t", 1 << 40, 1 << 40, True, 0),))


@dataclasses.dataclass(frozen=True)
class Store:
    """``servers`` of one store. ``reads_wait`` says that blocks are shown only once they are as
    durable as their commit; if they are not, a reader may see one that a kill takes back."""

    name: str
    durability: str = "cache"
    servers: int = 1
    reads_wait: bool = True
    url: str = ""


STORES = (
    Store("lmdb-cache"),
    Store("lmdb-strict", durability="strict", reads_wait=False),
    Store("postgres"),
    Store("postgres-two-servers", servers=2),
)


@pytest.fixture(params=STORES, ids=lambda store: store.name)
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.param
    if not found.name.startswith("postgres"):
        return found
    for module in ("kvfs_metadata.engines.postgres_engine", "postgres_server"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"there is no {module}")
    if not any(setting.name == "store" for setting in settings_of(MetadataConfig, "metadata")):
        pytest.skip("the metadata service has no setting 'store'")
    plugins = request.config.pluginmanager
    fixtures = importlib.import_module("postgres_server")
    if not plugins.is_registered(fixtures):
        plugins.register(fixtures)  # its fixtures can be asked for from now on
    return dataclasses.replace(found, url=request.getfixturevalue("postgres_url"))


class Servers:
    """The servers of a store. Ends with ``stop``, whatever state they are in."""

    def __init__(self, directory: Path, store: Store) -> None:
        self.directory = directory / "store"
        self.store = store
        self.addresses = [Address.unix(f"{directory}/m{n}.sock") for n in range(store.servers)]
        self._processes: dict[int, Forked] = {}

    def start(self, number: int = 0) -> None:
        flags = [f"--unix={self.addresses[number]}", f"--durability={self.store.durability}"]
        if self.store.url:
            flags.append(f"--store={self.store.url}")
        if not self.store.url or _is_required("directory"):
            flags.append(f"--directory={self.directory}")
        process = self._processes[number] = Forked("kvfs.cli:main", "serve", "metadata", *flags)
        assert json.loads(process.stdout.readline())["event"] == "ready"

    def start_all(self) -> None:
        for number in range(self.store.servers):
            self.start(number)

    def kill(self, number: int = 0) -> None:
        process = self._processes.pop(number)
        process.kill()
        process.wait()
        process.stdout.close()

    def stop(self) -> None:
        """By SIGTERM; each must end well."""
        codes = []
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            codes.append(process.wait(60))
            process.stdout.close()
        self._processes.clear()
        assert set(codes) <= {0}

    def client(self, first: int = 0, env: Env | None = None) -> BlockingMetadataClient:
        """One that begins with server ``first`` and knows the others."""
        first %= len(self.addresses)
        addresses = [*self.addresses[first:], *self.addresses[:first]]
        return BlockingMetadataClient(env or os_env(), addresses, retry_seconds=60)

    @contextlib.contextmanager
    def heartbeats(self) -> Iterator[None]:
        """There is a target for as long, so blocks can be put."""
        ended = threading.Event()
        failures: list[BaseException] = []
        client = self.client()
        client.call(HEARTBEAT)

        def beat() -> None:
            try:
                while not ended.wait(HEARTBEAT_SECONDS):
                    client.call(HEARTBEAT)
            except BaseException as exc:
                failures.append(exc)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            client.close()
        assert failures == []


class BreakingNetwork:
    """Some connections break after a request was sent: before its answer is waited for, so that
    the server may carry it out at any later time, or when the answer is there."""

    def __init__(self, network: BlockingNetwork, rng: random.Random, chance: float) -> None:
        self._network = network
        self._rng = rng
        self._chance = chance
        self.broken = 0

    def connect(self, address: Address, timeout: float) -> Connection:
        return _BreakingConnection(self, self._network.connect(address, timeout))

    def listen(self, address: Address) -> Listener:
        return self._network.listen(address)

    def breaks(self) -> bool:
        if self._rng.random() >= self._chance:
            return False
        self.broken += 1
        return True


class _BreakingConnection:
    can_pass_descriptors = False

    def __init__(self, network: BreakingNetwork, connection: Connection) -> None:
        self._network = network
        self._connection = connection

    def send(
        self, parts: Sequence[Buffer], descriptors: Sequence[int] = (), *, more: bool = False
    ) -> None:
        self._connection.send(parts, descriptors, more=more)
        if self._network.breaks():
            raise ConnectionLost(detail="broken after a request")

    def receive_into(self, views: Sequence[memoryview]) -> None:
        self._connection.receive_into(views)
        if self._network.breaks():
            raise ConnectionLost(detail="broken within an answer")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def breaking_env(seed: int, chance: float) -> tuple[Env, BreakingNetwork]:
    env = os_env()
    network = BreakingNetwork(env.blocking_network, random.Random(seed), chance)
    return dataclasses.replace(env, blocking_network=network), network


def _is_required(name: str) -> bool:
    return any(s.name == name and s.required for s in settings_of(MetadataConfig, "metadata"))


@contextlib.contextmanager
def running(directory: Path, store: Store) -> Iterator[Servers]:
    servers = Servers(directory, store)
    servers.directory.mkdir()
    try:
        servers.start_all()
        with servers.heartbeats():
            yield servers
    finally:
        servers.stop()


def make_directory(client: BlockingMetadataClient, name: str) -> int:
    made = client.call(m.Make(1, name.encode(), 0o040755))
    return int(made.inode)


def make_namespace(client: BlockingMetadataClient, path: str) -> int:
    layout = KVLayout(block_tokens=16)
    return int(client.call(m.OpenNamespace(path, layout, create=True)).inode)


def play(players: Sequence[Any], moves: int) -> None:
    """Each player in a thread of its own. Raises what one of them raised."""
    failures: list[BaseException] = []
    begin = threading.Barrier(len(players))

    def run(player: Any) -> None:
        try:
            begin.wait(60)
            for _ in range(moves):
                if failures:
                    return
                player.move()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(player,)) for player in players]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
