"""The POSIX namespace: inodes, entries, links, and the directories of blocks.

Synchronous code on a transaction; nothing here waits. Every change of a directory also sets its
mtime and ctime. A directory has 2 + (number of subdirectories) links, as ext4 counts them.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from functools import partial

from kvfs_base.errors import (
    CrossesQuota,
    DirectoryNotEmpty,
    EntryExists,
    EntryNotFound,
    InodeStale,
    InvalidRequest,
    IsADirectory,
    LayoutMismatch,
    NotADirectory,
    NotPermitted,
    ServerBusy,
    TooManyLinks,
)
from kvfs_base.limits import FILE_CHUNK_BYTES
from kvfs_base.types import KV_DIRECTORY, ROOT_INODE, Attr, KVLayout, Layout
from kvfs_metadata import records
from kvfs_metadata.block_index import KVNamespace
from kvfs_metadata.block_table import Block
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.copies import Copies
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.inodes import (
    KV_INODE,
    charged_bytes,
    check_name,
    child,
    chunks_to_remove,
    has_entries,
    load,
    load_directory,
    load_named,
    put_entry,
    save,
    touch,
)
from kvfs_metadata.limits import (
    FILE_WIDE_CHUNK_BYTES,
    LINKS_MAX,
    NAMESPACE_DEPTH_MAX,
    NAMESPACES_MAX,
)
from kvfs_metadata.messages import (
    DirectoryPage,
    GetAttr,
    Link,
    Lookup,
    Make,
    NamespaceInfo,
    OpenNamespace,
    ReadDir,
    ReadLink,
    Resolve,
    Rmdir,
    SetAttr,
    Touched,
    Unlink,
)
from kvfs_metadata.quotas import quota_bytes
from kvfs_metadata.records import InodeRecord, NamespaceRecord
from kvfs_metadata.transaction import Counters, Tx, change_usage

BLOCK_NAME = re.compile(rb"[0-9a-f]{64}")
BLOCK_MODE = stat.S_IFREG | 0o444
DIRECTORY_MODE = stat.S_IFDIR | 0o755
XATTRS_PAGE = 256
"""Attributes of an inode that are read at a time when it goes."""
SPECIAL_TYPES = (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


class FileTree:
    """``may_be_open`` says whether an unlinked file has to keep its data for somebody."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        cluster: ClusterState,
        copies: Copies,
        counters: Counters,
        may_be_open: Callable[[int], bool],
    ) -> None:
        self._blocks = blocks
        self._index = blocks.index
        self._cluster = cluster
        self._copies = copies
        self._quotas = blocks.quotas
        self._counters = counters
        self._may_be_open = may_be_open

    def create_roots(self, tx: Tx) -> None:
        """``/`` and ``/kv``, if this store is new."""
        if tx.kv.get(records.inode_key(ROOT_INODE)) is not None:
            return
        root = _directory(ROOT_INODE, ROOT_INODE, tx.now_ns)
        root.nlink = 3
        save(tx, root)
        save(tx, _directory(KV_INODE, ROOT_INODE, tx.now_ns))
        put_entry(tx, ROOT_INODE, KV_DIRECTORY, KV_INODE)
        change_usage(tx, inodes=2, file_bytes=0)

    # --- reading

    def lookup(self, kv: KVRead, request: Lookup) -> Attr:
        check_name(request.name)
        return self._child_attr(kv, request.parent, request.name)

    def resolve(self, kv: KVRead, request: Resolve) -> Attr:
        inode = ROOT_INODE
        attr: Attr | None = None
        for name in filter(None, request.path.split(b"/")):
            check_name(name)
            attr = self._child_attr(kv, inode, name)
            inode = attr.inode
        return self.attr(load(kv, inode)) if attr is None else attr

    def _child_attr(self, kv: KVRead, parent: int, name: bytes) -> Attr:
        namespace = self._index.namespaces.get(parent)
        if namespace is not None:
            return block_attr(load(kv, parent), _block_named(namespace, name))
        record = load_named(kv, records.entry_key(parent, name))
        if record is None:
            if parent in self._index.by_inode:
                raise NotADirectory(name)
            load_directory(kv, parent)  # what is wrong may be the parent
            raise EntryNotFound(name)
        return self.attr(record)

    def get_attr(self, kv: KVRead, request: GetAttr) -> Attr:
        return self.attr_of(kv, request.inode)

    def attr_of(self, kv: KVRead, inode: int) -> Attr:
        """Attributes of an inode or a block. Raises InodeStale."""
        block = self._index.by_inode.get(inode)
        if block is not None:
            return block_attr(load(kv, block.namespace), block)
        return self.attr(load(kv, inode))

    def attr(self, record: InodeRecord) -> Attr:
        attr = record.attr()
        namespace = self._index.namespaces.get(record.inode)
        if namespace is not None:
            attr.mtime_ns = max(attr.mtime_ns, namespace.changed_ns)
        return attr

    def read_link(self, kv: KVRead, request: ReadLink) -> bytes:
        self._refuse_block(request.inode)
        record = load(kv, request.inode)
        if not stat.S_ISLNK(record.mode):
            raise InvalidRequest(detail="not a symbolic link")
        return record.target

    def read_directory(self, kv: KVRead, request: ReadDir) -> DirectoryPage:
        if request.inode in self._index.by_inode:
            raise NotADirectory()
        record = load_directory(kv, request.inode)
        if record.is_namespace:
            return self._read_namespace(record, request)
        start = records.entry_key(request.inode, request.after + b"\x00" if request.after else b"")
        end = records.entry_key(request.inode + 1, b"")
        items = kv.range(start, end, request.limit + 1)
        page = items[: request.limit]
        inodes = kv.get_many([records.INODE + value for _, value in page])
        entries = tuple(
            (key[12:], self.attr(records.decode_inode(value)))
            for (key, _), value in zip(page, inodes, strict=True)
            if value is not None
        )
        return DirectoryPage(entries, more=len(items) > request.limit)

    def _read_namespace(self, record: InodeRecord, request: ReadDir) -> DirectoryPage:
        after = request.after
        if after and not BLOCK_NAME.fullmatch(after):
            raise InvalidRequest(detail="a listing of blocks goes on after the name of a block")
        listing = self._index.namespaces[request.inode].listing
        blocks = listing.page(bytes.fromhex(after.decode()), request.limit + 1)
        entries = tuple(
            (block.key.hex().encode(), block_attr(record, block))
            for block in blocks[: request.limit]
        )
        return DirectoryPage(entries, more=len(blocks) > request.limit)

    # --- attributes

    def set_attr(self, tx: Tx, request: SetAttr) -> Attr:
        self._refuse_block(request.inode)
        record = load(tx.kv, request.inode)
        charged, counted = charged_bytes(record), quota_bytes(record)
        _set_ownership(record, request)
        if request.size is not None or request.grow_to is not None or request.sparse:
            _set_size(record, request, tx.now_ns)
        if request.atime_ns is not None:
            record.atime_ns = request.atime_ns
        if request.mtime_ns is not None:
            record.mtime_ns = request.mtime_ns
        record.ctime_ns = tx.now_ns
        save(tx, record)
        if charged_bytes(record) != charged:
            change_usage(tx, inodes=0, file_bytes=charged_bytes(record) - charged)
        if quota_bytes(record) != counted:
            grown = quota_bytes(record) - counted
            self._quotas.charge(tx, record.quota, inodes=0, file_bytes=grown)
        return self.attr(record)

    def widen(self, tx: Tx, inode: int) -> Attr:
        """All that the file has is in its first chunk, and more of it will be. Raises
        InvalidRequest."""
        record = load(tx.kv, inode)
        layout = record.layout
        if layout is None or layout.chunk_bytes == FILE_WIDE_CHUNK_BYTES:
            return self.attr(record)
        if layout.chunk_bytes != FILE_CHUNK_BYTES:
            raise InvalidRequest(detail=f"the chunks of inode {inode} have several copies")
        if record.size_max > FILE_CHUNK_BYTES:
            raise InvalidRequest(detail=f"inode {inode} has had more than one chunk")
        record.layout = Layout(FILE_WIDE_CHUNK_BYTES, layout.chains)
        save(tx, record)
        return self.attr(record)

    # --- making

    def make(self, tx: Tx, request: Make) -> Attr:
        check_name(request.name)
        parent = self.load_parent(tx.kv, request.parent)
        entry = records.entry_key(request.parent, request.name)
        existing = load_named(tx.kv, entry)
        if existing is not None:
            if request.exclusive or not (stat.S_ISREG(request.mode) and existing.is_file):
                raise EntryExists(request.name)
            return self.attr(existing)
        record = self._new_inode(tx, parent, request)
        save(tx, record)
        tx.kv.put(entry, records.u64(record.inode))
        if record.is_dir:
            _add_link(parent)
        touch(parent, tx.now_ns)
        save(tx, parent)
        change_usage(tx, inodes=1, file_bytes=0)
        self._quotas.charge(tx, record.quota, inodes=1, file_bytes=0)
        return self.attr(record)

    def _new_inode(self, tx: Tx, parent: InodeRecord, request: Make) -> InodeRecord:
        kind = stat.S_IFMT(request.mode)
        record = InodeRecord(
            inode=0,
            mode=kind | stat.S_IMODE(request.mode),
            uid=request.uid,
            gid=request.gid,
            atime_ns=tx.now_ns,
            mtime_ns=tx.now_ns,
            ctime_ns=tx.now_ns,
            quota=parent.quota,
            born_ns=tx.now_ns,
        )
        if parent.mode & stat.S_ISGID:  # members of a group share the directory
            record.gid = parent.gid
            record.mode |= stat.S_ISGID if kind == stat.S_IFDIR else 0
        if kind == stat.S_IFREG:
            record.inode = self._counters.inode.take(tx)
            record.layout = self._copies.layout(tx, parent, record.inode)
            return record
        if kind == stat.S_IFDIR:
            record.nlink = 2
            record.parent = parent.inode
            record.copies = parent.copies
        elif kind == stat.S_IFLNK:
            if not request.target or b"\x00" in request.target:
                raise InvalidRequest(detail="a symbolic link needs a target")
            record.target = request.target
            record.size = len(request.target)
        elif kind in SPECIAL_TYPES:
            record.rdev = request.rdev
        else:
            raise InvalidRequest(detail=f"not a kind of file: mode {request.mode:o}")
        record.inode = self._counters.inode.take(tx)
        return record

    def link(self, tx: Tx, request: Link) -> Attr:
        check_name(request.name)
        self._refuse_block(request.inode)
        parent = self.load_parent(tx.kv, request.parent)
        record = load(tx.kv, request.inode)
        if child(tx.kv, parent.inode, request.name) is not None:
            raise EntryExists(request.name)
        if record.is_dir:
            raise NotPermitted(reason="directories have one name")
        if record.nlink == 0:  # unlinked while open: its name is gone for good
            raise EntryNotFound(request.name)
        check_quota(record, parent)
        _add_link(record)
        record.ctime_ns = tx.now_ns
        save(tx, record)
        put_entry(tx, parent.inode, request.name, record.inode)
        touch(parent, tx.now_ns)
        save(tx, parent)
        return self.attr(record)

    # --- unmaking

    def unlink(self, tx: Tx, request: Unlink) -> Attr:
        check_name(request.name)
        namespace = self._index.namespaces.get(request.parent)
        if namespace is not None:
            return self._unlink_block(tx, namespace, request.name)
        parent = self.load_parent(tx.kv, request.parent)
        entry = records.entry_key(request.parent, request.name)
        record = load_named(tx.kv, entry)
        if record is None:
            raise EntryNotFound(request.name)
        if record.is_dir:
            raise IsADirectory(request.name)
        tx.kv.delete(entry)
        touch(parent, tx.now_ns)
        save(tx, parent)
        self.drop_link(tx, record)
        return self.attr(record)

    def _unlink_block(self, tx: Tx, namespace: KVNamespace, name: bytes) -> Attr:
        block = _block_named(namespace, name)
        attr = block_attr(load(tx.kv, namespace.inode), block)
        attr.nlink = 0
        attr.ctime_ns = tx.now_ns
        self._blocks.remove_block(tx, block)
        return attr

    def drop_link(self, tx: Tx, record: InodeRecord) -> None:
        """One name less for a file; with the last one it goes, or waits until nobody has it open.
        ``record`` shows the new link count."""
        record.nlink -= 1
        record.ctime_ns = tx.now_ns
        if record.nlink > 0:
            save(tx, record)
        elif self._may_be_open(record.inode):
            save(tx, record)
            tx.kv.put(records.orphan_key(record.inode), b"")
        else:
            self._delete(tx, record)

    def collect(self, tx: Tx, inode: int) -> bool:
        """Deletes an unlinked file that nobody has open any more. Whether there was one."""
        if tx.kv.get(records.orphan_key(inode)) is None or self._may_be_open(inode):
            return False
        self._delete(tx, load(tx.kv, inode))
        return True

    def _delete(self, tx: Tx, record: InodeRecord) -> None:
        """The inode with all that hangs on it, its chunks too."""
        tx.kv.delete(records.inode_key(record.inode))
        tx.kv.delete(records.orphan_key(record.inode))
        tx.kv.delete(records.lock_key(record.inode))
        xattrs = records.xattr_key(record.inode, b""), records.xattr_key(record.inode + 1, b"")
        while found := tx.kv.range(*xattrs, XATTRS_PAGE):
            for key, _ in found:
                tx.kv.delete(key)
        charged = charged_bytes(record)
        change_usage(tx, inodes=-1, file_bytes=-charged)
        self._quotas.deleted(tx, record)
        chains, end = chunks_to_remove(record)
        share = charged // max(1, len(chains))
        self._cluster.remove_chunks(tx, chains, record.inode, end, share)
        self._cluster.stop_move(tx, chains, record.inode, end)

    def rmdir(self, tx: Tx, request: Rmdir) -> Touched:
        check_name(request.name)
        if request.parent in self._index.namespaces:
            _block_named(self._index.namespaces[request.parent], request.name)
            raise NotADirectory(request.name)
        parent = self.load_parent(tx.kv, request.parent)
        entry = records.entry_key(request.parent, request.name)
        record = load_named(tx.kv, entry)
        if record is None:
            raise EntryNotFound(request.name)
        if not record.is_dir:
            raise NotADirectory(request.name)
        if record.inode == KV_INODE:
            raise NotPermitted(reason="/kv stays")
        tx.kv.delete(entry)
        parent.nlink -= 1
        touch(parent, tx.now_ns)
        save(tx, parent)
        self.delete_directory(tx, record, request.name)
        return Touched((record.inode,), tx.now_ns)

    def delete_directory(self, tx: Tx, record: InodeRecord, name: bytes) -> None:
        """An empty directory that has no entry any more. Raises DirectoryNotEmpty."""
        namespace = self._index.namespaces.get(record.inode)
        if has_entries(tx.kv, record.inode) or (namespace is not None and namespace.blocks):
            raise DirectoryNotEmpty(name)
        self._delete(tx, record)
        if namespace is not None:
            tx.kv.delete(records.namespace_key(record.inode))
            self._index.remove_namespace(namespace)
            tx.undo.append(partial(self._index.add_namespace, namespace))

    # --- namespaces of blocks

    def find_namespace(self, request: OpenNamespace) -> NamespaceInfo | None:
        """The namespace at a path. Raises LayoutMismatch, and EntryNotFound without ``create``."""
        names = [name for name in request.path.split("/") if name]
        namespace = self._index.by_path.get("/".join(names))
        if namespace is None:
            if not request.create:
                raise EntryNotFound(request.path)
            return None
        _require_layout(namespace.layout, request.layout)
        return NamespaceInfo(namespace.inode, namespace.layout)

    def open_namespace(self, tx: Tx, request: OpenNamespace) -> NamespaceInfo:
        found = self.find_namespace(request)
        if found is not None:
            return found
        if request.layout is None:
            raise InvalidRequest(detail="a new namespace needs a layout")
        if request.layout.block_tokens <= 0 or request.layout.block_bytes < 0:
            raise InvalidRequest(detail="a layout has block_tokens > 0 and block_bytes >= 0")
        if len(self._index.namespaces) >= NAMESPACES_MAX:
            raise ServerBusy(detail=f"{NAMESPACES_MAX} namespaces")
        names = [name.encode() for name in request.path.split("/") if name]
        if not 1 <= len(names) <= NAMESPACE_DEPTH_MAX:
            raise InvalidRequest(detail=f"a namespace's path has 1 to {NAMESPACE_DEPTH_MAX} names")
        inode = KV_INODE
        for name in names[:-1]:
            inode = self._enter_directory(tx, inode, name)
        attr = self.make(tx, Make(inode, names[-1], DIRECTORY_MODE))
        record = load(tx.kv, attr.inode)
        record.is_namespace = True
        if request.copies:
            self._copies.set(record, request.copies)
        save(tx, record)
        path = b"/".join(names).decode()
        value = NamespaceRecord(path, request.layout)
        tx.kv.put(records.namespace_key(attr.inode), records.encode(value))
        namespace = KVNamespace(self._index.table, attr.inode, path, request.layout, record.quota)
        self._index.add_namespace(namespace)
        tx.undo.append(partial(self._index.remove_namespace, namespace))
        return NamespaceInfo(attr.inode, request.layout)

    def _enter_directory(self, tx: Tx, parent: int, name: bytes) -> int:
        """The plain directory ``name``, made if missing."""
        check_name(name)
        inode = child(tx.kv, parent, name)
        if inode is None:
            return self.make(tx, Make(parent, name, DIRECTORY_MODE)).inode
        record = load_directory(tx.kv, inode)
        if record.is_namespace:
            raise NotADirectory(name)
        return inode

    # --- checks

    def load_parent(self, kv: KVRead, inode: int) -> InodeRecord:
        """A directory whose entries may change. Raises NotPermitted for a namespace."""
        try:
            record = load_directory(kv, inode)
        except InodeStale:
            if inode in self._index.by_inode:
                raise NotADirectory() from None
            raise
        if record.is_namespace:
            raise NotPermitted(reason="a namespace holds blocks only")
        return record

    def _refuse_block(self, inode: int) -> None:
        if inode in self._index.by_inode:
            raise NotPermitted(reason="a block is read-only")


