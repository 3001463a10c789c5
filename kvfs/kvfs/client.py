"""The Python API: connect, namespaces, blocks.

    with kvfs.connect("/var/lib/kvfs") as client:
        ns = client.namespace("tenant/model", layout=KVLayout(block_tokens=16), create=True)
        keys = kvfs.block_keys(token_ids, 16)
        ns.put(keys, buffers)
        with ns.get(keys[: ns.match(keys)]) as blocks:
            for view in blocks:                 # memoryviews into the arena, nothing was copied
                ...

Everything here is thread-safe, but a Blocks, which belongs to one thread at a time. Every call may
raise ConnectionLost or DeadlineExceeded (the agent, or the metadata service behind it): both are
temporary, and for a cache a miss is always a right answer.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from kvfs.agent.link import AgentSession, Line, SessionLost
from kvfs.agent.messages import (
    GRANTED,
    STAGED,
    AbortPut,
    AgentStatistics,
    CountResident,
    DropBlocks,
    GetBlocks,
    Granted,
    KeysPage,
    ListKeys,
    PreparePut,
    PutPlan,
    StageBlocks,
    split_keys,
)
from kvfs.buffers import byte_view
from kvfs_base.answers import Answer
from kvfs_base.errors import ConnectionLost, InvalidRequest, KvfsError, LimitExceeded
from kvfs_base.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_KEY_BYTES,
    COPIES_MAX,
    STAGING_ROUND_BYTES,
)
from kvfs_base.os_env import os_env
from kvfs_base.seams import BlockingNetwork, Env
from kvfs_base.types import Address, KVLayout
from kvfs_gds.arena import ArenaView
from kvfs_metadata.messages import MatchBlocks, NamespaceInfo, OpenNamespace

T = TypeVar("T")

TARGET_VARIABLE = "KVFS_TARGET"
_NOWHERE = (1 << 64) - 1
_ENDPOINTS_BYTES_MAX = 1 << 20


def connect(target: str | os.PathLike[str] | None = None, *, env: Env | None = None) -> Client:
    """A client of the node agent that ``target`` names: the directory of a running ``kvfs up``,
    ``unix:/path/of/agent.sock``, or by default what the environment variable KVFS_TARGET says.

    Raises InvalidRequest for anything else, ConnectionLost if nothing runs there.
    """
    env = env or os_env()
    if target is None:
        target = os.environ.get(TARGET_VARIABLE)
        if not target:
            raise InvalidRequest(detail=f"no target, and {TARGET_VARIABLE} is not set")
    text = os.fspath(target)
    if text.startswith(("unix:", "tcp:")):
        address = Address.parse(text)
    else:
        address = _agent_of(env, os.path.abspath(text))
    if address.kind != "unix":
        raise InvalidRequest(detail=f"{address}: an agent listens on a unix: address")
    return Client(env, address)


def _agent_of(env: Env, directory: str) -> Address:
    """The agent's address in ``directory``/run/endpoints.json."""
    try:
        file = env.open_disk(f"{directory}/run").open("endpoints.json")
    except (FileNotFoundError, KvfsError) as exc:
        raise ConnectionLost(address=directory, detail="kvfs is not running there") from exc
    try:
        data = bytearray(min(file.size(), _ENDPOINTS_BYTES_MAX))
        file.preadv([memoryview(data)], 0)
        return Address.parse(json.loads(data)["agent"])
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise InvalidRequest(detail=f"{directory}/run/endpoints.json: {exc}") from exc
    finally:
        file.close()


