"""Every bound in one place, with the arithmetic behind it."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

PAGE_BYTES = 4 * KIB
"""Alignment of O_DIRECT buffers, offsets and lengths; arena extents are whole pages."""

NAME_BYTES_MAX = 255
SYMLINK_BYTES_MAX = 4095
XATTR_VALUE_BYTES_MAX = 64 * KIB
XATTR_NAME_BYTES_MAX = 255
LINKS_MAX = 65_000

BLOCK_KEY_BYTES = 32
"""A block's key is a chained SHA-256 (``kvfs.keys.block_keys``)."""

BLOCK_BYTES_MAX = 256 * MIB
"""Blocks of today's models are 50 KB to 80 MiB. A block is one chunk: never striped."""

BATCH_BLOCKS_MAX = 4096
"""Keys in one request. 4,096 keys are 128 KiB of names, a 64 K-token prefix at 16 tokens a block.
Clients split longer lists."""

FILE_CHUNK_BYTES = 16 * MIB
"""Chunk size of ordinary files: a 4 MiB write stays in one file (one backing file for the kernel),
a 1 GiB file spreads over 64 chunks, and a checksum of a whole chunk costs about 3 ms."""

FILE_WIDE_CHUNK_BYTES = BLOCK_BYTES_MAX
"""The same of a file that grew longer than FILE_CHUNK_BYTES in one staged chunk file: what the
kernel has written there stays there (docs/design/0010)."""

STRIPE_MAX = 16
"""Chains one file is striped over; the list is stored in the inode (2-5 bytes each)."""

FRAME_BODY_BYTES_MAX = 4 * MIB
"""Control part of a frame. The largest honest one is a directory page of 4,096 entries
of 255-byte names with attributes: about 1.7 MiB."""

FRAME_PAYLOAD_BYTES_MAX = 512 * MIB
"""Data part of a frame: twice the largest block."""

TRANSFER_BYTES = 8 * MIB
"""What one data request aims for: at 2 GB/s it takes 4 ms, beside which a call of some 50 us does
not show. Every connection at work needs a buffer of this size. By arithmetic, not measured."""

FDS_PER_MESSAGE_MAX = 250
"""The kernel's SCM_MAX_FD is 253."""

DIRECTORY_PAGE_ENTRIES = 1024

CONNECTIONS_MAX = 1024
"""Per server. A connection costs a thread (8 MiB of address space, of which little is touched) on
the data path or a task on the control path."""

CONNECT_SECONDS = 5.0
CALL_SECONDS = 30.0
"""A call without an answer by then fails with DeadlineExceeded: the mount never hangs."""

SECRET_BYTES_MIN = 32
SECRET_BYTES_MAX = 4096
"""A cluster's secret: 256 bits at least, and no file that was meant to be something else."""

HANDSHAKE_SECONDS = CONNECT_SECONDS
HANDSHAKES_MAX = 64
"""Peers of one listener that have not proved themselves yet, a descriptor and about 1 KiB each. An
honest one needs a round trip, so with one more the oldest is given up."""

HEARTBEAT_SECONDS = 0.5
TARGET_LEASE_SECONDS = 5.0
"""A target that missed ten heartbeats is offline: its blocks miss, new chunks go elsewhere."""

FENCE_SECONDS = TARGET_LEASE_SECONDS / 2
"""A server that was not answered for so long stops serving chains of several copies: well before
others may take its place, whatever the clocks' rates."""

VIEW_WAIT_SECONDS = 1.0
"""A request that names a newer chain version than the server knows waits this long for it: two
heartbeats."""

BEAT_PAUSE_SECONDS = 0.05
"""Heartbeats that requests ask for come no closer than this."""

PASS_SECONDS = 4.0
"""What a member gives the next one to answer, and as much again for each one behind that. A lease
is over by then, so the answer to a longer silence comes from the metadata service."""

PASS_CONNECT_SECONDS = 2.0
"""A connection to another member: a first segment that is lost is sent again after a second."""

