"""Random POSIX operations give the same answers on the metadata service as on a kernel's directory.

KVFS_MODEL_EXAMPLES sets the number of histories of up to 100 operations (200 by default: 20,000),
always the same ones; with KVFS_MODEL_RANDOM they are new ones each time.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from api_cluster import MetadataThread
from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request
from kvfs_base.types import Address, Attr
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.config import MetadataConfig
from posix_trees import RENAME_EXCHANGE, RENAME_NOREPLACE, KernelTree, ServiceTree

EXAMPLES = int(os.environ.get("KVFS_MODEL_EXAMPLES", "200"))

names = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff\x01", b"n" * 255])
odd_names = st.sampled_from([b"n" * 256])
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: b"/" + b"/".join(parts))
any_paths = paths | st.tuples(paths, odd_names).map(b"/".join)
modes = st.sampled_from([0o755, 0o644, 0o000, 0o1777, 0o4755, 0o2755])
xattr_names = st.sampled_from([b"user.one", b"user.two"])


class PosixModel(RuleBasedStateMachine):
    """Subclassed with a ``call`` by each test below."""

    counter = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvfs-model-")
        self.kernel = KernelTree(self.folder.name)

    def call(self, request: Request) -> Any:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.service = ServiceTree(self.call, b"model-%d" % next(self.counter))

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


def check(call: Any, examples: int) -> None:
    machine = type("Machine", (PosixModel,), {"call": staticmethod(call)})
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


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Address]:
    """The metadata service on LMDB behind a Unix socket, in a thread of its own."""
    address = Address.unix(str(tmp_path / "metadata.sock"))
    thread = MetadataThread(MetadataConfig(directory=str(tmp_path / "metadata"), unix=address))
    yield address
    thread.stop()


class Caller:
    """A client that also plays a chunk server, so that files can be made."""

    HEARTBEAT_EVERY = 100

    def __init__(self, address: Address) -> None:
        self._client = BlockingMetadataClient(os_env(), address)
        self._calls = 0

    def __call__(self, request: Request) -> Any:
        if self._calls % self.HEARTBEAT_EVERY == 0:
            report = TargetReport("disk", 1 << 40, 1 << 40, True, 0)
            self._client.call(Heartbeat("server", "host", None, None, (report,)))
        self._calls += 1
        return self._client.call(request)

    def close(self) -> None:
        self._client.close()


@pytest.mark.timeout(900)
def test_the_service_agrees_with_the_kernel(service: Address) -> None:
    call = Caller(service)
    try:
        check(call, EXAMPLES)
    finally:
        call.close()


def test_the_model_finds_a_wrong_answer(service: Address) -> None:
    """Planted: files lose their execute bits. The model must see it."""
    call = Caller(service)

    def forgetful(request: Request) -> Any:
        answer = call(request)
        if isinstance(answer, Attr) and answer.is_file:
            answer.mode &= ~0o111
        return answer

    try:
        with pytest.raises(AssertionError):
            check(forgetful, 20)
    finally:
        call.close()
