"""Bounds made tiny, so that a short run meets them: those of the packages' ``limits`` (and a few of
modules' own) wherever they are used."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import msgspec

from kvfs_base.limits import PAGE_BYTES, TRANSFER_BYTES
from kvfs_datapath import format

ALWAYS: dict[str, object] = {
    # Files of a few pages are striped, and what dead writers prepared goes within a run.
    "FILE_CHUNK_BYTES": 2 * PAGE_BYTES,
    "CHAIN_CHUNK_BYTES": 2 * PAGE_BYTES,
    "PREPARE_SECONDS_MAX": 20.0,
    "SESSION_GRACE_SECONDS": 12.0,
    # Chains are few and busy: each costs removals, comparisons and rounds of the collector.
    "STRIPE_MAX": 4,
    "CHAINS_PER_TARGET": 4,
}
SOMETIMES: dict[str, tuple[object, ...]] = {
    "SERVER_BUFFERS": (1, 2),
    "SERVER_CHECK_BUFFERS": (1,),
    "SERVER_CHECK_BYTES": (PAGE_BYTES,),
    "UNSEALED_CHUNKS_MAX": (1, 2),
    "LOCKS": (1, 2),
    "KEPT_FILES_MAX": (1, 2),
    "TICKETS": (1,),
    "VERIFIED_CHUNKS_MAX": (1, 2),
    "REMOVE_BY_NAME_MAX": (0, 1),
    "CLIENT_SPLIT_BYTES": (1, PAGE_BYTES),
    "CLIENT_THREADS_PER_TARGET": (1, 2),
    "ITEMS_PER_REQUEST_MAX": (1, 2),
    "CLIENT_IDLE_CONNECTIONS": (1,),
    "REMOVALS_PER_HEARTBEAT": (10, 40),
    "ONCE_SLOTS": (2,),
    "WRITE_GROUP_REQUESTS": (1, 2),
    "SYNC_PAGE_CHUNKS": (1, 2),
    "UNWANTED_INODES_MAX": (1, 2),
    "UNWANTED_REMEMBERED_MAX": (8, 32),
    "UPDATES_REMEMBERED_MAX": (2, 8),
    "SYNC_CAME_MAX": (2, 16),
    "SYNC_THREADS": (1,),
    "SYNC_BUFFERS": (1,),
    "PASS_BUFFERS": (1,),
    "PASS_CONNECTIONS": (1,),
    "SUSPECTS_MAX": (1,),
    "SYNCED_MAX": (1, 2),
    "STAGED_CHUNKS_MAX": (1, 2),
    "PUBLISH_TOGETHER_MAX": (1, 2),
    "PREPARED_BATCHES_MAX": (2, 4),
    "DRAIN_PAGE_RECORDS": (1, 3),
    "COLLECT_BATCH": (20,),
    "REPAIRS_QUEUED_MAX": (1,),
    "REPAIRS_REMEMBERED_MAX": (1,),
    "HEDGES_AT_ONCE": (1,),
    "LATENCIES_KEPT": (8,),
    "VERSIONS_KEPT_MAX": (1, 2),
    "STAT_AHEAD_CHUNKS": (1, 2),
    "REMOVED_TARGETS_MAX": (1,),
}
CHANCE = 0.25
DIRECTORIES = 4
"""Of each chain, instead of 256 that would be nearly empty and take most of the time."""
PACKAGES = ("kvfs_base.", "kvfs_datapath.", "kvfs_metadata.")


def _directory_of(inode: int, chain: int = 0) -> str:
    return f"{format.root_of(chain)}/{inode % DIRECTORIES:02x}"


def _defines_messages(module: ModuleType) -> bool:
    """Bounds of messages are what peers agreed on; a decoder keeps those of when it was made."""
    return any(
        isinstance(one, type) and issubclass(one, msgspec.Struct) and one.__module__ == name
        for name, one in ((module.__name__, value) for value in vars(module).values())
    )


@contextlib.contextmanager
def limits(
    rng: random.Random, *, short_sessions: bool = False, short_tails: bool = False
) -> Iterator[None]:
    """Some of them, by chance, for as long as a run takes. ``short_tails``: little may lie behind
    the end of a file, whose chunks are small here."""
    chosen = dict(ALWAYS)
    if short_sessions:
        chosen["SESSION_GRACE_SECONDS"] = 4.0
    if short_tails:
        chosen["MOUNT_UNPUSHED_BYTES"] = 4 * PAGE_BYTES
    # A chunk of a chain fits into a transfer.
    chosen["TRANSFER_BYTES"] = rng.choice((2 * PAGE_BYTES, 3 * PAGE_BYTES, TRANSFER_BYTES))
    for name, values in SOMETIMES.items():
        value = rng.choice(values)
        if rng.random() < CHANCE:
            chosen[name] = value
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(PACKAGES) and not _defines_messages(module)
    ]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name in sorted(chosen.keys() & vars(module).keys()):
                stack.enter_context(mock.patch.object(module, name, chosen[name]))
        for module in (format, *modules):
            for name, value in (("directory_of", _directory_of), ("DIRECTORIES", DIRECTORIES)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield
