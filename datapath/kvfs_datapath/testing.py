"""A metadata service of heartbeats only, for tests of chunk servers and clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvfs_base import frames, threads
from kvfs_base.cluster import (
    Chain,
    ClusterMap,
    FindUnwanted,
    GetClusterMap,
    Heartbeat,
    HeartbeatReply,
    Removal,
    Synced,
    Target,
    TargetOrders,
    TargetReport,
    TargetState,
)
from kvfs_base.errors import ConnectionLost, KvfsError
from kvfs_base.frames import Kind
from kvfs_base.rpc import receive_frame
from kvfs_base.seams import Connection, Env, Listener
from kvfs_base.types import Address

WAIT_SECONDS = 60.0


class FakeMetadata:
    """Answers heartbeats, numbers targets from 1 and gives each a chain of its own (of the same
    number), and is the ClusterSource of clients in the same process. Chains of several copies are
    as tests set them: nobody is taken out of one, or in, by itself."""

    def __init__(self, env: Env, address: Address) -> None:
        self._env = env
        self._condition = threads.condition()
        self._beats: dict[str, tuple[Heartbeat, TargetReport]] = {}
        self._numbers: dict[str, int] = {}
        self._removals: dict[str, list[Removal]] = {}
        self._offline: set[int] = set()
        self._removed: set[str] = set()
        self._fences: set[int] = set()
        self._replicated: dict[int, Chain] = {}
        self._unwanted: set[tuple[int, int]] = set()
        self._version = 1
        self._map = ClusterMap(1, (), ())
        self.refreshes = 0
        self.address = address
        self._listener: Listener | None = None
        self._connections: list[Connection] = []
        self._threads: list[threads.Thread] = []

    # --- life

    def start(self) -> None:
        """May be called again after ``stop``: what is known stays."""
        self._listener = self._env.blocking_network.listen(self.address)
        self.address = self._listener.address
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        assert self._listener is not None
        self._listener.close()
        with self._condition:
            connections, self._connections = self._connections, []
            running, self._threads = self._threads, []
        for connection in connections:
            connection.shutdown()
        for thread in running:
            thread.join()

    def _spawn(self, target: Callable[[Any], None], argument: object) -> None:
        thread = threads.thread(target, argument, name="kvfs-fake")
        with self._condition:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = listener.accept()
            except ConnectionLost:
                return
            with self._condition:
                self._connections.append(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        decoder = msgspec.msgpack.Decoder(Heartbeat | GetClusterMap | FindUnwanted)
        try:
            while True:
                frame = receive_frame(connection)
                reply = self._answer(decoder.decode(frame.body))
                connection.send([frames.encode(Kind.REPLY, frame.request_id, reply)])
        except KvfsError:
            connection.close()

    def _answer(self, request: Heartbeat | GetClusterMap | FindUnwanted) -> Any:
        if isinstance(request, Heartbeat):
            return self._beat(request)
        if isinstance(request, GetClusterMap):
            return self.current()
        with self._condition:
            return tuple(
                index
                for index, inode in enumerate(request.inodes)
                if (request.chain, inode) in self._unwanted
            )

    def _beat(self, beat: Heartbeat) -> HeartbeatReply:
        with self._condition:
            orders = []
            for report in beat.targets:
                if report.uuid in self._removed:
                    continue
                number = self._numbers.setdefault(report.uuid, len(self._numbers) + 1)
                self._beats[report.uuid] = (beat, report)
                queue = self._removals.setdefault(report.uuid, [])
                queue[:] = [r for r in queue if r.seq > report.removed_seq]
                fence = number in self._fences
                orders.append(TargetOrders(report.uuid, number, tuple(queue), fence))
            self._rebuild()
            self._condition.notify_all()
            refused = tuple(r.uuid for r in beat.targets if r.uuid in self._removed)
            return HeartbeatReply(self._version, tuple(orders), refused)

    def _rebuild(self) -> None:
        targets = []
        for uuid, number in self._numbers.items():
            if uuid not in self._beats:
                continue
            beat, report = self._beats[uuid]
            gone = number in self._offline or not report.healthy
            targets.append(
                Target(
                    target_id=number,
                    server_id=beat.server_id,
                    host_id=beat.host_id,
                    unix=beat.unix,
                    tcp=beat.tcp,
                    state=TargetState.OFFLINE if gone else TargetState.SERVING,
                    capacity_bytes=report.capacity_bytes,
                    free_bytes=0,
                )
            )
        chains = tuple(Chain(t.target_id, 1, (t.target_id,)) for t in targets)
        chains += tuple(self._replicated.values())
        if (tuple(targets), chains) != (self._map.targets, self._map.chains):
            self._version += 1
            self._map = ClusterMap(self._version, tuple(targets), chains)

    # --- what clients ask

    def current(self) -> ClusterMap:
        with self._condition:
            return self._map

    def refresh(self) -> ClusterMap:
        with self._condition:
            self.refreshes += 1
            return self._map

    # --- chains of several copies

    def set_chain(
        self,
        chain_id: int,
        targets: Sequence[int],
        syncing: Sequence[int] = (),
        offline: Sequence[int] = (),
    ) -> Chain:
        """Makes a chain, or gives one other members, under the next version."""
        with self._condition:
            known = self._replicated.get(chain_id)
            chain = self._replicated[chain_id] = Chain(
                chain_id,
                known.version + 1 if known is not None else 1,
                tuple(targets),
                copies=max(2, len(targets) + len(syncing) + len(offline)),
                syncing=tuple(syncing),
                offline=tuple(offline),
            )
            self._rebuild()
            return chain

    def order_fences(self, *numbers: int) -> None:
        """Answers to heartbeats tell these targets to stop, from now on; the others not."""
        with self._condition:
            self._fences = set(numbers)

    def call_unwanted(self, chain_id: int, *inodes: int) -> None:
        """Nothing refers to these any more."""
        with self._condition:
            self._unwanted.update((chain_id, inode) for inode in inodes)

    def suspects(self) -> set[int]:
        """Whom the servers named in their last heartbeats."""
        with self._condition:
            return {number for beat, _ in self._beats.values() for number in beat.suspects}

    def synced(self) -> set[Synced]:
        with self._condition:
            return {synced for beat, _ in self._beats.values() for synced in beat.synced}

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Until it is true, looked at after every heartbeat."""
        self._wait(condition)

    def beat(self, number: int) -> Heartbeat:
        """The last one of a target's server."""
        with self._condition:
            return next(self._beats[u][0] for u, n in self._numbers.items() if n == number)

    # --- what tests ask

    def take_offline(self, *numbers: int) -> None:
        """These targets are offline from now on, the others are not."""
        with self._condition:
            self._offline = set(numbers)
            self._rebuild()

    def remove(self, number: int) -> str:
        """The target is no part of the cluster any more; answers its uuid."""
        with self._condition:
            uuid = next(u for u, n in self._numbers.items() if n == number)
            self._removed.add(uuid)
            del self._beats[uuid]
            self._rebuild()
            return uuid

    def admit(self, uuid: str) -> None:
        """It may register again, under a new number."""
        with self._condition:
            self._removed.discard(uuid)
            self._numbers[uuid] = len(self._numbers) + 1
            self._removals[uuid] = []

    def wait_for_targets(self, count: int) -> None:
        self._wait(lambda: len(self._map.targets) >= count)

    def wait_for_beats(self, count: int) -> None:
        """Until every target has sent ``count`` more heartbeats."""
        for uuid in list(self._beats):
            for _ in range(count):
                before = self._beats[uuid][0]
                self._wait(lambda u=uuid, b=before: self._beats[u][0] is not b)

    def report(self, number: int) -> TargetReport:
        """The last one of a target."""
        with self._condition:
            return next(self._beats[u][1] for u, n in self._numbers.items() if n == number)

    def order_removals(
        self, number: int, ranges: Sequence[tuple[int, int, int]], chain: int = 0
    ) -> int:
        """Queues (inode, first, end); answers the last sequence number."""
        with self._condition:
            uuid = next(u for u, n in self._numbers.items() if n == number)
            queue = self._removals[uuid]
            seq = max([self._beats[uuid][1].removed_seq, *(r.seq for r in queue)])
            for inode, first, end in ranges:
                seq += 1
                queue.append(Removal(seq, inode, first, end, chain))
            return seq

    def wait_for_removals(self, number: int, seq: int) -> None:
        """Until the target has reported ``seq`` as done."""
        uuid = next(u for u, n in self._numbers.items() if n == number)
        self._wait(lambda: self._beats[uuid][1].removed_seq >= seq)

    def wait_until_unhealthy(self, number: int) -> None:
        uuid = next(u for u, n in self._numbers.items() if n == number)
        self._wait(lambda: not self._beats[uuid][1].healthy)

    def _wait(self, condition: object) -> None:
        assert callable(condition)
        with self._condition:
            if not self._condition.wait_for(condition, WAIT_SECONDS):
                raise AssertionError("waited in vain for a heartbeat")
