"""Four hosts with chains of several copies, and what is done to them: three chunk servers, and a
client (agent and mount) on the fourth. The metadata service is on the first."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kvfs
from kvfs.cli.exits import ExitCode
from kvfs_base.cluster import Chain, ClusterMap, GetClusterMap, Target, TargetState
from kvfs_base.types import ChunkId
from kvfs_datapath import format as chunk_format
from t5_cluster.chain_checker import Blocks, Checker, Files
from t5_cluster.hosts import Hosts, Service
from t5_cluster.processes import DEADLINE_SECONDS, wait_until

CLIENT = 4
SERVERS = (1, 2, 3)
SMALL_DISK_BYTES = 256 << 20
ARENA_BYTES = 1 << 20
"""Holds 64 blocks: most reads ask the chunk servers."""

HEADER = (
    "| copies | what happened | pages acknowledged | longest without put / get / write / read, s "
    "| recovery, s | errors told |\n| --- | --- | --- | --- | --- | --- |"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One scenario. ``recovery_seconds``: from the repair to all chains having all copies again."""

    copies: int
    scenario: str
    acknowledged: int
    gaps: tuple[float, ...]
    recovery_seconds: float
    errors: str

    def __str__(self) -> str:
        gaps = " / ".join(f"{gap:.1f}" for gap in self.gaps)
        return (
            f"| {self.copies} | {self.scenario} | {self.acknowledged:,} | {gaps} "
            f"| {self.recovery_seconds:.1f} | {self.errors} |"
        )


