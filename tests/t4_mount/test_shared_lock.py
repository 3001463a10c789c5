"""The lock of an open file."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from kvfs.mount.locks import SharedLock


def run(test) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_exclusive_holder_need_not_be_a_task() -> None:
    async def test() -> None:
        lock = SharedLock()
        assert lock.is_free and lock.try_exclusive()
        assert not (lock.is_free or lock.try_exclusive() or lock.try_shared())
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with lock.exclusive():
                    assert not lock.is_free

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            lock.release_exclusive()
            assert not lock.is_free  # it is the other's already
        assert lock.is_free

    run(test)


def test_shared_holders_share_and_exclusive_ones_wait() -> None:
    async def test() -> None:
        lock, order = SharedLock(), []

        async def hold(name: str, kind: str, seconds: float) -> None:
            async with lock.exclusive() if kind == "exclusive" else lock.shared():
                order.append(f"+{name}")
                await trio.sleep(seconds)
                order.append(f"-{name}")

        async with trio.open_nursery() as nursery:
            for name, kind in (
                ("a", "shared"),
                ("b", "shared"),
                ("c", "exclusive"),
                ("d", "shared"),
            ):
                nursery.start_soon(hold, name, kind, 1.0)
                await trio.testing.wait_all_tasks_blocked()
        assert order[:2] == ["+a", "+b"]
        assert sorted(order[2:4]) == ["-a", "-b"]
        assert order[4:] == ["+c", "-c", "+d", "-d"]  # d came after c: it does not overtake
        assert lock.try_shared()

    run(test)


def test_try_shared_never_waits() -> None:
    async def test() -> None:
        lock = SharedLock()
        assert lock.try_shared() and lock.try_shared()
        lock.release_shared()
        lock.release_shared()
        async with lock.exclusive():
            assert not lock.try_shared()
        assert lock.try_shared()

    run(test)


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_cancelled_waiter_leaves_the_queue(kind: str) -> None:
    async def test() -> None:
        lock = SharedLock()
        async with lock.exclusive():
            with trio.move_on_after(1) as scope:
                async with lock.exclusive() if kind == "exclusive" else lock.shared():
                    raise AssertionError("got the lock twice")
            assert scope.cancelled_caught
        assert lock.try_shared()
        lock.release_shared()
        async with lock.exclusive():
            pass

    run(test)


def test_a_waiter_that_is_admitted_and_cancelled_at_once_gives_it_back() -> None:
    async def test() -> None:
        lock = SharedLock()
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                async with lock.exclusive():
                    raise AssertionError("cancelled before it ran")

        async with trio.open_nursery() as nursery:
            async with lock.exclusive():
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        async with lock.exclusive():
            pass

    run(test)
