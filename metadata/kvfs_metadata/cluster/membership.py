"""What happens to targets, and what that does to the chains that they are members of.

``members`` says how a chain changes with an event. Here is decided which events have happened: by
heartbeats, at once, and by the time that passes, in ``settle``, which the service calls now and
then if ``has_work``. Everything is decided and recorded in one transaction, so of several servers
on a store one decides, and the others follow. docs/design/0004-chains.md has the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import msgspec

from kvfs_base.cluster import Synced
from kvfs_base.errors import InvalidRequest, TargetInUse
from kvfs_metadata.cluster import members
from kvfs_metadata.cluster.chains import ChainTable
from kvfs_metadata.cluster.placement import Loads
from kvfs_metadata.cluster.placing import Placement
from kvfs_metadata.cluster.targets import TargetEntry, TargetTable
from kvfs_metadata.limits import REPLACE_SECONDS
from kvfs_metadata.records import ChainRecord, TargetRecord
from kvfs_metadata.transaction import Tx


class Membership:
    def __init__(self, targets: TargetTable, chains: ChainTable, placement: Placement) -> None:
        self._targets = targets
        self._chains = chains
        self._placement = placement

    # --- heartbeats

    def restarted(self, tx: Tx, entry: TargetEntry) -> None:
        """It has another incarnation, and serves nothing before it has seen a map."""
        self._change_all(tx, entry, members.restarted)
        self._unfence(tx, entry)

    def failed(self, tx: Tx, entry: TargetEntry) -> None:
        """Its disk, and it says so itself."""
        self._change_all(tx, entry, members.lost)
        self._unfence(tx, entry)

    def fenced(self, tx: Tx, entry: TargetEntry) -> None:
        """It says that it answers for no chain. That counts only while it is to be fenced: what it
        says otherwise, it said before it saw the present map. Where nobody else is there it stays,
        and serves again."""
        if not entry.record.is_to_be_fenced:
            return
        target_id = entry.target_id

        def step(chain: ChainRecord) -> ChainRecord:
            others = [other for other in chain.targets if other != target_id]
            if not any(map(self._targets.is_alive, others)):
                return chain  # who is away cannot serve in its place
            if entry.record.draining and self._is_whole_without(chain, target_id):
                return members.left(chain, target_id)
            return members.lost(chain, target_id) if entry.record.suspected else chain

        self._change(tx, self._serving(target_id), step)
        self._unfence(tx, entry, holds=True)

    def _unfence(self, tx: Tx, entry: TargetEntry, *, holds: bool = False) -> None:
        """It is out of the chains, or is not to leave them any more. A suspicion ``holds`` if it
        was there all the time: one that was away, or is another process now, was rightly not
        reached, and need not wait when it is back."""
        record = entry.record
        if record.is_to_be_fenced:
            held = record.suspected and holds
            count = self._targets.suspicions(entry) if held else record.suspicions
            self._replace(tx, entry, leaving=False, suspected=False, suspicions=count)

    def heard(self, tx: Tx, entry: TargetEntry) -> None:
        """What was missed while it was away can be brought to it, and nobody takes its place unless
        it is to leave."""
        target_id = entry.target_id
        if not entry.record.draining:
            for other in self._targets:
                if other.record.replaces == target_id:
                    self._replace(tx, other, replaces=0)
        if self._targets.may_return(target_id):
            self._change_all(tx, entry, members.returned)

    def synced(self, tx: Tx, reporters: Collection[int], reports: Iterable[Synced]) -> None:
        """``reporters`` are the targets of the server that says so."""
        for report in reports:
            chain = self._chains.get(report.chain_id)
            if chain is None or not chain.targets or chain.targets[-1] not in reporters:
                continue
            if self._targets.is_alive(report.target_id):
                step = partial(
                    members.synced,
                    version=report.version,
                    source=chain.targets[-1],
                    target_id=report.target_id,
                )
                self._change(tx, (report.chain_id,), step)

    def suspects(self, tx: Tx, reporters: Collection[int], suspects: Iterable[int]) -> None:
        """A server cannot reach targets that follow its own. Those that are being brought in step
        serve nobody and are out at once; others are to be fenced."""
        for target_id in suspects:
            entry = self._targets.get(target_id)
            if entry is None or target_id in reporters or entry.record.suspected:
                continue
            behind = [
                chain_id
                for chain_id in self._chains.replicated(target_id)
                if _is_behind(self._chains[chain_id], target_id, reporters)
            ]
            syncing = [c for c in behind if target_id in self._chains[c].syncing]
            if len(syncing) < len(behind):
                self._replace(tx, entry, suspected=True)
            elif syncing:
                self._replace(tx, entry, suspicions=self._targets.suspicions(entry))
            self._change(tx, syncing, partial(members.lost, target_id=target_id))

    # --- time

    def has_work(self) -> bool:
        return any(True for _ in self._steps()) or any(True for _ in self._target_steps())

    def settle(self, tx: Tx) -> None:
        """Everything that is due, one step of each chain."""
        for chain_id, chain in list(self._steps()):
            self._chains.put(tx, chain_id, chain)
        for entry, record in list(self._target_steps()):
            self._targets.put(tx, entry, record)

    def _steps(self) -> Iterable[tuple[int, ChainRecord]]:
        loads: dict[int, Loads] = {}
        dead = {e.target_id for e in self._targets if not self._targets.is_alive(e.target_id)}
        leaving = {e.target_id for e in self._targets if not e.is_settled}
        for chain_id in self._chains:
            chain = self._chains[chain_id]
            if not chain.is_replicated or _is_in_order(chain, dead | leaving):
                continue
            after = self._step(chain, loads)
            if after is not chain:
                yield chain_id, after

    def _step(self, chain: ChainRecord, loads: dict[int, Loads]) -> ChainRecord:
        """What the time that passed makes of a chain."""
        for target_id in sorted(chain.targets + chain.syncing, key=self._silent, reverse=True):
            if not self._targets.is_alive(target_id):
                chain = members.lost(chain, target_id)
        for target_id in chain.syncing + chain.offline:
            if self._is_superfluous(chain, target_id):
                chain = members.left(chain, target_id)
        for target_id in chain.offline:
            if self._targets.may_return(target_id):
                chain = members.returned(chain, target_id)
        for target_id in chain.offline:
            if self._is_to_be_replaced(target_id):
                other = self._stand_in(chain, target_id, loads)
                if other is not None:
                    chain = members.replaced(chain, target_id, other)
        for _ in range(chain.copies - self._staying(chain.everybody)):
            lost = next((m for m in chain.everybody if not self._stays(m)), 0)
            other = self._stand_in(chain, lost, loads)
            if other is None:
                break
            chain = members.joined(chain, other)
        return chain

    def _stand_in(self, chain: ChainRecord, lost: int, loads: dict[int, Loads]) -> int | None:
        if chain.copies not in loads:
            loads[chain.copies] = self._placement.loads(chain.copies)
        known = loads[chain.copies]
        found = self._placement.stand_in(chain, lost, known)
        if found is not None:
            known.joined(chain.everybody, found)
        return found

    def _is_superfluous(self, chain: ChainRecord, target_id: int) -> bool:
        """It is not needed, and nobody waits for it."""
        if not self._is_whole_without(chain, target_id):
            return False
        if not self._stays(target_id):
            return True
        return target_id in chain.offline and self._silent(target_id) >= REPLACE_SECONDS

    def _is_to_be_replaced(self, target_id: int) -> bool:
        if self._targets.is_alive(target_id):
            return False
        meant = any(entry.record.replaces == target_id for entry in self._targets)
        return meant or self._silent(target_id) >= REPLACE_SECONDS

    def _target_steps(self) -> Iterable[tuple[TargetEntry, TargetRecord]]:
        for entry in self._targets:
            record = self._target_step(entry)
            if record != entry.record:
                yield entry, record

    def _target_step(self, entry: TargetEntry) -> TargetRecord:
        """Fences that are called for, and those that have done their work or are not."""
        record, target_id = entry.record, entry.target_id
        if not self._targets.is_alive(target_id):
            held = record.suspected and self._targets.is_heard_of(entry)
            count = self._targets.suspicions(entry) if held else record.suspicions
            record = _with(record, leaving=False, suspected=False, suspicions=count)
        elif record.draining:
            serving = self._serving(target_id)
            ready = all(self._is_whole_without(self._chains[c], target_id) for c in serving)
            record = _with(record, leaving=bool(serving) and ready)
        elif record.leaving:
            record = _with(record, leaving=False)
        if record.replaces and not self._is_replacing(record.replaces):
            record = _with(record, replaces=0)
        return record

    def _is_replacing(self, lost: int) -> bool:
        """Whether there may be places of ``lost`` to take."""
        return self._targets.get(lost) is not None and bool(self._chains.replicated(lost))

    # --- targets that go

    def remove(self, tx: Tx, entry: TargetEntry) -> None:
        """It is no member of anything any more, by force. Raises TargetInUse while it may be
        answering readers: they must not be told old data."""
        target_id = entry.target_id
        if self._serving(target_id) and self._targets.is_alive(target_id):
            detail = "it serves chains of several copies: drain it, or stop its server first"
            raise TargetInUse(target_id=target_id, detail=detail)
        for chain_id in self._chains.replicated(target_id):
            self._chains.put(tx, chain_id, members.removed(self._chains[chain_id], target_id))

    def replace(self, tx: Tx, entry: TargetEntry, other: TargetEntry) -> None:
        """``other`` takes the places of ``entry``: at once where that is away, else while it is
        drained. Raises TargetInUse if it is neither."""
        if other is entry:
            raise InvalidRequest(detail="a target does not take its own places")
        if self._targets.is_alive(entry.target_id) and not entry.record.draining:
            detail = "it is there: drain it first"
            raise TargetInUse(target_id=entry.target_id, detail=detail)
        self._replace(tx, other, replaces=entry.target_id)

    def exchanged(self, server_id: str, named: Collection[str]) -> int:
        """A new target of a server: which one it stands for, because the server does not name that
        any more and nobody else has its places. 0: none."""
        taken = {entry.record.replaces for entry in self._targets}
        return min(
            (
                entry.target_id
                for entry in self._targets
                if entry.record.server_id == server_id
                and entry.uuid not in named
                and entry.target_id not in taken
                and self._chains.replicated(entry.target_id)
            ),
            default=0,
        )

    # --- asking

    def _serving(self, target_id: int) -> list[int]:
        """Chains of several copies that a target serves."""
        replicated = self._chains.replicated(target_id)
        return [c for c in replicated if target_id in self._chains[c].targets]

    def _is_whole_without(self, chain: ChainRecord, target_id: int) -> bool:
        others = [member for member in chain.targets if member != target_id]
        return self._staying(others) >= chain.copies

    def _staying(self, target_ids: Iterable[int]) -> int:
        return sum(map(self._stays, target_ids))

    def _stays(self, target_id: int) -> bool:
        entry = self._targets.get(target_id)
        return entry is not None and entry.is_settled

    def _silent(self, target_id: int) -> float:
        entry = self._targets.get(target_id)
        return float("inf") if entry is None else self._targets.silent_seconds(entry)

    def statistics(self) -> dict[str, int]:
        found = {"chains": len(self._chains), "chains_whole": 0, "chains_short": 0}
        found |= {"chains_unavailable": 0, "chains_syncing": 0}
        for chain_id in self._chains:
            chain = self._chains[chain_id]
            if not any(map(self._targets.is_alive, chain.targets)):
                found["chains_unavailable"] += 1
            elif len(chain.targets) < chain.copies:
                found["chains_short"] += 1
            else:
                found["chains_whole"] += 1
            found["chains_syncing"] += bool(chain.syncing)
        return found

    # --- recording

    def _change(
        self, tx: Tx, chain_ids: Iterable[int], step: Callable[[ChainRecord], ChainRecord]
    ) -> None:
        for chain_id in chain_ids:
            chain = self._chains[chain_id]
            after = step(chain)
            if after is not chain:
                self._chains.put(tx, chain_id, after)

    def _change_all(
        self, tx: Tx, entry: TargetEntry, step: Callable[[ChainRecord, int], ChainRecord]
    ) -> None:
        """Every chain that a target is a member of."""
        target_id = entry.target_id
        self._change(tx, self._chains.replicated(target_id), lambda chain: step(chain, target_id))

    def _replace(self, tx: Tx, entry: TargetEntry, **fields: Any) -> None:
        self._targets.put(tx, entry, _with(entry.record, **fields))


def _with(record: TargetRecord, **fields: Any) -> TargetRecord:
    return msgspec.structs.replace(record, **fields)


def _is_in_order(chain: ChainRecord, troubled: Collection[int]) -> bool:
    if chain.syncing or chain.offline or len(chain.targets) < chain.copies:
        return False
    return not any(target_id in troubled for target_id in chain.targets)


def _is_behind(chain: ChainRecord, target_id: int, others: Collection[int]) -> bool:
    """Whether writes come to a member from, at last, one of ``others``."""
    order = chain.targets + chain.syncing
    if target_id not in order:
        return False
    return any(member in others for member in order[: order.index(target_id)])
