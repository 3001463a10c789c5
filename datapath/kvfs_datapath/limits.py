"""Bounds of the data path. Others share those in kvfs_base.limits."""

from __future__ import annotations

from kvfs_base.limits import KIB, MIB, TARGET_LEASE_SECONDS

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

SUSPECT_SECONDS = 2.0
"""A successor that cannot be reached for so long is reported."""

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

MOVE_THREADS = 4
"""Chunks that one target sends away at the same time."""

MOVE_END_TOGETHER = 16
"""Moves that are reported together: each report is a transaction."""

FILES_LEFT_MAX = 65_536
"""Files that a server remembers to have moved away, 100 bytes each."""

MOVE_PAUSE_SECONDS = 0.5
"""Before a target that has nothing to move for now asks again."""

STAGED_AHEAD = 32
"""Empty files of a target that a mount has at hand for new files, a descriptor and 1 KiB of the
server's each. One request asks for half of them, after an adoption rather than before one: at 6,000
new files a second, 375 requests."""

SEAL_TOGETHER_SECONDS = 0.1
SEAL_LATEST_SECONDS = 2.0
"""Staged files that were closed are sealed once none has been for so long, or the first of them has
waited for the second: to read all of them once more takes the cores and the memory from who is
still writing others. Whoever opens one meanwhile has it sealed then."""

STAGED_AHEAD_TARGETS_MAX = 64
"""Chains of one copy on this host that a mount asks empty files of: 2,048 descriptors at most."""

STAGED_AHEAD_RETRY_SECONDS = 10.0
"""How long a chain is taken to be elsewhere, or its server to be away, before it is looked at
again."""

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

SERVER_BUFFERS = 16
"""Receive buffers of TRANSFER_BYTES in one chunk server: 128 MiB at worst, whatever clients do.
A disk that takes 1 GB/s is kept busy by about three."""

SERVER_CHECK_BUFFERS = 4

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

READ_PIECE_BYTES = 1 * MIB
"""Of a chunk on a disk of this host: with longer reads the threads of a client are done with theirs
at the same time, and then none is under way (2.18 and 2.00 GB/s with chunks of 2 and 4 MiB, 2.32
and 2.23 by pieces)."""

CLIENT_IDLE_CONNECTIONS = CLIENT_THREADS_PER_TARGET
"""Kept per address between requests."""

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

DOMAIN_CHARS_MAX = 255
"""Names of hosts and racks: as long as a name in the DNS."""

FILE_RETRY_SECONDS = 5.0
FILE_RETRY_PAUSE_SECONDS = 0.1
"""Reads and writes of ordinary files wait this long for a chunk server that is being restarted
(a supervisor needs about one second) before a program sees EIO. Blocks do not: they miss."""

SEAL_CHUNKS_PER_REQUEST = 32
"""512 MiB to checksum: 0.1 s from the page cache, a few seconds from a slow disk, well within
CALL_SECONDS."""
