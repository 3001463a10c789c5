"""Bounds that several packages share, with the arithmetic behind each. Those of one package are in
its own ``limits``."""

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

COPIES_MAX = 3
HOPS_MAX = 8
"""Members that a write passes: the copies, and those that are being brought in step."""

CHAIN_CHUNK_BYTES = 1 * MIB
"""Chunks of files with several copies: an overwrite copies its chunk (0.7 ms of CPU a copy)."""

SUSPECTS_MAX = 64
SYNCED_MAX = 256

UNWANTED_INODES_MAX = 4096
"""Chunks that a server asks about at once: 9 bytes each."""

REMOVALS_PER_HEARTBEAT = 4096
"""Chunks one heartbeat reply asks a server to remove: at 1 ms an unlink (ext4 with discard)
about 4 s of work, done outside the heartbeat."""

MOVES_AT_ONCE = 64
"""Blocks and files of one copy that a draining target has been told to move, 100 bytes each."""

# --- mount

MOUNT_IO_BYTES = 1 * MIB
"""The largest FUSE read or write: 256 pages, the kernel's own bound."""

MOUNT_UNPUSHED_BYTES = 4 * FILE_CHUNK_BYTES
"""A file that grew by this much tells the metadata service, so that after a crash no more than
this (and one write) lies unrecorded behind its end: that tail is cut before a hole is opened."""

CLOSED_TOGETHER_MAX = 1024
"""Files that one request closes: some milliseconds of the service's time if all were removed."""

# --- metadata

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

# --- data path

LIST_CHUNKS_MAX = 2048
"""Chunks in one page of a target's listing: 13 us of CPU each, 64 bytes each on the wire."""

CHECK_CHUNKS_PER_REQUEST = 32
"""Chunks that one request reads again from the disk: 512 MiB of file chunks, within CALL_SECONDS
at 20 MB/s. Large blocks are sent in smaller batches (CHECK_BYTES_PER_REQUEST)."""

CHECK_BYTES_PER_REQUEST = 512 * MIB

TARGETS_PER_SERVER_MAX = 64
"""What one Heartbeat can report. More disks than that want a second server anyway."""

ITEMS_PER_REQUEST_MAX = FDS_PER_MESSAGE_MAX
"""Chunks in one data request: as many as descriptors fit into one message."""

SERVER_CHECK_BYTES = 1 * MIB
"""Buffers in which a server computes checksums of chunks it already has. They are apart from the
receive buffers, so that stalled writers do not hold up readers."""

CLIENT_SPLIT_BYTES = 1 * MIB
"""A batch is spread over threads in portions of at least this: below, the cost of a request (about
50 us) is more than what a further thread gains."""

COMMIT_ATTEMPTS_MAX = 5
"""Commits of one put whose chains changed while it was written."""

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

USED_KEYS_BYTES_MAX = BATCH_BLOCKS_MAX * BLOCK_KEY_BYTES * 8
"""Keys whose uses an agent has yet to tell the metadata service: 1 MiB. More is told late anyway,
and only makes the oldest of them look unused."""

USES_TOLD_SECONDS = 2.0
"""Uses are told when nothing is revoked, every second, or after this long."""

WATCH_AGAIN_SECONDS = 0.5
"""Between two attempts of an agent to watch."""

LOAD_WAIT_SECONDS = 30.0
"""How long a get waits for another client's load of the same block before it counts a miss."""
