"""rename(2) with its flags."""

from __future__ import annotations

from kvfs_base.errors import (
    EntryExists,
    EntryNotFound,
    InvalidRename,
    InvalidRequest,
    IsADirectory,
    NotADirectory,
    NotPermitted,
    TooManyLinks,
)
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.inodes import (
    KV_INODE,
    check_name,
    is_below,
    load_named,
    save,
    touch,
)
from kvfs_metadata.limits import LINKS_MAX
from kvfs_metadata.messages import Rename, Touched
from kvfs_metadata.namespace import FileTree, check_quota
from kvfs_metadata.records import InodeRecord
from kvfs_metadata.transaction import Tx

NOREPLACE = 1
EXCHANGE = 2


def rename(tree: FileTree, tx: Tx, request: Rename) -> Touched:
    """Raises EntryNotFound, EntryExists (NOREPLACE), IsADirectory, NotADirectory,
    DirectoryNotEmpty, InvalidRename (into its own subtree), NotPermitted, CrossesQuota."""
    check_name(request.name)
    check_name(request.new_name)
    if request.flags not in (0, NOREPLACE, EXCHANGE):
        raise InvalidRequest(detail=f"rename flags {request.flags}")
    old_parent = tree.load_parent(tx.kv, request.parent)
    new_parent = old_parent
    if request.new_parent != request.parent:
        new_parent = tree.load_parent(tx.kv, request.new_parent)
    old_entry = records.entry_key(request.parent, request.name)
    new_entry = records.entry_key(request.new_parent, request.new_name)
    source = load_named(tx.kv, old_entry)
    if source is None:
        raise EntryNotFound(request.name)
    replaced = load_named(tx.kv, new_entry)
    if replaced is not None and request.flags == NOREPLACE:
        raise EntryExists(request.new_name)
    if replaced is None and request.flags == EXCHANGE:
        raise EntryNotFound(request.new_name)
    if replaced is not None and replaced.inode == source.inode:
        return Touched()  # two names of one file: POSIX wants nothing to happen
    _check_move(tx.kv, source, new_parent, request.name)
    check_quota(source, new_parent)
    if request.flags == EXCHANGE and replaced is not None:
        _check_move(tx.kv, replaced, old_parent, request.new_name)
        check_quota(replaced, old_parent)
        tx.kv.put(old_entry, records.u64(replaced.inode))
        _moved(tx, replaced, new_parent, old_parent)
    else:
        # First: a directory that still has the source in it is not empty.
        if replaced is not None:
            _replace(tree, tx, source, replaced, parent=new_parent, name=request.new_name)
        tx.kv.delete(old_entry)
    tx.kv.put(new_entry, records.u64(source.inode))
    _moved(tx, source, old_parent, new_parent)
    for parent in (old_parent,) if old_parent is new_parent else (old_parent, new_parent):
        touch(parent, tx.now_ns)
        save(tx, parent)
    moved = (source, replaced) if replaced is not None else (source,)
    return Touched(tuple(record.inode for record in moved), tx.now_ns)


def _check_move(kv: KVRead, record: InodeRecord, into: InodeRecord, name: bytes) -> None:
    if not record.is_dir:
        return
    # Directories below /kv are parts of namespaces' names.
    if record.inode == KV_INODE or is_below(kv, record.inode, KV_INODE):
        raise NotPermitted(reason="directories of namespaces do not move")
    if is_below(kv, into.inode, record.inode):
        raise InvalidRename(name)


def _replace(
    tree: FileTree,
    tx: Tx,
    source: InodeRecord,
    replaced: InodeRecord,
    *,
    parent: InodeRecord,
    name: bytes,
) -> None:
    if not replaced.is_dir:
        if source.is_dir:
            raise NotADirectory(name)
        tree.drop_link(tx, replaced)
        return
    if not source.is_dir:
        raise IsADirectory(name)
    if replaced.inode == KV_INODE or replaced.is_namespace:
        raise NotPermitted(reason="a namespace is not replaced")
    tree.delete_directory(tx, replaced, name)
    parent.nlink -= 1


def _moved(tx: Tx, record: InodeRecord, old: InodeRecord, new: InodeRecord) -> None:
    record.ctime_ns = tx.now_ns
    if record.is_dir:
        record.parent = new.inode
        old.nlink -= 1
        new.nlink += 1
        if new.nlink > LINKS_MAX:
            raise TooManyLinks(new.inode)
    save(tx, record)
