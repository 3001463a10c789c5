"""Counters that several threads add to."""

from __future__ import annotations

from kvfs_base import threads


class Counters:
    """Every name is declared at the start, so that a statistics page never lacks one."""

    def __init__(self, *names: str) -> None:
        self._lock = threads.lock()
        self._values = dict.fromkeys(names, 0)

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)