WATCHDOG_SECONDS = 1.0
WATCHDOG_CONNECT_SECONDS = 1.5
"""Who waits longer than the first for a write, or a read of a file, dials the server once more: if
that takes longer than the second (a segment may be lost), it is not waited for any more. A server
that is gone costs 2.5 s at most instead of DATA_SECONDS and more, a slow disk a connection a
second."""

RELAY_SECONDS_MAX = 300
"""The longest that a sender can say it waits for what another member passes on to the head:
TRANSFER_BYTES to HOPS_MAX members take less."""

CHUNK_LOCK_SECONDS = 5.0
"""An update waits this long for another one of its chunk, which may wait for a member that died."""

PASS_CONNECTIONS = 8
"""Requests that a server has on their way to one address, for each number of members that have yet
to get them: those with more behind them wait only for those with fewer, never in a circle."""

PASS_BUFFERS = 8
"""Receive buffers for what is passed on, again for each number of members behind: 64 MiB each, made
when first used."""

CREW_THREADS = 8
"""Threads of a chunk server that help with requests of several items, on its chains: as many as
connections to the next member (PASS_CONNECTIONS). Requests that find none free do without."""

PASS_PIECE_BYTES = 1 * MIB
"""A block goes on in pieces of this size: while one is sent the next one comes in."""

READ_ATTEMPTS = 3
"""How often a server is asked for a piece whose bytes changed on their way."""

READ_AGAIN_ATTEMPTS = 3
"""And for a whole chunk that is right on the server's disk, each time over another connection."""

WRITE_ATTEMPTS_BAD = 4
"""How often an update is sent again because its bytes, or those that it changes, are wrong: the
former may be the network's fault, the latter are repaired if anybody has a good copy."""

COPIES_MAX = 3
HOPS_MAX = 8
"""Members that a write passes: the copies, and those that are being brought in step."""

CHAIN_CHUNK_BYTES = 1 * MIB
"""Chunks of files with several copies: an overwrite copies its chunk (0.7 ms of CPU a copy)."""

SUSPECT_SECONDS = 2.0
"""A successor that cannot be reached for so long is reported."""

REJOIN_SECONDS = 5.0
"""A suspected target waits for so long before it is brought in step again; twice as long each
time, up to REJOIN_SECONDS_MAX."""

REJOIN_SECONDS_MAX = 160.0
REPLACE_SECONDS = 300.0
"""A member that is away for so long is replaced, if there is a target for that."""

SUSPECTS_MAX = 64
SYNCED_MAX = 256

UPDATES_REMEMBERED_MAX = 65_536
"""Numbers of updates that a target keeps in memory to recognise repetitions, 165 bytes each: ten
minutes at 100 writes a second."""

DAMAGED_CHUNKS_MAX = 4096
"""Chunks of one target that are known to be damaged, and counted: 30 bytes each in a note that is
written anew with each."""

UPDATES_REFUSED_MAX = 4096
"""Updates that a member had no room for and that are given up, under one version of a chain; 150
bytes each. Further ones stay pending until there is room."""

RESOLVE_FULL_SECONDS = 10.0
"""A member that cannot commit for so long what those behind it have, because its disk is full,
leaves its chains."""

UNWANTED_INODES_MAX = 4096
"""Chunks that a server asks about at once: 9 bytes each."""

SYNC_CAME_MAX = 262_144
"""Chunks that are updated behind the place that a comparison has come to, 100 bytes each: further
updates wait for it."""

SYNC_THREADS = 4
"""Chains that one server brings in step at the same time, a chunk on its way each."""

SYNC_BUFFERS = 8
"""Whole chunks that a server reads to send them: for those threads, and for updates that could not
be passed on as they came."""

SYNC_RETRY_SECONDS = 1.0
"""Pause before a comparison that failed begins again."""

SYNC_CALL_SECONDS = 60.0
"""What a member gets to begin a comparison: it reads the attributes of a chain's chunks, 20 us
each, and all their names."""

