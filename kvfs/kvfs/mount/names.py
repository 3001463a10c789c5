"""Names and attributes that the metadata service has leased to this mount: what may be answered
without asking it. docs/design/0007-name-leases.md argues why no older state is ever shown.

Everything here is synchronous. ``token`` counts what was dropped; whoever asks the service takes it
before he sends, and his answer is kept only if none of its keys was dropped since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from kvfs.mount.limits import (
    MOUNT_DROPPED_MAX,
    MOUNT_NAMES_MAX,
    MOUNT_WHOLE_MAX,
)
from kvfs.mount.listings import Listing, Listings
from kvfs_base.errors import EntryNotFound, KvfsError
from kvfs_base.rpc import Request
from kvfs_base.seams import Clock
from kvfs_base.types import Attr
from kvfs_metadata import messages as m

Entry = tuple[int, bytes]
"""Parent and name."""

MISSING = 0
"""Where a name leads that does not exist."""

EXCHANGE = 2
"""Of renameat2."""


class Names:
    """A Watcher of the metadata client."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._until = 0.0
        self._attrs: dict[int, Attr] = {}
        self._entries: dict[Entry, int] = {}
        self._whole: set[int] = set()
        """Directories that were made here and of which all entries are known."""
        self._namespaces: set[int] = set()
        """Directories of blocks that are here."""
        self.listings = Listings()
        """To be asked by ``listing``."""
        self.token = 0
        self._floor = 0
        """Answers to what was asked before are not kept."""
        self._dropped: dict[int | Entry, int] = {}
        self.tell_kernel: Callable[[Sequence[int], Sequence[Entry]], None] = lambda *_: None
        """Told of inodes and entries that somebody else changed, after they were dropped."""
        self.answered_here = 0
        self._settle: dict[type, Callable[[Any, Any, int], None]] = {
            m.Lookup: self._looked_up,
            m.GetAttr: self._got,
            m.OpenInode: self._got,
            m.SetAttr: self._set,
            m.WidenChunks: self._set,
            m.Make: self._made,
            m.Link: self._linked,
            m.Unlink: self._unlinked,
            m.Rmdir: self._removed,
            m.Rename: self._renamed,
            m.SetXattr: self._changed,
            m.RemoveXattr: self._changed,
            m.CloseInode: self._closed,
            m.RemoveBlocks: self._blocks_removed,
            m.ReadDir: self._listed,
        }

    # --- what is known

    @property
    def are_leased(self) -> bool:
        """Whether anything is."""
        return self._now() < self._until

    def attr(self, inode: int) -> Attr | None:
        """None: the service has to be asked."""
        return self._attrs.get(inode) if self._now() < self._until else None

    def entry(self, parent: int, name: bytes) -> int | None:
        """The inode that a name leads to, or MISSING; None: the service has to be asked."""
        if self._now() >= self._until:
            return None
        inode = self._entries.get((parent, name))
        if inode is not None:
            return inode
        listing = self.listings.get(parent)
        if listing is not None:
            return listing.inodes.get(name, MISSING)
        return MISSING if parent in self._whole else None

    def listing(self, inode: int) -> Listing | None:
        """All names of a directory; None: the service has to be asked."""
        return self.listings.get(inode) if self.are_leased else None

    def wants_listing(self, inode: int) -> bool:
        """The next listing of the directory is to be asked for as a whole, and kept."""
        return self.are_leased and self.listings.is_small(inode)

    def keep_listing(self, inode: int, listing: Listing, token: int) -> None:
        """All pages of it were asked for with ``keeps``, the first one at ``token``, and the last
        one has just come. The service has told us of any name that changed since."""
        if self._is_fresh((inode, b""), token):
            self.listings.keep(inode, listing)

    def attrs(self, inodes: Sequence[int]) -> list[Attr] | None:
        """The same for all of them."""
        known = map(self._attrs.get, inodes) if self.are_leased else ()
        attrs = [attr for attr in known if attr is not None]
        return attrs if len(attrs) == len(inodes) else None

    def drop(self, inode: int) -> None:
        """What is known of it has proved wrong."""
        self._drop((inode,), ())

    # --- the watch

    def began(self) -> None:
        self._drop_all()

    def lost(self) -> None:
        self._until = 0.0
        self._drop_all()

    def revoked(self, revoked: m.Revoked, until: float) -> None:
        self._until = until
        if revoked.everything or not self._namespaces.isdisjoint(revoked.inodes):
            self._drop_all()  # also where blocks got another owner with their directory
        else:
            self._drop(revoked.inodes, revoked.entries)
        entries = [entry for entry in revoked.entries if entry[1]]
        if revoked.inodes or entries:
            self.tell_kernel(revoked.inodes, entries)

    # --- answers

    def answered(self, request: Request, reply: Any, token: int) -> None:
        """``reply`` came to what was asked at ``token``. Drops what a request of ours changed."""
        settle = self._settle.get(type(request))
        if settle is not None:
            settle(request, reply, token)

    def failed(self, request: Request, error: KvfsError, token: int) -> None:
        if isinstance(request, m.Lookup) and isinstance(error, EntryNotFound):
            self._keep_entry(request.parent, request.name, MISSING, token)

    def _looked_up(self, request: m.Lookup, attr: Attr, token: int) -> None:
        self._keep_entry(request.parent, request.name, attr.inode, token)
        if not attr.is_block:
            self._keep(attr, token)
        elif self._is_fresh(request.parent, token):
            self._namespaces.add(request.parent)
            self._keep(attr, token)

    def _got(self, request: Any, attr: Attr, token: int) -> None:
        if not attr.is_block:  # else its directory is not known here
            self._keep(attr, token)

    def _set(self, request: m.SetAttr | m.WidenChunks, attr: Attr, token: int) -> None:
        if request.inode in self._namespaces:  # its blocks have its owner
            self._drop_all()
        else:
            self._settle_change(token, {}, {request.inode: attr})

    def _made(self, request: m.Make, attr: Attr, token: int) -> None:
        whole = attr.is_dir and self._is_fresh((attr.inode, b""), token)
        self._linked(request, attr, token)
        if whole:
            if len(self._whole) >= MOUNT_WHOLE_MAX:
                self._whole.pop()
            self._whole.add(attr.inode)

    def _linked(self, request: m.Make | m.Link, attr: Attr, token: int) -> None:
        parent = request.parent
        directory = self._after(parent, attr.ctime_ns, links=int(attr.is_dir))
        entries = {(parent, request.name): attr.inode}
        self._settle_change(token, entries, {parent: directory, attr.inode: attr})

    def _unlinked(self, request: m.Unlink, attr: Attr, token: int) -> None:
        entry, inodes = (request.parent, request.name), (request.parent, attr.inode)
        if attr.is_block:
            self._drop(inodes, (entry,))
            return
        directory = self._after(request.parent, attr.ctime_ns)
        self._settle_change(token, {entry: MISSING}, {request.parent: directory, attr.inode: None})

    def _removed(self, request: m.Rmdir, touched: m.Touched, token: int) -> None:
        parent, (inode,) = request.parent, touched.inodes
        directory = self._after(parent, touched.at_ns, links=-1)
        entries = {(parent, request.name): MISSING}
        self._settle_change(token, entries, {parent: directory, inode: None})
        self._whole.discard(inode)
        self.listings.drop(inode)

    def _renamed(self, request: m.Rename, touched: m.Touched, token: int) -> None:
        old, new = (request.parent, request.name), (request.new_parent, request.new_name)
        parents = request.parent, request.new_parent
        if request.flags & EXCHANGE or not touched.inodes:
            self._drop((*parents, *touched.inodes), (old, new))
            return
        moved, at_ns = touched.inodes[0], touched.at_ns
        attr = self._before(moved, at_ns)
        inodes: dict[int, Attr | None] = dict.fromkeys((*parents, *touched.inodes))
        if attr is not None and not attr.is_dir:  # else link counts may have changed
            inodes |= {parent: self._after(parent, at_ns) for parent in parents}
            inodes[moved] = replace(attr, ctime_ns=at_ns)
        self._settle_change(token, {old: MISSING, new: moved}, inodes)

    def _before(self, inode: int, at_ns: int) -> Attr | None:
        """What is known of it and older than a change. An answer to a later question may have come
        first: it has the change in it, and perhaps others."""
        attr = self._attrs.get(inode)
        return attr if attr is not None and attr.ctime_ns < at_ns else None

    def _after(self, parent: int, at_ns: int, links: int = 0) -> Attr | None:
        """A directory after one of its names was changed: the kernel asks for it after each change.
        None if it is not known."""
        known = self._before(parent, at_ns)
        if known is None:
            return None
        return replace(known, mtime_ns=at_ns, ctime_ns=at_ns, nlink=known.nlink + links)

    def _settle_change(
        self, token: int, entries: dict[Entry, int], inodes: dict[int, Attr | None]
    ) -> None:
        """A change of ours had this outcome: so names lead now, and this is what inodes are, or
        None if that is not known. Other names of the directories are what they were. Where
        somebody else has changed something meanwhile, nothing is known any more."""
        self.token = now = self.token + 1
        dropped = self._dropped
        last = token if token >= self._floor else -1
        for inode, attr in inodes.items():
            if attr is not None and dropped.get(inode, 0) <= last and not attr.is_namespace:
                _add(self._attrs, inode, attr)
            else:
                self._attrs.pop(inode, None)
            dropped[inode] = now
        for entry, inode in entries.items():
            parent = entry[0]
            if dropped.get(entry, 0) <= last:
                self._set_entry(entry, inode)
            else:
                self._entries.pop(entry, None)
                self._whole.discard(parent)
            self.listings.drop(parent)
            dropped[entry] = dropped[parent, b""] = now
        self._bound_dropped()

    def _changed(self, request: Any, reply: Any, token: int) -> None:
        if request.inode in self._namespaces:  # its blocks have its owner
            self._drop_all()
        else:
            self._drop((request.inode,), ())

    def _closed(self, request: m.CloseInode, reply: Any, token: int) -> None:
        for inode in (request.inode, *request.others):
            attr = self._attrs.get(inode)
            if attr is not None and not attr.nlink:  # perhaps that was the end of it
                self._drop((inode,), ())

    def _blocks_removed(self, request: m.RemoveBlocks, reply: Any, token: int) -> None:
        self._drop(request.inodes, ())

    def _listed(self, request: m.ReadDir, page: m.DirectoryPage, token: int) -> None:
        if request.is_kept(page):
            for _, attr in page.entries:
                self._keep(attr, token)

    # --- keeping and dropping

    def _is_fresh(self, key: int | Entry, token: int) -> bool:
        return token >= self._floor and self._dropped.get(key, 0) <= token

    def _keep(self, attr: Attr, token: int) -> None:
        # The times of a directory of blocks follow every put: they are not leased.
        if not attr.is_namespace and self._is_fresh(attr.inode, token):
            _add(self._attrs, attr.inode, attr)

    def _keep_entry(self, parent: int, name: bytes, inode: int, token: int) -> None:
        if self._is_fresh((parent, name), token):
            self._set_entry((parent, name), inode)

    def _set_entry(self, entry: Entry, inode: int) -> None:
        entries = self._entries
        if len(entries) >= MOUNT_NAMES_MAX and entry not in entries:
            self._whole.discard(next(iter(entries))[0])
        _add(entries, entry, inode)

    def _drop(self, inodes: Iterable[int], entries: Iterable[Entry]) -> None:
        self.token += 1
        for inode in inodes:
            self._attrs.pop(inode, None)
            self._dropped[inode] = self.token
        for entry in entries:
            parent = entry[0]
            self._entries.pop(entry, None)
            self._whole.discard(parent)
            self.listings.drop(parent)
            self._dropped[entry] = self._dropped[parent, b""] = self.token
        self._bound_dropped()

    def _bound_dropped(self) -> None:
        if len(self._dropped) > MOUNT_DROPPED_MAX:
            self._dropped.clear()
            self._floor = self.token

    def _drop_all(self) -> None:
        self.token += 1
        self._floor = self.token
        self.listings.clear()
        for known in (self._attrs, self._entries, self._whole, self._namespaces, self._dropped):
            known.clear()

    def statistics(self) -> dict[str, int]:
        return {
            "names_known": len(self._entries),
            "attributes_known": len(self._attrs),
            "answered_here": self.answered_here,
        }


def _add(known: dict[Any, Any], key: Any, value: Any) -> None:
    """The oldest goes for a new one."""
    if key not in known and len(known) >= MOUNT_NAMES_MAX:
        del known[next(iter(known))]
    known[key] = value
