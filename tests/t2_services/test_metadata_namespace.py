"""Files, directories, links, attributes and listings."""

from __future__ import annotations

import stat
from collections import Counter

import msgspec
import pytest

from kvfs_base import errors as e
from kvfs_base.limits import FILE_CHUNK_BYTES, STRIPE_MAX
from kvfs_base.types import Attr
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.cluster.placement import splitmix64
from kvfs_metadata.limits import LINKS_MAX
from t2_services.metadata_rig import DIRECTORY, FILE, ROOT, Rig, key, keys


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=3)


def test_the_start(rig: Rig) -> None:
    assert rig.names(ROOT) == [b"kv"]
    root, kv = rig.attr(ROOT), rig.resolve(b"/kv")
    assert root.is_dir and root.nlink == 3 and kv.is_dir and kv.nlink == 2
    assert not kv.is_namespace
    assert rig.resolve(b"/") == root == rig.resolve(b"")


def test_a_file_and_where_its_bytes_go(rig: Rig) -> None:
    attr = rig.make(ROOT, b"f", stat.S_IFREG | 0o640, uid=7, gid=8)
    assert (attr.mode, attr.uid, attr.gid, attr.nlink) == (stat.S_IFREG | 0o640, 7, 8, 1)
    assert attr.size == 0 and not attr.sparse
    assert attr.layout is not None and attr.layout.chunk_bytes == FILE_CHUNK_BYTES
    assert sorted(attr.layout.chains) == [1, 2, 3]
    assert rig.attr(attr.inode) == attr == rig.resolve(b"/f")
    assert rig.call(m.Lookup(ROOT, b"f")) == attr


def test_files_start_on_different_chains(rig: Rig) -> None:
    """In the order that docs/design/0004-chains.md names, so about as many on each."""
    first: Counter[int] = Counter()
    for n in range(60):
        attr = rig.make(ROOT, b"%d" % n)
        assert attr.layout is not None
        order = sorted((1, 2, 3), key=lambda chain: splitmix64((attr.inode << 32) + chain))
        assert attr.layout.chains == tuple(order)
        first[order[0]] += 1
    assert min(first.values()) > 10


def test_a_stripe_is_bounded() -> None:
    layout = Rig(targets=STRIPE_MAX + 4).make(ROOT, b"f").layout
    assert layout is not None and len(set(layout.chains)) == STRIPE_MAX


def test_no_target_no_file() -> None:
    rig = Rig(targets=0)
    with pytest.raises(e.NoTarget):
        rig.make(ROOT, b"f")
    assert rig.names(ROOT) == [b"kv"]
    rig.make(ROOT, b"d", DIRECTORY)  # needs no chunk


def test_times_are_the_clocks(rig: Rig) -> None:
    rig.advance(5)
    now = rig.clock.time_ns()
    attr = rig.make(ROOT, b"f")
    assert attr.atime_ns == attr.mtime_ns == attr.ctime_ns == now
    assert rig.attr(ROOT).mtime_ns == rig.attr(ROOT).ctime_ns == now
    rig.advance(5)
    rig.call(m.Unlink(ROOT, b"f"))
    assert rig.attr(ROOT).mtime_ns == rig.clock.time_ns()


def test_directories_count_their_subdirectories(rig: Rig) -> None:
    top = rig.mkdir(ROOT, b"top")
    assert rig.attr(top).nlink == 2
    rig.mkdir(top, b"a")
    rig.mkdir(top, b"b")
    rig.make(top, b"file")
    assert rig.attr(top).nlink == 4
    rig.call(m.Rmdir(top, b"a"))
    assert rig.attr(top).nlink == 3
    assert rig.attr(ROOT).nlink == 4


def test_set_group_id_directories_pass_their_group_on(rig: Rig) -> None:
    shared = rig.make(ROOT, b"shared", DIRECTORY | stat.S_ISGID, gid=50).inode
    assert rig.make(shared, b"f", gid=1).gid == 50
    below = rig.make(shared, b"d", DIRECTORY, gid=1)
    assert below.gid == 50 and below.mode & stat.S_ISGID


