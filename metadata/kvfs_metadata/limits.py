"""Bounds of the metadata service and its clients. Others share those in kvfs_base.limits."""

from __future__ import annotations

from kvfs_base.limits import BLOCK_BYTES_MAX, GIB, MIB

LINKS_MAX = 65_000

FILE_WIDE_CHUNK_BYTES = BLOCK_BYTES_MAX
"""The same of a file that grew longer than FILE_CHUNK_BYTES in one staged chunk file: what the
kernel has written there stays there (docs/design/0010)."""

REJOIN_SECONDS = 5.0
"""A suspected target waits for so long before it is brought in step again; twice as long each
time, up to REJOIN_SECONDS_MAX."""

REJOIN_SECONDS_MAX = 160.0
REPLACE_SECONDS = 300.0
"""A member that is away for so long is replaced, if there is a target for that."""

PREPARE_SECONDS_MAX = 120.0
"""A batch that was prepared and neither committed nor aborted by then belongs to a dead writer.
Writing 4,096 blocks of 8 MiB at 300 MB/s would take longer; clients split such batches."""

REMOVED_TARGETS_MAX = 1024
"""Removed targets that are remembered, 100 bytes each: one that comes back is refused. The oldest
is forgotten for a new one."""

DRAIN_PAGE_RECORDS = 512
"""Blocks or inodes that one transaction looks at to empty a target: about 8 ms of the service's
time if all of them are given up, 0.5 ms if none is (memory engine)."""

DRAIN_PAUSE = 10
"""A target that files keep from being empty is looked through again and again: the pause is this
many times as long as the look took, so it takes a tenth of the service's time at most. A million
inodes take about 1 s."""

MOVE_FILES_AT_ONCE = 16
"""Of these, files that move at the same time."""

MOVE_CANDIDATES_MAX = 65_536
"""Files that a look through the store found to be moved from one target, 100 bytes each; the next
look finds the others."""

MOVE_LOOKS_MAX = 256
"""Of these, how many one TakeMoves looks at: 20 us each."""

OPEN_FILES_SHOWN_MAX = 100
"""Open files that keep a target from being empty, of those that are named."""

OPEN_FILE_HOLDERS_MAX = 16
"""Sessions that have one of these open, of those that are named."""

MOVE_REMOVALS_MAX = 4096
"""Chunks of a file whose copies are removed one by one when its move is given up; more of them are
left to fsck."""

COUNT_PAGE_RECORDS = 4096
"""Blocks or inodes that one CountChunks looks at: about 4 ms."""

WRITE_GROUP_REQUESTS = 4096
"""Requests in one group commit. Their writes are held in memory until the commit: a few hundred
bytes each, a batch of blocks up to 0.5 MiB."""

INODE_RANGE = 4096
"""Inode numbers a metadata service takes from its persistent counter at a time. A crash wastes at
most one range: at one crash a second 63 bits last 70 million years."""

NUMBERS_SKIPPED = 1 << 32
"""Given up when a store has gone back to an older state (a machine that lost its power, a backup):
more than were given out since. 63 bits last for 2 thousand million times."""

COMMITTED_BATCHES_MAX = 65_536
"""Batches whose commit can be repeated: a caller retries for less than a minute, and commits reach
about 1,000 a second. About 6 MiB of memory, 20 bytes each on disk."""

PREPARED_BATCHES_MAX = 65_536
"""Batches being written at the same time. Each holds up to BATCH_BLOCKS_MAX keys, but their sizes
together are bounded by the cache's capacity."""

EVICT_BATCH_BLOCKS = 256
"""Blocks one background transaction evicts: about 3 ms of the service's time."""

EVICT_SECONDS = 1.0
"""How often the disks' free space is compared with what they keep free."""

LAST_USE_SECONDS = 30.0
"""Uses of blocks are written down this often (in transactions of LAST_USE_BATCH_BLOCKS): a crash
forgets at most the recency of this long."""

LAST_USE_BATCH_BLOCKS = 512

SYNC_SECONDS = 1.0
"""With durability "cache" everything acknowledged is on stable storage this much later."""

OPEN_INODES_MAX = 100_000
"""Files one session may have open, and one Attach may name: 0.9 MiB of frame."""

SESSIONS_MAX = 8192
"""Sessions remembered, detached ones included."""

SESSION_GRACE_SECONDS = 30.0
"""A session whose connection broke keeps its files open this long: three times as long as clients
try to reconnect."""

SESSION_SILENT_SECONDS = SESSION_GRACE_SECONDS / 3
"""One that was not heard of for so long may be dead. Mounts say something every five seconds."""

INODE_LOCKS_MAX = 4096
"""Locked ranges of one file: they are one record of the store, of 40 bytes a range."""

LOCK_WAIT_SECONDS = 5.0
"""A question for a lock is answered after this long at the latest, and then asked again: so nobody
waits for good for what a lost answer said. Well below CALL_SECONDS."""

LOCK_WAITS_MAX = 1024
"""Questions for locks that a metadata server keeps waiting: a task (some 10 KiB) each."""

LOCK_LOOK_SECONDS = 0.5
"""How often a server on a shared store looks whether another one has released a lock."""

WATCH_SECONDS = 5.0
"""A change waits at most so long for a mount that does not say that it has dropped what was
changed: as long as a target may be silent. Also the pause of changes after a start that finds
watches recorded whose mounts do not come back."""

