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

STRIPE_MAX = 16
"""Chains one file is striped over; the list is stored in the inode (2-5 bytes each)."""

FRAME_BODY_BYTES_MAX = 4 * MIB
"""Control part of a frame. The largest honest one is a directory page of 4,096 entries
of 255-byte names with attributes: about 1.7 MiB."""

FRAME_PAYLOAD_BYTES_MAX = 512 * MIB
"""Data part of a frame: twice the largest block."""

TRANSFER_BYTES = 8 * MIB
"""What one data request aims for: below 4 MiB the per-request cost (about 50 us) shows,
above 8 MiB nothing is gained and buffers grow."""

FDS_PER_MESSAGE_MAX = 250
"""The kernel's SCM_MAX_FD is 253."""

DIRECTORY_PAGE_ENTRIES = 1024

CONNECTIONS_MAX = 1024
"""Per server. A connection costs a thread (8 MiB of address space, about 30 KiB resident) on the
data path or a task (about 10 KiB) on the control path."""

CONNECT_SECONDS = 5.0
CALL_SECONDS = 30.0
"""A call without an answer by then fails with DeadlineExceeded: the mount never hangs."""

HEARTBEAT_SECONDS = 0.5
TARGET_LEASE_SECONDS = 3.0
"""A target that missed six heartbeats is offline: its blocks miss, new chunks go elsewhere."""

PREPARE_SECONDS_MAX = 120.0
"""A batch that was prepared and neither committed nor aborted by then belongs to a dead writer.
Writing 4,096 blocks of 8 MiB at 300 MB/s would take longer; clients split such batches."""

REMOVALS_PER_HEARTBEAT = 4096
"""Chunks one heartbeat reply asks a server to remove: at 1 ms an unlink (ext4 with discard)
about 4 s of work, done outside the heartbeat."""
