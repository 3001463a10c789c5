"""Puts of the node agent whose chains change before they are committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs.agent.messages import PreparePut, PutPlan, StageBlocks
from kvfs_base.errors import ConnectionLost, StaleChain
from kvfs_base.limits import COMMIT_ATTEMPTS_MAX
from kvfs_base.rpc import Request
from kvfs_base.types import ChunkId
from kvfs_datapath.client.chunk_client import ChunkWrite
from kvfs_metadata import messages as m
from t2_services.agent_rig import KEYS, NAMESPACE, RunningAgent, block

SINGLE, SEVERAL, OTHER = 1, 20, 21


@pytest.fixture(params=[True, False], ids=["kept", "not kept"])
def agent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningAgent]:
    """Blocks rotate over one chain of one copy and two of several."""
    agent = RunningAgent(tmp_path, keep_puts=request.param)
    agent.metadata.chains = (SINGLE, SEVERAL, OTHER)
    agent.metadata.chain_versions = {SEVERAL: 3, OTHER: 5}
    agent.chunks.chain_versions = agent.metadata.chain_versions
    yield agent
    agent.stop()


class Writes:
    """To which chains chunks went, in order."""

    def __init__(self, agent: RunningAgent) -> None:
        self.agent = agent
        self.chains: list[int] = []
        agent.chunks.before = self.note

    def note(self, batch: Any) -> None:
        self.chains += [item.chain for item in batch if isinstance(item, ChunkWrite)]


def change_at_commit(agent: RunningAgent, chain: int, times: int) -> None:
    """The chain gets another version just before each of the next commits."""
    left = [times]

    def before(request: Request) -> None:
        if isinstance(request, m.CommitBlocks) and left[0]:
            left[0] -= 1
            agent.metadata.chain_versions[chain] += 1

    agent.metadata.before = before


DATA = [block(n) for n in range(6)]


def test_a_commit_names_the_versions(agent: RunningAgent) -> None:
    peer = agent.peer()
    peer.put(KEYS[:6], DATA)
    (commit,) = agent.metadata.named(m.CommitBlocks)
    assert sorted(commit.versions) == [(SEVERAL, 3), (OTHER, 5)]
    assert peer.get(KEYS[:6])[1] == DATA


def test_blocks_of_a_changed_chain_are_written_again(agent: RunningAgent) -> None:
    writes = Writes(agent)
    change_at_commit(agent, SEVERAL, 1)
    peer = agent.peer()
    peer.put(KEYS[:6], DATA)
    assert sorted(writes.chains) == [SINGLE] * 2 + [SEVERAL] * 4 + [OTHER] * 2
    first, second = agent.metadata.named(m.CommitBlocks)
    assert dict(first.versions) == {SEVERAL: 3, OTHER: 5}
    assert dict(second.versions) == {SEVERAL: 4, OTHER: 5}
    assert peer.get(KEYS[:6])[1] == DATA


def test_a_chain_that_changes_between_rounds(agent: RunningAgent) -> None:
    """The staging area holds the second round when the first one has to be written again."""
    writes = Writes(agent)
    peer = agent.peer()
    sizes = tuple(map(len, DATA))
    plan: PutPlan = peer.call(PreparePut(NAMESPACE, b"".join(KEYS[:6]), sizes))
    rounds = [bytes([1, 1, 1, 0, 0, 0]), bytes([0, 0, 0, 1, 1, 1])]
    peer.call(StageBlocks(plan.put, peer.staged(DATA, rounds[0]), False))
    agent.metadata.chain_versions[OTHER] = 6
    peer.call(StageBlocks(plan.put, peer.staged(DATA, rounds[1]), True))
    assert writes.chains.count(OTHER) >= 3
    assert writes.chains.count(SEVERAL) == 2
    assert dict(agent.metadata.named(m.CommitBlocks)[-1].versions) == {SEVERAL: 3, OTHER: 6}
    assert peer.get(KEYS[:6])[1] == DATA


def test_all_chains_that_changed_are_done_at_once(agent: RunningAgent) -> None:
    change_at_commit(agent, SEVERAL, 1)
    before = agent.metadata.before

    def both(request: Request) -> None:
        if isinstance(request, m.CommitBlocks) and not agent.metadata.named(m.CommitBlocks):
            agent.metadata.chain_versions[OTHER] = 9
        before(request)

    agent.metadata.before = both
    agent.peer().put(KEYS[:6], DATA)
    assert len(agent.metadata.named(m.CommitBlocks)) == 2


def test_a_chain_that_never_stays(agent: RunningAgent) -> None:
    change_at_commit(agent, SEVERAL, 1000)
    peer = agent.peer()
    with pytest.raises(StaleChain):
        peer.put(KEYS[:6], DATA)
    assert len(agent.metadata.named(m.CommitBlocks)) == COMMIT_ATTEMPTS_MAX
    assert not agent.metadata.blocks
    assert not agent.metadata.batches
    assert peer.get(KEYS[:6])[1] == [None] * 6


def test_a_block_that_cannot_be_had_again(agent: RunningAgent) -> None:
    """All who had it are away: the put fails whole."""
    change_at_commit(agent, SEVERAL, 1)

    def lose(batch: Any) -> None:
        for item in batch:
            if item.chain == SEVERAL and not isinstance(item, ChunkWrite):
                agent.chunks.errors[ChunkId(item.chunk.inode, 0)] = ConnectionLost()

    agent.chunks.before = lose
    with pytest.raises(ConnectionLost):
        agent.peer().put(KEYS[:6], DATA)
    assert not agent.metadata.blocks
