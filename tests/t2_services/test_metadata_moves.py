"""What has one copy on a draining target: the state machine of docs/design/0006-moves.md.

``Disks`` plays the chunk servers: which chunks lie where, and what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import EndMoves, FindUnwanted, Move, Moves, TakeMoves
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.cluster.admin_messages import DescribeCluster, RemoveTarget, SetDraining
from t2_services.metadata_rig import FILE, ROOT, Rig, keys
from t2_services.test_metadata_shared import Servers

CHUNK = limits.FILE_CHUNK_BYTES


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=3)


def uuid(target_id: int) -> str:
    return f"target-{target_id}"


def drain(rig: Rig, *targets: int, keep_blocks: bool = False) -> None:
    rig.call(SetDraining(targets, True, keep_blocks))
    look(rig)


def look(rig: Rig) -> None:
    """One pass of the background's."""
    while rig.core.update([rig.core.drain])[0]:
        pass


def take(rig: Rig, target_id: int = 2) -> Moves:
    return rig.call(TakeMoves(target_id))


def end(rig: Rig, taken: Moves, target_id: int = 2, **outcomes: Any) -> tuple[int, ...]:
    if not outcomes:
        outcomes = {"done": tuple(move.inode for move in taken.moves)}
    return rig.call(EndMoves(target_id, taken.ticket, **outcomes))


def acknowledge(rig: Rig, target_id: int) -> list[int]:
    """The target does what it is asked to; the inodes of it."""
    done: list[int] = []
    while orders := rig.removals(uuid(target_id)):
        done += [inode for _, inode in orders]
        rig.removals(uuid(target_id), removed_seq=orders[-1][0])
    return done


def make_file(rig: Rig, name: bytes, chunks: int) -> int:
    inode = rig.make(ROOT, name).inode
    rig.call(m.SetAttr(inode, size=chunks * CHUNK))
    return inode


def chains(rig: Rig, inode: int) -> tuple[int, ...]:
    layout = rig.attr(inode).layout
    assert layout is not None
    return layout.chains


def is_drained(rig: Rig, target_id: int = 2) -> bool:
    look(rig)
    return next(t for t in rig.call(DescribeCluster()).targets if t.target_id == target_id).drained


def moving(rig: Rig) -> int:
    return len(rig.dump(records.MOVE))


def put(rig: Rig, count: int = 9, size: int = 1000) -> int:
    """A namespace with a third of its blocks on target 2."""
    namespace = rig.namespace()
    rig.put(namespace, range(count), size)
    return namespace


# --- blocks


def test_blocks_move_and_are_found_where_they_are_then(rig: Rig) -> None:
    namespace = put(rig)
    before = rig.call(m.LookupBlocks(namespace, keys(range(9))))
    on_2 = {info.inode for info in before if info and info.chain == 2}
    assert take(rig).moves == (), "nobody drains it"
    drain(rig, 2)
    taken = take(rig)
    assert {move.inode for move in taken.moves} == on_2
    assert all(move.is_block and move.size == 1000 for move in taken.moves)
    assert {move.target_id for move in taken.moves} <= {1, 3}
    assert set(end(rig, taken)) == on_2
    assert rig.match(namespace, range(9)) == 9
    after = rig.call(m.LookupBlocks(namespace, keys(range(9))))
    to = {move.inode: move.to for move in taken.moves}
    assert [(i.inode, i.size, i.crc32c) for i in after] == [
        (i.inode, i.size, i.crc32c) for i in before
    ]
    assert [i.chain for i in after] == [to.get(i.inode, i.chain) for i in before]
    assert set(acknowledge(rig, 2)) == on_2
    assert (moving(rig), is_drained(rig)) == (0, True)
    assert rig.statistics()["moved_blocks"] == 3
    assert rig.statistics()["moved_bytes"] == 3000
    assert rig.statistics()["drained_blocks"] == 0
    rig.restart()
    assert rig.call(m.LookupBlocks(namespace, keys(range(9)))) == after
    rig.call(RemoveTarget((2,)))


