"""Names and small files: what a small-file tool does, one call after the other."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from kvfs_tools.mount_rows import Comparison, Measure, Sample, timed
from kvfs_tools.mount_systems import System

FORGOTTEN_SECONDS = 1.2
"""Kernels answer for names and attributes by themselves for a second, whatever is mounted."""


class Names:
    """``files`` of each operation a measurement, in one directory."""

    def __init__(self, comparison: Comparison, systems: Sequence[System], files: int) -> None:
        self._comparison = comparison
        self._systems = systems
        self._files = files
        self._turns = itertools.count()

    def run(self) -> None:
        self._add("create and close, new files", self._create)
        for system in (self._comparison.plain, *self._systems):
            for path in self._paths(system):
                Path(path).touch()
        self._add("stat, not asked for lately", self._stat)
        self._add("open and close, for reading", self._open)
        self._add("list with types and sizes", self._list)
        self._add("rename", self._rename)
        self._add("unlink", self._unlink)

    def _add(self, what: str, measure: Measure) -> None:
        self._comparison.add(what, "/s", self._systems, measure)

    def _folder(self, system: System) -> Path:
        folder = system.path / "files"
        folder.mkdir(exist_ok=True)
        return folder

    def _paths(self, system: System) -> list[str]:
        folder = self._folder(system)
        return [f"{folder}/{number:06d}" for number in range(self._files)]

    def _create(self, system: System) -> Sample:
        folder = self._folder(system) / f"new-{next(self._turns)}"
        folder.mkdir()
        paths = [f"{folder}/{number}" for number in range(self._files)]
        with timed(system) as timer:
            for path in paths:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        shutil.rmtree(folder)
        return Sample.of(self._files, timer)

    def _stat(self, system: System) -> Sample:
        paths = self._paths(system)
        if system is not self._comparison.plain:
            time.sleep(FORGOTTEN_SECONDS)
        with timed(system) as timer:
            for path in paths:
                os.stat(path)
        return Sample.of(self._files, timer)

    def _open(self, system: System) -> Sample:
        paths = self._paths(system)
        with timed(system) as timer:
            for path in paths:
                os.close(os.open(path, os.O_RDONLY))
        return Sample.of(self._files, timer)

    def _list(self, system: System) -> Sample:
        with timed(system) as timer, os.scandir(self._folder(system)) as entries:
            found = sum(entry.stat(follow_symlinks=False).st_size == 0 for entry in entries)
        if found < self._files:
            raise RuntimeError(f"{found} entries of {self._files} were listed")
        return Sample.of(self._files, timer)

    def _rename(self, system: System) -> Sample:
        paths = self._paths(system)
        with timed(system) as timer:
            for path in paths:
                os.rename(path, f"{path}-new")
        for path in paths:
            os.rename(f"{path}-new", path)
        return Sample.of(self._files, timer)

    def _unlink(self, system: System) -> Sample:
        paths = [f"{path}-gone" for path in self._paths(system)]
        for path in paths:
            Path(path).touch()
        with timed(system) as timer:
            for path in paths:
                os.unlink(path)
        return Sample.of(self._files, timer)


__all__ = ["Names"]
