"""Clients of the node agent that mean harm, or make no sense."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api_cluster import wait_until
from kvfs.agent.messages import (
    STAGED,
    AbortPut,
    AgentStatistics,
    DropBlocks,
    GetBlocks,
    Hello,
    ListKeys,
    PreparePut,
    StageBlocks,
    Welcome,
)
from kvfs_base import frames
from kvfs_base.errors import (
    ConnectionLost,
    InvalidRequest,
    ProtocolError,
    ServerBusy,
)
from kvfs_base.frames import Kind
from kvfs_base.limits import MIB, PAGE_BYTES
from kvfs_base.rpc import receive_frame
from t2_services.agent_rig import KEYS, NAMESPACE, RunningAgent, agents, block
from t2_services.chunk_noise import with_sums


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningAgent]]:
    with agents(tmp_path) as start:
        yield start


@pytest.fixture
def agent(start: Callable[..., RunningAgent]) -> RunningAgent:
    return start()


@pytest.mark.parametrize(
    "request_made",
    [
        PreparePut(NAMESPACE, KEYS[0] + b"x", (1,)),
        PreparePut(NAMESPACE, KEYS[0], (1, 2)),
        PreparePut(NAMESPACE, KEYS[0], (0,)),
        PreparePut(NAMESPACE, KEYS[0], (MIB,)),
        PreparePut(NAMESPACE, KEYS[0] * 2, (1, 1)),
        StageBlocks(99, b"", True),
        GetBlocks(NAMESPACE, KEYS[0] + b"x"),
        DropBlocks(NAMESPACE, KEYS[0] + b"x"),
        ListKeys(1),
        Hello(b""),
        Hello(b"1234"),
    ],
    ids=lambda request: type(request).__name__,
)
def test_requests_that_make_no_sense_are_refused(agent: RunningAgent, request_made: Any) -> None:
    peer = agent.peer()
    with pytest.raises(InvalidRequest):
        peer.call(request_made)
    assert agent.metadata.batches == {}
    assert peer.put(KEYS[:1], [block(1)]).put, "the connection goes on"


@pytest.mark.parametrize(
    "blocks",
    [
        STAGED.pack(0, 1),
        STAGED.pack(0, MIB // 4),
        STAGED.pack(0, MIB // 4 - PAGE_BYTES),
        STAGED.pack(0, (1 << 64) - PAGE_BYTES),
        STAGED.pack(1, 0),
        STAGED.pack(2, 0),
        STAGED.pack(0, 0) * 2,
        STAGED.pack(0, 0)[:-1],
        b"",
    ],
    ids=[
        "between pages",
        "behind the end",
        "over the end",
        "far away",
        "not wanted",
        "not there",
        "twice",
        "cut off",
        "commit without bytes",
    ],
)
@pytest.mark.parametrize("keep_puts", [True, False])
def test_staging_is_checked(
    start: Callable[..., RunningAgent], blocks: bytes, keep_puts: bool
) -> None:
    agent = start(keep_puts=keep_puts)
    peer = agent.peer()
    peer.put(KEYS[1:2], [block(1)])
    before = agent.figures()["arena_used_bytes"]
    plan = peer.call(PreparePut(NAMESPACE, b"".join(KEYS[:2]), (5000, 5000)))
    assert plan.wanted == b"\1\0"
    with pytest.raises(InvalidRequest):
        peer.call(StageBlocks(plan.put, blocks, True))
    assert KEYS[0] not in agent.metadata.blocks
    assert agent.figures()["arena_used_bytes"] == before


def test_puts_and_staging_belong_to_their_session(agent: RunningAgent) -> None:
    peer, thief = agent.peer(), agent.peer()
    assert peer.welcome.session != thief.welcome.session
    plan = peer.call(PreparePut(NAMESPACE, KEYS[0], (5000,)))
    with pytest.raises(InvalidRequest):
        thief.call(StageBlocks(plan.put, STAGED.pack(0, 0), True))
    thief.call(AbortPut(plan.put))
    peer.call(StageBlocks(plan.put, peer.staged([block(7)], b"\1"), True))
    assert peer.get(KEYS[:1])[1] == [block(7)]
    assert os.fstat(peer.staging_fd).st_ino != os.fstat(thief.staging_fd).st_ino


def test_nothing_before_hello(agent: RunningAgent) -> None:
    for request in (AgentStatistics(), GetBlocks(NAMESPACE, KEYS[0]), AbortPut(1)):
        line = agent.dial()
        line.send(request)
        with pytest.raises(InvalidRequest):
            line.receive(type(request))
    assert agent.metadata.calls == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        with_sums(frames.FIELDS.pack(frames.MAGIC, frames.VERSION, 1, 0xFFFF_FFFF, 1, 0)),
        frames.FIELDS.pack(frames.MAGIC, frames.VERSION, 1, 1000, 1, 0) + bytes(8),
        frames.frame(9, 1, b""),
        frames.encode(Kind.REPLY, 1, None),
        frames.encode(Kind.REQUEST, 1, None, payload_bytes=10),
        frames.encode(Kind.NOTIFICATION, 0, AgentStatistics()),
        frames.encode(Kind.NOTIFICATION, 0, [1, 2]),
    ],
    ids=[
        "http",
        "endless",
        "flipped",
        "kind",
        "reply",
        "payload",
        "notification",
        "garbage notification",
    ],
)
def test_a_connection_that_speaks_nonsense_is_closed(agent: RunningAgent, data: bytes) -> None:
    connection = agent.env.blocking_network.connect(agent.address, 5.0)
    connection.set_timeout(10.0)
    connection.send([data])
    with pytest.raises(ConnectionLost):
        receive_frame(connection)
    connection.close()
    assert agent.peer().call(AgentStatistics())["sessions"] == 1


@pytest.mark.parametrize(
    "body",
    [
        None,
        ["no_such_request"],
        ["get_blocks", -1, b""],
        [b"\xff"],
        ["open_namespace", msgspec.Raw(b"\xa2\xff\xff")],
    ],
    ids=["nothing", "unknown", "too-low", "no-text", "no-utf-8"],
)
def test_a_request_that_cannot_be_decoded_gets_an_error(agent: RunningAgent, body: Any) -> None:
    connection = agent.env.blocking_network.connect(agent.address, 5.0)
    connection.set_timeout(10.0)
    for number in (5, 6):
        connection.send([frames.encode(Kind.REQUEST, number, body)])
        frame = receive_frame(connection)
        assert (frame.kind, frame.request_id) == (Kind.ERROR, number)
        assert isinstance(frames.decode_error(frame.body), ProtocolError)
    connection.close()


def test_the_number_of_connections_is_bounded(start: Callable[..., RunningAgent]) -> None:
    agent = start(connections_max=2)
    first = agent.peer()
    second = agent.peer(first.welcome.session)
    with pytest.raises(ServerBusy):
        agent.dial().hello(b"")
    agent.peers.remove(second)
    second.close()
    wait_until(lambda: agent.figures()["connections"] == 1)
    assert isinstance(agent.peer().welcome, Welcome)