WATCH_MARGIN_SECONDS = 1.0
"""A mount stops so much earlier to answer by itself: clocks may differ in rate by a quarter."""

WATCH_POLL_SECONDS = 1.0
"""How often a watch is renewed: two answers may come a second late before a mount asks again."""

LEASES_MAX = 262_144
"""Leases of all watchers, about 250 bytes each: 64 MiB."""

REVOKED_KEYS_MAX = 8192
"""What one message revokes: 2.2 MiB of the longest names. More is told as everything."""

SERVER_BEAT_SECONDS = 2.0
SERVER_LEASE_SECONDS = 10.0
"""A metadata server that missed five beats is taken for dead by the others on its store: the grace
period of its sessions begins. A commit a beat and server."""

CONFLICT_RETRIES = 8
"""A group that lost its race is decided anew this often. Each time somebody else got ahead."""

RETRY_SECONDS = 10.0
"""Clients wait this long for a metadata service that is restarting. Loading 1 M blocks takes about
4 s."""

ONCE_SLOTS = 256
"""Changes that one client has on their way at the same time. The answer of each slot's last one is
kept for ONCE_SECONDS: about 150 bytes, 38 KiB a client at worst."""

ONCE_SECONDS = 600.0
"""Clients repeat a request for RETRY_SECONDS; one that was suspended in between is given more."""

ANSWERS_PER_COLLECTION = 4096
"""Kept answers that are looked at every LAST_USE_SECONDS: about 10 ms of work. A million of them,
150 MB of disk, are gone through in two hours."""

QUOTA_INODES_MAX = 10_000
"""Inodes that may lie below a directory that gets its first quota: they are rewritten in one
transaction, 4 us each, during which nothing else is decided."""

QUOTA_EVICTED_FRACTION = 64
"""Of the blocks of a full quota this part goes at once. Looking for the oldest takes 23 ms where
half a million blocks of a million count for it: 3 us for each of the 7,800 that go."""

NAMESPACES_MAX = 65_536
"""KV namespaces; each costs about 1 KiB of memory before it holds a block."""

NAMESPACE_DEPTH_MAX = 8
"""Names in a namespace's path below ``/kv``."""

COPY_BATCH_BYTES = 4 * MIB
"""Items that a copy of a store writes in one transaction, and one frame of a backup: some 20,000
inodes. It compresses to about 1 MiB."""

BACKUP_FRAME_BYTES_MAX = 64 * MIB
"""What a reader of a backup unpacks at once: a batch and one value that is larger than any that the
service writes (0.5 MiB)."""

METADATA_MAP_BYTES = 1 * GIB
"""First size of the LMDB map; it doubles when full. Address space only: the file grows by pages."""

METADATA_MAP_BYTES_MAX = 4096 * GIB

SCAN_RECORDS_MAX = 1024
SCAN_BYTES = 1 * MIB
"""Raw records in one page of a check: about half a millisecond of the service's time. They are
read 32 at a time, and none is over 64 KiB, so a page is at most 3 MiB: FRAME_BODY_BYTES_MAX."""

POSTGRES_IDLE_SECONDS = 5.0
"""A metadata server that stands still (stopped, swapped out) holds the row that orders commits for
at most this long, then the database ends its transaction. Deciding a group takes milliseconds."""

POSTGRES_LOCK_SECONDS = 10.0
"""How long a group waits for its turn: one server that stands still and a few that do not."""

POSTGRES_STATEMENT_SECONDS = 15.0
"""One statement, waiting for its turn included."""

POSTGRES_ANSWER_SECONDS = 20.0
"""A database that has not answered by then is taken for dead, and the connection given up. With
POSTGRES_LOCK_SECONDS to look what became of a commit: as long as clients wait (CALL_SECONDS)."""

POSTGRES_TRANSACTION_SECONDS = 30.0
"""A whole group, from the wait for its turn to the commit (PostgreSQL 17 and newer)."""

POSTGRES_SNAPSHOT_SECONDS = 120.0
"""A read transaction that asks nothing for that long ends: it keeps the database from vacuuming."""

POSTGRES_CONNECT_SECONDS = 5.0
POSTGRES_PATIENCE_SECONDS = RETRY_SECONDS
"""A database that restarts or fails over is waited for this long, as clients wait for us."""

POSTGRES_RETRIES = 8
"""Attempts at a transaction that lost a race before anything was decided in it."""

POSTGRES_CACHE_BYTES = 128 * MIB
"""Values of the database that a metadata server keeps: with 200 bytes of overhead an inode or an
entry costs about 300, so this is some 450,000 of them. It saves a round trip (0.1 ms) each."""

POSTGRES_ROUND_BYTES = 16 * MIB
"""Writes that go to the database in one round trip; it takes about 0.1 s to write them. PostgreSQL
refuses messages over 1 GiB."""

POSTGRES_LOG_VERSIONS_MAX = 65_536
"""Commits that the log tells one by one: at 1,000 a second a server may be away for half a minute
(the log is cut to a half) before it has to load everything anew."""

POSTGRES_LOG_BYTES_MAX = 64 * MIB
"""The same in bytes: 1 KiB a commit. A server that lags reads at most this at once."""

POSTGRES_LOG_ENTRY_BYTES_MAX = 8 * MIB
"""A larger commit is not told: everybody loads anew. 16 of the largest batches of blocks."""

TARGET_UUID_CHARS_MAX = 128
"""It is part of a key of the metadata store; LMDB's keys end at 511 bytes."""
