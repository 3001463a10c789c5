"""What a mount keeps counted as open, and when it lets go of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.mount.limits import (
    MOUNT_CLOSE_SECONDS,
    MOUNT_IDLE_SECONDS,
    TAIL_WAIT_SECONDS,
)
from kvfs.mount.opens import Opens
from kvfs_base.errors import TailBusy
from kvfs_base.types import Attr
from kvfs_metadata.messages import CloseInode, OpenInode

FILE = 7


class Service:
    """Answers, and counts what it has open."""

    def __init__(self) -> None:
        self.leased = True
        self.open: list[int] = []
        self.written: list[bool] = []
        self.cutting = 0
        """So often somebody is told to wait."""
        self.calls = 0
        self.asked: list[Any] = []

    @property
    def names(self) -> Any:
        return SimpleNamespace(
            are_leased=self.leased,
            attr=lambda inode: Attr(inode, mode=0o100600) if self.leased else None,
        )

    def call_soon(self, request: Any, done: Any) -> bool:
        self.calls += 1
        self.open.append(request.inode)
        self.asked.append(done)
        return True

    async def call(self, request: Any) -> Any:
        self.calls += 1
        if isinstance(request, OpenInode):
            if self.cutting:
                self.cutting -= 1
                raise TailBusy(inode=request.inode)
            self.open.append(request.inode)
            self.written.append(request.writes)
        if isinstance(request, CloseInode):
            for inode in (request.inode, *request.others):
                self.open.remove(inode)
        return Attr(FILE, mode=0o100600)


def run(test: Callable[[Opens, Service], Awaitable[None]], *, closer: bool = True) -> None:
    async def body() -> None:
        service: Any = Service()
        opens = Opens(service)
        async with trio.open_nursery() as nursery:
            if closer:
                nursery.start_soon(opens.close_idle)
            await trio.testing.wait_all_tasks_blocked()
            await test(opens, service)
            nursery.cancel_scope.cancel()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_next_open_costs_no_call() -> None:
    async def test(opens: Opens, service: Service) -> None:
        await opens.take(FILE)
        opens.give_back(FILE)
        assert opens.take_now(FILE) is not None
        opens.give_back(FILE)
        assert (service.calls, service.open) == (1, [FILE])
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert service.open == []

    run(test)


def test_who_writes_asks_once_more_if_it_was_open_for_reading_only() -> None:
    async def test(opens: Opens, service: Service) -> None:
        await opens.take(FILE)
        assert opens.take_now(FILE, writes=True) is None
        await opens.take(FILE, writes=True)
        assert service.written == [False, True]
        assert opens.take_now(FILE, writes=True) is not None
        for _ in range(3):
            opens.give_back(FILE)
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert service.open == []
        assert opens.take_now(FILE, writes=True) is None
        opens.made(FILE)
        assert opens.take_now(FILE, writes=True) is not None

    run(test)


def test_who_writes_waits_while_somebody_cuts() -> None:
    async def test(opens: Opens, service: Service) -> None:
        service.cutting = 5
        await opens.take(FILE, writes=True)
        assert (service.cutting, service.open) == (0, [FILE])
        service.cutting = 1 << 20
        begin = trio.current_time()
        with pytest.raises(TailBusy):
            await opens.take(FILE + 1, writes=True)
        assert TAIL_WAIT_SECONDS <= trio.current_time() - begin < TAIL_WAIT_SECONDS + 1
        # Without a task: who asked goes on with one.
        told: list[Any] = []
        opens.count_soon(FILE + 1, lambda *answer: told.append(answer), writes=True)
        service.asked[-1](None, TailBusy(inode=FILE + 1))
        assert told == [(None, None)]
        assert opens.take_now(FILE + 1) is None

    run(test)


def test_an_open_without_a_task() -> None:
    async def test(opens: Opens, service: Service) -> None:
        told: list[Any] = []
        for _ in range(2):  # twice at the same time
            assert opens.count_soon(FILE, lambda _, error: told.append(error))
        assert opens.take_now(FILE) is None
        for done in service.asked:
            done(Attr(FILE, mode=0o100600), None)
        assert told == [None, None]
        assert not opens.count_soon(FILE, told.append), "it is counted already"
        assert opens.take_now(FILE) is not None and len(opens) == 0
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert service.open == [FILE, FILE]
        opens.give_back(FILE)
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert service.open == []
        # Whoever asked may find that he cannot use it.
        assert opens.count_soon(FILE, lambda _, error: told.append(error))
        service.asked[-1](Attr(FILE, mode=0o100600), None)
        assert len(opens) == 1
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        assert service.open == []
        service.leased = False
        assert not opens.count_soon(FILE, told.append)

    run(test)


def test_what_somebody_else_changed_is_closed_and_not_kept_for_a_while() -> None:
    """It may be about to move: each moment in which nobody has it open counts."""

    async def test(opens: Opens, service: Service) -> None:
        await opens.take(FILE)
        opens.give_back(FILE)
        opens.changed((FILE,))
        for _ in range(3):
            await trio.sleep(2 * MOUNT_CLOSE_SECONDS)
            assert service.open == []
            await opens.take(FILE)
            opens.changed((FILE,))
            opens.give_back(FILE)
        await trio.sleep(3 * MOUNT_IDLE_SECONDS)
        await opens.take(FILE)
        opens.give_back(FILE)
        await trio.testing.wait_all_tasks_blocked()
        assert service.open == [FILE]

    run(test)


def test_without_leases_nothing_is_kept() -> None:
    async def test(opens: Opens, service: Service) -> None:
        service.leased = False
        await opens.take(FILE)
        opens.give_back(FILE)
        await trio.sleep(2 * MOUNT_CLOSE_SECONDS)
        assert service.open == []

    run(test)


def test_what_was_removed_is_closed_together() -> None:
    async def test(opens: Opens, service: Service) -> None:
        for inode in range(10, 20):
            await opens.take(inode)
            opens.give_back(inode)
        calls = service.calls
        for inode in range(10, 20):
            opens.changed((inode,))
            await trio.sleep(MOUNT_CLOSE_SECONDS / 20)
        await trio.sleep(2 * MOUNT_CLOSE_SECONDS)
        assert (service.open, service.calls) == ([], calls + 1)

    run(test)


def test_without_somebody_who_closes_nothing_is_kept() -> None:
    async def test(opens: Opens, service: Service) -> None:
        await opens.take(FILE)
        opens.give_back(FILE)
        await opens.close_unwanted()
        assert service.open == []

    run(test, closer=False)