class ChainHosts:
    """The cluster, its checker, and the rows of the scenarios that were played. With two copies the
    disk of host 3 is small, and that of host 2 can fail."""

    def __init__(self, hosts: Hosts, copies: int, seed: int) -> None:
        self.hosts = hosts
        self.copies = copies
        hosts[1].start("metadata")
        self.servers: dict[int, Service] = {}
        self.small_disk_reason = ""
        """Why there is no small disk."""
        if copies == 2 and not stores_attributes(hosts[3].small_disk("probe", 1 << 20)):
            self.small_disk_reason = "tmpfs has no extended attributes in this kernel"
        elif copies == 2:
            hosts[3].small_disk(hosts[3].disk().name, SMALL_DISK_BYTES)
        for number in SERVERS:
            failing = hosts[2].disk() if copies == 2 and number == 2 else None
            host = hosts[number]
            self.servers[number] = host.start("chunks", failing=failing, garbage_seconds=2)
        hosts.wait_for_states(host1="serving", host2="serving", host3="serving")
        agent = hosts[CLIENT].start("agent", arena_bytes=ARENA_BYTES, keep_puts=False)
        hosts[CLIENT].start("mount")
        self.client = kvfs.connect(agent.addresses[0])
        self.directory = hosts[CLIENT].directory / "mnt/safe"
        self.directory.mkdir()
        os.setxattr(self.directory, "user.kvfs.copies", str(copies).encode())
        blocks = Blocks(self.client, "checker/model", copies, seed)
        self.checker = Checker(blocks, Files(self.directory, seed + 2))
        self.rows: list[Row] = []

    def close(self) -> None:
        self.client.close()

    # --- what the metadata service says

    def map(self) -> ClusterMap | None:
        found: ClusterMap | None = self.hosts.ask_metadata(GetClusterMap())
        return found

    def chains(self) -> list[Chain]:
        found = self.map()
        assert found is not None
        return [chain for chain in found.chains if chain.is_replicated]

    def is_whole(self, restarted: dict[int, int]) -> bool:
        """Each chain has all its copies. Of the chains ``restarted`` the members have changed since
        they had these versions: nobody may have noticed before that a server was another one."""
        found = self.map()
        return (
            found is not None
            and all(target.state is not TargetState.OFFLINE for target in found.targets)
            and all(
                len(chain.targets) == chain.copies
                and not chain.syncing
                and not chain.offline
                and chain.version > restarted.get(chain.chain_id, 0)
                for chain in found.chains
                if chain.is_replicated
            )
        )

    def host_at(self, place: int) -> int:
        """The host that is at this place of a chain."""
        found = self.map()
        assert found is not None
        chain = next(chain for chain in found.chains if chain.is_replicated)
        servers = {target.target_id: target.server_id for target in found.targets}
        return int(servers[chain.targets[place]].removeprefix("host"))

    def versions_of(self, number: int) -> dict[int, int]:
        """The chains with a member on this host, by number, with their versions."""
        found = self.map()
        assert found is not None
        own = {one.target_id for one in found.targets if one.server_id == f"host{number}"}
        return {
            chain.chain_id: chain.version
            for chain in found.chains
            if chain.is_replicated and own & {*chain.targets, *chain.syncing, *chain.offline}
        }

    # --- scenarios

    def play(
        self,
        scenario: str,
        seconds: float,
        fault: Callable[[], None],
        repair: Callable[[], dict[int, int]],
        *,
        evicting: bool = False,
        going_on: Sequence[str] = (),
    ) -> Row:
        """The checker runs; the fault comes, and for ``seconds`` it goes on; it is repaired
        (``repair`` says which chains must have changed since); chains become whole again while the
        checker still runs. Then everything is verified, and the copies are compared.
        ``going_on``: what does not wait for the repair."""
        self.checker.start()
        try:
            self._all_succeed(f"before: {scenario}")
            before = self.checker.acknowledged
            self.checker.open_window()
            self.checker.blocks.evicting = evicting
            fault()
            self.checker.wait(seconds)
            # Blocks are read whatever is broken; writes may wait for a chain to change.
            wait_until(
                lambda: self._checked() and self.checker.window["get"].done > 0,
                f"blocks are read: {scenario}",
            )
            restarted = repair()
            began = time.monotonic()
            wait_until(lambda: self._checked() and self.is_whole(restarted), "chains are whole")
            recovery = time.monotonic() - began
            window = self.checker.window
            self._all_succeed(f"after: {scenario}")
        finally:
            self.checker.stop()
        self.checker.verify()
        self.compare_copies()
        self.checker.blocks.evicting = False
        errors = ", ".join(
            f"{name}: {count} {error}"
            for name, one in window.items()
            for error, count in sorted(one.errors.items())
        )
        if evicting:
            errors += f"; {self.checker.blocks.evicted} blocks evicted"
        for name in going_on:
            assert window[name].gap < seconds, f"{name} waited: {scenario}"
        gaps = tuple(window[name].gap for name in ("put", "get", "write", "read"))
        done = self.checker.acknowledged - before
        row = Row(self.copies, scenario, done, gaps, recovery, errors or "none")
        self.rows.append(row)
        return row

    def _checked(self) -> bool:
        self.checker.check()
        return True

    def _all_succeed(self, when: str) -> None:
        """Each of the four has done something from now on. The window's gaps include the wait."""
        done = {name: one.done for name, one in self.checker.window.items()}
        wait_until(
            lambda: (
                self._checked()
                and all(one.done > done[name] for name, one in self.checker.window.items())
            ),
            f"service {when}",
        )

    def heal(self) -> dict[int, int]:
        self.hosts.heal()
        return {}

    # --- what is on the disks

    def compare_copies(self) -> None:
        """Nobody writes: what several members of a chain have is the same, byte by byte, and
        nothing is pending. Who lacks something that he should have, ``kvfs fsck`` tells."""
        found = self.map()
        assert found is not None
        disks = {one.target_id: self._disk_of(one) for one in found.targets}
        for chain in found.chains:
            if not chain.is_replicated:
                continue
            wait_until(
                lambda chain=chain: self._difference(chain, disks) is None,
                f"copies of chain {chain.chain_id} agree: {self._difference(chain, disks)}",
            )

    def _disk_of(self, target: Target) -> Path:
        return self.hosts[int(target.server_id.removeprefix("host"))].disk()

    @staticmethod
    def _difference(chain: Chain, disks: dict[int, Path]) -> str | None:
        """Removed chunks go at different times: they count only if they are still there."""
        copies: dict[ChunkId, list[tuple[Path, bytes]]] = {}
        for target_id in chain.targets:
            root = disks[target_id] / chunk_format.root_of(chain.chain_id)
            for path in sorted(root.glob("*/*")):
                if path.parent.name == chunk_format.PENDING:
                    return f"{path} is pending"
                chunk = chunk_format.chunk_of(path.name, chain.chain_id)
                assert chunk is not None, path
                data = _committed(path, chunk)
                if data is not None:
                    copies.setdefault(chunk, []).append((path, data))
        for chunk, found in copies.items():
            if any(data != found[0][1] for _, data in found) and found[-1][0].exists():
                return f"{chunk}: {[str(path) for path, _ in found]} differ"
        return None

    def wait_for_fsck(self) -> None:
        """Until `kvfs fsck --verify` finds nothing: servers look for what slipped through in
        rounds of their own."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while printed := self._fsck():
            assert time.monotonic() < deadline, printed[:3000]

    def _fsck(self) -> str:
        done = self.hosts[1].kvfs("fsck", self.hosts.metadata_unix, "--verify", "--json")
        return "" if done.returncode == ExitCode.OK else (done.stdout + done.stderr).decode()


def _committed(path: Path, chunk: ChunkId) -> bytes | None:
    """What readers of the chunk get; None if it was removed meanwhile."""
    try:
        attribute = os.getxattr(path, f"user.{chunk_format.ATTRIBUTE}")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    info, append = chunk_format.unpack_versioned(attribute, chunk)
    assert append is None, f"{path} has a pending append"
    return data[: info.length]


def stores_attributes(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.kvfs", b"x")
    except OSError:
        return False
    return True


def chain_hosts(copies: int, seed: int) -> Iterator[ChainHosts]:
    with Hosts(4) as hosts:
        cluster = ChainHosts(hosts, copies, seed)
        try:
            yield cluster
        finally:
            cluster.close()
