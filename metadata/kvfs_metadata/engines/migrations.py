"""Stores that older versions wrote: brought to this version's format when they are opened.

``METAformat`` says which format the records have. A step turns format N into N + 1 in transactions
of bounded size; N + 1 is written when the last of them is durable, so a step that was cut short
runs again from its beginning and must not mind what it did before. A store of a newer version is
refused and left alone.

Several servers that share a store may run a step at the same time, so each of its transactions
looks whether the store still has the format that it converts (``convert_all``). Servers of the
older version must be gone by then: nobody tells them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from kvfs_base.errors import VersionMismatch
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KEYS_END, KVEngine, KVTransaction, prefix_end, scan
from kvfs_metadata.engines.stores import unfinished, update

log = logging.getLogger(__name__)

Step = Callable[[KVEngine], None]
"""Turns one format into the next. May be run again, whole, at any point of a former run."""

Convert = Callable[[KVTransaction, bytes, bytes], None]
"""Changes one item; does nothing to one that was changed before."""

BATCH_ITEMS = 1024
"""In one transaction of a step: about 20 ms."""


def _length_of_queues(engine: KVEngine) -> None:
    """1 to 2: a queue's state holds its length beside its next number. SESS, OPEN, BEAT, SRVR, GONE
    and RSLT may be there from now on; nothing else changed."""
    convert_all(engine, 1, records.REMOVAL_STATE, _add_length)


def _add_length(txn: KVTransaction, key: bytes, value: bytes) -> None:
    if len(value) != 8:
        return
    removals = scan(txn, records.REMOVAL + key[4:])
    sizes = [int.from_bytes(removal[16:24], "little") for _, removal in removals]
    state = records.RemovalState(int.from_bytes(value, "big"), len(sizes), sum(sizes))
    txn.put(key, records.pack_removal_state(state))


def _several_copies(engine: KVEngine) -> None:
    """2 to 3: a removal names its chain, a heartbeat its number. Chains may have several copies,
    targets incarnations, directories a number of copies."""
    convert_all(engine, 2, records.REMOVAL, _add_chain)
    convert_all(engine, 2, records.BEAT, _add_number)


def _add_chain(txn: KVTransaction, key: bytes, value: bytes) -> None:
    if len(value) == 24:
        txn.put(key, value + bytes(4))


def _add_number(txn: KVTransaction, key: bytes, value: bytes) -> None:
    if len(value) == 9:
        txn.put(key, value + bytes(8))


def _quotas(engine: KVEngine) -> None:
    """3 to 4: QUOT may be there from now on, and an inode says what it counts for, and when it was
    made. Version 3 would drop that with the next change of the inode."""


STEPS: Mapping[int, Step] = {1: _length_of_queues, 2: _several_copies, 3: _quotas}


def migrate(
    engine: KVEngine,
    *,
    steps: Mapping[int, Step] = STEPS,
    newest: int = records.FORMAT_VERSION,
) -> None:
    """Raises VersionMismatch if the store is no metadata store or a newer version's. A store that
    is empty stays so."""
    found = _version(engine, newest)
    if found is None:
        return
    for version in range(found, newest):
        log.info("the store has format %d, converting it to %d", version, version + 1)
        steps[version](engine)
        engine.sync()
        update(engine, partial(_advance, version))
        engine.sync()


def check_format(text: bytes, newest: int = records.FORMAT_VERSION) -> int:
    """The version in the value of METAformat. Raises VersionMismatch if it is none that this kvfs
    reads."""
    number = text.removeprefix(records.FORMAT_PREFIX)
    if text.startswith(records.FORMAT_PREFIX) and number.isdigit() and 0 < int(number) <= newest:
        return int(number)
    raise VersionMismatch(
        detail="metadata store",
        found=text.decode(errors="replace"),
        expected=records.format_text(newest).decode(),
    )


def _version(engine: KVEngine, newest: int) -> int | None:
    """None: nothing was ever stored."""
    text, items, copy = engine.view(
        lambda read: (read.get(records.FORMAT_KEY), read.range(b"", KEYS_END, 1), unfinished(read))
    )
    if text is not None:
        return check_format(text, newest)
    if items:
        expected = records.format_text(newest).decode()
        raise VersionMismatch(
            detail=copy or "not a metadata store", found="none", expected=expected
        )
    return None


def _advance(version: int, txn: KVTransaction) -> None:
    # Another server may have been faster, by more than one step.
    if txn.get(records.FORMAT_KEY) == records.format_text(version):
        txn.put(records.FORMAT_KEY, records.format_text(version + 1))


def convert_all(engine: KVEngine, version: int, prefix: bytes, convert: Convert) -> None:
    """The usual step from format ``version``: calls ``convert`` for every item whose key starts
    with ``prefix``."""
    start: bytes | None = prefix
    while start is not None:
        start = update(engine, partial(_batch, version, prefix, start, convert))


def _batch(
    version: int, prefix: bytes, start: bytes, convert: Convert, txn: KVTransaction
) -> bytes | None:
    """Where to go on, or None."""
    if txn.get(records.FORMAT_KEY) != records.format_text(version):
        return None  # another server has done it all
    items = txn.range(start, prefix_end(prefix), BATCH_ITEMS)
    for key, value in items:
        convert(txn, key, value)
    return items[-1][0] + b"\x00" if len(items) == BATCH_ITEMS else None


__all__ = ["STEPS", "Convert", "Step", "check_format", "convert_all", "migrate"]
