"""Looks at chains all the time. In the map that clients are given versions only grow, and a version
means one thing. In the store no member leaves a chain that is not whole without it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from kvfs_base.cluster import Chain
from kvfs_base.errors import KvfsError
from kvfs_metadata import records
from kvfs_metadata.engines.engine import KVRead, Writes
from kvfs_metadata.records import ChainRecord
from sim import bounds, replicas
from sim.cluster import ClientHost
from sim.hub import SimulationFailed

if TYPE_CHECKING:
    from sim.world import World

LOOK_SECONDS = 0.7


class Observer:
    """A client that nothing happens to, but that the network may be cut."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.host = ClientHost(world.site, "observer")
        self._chains: dict[int, Chain] = {}

    def start(self) -> None:
        self.host.start()
        self.host.process.start(self._run, name="observer")

    def _run(self) -> None:
        while not self._world.enough:
            self._world.hub.sleep(LOOK_SECONDS)
            found = bounds.exceeded(self._world) + replicas.missing_blocks(self._world)
            if found:
                raise SimulationFailed("\n".join(found))
            with contextlib.suppress(KvfsError):
                for chain in self.host.map().chains:
                    self._look(chain)

    def watch(self, before: KVRead, writes: Writes) -> None:
        """What is about to be recorded."""
        for key, value in writes.items():
            old = before.get(key) if key.startswith(records.CHAIN) else None
            if old is not None and value is not None:
                self._compare(records.decode_chain(old), records.decode_chain(value))

    def _compare(self, old: ChainRecord, new: ChainRecord) -> None:
        left = {*old.targets, *old.syncing} - {*new.everybody, *self._world.keeper.lost}
        if left and len(new.targets) < new.copies:
            self._world.hub.fail(f"targets {left} left a chain early: it was {old}, is {new}")

    def _look(self, chain: Chain) -> None:
        before = self._chains.get(chain.chain_id, chain)
        same = chain.version == before.version
        if self._world.metadata_went_back:
            pass  # a store that forgets goes back; what it forgot must not have been told
        elif chain.version < before.version or (same and chain != before):
            raise SimulationFailed(f"a chain was {before} and is now {chain}")
        if chain != before or chain.chain_id not in self._chains:
            self._world.hub.trace("chain", *chain.__reduce__()[1])
        self._chains[chain.chain_id] = chain
