"""A metadata service and its targets in memory, for damaging them: every chunk that the metadata
speaks of is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kvfs.fsck import Fsck, Report
from kvfs.fsck.sources import LocalStore
from kvfs_base.errors import ChunkCorrupt, ChunkNotFound, KvfsError
from kvfs_base.os_env import os_env
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo, ChunkState
from kvfs_datapath.messages import ListedChunk
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.check import fixes
from kvfs_metadata.check.findings import Finding
from kvfs_metadata.check.fsck import RecordReader
from kvfs_metadata.engines.engine import KVRead, scan
from t2_services.metadata_rig import DIRECTORY, FILE, ROOT, Rig, key

CHUNK = 16 << 20


class MemoryTargets:
    """Chunks by target. ``rotten`` are sealed chunks whose bytes have changed."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.chunks: dict[int, dict[ChunkId, ChunkInfo | str]] = {t: {} for t in targets}
        self.rotten: set[ChunkId] = set()
        self.unreachable: dict[str, str] = {}
        self.hidden: set[int] = set()
        self.before_look: Callable[[], None] = lambda: None

    def put(self, target_id: int, info: ChunkInfo) -> None:
        self.chunks[target_id][info.chunk] = info

    def listings(self) -> dict[int, Iterator[ListedChunk]]:
        return {
            target_id: iter([_listed(chunk, self.chunks[target_id]) for chunk in sorted(chunks)])
            for target_id, chunks in self.chunks.items()
            if target_id not in self.hidden
        }

    def look(self, target_id: int, chunks: Sequence[ChunkId]) -> list[ListedChunk]:
        self.before_look()
        held = self.chunks[target_id]
        return [_listed(chunk, held) for chunk in chunks if chunk in held]

    def recheck(
        self, target_id: int, chunks: Sequence[ChunkId]
    ) -> list[KvfsError | ChunkInfo | None]:
        found: list[KvfsError | ChunkInfo | None] = []
        for chunk in chunks:
            info = self.chunks[target_id].get(chunk)
            if info is None or isinstance(info, str):
                found.append(ChunkNotFound(*chunk))
            else:
                found.append(ChunkCorrupt(*chunk) if chunk in self.rotten else info)
        return found

    def repair(self, target_id: int, chunks: Sequence[ChunkId]) -> bool:
        """From another target that has them."""
        for chunk in chunks:
            others = [
                held[chunk] for t, held in self.chunks.items() if t != target_id and chunk in held
            ]
            good = [info for info in others if not isinstance(info, str)]
            if not good:
                return False
            self.chunks[target_id][chunk] = good[0]
            self.rotten.discard(chunk)
        return True


def _listed(chunk: ChunkId, held: dict[ChunkId, ChunkInfo | str]) -> ListedChunk:
    info = held[chunk]
    if isinstance(info, str):
        return ListedChunk(*chunk, info=None, problem=info)
    return ListedChunk(*chunk, info=info)