RESOLVE_SECONDS = 0.5
"""How often updates that stayed pending are tried again, and members that did not answer asked,
while nothing else says that it is time."""

GARBAGE_SECONDS = 600.0
"""Pause between two rounds in which a server asks which of its chunks are unwanted: names alone
cost 1.2 us a chunk."""

GARBAGE_PAUSE_SECONDS = 0.1
"""Pause before each question of a round: 40,000 inodes a second at most."""

UNWANTED_REMEMBERED_MAX = 262_144
"""Inodes that were unwanted in the last round, about 150 bytes each; the others take one more."""

SYNC_PAGE_CHUNKS = 1024
"""Chunks of one page of a comparison between two members, 40 bytes each."""

PREPARE_SECONDS_MAX = 120.0
"""A batch that was prepared and neither committed nor aborted by then belongs to a dead writer.
Writing 4,096 blocks of 8 MiB at 300 MB/s would take longer; clients split such batches."""

REMOVALS_PER_HEARTBEAT = 4096
"""Chunks one heartbeat reply asks a server to remove: at 1 ms an unlink (ext4 with discard)
about 4 s of work, done outside the heartbeat."""

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

MOVES_AT_ONCE = 64
"""Blocks and files of one copy that a draining target has been told to move, 100 bytes each."""

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

MOVE_THREADS = 4
"""Chunks that one target sends away at the same time."""

MOVE_END_TOGETHER = 16
"""Moves that are reported together: each report is a transaction."""

FILES_LEFT_MAX = 65_536
"""Files that a server remembers to have moved away, 100 bytes each."""

MOVE_PAUSE_SECONDS = 0.5
"""Before a target that has nothing to move for now asks again."""

COUNT_PAGE_RECORDS = 4096
"""Blocks or inodes that one CountChunks looks at: about 4 ms."""

# --- mount

FILE_BYTES_MAX = FILE_CHUNK_BYTES << 32
"""Chunks are numbered with 32 bits: 64 PiB."""

MOUNT_IO_BYTES = 1 * MIB
"""The largest FUSE read or write: 256 pages, the kernel's own bound."""

MOUNT_THREADS = 8
"""Data path calls that wait at the same time. Each holds at most one MOUNT_IO_BYTES buffer; more
threads than disks and cores gain nothing."""

MOUNT_TASKS = 64
"""FUSE requests at work at the same time; each has a receive buffer of MOUNT_IO_BYTES (libfuse's),
or a copy of what it writes, so 64 MiB at worst."""

MOUNT_BACKGROUND = 64
"""Read-ahead and other requests that nobody waits for, as many as the kernel may send at a time."""

MOUNT_DRAIN_REQUESTS = 64
"""Requests read before other tasks get their turn: 64 of 15 us are a millisecond."""

MOUNT_INTERRUPT_SECONDS = 1.0
"""How long a request may go on after its caller got a signal. Almost all end by themselves:
programs that do not expect EINTR of files never see it, and Ctrl-C need not wait for a dead
server."""

MOUNT_LOCK_WAITS_MAX = 512
"""Programs that wait for locks at the same time; they are not counted in MOUNT_TASKS, since what
they wait for may come as a request. Half of LOCK_WAITS_MAX: one mount leaves room for others."""

MOUNT_PASSED_BYTES_MIN = 128 * KIB
"""Smaller ordinary files are read by one request, which costs less than to fetch a descriptor."""

MOUNT_PASSED_SETTLED_SECONDS = 10.0
"""An ordinary file that changed later may be one that grows: who reads it through the kernel alone
would not see what lies behind its first chunk. Its pages are likely to be cached, too."""

STAGED_AHEAD = 32
"""Empty files of a target that a mount has at hand for new files, a descriptor and 1 KiB of the
server's each. One request asks for half of them, after an adoption rather than before one: at 6,000
new files a second, 375 requests."""

SEAL_TOGETHER_SECONDS = 0.1
"""How long a staged file that was closed waits for others to be sealed with: at 200 a second, some
seven of each server with one request. Whoever opens it meanwhile has it sealed then."""

