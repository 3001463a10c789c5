"""How long to go on asking: pauses that grow, with jitter, and an end."""

from __future__ import annotations

from kvfs_base.limits import CHAIN_PAUSE_SECONDS, CHAIN_PAUSE_SECONDS_MAX
from kvfs_base.seams import Env
from kvfs_base.threads import Event


class Patience:
    """For one thread. Over after ``seconds`` of the clock, or of pauses, whichever is sooner."""

    def __init__(self, env: Env, closed: Event, seconds: float) -> None:
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


__all__ = ["Patience"]
