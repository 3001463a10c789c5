"""Reads and writes of ordinary files by fio, through the page cache as programs do them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfs_base.limits import KIB, MIB
from kvfs_tools.mount_rows import Comparison, Sample, have_memory, timed
from kvfs_tools.mount_systems import System

KINDS = ("read", "randread", "write", "randwrite")
"""As fio says it."""
SIZES = (4 * KIB, 64 * KIB, MIB, 4 * MIB)
JOBS = (1, 4)
RUN_SECONDS = 3
"""The longest that one measurement takes; small requests do not get through all of their file."""
WARM_SECONDS = 0.4
"""So long files are read again and again: fio counts whole milliseconds, and reads 16 of them for a
file of 128 MiB."""
NEW_BYTES_MIN = 256 * MIB
"""What a job writes in new files, for the same reason: in one after the other of ``file_bytes``."""
CACHES = Path("/proc/sys/vm/drop_caches")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of the table. ``cold``: the kernel's caches are dropped before."""

    kind: str
    """One of KINDS."""
    request_bytes: int
    jobs: int
    cold: bool = False

    def __str__(self) -> str:
        size = self.request_bytes // KIB
        shown = f"{size} KiB" if size < KIB else f"{size // KIB} MiB"
        verb = "read" if self.kind.endswith("read") else "write"
        order = "at random" if self.kind.startswith("rand") else "in a row"
        caches = "" if verb == "write" else ", cold" if self.cold else ", warm"
        return f"fio, {verb}, {shown} {order}, {self.jobs} job{'s'[: self.jobs > 1]}{caches}"


def workloads(
    sizes: Sequence[int] = SIZES,
    jobs: Sequence[int] = JOBS,
    kinds: Sequence[str] = KINDS,
    *,
    cold: bool = True,
) -> Iterator[Workload]:
    """``cold``: reads from disk as well, where the caches can be dropped."""
    for kind in kinds:
        for size in sizes:
            for count in jobs:
                yield Workload(kind, size, count)
                if cold and kind.endswith("read") and os.access(CACHES, os.W_OK):
                    yield Workload(kind, size, count, cold=True)


class Fio:
    """A file of ``file_bytes`` for each job. Files that are read were written once, before; random
    writes change files that exist, the others make new ones.

    Warm reads are of pages that were read in a row right before, by each system anew: which pages
    a file has got makes some of a difference, and kept ones would make it for a whole row. fio's
    hints (``posix_fadvise``) are off: the kernel does not pass them on to the file that it reads
    for a mount, while the plain directory reads ahead twice as far with them.
    """

    def __init__(
        self, comparison: Comparison, systems: Sequence[System], file_bytes: int, jobs: int
    ) -> None:
        self._comparison = comparison
        self._systems = systems
        self._file_bytes = file_bytes
        self._jobs = jobs

    def prepare(self) -> None:
        data = os.urandom(self._file_bytes)
        for system in (self._comparison.plain, *self._systems):
            for purpose in ("read", "change"):
                folder = system.path / f"fio-{purpose}"
                folder.mkdir()
                for job in range(self._jobs):
                    (folder / f"{job}.0").write_bytes(data)

    def run(self, chosen: Sequence[Workload]) -> None:
        for work in chosen:
            self._comparison.add(
                str(work),
                "GB/s",
                self._systems,
                lambda system, work=work: self._measure(system, work),  # type: ignore[misc]
            )

    def _measure(self, system: System, work: Workload) -> Sample:
        folder = system.path / f"fio-{self._purpose(work)}"
        folder.mkdir(exist_ok=True)
        if self._purpose(work) == "read":
            self._prepare_reads(folder, work)
        if self._purpose(work) == "new":
            os.sync()  # what the one before has left in memory is not written meanwhile
            have_memory(2 * work.jobs * self._new_files * self._file_bytes)
        with timed(system) as timer:
            report = self._fio(folder, work)
        if self._purpose(work) == "new":
            shutil.rmtree(folder)
        side = report["jobs"][0]["read" if work.kind.endswith("read") else "write"]
        # fio knows when its jobs began and ended: starting it is not part of it.
        return Sample(side["io_bytes"], side["runtime"] / 1e3, timer.cpu_seconds)

    @property
    def _new_files(self) -> int:
        return -(-NEW_BYTES_MIN // self._file_bytes)

    def _prepare_reads(self, folder: Path, work: Workload) -> None:
        if os.access(CACHES, os.W_OK):
            CACHES.write_text("3")
        if not work.cold:
            room = memoryview(bytearray(MIB))
            for job in range(work.jobs):
                with (folder / f"{job}.0").open("rb", buffering=0) as file:
                    while file.readinto(room):
                        pass

    @staticmethod
    def _purpose(work: Workload) -> str:
        return {"write": "new", "randwrite": "change"}.get(work.kind, "read")

    def _fio(self, folder: Path, work: Workload) -> dict[str, list[dict[str, dict[str, float]]]]:
        argv = [
            "fio",
            "--name=mount",
            f"--directory={folder}",
            "--filename_format=$jobnum.$filenum",
        ]
        argv += [f"--rw={work.kind}", f"--bs={work.request_bytes}"]
        argv += [f"--filesize={self._file_bytes}", "--fadvise_hint=0"]
        argv += [f"--numjobs={work.jobs}", "--group_reporting", "--thread", "--ioengine=psync"]
        argv += ["--invalidate=0", "--fallocate=none"]
        if self._purpose(work) == "new":
            count = self._new_files
            argv += [f"--nrfiles={count}", f"--size={count * self._file_bytes}"]
            argv += ["--create_on_open=1", "--openfiles=1", "--file_service_type=sequential"]
        if self._purpose(work) == "read" and not work.cold:
            argv += ["--time_based", f"--runtime={WARM_SECONDS * 1e3:.0f}ms"]
        else:
            argv.append(f"--runtime={RUN_SECONDS}")
        argv += ["--randrepeat=0", "--norandommap", "--output-format=json"]
        done = subprocess.run(argv, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"fio failed: {done.stderr.decode(errors='replace')[-1000:]}")
        found: dict[str, list[dict[str, dict[str, float]]]] = json.loads(done.stdout)
        return found


__all__ = ["JOBS", "KINDS", "SIZES", "Fio", "Workload", "workloads"]
