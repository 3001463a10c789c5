"""Chunk servers as processes of their own, for benchmarks of the data path."""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import click

from kvfs_base.cluster import Chain, TargetState
from kvfs_base.errors import KvfsError
from kvfs_base.os_env import os_env
from kvfs_base.types import Address, ChunkId, KVLayout
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkClient, ChunkRead, ChunkWrite
from kvfs_metadata import messages as m
from kvfs_metadata.client import BlockingMetadataClient, ClusterView
from kvfs_tools.cluster import cpu_clock

START_SECONDS = 60.0
REBUILD_SECONDS = 600.0
POLL_SECONDS = 0.02
FIRST_INODE = 1 << 40
"""The benchmark makes chunks that no metadata knows, far from those that it does."""


class ChunkRig:
    """A metadata service and ``servers`` chunk servers below ``directory``, each with a Unix and a
    TCP address on this machine, and clients of both ways."""

    def __init__(
        self, directory: Path, servers: int, copies: int, durability: str = "cache"
    ) -> None:
        self._directory = directory
        self._servers = servers
        self._copies = copies
        self._durability = durability
        self._metadata = Address.unix(f"{directory}/m.sock")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._inodes = itertools.count(FIRST_INODE)

    def __enter__(self) -> ChunkRig:
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            self._directory.mkdir()
            home = f"--directory={self._directory}/metadata"
            self._start("metadata", "metadata", home, f"--unix={self._metadata}")
            for number in range(self._servers):
                self._start_server(number)
            env = os_env()
            self._view = view = ClusterView(env, self._metadata)
            stack.callback(view.close)
            self.chains = self._chains()
            self.local = ChunkClient(env, view, prefer="local")
            stack.callback(self.local.close)
            self.remote = ChunkClient(env, view, prefer="tcp")
            stack.callback(self.remote.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def target(self, number: int) -> Path:
        return self._directory / f"target-{number}"

    def _start_server(self, number: int) -> None:
        self._start(
            f"chunks-{number}",
            "chunks",
            f"--server-id=bench-{number}",
            f"--host=bench-{number}",  # copies are on different hosts
            f"--directories={self.target(number)}",
            f"--metadata={self._metadata}",
            f"--durability={self._durability}",
            f"--unix=unix:{self._directory}/{number}.sock",
            "--tcp=tcp:127.0.0.1:0",
        )

    def _start(self, name: str, role: str, *flags: str) -> None:
        log = self._directory / f"{name}.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvfs", "serve", role, *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._processes[name] = process
        assert process.stdout is not None
        if not process.stdout.readline():
            raise click.ClickException(f"kvfs serve {role} did not start:\n{log.read_text()}")

    def _stop(self) -> None:
        for name in reversed(list(self._processes)):
            process = self._processes.pop(name)
            process.terminate()
            _reap(process)

    def _chains(self) -> list[Chain]:
        """Chains of as many copies as are to be measured. Everything below writes to them and reads
        from them through ChunkClient, however many targets they have. The targets' chains of one
        copy are ``single_chains``."""
        view = self._view
        deadline = time.monotonic() + START_SECONDS
        while True:
            cluster = view.refresh()
            serving = {t.target_id for t in cluster.targets if t.state is TargetState.SERVING}
            if len(serving) == self._servers:
                if self._copies > 1:
                    _ask_for_chains(self._metadata, self._copies)
                    cluster = view.refresh()
                whole = [
                    chain
                    for chain in cluster.chains
                    if chain.copies == len(chain.targets) and serving.issuperset(chain.targets)
                ]
                found = [chain for chain in whole if chain.copies == self._copies]
                if found:
                    self.single_chains = [chain for chain in whole if chain.copies == 1]
                    return found
            if time.monotonic() > deadline:
                raise click.ClickException(f"no chains of {self._copies} copies came up")
            time.sleep(POLL_SECONDS)

    def server_seconds(self) -> float:
        """CPU that the chunk servers have used."""
        return sum(cpu_clock(process.pid) for process in self._servers_alone())

    def _servers_alone(self, besides: int | None = None) -> list[subprocess.Popen[bytes]]:
        numbers = (number for number in range(self._servers) if number != besides)
        return [self._processes[f"chunks-{number}"] for number in numbers]

    def bytes_read(self, besides: int) -> list[int]:
        """What each other chunk server has read of files (not of sockets) since it was started."""
        return [_bytes_read(process.pid) for process in self._servers_alone(besides)]

    # --- a member that has lost everything

    def lose(self, number: int) -> int:
        """Kills a server and takes from its disk what it held: so many bytes."""
        process = self._processes.pop(f"chunks-{number}")
        process.kill()
        _reap(process)
        lost = self.held(number)
        self._clear(number)
        return lost

    def held(self, number: int) -> int:
        """Bytes of the chunks that a server has."""
        return sum(path.stat().st_size for path in self._chunk_files(number))

    def clear(self) -> None:
        """Takes all chunks away, behind the servers' backs."""
        for number in range(self._servers):
            self._clear(number)

    def _clear(self, number: int) -> None:
        for path in self._chunk_files(number):
            path.unlink()

    def _chunk_files(self, number: int) -> list[Path]:
        return [path for path in self.target(number).glob("ch*/**/*.*") if path.is_file()]

    def bring_back(self, number: int) -> float:
        """Starts it again. How many seconds it takes until every chain has all its copies, from
        the moment at which it can be asked."""
        before = {c.chain_id: c.version for c in self._view.refresh().chains}
        self._start_server(number)
        (target,) = (t for t in self._view.current().targets if t.server_id == f"bench-{number}")
        wanted = {c.chain_id for c in self.chains if target.target_id in c.targets}
        began = time.monotonic()
        while True:
            now = {c.chain_id: c for c in self._view.refresh().chains}
            # One change to be left out, one to sync, one to serve: what has all its copies under
            # the version from before has only not been looked at yet.
            if all(
                now[c].version > before[c] and len(now[c].targets) == self._copies for c in wanted
            ):
                return time.monotonic() - began
            if time.monotonic() - began > REBUILD_SECONDS:
                raise click.ClickException("a server does not come back into its chains")
            time.sleep(POLL_SECONDS)

    # --- chunks

    def fill(
        self, memory: memoryview, count: int, size: int, chains: Sequence[Chain] | None = None
    ) -> list[ChunkWrite]:
        """``count`` new chunks that lie one after the other in ``memory``, dealt to the chains in
        order; their bytes are what is in memory."""
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        chains = self.chains if chains is None else chains
        return [
            ChunkWrite(
                chunk=ChunkId(next(self._inodes), 0),
                chain=chains[index * len(chains) // count].chain_id,
                size=size,
                crc32c=crc32c(memory[index * room : index * room + size]),
                key=b"",
                view=memory[index * room : (index + 1) * room],
            )
            for index in range(count)
        ]

    def reads_of(self, writes: Sequence[ChunkWrite], memory: memoryview) -> list[ChunkRead]:
        """The same chunks, into other memory."""
        at = 0
        reads = []
        for write in writes:
            view = memory[at : at + len(write.view)]
            at += len(view)
            reads.append(
                ChunkRead(write.chunk, write.chain, write.size, write.crc32c, write.key, view)
            )
        return reads

    def files_of(self, writes: Sequence[ChunkWrite], number: int) -> list[Path]:
        """Where server ``number`` keeps them, those that it has."""
        wanted = {write.chunk.inode for write in writes}
        return [
            path
            for path in self._chunk_files(number)
            if int(path.name.partition(".")[0], 16) in wanted
        ]

    def remove(self, writes: Sequence[ChunkWrite]) -> None:
        """Behind the servers' backs: nobody will ask for them again."""
        for number in range(self._servers):
            for path in self.files_of(writes, number):
                os.unlink(path)


def _bytes_read(pid: int) -> int:
    (line,) = re.findall(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())
    return int(line)


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _ask_for_chains(metadata: Address, copies: int) -> None:
    """Chains of several copies are made for the first who stores something that wants them."""
    client = BlockingMetadataClient(os_env(), metadata)
    try:
        layout = KVLayout(block_tokens=1)
        info: m.NamespaceInfo = client.call(m.OpenNamespace("bench/copies", layout, True, copies))
        batch: m.PreparedBatch = client.call(m.PrepareBlocks(info.inode, bytes(32), (1,)))
        client.call(m.AbortBlocks(batch.batch_id))
    finally:
        client.close()


def check(results: Sequence[KvfsError | None]) -> None:
    """Raises the first error: what was not moved must not be measured."""
    for error in results:
        if error is not None:
            raise error


def write_json(path: str, rows: Sequence[dict[str, object]]) -> None:
    Path(path).write_text(json.dumps(list(rows), indent=1))
