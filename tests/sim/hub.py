"""Threads that take turns: one greenlet a thread, virtual time, a seed that decides who is next.

The hub keeps a heap of things to come: threads to be resumed and functions to be called, each at a
moment of virtual time. Among those of one moment chance decides. A thread runs until it comes to a
seam (a lock, a wait, the network, a disk), where others may get their turn; nothing else can
interrupt it, so a run repeats exactly.

A *process* is what is killed, stopped and paused together. The threads of a killed process unwind
with ``Killed``, and from then on no seam does anything for them: what their ``finally`` clauses
try has no effect, as nothing has after ``kill -9``.
"""

from __future__ import annotations

import collections
import hashlib
import heapq
import random
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import greenlet

STEPS_AT_ONE_MOMENT_MAX = 200_000
"""More than this without any time going by is a loop that never ends."""

TRACE_LINES = 20_000
"""The last lines of the trace are kept for whoever looks at a failure."""


HASH_BITS = (1 << 63) - 1


class Killed(BaseException):
    """The process of this thread is gone. Not an Exception: nobody handles it."""


class SimulationFailed(AssertionError):
    """The run went wrong: a thread died of an exception, or nobody can go on."""


class Process:
    """What lives and dies together."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub = hub
        self.name = name
        self.alive = True
        self.paused_until = 0.0
        self.threads: dict[SimThread, None] = {}
        self.at_death: list[Callable[[], None]] = []
        """What the kernel does for the dead: closing connections, giving up locks."""

    def thread(self, target: Callable[..., Any], *args: Any, name: str) -> SimThread:
        """Not yet started."""
        return SimThread(self.hub, self, target, args, name)

    def start(self, target: Callable[..., Any], *args: Any, name: str) -> SimThread:
        started = self.thread(target, *args, name=name)
        started.start()
        return started

    def run(self, target: Callable[..., Any], *args: Any) -> Any:
        """Calls ``target`` in a thread of this process, waits for it and answers what it did.
        Raises what it raised, Killed if the process died meanwhile."""
        outcome: list[tuple[bool, Any]] = []

        def call() -> None:
            try:
                outcome.append((True, target(*args)))
            except Exception as exc:
                outcome.append((False, exc))

        self.start(call, name=f"{self.name}-run").join()
        if not outcome:
            raise ProcessDied(self.name)
        good, value = outcome[0]
        if not good:
            raise value
        return value


class ProcessDied(Exception):
    """A process was killed while somebody waited for it."""


class SimThread:
    """As threading.Thread."""

    def __init__(
        self, hub: Hub, process: Process, target: Callable[..., Any], args: Iterable[Any], name: str
    ) -> None:
        self.hub = hub
        self.process = process
        self.name = name
        self.number = hub.next_number()
        self.serial = 0
        """Grows with each resumption: what was planned for an earlier wait is stale."""
        self._target = target
        self._args = tuple(args)
        self.greenlet: greenlet.greenlet
        """Once it is started."""
        self.started = False
        self.is_done = False
        self._joiners: list[SimThread] = []

    def start(self) -> None:
        if self.hub.is_dead:
            raise Killed
        if self.started:
            raise RuntimeError("threads can only be started once")
        if not self.process.alive:
            raise Killed
        self.greenlet = greenlet.greenlet(self._run, parent=self.hub.greenlet)
        self.started = True
        self.process.threads[self] = None
        self.hub.plan(self)

    def _run(self, _: Any) -> None:
        try:
            self._target(*self._args)
        except Killed:
            pass
        except BaseException as exc:
            self.hub.fail(f"thread {self.name} of {self.process.name} died", exc)
        finally:
            self.is_done = True
            self.process.threads.pop(self, None)
            for joiner in self._joiners:
                self.hub.wake(joiner)

    def is_alive(self) -> bool:
        return self.started and not self.is_done

    def join(self, timeout: float | None = None) -> None:
        if not self.started:
            raise RuntimeError("cannot join a thread before it is started")
        me = self.hub.require_alive()
        deadline = None if timeout is None else self.hub.now + timeout
        while not self.is_done:
            left = None if deadline is None else deadline - self.hub.now
            if left is not None and left <= 0:
                return
            self._joiners.append(me)
            try:
                self.hub.park(left)
            finally:
                self._joiners.remove(me)

    def unwind(self) -> None:
        """In the hub: the thread's process is dead."""
        self.serial += 1
        if self.is_alive():
            self.greenlet.throw(Killed)
            if not self.is_done:
                raise SimulationFailed(f"thread {self.name} outlived its process")

    def stack(self) -> str:
        frame = self.greenlet.gr_frame if self.started else None
        lines = traceback.format_stack(frame) if frame is not None else ["  at work\n"]
        return f"{self.name} of {self.process.name}:\n{''.join(lines[-12:])}"


