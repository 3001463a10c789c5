"""The metadata service killed under load, again and again: clients notice nothing but the time.

Each client goes on through its retries. What they saw must have one order in which every
acknowledged request happened once, and every other one at most once: that is what linearizability
of a history across kills means. The store is checked whenever nobody serves it.

``KVFS_CRASH_ROUNDS`` sets the number of kills (default 50), ``KVFS_CRASH_SEED`` when they happen.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from kvfs_base.os_env import os_env
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.client import BlockingMetadataClient, MetadataClient
from linearizability import check
from metadata_checks import Dump, assert_consistent, problems
from metadata_models import BlockPlayer, Blocks, NamePlayer, Names, Player, made_by
from metadata_servers import Servers, Store, make_directory, make_namespace, running, store
from t2_services.metadata_rig import FILE, ROOT, Rig

__all__ = ["store"]

ROUNDS = int(os.environ.get("KVFS_CRASH_ROUNDS", "50"))
SEED = int(os.environ.get("KVFS_CRASH_SEED", "1"))
NAMES = 3
KEYS = 6
MOVES_PER_ROUND = 60
"""At most, between the start of a server and its end."""
WAIT_SECONDS = 120.0


class Load:
    """Two directories with two clients each, and one namespace with two."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._links: list[BlockingMetadataClient] = []
        self._progress = threading.Condition()
        self._moves = 0
        self._ended = False
        self._failures: list[BaseException] = []
        marks = itertools.count(1)
        self._marks = [itertools.count(n, 4) for n in range(1, 5)]
        link = self._link(0)
        directories = [make_directory(link, name) for name in "de"]
        namespace = make_namespace(link, "a/b")
        self.names: list[list[NamePlayer]] = [
            [self._name_player(directory, next(marks)) for _ in range(2)]
            for directory in directories
        ]
        self.blocks = [self._block_player(namespace, n) for n in range(2)]

    def _link(self, number: int) -> BlockingMetadataClient:
        self._links.append(self._servers.client(number))
        return self._links[-1]

    def _name_player(self, directory: int, number: int) -> NamePlayer:
        return NamePlayer(
            self._link(number),
            f"names {number}",
            SEED * 100 + number,
            directory=directory,
            count=NAMES,
            marks=self._marks[number - 1],
        )

    def _block_player(self, namespace: int, number: int) -> BlockPlayer:
        return BlockPlayer(
            self._link(number),
            f"blocks {number}",
            SEED * 100 + 50 + number,
            namespace=namespace,
            first=0,
            count=KEYS,
            reads=self._servers.store.reads_wait,
        )

    @property
    def players(self) -> list[Player]:
        return [*itertools.chain.from_iterable(self.names), *self.blocks]

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._play, args=(p,)) for p in self.players]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended = True
            for thread in threads:
                thread.join()
        self._raise()

    def _play(self, player: Player) -> None:
        try:
            while not self._ended:
                player.move()
                with self._progress:
                    self._moves += 1
                    self._progress.notify()
        except BaseException as exc:
            with self._progress:
                self._failures.append(exc)
                self._progress.notify()

    def wait_for_moves(self, count: int) -> None:
        with self._progress:
            wanted = self._moves + count
            ready = self._progress.wait_for(
                lambda: self._moves >= wanted or self._failures, WAIT_SECONDS
            )
        self._raise()
        assert ready, "the load stands still"

    def _raise(self) -> None:
        if self._failures:
            raise self._failures[0]

    def check(self) -> None:
        for players in self.names:
            history = list(itertools.chain.from_iterable(p.history for p in players))
            made = made_by(history)
            assert len(made) == len(set(made))
            check(history, Names(NAMES, made))
        check([op for player in self.blocks for op in player.history], Blocks(KEYS))

    def look(self) -> None:
        """Everything that can be seen; nobody else asks meanwhile."""
        for players in self.names:
            players[0].final()
        for player in self.blocks:
            player.final()

    def close(self) -> None:
        for link in self._links:
            link.close()


def strike(servers: Servers, rng: random.Random) -> None:
    """Kills one server, looks at what it left, and starts it again."""
    number = rng.randrange(servers.store.servers)
    servers.kill(number)
    if not servers.store.url:
        assert_consistent(str(servers.directory))
    servers.start(number)


@pytest.mark.timeout(600)
def test_a_service_that_is_killed_under_load(tmp_path: Path, store: Store) -> None:
    rng = random.Random(SEED)
    pause = threading.Event()
    with running(tmp_path, store) as servers:
        load = Load(servers)
        with load.running():
            for _ in range(ROUNDS):
                load.wait_for_moves(rng.randint(1, MOVES_PER_ROUND))
                pause.wait(rng.random() * 0.002)  # in the midst of what comes next
                strike(servers, rng)
        load.look()
        strike(servers, rng)
        load.look()
        load.close()
    assert_consistent(store.url or str(servers.directory))
    load.check()


