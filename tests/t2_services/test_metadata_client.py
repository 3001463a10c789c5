"""Clients across lost connections, and across the death of the service."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kvfs_base import errors as e
from kvfs_base import frames, limits
from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request, RpcServer
from kvfs_base.seams import Env
from kvfs_base.testing import memory_env
from kvfs_base.types import Address
from kvfs_metadata import messages as m
from kvfs_metadata.admin_messages import AdmitTarget, RemoveTarget, SetDraining
from kvfs_metadata.client import (
    REPEATABLE,
    BlockingMetadataClient,
    ClusterView,
    MetadataClient,
)
from kvfs_metadata.core import MetadataCore
from t2_services.metadata_rig import FILE, LAYOUT, ROOT, Rig, key, keys

ADDRESS = Address.unix("/meta")
HEARTBEAT = Heartbeat("s", "h", None, None, (TargetReport("t", 10**9, 10**9, True, 0),))
SESSION = b"a session of mine"[:16]
CHANGING = set(m.Changing.__args__)


class Scripted:
    """A service that answers, or hangs up instead (before or after doing it)."""

    def __init__(self, core: MetadataCore) -> None:
        self.core = core
        self.seen: list[Request] = []
        self.hang_up: deque[str] = deque()
        """For the next requests: "" answers, "before" and "after" hang up, "away" has done the
        request, but does not know that it was written."""

    def connected(self, session_id: int) -> None:
        pass

    def disconnected(self, session_id: int) -> None:
        self.core.disconnected(session_id)

    async def handle(self, session_id: int, requests: Sequence[Any]) -> Sequence[Any]:
        answers = []
        for request in requests:
            self.seen.append(request)
            how = self.hang_up.popleft() if self.hang_up else ""
            if how == "before":
                raise trio.BrokenResourceError
            answers += self.core.update([self.core.operation(session_id, request)])
            if how == "after":
                raise trio.BrokenResourceError
            if how == "away":
                answers[-1] = e.StoreUnavailable()
        return answers

    def types(self) -> list[type]:
        return [type(request) for request in self.seen]

    def lose(self, how: str, times: int) -> None:
        self.hang_up.extend([how] * times + [""])


class HangingUpServer(RpcServer):
    """Lets the handler's BrokenResourceError end the connection instead of answering it."""

    async def _answer(self, session_id: int, batch: Any) -> list[bytes]:
        requests = [self._decoder.decode(frame.body) for frame in batch]
        results = await self._handler.handle(session_id, requests)
        return [
            frames.encode_error(frame.request_id, result)
            if isinstance(result, BaseException)
            else frames.encode(frames.Kind.REPLY, frame.request_id, result)
            for frame, result in zip(batch, results, strict=True)
        ]


class Stage:
    def __init__(self) -> None:
        self.env, self.clock = memory_env()
        self.rig = Rig()
        self.handler = Scripted(self.rig.core)

    @contextlib.asynccontextmanager
    async def serving(self, address: Address = ADDRESS) -> AsyncIterator[None]:
        server = HangingUpServer(self.env.network, m.MetadataRequest, self.handler)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, address)
            yield
            nursery.cancel_scope.cancel()

    def client(self, **options: Any) -> MetadataClient:
        return MetadataClient(self.env, ADDRESS, **options)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_every_request_is_repeatable_or_not_by_decision() -> None:
    """A new request fails here until somebody has thought about it."""
    assert set(m.MetadataRequest.__args__) == REPEATABLE | CHANGING | {m.Once}
    assert not REPEATABLE & CHANGING


@pytest.mark.parametrize("how", ["before", "after", "away"])
def test_repeatable_requests_are_repeated(stage: Stage, how: str) -> None:
    async def test() -> None:
        namespace = stage.rig.namespace()
        batch = stage.rig.prepare(namespace, [1])
        async with stage.serving(), stage.client() as client:
            stage.handler.lose(how, 2)
            await client.call(m.CommitBlocks(batch.batch_id, (1,)))
            stage.handler.lose(how, 1)
            assert await client.call(m.MatchBlocks(namespace, keys([1]))) == 1

    run(test)
    assert stage.handler.types() == 3 * [m.CommitBlocks] + 2 * [m.MatchBlocks]


# --- changes: the caller gets the first answer, and it happened once


