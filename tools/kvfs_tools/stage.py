"""A kvfs of its own for a demonstration: a temporary directory, everything that `kvfs up` starts,
and nothing left of it afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import click
from rich.console import Console

from kvfs_tools.cluster import ClusterFailed, LocalCluster

STOPPING = (signal.SIGTERM, signal.SIGHUP)


class Stage:
    """A running kvfs for the length of a ``with`` block. However that ends (an error, Ctrl-C,
    SIGTERM, a closed terminal), every process, the mount and the directory go; unless ``keep`` is
    set and it ended well."""

    def __init__(
        self,
        *,
        capacity_bytes: int,
        arena_bytes: int,
        keep: bool = False,
        parent: str | None = None,
    ) -> None:
        self.keep = keep
        self.root = Path(tempfile.mkdtemp(prefix="kvfs-demo-", dir=parent))
        self.cluster = LocalCluster(
            self.root, capacity_bytes=capacity_bytes, arena_bytes=arena_bytes, chunk_servers=3
        )
        self._handlers: dict[signal.Signals, object] = {}

    @property
    def directory(self) -> Path:
        """What ``kvfs.connect`` takes."""
        return self.cluster.directory

    @property
    def mountpoint(self) -> Path:
        return self.cluster.mountpoint

    def __enter__(self) -> Self:
        try:
            for number in STOPPING:
                self._handlers[number] = signal.signal(number, _interrupt)
            self.cluster.start()
        except ClusterFailed as exc:
            self._clear()
            raise click.ClickException(f"kvfs did not start:\n{exc}") from exc
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self.keep:
            self._restore_handlers()
            return
        self._clear()

    def _clear(self) -> None:
        """Not to be interrupted: it takes a second, and half of it would leave a mount behind."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        try:
            self.cluster.stop()
            if os.path.ismount(self.mountpoint):
                subprocess.run(["umount", "-l", self.mountpoint], check=False)
            shutil.rmtree(self.root, ignore_errors=True)
        finally:
            signal.signal(signal.SIGINT, before)
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def room_bytes(self) -> int:
        """Free space where the blocks go."""
        return shutil.disk_usage(self.root).free


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite signal unwinds as Ctrl-C does."""
    raise KeyboardInterrupt


class Teller:
    """Says how far a long step is: a line that is written over in a terminal, a line every few
    seconds elsewhere."""

    PLAIN_SECONDS = 3.0
    LIVE_SECONDS = 0.1

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live = console.is_terminal
        self._next = 0.0

    def __call__(self, text: Callable[[], str]) -> None:
        """Shows ``text()`` if it is time to."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (self.LIVE_SECONDS if self._live else self.PLAIN_SECONDS)
        if self._live:
            line = text()[: max(10, self._console.width - 1)]
            sys.stdout.write(f"\r\x1b[2K{line}")
            sys.stdout.flush()
        else:
            self.say(text())

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            sys.stdout.write("\r\x1b[2K")
            sys.stdout.flush()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