STAGED_AHEAD_TARGETS_MAX = 64
"""Chains of one copy on this host that a mount asks empty files of: 2,048 descriptors at most."""

STAGED_AHEAD_RETRY_SECONDS = 10.0
"""How long a chain is taken to be elsewhere, or its server to be away, before it is looked at
again."""

PASSED_SETTLED_SECONDS = 0.05
"""How old a change has to be for a file's mtime to tell of the next one: several ticks of the clock
that times are taken from (4 ms, or 10)."""

MOUNT_UNPUSHED_BYTES = 4 * FILE_CHUNK_BYTES
"""A file that grew by this much tells the metadata service, so that after a crash no more than
this (and one write) lies unrecorded behind its end: that tail is cut before a hole is opened."""

MOUNT_WRITE_BACK_SECONDS = 5.0
"""Sizes and times of files that stay open are recorded this often."""

MOUNT_REMEMBERED_INODES = 65_536
"""Inodes whose cached pages are known to be current, about 150 bytes each. One that was forgotten
only has its pages dropped when it is opened again."""

MOUNT_STALE_OPENS = 1024
"""Threads that were just told to look a name up once more; each is there for some milliseconds."""

MOUNT_NAMES_MAX = 65_536
"""Names, and as many inodes, that a mount answers for by itself: about 0.5 KiB for both."""

MOUNT_WHOLE_MAX = 4096
"""Directories of which a mount knows all entries, because it made them."""

MOUNT_LISTED_MAX = 4096
MOUNT_LISTED_NAMES_MAX = 65_536
"""Directories whose listing a mount has leased, and names in all of them: about 150 bytes a name,
10 MiB. Their attributes count for MOUNT_NAMES_MAX."""

MOUNT_DROPPED_MAX = 4096
"""Keys that were dropped lately; with more, answers that are on their way are not kept."""

MOUNT_NOTICES_MAX = 16_384
"""Notices that wait to be told to the kernel. Further ones are left to its time-outs."""

MOUNT_IDLE_FILES = 4096
"""Files that nobody has open any more and that the service still counts as open, so that the next
open costs no call. The space of one that another mount removes comes back when it is closed."""

MOUNT_IDLE_BLOCKS = 256
"""Blocks that nobody has open any more and that are still at hand, and as many files. A mount that
does not run any more keeps the space of those that are removed: 512 MiB of 2 MiB each."""

MOUNT_IDLE_SECONDS = 5.0
"""Such a file or block is closed when nobody opened it for one to two times as long."""

MOUNT_CLOSE_SECONDS = 0.01
"""One that was removed is closed after this, together with others: its space waits as long."""

MOUNT_USES_MAX = 1024
"""Blocks that were opened and whose use was not told to the service yet: told every
MOUNT_IDLE_SECONDS, or when there are so many."""

CLOSED_TOGETHER_MAX = 1024
"""Files that one request closes: some milliseconds of the service's time if all were removed."""

MOUNT_OPEN_FILES = 100_000
"""As many inodes as one Attach can name after a reconnect."""

MOUNT_BLOCK_BUFFER_BYTES = BLOCK_BYTES_MAX
"""Blocks of other hosts are held whole while they are read (a part cannot be verified): together
at most this much, or the one block that is being read."""

DIRECTORY_REPLY_ENTRIES = 256
"""Entries fetched for one readdir of the kernel at most: its buffer of 32 KiB holds about 180."""

MOUNT_PACKED_ENTRIES_MAX = 16_384
"""Entries of directories that the mount keeps as the kernel wants them, 6 MiB: packing one takes
1.5 us, finding it 0.3."""

DIRECTORY_RECENT_NAMES = 4096
"""Names a directory handle keeps as they are, about 0.5 MiB; the kernel steps back by less than one
reply. Older positions cost 8 bytes each."""

# --- metadata

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

TAIL_POLL_SECONDS = 0.1
"""How often a mount asks again whether what lies behind the end of a file may be cut, or is cut by
now: each is one request, and seldom."""