def block_attr(namespace: InodeRecord, block: Block) -> Attr:
    """A block as a file that belongs to whom its namespace does."""
    return Attr(
        inode=block.inode,
        mode=BLOCK_MODE,
        uid=namespace.uid,
        gid=namespace.gid,
        size=block.size,
        atime_ns=block.last_use_ns,
        mtime_ns=block.created_ns,
        ctime_ns=block.created_ns,
        born_ns=block.created_ns,
        layout=Layout(block.size, (block.chain,)),
        key=block.key,
        crc32c=block.crc32c,
    )


def check_quota(record: InodeRecord, into: InodeRecord) -> None:
    """Whether it may get a name in a directory. One that has a quota of its own may lie anywhere.
    Raises CrossesQuota."""
    if record.quota not in (into.quota, record.inode):
        raise CrossesQuota(quota=record.quota)


def _block_named(namespace: KVNamespace, name: bytes) -> Block:
    """Raises EntryNotFound."""
    if BLOCK_NAME.fullmatch(name):
        block = namespace.blocks.get(bytes.fromhex(name.decode()))
        if block is not None:
            return block
    raise EntryNotFound(name)


def _directory(inode: int, parent: int, now_ns: int) -> InodeRecord:
    return InodeRecord(
        inode=inode,
        mode=DIRECTORY_MODE,
        nlink=2,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        parent=parent,
        born_ns=now_ns,
    )


