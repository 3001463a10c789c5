"""Whether the records of a metadata store fit together."""

from __future__ import annotations

import importlib
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import lmdb

from kvfs_base.os_env import os_env
from kvfs_base.types import ROOT_INODE
from kvfs_metadata import records
from kvfs_metadata.check.fsck import MetadataCheck
from kvfs_metadata.engines.memory_engine import MemoryStore
from kvfs_metadata.inodes import charged_bytes
from kvfs_metadata.records import InodeRecord

Dump = dict[bytes, bytes]


def assert_consistent(location: str) -> None:
    """``location`` is the directory of an LMDB store that no service uses, or a database's URL."""
    stored = dump(location)
    found = problems(stored) + fsck_findings(stored)
    assert found == [], "\n".join(found)


def fsck_findings(stored: Dump) -> list[str]:
    """What `kvfs fsck` finds wrong in the records; it was written without the checks below."""
    state = MemoryStore().state
    state.apply(dict(stored))
    return [f"fsck: {finding}" for finding in MetadataCheck(state).run()]


def dump(location: str) -> Dump:
    if "://" not in location:
        with _environment(location) as environment, environment.begin() as txn:
            return dict(txn.cursor())
    engine = importlib.import_module("kvfs_metadata.engines.postgres_engine").PostgresEngine
    opened = engine(os_env(), location)
    try:
        return dict(opened.view(lambda read: read.range(b"", b"\xff", 1 << 30)))
    finally:
        opened.close()


@contextmanager
def _environment(directory: str) -> Iterator[lmdb.Environment]:
    environment = lmdb.open(directory, readonly=True, lock=False)
    try:
        yield environment
    finally:
        environment.close()


def problems(records_of: Dump) -> list[str]:
    """One line each."""
    return [*_files(records_of), *_blocks(records_of), *_queues(records_of), *_counters(records_of)]


def _of(found: Dump, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    return ((key[4:], value) for key, value in found.items() if key.startswith(prefix))


def _number(text: bytes) -> int:
    return int.from_bytes(text[:8], "big")


def _inodes(found: Dump) -> dict[int, InodeRecord]:
    return {_number(k): records.decode_inode(v) for k, v in _of(found, records.INODE)}


def _files(found: Dump) -> Iterator[str]:
    inodes = _inodes(found)
    names: Counter[int] = Counter()
    subdirectories: Counter[int] = Counter()
    for rest, value in _of(found, records.ENTRY):
        parent, inode = _number(rest), _number(value)
        names[inode] += 1
        if inode not in inodes:
            yield f"entry {rest[8:]!r} of {parent} names {inode}, which is missing"
        elif stat.S_ISDIR(inodes[inode].mode):
            subdirectories[parent] += 1
            if inodes[inode].parent != parent:
                yield f"directory {inode} lies in {parent} and thinks {inodes[inode].parent}"
        if parent not in inodes or not stat.S_ISDIR(inodes[parent].mode):
            yield f"entry {rest[8:]!r} lies in {parent}, which is no directory"
    orphans = {_number(rest) for rest, _ in _of(found, records.ORPHAN)}
    for inode, record in inodes.items():
        directory = stat.S_ISDIR(record.mode)
        expected = 2 + subdirectories[inode] if directory else names[inode]
        if record.inode != inode or record.nlink != expected:
            yield f"inode {inode} has {record.nlink} links, expected {expected}"
        if directory and names[inode] != (inode != ROOT_INODE):
            yield f"directory {inode} has {names[inode]} names"
        if (inode in orphans) != (record.nlink == 0):
            yield f"inode {inode} with {record.nlink} links, orphan: {inode in orphans}"
    for missing in orphans - inodes.keys():
        yield f"orphan {missing} is missing"
    for rest, _ in _of(found, records.XATTR):
        if _number(rest) not in inodes:
            yield f"attribute {rest[8:]!r} of {_number(rest)}, which is missing"
    usage = records.unpack_usage(found.get(records.USAGE_KEY))
    counted = (len(inodes), sum(map(charged_bytes, inodes.values())))
    if tuple(usage) != counted:
        yield f"usage is {tuple(usage)}, counted {counted}"
    for rest, value in _of(found, records.QUOTA):
        quota, directory = records.decode_quota(value), _number(rest)
        charged = [record for record in inodes.values() if record.quota == directory]
        size = sum(record.size for record in charged if stat.S_ISREG(record.mode))
        if directory not in inodes:
            yield f"quota of {directory}, which is missing"
        elif (quota.inodes, quota.file_bytes) != (len(charged), size):
            yield f"quota of {directory} is {quota}, counted {len(charged)} and {size}"


def _blocks(found: Dump) -> Iterator[str]:
    namespaces = {_number(rest) for rest, _ in _of(found, records.NAMESPACE)}
    inodes = _inodes(found)
    for namespace in namespaces - inodes.keys():
        yield f"namespace {namespace} has no directory"
    taken: defaultdict[int, list[str]] = defaultdict(list)
    for inode in inodes:
        taken[inode].append("a file")
    keys: Counter[tuple[int, bytes]] = Counter()
    for rest, value in _of(found, records.BLOCK):
        block = records.unpack_block(value)
        taken[_number(rest)].append("a block")
        keys[block.namespace, block.key] += 1
        if block.namespace not in namespaces:
            yield f"block {_number(rest)} lies in {block.namespace}, which is no namespace"
    for (namespace, key), count in keys.items():
        if count > 1:
            yield f"{count} blocks of {namespace} have the key {key.hex()}"
    committed = {_number(rest) for rest, _ in _of(found, records.COMMITTED)}
    for rest, value in _of(found, records.PREPARED):
        batch = records.decode_prepared(value)
        if _number(rest) in committed:
            yield f"batch {_number(rest)} is committed and prepared"
        if not len(batch.keys) == 32 * len(batch.sizes) == 32 * len(batch.chains):
            yield f"batch {_number(rest)} has {len(batch.sizes)} sizes"
        for place in range(len(batch.sizes)):
            taken[batch.first_inode + place].append(f"batch {_number(rest)}")
    for rest, value in _of(found, records.REMOVAL):
        removal = records.unpack_removal(value)
        if "a block" in taken[removal.inode] or len(taken[removal.inode]) > 1:
            taken[removal.inode].append(f"removal {rest.hex()}")
    for inode, users in taken.items():
        if len(users) > 1:
            yield f"inode {inode} is {' and '.join(users)}"


def _queues(found: Dump) -> Iterator[str]:
    following = {
        rest: records.unpack_removal_state(value).next_seq
        for rest, value in _of(found, records.REMOVAL_STATE)
    }
    for rest, _ in _of(found, records.REMOVAL):
        target, seq = rest[:4], _number(rest[4:])
        if seq >= following.get(target, 0):
            yield f"removal {seq} of target {target.hex()} is not counted"


def _counters(found: Dump) -> Iterator[str]:
    ends = {rest: _number(value) for rest, value in _of(found, records.COUNTER)}
    inodes = [_number(k[4:]) for k in found if k.startswith((records.INODE, records.BLOCK))]
    for _, value in _of(found, records.PREPARED):
        batch = records.decode_prepared(value)
        inodes.append(batch.first_inode + len(batch.sizes) - 1)
    batches = [_number(k[4:]) for k in found if k.startswith((records.PREPARED, records.COMMITTED))]
    for name, used in ((b"inode", [i for i in inodes if i >= 16]), (b"batch", batches)):
        if used and max(used) >= ends.get(name, 0):
            yield f"{name.decode()} {max(used)} is in use, numbers are given from {ends.get(name)}"
