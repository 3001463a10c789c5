"""Locks of files: who holds what, who waits for whom, and what ends them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvfs_base import errors as e
from kvfs_metadata import limits, records
from kvfs_metadata import messages as m
from t2_services.metadata_rig import ROOT, Rig

ONE, TWO = b"session-one-....", b"session-two-...."
GRACE = limits.SESSION_GRACE_SECONDS
END = 2**63 - 1
A, B, C = b"owner--a", b"owner--b", b"owner--c"


def lock(owner: bytes, start: int = 0, end: int = END, **fields: Any) -> m.FileLock:
    return m.FileLock(start, end, fields.pop("exclusive", True), owner, **fields)


def shared(owner: bytes, start: int = 0, end: int = END, **fields: Any) -> m.FileLock:
    return lock(owner, start, end, exclusive=False, **fields)


@pytest.fixture
def rig() -> Rig:
    """Connections 1 and 2 speak for sessions ONE and TWO."""
    rig = Rig()
    rig.call(m.Attach(ONE), 1)
    rig.call(m.Attach(TWO), 2)
    return rig


@pytest.fixture
def inode(rig: Rig) -> int:
    inode = rig.make(ROOT, b"f").inode
    rig.call(m.OpenInode(inode), 1)
    rig.call(m.OpenInode(inode), 2)
    return inode


def held(rig: Rig, inode: int) -> list[tuple[bytes, int, int, bool]]:
    found = rig.dump(records.lock_key(inode)).get(records.lock_key(inode))
    locks = [] if found is None else records.decode_locks(found)
    return [(one.owner, one.start, one.end, one.exclusive) for one in locks]


def waits(rig: Rig, inode: int, wanted: m.FileLock, connection: int = 1) -> bool:
    request = m.AwaitLock(inode, wanted)
    locks = rig.core.locks
    return not locks.may_lock(locks.asker(connection, request), request)


# --- ranges


def test_an_exclusive_range_keeps_others_out(rig: Rig, inode: int) -> None:
    assert rig.call(m.SetLock(inode, lock(A, 10, 19, pid=77)), 1) is None
    in_the_way = m.FileLock(10, 19, True, A, pid=77)
    assert rig.call(m.SetLock(inode, lock(B, 19, 30)), 1) == in_the_way
    assert rig.call(m.GetLock(inode, shared(B, 0, 10)), 1) == in_the_way
    for free in (lock(B, 0, 9), lock(B, 20, END)):
        assert rig.call(m.SetLock(inode, free), 1) is None
    assert held(rig, inode) == [(B, 0, 9, True), (A, 10, 19, True), (B, 20, END, True)]


def test_the_same_owner_number_of_two_sessions_is_two_owners(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A, pid=77)), 1)
    found = rig.call(m.SetLock(inode, lock(A)), 2)
    assert found.pid == 0  # it would name some process of another machine


def test_shared_ranges_are_shared(rig: Rig, inode: int) -> None:
    for connection, owner in ((1, A), (1, B), (2, C)):
        assert rig.call(m.SetLock(inode, shared(owner, 0, 99)), connection) is None
    assert rig.call(m.SetLock(inode, lock(A, 50, 50)), 1) is not None
    rig.call(m.Unlock(inode, lock(B)), 1)
    rig.call(m.Unlock(inode, lock(C, 50, 50)), 2)
    assert rig.call(m.SetLock(inode, lock(A, 50, 50)), 1) is None
    assert (A, 50, 50, True) in held(rig, inode)


def test_what_an_owner_locks_replaces_what_it_had_there(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A, 0, 99)), 1)
    rig.call(m.SetLock(inode, shared(A, 20, 29)), 1)
    assert held(rig, inode) == [(A, 0, 19, True), (A, 20, 29, False), (A, 30, 99, True)]
    rig.call(m.SetLock(inode, lock(A, 10, 50)), 1)
    assert held(rig, inode) == [(A, 0, 99, True)]
    rig.call(m.Unlock(inode, lock(A, 40, 49)), 1)
    assert held(rig, inode) == [(A, 0, 39, True), (A, 50, 99, True)]
    rig.call(m.Unlock(inode, lock(A)), 1)
    assert held(rig, inode) == []


def test_random_ranges_are_as_bytes_say(rig: Rig, inode: int) -> None:
    """Against a model that knows each byte's lock by owner."""
    rng = random.Random(7)
    owners = [(1, A), (1, B), (2, A)]
    model: dict[tuple[int, bytes], list[str]] = {owner: [""] * 12 for owner in owners}
    for _ in range(2000):
        who = rng.choice(owners)
        start, end = sorted((rng.randrange(12), rng.randrange(12)))
        kind = rng.choice(["shared", "exclusive", ""])
        wanted = lock(who[1], start, end, exclusive=kind == "exclusive")
        others = {
            other[at] for one, other in model.items() if one != who for at in range(start, end + 1)
        }
        is_free = not kind or others <= ({""} if kind == "exclusive" else {"", "shared"})
        if kind:
            assert (rig.call(m.GetLock(inode, wanted), who[0]) is None) == is_free
            assert (rig.call(m.SetLock(inode, wanted), who[0]) is None) == is_free
        else:
            rig.call(m.Unlock(inode, wanted), who[0])
        if is_free:
            model[who][start : end + 1] = [kind] * (end - start + 1)
    found = records.decode_locks(
        rig.engine.view(lambda kv: kv.get(records.lock_key(inode))) or b"\x90"
    )
    for (connection, owner), wanted_bytes in model.items():
        session = ONE if connection == 1 else TWO
        bytes_found = [""] * 12
        own = [one for one in found if (one.session, one.owner) == (session, owner)]
        for one in own:
            for at in range(one.start, one.end + 1):
                bytes_found[at] = "exclusive" if one.exclusive else "shared"
        assert bytes_found == wanted_bytes
        runs = sum(
            a != b and bool(b) for a, b in zip(["", *wanted_bytes], wanted_bytes, strict=False)
        )
        assert len(own) == runs  # ranges that touch are one