def _add_link(record: InodeRecord) -> None:
    if record.nlink >= LINKS_MAX:
        raise TooManyLinks(record.inode)
    record.nlink += 1


def _set_ownership(record: InodeRecord, request: SetAttr) -> None:
    if request.mode is not None:
        record.mode = stat.S_IFMT(record.mode) | stat.S_IMODE(request.mode)
    if request.uid is not None:
        record.uid = request.uid
    if request.gid is not None:
        record.gid = request.gid


def _set_size(record: InodeRecord, request: SetAttr, now_ns: int) -> None:
    if record.is_dir:
        raise IsADirectory()
    if not record.is_file:
        raise InvalidRequest(detail="only files have a size to set")
    if request.size is not None and request.size != record.size:
        record.size = request.size
        record.mtime_ns = now_ns
    if request.grow_to is not None and request.grow_to > record.size:
        record.size = request.grow_to
        record.mtime_ns = now_ns
    record.size_max = max(record.size_max, record.size)
    record.sparse = record.sparse or request.sparse


def _require_layout(stored: KVLayout, wanted: KVLayout | None) -> None:
    if wanted is None or wanted == stored:
        return
    fields = [
        f"{name} {getattr(stored, name)!r} != {getattr(wanted, name)!r}"
        for name in KVLayout.__struct_fields__
        if getattr(stored, name) != getattr(wanted, name)
    ]
    raise LayoutMismatch(detail="; ".join(fields))