class Client:
    """A session with the node agent. Survives restarts of the agent: the next call opens a new
    session, and blocks that are still held stay readable. After a fork the child gets a session of
    its own; what the parent holds leased is not leased by the child."""

    def __init__(self, env: Env, address: Address) -> None:
        """Raises ConnectionLost if no agent listens at ``address``."""
        self._network: BlockingNetwork = env.blocking_network
        self._address = address
        self._lock = threading.Lock()
        self._closed = False
        self._blocks: weakref.WeakSet[Blocks] = weakref.WeakSet()
        self._session: AgentSession | None = AgentSession(self._network, address)
        _clients.add(self)

    def namespace(
        self,
        name: str,
        layout: KVLayout | None = None,
        *,
        create: bool = False,
        copies: int = 0,
    ) -> Namespace:
        """The namespace ``TENANT/MODEL``. ``layout`` None accepts any that exists; otherwise raises
        LayoutMismatch if it differs. Raises EntryNotFound without ``create``, and InvalidRequest
        for a ``create`` without a layout.

        ``copies``: on how many hosts each block of a namespace that is made is kept, 1 to 3; 0 as
        the directory says in which it is made. One that exists keeps what it has. Raises NoTarget
        if there are not so many hosts."""
        if create and layout is None:
            raise InvalidRequest(detail="a new namespace needs a layout")
        if not 0 <= copies <= COPIES_MAX or (copies and not create):
            raise InvalidRequest(detail=f"copies of a new namespace are 1 to {COPIES_MAX}")
        info: NamespaceInfo = self._call(OpenNamespace(name, layout, create, copies))
        return Namespace(self, name, info)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges of the node agent by name."""
        found: dict[str, int] = self._call(AgentStatistics())
        return found

    def close(self) -> None:
        """Releases every block that is still held and ends the session. Arrays that were made from
        blocks and are still alive keep their bytes, and the lease, until they go."""
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
            held = list(self._blocks)
        for blocks in held:
            blocks.release()
        if session is not None:
            session.retire()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, request: Any) -> Any:
        return self._run(lambda session: session.call(request))

    def _run(self, operation: Callable[[AgentSession], T]) -> T:
        """``operation`` with the current session; if that is lost, once more with a new one.
        Everything that goes through here may happen twice without harm."""
        session = self._current(None)
        try:
            return operation(session)
        except SessionLost:
            session = self._current(lost=session)
        try:
            return operation(session)
        except SessionLost as exc:
            raise ConnectionLost(address=exc.address, detail=exc.detail) from exc

    def _current(self, lost: AgentSession | None) -> AgentSession:
        with self._lock:
            if self._closed:
                raise InvalidRequest(detail="the client is closed")
            session = self._session
            if session is None or session is lost or session.broken:
                self._session = AgentSession(self._network, self._address)
                if session is not None:
                    session.retire()
                session = self._session
            return session

    def _track(self, blocks: Blocks) -> None:
        """Remembers what ``close`` has to release."""
        with self._lock:
            self._blocks.add(blocks)

    def _after_fork(self) -> None:
        session, self._session = self._session, None
        self._lock = threading.Lock()
        if session is not None:
            session.abandon()


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _packed(keys: Sequence[bytes]) -> bytes:
    """The keys end to end. Raises InvalidRequest unless each is 32 bytes."""
    try:
        packed = b"".join(keys)
    except TypeError as exc:
        raise InvalidRequest(detail="keys are a sequence of bytes") from exc
    if not set(map(len, keys)) <= {BLOCK_KEY_BYTES}:
        raise InvalidRequest(detail=f"keys have {BLOCK_KEY_BYTES} bytes each")
    return packed


def _batches(packed: bytes) -> Iterator[bytes]:
    step = BATCH_BLOCKS_MAX * BLOCK_KEY_BYTES
    for start in range(0, len(packed), step):
        yield packed[start : start + step]


class Namespace:
    """The blocks of one layout. Made by Client.namespace."""

    def __init__(self, client: Client, name: str, info: NamespaceInfo) -> None:
        self.name = name
        self.layout: KVLayout = info.layout
        self._client = client
        self._inode = info.inode

    def __repr__(self) -> str:
        return f"<kvfs.Namespace {self.name!r}>"

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first without a gap, are stored."""
        total = 0
        for batch in _batches(_packed(keys)):
            found: int = self._client._call(MatchBlocks(self._inode, batch))
            total += found
            if found * BLOCK_KEY_BYTES < len(batch):
                break
        return total

    def resident(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` have their block in the arena, where a get finds it without a disk.
        A hint: blocks come and go, and one that was removed elsewhere is still counted."""
        return sum(
            self._client._call(CountResident(self._inode, batch))
            for batch in _batches(_packed(keys))
        )

    def get(self, keys: Sequence[bytes]) -> Blocks:
        """Leases the blocks that are stored, bringing them into the arena as needed. Use as a
        context manager. Raises ArenaFull (temporary) if leases leave too little room for them all:
        split the batch, or release others first."""
        packed = _packed(keys)
        return self._client._run(lambda session: self._get(session, packed))

    def ask(self, keys: Sequence[bytes]) -> Answer[Blocks] | None:
        """``get`` in two steps: sends the request and does not wait. The answer, which raises as
        ``get``, must be taken. None if that takes more than one request, or no connection is free
        this moment."""
        packed = _packed(keys)
        session = self._client._session
        if session is None or session.broken or len(keys) > BATCH_BLOCKS_MAX:
            return None
        answer = session.ask(GetBlocks(self._inode, packed))
        if answer is None:
            return None
        take = functools.partial(self._answered, session, packed, answer)
        return Answer(take, answer.within)

    def _answered(self, session: AgentSession, packed: bytes, answer: Answer[Granted]) -> Blocks:
        try:
            return self._leased(session, [answer.take()])
        except SessionLost:
            return self._client._run(lambda session: self._get(session, packed))

    def _get(self, session: AgentSession, packed: bytes) -> Blocks:
        answers = (session.call(GetBlocks(self._inode, batch)) for batch in _batches(packed))
        return self._leased(session, answers)

    def _leased(self, session: AgentSession, answers: Iterable[Granted]) -> Blocks:
        blocks = Blocks(session)
        try:
            for granted in answers:
                blocks._append(granted)
        except BaseException:
            blocks.release()
            raise
        self._client._track(blocks)
        return blocks

    def get_into(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> list[bool]:
        """Copies blocks into writable buffers of exactly their size; True for each that was
        stored. Raises InvalidRequest if a size differs: before anything is read where the layout
        has a size, else before that block is copied."""
        views = self._views(keys, buffers, writable=True)
        done: list[bool] = []
        for count in _round_lengths([len(v) for v in views], STAGING_ROUND_BYTES):
            first = len(done)
            with self.get(keys[first : first + count]) as blocks:
                done += blocks._copy_into(views[first : first + count])
        return done

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        """Stores blocks, all or none; keys that are stored already keep their bytes. Returns how
        many were new. Buffers: anything that byte_view takes; at most 4,096 of them.

        Raises InvalidRequest (sizes, counts), LimitExceeded, CacheFull, QuotaExceeded (it is
        more than the quota of the namespace can hold), PrepareExpired, and what
        the chunk servers raised (NoTarget, DiskFull, TargetFailed ...): then nothing is stored.
        """
        views = self._views(keys, buffers, writable=False)
        if len(views) > BATCH_BLOCKS_MAX:
            raise LimitExceeded(detail="blocks in one put", limit=BATCH_BLOCKS_MAX)
        if not views:
            return 0
        if min(map(len, views)) == 0:
            raise InvalidRequest(detail="an empty block")
        unique: dict[bytes, memoryview] = {}
        for key, view in zip(keys, views, strict=True):
            unique.setdefault(key, view)
        sized = list(unique.values())
        request = PreparePut(self._inode, b"".join(unique), tuple(map(len, sized)))
        return self._client._run(lambda session: _Put(session, request, sized).run())

    def remove(self, keys: Sequence[bytes]) -> int:
        """Removes blocks; returns how many were stored. Who holds one leased keeps its bytes."""
        return sum(
            self._client._call(DropBlocks(self._inode, batch)) for batch in _batches(_packed(keys))
        )

    def keys(self) -> Iterator[bytes]:
        """All stored keys in the order of their bytes. Blocks that come and go meanwhile may or may
        not be seen."""
        after, more = b"", True
        while more:
            page, more = self.keys_page(after)
            yield from page
            after = page[-1] if page else after

    def keys_page(self, after: bytes) -> tuple[list[bytes], bool]:
        """Up to 1,024 stored keys that sort after ``after``, and whether more follow."""
        page: KeysPage = self._client._call(ListKeys(self._inode, after))
        return split_keys(page.keys), page.more and bool(page.keys)

    def _views(
        self, keys: Sequence[bytes], buffers: Sequence[Any], *, writable: bool
    ) -> list[memoryview]:
        """The buffers as bytes, checked against the keys and the layout."""
        _packed(keys)
        if len(keys) != len(buffers):
            raise InvalidRequest(detail=f"{len(keys)} keys, {len(buffers)} buffers")
        views = [byte_view(buffer, writable=writable) for buffer in buffers]
        size = self.layout.block_bytes
        for place, view in enumerate(views):
            if size and len(view) != size:
                raise InvalidRequest(
                    detail=f"buffer {place} has {len(view)} bytes, the layout says {size}"
                )
        return views


def _round_lengths(sizes: Sequence[int], round_bytes: int) -> Iterator[int]:
    """Cuts a list into rounds of about ``round_bytes``: how many items each has, at least one."""
    count = total = 0
    for size in sizes:
        if count and (total + size > round_bytes or count == BATCH_BLOCKS_MAX):
            yield count
            count = total = 0
        count += 1
        total += size
    if count:
        yield count


class _Put:
    """One put on one connection. While the agent writes a round, the next one is copied."""

    def __init__(
        self, session: AgentSession, request: PreparePut, views: Sequence[memoryview]
    ) -> None:
        self._session = session
        self._request = request
        self._views = views
        self._put = 0
        self._in_flight: list[int] = []
        """Staging offsets of the round that the agent works on."""

    def run(self) -> int:
        with self._session.line() as line:
            plan: PutPlan = line.call(self._request)
            if not plan.put:
                return 0
            self._put = plan.put
            places = [place for place, wanted in enumerate(plan.wanted) if wanted]
            try:
                self._stage(line, places)
            except BaseException:
                self._give_up(line)
                raise
            return len(places)

    def _stage(self, line: Line, places: list[int]) -> None:
        while places:
            offsets = self._copy_round(places, wait=not self._in_flight)
            try:
                self._finish_round(line)
                if not offsets:
                    continue  # the staging area was full: now it has room
                batch, places = places[: len(offsets)], places[len(offsets) :]
                packed = b"".join(map(STAGED.pack, batch, offsets))
                line.send(StageBlocks(self._put, packed, not places))
                self._in_flight, offsets = offsets, []
            finally:
                self._session.staging.free(offsets)
        self._finish_round(line)

    def _copy_round(self, places: Sequence[int], *, wait: bool) -> list[int]:
        """Copies as many blocks as one round takes; their offsets in the staging area."""
        staging = self._session.staging
        round_bytes = min(STAGING_ROUND_BYTES, staging.size_bytes // 2)
        sizes = [len(self._views[place]) for place in places]
        count = next(_round_lengths(sizes, round_bytes))
        offsets = staging.allocate(sizes[:count], wait=wait)
        try:
            for place, offset in zip(places, offsets, strict=False):
                staging.write(offset, self._views[place])
        except BaseException:
            staging.free(offsets)
            raise
        return offsets

    def _finish_round(self, line: Line) -> None:
        if self._in_flight:
            offsets, self._in_flight = self._in_flight, []
            try:
                line.receive(StageBlocks)
            finally:
                # Without an answer the agent may be reading them still: never reuse them. The
                # session is broken then, and its successor has a staging area of its own.
                if line.usable:
                    self._session.staging.free(offsets)

    def _give_up(self, line: Line) -> None:
        try:
            self._finish_round(line)
        except KvfsError:
            pass
        try:
            if line.usable:
                line.call(AbortPut(self._put))
        except KvfsError:
            pass


class Blocks(Sequence[memoryview | None]):
    """The answer to a get: a read-only memoryview of each block, or None for a miss.

    They show the arena itself, and are valid until ``release`` (the end of the ``with`` block);
    using one later raises ValueError. An array made from one keeps the bytes, and their lease, for
    as long as it lives.
    """

    def __init__(self, session: AgentSession) -> None:
        self._session = session
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._generations: list[int] = []
        self._bases: list[memoryview | None] = []
        self._views: dict[int, memoryview] = {}
        self._released = False

    def _append(self, granted: Granted) -> None:
        """One reply: up to BATCH_BLOCKS_MAX blocks, under one lease."""
        count = len(granted.blocks) // GRANTED.size
        values = struct.unpack(f"<{3 * count}Q", granted.blocks)
        self._offsets += values[0::3]
        self._sizes += values[1::3]
        self._generations += values[2::3]
        self._bases.append(self._session.lease(granted.lease) if granted.lease else None)

    @property
    def hits(self) -> int:
        """How many blocks were stored."""
        return len(self._offsets) - self._offsets.count(_NOWHERE)

    @property
    def arena(self) -> ArenaView:
        """The mapping that ``extents`` refers to."""
        return self._session.arena

    @property
    def extents(self) -> list[tuple[int, int] | None]:
        """Offset and size of each block in ``arena``, None for a miss."""
        return [
            None if offset == _NOWHERE else (offset, size)
            for offset, size in zip(self._offsets, self._sizes, strict=True)
        ]

    @property
    def generations(self) -> list[int]:
        """The generation of each block: a key that is removed and stored again gets another one.
        0 for a miss."""
        return list(self._generations)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, place: int) -> memoryview | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[memoryview | None]: ...
    def __getitem__(self, place: int | slice) -> memoryview | list[memoryview | None] | None:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if self._released:
            raise ValueError("these blocks were released")
        if place < 0:
            place += len(self._offsets)
        view = self._views.get(place)
        if view is None:
            if not 0 <= place < len(self._offsets):
                raise IndexError(place)
            offset = self._offsets[place]
            if offset == _NOWHERE:
                return None
            base = self._bases[place // BATCH_BLOCKS_MAX]
            assert base is not None
            view = self._views[place] = base[offset : offset + self._sizes[place]]
        return view

    def _copy_into(self, views: Sequence[memoryview]) -> list[bool]:
        """Copies each block that is there. The kernel does it: other threads run meanwhile."""
        for place, view in enumerate(views):
            if self._offsets[place] != _NOWHERE and self._sizes[place] != len(view):
                raise InvalidRequest(
                    detail=f"buffer {place} has {len(view)} bytes, the block {self._sizes[place]}"
                )
        fd = self.arena.fd
        for place, view in enumerate(views):
            if self._offsets[place] != _NOWHERE:
                done = 0
                while done < len(view):
                    done += os.preadv(fd, [view[done:]], self._offsets[place] + done)
        return [offset != _NOWHERE for offset in self._offsets]

    def release(self) -> None:
        """Ends the lease. Twice does no harm."""
        if self._released:
            return
        self._released = True
        for view in (*self._views.values(), *self._bases):
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    pass  # somebody reads it this moment; the lease lasts until they let go
        self._views.clear()
        self._bases.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


__all__ = ["Blocks", "Client", "Namespace", "connect"]