@dataclasses.dataclass
class Prepared:
    """What the changes below work on, made anew for each."""

    rig: Rig

    def __post_init__(self) -> None:
        self.rig.heartbeat("gone")
        self.rig.call(RemoveTarget((2,), force=True))
        self.file = self.rig.make(ROOT, b"file").inode
        self.rig.make(ROOT, b"other")
        self.rig.call(m.SetXattr(self.file, b"user.old", b"1"))
        self.rig.mkdir(ROOT, b"empty")
        self.namespace = self.rig.namespace()
        self.rig.put(self.namespace, [1, 2, 3])


CHANGES: dict[str, Callable[[Prepared], Request]] = {
    "set_attr": lambda p: m.SetAttr(p.file, size=77, mode=0o600),
    "make": lambda p: m.Make(ROOT, b"new", FILE),
    "make_or_find": lambda p: m.Make(ROOT, b"new", FILE, exclusive=False),
    "make_open": lambda p: m.Make(ROOT, b"new", FILE, open=True),
    "make_directory": lambda p: m.Make(ROOT, b"new", 0o040755),
    "make_link": lambda p: m.Make(ROOT, b"new", 0o120777, target=b"file"),
    "link": lambda p: m.Link(p.file, ROOT, b"second"),
    "unlink": lambda p: m.Unlink(ROOT, b"file"),
    "unlink_block": lambda p: m.Unlink(p.namespace, key(2).hex().encode()),
    "rmdir": lambda p: m.Rmdir(ROOT, b"empty"),
    "rename": lambda p: m.Rename(ROOT, b"file", ROOT, b"moved", 1),
    "rename_over": lambda p: m.Rename(ROOT, b"file", ROOT, b"other"),
    "exchange": lambda p: m.Rename(ROOT, b"file", ROOT, b"other", 2),
    "set_xattr": lambda p: m.SetXattr(p.file, b"user.new", b"1", 1),
    "remove_xattr": lambda p: m.RemoveXattr(p.file, b"user.old"),
    "prepare": lambda p: m.PrepareBlocks(p.namespace, keys([3, 4, 5]), (10,) * 3),
    "remove": lambda p: m.RemoveBlocks(p.namespace, keys([2, 3, 9])),
    "set_draining": lambda p: SetDraining((1,), True),
    "remove_target": lambda p: RemoveTarget((1,), force=True),
    "admit_target": lambda p: AdmitTarget("gone"),
}


def done_once(change: str) -> tuple[Any, dict[bytes, bytes]]:
    """Answer and store of a service that was asked once."""
    prepared = Prepared(Rig())
    answer = prepared.rig.call(CHANGES[change](prepared))
    return answer, prepared.rig.dump()


def without_answers(rig: Rig) -> dict[bytes, bytes]:
    return {k: v for k, v in rig.dump().items() if not k.startswith(b"RSLT")}


