"""How long to go on asking: pauses that grow, with jitter, and an end."""

from __future__ import annotations

from kvfs_base import threads
from kvfs_base.seams import Env
from kvfs_base.threads import Event, Lock
from kvfs_datapath.limits import CHAIN_PAUSE_SECONDS, CHAIN_PAUSE_SECONDS_MAX


class Closed:
    """An event that is made when somebody waits for it: most files are closed before anybody does,
    and it would be half of what opening one costs here."""

    __slots__ = ("_event", "_is_set", "_lock")

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._is_set = False
        self._event: Event | None = None

    def set(self) -> None:
        with self._lock:
            self._is_set = True
            if self._event is not None:
                self._event.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is set by then."""
        with self._lock:
            if self._is_set:
                return True
            event = self._event = self._event or threads.event()
        return event.wait(seconds)


class Patience:
    """For one thread. Over after ``seconds`` of the clock, or of pauses, whichever is sooner."""

    def __init__(self, env: Env, closed: Event | Closed, seconds: float) -> None:
        """``closed`` ends it at once."""
        self._env = env
        self._closed = closed
        self._deadline = env.clock.monotonic() + seconds
        self._left = seconds
        self._pause = CHAIN_PAUSE_SECONDS

    def wait(self) -> bool:
        """Pauses. False when it is over: then there was no pause."""
        if self._left <= 0 or self._env.clock.monotonic() >= self._deadline:
            return False
        pause = min(self._pause * (0.5 + 0.5 * self._env.rng.random()), self._left)
        self._left -= pause
        self._pause = min(2 * self._pause, CHAIN_PAUSE_SECONDS_MAX)
        return not self._closed.wait(pause)


__all__ = ["Closed", "Patience"]
