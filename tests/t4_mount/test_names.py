"""What a mount knows of names and attributes after the answers to its own changes: as much as can
be known, and nothing that may be wrong."""

from __future__ import annotations

import stat
from typing import Any

import pytest

from kvfs.mount.names import EXCHANGE, MISSING, Names
from kvfs_base.testing import memory_env
from kvfs_base.types import Attr
from kvfs_metadata import messages as m

HERE, THERE, FILE, FOLDER, OTHER = 10, 11, 20, 21, 22
EARLIER_NS, NOW_NS, LATER_NS = 1_000, 2_000, 3_000


def directory(inode: int, **fields: Any) -> Attr:
    return Attr(inode, stat.S_IFDIR | 0o755, **{"nlink": 5, "ctime_ns": EARLIER_NS, **fields})


def file(inode: int, **fields: Any) -> Attr:
    return Attr(inode, stat.S_IFREG | 0o644, **{"ctime_ns": EARLIER_NS, **fields})


@pytest.fixture
def names() -> Names:
    """Knows two directories, and a file and a directory in the first one."""
    names = Names(memory_env()[0].clock)
    names.began()
    names.revoked(m.Revoked(1), until=float("inf"))
    for attr in (directory(HERE), directory(THERE)):
        names.answered(m.GetAttr(attr.inode), attr, names.token)
    for name, attr in ((b"file", file(FILE)), (b"folder", directory(FOLDER))):
        names.answered(m.Lookup(HERE, name), attr, names.token)
    return names


def rename(names: Names, name: bytes, moved: int, parent: int, *, flags: int = 0) -> None:
    request = m.Rename(HERE, name, parent, b"new", flags)
    names.answered(request, m.Touched((moved,), NOW_NS), names.token)


@pytest.mark.parametrize("parent", [HERE, THERE])
def test_a_renamed_file_and_its_directories_are_known(names: Names, parent: int) -> None:
    rename(names, b"file", FILE, parent)
    assert names.entry(HERE, b"file") == MISSING
    assert names.entry(parent, b"new") == FILE
    assert names.attr(FILE) == file(FILE, ctime_ns=NOW_NS)
    for touched in {HERE, parent}:
        assert names.attr(touched) == directory(touched, mtime_ns=NOW_NS, ctime_ns=NOW_NS)


def test_link_counts_are_asked_for_where_a_directory_was_moved(names: Names) -> None:
    rename(names, b"folder", FOLDER, THERE)
    assert names.entry(THERE, b"new") == FOLDER
    assert [names.attr(inode) for inode in (HERE, THERE, FOLDER)] == [None] * 3


def test_nothing_is_known_of_what_two_names_exchanged(names: Names) -> None:
    rename(names, b"file", FILE, THERE, flags=EXCHANGE)
    assert names.entry(HERE, b"file") is None
    assert [names.attr(inode) for inode in (HERE, THERE, FILE)] == [None] * 3


def test_what_was_replaced_is_asked_for(names: Names) -> None:
    names.answered(m.Lookup(HERE, b"new"), file(OTHER), names.token)
    request = m.Rename(HERE, b"file", HERE, b"new")
    names.answered(request, m.Touched((FILE, OTHER), NOW_NS), names.token)
    assert names.attr(OTHER) is None
    assert names.entry(HERE, b"new") == FILE


def test_a_removed_directory_is_one_link_less(names: Names) -> None:
    names.answered(m.Rmdir(HERE, b"folder"), m.Touched((FOLDER,), NOW_NS), names.token)
    assert names.entry(HERE, b"folder") == MISSING
    assert names.attr(FOLDER) is None
    assert names.attr(HERE) == directory(HERE, nlink=4, mtime_ns=NOW_NS, ctime_ns=NOW_NS)


def test_what_somebody_else_changed_meanwhile_is_asked_for(names: Names) -> None:
    request, asked_at = m.Rename(HERE, b"file", THERE, b"new"), names.token
    names.revoked(m.Revoked(2, (THERE,), ((THERE, b"new"),)), until=float("inf"))
    names.answered(request, m.Touched((FILE,), NOW_NS), asked_at)
    assert names.entry(THERE, b"new") is None
    assert names.attr(THERE) is None
    assert names.entry(HERE, b"file") == MISSING
    assert names.attr(HERE) is not None


@pytest.mark.parametrize("ctime_ns", [NOW_NS, LATER_NS])
def test_an_answer_that_overtook_the_one_to_a_change_has_it_in_it(
    names: Names, ctime_ns: int
) -> None:
    make = m.Make(HERE, b"made", stat.S_IFDIR | 0o755, 0, 0)
    asked_at = names.token
    names.answered(m.GetAttr(HERE), directory(HERE, nlink=6, ctime_ns=ctime_ns), names.token)
    names.answered(make, directory(OTHER, nlink=2, ctime_ns=NOW_NS), asked_at)
    assert names.attr(HERE) is None  # not one with 7 links
    assert names.entry(HERE, b"made") == OTHER
