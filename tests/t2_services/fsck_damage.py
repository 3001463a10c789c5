"""Damage of every kind, each with the findings that it is to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from fsck_world import World
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.check.findings import Kind
from t2_services.metadata_rig import FILE, ROOT, key

Found = set[tuple[Kind, int]]
NOBODY = 10  # an inode number in reserve, which is never given out


def counts_changed(*found: tuple[Kind, int]) -> Found:
    """An inode that came or went behind the service's back is missing in the totals, too."""
    return {*found, (Kind.USAGE_WRONG, 0)}


# --- names


def dangling_entry(world: World) -> Found:
    world.put(records.entry_key(world.inodes["a"], b"ghost"), records.u64(NOBODY))
    return {(Kind.ENTRY_DANGLING, NOBODY)}


def deleted_inode(world: World) -> Found:
    """Its entry dangles, its attributes hang on nothing, its chunk is nobody's."""
    inode = world.inodes["a/small"]
    world.put(records.inode_key(inode), None)
    return counts_changed(
        (Kind.ENTRY_DANGLING, inode), (Kind.XATTR_STRAY, inode), (Kind.CHUNK_ORPHAN, inode)
    )


def entry_in_nothing(world: World) -> Found:
    file = world.rig.make(ROOT, b"twice", FILE).inode
    world.put(records.entry_key(ROOT, b"twice"), None)
    world.put(records.entry_key(NOBODY, b"twice"), records.u64(file))
    return {(Kind.ENTRY_MISPLACED, file), (Kind.INODE_LOST, file)}


def entry_in_a_file(world: World) -> Found:
    world.put(records.entry_key(world.inodes["a/small"], b"x"), records.u64(world.inodes["a/hole"]))
    return {(Kind.ENTRY_MISPLACED, world.inodes["a/hole"])}


def entry_in_a_namespace(world: World) -> Found:
    world.put(records.entry_key(world.inodes["t/m"], b"x"), records.u64(world.inodes["a/hole"]))
    return {(Kind.ENTRY_MISPLACED, world.inodes["a/hole"])}


def entry_of_the_root(world: World) -> Found:
    world.put(records.entry_key(world.inodes["a"], b"up"), records.u64(ROOT))
    return {(Kind.ENTRY_MISPLACED, ROOT)}


def second_entry_of_a_directory(world: World) -> Found:
    world.put(records.entry_key(world.inodes["a/c"], b"zz"), records.u64(world.inodes["a/b"]))
    return {(Kind.DIRECTORY_TWICE, world.inodes["a/b"])}


def first_entry_of_a_directory_is_the_wrong_one(world: World) -> Found:
    """The root's entries are read first; the directory says that it lies in ``a``."""
    world.put(records.entry_key(ROOT, b"b"), records.u64(world.inodes["a/b"]))
    return {(Kind.DIRECTORY_TWICE, world.inodes["a/b"])}


def circle(world: World) -> Found:
    """``a`` moves into its own subtree: a, b and d lie in each other."""
    a, d = world.inodes["a"], world.inodes["a/b/d"]
    world.put(records.entry_key(ROOT, b"a"), None)
    world.put(records.entry_key(d, b"a"), records.u64(a))
    world.change_inode(a, parent=d)
    world.change_inode(d, nlink=3)
    world.change_inode(ROOT, nlink=3)
    return {(Kind.DIRECTORY_DETACHED, a)}


def lost_file(world: World) -> Found:
    world.put(records.entry_key(ROOT, b"empty"), None)
    return {(Kind.INODE_LOST, world.inodes["empty"])}


def lost_directory(world: World) -> Found:
    """With all that is in it; ``a`` has one subdirectory less."""
    world.put(records.entry_key(world.inodes["a"], b"b"), None)
    return {(Kind.INODE_LOST, world.inodes["a/b"]), (Kind.LINKS_WRONG, world.inodes["a"])}


def lost_namespace(world: World) -> Found:
    parent = world.rig.resolve(b"kv/t").inode
    world.put(records.entry_key(parent, b"m"), None)
    return {(Kind.INODE_LOST, world.inodes["t/m"]), (Kind.LINKS_WRONG, parent)}


def lost_kv(world: World) -> Found:
    world.put(records.entry_key(ROOT, b"kv"), None)
    return {(Kind.INODE_LOST, 2), (Kind.LINKS_WRONG, ROOT)}


def forgotten_unlinked_file(world: World) -> Found:
    world.put(records.orphan_key(world.inodes["open"]), None)
    return {(Kind.INODE_UNLINKED, world.inodes["open"])}


def wrong_links_of_a_file(world: World) -> Found:
    world.change_inode(world.inodes["a/small"], nlink=1)
    return {(Kind.LINKS_WRONG, world.inodes["a/small"])}


