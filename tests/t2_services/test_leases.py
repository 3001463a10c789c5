"""Leases on names: who is told of a change, and what waits until he has dropped it."""

from __future__ import annotations

from typing import Any

import pytest

from kvfs_base.testing import ManualClock
from kvfs_base.types import Attr, BlockInfo
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.block_table import Block
from kvfs_metadata.leases import MERGED, Leases, Revocation, leased_keys
from kvfs_metadata.limits import REVOKED_KEYS_MAX, WATCH_SECONDS

A, B, OTHER = 1, 2, 9
SESSIONS = {A: b"a" * 16, B: b"b" * 16}
INODE = records.inode_key(7)
ENTRY = records.entry_key(1, b"name")


class World:
    def __init__(self, leases_max: int = 1000) -> None:
        self.clock = ManualClock()
        self.leases = Leases(self.clock, leases_max)

    def begin(self, *connections: int) -> World:
        for connection in connections or (A, B):
            assert self.leases.hear(connection, m.Watch(SESSIONS[connection]))
            assert self.leases.take(connection) == m.Revoked(1)
        return self

    def ack(self, connection: int, revoked: m.Revoked) -> None:
        assert not self.leases.hear(connection, m.Watch(SESSIONS[connection], revoked.number))

    def change(self, *keys: bytes, author: int = OTHER, value: Any = b"") -> Revocation | None:
        return self.leases.changed(dict.fromkeys(keys, value), author)


def is_over(revocation: Revocation | None) -> bool:
    return revocation is None or revocation.is_over


def test_a_change_waits_until_the_watcher_has_dropped_it() -> None:
    world = World().begin()
    world.leases.grant(A, INODE)
    revocation = world.change(INODE)
    assert not is_over(revocation)
    told = world.leases.take(A)
    assert (told.inodes, told.entries) == ((7,), ())
    assert not is_over(revocation)
    world.ack(A, told)
    assert is_over(revocation)


def test_nobody_is_asked_about_what_nobody_has() -> None:
    world = World().begin()
    assert world.change(INODE) is None
    world.leases.grant(A, INODE)
    assert world.change(ENTRY) is None
    assert not world.leases.has_news(A)


def test_a_lease_ends_with_its_revocation() -> None:
    world = World().begin()
    world.leases.grant(A, INODE)
    world.change(INODE)
    world.ack(A, world.leases.take(A))
    assert world.change(INODE) is None


def test_the_author_is_not_told() -> None:
    world = World().begin()
    for connection in (A, B):
        world.leases.grant(connection, ENTRY)
    revocation = world.change(ENTRY, author=A)
    assert not world.leases.has_news(A)
    world.ack(B, world.leases.take(B))
    assert is_over(revocation)
    # He keeps the lease: what he was answered is the new state.
    assert not is_over(world.change(ENTRY, author=B))
    assert world.leases.take(A).entries == ((1, b"name"),)


def test_of_a_group_of_several_clients_everybody_is_told() -> None:
    world = World().begin()
    world.leases.grant(A, INODE)
    assert not is_over(world.change(INODE, author=MERGED))


def test_what_comes_while_a_message_is_on_its_way_goes_with_the_next() -> None:
    world = World().begin(A)
    world.leases.grant(A, INODE)
    world.leases.grant(A, ENTRY)
    first = world.change(INODE)
    told = world.leases.take(A)
    second = world.change(ENTRY)
    world.ack(A, told)
    assert is_over(first) and not is_over(second)
    world.ack(A, world.leases.take(A))
    assert is_over(second)


def test_a_silent_watcher_is_waited_for_until_its_lease_is_over() -> None:
    world = World().begin()
    world.leases.grant(A, INODE)
    revocation = world.change(INODE)
    world.clock.advance(WATCH_SECONDS - 0.01)
    world.leases.expire()
    assert not is_over(revocation)
    assert world.leases.next_end() == pytest.approx(world.clock.monotonic() + 0.01)
    world.clock.advance(0.02)
    world.leases.expire()
    assert is_over(revocation)
    assert not world.leases.watches(A)


