"""Targets that leave the cluster: draining ones, removed ones, and the memory of those.

A target can be drained (nothing new is placed on it, ``draining.py`` empties its chains of one
copy, ``membership.py`` brings its places in others to somebody else) and removed. Removed ones are
remembered (``GONE``): a server that was away does not bring them back.
"""

from __future__ import annotations

from functools import partial

import msgspec

from kvfs_base.cluster import TargetState
from kvfs_base.errors import TargetInUse, TargetUnknown
from kvfs_metadata import records
from kvfs_metadata.cluster.chains import ChainTable, MapVersion
from kvfs_metadata.cluster.membership import Membership
from kvfs_metadata.cluster.removals import Removals
from kvfs_metadata.cluster.targets import TargetEntry, TargetTable
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.limits import REMOVED_TARGETS_MAX
from kvfs_metadata.records import GoneRecord
from kvfs_metadata.transaction import Tx


class Departures:
    def __init__(
        self,
        read: KVRead,
        version: MapVersion,
        *,
        targets: TargetTable,
        chains: ChainTable,
        membership: Membership,
        removals: Removals,
    ) -> None:
        self._version = version
        self._targets = targets
        self._chains = chains
        self._membership = membership
        self._removals = removals
        self.gone: dict[str, GoneRecord] = {}
        self.sweep_wanted = read.get(records.SWEEP_KEY) is not None
        """Something may refer to targets that were removed."""

    def apply(self, uuid: str, value: bytes | None) -> None:
        """Another server committed it, or it is loaded."""
        if value is None:
            self.gone.pop(uuid, None)
        else:
            self.gone[uuid] = records.decode_gone(value)

    # --- draining

    def has_departures(self) -> bool:
        """Whether there is, or may be, anything that is to leave a target."""
        return self.sweep_wanted or any(
            entry.record.draining and not entry.record.drained for entry in self._targets
        )

    def leaving_chains(self) -> tuple[set[int], set[int]]:
        """Chains of one copy of draining targets, and those of them that keep their blocks."""
        draining: set[int] = set()
        keeping: set[int] = set()
        for entry in self._targets:
            if entry.record.draining:
                draining.update(self._chains.single(entry.target_id))
                if entry.record.keep_blocks:
                    keeping.update(self._chains.single(entry.target_id))
        return draining, keeping

    def set_draining(self, tx: Tx, target_id: int, on: bool, keep_blocks: bool) -> None:
        """Raises TargetUnknown."""
        entry = self._targets[target_id]
        keep_blocks = on and keep_blocks
        before = entry.record
        if (before.draining, before.keep_blocks) != (on, keep_blocks):
            record = msgspec.structs.replace(
                before, draining=on, keep_blocks=keep_blocks, drained=False
            )
            self._targets.put(tx, entry, record)

    def set_drained(self, tx: Tx, target_id: int) -> None:
        entry = self._targets[target_id]
        self._targets.put(tx, entry, msgspec.structs.replace(entry.record, drained=True))

    # --- removal

    def remove(self, tx: Tx, target_id: int, *, force: bool) -> None:
        """Raises TargetUnknown, TargetInUse."""
        self._targets.expire()
        entry = self._targets[target_id]
        if not force:
            self._require_empty(entry)
        self._membership.remove(tx, entry)
        for chain_id in self._chains.single(target_id):
            self._chains.put(tx, chain_id, None)
        tx.kv.delete(records.target_key(entry.uuid))
        tx.kv.delete(records.beat_key(target_id))
        self._version.record(tx)
        self._removals.drop(tx, target_id)
        self._set_sweep(tx, True)
        self._remember(tx, entry)
        self._targets.remove(entry)
        self._targets.departures += 1
        tx.undo.append(partial(self._bring_back, entry))
        self._membership.settle(tx)  # others take its places at once

    def _require_empty(self, entry: TargetEntry) -> None:
        record = entry.record
        if not record.draining:
            raise TargetInUse(target_id=record.target_id, detail="it is not draining")
        if self._chains.replicated(record.target_id):
            raise TargetInUse(target_id=record.target_id, detail="chains of several copies need it")
        if not record.drained:
            raise TargetInUse(target_id=record.target_id, detail="it is not empty")
        removals = self._removals.pending(record.target_id)
        if removals and entry.state is not TargetState.OFFLINE:
            detail = "it has chunks to remove from its disk"
            raise TargetInUse(target_id=record.target_id, removals=removals, detail=detail)

    def _bring_back(self, entry: TargetEntry) -> None:
        self._targets.add(entry)
        self._targets.departures += 1

    def _remember(self, tx: Tx, entry: TargetEntry) -> None:
        record = GoneRecord(entry.target_id, entry.record.server_id, tx.now_ns)
        tx.kv.put(records.gone_key(entry.uuid), records.encode(record))
        self.gone[entry.uuid] = record
        tx.undo.append(partial(self.gone.__delitem__, entry.uuid))
        while len(self.gone) > REMOVED_TARGETS_MAX:
            self._forget(tx, min(self.gone, key=lambda uuid: self.gone[uuid].removed_ns))

    def _forget(self, tx: Tx, uuid: str) -> None:
        tx.kv.delete(records.gone_key(uuid))
        tx.undo.append(partial(self.gone.__setitem__, uuid, self.gone.pop(uuid)))

    def admit(self, tx: Tx, uuid: str) -> None:
        """A removed target may register again. Raises TargetUnknown."""
        if uuid not in self.gone:
            raise TargetUnknown(name=uuid)
        self._forget(tx, uuid)

    # --- what they leave behind

    def swept(self, tx: Tx) -> None:
        """Nothing refers to removed targets but files that lost data."""
        self._set_sweep(tx, False)

    def _set_sweep(self, tx: Tx, wanted: bool) -> None:
        if wanted:
            tx.kv.put(records.SWEEP_KEY, b"")
        else:
            tx.kv.delete(records.SWEEP_KEY)
        tx.undo.append(partial(setattr, self, "sweep_wanted", self.sweep_wanted))
        self.sweep_wanted = wanted
