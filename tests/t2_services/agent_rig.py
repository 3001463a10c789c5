"""A node agent with the other roles in memory, and clients of which every frame is the test's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent_fakes import MemoryChunks, MemoryMetadata
from kvfs.agent.config import AgentConfig
from kvfs.agent.link import Line
from kvfs.agent.messages import (
    GRANTED,
    NO_BLOCK,
    STAGED,
    GetBlocks,
    Granted,
    PreparePut,
    PutPlan,
    StageBlocks,
)
from kvfs.agent.server import Agent
from kvfs_base.limits import MIB, PAGE_BYTES
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from kvfs_gds.arena import ArenaView

NAMESPACE = MemoryMetadata.NAMESPACE
KEYS = [bytes([n]) * 32 for n in range(1, 40)]
NOWHERE = GRANTED.unpack(NO_BLOCK)[0]


class Peer:
    """A client of which every frame is the test's."""

    def __init__(self, agent: RunningAgent, session: bytes = b"") -> None:
        self.agent = agent
        self.line = agent.dial()
        self.welcome, descriptors = self.line.hello(session)
        self.arena: ArenaView | None = None
        self.staging_fd = self.board_fd = -1
        if descriptors:
            self.arena = ArenaView.open(descriptors[0])
            self.staging_fd, self.board_fd = descriptors[1:]

    def call(self, request: Any) -> Any:
        self.line.send(request)
        return self.line.receive(type(request))

    def put(self, keys: list[bytes], data: list[bytes], commit: bool = True) -> PutPlan:
        plan: PutPlan = self.call(PreparePut(NAMESPACE, b"".join(keys), tuple(map(len, data))))
        if plan.put:
            self.call(StageBlocks(plan.put, self.staged(data, plan.wanted), commit))
        return plan

    def staged(self, data: list[bytes], wanted: bytes) -> bytes:
        """Copies blocks to staging one after the other; the list for StageBlocks."""
        offset = 0
        packed = b""
        for place, block in enumerate(data):
            if wanted[place]:
                os.pwrite(self.staging_fd, block, offset)
                packed += STAGED.pack(place, offset)
                offset += -(-len(block) // PAGE_BYTES) * PAGE_BYTES
        return packed

    def get(self, keys: list[bytes]) -> tuple[int, list[bytes | None]]:
        """The lease and the bytes."""
        granted: Granted = self.call(GetBlocks(NAMESPACE, b"".join(keys)))
        arena = self.arena
        assert arena is not None
        blocks: list[bytes | None] = []
        for offset, size, _ in GRANTED.iter_unpack(granted.blocks):
            blocks.append(None if offset == NOWHERE else bytes(arena.view(offset, size)))
        return granted.lease, blocks

    def give_back(self, lease: int) -> None:
        os.pwrite(self.board_fd, b"\1", lease - 1)

    def close(self) -> None:
        self.line.close()
        if self.arena is not None:
            self.arena.close()
            os.close(self.staging_fd)
            os.close(self.board_fd)


class RunningAgent:
    def __init__(self, directory: Path, **settings: Any) -> None:
        self.metadata = MemoryMetadata()
        self.chunks = MemoryChunks()
        self.address = Address.unix(str(directory / "agent.sock"))
        settings = {"arena_bytes": MIB, "staging_bytes": MIB // 4, **settings}
        config = AgentConfig(unix=self.address, metadata=(Address.unix("/nowhere"),), **settings)
        self.env = os_env(seed=1)
        self.agent = Agent(self.env, config, dial_metadata=self.metadata.dial, chunks=self.chunks)
        self.agent.start()
        self.peers: list[Peer] = []
        self.lines: list[Line] = []

    def dial(self) -> Line:
        connection = self.env.blocking_network.connect(self.address, 5.0)
        self.lines.append(Line(connection, self.address))
        return self.lines[-1]

    def peer(self, session: bytes = b"") -> Peer:
        self.peers.append(Peer(self, session))
        return self.peers[-1]

    def figures(self) -> dict[str, int]:
        return self.agent.statistics()

    def stop(self) -> None:
        self.agent.stop()
        for peer in self.peers:
            peer.close()
        for line in self.lines:
            line.close()


@contextlib.contextmanager
def agents(directory: Path) -> Iterator[Callable[..., RunningAgent]]:
    """Starts them, with settings, and stops them all in the end."""
    started: list[RunningAgent] = []

    def start(**settings: Any) -> RunningAgent:
        started.append(RunningAgent(directory, **settings))
        return started[-1]

    yield start
    for agent in started:
        agent.stop()


def block(number: int, size: int = 5000) -> bytes:
    return bytes([number]) * size
