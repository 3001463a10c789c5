"""The chains as they are recorded, in memory, and the version of the map that shows them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.records import ChainRecord
from kvfs_metadata.transaction import Tx


class MapVersion:
    """The upper half counts what was recorded, and is the same for all servers of a store; the
    lower half what only this server knows (who is silent, who is full).

    ``urgent`` is set by changes that must be on stable storage before anybody hears of them: a
    store that forgot one could let two sets of members serve."""

    def __init__(self, read: KVRead) -> None:
        self.urgent = False
        self._recorded = 0
        self._local = 0
        self.apply(read.get(records.MAP_KEY))

    def apply(self, value: bytes | None) -> None:
        self._recorded = 0 if value is None else int.from_bytes(value, "big")

    def __int__(self) -> int:
        return self._recorded << 32 | self._local

    @property
    def recorded(self) -> int:
        """Any map of this version or a later one shows everything that is recorded now."""
        return self._recorded << 32

    @property
    def next(self) -> int:
        """Nobody knows a map of this version before the next change is recorded."""
        return self._recorded + 1 << 32

    def changed(self) -> None:
        """Something that is not recorded."""
        self._local += 1

    def record(self, tx: Tx, *, at_least: int = 0) -> None:
        """Something is recorded in this transaction."""
        tx.undo.append(partial(self._take_back, self._recorded))
        self._recorded = max(self._recorded, at_least) + 1
        tx.kv.put(records.MAP_KEY, records.u64(self._recorded))

    def _take_back(self, recorded: int) -> None:
        self._recorded = recorded
        self._local += 1  # no version comes twice


class ChainTable:
    def __init__(self, version: MapVersion) -> None:
        self._version = version
        self._chains: dict[int, ChainRecord] = {}
        self._of_target: dict[int, set[int]] = {}

    def apply(self, chain_id: int, value: bytes | None) -> None:
        """Another server committed it, or it is loaded."""
        self._set(chain_id, None if value is None else records.decode_chain(value))

    def _set(self, chain_id: int, record: ChainRecord | None) -> None:
        before = self._chains.pop(chain_id, None)
        if before is not None:
            for target_id in before.everybody:
                self._of_target[target_id].discard(chain_id)
        if record is not None:
            self._chains[chain_id] = record
            for target_id in record.everybody:
                self._of_target.setdefault(target_id, set()).add(chain_id)

    def put(self, tx: Tx, chain_id: int, record: ChainRecord | None) -> None:
        """Records it; None: there is no such chain any more."""
        before = self._chains.get(chain_id)
        if record is None:
            tx.kv.delete(records.chain_key(chain_id))
        else:
            tx.kv.put(records.chain_key(chain_id), records.encode(record))
        self._version.record(tx)
        tx.undo.append(partial(self._set, chain_id, before))
        self._set(chain_id, record)
        if any(chain is not None and chain.is_replicated for chain in (before, record)):
            self._version.urgent = True

    def get(self, chain_id: int) -> ChainRecord | None:
        return self._chains.get(chain_id)

    def __getitem__(self, chain_id: int) -> ChainRecord:
        return self._chains[chain_id]

    def __contains__(self, chain_id: int) -> bool:
        return chain_id in self._chains

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._chains))

    def __len__(self) -> int:
        return len(self._chains)

    def of_target(self, target_id: int) -> list[int]:
        """Chains of which it is any kind of member."""
        return sorted(self._of_target.get(target_id, ()))

    def of_copies(self, copies: int) -> list[int]:
        return [chain_id for chain_id in self if self._chains[chain_id].copies == copies]

    def single(self, target_id: int) -> list[int]:
        """A target's chains of one copy."""
        return [c for c in self.of_target(target_id) if not self._chains[c].is_replicated]

    def replicated(self, target_id: int) -> list[int]:
        return [c for c in self.of_target(target_id) if self._chains[c].is_replicated]
