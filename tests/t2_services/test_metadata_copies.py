"""How many copies directories want, and the chains that these make."""

from __future__ import annotations

import pytest

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import GetClusterMap, Heartbeat, TargetReport
from kvfs_metadata import messages as m
from kvfs_metadata.xattrs import COPIES
from t2_services.metadata_rig import DIRECTORY, LAYOUT, ROOT, TERABYTE, Rig


def beat(rig: Rig, name: str, host: str, rack: str = "", free: int = TERABYTE) -> None:
    report = TargetReport(name, TERABYTE, free, True, 0)
    rig.call(Heartbeat(name, "one machine", None, None, (report,), host=host, rack=rack))


@pytest.fixture
def rig() -> Rig:
    found = Rig(targets=0)
    for number in range(3):
        beat(found, f"disk-{number}", f"host-{number}")
    return found


def set_copies(rig: Rig, inode: int, value: bytes, flags: int = 0) -> None:
    rig.call(m.SetXattr(inode, COPIES, value, flags))


def copies(rig: Rig, inode: int) -> bytes:
    found: bytes = rig.call(m.GetXattr(inode, COPIES))
    return found


def copies_of_chains(rig: Rig, inode: int) -> set[int]:
    layout = rig.attr(inode).layout
    assert layout is not None
    by_id = {chain.chain_id: chain.copies for chain in rig.call(GetClusterMap()).chains}
    return {by_id[chain] for chain in layout.chains}


def test_directories_inherit_what_their_parent_says(rig: Rig) -> None:
    plain, safe = rig.mkdir(ROOT, b"plain"), rig.mkdir(ROOT, b"safe")
    set_copies(rig, safe, b"2")
    below = rig.mkdir(safe, b"below")
    assert [copies(rig, inode) for inode in (ROOT, plain, safe, below)] == [b"1", b"1", b"2", b"2"]
    file = rig.make(below, b"f").inode
    layout = rig.attr(file).layout
    assert layout is not None and layout.chunk_bytes == limits.CHAIN_CHUNK_BYTES
    assert copies_of_chains(rig, file) == {2} and copies(rig, file) == b"2"
    set_copies(rig, safe, b"3")
    assert copies(rig, below) == copies(rig, file) == b"2", "what exists stays what it is"
    assert copies_of_chains(rig, rig.make(safe, b"g").inode) == {3}
    rig.restart()
    assert copies(rig, safe) == b"3"


def test_only_directories_that_were_asked_list_it(rig: Rig) -> None:
    """Whoever copies attributes along would set it where nobody wants it."""
    directory = rig.mkdir(ROOT, b"d")
    assert rig.call(m.ListXattr(directory)) == ()
    set_copies(rig, directory, b"2")
    file = rig.make(directory, b"f").inode
    assert rig.call(m.ListXattr(directory)) == (COPIES,)
    assert rig.call(m.ListXattr(file)) == ()
    with pytest.raises(e.EntryExists):
        set_copies(rig, directory, b"2", flags=1)
    rig.call(m.RemoveXattr(directory, COPIES))
    assert copies(rig, directory) == b"1"
    for attempt in (m.RemoveXattr(directory, COPIES), m.SetXattr(directory, COPIES, b"2", 2)):
        with pytest.raises(e.AttributeMissing):
            rig.call(attempt)


@pytest.mark.parametrize("value", [b"", b"0", b"4", b"-1", b"two", b"2 ", b"22"])
def test_other_values_are_refused(rig: Rig, value: bytes) -> None:
    with pytest.raises(e.InvalidRequest):
        set_copies(rig, ROOT, value)
    assert copies(rig, ROOT) == b"1"


def test_what_is_no_directory_does_not_take_it(rig: Rig) -> None:
    with pytest.raises(e.NotADirectory):
        set_copies(rig, rig.make(ROOT, b"f").inode, b"2")
    link = rig.make(ROOT, b"l", 0o120777, target=b"f").inode
    with pytest.raises(e.AttributeMissing):
        copies(rig, link)