def test_the_most_recently_used_move_first_and_only_where_there_is_room() -> None:
    rig = Rig(targets=2)
    namespace = put(rig, 40, size=10)
    on_1 = [n for n in range(40) if _chain(rig, namespace, n) == 1]
    used = on_1[5:10]
    rig.clock.advance(1)
    rig.match(namespace, used[:1])
    rig.call(m.LookupBlocks(namespace, keys(used)))
    rig.heartbeat(uuid(2), capacity=1000, free=20 + 5 * 10 + 5)
    drain(rig, 1)
    taken = take(rig, 1)
    inodes = {i.inode for i in rig.call(m.LookupBlocks(namespace, keys(used)))}
    assert {move.inode for move in taken.moves} == inodes
    rig.heartbeat(uuid(2), capacity=1000, free=10)
    assert len(end(rig, taken, 1)) == 5, "what is there already is there"
    assert take(rig, 1).moves == (), "full"
    assert len(rig.stored(namespace, range(40))) == 40
    assert not is_drained(rig, 1)


def _chain(rig: Rig, namespace: int, name: int) -> int:
    (info,) = rig.call(m.LookupBlocks(namespace, keys([name])))
    chain: int = info.chain
    return chain


def test_without_another_target_blocks_are_given_up(rig: Rig) -> None:
    put(rig)
    drain(rig, 1, 2, 3)
    assert (rig.statistics()["blocks"], rig.statistics()["drained_blocks"]) == (0, 9)
    assert take(rig).moves == ()


def test_kept_blocks_do_not_move(rig: Rig) -> None:
    put(rig)
    inode = make_file(rig, b"f", 3)
    drain(rig, 2, keep_blocks=True)
    assert [move.inode for move in take(rig).moves] == [inode]


def test_a_block_that_goes_takes_its_move_along(rig: Rig) -> None:
    namespace = put(rig)
    drain(rig, 2)
    taken = take(rig)
    rig.call(m.RemoveBlocks(namespace, keys(range(9))))
    assert end(rig, taken) == ()
    assert moving(rig) == 0
    gone = {move.inode for move in taken.moves}
    assert gone <= set(acknowledge(rig, 1)) | set(acknowledge(rig, 3)), "the copies, too"
    assert is_drained(rig)


def test_a_reader_of_the_old_chain_does_not_remove_what_has_moved(rig: Rig) -> None:
    namespace = put(rig, 3)
    drain(rig, 2)
    (move,) = take(rig).moves
    end(rig, take(rig))
    name = next(n for n in range(3) if _chain(rig, namespace, n) == move.to)
    infos = rig.call(m.LookupBlocks(namespace, keys(range(3))))
    name = next(n for n, info in enumerate(infos) if info.inode == move.inode)
    assert rig.call(m.RemoveBlocks(namespace, keys([name]), (move.inode,), (2,))) == 0
    assert rig.match(namespace, range(3)) == 3
    assert rig.call(m.RemoveBlocks(namespace, keys([name]), (move.inode,), (move.to,))) == 1
    with pytest.raises(e.InvalidRequest):
        rig.call(m.RemoveBlocks(namespace, keys([name]), (), (1, 2)))


def test_what_is_damaged_or_cannot_be_brought_away(rig: Rig) -> None:
    namespace = put(rig)
    drain(rig, 2)
    taken = take(rig)
    lost, failed, done = (move.inode for move in taken.moves)
    assert end(rig, taken, done=(done,), failed=(failed,), lost=(lost,)) == (done,)
    assert rig.statistics()["blocks"] == 8
    # What was copied to the other target has to be gone before it is tried again.
    again = take(rig)
    assert failed not in {move.inode for move in again.moves} or again.moves[0].to != 0
    for target_id in (1, 3):
        acknowledge(rig, target_id)
    assert [move.inode for move in take(rig).moves] == [failed]
    assert end(rig, take(rig)) == (failed,)
    assert is_drained(rig)
    assert len(rig.stored(namespace, range(9))) == 8


# --- files


def test_a_file_moves_with_the_places_it_has_there(rig: Rig) -> None:
    inode = make_file(rig, b"f", 5)
    before = chains(rig, inode)
    ctime_ns = rig.attr(inode).ctime_ns
    drain(rig, 2)
    taken = take(rig)
    (move,) = taken.moves
    place = before.index(2)
    assert (move.inode, move.width, move.places) == (inode, 3, (place,))
    assert move.end >= 5
    assert end(rig, taken) == (inode,)
    expected = tuple(move.to if chain == 2 else chain for chain in before)
    assert chains(rig, inode) == expected
    assert rig.attr(inode).ctime_ns == ctime_ns
    (order,) = rig.heartbeat(uuid(2)).targets[0].removals
    assert (order.inode, order.first) == (inode, 0)
    assert order.end >= 5
    assert is_drained(rig)
    assert rig.statistics()["moved_files"] == 1
    rig.restart()
    assert chains(rig, inode) == expected
    assert end(rig, taken) == (), "once"


