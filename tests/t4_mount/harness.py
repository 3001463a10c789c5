"""A whole kvfs (metadata on LMDB, three chunk servers) and real mounts of it.

Every role is a process, so that a test may block in the mount and may kill it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forks import Forked

START_SECONDS = 60.0
STOP_SECONDS = 60.0
WAIT_SECONDS = 60.0
COLLECTED_SECONDS = 120.0
"""An unlinked file may be kept for SESSION_GRACE_SECONDS after the service started."""
MNT_DETACH = 2
COMPLAINT = re.compile(r"^((WARNING|ERROR|CRITICAL) kvfs|Traceback)\b", re.MULTILINE)


def wait_until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    """Polls ``condition`` until it is true; fails the test otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not true within {seconds} s: {condition}")
        time.sleep(0.01)


class Role:
    """One process of a kvfs."""

    def __init__(self, cluster: Cluster, *argv: str) -> None:
        self.cluster = cluster
        self.argv = argv
        self.log = cluster.directory / f"{argv[0]}-{uuid.uuid4().hex[:6]}.log"
        self.process: Forked | None = None

    def start(self) -> Role:
        role, *arguments = self.argv
        with self.log.open("ab") as log:
            self.process = Forked(
                "t4_mount.roles:main", role, self.cluster.directory, *arguments, stderr=log
            )
        poll = select.poll()  # select() takes no descriptor above 1,023
        poll.register(self.process.stdout, select.POLLIN)
        line = self.process.stdout.readline() if poll.poll(1000 * START_SECONDS) else b""
        if line.strip() != b"ready":
            self.kill()
            pytest.fail(f"{self.argv[0]} did not start:\n{self.log.read_text()[-3000:]}")
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self._reap()

    def stop(self) -> None:
        """SIGTERM; a process that does not end is a failure."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self._reap()
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{self.argv[0]} ignored SIGTERM:\n{self.log.read_text()[-3000:]}")

    def _reap(self) -> None:
        assert self.process is not None
        self.process.wait(STOP_SECONDS)
        self.process.stdout.close()
        self.process = None


class Cluster:
    """With ``hosts`` each chunk server believes to be on a host of its own, the first one on that
    of the mounts. ``session_seconds``: how long sessions of mounts that were killed last, if not
    30 s."""

    def __init__(self, directory: Path, *, hosts: bool = False, session_seconds: float = 0) -> None:
        self.directory = directory
        self.mount_options: tuple[str, ...] = ()
        """Of every mount."""
        for name in ("metadata", "targets", "run"):
            (directory / name).mkdir(mode=0o700)
        self.roles: list[Role] = []
        short = (str(session_seconds),) if session_seconds else ()
        self.metadata = self._role("metadata", *short).start()
        self.chunks = self._role("chunks", "3", *["--hosts"] * hosts).start()
        self._wait_for_targets(3)

    def _role(self, *argv: str) -> Role:
        role = Role(self, *argv)
        self.roles.append(role)
        return role

    @property
    def address(self) -> Any:
        from kvfs_base.types import Address

        return Address.unix(f"{self.directory}/run/metadata.sock")

    def _wait_for_targets(self, count: int) -> None:
        from kvfs_base.cluster import GetClusterMap

        with self.client() as client:
            wait_until(lambda: len(client.call(GetClusterMap()).chains) >= count)

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A BlockingMetadataClient."""
        from kvfs_base.os_env import os_env
        from kvfs_metadata.client import BlockingMetadataClient

        client = BlockingMetadataClient(os_env(), self.address)
        try:
            yield client
        finally:
            client.close()

    @contextlib.contextmanager
    def chunk_client(self) -> Iterator[Any]:
        from kvfs_base.os_env import os_env
        from kvfs_datapath.client.chunk_client import ChunkClient
        from kvfs_metadata.client import ClusterView

        view = ClusterView(os_env(), self.address)
        client = ChunkClient(os_env(), view)
        try:
            yield client
        finally:
            client.close()
            view.close()

    def mount(self, mountpoint: Path, *options: str) -> Role:
        with contextlib.suppress(FileExistsError):
            mountpoint.mkdir()
        return self._role("mount", str(mountpoint), *self.mount_options, *options).start()

    @contextlib.contextmanager
    def mounted(self, mountpoint: Path, *options: str) -> Iterator[Path]:
        role = self.mount(mountpoint, *options)
        try:
            yield mountpoint
        finally:
            role.stop()
            assert not os.path.ismount(mountpoint)

    def put_blocks(self, path: str, blocks: dict[bytes, bytes]) -> dict[bytes, Any]:
        """Stores KV blocks by key in the namespace ``path``; answers with their BlockInfo."""
        import mmap

        from kvfs_base.limits import PAGE_BYTES
        from kvfs_base.types import ChunkId, KVLayout
        from kvfs_datapath.checksum import crc32c
        from kvfs_datapath.client.chunk_client import ChunkWrite
        from kvfs_metadata.messages import (
            CommitBlocks,
            LookupBlocks,
            OpenNamespace,
            PrepareBlocks,
        )

        keys = b"".join(blocks)
        with self.client() as client, self.chunk_client() as chunks:
            layout = KVLayout(block_tokens=16)
            namespace = client.call(OpenNamespace(path, layout, create=True))
            sizes = tuple(len(data) for data in blocks.values())
            batch = client.call(PrepareBlocks(namespace.inode, keys, sizes))
            writes = []
            for prepared, (key, data) in zip(batch.blocks, blocks.items(), strict=True):
                view = memoryview(mmap.mmap(-1, -(-len(data) // PAGE_BYTES) * PAGE_BYTES))
                view[: len(data)] = data
                writes.append(
                    ChunkWrite(
                        chunk=ChunkId(prepared.inode, 0),
                        chain=prepared.chain,
                        size=len(data),
                        crc32c=crc32c(data),
                        key=key,
                        view=view,
                    )
                )
            assert chunks.write_chunks(writes) == [None] * len(writes)
            client.call(CommitBlocks(batch.batch_id, tuple(w.crc32c for w in writes)))
            infos = client.call(LookupBlocks(namespace.inode, keys))
        return dict(zip(blocks, infos, strict=True))

    def chunk_files(self, inode: int) -> list[Path]:
        """The files on disk that hold the chunks of an inode."""
        name = f"*/{inode:016x}.*"
        found = [self.directory.glob(f"targets/*/{kind}/{name}") for kind in ("chunks", "chains/*")]
        return sorted(itertools.chain(*found))

    def complaints(self) -> list[str]:
        found = []
        for role in self.roles:
            text = role.log.read_text() if role.log.exists() else ""
            found += [line for line in text.splitlines() if COMPLAINT.match(line)]
        return found

    def stop(self) -> None:
        for role in reversed(self.roles):
            role.stop()


def detach(mountpoint: Path) -> None:
    """Removes whatever a failed test left mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.umount2(os.fsencode(mountpoint), MNT_DETACH) == 0:
        pass


def as_user(uid: int, directory: Path, action: Callable[[], Any]) -> int:
    """Runs ``action`` in a child as ``uid``, in ``directory`` (which that user may not be able to
    name); 0, or the errno it failed with."""
    pid = os.fork()
    if not pid:
        code = 255
        try:
            os.chdir(directory)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            action()
            code = 0
        except OSError as exc:
            code = exc.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
