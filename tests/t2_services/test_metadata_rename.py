"""rename(2): replacing, exchanging, and everything it refuses."""

from __future__ import annotations

import pytest

from kvfs_base import errors as e
from kvfs_metadata import messages as m
from t2_services.metadata_rig import ROOT, Rig

NOREPLACE, EXCHANGE = 1, 2


@pytest.fixture
def rig() -> Rig:
    return Rig()


def rename(rig: Rig, old: bytes, new: bytes, flags: int = 0) -> None:
    """Paths with directories that exist."""
    parents = [rig.resolve(path.rpartition(b"/")[0]).inode for path in (old, new)]
    names = [path.rpartition(b"/")[2] for path in (old, new)]
    rig.call(m.Rename(parents[0], names[0], parents[1], names[1], flags))


def tree(rig: Rig, inode: int = ROOT, path: bytes = b"") -> dict[bytes, int]:
    """Every path below the root but /kv, and a check of all link counts on the way."""
    found: dict[bytes, int] = {}
    directories = 0
    for name, attr in rig.call(m.ReadDir(inode)).entries:
        below = path + b"/" + name
        if attr.is_dir:
            directories += 1
            found.update(tree(rig, attr.inode, below))
        found[below] = attr.inode
    assert rig.attr(inode).nlink == 2 + directories, path
    return {p: i for p, i in found.items() if p != b"/kv"}


def test_a_new_name(rig: Rig) -> None:
    file = rig.make(ROOT, b"a").inode
    directory = rig.mkdir(ROOT, b"d")
    rig.advance(1)
    rename(rig, b"/a", b"/d/b")
    assert tree(rig) == {b"/d": directory, b"/d/b": file}
    now = rig.clock.time_ns()
    assert rig.attr(file).ctime_ns == now
    assert rig.attr(ROOT).mtime_ns == now and rig.attr(directory).mtime_ns == now
    rename(rig, b"/d/b", b"/d/c")
    assert tree(rig) == {b"/d": directory, b"/d/c": file}


def test_replacing_a_file(rig: Rig) -> None:
    file = rig.make(ROOT, b"a").inode
    old = rig.make(ROOT, b"b").inode
    rig.call(m.SetAttr(old, size=100))
    rename(rig, b"/a", b"/b")
    assert tree(rig) == {b"/b": file}
    with pytest.raises(e.InodeStale):
        rig.attr(old)
    assert [inode for _, inode in rig.removals()] == [old]
    assert rig.call(m.StatFs()).used_bytes == 0


def test_replacing_one_of_several_names(rig: Rig) -> None:
    file = rig.make(ROOT, b"a").inode
    old = rig.make(ROOT, b"b").inode
    rig.call(m.Link(old, ROOT, b"c"))
    rename(rig, b"/a", b"/b")
    assert tree(rig) == {b"/b": file, b"/c": old}
    assert rig.attr(old).nlink == 1 and rig.removals() == []


def test_two_names_of_one_file_stay(rig: Rig) -> None:
    file = rig.make(ROOT, b"a").inode
    rig.call(m.Link(file, ROOT, b"b"))
    for flags in (0, EXCHANGE):
        rename(rig, b"/a", b"/b", flags)
        assert tree(rig) == {b"/a": file, b"/b": file}
    rename(rig, b"/a", b"/a")
    assert rig.attr(file).nlink == 2


def test_directories_move_with_what_is_in_them(rig: Rig) -> None:
    a, b = rig.mkdir(ROOT, b"a"), rig.mkdir(ROOT, b"b")
    deep = rig.mkdir(a, b"deep")
    file = rig.make(deep, b"f").inode
    rename(rig, b"/a", b"/b/moved")
    expected = {b"/b": b, b"/b/moved": a, b"/b/moved/deep": deep, b"/b/moved/deep/f": file}
    assert tree(rig) == expected
    # The parent that it knows has moved along: it cannot go below itself now either.
    with pytest.raises(e.InvalidRename):
        rename(rig, b"/b", b"/b/moved/deep/b")


