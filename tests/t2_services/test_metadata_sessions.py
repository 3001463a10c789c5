"""Files that are open while they are unlinked, clients that come and go."""

from __future__ import annotations

import pytest

from kvfs_base import errors as e
from kvfs_metadata import limits, records
from kvfs_metadata import messages as m
from t2_services.metadata_rig import FILE, ROOT, Rig

ONE, TWO = b"session-one-....", b"session-two-...."
GRACE = limits.SESSION_GRACE_SECONDS


@pytest.fixture
def rig() -> Rig:
    return Rig()


def attach(rig: Rig, connection: int, session: bytes, *opens: int) -> None:
    rig.call(m.Attach(session, opens), connection)


def make_unlinked(rig: Rig, connection: int) -> int:
    """A file that ``connection`` has open and that has no name any more."""
    inode = rig.make(ROOT, b"f").inode
    rig.call(m.SetAttr(inode, size=100))
    rig.call(m.SetXattr(inode, b"user.a", b"1"))
    rig.call(m.OpenInode(inode), connection)
    assert rig.call(m.Unlink(ROOT, b"f")).nlink == 0
    return inode


def is_gone(rig: Rig, inode: int) -> bool:
    """Whether its data is to be removed; if so nothing else may be left of it."""
    queued = inode in [i for _, i in rig.removals()]
    try:
        attr = rig.attr(inode)
    except e.InodeStale:
        assert queued
        assert rig.dump(records.orphan_key(inode)) == {}
        assert rig.dump(records.xattr_key(inode, b"")) == {}
        assert rig.call(m.StatFs()).used_bytes == 0
        return True
    assert not queued and attr.nlink == 0
    return False


