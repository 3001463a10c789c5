"""What the answers of a batch say."""

from __future__ import annotations

from kvfs_base.errors import KvfsError
from kvfs_datapath import messages as m


def raise_first(outcomes: m.Outcomes, *, besides: type[KvfsError] | None = None) -> None:
    """The first item's error that is not ``besides``."""
    for index in outcomes.errors:
        error = outcomes.error(index)
        if error is not None and (besides is None or not isinstance(error, besides)):
            raise error


__all__ = ["raise_first"]
