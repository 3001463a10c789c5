"""Bounds of the loader. Others share those in kvfs_base.limits."""

from __future__ import annotations

from kvfs_base.limits import GIB, MIB

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

LOADER_ANSWER_SECONDS = 0.001
"""Who starts a load whose blocks are all in memory waits so long for the answer (0.1 to 0.2 ms),
and queues the first layers: another thread would take turns with the one that queues a model."""

LOADER_QUIET_SECONDS = 0.003
"""A load is quiet for this long behind its first layers, unless somebody waits for more: who queues
a model is about to queue its first layer, which the device waits for, and would take turns with
the thread that describes copies. Who waits for more queues it."""

LOADER_AT_ONCE_BYTES = 64 * MIB
"""Runs are begun, before anybody waits, until so much is queued, 128 MiB with the last one of them:
2.4 ms of the link, until a model that is queued comes for its first layer."""

LOADER_FIRST_RUN_BYTES = 16 * MIB
LOADER_RUN_BYTES = 128 * MIB
LOADER_FIRST_RUN_LAYERS = 2
LOADER_RUN_LAYERS = 4
"""The first two layers are queued by themselves, the others in runs of four: a model computes a
layer for longer than it is copied. Describing a run, and the event behind it, takes 0.1 ms, and 0.2
beside a thread that queues a model and is held up meanwhile. So the first run is no shorter than
0.3 ms of the link, and the others no shorter than 2.4."""

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