@pytest.mark.parametrize("name", [b".", b"..", b"a/b", b"nul\x00", b""])
def test_bad_names(rig: Rig, name: bytes) -> None:
    for request in (
        m.Make(ROOT, name, FILE),
        m.Lookup(ROOT, name),
        m.Unlink(ROOT, name),
        m.Rmdir(ROOT, name),
        m.Link(ROOT, ROOT, name),
        m.Rename(ROOT, name, ROOT, b"x"),
        m.Rename(ROOT, b"x", ROOT, name),
    ):
        with pytest.raises(e.InvalidRequest):
            rig.call(request)


def test_names_are_bytes_up_to_255(rig: Rig) -> None:
    longest = bytes(range(1, 47)) + bytes(range(48, 256)) + b"!"
    assert len(longest) == 255
    inode = rig.make(ROOT, longest).inode
    assert rig.call(m.Lookup(ROOT, longest)).inode == inode
    with pytest.raises(e.NameTooLong):
        rig.make(ROOT, b"x" * 256)


def test_an_existing_name(rig: Rig) -> None:
    first = rig.make(ROOT, b"f")
    with pytest.raises(e.EntryExists):
        rig.make(ROOT, b"f")
    assert rig.make(ROOT, b"f", stat.S_IFREG | 0o600, exclusive=False) == first
    with pytest.raises(e.EntryExists):
        rig.make(ROOT, b"f", DIRECTORY, exclusive=False)
    rig.mkdir(ROOT, b"d")
    with pytest.raises(e.EntryExists):
        rig.make(ROOT, b"d", exclusive=False)


def test_missing_and_wrong_parents(rig: Rig) -> None:
    file = rig.make(ROOT, b"f").inode
    for request in (
        m.Make(file, b"x", FILE),
        m.Lookup(file, b"x"),
        m.Unlink(file, b"x"),
        m.Rmdir(file, b"x"),
        m.ReadDir(file),
        m.Link(file, file, b"x"),
        m.Resolve(b"/f/x"),
    ):
        with pytest.raises(e.NotADirectory):
            rig.call(request)
    for request in (
        m.Make(999_999, b"x", FILE),
        m.Lookup(999_999, b"x"),
        m.GetAttr(999_999),
        m.SetAttr(999_999, mode=0),
        m.ReadDir(999_999),
        m.ReadLink(999_999),
        m.OpenInode(999_999),
        m.ListXattr(999_999),
        m.GetXattr(999_999, b"user.x"),
        m.Link(999_999, ROOT, b"x"),
    ):
        with pytest.raises(e.InodeStale):
            rig.call(request)
    for request in (
        m.Lookup(ROOT, b"x"),
        m.Unlink(ROOT, b"x"),
        m.Rmdir(ROOT, b"x"),
        m.Resolve(b"/x/y"),
    ):
        with pytest.raises(e.EntryNotFound):
            rig.call(request)


def test_symbolic_links(rig: Rig) -> None:
    attr = rig.make(ROOT, b"s", stat.S_IFLNK | 0o777, target=b"../x/\xff")
    assert stat.S_ISLNK(attr.mode) and attr.size == 6 and attr.layout is None
    assert rig.call(m.ReadLink(attr.inode)) == b"../x/\xff"
    with pytest.raises(e.InvalidRequest):
        rig.make(ROOT, b"t", stat.S_IFLNK | 0o777)
    with pytest.raises(e.InvalidRequest):
        rig.call(m.ReadLink(ROOT))
    with pytest.raises(e.NotADirectory):  # not followed
        rig.resolve(b"/s/x")


def test_special_files(rig: Rig) -> None:
    fifo = rig.make(ROOT, b"fifo", stat.S_IFIFO | 0o600)
    device = rig.make(ROOT, b"null", stat.S_IFCHR | 0o666, rdev=0x103)
    assert stat.S_ISFIFO(fifo.mode) and device.rdev == 0x103
    with pytest.raises(e.InvalidRequest):
        rig.make(ROOT, b"what", 0o170000)
    with pytest.raises(e.InvalidRequest):
        rig.make(ROOT, b"what", 0o644)