def test_one_that_comes_back_too_late_is_told_that_everything_is_revoked() -> None:
    world = World().begin()
    world.clock.advance(WATCH_SECONDS)
    world.leases.expire()
    assert world.leases.hear(A, m.Watch(SESSIONS[A], 1))
    told = world.leases.take(A)
    assert told.everything
    world.leases.grant(A, INODE)
    world.ack(A, told)
    assert not is_over(world.change(INODE))


def test_each_watch_renews_the_lease() -> None:
    world = World().begin(A)
    world.leases.grant(A, INODE)
    for _ in range(3):
        world.clock.advance(WATCH_SECONDS - 1)
        world.ack(A, world.leases.take(A))
        world.leases.expire()
    assert not is_over(world.change(INODE))


def test_a_watch_that_ends_lets_everybody_go_on() -> None:
    world = World().begin()
    called = []
    world.leases.when_news(A, lambda: called.append("A"))
    world.leases.grant(A, INODE)
    revocation = world.change(INODE)
    assert revocation is not None and called == ["A"]
    revocation.then(lambda: called.append("over"))
    world.leases.end(A)
    assert called == ["A", "A", "over"]
    assert world.leases.take(A).everything


def test_a_new_connection_of_a_session_ends_its_old_watch() -> None:
    world = World().begin(A)
    world.leases.grant(A, INODE)
    revocation = world.change(INODE)
    assert world.leases.hear(B, m.Watch(SESSIONS[A]))
    assert is_over(revocation)
    assert not world.leases.watches(A)


def test_a_new_block_concerns_those_who_took_it_for_missing() -> None:
    world = World().begin()
    key = bytes(range(32))
    record = records.pack_block((5, 100, 0, 1, 0, 0, key))
    world.leases.grant(A, records.entry_key(5, key.hex().encode()))
    world.leases.grant(B, records.block_key(8))
    revocation = world.change(records.block_key(8), value=record)
    assert world.leases.take(A).entries == ((5, key.hex().encode()),)
    assert not world.leases.has_news(B)
    assert not is_over(revocation)
    assert not is_over(world.change(records.block_key(8), value=None))
    assert world.leases.take(B).inodes == (8,)


def test_who_knows_a_whole_directory_is_told_of_each_name_in_it() -> None:
    world = World().begin()
    world.leases.grant(A, records.entry_key(1, b""))
    assert world.change(records.entry_key(2, b"name")) is None
    assert not is_over(world.change(ENTRY))
    assert world.leases.take(A).entries == ((1, b""),)


def test_a_listing_is_leased_with_all_that_it_names() -> None:
    entries = ((b"a", Attr(7, 0o100644)), (b"d", Attr(8, 0o040755)))
    page = m.DirectoryPage(entries, more=False)
    keys = leased_keys(m.ReadDir(1, keeps=True), page, lambda _: None)
    assert keys == (records.entry_key(1, b""), INODE, records.inode_key(8))
    first = m.DirectoryPage(entries, more=True)
    assert leased_keys(m.ReadDir(1, keeps=True), first, lambda _: None) == keys
    later = leased_keys(m.ReadDir(1, after=b"A", keeps=True), page, lambda _: None)
    assert later == keys[1:]
    blocks = m.DirectoryPage(((b"00" * 32, Attr(9, 0o100444, key=b"k" * 32)),), more=False)
    for request, answer in (
        (m.ReadDir(1), page),
        (m.ReadDir(1, keeps=True), blocks),
    ):
        assert leased_keys(request, answer, lambda _: None) == ()


def test_when_full_the_oldest_leases_are_revoked() -> None:
    world = World(leases_max=8).begin(A)
    for inode in range(9):
        world.leases.grant(A, records.inode_key(inode))
    told = world.leases.take(A)
    assert told.inodes == (0, 1, 2)
    # Until it has said so, it may still use them.
    assert not is_over(world.change(records.inode_key(0)))
    world.ack(A, told)
    assert is_over(world.change(records.inode_key(1)))
    assert not is_over(world.change(records.inode_key(3)))