def no_links_but_a_name(world: World) -> Found:
    world.change_inode(world.inodes["empty"], nlink=0)
    return {(Kind.LINKS_WRONG, world.inodes["empty"])}


def wrong_links_of_directories(world: World) -> Found:
    world.change_inode(ROOT, nlink=9)
    world.change_inode(world.inodes["a/c"], nlink=1)
    return {(Kind.LINKS_WRONG, ROOT), (Kind.LINKS_WRONG, world.inodes["a/c"])}


def wrong_parents(world: World) -> Found:
    world.change_inode(world.inodes["a/c"], parent=ROOT)
    world.change_inode(ROOT, parent=world.inodes["a"])
    return {(Kind.PARENT_WRONG, world.inodes["a/c"]), (Kind.PARENT_WRONG, ROOT)}


def no_root(world: World) -> Found:
    world.put(records.inode_key(ROOT), None)
    return counts_changed((Kind.ROOT_MISSING, ROOT))


def no_kv(world: World) -> Found:
    world.put(records.inode_key(2), None)
    return counts_changed((Kind.ROOT_MISSING, 2))


def nothing_of_kv(world: World) -> Found:
    world.put(records.entry_key(ROOT, b"kv"), None)
    world.change_inode(ROOT, nlink=3)
    return no_kv(world)


def stray_xattrs(world: World) -> Found:
    for name in (b"user.a", b"user.b"):
        world.put(records.xattr_key(NOBODY, name), b"value")
    return {(Kind.XATTR_STRAY, NOBODY)}


def stray_orphan(world: World) -> Found:
    world.put(records.orphan_key(NOBODY), b"")
    return {(Kind.ORPHAN_STRAY, NOBODY)}


def linked_orphan(world: World) -> Found:
    """The next start of the service would delete a file that has a name."""
    world.put(records.orphan_key(world.inodes["a/small"]), b"")
    return {(Kind.ORPHAN_LINKED, world.inodes["a/small"])}


# --- blocks and numbers


def namespace_without_directory(world: World) -> Found:
    world.change_inode(world.inodes["t/n"], is_namespace=False)
    blocks = {(Kind.BLOCK_STRAY, world.inodes[f"t/n/{name}"]) for name in range(4, 12)}
    return {(Kind.NAMESPACE_STRAY, world.inodes["t/n"]), *blocks}


def directory_without_namespace(world: World) -> Found:
    world.put(records.namespace_key(world.inodes["t/n"]), None)
    blocks = {(Kind.BLOCK_STRAY, world.inodes[f"t/n/{name}"]) for name in range(4, 12)}
    return {(Kind.NAMESPACE_UNNAMED, world.inodes["t/n"]), *blocks}


def duplicate_block(world: World) -> Found:
    first, second = world.inodes["t/m/1"], world.inodes["t/m/2"]
    block = records.unpack_block(world.get(records.block_key(second)))
    changed = block._replace(key=records.unpack_block(world.get(records.block_key(first))).key)
    world.put(records.block_key(second), records.pack_block(changed))
    world.targets.put(
        world.target_of(block.chain),
        ChunkInfo(second, 0, 0, ChunkState.SEALED, block.size, block.crc32c, changed.key),
    )
    return {(Kind.BLOCK_DUPLICATE, second)}


def block_on_no_chain(world: World) -> Found:
    inode = world.inodes["t/m/3"]
    block = records.unpack_block(world.get(records.block_key(inode)))
    world.put(records.block_key(inode), records.pack_block(block._replace(chain=77)))
    return {(Kind.CHAIN_MISSING, inode), (Kind.CHUNK_ORPHAN, inode)}


def counter_that_went_back(world: World) -> Found:
    last = max(world.inodes.values())
    world.put(records.counter_key(b"inode"), records.u64(20))
    return {(Kind.COUNTER_LOW, last)}


def wrong_totals(world: World) -> Found:
    world.put(records.USAGE_KEY, records.pack_usage(records.Usage(3, 12345)))
    return {(Kind.USAGE_WRONG, 0)}


def wrong_quotas(world: World) -> Found:
    """One that counts what is not there, and one of nothing."""
    quota = records.encode(records.QuotaRecord(10**9, 0, file_bytes=5, inodes=1))
    for inode in (world.inodes["a"], NOBODY):
        world.put(records.quota_key(inode), quota)
    return {(Kind.QUOTA_WRONG, world.inodes["a"]), (Kind.QUOTA_WRONG, NOBODY)}


def damaged_records(world: World) -> Found:
    """A batch that cannot be read: its numbers are nobody's, and its chunks none."""
    world.put(records.entry_key(world.inodes["a"], b"short"), b"xyz")
    world.put(records.orphan_key(5)[:-1], b"")
    world.put(records.prepared_key(99), b"\xc1")
    return {
        (Kind.RECORD_DAMAGED, world.inodes["a"]),
        (Kind.RECORD_DAMAGED, 0),
        (Kind.RECORD_DAMAGED, 99),
    }


