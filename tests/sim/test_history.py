"""The judges of a run: bytes that say whose they are, and histories that have an order or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import linearizability
from sim.history import (
    History,
    NotLinearizable,
    WrongBytes,
    check_key,
    check_register,
    page,
    read_page,
)


def test_pages_say_whose_they_are() -> None:
    whole = page(7, 3, 42)
    assert read_page(whole, 7, 3) == 42
    assert read_page(whole[:100], 7, 3) == 42
    assert read_page(bytes(4096), 7, 3) == 0
    for owner, index in ((8, 3), (7, 2)):
        with pytest.raises(WrongBytes):
            read_page(whole, owner, index)
    for torn in (whole[:512] + page(7, 3, 41)[512:], whole[:512] + bytes(3584)):
        with pytest.raises(WrongBytes):
            read_page(torn, 7, 3)
    flipped = bytearray(whole)
    flipped[1000] ^= 4
    with pytest.raises(WrongBytes):
        read_page(flipped, 7, 3)


def history(*operations: tuple[Sequence[Any], Any, int, int | None]) -> History:
    """Operations as (request, answer, called, returned)."""
    made = History()
    for request, answer, called, returned in operations:
        entry = made.begin("x", "p", request)
        entry.called, entry.answer, entry.returned = called, answer, returned
    return made


READ = ("read",)


@pytest.mark.parametrize(
    "operations",
    [
        [(READ, 0, 1, 2), (("write", 5), None, 3, 4), (READ, 5, 5, 6)],
        [(("write", 5), None, 1, 9), (READ, 0, 2, 3), (READ, 5, 4, 5)],
        [(("write", 5), None, 1, None), (READ, 0, 2, 3), (READ, 5, 40, 50)],
        [(("write", 5), None, 1, None), (READ, 0, 20, 30)],
        [(("write", 5), None, 1, 8), (("write", 6), None, 2, 7), (READ, 5, 9, 10)],
    ],
)
def test_histories_of_a_register_that_have_an_order(operations: Any) -> None:
    check_register(history(*operations).entries["x"])


@pytest.mark.parametrize(
    "operations",
    [
        [(("write", 5), None, 1, 2), (READ, 0, 3, 4)],
        [(READ, 5, 1, 2), (("write", 5), None, 3, 4)],
        [(READ, 9, 1, 2)],
        [(("write", 5), None, 1, None), (READ, 5, 2, 3), (READ, 0, 4, 5)],
        [
            (("write", 5), None, 1, 2),
            (("write", 6), None, 3, 4),
            (READ, 6, 5, 6),
            (READ, 5, 7, 8),
        ],
    ],
)
def test_histories_of_a_register_that_have_none(operations: Any) -> None:
    with pytest.raises(NotLinearizable):
        check_register(history(*operations).entries["x"])


def check(*operations: tuple[Sequence[Any], Any, int, int | None], lossy: bool = False) -> None:
    check_key(history(*operations).operations("x"), lossy=lossy)


def test_the_first_commit_of_a_key_counts_until_it_is_removed() -> None:
    check(
        (("commit", 20), None, 1, 2),
        (("commit", 21), None, 3, 4),
        (("lookup",), 20, 5, 6),
        (("remove", 21), 0, 7, 8),
        (("remove", 20), 1, 9, 10),
        (("lookup",), None, 11, 12),
        (("commit", 22), None, 13, 14),
        (("remove", None), 1, 15, 16),
        (("remove", None), 0, 17, 18),
    )


def test_what_a_key_cannot_do() -> None:
    stored = (("commit", 20), None, 1, 2)
    for wrong in (
        (("lookup",), None, 3, 4),
        (("lookup",), 21, 3, 4),
        (("remove", None), 0, 3, 4),
        (("remove", 21), 1, 3, 4),
    ):
        with pytest.raises(linearizability.NotLinearizable):
            check(stored, wrong)
    check(stored, (("lookup",), None, 3, 4), lossy=True)
    with pytest.raises(linearizability.NotLinearizable):
        check(stored, (("lookup",), None, 3, 4), (("lookup",), 20, 5, 6), lossy=True)