def test_hard_links(rig: Rig) -> None:
    file = rig.make(ROOT, b"a")
    directory = rig.mkdir(ROOT, b"d")
    rig.advance(1)
    linked = rig.call(m.Link(file.inode, directory, b"b"))
    assert linked.nlink == 2 and linked.ctime_ns == rig.clock.time_ns()
    assert rig.resolve(b"/d/b") == linked
    with pytest.raises(e.EntryExists):
        rig.call(m.Link(file.inode, directory, b"b"))
    with pytest.raises(e.NotPermitted):
        rig.call(m.Link(directory, ROOT, b"again"))
    assert rig.call(m.Unlink(ROOT, b"a")).nlink == 1
    assert rig.attr(file.inode).nlink == 1
    assert rig.call(m.Unlink(directory, b"b")).nlink == 0
    with pytest.raises(e.InodeStale):
        rig.attr(file.inode)


def test_links_are_bounded(rig: Rig) -> None:
    file = rig.make(ROOT, b"a").inode
    stored = records.decode_inode(rig.dump(records.inode_key(file)).popitem()[1])
    stored.nlink = LINKS_MAX
    rig.engine.update([lambda kv: kv.put(records.inode_key(file), records.encode(stored))])
    with pytest.raises(e.TooManyLinks):
        rig.call(m.Link(file, ROOT, b"b"))
    assert rig.names(ROOT) == [b"a", b"kv"]


def test_rmdir_refuses(rig: Rig) -> None:
    top = rig.mkdir(ROOT, b"top")
    rig.make(top, b"f")
    with pytest.raises(e.DirectoryNotEmpty):
        rig.call(m.Rmdir(ROOT, b"top"))
    with pytest.raises(e.NotADirectory):
        rig.call(m.Rmdir(top, b"f"))
    with pytest.raises(e.IsADirectory):
        rig.call(m.Unlink(ROOT, b"top"))
    with pytest.raises(e.NotPermitted):
        rig.call(m.Rmdir(ROOT, b"kv"))
    rig.call(m.Unlink(top, b"f"))
    rig.call(m.Rmdir(ROOT, b"top"))
    with pytest.raises(e.InodeStale):
        rig.attr(top)


def test_an_emptied_store_is_as_new(rig: Rig) -> None:
    """No key is left behind by anything that was made and removed."""
    before = rig.dump()
    top = rig.mkdir(ROOT, b"top")
    file = rig.make(top, b"f").inode
    rig.call(m.SetXattr(file, b"user.a", b"1"))
    rig.call(m.SetXattr(top, b"user.b", b"2"))
    rig.call(m.Link(file, top, b"g"))
    rig.make(top, b"s", stat.S_IFLNK, target=b"x")
    for name in (b"f", b"g", b"s"):
        rig.call(m.Unlink(top, name))
    rig.call(m.Rmdir(ROOT, b"top"))
    after = rig.dump()
    kinds = {k[:4] for k in after.keys() - before.keys()}
    assert kinds <= {records.COUNTER, records.REMOVAL, records.REMOVAL_STATE}
    assert after[records.USAGE_KEY] == before[records.USAGE_KEY]


def test_set_attr(rig: Rig) -> None:
    file = rig.make(ROOT, b"f")
    rig.advance(1)
    now = rig.clock.time_ns()
    changed = rig.call(m.SetAttr(file.inode, mode=0o4711, uid=1, gid=2))
    assert changed.mode == stat.S_IFREG | 0o4711 and (changed.uid, changed.gid) == (1, 2)
    assert changed.ctime_ns == now and changed.mtime_ns == file.mtime_ns
    changed = rig.call(m.SetAttr(file.inode, atime_ns=-5, mtime_ns=10**18))
    assert (changed.atime_ns, changed.mtime_ns) == (-5, 10**18)
    assert rig.call(m.SetAttr(file.inode, mode=stat.S_IFDIR | 0o700)).is_file