# --- chunks


def held(world: World, path: str, number: int = 0) -> tuple[dict[ChunkId, Any], ChunkId]:
    """Where a chunk is."""
    chunk = ChunkId(world.inodes[path], number)
    (chunks,) = (chunks for chunks in world.targets.chunks.values() if chunk in chunks)
    return chunks, chunk


def change_chunk(world: World, path: str, **fields: Any) -> None:
    chunks, chunk = held(world, path)
    chunks[chunk] = msgspec.structs.replace(chunks[chunk], **fields)


def lost_block(world: World) -> Found:
    chunks, chunk = held(world, "t/m/0")
    del chunks[chunk]
    return {(Kind.BLOCK_LOST, chunk.inode)}


def damaged_blocks(world: World) -> Found:
    change_chunk(world, "t/m/0", length=999)
    change_chunk(world, "t/m/1", key=key(12345))
    change_chunk(world, "t/m/2", crc32c=4711)
    change_chunk(world, "t/m/3", state=ChunkState.OPEN)
    chunks, chunk = held(world, "t/m/4")
    chunks[chunk] = "no chunk attribute"
    return {(Kind.BLOCK_DAMAGED, world.inodes[f"t/m/{name}"]) for name in range(5)}


def block_on_another_target(world: World) -> Found:
    chunks, chunk = held(world, "t/m/0")
    info = chunks.pop(chunk)
    other = next(t for t, held_ in world.targets.chunks.items() if held_ is not chunks)
    world.targets.put(other, info)
    return {(Kind.BLOCK_LOST, chunk.inode), (Kind.CHUNK_MISPLACED, chunk.inode)}


def second_chunk_of_a_block(world: World) -> Found:
    chunks, chunk = held(world, "t/m/0")
    chunks[ChunkId(chunk.inode, 1)] = ChunkInfo(chunk.inode, 1, 0, ChunkState.OPEN)
    return {(Kind.CHUNK_MISPLACED, chunk.inode)}


def chunk_on_a_wrong_target(world: World) -> Found:
    chunks, chunk = held(world, "a/b/large", 1)
    other = next(t for t, held_ in world.targets.chunks.items() if held_ is not chunks)
    world.targets.put(other, chunks[chunk])
    return {(Kind.CHUNK_MISPLACED, chunk.inode)}


def orphans(world: World) -> Found:
    """Of a number that was given out and never used, of one in reserve, of one from a future that
    was lost, and of a directory."""
    future = 50_000
    given = world.rig.prepare(world.inodes["t/m"], [200])
    assert given.blocks[0] is not None
    world.rig.call(m.AbortBlocks(given.batch_id))
    world.settle()
    wanted = [given.blocks[0].inode, NOBODY, future, world.inodes["a"]]
    for inode in wanted:
        world.targets.put(2, ChunkInfo(inode, 0, 0, ChunkState.SEALED, 10, 1, key(1)))
    world.targets.chunks[3][ChunkId(NOBODY, 7)] = "no chunk attribute"
    return {(Kind.CHUNK_ORPHAN, inode) for inode in wanted}


def tail(world: World) -> Found:
    inode = world.inodes["a/small"]
    layout = world.rig.attr(inode).layout
    assert layout is not None
    target = world.target_of(layout.chain_of(1000))
    world.targets.put(target, ChunkInfo(inode, 1000, 0, ChunkState.OPEN, 1))
    return {(Kind.FILE_TAIL, inode)}


DAMAGE: list[Callable[[World], Found]] = [
    dangling_entry,
    deleted_inode,
    entry_in_nothing,
    entry_in_a_file,
    entry_in_a_namespace,
    entry_of_the_root,
    second_entry_of_a_directory,
    first_entry_of_a_directory_is_the_wrong_one,
    circle,
    lost_file,
    lost_directory,
    lost_namespace,
    lost_kv,
    forgotten_unlinked_file,
    wrong_links_of_a_file,
    no_links_but_a_name,
    wrong_links_of_directories,
    wrong_parents,
    no_root,
    no_kv,
    nothing_of_kv,
    stray_xattrs,
    stray_orphan,
    linked_orphan,
    namespace_without_directory,
    directory_without_namespace,
    duplicate_block,
    block_on_no_chain,
    counter_that_went_back,
    wrong_quotas,
    wrong_totals,
    damaged_records,
    lost_block,
    damaged_blocks,
    block_on_another_target,
    second_chunk_of_a_block,
    chunk_on_a_wrong_target,
    orphans,
    tail,
]

STORE_ONLY = {
    # The service does not start with these, or repairs them itself when it does.
    namespace_without_directory,
    directory_without_namespace,
    damaged_records,
    no_root,
    no_kv,
    nothing_of_kv,
    lost_kv,
}
