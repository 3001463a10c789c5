"""An answer that is on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer(Generic[T_co]):
    """To be taken once, in whichever thread."""

    take: Callable[[], T_co]
    """Waits for it. Raises what went wrong."""
    within: Callable[[float], bool]
    """Waits so many seconds at most; whether ``take`` would not wait (much) any more."""

    def then(self, step: Callable[[T_co], U]) -> Answer[U]:
        """With ``step`` done to what it is."""
        return Answer(lambda: step(self.take()), self.within)


__all__ = ["Answer"]
