"""Known mistakes, planted into the production code to see that seeds find them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec

from kvfs_base import frames
from kvfs_base.errors import KvfsError, ServerBusy, StaleChain, TargetFenced
from kvfs_datapath import rules
from kvfs_datapath.chains import replication, views
from kvfs_datapath.chains import requests as chain_session
from kvfs_datapath.chains.peers import Unreached
from kvfs_datapath.chains.replication import Replicator
from kvfs_datapath.chains.sync_sink import SyncSinks
from kvfs_datapath.chains.views import Views
from kvfs_datapath.chunks import numbers, versions
from kvfs_datapath.chunks.numbers import UpdateNumbers
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.chunks.versions import Versions
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_datapath.format import ChunkState
from kvfs_datapath.limits import PASS_SECONDS
from kvfs_datapath.server import chunk_server
from kvfs_datapath.server.chunk_server import ChunkServer
from kvfs_gds.block_cache import BlockCache
from kvfs_metadata import records
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster import draining, members
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.cluster.membership import Membership
from kvfs_metadata.cluster.moves import Moves
from kvfs_metadata.cluster.moving import Mover
from kvfs_metadata.sessions import Sessions
from kvfs_metadata.watching import Watching


def _remove_other_generation() -> Any:
    """Dropping a block that was found bad ignores which block that was."""
    remove = Blocks.remove

    def careless(self: Blocks, tx: Any, request: Any) -> int:
        request.inodes = ()
        return remove(self, tx, request)

    return mock.patch.object(Blocks, "remove", careless)


def _commit_without_chunks() -> Any:
    """The client says that everything is written, whatever servers answered."""
    write_chunks = ChunkClient.write_chunks

    def hopeful(self: ChunkClient, writes: Any) -> Any:
        return [None for _ in write_chunks(self, writes)]

    return mock.patch.object(ChunkClient, "write_chunks", hopeful)


def _collect_early() -> Any:
    """A prepared batch that commits has its chunks removed as well."""
    insert = Blocks._insert

    def eager(self: Blocks, tx: Any, namespace: Any, record: Any, crc32c: Any) -> None:
        insert(self, tx, namespace, record, crc32c)
        if record.first_inode % 4 == 0:
            self._cluster.remove_chunks(tx, record.chains[:1], record.first_inode, 1, 0)

    return mock.patch.object(Blocks, "_insert", eager)


def _overwrite_committed() -> Any:
    """Who commits a key second wins, though the first has been read."""
    insert = Blocks._insert

    def last_wins(self: Blocks, tx: Any, namespace: Any, record: Any, crc32c: Any) -> None:
        keys = [record.keys[i : i + 32] for i in range(0, len(record.keys), 32)]
        for key in keys:
            block = namespace.blocks.get(key)
            if block is not None:
                self.remove_block(tx, block)
        insert(self, tx, namespace, record, crc32c)

    return mock.patch.object(Blocks, "_insert", last_wins)


def _forget_removals() -> Any:
    """What is removed from the namespace stays on the disks."""

    def nothing(self: ClusterState, *args: Any, **kwargs: Any) -> None:
        pass

    return mock.patch.object(ClusterState, "remove_chunks", nothing)


def _collect_what_is_written() -> Any:
    """Garbage is also what a writer has stored and not committed yet."""
    return mock.patch.object(Blocks, "prepared_inodes", lambda self, chains: set())


def _collect_what_is_open() -> Any:
    """A file without a name goes at once, whoever has it open."""
    return mock.patch.object(Sessions, "may_be_open", lambda self, inode: False)


# --- chains of several copies


def _skip_version_check() -> Any:
    """Members take updates and blocks under whatever version of the chain they were sent."""

    def anything(place: Any, passing: Any) -> None:
        pass

    stack = contextlib.ExitStack()
    for module in (views, replication, chain_session):
        for name in ("require_head", "require_hops", "require_block"):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, anything))
    return stack


def _answer_before_the_tail() -> Any:
    """A member commits and answers, whatever became of the update behind it."""
    passed = Replicator._pass

    def hurried(self: Replicator, *args: Any) -> None:
        with contextlib.suppress(Unreached, KvfsError):
            passed(self, *args)

    return mock.patch.object(Replicator, "_pass", hurried)


def _serve_pending() -> Any:
    """Readers are given a version that the rest of the chain may never get."""

    def eager(self: Versions, chunk: Any, *, direct: bool = False) -> Any:
        try:
            file, info = self.open_pending(chunk)
        except (KvfsError, FileNotFoundError):
            return self.open(chunk, direct=direct)
        return file, msgspec.structs.replace(info, state=ChunkState.SEALED)

    return mock.patch.object(Versions, "open_settled", eager)


def _no_fence() -> Any:
    """A server whose lease is over goes on serving."""
    learn = Views.learn

    def trusting(self: Views, *args: Any) -> None:
        learn(self, *args)
        self._leased_until = math.inf

    return mock.patch.object(Views, "learn", trusting)


def _no_memory_of_updates() -> Any:
    """An update that comes again is carried out again."""
    return mock.patch.object(rules, "is_repeated", lambda update, committed, seen: False)


def _serve_while_syncing() -> Any:
    """A member answers readers before it is in step."""

    def anywhere(self: Views, store: Any, chain_id: int) -> Any:
        try:
            return self.place(store, chain_id)
        except StaleChain as exc:
            raise TargetFenced(target_id=store.target_id) from exc

    return mock.patch.object(Views, "require_read", anywhere)


def _take_silence_for_no() -> Any:
    """An update whose answer was lost is dropped, though it may be committed behind."""
    carry = Replicator._carry

    def impatient(
        self: Replicator, store: Any, place: Any, info: Any, *args: Any, **kw: Any
    ) -> Any:
        try:
            return carry(self, store, place, info, *args, **kw)
        except replication.Unresolved:
            self._drop(store, info.chunk)
            self._forget(store, info.chunk)
            raise

    return mock.patch.object(Replicator, "_carry", impatient)


def _keep_pending_at_a_rejoin() -> Any:
    """A member that begins to sync keeps what it has pending, and commits it once it serves."""

    def begin(self: SyncSinks, store: Any, place: Any) -> None:
        with self._lock:
            self._listings.pop((place.target_id, place.chain.chain_id), None)
            comparison = self._get(place)
        if not comparison.begun and not self._views.wait_quiet(place, 2 * PASS_SECONDS):
            raise ServerBusy
        comparison.begun = True

    return mock.patch.object(SyncSinks, "begin", begin)


def _go_on_after_a_restart() -> Any:
    """Who is brought in step believes what a process that is gone told it."""
    return mock.patch.object(members, "restarted", members.lost)


def _commit_under_any_version() -> Any:
    """A member makes the next version of an update, whatever version it has."""
    receive, prepare = rules.receive, Versions.prepare

    def careless(*args: Any) -> Any:
        found = receive(*args)
        return rules.Receipt.PREPARE if found is rules.Receipt.ASK_WHOLE else found

    def anyhow(self: Versions, chunk: Any, update: Any, data: Any, version: Any = None) -> Any:
        return prepare(self, chunk, update, data)

    def same_number(info: Any, request: Any) -> bool:
        number = (request.update.writer, request.update.sequence)
        return info is not None and (info.writer, info.sequence) == number

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(rules, "receive", careless))
    stack.enter_context(mock.patch.object(rules, "is_version", same_number))
    stack.enter_context(mock.patch.object(Versions, "prepare", anyhow))
    return stack


def _synced_at_once() -> Any:
    """A member counts as in step as soon as it is heard of."""
    returned = members.returned

    def hasty(chain: Any, target_id: int) -> Any:
        found = returned(chain, target_id)
        if found is chain or not found.targets:
            return found
        return members.synced(found, found.version, found.targets[-1], target_id)

    return mock.patch.object(members, "returned", hasty)


class _Blind:
    """The kinds of records of which one is never found."""

    def __getattr__(self, name: str) -> Any:
        return getattr(records, name)

    def move_key(self, inode: int) -> bytes:
        return b"none"


def _fill_the_place_of_a_move() -> Any:
    """A file that was cut while it moves gets its empty places wherever there is room: there as
    well where it was copied to before."""
    return mock.patch.object(draining, "records", _Blind())


def _serve_what_is_lost() -> Any:
    """Readers are given what is left of a chunk that is recorded as damaged."""
    return mock.patch.object(versions, "refuse_damaged", lambda info: None)


def _move_what_is_open() -> Any:
    """An open does not keep a file's move from ending."""
    init = Mover.__init__

    def blind(self: Mover, **settings: Any) -> None:
        init(self, **settings | {"may_be_open": lambda inode: False})

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Mover, "__init__", blind))
    stack.enter_context(mock.patch.object(Moves, "disarm", lambda *_: None))
    return stack


