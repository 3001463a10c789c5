"""The service as its clients meet it: over the memory network and over real sockets with LMDB."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from kvfs_base import errors as e
from kvfs_base import limits
from kvfs_base.cluster import GetClusterMap, Heartbeat, TargetReport
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request, RpcClient
from kvfs_base.seams import Env
from kvfs_base.testing import ManualClock, memory_env
from kvfs_base.types import Address
from kvfs_metadata import limits as metadata_limits
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.client import BlockingMetadataClient, MetadataClient
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.engines.engine import Group, KVEngine
from kvfs_metadata.engines.lmdb_engine import LmdbEngine
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.service import MetadataService, serve_metadata
from mock_time import run_in_mock_time
from t2_services.metadata_rig import FILE, LAYOUT, ROOT, keys

HEARTBEAT = Heartbeat("s", "h", None, None, (TargetReport("t", 10**9, 10**9, True, 0),))


@dataclasses.dataclass
class World:
    env: Env
    config: MetadataConfig
    engine: KVEngine
    clock: ManualClock | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[list[Address]]:
        service = MetadataService(self.env, self.config, self.engine)
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(
                lambda task_status: service.serve(task_status=task_status)
            )
            try:
                yield addresses
            finally:
                nursery.cancel_scope.cancel()


def memory_world(durability: str) -> World:
    env, clock = memory_env()
    config = MetadataConfig(
        "unused", Address.unix("/meta"), Address.tcp("127.0.0.1", 0), durability=durability
    )
    return World(env, config, MemoryEngine(), clock)


def real_world(durability: str, directory: Path) -> World:
    env = os_env()
    config = MetadataConfig(
        str(directory / "store"),
        Address.unix(str(directory / "meta.sock")),
        Address.tcp("127.0.0.1", 0),
        durability=durability,
    )
    return World(env, config, LmdbEngine(env, config.directory, durability=durability))


@pytest.fixture(params=["memory-cache", "memory-strict", "real-cache", "real-strict"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    kind, durability = request.param.split("-")
    world = memory_world(durability) if kind == "memory" else real_world(durability, tmp_path)
    yield world
    world.engine.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await test()

    trio.run(bounded)


def test_requests_over_every_address(world: World) -> None:
    async def test() -> None:
        async with world.serving() as addresses:
            assert [address.kind for address in addresses] == ["unix", "tcp"]
            for number, address in enumerate(addresses):
                async with MetadataClient(world.env, address) as client:
                    await client.call(HEARTBEAT)
                    name = b"%d" % number
                    made = await client.call(m.Make(ROOT, name, FILE))
                    assert await client.call(m.Lookup(ROOT, name)) == made
                    with pytest.raises(e.EntryExists) as caught:
                        await client.call(m.Make(ROOT, name, FILE))
                    assert caught.value.name == name
                    await client.call(m.Sync())

    run(test)


def test_a_put_and_a_match(world: World) -> None:
    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            info = await client.call(m.OpenNamespace("a/b", LAYOUT, create=True))
            batch = await client.call(m.PrepareBlocks(info.inode, keys(range(3)), (10, 20, 30)))
            await client.call(m.CommitBlocks(batch.batch_id, (1, 2, 3)))
            assert await client.call(m.MatchBlocks(info.inode, keys(range(4)))) == 3
            found = await client.call(m.LookupBlocks(info.inode, keys([2, 9])))
            assert found[0].size == 30 and found[1] is None
            page = await client.call(m.ReadDir(info.inode))
            assert [attr.size for _, attr in page.entries if attr.key == keys([1])] == [20]

    run(test)


def test_many_clients_at_once(world: World) -> None:
    """Every request is answered to whom it belongs, and all of them happened."""

    async def test() -> None:
        async def create(client: MetadataClient, number: int) -> None:
            name = b"%04d" % number
            made = await client.call(m.Make(ROOT, name, FILE))
            assert (await client.call(m.Lookup(ROOT, name))).inode == made.inode
            inodes.append(made.inode)

        inodes: list[int] = []
        async with world.serving() as addresses, contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(MetadataClient(world.env, addresses[i % 2]))
                for i in range(4)
            ]
            await clients[0].call(HEARTBEAT)
            async with trio.open_nursery() as nursery:
                for number in range(80):
                    nursery.start_soon(create, clients[number % 4], number)
            page = await clients[0].call(m.ReadDir(ROOT))
            assert len(page.entries) == 81 and len(set(inodes)) == 80

    run(test)


def test_requests_that_travel_together_keep_their_order(world: World) -> None:
    async def test() -> None:
        async with (
            world.serving() as addresses,
            RpcClient(world.env.network, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            found: dict[int, object] = {}

            async def call(place: int, request: Request) -> None:
                try:
                    found[place] = await client.call(request)
                except e.KvfsError as exc:
                    found[place] = exc

            requests = (
                m.Lookup(ROOT, b"f"),
                m.Make(ROOT, b"f", FILE),
                m.Sync(),
                m.Lookup(ROOT, b"f"),
                m.Unlink(ROOT, b"f"),
                m.Lookup(ROOT, b"f"),
            )
            async with trio.open_nursery() as nursery:
                for place, request in enumerate(requests):
                    nursery.start_soon(call, place, request)
                    await trio.testing.wait_all_tasks_blocked()
            assert isinstance(found[0], e.EntryNotFound)
            assert isinstance(found[2], m.Done)
            assert isinstance(found[3], type(found[1])) and found[3] == found[1]
            assert isinstance(found[5], e.EntryNotFound)

    run(test)


def test_a_batch_is_answered_in_order_and_each_by_itself(tmp_path: Path) -> None:
    world = real_world("cache", tmp_path)

    async def test() -> None:
        def calls() -> None:
            client = BlockingMetadataClient(world.env, world.config.unix)
            client.call(HEARTBEAT)
            made, found, synced, unlinked = client.call_many(
                [
                    m.Make(ROOT, b"f", FILE),
                    m.Lookup(ROOT, b"f"),
                    m.Sync(),
                    m.Unlink(ROOT, b"f"),
                ]
            )
            assert found == made and synced == m.Done() and unlinked.nlink == 0
            with pytest.raises(e.EntryNotFound):
                client.call_many([m.Make(ROOT, b"g", FILE), m.Unlink(ROOT, b"f")])
            assert client.call(m.Lookup(ROOT, b"g")).nlink == 1
            client.close()

        async with world.serving():
            await trio.to_thread.run_sync(calls)

    run(test)
    world.engine.close()


class SlowCommits(MemoryEngine):
    """Commits wait for ``open`` and are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.groups: list[int] = []

    def commit(self, group: Group[object]) -> None:
        self.open.wait(60)
        self.groups.append(len(group.results))
        super().commit(group)