# --- whole files


def test_the_two_kinds_do_not_see_each_other(rig: Rig, inode: int) -> None:
    assert rig.call(m.SetLock(inode, lock(A)), 1) is None
    assert rig.call(m.SetLock(inode, lock(B, flock=True)), 2) is None
    assert rig.call(m.SetLock(inode, lock(C, flock=True)), 1) is not None


def test_a_conversion_that_fails_loses_the_lock(rig: Rig, inode: int) -> None:
    """As flock(2) says: else two that share and both want the file alone wait for good."""
    for owner in (A, B):
        assert rig.call(m.SetLock(inode, shared(owner, flock=True)), 1) is None
    assert rig.call(m.SetLock(inode, lock(A, flock=True)), 1) is not None
    assert rig.call(m.SetLock(inode, lock(B, flock=True)), 1) is None


# --- what ends them


def test_the_last_close_ends_the_locks_of_a_session(rig: Rig, inode: int) -> None:
    rig.call(m.OpenInode(inode), 1)
    rig.call(m.SetLock(inode, lock(A, 0, 9)), 1)
    rig.call(m.SetLock(inode, lock(A, 10, 19)), 2)
    rig.call(m.CloseInode(inode), 1)
    assert len(held(rig, inode)) == 2
    rig.call(m.CloseInode(inode), 1)
    assert held(rig, inode) == [(A, 10, 19, True)]


def test_locks_end_with_their_session(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A)), 1)
    rig.core.disconnected(1)
    rig.work(GRACE - 1)
    assert rig.call(m.SetLock(inode, lock(B)), 2) is not None
    rig.work(2)
    assert rig.call(m.SetLock(inode, lock(B)), 2) is None


def test_locks_outlive_a_connection(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A)), 1)
    rig.core.disconnected(1)
    rig.call(m.Attach(ONE, (inode,), 2), 3)
    rig.work(2 * GRACE)
    assert rig.call(m.SetLock(inode, lock(B)), 2) is not None
    rig.call(m.Unlock(inode, lock(A)), 3)
    assert rig.call(m.SetLock(inode, lock(B)), 2) is None


def test_a_late_copy_locks_nothing(rig: Rig, inode: int) -> None:
    """It lay in the queue of a connection that the session has left."""
    rig.call(m.Attach(ONE, (inode,), 2), 3)
    rig.call(m.SetLock(inode, lock(A)), 1)
    rig.call(m.SetLock(inode, lock(A, 0, 9)), 3)
    rig.call(m.Unlock(inode, lock(A)), 1)
    assert held(rig, inode) == [(A, 0, 9, True)]