def test_an_open_file_outlives_its_name(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    assert not is_gone(rig, inode)
    assert rig.call(m.SetAttr(inode, grow_to=200)).size == 200
    assert rig.call(m.OpenInode(inode), 1).nlink == 0  # through /proc/self/fd
    rig.call(m.CloseInode(inode), 1)
    assert not is_gone(rig, inode)
    with pytest.raises(e.EntryNotFound):
        rig.call(m.Link(inode, ROOT, b"back"))
    rig.call(m.CloseInode(inode), 1)
    assert is_gone(rig, inode)


def test_a_file_that_is_opened_as_it_is_made(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = rig.call(m.Make(ROOT, b"f", 0o100644, open=True), 1).inode
    with pytest.raises(e.EntryExists):
        rig.call(m.Make(ROOT, b"f", 0o100644, open=True), 1)  # counts nothing
    assert rig.call(m.Unlink(ROOT, b"f")).nlink == 0
    assert not is_gone(rig, inode)
    rig.call(m.CloseInode(inode), 1)
    assert is_gone(rig, inode)


def test_a_file_with_a_name_stays_when_it_is_closed(rig: Rig) -> None:
    inode = rig.make(ROOT, b"f").inode
    rig.call(m.OpenInode(inode))
    rig.call(m.CloseInode(inode))
    rig.call(m.CloseInode(inode))  # a repeated close
    assert rig.attr(inode).nlink == 1
    rig.call(m.Unlink(ROOT, b"f"))
    assert is_gone(rig, inode)


def test_each_session_counts_for_itself(rig: Rig) -> None:
    attach(rig, 1, ONE)
    attach(rig, 2, TWO)
    inode = make_unlinked(rig, 1)
    rig.call(m.OpenInode(inode), 2)
    rig.call(m.CloseInode(inode), 1)
    rig.call(m.CloseInode(inode), 1)
    assert not is_gone(rig, inode)
    rig.call(m.CloseInode(inode), 2)
    assert is_gone(rig, inode)


def test_replacing_an_open_file_by_rename(rig: Rig) -> None:
    inode = rig.make(ROOT, b"old").inode
    rig.call(m.OpenInode(inode))
    rig.make(ROOT, b"new")
    rig.call(m.Rename(ROOT, b"new", ROOT, b"old"))
    assert not is_gone(rig, inode)
    rig.call(m.CloseInode(inode))
    assert is_gone(rig, inode)


def test_a_lost_connection_keeps_its_files_for_a_while(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    rig.core.disconnected(1)
    rig.work(GRACE - 0.01)
    assert not is_gone(rig, inode)
    rig.work(0.02)
    assert is_gone(rig, inode)
    assert rig.statistics()["sessions"] == 0


def test_a_service_that_stood_still_cannot_tell_who_was_silent(rig: Rig) -> None:
    """What its clients said meanwhile it has not read yet."""
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    rig.clock.advance(2 * GRACE)
    rig.core.stood_still(2 * GRACE)
    rig.work(silent=True)
    assert not is_gone(rig, inode)
    rig.work(GRACE - 0.01, silent=True)
    assert not is_gone(rig, inode)
    rig.work(0.02, silent=True)
    assert is_gone(rig, inode)


def test_a_connection_that_never_attached(rig: Rig) -> None:
    inode = make_unlinked(rig, 7)
    rig.core.disconnected(7)
    rig.work(GRACE + 0.01)
    assert is_gone(rig, inode)


def test_coming_back(rig: Rig) -> None:
    attach(rig, 1, ONE)
    kept = make_unlinked(rig, 1)
    rig.core.disconnected(1)
    rig.work(GRACE - 1)
    attach(rig, 2, ONE, kept)
    rig.work(GRACE + 1)
    assert not is_gone(rig, kept)
    rig.call(m.CloseInode(kept), 2)
    assert is_gone(rig, kept)


def test_the_new_connection_may_come_before_the_old_ones_end(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    attach(rig, 2, ONE, inode)
    rig.core.disconnected(1)
    rig.work(GRACE + 1)
    assert not is_gone(rig, inode)


def test_what_is_not_named_after_a_reconnect_is_closed(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    rig.core.disconnected(1)
    attach(rig, 2, ONE)
    # An answer that said it is open may be lost: whoever asks for it again finds the file.
    rig.work(GRACE - 1)
    assert not is_gone(rig, inode)
    rig.work(1)
    assert is_gone(rig, inode)


def test_a_file_that_is_open_twice_is_named_twice(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    rig.core.disconnected(1)
    attach(rig, 2, ONE, inode, inode)
    rig.call(m.CloseInode(inode), 2)
    assert not is_gone(rig, inode)
    rig.call(m.CloseInode(inode), 2)
    assert is_gone(rig, inode)


def test_a_restart_forgets_nobody_who_comes_back(rig: Rig) -> None:
    attach(rig, 1, ONE)
    kept = make_unlinked(rig, 1)
    dropped = make_unlinked(rig, 1)
    rig.restart()
    rig.work(1)
    attach(rig, 1, ONE, kept)
    assert not is_gone(rig, kept) and not is_gone(rig, dropped)
    rig.work(GRACE)
    assert rig.attr(kept).nlink == 0
    with pytest.raises(e.InodeStale):
        rig.attr(dropped)
    rig.call(m.CloseInode(kept), 1)
    assert is_gone(rig, kept)


def test_an_unlink_soon_after_a_restart_waits_for_those_who_come_back(rig: Rig) -> None:
    inode = rig.make(ROOT, b"f").inode
    rig.restart()
    rig.call(m.Unlink(ROOT, b"f"))
    assert not is_gone(rig, inode)
    rig.work(GRACE + 0.01)
    assert is_gone(rig, inode)


def test_a_service_that_stands_still_after_a_restart_waits_for_longer(rig: Rig) -> None:
    inode = make_unlinked(rig, 1)
    rig.restart()
    rig.clock.advance(2 * GRACE)
    rig.core.stood_still(2 * GRACE)
    rig.work()
    assert not is_gone(rig, inode)
    rig.work(GRACE + 0.01)
    assert is_gone(rig, inode)


def test_many_orphans_are_collected_page_by_page(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.core.COLLECT_BATCH", 3)
    rig.restart()
    inodes = []
    for n in range(8):
        inodes.append(rig.make(ROOT, b"%d" % n).inode)
        rig.call(m.Unlink(ROOT, b"%d" % n))
    attach(rig, 1, ONE, *inodes[:4])  # a page of files that are still open stops nothing
    rig.work(GRACE + 0.01)
    left = [records.number_at(k) for k in rig.dump(records.ORPHAN)]
    assert left == inodes[:4]


def test_a_failed_commit_leaves_opens_as_they_were(rig: Rig) -> None:
    def fail(writes: dict[bytes, bytes | None]) -> None:
        if writes:
            raise e.DiskFull(path="x")

    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    rig.engine.before_commit = fail
    with pytest.raises(e.DiskFull):
        rig.call(m.CloseInode(inode), 1)
    with pytest.raises(e.DiskFull):
        rig.calls([m.OpenInode(inode), m.SetAttr(inode, size=1)], 1)
    with pytest.raises(e.DiskFull):
        rig.calls([m.Attach(ONE), m.SetAttr(inode, size=1)], 2)
    rig.engine.before_commit = lambda writes: None
    assert not is_gone(rig, inode)
    rig.call(m.CloseInode(inode), 1)
    assert is_gone(rig, inode)


def test_bounds(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.sessions.OPEN_INODES_MAX", 2)
    monkeypatch.setattr("kvfs_metadata.sessions.SESSIONS_MAX", 2)
    inodes = [rig.make(ROOT, b"%d" % n).inode for n in range(3)]
    for inode in inodes[:2]:
        rig.call(m.OpenInode(inode), 1)
    with pytest.raises(e.LimitExceeded):
        rig.call(m.OpenInode(inodes[2]), 1)
    attach(rig, 2, ONE)
    with pytest.raises(e.ServerBusy):
        attach(rig, 3, TWO)
    rig.core.disconnected(1)
    rig.work(GRACE + 1)
    attach(rig, 3, TWO)


def test_a_connection_that_changes_its_session(rig: Rig) -> None:
    attach(rig, 1, ONE)
    inode = make_unlinked(rig, 1)
    attach(rig, 1, TWO)
    rig.work(GRACE + 0.01)
    assert is_gone(rig, inode)
    assert rig.statistics()["sessions"] == 1


def test_a_file_can_be_opened_as_it_is_made(rig: Rig) -> None:
    attach(rig, 1, ONE)
    made = rig.call(m.Make(ROOT, b"f", FILE, open=True), 1)
    again = rig.call(m.Make(ROOT, b"f", FILE, exclusive=False, open=True), 1)
    assert again.inode == made.inode
    rig.call(m.Unlink(ROOT, b"f"))
    rig.call(m.CloseInode(made.inode), 1)
    assert rig.attr(made.inode).nlink == 0
    rig.call(m.CloseInode(made.inode), 1)
    assert is_gone(rig, made.inode)
