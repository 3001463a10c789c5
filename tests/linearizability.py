"""Whether a concurrent history has an order: each operation at one moment between its call and its
return, with the answer that a sequential object would have given there.

The search is Wing and Gong's ("Testing and Verifying Concurrent Objects", 1993) with the memory and
the just-in-time steps of Lowe's ("Testing for linearizability", 2017): it follows the history in
time and keeps every configuration that explains it so far, a state of the object and the open
operations that have happened in it. Operations happen only when the return of one needs them to.
The cost is linear in the length of the history and exponential in how many operations are open at
the same time, so a few clients may play for as long as they like.

Linearizability is local (Herlihy and Wing, 1990): a history is linearizable if its part on each
object is. Whoever can take a history apart by object has less to search: ``check_parts``.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

CONFIGURATIONS_MAX = 200_000
"""More than this at once is a history with too many open operations, not one to wait for."""


class Unanswered:
    """The answer of an operation that did not return: it may have happened, once, at any time
    after its call, or not at all."""

    def __repr__(self) -> str:
        return "UNANSWERED"


UNANSWERED = Unanswered()


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    process: Hashable
    request: Any
    answer: Any
    called: int
    returned: int | None
    """None if it did not."""

    def __str__(self) -> str:
        end = "..." if self.returned is None else str(self.returned)
        return f"[{self.called}, {end}] {self.process}: {self.request} -> {self.answer}"


class Model(Protocol):
    """A sequential object. States are compared and remembered, so they are hashable values."""

    def initial(self) -> Hashable: ...

    def step(self, state: Any, request: Any, answer: Any) -> Iterable[Hashable]:
        """The states in which ``request`` may leave the object, given that it answered ``answer``
        in ``state``: none if it cannot have. For UNANSWERED those of every answer."""


class NotLinearizable(AssertionError):
    pass


def check(history: Sequence[Operation], model: Model) -> None:
    """Raises NotLinearizable with the first operation whose return nothing explains."""
    events = [(op.called, 0, number) for number, op in enumerate(history)]
    # A call and a return at the same moment count as concurrent.
    events += [
        (op.returned, 1, number) for number, op in enumerate(history) if op.returned is not None
    ]
    open_operations: dict[int, Operation] = {}
    configurations: set[tuple[Any, frozenset[int]]] = {(model.initial(), frozenset())}
    for _, is_return, number in sorted(events):
        if not is_return:
            open_operations[number] = history[number]
            continue
        before = configurations
        configurations = _happened(before, number, open_operations, model)
        if not configurations:
            raise NotLinearizable(_explain(history, number, open_operations, before))
        del open_operations[number]


def _happened(
    configurations: set[tuple[Any, frozenset[int]]],
    wanted: int,
    open_operations: dict[int, Operation],
    model: Model,
) -> set[tuple[Any, frozenset[int]]]:
    """The configurations after ``wanted`` has happened, which forget that it did: it is over."""
    found = set()
    seen = set(configurations)
    left = list(configurations)
    while left:
        state, happened = left.pop()
        if wanted in happened:
            found.add((state, happened - {wanted}))
            continue
        for number, operation in open_operations.items():
            if number in happened:
                continue
            for following in model.step(state, operation.request, operation.answer):
                if operation.answer is UNANSWERED and following == state:
                    continue  # the same as if it had not happened
                configuration = (following, happened | {number})
                if configuration not in seen:
                    seen.add(configuration)
                    left.append(configuration)
        if len(seen) > CONFIGURATIONS_MAX:
            raise RuntimeError(f"{len(open_operations)} open operations are too many to search")
    return found


def _explain(
    history: Sequence[Operation],
    number: int,
    open_operations: dict[int, Operation],
    configurations: set[tuple[Any, frozenset[int]]],
) -> str:
    culprit = history[number]
    earlier = [op for op in history if op.returned is not None and op.returned < culprit.called]
    earlier.sort(key=lambda op: op.returned or 0)
    lines = ["nothing explains", f"  {culprit}", "open at the same time:"]
    lines += [f"  {op}" for n, op in open_operations.items() if n != number]
    lines += ["before it:"] + [f"  {op}" for op in earlier[-10:]]
    lines += ["possible states:"]
    for state, happened in list(configurations)[:10]:
        lines.append(f"  {state} after {[str(open_operations[n]) for n in happened]}")
    return "\n".join(lines)


def check_parts(
    history: Sequence[Operation], part_of: Callable[[Operation], Hashable], model: Model
) -> None:
    """``check`` of each object's part: no operation may touch two."""
    parts: dict[Hashable, list[Operation]] = defaultdict(list)
    for operation in history:
        parts[part_of(operation)].append(operation)
    for part in parts.values():
        check(part, model)


class Recorder:
    """The history of one process, which calls from one thread. The clock is the machine's, so
    histories of several processes are comparable."""

    def __init__(self, process: Hashable) -> None:
        self._process = process
        self.history: list[Operation] = []

    def call(self, request: Any, function: Callable[[], Any]) -> Any:
        """Calls and records. ``function`` answers with a value, UNANSWERED included."""
        called = time.monotonic_ns()
        answer = function()
        returned = None if answer is UNANSWERED else time.monotonic_ns()
        self.history.append(Operation(self._process, request, answer, called, returned))
        return answer
