"""A metadata service, three chunk servers and a node agent, real ones, in threads of this process:
fast to start, and tests can reach into each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import trio

import kvfs
from kvfs.agent.config import AgentConfig
from kvfs.agent.server import Agent
from kvfs_base.cluster import Chain, TargetState
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from kvfs_datapath.config import ChunkServerConfig
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_metadata.client import ClusterView
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.service import serve_metadata

WAIT_SECONDS = 60.0
MIB = 1 << 20


def wait_until(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Polls; fails the test when the time is up."""
    clock = os_env().clock
    deadline = clock.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert clock.monotonic() < deadline, "waited in vain"
        pause.wait(0.01)


class MetadataThread:
    """serve_metadata in a trio of its own."""

    def __init__(self, config: MetadataConfig) -> None:
        self._config = config
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT_SECONDS)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:
            self._error = exc
        self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_metadata, os_env(), self._config)
                self._ready.set()

    def stop(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


class ApiCluster:
    """Everything under ``directory``, which may hold what an earlier one left. With ``hosts`` each
    chunk server believes to be on a host of its own, all but the first on another one than the
    agent: those are reached by TCP."""

    def __init__(
        self, directory: str, servers: int = 3, *, hosts: bool = False, **agent_settings: Any
    ) -> None:
        self.directory = directory
        self._hosts = hosts
        self.metadata_address = Address.unix(f"{directory}/metadata.sock")
        self.agent_address = Address.unix(f"{directory}/agent.sock")
        os.makedirs(f"{directory}/metadata", exist_ok=True)
        self.metadata = MetadataThread(
            MetadataConfig(directory=f"{directory}/metadata", unix=self.metadata_address)
        )
        self.servers = [self._start_server(number) for number in range(servers)]
        self._wait_for_targets(servers)
        self.agent_settings = {"arena_bytes": 64 * MIB, "staging_bytes": 16 * MIB, **agent_settings}
        self.agent = self._start_agent()

    def _start_server(self, number: int) -> ChunkServer:
        target = self.target(number)
        os.makedirs(target, exist_ok=True)
        config = ChunkServerConfig(
            server_id=f"server-{number}",
            directories=(target,),
            metadata=(self.metadata_address,),
            unix=Address.unix(f"{self.directory}/chunks-{number}.sock"),
            tcp=Address.tcp("127.0.0.1", 0) if self._hosts else None,
        )
        env = os_env()
        if self._hosts and number:
            env = dataclasses.replace(env, host_id=f"host-{number}")
        server = ChunkServer(env, config)
        server.start()
        return server

    def restart_server(self, number: int) -> None:
        """It may be stopped already."""
        self.servers[number].stop()
        self.servers[number] = self._start_server(number)

    @contextlib.contextmanager
    def without_server(self, number: int) -> Iterator[None]:
        """A server stops before the body; after it the server starts, is found to be another one,
        taken out of its chains, brought in step and put back into each of them."""
        view = ClusterView(os_env(), self.metadata_address)
        try:
            before = {chain.chain_id: chain for chain in view.refresh().chains}
            server = self.servers[number]
            targets = {t.target_id for t in view.current().targets if t.unix in server.addresses}
            assert targets
            server.stop()
            yield
            self.restart_server(number)

            def is_back(chain: Chain) -> bool:
                known = before.get(chain.chain_id)
                if known is None or not known.is_replicated or targets.isdisjoint(known.members):
                    return True
                return chain.version > known.version and len(chain.targets) == chain.copies

            wait_until(lambda: all(map(is_back, view.refresh().chains)), 60)
        finally:
            view.close()

    def _wait_for_targets(self, count: int) -> None:
        view = ClusterView(os_env(), self.metadata_address)

        def serving() -> bool:
            states = [target.state for target in view.refresh().targets]
            # A server knows its own number when it has heard what clients are told.
            numbered = all(s.target_id for server in self.servers for s in server._targets.stores)
            return numbered and states.count(TargetState.SERVING) >= count

        wait_until(serving)
        view.close()

    def _start_agent(self) -> Agent:
        config = AgentConfig(
            unix=self.agent_address, metadata=(self.metadata_address,), **self.agent_settings
        )
        agent = Agent(os_env(), config)
        agent.start()
        return agent

    def restart_agent(self, **settings: Any) -> None:
        """Another agent at the same address; the arena starts empty."""
        self.agent.stop()
        self.agent_settings |= settings
        self.agent = self._start_agent()

    def target(self, number: int) -> str:
        return f"{self.directory}/targets/{number}"

    def chunk_files(self) -> list[str]:
        """Paths of all chunk files, in the order of their inode numbers."""
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(f"{self.directory}/targets")
            if "/chunks" in folder or "/chains" in folder
            for name in names
        ]
        return sorted(found, key=os.path.basename)

    def connect(self) -> kvfs.Client:
        return kvfs.connect(str(self.agent_address))

    def statistics(self) -> dict[str, int]:
        return self.agent.statistics()

    def stop(self) -> None:
        self.agent.stop()
        for server in self.servers:
            server.stop()
        self.metadata.stop()