class Hub:
    """One simulated world's time and turns. ``run`` belongs to the thread of the caller."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.greenlet = greenlet.getcurrent()
        self.current: SimThread | None = None
        self.processes: list[Process] = []
        self.steps = 0
        self.switch_chance = 0.3
        """How often a seam that need not wait lets others go first."""
        self.counts: collections.Counter[str] = collections.Counter()
        """Faults and events by name, for the summary."""
        self._heap: list[tuple[float, int, int, Any, int, bool]] = []
        self._sequence = 0
        self._number = 0
        self._failure: SimulationFailed | None = None
        self._digest = hashlib.blake2b(digest_size=8)
        self._turns = 0
        self._lines: collections.deque[tuple[float, tuple[Any, ...]]] = collections.deque(
            maxlen=TRACE_LINES
        )
        self._bits = self.rng.getrandbits

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def process(self, name: str) -> Process:
        made = Process(self, name)
        self.processes.append(made)
        return made

    # --- the trace

    def trace(self, *words: Any) -> None:
        """One line of what happened. Words are plain values: their text is part of the hash."""
        self._digest.update(repr((self.now, words)).encode())
        self._lines.append((self.now, words))

    def trace_hash(self) -> str:
        """Of every line and every turn that a thread took."""
        digest = self._digest.copy()
        digest.update(self._turns.to_bytes(8, "little"))
        return digest.hexdigest()

    def trace_tail(self, count: int) -> list[str]:
        lines = list(self._lines)[-count:]
        return [f"{at:12.6f}  {' '.join(map(str, words))}" for at, words in lines]

    # --- planning

    def plan(self, thread: SimThread, delay: float = 0.0, woken: bool = True) -> None:
        """``thread`` is resumed after ``delay`` unless it is resumed before."""
        self._sequence += 1
        entry = (self.now + delay, self._bits(32), self._sequence, thread, thread.serial, woken)
        heapq.heappush(self._heap, entry)

    def call_at(self, moment: float, function: Callable[[], None]) -> None:
        """``function`` is called in the hub: it may wake threads, but not wait."""
        self._sequence += 1
        entry = (max(moment, self.now), self._bits(32), self._sequence, function, 0, True)
        heapq.heappush(self._heap, entry)

    def call_later(self, delay: float, function: Callable[[], None]) -> None:
        self.call_at(self.now + delay, function)

    def wake(self, thread: SimThread) -> None:
        self.plan(thread)

    # --- for threads

    def require_alive(self) -> SimThread:
        """The thread that runs. Raises Killed if its process is dead."""
        me = self.current
        if me is None:
            raise RuntimeError("only a simulated thread may wait")
        if not me.process.alive:
            raise Killed
        return me

    @property
    def is_dead(self) -> bool:
        """Whether the thread that runs belongs to a dead process: no seam does anything for it."""
        return self.current is not None and not self.current.process.alive

    def park(self, timeout: float | None = None) -> bool:
        """Waits until somebody wakes this thread (True) or ``timeout`` is over (False)."""
        me = self.require_alive()
        if timeout is not None:
            self.plan(me, max(timeout, 0.0), woken=False)
        woken: bool = self.greenlet.switch()
        return woken

    def sleep(self, seconds: float) -> None:
        me = self.require_alive()
        self.plan(me, seconds)
        self.greenlet.switch()

    def checkpoint(self) -> None:
        """A seam that need not wait: by chance others go first."""
        me = self.require_alive()
        if self.rng.random() < self.switch_chance:
            self.plan(me)
            self.greenlet.switch()

    def in_hub(self, function: Callable[[], None]) -> None:
        """Calls ``function`` outside of every thread, and waits until it has been called."""
        me = self.require_alive()

        def call() -> None:
            function()
            self.wake(me)

        self.call_at(self.now, call)
        self.greenlet.switch()

    # --- processes

    def kill(self, process: Process) -> None:
        """From any thread, which may be one of the process."""
        self.in_hub(lambda: self.kill_now(process))

    def kill_now(self, process: Process) -> None:
        """In the hub."""
        if not process.alive:
            return
        process.alive = False
        self.trace("killed", process.name)
        for thread in list(process.threads):
            self._enter(thread, thread.unwind)
        for action in process.at_death:
            action()
        process.at_death.clear()

    def pause(self, process: Process, seconds: float) -> None:
        """As SIGSTOP, and SIGCONT after ``seconds``."""
        process.paused_until = max(process.paused_until, self.now + seconds)

    # --- running

    def fail(self, what: str, cause: BaseException | None = None) -> None:
        """The run ends as soon as the hub has its turn."""
        if self._failure is None:
            self._failure = SimulationFailed(
                what if cause is None else f"{what}: {type(cause).__name__}: {cause}"
            )
            self._failure.__cause__ = cause

    def _enter(self, thread: SimThread, action: Callable[..., None], *args: Any) -> None:
        before, self.current = self.current, thread
        try:
            action(*args)
        finally:
            self.current = before

    def run(self, thread: SimThread, until: float) -> None:
        """Until ``thread`` has ended. Raises SimulationFailed, also if that takes virtual time
        longer than ``until``."""
        moment_steps = 0
        heap, pop = self._heap, heapq.heappop
        while not thread.is_done:
            if not heap:
                raise SimulationFailed(f"deadlock\n{self.stacks()}")
            moment, _, sequence, what, serial, woken = pop(heap)
            if moment > self.now:
                self.now, moment_steps = moment, 0
            moment_steps += 1
            if type(what) is SimThread:
                if serial == what.serial:
                    self._turn(what, woken)
            else:
                self.steps += 1
                self._turns = hash((self._turns, sequence)) & HASH_BITS
                what()
            if self._failure is not None:
                raise self._failure
            if self.now > until:
                raise SimulationFailed(f"not done after {until} s\n{self.stacks()}")
            if moment_steps > STEPS_AT_ONE_MOMENT_MAX:
                raise SimulationFailed(f"time stands still\n{self.stacks()}")

    def _turn(self, thread: SimThread, woken: bool) -> None:
        paused = thread.process.paused_until
        if paused > self.now:
            self.plan(thread, paused - self.now, woken)
            return
        self.steps += 1
        self._turns = hash((self._turns, thread.number, self.now)) & HASH_BITS
        self.current = thread
        thread.serial += 1
        thread.greenlet.switch(woken)
        self.current = None

    def close(self) -> None:
        """Ends every thread. Nothing of the world may be used afterwards."""
        for process in self.processes:
            process.alive = False
        for process in self.processes:
            for thread in list(process.threads):
                self._enter(thread, thread.unwind)
            process.at_death.clear()
        self._heap.clear()

    def stacks(self) -> str:
        alive = [t for process in self.processes for t in process.threads]
        return "\n".join(thread.stack() for thread in alive)
