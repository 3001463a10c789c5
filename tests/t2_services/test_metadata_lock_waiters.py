"""Clients that wait for locks at a service: on a store of its own, and beside other servers."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from kvfs_base import errors as e
from kvfs_base.rpc import Later
from kvfs_base.testing import memory_env
from kvfs_base.types import Address
from kvfs_metadata import limits
from kvfs_metadata import messages as m
from kvfs_metadata.client import MetadataClient
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.service import MetadataService
from kvfs_metadata.watching import Watching
from mock_time import run_in_mock_time
from t2_services.metadata_rig import ROOT

ADDRESS = Address.unix("/meta")
FIFO = stat.S_IFIFO | 0o644
A, B = b"owner--a", b"owner--b"
Test = Callable[[MetadataClient, MetadataClient, int], Awaitable[None]]


def lock(owner: bytes, at: int = 0) -> m.FileLock:
    return m.FileLock(at, at, True, owner)


def run(test: Test, durability: str = "cache") -> None:
    """``test`` gets the clients of two sessions and a file."""

    async def body() -> None:
        env, _ = memory_env()
        service = MetadataService(
            env, MetadataConfig("unused", ADDRESS, durability=durability), MemoryEngine()
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: service.serve(task_status=task_status))
            one = MetadataClient(env, ADDRESS, session=b"session-one-....")
            two = MetadataClient(env, ADDRESS, session=b"session-two-....")
            async with one, two:
                inode = (await one.call(m.Make(ROOT, b"fifo", FIFO))).inode  # needs no target
                await test(one, two, inode)
            nursery.cancel_scope.cancel()

    run_in_mock_time(body)


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_a_waiter_is_told_at_once_and_others_are_answered_meanwhile(durability: str) -> None:
    async def test(one: MetadataClient, two: MetadataClient, inode: int) -> None:
        assert await one.call(m.SetLock(inode, lock(A))) is None
        told = trio.Event()

        async def wait() -> None:
            await two.call(m.AwaitLock(inode, lock(B)))
            told.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert (await two.call(m.GetLock(inode, lock(B)))) is not None
            assert not told.is_set()
            begun = trio.current_time()
            await one.call(m.Unlock(inode, lock(A)))
            await told.wait()
            assert trio.current_time() - begun < 0.5
        assert await two.call(m.SetLock(inode, lock(B))) is None

    run(test, durability)


def test_who_waits_for_long_asks_again() -> None:
    async def test(one: MetadataClient, two: MetadataClient, inode: int) -> None:
        await one.call(m.SetLock(inode, lock(A)))
        begun = trio.current_time()
        await two.call(m.AwaitLock(inode, lock(B)))
        assert trio.current_time() - begun == pytest.approx(limits.LOCK_WAIT_SECONDS, abs=0.5)

    run(test)


def test_a_circle_of_waiters_is_refused() -> None:
    async def test(one: MetadataClient, two: MetadataClient, inode: int) -> None:
        await one.call(m.SetLock(inode, lock(A, 0)))
        await two.call(m.SetLock(inode, lock(B, 1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.call, m.AwaitLock(inode, lock(A, 1)))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(e.LockDeadlock):
                await two.call(m.AwaitLock(inode, lock(B, 0)))
            await two.call(m.Unlock(inode, lock(B, 1)))

    run(test)


def test_a_connection_that_ends_waits_no_more() -> None:
    async def test(one: MetadataClient, two: MetadataClient, inode: int) -> None:
        await one.call(m.SetLock(inode, lock(A, 0)))
        await two.call(m.SetLock(inode, lock(B, 1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.call, m.AwaitLock(inode, lock(B, 0)))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        stream = two._rpc._stream
        assert stream is not None
        await stream.aclose()
        with trio.move_on_after(1) as scope:
            await one.call(m.AwaitLock(inode, lock(A, 1)))
        assert scope.cancelled_caught  # it waits: nobody waits for it

    run(test)


def test_a_server_bounds_how_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.lock_waiters.LOCK_WAITS_MAX", 1)

    async def test(one: MetadataClient, two: MetadataClient, inode: int) -> None:
        await one.call(m.SetLock(inode, lock(A)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.call, m.AwaitLock(inode, lock(B)))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(e.ServerBusy):
                await two.call(m.AwaitLock(inode, lock(B)))
            await one.call(m.Unlock(inode, lock(A)))

    run(test)


def test_a_waiter_comes_with_a_change_that_others_have_to_hear_of() -> None:
    """In one packet: the change's answer waits for watchers, the waiter's for the lock alone."""

    async def never() -> None:
        await trio.sleep_forever()

    async def body() -> None:
        core: Any = SimpleNamespace(leases=SimpleNamespace(watches=lambda connection: True))
        turns: Any = None
        waiter = Later(never)
        watching = Watching(memory_env()[0].clock, core, turns)
        held = await watching.hold(1, [waiter, "changed"], [])
        assert held[0] is waiter
        assert await held[1].wait() == "changed"

    trio.run(body)
