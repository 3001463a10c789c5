"""Targets as the metadata service hears of them, for tests of who is a member of what."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

from kvfs_base import limits
from kvfs_base.cluster import (
    Chain,
    ClusterMap,
    GetClusterMap,
    Heartbeat,
    HeartbeatReply,
    Synced,
    TargetReport,
)
from kvfs_metadata import messages as m
from t2_services.metadata_rig import ROOT, TERABYTE, Rig

LEASE = limits.TARGET_LEASE_SECONDS
BEAT = limits.HEARTBEAT_SECONDS


class Disk:
    """A chunk server with one target, as far as the metadata service knows it."""

    def __init__(self, name: str, *, host: str = "", rack: str = "") -> None:
        self.name = name
        self.host = host or f"host of {name}"
        self.rack = rack
        self.incarnation = zlib.crc32(name.encode()) % 1000 + 1
        self.number = 0
        self.map_version = 0
        self.fenced = False
        self.healthy = True
        self.removed_seq = 0
        self.silent = False
        self.disks = [name]

    def request(self, suspects: Sequence[int] = (), synced: Sequence[Synced] = ()) -> Heartbeat:
        self.number += 1
        reports = tuple(
            TargetReport(
                uuid,
                TERABYTE,
                TERABYTE,
                self.healthy,
                self.removed_seq,
                incarnation=self.incarnation,
                fenced=self.fenced,
            )
            for uuid in self.disks
        )
        return Heartbeat(
            self.name,
            self.host,
            None,
            None,
            reports,
            tuple(suspects),
            tuple(synced),
            self.host,
            self.rack,
            self.number,
            self.map_version,
        )

    def restart(self) -> None:
        self.incarnation += 1000
        self.number = self.map_version = 0
        self.fenced = False


class World:
    """Disks 1, 2, ... of one server each, and a directory of two copies."""

    def __init__(self, disks: int = 3, copies: int = 2, **options: Any) -> None:
        self.rig = Rig(targets=0, **options)
        self.disks: list[Disk] = []
        for number in range(1, disks + 1):
            self.add(Disk(f"disk-{number}"))
        self.directory = self.rig.mkdir(ROOT, b"d")
        set_copies(self.rig, self.directory, copies)

    def add(self, disk: Disk) -> Disk:
        self.disks.append(disk)
        self.beat(disk)
        return disk

    def beat(self, disk: Disk, **news: Any) -> HeartbeatReply:
        """The disk asks for the map that the answer names."""
        reply: HeartbeatReply = self.rig.call(disk.request(**news))
        disk.map_version = reply.map_version
        return reply

    def restart(self, disk: Disk) -> None:
        """A new process, until it is known to be one."""
        disk.restart()
        assert all(order.fence for order in self.beat(disk).targets)
        disk.fenced = True
        assert not any(order.fence for order in self.beat(disk).targets)
        disk.fenced = False

    def live(self, seconds: float) -> None:
        """Disks that are not silent say so; what is due is done."""
        while seconds > 0:
            self.rig.clock.advance(BEAT)
            seconds -= BEAT
            for disk in self.disks:
                if not disk.silent:
                    reply = self.beat(disk)
                    disk.fenced = any(order.fence for order in reply.targets)
            self.rig.work()

    def file(self, name: bytes = b"f") -> int:
        return self.rig.make(self.directory, name).inode

    def map(self) -> ClusterMap:
        found: ClusterMap = self.rig.call(GetClusterMap())
        return found

    def chains(self) -> dict[int, Chain]:
        return {c.chain_id: c for c in self.map().chains if c.is_replicated}

    def of(self, target_id: int) -> list[Chain]:
        return [c for c in self.chains().values() if target_id in c.targets + c.syncing + c.offline]

    def sync_all(self) -> None:
        """Sources say that everybody is in step, until it is so."""
        for _ in range(10):
            for disk, target_id in zip(self.disks, itertools.count(1), strict=False):
                reports = [
                    Synced(c.chain_id, c.version, other)
                    for c in self.chains().values()
                    if c.targets[-1] == target_id
                    for other in c.syncing
                ]
                if reports:
                    self.beat(disk, synced=reports)
        assert not any(c.syncing for c in self.chains().values())


def set_copies(rig: Rig, directory: int, copies: int) -> None:
    rig.call(m.SetXattr(directory, b"user.kvfs.copies", b"%d" % copies))
