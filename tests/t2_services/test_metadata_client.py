"""Clients across lost connections, and across the death of the service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request
from kvfs_base.types import Address
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata.client import REPEATABLE, BlockingMetadataClient, ClusterView, MetadataClient
from t2_services.metadata_rig import FILE, LAYOUT, ROOT, keys
from t2_services.metadata_stage import (
    ADDRESS,
    CHANGING,
    HEARTBEAT,
    SESSION,
    HangingUpServer,
    Scripted,
    Stage,
    blocking_stage,
    call_soon,
    run,
)


@pytest.fixture
def stage() -> Stage:
    return Stage()


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


def test_calls_without_a_task_are_told_of_in_any_case(stage: Stage) -> None:
    async def test() -> None:
        async with stage.client(session=SESSION, retry_seconds=3) as client:
            make = m.Make(ROOT, b"f", FILE)
            assert not client.call_soon(make, lambda *_: None), "there is no connection"
            async with stage.serving():
                await client.call(m.GetAttr(ROOT))
                stage.handler.silent = True
                begun = trio.current_time()
                async with trio.open_nursery() as nursery:
                    for _ in range(metadata_limits.ONCE_SLOTS):
                        nursery.start_soon(call_late, client, make)
                    await trio.testing.wait_all_tasks_blocked(0.001)
                    assert not client.call_soon(make, lambda *_: None), "too many"
                late = trio.current_time() - begun
                assert limits.CALL_SECONDS <= late < limits.CALL_SECONDS + 2
                stage.handler.silent = False
                assert not client.call_soon(make, lambda *_: None), "the connection was left"
                await client.call(m.GetAttr(ROOT))
                made = await call_soon(client, m.Make(ROOT, b"g", FILE))
                assert (await call_soon(client, m.OpenInode(made.inode))).inode == made.inode
                with pytest.raises(e.EntryNotFound):
                    await call_soon(client, m.Unlink(ROOT, b"missing"))
                stage.handler.hang_up.extend(["before"] * 1000)
                with pytest.raises(e.ConnectionLost):
                    await call_soon(client, m.Unlink(ROOT, b"g"))

    async def call_late(client: MetadataClient, request: Request) -> None:
        with pytest.raises(e.DeadlineExceeded):
            await call_soon(client, request)

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
            assert attach.written_inodes == (made.inode,)
            await client.call(m.OpenInode(one, writes=True))
            await client.call(m.CloseInode(one, (made.inode,)))
            stage.handler.seen.clear()
            stage.handler.hang_up.append("before")
            await client.call(m.GetAttr(ROOT))
            attach = stage.handler.seen[1]
            assert isinstance(attach, m.Attach)
            assert attach.open_inodes == (one, one) and attach.written_inodes == (one,)
            stage.rig.call(m.Unlink(ROOT, b"1"))
            for expected in (0, 0):
                assert (await client.call(m.GetAttr(one))).nlink == expected
                await client.call(m.CloseInode(one))
            with pytest.raises(e.InodeStale):
                await client.call(m.GetAttr(one))

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
                stage.rig.work(metadata_limits.SESSION_GRACE_SECONDS + 1)
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


RESTART_SECONDS = 200.0
"""For a process that starts on a busy machine."""


@pytest.fixture(params=["cache", "strict"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, request.param)
    process.start()
    yield process
    process.kill()


def test_a_killed_service_is_not_noticed_and_forgets_nothing(process: Process) -> None:
    """Blocks are put without a pause while the service is killed and started three times."""
    env = os_env()
    client = BlockingMetadataClient(env, process.address, retry_seconds=RESTART_SECONDS)
    client.call(HEARTBEAT)
    namespace = client.call(m.OpenNamespace("a/b", LAYOUT, create=True)).inode
    acknowledged: list[int] = []
    failures: list[BaseException] = []
    stop = threading.Event()
    progress = threading.Condition()

    def put() -> None:
        writer = BlockingMetadataClient(env, process.address, retry_seconds=RESTART_SECONDS)
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
            assert progress.wait_for(
                lambda: len(acknowledged) >= wanted or failures, RESTART_SECONDS
            )

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
    client = MetadataClient(
        os_env(), process.address, session=SESSION, retry_seconds=RESTART_SECONDS
    )

    async def test() -> None:
        async with client, trio.open_nursery() as nursery:
            await client.call(HEARTBEAT)
            file = await client.call(m.Make(ROOT, b"f", FILE))
            await client.call(m.OpenInode(file.inode))
            await client.call(m.Unlink(ROOT, b"f"))
            process.kill()
            nursery.start_soon(trio.to_thread.run_sync, process.start)
            with trio.fail_after(RESTART_SECONDS):
                assert (await client.call(m.GetAttr(file.inode))).nlink == 0
            # The reader noticed the lost connection, so even this is known not to have been sent.
            process.kill()
            await trio.to_thread.run_sync(process.start)
            made = await client.call(m.Make(ROOT, b"d", 0o040755))
            assert made.is_dir

    trio.run(test)


# --- blocking clients


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
    thread.join(60)
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
