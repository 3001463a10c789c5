"""Which sessions may write to which files, and who cuts what lies behind the end of one.

docs/design/0009-tails.md has the rules. Kept in memory; what a server has to know that starts
again, or another one on the same store, is recorded: on a store of its own one record a session
that may write to anything (``WRIT``), on a shared one a letter in each ``OPEN``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

from kvfs_base.errors import TailBusy
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, scan
from kvfs_metadata.transaction import Tx


class Writers:
    """``shared`` if the store is shared with other servers."""

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._files: dict[bytes, set[int]] = {}
        """By session, the files that it may write to: never an empty set."""
        self._cuts: dict[int, bytes] = {}
        """By inode, the session that cuts what lies behind its end."""
        self.expected: set[bytes] = set()
        """Sessions that the process before this one knew, and that have not come back yet. What
        they may write to is not known."""

    # --- the store

    def load(self, read: KVRead) -> None:
        """What an earlier process recorded on a store of its own."""
        for key, value in scan(read, records.WRITER):
            session = key[len(records.WRITER) :]
            self.expected.add(session)
            self._cuts.update(dict.fromkeys(records.unpack_cuts(value), session))

    def told(self, inode: int, session: bytes, value: bytes | None) -> None:
        """Another server recorded this in ``OPEN``."""
        if value:
            self._files.setdefault(session, set()).add(inode)
        elif session in self._files:
            self._remove(session, inode)
        if value == records.OPEN_CUTS:
            self._cuts[inode] = session
        elif self._cuts.get(inode) == session:
            del self._cuts[inode]

    def clear(self) -> None:
        """Everything is loaded anew."""
        self._files.clear()
        self._cuts.clear()

    def _record(self, tx: Tx, session: bytes) -> None:
        """On a store of its own."""
        if self._shared:
            return
        cuts = [inode for inode, cutter in self._cuts.items() if cutter == session]
        if session in self._files:
            tx.kv.put(records.writer_key(session), records.pack_cuts(cuts))
        else:
            tx.kv.delete(records.writer_key(session))

    def _record_open(self, tx: Tx, session: bytes, inode: int, value: bytes) -> None:
        if self._shared:
            tx.kv.put(records.open_key(inode, session), value)

    # --- who may write

    def may_write(self, session: bytes, inode: int) -> bool:
        return inode in self._files.get(session, ())

    def others(self, session: bytes, inode: int) -> list[bytes]:
        """Sessions besides this one that may write to it. Looks at all sessions: it is asked
        seldom, and an index by inode would cost each file that is made."""
        return [
            other for other, files in self._files.items() if inode in files and other != session
        ]

    def begin(self, tx: Tx, session: bytes, inode: int) -> None:
        """The session, which has the file open, may write to it. Raises TailBusy."""
        if self._cuts and self._cuts.get(inode, session) != session:
            raise TailBusy(inode=inode)
        files = self._files.get(session)
        if files is None:
            files = self._files[session] = set()
        if inode in files:
            return
        files.add(inode)
        tx.undo.append(partial(self._remove, session, inode))
        if self._shared:
            self._record_open(tx, session, inode, records.OPEN_WRITES)
        elif len(files) == 1:
            self._record(tx, session)

    def end(self, tx: Tx, session: bytes, inode: int) -> None:
        """The session does not have it open any more."""
        if not self.may_write(session, inode):
            return
        cut = self._cuts.get(inode) == session
        if cut:
            self._end_cut(tx, session, inode)
        self._remove(session, inode)
        tx.undo.append(partial(self._add, session, inode))
        if cut or session not in self._files:
            self._record(tx, session)

    def _add(self, session: bytes, inode: int) -> None:
        self._files.setdefault(session, set()).add(inode)

    def _remove(self, session: bytes, inode: int) -> None:
        files = self._files[session]
        files.discard(inode)
        if not files:
            del self._files[session]

    def replace(self, tx: Tx, session: bytes, inodes: Iterable[int]) -> None:
        """The session says what it may write to, which is all of it."""
        before, now = self._files.get(session, set()), set(inodes)
        tx.undo.append(partial(self._swap, session, before))
        self._swap(session, now)
        has_cut = self._drop_cuts(tx, session, now)
        is_expected = session in self.expected
        if is_expected:
            self.expected.discard(session)
            tx.undo.append(partial(self.expected.add, session))
        if has_cut or is_expected or bool(before) != bool(now):
            self._record(tx, session)
        for inode in now - before:
            self._record_open(tx, session, inode, records.OPEN_WRITES)

    def gone(self, tx: Tx, session: bytes) -> None:
        """The session is over."""
        before = self._files.get(session)
        if before is not None:
            tx.undo.append(partial(self._swap, session, before))
            self._swap(session, set())
            self._drop_cuts(tx, session, ())
            self._record(tx, session)

    def forget(self, session: bytes) -> None:
        """Another server said so."""
        for inode in list(self._files.get(session, ())):
            self.told(inode, session, None)

    def expect_no_more(self, tx: Tx) -> None:
        """Those who have not come back will not."""
        for session in list(self.expected):
            self.replace(tx, session, ())

    def _swap(self, session: bytes, files: set[int]) -> None:
        if files:
            self._files[session] = files
        else:
            self._files.pop(session, None)

    # --- who cuts

    def begin_cut(self, tx: Tx, session: bytes, inode: int) -> None:
        """The session alone may write to the file."""
        if self._cuts.get(inode) == session:
            return
        self._cuts[inode] = session
        tx.undo.append(partial(self._cuts.__delitem__, inode))
        self._record(tx, session)
        self._record_open(tx, session, inode, records.OPEN_CUTS)

    def end_cut(self, tx: Tx, session: bytes, inode: int) -> None:
        if self._cuts.get(inode) == session:
            self._end_cut(tx, session, inode)
            self._record(tx, session)
            self._record_open(tx, session, inode, records.OPEN_WRITES)

    def _end_cut(self, tx: Tx, session: bytes, inode: int) -> None:
        del self._cuts[inode]
        tx.undo.append(partial(self._cuts.__setitem__, inode, session))

    def _drop_cuts(self, tx: Tx, session: bytes, files: Collection[int]) -> bool:
        """Of files that the session does not have any more; whether there were any."""
        over = [i for i, cutter in self._cuts.items() if cutter == session and i not in files]
        for inode in over:
            self._end_cut(tx, session, inode)
        return bool(over)
