"""Clients across lost connections, and across the death of the service."""

from __future__ import annotations

import contextlib
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
from kvfs_base import frames
from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request, RpcServer
from kvfs_base.seams import Env
from kvfs_base.testing import memory_env
from kvfs_base.types import Address
from kvfs_metadata import messages as m
from kvfs_metadata.client import (
    REPEATABLE,
    BlockingMetadataClient,
    ClusterView,
    MetadataClient,
)
from kvfs_metadata.core import MetadataCore
from t2_services.metadata_rig import FILE, LAYOUT, ROOT, Rig, keys

ADDRESS = Address.unix("/meta")
HEARTBEAT = Heartbeat("s", "h", None, None, (TargetReport("t", 10**9, 10**9, True, 0),))
SESSION = b"a session of mine"[:16]


class Scripted:
    """A service that answers, or hangs up instead (before or after doing it)."""

    def __init__(self, core: MetadataCore) -> None:
        self.core = core
        self.seen: list[Request] = []
        self.hang_up: deque[str] = deque()
        """For the next requests: "" answers, "before" and "after" hang up."""

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
        return answers

    def types(self) -> list[type]:
        return [type(request) for request in self.seen]


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
    async def serving(self) -> AsyncIterator[None]:
        server = HangingUpServer(self.env.network, m.MetadataRequest, self.handler)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, ADDRESS)
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
    once = {
        m.SetAttr,
        m.Make,
        m.Link,
        m.Unlink,
        m.Rmdir,
        m.Rename,
        m.SetXattr,
        m.RemoveXattr,
    }
    assert set(m.MetadataRequest.__args__) == REPEATABLE | once
    assert not REPEATABLE & once


@pytest.mark.parametrize("how", ["before", "after"])
def test_repeatable_requests_are_repeated(stage: Stage, how: str) -> None:
    async def test() -> None:
        namespace = stage.rig.namespace()
        async with stage.serving(), stage.client() as client:
            stage.handler.hang_up.extend([how, how, ""])
            batch = await client.call(m.PrepareBlocks(namespace, keys([1]), (10,)))
            stage.handler.hang_up.extend([how, ""])
            await client.call(m.CommitBlocks(batch.batch_id, (1,)))
            stage.handler.hang_up.extend([how, ""])
            assert await client.call(m.MatchBlocks(namespace, keys([1]))) == 1

    run(test)
    assert stage.handler.types() == 3 * [m.PrepareBlocks] + 2 * [m.CommitBlocks] + 2 * [
        m.MatchBlocks
    ]


def test_other_requests_are_not(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            stage.handler.hang_up.append("after")
            with pytest.raises(e.ConnectionLost):
                await client.call(m.Make(ROOT, b"f", FILE))
            with pytest.raises(e.EntryExists):
                await client.call(m.Make(ROOT, b"f", FILE))

    run(test)
    assert stage.handler.types() == [m.Make, m.Make]


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


@pytest.mark.parametrize("how", ["before", "after"])
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
            with pytest.raises(e.InodeStale):
                await client.call(m.GetAttr(inode))

    run(test)


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


@contextlib.contextmanager
def blocking_stage(tmp_path: Path) -> Iterator[tuple[Env, Address, Rig, Callable[[], None]]]:
    """A real server in a thread; the last item cuts the connections off."""
    env = os_env()
    rig = Rig(targets=2)
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
                    server = RpcServer(env.network, m.MetadataRequest, Scripted(rig.core))
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
        yield env, address, rig, cut
    finally:
        trio.from_thread.run_sync(token[1].cancel, trio_token=token[0])
        thread.join()


def test_blocking_calls_outlive_a_connection(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as (env, address, _, cut):
        client = BlockingMetadataClient(env, address)
        assert client.call(m.GetAttr(ROOT)).inode == ROOT
        cut()
        answers = client.call_many([m.GetAttr(ROOT), m.StatFs(), m.Lookup(ROOT, b"kv")])
        assert answers[0].inode == ROOT and answers[2].is_dir
        cut()
        with pytest.raises(e.ConnectionLost):  # it may have been carried out
            client.call_many([m.GetAttr(ROOT), m.Make(ROOT, b"d", 0o040755)])
        client.call(m.Make(ROOT, b"d", 0o040755))
        client.close()


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
    with blocking_stage(tmp_path) as (env, address, rig, cut):
        view = ClusterView(env, address)
        first = view.current()
        assert [t.target_id for t in first.targets] == [1, 2]
        rig.heartbeat("new")
        assert view.current() is first
        cut()
        assert len(view.refresh().targets) == 3
        assert view.current().version > first.version
        view.close()


def test_cluster_view_from_many_threads(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as (env, address, rig, _):
        view = ClusterView(env, address)
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
