"""Who may write to a file, and whether what lies behind its end may be cut."""

from __future__ import annotations

import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.types import Layout
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from t2_services.metadata_rig import FILE, ROOT, Rig
from t2_services.test_metadata_shared import Servers

ONE, TWO, THREE = b"session-one-....", b"session-two-....", b"session-three..."
GRACE = metadata_limits.SESSION_GRACE_SECONDS
MAY_CUT, OTHERS, OPEN = m.Tail(100, True), m.Tail(100), m.Tail(100, False, True)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    for connection, session in ((1, ONE), (2, TWO), (3, THREE)):
        rig.call(m.Attach(session), connection)
    return rig


def make(rig: Rig, connection: int = 1) -> int:
    """A file of 100 bytes that the connection has made, and so writes to."""
    inode: int = rig.call(m.Make(ROOT, b"f", FILE, open=True), connection).inode
    rig.call(m.SetAttr(inode, size=100))
    return inode


def ask(rig: Rig, inode: int, connection: int) -> m.Tail:
    tail: m.Tail = rig.call(m.BeginCut(inode), connection)
    return tail


def recorded(rig: Rig) -> dict[bytes, bytes]:
    return {key[4:]: value for key, value in rig.dump(records.WRITER).items()}


def test_whoever_writes_alone_may_cut(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.OpenInode(inode), 2)  # a reader does not matter
    assert ask(rig, inode, 1) == ask(rig, inode, 1) == MAY_CUT
    assert ask(rig, inode, 2) == OTHERS


def test_nobody_cuts_while_another_one_writes(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.OpenInode(inode, writes=True), 2)
    assert ask(rig, inode, 1) == ask(rig, inode, 2) == OTHERS
    rig.call(m.CloseInode(inode), 1)
    assert ask(rig, inode, 2) == MAY_CUT


def test_nobody_begins_to_write_while_another_one_cuts(rig: Rig) -> None:
    inode = make(rig)
    assert ask(rig, inode, 1) == MAY_CUT
    with pytest.raises(e.TailBusy):
        rig.call(m.OpenInode(inode, writes=True), 2)
    with pytest.raises(e.TailBusy):
        rig.call(m.Make(ROOT, b"f", FILE, exclusive=False, open=True), 2)
    rig.call(m.OpenInode(inode), 2)
    rig.call(m.OpenInode(inode, writes=True), 1)  # its own opens
    rig.call(m.EndCut(inode), 2)  # not his
    with pytest.raises(e.TailBusy):
        rig.call(m.OpenInode(inode, writes=True), 2)
    rig.call(m.EndCut(inode), 1)
    rig.call(m.OpenInode(inode, writes=True), 2)
    assert ask(rig, inode, 1) == OTHERS


@pytest.mark.parametrize("how", ["closed", "over", "not named"])
def test_a_cut_ends_with_the_file_and_with_the_session(rig: Rig, how: str) -> None:
    inode = make(rig)
    assert ask(rig, inode, 1) == MAY_CUT
    if how == "closed":
        rig.call(m.CloseInode(inode), 1)
    elif how == "over":
        rig.core.disconnected(1)
        rig.work(GRACE - 1)
        with pytest.raises(e.TailBusy):
            rig.call(m.OpenInode(inode, writes=True), 2)
        rig.work(1.01)
    else:
        rig.call(m.Attach(ONE, (), 1), 4)
    rig.call(m.OpenInode(inode, writes=True), 2)
    assert ask(rig, inode, 2) == MAY_CUT


def test_a_session_that_is_not_heard_of_may_come_back(rig: Rig) -> None:
    inode = make(rig)
    rig.core.disconnected(1)
    rig.call(m.OpenInode(inode, writes=True), 2)
    assert ask(rig, inode, 2) == OPEN
    rig.work(GRACE - 1)
    assert ask(rig, inode, 2) == OPEN
    rig.call(m.Attach(ONE, (inode,), 1, "", (inode,)), 4)
    assert ask(rig, inode, 2) == OTHERS
    rig.core.disconnected(4)
    rig.call(m.OpenInode(inode, writes=True), 3)
    assert ask(rig, inode, 2) == OTHERS  # the third one lives
    rig.call(m.CloseInode(inode), 3)
    rig.work(GRACE + 0.01)
    assert ask(rig, inode, 2) == MAY_CUT