TAIL_WAIT_SECONDS = 60.0
"""How long it goes on: longer than a session of a server that is gone too can take to end."""

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

FIXES_PER_REQUEST = 256
"""Repairs in one transaction: each looks at a few records, about 5 ms together."""

FSCK_SETTLE_SECONDS = 2.0
"""A check of a kvfs at work looks again after this long for bytes that files lack: a truncation
takes two calls, some milliseconds apart."""

FSCK_CHAIN_PAGE_CHUNKS = 128
"""Chunks in one page of a chain's listing. A check holds a page of each chain of each target while
it merges them: 64 chains of 100 targets are 160 MB."""

FINDINGS_MAX = 100_000
"""Findings that one check keeps, about 50 MB. A store with more is repaired in several rounds."""

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

# --- data path

LIST_CHUNKS_MAX = 2048
"""Chunks in one page of a target's listing: 13 us of CPU each, 64 bytes each on the wire."""

CHECK_CHUNKS_PER_REQUEST = 32
"""Chunks that one request reads again from the disk: 512 MiB of file chunks, within CALL_SECONDS
at 20 MB/s. Large blocks are sent in smaller batches (CHECK_BYTES_PER_REQUEST)."""

CHECK_BYTES_PER_REQUEST = 512 * MIB

SCRUB_DAYS = 30.0
SCRUB_BYTES_PER_SECOND = 16 * MIB
"""A server reads everything again once in SCRUB_DAYS, each target at this rate: 41 TB by then, or
1 TB in 18 hours, beside which a disk that reads 1 GB/s does not slow down."""

SCRUB_CHUNK_BYTES = 64 * KIB
"""A smaller chunk counts as one of this size: it costs an access all the same. 256 chunks a second
at most by default, about 2 % of a core."""

SCRUB_START_SECONDS = 300.0
"""A server that has just started does not read by itself yet."""

SCRUB_SAVE_SECONDS = 60.0
"""What a killed server may read again."""

SCRUB_BAD_REMEMBERED_MAX = 4096
"""Bad single copies that are not spoken of again; 300 bytes each."""

TARGETS_PER_SERVER_MAX = 64
"""What one Heartbeat can report. More disks than that want a second server anyway."""

ITEMS_PER_REQUEST_MAX = FDS_PER_MESSAGE_MAX
"""Chunks in one data request: as many as descriptors fit into one message."""

SERVER_BUFFERS = 16
"""Receive buffers of TRANSFER_BYTES in one chunk server: 128 MiB at worst, whatever clients do.
A disk that takes 1 GB/s is kept busy by about three."""

SERVER_CHECK_BUFFERS = 4
SERVER_CHECK_BYTES = 1 * MIB
"""Buffers in which a server computes checksums of chunks it already has. They are apart from the
receive buffers, so that stalled writers do not hold up readers."""

STALL_SECONDS = 10.0
"""A peer that neither sends nor takes what was announced for that long loses its connection and
gives back its buffer."""

STAGING_DIRECTORIES = 64
STAGING_IN_A_ROW = 64
"""Files are made in one of so many directories, so many in one before the next. ext4 makes a file
in the block group of its directory; without a journal it steps over all that were removed there in
the last minute, up to 0.3 us each and 8,192 of them. The directories are in groups of their own."""

STAGED_CHUNKS_MAX = 4096
"""Staging files open in one chunk server, a descriptor each."""

PUBLISH_TOGETHER_MAX = 32
"""Chunks that come in over one connection and wait for the disk together. Each is an open file
until then, and no more connections receive at a time than there are buffers (SERVER_BUFFERS: 512
files), where many systems allow a process 1,024."""

BATCH_SYNC_THREADS = 8
"""Syncs of a batch that wait together on one target. 32 files and as many directories, on ext4 on a
disk whose flush takes 3 ms: one thread 195 ms, four 10, eight 8, more no less."""

