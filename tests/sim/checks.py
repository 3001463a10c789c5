"""What must hold when the faults have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfs.fsck import Fsck
from kvfs.fsck.sources import RemoteStore, RemoteTargets
from kvfs_base.limits import HEARTBEAT_SECONDS
from kvfs_metadata.check.findings import Finding, Kind
from kvfs_metadata.check.fsck import MetadataCheck
from kvfs_metadata.cluster import removals
from sim import bounds, replicas
from sim.history import check_key, check_register
from sim.leftovers import orphans, promised
from sim.plan import LIVENESS_SECONDS, NEVER
from sim.workloads import FILE_PAGES, KEYS, BlockWorker, FileWorker

if TYPE_CHECKING:
    from sim.world import World

GARBAGE_SECONDS = 60.0
"""What three rounds may take, a question each for every chain or inode, beside the pauses."""
ORPHANS = {Kind.CHUNK_ORPHAN, Kind.CHUNK_MISPLACED, Kind.FILE_TAIL}
BLOCK_LOSSES = {Kind.BLOCK_LOST, Kind.BLOCK_DAMAGED}
FILE_LOSSES = {Kind.FILE_HOLE, Kind.FILE_DAMAGED}


def after(world: World) -> None:
    """Everything is healed: service, then contents, then what clients saw."""
    client = world.clients[0]
    world.wait(lambda: world.all_whole(client), "all chains to be whole", lambda: _chains(world))
    world.wait(lambda: _read_everything(world), "everything to be readable")
    if world.plan.copies > 1 and not world.metadata_went_back:
        # Else a removal that was forgotten may have been carried out by some of the members.
        agree: list[str] = []

        def agreed() -> bool:
            agree[:] = replicas.differences(world)
            return not agree

        world.wait(agreed, "the copies to agree", lambda: "\n".join(agree))
    _check_histories(world)
    _check_leftovers(world)
    _check_memory(world)
    found: list[Finding] = []

    def clean() -> bool:
        found[:] = _findings(world)
        return not found

    world.wait(clean, "fsck to find nothing", lambda: "\n".join(map(str, found)))


def _check_leftovers(world: World) -> None:
    """What nobody needs any more goes: by itself, or as garbage."""
    # Each heartbeat takes a bounded number of removals along, and there may be thousands.
    beats = len(promised(world)) / removals.REMOVALS_PER_HEARTBEAT
    world.wait(
        lambda: not promised(world),
        "what is promised",
        lambda: "\n".join(promised(world)),
        seconds=LIVENESS_SECONDS + 2 * HEARTBEAT_SECONDS * beats,
    )
    if world.plan.garbage_seconds != NEVER:  # else fsck looks
        # Each chunk has to be found twice, and the first round may be nearly over.
        rounds = 3 * world.plan.garbage_seconds + GARBAGE_SECONDS
        left: list[str] = []

        def gone() -> bool:
            left[:] = orphans(world)
            return not left

        world.wait(gone, "orphans to go", lambda: "\n".join(left), seconds=rounds)


def _check_memory(world: World) -> None:
    found = bounds.exceeded(world)
    if found:
        raise AssertionError("\n".join(found))
    world.wait(lambda: not bounds.kept(world), "quiet", lambda: "\n".join(bounds.kept(world)))


def _chains(world: World) -> str:
    found = world.clients[0].view.current()
    states = {target.target_id: target.state.value for target in found.targets}
    return "\n".join([str(states), *map(str, found.chains)])


def _read_everything(world: World) -> bool:
    client = world.clients[0]
    blocks = BlockWorker(world, client, 100)
    good = blocks.get(range(KEYS))
    if world.plan.files:
        files = FileWorker(world, client, 100)
        files.find_again()
        for inode, file in files.files:
            for page in range(FILE_PAGES):
                if not files.read(inode, file, page, 1):
                    good = False
                    if world.plan.ruins:
                        files.write(inode, file, 0, FILE_PAGES)
    return good


def _check_histories(world: World) -> None:
    for thing in list(world.history.entries):
        if thing[0] == "key":
            if world.metadata_went_back:
                continue  # removals are forgotten, too
            check_key(world.history.operations(thing), lossy=world.plan.evicts)
        else:
            check_register(world.history.entries[thing])


def _findings(world: World) -> list[Finding]:
    """What the production check finds, less what the faults excuse."""
    client = world.clients[0]
    if world.plan.copies > 1:
        return list(MetadataCheck(RemoteStore(client.metadata_client())).run())
    targets = RemoteTargets(client.env, client.metadata_client())
    try:
        report = Fsck(RemoteStore(client.metadata_client()), targets, verify=True).check()
    finally:
        targets.close()
    if report.unreachable:
        return [outcome.finding for outcome in report.outcomes]
    excused = set(BLOCK_LOSSES) if world.plan.lossy else set()
    if world.plan.files_lossy:
        excused |= FILE_LOSSES
    if world.metadata_went_back or world.plan.late_writes:
        excused |= ORPHANS
    return [o.finding for o in report.outcomes if o.finding.kind not in excused]
