"""Who may read or write the service's state, and when.

* ``CacheTurns``: a commit costs about 20 us (no disk is waited for), less than handing it to
  another task; so what one read of a connection brought is one group, committed on the spot.
* ``StrictTurns``: a commit waits for the disk, in a worker thread. What arrives meanwhile, from all
  connections, forms the next group; reads are answered in between.
* ``SharedTurns``: reads too wait for the database, and before they are answered memory changes. So
  one worker thread at a time does everything: all reads that have arrived on one snapshot, then all
  writes as one group.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import trio

from kvfs_base.errors import InternalError, KvfsError
from kvfs_metadata.core import MetadataCore, Operation
from kvfs_metadata.leases import MERGED, Revocation
from kvfs_metadata.limits import WRITE_GROUP_REQUESTS
from kvfs_metadata.transaction import ANY_CONNECTION

T = TypeVar("T")
log = logging.getLogger(__name__)


Changed = tuple[list[Any], Revocation | None]
"""A result or KvfsError for each operation, and what is to be over before they are told."""


class Turns(Protocol):
    async def read(self, connection: int, requests: Sequence[Any]) -> list[Any]:
        """Answers to requests that only read."""

    async def change(self, author: int, operations: Sequence[Operation]) -> Changed:
        """``operations`` of the connection ``author``, once they are as durable as configured."""

    async def write(self, operations: Sequence[Operation]) -> list[Any]:
        """The same for the service itself, which waits for no watcher."""
        return (await self.change(ANY_CONNECTION, operations))[0]

    async def ask(self, fn: Callable[[], T]) -> T:
        """Calls ``fn`` while nobody else touches the core. Raises what it raises."""

    async def run(self) -> None:
        """Runs beside the requests until cancelled."""


class CacheTurns(Turns):
    """``committed`` is called after each group."""

    def __init__(self, core: MetadataCore, committed: Callable[[], None]) -> None:
        self._core = core
        self._committed = committed

    async def read(self, connection: int, requests: Sequence[Any]) -> list[Any]:
        return self._core.answer(requests, connection)

    async def change(self, author: int, operations: Sequence[Operation]) -> Changed:
        changed = update(self._core, operations, author)
        self._committed()
        return changed

    async def ask(self, fn: Callable[[], T]) -> T:
        return fn()

    async def run(self) -> None:
        await trio.sleep_forever()


@dataclasses.dataclass
class _Waiting:
    """Somebody whose turn comes: ``results`` are set, then ``done``."""

    author: int
    operations: Sequence[Operation]
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    results: list[Any] = dataclasses.field(default_factory=list)
    revocation: Revocation | None = None


class StrictTurns(Turns):
    def __init__(self, core: MetadataCore, committed: Callable[[], None]) -> None:
        self._core = core
        self._committed = committed
        self._queue: list[_Waiting] = []
        self._arrived = trio.Event()

    async def read(self, connection: int, requests: Sequence[Any]) -> list[Any]:
        return self._core.answer(requests, connection)

    async def change(self, author: int, operations: Sequence[Operation]) -> Changed:
        waiting = _Waiting(author, operations)
        self._queue.append(waiting)
        self._arrived.set()
        await waiting.done.wait()
        return waiting.results, waiting.revocation

    async def ask(self, fn: Callable[[], T]) -> T:
        return fn()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._queue:
                group, self._queue = _first(self._queue)
                await self._write(group)

    async def _write(self, group: list[_Waiting]) -> None:
        decision = self._core.decide([op for waiting in group for op in waiting.operations])
        results = decision.group.results
        try:
            # Nobody else decides while this waits: this task is the only one that does.
            await trio.to_thread.run_sync(self._core.commit, decision)
        except Exception as exc:
            self._core.take_back(decision)
            results = [commit_error(exc)] * len(results)
            revocation = None
        else:
            authors = {waiting.author for waiting in group}
            author = authors.pop() if len(authors) == 1 else MERGED
            revocation = self._core.committed(decision, author)
        _deliver(group, results, revocation)
        self._committed()


@dataclasses.dataclass
class _Question:
    """A read or anything else that is not part of a group. ``answer`` or ``error`` is set, then
    ``done``."""

    requests: Sequence[Any]
    fn: Callable[[], Any] | None = None
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    answer: Any = None
    error: BaseException | None = None


class SharedTurns(Turns):
    def __init__(self, core: MetadataCore, committed: Callable[[], None]) -> None:
        self._core = core
        self._committed = committed
        self._questions: list[_Question] = []
        self._queue: list[_Waiting] = []
        self._arrived = trio.Event()

    async def read(self, connection: int, requests: Sequence[Any]) -> list[Any]:
        answers: list[Any] = await self._question(_Question(requests))
        return answers

    async def ask(self, fn: Callable[[], T]) -> T:
        answer: T = await self._question(_Question((), fn))
        return answer

    async def _question(self, question: _Question) -> Any:
        self._questions.append(question)
        self._arrived.set()
        await question.done.wait()
        if question.error is not None:
            raise question.error
        return question.answer

    async def change(self, author: int, operations: Sequence[Operation]) -> Changed:
        waiting = _Waiting(author, operations)
        self._queue.append(waiting)
        self._arrived.set()
        await waiting.done.wait()
        return waiting.results, None

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._questions or self._queue:
                await self._turn()

    async def _turn(self) -> None:
        questions, self._questions = self._questions, []
        group, self._queue = _first(self._queue)
        if questions:
            # The thread alone touches the core until it ends; a cancelled service waits for it.
            await trio.to_thread.run_sync(self._answer, questions)
            for question in questions:
                question.done.set()
        if group:
            operations = [op for waiting in group for op in waiting.operations]
            results, _ = await trio.to_thread.run_sync(update, self._core, operations)
            _deliver(group, results)
            self._committed()

    def _answer(self, questions: list[_Question]) -> None:
        reads = [question for question in questions if question.fn is None]
        if reads:
            try:
                answers = iter(self._core.answer([r for read in reads for r in read.requests]))
                for read in reads:
                    read.answer = [next(answers) for _ in read.requests]
            except Exception as exc:
                error = commit_error(exc)
                for read in reads:
                    read.answer = [error] * len(read.requests)
        for question in questions:
            if question.fn is not None:
                try:
                    question.answer = question.fn()
                except Exception as exc:
                    question.error = exc


def _first(queue: list[_Waiting]) -> tuple[list[_Waiting], list[_Waiting]]:
    """As many as fit into one group, at least one, and the rest."""
    count = size = 0
    for waiting in queue:
        size += len(waiting.operations)
        if count and size > WRITE_GROUP_REQUESTS:
            break
        count += 1
    return queue[:count], queue[count:]


def _deliver(
    group: list[_Waiting], results: Sequence[Any], revocation: Revocation | None = None
) -> None:
    left = iter(results)
    for waiting in group:
        waiting.results = [next(left) for _ in waiting.operations]
        waiting.revocation = revocation
        waiting.done.set()


def update(
    core: MetadataCore, operations: Sequence[Operation], author: int = ANY_CONNECTION
) -> Changed:
    """``core.change``; if nothing could be written, that error for each operation."""
    try:
        return core.change(operations, author)
    except Exception as exc:
        return [commit_error(exc)] * len(operations), None


def commit_error(exc: Exception) -> KvfsError:
    if isinstance(exc, KvfsError):
        return exc
    log.error("a commit failed", exc_info=exc)
    return InternalError(detail=type(exc).__name__)