def test_sizes(rig: Rig) -> None:
    file = rig.make(ROOT, b"f").inode
    assert rig.call(m.SetAttr(file, size=100)).size == 100
    assert rig.call(m.SetAttr(file, grow_to=50)).size == 100
    rig.advance(1)
    grown = rig.call(m.SetAttr(file, grow_to=150))
    assert grown.size == 150 and grown.mtime_ns == rig.clock.time_ns()
    assert rig.call(m.StatFs()).used_bytes == 150
    rig.call(m.SetAttr(file, size=10))
    assert rig.call(m.StatFs()).used_bytes == 10
    sparse = rig.call(m.SetAttr(file, size=1 << 40, sparse=True))
    assert sparse.sparse and rig.call(m.SetAttr(file, mode=0o600)).sparse
    assert rig.call(m.StatFs()).used_bytes == 0, "holes fill no disk"
    with pytest.raises(e.IsADirectory):
        rig.call(m.SetAttr(ROOT, size=1))
    link = rig.make(ROOT, b"s", stat.S_IFLNK, target=b"x").inode
    with pytest.raises(e.InvalidRequest):
        rig.call(m.SetAttr(link, size=1))


def test_statfs_counts(rig: Rig) -> None:
    before = rig.call(m.StatFs())
    assert before.inodes == 2 and before.used_bytes == 0
    top = rig.mkdir(ROOT, b"d")
    file = rig.make(top, b"f").inode
    rig.call(m.SetAttr(file, size=1000))
    rig.put(rig.namespace(), [1, 2], size=500)
    stats = rig.call(m.StatFs())
    assert stats.inodes == 2 + 2 + 2 + 2  # the namespace is two directories
    assert stats.used_bytes == 2000
    rig.restart()
    assert rig.call(m.StatFs()) == stats


def test_listing_by_pages(rig: Rig) -> None:
    top = rig.mkdir(ROOT, b"d")
    names = sorted(b"%d" % n for n in range(25))
    for name in names:
        rig.make(top, name)
    found: list[bytes] = []
    after = b""
    while True:
        page = rig.call(m.ReadDir(top, after, 10))
        found += [name for name, _ in page.entries]
        if not page.more:
            break
        after = page.entries[-1][0]
        rig.call(m.Unlink(top, page.entries[-1][0]))  # the cookie need not exist any more
    assert found == names
    assert len(rig.call(m.ReadDir(top, b"", 1)).entries) == 1
    assert rig.call(m.ReadDir(top, b"\xff")).entries == ()


def test_listing_answers_with_attributes(rig: Rig) -> None:
    top = rig.mkdir(ROOT, b"d")
    file = rig.make(top, b"f")
    below = rig.make(top, b"g", DIRECTORY)
    assert dict(rig.call(m.ReadDir(top)).entries) == {b"f": file, b"g": below}
    # A neighbour's entries, whose inode number is one higher, are not shown.
    rig.make(below.inode, b"other")
    assert rig.names(top) == [b"f", b"g"]


def test_xattrs(rig: Rig) -> None:
    file = rig.make(ROOT, b"f").inode
    rig.advance(1)
    rig.call(m.SetXattr(file, b"user.b", b"2"))
    rig.call(m.SetXattr(file, b"user.a", b""))
    assert rig.attr(file).ctime_ns == rig.clock.time_ns()
    assert rig.call(m.ListXattr(file)) == (b"user.a", b"user.b")
    assert rig.call(m.GetXattr(file, b"user.b")) == b"2"
    assert rig.call(m.GetXattr(file, b"user.a")) == b""
    with pytest.raises(e.EntryExists):
        rig.call(m.SetXattr(file, b"user.a", b"1", 1))
    with pytest.raises(e.AttributeMissing):
        rig.call(m.SetXattr(file, b"user.c", b"1", 2))
    with pytest.raises(e.InvalidRequest):
        rig.call(m.SetXattr(file, b"user.c", b"1", 3))
    with pytest.raises(e.NotPermitted):
        rig.call(m.SetXattr(file, b"user.kvfs.x", b"1"))
    rig.call(m.SetXattr(file, b"user.a", b"new", 2))
    rig.call(m.RemoveXattr(file, b"user.b"))
    for request in (m.GetXattr(file, b"user.b"), m.RemoveXattr(file, b"user.b")):
        with pytest.raises(e.AttributeMissing):
            rig.call(request)
    assert rig.call(m.ListXattr(file)) == (b"user.a",)


