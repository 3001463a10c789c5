"""Quotas of directories: what counts, what is refused, and that the counts stay true."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfs.cli.quota import quota as quota_command
from kvfs_base import errors as e
from kvfs_metadata import messages as m
from kvfs_metadata import quotas, records
from kvfs_metadata.check import fixes
from kvfs_metadata.check.fixes import Verdict
from metadata_checks import fsck_findings, problems
from t2_services.metadata_rig import DIRECTORY, FILE, ROOT, Rig, key, keys
from t2_services.metadata_stage import blocking_stage
from t2_services.test_copies_commands import run
from t2_services.test_metadata_follow import Pair


@pytest.fixture
def rig() -> Rig:
    return Rig(targets=2)


def grow(rig: Rig, inode: int, size: int) -> None:
    rig.call(m.SetAttr(inode, grow_to=size))


def quota(rig: Rig, inode: int) -> m.QuotaInfo:
    found = rig.call(m.GetQuota(inode))
    assert found is not None
    return found  # type: ignore[no-any-return]


def used(rig: Rig, inode: int) -> tuple[int, int]:
    found = quota(rig, inode)
    return found.bytes_used, found.inodes


def check(rig: Rig) -> None:
    assert problems(rig.dump()) + fsck_findings(rig.dump()) == []


def limited(rig: Rig, name: bytes = b"limited", bytes_max: int = 1000, inodes_max: int = 0) -> int:
    directory = rig.mkdir(ROOT, name)
    rig.call(m.SetQuota(directory, bytes_max, inodes_max))
    return directory


def test_files_count_for_their_size(rig: Rig) -> None:
    directory = limited(rig)
    assert rig.call(m.GetQuota(ROOT)) is None
    inner = rig.mkdir(directory, b"inner")
    file = rig.make(inner, b"file")
    assert file.quota == directory == rig.attr(inner).quota == rig.attr(directory).quota
    grow(rig, file.inode, 600)
    rig.call(m.SetAttr(file.inode, size=700, sparse=True))
    assert used(rig, file.inode) == (700, 3)
    with pytest.raises(e.QuotaExceeded) as caught:
        grow(rig, file.inode, 1001)
    found = caught.value
    assert (found.what, found.needed, found.used, found.limit) == ("bytes", 301, 700, 1000)
    assert found.directory == directory
    assert rig.attr(file.inode).size == 700, "what is refused changes nothing"
    grow(rig, file.inode, 1000)
    other = rig.make(directory, b"other")
    with pytest.raises(e.QuotaExceeded):
        rig.call(m.SetAttr(other.inode, size=1))
    rig.call(m.SetAttr(file.inode, size=0))
    grow(rig, other.inode, 1000)
    assert used(rig, inner) == (1000, 4)
    rig.call(m.Unlink(directory, b"other"))
    assert used(rig, inner) == (0, 3)
    check(rig)


def test_an_unlinked_file_counts_until_it_is_closed(rig: Rig) -> None:
    directory = limited(rig)
    file = rig.make(directory, b"file", open=True)
    grow(rig, file.inode, 900)
    rig.call(m.Unlink(directory, b"file"))
    assert used(rig, directory) == (900, 2)
    rig.call(m.CloseInode(file.inode))
    assert used(rig, directory) == (0, 1)
    # One that outlives its directory counts for nothing.
    last = rig.make(directory, b"last", open=True)
    grow(rig, last.inode, 900)
    rig.call(m.Unlink(directory, b"last"))
    rig.call(m.Rmdir(ROOT, b"limited"))
    assert rig.call(m.GetQuota(last.inode)) is None
    grow(rig, last.inode, 5000)
    check(rig)
    rig.call(m.CloseInode(last.inode))
    check(rig)
    assert rig.dump(records.QUOTA) == {}


def test_inodes_are_bounded(rig: Rig) -> None:
    directory = limited(rig, bytes_max=0, inodes_max=3)
    file = rig.make(directory, b"file")
    grow(rig, file.inode, 1 << 40)  # bytes are not
    rig.mkdir(directory, b"inner")
    with pytest.raises(e.QuotaExceeded) as caught:
        rig.make(directory, b"one too many")
    assert caught.value.what == "inodes"
    with pytest.raises(e.QuotaExceeded):
        rig.make(directory, b"link", stat.S_IFLNK | 0o777, target=b"x")
    rig.call(m.Link(file.inode, directory, b"a second name is no second file"))
    rig.call(m.Rmdir(directory, b"inner"))
    rig.make(directory, b"now")
    assert rig.names(directory) == [b"a second name is no second file", b"file", b"now"]
    check(rig)


def test_nothing_gets_from_one_below_another(rig: Rig) -> None:
    one, two = limited(rig, b"one"), limited(rig, b"two")
    file = rig.make(one, b"file")
    outside = rig.make(ROOT, b"outside")
    for request in (
        m.Rename(one, b"file", two, b"file"),
        m.Rename(one, b"file", ROOT, b"file"),
        m.Rename(ROOT, b"outside", one, b"outside"),
        m.Rename(ROOT, b"outside", one, b"file", 2),  # exchange
        m.Link(file.inode, two, b"file"),
        m.Link(file.inode, ROOT, b"file"),
        m.Link(outside.inode, one, b"outside"),
    ):
        with pytest.raises(e.CrossesQuota):
            rig.call(request)
    inner = rig.mkdir(one, b"inner")
    rig.call(m.Rename(one, b"file", inner, b"moved"))
    # A directory with a quota of its own may lie anywhere.
    rig.call(m.Rename(ROOT, b"two", inner, b"two"))
    assert rig.attr(rig.make(two, b"new").inode).quota == two
    assert used(rig, one) == (0, 3)
    check(rig)
    assert e.CrossesQuota.posix_errno == 18 and e.QuotaExceeded.posix_errno == 122


def test_what_lies_there_already_counts(rig: Rig) -> None:
    top = rig.mkdir(ROOT, b"top")
    inner = rig.mkdir(top, b"inner")
    file = rig.make(inner, b"file")
    rig.call(m.Link(file.inode, top, b"second name"))
    grow(rig, file.inode, 5000)
    before = rig.call(m.SetQuota(top, bytes_max=10_000))
    assert before == m.QuotaInfo(top, 10_000, 0, 5000, 3)
    # The inner one takes its own out of the outer one.
    with pytest.raises(e.InvalidRequest):
        rig.call(m.SetQuota(inner, bytes_max=100))  # the file has a name outside
    rig.call(m.Unlink(top, b"second name"))
    assert rig.call(m.SetQuota(inner, bytes_max=100)).bytes_used == 5000  # more than it may
    assert used(rig, top) == (0, 1)
    with pytest.raises(e.QuotaExceeded):
        grow(rig, file.inode, 5001)
    rig.call(m.SetAttr(file.inode, size=200))  # less is always possible
    rig.call(m.SetQuota(inner, inodes_max=7))
    assert quota(rig, file.inode) == m.QuotaInfo(inner, 100, 7, 200, 2)
    rig.call(m.SetQuota(inner, bytes_max=0))
    grow(rig, file.inode, 1 << 50)
    check(rig)
    with pytest.raises(e.NotADirectory):
        rig.call(m.SetQuota(file.inode, bytes_max=1))


def test_too_much_to_be_counted_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "QUOTA_INODES_MAX", 5)
    top = rig.mkdir(ROOT, b"top")
    for n in range(5):
        rig.make(top, b"%d" % n)
    before = rig.dump()
    with pytest.raises(e.LimitExceeded):
        rig.call(m.SetQuota(top, bytes_max=1))
    assert rig.dump() == before
    rig.call(m.Unlink(top, b"0"))
    assert rig.call(m.SetQuota(top, bytes_max=1)).inodes == 5


def test_blocks_give_way_to_new_ones_of_the_same_quota(rig: Rig) -> None:
    mine, second = rig.namespace("mine/model"), rig.namespace("mine/other")
    theirs = rig.namespace("theirs/model")
    tenant = rig.resolve(b"/kv/mine").inode
    rig.put(mine, [1, 2])
    rig.put(theirs, [1, 2, 3])
    assert rig.call(m.SetQuota(tenant, bytes_max=6000)).bytes_used == 2000
    rig.put(second, [3, 4, 5])
    rig.match(mine, [1])  # so 2 is the oldest
    late = rig.prepare(mine, [6])
    assert used(rig, tenant) == (6000, 3), "what is being written counts"
    rig.put(second, [7])
    assert rig.stored(mine, [1, 2]) == [1]
    rig.commit(late)
    assert rig.stored(mine, [6]) == [6] and rig.stored(theirs, [1, 2, 3]) == [1, 2, 3]
    assert used(rig, tenant) == (6000, 3)
    rig.call(m.RemoveBlocks(mine, key(1)))
    assert used(rig, tenant) == (5000, 3)
    with pytest.raises(e.QuotaExceeded) as caught:
        rig.call(m.PrepareBlocks(mine, keys(list(range(20, 27))), (1000,) * 7))
    assert caught.value.limit == 6000
    assert used(rig, tenant) == (5000, 3), "and nothing was evicted for it"
    rig.restart()
    assert used(rig, rig.call(m.LookupBlocks(mine, key(6)))[0].inode) == (5000, 3)
    check(rig)


def test_a_full_quota_gives_up_some_at_once(rig: Rig) -> None:
    namespace = rig.namespace()
    rig.call(m.SetQuota(namespace, bytes_max=256_000))
    for n in range(0, 256, 64):
        rig.put(namespace, list(range(n, n + 64)))
    rig.put(namespace, [300])
    # Of a request the end of the prefix goes first.
    assert len(rig.stored(namespace, list(range(256)))) == 256 - 256 // 64
    assert rig.stored(namespace, [60, 61, 62, 63]) == []
    assert rig.statistics()["evicted_blocks"] == 4


def test_files_and_blocks_share_a_quota(rig: Rig) -> None:
    rig.call(m.SetQuota(ROOT, bytes_max=5000))
    namespace = rig.namespace()
    file = rig.make(ROOT, b"file")
    rig.put(namespace, [1, 2, 3])
    grow(rig, file.inode, 2000)
    with pytest.raises(e.QuotaExceeded):  # blocks make room for blocks alone
        grow(rig, file.inode, 2001)
    rig.put(namespace, [4])
    assert len(rig.stored(namespace, [1, 2, 3, 4])) == 3
    assert used(rig, ROOT) == (5000, 5)
    check(rig)


def test_statfs_shows_what_is_left(rig: Rig) -> None:
    directory = limited(rig, bytes_max=10_000, inodes_max=7)
    file = rig.make(directory, b"file")
    grow(rig, file.inode, 4000)
    whole = rig.call(m.StatFs())
    assert whole.used_bytes == 4000 and whole.inodes_max == 0
    assert rig.call(m.StatFs(file.inode)) == m.FilesystemStats(10_000, 4000, 2, 7)
    assert rig.call(m.StatFs(ROOT)) == whole
    rig.call(m.SetQuota(directory, bytes_max=3000))
    assert rig.call(m.StatFs(directory)).capacity_bytes == 4000  # full, and more than that
    rig.call(m.SetQuota(directory, bytes_max=1 << 60))
    left = whole.capacity_bytes - whole.used_bytes
    assert rig.call(m.StatFs(directory)).capacity_bytes == 4000 + left


def test_servers_follow_each_other() -> None:
    pair = Pair()
    rig = pair.on(0)
    tenant = rig.resolve(b"/kv/tenant").inode
    rig.call(m.SetQuota(tenant, bytes_max=3000))
    rig.put(rig.namespace("tenant/second"), [1])
    rig = pair.on(1)
    assert used(rig, tenant)[0] == 2000
    rig.prepare(pair.namespace, [2])
    rig.put(pair.namespace, [3])  # one of two goes
    counted = used(rig, tenant)
    assert used(pair.on(0), tenant) == counted == (3000, 3)
    pair.check_equal()
    assert [{q: set(n) for q, n in core.index.by_quota.items()} for core in pair.cores] == [
        {tenant: {pair.namespace, rig.namespace("tenant/second")}}
    ] * 2


def test_damage_is_found_and_repaired(rig: Rig) -> None:
    directory = limited(rig)
    file = rig.make(directory, b"file")
    grow(rig, file.inode, 100)

    def write(inode: int, record: records.QuotaRecord) -> None:
        rig.core.update([lambda tx: tx.kv.put(records.quota_key(inode), records.encode(record))])

    write(directory, records.QuotaRecord(1000, 0, 99, 9))
    write(12345, records.QuotaRecord(1, 0))
    assert len(fsck_findings(rig.dump())) == 2
    both = (fixes.SetQuotaUsage(directory), fixes.SetQuotaUsage(12345))
    assert rig.call(fixes.RepairRecords(both, dry=True)) == (Verdict.DONE,) * 2
    assert rig.call(fixes.RepairRecords(both)) == (Verdict.DONE,) * 2
    assert rig.call(fixes.RepairRecords(both)) == (Verdict.GONE,) * 2
    assert used(rig, directory) == (100, 2)
    check(rig)


class Tree(RuleBasedStateMachine):
    """Random operations below three directories with quotas, one in another: the records say what
    a count of everything says, and no bound is passed by anything that grows."""

    BOUND = 5000

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(targets=2)

    @initialize()
    def make_directories(self) -> None:
        outer = limited(self.rig, b"outer", self.BOUND, 12)
        inner = self.rig.mkdir(outer, b"inner")
        self.rig.call(m.SetQuota(inner, self.BOUND))
        self.namespace = self.rig.namespace()
        self.rig.call(m.SetQuota(self.rig.resolve(b"/kv/tenant").inode, self.BOUND))
        self.directories = [ROOT, outer, inner, self.rig.mkdir(outer, b"plain")]

    def attempt(self, request: Any) -> Any:
        refusals = (e.NamespaceError, e.CapacityError, e.InvalidRequest)
        try:
            return self.rig.call(request)
        except refusals:
            return None

    places = st.integers(0, 3)
    names_ = st.sampled_from([b"a", b"b", b"c"])

    @rule(
        place=places,
        name=names_,
        mode=st.sampled_from([FILE, DIRECTORY]),
        size=st.integers(1, 6000),
    )
    def make(self, place: int, name: bytes, mode: int, size: int) -> None:
        attr = self.attempt(m.Make(self.directories[place], name, mode, open=mode == FILE))
        if attr is not None and mode == FILE:
            self.attempt(m.SetAttr(attr.inode, grow_to=size))

    @rule(place=places, name=names_, size=st.integers(0, 8000))
    def resize(self, place: int, name: bytes, size: int) -> None:
        attr = self.attempt(m.Lookup(self.directories[place], name))
        if attr is not None:
            self.attempt(m.SetAttr(attr.inode, size=size))

    @rule(place=places, name=names_, to=places, new=names_, flags=st.sampled_from([0, 0, 2]))
    def move(self, place: int, name: bytes, to: int, new: bytes, flags: int) -> None:
        one, other = self.directories[place], self.directories[to]
        self.attempt(m.Rename(one, name, other, new, flags))

    @rule(place=places, name=names_, to=places, new=names_)
    def link(self, place: int, name: bytes, to: int, new: bytes) -> None:
        attr = self.attempt(m.Lookup(self.directories[place], name))
        if attr is not None:
            self.attempt(m.Link(attr.inode, self.directories[to], new))

    @rule(place=places, name=names_)
    def remove(self, place: int, name: bytes) -> None:
        self.attempt(m.Unlink(self.directories[place], name))
        self.attempt(m.Rmdir(self.directories[place], name))

    @rule()
    def close(self) -> None:
        for key_ in self.rig.dump(records.ORPHAN):
            self.attempt(m.CloseInode(records.number_at(key_)))

    @rule(
        names=st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True),
        commit=st.booleans(),
    )
    def put(self, names: list[int], commit: bool) -> None:
        batch = self.attempt(m.PrepareBlocks(self.namespace, keys(names), (1500,) * len(names)))
        if batch is not None and commit:
            self.rig.commit(batch)
        elif batch is not None:
            self.rig.call(m.AbortBlocks(batch.batch_id))

    @rule()
    def restart(self) -> None:
        self.rig.restart()
        self.rig.advance(31)

    @invariant()
    def counts_are_true(self) -> None:
        check(self.rig)
        for key_ in self.rig.dump(records.QUOTA):
            found = quota(self.rig, records.number_at(key_))
            assert found.bytes_used <= found.bytes_max
            assert not found.inodes_max or found.inodes <= found.inodes_max


TestTree = Tree.TestCase
TestTree.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_the_commands(tmp_path: Path) -> None:
    with blocking_stage(tmp_path) as stage:
        directory = stage.rig.mkdir(ROOT, b"d")
        assert run(quota_command, "show", stage.address, "/d") == "no quota\n"
        assert run(quota_command, "show", stage.address, "/d", "--json") == "null\n"
        assert run(quota_command, "set", stage.address, "/d", "10K", "--inodes", 5) == (
            "bytes   0 B of 10.0 KiB\ninodes  1 of 5\n"
        )
        grow(stage.rig, stage.rig.make(directory, b"f").inode, 5120)
        found = json.loads(run(quota_command, "show", stage.address, "/d/f", "--json"))
        assert found == {
            "directory": directory, "bytes_max": 10240, "inodes_max": 5, "bytes_used": 5120,
            "inodes": 2,
        }  # fmt: skip
        text = run(quota_command, "set", stage.address, "/d", "none")
        assert text == "bytes   5.0 KiB of no bound\ninodes  2 of 5\n"
        for size in ("0", "-5", "much"):
            with pytest.raises(SystemExit):
                run(quota_command, "set", stage.address, "/d", size)