def test_open_files_outlive_kills(tmp_path: Path, store: Store) -> None:
    """Made open, unlinked at once, and used for as long as they are open."""
    rng = random.Random(SEED)

    async def test(servers: Servers) -> None:
        session = rng.randbytes(16)
        pause = trio.Event()
        made = []

        async def make(client: MetadataClient) -> None:
            for number in itertools.count():
                name = b"%d" % number
                made.append((await client.call(m.Make(ROOT, name, FILE, open=True))).inode)
                await client.call(m.Unlink(ROOT, name))
                attr = await client.call(m.SetAttr(rng.choice(made), uid=number))
                assert attr.nlink == 0
                if pause.is_set():
                    return

        patient = MetadataClient(os_env(), servers.addresses, session=session, retry_seconds=60)
        async with patient as client, trio.open_nursery() as nursery:
            nursery.start_soon(make, client)
            for _ in range(max(1, ROUNDS // 10)):
                count = len(made) + rng.randint(1, MOVES_PER_ROUND)
                with trio.fail_after(WAIT_SECONDS):
                    while len(made) < count:
                        await trio.sleep(0.001)
                await trio.to_thread.run_sync(strike, servers, rng)
            pause.set()
            nursery.cancel_scope.deadline = trio.current_time() + WAIT_SECONDS
        assert len(set(made)) == len(made)
        if store.servers == 1:  # each server counts for itself
            async with MetadataClient(os_env(), servers.addresses) as client:
                figures = await client.call(m.Statistics())
            assert figures["open_inodes"] == len(made)

    with running(tmp_path, store) as servers:
        trio.run(test, servers)
    assert_consistent(store.url or str(servers.directory))


# --- the checks themselves


def whole() -> Dump:
    rig = Rig()
    file = rig.make(ROOT, b"file").inode
    rig.call(m.Link(file, ROOT, b"link"))
    rig.call(m.SetAttr(file, size=100))
    rig.call(m.SetXattr(file, b"user.a", b"1"))
    gone = rig.make(ROOT, b"gone").inode
    rig.call(m.OpenInode(gone))
    rig.call(m.Unlink(ROOT, b"gone"))
    rig.mkdir(ROOT, b"directory")
    namespace = rig.namespace()
    rig.put(namespace, [1, 2, 3])
    rig.prepare(namespace, [4, 5])
    rig.call(m.Unlink(namespace, sorted(rig.names(namespace))[0]))
    return rig.dump()


def without(prefix: bytes, place: int = 0) -> Callable[[Dump], Any]:
    return lambda found: found.pop(sorted(k for k in found if k.startswith(prefix))[place])


def twice(prefix: bytes) -> Callable[[Dump], Any]:
    def change(found: Dump) -> None:
        key = max(k for k in found if k.startswith(prefix))
        found[key[:4] + records.u64(records.number_at(key) + 100)] = found[key]

    return change


def renamed(old: bytes, new: bytes) -> Callable[[Dump], Any]:
    return lambda found: found.update({records.entry_key(ROOT, new): found[entry(found, old)]})


def entry(found: Dump, name: bytes) -> bytes:
    return next(k for k in found if k == records.entry_key(ROOT, name))


DAMAGE: dict[str, Callable[[Dump], Any]] = {
    "a name less": lambda found: found.pop(entry(found, b"link")),
    "a name more": renamed(b"file", b"new"),
    "a directory under two names": renamed(b"directory", b"new"),
    "a directory without a name": lambda found: found.pop(entry(found, b"directory")),
    "a missing inode": without(records.INODE, -1),
    "no orphan": without(records.ORPHAN),
    "an orphan of nothing": lambda found: found.update({records.orphan_key(999): b""}),
    "an attribute of nothing": lambda found: found.update({records.xattr_key(99, b"a"): b""}),
    "usage": lambda found: found.update({records.USAGE_KEY: records.pack_usage((1, 1))}),
    "a key twice": twice(records.BLOCK),
    "a batch in two states": lambda found: found.update(
        {records.COMMITTED + k[4:]: b"" for k in found if k.startswith(records.PREPARED)}
    ),
    "a block of no namespace": without(records.NAMESPACE),
    "an inode used twice": twice(records.PREPARED),
    "a removal that was not counted": without(records.REMOVAL_STATE),
    "numbers that were given": without(records.COUNTER + b"inode"),
}


def test_a_whole_store_has_no_problems() -> None:
    assert problems(whole()) == []


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str) -> None:
    found = whole()
    DAMAGE[name](found)
    assert problems(found)
