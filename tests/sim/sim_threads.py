"""``kvfs_base.threads`` in virtual time: each wait is a turn of the hub."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

from kvfs_base import threads
from sim.hub import Hub, Killed, SimThread


class _Waiters:
    """Threads that wait for one thing; chance decides who is woken."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.waiting: list[SimThread] = []

    def wait(self, timeout: float | None) -> bool:
        me = self.hub.require_alive()
        self.waiting.append(me)
        try:
            return self.hub.park(timeout)
        finally:
            if me in self.waiting:
                self.waiting.remove(me)

    def wake(self, count: int) -> None:
        for _ in range(min(count, len(self.waiting))):
            place = self.hub.rng.randrange(len(self.waiting)) if len(self.waiting) > 1 else 0
            self.hub.wake(self.waiting.pop(place))


class SimLock:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._held = False
        self._waiters = _Waiters(hub)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._hub.checkpoint()
        deadline = None if timeout < 0 else self._hub.now + timeout
        while self._held:
            left = None if deadline is None else deadline - self._hub.now
            if not blocking or (left is not None and left <= 0):
                return False
            self._waiters.wait(left)
        self._held = True
        return True

    def release(self) -> None:
        if self._hub.is_dead:
            return
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False
        self._waiters.wake(1)

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc_info: Any) -> None:
        self.release()


class SimEvent:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._set = False
        self._waiters = _Waiters(hub)

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        if not self._hub.is_dead:
            self._set = True
            self._waiters.wake(len(self._waiters.waiting))

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._hub.checkpoint()
        deadline = None if timeout is None else self._hub.now + timeout
        while not self._set:
            left = None if deadline is None else deadline - self._hub.now
            if left is not None and left <= 0:
                break
            self._waiters.wait(left)
        return self._set


class SimCondition:
    """Its lock may be taken again by who has it, as threading.Condition's."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lock = SimLock(hub)
        self._owner: SimThread | None = None
        self._depth = 0
        self._waiters = _Waiters(hub)

    def __enter__(self) -> bool:
        me = self._hub.require_alive()
        if self._owner is not me:
            self._lock.acquire()
            self._owner = me
        self._depth += 1
        return True

    def __exit__(self, *exc_info: Any) -> None:
        if self._hub.is_dead:
            return
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    def _require_owner(self) -> None:
        if self._owner is not self._hub.current:
            raise RuntimeError("the condition's lock is not held")

    def wait(self, timeout: float | None = None) -> bool:
        me = self._hub.require_alive()
        self._require_owner()
        depth, self._depth, self._owner = self._depth, 0, None
        # Registered before the lock is given up, or a notification would be lost.
        self._waiters.waiting.append(me)
        self._lock.release()
        try:
            woken = self._hub.park(timeout)
        finally:
            if me in self._waiters.waiting:
                self._waiters.waiting.remove(me)
        self._lock.acquire()
        self._owner, self._depth = me, depth
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self._hub.now + timeout
        result = predicate()
        while not result:
            left = None if deadline is None else deadline - self._hub.now
            if left is not None and left <= 0:
                break
            self.wait(left)
            result = predicate()
        return result

    def notify(self, n: int = 1) -> None:
        if not self._hub.is_dead:
            self._require_owner()
            self._waiters.wake(n)

    def notify_all(self) -> None:
        if not self._hub.is_dead:
            self._require_owner()
            self._waiters.wake(len(self._waiters.waiting))


class SimSemaphore:
    def __init__(self, hub: Hub, count: int) -> None:
        self._hub = hub
        self._count = self._free = count
        self._waiters = _Waiters(hub)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        self._hub.checkpoint()
        deadline = None if timeout is None else self._hub.now + timeout
        while not self._free:
            left = None if deadline is None else deadline - self._hub.now
            if not blocking or (left is not None and left <= 0):
                return False
            self._waiters.wait(left)
        self._free -= 1
        return True

    def release(self, n: int = 1) -> None:
        if self._hub.is_dead:
            return
        if self._free + n > self._count:
            raise ValueError("Semaphore released too many times")
        self._free += n
        self._waiters.wake(n)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc_info: Any) -> None:
        self.release()


class SimFuture:
    def __init__(self, hub: Hub) -> None:
        self._done = SimEvent(hub)
        self._value: Any = None
        self._error: BaseException | None = None

    def finish(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self._done.set()

    def done(self) -> bool:
        return self._done.is_set()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if not self._done.wait(timeout):
            raise TimeoutError
        return self._error

    def result(self, timeout: float | None = None) -> Any:
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._value


class SimPool:
    """Threads are made when there is work and end when there is none: what an idle thread would
    do cannot be told from nothing."""

    def __init__(self, hub: Hub, count: int, name: str) -> None:
        self._hub = hub
        self._count = count
        self._name = name
        self._closed = False
        self._jobs: collections.deque[tuple[SimFuture, Callable[[], Any]]] = collections.deque()
        self._workers: dict[SimThread, None] = {}

    def submit(self, job: Callable[..., Any], /, *args: Any, **kwargs: Any) -> SimFuture:
        me = self._hub.require_alive()
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = SimFuture(self._hub)
        self._jobs.append((future, lambda: job(*args, **kwargs)))
        if len(self._workers) < self._count:
            worker = SimThread(self._hub, me.process, self._work, (), self._name)
            self._workers[worker] = None
            worker.start()
        return future

    def _work(self) -> None:
        me = self._hub.require_alive()
        try:
            while self._jobs:
                future, job = self._jobs.popleft()
                try:
                    value, error = job(), None
                except Killed:
                    raise
                except BaseException as exc:
                    value, error = None, exc
                future.finish(value, error)
        finally:
            self._workers.pop(me, None)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            self._jobs.clear()
        if wait:
            for worker in list(self._workers):
                worker.join()


class SimThreads:
    """What ``threads.installed`` is given for a simulation."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def lock(self) -> threads.Lock:
        return SimLock(self._hub)

    def event(self) -> threads.Event:
        return SimEvent(self._hub)

    def condition(self) -> threads.Condition:
        return SimCondition(self._hub)

    def semaphore(self, count: int) -> threads.Semaphore:
        return SimSemaphore(self._hub, count)

    def thread(self, target: Callable[..., Any], args: Iterable[Any], name: str) -> threads.Thread:
        return SimThread(self._hub, self._hub.require_alive().process, target, args, name)

    def pool(self, count: int, name: str) -> threads.Pool:
        return SimPool(self._hub, count, name)