def test_a_host_that_lost_its_power_closes_no_connection(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.OpenInode(inode, writes=True), 2)
    rig.work(metadata_limits.SESSION_SILENT_SECONDS - 1, silent=True)
    rig.core.sessions.heard(2)
    assert ask(rig, inode, 2) == OTHERS
    rig.work(1, silent=True)
    assert ask(rig, inode, 2) == OPEN


def test_who_has_gone_on_to_another_connection_is_told_nothing(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.Attach(ONE, (inode,), 1, "", (inode,)), 4)
    assert ask(rig, inode, 1) == OTHERS
    assert ask(rig, inode, 4) == MAY_CUT
    rig.call(m.EndCut(inode), 1)
    with pytest.raises(e.TailBusy):
        rig.call(m.OpenInode(inode, writes=True), 2)


def test_only_files_that_are_open_are_written_to(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.CloseInode(inode), 1)
    rig.call(m.Attach(ONE, (), 1, "", (inode,)), 4)
    rig.call(m.OpenInode(inode, writes=True), 2)
    assert ask(rig, inode, 2) == MAY_CUT


def test_what_is_recorded_is_gone_with_the_last_file(rig: Rig) -> None:
    first, second = (rig.call(m.Make(ROOT, n, FILE, open=True), 1).inode for n in (b"1", b"2"))
    assert recorded(rig) == {ONE: b""}
    ask(rig, first, 1)
    assert recorded(rig) == {ONE: records.u64(first)}
    rig.call(m.EndCut(first), 1)
    rig.call(m.CloseInode(first, (second,)), 1)
    assert recorded(rig) == {}
    rig.call(m.OpenInode(first), 1)
    assert recorded(rig) == {}


def test_after_a_restart_those_who_wrote_are_waited_for(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.Make(ROOT, b"another", FILE, open=True), 2)
    rig.restart()
    rig.call(m.Attach(THREE, (), 1), 3)
    rig.call(m.OpenInode(inode, writes=True), 3)
    assert ask(rig, inode, 3) == OPEN
    rig.call(m.Attach(TWO, (), 1), 2)
    assert ask(rig, inode, 3) == OPEN
    rig.call(m.Attach(ONE, (inode,), 1, "", (inode,)), 1)
    assert ask(rig, inode, 3) == OTHERS
    assert recorded(rig) == {ONE: b"", THREE: b""}
    rig.call(m.CloseInode(inode), 1)
    assert ask(rig, inode, 3) == MAY_CUT


def test_after_a_restart_those_who_do_not_come_back_are_given_up(rig: Rig) -> None:
    inode = make(rig)
    rig.restart()
    rig.call(m.Attach(THREE, (), 1), 3)
    rig.call(m.OpenInode(inode, writes=True), 3)
    rig.work(GRACE - 1)
    assert ask(rig, inode, 3) == OPEN
    rig.work(1.01)
    assert ask(rig, inode, 3) == MAY_CUT
    assert recorded(rig) == {THREE: records.u64(inode)}


def test_a_cut_outlives_a_restart(rig: Rig) -> None:
    inode = make(rig)
    assert ask(rig, inode, 1) == MAY_CUT
    rig.restart()
    with pytest.raises(e.TailBusy):
        rig.call(m.OpenInode(inode, writes=True), 2)
    rig.call(m.Attach(ONE, (inode,), 1, "", (inode,)), 1)
    with pytest.raises(e.TailBusy):
        rig.call(m.OpenInode(inode, writes=True), 2)
    rig.call(m.EndCut(inode), 1)
    rig.call(m.OpenInode(inode, writes=True), 2)