def test_one_that_does_not_keep_up_loses_everything() -> None:
    world = World(leases_max=REVOKED_KEYS_MAX).begin(A)
    for inode in range(2 * REVOKED_KEYS_MAX):
        world.leases.grant(A, records.inode_key(inode))
    assert world.leases.statistics()["leases"] <= 1.5 * REVOKED_KEYS_MAX
    told = world.leases.take(A)
    assert told.everything
    revocation = world.change(records.inode_key(0))
    assert not is_over(revocation)
    world.ack(A, told)
    assert is_over(revocation)


def test_watchers_share_the_room() -> None:
    world = World(leases_max=8).begin(A)
    for inode in range(8):
        world.leases.grant(A, records.inode_key(inode))
    world.begin(B)
    assert world.leases.take(A).everything
    assert world.leases.statistics()["leases"] == 0


def test_a_group_that_failed_revokes_everything() -> None:
    world = World().begin()
    world.leases.grant(A, INODE)
    world.leases.reset_all()
    revocation = world.change(ENTRY)
    for connection in (A, B):
        told = world.leases.take(connection)
        assert told.everything
        world.ack(connection, told)
    assert is_over(revocation)


def test_a_repetition_waits_for_what_the_first_copy_is_waited_for() -> None:
    world = World().begin()
    world.leases.grant(A, INODE)
    first = world.change(INODE)
    again = world.leases.changed({}, OTHER)
    assert not is_over(again)
    world.ack(A, world.leases.take(A))
    assert is_over(first) and is_over(again)


def test_after_a_start_changes_wait_for_those_who_watched() -> None:
    world = World()
    world.leases.expect([SESSIONS[A], SESSIONS[B]])
    revocation = world.change(INODE)
    world.begin(A)
    assert not is_over(revocation)
    world.begin(B)
    assert is_over(revocation)
    assert world.leases.forgotten() == []


def test_after_a_start_nobody_is_waited_for_longer_than_a_lease() -> None:
    world = World()
    world.leases.expect([SESSIONS[A]])
    revocation = world.change(INODE)
    world.clock.advance(WATCH_SECONDS)
    world.leases.expire()
    assert is_over(revocation)
    assert world.change(INODE) is None
    assert world.leases.forgotten() == [SESSIONS[A]]


# --- changes on top of what is being revoked


def test_a_change_waits_for_what_is_still_being_revoked_of_the_same_name() -> None:
    """The first one's author waits for nobody: the service itself, or one that is not answered."""
    world = World().begin(A)
    world.leases.grant(A, ENTRY)
    world.change(ENTRY)
    for told in (False, True):
        if told:
            message = world.leases.take(A)
        second = world.change(ENTRY)
        assert not is_over(second)
        assert is_over(world.change(records.entry_key(1, b"another")))
    world.ack(A, message)
    assert is_over(second)
    assert world.change(ENTRY) is None


def test_a_new_block_waits_until_the_one_before_it_is_dropped() -> None:
    """Its inode number is another, so the key of what is revoked says nothing."""
    block = Block(8, 1, b"k" * 32, 10, 0, 1, 0, 0)
    world = World().begin(A)
    world.leases.grant(A, records.block_key(7))
    world.change(records.block_key(7), value=None)
    new = world.change(records.block_key(8), value=block.record())
    assert not is_over(new)
    world.ack(A, world.leases.take(A))
    assert is_over(new)


def test_blocks_are_leased_to_the_session_that_is_named() -> None:
    world = World().begin(A)
    asked = m.LookupBlocks(1, b"", SESSIONS[A])
    assert world.leases.watcher_of(OTHER, asked) == A
    assert world.leases.watcher_of(A, m.LookupBlocks(1, b"")) is None
    assert world.leases.watcher_of(OTHER, m.LookupBlocks(1, b"", SESSIONS[B])) is None
    answer = (BlockInfo(7, 10, 0, 1), None)
    assert leased_keys(asked, answer, lambda inode: None) == (records.block_key(7),)
    world.leases.end(A)
    assert world.leases.watcher_of(OTHER, asked) is None
