"""The states of a chain's members, event by event, against the table of 0004-chains.md."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfs_base.limits import HOPS_MAX
from kvfs_metadata.cluster import members
from kvfs_metadata.records import ChainRecord


def chain(
    targets: tuple[int, ...],
    syncing: tuple[int, ...] = (),
    offline: tuple[int, ...] = (),
    copies: int = 2,
) -> ChainRecord:
    return ChainRecord(7, targets, copies, syncing, offline)


def states(record: ChainRecord) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return record.targets, record.syncing, record.offline


def test_the_table() -> None:
    assert states(members.lost(chain((1, 2)), 1)) == ((2,), (), (1,))
    assert states(members.lost(chain((1,), offline=(2,)), 1)) == ((1,), (), (2,)), "the only one"
    assert states(members.lost(chain((1,), (2,)), 1)) == ((1,), (2,), ())
    assert states(members.lost(chain((1,), (2,)), 2)) == ((1,), (), (2,))
    assert states(members.restarted(chain((1, 2)), 1)) == ((2,), (), (1,))
    assert states(members.restarted(chain((1,), (2,)), 2)) == ((1,), (), (2,))
    assert states(members.returned(chain((1,), (3,), (2,)), 2)) == ((1,), (3, 2), ()), "last"
    assert states(members.synced(chain((1,), (2, 3)), 7, 1, 3)) == ((1, 3), (2,), ())
    assert states(members.replaced(chain((1,), offline=(2,)), 2, 3)) == ((1,), (3,), ())
    assert states(members.joined(chain((1, 2)), 3)) == ((1, 2), (3,), ())
    assert states(members.left(chain((1, 2, 3)), 1)) == ((2, 3), (), ())


@pytest.mark.parametrize("record", [chain((1,)), chain((1,), (2,)), chain((1, 2), (3,), (4,))])
def test_what_says_nothing_changes_nothing(record: ChainRecord) -> None:
    assert members.lost(record, 9) is record
    assert members.restarted(record, 9) is record
    assert members.returned(record, 1) is record
    assert members.synced(record, 7, 1, 9) is record
    assert members.replaced(record, 1, 8) is record
    assert members.joined(record, 1) is record
    assert members.left(record, 9) is record
    assert members.removed(record, 9) is record


def test_those_that_the_only_one_was_bringing_in_step_begin_again_when_it_was_restarted() -> None:
    record = chain((1,), (2, 3), (4,))
    after = members.restarted(record, 1)
    assert states(after) == states(record) and after.version == record.version + 1
    assert members.synced(after, record.version, 1, 2) is after
    alone = chain((1,), offline=(2,))
    assert members.restarted(alone, 1) is alone


@pytest.mark.parametrize(
    ("version", "source", "target_id"),
    [(6, 2, 3), (8, 2, 3), (7, 1, 3), (7, 3, 3), (7, 2, 1), (7, 2, 4)],
)
def test_only_the_last_one_knows_who_is_in_step_and_only_now(
    version: int, source: int, target_id: int
) -> None:
    record = chain((1, 2), (3,), (4,))
    assert members.synced(record, version, source, target_id) is record


def test_the_heir_is_who_had_everything_last() -> None:
    """Though it is being brought in step by now, and another one is away for longer."""
    record = members.lost(chain((1, 2), (), (3,)), 2)
    record = members.returned(record, 2)
    assert (record.syncing, record.offline) == ((2,), (3,))
    heir = members.removed(record, 1)
    assert heir is not None and (heir.targets, heir.syncing, heir.offline) == ((2,), (), (3,))
    back = members.synced(record, record.version, 1, 2)
    assert back.targets == (1, 2) and back.served == ()


def test_who_serves_when_the_only_one_is_removed_by_force() -> None:
    record = members.lost(members.lost(chain((1, 2, 3), copies=3), 1), 2)
    assert states(record) == ((3,), (), (2, 1))
    heir = members.removed(record, 3)
    assert heir is not None and states(heir) == ((2,), (), (1,)), "the one that had everything last"
    new = members.removed(chain((1,), (5,), (2,)), 1)
    assert new is not None and states(new) == ((2,), (5,), ()), "a new one may have nothing"
    only = members.removed(chain((1,), (5,)), 1)
    assert only is not None and states(only) == ((5,), (), ())
    assert members.removed(chain((1,)), 1) is None
    assert members.removed(chain((1,), copies=1), 1) is None


def test_writes_pass_a_bounded_number_of_members() -> None:
    full = chain((1, 2), tuple(range(3, HOPS_MAX + 1)), (99,))
    assert members.joined(full, 50) is full
    assert members.returned(full, 99) is full
    assert members.replaced(full, 99, 50) is full


TARGETS = st.integers(1, 6)


class ChainMachine(RuleBasedStateMachine):
    """A chain beside what is true of the data: which targets have every acknowledged write."""

    record: ChainRecord

    @initialize(copies=st.integers(2, 3))
    def start(self, copies: int) -> None:
        self.copies = copies
        self.record = ChainRecord(1, tuple(range(1, copies + 1)), copies)
        self.complete = set(self.record.targets)
        self.versions = [1]

    def become(self, after: ChainRecord) -> None:
        before, self.record = self.record, after
        assert (after is before) == (after.version == before.version)
        assert after.version in (before.version, before.version + 1)
        self.versions.append(after.version)

    @rule()
    def write(self) -> None:
        """Acknowledged by all that serve, so the others are not complete any more."""
        self.complete = set(self.record.targets) & self.complete

    @rule(target_id=TARGETS)
    def lose(self, target_id: int) -> None:
        before = self.record
        self.become(members.lost(before, target_id))
        after = self.record
        assert set(before.targets) - set(after.targets) <= {target_id}
        assert set(before.everybody) == set(after.everybody)
        assert target_id not in after.targets or before.targets in ((target_id,), after.targets)

    @rule(target_id=TARGETS)
    def restart(self, target_id: int) -> None:
        before = self.record
        self.become(members.restarted(before, target_id))
        after = self.record
        assert set(before.everybody) == set(after.everybody)
        if target_id in before.targets and before.syncing:
            assert after is not before, "what it said of them does not count any more"

    @rule(target_id=TARGETS)
    def come_back(self, target_id: int) -> None:
        before = self.record
        self.become(members.returned(before, target_id))
        assert self.record.targets == before.targets, "it does not serve before it is in step"

    @rule(target_id=TARGETS, old=st.integers(0, 3))
    def sync(self, target_id: int, old: int) -> None:
        """The source has compared everything, some changes of the chain ago."""
        before = self.record
        version = before.version - old
        self.become(members.synced(before, version, before.targets[-1], target_id))
        if self.record is not before:
            assert old == 0 and target_id in before.syncing
            self.complete.add(target_id)

    @rule(target_id=TARGETS)
    def join(self, target_id: int) -> None:
        before = self.record
        self.become(members.joined(before, target_id))
        assert self.record.targets == before.targets

    @rule(target_id=TARGETS, other=TARGETS)
    def replace(self, target_id: int, other: int) -> None:
        before = self.record
        self.become(members.replaced(before, target_id, other))
        assert self.record.targets == before.targets

    @rule(target_id=TARGETS)
    def leave(self, target_id: int) -> None:
        before = self.record
        self.become(members.left(before, target_id))
        assert set(before.targets) - set(self.record.targets) <= {target_id}

    @rule(target_id=TARGETS)
    def remove(self, target_id: int) -> None:
        before = self.record
        heirs = set(before.everybody) - {target_id}
        after = members.removed(before, target_id)
        if after is None:
            assert not heirs
            self.start(self.copies)
            return
        self.become(after)
        if before.targets == (target_id,):
            # Data may be lost; what is served now is what counts from here on.
            assert after.targets[0] in heirs
            self.complete = set(after.targets)

    @invariant()
    def whoever_serves_has_everything(self) -> None:
        assert self.record.targets, "somebody serves"
        assert set(self.record.targets) <= self.complete

    @invariant()
    def nobody_is_twice(self) -> None:
        assert len(set(self.record.everybody)) == len(self.record.everybody)

    @invariant()
    def versions_grow(self) -> None:
        assert self.versions == sorted(self.versions)


TestChainMachine = ChainMachine.TestCase
TestChainMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
