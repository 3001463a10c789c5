"""What was written to a file and not synced yet, and whether its servers may have lost it since."""

from __future__ import annotations

from collections.abc import Iterable

from kvfs_base.errors import TargetFailed


class Unsynced:
    """Chunks by number. The caller has a lock."""

    def __init__(self) -> None:
        self._incarnations: dict[int, int] = {}
        """Of the target that took the bytes; 0 where nobody said, or where it is on this host."""
        self._lost: TargetFailed | None = None

    @property
    def numbers(self) -> set[int]:
        return set(self._incarnations)

    def add(self, number: int, incarnation: int = 0) -> None:
        """Written, to this incarnation of the target."""
        before = self._incarnations.get(number, 0)
        self._incarnations[number] = incarnation or before
        self._compare(number, before, incarnation)

    def compare(self, numbers: Iterable[int], incarnation: int) -> None:
        """Synced, by this one."""
        for number in numbers:
            self._compare(number, self._incarnations.get(number, 0), incarnation)

    def _compare(self, number: int, before: int, after: int) -> None:
        if before and after and before != after and self._lost is None:
            detail = f"what was written to chunk {number} and not synced may be lost"
            self._lost = TargetFailed(detail=detail)

    def drop(self, first: int, end: int) -> None:
        """Nobody will read these any more."""
        for number in [n for n in self._incarnations if first <= n < end]:
            del self._incarnations[number]

    def take_back(self, other: Unsynced) -> None:
        """What could not be synced after all. What was lost stays so, whatever is synced later."""
        self._lost = self._lost or other._lost
        for number, older in other._incarnations.items():
            newer = self._incarnations.get(number, 0)
            self._incarnations[number] = newer or older
            self._compare(number, older, newer)

    def raise_lost(self) -> None:
        if self._lost is not None:
            raise self._lost.with_traceback(None)


__all__ = ["Unsynced"]
