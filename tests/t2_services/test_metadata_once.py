"""Changes whose answer is lost: the caller gets the first answer, and it happened once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kvfs_base import errors as e
from kvfs_base.rpc import Request
from kvfs_metadata import limits
from kvfs_metadata import messages as m
from kvfs_metadata.client import BlockingMetadataClient, MetadataClient
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
)
from t2_services.metadata_rig import FILE, ROOT, Rig, key, keys
from t2_services.metadata_stage import (
    CHANGING,
    SESSION,
    Stage,
    blocking_stage,
    call_soon,
    run,
)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@dataclasses.dataclass
class Prepared:
    """What the changes below work on, made anew for each."""

    rig: Rig

    def __post_init__(self) -> None:
        self.rig.heartbeat("gone")
        self.rig.call(RemoveTarget((2,), force=True))
        self.rig.heartbeat("leaving")
        self.rig.call(SetDraining((3,), True))
        self.file = self.rig.make(ROOT, b"file").inode
        self.rig.make(ROOT, b"other")
        self.rig.call(m.SetXattr(self.file, b"user.old", b"1"))
        self.rig.mkdir(ROOT, b"empty")
        self.namespace = self.rig.namespace()
        self.rig.put(self.namespace, [1, 2, 3])


CHANGES: dict[str, Callable[[Prepared], Request]] = {
    "set_attr": lambda p: m.SetAttr(p.file, size=77, mode=0o600),
    "make": lambda p: m.Make(ROOT, b"new", FILE),
    "make_or_find": lambda p: m.Make(ROOT, b"new", FILE, exclusive=False),
    "make_open": lambda p: m.Make(ROOT, b"new", FILE, open=True),
    "make_directory": lambda p: m.Make(ROOT, b"new", 0o040755),
    "make_link": lambda p: m.Make(ROOT, b"new", 0o120777, target=b"file"),
    "link": lambda p: m.Link(p.file, ROOT, b"second"),
    "unlink": lambda p: m.Unlink(ROOT, b"file"),
    "unlink_block": lambda p: m.Unlink(p.namespace, key(2).hex().encode()),
    "rmdir": lambda p: m.Rmdir(ROOT, b"empty"),
    "rename": lambda p: m.Rename(ROOT, b"file", ROOT, b"moved", 1),
    "rename_over": lambda p: m.Rename(ROOT, b"file", ROOT, b"other"),
    "exchange": lambda p: m.Rename(ROOT, b"file", ROOT, b"other", 2),
    "set_xattr": lambda p: m.SetXattr(p.file, b"user.new", b"1", 1),
    "remove_xattr": lambda p: m.RemoveXattr(p.file, b"user.old"),
    "set_quota": lambda p: m.SetQuota(ROOT, bytes_max=1 << 40, inodes_max=100),
    "prepare": lambda p: m.PrepareBlocks(p.namespace, keys([3, 4, 5]), (10,) * 3),
    "remove": lambda p: m.RemoveBlocks(p.namespace, keys([2, 3, 9])),
    "set_draining": lambda p: SetDraining((1,), True),
    "remove_target": lambda p: RemoveTarget((1,), force=True),
    "replace_target": lambda p: ReplaceTarget(3, 1),
    "admit_target": lambda p: AdmitTarget("gone"),
}


def done_once(change: str) -> tuple[Any, dict[bytes, bytes]]:
    """Answer and store of a service that was asked once."""
    prepared = Prepared(Rig())
    answer = prepared.rig.call(CHANGES[change](prepared))
    return answer, without_answers(prepared.rig)


def without_answers(rig: Rig) -> dict[bytes, bytes]:
    """Nor what has the name of a client's session."""
    return {k: v for k, v in rig.dump().items() if not k.startswith((b"RSLT", b"WRIT"))}


