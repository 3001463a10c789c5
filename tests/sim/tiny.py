"""Bounds made tiny, so that a short run meets them. Each is changed where it is used."""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Iterator
from unittest import mock

from kvfs_base.limits import PAGE_BYTES, TRANSFER_BYTES

ALWAYS: dict[str, object] = {
    # Files of a few pages are striped, and what dead writers prepared goes within a run.
    "kvfs_metadata.namespace.FILE_CHUNK_BYTES": 2 * PAGE_BYTES,
    "kvfs_metadata.inodes.FILE_CHUNK_BYTES": 2 * PAGE_BYTES,
    "kvfs_metadata.blocks.PREPARE_SECONDS_MAX": 40.0,
    "kvfs_metadata.sessions.SESSION_GRACE_SECONDS": 12.0,
}
TRANSFERS = (
    # Both sides must agree on it.
    "kvfs_datapath.server.TRANSFER_BYTES",
    "kvfs_datapath.files.TRANSFER_BYTES",
)
SOMETIMES: dict[str, tuple[object, ...]] = {
    "kvfs_datapath.server.SERVER_BUFFERS": (1, 2),
    "kvfs_datapath.server.SERVER_CHECK_BUFFERS": (1,),
    "kvfs_datapath.server.SERVER_CHECK_BYTES": (PAGE_BYTES,),
    "kvfs_datapath.session.UNSEALED_CHUNKS_MAX": (1, 2),
    "kvfs_datapath.targets.UNSEALED_CHUNKS_MAX": (1, 2),
    "kvfs_datapath.store.LOCKS": (1, 2),
    "kvfs_datapath.store.VERIFIED_CHUNKS_MAX": (1, 2),
    "kvfs_datapath.store.REMOVE_BY_NAME_MAX": (0, 1),
    "kvfs_datapath.client.CLIENT_SPLIT_BYTES": (1, PAGE_BYTES),
    "kvfs_datapath.client.CLIENT_THREADS_PER_TARGET": (1, 2),
    "kvfs_datapath.client.ITEMS_PER_REQUEST_MAX": (1, 2),
    "kvfs_datapath.connections.CLIENT_IDLE_CONNECTIONS": (1,),
    "kvfs_metadata.removals.REMOVALS_PER_HEARTBEAT": (1, 2),
    "kvfs_metadata.client.ONCE_SLOTS": (2,),
    "kvfs_metadata.service.WRITE_GROUP_REQUESTS": (1, 2),
}
CHANCE = 0.25


@contextlib.contextmanager
def limits(rng: random.Random) -> Iterator[None]:
    """Some of them, by chance, for as long as a run takes."""
    chosen = dict(ALWAYS)
    transfer_bytes = rng.choice((PAGE_BYTES, 2 * PAGE_BYTES, TRANSFER_BYTES))
    chosen |= dict.fromkeys(TRANSFERS, transfer_bytes)
    for name, values in SOMETIMES.items():
        value = rng.choice(values)
        if rng.random() < CHANCE:
            chosen[name] = value
    with contextlib.ExitStack() as stack:
        for name, value in chosen.items():
            module, _, attribute = name.rpartition(".")
            imported = importlib.import_module(module)
            stack.enter_context(mock.patch.object(imported, attribute, value))
        yield
