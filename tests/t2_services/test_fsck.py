"""Damage of every kind is found for what it is and repaired, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from fsck_world import CHUNK, ServiceStore, World
from kvfs.cli.exits import ExitCode
from kvfs.cli.fsck import exit_code
from kvfs.fsck import Fsck, Outcome, Report, State, check
from kvfs.fsck import run as run_module
from kvfs_base.limits import FIXES_PER_REQUEST
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.check import fixes
from kvfs_metadata.check.findings import Finding, Kind
from t2_services.fsck_damage import (
    DAMAGE,
    NOBODY,
    STORE_ONLY,
    Found,
    directory_without_namespace,
    duplicate_block,
    held,
    lost_block,
    lost_directory,
    lost_file,
    lost_namespace,
    orphans,
    stray_xattrs,
    wrong_links_of_a_file,
)
from t2_services.metadata_rig import FILE, ROOT, key

CASES = [
    pytest.param(damage, mode, id=f"{damage.__name__}-{mode}")
    for damage in DAMAGE
    for mode in ("store", "service")
    if mode == "store" or damage not in STORE_ONLY
]


def found_in(world: World) -> Found:
    return {(one.kind, one.inode) for one in world.findings()}


@pytest.mark.parametrize("mode", ["store", "service"])
def test_what_is_sound_has_no_findings(mode: str) -> None:
    world = World(mode)
    world.fill()
    assert world.findings(verify=True) == []
    assert world.repair(verify=True, zero_holes=True).outcomes == []


@pytest.mark.parametrize(("damage", "mode"), CASES)
def test_damage_is_found_and_repaired_and_nothing_else(
    damage: Callable[[World], Found], mode: str
) -> None:
    world = World(mode)
    world.fill()
    expected = damage(world)
    if mode == "service":
        world.rig.restart()
        world.rig.advance(31)
    before = world.dump()
    assert found_in(world) == expected
    assert world.dump() == before | changed_by_looking(world), "looking changes nothing"

    report = world.repair()
    assert {one.state for one in report.outcomes} == {State.REPAIRED}
    assert found_in(world) == set()
    world.settle()
    assert found_in(world) == set()
    if mode == "store":
        world.rig.restart()
        world.rig.advance(31)
    check_the_rest(world, before, {inode for _, inode in expected})
    world.rig.work(31)
    world.settle()
    assert check(world.reader(), world.targets.listings()) == []


def changed_by_looking(world: World) -> dict[bytes, bytes]:
    """Counters may have moved on."""
    return {k: v for k, v in world.dump().items() if k.startswith(records.COUNTER)}


def check_the_rest(world: World, before: dict[bytes, bytes], damaged: set[int]) -> None:
    """Blocks and files without a finding are what they were, and can be used."""
    after = world.dump()
    for record, value in before.items():
        number = records.number_at(record)
        if record[:4] == records.BLOCK and number not in damaged:
            assert after[record] == value
            block = records.unpack_block(value)
            (info,) = world.rig.call(m.LookupBlocks(block.namespace, block.key))
            assert info is not None and info.inode == number
        elif record[:4] == records.INODE and number not in damaged:
            was, now = records.decode_inode(value), records.decode_inode(after[record])
            if was.is_file and was.nlink:
                assert now == was
                world.rig.call(m.OpenInode(number))
                world.rig.call(m.CloseInode(number))
            elif was.is_dir and not was.is_namespace:
                world.rig.call(m.ReadDir(number))


# --- particular repairs


def test_lost_things_have_names_afterwards() -> None:
    world = World("service")
    world.fill()
    lost_file(world)
    lost_directory(world)
    world.repair()
    rig, inodes = world.rig, world.inodes
    assert rig.resolve(b"lost+found/#%d" % inodes["empty"]).inode == inodes["empty"]
    assert rig.resolve(b"lost+found/#%d/large" % inodes["a/b"]).inode == inodes["a/b/large"]
    assert rig.attr(rig.resolve(b"lost+found").inode).nlink == 3
    lost_file(world)
    world.put(records.entry_key(rig.resolve(b"lost+found").inode, b"#%d" % inodes["empty"]), None)
    world.repair()
    assert rig.resolve(b"lost+found/#%d" % inodes["empty"]).inode == inodes["empty"]


def test_a_lost_namespace_comes_back_where_it_was() -> None:
    world = World("service")
    world.fill()
    lost_namespace(world)
    world.repair()
    assert world.rig.resolve(b"kv/t/m").inode == world.inodes["t/m"]
    assert world.rig.match(world.inodes["t/m"], range(8)) == 8


def test_a_store_with_which_the_service_does_not_start_is_repaired() -> None:
    world = World("store")
    world.fill()
    directory_without_namespace(world)
    with pytest.raises(KeyError):
        world.rig.restart()
    assert world.repair().remaining == []
    world.rig.restart()
    assert world.rig.match(world.inodes["t/m"], range(8)) == 8


def test_what_is_in_the_way_is_said() -> None:
    world = World("service")
    world.fill()
    world.rig.make(ROOT, b"lost+found", FILE)
    expected = lost_file(world)
    report = world.repair()
    assert [one.state for one in report.outcomes] == [State.BLOCKED]
    assert report.remaining == report.outcomes
    assert found_in(world) == expected


def test_a_forgotten_unlinked_file_is_deleted() -> None:
    world = World("service")
    world.fill()
    inode = world.inodes["open"]
    world.rig.call(m.CloseInode(inode))
    assert world.findings() == []
    inode = world.file("gone", 100)
    world.rig.call(m.OpenInode(inode))
    world.rig.call(m.Unlink(ROOT, b"gone"))
    world.put(records.orphan_key(inode), None)
    world.rig.call(m.CloseInode(inode))  # nobody remembers it now
    assert found_in(world) == {(Kind.INODE_UNLINKED, inode)}
    world.repair()
    assert world.view(lambda kv: kv.get(records.inode_key(inode))) is None
    world.settle()
    assert ChunkId(inode, 0) not in {c for held_ in world.targets.chunks.values() for c in held_}
    assert world.findings() == []


@pytest.mark.parametrize("damage", ["missing", "short", "all"])
def test_lost_bytes_of_a_file_stay_errors_unless_zeros_are_asked_for(damage: str) -> None:
    world = World("service")
    world.fill()
    chunks, chunk = held(world, "a/b/large", 1)
    if damage == "short":
        chunks[chunk] = msgspec.structs.replace(chunks[chunk], length=CHUNK - 1)
    elif damage == "missing":
        del chunks[chunk]
    else:
        for held_ in world.targets.chunks.values():
            for one in [one for one in held_ if one.inode == chunk.inode]:
                del held_[one]
    hole = {(Kind.FILE_HOLE, chunk.inode)}
    assert found_in(world) == hole
    report = world.repair()
    assert [one.state for one in report.outcomes] == [State.FOUND]
    assert found_in(world) == hole
    assert not world.rig.attr(chunk.inode).sparse
    report = world.repair(zero_holes=True)
    assert [one.state for one in report.outcomes] == [State.REPAIRED]
    assert world.rig.attr(chunk.inode).sparse
    assert world.rig.attr(chunk.inode).size == 3 * CHUNK + 5
    assert world.findings() == []


def test_rotten_bytes_are_found_by_reading_them() -> None:
    world = World("service")
    world.fill()
    _, block = held(world, "t/m/3")
    _, chunk = held(world, "a/b/large", 2)
    world.targets.rotten = {block, chunk}
    assert world.findings() == []
    expected = {(Kind.BLOCK_DAMAGED, block.inode), (Kind.FILE_DAMAGED, chunk.inode)}
    assert {(one.kind, one.inode) for one in world.findings(verify=True)} == expected
    report = world.repair(verify=True)
    states = {one.finding.kind: one.state for one in report.outcomes}
    assert states == {Kind.BLOCK_DAMAGED: State.REPAIRED, Kind.FILE_DAMAGED: State.FOUND}
    assert world.rig.stored(world.inodes["t/m"], range(8)) == [0, 1, 2, 4, 5, 6, 7]


def test_a_damaged_chunk_of_a_file_is_only_told() -> None:
    world = World("service")
    world.fill()
    chunks, chunk = held(world, "a/b/large", 1)
    chunks[chunk] = "chunk attribute is damaged"
    report = world.repair(zero_holes=True)
    assert [(o.finding.kind, o.state) for o in report.outcomes] == [
        (Kind.FILE_DAMAGED, State.FOUND)
    ]


def test_damaged_inodes_and_chains_are_left_to_people() -> None:
    world = World("store")
    world.fill()
    inode = world.inodes["a/small"]
    world.put(records.inode_key(inode), b"\xc1")
    world.put(records.chain_key(50), records.encode(records.ChainRecord(1, (99,))))
    report = world.repair()
    kinds = {(o.finding.kind, o.finding.inode): o.state for o in report.outcomes}
    assert kinds[Kind.RECORD_DAMAGED, inode] is State.FOUND
    assert kinds[Kind.CHAIN_BROKEN, 0] is State.FOUND
    assert world.get(records.inode_key(inode)) == b"\xc1"


def test_what_lies_on_a_target_that_is_away_is_not_judged() -> None:
    world = World("service")
    world.fill()
    chunks = dict(world.targets.chunks[2])
    world.targets.hidden = {2}
    report = world.repair(zero_holes=True)
    assert report.outcomes == []
    assert report.unchecked > 0
    assert world.targets.chunks[2] == chunks


def test_records_of_unknown_kinds_are_not_damage() -> None:
    world = World("store")
    world.fill()
    for prefix in (b"SESS", b"OPEN", b"BEAT", b"RSLT", b"AAAA", b"zzzz"):
        world.put(prefix + b"something", b"\xc1")
    assert world.findings() == []


def test_removals_and_batches_are_not_orphans() -> None:
    world = World("service")
    world.fill()
    batch = world.rig.prepare(world.inodes["t/m"], [300, 301])
    for block in batch.blocks:
        assert block is not None
        info = ChunkInfo(block.inode, 0, 0, ChunkState.SEALED, 1000, 1, key(300))
        world.targets.put(world.target_of(block.chain), info)
    world.rig.call(m.RemoveBlocks(world.inodes["t/m"], key(0)))
    assert world.findings() == []
    world.rig.call(m.AbortBlocks(batch.batch_id))
    assert world.findings() == []


# --- races: the service goes on between the look and the second look


def race(world: World, action: Callable[[], None]) -> None:
    """``action`` happens once, when the candidates are there and before they are looked at."""

    def once() -> None:
        world.targets.before_look = lambda: None
        action()

    world.targets.before_look = once


def test_a_block_that_is_evicted_meanwhile_is_no_finding() -> None:
    world = World("service")
    world.fill()
    inode = world.inodes["t/m/0"]
    chunks, chunk = held(world, "t/m/0")
    del chunks[chunk]
    race(world, lambda: world.rig.call(m.RemoveBlocks(world.inodes["t/m"], key(0))) and None)
    assert world.findings() == []
    assert inode not in world.rig.core.index.by_inode


class Interrupted(ServiceStore):
    """Something happens after the queues of removals were read, before the blocks are."""

    def __init__(self, world: World, action: Callable[[], object]) -> None:
        super().__init__(world.rig)
        self._action: Callable[[], object] | None = action
        self._removals_read = False

    def range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        if start.startswith(records.REMOVAL):
            self._removals_read = True
        elif start.startswith(records.BLOCK) and self._removals_read and self._action is not None:
            action, self._action = self._action, None
            action()
        return super().range(start, end, limit)


@pytest.mark.parametrize("removed", [False, True])
def test_a_block_that_is_removed_under_the_check_is_no_orphan(removed: bool) -> None:
    """Its chunk is listed, its record is not there any more, and the queue that was read did not
    have it. It waits for its removal, or is gone by now."""
    world = World("service")
    world.fill()
    looks = 0

    def action() -> None:
        world.rig.call(m.RemoveBlocks(world.inodes["t/m"], key(0)))
        if removed:
            world.settle()

    def count() -> None:
        nonlocal looks
        looks += 1

    world.targets.before_look = count
    run = Fsck(Interrupted(world, action), world.targets)
    assert run.check().outcomes == []
    assert looks, "there was no candidate"
    world.settle()
    assert world.findings() == []


def test_fixes_are_not_taken_on_trust() -> None:
    """None of these is called for: nothing happens."""
    world = World("service")
    world.fill()
    inodes = world.inodes
    small = world.rig.attr(inodes["a/small"])
    layout = world.rig.attr(inodes["a/b/large"]).layout
    assert layout is not None
    target = world.target_of(layout.chain_of(0))
    block = records.unpack_block(world.get(records.block_key(inodes["t/m/0"])))
    batch = world.rig.prepare(inodes["t/m"], [400])
    assert batch.blocks[0] is not None
    wrong: list[fixes.Fix] = [
        fixes.SetLinks(small.inode, small.ctime_ns - 1, 2, 1),
        fixes.SetLinks(small.inode, small.ctime_ns, 1, 3),
        fixes.SetParent(inodes["a/b"], inodes["a/c"], b"b"),
        fixes.ClearNamespace(inodes["t/m"], world.rig.attr(inodes["t/m"]).ctime_ns),
        fixes.MakeRoot(ROOT),
        fixes.MakeRoot(NOBODY),
        fixes.MarkSparse(small.inode, small.ctime_ns - 1),
        fixes.CoverTail(small.inode, 1),
        fixes.DropBlock(inodes["t/m/0"], "namespace"),
        fixes.DropBlock(inodes["t/m/0"], "chain"),
        fixes.DropBlock(inodes["t/m/0"], "duplicate", inodes["t/m/1"]),
        fixes.DropBlock(inodes["t/m/0"], "duplicate", inodes["t/m/0"]),
        fixes.DropBlock(inodes["t/m/0"], "because"),
        fixes.DropDamaged(records.block_key(inodes["t/m/0"])),
        fixes.DropDamaged(records.FORMAT_KEY),
        fixes.DropNamespace(inodes["t/m"]),
        fixes.DropEntry(inodes["a"], b"small", small.inode),
        fixes.DropEntry(inodes["a"], b"small", small.inode, small.ctime_ns),
        fixes.DropEntry(inodes["a"], b"small", NOBODY),
        fixes.DropXattrs(small.inode),
        fixes.DropOrphan(small.inode, small.ctime_ns),
        fixes.DropOrphan(inodes["open"]),
        fixes.QueueUnlinked(small.inode, small.ctime_ns),
        fixes.LinkLost(small.inode, small.ctime_ns - 1),
        fixes.LinkLost(inodes["a/b"], world.rig.attr(inodes["a/b"]).ctime_ns, inodes["a"], b"b"),
        fixes.RaiseCounter(inodes["t/m/0"]),
        fixes.RemoveChunks(target, inodes["a/b/large"], 0, 1),
        fixes.RemoveChunks(target, inodes["a/b/large"], 1000, 9999),
        fixes.RemoveChunks(world.target_of(block.chain), inodes["t/m/0"], 0, 1),
        fixes.RemoveChunks(1, batch.blocks[0].inode, 0, 1),
        fixes.SetUsage(),
    ]
    before = world.dump()
    for dry in (True, False):
        verdicts = world.rig.call(fixes.RepairRecords(tuple(wrong), dry))
        called_for = [
            f for f, v in zip(wrong, verdicts, strict=True) if v is not fixes.Verdict.GONE
        ]
        assert called_for == []
    after = world.dump()
    assert after == before | changed_by_looking(world)


def test_a_removal_never_meets_a_number_that_is_given_out_later() -> None:
    """A chunk of a number that comes later: a store that went back in time. Its removal waits in
    the queue while the numbers catch up."""
    world = World("service")
    world.fill()
    future = world.rig.make(ROOT, b"now", FILE).inode + 5
    world.targets.put(1, ChunkInfo(future, 0, 0, ChunkState.SEALED, 10, 1, key(9)))
    assert found_in(world) == {(Kind.CHUNK_ORPHAN, future)}
    world.repair()
    inodes = {world.rig.make(ROOT, b"later %d" % n, FILE).inode for n in range(20)}
    assert future not in inodes
    assert min(inodes) > future


def test_a_number_that_cannot_come_for_ages_is_left_to_people() -> None:
    world = World("service")
    world.fill()
    world.targets.put(1, ChunkInfo(1 << 62, 0, 0, ChunkState.SEALED, 10, 1, key(9)))
    report = world.repair()
    assert [one.state for one in report.outcomes] == [State.BLOCKED]
    assert world.rig.make(ROOT, b"file", FILE).inode < 1 << 40


def test_a_failed_commit_takes_a_repair_back() -> None:
    """Memory and store go together."""
    world = World("service")
    world.fill()
    fix = fixes.DropBlock(world.inodes["t/m/0"], "chunk")
    core = world.rig.core
    decision = core.decide([core.operation(1, fixes.RepairRecords((fix,)))])
    assert decision.group.results == [(fixes.Verdict.DONE,)]
    assert world.rig.stored(world.inodes["t/m"], [0]) == []
    pending = core.removals.pending_count()
    core.take_back(decision)
    assert world.rig.stored(world.inodes["t/m"], [0]) == [0]
    assert core.removals.pending_count() == pending - 1
    assert world.findings() == []


def test_of_two_blocks_with_one_key_the_first_is_found() -> None:
    world = World("service")
    world.fill()
    duplicate_block(world)
    world.rig.restart()
    world.rig.advance(31)
    world.repair()
    (info,) = world.rig.call(m.LookupBlocks(world.inodes["t/m"], key(1)))
    assert info is not None and info.inode == world.inodes["t/m/1"]


def test_more_findings_than_one_run_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("service")
    world.fill()
    for number in range(3 * FIXES_PER_REQUEST):
        world.put(records.xattr_key(100_000 + number, b"user.x"), b"")
    monkeypatch.setattr(run_module, "FINDINGS_MAX", 300)
    rounds = 0
    while (report := world.repair()).truncated:
        assert 300 <= len(report.outcomes) <= 300 + FIXES_PER_REQUEST
        assert exit_code(report) is ExitCode.INCONSISTENT
        rounds += 1
    assert rounds == 1, "512 of 768 findings, then the rest"
    assert world.findings() == []


def test_a_repair_that_is_repeated_does_nothing_twice() -> None:
    """The answer to the first copy may have been lost."""
    world = World("service")
    world.fill()
    for damage in (lost_file, lost_block, wrong_links_of_a_file, orphans, stray_xattrs):
        damage(world)
    found = sorted(world.findings(), key=lambda one: one.fix.rank if one.fix else 0)
    request = fixes.RepairRecords(tuple(one.fix for one in found if one.fix is not None))
    world.rig.clock.advance(0.001)
    first = world.rig.call(request)
    assert set(first) == {fixes.Verdict.DONE}
    before = {k: v for k, v in world.dump().items() if k[:4] not in CHANGES_AGAIN}
    again = world.rig.call(request)
    done = {type(fix) for fix, v in zip(request.fixes, again, strict=True) if v.value}
    assert done == {fixes.RemoveChunks}, "queued once more, which harms nobody"
    assert {k: v for k, v in world.dump().items() if k[:4] not in CHANGES_AGAIN} == before
    assert world.findings() == []


CHANGES_AGAIN = {records.COUNTER, records.REMOVAL, records.REMOVAL_STATE}


def test_exit_codes() -> None:
    finding = Finding(kind=Kind.USAGE_WRONG, inode=0, detail="")
    found = Outcome(finding)
    repaired, blocked = Outcome(finding, State.REPAIRED), Outcome(finding, State.BLOCKED)
    assert exit_code(Report([])) is ExitCode.OK
    assert exit_code(Report([found])) is ExitCode.INCONSISTENT
    assert exit_code(Report([repaired, blocked])) is ExitCode.INCONSISTENT
    assert exit_code(Report([repaired])) is ExitCode.REPAIRED
    assert exit_code(Report([], unreachable={"2": "offline"})) is ExitCode.UNREACHABLE
    assert exit_code(Report([found], unreachable={"2": "offline"})) is ExitCode.INCONSISTENT


# --- the wire


def test_a_page_of_records_is_bounded() -> None:
    world = World("service")
    world.fill()
    value = bytes(60_000)
    for number in range(200):
        world.put(records.xattr_key(world.inodes["a"], b"user.%03d" % number), value)
    start, pages, found = records.XATTR, 0, []
    while True:
        page = world.rig.call(fixes.ScanRecords(start, b"XATS"))
        pages += 1
        found += [k for k, _ in page.items]
        assert sum(len(k) + len(v) for k, v in page.items) < 4 << 20
        if not page.more:
            break
        start = page.items[-1][0] + b"\x00"
    assert pages > 3
    assert found == sorted(k for k in world.dump() if k.startswith(records.XATTR))


def test_every_fix_survives_the_wire() -> None:
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(m.MetadataRequest)
    request = fixes.RepairRecords(
        (
            fixes.SetLinks(1, -5, 2, 3),
            fixes.DropEntry(1, b"\xff", 2),
            fixes.DropOrphan(3, 7),
            fixes.LinkLost(1, 2, 3, b"x"),
            fixes.RemoveChunks(1, 2, 3, 4, 5),
            fixes.SetUsage(),
        ),
        dry=True,
    )
    assert decoder.decode(encoder.encode(request)) == request