def test_a_namespace_is_a_directory_of_blocks(rig: Rig) -> None:
    namespace = rig.namespace("tenant/model")
    batch = rig.put(namespace, [1, 2, 3], size=4096)
    attr = rig.resolve(b"/kv/tenant/model")
    assert attr.inode == namespace and attr.is_namespace and attr.is_dir
    names = sorted(key(n).hex().encode() for n in (1, 2, 3))
    page = rig.call(m.ReadDir(namespace))
    assert [name for name, _ in page.entries] == names and not page.more
    first = rig.call(m.ReadDir(namespace, b"", 2))
    assert first.more and [n for n, _ in first.entries] == names[:2]
    assert [n for n, _ in rig.call(m.ReadDir(namespace, names[1])).entries] == names[2:]
    with pytest.raises(e.InvalidRequest):
        rig.call(m.ReadDir(namespace, b"zz"))
    block = rig.call(m.Lookup(namespace, key(2).hex().encode()))
    prepared = batch.blocks[1]
    assert prepared is not None
    assert block.mode == stat.S_IFREG | 0o444 and block.is_block and block.nlink == 1
    assert (block.inode, block.size, block.key, block.crc32c) == (
        prepared.inode,
        4096,
        key(2),
        1,
    )
    assert block.layout is not None and block.layout.chains == (prepared.chain,)
    assert block.layout.chunk_bytes == 4096
    assert rig.attr(block.inode) == block == dict(page.entries)[key(2).hex().encode()]
    assert rig.resolve(b"kv/tenant/model/" + key(2).hex().encode()) == block


def test_listings_keep_up_with_a_namespace(rig: Rig) -> None:
    def listed() -> list[bytes]:
        names: list[bytes] = []
        while True:
            page = rig.call(m.ReadDir(namespace, names[-1] if names else b"", 7))
            names += [name for name, _ in page.entries]
            if not page.more:
                return names

    def expected(numbers: list[int]) -> list[bytes]:
        return sorted(key(n).hex().encode() for n in numbers)

    namespace = rig.namespace()
    assert listed() == []
    rig.put(namespace, range(20))
    assert listed() == expected(list(range(20)))
    rig.call(m.RemoveBlocks(namespace, keys(range(10))))
    rig.put(namespace, range(5, 8))  # known to the listing already, and stored again
    assert listed() == expected([5, 6, 7, *range(10, 20)])
    for _ in range(80):  # enough for the listing to be made anew
        rig.call(m.RemoveBlocks(namespace, keys(range(20))))
        rig.put(namespace, range(20))
    assert listed() == expected(list(range(20)))


def test_what_a_namespace_and_its_blocks_refuse(rig: Rig) -> None:
    namespace = rig.namespace("tenant/model")
    rig.put(namespace, [1])
    file = rig.make(ROOT, b"f").inode
    name = key(1).hex().encode()
    block = rig.call(m.Lookup(namespace, name)).inode
    for request in (
        m.Make(namespace, b"f", FILE),
        m.Make(namespace, b"d", DIRECTORY),
        m.Link(file, namespace, b"f"),
        m.Link(block, ROOT, b"f2"),
        m.SetAttr(block, mode=0o600),
        m.SetXattr(block, b"user.x", b""),
        m.RemoveXattr(block, b"user.x"),
        m.ReadLink(block),
        m.Rename(namespace, name, ROOT, b"x"),
        m.Rename(ROOT, b"f", namespace, b"x"),
    ):
        with pytest.raises(e.NotPermitted):
            rig.call(request)
    for request in (
        m.Make(block, b"f", FILE),
        m.Lookup(block, b"f"),
        m.ReadDir(block),
        m.Rmdir(namespace, name),
    ):
        with pytest.raises(e.NotADirectory):
            rig.call(request)
    for missing in (key(9).hex().encode(), name.upper(), b"f", name[:-1]):
        with pytest.raises(e.EntryNotFound):
            rig.call(m.Lookup(namespace, missing))
        with pytest.raises(e.EntryNotFound):
            rig.call(m.Unlink(namespace, missing))
    with pytest.raises(e.DirectoryNotEmpty):
        rig.call(m.Rmdir(rig.resolve(b"/kv/tenant").inode, b"model"))


