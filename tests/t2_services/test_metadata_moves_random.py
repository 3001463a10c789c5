"""Files that move at random, while they grow, shrink, and are opened and removed."""

from __future__ import annotations

import random

import pytest

from kvfs_base.cluster import Move, Moves
from kvfs_metadata import messages as m
from kvfs_metadata.cluster.admin_messages import SetDraining
from t2_services.metadata_rig import ROOT, Rig
from t2_services.test_metadata_moves import (
    CHUNK,
    chains,
    end,
    is_drained,
    look,
    make_file,
    take,
    uuid,
)


class World:
    """Files with chunks on disks, readers by the layout that they have, and movers that die."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.rig = Rig(targets=4)
        self.disks: dict[int, dict[tuple[int, int], int]] = {n: {} for n in range(1, 5)}
        """What each target has: the version of each chunk."""
        self.done: dict[int, int] = dict.fromkeys(self.disks, 0)
        self.truth: dict[int, dict[int, int]] = {}
        self.layouts: dict[int, tuple[int, ...]] = {}
        """Of the files that somebody has open."""
        self.taken: dict[int, list[Moves]] = {n: [] for n in self.disks}
        self.version = 0
        self.moved = 0

    def chunks_at(self, inode: int, layout: tuple[int, ...]) -> dict[int, int]:
        return {
            number: version
            for target_id, disk in self.disks.items()
            for (one, number), version in disk.items()
            if one == inode and layout[number % len(layout)] == target_id
        }

    def step(self) -> None:
        names = [name for name in dir(self) if name.startswith("do_")]
        getattr(self, self.chance.choice(names))()
        self.check()

    def check(self) -> None:
        for inode, chunks in self.truth.items():
            layout = self.layouts.get(inode) or chains(self.rig, inode)
            assert self.chunks_at(inode, layout) == chunks, inode
            assert layout == chains(self.rig, inode)

    def a_file(self) -> int:
        return self.chance.choice(sorted(self.truth)) if self.truth else 0

    def do_make(self) -> None:
        if len(self.truth) < 8 and self.rig.statistics()["targets_serving"]:
            inode = make_file(self.rig, b"%d" % self.version, 0)
            self.version += 1
            self.truth[inode] = {}

    def do_open(self) -> None:
        inode = self.a_file()
        if inode and inode not in self.layouts:
            self.rig.call(m.OpenInode(inode))
            self.layouts[inode] = chains(self.rig, inode)

    def do_close(self) -> None:
        for inode in list(self.layouts)[:1]:
            del self.layouts[inode]
            self.rig.call(m.CloseInode(inode))

    def do_write(self) -> None:
        for inode, layout in self.layouts.items():
            number, self.version = self.chance.randrange(9), self.version + 1
            self.disks[layout[number % len(layout)]][inode, number] = self.version
            self.truth[inode][number] = self.version
            self.rig.call(m.SetAttr(inode, grow_to=(number + 1) * CHUNK, sparse=True))

    def do_cut(self) -> None:
        for inode in list(self.layouts)[:1]:
            for disk in self.disks.values():
                for chunk in [c for c in disk if c[0] == inode and c[1] >= 2]:
                    if self.layouts[inode][chunk[1] % len(self.layouts[inode])] in (
                        n for n, d in self.disks.items() if d is disk
                    ):
                        del disk[chunk]
            self.truth[inode] = {n: v for n, v in self.truth[inode].items() if n < 2}
            self.rig.call(m.SetAttr(inode, size=2 * CHUNK))

    def do_drain(self) -> None:
        self.rig.call(SetDraining((self.chance.randrange(1, 5),), True))

    def do_undrain(self) -> None:
        self.rig.call(SetDraining((self.chance.randrange(1, 5),), False))

    def do_look(self) -> None:
        look(self.rig)

    def do_take(self) -> None:
        target_id = self.chance.randrange(1, 5)
        taken = take(self.rig, target_id)
        self.taken[target_id].append(taken)
        for move in taken.moves:
            if self.chance.random() < 0.7:
                self._copy(target_id, move)

    def _copy(self, target_id: int, move: Move) -> None:
        for number in range(move.end):
            if number % move.width in move.places:
                version = self.disks[target_id].get((move.inode, number))
                self.disks[move.target_id].pop((move.inode, number), None)
                if version is not None:
                    self.disks[move.target_id][move.inode, number] = version

    def do_move(self) -> None:
        target_id = self.chance.randrange(1, 5)
        taken = take(self.rig, target_id)
        for move in taken.moves:
            self._copy(target_id, move)
        self.taken[target_id].append(taken)
        if self.chance.random() < 0.3:
            self.do_open()
            self.do_write()
            if self.chance.random() < 0.5:
                self.do_close()
        self.moved += len(end(self.rig, taken, target_id))

    do_move_more = do_move_again = do_move

    def do_fail(self) -> None:
        target_id = self.chance.randrange(1, 5)
        taken = take(self.rig, target_id)
        failed = tuple(move.inode for move in taken.moves)
        end(self.rig, taken, target_id, failed=failed)

    def do_end_late(self) -> None:
        """The report of a mover that was overtaken."""
        for target_id, all_taken in self.taken.items():
            if len(all_taken) > 1:
                end(self.rig, self.chance.choice(all_taken[:-1]), target_id)

    def do_remove(self) -> None:
        target_id = self.chance.randrange(1, 5)
        for order in self.rig.heartbeat(uuid(target_id)).targets[0].removals:
            if order.seq > self.done[target_id]:
                disk = self.disks[target_id]
                for chunk in [c for c in disk if c[0] == order.inode]:
                    if order.first <= chunk[1] < order.end:
                        del disk[chunk]
                self.done[target_id] = order.seq

    def do_acknowledge(self) -> None:
        for target_id, seq in self.done.items():
            self.rig.heartbeat(uuid(target_id), removed_seq=seq)

    def do_unlink(self) -> None:
        inode = self.a_file()
        if inode and inode not in self.layouts and self.chance.random() < 0.2:
            for name, attr in self.rig.call(m.ReadDir(ROOT)).entries:
                if attr.inode == inode:
                    self.rig.call(m.Unlink(ROOT, name))
                    del self.truth[inode]


@pytest.mark.parametrize("seed", range(6))
def test_files_that_move_at_random_keep_every_chunk_and_every_hole(seed: int) -> None:
    world = World(seed)
    for _ in range(700):
        world.step()
    assert world.moved > 1
    while world.layouts:
        world.do_close()
    for target_id in range(1, 5):
        world.rig.call(SetDraining((target_id,), target_id != 3))
    for _ in range(12):
        for target_id in range(1, 5):
            world.do_look()
            taken = take(world.rig, target_id)
            for move in taken.moves:
                world._copy(target_id, move)
            end(world.rig, taken, target_id)
            world.check()
        for _ in range(8):
            world.do_remove()
        world.do_acknowledge()
    assert all(is_drained(world.rig, target_id) for target_id in (1, 2, 4))
    for _ in range(30):
        world.do_remove()
    left = {t: {c for c in disk if c[0] in world.truth} for t, disk in world.disks.items()}
    assert not any(left[t] for t in (1, 2, 4)), left
