"""Trio under a clock that jumps to the next deadline when nobody does anything, and only then."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import trio
import trio.testing


def run_in_mock_time(main: Callable[[], Awaitable[None]]) -> None:
    """Time stands still while a thread is at work: trio's own clock takes it for idleness, and
    deadlines would pass because of a machine that is busy."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    run_sync = trio.to_thread.run_sync
    at_work = 0

    async def in_thread(*args: Any, **named: Any) -> Any:
        nonlocal at_work
        at_work += 1
        clock.autojump_threshold = math.inf
        try:
            return await run_sync(*args, **named)
        finally:
            at_work -= 1
            if not at_work:
                clock.autojump_threshold = 0

    with mock.patch.object(trio.to_thread, "run_sync", in_thread):
        trio.run(main, clock=clock)