UNSEALED_CHUNKS_MAX = 65_536
"""Chunks that one connection wrote to and did not seal: 1 TiB of files. The oldest is sealed (or
left open, if it still has a writer) to make room."""

VERIFIED_CHUNKS_MAX = 65_536
"""Chunks a server remembers to have verified since its start, about 200 bytes each."""

KEPT_FILES_MAX = 8192
"""Files of whole chunks that a server keeps open for the next reader, of all its targets together
(and at most a quarter of the descriptors that it may have): some 2 KiB each, half of it the
kernel's."""

REMOVE_BY_NAME_MAX = 4096
"""A removal of more chunks than this lists the directory instead of trying every name."""

CLIENT_THREADS = 32
CLIENT_THREADS_PER_TARGET = 8
"""Requests that a chunk client has in flight, in all and to one target: a target that hangs holds
up no more than its own. Eight O_DIRECT reads of 1 MiB or more saturate an NVMe disk (fio)."""

CLIENT_IDLE_CONNECTIONS = CLIENT_THREADS_PER_TARGET
"""Kept per address between requests."""

CLIENT_SPLIT_BYTES = 1 * MIB
"""A batch is spread over threads in portions of at least this: below, the cost of a request (about
50 us) is more than what a further thread gains."""

SUM_BYTES = 2 * MIB
"""Bytes that are received before their checksum is computed: most are still in a cache of the
processor, and the sender goes on meanwhile (the socket's buffer is larger). A thread gives up the
interpreter's lock twice for each, and whoever finds it taken on coming back sleeps: with 512 KiB,
eight threads of a processor with many cores did little else. The next request leaves before the
last of these, 0.6 ms before the end at 3 GB/s a connection."""

SMALL_SUM_BYTES = 64 * KIB
"""Chunks of up to this size are summed without giving up the interpreter's lock: 2 to 4 us, where
getting it back from seven other threads that sum as many takes longer."""

DATA_SECONDS = 10.0
DATA_BYTES_PER_SECOND = 1 * MIB
"""A data request has DATA_SECONDS, and as long as its bytes take at this rate: 18 s for
TRANSFER_BYTES. A disk that does not reach it is as good as none."""

CHAIN_CONNECT_SECONDS = 1.0
"""A connection to one of several replicas: a host that is gone does not even refuse."""

CHAIN_READ_SECONDS = 2.0
"""How long a reader goes round the replicas of a chain while all of them only fail for now: a
change of the chain takes a heartbeat. Who reads files waits longer (FILE_RETRY_SECONDS)."""

CHAIN_WRITE_SECONDS = 15.0
"""How long a writer waits for a chain that has lost a member: TARGET_LEASE_SECONDS until it is left
out, two heartbeats until the others know, and as much again."""

CHAIN_PAUSE_SECONDS = 0.02
CHAIN_PAUSE_SECONDS_MAX = 0.5
"""Pauses between rounds through a chain: each is up to twice as long as the one before. Half of a
pause is drawn, so that clients do not come all at once."""

COMMIT_ATTEMPTS_MAX = 5
"""Commits of one put whose chains changed while it was written."""

AVOID_SECONDS = 1.0
AVOID_SECONDS_MAX = 16.0
"""A target that failed is asked last for so long; twice as long each time, until it answers."""

LATENCIES_KEPT = 64
LATENCIES_NEEDED = 8
"""Recent times of each target, from which the bound of the next read is learned."""

HEDGE_QUANTILE = 0.95
HEDGE_FACTOR = 2.0
HEDGE_SECONDS_MIN = 0.01
HEDGE_SECONDS_FIRST = 0.25
"""A portion that takes HEDGE_FACTOR times as long as this share of the recent ones did, by bytes,
is asked of another replica, too: seldom sooner than needed, and never before HEDGE_SECONDS_MIN. As
long as too few times are known: HEDGE_SECONDS_FIRST, and its bytes at HEDGE_BYTES_PER_SECOND."""