def test_strict_commits_gather_while_one_is_written() -> None:
    world = memory_world("strict")
    world.engine = engine = SlowCommits()

    async def test() -> None:
        async def make(client: MetadataClient, name: bytes) -> None:
            await client.call(m.Make(ROOT, name, stat.S_IFDIR | 0o755))

        async with world.serving() as addresses, contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(MetadataClient(world.env, addresses[0]))
                for _ in range(5)
            ]
            engine.open.clear()
            engine.groups.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(make, clients[0], b"first")
                await trio.testing.wait_all_tasks_blocked(0.01)
                for number, client in enumerate(clients[1:]):
                    nursery.start_soon(make, client, b"%d" % number)
                await trio.testing.wait_all_tasks_blocked(0.01)
                # Readers do not wait, and see what is committed.
                async with MetadataClient(world.env, addresses[0]) as reader:
                    found = await reader.call(m.ReadDir(ROOT))
                assert [name for name, _ in found.entries] == [b"kv"]
                engine.open.set()
            assert engine.groups == [1, 4]

    run(test)


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_a_full_disk_fails_the_requests_and_not_the_service(durability: str) -> None:
    world = memory_world(durability)
    engine = MemoryEngine()
    world.engine = engine

    def full(writes: dict[bytes, bytes | None]) -> None:
        if writes:
            raise e.DiskFull(path="store")

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            engine.before_commit = full
            for _ in range(2):
                with pytest.raises(e.DiskFull):
                    await client.call(m.Make(ROOT, b"f", FILE))
            assert len((await client.call(m.ReadDir(ROOT))).entries) == 1
            engine.before_commit = lambda writes: None
            await client.call(m.Make(ROOT, b"f", FILE))

    run(test)


@pytest.mark.logs_warnings
def test_a_bug_is_an_internal_error_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    world = memory_world("cache")

    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("kvfs_metadata.xattrs.Xattrs.set", broken)
    monkeypatch.setattr("kvfs_metadata.xattrs.Xattrs.get", broken)

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            for request in (m.SetXattr(ROOT, b"user.a", b""), m.GetXattr(ROOT, b"user.a")):
                with pytest.raises(e.InternalError) as caught:
                    await client.call(request)
                assert caught.value.detail == "RuntimeError"
            assert await client.call(m.ListXattr(ROOT)) == ()

    run(test)


# --- background work, under a clock of the test's


async def renew(world: World, client: MetadataClient, seconds: float) -> None:
    """Time passes for the service and for trio; its target stays alive. In small steps: a service
    that finds much time gone takes itself for one that stood still."""
    assert world.clock is not None
    steps = math.ceil(2 * seconds / limits.HEARTBEAT_SECONDS)
    for _ in range(steps):
        world.clock.advance(seconds / steps)
        await client.call(HEARTBEAT)
        await trio.sleep(seconds / steps)
    await trio.sleep(2 * metadata_limits.EVICT_SECONDS)


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_eviction_runs_by_itself(durability: str) -> None:
    world = memory_world(durability)
    world.config = dataclasses.replace(world.config, capacity_bytes=100_000)

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            info = await client.call(m.OpenNamespace("a/b", LAYOUT, create=True))
            for number in range(99):
                batch = await client.call(m.PrepareBlocks(info.inode, keys([number]), (1000,)))
                await client.call(m.CommitBlocks(batch.batch_id, (0,)))
            await renew(world, client, 0.1)
            statistics = await client.call(m.Statistics())
            assert statistics["used_bytes"] <= 95_000
            assert statistics["evicted_blocks"] >= 5
            assert statistics["removals_pending"] == statistics["evicted_blocks"]
            assert await client.call(m.MatchBlocks(info.inode, keys([98]))) == 1
            assert await client.call(m.MatchBlocks(info.inode, keys([0]))) == 0

    run_in_mock_time(test)


@pytest.mark.parametrize("durability", ["cache", "strict"])
def test_batches_sessions_and_leases_expire_by_themselves(durability: str) -> None:
    world = memory_world(durability)

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            await renew(world, client, metadata_limits.SESSION_GRACE_SECONDS + 1)
            info = await client.call(m.OpenNamespace("a/b", LAYOUT, create=True))
            await client.call(m.PrepareBlocks(info.inode, keys([1]), (10,)))
            async with MetadataClient(world.env, addresses[0], session=b"s" * 16) as other:
                file = await other.call(m.Make(ROOT, b"f", FILE))
                await other.call(m.OpenInode(file.inode))
                await client.call(m.Unlink(ROOT, b"f"))
            await renew(world, client, metadata_limits.SESSION_GRACE_SECONDS - 1)
            assert (await client.call(m.GetAttr(file.inode))).nlink == 0
            await renew(world, client, 2)
            with pytest.raises(e.InodeStale):
                await client.call(m.GetAttr(file.inode))
            assert (await client.call(m.Statistics()))["prepared_batches"] == 1
            await renew(world, client, metadata_limits.PREPARE_SECONDS_MAX)
            assert (await client.call(m.Statistics()))["prepared_batches"] == 0
            assert world.clock is not None
            version = (await client.call(GetClusterMap())).version
            for _ in range(int(limits.TARGET_LEASE_SECONDS / limits.HEARTBEAT_SECONDS) + 2):
                world.clock.advance(limits.HEARTBEAT_SECONDS)
                await trio.sleep(limits.HEARTBEAT_SECONDS)
            assert (await client.call(m.Statistics()))["targets_offline"] == 1
            assert (await client.call(GetClusterMap())).version > version

    run_in_mock_time(test)