def _leave_before_the_copies() -> Any:
    """A target that is drained leaves chains that are not whole without it."""
    return mock.patch.object(Membership, "_is_whole_without", lambda self, chain, target_id: True)


def _remember_every_update() -> Any:
    """The table of updates that were carried out grows without bound."""

    def keep(self: UpdateNumbers, info: Any) -> None:
        self._versions[numbers._name(info.chunk, info.writer, info.sequence)] = info.version

    return mock.patch.object(UpdateNumbers, "add", keep)


def _publish_before_the_bytes() -> Any:
    """A chunk gets its name before its length and attribute."""
    complete, name = ChunkStore._complete, ChunkStore._name

    def named_first(self: ChunkStore, staged: Any, info: Any) -> None:
        name(self, staged, info)
        complete(self, staged, info)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(ChunkStore, "_complete", lambda *args: None))
    stack.enter_context(mock.patch.object(ChunkStore, "_name", named_first))
    return stack


def _believe_every_frame() -> Any:
    """Nobody looks at the checksum of a request or an answer."""
    return mock.patch.object(frames, "crc32c", lambda data, begun=0: 0)


def _keep_what_is_revoked() -> Any:
    """An agent goes on with blocks of which it was told that they are gone."""
    return mock.patch.object(BlockCache, "revoke", lambda self, generations: None)