def test_a_file_that_is_open_waits(rig: Rig) -> None:
    inode = make_file(rig, b"f", 3)
    rig.call(m.OpenInode(inode))
    drain(rig, 2)
    assert take(rig).moves == ()
    assert not is_drained(rig)
    rig.call(m.CloseInode(inode))
    look(rig)
    assert [move.inode for move in take(rig).moves] == [inode]


def test_who_counts_a_file_as_open_is_asked_for_it(rig: Rig) -> None:
    """A mount may only keep it for the next open, and lets go of what is written."""
    inode = make_file(rig, b"f", 3)
    rig.call(m.OpenInode(inode))
    drain(rig, 2)
    written: set[bytes] = set()
    rig.engine.before_commit = written.update
    take(rig)
    assert records.inode_key(inode) in written


@pytest.mark.parametrize("closed", [False, True])
def test_an_open_during_the_copy_spoils_the_ticket(rig: Rig, closed: bool) -> None:
    inode = make_file(rig, b"f", 3)
    old = chains(rig, inode)
    drain(rig, 2)
    taken = take(rig)
    assert rig.call(m.OpenInode(inode)).layout.chains == old
    if closed:
        rig.call(m.CloseInode(inode))
    assert end(rig, taken) == ()
    assert chains(rig, inode) == old
    assert moving(rig) == 1, "what was copied stays"
    if not closed:
        assert take(rig).moves == ()
        rig.call(m.CloseInode(inode))
    again = take(rig)
    assert again.moves == taken.moves
    assert again.ticket > taken.ticket
    assert end(rig, taken) == (), "a mover that is dead"
    assert end(rig, again) == (inode,)


@pytest.mark.parametrize("way", ["make", "attach", "once"])
def test_every_way_to_open_spoils_the_ticket(rig: Rig, way: str) -> None:
    inode = make_file(rig, b"f", 3)
    drain(rig, 2)
    taken = take(rig)
    make = m.Make(ROOT, b"f", FILE, exclusive=False, open=True)
    request = {
        "make": make,
        "once": m.Once(bytes(16), 0, 1, make),
        "attach": m.Attach(bytes(16), (inode,), 1),
    }[way]
    rig.call(request, connection=7)
    if way == "attach":
        rig.call(m.Attach(bytes(16), (), 2), connection=7)
        rig.advance(2 * metadata_limits.SESSION_GRACE_SECONDS)
        rig.work()
    else:
        rig.call(m.CloseInode(inode), connection=7)
    assert end(rig, taken) == ()


def test_after_a_restart_files_may_be_open(rig: Rig) -> None:
    inode = make_file(rig, b"f", 3)
    drain(rig, 2)
    taken = take(rig)
    rig.restart()
    assert end(rig, taken) == ()
    assert take(rig).moves == ()
    rig.advance(metadata_limits.SESSION_GRACE_SECONDS + 1)
    assert end(rig, take(rig)) == (inode,)


def test_a_file_that_goes_takes_its_move_along(rig: Rig) -> None:
    inode = make_file(rig, b"f", 1)
    target_id = chains(rig, inode)[0]
    drain(rig, target_id)
    taken = take(rig, target_id)
    (move,) = taken.moves
    rig.call(m.Unlink(ROOT, b"f"))
    assert end(rig, taken, target_id) == ()
    assert moving(rig) == 0
    assert inode in acknowledge(rig, move.target_id)
    assert is_drained(rig, target_id)


def test_a_file_moves_beside_its_other_chunks_where_there_is_no_other_target() -> None:
    rig = Rig(targets=2)
    inode = make_file(rig, b"f", 4)
    old = chains(rig, inode)
    drain(rig, 2)
    (move,) = take(rig).moves
    rig.call(SetDraining((2,), False))
    orders = rig.heartbeat(uuid(1)).targets[0].removals
    numbers = {order.first for order in orders}
    assert all(order.inode == inode and order.end == order.first + 1 for order in orders)
    assert numbers == {n for n in range(move.end) if old[n % 2] == 2}, "not those that it has there"
    assert chains(rig, inode) == old