def test_all_changes_are_tried() -> None:
    prepared = Prepared(Rig())
    assert {type(make(prepared)) for make in CHANGES.values()} == CHANGING


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("how", ["before", "after", "away"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_happens_once(stage: Stage, change: str, how: str, times: int) -> None:
    answers = []

    async def test() -> None:
        prepared = Prepared(stage.rig)
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.seen.clear()
            for _ in range(times):  # the greeting of each new connection comes in between
                stage.handler.hang_up.extend([how, ""])
            answers.append(await client.call(CHANGES[change](prepared)))

    run(test)
    assert stage.handler.types() == [m.Once] + [m.Attach, m.Once] * times
    assert (answers[0], without_answers(stage.rig)) == done_once(change)


@pytest.mark.parametrize("how", ["before", "after", "away"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_without_a_task_happens_once(stage: Stage, change: str, how: str) -> None:
    answers = []

    async def test() -> None:
        prepared = Prepared(stage.rig)
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.seen.clear()
            stage.handler.hang_up.extend([how, ""])
            answers.append(await call_soon(client, CHANGES[change](prepared)))

    run(test)
    assert stage.handler.types() == [m.Once, m.Attach, m.Once]
    assert (answers[0], without_answers(stage.rig)) == done_once(change)


@pytest.mark.parametrize("how", ["before", "after", "away"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_a_thread_happens_once(change: str, how: str, tmp_path: Path) -> None:
    with blocking_stage(tmp_path, targets=1) as stage:
        prepared = Prepared(stage.rig)
        client = BlockingMetadataClient(stage.env, stage.address)
        stage.handler.lose(how, 2)
        answer = client.call(CHANGES[change](prepared))
        client.close()
        assert stage.handler.types() == [m.Once] * 3
        assert (answer, without_answers(stage.rig)) == done_once(change)


def test_an_error_is_given_again_and_an_earlier_copy_fails_too(stage: Stage) -> None:
    """The queue of a server that lost its client may hold a copy for long."""

    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            stage.handler.lose("before", 1)
            with pytest.raises(e.EntryNotFound):
                await client.call(m.Unlink(ROOT, b"file"))
            await client.call(m.GetAttr(ROOT))

    run(test)
    first, second = stage.handler.seen[:2]
    assert isinstance(first, m.Once) and isinstance(second, m.Once)
    assert (first.again, second.again) == (False, True)
    assert (first.client, first.slot, first.number) == (second.client, second.slot, second.number)
    stage.rig.make(ROOT, b"file")
    for copy in (first, second):
        with pytest.raises(e.EntryNotFound):
            stage.rig.call(copy)
    assert b"file" in stage.rig.names(ROOT)


def test_an_error_of_a_first_copy_costs_no_record(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            with pytest.raises(e.EntryNotFound):
                await client.call(m.Unlink(ROOT, b"file"))

    run(test)
    assert stage.rig.dump(b"RSLT") == {}


def test_few_slots_are_used_and_none_by_two(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client, trio.open_nursery() as nursery:
            for n in range(3):
                await client.call(m.Make(ROOT, b"%d" % n, FILE))
            assert {(r.slot, r.number) for r in seen()} == {(0, 1), (0, 2), (0, 3)}
            stage.handler.seen.clear()
            for n in range(2 * limits.ONCE_SLOTS):
                nursery.start_soon(client.call, m.Make(ROOT, b"many %d" % n, FILE))

    def seen() -> list[m.Once]:
        return [request for request in stage.handler.seen if isinstance(request, m.Once)]

    run(test)
    used: dict[int, list[int]] = {}
    for request in seen():
        used.setdefault(request.slot, []).append(request.number)
    assert len(used) == limits.ONCE_SLOTS
    assert sum(map(len, used.values())) == 2 * limits.ONCE_SLOTS
    assert all(numbers == sorted(set(numbers)) for numbers in used.values())


def test_a_slot_of_a_cancelled_call_is_used_again(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as client:
            with trio.move_on_after(0):
                await client.call(m.Make(ROOT, b"1", FILE))
            await client.call(m.Make(ROOT, b"2", FILE))

    run(test)
    last = stage.handler.seen[-1]
    assert isinstance(last, m.Once) and last.slot == 0


def test_clients_are_told_apart(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client() as one, stage.client() as two:
            for number, client in enumerate((one, two)):
                assert (await client.call(m.Make(ROOT, b"%d" % number, FILE))).nlink == 1

    run(test)
    assert stage.rig.names(ROOT) == [b"0", b"1", b"kv"]


@pytest.mark.parametrize("lost_at", [0, 1, 255, 256, 300])
def test_many_changes_from_a_thread_happen_once(tmp_path: Path, lost_at: int) -> None:
    """More than there are slots, and reads among them."""
    with blocking_stage(tmp_path) as stage:
        client = BlockingMetadataClient(stage.env, stage.address)
        requests: list[Request] = [m.Make(ROOT, b"%03d" % n, FILE) for n in range(300)]
        requests[200:200] = [m.Lookup(ROOT, b"199")]
        stage.handler.hang_up.extend([""] * lost_at + ["after"])
        answers = client.call_many(requests)
        names = [b"%03d" % n for n in range(300)]
        assert stage.rig.names(ROOT)[:300] == names
        made = answers[:200] + answers[201:]
        assert [a.inode for a in made] == [stage.rig.resolve(name).inode for name in names]
        assert answers[200] == answers[199]
        client.close()


# --- files that are open


@pytest.mark.parametrize("how", ["before", "after", "away"])
def test_opens_and_closes_count_once_across_lost_answers(stage: Stage, how: str) -> None:
    async def test() -> None:
        inode = stage.rig.make(ROOT, b"f").inode
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.hang_up.extend([how, "", ""])  # the repeat comes after an Attach
            await client.call(m.OpenInode(inode))
            await client.call(m.OpenInode(inode))
            stage.rig.call(m.Unlink(ROOT, b"f"))
            stage.handler.hang_up.extend([how, "", ""])
            await client.call(m.CloseInode(inode))
            assert (await client.call(m.GetAttr(inode))).nlink == 0
            await client.call(m.CloseInode(inode))
            # What a lost answer may have opened is kept for a while.
            stage.rig.work(limits.SESSION_GRACE_SECONDS)
            with pytest.raises(e.InodeStale):
                await client.call(m.GetAttr(inode))

    run(test)


@pytest.mark.parametrize("call", [MetadataClient.call, call_soon])
@pytest.mark.parametrize("how", ["before", "after", "away"])
def test_a_file_opened_as_it_is_made_stays_open_if_the_answer_is_lost(
    stage: Stage, how: str, call: Any
) -> None:
    """Even if somebody unlinks it before the answer comes, which only "after" and "away" allow."""

    async def test() -> None:
        async with stage.serving(), stage.client(session=SESSION) as client:
            await client.call(m.GetAttr(ROOT))
            stage.handler.hang_up.extend([how, "", ""])
            unlink_at_once(stage.rig)
            made = await call(client, m.Make(ROOT, b"f", FILE, open=True))
            if how == "before":
                stage.rig.call(m.Unlink(ROOT, b"f"))
            assert stage.rig.call(m.SetAttr(made.inode, size=5)).nlink == 0
            stage.rig.work(limits.SESSION_GRACE_SECONDS + 1)
            assert stage.rig.attr(made.inode).nlink == 0
            await client.call(m.CloseInode(made.inode))
            with pytest.raises(e.InodeStale):
                stage.rig.attr(made.inode)

    def unlink_at_once(rig: Rig) -> None:
        """Between the first copy and the greeting of the next connection."""
        disconnected = stage.handler.disconnected

        def unlinking(session_id: int, *, by_peer: bool) -> None:
            disconnected(session_id, by_peer=by_peer)
            if how != "before":
                rig.call(m.Unlink(ROOT, b"f"))
            stage.handler.disconnected = disconnected  # type: ignore[method-assign]

        stage.handler.disconnected = unlinking  # type: ignore[method-assign]

    run(test)


def test_an_open_of_a_connection_that_was_left_does_not_count(stage: Stage) -> None:
    """A copy that lay in a queue while the client came back elsewhere: its repetition counts."""
    make = m.Once(b"c" * 16, 0, 1, m.Make(ROOT, b"f", FILE, open=True))
    stage.rig.call(m.Attach(SESSION), 1)
    stage.rig.call(m.Attach(SESSION), 2)
    made = stage.rig.call(make, 1)
    stage.rig.core.disconnected(1)
    assert stage.rig.call(make, 2) == made
    stage.rig.call(m.Unlink(ROOT, b"f"))
    assert stage.rig.attr(made.inode).nlink == 0
    stage.rig.call(m.CloseInode(made.inode), 2)
    with pytest.raises(e.InodeStale):
        stage.rig.attr(made.inode)


def test_what_comes_late_over_a_connection_that_was_left_changes_nothing(stage: Stage) -> None:
    inode = stage.rig.make(ROOT, b"f").inode
    stage.rig.call(m.Attach(SESSION, (), 1), 1)
    stage.rig.call(m.Attach(SESSION, (inode,), 3), 3)
    stage.rig.call(m.Unlink(ROOT, b"f"))
    stage.rig.call(m.CloseInode(inode), 1)
    stage.rig.call(m.Attach(SESSION, (), 2), 2)
    stage.rig.core.disconnected(1)
    stage.rig.core.disconnected(2)
    stage.rig.work(limits.SESSION_GRACE_SECONDS + 1)
    assert stage.rig.attr(inode).nlink == 0
    stage.rig.call(m.CloseInode(inode), 3)
    with pytest.raises(e.InodeStale):
        stage.rig.attr(inode)


def test_greetings_are_numbered(stage: Stage) -> None:
    async def test() -> None:
        async with stage.serving(), stage.client(session=SESSION) as client:
            for _ in range(3):
                stage.handler.hang_up.append("after")
                await client.call(m.GetAttr(ROOT))

    run(test)
    greetings = [r.number for r in stage.handler.seen if isinstance(r, m.Attach)]
    assert greetings == sorted(set(greetings)) and len(greetings) > 2