def _answer_before_all_have_dropped_it() -> Any:
    """A change is answered while watchers may still show what was before it."""

    async def at_once(self: Watching, revocations: Any) -> None:
        pass

    return mock.patch.object(Watching, "_over", at_once)


def _believe_an_old_answer() -> Any:
    """What was revoked while its answer was on its way is kept."""
    acquire = BlockCache.acquire

    def trusting(self: BlockCache, *args: Any) -> Any:
        return acquire(self, *args[:-1], None if args[-1] is None else self.revocations)

    return mock.patch.object(BlockCache, "acquire", trusting)


def _keep_the_incarnation() -> Any:
    """A target is who it is by its place: whose disk was exchanged is taken for the old one."""
    stack = contextlib.ExitStack()
    open_store, make_views = ChunkServer._open_store, Views.__init__

    def by_place(self: ChunkServer, directory: str) -> Any:
        name = uuid.UUID(bytes=hashlib.md5(directory.encode()).digest(), version=4)
        with mock.patch.object(chunk_server.uuid, "UUID", lambda *_, **__: name):
            return open_store(self, directory)

    def always_one(self: Views, clock: Any, draw: Any, uuids: Any) -> None:
        make_views(self, clock, lambda: 1, uuids)

    stack.enter_context(mock.patch.object(ChunkServer, "_open_store", by_place))
    stack.enter_context(mock.patch.object(Views, "__init__", always_one))
    return stack


BUGS: dict[str, tuple[Callable[[], Any], str]] = {
    "remove another generation": (_remove_other_generation, "network"),
    "commit without chunks": (_commit_without_chunks, "network"),
    "collect too early": (_collect_early, "network"),
    "overwrite what is committed": (_overwrite_committed, "network"),
    "forget removals": (_forget_removals, "restarts"),
    "skip the version check": (_skip_version_check, "chains"),
    "answer before the tail": (_answer_before_the_tail, "chains"),
    "serve pending": (_serve_pending, "chains"),
    "no fence": (_no_fence, "leases"),
    "no memory of updates": (_no_memory_of_updates, "chains"),
    "serve while syncing": (_serve_while_syncing, "leases"),
    "take silence for no": (_take_silence_for_no, "chains"),
    "keep pending at a rejoin": (_keep_pending_at_a_rejoin, "chains"),
    "go on after a restart": (_go_on_after_a_restart, "chains and ruin"),
    "commit under any version": (_commit_under_any_version, "chains"),
    "synced at once": (_synced_at_once, "chains"),
    "move what is open": (_move_what_is_open, "drains"),
    "fill the place of a move": (_fill_the_place_of_a_move, "drains and cuts"),
    "serve what is lost": (_serve_what_is_lost, "chains and ruin"),
    "collect what is written": (_collect_what_is_written, "chains"),
    "collect what is open": (_collect_what_is_open, "network"),
    "leave before the copies": (_leave_before_the_copies, "chains and changes"),
    "remember every update": (_remember_every_update, "chains"),
    "publish before the bytes": (_publish_before_the_bytes, "chains and power"),
    "believe every frame": (_believe_every_frame, "chains"),
    "keep the incarnation": (_keep_the_incarnation, "chains and changes"),
    "keep what is revoked": (_keep_what_is_revoked, "block leases"),
    "answer before all have dropped it": (_answer_before_all_have_dropped_it, "block leases"),
    "believe an old answer": (_believe_an_old_answer, "block leases"),
}
"""What is wrong, and the kind of world in which it shows."""

FOUND_AT = {
    "remove another generation": 27,
    "commit without chunks": 1,
    "forget removals": 5,
    "skip the version check": 12,
    "serve pending": 1,
    "no fence": 49,
    "no memory of updates": 82,
    "serve while syncing": 22,
    "take silence for no": 67,
    "keep pending at a rejoin": 119,
    "commit under any version": 32,
    "synced at once": 1,
    "move what is open": 278,
    "fill the place of a move": 7,
    "go on after a restart": 76,
    "serve what is lost": 103,
    "collect what is written": 1,
    "leave before the copies": 1,
    "remember every update": 9,
    "believe every frame": 10,
    "keep what is revoked": 1,
    "answer before all have dropped it": 1,
    "believe an old answer": 33,
}
"""A seed that found it when this was written, where the first one does not. A search begins there,
and goes on from there once a change of the code has made it miss."""


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Nothing for an empty name."""
    with contextlib.nullcontext() if not name else BUGS[name][0]():
        yield
