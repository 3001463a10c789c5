"""Numbers by which writers notice that what they wrote, and did not sync, may be gone.

A target gets another number when it is opened, unless the server before ended as it should, with
the disk in good health, and the machine is still up: then the kernel has what was written. A
process that was killed may have seen the disk fail; a machine that was started again has lost its
memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from kvfs_base.errors import KvfsError
from kvfs_base.types import U64
from kvfs_datapath.chunks.store import ChunkStore

log = logging.getLogger(__name__)

NOTE = "incarnation.json"


class _Note(msgspec.Struct, frozen=True):
    host_id: str
    """With the boot id of the machine."""
    number: U64
    ended: bool


def begin(store: ChunkStore, host_id: str, draw: Callable[[], int]) -> int:
    """The number of a target that was just opened."""
    number = 0
    try:
        before = msgspec.json.decode(store.read_note(NOTE), type=_Note)
        if before.ended and before.host_id == host_id:
            number = before.number
    except (KvfsError, msgspec.MsgspecError, UnicodeDecodeError):
        pass  # there is none, or it was torn
    number = number or draw()
    _write(store, _Note(host_id, number, ended=False))
    return number


def end(store: ChunkStore, host_id: str, number: int) -> None:
    """Nobody uses the target any more."""
    if store.healthy:
        _write(store, _Note(host_id, number, ended=True))


def _write(store: ChunkStore, note: _Note) -> None:
    try:
        store.write_note(NOTE, msgspec.json.encode(note))
    except KvfsError as exc:
        log.info("target %s: its incarnation is not noted: %s", store.uuid, exc)