HEDGE_SECONDS_MAX = 1.0
HEDGE_BYTES_PER_SECOND = 32 * MIB
"""No bound is longer than HEDGE_SECONDS_MAX and the bytes at this rate: a target that is always
slow must not make that its measure."""

HEDGE_UNIT_BYTES = 256 * KIB
"""Smaller portions count as this: what they take does not depend on their bytes."""

HEDGES_AT_ONCE = 4
"""Each has a buffer of TRANSFER_BYTES: 32 MiB at worst. Larger portions are not asked twice."""

HEDGE_SHARE = 0.1
HEDGES_SAVED_MAX = 16.0
"""Every portion read earns this much of a hedge: all replicas being slow, a tenth more load. So
many may be saved up for the moment at which one target stops."""

HELPER_IDLE_SECONDS = 10.0
"""Threads that a client starts when it needs them (one watches slow reads, one reports bad
replicas) end when they had nothing to do for so long."""

REPAIRS_QUEUED_MAX = 256
REPAIRS_REMEMBERED_MAX = 4096
REPAIR_AGAIN_SECONDS = 60.0
"""A bad replica is reported once in this long, by a thread of its own; what does not fit into the
queue is found again by the next reader, or by the scrubber."""

STAT_AHEAD_CHUNKS = 16
"""Versions that a writer asks for when he comes to a chunk that he knows nothing of: a stream asks
once in so many chunks of a chain."""

VERSIONS_KEPT_MAX = 65_536
"""Chunks of one open file whose versions a writer remembers: 64 GiB, 100 bytes each."""

FILE_DESCRIPTORS_MAX = 512
"""Chunk descriptors one client keeps open for its files; half of the usual limit of 1,024."""

# --- node agent and its clients

AGENT_CONNECTIONS_MAX = 256
"""A connection costs the agent a thread and a connection to the metadata service."""

CLIENT_CONNECTIONS_MAX = 8
"""Calls that one Client has in flight; further threads wait. The agent's work is disk reads, which
eight requests keep busy, and one more connection holds the session."""

STAGING_BYTES = BLOCK_BYTES_MAX
"""Staging area of one client by default: the largest block fits. Pages are allocated on touch, so a
client that never stages more than 8 MiB at a time costs 8 MiB."""

STAGING_ROUND_BYTES = 4 * TRANSFER_BYTES
"""A put goes to the agent in rounds of about this, so that the client copies one round while the
agent writes the one before."""

AGENT_WRITE_THREADS = 8
"""Portions of puts (TRANSFER_BYTES each) that an agent copies, sums and writes side by side,
besides one in the thread of each connection: two rounds of four."""

LEASES_PER_CLIENT_MAX = 65_536
"""Batches a client may hold at once: bytes of its lease board. A lease of one block costs the agent
about 200 bytes."""

PUTS_PER_CLIENT_MAX = 64
"""Prepared batches a client may have open: its connections, and what it left unfinished."""

AGENT_CALL_SECONDS = 60.0
"""A batch of 4,096 blocks of 2 MiB, read at 150 MB/s, takes this long; what takes longer is better
recomputed."""

LOAD_WAIT_SECONDS = 30.0
"""How long a get waits for another client's load of the same block before it counts a miss."""

DOMAIN_CHARS_MAX = 255
"""Names of hosts and racks: as long as a name in the DNS."""

TARGET_UUID_CHARS_MAX = 128
"""It is part of a key of the metadata store; LMDB's keys end at 511 bytes."""

FILE_RETRY_SECONDS = 5.0
FILE_RETRY_PAUSE_SECONDS = 0.1
"""Reads and writes of ordinary files wait this long for a chunk server that is being restarted
(a supervisor needs about one second) before a program sees EIO. Blocks do not: they miss."""

SEAL_CHUNKS_PER_REQUEST = 32
"""512 MiB to checksum: 0.1 s from the page cache, a few seconds from a slow disk, well within
CALL_SECONDS."""

# --- GPU loader

LOADER_GROUP_BYTES = 64 * MIB
"""What a load asks its source for at first: about 1 ms of the link, 10 ms of a fast disk."""

