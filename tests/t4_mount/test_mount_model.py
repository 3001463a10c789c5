"""Random operations on the mount and on a directory of another file system, side by side: the same
results, the same errno, the same tree in the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posix_model import PosixModel, check
from posix_trees import KernelTree

STEPS = 1500
MODEL_EXAMPLES = int(os.environ.get("KVFS_MOUNT_EXAMPLES", "20"))
NAMES = ["a", "b", "c", "dd", "e" * 60, "x.tmp"]


@pytest.fixture
def reference() -> Iterator[Path]:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as directory:
        yield Path(directory)


class Twins:
    """Does everything twice and compares."""

    def __init__(self, mount: Path, reference: Path, seed: int) -> None:
        self.roots = (mount, reference)
        self.rng = random.Random(seed)
        self.open: list[tuple[int, int]] = []
        self.trace: list[str] = []

    def both(self, text: str, function: Callable[[Path, int], Any]) -> None:
        self.trace.append(text)
        outcomes = []
        for which, root in enumerate(self.roots):
            try:
                outcomes.append(("ok", function(root, which)))
            except OSError as exc:
                outcomes.append(("errno", exc.errno))
        assert outcomes[0] == outcomes[1], "\n".join(self.trace[-40:]) + f"\n{outcomes}"

    def path(self) -> str:
        return "/".join(self.rng.choice(NAMES) for _ in range(self.rng.choice([1, 1, 2, 2, 3])))

    def step(self) -> None:
        operations = [
            (8, self.make_file), (4, self.mkdir), (2, self.rmdir), (4, self.unlink),
            (5, self.rename), (2, self.link), (2, self.symlink), (3, self.truncate),
            (3, self.chmod), (2, self.utime), (6, self.stat), (3, self.listdir),
            (8, self.open_file), (12, self.write), (10, self.read), (3, self.ftruncate),
            (2, self.fsync), (5, self.close), (3, self.append), (2, self.readlink),
            (2, self.xattr),
        ]  # fmt: skip
        weights = [weight for weight, _ in operations]
        self.rng.choices([operation for _, operation in operations], weights)[0]()

    # --- names

    def make_file(self) -> None:
        path, data = self.path(), self.rng.randbytes(self.rng.choice([0, 10, 5000, 70_000]))
        self.both(f"write {path} {len(data)}", lambda root, _: (root / path).write_bytes(data))

    def mkdir(self) -> None:
        path = self.path()
        self.both(f"mkdir {path}", lambda root, _: os.mkdir(root / path))

    def rmdir(self) -> None:
        path = self.path()
        self.both(f"rmdir {path}", lambda root, _: os.rmdir(root / path))

    def unlink(self) -> None:
        path = self.path()
        self.both(f"unlink {path}", lambda root, _: os.unlink(root / path))

    def rename(self) -> None:
        old, new = self.path(), self.path()
        self.both(f"rename {old} {new}", lambda root, _: os.rename(root / old, root / new))

    def link(self) -> None:
        old, new = self.path(), self.path()
        self.both(
            f"link {old} {new}",
            lambda root, _: os.link(root / old, root / new, follow_symlinks=False),
        )

    def symlink(self) -> None:
        path, target = self.path(), self.rng.choice(NAMES)
        self.both(f"symlink {target} {path}", lambda root, _: os.symlink(target, root / path))

    def readlink(self) -> None:
        path = self.path()
        self.both(f"readlink {path}", lambda root, _: os.readlink(root / path))

    def listdir(self) -> None:
        path = self.path()
        self.both(f"listdir {path}", lambda root, _: sorted(os.listdir(root / path)))

    # --- attributes

    def chmod(self) -> None:
        path, mode = self.path(), self.rng.choice([0o600, 0o644, 0o755, 0o777, 0o1755])
        self.both(f"chmod {path} {mode:o}", lambda root, _: os.chmod(root / path, mode))

    def utime(self) -> None:
        path, when = self.path(), self.rng.randrange(10**18)
        self.both(f"utime {path} {when}", lambda root, _: os.utime(root / path, ns=(when, when)))

        def times(root: Path, _: int) -> Any:
            return os.stat(root / path).st_mtime_ns

        self.both(f"mtime {path}", times)

    def truncate(self) -> None:
        path, size = self.path(), self.rng.choice([0, 1, 4095, 4096, 50_000, 20_000_000])
        self.both(f"truncate {path} {size}", lambda root, _: os.truncate(root / path, size))

    def stat(self) -> None:
        path = self.path()
        self.both(f"stat {path}", lambda root, _: facts(os.lstat(root / path)))

    def xattr(self) -> None:
        path, name = self.path(), self.rng.choice(["user.a", "user.b"])
        value = self.rng.randbytes(self.rng.choice([0, 5, 500]))
        choice = self.rng.randrange(4)

        def act(root: Path, _: int) -> Any:
            if choice == 0:
                return os.setxattr(root / path, name, value)
            if choice == 1:
                return os.getxattr(root / path, name)
            if choice == 2:
                return os.removexattr(root / path, name)
            return sorted(os.listxattr(root / path))

        self.both(f"xattr {choice} {path} {name} {len(value)}", act)

    # --- open files

    def open_file(self) -> None:
        if len(self.open) >= 8:
            return
        path = self.path()
        flags = self.rng.choice([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT])
        flags |= self.rng.choice([0, 0, os.O_TRUNC if flags & os.O_RDWR else 0])
        flags |= self.rng.choice([0, 0, os.O_EXCL if flags & os.O_CREAT else 0])
        opened: list[int] = []

        def act(root: Path, _: int) -> None:
            opened.append(os.open(root / path, flags, 0o644))

        try:
            self.both(f"open {path} {flags:o} -> #{len(self.open)}", act)
        finally:
            if len(opened) == 2:
                self.open.append((opened[0], opened[1]))

    def some(self) -> tuple[int, tuple[int, int]] | None:
        if not self.open:
            return None
        number = self.rng.randrange(len(self.open))
        return number, self.open[number]

    def write(self) -> None:
        if (some := self.some()) is None:
            return
        number, pair = some
        offset = self.rng.choice([0, 100, 4096, 65_536, 16_777_210, self.rng.randrange(200_000)])
        data = self.rng.randbytes(self.rng.choice([1, 100, 4096, 30_000]))
        self.both(
            f"pwrite #{number} {len(data)} at {offset}",
            lambda _, which: os.pwrite(pair[which], data, offset),
        )

    def append(self) -> None:
        path, data = self.path(), self.rng.randbytes(self.rng.choice([1, 5000]))

        def act(root: Path, _: int) -> int:
            descriptor = os.open(root / path, os.O_WRONLY | os.O_APPEND)
            with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)) as file:
                return file.write(data)

        self.both(f"append {path} {len(data)}", act)

    def read(self) -> None:
        if (some := self.some()) is None:
            return
        number, pair = some
        offset = self.rng.choice([0, 50, 4096, 16_777_200, self.rng.randrange(200_000)])
        length = self.rng.choice([1, 4096, 100_000])
        self.both(
            f"pread #{number} {length} at {offset}",
            lambda _, which: os.pread(pair[which], length, offset),
        )

    def ftruncate(self) -> None:
        if (some := self.some()) is None:
            return
        number, pair = some
        size = self.rng.choice([0, 10, 4097, 100_000, 16_777_300])
        self.both(f"ftruncate #{number} {size}", lambda _, which: os.ftruncate(pair[which], size))

    def fsync(self) -> None:
        if (some := self.some()) is None:
            return
        number, pair = some
        self.both(f"fsync #{number}", lambda _, which: os.fsync(pair[which]))
        self.both(f"fstat #{number}", lambda _, which: facts(os.fstat(pair[which])))

    def close(self) -> None:
        if (some := self.some()) is None:
            return
        number, pair = some
        del self.open[number]
        self.both(f"close #{number}", lambda _, which: os.close(pair[which]))

    def close_all(self) -> None:
        while self.open:
            pair = self.open.pop()
            self.both("close", lambda _, which, pair=pair: os.close(pair[which]))


def facts(found: os.stat_result) -> tuple[Any, ...]:
    """What must be equal: sizes of directories and their times are each file system's own."""
    size = -1 if stat.S_ISDIR(found.st_mode) else found.st_size
    return (found.st_mode, found.st_uid, found.st_gid, size, found.st_nlink)


def tree(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            seen = path.lstat()
            contents = path.read_bytes() if stat.S_ISREG(seen.st_mode) else b""
            found[str(path.relative_to(root))] = (facts(seen), contents)
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations(work: Path, reference: Path, seed: int) -> None:
    twins = Twins(work, reference, seed)
    try:
        for _ in range(STEPS):
            twins.step()
    finally:
        twins.close_all()
    assert tree(work) == tree(reference), "\n".join(twins.trace[-40:])


def test_names_and_attributes(work: Path) -> None:
    """The histories that the metadata service alone agrees with the kernel in, through a mount."""
    numbers = itertools.count()

    class MountModel(PosixModel):
        beside = "/var/tmp"

        def tree(self) -> KernelTree:
            directory = work / str(next(numbers))
            directory.mkdir()
            return KernelTree(str(directory))

    check(MountModel, MODEL_EXAMPLES)
