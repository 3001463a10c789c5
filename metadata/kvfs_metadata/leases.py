"""What watchers may answer for by themselves, and who waits until they have dropped it.

No clock of its own, no waiting: the service tells it what happened and when. Keys are those of the
store's records. docs/design/0007-name-leases.md says what each is a lease on.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from kvfs_base.errors import EntryNotFound
from kvfs_base.seams import Clock
from kvfs_base.types import Attr
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, Writes, scan
from kvfs_metadata.limits import (
    LEASES_MAX,
    REVOKED_KEYS_MAX,
    WATCH_SECONDS,
)
from kvfs_metadata.transaction import Tx

MERGED = -1
"""Author of a group that holds changes of several connections."""

LEASED_KINDS = frozenset({records.INODE, records.ENTRY, records.BLOCK})

WHOLE_BYTES = len(records.entry_key(0, b""))
"""Of the key of an entry without a name: the lease on knowing all entries of a directory."""

TRIM_KEYS = REVOKED_KEYS_MAX // 2
"""Revoked at a time when a watcher has its share."""


class Revocation:
    """Over when all watchers that it concerns have dropped what was changed, or are gone."""

    __slots__ = ("_then", "left")

    def __init__(self) -> None:
        self.left = 0
        self._then: list[Callable[[], None]] = []

    @property
    def is_over(self) -> bool:
        return not self.left

    def then(self, act: Callable[[], None]) -> None:
        """``act`` is called when it is over, which it is not yet."""
        self._then.append(act)

    def one_less(self) -> None:
        self.left -= 1
        if not self.left:
            for act in self._then:
                act()


class _Watcher:
    def __init__(self, session: bytes, ends_at: float) -> None:
        self.session = session
        self.ends_at = ends_at
        self.keys: dict[bytes, None] = {}
        """The oldest first."""
        self.number = 1
        """Of the last message."""
        self.unsent: dict[bytes, None] = {}
        self.sent: collections.deque[tuple[int, dict[bytes, None]]] = collections.deque()
        """By number of the message, what was told and may not have been dropped yet."""
        self.reset = False
        """Everything is to be revoked with the next message."""
        self.reset_number = 0
        """Of the message that revokes everything, until it was seen."""
        self.trimmed: tuple[int, list[bytes]] = (0, [])
        self.waiting: collections.deque[tuple[int, Revocation]] = collections.deque()
        """By number of the message that has to be seen."""
        self.wake: Callable[[], None] | None = None

    @property
    def has_news(self) -> bool:
        return bool(self.unsent) or self.reset

    def owes(self, writes: Writes) -> int:
        """The message that has to be seen before a change is answered which comes on top of one
        that is revoked already; 0 if there is none."""
        if not self.unsent and not self.sent:
            return 0
        last = self.number + 1 if self.unsent else self.number
        if any(value is not None and key[:4] == records.BLOCK for key, value in writes.items()):
            return last  # another block of the same name may be among those that are gone
        if not self.unsent.keys().isdisjoint(writes):
            return last
        told = (number for number, keys in self.sent if not keys.keys().isdisjoint(writes))
        return max(told, default=0)

    def wait(self, revocation: Revocation, number: int) -> None:
        revocation.left += 1
        self.waiting.append((number, revocation))

    def call(self) -> None:
        if self.wake is not None:
            self.wake()


class Leases:
    """Watchers are known by their connection."""

    def __init__(self, clock: Clock, leases_max: int = LEASES_MAX) -> None:
        self._clock = clock
        self._leases_max = leases_max
        self._watchers: dict[int, _Watcher] = {}
        self._connections: dict[bytes, int] = {}
        """Of the watchers, by session."""
        self._holders: dict[bytes, tuple[int, ...]] = {}
        self._expected: dict[bytes, None] = {}
        """Sessions that may have watched the process before this one."""
        self._expected_until = 0.0
        self._start: Revocation | None = None
        """Over when none of those is left."""
        self._recorded: set[bytes] = set()
        """Sessions whose watch is recorded in the store."""
        self._revoked = 0

    # --- watchers

    def expect(self, sessions: Iterable[bytes]) -> None:
        """At the start: these were recorded."""
        self._expected = dict.fromkeys(sessions)
        self._recorded.update(self._expected)
        if self._expected:
            self._expected_until = self._clock.monotonic() + WATCH_SECONDS
            self._start = Revocation()
            self._start.left = 1

    def watches(self, connection: int) -> bool:
        return connection in self._watchers

    def watcher_of(self, connection: int, request: Any) -> int | None:
        """Who is leased what the answer says: the connection that asks, or the session that it asks
        for, if it watches."""
        if type(request) is m.LookupBlocks:
            return self._connections.get(request.watcher) if request.watcher else None
        return connection if connection in self._watchers else None

    def hear(self, connection: int, request: m.Watch) -> bool:
        """A Watch arrived; True if a watch begins with it."""
        watcher = self._watchers.get(connection)
        if watcher is None or not request.seen:
            self._begin(connection, request.session)
            # Who thinks that it watched already is told that everything is revoked.
            self._watchers[connection].reset = request.seen > 0
            return True
        watcher.ends_at = self._clock.monotonic() + WATCH_SECONDS
        self._seen(connection, watcher, request.seen)
        return False

    def _begin(self, connection: int, session: bytes) -> None:
        for other, watcher in list(self._watchers.items()):
            if watcher.session == session or other == connection:
                self.end(other)
        self._come_back(session)
        share = self._leases_max // (len(self._watchers) + 1)
        for other, watcher in self._watchers.items():
            if len(watcher.keys) > share:
                self._reset(other, watcher)
        self._watchers[connection] = _Watcher(session, self._clock.monotonic() + WATCH_SECONDS)
        self._connections[session] = connection

    def _come_back(self, session: bytes) -> None:
        self._expected.pop(session, None)
        if not self._expected and self._start is not None:
            self._start.one_less()
            self._start = None

    def _seen(self, connection: int, watcher: _Watcher, number: int) -> None:
        trimmed_number, trimmed = watcher.trimmed
        if trimmed and number >= trimmed_number:
            for key in trimmed:
                if key in watcher.keys:  # else it was revoked meanwhile
                    del watcher.keys[key]
                    self._forget(connection, key)
            watcher.trimmed = (0, [])
        if watcher.reset_number and number >= watcher.reset_number:
            watcher.reset_number = 0
        while watcher.sent and watcher.sent[0][0] <= number:
            watcher.sent.popleft()
        while watcher.waiting and watcher.waiting[0][0] <= number:
            watcher.waiting.popleft()[1].one_less()

    def end(self, connection: int) -> None:
        """The watcher remembers nothing any more, or must not use it."""
        watcher = self._watchers.pop(connection, None)
        if watcher is None:
            return
        del self._connections[watcher.session]
        for key in watcher.keys:
            self._forget(connection, key)
        watcher.call()
        for _, revocation in watcher.waiting:
            revocation.one_less()

    def expire(self) -> None:
        """Ends what was not renewed in time."""
        now = self._clock.monotonic()
        for connection in [c for c, w in self._watchers.items() if w.ends_at <= now]:
            self.end(connection)
        if self._start is not None and self._expected_until <= now:
            for session in list(self._expected):
                self._come_back(session)

    def next_end(self) -> float:
        """When ``expire`` may have something to do. Monotonic seconds."""
        ends = [watcher.ends_at for watcher in self._watchers.values() if watcher.waiting]
        if self._start is not None:
            ends.append(self._expected_until)
        return min(ends, default=self._clock.monotonic())

    def forgotten(self) -> list[bytes]:
        """Sessions that are recorded and need not be."""
        active = {watcher.session for watcher in self._watchers.values()}
        return [s for s in self._recorded if s not in active and s not in self._expected]

    def record(self, session: bytes) -> Callable[[Tx], None]:
        """The next process is to know that this session may answer for names by itself."""

        def put(tx: Tx) -> None:
            if session not in self._recorded:
                tx.kv.put(records.watcher_key(session), b"")
                self._recorded.add(session)
                tx.undo.append(partial(self._recorded.discard, session))

        return put

    def forget(self, tx: Tx) -> None:
        """Takes away the records that are not needed."""
        for session in self.forgotten():
            tx.kv.delete(records.watcher_key(session))
            self._recorded.discard(session)
            tx.undo.append(partial(self._recorded.add, session))

    # --- messages

    def when_news(self, connection: int, wake: Callable[[], None]) -> None:
        """``wake`` is called when ``take`` has something to tell, or the watch has ended."""
        watcher = self._watchers.get(connection)
        if watcher is not None:
            watcher.wake = wake

    def has_news(self, connection: int) -> bool:
        watcher = self._watchers.get(connection)
        return watcher is None or watcher.has_news

    def take(self, connection: int) -> m.Revoked:
        """The next message: empty if there is nothing to revoke."""
        watcher = self._watchers.get(connection)
        if watcher is None:  # whatever it answers next begins a new watch
            return m.Revoked(1, everything=True)
        if not watcher.has_news:
            return m.Revoked(watcher.number)
        watcher.number += 1
        keys, watcher.unsent = watcher.unsent, {}
        if watcher.reset:
            watcher.reset, watcher.reset_number = False, watcher.number
            return m.Revoked(watcher.number, everything=True)
        watcher.sent.append((watcher.number, keys))
        inodes = [records.number_at(key) for key in keys if key[:4] != records.ENTRY]
        entries = [(records.number_at(k), k[12:]) for k in keys if k[:4] == records.ENTRY]
        return m.Revoked(watcher.number, tuple(inodes), tuple(entries))

    # --- giving

    def grant(self, connection: int, *keys: bytes) -> None:
        watcher = self._watchers.get(connection)
        if watcher is None:
            return
        share = self._leases_max // len(self._watchers)
        for key in keys:
            if key not in watcher.keys:
                watcher.keys[key] = None
                self._holders[key] = (*self._holders.get(key, ()), connection)
                if len(watcher.keys) > share:
                    self._trim(connection, watcher, share)

    def _trim(self, connection: int, watcher: _Watcher, share: int) -> None:
        if watcher.trimmed[1]:
            # It does not keep up with what it is told.
            if len(watcher.keys) > share + TRIM_KEYS:
                self._reset(connection, watcher)
            return
        oldest = list(itertools.islice(watcher.keys, min(TRIM_KEYS, 1 + share // 4)))
        watcher.unsent.update(dict.fromkeys(oldest))
        watcher.trimmed = (watcher.number + 1, oldest)
        watcher.call()

    def _reset(self, connection: int, watcher: _Watcher) -> None:
        for key in watcher.keys:
            self._forget(connection, key)
        watcher.keys.clear()
        watcher.unsent.clear()
        watcher.trimmed = (0, [])
        watcher.reset, watcher.reset_number = True, watcher.number + 1
        watcher.call()

    def reset_all(self) -> None:
        """What was answered may not have happened."""
        for connection, watcher in self._watchers.items():
            self._reset(connection, watcher)

    # --- revoking

    def changed(self, writes: Writes, author: int) -> Revocation | None:
        """A group was committed. What is returned, if anything, is to be over before the group is
        answered."""
        if self._start is None and (not self._watchers or self._watches_alone(author)):
            return None
        revocation = Revocation()
        told: dict[int, None] = {}
        if self._holders:
            self._revoke(writes, author, told)
        for connection, watcher in self._watchers.items():
            if connection in told:
                watcher.wait(revocation, watcher.number + 1)
                watcher.call()
            elif connection != author and (number := watcher.reset_number or watcher.owes(writes)):
                watcher.wait(revocation, number)
        if author == MERGED or not any(key[:4] in LEASED_KINDS for key in writes):
            # Perhaps a repetition of a change that somebody still waits for.
            self._join_all(revocation, told)
        if self._start is not None:
            revocation.left += 1
            self._start.then(revocation.one_less)
        return revocation if revocation.left else None

    def _watches_alone(self, connection: int) -> bool:
        """Whether nobody else watches, and it has nothing to drop: nobody is waited for then."""
        watcher = self._watchers.get(connection)
        return watcher is not None and len(self._watchers) == 1 and not watcher.waiting

    def _revoke(self, writes: Writes, author: int, told: dict[int, None]) -> None:
        holders = self._holders
        for written, value in writes.items():
            key = written
            if value is not None and key[:4] == records.BLOCK:
                # It is new, or its last use was recorded: only who took it for missing is wrong.
                block = records.unpack_block(value)
                key = records.entry_key(block.namespace, block.key.hex().encode())
            if key in holders:
                self._revoke_key(key, author, told)
            if key[:4] == records.ENTRY and key[:WHOLE_BYTES] in holders:
                self._revoke_key(key[:WHOLE_BYTES], author, told)

    def _revoke_key(self, key: bytes, author: int, told: dict[int, None]) -> None:
        for connection in self._holders[key]:
            if connection != author:
                told[connection] = None
                self._take_back(connection, key)

    def _take_back(self, connection: int, key: bytes) -> None:
        watcher = self._watchers[connection]
        del watcher.keys[key]
        self._forget(connection, key)
        self._revoked += 1
        if watcher.reset:
            return
        watcher.unsent[key] = None
        if len(watcher.unsent) > REVOKED_KEYS_MAX:
            self._reset(connection, watcher)

    def _join_all(self, revocation: Revocation, told: dict[int, None]) -> None:
        for connection, watcher in self._watchers.items():
            if watcher.waiting and connection not in told:
                watcher.wait(revocation, watcher.waiting[-1][0])

    def _forget(self, connection: int, key: bytes) -> None:
        left = tuple(c for c in self._holders[key] if c != connection)
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]

    def statistics(self) -> dict[str, int]:
        return {
            "watchers": len(self._watchers),
            "leases": sum(len(watcher.keys) for watcher in self._watchers.values()),
            "leases_revoked": self._revoked,
        }


def recorded_watchers(kv: KVRead) -> list[bytes]:
    return [key[len(records.WATCHER) :] for key, _ in scan(kv, records.WATCHER)]


_OF_ONE_NAME = frozenset({m.Lookup, m.Make, m.Link, m.Unlink})


def leased_keys(
    request: Any, answer: Any, namespace_of: Callable[[int], int | None]
) -> tuple[bytes, ...]:
    """What a watcher may keep of an answer. ``namespace_of`` knows the directory of a block."""
    kind = type(request)
    if kind is m.Once:
        request = request.request
        kind = type(request)
    if isinstance(answer, Attr):
        return _of_attributes(request, kind, answer, namespace_of)
    if kind is m.LookupBlocks and isinstance(answer, tuple):
        return tuple([records.block_key(info.inode) for info in answer if info is not None])
    if isinstance(answer, EntryNotFound) and kind is m.Lookup:
        return (records.entry_key(request.parent, request.name),)
    if isinstance(answer, m.Touched):
        name = records.entry_key(request.parent, request.name)
        if kind is m.Rename:
            return name, records.entry_key(request.new_parent, request.new_name)
        return (name,)
    if isinstance(answer, m.DirectoryPage) and request.is_kept(answer):
        inodes = tuple([records.inode_key(attr.inode) for _, attr in answer.entries])
        # From the first page on: who still has it at the last one knows the whole directory.
        return inodes if request.after else (records.entry_key(request.inode, b""), *inodes)
    return ()


def _of_attributes(
    request: Any, kind: type, attr: Attr, namespace_of: Callable[[int], int | None]
) -> tuple[bytes, ...]:
    if kind is m.Resolve:
        return ()
    if attr.is_block:
        namespace = namespace_of(attr.inode)
        if namespace is None:  # an unlinked block
            return ()
        return records.block_key(attr.inode), records.inode_key(namespace)
    key = records.inode_key(attr.inode)
    if kind not in _OF_ONE_NAME:
        return (key,)
    name = records.entry_key(request.parent, request.name)
    if kind is m.Make and attr.is_dir:
        # It is empty: whoever made it knows all that is in it.
        return name, key, records.entry_key(attr.inode, b"")
    return name, key