def test_locks_outlive_the_server_if_their_session_does(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A, 0, 9)), 1)
    rig.call(m.SetLock(inode, lock(A, 10, 19)), 2)
    rig.restart()
    rig.call(m.Attach(TWO, (inode,), 2), 2)
    rig.work(GRACE - 1)
    assert len(held(rig, inode)) == 2
    rig.work(2)
    assert held(rig, inode) == [(A, 10, 19, True)]


def test_locks_go_with_the_file(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A)), 5)  # has no session of its own, and never opened it
    rig.call(m.Unlink(ROOT, b"f"))
    for connection in (1, 2):
        rig.call(m.CloseInode(inode), connection)
    assert held(rig, inode) == []


def test_a_missing_file_cannot_be_locked(rig: Rig) -> None:
    with pytest.raises(e.InodeStale):
        rig.call(m.SetLock(999, lock(A)), 1)


def test_a_file_has_a_bounded_number_of_locks(
    rig: Rig, inode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfs_metadata.locks.INODE_LOCKS_MAX", 3)
    for at in (0, 2, 4):
        rig.call(m.SetLock(inode, lock(A, at, at)), 1)
    with pytest.raises(e.TooManyLocks):
        rig.call(m.SetLock(inode, lock(A, 6, 6)), 1)
    rig.call(m.SetLock(inode, lock(A, 3, 3)), 1)  # closes a gap


# --- waiting


def test_who_waits_is_told_of_every_change_that_may_let_it_in(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A)), 1)
    rig.core.locks.take_changed()
    assert waits(rig, inode, shared(B), 2)
    for request in (
        m.SetLock(inode, shared(A, 0, 9)),  # no longer alone
        m.Unlock(inode, lock(A, 0, 0)),
        m.CloseInode(inode),
    ):
        rig.call(request, 1)
        assert rig.core.locks.take_changed() == {inode}
    assert not waits(rig, inode, shared(B), 2)


@pytest.mark.parametrize("others", [1, 2])
def test_a_circle_is_refused(rig: Rig, inode: int, others: int) -> None:
    """Each has its byte and waits for the next one's; the last one may not."""
    owners = [(1, A), (2, B), (1, C)][: others + 1]
    for at, (connection, owner) in enumerate(owners):
        assert rig.call(m.SetLock(inode, lock(owner, at, at)), connection) is None
    for at, (connection, owner) in enumerate(owners[:-1]):
        assert waits(rig, inode, lock(owner, at + 1, at + 1), connection)
    connection, owner = owners[-1]
    with pytest.raises(e.LockDeadlock):
        waits(rig, inode, lock(owner, 0, 0), connection)
    # Once one of the others gave up there is none.
    rig.call(m.StopAwaiting(A), 1)
    assert waits(rig, inode, lock(owner, 0, 0), connection)


def test_what_was_waited_for_once_makes_no_circle(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A, 0, 0)), 1)
    rig.call(m.SetLock(inode, lock(B, 1, 1)), 2)
    assert waits(rig, inode, lock(A, 1, 1), 1)
    rig.call(m.Unlock(inode, lock(B, 1, 1)), 2)
    assert waits(rig, inode, lock(B, 0, 0), 2)  # A does not wait for B any more


def test_a_waiter_that_locks_does_not_wait(rig: Rig, inode: int) -> None:
    rig.call(m.SetLock(inode, lock(A, 0, 0)), 1)
    rig.call(m.SetLock(inode, lock(B, 1, 1)), 2)
    assert waits(rig, inode, lock(A, 1, 1), 1)
    rig.call(m.SetLock(inode, lock(A, 2, 2)), 1)
    assert waits(rig, inode, lock(B, 0, 0), 2)


def test_whole_files_are_waited_for_in_circles(rig: Rig, inode: int) -> None:
    """flock(2) knows no EDEADLK."""
    other = rig.make(ROOT, b"g").inode
    rig.call(m.SetLock(inode, lock(A, flock=True)), 1)
    rig.call(m.SetLock(other, lock(B, flock=True)), 2)
    assert waits(rig, other, lock(A, flock=True), 1)
    assert waits(rig, inode, lock(B, flock=True), 2)
