"""Random POSIX operations on two trees (Hypothesis): the same answers from both, errno included.

With KVFS_MODEL_RANDOM the histories are new ones each time, else always the same.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from posix_trees import RENAME_EXCHANGE, RENAME_NOREPLACE, KernelTree

names = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff\x01", b"n" * 255])
odd_names = st.sampled_from([b"n" * 256])
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: b"/" + b"/".join(parts))
any_paths = paths | st.tuples(paths, odd_names).map(b"/".join)
modes = st.sampled_from([0o755, 0o644, 0o000, 0o1777, 0o4755, 0o2755])
xattr_names = st.sampled_from([b"user.one", b"user.two"])


class PosixModel(RuleBasedStateMachine):
    """A directory of the kernel's, below ``beside``, and what ``tree`` makes."""

    beside = "/dev/shm"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=self.beside, prefix="kvfs-model-")
        self.kernel = KernelTree(self.folder.name)

    def tree(self) -> Any:
        """A new, empty tree with the operations of a KernelTree."""
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.service = self.tree()

    def both(self, operation: str, *args: Any) -> None:
        expected = getattr(self.kernel, operation)(*args)
        actual = getattr(self.service, operation)(*args)
        assert actual == expected, f"{operation}{args}: kernel {expected!r}, kvfs {actual!r}"

    @rule(path=any_paths, mode=modes)
    def mkdir(self, path: bytes, mode: int) -> None:
        self.both("mkdir", path, mode)

    @rule(path=any_paths, mode=modes)
    def create(self, path: bytes, mode: int) -> None:
        self.both("create", path, mode)

    @rule(path=paths, mode=modes)
    def mkfifo(self, path: bytes, mode: int) -> None:
        self.both("mkfifo", path, mode)

    @rule(path=paths, to=st.sampled_from([b"nowhere", b"/no/where", b"\x80\xff"]))
    def symlink(self, path: bytes, to: bytes) -> None:
        self.both("symlink", path, to)

    @rule(path=paths, new=any_paths)
    def link(self, path: bytes, new: bytes) -> None:
        self.both("link", path, new)

    @rule(path=any_paths)
    def unlink(self, path: bytes) -> None:
        self.both("unlink", path)

    @rule(path=paths)
    def rmdir(self, path: bytes) -> None:
        self.both("rmdir", path)

    @rule(
        path=paths,
        new=any_paths,
        flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]),
    )
    def rename(self, path: bytes, new: bytes, flags: int) -> None:
        self.both("rename", path, new, flags)

    @rule(path=paths, mode=modes)
    def chmod(self, path: bytes, mode: int) -> None:
        self.both("chmod", path, mode)

    @rule(path=paths, uid=st.sampled_from([0, 7]), gid=st.sampled_from([0, 8]))
    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self.both("chown", path, uid, gid)

    @rule(path=paths, times=st.tuples(st.integers(0, 2**33), st.integers(0, 10**9)))
    def utime(self, path: bytes, times: tuple[int, int]) -> None:
        self.both("utime", path, times[0] * 10**9 + times[1], times[1])

    @rule(path=paths, name=xattr_names, value=st.binary(max_size=40), flags=st.integers(0, 2))
    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        self.both("setxattr", path, name, value, flags)

    @rule(path=paths, name=xattr_names)
    def getxattr(self, path: bytes, name: bytes) -> None:
        self.both("getxattr", path, name)

    @rule(path=paths, name=xattr_names)
    def removexattr(self, path: bytes, name: bytes) -> None:
        self.both("removexattr", path, name)

    @rule(path=paths)
    def look(self, path: bytes) -> None:
        for operation in ("stat", "readlink", "listdir", "listxattr"):
            self.both(operation, path)

    def compare(self, folder: bytes = b"") -> None:
        self.both("listdir", folder or b"/")
        for name in self.kernel.listdir(folder or b"/"):
            path = folder + b"/" + name
            for operation in ("stat", "readlink", "listxattr"):
                self.both(operation, path)
            if os.path.isdir(self.kernel._path(path)) and not os.path.islink(
                self.kernel._path(path)
            ):
                self.compare(path)

    def teardown(self) -> None:
        try:
            if hasattr(self, "service"):
                self.compare()
        finally:
            self.folder.cleanup()


def check(machine: type[PosixModel], examples: int) -> None:
    """``examples`` histories of up to 100 operations each."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=100,
            deadline=None,
            phases=[
                Phase.generate
            ],  # a history of 100 operations says enough; shrinking takes minutes
            database=None,
            derandomize="KVFS_MODEL_RANDOM" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