class ServiceStore:
    """The store as its service answers."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        page = self._rig.call(fixes.ScanRecords(start, end, limit))
        return list(page.items)

    def repair(self, wanted: Sequence[fixes.Fix], *, dry: bool) -> Sequence[fixes.Verdict]:
        return self._rig.call(fixes.RepairRecords(tuple(wanted), dry))


class World:
    """``mode`` is ``service`` (checked through the service) or ``store`` (behind its back)."""

    def __init__(self, mode: str, targets: int = 3) -> None:
        self.mode = mode
        self.rig = Rig(targets=targets)
        self.targets = MemoryTargets(range(1, targets + 1))
        self.inodes: dict[str, int] = {}

    # --- making

    def directory(self, path: str) -> int:
        return self._made(path, self.rig.make(*self._at(path), DIRECTORY).inode)

    def file(self, path: str, size: int, *, sparse: bool = False) -> int:
        """With all of its chunks, or none if it is ``sparse``."""
        attr = self.rig.make(*self._at(path), FILE)
        self.rig.call(m.SetAttr(attr.inode, size=size, sparse=sparse))
        assert attr.layout is not None
        if not sparse:
            for number in range(-(-size // CHUNK)):
                length = min(CHUNK, size - number * CHUNK)
                info = ChunkInfo(attr.inode, number, 0, ChunkState.SEALED, length, 1)
                self.targets.put(self.target_of(attr.layout.chain_of(number)), info)
        return self._made(path, attr.inode)

    def blocks(self, namespace: str, names: Sequence[int], size: int = 1000) -> list[int]:
        """Inodes of the blocks, which are named ``namespace/name`` as well."""
        inode = self.rig.namespace(namespace)
        self.inodes[namespace] = inode
        batch = self.rig.put(inode, names, size)
        found = []
        for place, (name, block) in enumerate(zip(names, batch.blocks, strict=True)):
            assert block is not None
            info = ChunkInfo(block.inode, 0, 0, ChunkState.SEALED, size, place, key(name))
            self.targets.put(self.target_of(block.chain), info)
            found.append(self._made(f"{namespace}/{name}", block.inode))
        return found

    def _at(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.rpartition("/")
        return (self.inodes[above] if above else ROOT), name.encode()

    def _made(self, path: str, inode: int) -> int:
        self.rig.clock.advance(0.001)  # so that every change has a ctime of its own
        self.inodes[path] = inode
        return inode

    def target_of(self, chain: int) -> int:
        return self.view(lambda kv: _targets(kv, chain))[0]

    def fill(self) -> None:
        """Some of everything."""
        for path in ("a", "a/b", "a/c", "a/b/d"):
            self.directory(path)
        self.file("a/small", 100)
        self.file("a/b/large", 3 * CHUNK + 5)
        self.file("a/hole", 10 * CHUNK, sparse=True)
        self.file("empty", 0)
        self.rig.call(m.Link(self.inodes["a/small"], self.inodes["a/b"], b"small-too"))
        self.rig.call(m.SetXattr(self.inodes["a/small"], b"user.note", b"hello"))
        self.rig.make(ROOT, b"link", 0o120777, target=b"a/small")
        self.blocks("t/m", range(8))
        self.blocks("t/n", range(4, 12), size=2000)
        self.rig.prepare(self.inodes["t/m"], [100, 101])
        opened = self.file("open", 50)
        self.rig.call(m.OpenInode(opened))
        self.rig.call(m.Unlink(ROOT, b"open"))

    # --- looking and damaging

    def view(self, fn: Callable[[KVRead], Any]) -> Any:
        return self.rig.engine.view(fn)

    def get(self, record: bytes) -> bytes:
        value = self.view(lambda kv: kv.get(record))
        assert value is not None
        return bytes(value)

    def put(self, record: bytes, value: bytes | None) -> None:
        """Behind the service's back; None deletes."""

        def change(kv: Any) -> None:
            if value is None:
                kv.delete(record)
            else:
                kv.put(record, value)

        assert self.rig.engine.update([change]) == [None]

    def change_inode(self, inode: int, **fields: Any) -> None:
        record = records.decode_inode(self.get(records.inode_key(inode)))
        changed = msgspec.structs.replace(record, **fields)
        self.put(records.inode_key(inode), records.encode(changed))

    def dump(self) -> dict[bytes, bytes]:
        return self.view(lambda kv: dict(kv.range(b"", b"\xff", 1_000_000)))

    def fsck(self, **options: Any) -> Fsck:
        store = (
            ServiceStore(self.rig)
            if self.mode == "service"
            else LocalStore(os_env(), self.rig.engine)
        )
        return Fsck(store, self.targets, **options)

    def check(self, **options: Any) -> Report:
        return self.fsck(**options).check()

    def findings(self, **options: Any) -> list[Finding]:
        return [one.finding for one in self.check(**options).outcomes]

    def repair(self, **options: Any) -> Report:
        run = self.fsck(**options)
        report = run.check()
        self.rig.clock.advance(0.001)
        run.repair(report)
        return report

    def settle(self) -> None:
        """The chunk servers do what they were told to."""
        for key_, value in self.view(lambda kv: list(scan(kv, records.REMOVAL))):
            removal = records.unpack_removal(value)
            held = self.targets.chunks[int.from_bytes(key_[4:8], "big")]
            for chunk in list(held):
                if chunk.inode == removal.inode and removal.first <= chunk.number < removal.end:
                    del held[chunk]
            self.put(key_, None)

    def reader(self) -> RecordReader:
        return LocalStore(os_env(), self.rig.engine)


def _targets(kv: KVRead, chain: int) -> tuple[int, ...]:
    value = kv.get(records.chain_key(chain))
    assert value is not None
    return records.decode_chain(value).targets
