"""What each client holds: leases, a staging area, unfinished puts, and the limits on them."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import threading
from collections.abc import Callable

from kvfs.agent.config import AgentConfig
from kvfs.agent.messages import SESSION_BYTES
from kvfs_base.errors import (
    ArenaFull,
    ConnectionLost,
    EntryNotFound,
    InvalidRequest,
    LimitExceeded,
)
from kvfs_base.limits import (
    LEASES_PER_CLIENT_MAX,
    PAGE_BYTES,
    PUTS_PER_CLIENT_MAX,
)
from kvfs_base.seams import Connection
from kvfs_gds.arena import SharedMemory
from kvfs_gds.block_cache import BlockCache, Entry, Grant
from kvfs_metadata.messages import PreparedBlock


@dataclasses.dataclass(slots=True)
class Put:
    """A prepared batch on its way to the chunk servers. Used by one thread at a time: whoever works
    on it has taken it out of its session."""

    namespace: int
    batch_id: int
    keys: list[bytes]
    sizes: tuple[int, ...]
    blocks: tuple[PreparedBlock | None, ...]
    """None where nothing is to be written."""
    crc32c: list[int | None]
    """Of each block that was written already."""
    versions: dict[int, int] = dataclasses.field(default_factory=dict)
    """By place, where the chain has several copies: its version when all members got the block."""
    grants: list[Grant] = dataclasses.field(default_factory=list)
    """Extents of the arena that hold its blocks; readable after the commit."""
    kept_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    entries: list[Entry]
    size_bytes: int


class Session:
    """Thread-safe: the connections of one client share it.

    The client gives leases back by marking them on the board, without a call. The marks are
    collected now and then by its own gets, and whenever anybody needs room.
    """

    def __init__(self, secret: bytes, config: AgentConfig, cache: BlockCache) -> None:
        self.secret = secret
        self.staging = SharedMemory.create(config.staging_bytes, "kvfs-staging")
        self.board = SharedMemory.create(LEASES_PER_CLIENT_MAX, "kvfs-leases")
        self._marks = self.board.view(0, LEASES_PER_CLIENT_MAX)
        self._leased_bytes_max = config.client_leased_bytes_max
        self._cache = cache
        self._lock = threading.Lock()
        self._over = False
        self._members: set[Connection] = set()
        self._leases: dict[int, Lease] = {}
        self._free_leases: list[int] = []
        self._gets_until_collect = 0
        self._leased_bytes = 0
        self._puts: dict[int, Put] = {}
        self._next_put = 1

    # --- leases

    def reserve(self, size_bytes: int) -> None:
        """Counts bytes that are about to be leased. Raises ArenaFull if that is more than one
        client may hold."""
        with self._lock:
            # A look at every lease costs about 0.1 us each: a client that holds many pays for it
            # once in many gets.
            self._gets_until_collect -= 1
            if self._gets_until_collect <= 0:
                self._collect()
                self._gets_until_collect = len(self._leases) // 16
            if self._leased_bytes + size_bytes > self._leased_bytes_max:
                self._collect()
            if self._leased_bytes + size_bytes > self._leased_bytes_max:
                raise ArenaFull(needed_bytes=size_bytes, leased_bytes=self._leased_bytes)
            self._leased_bytes += size_bytes

    def unreserve(self, size_bytes: int) -> None:
        with self._lock:
            self._leased_bytes -= size_bytes

    def add_lease(self, entries: list[Entry], size_bytes: int) -> int:
        """The number of a new lease, whose ``size_bytes`` are reserved. Raises LimitExceeded, or
        ConnectionLost if the session is over: its leases have been given back, this must be too."""
        with self._lock:
            self._require_open()
            if len(self._leases) >= LEASES_PER_CLIENT_MAX:
                self._collect()
            if len(self._leases) >= LEASES_PER_CLIENT_MAX:
                raise LimitExceeded(detail="leases", limit=LEASES_PER_CLIENT_MAX)
            lease = self._free_leases.pop() if self._free_leases else len(self._leases) + 1
            self._marks[lease - 1] = 0
            self._leases[lease] = Lease(entries, size_bytes)
            return lease

    def collect(self) -> None:
        """Ends the leases that the client gave back."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        marks = self._marks
        done = [number for number in self._leases if marks[number - 1]]
        for number in done:
            lease = self._leases.pop(number)
            self._free_leases.append(number)
            self._leased_bytes -= lease.size_bytes
            self._cache.release(lease.entries)

    # --- puts

    def add_put(self, put: Put) -> int:
        """Raises LimitExceeded, or ConnectionLost if the session is over; abort the put then."""
        with self._lock:
            self._require_open()
            if len(self._puts) >= PUTS_PER_CLIENT_MAX:
                raise LimitExceeded(detail="unfinished puts", limit=PUTS_PER_CLIENT_MAX)
            put_id = self._next_put
            self._next_put += 1
            self._puts[put_id] = put
            return put_id

    def take_put(self, put_id: int) -> Put | None:
        """The put, which nobody else gets until it is returned."""
        with self._lock:
            return self._puts.pop(put_id, None)

    def return_put(self, put_id: int, put: Put) -> None:
        """Raises ConnectionLost if the session is over; abort the put then."""
        with self._lock:
            self._require_open()
            self._puts[put_id] = put

    def staged(self, offset: int, length: int) -> memoryview:
        """A part of the staging area. Raises InvalidRequest out of bounds."""
        if offset % PAGE_BYTES:
            raise InvalidRequest(detail=f"staging offset {offset} is not at a page")
        return self.staging.view_to_fill(offset, length)

    # --- life

    def join(self, connection: Connection) -> None:
        """Another connection of this client. Raises ConnectionLost if the session is over."""
        with self._lock:
            self._require_open()
            self._members.add(connection)

    def leave(self, connection: Connection) -> None:
        """The connection's thread is done with this session."""
        with self._lock:
            self._members.discard(connection)
            unused = self._over and not self._members
        if unused:
            self.staging.close()
            self._marks.release()
            self.board.close()

    def end(self) -> list[Put]:
        """Ends the session, its leases and its connections; the puts are to be aborted. The shared
        memory lives until the last connection has left."""
        with self._lock:
            self._over = True
            leases, self._leases = self._leases, {}
            puts, self._puts = self._puts, {}
            for connection in self._members:
                connection.shutdown()
        for lease in leases.values():
            self._cache.release(lease.entries)
        return list(puts.values())

    def _require_open(self) -> None:
        if self._over:
            raise ConnectionLost(detail="the session is over")


class Sessions:
    """All sessions of an agent. Thread-safe."""

    def __init__(self, config: AgentConfig, cache: BlockCache, randbytes: Callable[[int], bytes]):
        self._config = config
        self._cache = cache
        self._key = randbytes(32)
        self._opened = 0
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self) -> Session:
        with self._lock:
            self._opened += 1
            number = self._opened.to_bytes(8, "little")
        # A client knows its own secret: it must not tell the next one.
        secret = hmac.digest(self._key, number, hashlib.sha256)[:SESSION_BYTES]
        session = Session(secret, self._config, self._cache)
        with self._lock:
            self._sessions.add(session)
        return session

    def find(self, secret: bytes) -> Session:
        """Raises EntryNotFound."""
        for session in self._all():
            if hmac.compare_digest(session.secret, secret):
                return session
        raise EntryNotFound(name="session")

    def end(self, session: Session) -> list[Put]:
        """As Session.end."""
        with self._lock:
            self._sessions.discard(session)
        return session.end()

    def collect(self) -> None:
        """Ends every lease that its client gave back."""
        for session in self._all():
            session.collect()

    def _all(self) -> list[Session]:
        with self._lock:
            return list(self._sessions)
