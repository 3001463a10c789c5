"""One trio run inside one simulated thread, in the hub's time.

trio asks its clock how long to sleep and then waits for I/O. Here the answer is always "not at
all", and before it would wait the thread gives its turn back until the next deadline or until
something of the simulation has made a task runnable. Everything is one thread of the operating
system, so ``trio.lowlevel.reschedule`` may be called from any simulated thread.

trio has two private names that make its scheduling repeatable; ``test_simulation.py`` would notice
if they ceased to.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

import trio
import trio._core._run as trio_run

from kvfs_base.errors import ConnectionLost
from kvfs_base.types import Address
from sim.hub import Hub, Killed, Process, SimThread
from sim.network import (
    DATA,
    END,
    RESET,
    SYN_AGAIN_SECONDS,
    BaseListener,
    Endpoint,
    Host,
    SimNetwork,
    Wake,
)


class _Clock(trio.abc.Clock):
    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.deadline: float | None = None
        """Of the wait that begins; None if tasks are runnable."""

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._hub.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        self.deadline = deadline
        return 0.0


class TrioHost(trio.abc.Instrument):
    """Runs ``main`` and whatever ``start_soon`` adds, until ``stop``."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.process = hub.process("trio")
        self._clock = _Clock(hub)
        self._waiting = False
        self._leaving = False
        self._ready = False
        self._scope = trio.CancelScope()
        self._workers: dict[trio.lowlevel.Task, None] = {}
        self._thread: SimThread | None = None
        self.nursery: trio.Nursery

    def start(self, seed: int) -> None:
        """Returns once tasks can be started."""
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
        trio_run._r.seed(seed)
        self._thread = self.process.start(self._run, name="trio")
        while not self._ready:
            self.hub.sleep(0.0)

    def _run(self) -> None:
        try:
            trio.run(self._main, clock=self._clock, instruments=[self])
        except BaseException:
            if self.process.alive:
                raise
            raise Killed from None

    async def _main(self) -> None:
        with self._scope:
            async with trio.open_nursery() as self.nursery:
                self._ready = True
                await trio.sleep_forever()

    def stop(self) -> None:
        """Ends every task, in their turns."""
        self.cancel(self._scope)

    def _abandon(self) -> None:
        """The world ends: every task as well, at once."""
        self._leaving = True
        self._scope.cancel()
        for task in self._workers:
            trio.lowlevel.reschedule(task)

    # --- Instrument

    def before_io_wait(self, timeout: float) -> None:
        deadline, self._clock.deadline = self._clock.deadline, None
        if self._leaving:
            return
        try:
            if deadline is None:
                self.hub.checkpoint()
                return
            self._waiting = True
            self.hub.park(None if deadline == math.inf else deadline - self.hub.now)
            self._waiting = False
        except Killed:
            self._abandon()

    # --- for simulated threads

    def reschedule(self, task: trio.lowlevel.Task) -> None:
        """From anywhere in the simulation."""
        trio.lowlevel.reschedule(task)
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            assert self._thread is not None
            self._waiting = False
            self.hub.wake(self._thread)

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self.start_soon_in(self.nursery, function, *args)

    def start_soon_in(
        self, nursery: trio.Nursery, function: Callable[..., Awaitable[Any]], *args: Any
    ) -> None:
        nursery.start_soon(function, *args)
        self._wake()

    def cancel(self, scope: trio.CancelScope) -> None:
        scope.cancel()
        self._wake()

    # --- trio's worker threads

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """``trio.to_thread`` uses simulated threads."""
        with mock.patch.object(trio.to_thread, "run_sync", self._run_in_thread):
            yield

    async def _run_in_thread(self, function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        """Not abandoned on cancellation, as trio's default is."""
        task = trio.lowlevel.current_task()
        outcome: list[tuple[Any, BaseException | None]] = []

        def work() -> None:
            try:
                outcome.append((function(*args), None))
            except Killed:
                return
            except BaseException as exc:
                outcome.append((None, exc))
            self.reschedule(task)

        await trio.lowlevel.checkpoint_if_cancelled()
        self.process.start(work, name="trio-worker")
        self._workers[task] = None
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        del self._workers[task]
        if not outcome:
            raise Killed
        value, error = outcome[0]
        if error is not None:
            raise error
        return value


class SimStream(trio.abc.Stream):
    """A connection as trio tasks see it."""

    def __init__(self, trio_host: TrioHost, endpoint: Endpoint) -> None:
        self._trio = trio_host
        self._end = endpoint

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        left = bytes(data)
        while left:
            self._require_open()
            room = self._end.room
            if room > 0:
                self._end.out.push(DATA, left[:room])
                left = left[room:]
            else:
                await self._wait(self._end.out.writers)

    async def wait_send_all_might_not_block(self) -> None:
        while not self._end.lost and self._end.room <= 0:
            await self._wait(self._end.out.writers)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._end.closed:
                raise trio.ClosedResourceError
            if self._end.into.buffer:
                return self._end.into.take(max_bytes or 65536)
            if self._end.into.ended == END:
                return b""
            self._require_open()
            await self._wait(self._end.into.readers)

    def _require_open(self) -> None:
        if self._end.closed:
            raise trio.ClosedResourceError
        if self._end.into.ended == RESET:
            raise trio.BrokenResourceError

    async def _wait(self, waiters: list[Wake]) -> None:
        wake = functools.partial(self._trio.reschedule, trio.lowlevel.current_task())

        def abort(_: Any) -> trio.lowlevel.Abort:
            waiters.remove(wake)
            return trio.lowlevel.Abort.SUCCEEDED

        waiters.append(wake)
        await trio.lowlevel.wait_task_rescheduled(abort)

    async def aclose(self) -> None:
        self._end.close()
        await trio.lowlevel.checkpoint()


class _Listener(BaseListener):
    def __init__(
        self, trio_host: TrioHost, network: SimNetwork, host: Host, process: Process, at: Address
    ) -> None:
        super().__init__(network, host, process, at)
        self._trio = trio_host
        self._backlog: collections.deque[Endpoint] = collections.deque()
        self._task: trio.lowlevel.Task | None = None

    def arrived(self, endpoint: Endpoint) -> None:
        self._backlog.append(endpoint)
        if self._task is not None:
            task, self._task = self._task, None
            self._trio.reschedule(task)

    async def accept(self) -> Endpoint:
        await trio.lowlevel.checkpoint()
        while not self._backlog:
            self._task = trio.lowlevel.current_task()

            def abort(_: Any) -> trio.lowlevel.Abort:
                self._task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        return self._backlog.popleft()

    def close(self) -> None:
        self.unbind()
        while self._backlog:
            self._backlog.popleft().close()


class SimTrioNetwork:
    """The network as tasks of one process see it."""

    def __init__(
        self, trio_host: TrioHost, network: SimNetwork, host: Host, process: Process
    ) -> None:
        self._trio = trio_host
        self._network = network
        self._host = host
        self._process = process

    async def connect(self, address: Address) -> trio.abc.Stream:
        network = self._network
        target = network.target_of(self._host, address)
        while target is not None:
            await trio.sleep(network.delay(self._host, target))
            if network.is_open(self._host, target) and network.is_open(target, self._host):
                break
            await trio.sleep(SYN_AGAIN_SECONDS)
        listener = None if target is None else network.listeners.get((target.name, address))
        if listener is None or target is None:
            await trio.sleep(network.knobs.latency)
            raise ConnectionLost(address=str(address), detail="connection refused")
        near = network.open_pair(self._host, self._process, listener)
        stream = SimStream(self._trio, near)
        try:
            await trio.sleep(network.delay(target, self._host))
        except trio.Cancelled:
            near.close()
            raise
        return stream

    async def serve(
        self,
        address: Address,
        handler: Callable[[trio.abc.Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        listener = _Listener(self._trio, self._network, self._host, self._process, address)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(listener.address)
                while True:
                    endpoint = await listener.accept()
                    nursery.start_soon(handler, SimStream(self._trio, endpoint))
        finally:
            listener.close()
