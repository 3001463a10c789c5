"""A metadata service without a network: requests in, answers out, under a clock that stands."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from typing import Any

from kvfs_base.cluster import Heartbeat, HeartbeatReply, TargetReport
from kvfs_base.rpc import Request
from kvfs_base.testing import ManualClock
from kvfs_base.types import Address, Attr, KVLayout
from kvfs_metadata import messages as m
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.core import MetadataCore
from kvfs_metadata.engines.engine import scan
from kvfs_metadata.engines.memory_engine import MemoryEngine

ROOT = 1
FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
TERABYTE = 10**12
LAYOUT = KVLayout(block_tokens=16, model="test")


class Rig:
    def __init__(
        self,
        capacity_bytes: int = 0,
        *,
        targets: int = 1,
        grace_over: bool = True,
        engine: MemoryEngine | None = None,
        server: bytes = bytes(16),
        **config: Any,
    ) -> None:
        self.clock = ManualClock()
        self.engine = engine or MemoryEngine()
        self.server = server
        self.config = MetadataConfig(
            "unused", Address.unix("/unused"), capacity_bytes=capacity_bytes, **config
        )
        self.restart()
        if grace_over:
            self.clock.advance(31)
        self._targets = [f"target-{number}" for number in range(1, targets + 1)]
        self.advance(0)

    def restart(self) -> None:
        """A new process on the same store."""
        self.core = MetadataCore(self.engine, self.clock, self.config, server=self.server)

    def call(self, request: Request, connection: int = 1) -> Any:
        """The reply, or raises the error."""
        return self.calls([request], connection)[0]

    def calls(self, requests: Sequence[Request], connection: int = 1) -> list[Any]:
        if self.core.only_reads(requests):
            results = self.core.answer(requests)
        else:
            results = self.core.update([self.core.operation(connection, r) for r in requests])
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def advance(self, seconds: float) -> None:
        """Time passes, and every target is still there."""
        self.clock.advance(seconds)
        for uuid in self._targets:
            self.heartbeat(uuid)

    def work(self, seconds: float = 0.0, *, silent: bool = False) -> None:
        """Time passes, clients say something unless they are ``silent``, and the background work
        that is due then is done."""
        self.clock.advance(seconds)
        for connection in range(0 if silent else 10):
            self.core.sessions.heard(connection)
        for _ in range(3):
            for result in self.core.update(self.core.due()):
                assert not isinstance(result, BaseException), result

    def heartbeat(
        self,
        uuid: str = "target-1",
        *,
        capacity: int = TERABYTE,
        free: int = TERABYTE,
        healthy: bool = True,
        removed_seq: int = 0,
        server: str = "server-1",
        volume: str = "",
    ) -> HeartbeatReply:
        report = TargetReport(uuid, capacity, free, healthy, removed_seq, volume)
        return self.call(Heartbeat(server, "host-1", None, None, (report,)))

    # --- shorthands

    def make(self, parent: int, name: bytes, mode: int = FILE, **fields: Any) -> Attr:
        return self.call(m.Make(parent, name, mode, **fields))

    def mkdir(self, parent: int, name: bytes) -> int:
        return self.make(parent, name, DIRECTORY).inode

    def attr(self, inode: int) -> Attr:
        return self.call(m.GetAttr(inode))

    def resolve(self, path: bytes) -> Attr:
        return self.call(m.Resolve(path))

    def names(self, inode: int) -> list[bytes]:
        return [name for name, _ in self.call(m.ReadDir(inode)).entries]

    def namespace(self, path: str = "tenant/model", layout: KVLayout = LAYOUT) -> int:
        return self.call(m.OpenNamespace(path, layout, create=True)).inode

    def prepare(self, namespace: int, names: Sequence[int], size: int = 1000) -> m.PreparedBatch:
        return self.call(m.PrepareBlocks(namespace, keys(names), (size,) * len(names)))

    def commit(self, batch: m.PreparedBatch) -> None:
        count = sum(block is not None for block in batch.blocks)
        self.call(m.CommitBlocks(batch.batch_id, tuple(range(count))))

    def put(self, namespace: int, names: Sequence[int], size: int = 1000) -> m.PreparedBatch:
        batch = self.prepare(namespace, names, size)
        self.commit(batch)
        return batch

    def match(self, namespace: int, names: Sequence[int]) -> int:
        return self.call(m.MatchBlocks(namespace, keys(names)))

    def stored(self, namespace: int, names: Sequence[int]) -> list[int]:
        """Which of ``names`` are stored; not a use."""
        blocks = self.core.index.namespaces[namespace].blocks
        return [name for name in names if key(name) in blocks]

    def statistics(self) -> dict[str, int]:
        return self.call(m.Statistics())

    def removals(self, uuid: str = "target-1", removed_seq: int = 0) -> list[tuple[int, int]]:
        """(seq, inode) that the target is told to remove."""
        orders = self.heartbeat(uuid, removed_seq=removed_seq).targets[0]
        return [(removal.seq, removal.inode) for removal in orders.removals]

    def dump(self, prefix: bytes = b"") -> dict[bytes, bytes]:
        """What the store holds under ``prefix``."""
        if not prefix:
            return dict(self.engine.view(lambda kv: kv.range(b"", b"\xff", 100_000)))
        return dict(self.engine.view(lambda kv: list(scan(kv, prefix))))


def key(name: int) -> bytes:
    return hashlib.sha256(b"%d" % name).digest()


def keys(names: Sequence[int]) -> bytes:
    return b"".join(map(key, names))


def all_removals(rig: Rig, targets: int = 3) -> list[int]:
    """Inodes of all that the targets are told to remove."""
    return sorted(i for t in range(1, targets + 1) for _, i in rig.removals(f"target-{t}"))


def evict(rig: Rig) -> int:
    """What the service's background task does."""
    total = 0
    left = rig.core.excess_bytes()
    while left > 0:
        freed = rig.core.update([rig.core.eviction(left)])[0]
        if not freed:
            break
        total += freed
        left -= freed
    return total
