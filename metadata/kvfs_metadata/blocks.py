"""Blocks of KV namespaces: match, lookup, the two steps of a put, removal and eviction.

A put prepares (inode numbers and chains are given out, nothing is visible), writes its chunks, and
commits. A prepared batch is recorded with the time at which its writer is taken for dead. Each way
out of it, commit, abort and expiry, deletes the record in the transaction that decides, so exactly
one of them happens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import msgspec

from kvfs_base.errors import (
    CacheFull,
    InodeStale,
    InvalidRequest,
    LimitExceeded,
    PrepareExpired,
    ServerBusy,
    StaleChain,
)
from kvfs_base.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_BYTES_MAX,
    BLOCK_KEY_BYTES,
)
from kvfs_base.seams import Clock
from kvfs_base.types import BlockInfo
from kvfs_metadata import records
from kvfs_metadata.block_index import BlockIndex, KVNamespace, split_keys
from kvfs_metadata.block_table import Block
from kvfs_metadata.cluster.cluster_state import ClusterState
from kvfs_metadata.copies import Copies
from kvfs_metadata.engines.engine import KVRead, scan
from kvfs_metadata.inodes import load
from kvfs_metadata.limits import (
    COMMITTED_BATCHES_MAX,
    EVICT_BATCH_BLOCKS,
    LAST_USE_BATCH_BLOCKS,
    PREPARE_SECONDS_MAX,
    PREPARED_BATCHES_MAX,
    QUOTA_EVICTED_FRACTION,
)
from kvfs_metadata.messages import (
    AbortBlocks,
    CommitBlocks,
    Done,
    LookupBlocks,
    MatchBlocks,
    PrepareBlocks,
    PreparedBatch,
    PreparedBlock,
    RemoveBlocks,
    UseBlocks,
)
from kvfs_metadata.quotas import Quotas
from kvfs_metadata.records import PreparedRecord
from kvfs_metadata.transaction import Counters, Tx

DONE = Done()


@dataclasses.dataclass(slots=True)
class _Prepared:
    record: PreparedRecord
    size: int
    expires_at: float
    """Monotonic seconds of this process; the record has the wall clock's."""


@dataclasses.dataclass(slots=True)
class BlockCounts:
    """Since the start of the service. Tokens are keys times the layout's ``block_tokens``."""

    match_hits: int = 0
    match_misses: int = 0
    match_hit_tokens: int = 0
    match_miss_tokens: int = 0
    lookup_hits: int = 0
    lookup_misses: int = 0
    lookup_hit_tokens: int = 0
    lookup_miss_tokens: int = 0
    prepared_blocks: int = 0
    committed_blocks: int = 0
    committed_bytes: int = 0
    duplicate_blocks: int = 0
    aborted_batches: int = 0
    expired_batches: int = 0
    removed_blocks: int = 0
    corrupt_blocks: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0