def test_all_changes_are_tried() -> None:
    prepared = Prepared(Rig())
    assert {type(make(prepared)) for make in CHANGES.values()} == CHANGING


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("how", ["before", "after", "away"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_happens_once(stage: Stage, change: str, how: str, times: int) -> None:
    answers = []

    async def test() -> None:
        prepared = Prepared(stage.rig)
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.seen.clear()
            for _ in range(times):  # the greeting of each new connection comes in between
                stage.handler.hang_up.extend([how, ""])
            answers.append(await client.call(CHANGES[change](prepared)))

    run(test)
    assert stage.handler.types() == [m.Once] + [m.Attach, m.Once] * times
    assert (answers[0], without_answers(stage.rig)) == done_once(change)


@pytest.mark.parametrize("how", ["before", "after", "away"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_a_thread_happens_once(change: str, how: str, tmp_path: Path) -> None:
    with blocking_stage(tmp_path, targets=1) as stage:
        prepared = Prepared(stage.rig)
        client = BlockingMetadataClient(stage.env, stage.address)
        stage.handler.lose(how, 2)
        answer = client.call(CHANGES[change](prepared))
        client.close()
        assert stage.handler.types() == [m.Once] * 3
        assert (answer, without_answers(stage.rig)) == done_once(change)


def test_an_error_is_given_again_and_an_earlier_copy_fails_too(stage: Stage) -> None:
    """The queue of a server that lost its client may hold a copy for long."""

    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            stage.handler.lose("before", 1)
            with pytest.raises(e.EntryNotFound):
                await client.call(m.Unlink(ROOT, b"file"))
            await client.call(m.GetAttr(ROOT))

    run(test)
    first, second = stage.handler.seen[:2]
    assert isinstance(first, m.Once) and isinstance(second, m.Once)
    assert (first.again, second.again) == (False, True)
    assert (first.client, first.slot, first.number) == (second.client, second.slot, second.number)
    stage.rig.make(ROOT, b"file")
    for copy in (first, second):
        with pytest.raises(e.EntryNotFound):
            stage.rig.call(copy)
    assert b"file" in stage.rig.names(ROOT)


def test_an_error_of_a_first_copy_costs_no_record(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            with pytest.raises(e.EntryNotFound):
                await client.call(m.Unlink(ROOT, b"file"))

    run(test)
    assert stage.rig.dump(b"RSLT") == {}


def test_few_slots_are_used_and_none_by_two(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client, trio.open_nursery() as nursery:
            for n in range(3):
                await client.call(m.Make(ROOT, b"%d" % n, FILE))
            assert {(r.slot, r.number) for r in seen()} == {(0, 1), (0, 2), (0, 3)}
            stage.handler.seen.clear()
            for n in range(2 * limits.ONCE_SLOTS):
                nursery.start_soon(client.call, m.Make(ROOT, b"many %d" % n, FILE))

    def seen() -> list[m.Once]:
        return [request for request in stage.handler.seen if isinstance(request, m.Once)]

    run(test)
    used: dict[int, list[int]] = {}
    for request in seen():
        used.setdefault(request.slot, []).append(request.number)
    assert len(used) == limits.ONCE_SLOTS
    assert sum(map(len, used.values())) == 2 * limits.ONCE_SLOTS
    assert all(numbers == sorted(set(numbers)) for numbers in used.values())


def test_a_slot_of_a_cancelled_call_is_used_again(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            with trio.move_on_after(0):
                await client.call(m.Make(ROOT, b"1", FILE))
            await client.call(m.Make(ROOT, b"2", FILE))

    run(test)
    last = stage.handler.seen[-1]
    assert isinstance(last, m.Once) and last.slot == 0


def test_clients_are_told_apart(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as one, stage.client() as two:
            for number, client in enumerate((one, two)):
                assert (await client.call(m.Make(ROOT, b"%d" % number, FILE))).nlink == 1

    run(test)
    assert stage.rig.names(ROOT) == [b"0", b"1", b"kv"]


# --- a service that is away


@pytest.mark.parametrize("request_", [m.Make(ROOT, b"f", FILE), m.GetAttr(ROOT)])
def test_a_service_that_is_not_there_yet_is_waited_for(stage: Stage, request_: Request) -> None:
    async def test() -> None:
        async with stage.client() as client, trio.open_nursery() as nursery:
            answers: list[Any] = []

            async def call() -> None:
                answers.append(await client.call(request_))

            nursery.start_soon(call)
            await trio.sleep(5)
            assert answers == []
            async with stage.serving():
                await trio.sleep(1)
                assert len(answers) == 1
            nursery.cancel_scope.cancel()

    run(test)


def test_waiting_ends(stage: Stage) -> None:
    async def test() -> None:
        async with stage.client(retry_seconds=3) as client:
            begun = trio.current_time()
            for request in (m.GetAttr(ROOT), m.Make(ROOT, b"f", FILE)):
                with pytest.raises(e.ConnectionLost):
                    await client.call(request)
            assert trio.current_time() - begun == pytest.approx(6)

    run(test)


def test_a_service_that_always_hangs_up_is_given_up(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client(retry_seconds=2) as client:
            stage.handler.hang_up.extend(["before"] * 1000)
            with pytest.raises(e.ConnectionLost):
                await client.call(m.GetAttr(ROOT))
        assert 3 < len(stage.handler.seen) < 50, "attempts are spaced"

    run(test)


def test_a_session_says_what_it_has_open(stage: Stage) -> None:
    async def test() -> None:
        one, two = stage.rig.make(ROOT, b"1").inode, stage.rig.make(ROOT, b"2").inode
        async with stage.serving(), stage.client(session=SESSION) as client:
            for inode in (one, one, two):
                await client.call(m.OpenInode(inode))
            made = await client.call(m.Make(ROOT, b"3", 0o100644, open=True))
            await client.call(m.Make(ROOT, b"4", 0o100644))
            await client.call(m.CloseInode(two))
            stage.handler.seen.clear()
            stage.handler.hang_up.append("before")
            await client.call(m.GetAttr(ROOT))
            attach = stage.handler.seen[1]
            assert isinstance(attach, m.Attach)
            assert attach.session == SESSION and attach.open_inodes == (one, one, made.inode)
            stage.rig.call(m.Unlink(ROOT, b"1"))
            for expected in (0, 0):
                assert (await client.call(m.GetAttr(one))).nlink == expected
                await client.call(m.CloseInode(one))
            with pytest.raises(e.InodeStale):
                await client.call(m.GetAttr(one))

    run(test)


@pytest.mark.parametrize("how", ["before", "after", "away"])
def test_opens_and_closes_count_once_across_lost_answers(stage: Stage, how: str) -> None:
    async def test() -> None:
        inode = stage.rig.make(ROOT, b"f").inode
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.hang_up.extend([how, "", ""])  # the repeat comes after an Attach
            await client.call(m.OpenInode(inode))
            await client.call(m.OpenInode(inode))
            stage.rig.call(m.Unlink(ROOT, b"f"))
            stage.handler.hang_up.extend([how, "", ""])
            await client.call(m.CloseInode(inode))
            assert (await client.call(m.GetAttr(inode))).nlink == 0
            await client.call(m.CloseInode(inode))
            # What a lost answer may have opened is kept for a while.
            stage.rig.work(limits.SESSION_GRACE_SECONDS)
            with pytest.raises(e.InodeStale):
                await client.call(m.GetAttr(inode))

    run(test)


@pytest.mark.parametrize("how", ["before", "after", "away"])
def test_a_file_opened_as_it_is_made_stays_open_if_the_answer_is_lost(
    stage: Stage, how: str
) -> None:
    """Even if somebody unlinks it before the answer comes, which only "after" and "away" allow."""

    async def test() -> None:
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.hang_up.extend([how, "", ""])
            unlink_at_once(stage.rig)
            made = await client.call(m.Make(ROOT, b"f", FILE, open=True))
            if how == "before":
                stage.rig.call(m.Unlink(ROOT, b"f"))
            assert stage.rig.call(m.SetAttr(made.inode, size=5)).nlink == 0
            stage.rig.work(limits.SESSION_GRACE_SECONDS + 1)
            assert stage.rig.attr(made.inode).nlink == 0
            await client.call(m.CloseInode(made.inode))
            with pytest.raises(e.InodeStale):
                stage.rig.attr(made.inode)

    def unlink_at_once(rig: Rig) -> None:
        """Between the first copy and the greeting of the next connection."""
        disconnected = stage.handler.disconnected

        def unlinking(session_id: int) -> None:
            disconnected(session_id)
            if how != "before":
                rig.call(m.Unlink(ROOT, b"f"))
            stage.handler.disconnected = disconnected  # type: ignore[method-assign]

        stage.handler.disconnected = unlinking  # type: ignore[method-assign]

    run(test)


def test_an_open_of_a_connection_that_was_left_does_not_count(stage: Stage) -> None:
    """A copy that lay in a queue while the client came back elsewhere: its repetition counts."""
    make = m.Once(b"c" * 16, 0, 1, m.Make(ROOT, b"f", FILE, open=True))
    stage.rig.call(m.Attach(SESSION), 1)
    stage.rig.call(m.Attach(SESSION), 2)
    made = stage.rig.call(make, 1)
    stage.rig.core.disconnected(1)
    assert stage.rig.call(make, 2) == made
    stage.rig.call(m.Unlink(ROOT, b"f"))
    assert stage.rig.attr(made.inode).nlink == 0
    stage.rig.call(m.CloseInode(made.inode), 2)
    with pytest.raises(e.InodeStale):
        stage.rig.attr(made.inode)


def test_what_comes_late_over_a_connection_that_was_left_changes_nothing(stage: Stage) -> None:
    inode = stage.rig.make(ROOT, b"f").inode
    stage.rig.call(m.Attach(SESSION, (), 1), 1)
    stage.rig.call(m.Attach(SESSION, (inode,), 3), 3)
    stage.rig.call(m.Unlink(ROOT, b"f"))
    stage.rig.call(m.CloseInode(inode), 1)
    stage.rig.call(m.Attach(SESSION, (), 2), 2)
    stage.rig.core.disconnected(1)
    stage.rig.core.disconnected(2)
    stage.rig.work(limits.SESSION_GRACE_SECONDS + 1)
    assert stage.rig.attr(inode).nlink == 0
    stage.rig.call(m.CloseInode(inode), 3)
    with pytest.raises(e.InodeStale):
        stage.rig.attr(inode)


def test_greetings_are_numbered(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client(session=SESSION) as client:
            for _ in range(3):
                stage.handler.hang_up.append("after")
                await client.call(m.GetAttr(ROOT))

    run(test)
    greetings = [r.number for r in stage.handler.seen if isinstance(r, m.Attach)]
    assert greetings == sorted(set(greetings)) and len(greetings) > 2


def test_an_idle_session_comes_back_by_itself(stage: Stage) -> None:
    """A file that is only read through an open descriptor outlives a restart of the service."""

    async def test() -> None:
        inode = stage.rig.make(ROOT, b"f").inode
        async with stage.client(session=SESSION) as client:
            async with stage.serving():
                await client.call(m.OpenInode(inode))
                stage.rig.call(m.Unlink(ROOT, b"f"))
            stage.rig.restart()
            stage.handler.core = stage.rig.core
            async with stage.serving():
                for _ in range(40):
                    await trio.sleep(1)
                    stage.rig.work(1)
                assert stage.rig.attr(inode).nlink == 0
                await client.call(m.CloseInode(inode))
                with pytest.raises(e.InodeStale):
                    stage.rig.attr(inode)

    run(test)


# --- several servers


OTHER, NOBODY = Address.unix("/other"), Address.unix("/nobody")


def test_another_server_of_the_store_takes_over(stage: Stage) -> None:
    """It gives the answers that the first one kept, and hears what is open."""

    async def test() -> None:
        kept = stage.rig.make(ROOT, b"kept").inode
        client = MetadataClient(stage.env, [NOBODY, ADDRESS, OTHER], session=SESSION)
        async with client, trio.open_nursery() as nursery:
            answers: list[Any] = []
            answered = trio.Event()

            async def make() -> None:
                answers.append(await client.call(m.Make(ROOT, b"new", FILE, open=True)))
                answered.set()

            async with stage.serving():
                await client.call(m.OpenInode(kept))
                stage.rig.call(m.Unlink(ROOT, b"kept"))
                stage.handler.hang_up.append("after")
                nursery.start_soon(make)
                while b"new" not in stage.rig.names(ROOT):
                    await trio.lowlevel.checkpoint()
            assert answers == []
            stage.rig.restart()
            stage.handler.core = stage.rig.core
            async with stage.serving(OTHER):
                made = await client.call(m.Lookup(ROOT, b"new"))
                await answered.wait()
                assert answers == [made]
                stage.rig.work(limits.SESSION_GRACE_SECONDS + 1)
                assert (await client.call(m.GetAttr(kept))).nlink == 0
                stage.rig.call(m.Unlink(ROOT, b"new"))
                for inode in (kept, made.inode):
                    await client.call(m.CloseInode(inode))
                    with pytest.raises(e.InodeStale):
                        await client.call(m.GetAttr(inode))

    run(test)


def test_a_server_that_lost_its_store_is_left(stage: Stage) -> None:
    async def test() -> None:
        other = Scripted(stage.rig.core)
        other.hang_up.extend(["away"] * 100)
        server = HangingUpServer(stage.env.network, m.MetadataRequest, other)
        async with stage.serving(), trio.open_nursery() as nursery:
            await nursery.start(server.serve, OTHER)
            async with MetadataClient(stage.env, [OTHER, ADDRESS]) as client:
                for n in range(3):
                    await client.call(m.Make(ROOT, b"%d" % n, FILE))
            assert other.types() == [m.Once]
            assert stage.handler.types() == [m.Once] * 3
            nursery.cancel_scope.cancel()

    run(test)
    assert stage.rig.names(ROOT) == [b"0", b"1", b"2", b"kv"]


def test_a_store_that_stays_away_is_given_up(stage: Stage) -> None:
    async def test() -> None:
        stage.handler.hang_up.extend(["away"] * 1000)
        async with stage.serving(), stage.client(retry_seconds=2) as client:
            with pytest.raises(e.StoreUnavailable):
                await client.call(m.Make(ROOT, b"f", FILE))

    run(test)
    assert 3 < len(stage.handler.seen) < 50


# --- a real service in another process, killed


SERVER = """
import sys, trio
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.service import serve_metadata

async def main():
    config = MetadataConfig(
        sys.argv[1] + "/store", Address.unix(sys.argv[1] + "/sock"), durability=sys.argv[2]
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_metadata(
            os_env(), config, task_status=task_status))
        print("{}", flush=True)

trio.run(main)
"""


class Process:
    """The service in a process of its own."""

    def __init__(self, directory: Path, durability: str) -> None:
        self._command = [sys.executable, "-c", SERVER, str(directory), durability]
        self.address = Address.unix(f"{directory}/sock")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@pytest.fixture(params=["cache", "strict"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, request.param)
    process.start()
    yield process
    process.kill()


def test_a_killed_service_is_not_noticed_and_forgets_nothing(process: Process) -> None:
    """Blocks are put without a pause while the service is killed and started three times."""
    env = os_env()
    client = BlockingMetadataClient(env, process.address)
    client.call(HEARTBEAT)
    namespace = client.call(m.OpenNamespace("a/b", LAYOUT, create=True)).inode
    acknowledged: list[int] = []
    failures: list[BaseException] = []
    stop = threading.Event()
    progress = threading.Condition()

    def put() -> None:
        writer = BlockingMetadataClient(env, process.address)
        try:
            while not stop.is_set():
                number = len(acknowledged)
                names = range(4 * number, 4 * number + 4)
                writer.call(HEARTBEAT)
                batch = writer.call(m.PrepareBlocks(namespace, keys(names), (100,) * 4))
                count = sum(block is not None for block in batch.blocks)
                writer.call(m.CommitBlocks(batch.batch_id, (number,) * count))
                with progress:
                    acknowledged.append(number)
                    progress.notify()
        except BaseException as exc:
            failures.append(exc)
            with progress:
                progress.notify()
        finally:
            writer.close()

    def wait_for_progress(wanted: int) -> None:
        with progress:
            assert progress.wait_for(lambda: len(acknowledged) >= wanted or failures, 30)

    thread = threading.Thread(target=put)
    thread.start()
    try:
        for _ in range(3):
            wait_for_progress(len(acknowledged) + 20)
            process.kill()
            process.start()
    finally:
        stop.set()
        thread.join()
    assert failures == []
    stored = 4 * len(acknowledged)
    assert client.call(m.MatchBlocks(namespace, keys(range(stored)))) == stored
    assert client.call(m.Statistics())["prepared_batches"] <= 3
    client.close()


def test_trio_clients_live_through_a_kill(process: Process, tmp_path: Path) -> None:
    env = os_env()

    async def test() -> None:
        async with (
            MetadataClient(env, process.address, session=SESSION) as client,
            trio.open_nursery() as nursery,
        ):
            await client.call(HEARTBEAT)
            file = await client.call(m.Make(ROOT, b"f", FILE))
            await client.call(m.OpenInode(file.inode))
            await client.call(m.Unlink(ROOT, b"f"))
            process.kill()
            nursery.start_soon(trio.to_thread.run_sync, process.start)
            with trio.fail_after(30):
                assert (await client.call(m.GetAttr(file.inode))).nlink == 0
            # The reader noticed the lost connection, so even this is known not to have been sent.
            process.kill()
            await trio.to_thread.run_sync(process.start)
            made = await client.call(m.Make(ROOT, b"d", 0o040755))
            assert made.is_dir

    trio.run(test)


# --- blocking clients


@dataclasses.dataclass
class BlockingStage:
    env: Env
    address: Address
    rig: Rig
    handler: Scripted
    cut: Callable[[], None]
    """Ends all connections; the server listens again."""


@contextlib.contextmanager
def blocking_stage(tmp_path: Path, targets: int = 2) -> Iterator[BlockingStage]:
    """A real server in a thread."""
    env = os_env()
    rig = Rig(targets=targets)
    handler = Scripted(rig.core)
    address = Address.unix(str(tmp_path / "sock"))
    ready = threading.Event()
    token: list[Any] = []
    scopes: list[trio.CancelScope] = []

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with trio.CancelScope() as outer:
            token.append(outer)
            while True:
                with trio.CancelScope() as scope:
                    scopes[:] = [scope]
                    server = HangingUpServer(env.network, m.MetadataRequest, handler)
                    async with trio.open_nursery() as nursery:
                        await nursery.start(server.serve, address)
                        ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(10)

    def cut() -> None:
        ready.clear()
        trio.from_thread.run_sync(scopes[0].cancel, trio_token=token[0])
        assert ready.wait(10)  # it listens again

    try:
        yield BlockingStage(env, address, rig, handler, cut)
    finally:
        trio.from_thread.run_sync(token[1].cancel, trio_token=token[0])
        thread.join()


def test_blocking_calls_outlive_a_connection(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as stage:
        client = BlockingMetadataClient(stage.env, stage.address)
        assert client.call(m.GetAttr(ROOT)).inode == ROOT
        stage.cut()
        answers = client.call_many([m.GetAttr(ROOT), m.StatFs(), m.Lookup(ROOT, b"kv")])
        assert answers[0].inode == ROOT and answers[2].is_dir
        stage.cut()
        answers = client.call_many([m.GetAttr(ROOT), m.Make(ROOT, b"d", 0o040755)])
        assert answers[1] == stage.rig.resolve(b"d")
        client.close()


@pytest.mark.parametrize("lost_at", [0, 1, 255, 256, 300])
def test_many_changes_from_a_thread_happen_once(tmp_path: Path, lost_at: int) -> None:
    """More than there are slots, and reads among them."""
    with blocking_stage(tmp_path) as stage:
        client = BlockingMetadataClient(stage.env, stage.address)
        requests: list[Request] = [m.Make(ROOT, b"%03d" % n, FILE) for n in range(300)]
        requests[200:200] = [m.Lookup(ROOT, b"199")]
        stage.handler.hang_up.extend([""] * lost_at + ["after"])
        answers = client.call_many(requests)
        names = [b"%03d" % n for n in range(300)]
        assert stage.rig.names(ROOT)[:300] == names
        made = answers[:200] + answers[201:]
        assert [a.inode for a in made] == [stage.rig.resolve(name).inode for name in names]
        assert answers[200] == answers[199]
        client.close()


def test_a_blocking_client_finds_the_server_that_is_there(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as stage:
        nobody = Address.unix(str(tmp_path / "nobody"))
        client = BlockingMetadataClient(stage.env, [nobody, stage.address])
        assert client.call(m.Make(ROOT, b"d", 0o040755)).is_dir
        stage.cut()
        assert client.call(m.Lookup(ROOT, b"d")).is_dir
        client.close()
        view = ClusterView(stage.env, [nobody, stage.address])
        assert len(view.refresh().targets) == 2
        view.close()


def test_blocking_calls_give_up(tmp_path: Path) -> None:
    client = BlockingMetadataClient(
        os_env(), Address.unix(str(tmp_path / "nobody")), retry_seconds=0.1
    )
    for request in (m.GetAttr(ROOT), m.Make(ROOT, b"f", FILE)):
        with pytest.raises(e.ConnectionLost):
            client.call(request)
    client.close()


def test_closing_ends_the_waiting(tmp_path: Path) -> None:
    client = BlockingMetadataClient(
        os_env(), Address.unix(str(tmp_path / "nobody")), retry_seconds=1000
    )
    raised: list[BaseException] = []

    def call() -> None:
        try:
            client.call(m.GetAttr(ROOT))
        except e.ConnectionLost as exc:
            raised.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    client.close()
    thread.join(10)
    assert not thread.is_alive() and len(raised) == 1


def test_cluster_view(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as stage:
        view = ClusterView(stage.env, stage.address)
        first = view.current()
        assert [t.target_id for t in first.targets] == [1, 2]
        stage.rig.heartbeat("new")
        assert view.current() is first
        stage.cut()
        assert len(view.refresh().targets) == 3
        assert view.current().version > first.version
        view.close()


def test_cluster_view_from_many_threads(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as stage:
        rig = stage.rig
        view = ClusterView(stage.env, stage.address)
        stale: list[int] = []

        def refresh() -> None:
            for _ in range(20):
                known = rig.core.cluster.version
                if view.refresh().version < known:
                    stale.append(known)

        threads = [threading.Thread(target=refresh) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(10):
            rig.heartbeat(f"more-{number}")
        for thread in threads:
            thread.join()
        assert stale == [], "a refresh answers with what was true after it was asked for"
        view.close()


def test_the_lock_of_a_killed_service_is_free(process: Process) -> None:
    second = subprocess.run(
        process._command, capture_output=True, timeout=60, check=False, env=dict(os.environ)
    )
    assert second.returncode != 0 and b"Conflict" in second.stderr
    process.kill()
    process.start()
