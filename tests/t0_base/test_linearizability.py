"""The checker that the race and crash tests rely on: what it accepts, and what it does not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest

import linearizability
from linearizability import (
    UNANSWERED,
    NotLinearizable,
    Operation,
    Recorder,
    check,
    check_parts,
)


class Register:
    """Reads, writes, and takes: a take answers the value and leaves None."""

    def initial(self) -> Hashable:
        return None

    def step(self, state: Any, request: Any, answer: Any) -> Iterable[Hashable]:
        kind = request[0]
        expected, following = {
            "read": (state, state),
            "write": ("done", request[-1]),
            "take": (state, None),
        }[kind]
        return [following] if answer in (expected, UNANSWERED) else []


def op(process: str, request: Any, answer: Any, called: int, returned: int | None) -> Operation:
    return Operation(process, request, answer, called, returned)


def write(process: str, value: Any, called: int, returned: int | None) -> Operation:
    answer = UNANSWERED if returned is None else "done"
    return op(process, ("write", value), answer, called, returned)


def read(process: str, value: Any, called: int, returned: int) -> Operation:
    return op(process, ("read",), value, called, returned)


def take(process: str, value: Any, called: int, returned: int | None) -> Operation:
    return op(process, ("take",), value, called, returned)


GOOD = {
    "empty": [],
    "one after the other": [write("a", 1, 0, 1), read("b", 1, 2, 3), read("b", 1, 4, 5)],
    "a write that overlaps is seen": [write("a", 1, 0, 10), read("b", 1, 1, 2)],
    "or not yet": [write("a", 1, 0, 10), read("b", None, 1, 2), read("b", 1, 3, 4)],
    "two writes in either order": [
        write("a", 1, 0, 10),
        write("b", 2, 0, 10),
        read("c", 2, 3, 4),
        read("c", 1, 5, 6),
    ],
    "the later call first": [
        write("a", 1, 0, 10),
        write("b", 2, 5, 6),
        read("b", 2, 7, 8),
        read("b", 1, 11, 12),
    ],
    "a write without an answer, seen late": [
        write("a", 1, 0, None),
        read("b", None, 1, 2),
        read("b", None, 3, 4),
        read("b", 1, 5, 6),
    ],
    "and one that did not happen": [write("a", 1, 0, None), read("b", None, 5, 6)],
    "one take wins": [
        write("a", 1, 0, 1),
        take("a", 1, 2, 5),
        take("b", None, 2, 5),
    ],
    "a take without an answer took it": [
        write("a", 1, 0, 1),
        take("b", UNANSWERED, 2, None),
        read("a", 1, 3, 4),
        read("a", None, 5, 6),
    ],
    "at the same moment is concurrent": [write("a", 1, 0, 5), read("b", None, 5, 6)],
}

BAD = {
    "a lost write": [write("a", 1, 0, 1), read("b", None, 2, 3)],
    "a value from nowhere": [read("b", 7, 0, 1)],
    "a write seen before its call": [read("b", 1, 0, 1), write("a", 1, 2, 3)],
    "back to an older value": [
        write("a", 1, 0, 1),
        write("a", 2, 2, 3),
        read("b", 2, 4, 5),
        read("b", 1, 6, 7),
    ],
    "seen, then not": [write("a", 1, 0, 10), read("b", 1, 1, 2), read("c", None, 3, 4)],
    "two readers that disagree about the order": [
        write("a", 1, 0, 10),
        write("b", 2, 0, 10),
        read("c", 1, 1, 2),
        read("c", 2, 3, 4),
        read("c", 1, 5, 6),
    ],
    "both take the same": [write("a", 1, 0, 1), take("a", 1, 2, 5), take("b", 1, 2, 5)],
    "a write without an answer that happens twice": [
        write("a", 1, 0, None),
        take("b", 1, 1, 2),
        take("b", 1, 3, 4),
    ],
    "a write without an answer, seen, then not": [
        write("a", 1, 0, None),
        read("b", 1, 1, 2),
        read("b", None, 3, 4),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_good_histories(name: str) -> None:
    check(GOOD[name], Register())


@pytest.mark.parametrize("name", BAD)
def test_bad_histories(name: str) -> None:
    with pytest.raises(NotLinearizable):
        check(BAD[name], Register())


def test_the_culprit_is_named() -> None:
    history = [write("a", 1, 0, 1), read("b", 1, 2, 3), read("b", 5, 4, 5), read("b", 1, 6, 7)]
    with pytest.raises(NotLinearizable, match=r"nothing explains\n  \[4, 5\] b: .'read',. -> 5\n"):
        check(history, Register())


def brute_force(history: Sequence[Operation]) -> bool:
    """By definition: some order of some of the unanswered operations and all others."""
    answered = [o for o in history if o.returned is not None]
    lost = [o for o in history if o.returned is None]
    model = Register()
    for count in range(len(lost) + 1):
        for some in itertools.combinations(lost, count):
            for order in itertools.permutations([*answered, *some]):
                if any(
                    later.returned is not None and later.returned < earlier.called
                    for earlier, later in itertools.combinations(order, 2)
                ):
                    continue
                states: list[Any] = [model.initial()]
                for o in order:
                    states = [f for s in states for f in model.step(s, o.request, o.answer)]
                if states:
                    return True
    return False


def test_random_histories_against_the_definition() -> None:
    rng = random.Random(1)
    verdicts = []
    for _ in range(400):
        history = []
        for process in ("a", "b", "c")[: rng.randint(2, 3)]:
            moment = 0
            for _ in range(2):
                called = moment + rng.randint(1, 3)
                moment = called + rng.randint(1, 4)
                value = rng.choice((None, 1, 2))
                lost = rng.random() < 0.15
                returned = None if lost else moment
                if rng.random() < 0.5:
                    history.append(write(process, value, called, returned))
                else:
                    answer = UNANSWERED if lost else value
                    request = ("take",) if rng.random() < 0.5 else ("read",)
                    history.append(op(process, request, answer, called, returned))
                if lost:
                    break
        try:
            check(history, Register())
        except NotLinearizable:
            verdicts.append(False)
        else:
            verdicts.append(True)
        assert verdicts[-1] == brute_force(history), "\n".join(map(str, history))
    assert 50 < sum(verdicts) < 350


def test_a_long_history_of_many_processes_is_quick() -> None:
    history = []
    for step in range(5000):
        moment = 10 * step
        history += [write(f"w{n}", (step, n), moment, moment + 5) for n in range(3)]
        history.append(read("r", (step, step % 3), moment + 6, moment + 9))
    check(history, Register())
    history.append(read("r", (0, 0), 10**9, 10**9 + 1))
    with pytest.raises(NotLinearizable):
        check(history, Register())


def test_parts_are_checked_each() -> None:
    def of_process(operation: Operation) -> Hashable:
        return operation.process

    good = [write("a", 1, 0, 1), write("b", 2, 2, 3), read("a", 1, 4, 5), read("b", 2, 6, 7)]
    check_parts(good, of_process, Register())
    with pytest.raises(NotLinearizable):
        check_parts([*good, read("b", 1, 8, 9)], of_process, Register())


def test_too_many_open_operations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearizability, "CONFIGURATIONS_MAX", 1000)
    history = [write("a", n, 0, None) for n in range(20)] + [read("b", 99, 1, 2)]
    with pytest.raises(RuntimeError, match="too many"):
        check(history, Register())


def test_a_recorder_writes_calls_down() -> None:
    recorder = Recorder("p")
    assert recorder.call("question", lambda: "answer") == "answer"
    assert recorder.call("lost", lambda: UNANSWERED) is UNANSWERED
    first, second = recorder.history
    assert (first.process, first.request, first.answer) == ("p", "question", "answer")
    assert first.returned is not None
    assert first.called <= first.returned <= second.called
    assert second.returned is None
