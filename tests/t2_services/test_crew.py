"""Threads that help with the items of one request."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvfs_datapath.chains.crew import Crew, Job


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(2)
    yield crew
    crew.close()


def nothing() -> None:
    pass


def test_jobs_wait_together(crew: Crew) -> None:
    barrier = threading.Barrier(3)
    crew.work([lambda: barrier.wait(60)] * 3)
    assert not barrier.broken


def test_one_job_alone_is_the_callers(crew: Crew) -> None:
    seen: list[threading.Thread] = []
    crew.work([lambda: seen.append(threading.current_thread())])
    crew.work([])
    assert seen == [threading.current_thread()]


def test_many_jobs_are_each_done_once(crew: Crew) -> None:
    done: list[int] = []
    crew.work([lambda n=n: done.append(n) for n in range(500)])
    assert sorted(done) == list(range(500))


def test_nobody_waits_for_a_helper_who_is_busy(crew: Crew) -> None:
    busy, go_on = threading.Barrier(4), threading.Event()

    def hold() -> None:
        busy.wait(60)
        assert go_on.wait(60)

    other = threading.Thread(target=crew.work, args=([hold] * 3,))
    other.start()
    busy.wait(60)
    done: list[int] = []
    crew.work([lambda n=n: done.append(n) for n in range(5)])
    assert sorted(done) == list(range(5))
    go_on.set()
    other.join()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_is_raised_when_all_have_ended(crew: Crew, place: int) -> None:
    done: list[int] = []

    def job(number: int) -> None:
        done.append(number)
        if number == place:
            raise KeyError(number)

    with pytest.raises(KeyError):
        crew.work([lambda n=n: job(n) for n in range(3)])
    assert sorted(done) == [0, 1, 2]


def test_a_source_of_jobs_that_breaks_off(crew: Crew) -> None:
    """What was begun has ended before the caller hears of it: it uses the caller's memory."""
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        began.set()
        assert go_on.wait(60)
        ended.set()

    def source() -> Iterator[Job]:
        yield first
        yield nothing
        assert began.wait(60)
        go_on.set()
        raise KeyError

    with pytest.raises(KeyError):
        crew.work(source())
    assert ended.is_set()


def test_a_crew_that_is_closed_leaves_its_callers_the_work(crew: Crew) -> None:
    crew.close()
    done: list[int] = []
    crew.work([lambda n=n: done.append(n) for n in range(3)])
    assert sorted(done) == [0, 1, 2]