def test_replacing_an_empty_directory(rig: Rig) -> None:
    a, _ = rig.mkdir(ROOT, b"a"), rig.mkdir(ROOT, b"b")
    below = rig.mkdir(a, b"x")
    rename(rig, b"/a", b"/b")
    assert tree(rig) == {b"/b": a, b"/b/x": below}


def test_refusals(rig: Rig) -> None:
    a, b = rig.mkdir(ROOT, b"a"), rig.mkdir(ROOT, b"b")
    rig.make(ROOT, b"f")
    rig.make(b, b"g")
    inner = rig.mkdir(a, b"inner")
    before = tree(rig)
    refused: list[tuple[bytes, bytes, int, type[e.KvfsError]]] = [
        (b"/missing", b"/x", 0, e.EntryNotFound),
        (b"/missing", b"/f", 0, e.EntryNotFound),
        (b"/f", b"/missing", EXCHANGE, e.EntryNotFound),
        (b"/f", b"/b/g", NOREPLACE, e.EntryExists),
        (b"/f", b"/f", NOREPLACE, e.EntryExists),
        (b"/f", b"/b/g", NOREPLACE | EXCHANGE, e.InvalidRequest),
        (b"/f", b"/x", 4, e.InvalidRequest),
        (b"/a", b"/f", 0, e.NotADirectory),
        (b"/f", b"/a", 0, e.IsADirectory),
        (b"/a", b"/b", 0, e.DirectoryNotEmpty),
        (b"/a/inner", b"/a", 0, e.DirectoryNotEmpty),
        (b"/a", b"/a/x", 0, e.InvalidRename),
        (b"/a", b"/a/inner/x", 0, e.InvalidRename),
        (b"/a", b"/a/inner", EXCHANGE, e.InvalidRename),
        (b"/a/inner", b"/a", EXCHANGE, e.InvalidRename),
        (b"/f", b"/f/x", 0, e.NotADirectory),
        (b"/f/x", b"/y", 0, e.NotADirectory),
    ]
    for old, new, flags, error in refused:
        with pytest.raises(error):
            rename(rig, old, new, flags)
        assert tree(rig) == before, (old, new, flags)
    with pytest.raises(e.InodeStale):
        rig.call(m.Rename(ROOT, b"f", 999_999, b"f"))
    assert inner == before[b"/a/inner"]


def test_noreplace_where_nothing_is(rig: Rig) -> None:
    file = rig.make(ROOT, b"a").inode
    rename(rig, b"/a", b"/b", NOREPLACE)
    assert tree(rig) == {b"/b": file}


def test_exchange(rig: Rig) -> None:
    a, b = rig.mkdir(ROOT, b"a"), rig.mkdir(ROOT, b"b")
    inner = rig.mkdir(a, b"inner")
    file = rig.make(b, b"f").inode
    rename(rig, b"/a/inner", b"/b/f", EXCHANGE)
    assert tree(rig) == {b"/a": a, b"/a/inner": file, b"/b": b, b"/b/f": inner}
    rename(rig, b"/a", b"/b", EXCHANGE)
    assert tree(rig) == {b"/a": b, b"/a/f": inner, b"/b": a, b"/b/inner": file}
    # Parents were exchanged as well.
    with pytest.raises(e.InvalidRename):
        rename(rig, b"/a", b"/a/f/x")
    rename(rig, b"/b", b"/a/f/x")


def test_what_kv_is_made_of_does_not_move(rig: Rig) -> None:
    rig.namespace("tenant/model")
    rig.mkdir(ROOT, b"d")
    for old, new, flags in (
        (b"/kv", b"/elsewhere", 0),
        (b"/kv/tenant", b"/kv/other", 0),
        (b"/kv/tenant/model", b"/kv/tenant/other", 0),
        (b"/d", b"/kv/tenant/model", 0),
        (b"/d", b"/kv", EXCHANGE),
    ):
        with pytest.raises(e.NotPermitted):
            rename(rig, old, new, flags)
    with pytest.raises(e.DirectoryNotEmpty):
        rename(rig, b"/d", b"/kv/tenant")
    assert rig.resolve(b"/kv/tenant/model").is_namespace
