"""What one client holds: leases, a staging area, unfinished puts, and the limits on them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable

from kvfs.agent.config import AgentConfig
from kvfs_base.errors import ArenaFull, ConnectionLost, InvalidRequest, LimitExceeded
from kvfs_base.limits import LEASES_PER_CLIENT_MAX, PAGE_BYTES, PUTS_PER_CLIENT_MAX
from kvfs_base.seams import Connection
from kvfs_gds.arena import Staging
from kvfs_gds.block_cache import Entry, Grant
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
    grants: list[Grant] = dataclasses.field(default_factory=list)
    """Extents of the arena that hold its blocks; readable after the commit."""
    kept_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    entries: list[Entry]
    size_bytes: int


class Session:
    """Thread-safe: the connections of one client share it."""

    def __init__(self, secret: bytes, config: AgentConfig) -> None:
        self.secret = secret
        self.staging = Staging.create(config.staging_bytes)
        self._leased_bytes_max = config.client_leased_bytes_max
        self._lock = threading.Lock()
        self._over = False
        self._members: set[Connection] = set()
        self._leases: dict[int, Lease] = {}
        self._puts: dict[int, Put] = {}
        self._next_id = 1
        self._leased_bytes = 0

    def reserve(self, size_bytes: int) -> None:
        """Counts bytes that are about to be leased. Raises ArenaFull if that is more than one
        client may hold."""
        with self._lock:
            if self._leased_bytes + size_bytes > self._leased_bytes_max:
                raise ArenaFull(needed_bytes=size_bytes, leased_bytes=self._leased_bytes)
            if len(self._leases) >= LEASES_PER_CLIENT_MAX:
                raise LimitExceeded(detail="leases", limit=LEASES_PER_CLIENT_MAX)
            self._leased_bytes += size_bytes

    def unreserve(self, size_bytes: int) -> None:
        with self._lock:
            self._leased_bytes -= size_bytes

    def add_lease(self, entries: list[Entry], size_bytes: int) -> int:
        """Names a lease whose ``size_bytes`` are reserved. Raises ConnectionLost if the session is
        over: its leases have been given back, this one must be too."""
        with self._lock:
            self._require_open()
            lease_id = self._next_id
            self._next_id += 1
            self._leases[lease_id] = Lease(entries, size_bytes)
            return lease_id

    def take_leases(self, lease_ids: Iterable[int]) -> list[Entry]:
        """Ends leases; the caller releases the entries. Unknown ones are skipped."""
        entries: list[Entry] = []
        with self._lock:
            for lease_id in lease_ids:
                lease = self._leases.pop(lease_id, None)
                if lease is not None:
                    self._leased_bytes -= lease.size_bytes
                    entries += lease.entries
        return entries

    def add_put(self, put: Put) -> int:
        """Raises LimitExceeded, or ConnectionLost if the session is over; abort the put then."""
        with self._lock:
            self._require_open()
            if len(self._puts) >= PUTS_PER_CLIENT_MAX:
                raise LimitExceeded(detail="unfinished puts", limit=PUTS_PER_CLIENT_MAX)
            put_id = self._next_id
            self._next_id += 1
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
        return self.staging.view(offset, length)

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

    def end(self) -> tuple[list[Entry], list[Put]]:
        """Ends the session, and its connections with it: entries to release and puts to abort. The
        staging area lives until the last connection has left."""
        with self._lock:
            self._over = True
            entries = [entry for lease in self._leases.values() for entry in lease.entries]
            puts = list(self._puts.values())
            self._leases.clear()
            self._puts.clear()
            for connection in self._members:
                connection.shutdown()
        return entries, puts

    def _require_open(self) -> None:
        if self._over:
            raise ConnectionLost(detail="the session is over")
