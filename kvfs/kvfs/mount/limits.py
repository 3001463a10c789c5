"""Bounds of the mount. Others share those in kvfs_base.limits."""

from __future__ import annotations

from kvfs_base.limits import BLOCK_BYTES_MAX, FILE_CHUNK_BYTES, KIB

FILE_BYTES_MAX = FILE_CHUNK_BYTES << 32
"""Chunks are numbered with 32 bits: 64 PiB."""

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

PASSED_SETTLED_SECONDS = 0.05
"""How old a change has to be for a file's mtime to tell of the next one: several ticks of the clock
that times are taken from (4 ms, or 10)."""

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

MOUNT_LISTING_NAMES_MAX = 16_384
"""Names in one of them: a quarter of what a mount knows of inodes, and what it keeps packed. The
first reply waits for all of it, 16 calls of 5 ms."""

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

TAIL_POLL_SECONDS = 0.1
"""How often a mount asks again whether what lies behind the end of a file may be cut, or is cut by
now: each is one request, and seldom."""

TAIL_WAIT_SECONDS = 60.0
"""How long it goes on: longer than a session of a server that is gone too can take to end."""
