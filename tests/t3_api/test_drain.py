"""A server is drained while its blocks and files of one copy are read, written and made: nothing is
lost, no byte is wrong, holes stay holes, and then there is nothing on its disk."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

import kvfs
from api_cluster import ApiCluster, MetadataThread, wait_until
from kvfs.cli.tree import Tree, open_tree
from kvfs.fsck import Fsck, online
from kvfs.keys import block_keys
from kvfs.mount.requests import Caller
from kvfs_base.cluster import EndMoves
from kvfs_base.errors import ConnectionLost, InodeStale, KvfsError, WriteUncertain
from kvfs_base.limits import CALL_SECONDS
from kvfs_base.os_env import os_env
from kvfs_base.rpc import BlockingRpcClient, Request
from kvfs_base.types import ROOT_INODE, Attr
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.cluster.admin_messages import (
    DescribeCluster,
    RemoveTarget,
    SetDraining,
    TargetDetails,
)
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.messages import Statistics

LAYOUT = kvfs.KVLayout(block_tokens=1)
CHUNK = 64 << 10
SECONDS = 60
OWNER = Caller(os.getuid(), os.getgid())


@pytest.fixture(autouse=True)
def small_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of many chunks, and no half a minute in which all of them may be open."""
    monkeypatch.setattr("kvfs_metadata.copies.FILE_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("kvfs_metadata.sessions.Sessions.in_grace", False)


def call(cluster: ApiCluster, request: Request) -> Any:
    client = BlockingMetadataClient(os_env(), cluster.metadata_address)
    try:
        return client.call(request)
    finally:
        client.close()


def on_server(cluster: ApiCluster, number: int) -> TargetDetails:
    details = call(cluster, DescribeCluster())
    return next(t for t in details.targets if t.server_id == f"server-{number}")


def server_of(cluster: ApiCluster, chain: int) -> int:
    details = call(cluster, DescribeCluster())
    server_id: str = next(t.server_id for t in details.targets if chain in t.chains)
    return int(server_id.removeprefix("server-"))


def drain(cluster: ApiCluster, number: int, on: bool = True) -> int:
    target_id = on_server(cluster, number).target_id
    call(cluster, SetDraining((target_id,), on))
    return target_id


def is_empty(cluster: ApiCluster, number: int) -> bool:
    found = on_server(cluster, number)
    return found.drained and not found.removals


def chunks_on(cluster: ApiCluster, number: int) -> list[str]:
    return [p for p in cluster.chunk_files() if p.startswith(cluster.target(number) + "/")]


def block(number: int) -> bytes:
    return random.Random(number).randbytes(20_000 + number)


def put(namespace: kvfs.Namespace, numbers: range) -> None:
    for number in numbers:
        namespace.put(block_keys(range(number, number + 1), 1), [block(number)])


def check(namespace: kvfs.Namespace, number: int) -> None:
    with namespace.get(block_keys(range(number, number + 1), 1)) as found:
        assert found[0] is not None, f"block {number} is gone"
        assert bytes(found[0]) == block(number)


def in_tree(cluster: ApiCluster, action: Callable[[Tree], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_tree(os_env(), (cluster.metadata_address,)) as tree:
            await action(tree)

    trio.run(main)


class Command:
    """`kvfs cluster` in a process of its own."""

    def __init__(self, cluster: ApiCluster, command: str, *arguments: str) -> None:
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "kvfs", "cluster", command),
                *(str(cluster.metadata_address), *arguments),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            self._lines.extend(self._process.stdout)

    def output(self) -> str:
        return "".join(self._lines)

    def finish(self) -> int:
        self._reader.join(SECONDS)
        return self._process.wait(SECONDS)


class Files:
    """What the files of a directory contain, to the byte. One thread's."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.expected: dict[bytes, bytearray] = {}
        self.seed = seed
        self.steps = 0

    def name(self) -> bytes:
        return b"%d-%d" % (self.seed, self.chance.randrange(6))

    async def step(self, tree: Tree) -> None:
        name = self.name()
        kind = self.chance.random()
        if name not in self.expected or kind < 0.5:
            await self.write(tree, name)
        elif kind < 0.6:
            await self.cut(tree, name)
        else:
            await self.check(tree, name)
        self.steps += 1

    async def write(self, tree: Tree, name: bytes) -> None:
        """A piece anywhere: what lies between reads as zeros."""
        filesystem = tree._filesystem
        if name not in self.expected:
            _, opened = await filesystem.create(ROOT_INODE, name, 0o644, os.O_RDWR, OWNER)
            self.expected[name] = bytearray()
        else:
            attr = await filesystem.lookup(ROOT_INODE, name)
            opened = await filesystem.open(attr.inode, os.O_RDWR)
        try:
            offset = self.chance.randrange(12 * CHUNK)
            data = self.chance.randbytes(self.chance.randrange(1, 2 * CHUNK))
            await filesystem.write(opened.handle, offset, data)
            content = self.expected[name]
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
            await filesystem.flush(opened.handle)
        finally:
            await filesystem.release(opened.handle)

    async def cut(self, tree: Tree, name: bytes) -> None:
        attr = await tree._filesystem.lookup(ROOT_INODE, name)
        opened = await tree._filesystem.open(attr.inode, os.O_WRONLY | os.O_TRUNC)
        await tree._filesystem.release(opened.handle)
        self.expected[name] = bytearray()

    async def check(self, tree: Tree, name: bytes) -> None:
        out = io.BytesIO()
        await tree.read_to(name, out)
        found, expected = out.getvalue(), bytes(self.expected[name])
        if found != expected:  # to show all of both takes minutes
            wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
            sizes = f"{len(found)} bytes of {len(expected)}"
            zeros = not any(found[wrong[0] : wrong[-1] + 1])
            raise AssertionError(f"{name!r}: {sizes}, wrong {wrong[:1]} to {wrong[-1:]}, {zeros=}")

    async def check_all(self, tree: Tree) -> None:
        for name in self.expected:
            await self.check(tree, name)

    async def fill(self, tree: Tree) -> None:
        for _ in range(20):
            await self.write(tree, self.name())


class Checker:
    """Reads, writes and puts from threads of its own until it is asked what it has seen."""

    def __init__(self, cluster: ApiCluster, files: Files, blocks: range) -> None:
        self._cluster = cluster
        self.files = files
        self._blocks = blocks
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self.reads = 0
        self.patient = True
        """An error is one."""
        self._threads = [
            threading.Thread(target=self._run, args=(work,)) for work in (self._file, self._block)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:
            self.errors.append(exc)

    def _file(self) -> None:
        async def work(tree: Tree) -> None:
            while not self._stop.is_set() and not self.errors:
                await self.files.step(tree)

        in_tree(self._cluster, work)

    def _block(self) -> None:
        chance = random.Random(1)
        end = self._blocks.stop
        with self._cluster.connect() as client:
            namespace = client.namespace("tenant/model")
            while not self._stop.is_set() and not self.errors:
                check(namespace, chance.randrange(self._blocks.start, end))
                self.reads += 1
                if chance.random() < 0.1:
                    put(namespace, range(end, end + 1))
                    end += 1

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SECONDS)
        if self.errors:
            raise self.errors[0]


@contextlib.contextmanager
def checked(cluster: ApiCluster, files: Files, blocks: range) -> Iterator[Checker]:
    checker = Checker(cluster, files, blocks)
    try:
        yield checker
    finally:
        checker.finish()


def fsck_finds_nothing(cluster: ApiCluster) -> None:
    with online(os_env(), cluster.metadata_address) as (store, targets):
        report = Fsck(store, targets, verify=True).check()
    assert [(one.finding.kind, one.finding.detail) for one in report.outcomes] == []


@pytest.fixture
def cluster(start_cluster: Callable[..., ApiCluster]) -> ApiCluster:
    """Of several hosts, one of them the agent's: some is read by descriptors, some over TCP. Its
    arena is too small for what is stored, so that blocks are read again and again."""
    return start_cluster(hosts=True, keep_puts=False, arena_bytes=1 << 20)


BLOCKS = range(120)


def fill(cluster: ApiCluster, files: Files) -> None:
    with cluster.connect() as client:
        put(client.namespace("tenant/model", LAYOUT, create=True), BLOCKS)
    in_tree(cluster, files.fill)


def test_a_server_is_emptied_while_everything_goes_on(cluster: ApiCluster) -> None:
    files, still = Files(1), Files(2)
    fill(cluster, files)
    in_tree(cluster, still.fill)
    assert chunks_on(cluster, 1)
    with checked(cluster, files, BLOCKS) as checker:
        target_id = drain(cluster, 1)
        wait_until(lambda: is_empty(cluster, 1) or checker.errors, SECONDS)
        seen = checker.reads, files.steps
        wait_until(lambda: checker.reads > seen[0] or checker.errors)
    assert not checker.errors
    assert chunks_on(cluster, 1) == []
    call(cluster, RemoveTarget((target_id,)))
    cluster.servers[1].stop()
    in_tree(cluster, files.check_all)
    in_tree(cluster, still.check_all)
    with cluster.connect() as client:
        for number in BLOCKS:
            check(client.namespace("tenant/model"), number)
    figures = call(cluster, Statistics())
    assert figures["corrupt_blocks"] == figures["drained_blocks"] == figures["moves_begun"] == 0
    assert figures["moved_blocks"] > 20
    assert figures["moved_files"] > 3
    fsck_finds_nothing(cluster)


def test_to_and_fro(cluster: ApiCluster) -> None:
    """Chunks come back to targets that they have left."""
    files = Files(3)
    fill(cluster, files)
    with checked(cluster, files, BLOCKS) as checker:
        for number in (0, 1, 0):
            drain(cluster, number)
            wait_until(lambda n=number: is_empty(cluster, n) or checker.errors, SECONDS)
            drain(cluster, number, on=False)
    in_tree(cluster, files.check_all)
    wait_until(lambda: call(cluster, Statistics())["removals_pending"] == 0)
    fsck_finds_nothing(cluster)
    names = [os.path.basename(path) for path in cluster.chunk_files()]
    assert len(names) == len(set(names)), "each chunk is in one place"


def test_who_dies_in_the_middle_goes_on_later(
    start_cluster: Callable[..., ApiCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, destination and metadata service, one after the other."""
    cluster = start_cluster(keep_puts=False, arena_bytes=1 << 20)
    files = Files(4)
    fill(cluster, files)
    sent = count_moves(monkeypatch)
    drain(cluster, 1)
    for number in (1, 0, 2, 1):
        before = len(sent)
        wait_until(lambda n=before: len(sent) > n + 3 or is_empty(cluster, 1))
        cluster.restart_server(number)
        if number != 1:
            restart_metadata(cluster)
    wait_until(lambda: is_empty(cluster, 1), SECONDS)
    assert chunks_on(cluster, 1) == []
    in_tree(cluster, files.check_all)
    cluster.restart_agent()
    with cluster.connect() as client:
        for number in BLOCKS:
            check(client.namespace("tenant/model"), number)
    wait_until(lambda: call(cluster, Statistics())["removals_pending"] == 0)
    fsck_finds_nothing(cluster)


def count_moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks that were sent. Slowly, so that there is a middle."""
    from kvfs_datapath.server.mover import Mover

    sent: list[int] = []
    send = Mover._send
    pause = threading.Event()

    def note(self: Mover, *arguments: Any) -> KvfsError | None:
        pause.wait(0.02)
        error = send(self, *arguments)
        sent.append(arguments[1].inode)
        return error

    monkeypatch.setattr(Mover, "_send", note)
    return sent


def restart_metadata(cluster: ApiCluster) -> None:
    cluster.metadata.stop()
    cluster.metadata = MetadataThread(
        MetadataConfig(directory=f"{cluster.directory}/metadata", unix=cluster.metadata_address)
    )


@pytest.mark.logs_warnings
def test_a_mount_that_was_silent_for_too_long(
    cluster: ApiCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file moved although it has it open: it is told so, says that what it wrote before may be
    lost, and goes on where the file is now."""
    monkeypatch.setattr("kvfs_metadata.sessions.SESSION_GRACE_SECONDS", 1.0)
    monkeypatch.setattr("kvfs_metadata.client.SESSION_GRACE_SECONDS", 1000.0)

    async def work(tree: Tree) -> None:
        filesystem = tree._filesystem
        attr, opened = await filesystem.create(ROOT_INODE, b"f", 0o644, os.O_RDWR, OWNER)
        await filesystem.write(opened.handle, 0, b"before" * CHUNK)
        await filesystem.flush(opened.handle)
        assert attr.layout is not None
        home = await trio.to_thread.run_sync(server_of, cluster, attr.layout.chains[0])
        await trio.to_thread.run_sync(drain, cluster, home)
        with trio.fail_after(SECONDS):
            while not await trio.to_thread.run_sync(is_empty, cluster, home):
                await trio.sleep(0.02)
        await filesystem.write(opened.handle, 0, b"now")
        with pytest.raises(WriteUncertain):
            await filesystem.flush(opened.handle)
        assert bytes(await filesystem.read(opened.handle, 0, 6)) == b"nowore"
        await filesystem.write(opened.handle, 0, b"after!")
        await filesystem.flush(opened.handle)
        await filesystem.release(opened.handle)
        out = io.BytesIO()
        await tree.read_to(b"f", out)
        assert out.getvalue() == b"after!" + (b"before" * CHUNK)[6:]
        assert chunks_on(cluster, home) == []

    in_tree(cluster, work)


def test_a_move_whose_end_was_not_answered(
    cluster: ApiCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source asks what became of it, and refuses the file from then on."""
    ask, lost = BlockingRpcClient.call, []

    def lose(self: BlockingRpcClient, request: Any, timeout: float = CALL_SECONDS) -> Any:
        answer = ask(self, request, timeout)
        if isinstance(request, EndMoves) and not lost:
            lost.append(request)
            raise ConnectionLost(detail="lost by the test")
        return answer

    monkeypatch.setattr(BlockingRpcClient, "call", lose)

    async def make(tree: Tree) -> None:
        await tree.write_from(b"f", io.BytesIO(b"x" * CHUNK))
        made.append(await tree.resolve(b"f"))

    made: list[Attr] = []
    in_tree(cluster, make)
    (attr,) = made
    assert attr.layout is not None
    home = server_of(cluster, attr.layout.chains[0])
    (store,) = cluster.servers[home]._targets.stores
    drain(cluster, home)
    wait_until(lambda: lost, SECONDS)
    drain(cluster, home, on=False)  # it is asked all the same
    wait_until(lambda: not store.leaving.held(), SECONDS)
    with pytest.raises(InodeStale):
        store.leaving.require_here(attr.inode)


def test_blocks_that_a_mount_has_seen_or_open(cluster: ApiCluster) -> None:
    with cluster.connect() as client:
        put(client.namespace("tenant/model", LAYOUT, create=True), range(12))
    names = {block_keys(range(n, n + 1), 1)[0].hex().encode(): block(n) for n in range(12)}

    async def work(tree: Tree) -> None:
        filesystem = tree._filesystem
        attrs = {name: await tree.resolve(b"kv/tenant/model/" + name) for name in names}
        opened = {name: await filesystem.open(attrs[name].inode, 0) for name in list(names)[:6]}
        await trio.to_thread.run_sync(drain, cluster, 1)
        with trio.fail_after(SECONDS):
            while not await trio.to_thread.run_sync(is_empty, cluster, 1):
                await trio.sleep(0.02)
        for name, data in names.items():
            found = opened.get(name) or await filesystem.open(attrs[name].inode, 0)
            held = filesystem._blocks.get(attrs[name].inode)
            assert held is not None
            filesystem._blocks._close(held)  # of other hosts: fetched again
            assert bytes(await filesystem.read(found.handle, 0, len(data))) == data
            await filesystem.release(found.handle)
        assert filesystem.statistics()["blocks_damaged"] == 0

    in_tree(cluster, work)
    assert call(cluster, Statistics())["blocks"] == 12


def test_an_open_file_waits_and_is_named(cluster: ApiCluster) -> None:
    files = Files(5)

    async def work(tree: Tree) -> None:
        await files.fill(tree)
        name = next(n for n, content in files.expected.items() if len(content) > 3 * CHUNK)
        attr = await tree._filesystem.lookup(ROOT_INODE, name)
        opened = await tree._filesystem.open(attr.inode, os.O_RDWR)
        await trio.to_thread.run_sync(drain, cluster, 2)
        command = Command(cluster, "drain", "server-2", "--wait")
        left = {attr.inode}
        while left != {int(os.path.basename(p)[:16], 16) for p in chunks_on(cluster, 2)}:
            await trio.sleep(0.02)
        await tree._filesystem.write(opened.handle, 7, b"written meanwhile")
        files.expected[name][7:24] = b"written meanwhile"
        with trio.fail_after(SECONDS):  # what is told is what the last look found
            while (await trio.to_thread.run_sync(on_server, cluster, 2)).files_left != 1:
                await trio.sleep(0.02)
        line = f"  /{name.decode()} is open: a command on {platform.node()} (pid {os.getpid()})\n"
        with trio.fail_after(SECONDS):
            while line not in command.output():
                await trio.sleep(0.02)
        assert not (await trio.to_thread.run_sync(on_server, cluster, 2)).drained
        assert command.output().startswith("target 3: takes nothing new")
        await tree._filesystem.release(opened.handle)
        with trio.fail_after(SECONDS):
            while not await trio.to_thread.run_sync(is_empty, cluster, 2):
                await trio.sleep(0.02)
        await files.check_all(tree)
        assert await trio.to_thread.run_sync(command.finish) == 0
        assert command.output().endswith("target 3: drained\n")

    in_tree(cluster, work)
    assert chunks_on(cluster, 2) == []
    fsck_finds_nothing(cluster)