def test_unlinking_a_block_removes_it(rig: Rig) -> None:
    namespace = rig.namespace()
    rig.put(namespace, [1, 2])
    gone = rig.call(m.Unlink(namespace, key(1).hex().encode()))
    assert gone.nlink == 0 and gone.key == key(1)
    assert rig.match(namespace, [1]) == 0 and rig.match(namespace, [2]) == 1
    with pytest.raises(e.InodeStale):
        rig.attr(gone.inode)
    chain = gone.layout.chains[0] if gone.layout else 0
    assert [i for _, i in rig.removals(f"target-{chain}")] == [gone.inode]


def test_own_attributes_of_blocks_and_namespaces(rig: Rig) -> None:
    namespace = rig.namespace()
    rig.put(namespace, [1])
    block = rig.call(m.Lookup(namespace, key(1).hex().encode())).inode
    names = rig.call(m.ListXattr(block))
    assert names == tuple(
        b"user.kvfs." + n for n in (b"crc32c", b"generation", b"key", b"last_use_ns")
    )
    assert rig.call(m.GetXattr(block, b"user.kvfs.key")) == key(1).hex().encode()
    assert rig.call(m.GetXattr(block, b"user.kvfs.generation")) == b"%d" % block
    layout = msgspec.json.decode(rig.call(m.GetXattr(namespace, b"user.kvfs.layout")))
    assert layout["block_tokens"] == 16 and layout["model"] == "test"
    with pytest.raises(e.AttributeMissing):
        rig.call(m.GetXattr(block, b"user.other"))
    rig.call(m.SetXattr(namespace, b"user.note", b"mine"))
    assert rig.call(m.ListXattr(namespace)) == (b"user.kvfs.layout", b"user.note")


def test_reads_among_writes_see_them(rig: Rig) -> None:
    made, listed, _, after = rig.calls(
        [m.Make(ROOT, b"f", FILE), m.ReadDir(ROOT), m.Unlink(ROOT, b"f"), m.ReadDir(ROOT)]
    )
    assert isinstance(made, Attr)
    assert [n for n, _ in listed.entries] == [b"f", b"kv"]
    assert [n for n, _ in after.entries] == [b"kv"]


def test_inode_numbers_are_never_used_again(rig: Rig) -> None:
    seen: set[int] = set()
    for _ in range(3):
        for n in range(5):
            inode = rig.make(ROOT, b"%d" % n).inode
            assert inode not in seen
            seen.add(inode)
            rig.call(m.Unlink(ROOT, b"%d" % n))
        namespace = rig.namespace()
        inodes = [b.inode for b in rig.prepare(namespace, [1, 2, 3]).blocks if b]
        assert not seen.intersection(inodes)
        seen.update(inodes)
        rig.restart()
        rig.heartbeat()


def test_a_failed_commit_leaves_no_trace(rig: Rig) -> None:
    def fail(writes: dict[bytes, bytes | None]) -> None:
        raise e.DiskFull(path="x")

    namespace = rig.namespace()
    rig.put(namespace, [1, 2])
    prepared = rig.prepare(namespace, [3])
    before, listing = rig.dump(), rig.call(m.ReadDir(ROOT))
    numbers = rig.statistics()
    rig.engine.before_commit = fail
    for request in (
        m.Make(ROOT, b"f", FILE),
        m.OpenNamespace("a/b", rig.core.index.namespaces[namespace].layout, create=True),
        m.PrepareBlocks(namespace, keys([7]), (10,)),
        m.CommitBlocks(prepared.batch_id, (1,)),
        m.AbortBlocks(prepared.batch_id),
        m.RemoveBlocks(namespace, keys([1, 2])),
        m.Unlink(namespace, key(1).hex().encode()),
    ):
        with pytest.raises(e.DiskFull):
            rig.call(request)
    rig.engine.before_commit = lambda writes: None
    assert rig.dump() == before and rig.call(m.ReadDir(ROOT)) == listing
    found = rig.statistics()
    assert {k: v for k, v in found.items() if k != "requests"} == {
        k: v for k, v in numbers.items() if k != "requests"
    }
    rig.commit(prepared)
    assert rig.match(namespace, [1, 2, 3]) == 3
