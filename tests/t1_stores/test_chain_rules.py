"""What members of a chain decide, as tables."""

from __future__ import annotations

import pytest

from kvfs_base.errors import WIRE_CODES, ChunkMismatch, Conflict, KvfsError, WriteUncertain
from kvfs_base.types import ChunkId
from kvfs_datapath import messages as m
from kvfs_datapath import rules
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.rules import Receipt

CHUNK = ChunkId(7, 0, 100)


def info(
    version: int,
    *,
    who: tuple[int, int] = (1, 1),
    crc: int = 5,
    state: ChunkState = ChunkState.SEALED,
) -> ChunkInfo:
    return ChunkInfo(
        *CHUNK,
        state,
        length=10,
        crc32c=crc,
        version=version,
        writer=who[0],
        sequence=who[1],
    )


def request(version: int, *, whole: bool = False, who: tuple[int, int] = (1, 1)) -> m.PassUpdate:
    update = m.Update(7, 0, 0, 10, 5, *who)
    return m.PassUpdate(2, m.Passing(100, 1), update, version, 5, 10, whole)


OTHER = (2, 9)


@pytest.mark.parametrize(
    ("committed", "pending", "passed", "in_step", "expected"),
    [
        # The usual: what comes is the next version.
        (None, None, request(1), True, Receipt.PREPARE),
        (info(3), None, request(4), True, Receipt.PREPARE),
        (info(3), None, request(4, whole=True), True, Receipt.PREPARE),
        # It comes again.
        (info(4), None, request(4), True, Receipt.ANSWER),
        (info(4), None, request(4, whole=True), False, Receipt.ANSWER),
        (info(3), info(4), request(4), True, Receipt.CARRY),
        (info(3), info(4), request(4, whole=True), True, Receipt.CARRY),
        # Another one was pending under its number, and is replaced.
        (info(3), info(4, who=OTHER), request(4), True, Receipt.PREPARE),
        # Something is missing.
        (None, None, request(4), True, Receipt.ASK_WHOLE),
        (info(2), None, request(4), True, Receipt.ASK_WHOLE),
        (info(2), None, request(4, whole=True), True, Receipt.PREPARE),
        # Late, or impossible.
        (info(5), None, request(4), True, Conflict),
        (info(5), None, request(4, whole=True), True, Conflict),
        (info(4, who=OTHER), None, request(4), True, ChunkMismatch),
        (info(4, crc=6), None, request(4, whole=True), True, ChunkMismatch),
        # Who is not in step takes what the others have, whatever it had.
        (info(9), None, request(4), False, Receipt.ASK_WHOLE),
        (info(9), None, request(4, whole=True), False, Receipt.PREPARE),
        (info(4, who=OTHER), None, request(4, whole=True), False, Receipt.PREPARE),
        (info(3), None, request(4), False, Receipt.PREPARE),
        (info(9), info(10, who=OTHER), request(4, whole=True), False, Receipt.PREPARE),
    ],
)
def test_what_a_member_does_with_an_update(
    committed: ChunkInfo | None,
    pending: ChunkInfo | None,
    passed: m.PassUpdate,
    in_step: bool,
    expected: Receipt | type[KvfsError],
) -> None:
    if isinstance(expected, Receipt):
        assert rules.receive(committed, pending, passed, in_step) is expected
    else:
        with pytest.raises(expected):
            rules.receive(committed, pending, passed, in_step)


def update(*, again: bool = False, base: int | None = None, writer: int = 1) -> m.Update:
    return m.Update(7, 0, 0, 10, 5, writer, 1, False, again, base)


@pytest.mark.parametrize(
    ("item", "committed", "seen", "expected"),
    [
        (update(), None, False, False),
        (update(), info(3, who=OTHER), False, False),
        (update(), info(3, who=OTHER), True, True),
        (update(), info(3), False, True),
        (update(again=True, base=0), None, False, False),
        (update(again=True), None, False, False),
        (update(again=True, base=3), info(3, who=OTHER), False, False),
        (update(again=True, base=3), info(4), False, True),
        (update(again=True, base=3), info(4, who=OTHER), True, True),
        (update(again=True, base=3), info(4, who=OTHER), False, WriteUncertain),
        (update(again=True), info(1, who=OTHER), False, WriteUncertain),
        (update(writer=0), info(3, who=(0, 1)), True, False),
        # What it wrote is lost, and nothing came since.
        (update(again=True, base=2), info(3, state=ChunkState.DAMAGED), True, False),
        (update(), info(3, who=OTHER, state=ChunkState.DAMAGED), True, True),
    ],
)
def test_whether_a_head_has_done_an_update_before(
    item: m.Update,
    committed: ChunkInfo | None,
    seen: bool,
    expected: bool | type[KvfsError],
) -> None:
    if isinstance(expected, bool):
        assert rules.is_repeated(item, committed, seen) is expected
    else:
        with pytest.raises(expected):
            rules.is_repeated(item, committed, seen)


HELD_FILE = m.Held(7, 0, 10, 5, 3)
HELD_BLOCK = m.Held(7, 0, 10, 5, 0)


@pytest.mark.parametrize(
    ("held", "own", "in_step", "expected"),
    [
        (HELD_FILE, None, False, True),
        (HELD_FILE, None, True, True),
        (HELD_FILE, info(3), False, False),
        (HELD_FILE, info(2), False, True),
        (HELD_FILE, info(4), False, True),
        (HELD_FILE, info(4), True, False),
        (HELD_FILE, info(3, crc=6), False, True),
        (HELD_BLOCK, None, False, True),
        (HELD_BLOCK, info(0), False, False),
        (HELD_BLOCK, info(0, crc=6), False, True),
        (HELD_BLOCK, info(1), False, True),
    ],
)
def test_what_a_member_wants_of_what_another_one_has(
    held: m.Held, own: ChunkInfo | None, in_step: bool, expected: bool
) -> None:
    assert rules.is_wanted(held, own, in_step) is expected


def test_no_answer_that_may_come_after_preparing_says_nowhere() -> None:
    """What a disk or a connection says in the middle leaves it open what became of an update."""
    unknown = {
        "chunk_corrupt",
        "chunk_mismatch",
        "chunk_not_found",
        "connection_lost",
        "deadline_exceeded",
        "internal_error",
        "protocol_error",
        "target_failed",
        "write_uncertain",
    }
    for code in unknown:
        assert not issubclass(WIRE_CODES[code], rules.NOWHERE)