def test_the_end_of_a_files_move_is_on_stable_storage_before_anybody_hears_of_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(rig, 3)
    inode = make_file(rig, b"f", 3)
    drain(rig, 2)
    taken = take(rig)
    syncs: list[bool] = []
    monkeypatch.setattr(rig.engine, "sync", lambda: syncs.append(True))
    blocks = tuple(move.inode for move in taken.moves if move.is_block)
    end(rig, taken, done=blocks)
    assert syncs == []
    end(rig, taken, done=(inode,))
    assert syncs == [True]


# --- what comes late


def test_a_move_waits_for_the_removals_that_were_queued_before_it(rig: Rig) -> None:
    """One of them may be of the same chunk: it was there before."""
    inode = make_file(rig, b"f", 1)
    first = chains(rig, inode)[0]
    others = {1, 2, 3} - {first}
    drain(rig, first)
    (move,) = take(rig, first).moves
    end(rig, take(rig, first), first)
    rig.call(SetDraining((first,), False))
    rig.call(SetDraining((*others,), True))  # there is only one way
    look(rig)
    assert take(rig, move.target_id).moves == ()
    assert moving(rig) == 1
    rig.heartbeat(uuid(first))
    assert take(rig, move.target_id).moves == ()
    assert inode in acknowledge(rig, first)
    (back,) = take(rig, move.target_id).moves
    assert back.target_id == first


def test_a_target_that_has_yet_to_remove_a_file_gets_no_place_of_it(rig: Rig) -> None:
    inode = make_file(rig, b"f", 0)
    drain(rig, 2)
    assert 2 not in chains(rig, inode)
    rig.call(SetDraining((2,), False))
    drain(rig, 1)
    assert 1 in chains(rig, inode)
    assert acknowledge(rig, 2) == [inode]
    look(rig)
    assert set(chains(rig, inode)) == {2, 3}


def test_a_file_that_is_cut_while_it_moves_still_moves(rig: Rig) -> None:
    """Its places that have no chunks any more could have any other chain; but the chain that it was
    moving to has copies of what was cut off, which only the move compares."""
    inode = make_file(rig, b"f", 6)
    before = chains(rig, inode)
    drain(rig, 2)
    (move,) = take(rig).moves
    rig.call(m.SetAttr(inode, size=0))
    look(rig)
    assert chains(rig, inode) == before
    taken = take(rig)
    assert [(one.inode, one.to) for one in taken.moves] == [(inode, move.to)]
    assert taken.moves[0].end >= move.end  # what there was is compared
    end(rig, taken)
    assert 2 not in chains(rig, inode) and move.to in chains(rig, inode)


def test_copies_on_their_way_are_wanted_and_others_are_not(rig: Rig) -> None:
    namespace = put(rig, 3)
    inode = make_file(rig, b"f", 1)
    home = chains(rig, inode)[0]
    drain(rig, home)
    taken = take(rig, home)
    for move in taken.moves:
        assert rig.call(FindUnwanted(move.target_id, 0, (move.inode,))) == ()
        (other,) = {1, 2, 3} - {home, move.target_id}
        is_on_it = not move.is_block and other in chains(rig, move.inode)
        found = rig.call(FindUnwanted(other, 0, (move.inode,)))
        assert found == (() if is_on_it else (0,))
    end(rig, taken, home)
    for move in taken.moves:
        assert rig.call(FindUnwanted(home, 0, (move.inode,))) == (0,)
        assert rig.call(FindUnwanted(move.target_id, 0, (move.inode,))) == ()
    assert rig.match(namespace, range(3)) == 3


# --- targets that come and go meanwhile


def test_a_drain_that_is_undone_removes_the_copies(rig: Rig) -> None:
    put(rig)
    drain(rig, 2)
    taken = take(rig)
    rig.call(SetDraining((2,), False))
    assert end(rig, taken) == ()
    assert (moving(rig), rig.statistics()["moves_begun"]) == (0, 0)
    copies = {move.inode for move in taken.moves}
    assert copies == set(acknowledge(rig, 1)) | set(acknowledge(rig, 3))
    assert acknowledge(rig, 2) == []


def test_nothing_is_moved_to_what_is_to_leave_as_well(rig: Rig) -> None:
    namespace = put(rig)
    drain(rig, 2)
    taken = take(rig)
    drain(rig, 1)
    to_1 = {move.inode for move in taken.moves if move.to == 1}
    assert to_1
    assert to_1.isdisjoint(end(rig, taken))
    assert to_1 <= set(acknowledge(rig, 1))
    for target_id in (2, 1):
        again = take(rig, target_id)
        assert {move.to for move in again.moves} == {3}
        end(rig, again, target_id)
    assert {i.chain for i in rig.call(m.LookupBlocks(namespace, keys(range(9))))} == {3}
    assert is_drained(rig, 1)
    assert is_drained(rig, 2)


