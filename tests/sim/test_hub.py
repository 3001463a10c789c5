"""Threads in virtual time: turns, waits, deadlocks, kills, and that a seed repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvfs_base import threads
from sim.hub import Hub, ProcessDied, SimulationFailed
from sim.sim_threads import SimThreads


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(1)
    with threads.installed(SimThreads(hub)):
        try:
            yield hub
        finally:
            hub.close()


def run(hub: Hub, function: Callable[..., Any], *args: Any, until: float = 1000.0) -> Any:
    process = hub.process("main")
    answers: list[Any] = []
    main = process.start(lambda: answers.append(function(*args)), name="main")
    hub.run(main, until)
    return answers[0]


def test_time_passes_only_when_everybody_waits(hub: Hub) -> None:
    def body() -> float:
        threads.event().wait(5.0)
        hub.sleep(2.5)
        return hub.now

    assert run(hub, body) == 7.5


def test_a_lock_has_one_holder_and_waiting_has_an_end(hub: Hub) -> None:
    def body() -> list[object]:
        lock, inside, seen = threads.lock(), [0], []

        def work(name: int) -> None:
            for _ in range(20):
                with lock:
                    inside[0] += 1
                    hub.sleep(0.01)
                    seen.append((name, inside[0]))
                    inside[0] -= 1

        workers = [threads.thread(work, n, name=f"w{n}") for n in range(5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert {count for _, count in seen} == {1} and len(seen) == 100
        lock.acquire()
        assert not lock.acquire(timeout=1.0) and not lock.acquire(blocking=False)
        lock.release()
        with pytest.raises(RuntimeError):
            lock.release()
        return [name for name, _ in seen]

    order = run(hub, body)
    assert order != sorted(order)


def test_conditions_events_and_semaphores(hub: Hub) -> None:
    def body() -> None:
        condition, ready, queue = threads.condition(), threads.event(), []

        def consume() -> None:
            ready.wait()
            with condition:
                while len(queue) < 3:
                    condition.wait()

        consumers = [threads.thread(consume, name="c") for _ in range(3)]
        for consumer in consumers:
            consumer.start()
        ready.set()
        for number in range(3):
            hub.sleep(0.1)
            with condition:
                queue.append(number)
                condition.notify_all()
        for consumer in consumers:
            consumer.join()
        with condition:
            assert not condition.wait_for(lambda: False, timeout=1.0)
            assert not condition.wait(1.0)
        with pytest.raises(RuntimeError):
            condition.notify()
        semaphore = threads.semaphore(2)
        assert semaphore.acquire() and semaphore.acquire()
        assert not semaphore.acquire(timeout=0.5)
        semaphore.release()
        assert semaphore.acquire()
        semaphore.release(2)
        with pytest.raises(ValueError):
            semaphore.release()

    run(hub, body)


def test_a_pool_has_no_more_threads_than_it_may(hub: Hub) -> None:
    def body() -> None:
        pool, busy, most = threads.pool(3, "pool"), [0], [0]

        def job(number: int) -> int:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            hub.sleep(0.1)
            busy[0] -= 1
            if number == 5:
                raise ValueError(number)
            return number

        futures = [pool.submit(job, n) for n in range(9)]
        assert [f.exception() is None for f in futures] == [n != 5 for n in range(9)]
        assert futures[8].result() == 8
        with pytest.raises(ValueError):
            futures[5].result()
        assert most[0] == 3
        pool.shutdown()
        with pytest.raises(RuntimeError):
            pool.submit(job, 1)

    run(hub, body)


def test_a_deadlock_shows_where_everybody_stands(hub: Hub) -> None:
    def body() -> None:
        lock = threads.lock()
        lock.acquire()
        lock.acquire()

    with pytest.raises(SimulationFailed, match=r"deadlock(.|\n)*lock.acquire"):
        run(hub, body)


def test_what_takes_too_long_and_what_takes_no_time(hub: Hub) -> None:
    with pytest.raises(SimulationFailed, match="not done"):
        run(hub, lambda: hub.sleep(100), until=50.0)

    def spin() -> None:
        while True:
            hub.sleep(0.0)

    with pytest.raises(SimulationFailed, match="stands still"):
        run(hub, spin)


def test_an_exception_nobody_handled_ends_the_run(hub: Hub) -> None:
    def body() -> None:
        threads.thread(lambda: 1 // 0, name="broken").start()
        hub.sleep(1.0)

    with pytest.raises(SimulationFailed, match=r"broken.*ZeroDivisionError"):
        run(hub, body)


def test_the_dead_have_no_effect(hub: Hub) -> None:
    def body() -> list[str]:
        said: list[str] = []
        lock, event = threads.lock(), threads.event()

        def victim() -> None:
            try:
                with lock:
                    hub.sleep(100.0)
            finally:
                event.set()
                said.append("unwound")
                hub.sleep(1.0)
                said.append("waited")

        process = hub.process("victim")
        process.start(victim, name="victim")
        hub.sleep(1.0)
        hub.kill(process)
        assert not event.is_set() and lock.locked()
        with pytest.raises(ProcessDied):
            other = hub.process("other")
            hub.call_later(1.0, lambda: hub.kill_now(other))
            other.run(hub.sleep, 5.0)
        return said

    assert run(hub, body) == ["unwound"]


def test_a_process_may_kill_itself(hub: Hub) -> None:
    def body() -> bool:
        process = hub.process("victim")
        thread = process.start(lambda: hub.kill(process), name="victim")
        thread.join()
        return process.alive

    assert not run(hub, body)


def test_a_paused_process_misses_its_time(hub: Hub) -> None:
    def body() -> float:
        process = hub.process("paused")
        woke: list[float] = []
        thread = process.start(lambda: (hub.sleep(1.0), woke.append(hub.now)), name="t")
        hub.sleep(0.5)
        hub.pause(process, 10.0)
        thread.join()
        return woke[0]

    assert run(hub, body) == 10.5


def test_a_seed_repeats_and_another_differs() -> None:
    def order(seed: int) -> tuple[list[int], str]:
        hub = Hub(seed)
        with threads.installed(SimThreads(hub)):

            def body() -> list[int]:
                seen: list[int] = []
                for number in range(20):
                    threads.thread(seen.append, number, name=f"t{number}").start()
                hub.sleep(1.0)
                hub.trace("seen", *seen)
                return seen

            try:
                return run(hub, body), hub.trace_hash()
            finally:
                hub.close()

    assert order(1) == order(1)
    assert order(1) != order(2)