LOADER_ANSWER_BLOCKS = 256
"""A load of so many blocks that lie in memory is one request: the answer takes 1 ms, and all layers
can be queued behind it. Of a longer one the link gets LOADER_MEMORY_FIRST_BYTES first."""

LOADER_MEMORY_FIRST_BYTES = 128 * MIB
"""2.4 ms of the link: the next answer, and its way to the device, take 1.5 ms."""

LOADER_MEMORY_GROUP_BYTES = 2 * GIB
"""What is asked for at once where blocks come from memory: 40 ms of the link, which is what a load
loses if they come from a disk after all, since nothing is copied before the last one is there."""

LOADER_QUIET_SECONDS = 0.003
"""A load is quiet for this long behind its first layers, unless somebody waits for more: who queues
a model is about to queue its first layer, which the device waits for, and would take turns with
the thread that describes copies."""

LOADER_FIRST_RUN_BYTES = 16 * MIB
LOADER_RUN_BYTES = 128 * MIB
LOADER_RUN_LAYERS = 4
"""The first layer is queued by itself, the others in runs of four: a model computes a layer for
longer than it is copied. Describing a run, and the event behind it, takes 0.1 ms, and 0.2 beside a
thread that queues a model and is held up meanwhile. So the first run is no shorter than 0.3 ms of
the link, and the others no shorter than 2.4."""

STAGING_SLOT_BYTES = 64 * MIB
STAGING_SLOTS = 3
"""Memory of a GPU that pieces of pages pass through: 1.2 ms of the link each, so that the copy
engine goes on while a kernel that scatters one waits behind those that compute."""

LAYOUTS_KEPT = 16
"""Layouts of paged caches whose tables a GPU keeps; a few KB each. An engine has one or two."""

LOADER_WINDOW_GROUPS = 4
"""A group of a load that is larger than its window takes at most this part of it: its room comes
back when all of it has been copied, and meanwhile the next ones must be there."""

LOADER_FAST_BYTES_PER_SECOND = 20_000_000_000
LOADER_FAST_SECONDS = 0.002
"""A fetch that takes no longer than this rate and these seconds came from memory: an answer of the
agent takes 0.4 ms and 3 us a block, whatever its size; the fastest disks read 14 GB/s."""

LOADER_QUEUED_BYTES = 128 * MIB
"""Copies of whole blocks that a load queues ahead (2.4 ms at 55 GB/s): enough to keep the link busy
while the rest is being fetched, and soon over when the rest can go layer by layer."""

LOADER_QUEUED_FACTOR = 2
"""As long as there are blocks that no fetch was begun for, layers are far away, and this many times
as much is queued: the copy engine takes a description of 64 KiB as fast as it is written."""

LOADER_FETCH_THREADS = 3
"""Requests to the source in flight: one is answered while the next one waits for the disk."""

LOADER_JOBS_MAX = 4096
"""Loads and stores that one loader has accepted and not finished; about 1 KiB each."""

LOADER_WINDOW_SHARE = 2
"""A load holds at most this fraction (1/2) of the arena or ring leased at a time."""

RING_BYTES = 512 * MIB
"""Pinned memory of a loader's stores by default: eight groups."""

READ_THREADS = 16
"""O_DIRECT reads that a file source has in flight; each takes READ_BYTES at a time."""

CACHED_READ_BYTES = 4 * MIB
"""Of a file in the page cache: a read is a copy then, of 0.1 ms for 1 MiB, and the threads of one
interpreter wait for their turns longer than that (7.7 GB/s; with 4 MiB 21)."""

READ_BYTES = 1 * MIB
"""Sixteen reads of 1 MiB are what a virtual NVMe disk needs; larger ones end at different times."""

CHECK_THREADS = 4
"""A core sums about 5 GB/s: four keep up with the fastest disks, and no read waits for them."""

DIRECT_FILES_MAX = 256
"""Files that a direct reader keeps open: two descriptors each."""