def test_more_copies_than_hosts_are_refused_at_once() -> None:
    rig = Rig(targets=0)
    for number in range(4):
        beat(rig, f"disk-{number}", f"host-{number % 2}")
    set_copies(rig, ROOT, b"2")
    with pytest.raises(e.NoTarget) as caught:
        set_copies(rig, ROOT, b"3")
    assert caught.value.detail == "3 copies need targets on 3 hosts, there are 2"
    with pytest.raises(e.NoTarget):
        rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=3))
    for chain in rig.call(GetClusterMap()).chains:
        assert not chain.is_replicated


def test_the_setting_decides_where_nobody_said_anything() -> None:
    rig = Rig(targets=0, default_copies=2)
    with pytest.raises(e.NoTarget):
        rig.make(ROOT, b"f")
    for number in range(2):
        beat(rig, f"disk-{number}", f"host-{number}")
    assert copies_of_chains(rig, rig.make(ROOT, b"f").inode) == {2}
    directory = rig.mkdir(ROOT, b"one")
    set_copies(rig, directory, b"1")
    assert copies_of_chains(rig, rig.make(directory, b"f").inode) == {1}
    for wrong in (0, 4):
        with pytest.raises(e.InvalidRequest):
            Rig(default_copies=wrong)


def test_namespaces_have_their_own_number(rig: Rig) -> None:
    namespace = rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=3)).inode
    assert copies(rig, namespace) == b"3"
    batch = rig.prepare(namespace, range(9))
    by_id = {chain.chain_id: chain for chain in rig.call(GetClusterMap()).chains}
    assert {by_id[b.chain].copies for b in batch.blocks if b} == {3}
    other = rig.call(m.OpenNamespace("t/n", LAYOUT, create=True)).inode
    assert copies(rig, other) == b"1"
    assert rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=2)).inode == namespace
    assert copies(rig, namespace) == b"3", "it exists"


def test_blocks_of_a_batch_go_to_chains_in_runs(rig: Rig) -> None:
    namespace = rig.call(m.OpenNamespace("t/m", LAYOUT, create=True, copies=2)).inode
    small = [b.chain for b in rig.prepare(namespace, range(100), size=1000).blocks if b]
    assert len(set(small)) == 1, "a request goes to one chain"
    large = [
        b.chain for b in rig.prepare(namespace, range(1000, 1064), size=limits.MIB).blocks if b
    ]
    runs = [chain for place, chain in enumerate(large) if large[place - 1] != chain]
    assert len(set(large)) == 18, "all of them"
    assert 18 <= len(runs) <= 24 and max(map(large.count, set(large))) <= 8


def test_new_targets_get_chains_and_full_ones_get_nothing_new(rig: Rig) -> None:
    directory = rig.mkdir(ROOT, b"d")
    set_copies(rig, directory, b"2")
    rig.make(directory, b"a")
    before = {c.chain_id: c for c in rig.call(GetClusterMap()).chains if c.is_replicated}
    beat(rig, "disk-3", "host-3")
    rig.make(directory, b"b")
    after = {c.chain_id: c for c in rig.call(GetClusterMap()).chains if c.is_replicated}
    assert before.items() <= after.items(), "old chains stay"
    new = [chain for number, chain in after.items() if number not in before]
    assert new and all(4 in chain.targets for chain in new)
    beat(rig, "disk-3", "host-3", free=0)
    for number in range(20):
        layout = rig.make(directory, b"%d" % number).layout
        assert layout is not None
        assert not any(4 in after[chain].targets for chain in layout.chains)
    for number in range(3):
        beat(rig, f"disk-{number}", f"host-{number}", free=0)
    with pytest.raises(e.CacheFull):
        rig.make(directory, b"no room")
    assert rig.mkdir(directory, b"needs no chunk") and DIRECTORY


def test_racks_are_kept_apart_where_there_are_enough() -> None:
    rig = Rig(targets=0)
    for number in range(6):
        beat(rig, f"disk-{number}", f"host-{number}", f"rack-{number % 2}")
    set_copies(rig, ROOT, b"2")
    rig.make(ROOT, b"f")
    for chain in rig.call(GetClusterMap()).chains:
        if chain.is_replicated:
            assert {target_id % 2 for target_id in chain.targets} == {0, 1}
