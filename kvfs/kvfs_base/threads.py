"""The seam of threads: services make threads and whatever threads wait for through this module.

Unlike the other seams it is one for the whole process, not a part of ``Env``: a lock deep inside a
buffer pool should not have to be handed down. The real implementation is the standard library's;
the simulator installs one in which threads take turns under a seed and time is virtual.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol


class Lock(Protocol):
    """As threading.Lock."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...

    def locked(self) -> bool: ...

    def __enter__(self) -> bool: ...

    def __exit__(self, *exc_info: Any) -> None: ...


class Event(Protocol):
    """As threading.Event."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Condition(Protocol):
    """As threading.Condition."""

    def __enter__(self) -> bool: ...

    def __exit__(self, *exc_info: Any) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any: ...

    def notify(self, n: int = 1) -> None: ...

    def notify_all(self) -> None: ...


class Semaphore(Protocol):
    """As threading.BoundedSemaphore."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool: ...

    def release(self, n: int = 1) -> None: ...

    def __enter__(self) -> bool: ...

    def __exit__(self, *exc_info: Any) -> None: ...


class Thread(Protocol):
    """As threading.Thread, which is started once and may be joined before that."""

    @property
    def name(self) -> str: ...

    def start(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool: ...


class Future(Protocol):
    """As concurrent.futures.Future."""

    def result(self, timeout: float | None = None) -> Any: ...

    def exception(self, timeout: float | None = None) -> BaseException | None: ...

    def done(self) -> bool: ...


class Pool(Protocol):
    """As ThreadPoolExecutor."""

    def submit(self, job: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future: ...

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...


class Threads(Protocol):
    """What an implementation has."""

    def lock(self) -> Lock: ...

    def event(self) -> Event: ...

    def condition(self) -> Condition: ...

    def semaphore(self, count: int) -> Semaphore: ...

    def thread(self, target: Callable[..., Any], args: Iterable[Any], name: str) -> Thread: ...

    def pool(self, count: int, name: str) -> Pool: ...


class OsThreads:
    """The standard library's."""

    def lock(self) -> Lock:
        return threading.Lock()

    def event(self) -> Event:
        return threading.Event()

    def condition(self) -> Condition:
        return threading.Condition()

    def semaphore(self, count: int) -> Semaphore:
        return threading.BoundedSemaphore(count)

    def thread(self, target: Callable[..., Any], args: Iterable[Any], name: str) -> Thread:
        return threading.Thread(target=target, args=tuple(args), name=name, daemon=True)

    def pool(self, count: int, name: str) -> Pool:
        return concurrent.futures.ThreadPoolExecutor(count, name)


_installed: Threads = OsThreads()


def lock() -> Lock:
    return _installed.lock()


def event() -> Event:
    return _installed.event()


def condition() -> Condition:
    return _installed.condition()


def semaphore(count: int) -> Semaphore:
    """A bounded one: more releases than acquisitions raise ValueError."""
    return _installed.semaphore(count)


def thread(target: Callable[..., Any], *args: Any, name: str) -> Thread:
    """A daemon, not yet started."""
    return _installed.thread(target, args, name)


def pool(count: int, name: str) -> Pool:
    return _installed.pool(count, name)


@contextlib.contextmanager
def installed(threads: Threads) -> Iterator[None]:
    """For as long as a simulation runs: whatever is made meanwhile belongs to it."""
    global _installed
    before, _installed = _installed, threads
    try:
        yield
    finally:
        _installed = before
