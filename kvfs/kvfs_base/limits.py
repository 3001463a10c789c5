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
so 64 MiB at worst."""

MOUNT_UNPUSHED_BYTES = 4 * FILE_CHUNK_BYTES
"""A file that grew by this much tells the metadata service, so that after a crash no more than
this (and one write) lies unrecorded behind its end: that tail is cut before a hole is opened."""

MOUNT_WRITE_BACK_SECONDS = 5.0
"""Sizes and times of files that stay open are recorded this often."""

MOUNT_REMEMBERED_INODES = 65_536
"""Inodes whose cached pages are known to be current, about 150 bytes each. One that was forgotten
only has its pages dropped when it is opened again."""

MOUNT_OPEN_FILES = 100_000
"""As many inodes as one Attach can name after a reconnect."""

MOUNT_BLOCK_BUFFER_BYTES = BLOCK_BYTES_MAX
"""Blocks of other hosts are held whole while they are read (a part cannot be verified): together
at most this much, or the one block that is being read."""

DIRECTORY_REPLY_ENTRIES = 256
"""Entries fetched for one readdir of the kernel at most: its buffer of 32 KiB holds about 180."""

DIRECTORY_RECENT_NAMES = 4096
"""Names a directory handle keeps as they are, about 0.5 MiB; the kernel steps back by less than one
reply. Older positions cost 8 bytes each."""