class Blocks:
    """``file_bytes`` tells how much of the capacity ordinary files take in a transaction's view;
    ``capacity_bytes`` the capacity, 0 while it is unknown (no target has registered). ``shared`` if
    batches may be prepared by other servers, whose clocks are not compared with this one."""

    def __init__(
        self,
        read: KVRead,
        index: BlockIndex,
        *,
        clock: Clock,
        counters: Counters,
        cluster: ClusterState,
        copies: Copies,
        capacity_bytes: Callable[[], int],
        counts: BlockCounts | None = None,
        shared: bool = False,
    ) -> None:
        self.index = index
        self.counts = counts or BlockCounts()
        self._clock = clock
        self._shared = shared
        self._counters = counters
        self._cluster = cluster
        self._copies = copies
        self._capacity_bytes = capacity_bytes
        self._prepared: dict[int, _Prepared] = {}
        self.prepared_bytes = 0
        self._prepared_of: Counter[int] = Counter()
        """Bytes by namespace."""
        self.quotas = Quotas(index, self.bytes_of_quota)
        self._committed: dict[int, None] = {}
        index.load(read)
        for key, value in scan(read, records.PREPARED):
            self._load_prepared(records.number_at(key), records.decode_prepared(value))
        for key, _ in scan(read, records.COMMITTED):
            self._committed[records.number_at(key)] = None

    def _load_prepared(self, batch_id: int, record: PreparedRecord) -> None:
        left = PREPARE_SECONDS_MAX
        if not self._shared:
            # A clock that was set back meanwhile must not keep the batch for longer.
            left = min(left, (record.expires_ns - self._clock.time_ns()) / 1e9)
        expires_at = self._clock.monotonic() + left
        self._add_prepared(batch_id, _Prepared(record, sum(record.sizes), expires_at))

    def _add_prepared(self, batch_id: int, batch: _Prepared) -> None:
        self._prepared[batch_id] = batch
        self.prepared_bytes += batch.size
        self._prepared_of[batch.record.namespace] += batch.size

    def _drop_prepared(self, batch_id: int) -> None:
        batch = self._prepared.pop(batch_id)
        self.prepared_bytes -= batch.size
        self._prepared_of[batch.record.namespace] -= batch.size
        if not self._prepared_of[batch.record.namespace]:
            del self._prepared_of[batch.record.namespace]

    # --- following other servers

    def apply(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Brings memory in step with what another server committed: the records it changed, None
        for those it deleted. Other kinds of records are passed over, and what is known already
        changes nothing. Not between the decision and the commit of a group of our own.

        Recency follows as the other server writes it down, so its uses arrive up to
        LAST_USE_SECONDS late and then count as new; among blocks with the same last use the order
        is that of a restart.
        """
        self.index.apply(writes, self._clock.time_ns())
        for key, value in writes.items():
            batch_id = records.number_at(key)
            if key.startswith(records.PREPARED):
                if batch_id in self._prepared:
                    self._drop_prepared(batch_id)
                if value is not None:
                    self._load_prepared(batch_id, records.decode_prepared(value))
            elif key.startswith(records.COMMITTED):
                if value is None:
                    self._committed.pop(batch_id, None)
                else:
                    self._committed[batch_id] = None

    # --- reading

    def namespace(self, inode: int) -> KVNamespace:
        """Raises InodeStale."""
        namespace = self.index.namespaces.get(inode)
        if namespace is None:
            raise InodeStale(inode)
        return namespace

    def match(self, request: MatchBlocks) -> int:
        namespace = self.namespace(request.namespace)
        count = _key_count(request.keys)
        found = self.index.prefix(namespace, request.keys)
        self.index.use_rows(found, self._clock.time_ns())
        hits = len(found)
        tokens = namespace.layout.block_tokens
        self.counts.match_hits += hits
        self.counts.match_misses += count - hits
        self.counts.match_hit_tokens += hits * tokens
        self.counts.match_miss_tokens += (count - hits) * tokens
        return hits

    def lookup(self, request: LookupBlocks) -> tuple[BlockInfo | None, ...]:
        namespace = self.namespace(request.namespace)
        count = _key_count(request.keys)
        rows = namespace.find(split_keys(request.keys))
        found = [row for row in rows if row is not None]
        self.index.use_rows(found, self._clock.time_ns())
        hits = len(found)
        tokens = namespace.layout.block_tokens
        self.counts.lookup_hits += hits
        self.counts.lookup_misses += count - hits
        self.counts.lookup_hit_tokens += hits * tokens
        self.counts.lookup_miss_tokens += (count - hits) * tokens
        infos = iter(self.index.table.infos(found))
        return tuple(None if row is None else next(infos) for row in rows)

    def use(self, request: UseBlocks) -> Done:
        namespace = self.namespace(request.namespace)
        _key_count(request.keys)
        rows = namespace.find(split_keys(request.keys))
        self.index.use_rows([row for row in rows if row is not None], self._clock.time_ns())
        tokens = namespace.layout.block_tokens
        self.counts.match_hits += request.matched
        self.counts.match_hit_tokens += request.matched * tokens
        self.counts.lookup_hits += request.looked_up
        self.counts.lookup_hit_tokens += request.looked_up * tokens
        return DONE

    # --- putting

    def prepare(self, tx: Tx, request: PrepareBlocks) -> PreparedBatch:
        namespace = self.namespace(request.namespace)
        _check_sizes(request, namespace)
        keys = split_keys(request.keys)
        rows = namespace.find(keys)
        self.index.use_rows([row for row in rows if row is not None], tx.now_ns)
        places = _absent(keys, rows)
        if not places:
            return PreparedBatch(0, (None,) * len(rows))
        if len(self._prepared) >= PREPARED_BATCHES_MAX:
            raise ServerBusy(detail=f"{PREPARED_BATCHES_MAX} batches are being written")
        sizes = tuple([request.sizes[place] for place in places])
        copies = self._copies.wanted(load(tx.kv, namespace.inode))
        chains = self._cluster.placement.place_blocks(tx, sizes, copies)
        self._make_room_in_quota(tx, namespace, sum(sizes))
        self._make_room(tx, sum(sizes))
        record = PreparedRecord(
            namespace=namespace.inode,
            expires_ns=tx.now_ns + int(PREPARE_SECONDS_MAX * 1e9),
            first_inode=self._counters.inode.take(tx, len(places)),
            keys=b"".join([keys[place] for place in places]),
            sizes=sizes,
            chains=tuple(chains),
        )
        batch_id = self._counters.batch.take(tx)
        tx.kv.put(records.prepared_key(batch_id), records.encode(record))
        expires_at = self._clock.monotonic() + PREPARE_SECONDS_MAX
        self._add_prepared(batch_id, _Prepared(record, sum(sizes), expires_at))
        tx.undo.append(partial(self._drop_prepared, batch_id))
        self._count(tx, prepared_blocks=len(places))
        answer: list[PreparedBlock | None] = [None] * len(rows)
        for i, place in enumerate(places):
            answer[place] = PreparedBlock(record.first_inode + i, chains[i])
        return PreparedBatch(batch_id, tuple(answer))

    def commit(self, tx: Tx, request: CommitBlocks) -> Done:
        batch_id = request.batch_id
        batch = self._prepared.get(batch_id)
        if batch is None:
            # The answer to the first attempt may have been lost.
            if batch_id in self._committed or batch_id == 0:
                return DONE
            raise PrepareExpired(batch_id)
        record = batch.record
        if len(request.crc32c) != len(record.sizes):
            raise InvalidRequest(detail=f"{len(record.sizes)} checksums expected")
        self._require_versions(record, request)
        namespace = self.index.namespaces.get(record.namespace)
        if namespace is None:
            raise PrepareExpired(batch_id)  # its directory is gone; expiry collects the chunks
        self._insert(tx, namespace, record, request.crc32c)
        self._close_batch(tx, batch_id, batch)
        self._remember_committed(tx, batch_id)
        return DONE

    def _require_versions(self, record: PreparedRecord, request: CommitBlocks) -> None:
        """A member that came meanwhile may not have the blocks. Raises StaleChain."""
        written = dict(request.versions)
        for chain_id in dict.fromkeys(record.chains):
            chain = self._cluster.chains.get(chain_id)
            if chain is None or not chain.is_replicated:
                continue
            if written.get(chain_id) != chain.version:
                raise StaleChain(chain=chain_id, version=chain.version)

    def _insert(
        self, tx: Tx, namespace: KVNamespace, record: PreparedRecord, crc32c: Sequence[int]
    ) -> None:
        new: list[Block] = []
        values: list[bytes] = []
        keys = split_keys(record.keys)
        known = namespace.find(keys)
        for i, key in enumerate(keys):
            inode, size, chain = record.first_inode + i, record.sizes[i], record.chains[i]
            if chain not in self._cluster.chains:
                continue  # its target was removed meanwhile: a miss from the beginning
            if known[i] is not None:
                self._cluster.remove_chunks(tx, (chain,), inode, 1, size)
                self._count(tx, duplicate_blocks=1)
                continue
            now = tx.now_ns
            block = Block(inode, namespace.inode, key, size, crc32c[i], chain, now, now)
            value = block.record()
            tx.kv.put(records.block_key(inode), value)
            new.append(block)
            values.append(value)
        self.index.insert(new, values)
        tx.undo.append(partial(self._remove_all, new))
        stored = sum(block.size for block in new)
        self._count(tx, committed_blocks=len(new), committed_bytes=stored)

    def _remove_all(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.index.remove(block)

    def _close_batch(self, tx: Tx, batch_id: int, batch: _Prepared) -> None:
        tx.kv.delete(records.prepared_key(batch_id))
        self._drop_prepared(batch_id)
        tx.undo.append(partial(self._add_prepared, batch_id, batch))

    def _remember_committed(self, tx: Tx, batch_id: int) -> None:
        tx.kv.put(records.committed_key(batch_id), b"")
        self._committed[batch_id] = None
        tx.undo.append(partial(self._committed.pop, batch_id))
        while len(self._committed) > COMMITTED_BATCHES_MAX:
            oldest = next(iter(self._committed))
            tx.kv.delete(records.committed_key(oldest))
            del self._committed[oldest]

    def abort(self, tx: Tx, request: AbortBlocks) -> Done:
        batch = self._prepared.get(request.batch_id)
        if batch is not None:
            self._release(tx, request.batch_id, batch)
            self._count(tx, aborted_batches=1)
        return DONE

    def _release(self, tx: Tx, batch_id: int, batch: _Prepared) -> None:
        """Drops a batch and has its chunks removed, whether they were written or not."""
        record = batch.record
        for i, (size, chain) in enumerate(zip(record.sizes, record.chains, strict=True)):
            self._cluster.remove_chunks(tx, (chain,), record.first_inode + i, 1, size)
        self._close_batch(tx, batch_id, batch)

    def expire(self, tx: Tx) -> None:
        """Drops batches of writers that are taken for dead, one transaction's worth."""
        now = self._clock.monotonic()
        late = [item for item in self._prepared.items() if item[1].expires_at <= now]
        released = count = 0
        for batch_id, batch in late:
            self._release(tx, batch_id, batch)
            count += 1
            released += len(batch.record.sizes)
            if released >= BATCH_BLOCKS_MAX:
                break
        self._count(tx, expired_batches=count)

    def prepared_chains(self) -> set[int]:
        """Where blocks may yet become visible."""
        return {chain for batch in self._prepared.values() for chain in batch.record.chains}

    def prepared_inodes(self, chains: Collection[int]) -> set[int]:
        """Blocks on these chains that may yet become visible."""
        return {
            batch.record.first_inode + place
            for batch in self._prepared.values()
            if not set(batch.record.chains).isdisjoint(chains)
            for place, chain in enumerate(batch.record.chains)
            if chain in chains
        }

    def next_expiry(self) -> float | None:
        """Monotonic seconds of the first expiry to come."""
        return min((batch.expires_at for batch in self._prepared.values()), default=None)

    # --- removing

    def remove(self, tx: Tx, request: RemoveBlocks) -> int:
        namespace = self.namespace(request.namespace)
        count = _key_count(request.keys)
        if request.inodes and len(request.inodes) != count:
            raise InvalidRequest(detail="one inode a key, or none")
        if request.chains and len(request.chains) != count:
            raise InvalidRequest(detail="one chain a key, or none")
        removed = 0
        for place, key in enumerate(split_keys(request.keys)):
            block = namespace.blocks.get(key)
            if block is None or (request.inodes and block.inode != request.inodes[place]):
                continue
            if request.chains and block.chain != request.chains[place]:
                continue
            self.remove_block(tx, block)
            removed += 1
        self._count(tx, removed_blocks=removed, corrupt_blocks=removed if request.inodes else 0)
        return removed

    def remove_block(self, tx: Tx, block: Block) -> None:
        """The block is gone, its chunk will be removed."""
        tx.kv.delete(records.block_key(block.inode))
        self._cluster.remove_chunks(tx, (block.chain,), block.inode, 1, block.size)
        self._cluster.stop_move(tx, (block.chain,), block.inode, 1)
        self.index.remove(block)
        self.index.namespaces[block.namespace].changed_ns = tx.now_ns
        tx.undo.append(partial(self.index.insert, [block]))

    def move_block(self, tx: Tx, block: Block, chain: int) -> None:
        """Its chunk is on another chain now."""
        moved = msgspec.structs.replace(block, chain=chain)
        tx.kv.put(records.block_key(block.inode), moved.record())
        self.index.set_chain(block.inode, chain)
        tx.undo.append(partial(self.index.set_chain, block.inode, block.chain))

    def evict(self, tx: Tx, bytes_needed: int, count_max: int = EVICT_BATCH_BLOCKS) -> int:
        """Removes the blocks that the policy gives up first; answers the bytes they had."""
        rows = self.index.policy.victims(bytes_needed, count_max)
        return self._evict(tx, [self.index.table.block(row) for row in rows])

    def _evict(self, tx: Tx, blocks: Sequence[Block]) -> int:
        freed = sum(block.size for block in blocks)
        for block in blocks:
            self.remove_block(tx, block)
        self._count(tx, evicted_blocks=len(blocks), evicted_bytes=freed)
        return freed

    def used_bytes(self, read: KVRead) -> int:
        """Blocks, prepared blocks and files."""
        usage = records.unpack_usage(read.get(records.USAGE_KEY))
        return self.index.block_bytes + self.prepared_bytes + usage.file_bytes

    def bytes_of_quota(self, quota: int) -> int:
        """Blocks that count for it, those that are being written included."""
        prepared = sum(map(self._prepared_of.__getitem__, self.index.by_quota.get(quota, {})))
        return self.index.bytes_of_quota(quota) + prepared

    def _make_room_in_quota(self, tx: Tx, namespace: KVNamespace, size: int) -> None:
        """A tenant's cache is as large as its quota lets it be: its own blocks give way to new
        ones, some at once, since looking for the oldest of them takes as long for one as for many.
        Raises QuotaExceeded."""
        missing = self.quotas.missing_bytes(tx.kv, namespace, size)
        if missing:
            some = self.index.bytes_of_quota(namespace.quota) // QUOTA_EVICTED_FRACTION
            self._evict(tx, self.index.victims_of_quota(namespace.quota, max(missing, some)))

    def _make_room(self, tx: Tx, size: int) -> None:
        """Prepares that outrun the background eviction evict for themselves: the bound holds, and
        a cache does not refuse what it could keep. Raises CacheFull."""
        capacity = self._capacity_bytes()
        if capacity == 0:
            return
        missing = self.used_bytes(tx.kv) + size - capacity
        if missing <= 0:
            return
        if missing > self.index.block_bytes:
            raise CacheFull(needed_bytes=size, capacity_bytes=capacity)
        self.evict(tx, missing, count_max=len(self.index.policy))

    def _count(self, tx: Tx, **changes: int) -> None:
        for name, change in changes.items():
            setattr(self.counts, name, getattr(self.counts, name) + change)
        tx.undo.append(partial(self._uncount, changes))

    def _uncount(self, changes: dict[str, int]) -> None:
        for name, change in changes.items():
            setattr(self.counts, name, getattr(self.counts, name) - change)

    # --- recency

    def persist_uses(self, tx: Tx) -> int:
        """Writes down the last use of some blocks; answers how many are left."""
        blocks = self.index.take_touched(LAST_USE_BATCH_BLOCKS)
        for block in blocks:
            tx.kv.put(records.block_key(block.inode), block.record())
        tx.undo.append(partial(self.index.touch, blocks))
        return self.index.touched_count

    def statistics(self) -> dict[str, int]:
        counts = dataclasses.asdict(self.counts)
        counts["hit_tokens"] = self.counts.match_hit_tokens + self.counts.lookup_hit_tokens
        counts["miss_tokens"] = self.counts.match_miss_tokens + self.counts.lookup_miss_tokens
        counts["blocks"] = len(self.index.by_inode)
        counts["block_bytes"] = self.index.block_bytes
        counts["prepared_batches"] = len(self._prepared)
        counts["prepared_bytes"] = self.prepared_bytes
        counts["namespaces"] = len(self.index.namespaces)
        for namespace in self.index.namespaces.values():
            counts[f"namespace_blocks:{namespace.path}"] = len(namespace.blocks)
            counts[f"namespace_bytes:{namespace.path}"] = namespace.block_bytes
        return counts


def _key_count(keys: bytes) -> int:
    count, rest = divmod(len(keys), BLOCK_KEY_BYTES)
    if rest:
        raise InvalidRequest(detail=f"keys are {BLOCK_KEY_BYTES} bytes each, end to end")
    return count


def _check_sizes(request: PrepareBlocks, namespace: KVNamespace) -> None:
    if _key_count(request.keys) != len(request.sizes):
        raise InvalidRequest(detail="one size a key")
    limit = namespace.layout.block_bytes or BLOCK_BYTES_MAX
    if request.sizes and not 0 < min(request.sizes) <= max(request.sizes) <= limit:
        raise LimitExceeded(detail="bytes of a block", limit=limit)


def _absent(keys: Sequence[bytes], rows: Sequence[int | None]) -> list[int]:
    """Places of keys that are not stored; of a key that is named twice, the first."""
    first: dict[bytes, int] = {}
    for place, row in enumerate(rows):
        if row is None:
            first.setdefault(keys[place], place)
    return list(first.values())
