"""A `kvfs up` as its users run it: the command line, signals, kills, what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import kvfs
from kvfs.cli import cli
from kvfs.mount import system
from kvfs.supervisor import locks
from kvfs_base.types import KVLayout

KVFS = (sys.executable, "-m", "kvfs")
DEADLINE_SECONDS = 120.0
POLL_SECONDS = 0.05
BLOCK_BYTES = 64 * 1024


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`kvfs ARGUMENTS`, to its end."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "check": False} | options
    if "input" in options:
        del options["stdin"]
    return subprocess.run([*KVFS, *map(str, arguments)], timeout=DEADLINE_SECONDS, **options)


def told(*arguments: object) -> Any:
    """What `kvfs ARGUMENTS --json` prints, without a process: tests ask until something is so."""
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    return json.loads(done.stdout)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(POLL_SECONDS)


def block(number: int) -> tuple[bytes, bytes]:
    """Key and bytes of the block ``number``: 64 KiB that no other block has."""
    key = hashlib.sha256(b"key %d" % number).digest()
    return key, hashlib.shake_128(b"block %d" % number).digest(BLOCK_BYTES)


class Cluster:
    """One directory and mount point."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "kv"
        self.mountpoint = root / "mnt"
        self.process: subprocess.Popen[bytes] | None = None

    def arguments(self) -> list[str]:
        flags = ["--mount", self.mountpoint, "--arena", "64M", "--capacity", "1G"]
        return ["up", *map(str, [self.directory, *flags])]

    def up(self, *more: str) -> None:
        """Detached."""
        done = run(*self.arguments(), "--detach", *more)
        assert done.returncode == 0, done.stderr

    def up_in_foreground(self) -> subprocess.Popen[bytes]:
        """As the leader of a process group, as a shell starts it; returns once it serves."""
        self.process = process = subprocess.Popen(
            [*KVFS, *self.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"kvfs is up in ")
        return process

    def down(self) -> None:
        done = run("down", self.directory)
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = told("status", self.directory)
        return found

    def endpoints(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "run/endpoints.json").read_bytes())
        return found

    def pids(self) -> dict[str, int]:
        pids: dict[str, int] = self.endpoints()["pids"]
        return pids

    def remaining(self) -> list[int]:
        """Every process of this kvfs holds this file open."""
        return locks.holders(self.directory / "run/children.lock")

    def is_mounted(self) -> bool:
        return system.mounted_at(str(self.mountpoint)) is not None

    def assert_gone(self) -> None:
        assert self.remaining() == []
        assert not self.is_mounted()
        assert not (self.directory / "run/endpoints.json").exists()
        assert list((self.directory / "run").glob("*.sock")) == []

    def clean_up(self) -> None:
        """Whatever a failed test left."""
        for pid in self.remaining():
            os.kill(pid, 9)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process.wait()
        if self.is_mounted():
            system.unmount(str(self.mountpoint), lazy=True)

    def put(self, client: kvfs.Client, numbers: Sequence[int]) -> None:
        keys, buffers = zip(*map(block, numbers), strict=True)
        layout = KVLayout(block_tokens=16)
        client.namespace("tenant/model", layout, create=True).put(keys, buffers)

    def check_api(self, client: kvfs.Client, numbers: Sequence[int]) -> None:
        """All of these blocks are there with the right bytes."""
        keys, buffers = zip(*map(block, numbers), strict=True)
        with client.namespace("tenant/model").get(keys) as blocks:
            assert [view is not None for view in blocks] == [True] * len(keys)
            assert all(view == data for view, data in zip(blocks, buffers, strict=True))

    def check_mount(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            key, data = block(number)
            assert self.block_path(key).read_bytes() == data

    def block_path(self, key: bytes) -> Path:
        return self.mountpoint / "kv/tenant/model" / key.hex()

    def chunk_files(self, inode: int) -> list[Path]:
        return list(self.directory.glob(f"targets/*/chunks/*/{inode:016x}.*"))
