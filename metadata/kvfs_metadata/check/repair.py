"""Repairs, each of which looks again before it does anything.

A check reads page by page while others write, so what it found may be true no longer, or never have
been. Here, in one transaction, it is decided. A dry run carries a repair out and takes it back:
what is confirmed and what is repaired are decided by the same lines.

Chunks that belong to nothing. A chunk is removed only if its inode number was given out before this
transaction and nothing refers to it now: no block, no inode, no prepared batch. That is final: a
number is recorded as prepared, or as an inode, in the transaction that gives it out, references
only ever become fewer, and no number is given twice. "Was given out" is asked of the counter
itself, by taking a number from it: what is smaller was given, or never will be. A larger number can
only come from a store that went back in time (the machine died, and the last checkpoint is what is
left): then the counter is moved beyond it first, so that the removal, which a chunk server may
carry out much later, can never meet a block that got this number in between.

Repairs that change numbers of links, or flags, or drop an entry that no check counts, leave ctime
alone: other fixes of the same run rely on it. Those that give names set it, as everybody does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgspec

from kvfs_base.errors import (
    Conflict,
    DirectoryNotEmpty,
    EntryExists,
    InodeStale,
    KvfsError,
    LimitExceeded,
    NotADirectory,
)
from kvfs_base.types import KV_DIRECTORY, ROOT_INODE
from kvfs_metadata import records
from kvfs_metadata.block_index import BlockIndex
from kvfs_metadata.check import fixes as f
from kvfs_metadata.check.findings import DROPPABLE, record_problem
from kvfs_metadata.check.fsck import Batches, is_file, leads_nowhere
from kvfs_metadata.check.quota_usage import set_quota_usage
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.engines.engine import KVRead, scan
from kvfs_metadata.inodes import (
    KV_INODE,
    charged_bytes,
    child,
    chunks_to_remove,
    load,
    load_directory,
    put_entry,
    save,
    touch,
)
from kvfs_metadata.limits import SCAN_BYTES
from kvfs_metadata.namespace import FileTree
from kvfs_metadata.records import BlockValue, InodeRecord, RemovalValue
from kvfs_metadata.sessions import Sessions
from kvfs_metadata.transaction import Counters, Tx, change_usage

log = logging.getLogger(__name__)

LOST_AND_FOUND = b"lost+found"
DIRECTORY_MODE = 0o040755
LOST_MODE = 0o040700
SKIPPED_NUMBERS_MAX = 1 << 40
"""How far the counter may be moved over numbers from a lost future: 2^23 such moves are left."""

SCAN_STEP = 32


def scan_records(kv: KVRead, request: f.ScanRecords) -> f.RecordPage:
    """A page ends at ``limit`` records, or with the step that passes SCAN_BYTES."""
    items: list[tuple[bytes, bytes]] = []
    start, size = request.start, 0
    while len(items) < request.limit and size < SCAN_BYTES:
        step = kv.range(start, request.end, min(SCAN_STEP, request.limit - len(items)))
        if not step:
            return f.RecordPage(tuple(items), more=False)
        items += step
        size += sum(len(key) + len(value) for key, value in step)
        start = step[-1][0] + b"\x00"
    return f.RecordPage(tuple(items), more=bool(kv.range(start, request.end, 1)))


class Memory(Protocol):
    """What a service holds in memory beside the store, and has to change with it."""

    def may_be_open(self, inode: int) -> bool: ...

    def block_dropped(self, tx: Tx, inode: int, other: int) -> None:
        """``other`` is a block of the same key that stays, or 0."""

    def namespace_dropped(self, tx: Tx, inode: int) -> None:
        """Raises DirectoryNotEmpty."""

    def unlinked(self, tx: Tx, inode: int) -> None:
        """An inode was noted for deletion."""


class NoMemory:
    """No service runs: nobody has anything open."""

    def may_be_open(self, inode: int) -> bool:
        return False

    def block_dropped(self, tx: Tx, inode: int, other: int) -> None:
        pass

    def namespace_dropped(self, tx: Tx, inode: int) -> None:
        pass

    def unlinked(self, tx: Tx, inode: int) -> None:
        pass


class ServiceMemory:
    """Of a service that runs."""

    def __init__(self, index: BlockIndex, tree: FileTree, sessions: Sessions) -> None:
        self._index = index
        self._tree = tree
        self._sessions = sessions

    def may_be_open(self, inode: int) -> bool:
        return self._sessions.may_be_open(inode)

    def block_dropped(self, tx: Tx, inode: int, other: int) -> None:
        block = self._index.by_inode.get(inode)
        if block is None:
            return
        self._index.remove(block)
        tx.undo.append(partial(self._index.insert, [block]))
        kept = self._index.by_inode.get(other)
        if kept is not None:
            # Of two blocks with one key the index finds the one that it met last.
            row = self._index.table.inodes.get(other)
            assert row is not None
            self._index.namespaces[kept.namespace].rows[kept.key] = row

    def namespace_dropped(self, tx: Tx, inode: int) -> None:
        namespace = self._index.namespaces.get(inode)
        if namespace is None:
            return
        if namespace.blocks:
            raise DirectoryNotEmpty(namespace.path)
        self._index.remove_namespace(namespace)
        tx.undo.append(partial(self._index.add_namespace, namespace))

    def unlinked(self, tx: Tx, inode: int) -> None:
        self._tree.collect(tx, inode)


class Repairer:
    """Everything that a check may ask for, on one store."""

    def __init__(self, *, counters: Counters, removals: Removals, memory: Memory) -> None:
        self._counters = counters
        self._removals = removals
        self._memory = memory
        self._actions: dict[type, Callable[[Tx, Any], bool]] = {
            f.SetLinks: self._set_links,
            f.SetParent: self._set_parent,
            f.ClearNamespace: self._clear_namespace,
            f.MakeRoot: self._make_root,
            f.MarkSparse: self._mark_sparse,
            f.CoverTail: self._cover_tail,
            f.DropBlock: self._drop_block,
            f.DropDamaged: self._drop_damaged,
            f.DropNamespace: self._drop_namespace,
            f.DropEntry: self._drop_entry,
            f.DropXattrs: self._drop_xattrs,
            f.DropOrphan: self._drop_orphan,
            f.QueueUnlinked: self._queue_unlinked,
            f.LinkLost: self._link_lost,
            f.RaiseCounter: self._raise_counter,
            f.RemoveChunks: self._remove_chunks,
            f.SetUsage: self._set_usage,
            f.SetQuotaUsage: set_quota_usage,
        }
        self._batches: Batches | None = None

    def repair(self, tx: Tx, request: f.RepairRecords) -> tuple[f.Verdict, ...]:
        """Carries out the fixes that are called for, unless the request is dry."""
        self._batches = None  # another transaction, other batches
        return tuple(self._try(tx, fix, request.dry) for fix in request.fixes)

    def _try(self, tx: Tx, fix: f.Fix, dry: bool) -> f.Verdict:
        mark = tx.mark()
        verdict = f.Verdict.BLOCKED
        try:
            wanted = self._actions[type(fix)](tx, fix)
            verdict = f.Verdict.DONE if wanted else f.Verdict.GONE
        except InodeStale:
            verdict = f.Verdict.GONE
        except (KvfsError, msgspec.MsgspecError) as exc:
            log.info("%s is blocked: %s", fix, exc)
        finally:
            if dry or verdict is not f.Verdict.DONE:
                tx.roll_back(mark)
        return verdict

    # --- inodes

    def _set_links(self, tx: Tx, fix: f.SetLinks) -> bool:
        record = load(tx.kv, fix.inode)
        if record.ctime_ns != fix.ctime_ns or record.nlink != fix.seen:
            return False
        record.nlink = fix.nlink
        save(tx, record)
        return True

    def _set_parent(self, tx: Tx, fix: f.SetParent) -> bool:
        record = load_directory(tx.kv, fix.inode)
        is_root = fix.inode == fix.parent == ROOT_INODE
        if record.parent == fix.parent or not (
            is_root or child(tx.kv, fix.parent, fix.name) == fix.inode
        ):
            return False
        record.parent = fix.parent
        save(tx, record)
        return True

    def _clear_namespace(self, tx: Tx, fix: f.ClearNamespace) -> bool:
        record = load(tx.kv, fix.inode)
        if not record.is_namespace or tx.kv.get(records.namespace_key(fix.inode)) is not None:
            return False
        record.is_namespace = False
        save(tx, record)
        return True

    def _make_root(self, tx: Tx, fix: f.MakeRoot) -> bool:
        if fix.inode not in (ROOT_INODE, KV_INODE):
            return False
        if tx.kv.get(records.inode_key(fix.inode)) is not None:
            return False
        children = (
            tx.kv.get(records.INODE + value)
            for _, value in scan(tx.kv, records.entry_key(fix.inode, b""))
        )
        subdirectories = sum(
            value is not None and records.decode_inode(value).is_dir for value in children
        )
        record = self._directory(tx, fix.inode, ROOT_INODE, DIRECTORY_MODE)
        record.nlink = 2 + subdirectories
        save(tx, record)
        change_usage(tx, inodes=1, file_bytes=0)
        if fix.inode == KV_INODE and child(tx.kv, ROOT_INODE, KV_DIRECTORY) is None:
            put_entry(tx, ROOT_INODE, KV_DIRECTORY, KV_INODE)
            root = _record(tx.kv, ROOT_INODE)
            if root is not None:  # else it counts when it is made
                root.nlink += 1
                save(tx, root)
        return True

    @staticmethod
    def _directory(tx: Tx, inode: int, parent: int, mode: int) -> InodeRecord:
        return InodeRecord(
            inode=inode,
            mode=mode,
            nlink=2,
            atime_ns=tx.now_ns,
            mtime_ns=tx.now_ns,
            ctime_ns=tx.now_ns,
            parent=parent,
        )

    def _mark_sparse(self, tx: Tx, fix: f.MarkSparse) -> bool:
        record = load(tx.kv, fix.inode)
        if record.ctime_ns != fix.ctime_ns or record.sparse:
            return False
        if fix.chains and (record.layout is None or record.layout.chains != fix.chains):
            return False
        change_usage(tx, inodes=0, file_bytes=-charged_bytes(record))
        record.sparse = True
        save(tx, record)
        return True

    def _cover_tail(self, tx: Tx, fix: f.CoverTail) -> bool:
        record = load(tx.kv, fix.inode)
        layout = record.layout
        if layout is None or chunks_to_remove(record)[1] >= fix.end:
            return False
        if self._memory.may_be_open(fix.inode):
            return False  # its writer will tell the size
        record.size_max = fix.end * layout.chunk_bytes
        save(tx, record)
        return True

    # --- names

    def _drop_entry(self, tx: Tx, fix: f.DropEntry) -> bool:
        if child(tx.kv, fix.parent, fix.name) != fix.inode:
            return False
        plain = _is_plain(tx.kv, fix.parent)
        own = _record(tx.kv, fix.inode)
        second = own is not None and own.is_dir and own.ctime_ns == fix.ctime_ns
        forbidden = leads_nowhere(fix.parent, fix.name, fix.inode)
        if own is not None and plain and not forbidden and not second:
            return False
        tx.kv.delete(records.entry_key(fix.parent, fix.name))
        return True

    def _drop_xattrs(self, tx: Tx, fix: f.DropXattrs) -> bool:
        if tx.kv.get(records.inode_key(fix.inode)) is not None:
            return False
        keys = [key for key, _ in scan(tx.kv, records.xattr_key(fix.inode, b""))]
        for key in keys:
            tx.kv.delete(key)
        return bool(keys)

    def _drop_orphan(self, tx: Tx, fix: f.DropOrphan) -> bool:
        if tx.kv.get(records.orphan_key(fix.inode)) is None:
            return False
        record = _record(tx.kv, fix.inode)
        if record is not None and record.ctime_ns != fix.ctime_ns:
            return False
        tx.kv.delete(records.orphan_key(fix.inode))
        return True

    def _queue_unlinked(self, tx: Tx, fix: f.QueueUnlinked) -> bool:
        record = load(tx.kv, fix.inode)
        if record.ctime_ns != fix.ctime_ns or record.nlink:
            return False
        if tx.kv.get(records.orphan_key(fix.inode)) is not None:
            return False
        tx.kv.put(records.orphan_key(fix.inode), b"")
        self._memory.unlinked(tx, fix.inode)
        return True

    def _link_lost(self, tx: Tx, fix: f.LinkLost) -> bool:
        record = load(tx.kv, fix.inode)
        if record.ctime_ns != fix.ctime_ns:
            return False
        if fix.name:
            if not self._detach(tx, fix):
                return False
            record = load(tx.kv, fix.inode)  # it may have lain in itself
        try:
            parent, name = self._place_for(tx, record)
        except InodeStale as exc:
            raise Conflict(detail="/ or /kv is missing") from exc
        put_entry(tx, parent.inode, name, record.inode)
        if record.is_dir:
            parent.nlink += 1
            record.parent = parent.inode
        else:
            record.nlink = 1
        touch(parent, tx.now_ns)
        save(tx, parent)
        record.ctime_ns = tx.now_ns
        save(tx, record)
        return True

    def _detach(self, tx: Tx, fix: f.LinkLost) -> bool:
        """Takes the entry from a directory that lies in itself."""
        if child(tx.kv, fix.parent, fix.name) != fix.inode:
            return False
        seen = {ROOT_INODE}
        inode, parent_inode = fix.inode, fix.parent
        while inode not in seen:
            seen.add(inode)
            entries = scan(tx.kv, records.entry_key(parent_inode, b""))
            if not any(value == records.u64(inode) for _, value in entries):
                raise Conflict(detail=f"{inode} does not lie in {parent_inode}")
            inode = parent_inode
            parent_inode = load_directory(tx.kv, inode).parent
        if inode == ROOT_INODE:
            return False
        tx.kv.delete(records.entry_key(fix.parent, fix.name))
        parent = load_directory(tx.kv, fix.parent)
        parent.nlink -= 1
        touch(parent, tx.now_ns)
        save(tx, parent)
        return True

    def _place_for(self, tx: Tx, record: InodeRecord) -> tuple[InodeRecord, bytes]:
        """Where something without a name goes. Raises EntryExists, NotADirectory, EntryNotFound."""
        if record.inode == KV_INODE:
            parent, name = load_directory(tx.kv, ROOT_INODE), KV_DIRECTORY
            self._make_way(tx, parent, name)
        elif _is_namespace(tx.kv, record.inode):
            value = tx.kv.get(records.namespace_key(record.inode))
            assert value is not None
            # Its path is what its users know it by, so it comes back there.
            names = records.decode_namespace(value).path.encode().split(b"/")
            parent = load_directory(tx.kv, KV_INODE)
            for middle in names[:-1]:
                inode = child(tx.kv, parent.inode, middle)
                if inode is not None and not _is_plain(tx.kv, inode):
                    self._make_way(tx, parent, middle)
                parent = self._enter(tx, parent, middle, DIRECTORY_MODE)
            name = names[-1]
            self._make_way(tx, parent, name)
        else:
            root = load_directory(tx.kv, ROOT_INODE)
            parent = self._enter(tx, root, LOST_AND_FOUND, LOST_MODE)
            name = b"#%d" % record.inode
        taken = child(tx.kv, parent.inode, name)
        if taken is not None and _record(tx.kv, taken) is not None:
            raise EntryExists(name)
        return parent, name

    @staticmethod
    def _make_way(tx: Tx, parent: InodeRecord, name: bytes) -> None:
        """What has the name gets another one."""
        inode = child(tx.kv, parent.inode, name)
        record = None if inode is None else _record(tx.kv, inode)
        if record is not None:
            tx.kv.delete(records.entry_key(parent.inode, name))
            put_entry(tx, parent.inode, b"%s.%d" % (name, record.inode), record.inode)
            touch(record, tx.now_ns)
            save(tx, record)

    def _enter(self, tx: Tx, parent: InodeRecord, name: bytes, mode: int) -> InodeRecord:
        """The directory ``name``, made if missing. Raises NotADirectory."""
        inode = child(tx.kv, parent.inode, name)
        if inode is not None and _record(tx.kv, inode) is not None:
            if not _is_plain(tx.kv, inode):
                raise NotADirectory(name)
            return load_directory(tx.kv, inode)
        record = self._directory(tx, self._counters.inode.take(tx), parent.inode, mode)
        save(tx, record)
        put_entry(tx, parent.inode, name, record.inode)
        parent.nlink += 1
        touch(parent, tx.now_ns)
        save(tx, parent)
        change_usage(tx, inodes=1, file_bytes=0)
        return record

    # --- blocks

    def _drop_block(self, tx: Tx, fix: f.DropBlock) -> bool:
        value = tx.kv.get(records.block_key(fix.inode))
        if value is None:
            return False
        block = records.unpack_block(value)
        chain = tx.kv.get(records.chain_key(block.chain))
        wanted = {
            # Who says so has seen the chunk; the block is the one it saw, if it has not moved.
            "chunk": fix.chain in (0, block.chain),
            "chain": chain is None,
            "namespace": not _is_namespace(tx.kv, block.namespace),
            "duplicate": _is_duplicate(tx.kv, block, fix),
        }
        if not wanted.get(fix.why, False):
            return False
        tx.kv.delete(records.block_key(fix.inode))
        if chain is not None:
            members = records.decode_chain(chain)
            number = block.chain if members.is_replicated else 0
            removal = RemovalValue(fix.inode, 0, 1, block.size, number)
            self._removals.add(tx, members.everybody, removal)
        self._memory.block_dropped(tx, fix.inode, fix.other)
        return True

    def _drop_namespace(self, tx: Tx, fix: f.DropNamespace) -> bool:
        key = records.namespace_key(fix.inode)
        if tx.kv.get(key) is None or _is_namespace(tx.kv, fix.inode):
            return False
        tx.kv.delete(key)
        self._memory.namespace_dropped(tx, fix.inode)
        return True

    def _drop_damaged(self, tx: Tx, fix: f.DropDamaged) -> bool:
        value = tx.kv.get(fix.key)
        if value is None or fix.key[:4] not in DROPPABLE:
            return False
        if record_problem(fix.key, value) is None:
            return False
        tx.kv.delete(fix.key)
        return True

    # --- numbers

    def _raise_counter(self, tx: Tx, fix: f.RaiseCounter) -> bool:
        if self._was_given(tx, fix.inode):
            return False
        self._skip_to(tx, fix.inode)
        return True

    def _was_given(self, tx: Tx, inode: int) -> bool:
        return inode < self._counters.inode.take(tx)

    def _skip_to(self, tx: Tx, inode: int) -> None:
        """No number up to ``inode`` will be given out. Raises LimitExceeded."""
        count = inode - self._counters.inode.take(tx) + 1
        if count > SKIPPED_NUMBERS_MAX:
            raise LimitExceeded(detail="inode numbers to skip", limit=SKIPPED_NUMBERS_MAX)
        if count > 0:
            self._counters.inode.take(tx, count)

    def _set_usage(self, tx: Tx, fix: f.SetUsage) -> bool:
        """Reads every inode: about 2 s a million, during which nothing else is written."""
        inodes = file_bytes = 0
        for key, value in scan(tx.kv, records.INODE):
            inodes += 1
            if record_problem(key, value) is None:
                file_bytes += charged_bytes(records.decode_inode(value))
        counted = records.pack_usage(records.Usage(inodes, file_bytes))
        if tx.kv.get(records.USAGE_KEY) == counted:
            return False
        tx.kv.put(records.USAGE_KEY, counted)
        return True

    # --- chunks

    def _remove_chunks(self, tx: Tx, fix: f.RemoveChunks) -> bool:
        if self._is_wanted(tx.kv, fix):
            return False
        if not self._was_given(tx, fix.inode):
            self._skip_to(tx, fix.inode)
        removal = RemovalValue(fix.inode, fix.first, fix.end, fix.size, fix.chain)
        self._removals.add(tx, (fix.target_id,), removal)
        return True

    def _is_wanted(self, kv: KVRead, fix: f.RemoveChunks) -> bool:
        """Whether one of the chunks belongs to something, or may."""
        if self._is_moving_there(kv, fix):
            return True
        value = kv.get(records.block_key(fix.inode))
        if value is not None:
            chain = records.unpack_block(value).chain
            return fix.first == 0 and _has_place(kv, chain, fix)
        record = _record(kv, fix.inode)
        if record is not None and is_file(record):
            return self._is_wanted_of(kv, record, fix)
        if self._batches is None:
            self._batches = Batches(kv)
        return fix.inode in self._batches

    @staticmethod
    def _is_moving_there(kv: KVRead, fix: f.RemoveChunks) -> bool:
        value = kv.get(records.move_key(fix.inode))
        return value is not None and _has_place(kv, records.unpack_move(value).to, fix)

    @staticmethod
    def _is_wanted_of(kv: KVRead, record: InodeRecord, fix: f.RemoveChunks) -> bool:
        """Where a chunk would be looked for it stays, also behind the recorded end: the file may
        grow over it before the chunk server has carried out the removal."""
        layout = record.layout
        if layout is None or not layout.chains:
            return False
        numbers = range(fix.first, min(fix.end, fix.first + len(layout.chains)))
        return any(_has_place(kv, layout.chain_of(n), fix) for n in numbers)


def _record(kv: KVRead, inode: int) -> InodeRecord | None:
    """Raises MsgspecError if it is damaged: then nothing that concerns it is repaired."""
    value = kv.get(records.inode_key(inode))
    return None if value is None else records.decode_inode(value)


def _has_place(kv: KVRead, chain: int, fix: f.RemoveChunks) -> bool:
    """Whether the target holds chunks of the chain where the fix says they are."""
    value = kv.get(records.chain_key(chain))
    if value is None:
        return False
    members = records.decode_chain(value)
    place = chain if members.is_replicated else 0
    return fix.chain == place and fix.target_id in members.everybody


def _is_namespace(kv: KVRead, inode: int) -> bool:
    record = _record(kv, inode)
    has_layout = kv.get(records.namespace_key(inode)) is not None
    return has_layout and record is not None and record.is_namespace


def _is_plain(kv: KVRead, inode: int) -> bool:
    """A directory of names, not of blocks."""
    record = _record(kv, inode)
    return record is not None and record.is_dir and not _is_namespace(kv, inode)


def _is_duplicate(kv: KVRead, block: BlockValue, fix: f.DropBlock) -> bool:
    value = kv.get(records.block_key(fix.other))
    if value is None or fix.other == fix.inode:
        return False
    other = records.unpack_block(value)
    return (other.namespace, other.key) == (block.namespace, block.key)


__all__ = ["Memory", "NoMemory", "Repairer", "ServiceMemory", "scan_records"]