def test_a_failed_commit_leaves_writers_as_they_were(rig: Rig) -> None:
    def fail(writes: dict[bytes, bytes | None]) -> None:
        if writes:
            raise e.DiskFull(path="x")

    inode = make(rig)
    other = rig.call(m.Make(ROOT, b"other", FILE), 1).inode
    rig.call(m.OpenInode(inode), 2)
    rig.engine.before_commit = fail
    for request, connection in (
        (m.OpenInode(inode, writes=True), 2),
        (m.OpenInode(other, writes=True), 1),
        (m.BeginCut(inode), 1),
        (m.Attach(ONE, (inode,), 1), 4),
        (m.CloseInode(inode), 1),
    ):
        with pytest.raises(e.DiskFull):
            rig.calls([request, m.SetAttr(other, size=1)], connection)
    rig.engine.before_commit = lambda writes: None
    rig.call(m.OpenInode(inode, writes=True), 3)
    assert ask(rig, inode, 3) == OTHERS
    rig.call(m.CloseInode(inode), 1)
    assert ask(rig, inode, 3) == MAY_CUT
    assert recorded(rig).keys() == {THREE}


def test_many_servers_know_each_others_writers() -> None:
    servers = Servers()
    a, b = servers.rigs
    a.call(m.Attach(ONE, (), 1), 1)
    b.call(m.Attach(TWO, (), 1), 2)
    inode = make(a)
    b.call(m.OpenInode(inode), 2)
    assert a.dump(records.OPEN) == {
        records.open_key(inode, ONE): records.OPEN_WRITES,
        records.open_key(inode, TWO): b"",
    }
    assert ask(a, inode, 1) == MAY_CUT
    with pytest.raises(e.TailBusy):
        b.call(m.OpenInode(inode, writes=True), 2)
    a.call(m.EndCut(inode), 1)
    b.call(m.OpenInode(inode, writes=True), 2)
    assert ask(a, inode, 1) == ask(b, inode, 2) == OTHERS
    a.call(m.CloseInode(inode), 1)
    assert ask(b, inode, 2) == MAY_CUT
    assert a.dump(records.OPEN) == {records.open_key(inode, TWO): records.OPEN_CUTS}
    assert b.dump(records.WRITER) == {}


def test_a_server_that_loads_everything_anew_knows_who_cuts() -> None:
    servers = Servers()
    a, b = servers.rigs
    a.call(m.Attach(ONE, (), 1), 1)
    inode = make(a)
    ask(a, inode, 1)
    b.restart()
    with pytest.raises(e.TailBusy):
        b.call(m.OpenInode(inode, writes=True), 2)
    for _ in range(5):
        servers.live(GRACE / 2, [b])  # the server that has the session dies
    b.call(m.OpenInode(inode, writes=True), 2)
    assert ask(b, inode, 2) == MAY_CUT


# --- wide chunks


def test_who_writes_alone_may_widen_the_chunks(rig: Rig) -> None:
    inode = make(rig)
    before = rig.call(m.GetAttr(inode)).layout
    with pytest.raises(e.InvalidRequest):  # it does not write
        rig.call(m.WidenChunks(inode), 2)
    rig.call(m.OpenInode(inode), 2)  # a reader does not matter
    widened = rig.call(m.WidenChunks(inode), 1)
    assert widened.layout == Layout(metadata_limits.FILE_WIDE_CHUNK_BYTES, before.chains)
    assert rig.call(m.GetAttr(inode)) == widened
    assert rig.call(m.WidenChunks(inode), 1) == widened


def test_chunks_are_not_widened_while_others_may_write(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.OpenInode(inode, writes=True), 2)
    with pytest.raises(e.InvalidRequest):
        rig.call(m.WidenChunks(inode), 1)
    rig.call(m.CloseInode(inode), 2)
    rig.call(m.WidenChunks(inode), 1)


def test_chunks_are_not_widened_where_there_have_been_several(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.SetAttr(inode, size=limits.FILE_CHUNK_BYTES + 1))
    rig.call(m.SetAttr(inode, size=10))
    with pytest.raises(e.InvalidRequest):
        rig.call(m.WidenChunks(inode), 1)


def test_chunks_are_not_widened_before_all_who_wrote_are_back(rig: Rig) -> None:
    inode = make(rig)
    rig.call(m.OpenInode(inode, writes=True), 2)
    rig.restart()
    rig.call(m.Attach(ONE, (inode,), 1, "", (inode,)), 1)
    with pytest.raises(e.InvalidRequest):
        rig.call(m.WidenChunks(inode), 1)
    rig.work(GRACE + 0.01)
    rig.call(m.WidenChunks(inode), 1)
