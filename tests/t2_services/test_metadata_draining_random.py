"""Targets that come and go at random, while blocks and files come and go."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvfs_base import errors as e
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    RemoveTarget,
    SetDraining,
)
from t2_services.metadata_rig import ROOT, Rig
from t2_services.test_metadata_draining import (
    acknowledge,
    details,
    make_file,
    move_blocks,
    work,
)
from t2_services.test_metadata_shared import Servers, snapshot


def check_drained(rig: Rig) -> None:
    """Nothing refers to a drained target, and prepared blocks do not go there."""
    drained = {chain for t in details(rig).targets if t.drained for chain in t.chains}
    index = rig.core.index.by_inode
    assert {index[inode].chain for inode in index}.isdisjoint(drained)
    assert rig.core.blocks.prepared_chains().isdisjoint(drained)
    for value in rig.dump(records.INODE).values():
        layout = records.decode_inode(value).layout
        assert layout is None or drained.isdisjoint(layout.chains)


def check_data_stays(rig: Rig, sizes: dict[bytes, tuple[int, tuple[int, ...]]]) -> None:
    """Chunks that a file has are where they were when it was given its size: nobody moves them
    here."""
    for name, (count, placed) in sizes.items():
        layout = rig.resolve(b"/" + name).layout
        assert layout is not None
        assert [layout.chain_of(i) for i in range(count)] == list(placed)


class Chaos:
    """One order or request after the other, of any server."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.servers = Servers(2, targets=4)
        self.uuids = [f"target-{n}" for n in range(1, 5)]
        self.namespace = self.servers.rigs[0].namespace()
        self.batches: list[m.PreparedBatch] = []
        self.files: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        self.done: Counter[str] = Counter()
        self.actions = [name for name in dir(self) if name.startswith("do_")]

    def step(self) -> None:
        rig, action = self.chance.choice(self.servers.rigs), self.chance.choice(self.actions)
        try:
            getattr(self, action)(rig)
            self.done[action] += 1
        except (e.TargetInUse, e.TargetUnknown, e.NoTarget):
            self.done[f"{action} refused"] += 1

    def target(self, rig: Rig, *, drained: bool = False) -> tuple[int]:
        known = [t for t in details(rig).targets if t.drained or not drained]
        return (self.chance.choice(known).target_id if known else 0,)

    def do_prepare(self, rig: Rig) -> None:
        start = self.chance.randrange(80)
        self.batches.append(rig.prepare(self.namespace, range(start, start + 6)))

    def do_put(self, rig: Rig) -> None:
        self.do_prepare(rig)
        rig.commit(self.batches.pop())

    def do_commit(self, rig: Rig) -> None:
        if self.batches:
            rig.commit(self.batches.pop(self.chance.randrange(len(self.batches))))

    def do_make(self, rig: Rig) -> None:
        name, count = b"%d" % self.chance.randrange(10**9), self.chance.randrange(3)
        _, placed = make_file(rig, name, count)
        self.files[name] = count, tuple(placed[i % len(placed)] for i in range(count))

    def do_unlink(self, rig: Rig) -> None:
        for _ in range(min(2, len(self.files))):
            name = self.chance.choice(sorted(self.files))
            rig.call(m.Unlink(ROOT, name))
            del self.files[name]

    def do_drain(self, rig: Rig) -> None:
        rig.call(SetDraining(self.target(rig), True, self.chance.random() < 0.2))

    def do_undrain(self, rig: Rig) -> None:
        rig.call(SetDraining(self.target(rig), False))

    def do_move_blocks(self, rig: Rig) -> None:
        move_blocks(rig, *self.target(rig))

    do_move_more_blocks = do_move_blocks

    def do_part_of_a_pass(self, rig: Rig) -> None:
        for _ in range(self.chance.randrange(60)):
            rig.core.update([rig.core.drain])

    def do_pass(self, rig: Rig) -> None:
        work(rig)

    def do_heartbeats(self, rig: Rig) -> None:
        for uuid in self.uuids:
            if rig.heartbeat(uuid).targets:
                acknowledge(rig, uuid)

    def do_remove(self, rig: Rig) -> None:
        rig.call(RemoveTarget(self.target(rig, drained=self.chance.random() < 0.8)))

    def do_remove_by_force(self, rig: Rig) -> None:
        if self.chance.random() < 0.2:
            rig.call(RemoveTarget(self.target(rig), force=True))

    def do_admit(self, rig: Rig) -> None:
        gone = [r.uuid for r in details(rig).removed]
        rig.call(AdmitTarget(self.chance.choice(gone or self.uuids)))

    def do_restart(self, rig: Rig) -> None:
        self.servers.rigs[1] = self.servers.start(self.chance.randbytes(16))


@pytest.mark.parametrize("seed", range(4))
def test_targets_that_come_and_go_at_random(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs_metadata.cluster.draining.DRAIN_PAGE_RECORDS", 3)
    chaos = Chaos(seed)
    for _ in range(600):
        chaos.step()
        check_drained(chaos.servers.rigs[0])
    check_data_stays(chaos.servers.rigs[0], chaos.files)
    assert chaos.done["do_remove"] and chaos.done["do_remove refused"] and chaos.done["do_admit"]
    chaos.do_heartbeats(chaos.servers.rigs[0])
    fresh = chaos.servers.start(b"Z" * 16)
    expected = snapshot(fresh.core)
    for rig in chaos.servers.rigs:
        assert snapshot(rig.core) == expected
        assert sorted(details(rig).removed, key=str) == sorted(details(fresh).removed, key=str)
