"""The node agent over raw frames, with the other roles in memory: limits and failures."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api_cluster import WAIT_SECONDS, wait_until
from kvfs.agent.config import AgentConfig
from kvfs.agent.counters import COUNTERS
from kvfs.agent.link import SessionLost
from kvfs.agent.messages import (
    NO_BLOCK,
    STAGED,
    AbortPut,
    AgentStatistics,
    DropBlocks,
    GetBlocks,
    KeysPage,
    ListKeys,
    PreparePut,
    StageBlocks,
)
from kvfs_base.errors import (
    ArenaFull,
    ChunkCorrupt,
    ChunkMismatch,
    ChunkNotFound,
    ConnectionLost,
    EntryNotFound,
    InternalError,
    InvalidRequest,
    KvfsError,
    LimitExceeded,
    NoTarget,
    PrepareExpired,
    TargetFailed,
)
from kvfs_base.limits import (
    MIB,
    PAGE_BYTES,
    PUTS_PER_CLIENT_MAX,
)
from kvfs_base.rpc import Request
from kvfs_base.types import Address, ChunkId
from kvfs_metadata import messages as m
from t2_services.agent_rig import KEYS, NAMESPACE, RunningAgent, agents, block


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningAgent]]:
    with agents(tmp_path) as start:
        yield start


@pytest.fixture
def agent(start: Callable[..., RunningAgent]) -> RunningAgent:
    return start()


# --- reads


def test_a_batch_costs_one_metadata_call(agent: RunningAgent) -> None:
    peer = agent.peer()
    data = [block(n) for n in range(8)]
    peer.put(KEYS[:8], data)
    agent.metadata.calls.clear()
    assert peer.get(KEYS[:9])[1] == [*data, None]
    assert [type(call) for call in agent.metadata.calls] == [m.LookupBlocks]


@pytest.mark.logs_warnings
@pytest.mark.parametrize(
    ("error", "counter", "removed"),
    [
        (ChunkCorrupt(inode=1), "blocks_corrupt", True),
        (ChunkMismatch(inode=1), "blocks_corrupt", True),
        (None, "blocks_missing", True),
        (ConnectionLost(), "load_failures", False),
        (NoTarget(), "load_failures", False),
        (TargetFailed(), "load_failures", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, KvfsError) else str(value),
)
def test_a_block_that_cannot_be_read_is_a_miss(
    start: Callable[..., RunningAgent], error: KvfsError | None, counter: str, removed: bool
) -> None:
    agent = start(keep_puts=False)
    peer = agent.peer()
    data = [block(n) for n in range(3)]
    peer.put(KEYS[:3], data)
    victim = agent.metadata.blocks[KEYS[1]].inode
    chunk = ChunkId(victim, 0)
    if error is None:
        del agent.chunks.stored[chunk]
    else:
        agent.chunks.errors[chunk] = error
    lease, blocks = peer.get(KEYS[:3])
    assert blocks == [data[0], None, data[2]]
    assert agent.figures()[counter] == 1
    assert agent.figures()["blocks_loaded"] == 2
    removals = agent.metadata.named(m.RemoveBlocks)
    gone = m.RemoveBlocks(NAMESPACE, KEYS[1], (victim,), (1,))
    assert removals == ([gone] if removed else [])
    peer.give_back(lease)
    assert agent.figures()["arena_leased_bytes"] == 0
    assert agent.figures()["arena_blocks"] == 2


def test_a_block_that_has_moved_is_read_where_it_is(start: Callable[..., RunningAgent]) -> None:
    """It was looked up before that, and read after."""
    agent = start(keep_puts=False)
    peer = agent.peer()
    data = [block(n) for n in range(3)]
    peer.put(KEYS[:3], data)
    info = agent.metadata.blocks[KEYS[1]]
    chunk = ChunkId(info.inode, 0)
    agent.chunks.errors[chunk] = ChunkNotFound(inode=info.inode)

    def move(request: Request) -> None:
        if isinstance(request, m.LookupBlocks) and request.keys == KEYS[1]:
            agent.metadata.blocks[KEYS[1]] = msgspec.structs.replace(info, chain=2)
            agent.chunks.errors.clear()

    chains: list[list[int]] = []
    agent.chunks.before = lambda batch: chains.append([read.chain for read in batch])
    agent.metadata.before = move
    _, blocks = peer.get(KEYS[:3])
    assert blocks == data
    assert chains == [[1, 1, 1], [2]]
    assert agent.metadata.named(m.RemoveBlocks) == []
    figures = agent.figures()
    assert (figures["blocks_loaded"], figures["blocks_missing"]) == (3, 0)
    assert figures["loaded_bytes"] == sum(map(len, data))


@pytest.mark.logs_warnings
def test_a_removal_that_fails_does_not_fail_the_get(start: Callable[..., RunningAgent]) -> None:
    agent = start(keep_puts=False)
    peer = agent.peer()
    peer.put(KEYS[:1], [block(1)])
    agent.chunks.stored.clear()

    def refuse(request: Any) -> None:
        if isinstance(request, m.RemoveBlocks):
            raise ConnectionLost(detail="injected")

    agent.metadata.before = refuse
    assert peer.get(KEYS[:1]) == (0, [None])


@pytest.mark.logs_warnings
def test_a_bug_while_loading_wakes_who_waits_and_leases_nothing(
    start: Callable[..., RunningAgent],
) -> None:
    agent = start(keep_puts=False)
    peer = agent.peer()
    peer.put(KEYS[:1], [block(1)])
    loading, gate = threading.Event(), threading.Event()

    def fail(_: Any) -> None:
        loading.set()
        assert gate.wait(WAIT_SECONDS)
        raise RuntimeError("a bug")

    agent.chunks.before = fail
    other = agent.peer()
    errors: list[BaseException] = []

    def first() -> None:
        try:
            peer.get(KEYS[:1])
        except InternalError as exc:
            errors.append(exc)

    thread = threading.Thread(target=first)
    thread.start()
    assert loading.wait(WAIT_SECONDS)
    other.line.send(GetBlocks(NAMESPACE, KEYS[0]))
    wait_until(lambda: len(agent.metadata.named(m.LookupBlocks)) == 2)
    agent.chunks.before = lambda _: None
    gate.set()
    thread.join()
    assert len(errors) == 1
    # It waited for the failed load, or came after it and loaded the block itself.
    granted = other.line.receive(GetBlocks)
    assert granted.lease or granted.blocks == NO_BLOCK
    if granted.lease:
        other.give_back(granted.lease)
    assert agent.figures()["arena_leased_bytes"] == 0
    assert peer.get(KEYS[:1])[1] == [block(1)], "the connection and the cache survive"


def test_counters_add_up(agent: RunningAgent) -> None:
    peer = agent.peer()
    peer.put(KEYS[:4], [block(n) for n in range(4)])
    peer.get(KEYS[:6])
    peer.get([KEYS[0], KEYS[0], KEYS[9]])
    figures = agent.figures()
    assert figures["blocks_requested"] == 9
    parts = ("arena_hits", "blocks_loaded", "blocks_unknown")
    assert [figures[part] for part in parts] == [6, 0, 3]
    assert set(COUNTERS) <= set(figures)
    assert figures["chunk_client_stored"] == 4
    assert peer.call(AgentStatistics())["blocks_requested"] == 9


# --- leases


def test_leases_are_given_back_on_the_board(agent: RunningAgent) -> None:
    peer = agent.peer()
    peer.put(KEYS[:2], [block(1), block(2)])
    first, _ = peer.get(KEYS[:2])
    second, _ = peer.get(KEYS[:1])
    assert agent.figures()["arena_leased_bytes"] == 4 * PAGE_BYTES
    peer.give_back(first)
    assert agent.figures()["arena_leased_bytes"] == 2 * PAGE_BYTES
    third, blocks = peer.get(KEYS[1:2])
    assert (third, blocks) == (first, [block(2)]), "numbers are used again"
    assert agent.figures()["arena_leased_bytes"] == 4 * PAGE_BYTES
    peer.give_back(second)
    peer.give_back(third)
    assert agent.figures()["arena_leased_bytes"] == 0


def test_marks_of_leases_that_are_not_mean_nothing(agent: RunningAgent) -> None:
    """Also those made in advance: a number that is given out is unmarked first."""
    peer, thief = agent.peer(), agent.peer()
    peer.put(KEYS[:1], [block(1)])
    for number in range(1, 100):
        peer.give_back(number)
    peer.get(KEYS[:1])
    for number in range(1, 100):
        thief.give_back(number)
    assert agent.figures()["arena_leased_bytes"] == 2 * PAGE_BYTES


def test_leases_of_idle_clients_are_collected_when_room_is_needed(
    start: Callable[..., RunningAgent],
) -> None:
    agent = start(client_leased_bytes=MIB)
    idle, busy = agent.peer(), agent.peer()
    data = [block(n, 60 * PAGE_BYTES) for n in range(8)]
    for key, one in zip(KEYS, data, strict=False):
        busy.put([key], [one])
    lease, _ = idle.get(KEYS[:4])
    with pytest.raises(ArenaFull):
        busy.get(KEYS[4:8])
    idle.give_back(lease)
    assert busy.get(KEYS[4:8])[1] == data[4:8]


def test_the_limit_on_leased_bytes(start: Callable[..., RunningAgent]) -> None:
    agent = start(client_leased_bytes=4 * PAGE_BYTES)
    peer = agent.peer()
    peer.put(KEYS[:3], [block(n) for n in range(3)])
    lease, _ = peer.get(KEYS[:2])
    with pytest.raises(ArenaFull) as caught:
        peer.get(KEYS[2:3])
    assert caught.value.leased_bytes == 4 * PAGE_BYTES
    peer.give_back(lease)
    assert peer.get(KEYS[2:3])[1] == [block(2)]


def test_a_session_is_over_with_the_connection_that_opened_it(agent: RunningAgent) -> None:
    owner = agent.peer()
    member = agent.peer(owner.welcome.session)
    assert member.arena is None, "joining brings no descriptors"
    owner.put(KEYS[:1], [block(1)])
    member.arena = owner.arena
    member.get(KEYS[:1])
    assert agent.figures()["arena_leased_bytes"] > 0
    member.arena = None
    agent.peers.remove(owner)
    owner.close()
    wait_until(lambda: agent.figures()["arena_leased_bytes"] == 0)
    wait_until(lambda: agent.figures()["sessions"] == 0)
    with pytest.raises(SessionLost):
        member.call(AgentStatistics())
    with pytest.raises(EntryNotFound):
        agent.dial().hello(owner.welcome.session)
    agent.lines[-1].close()
    wait_until(lambda: agent.figures()["connections"] == 0)


def test_a_get_whose_session_ends_meanwhile_leaves_no_lease(
    start: Callable[..., RunningAgent],
) -> None:
    agent = start(keep_puts=False)
    owner = agent.peer()
    owner.put(KEYS[:1], [block(1)])
    member = agent.peer(owner.welcome.session)
    loading, gate = threading.Event(), threading.Event()

    def slow(_: Any) -> None:
        loading.set()
        assert gate.wait(WAIT_SECONDS)

    agent.chunks.before = slow
    member.line.send(GetBlocks(NAMESPACE, KEYS[0]))
    assert loading.wait(WAIT_SECONDS)
    agent.peers.remove(owner)
    owner.close()
    wait_until(lambda: agent.figures()["sessions"] == 0)
    gate.set()
    wait_until(lambda: agent.figures()["connections"] == 0)
    assert agent.figures()["arena_leased_bytes"] == 0


# --- writes


@pytest.mark.parametrize("keep_puts", [True, False])
def test_a_put_is_committed_with_its_checksums(
    start: Callable[..., RunningAgent], keep_puts: bool
) -> None:
    agent = start(keep_puts=keep_puts)
    peer = agent.peer()
    data = [block(n, 5000 + n) for n in range(4)]
    assert peer.put(KEYS[:4], data).wanted == b"\1\1\1\1"
    assert agent.figures()["arena_blocks"] == (4 if keep_puts else 0)
    assert agent.figures()["arena_leased_bytes"] == 0
    plan = peer.put(KEYS[:5], [*data, block(9)])
    assert plan.wanted == b"\0\0\0\0\1"
    assert peer.put(KEYS[:5], [*data, block(9)]).put == 0
    assert peer.get(KEYS[:5])[1] == [*data, block(9)]


def test_blocks_that_are_not_committed_yet_are_not_there(agent: RunningAgent) -> None:
    peer = agent.peer()
    data = [block(1), block(2)]
    plan = peer.call(PreparePut(NAMESPACE, b"".join(KEYS[:2]), (5000, 5000)))
    packed = peer.staged(data, plan.wanted)
    peer.call(StageBlocks(plan.put, packed[: STAGED.size], False))
    assert peer.get(KEYS[:2]) == (0, [None, None])
    peer.call(StageBlocks(plan.put, packed[STAGED.size :], True))
    assert peer.get(KEYS[:2])[1] == data


def test_a_put_is_kept_only_up_to_its_share_of_the_arena(agent: RunningAgent) -> None:
    peer = agent.peer()
    data = [block(n, 20 * PAGE_BYTES) for n in range(3)]
    for key, one in zip(KEYS, data, strict=False):
        peer.put([key], [one])
    assert agent.figures()["arena_blocks"] == 3
    plan = peer.call(PreparePut(NAMESPACE, b"".join(KEYS[10:14]), (20 * PAGE_BYTES,) * 4))
    for place in range(4):
        os.pwrite(peer.staging_fd, block(place, 20 * PAGE_BYTES), 0)
        peer.call(StageBlocks(plan.put, STAGED.pack(place, 0), place == 3))
    assert agent.figures()["arena_blocks"] == 6, "64 of 256 pages for one put: three blocks"
    assert peer.get(KEYS[10:14])[1] == [block(n, 20 * PAGE_BYTES) for n in range(4)]


def test_a_full_arena_does_not_stop_a_put(start: Callable[..., RunningAgent]) -> None:
    agent = start(client_leased_bytes=MIB)
    peer = agent.peer()
    keys, data = KEYS[:4], [block(n, 60 * PAGE_BYTES) for n in range(4)]
    for key, one in zip(keys, data, strict=True):
        peer.put([key], [one])
    lease, _ = peer.get(keys)
    peer.put(KEYS[5:6], [block(5, 60 * PAGE_BYTES)])
    assert agent.figures()["arena_blocks"] == 4
    peer.give_back(lease)
    assert peer.get(KEYS[5:6])[1] == [block(5, 60 * PAGE_BYTES)]


@pytest.mark.parametrize("keep_puts", [True, False])
@pytest.mark.parametrize("step", ["write", "commit"])
def test_a_put_that_fails_is_aborted_and_leaves_nothing(
    start: Callable[..., RunningAgent], keep_puts: bool, step: str
) -> None:
    agent = start(keep_puts=keep_puts)
    peer = agent.peer()

    def expire(request: Any) -> None:
        if isinstance(request, m.CommitBlocks):
            raise PrepareExpired(batch_id=request.batch_id)

    plan = peer.call(PreparePut(NAMESPACE, b"".join(KEYS[:3]), (5000,) * 3))
    batch_id = max(agent.metadata.batches)
    if step == "write":
        inode = agent.metadata.batches[batch_id][1][1]
        agent.chunks.errors[ChunkId(inode, 0)] = TargetFailed(detail="injected")
    else:
        agent.metadata.before = expire
    request = StageBlocks(plan.put, peer.staged([block(1)] * 3, plan.wanted), True)
    with pytest.raises(TargetFailed if step == "write" else PrepareExpired):
        peer.call(request)
    assert agent.metadata.named(m.AbortBlocks) == [m.AbortBlocks(batch_id)]
    assert agent.metadata.blocks == {}
    figures = agent.figures()
    assert (figures["puts_aborted"], figures["put_blocks"]) == (1, 0)
    assert (figures["arena_blocks"], figures["arena_used_bytes"]) == (0, 0)
    with pytest.raises(InvalidRequest):
        peer.call(request)


def test_unfinished_puts_end_with_their_client(agent: RunningAgent) -> None:
    peer = agent.peer()
    plan = peer.call(PreparePut(NAMESPACE, KEYS[0], (5000,)))
    peer.call(StageBlocks(plan.put, peer.staged([block(1)], b"\1"), False))
    assert agent.figures()["arena_used_bytes"] > 0
    peer.call(PreparePut(NAMESPACE, KEYS[1], (5000,)))
    agent.peers.remove(peer)
    peer.close()
    wait_until(lambda: agent.figures()["connections"] == 0)
    assert agent.metadata.batches == {}
    assert agent.figures()["arena_used_bytes"] == 0
    assert agent.figures()["puts_aborted"] == 2


def test_a_put_can_be_given_up(agent: RunningAgent) -> None:
    peer = agent.peer()
    plan = peer.call(PreparePut(NAMESPACE, KEYS[0], (5000,)))
    peer.call(AbortPut(plan.put))
    peer.call(AbortPut(plan.put))
    assert agent.metadata.batches == {}


def test_the_number_of_open_puts_is_bounded(agent: RunningAgent) -> None:
    peer = agent.peer()
    for number in range(PUTS_PER_CLIENT_MAX):
        peer.call(PreparePut(NAMESPACE, bytes([0, number]) * 16, (1,)))
    with pytest.raises(LimitExceeded):
        peer.call(PreparePut(NAMESPACE, KEYS[0], (1,)))
    assert len(agent.metadata.batches) == PUTS_PER_CLIENT_MAX


# --- the rest


def test_requests_of_the_metadata_service_are_passed_on(agent: RunningAgent) -> None:
    peer = agent.peer()
    assert peer.call(m.OpenNamespace("t/m")).inode == NAMESPACE
    peer.put(KEYS[:2], [block(1), block(2)])
    assert peer.call(m.MatchBlocks(NAMESPACE, b"".join(KEYS[:3]))) == 2
    page: KeysPage = peer.call(ListKeys(NAMESPACE, limit=1))
    assert (page.keys, page.more) == (KEYS[0], True)
    page = peer.call(ListKeys(NAMESPACE, after=KEYS[0]))
    assert (page.keys, page.more) == (KEYS[1], False)
    assert peer.call(DropBlocks(NAMESPACE, KEYS[0])) == 1
    assert peer.get(KEYS[:2])[1] == [None, block(2)]


def test_errors_of_the_metadata_service_reach_the_client(agent: RunningAgent) -> None:
    def lost(_: Any) -> None:
        raise ConnectionLost(address="metadata", detail="injected")

    peer = agent.peer()
    agent.metadata.before = lost
    with pytest.raises(ConnectionLost) as caught:
        peer.get(KEYS[:1])
    assert not isinstance(caught.value, SessionLost)
    agent.metadata.before = lambda _: None
    assert peer.get(KEYS[:1]) == (0, [None])


@pytest.mark.parametrize(
    "settings",
    [
        {"arena_bytes": 0},
        {"arena_bytes": 5000},
        {"staging_bytes": -PAGE_BYTES},
        {"client_leased_bytes": -1},
        {"connections_max": 0},
        {"unix": Address.tcp("127.0.0.1", 1)},
        {"metadata": ()},
    ],
    ids=repr,
)
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    good = {"unix": Address.unix("/a"), "metadata": (Address.unix("/m"),)}
    with pytest.raises(InvalidRequest):
        AgentConfig(**{**good, **settings})


def test_stopping_closes_everything(tmp_path: Path) -> None:
    running = RunningAgent(tmp_path)
    peer = running.peer()
    before = {thread for thread in threading.enumerate() if thread.name.startswith("kvfs-agent")}
    assert before
    running.stop()
    assert running.chunks.closed
    assert not any(thread.is_alive() for thread in before)
    assert not os.path.exists(running.address.path)
    assert not peer.line.usable


@pytest.mark.parametrize("keep_puts", [True, False])
def test_a_round_of_several_portions_waits_for_all_of_them(
    start: Callable[..., RunningAgent], keep_puts: bool
) -> None:
    """One portion fails at once, the others are still being written: the staging area and the
    arena must not be given back before they are done."""
    agent = start(keep_puts=keep_puts, arena_bytes=256 * MIB, staging_bytes=48 * MIB)
    peer = agent.peer()
    size = 4 * MIB
    plan = peer.call(PreparePut(NAMESPACE, b"".join(KEYS[:10]), (size,) * 10))
    failing = agent.metadata.batches[max(agent.metadata.batches)][0][1]
    agent.chunks.errors[ChunkId(failing, 0)] = TargetFailed(detail="injected")
    gate = threading.Event()
    waiting = threading.Semaphore(0)

    def hold(writes: Any) -> None:
        if writes[0].chunk.inode != failing:
            waiting.release()
            assert gate.wait(WAIT_SECONDS)

    agent.chunks.before = hold
    packed = peer.staged([block(n, size) for n in range(10)], plan.wanted)
    peer.line.send(StageBlocks(plan.put, packed, True))
    for _ in range(4):
        assert waiting.acquire(timeout=WAIT_SECONDS)
    assert agent.figures()["puts_aborted"] == 0
    assert agent.figures()["arena_used_bytes"] == (10 * size if keep_puts else 0)
    gate.set()
    with pytest.raises(TargetFailed):
        peer.line.receive(StageBlocks)
    assert agent.figures()["puts_aborted"] == 1
    assert agent.figures()["arena_used_bytes"] == 0