def test_time_in_which_a_server_stood_still_is_given_back_once_its_store_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that was stopped may find that its connection to the database was lost."""
    world = memory_world("cache")
    engine = MemoryEngine()
    engine.shared = True
    service = MetadataService(world.env, world.config, engine)
    given: list[float] = []
    monkeypatch.setattr(service.core, "stood_still", given.append)
    lost = [e.StoreUnavailable(detail="lost")]

    def catch_up() -> None:
        if lost:
            raise lost.pop()

    monkeypatch.setattr(service.core, "catch_up", catch_up)
    monkeypatch.setattr(service.core, "due", list)
    service._stood_still = 40.0
    with pytest.raises(e.StoreUnavailable):
        service._due()
    assert given == []
    service._due()
    service._due()
    assert given == [40.0]


def test_uses_are_recorded_now_and_then_and_at_the_end() -> None:
    world = memory_world("cache")

    def recorded() -> list[int]:
        items = world.engine.view(lambda kv: kv.range(records.BLOCK, records.BLOCK + b"\xff", 100))
        return [records.unpack_block(value).last_use_ns for _, value in items]

    async def test() -> None:
        assert world.clock is not None
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            info = await client.call(m.OpenNamespace("a/b", LAYOUT, create=True))
            batch = await client.call(m.PrepareBlocks(info.inode, keys([1, 2]), (10, 10)))
            await client.call(m.CommitBlocks(batch.batch_id, (0, 0)))
            await renew(world, client, 1)
            now = world.clock.time_ns()
            await client.call(m.MatchBlocks(info.inode, keys([1, 2])))
            assert now not in recorded()
            await trio.sleep(metadata_limits.LAST_USE_SECONDS * 1.1)
            assert recorded() == [now, now]
            world.clock.advance(1)
            await client.call(m.MatchBlocks(info.inode, keys([1, 2])))
        assert recorded() == [now + 10**9] * 2

    run_in_mock_time(test)


class CountingSyncs(MemoryEngine):
    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0
        self.error: e.KvfsError | None = None

    def sync(self) -> None:
        self.syncs += 1
        if self.error is not None:
            raise self.error


def test_what_was_written_is_synced_within_a_second() -> None:
    world = memory_world("cache")
    world.engine = engine = CountingSyncs()

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            await client.call(HEARTBEAT)
            await trio.sleep(metadata_limits.SYNC_SECONDS * 1.5)
            before = engine.syncs
            assert before >= 1
            await trio.sleep(metadata_limits.SYNC_SECONDS * 5)
            assert engine.syncs == before, "nothing was written meanwhile"
            await client.call(m.Make(ROOT, b"f", FILE))
            await trio.sleep(metadata_limits.SYNC_SECONDS * 1.5)
            assert engine.syncs == before + 1

    run_in_mock_time(test)


@pytest.mark.logs_warnings
def test_a_sync_that_fails_is_told() -> None:
    world = memory_world("cache")
    world.engine = engine = CountingSyncs()

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            engine.error = e.TargetFailed(detail="broken disk")
            with pytest.raises(e.TargetFailed):
                await client.call(m.Sync())
            await client.call(HEARTBEAT)
            await trio.sleep(metadata_limits.SYNC_SECONDS * 3)
            assert len((await client.call(m.ReadDir(ROOT))).entries) == 1

    run_in_mock_time(test)


@pytest.mark.logs_warnings
def test_nobody_is_told_that_a_sync_was_done_which_failed() -> None:
    """Who asks while others wait shares their sync only if it ends well."""
    world = memory_world("cache")
    world.engine = engine = CountingSyncs()
    outcomes: list[object] = []

    async def ask(client: MetadataClient) -> None:
        try:
            outcomes.append(await client.call(m.Sync()))
        except e.StoreUnavailable as exc:
            outcomes.append(exc)

    async def test() -> None:
        async with world.serving() as addresses, contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    MetadataClient(world.env, addresses[0], retry_seconds=0)
                )
                for _ in range(4)
            ]
            engine.error = e.StoreUnavailable(detail="away")
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(ask, client)

    run_in_mock_time(test)
    assert [type(outcome) for outcome in outcomes] == 4 * [e.StoreUnavailable]


@pytest.mark.logs_warnings
@pytest.mark.parametrize("error", [e.DiskFull(path="store"), e.StoreUnavailable(detail="away")])
def test_a_sync_that_may_go_well_later_is_repeated(error: e.KvfsError) -> None:
    world = memory_world("cache")
    world.engine = engine = CountingSyncs()

    async def test() -> None:
        async with (
            world.serving() as addresses,
            MetadataClient(world.env, addresses[0]) as client,
        ):
            engine.error = error
            begun = engine.syncs
            await client.call(HEARTBEAT)
            await trio.sleep(metadata_limits.SYNC_SECONDS * 3.5)
            assert engine.syncs == begun + 3
            engine.error = None
            await trio.sleep(metadata_limits.SYNC_SECONDS * 3)
            assert engine.syncs == begun + 4

    run_in_mock_time(test)


# --- starting and stopping


def test_serve_metadata_opens_and_closes_its_store(tmp_path: Path) -> None:
    env = os_env()
    config = MetadataConfig(str(tmp_path / "store"), Address.unix(str(tmp_path / "sock")))

    async def once(name: bytes) -> list[bytes]:
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(
                lambda task_status: serve_metadata(env, config, task_status=task_status)
            )
            assert addresses == [config.unix]
            async with MetadataClient(env, config.unix) as client:
                await client.call(m.Make(ROOT, name, stat.S_IFDIR | 0o755))
                page = await client.call(m.ReadDir(ROOT))
            nursery.cancel_scope.cancel()
        return [name for name, _ in page.entries]

    trio.run(once, b"one")
    assert trio.run(once, b"two") == [b"kv", b"one", b"two"]
    assert not (tmp_path / "sock").exists()


def test_only_loopback_is_served(tmp_path: Path) -> None:
    config = MetadataConfig(
        str(tmp_path), Address.unix(str(tmp_path / "s")), Address.tcp("0.0.0.0", 0)
    )

    async def test() -> None:
        with pytest.raises((e.NotLoopback, ExceptionGroup)) as caught:
            await serve_metadata(os_env(), config)
        assert isinstance(first(caught.value), e.NotLoopback)

    trio.run(test)


def first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def test_another_version_is_refused(tmp_path: Path) -> None:
    env = os_env()
    engine = LmdbEngine(env, str(tmp_path))
    engine.update([lambda kv: kv.put(records.FORMAT_KEY, b"kvfs-metadata 999")])
    config = MetadataConfig(str(tmp_path), Address.unix(str(tmp_path / "s")))
    with pytest.raises(e.VersionMismatch) as caught:
        MetadataService(env, config, engine)
    assert caught.value.found == "kvfs-metadata 999"
    engine.update([lambda kv: kv.delete(records.FORMAT_KEY), lambda kv: kv.put(b"x", b"y")])
    with pytest.raises(e.VersionMismatch):
        MetadataService(env, config, engine)
    engine.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"durability": "sometimes"},
        {"low_watermark": 0.9, "high_watermark": 0.8},
        {"low_watermark": 0.0},
        {"high_watermark": 1.1},
        {"capacity_bytes": -1},
    ],
)
def test_settings_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(e.InvalidRequest):
        MetadataConfig("d", Address.unix("/u"), **fields)