def test_targets_that_are_removed_by_force(rig: Rig) -> None:
    put(rig)
    drain(rig, 2)
    taken = take(rig)
    rig.call(RemoveTarget((1,), force=True))
    assert {rig.core.cluster.moves.get(m.inode) for m in taken.moves if m.to == 1} == {None}
    rig.call(RemoveTarget((2,), force=True))
    assert moving(rig) == 0
    assert {move.inode for move in taken.moves if move.to == 3} <= set(acknowledge(rig, 3))


def test_a_target_that_is_away_is_passed_over(rig: Rig) -> None:
    put(rig)
    drain(rig, 2)
    first = take(rig).moves
    rig.clock.advance(limits.TARGET_LEASE_SECONDS + 1)
    for target_id in (2, 3):
        rig.heartbeat(uuid(target_id))
    again = take(rig).moves
    assert {move.inode for move in again} <= {move.inode for move in first}
    assert {move.to for move in again} == {3}


def test_no_more_is_handed_out_than_is_said(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.moving.MOVES_AT_ONCE", 5)
    monkeypatch.setattr("kvfs_metadata.cluster.moving.MOVE_FILES_AT_ONCE", 2)
    put(rig, 60)
    files = {make_file(rig, b"%d" % n, 3) for n in range(7)}
    drain(rig, 2)
    seen: list[Move] = []
    while taken := take(rig):
        assert moving(rig) <= 7
        if not taken.moves:
            break
        assert len(taken.moves) <= 5
        assert sum(not move.is_block for move in taken.moves) <= 2
        assert take(rig).moves == taken.moves
        end(rig, take(rig), done=(taken.moves[0].inode,))
        seen.append(taken.moves[0])
    assert len(seen) == len({move.inode for move in seen}) == 20 + 7
    assert {move.inode for move in seen} >= files
    assert is_drained(rig)


def test_an_unknown_target(rig: Rig) -> None:
    for request in (TakeMoves(9), EndMoves(9, 1)):
        with pytest.raises(e.TargetUnknown):
            rig.call(request)


def test_a_change_that_cannot_be_written_did_not_happen(rig: Rig) -> None:
    put(rig)
    make_file(rig, b"f", 3)
    drain(rig, 2)
    active = True

    def check(writes: dict[bytes, bytes | None]) -> None:
        if active:
            raise e.DiskFull(path="x")

    rig.engine.before_commit = check

    def image() -> Any:
        index = rig.core.index.by_inode
        moves = rig.core.cluster.moves
        return (
            {inode: index[inode].chain for inode in index},
            {inode: moves.get(inode) for inode in moves.of_source(2)},
            rig.core.mover.statistics(),
            rig.dump(),
        )

    def attempt(request: Callable[[], Any]) -> Any:
        nonlocal active
        before, active = image(), True
        with pytest.raises(e.DiskFull):
            request()
        assert image() == before
        active = False
        look(rig)  # which files there are is only remembered
        return request()

    taken = attempt(lambda: take(rig))
    assert len(taken.moves) == 4
    done = tuple(move.inode for move in taken.moves[:2])
    assert attempt(lambda: end(rig, taken, done=done)) == done
    attempt(lambda: end(rig, taken, failed=(taken.moves[2].inode,)))
    attempt(lambda: rig.call(SetDraining((2,), False)))


# --- several servers on one store


def test_servers_of_one_store_know_each_others_moves() -> None:
    servers = Servers(2, targets=3)
    a, b = servers.rigs
    namespace = a.namespace()
    a.put(namespace, range(9))
    inode = make_file(b, b"f", 3)
    a.call(SetDraining((2,), True))
    look(a)
    look(b)
    taken = take(a)
    assert len(taken.moves) == 4
    b.call(m.OpenInode(inode))
    b.call(m.CloseInode(inode))
    assert inode not in end(a, taken), "it was open at the other one"
    again = take(b)
    assert again.ticket > taken.ticket
    assert end(b, again) == (inode,)
    for rig in (a, b):
        infos = rig.call(m.LookupBlocks(namespace, keys(range(9))))
        assert {info.chain for info in infos} == {1, 3}
    assert take(a).ticket > again.ticket
    fresh = servers.start(b"Z" * 16)
    assert fresh.call(m.LookupBlocks(namespace, keys(range(9)))) == infos
