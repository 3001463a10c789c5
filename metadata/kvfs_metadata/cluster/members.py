"""Who is a member of a chain: the table of docs/design/0004-chains.md.

Each function takes a chain and answers with the chain as it is after an event; it is the same
object where nothing changes. Nothing here knows of time or of the store: ``membership`` decides
which event has happened.
"""

from __future__ import annotations

import msgspec

from kvfs_base.limits import HOPS_MAX
from kvfs_metadata.records import ChainRecord


def lost(chain: ChainRecord, target_id: int) -> ChainRecord:
    """A member may miss something from now on, and it answers nobody: its lease is over, its disk
    failed, or it was fenced. The only one that serves stays: it has the newest data, and all wait
    for it."""
    if target_id in chain.targets and len(chain.targets) > 1:
        # It had everything just now, so it comes before those that are away for longer.
        return _changed(
            chain,
            targets=_without(chain.targets, target_id),
            offline=(target_id, *chain.offline),
            served=(target_id, *_without(chain.served, target_id)),
        )
    if target_id in chain.syncing:
        return _changed(
            chain,
            syncing=_without(chain.syncing, target_id),
            offline=(*chain.offline, target_id),
        )
    return chain


def restarted(chain: ChainRecord, target_id: int) -> ChainRecord:
    """A member's process is another one. If it is the only one that serves it stays, but those that
    it was bringing in step may have updates that it lost: they begin again."""
    if chain.targets == (target_id,) and chain.syncing:
        return _changed(chain)
    return lost(chain, target_id)


def returned(chain: ChainRecord, target_id: int) -> ChainRecord:
    """A member that was away was heard of."""
    if target_id not in chain.offline or not has_place(chain):
        return chain
    return _changed(
        chain,
        syncing=(*chain.syncing, target_id),
        offline=_without(chain.offline, target_id),
    )


def synced(chain: ChainRecord, version: int, source: int, target_id: int) -> ChainRecord:
    """``source`` says that a member is in step under ``version``. Only the last one that serves can
    know, and only of the present version."""
    if version != chain.version or target_id not in chain.syncing:
        return chain
    if not chain.targets or source != chain.targets[-1]:
        return chain
    return _changed(
        chain,
        targets=(*chain.targets, target_id),
        syncing=_without(chain.syncing, target_id),
        served=_without(chain.served, target_id),
    )


def joined(chain: ChainRecord, target_id: int) -> ChainRecord:
    """Another target is to have a copy."""
    if target_id in chain.everybody or not has_place(chain):
        return chain
    return _changed(chain, syncing=(*chain.syncing, target_id))


def left(chain: ChainRecord, target_id: int) -> ChainRecord:
    """A member answers nobody any more and is not to come back. The only one that serves stays."""
    if target_id not in chain.everybody or chain.targets == (target_id,):
        return chain
    return _changed(chain, **_all_without(chain, target_id))


def replaced(chain: ChainRecord, target_id: int, other: int) -> ChainRecord:
    """``other`` takes the place of a member that is away."""
    if target_id not in chain.offline or other in chain.everybody or not has_place(chain):
        return chain
    return _changed(
        chain,
        syncing=(*chain.syncing, other),
        offline=_without(chain.offline, target_id),
        served=_without(chain.served, target_id),
    )


def removed(chain: ChainRecord, target_id: int) -> ChainRecord | None:
    """A member is gone for good, by force. If it was the only one that served, the one that served
    last before it does, be it away or being brought in step; or else one that never did: data may
    be lost. None: nobody is left."""
    if target_id not in chain.everybody:
        return chain
    found = _changed(chain, **_all_without(chain, target_id))
    if found.targets:
        return found
    others = found.served + found.offline + found.syncing
    if not others:
        return None
    heir = others[0]
    return msgspec.structs.replace(
        found,
        targets=(heir,),
        syncing=_without(found.syncing, heir),
        offline=_without(found.offline, heir),
        served=_without(found.served, heir),
    )


def has_place(chain: ChainRecord) -> bool:
    """Writes pass a bounded number of members."""
    return len(chain.targets) + len(chain.syncing) < HOPS_MAX


def _all_without(chain: ChainRecord, target_id: int) -> dict[str, tuple[int, ...]]:
    return {
        name: _without(getattr(chain, name), target_id)
        for name in ("targets", "syncing", "offline", "served")
    }


def _without(members: tuple[int, ...], target_id: int) -> tuple[int, ...]:
    return tuple(member for member in members if member != target_id)


def _changed(chain: ChainRecord, **members: tuple[int, ...]) -> ChainRecord:
    return msgspec.structs.replace(chain, version=chain.version + 1, **members)
