"""The extent allocator against a model: a list of pages with their owners."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import PAGE_BYTES
from kvfs_gds.extents import ExtentAllocator, pages_of

PAGES = 24


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.extents = ExtentAllocator(PAGES * PAGE_BYTES)
        self.owner: list[int | None] = [None] * PAGES
        self.held: dict[int, int] = {}

    def holes(self) -> list[tuple[int, int]]:
        """(start, length) of each run of free pages."""
        found = []
        start = 0
        for page in range(PAGES + 1):
            if page == PAGES or self.owner[page] is not None:
                if page > start:
                    found.append((start, page - start))
                start = page + 1
        return found

    @rule(size=st.integers(1, PAGES * PAGE_BYTES))
    def allocate(self, size: int) -> None:
        pages = pages_of(size) // PAGE_BYTES
        fitting = [length for _, length in self.holes() if length >= pages]
        starts = dict(self.holes())
        offset = self.extents.allocate(size)
        if not fitting:
            assert offset is None
            return
        assert offset is not None and offset % PAGE_BYTES == 0
        page = offset // PAGE_BYTES
        assert starts[page] == min(fitting), "not the best fit"
        self.owner[page : page + pages] = [offset] * pages
        self.held[offset] = pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        pages = self.held.pop(offset)
        assert self.extents.free(offset) == pages * PAGE_BYTES
        page = offset // PAGE_BYTES
        self.owner[page : page + pages] = [None] * pages
        with pytest.raises(InvalidRequest):
            self.extents.free(offset)

    @invariant()
    def adds_up(self) -> None:
        lengths = [length for _, length in self.holes()]
        assert self.extents.free_bytes == sum(lengths) * PAGE_BYTES
        assert self.extents.used_bytes == (PAGES - sum(lengths)) * PAGE_BYTES
        assert self.extents.largest_free_bytes == max(lengths, default=0) * PAGE_BYTES


TestExtents = Model.TestCase
TestExtents.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("size", [0, -PAGE_BYTES, 1, PAGE_BYTES + 1])
def test_a_range_is_whole_pages(size: int) -> None:
    with pytest.raises(InvalidRequest):
        ExtentAllocator(size)


@pytest.mark.parametrize("size", [0, -1])
def test_an_extent_has_bytes(size: int) -> None:
    with pytest.raises(InvalidRequest):
        ExtentAllocator(PAGE_BYTES).allocate(size)


def test_the_extent_freed_last_is_used_first() -> None:
    extents = ExtentAllocator(8 * PAGE_BYTES)
    offsets = [extents.allocate(PAGE_BYTES) for _ in range(8)]
    assert None not in offsets
    for offset in (offsets[1], offsets[5], offsets[3]):
        assert offset is not None
        extents.free(offset)
    assert [extents.allocate(1) for _ in range(3)] == [offsets[3], offsets[5], offsets[1]]


def test_neighbours_grow_together_again() -> None:
    extents = ExtentAllocator(4 * PAGE_BYTES)
    offsets = [extents.allocate(PAGE_BYTES) for _ in range(4)]
    for offset in (offsets[0], offsets[2], offsets[1], offsets[3]):
        assert offset is not None
        extents.free(offset)
    assert extents.allocate(4 * PAGE_BYTES) == 0
