"""A disk that forgets what was not synced, and goes wrong in the ways that disks do.

Contents are volatile until ``sync``, directory entries until ``sync_directory``. When the power
goes, each page (4 KiB) that was written since keeps its old bytes, has the new ones, or is torn
between two sectors; the file's length and attributes are those of some moment since the last sync;
of the changes to directories a first part survives, in their order, as a journal would have it.
``fdatasync`` keeps no attributes, and no sync of a file keeps its name.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from kvfs_base.errors import DiskFull, TargetFailed
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.seams import Buffer, DiskFile, DiskUsage

SECTOR_BYTES = 512


@dataclasses.dataclass
class DiskKnobs:
    latency: float = 0.0002
    """Mean seconds of an operation; a sync takes five times as long."""
    stall_chance: float = 0.0005
    """An operation that takes up to two seconds."""
    failure_chance: float = 0.0
    """EIO, after which the disk is dead."""
    lost_write_chance: float = 0.0
    """A write that the disk acknowledged and did not do."""
    misdirected_chance: float = 0.0
    """A write that went to another file's pages."""


class Node:
    """A file, whatever its names are."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.attributes: dict[str, bytes] = {}
        self.durable = b""
        self.durable_attributes: dict[str, bytes] = {}
        self.dirty: set[int] = set()
        """Pages that were written since the last sync."""
        self.lengths: list[int] = []
        """Lengths since the last sync."""
        self.writers = 0
        self.locked_by: SimDiskFile | None = None

    def sync(self, attributes: bool) -> None:
        self.durable = bytes(self.data)
        self.dirty.clear()
        self.lengths.clear()
        if attributes:
            self.durable_attributes = dict(self.attributes)

    def lose_power(self, rng: random.Random) -> None:
        if self.dirty or self.lengths:
            self.data = self._remains(rng)
        for name in sorted(self.attributes.keys() | self.durable_attributes.keys()):
            kept = rng.choice((self.attributes, self.durable_attributes)).get(name)
            if kept is None:
                self.attributes.pop(name, None)
            else:
                self.attributes[name] = kept
        self.durable, self.durable_attributes = bytes(self.data), dict(self.attributes)
        self.dirty.clear()
        self.lengths.clear()

    def _remains(self, rng: random.Random) -> bytearray:
        length = rng.choice([len(self.durable), len(self.data), *self.lengths])
        found = bytearray(self.durable[:length].ljust(length, b"\0"))
        for page in sorted(self.dirty):
            start, end = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, length)
            kind = rng.randrange(3)
            if kind == 2:
                end = min(end, start + SECTOR_BYTES * rng.randrange(1, PAGE_BYTES // SECTOR_BYTES))
            piece = self.data[start:end] if kind else b""
            found[start : start + len(piece)] = piece
        return found[:length]


class _Change:
    """Of directories: ``source`` is the name that goes, ``target`` the one that comes. ``node`` is
    None for a directory."""

    def __init__(self, source: str | None, target: str | None, node: Node | None) -> None:
        self.source = source
        self.target = target
        self.node = node
        self.paths = tuple(path for path in (source, target) if path is not None)
        self._directories = tuple(map(_parent, self.paths))

    def touches(self, directory: str) -> bool:
        return directory in self._directories


Entries = dict[str, Node | None]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _apply(change: _Change, entries: Entries) -> None:
    if change.source is not None:
        entries.pop(change.source, None)
    if change.target is not None:
        if change.node is None:
            entries.setdefault(change.target, None)
        else:
            entries[change.target] = change.node


class SimDiskFile:
    def __init__(self, disk: SimDisk, node: Node, path: str, *, write: bool) -> None:
        self._disk = disk
        self.node = node
        self._path = path
        self._write = write
        self._open = True
        node.writers += write
        disk.open_files[self] = None

    def fileno(self) -> int:
        """-1: nobody can be given a descriptor."""
        return -1

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._disk.enter("preadv", self._path)
        done = 0
        for buffer in buffers:
            piece = self.node.data[offset + done : offset + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
            if len(piece) < len(buffer):
                break
        return done

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        self._disk.enter("pwritev", self._path)
        if not self._write:
            raise TargetFailed(detail=f"{self._path}: Bad file descriptor")
        data = b"".join(buffers)
        self._disk.reserve(offset + len(data) - len(self.node.data), self._path)
        self._disk.place(self.node, offset, data, self._path)
        return len(data)

    def will_need(self, offset: int, length: int) -> None:
        """Everything is near."""

    def truncate(self, size: int) -> None:
        self._disk.enter("truncate", self._path)
        node = self.node
        node.lengths.append(len(node.data))
        if size < len(node.data):
            del node.data[size:]
        else:
            self._disk.reserve(size - len(node.data), self._path)
            node.data.extend(bytes(size - len(node.data)))
        node.dirty.add(size // PAGE_BYTES)

    def size(self) -> int:
        return len(self.node.data)

    def get_attribute(self, name: str) -> bytes | None:
        self._disk.enter("get_attribute", self._path)
        return self.node.attributes.get(name)

    def set_attribute(self, name: str, value: bytes) -> None:
        self._disk.enter("set_attribute", self._path)
        self.node.attributes[name] = bytes(value)

    def sync(self, *, attributes: bool = False) -> None:
        self._disk.enter("sync", self._path)
        self.node.sync(attributes)

    def has_writer(self) -> bool:
        return self.node.writers > 0

    def lock(self) -> bool:
        self._disk.enter("lock", self._path)
        if self.node.locked_by not in (None, self):
            return False
        self.node.locked_by = self
        return True

    def close(self) -> None:
        if self._open and not self._disk.is_dead():
            self.let_go()

    def let_go(self) -> None:
        """As a kernel closes what a dead process had open."""
        self._open = False
        self.node.writers -= self._write
        if self.node.locked_by is self:
            self.node.locked_by = None
        self._disk.open_files.pop(self, None)


class SimDisk:
    """``pace(operation)`` is called before each operation: the place to wait, or to fail.
    ``is_dead`` tells that the process of the caller is gone."""

    def __init__(
        self,
        rng: random.Random | None = None,
        knobs: DiskKnobs | None = None,
        capacity_bytes: int = 1 << 40,
        volume: str = "",
    ) -> None:
        self.rng = rng or random.Random(0)
        self.knobs = knobs or DiskKnobs()
        self.capacity_bytes = capacity_bytes
        self.volume = volume
        self.reserved_bytes = 0
        """Taken by somebody else."""
        self.failed = False
        self.pace: Callable[[str], None] = lambda operation: None
        self.is_dead: Callable[[], bool] = lambda: False
        self.note: Callable[[str], None] = lambda fault: None
        self.open_files: dict[SimDiskFile, None] = {}
        self.entries: Entries = {"": None}
        self._durable: Entries = {"": None}
        self._pending: list[_Change] = []

    # --- what goes wrong

    def enter(self, operation: str, path: str) -> None:
        self.pace(operation)
        if not self.failed and self._chance(self.knobs.failure_chance):
            self.note("EIO")
            self.failed = True
        if self.failed:
            raise TargetFailed(detail=f"{operation} {path}: Input/output error")

    def _chance(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share

    def reserve(self, count: int, path: str) -> None:
        """Raises DiskFull."""
        if count > 0 and count > self._free_bytes():
            self.note("disk full")
            raise DiskFull(path=path)

    def place(self, node: Node, offset: int, data: bytes, path: str) -> None:
        """Files at the top say whose the directory is: without them nobody would start."""
        if "/" not in path:
            pass
        elif self._chance(self.knobs.lost_write_chance):
            self.note("lost write")
            data = node.data[offset : offset + len(data)].ljust(len(data), b"\0")
        elif self._chance(self.knobs.misdirected_chance):
            others = [n for n in self._nodes() if n is not node and len(n.data) >= PAGE_BYTES]
            if others:
                self.note("misdirected write")
                self._put(self.rng.choice(others), 0, data[:PAGE_BYTES], grow=False)
        self._put(node, offset, data)

    def _put(self, node: Node, offset: int, data: bytes, *, grow: bool = True) -> None:
        end = offset + len(data)
        if end > len(node.data):
            if not grow:
                data, end = data[: len(node.data) - offset], len(node.data)
            node.lengths.append(len(node.data))
            node.data.extend(bytes(max(0, end - len(node.data))))
        node.data[offset:end] = data
        node.dirty.update(range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)))

    def _nodes(self) -> list[Node]:
        return [node for node in self.entries.values() if node is not None]

    def rot(self, wanted: Callable[[Node], bool]) -> bool:
        """One bit of one file that is ``wanted`` changes. Whether there was one."""
        found = [n for n in self._nodes() if n.data and wanted(n)]
        if not found:
            return False
        node = self.rng.choice(found)
        place, bit = self.rng.randrange(len(node.data)), 1 << self.rng.randrange(8)
        node.data[place] ^= bit
        if place < len(node.durable):
            durable = bytearray(node.durable)
            durable[place] ^= bit
            node.durable = bytes(durable)
        return True

    def lose_power(self) -> None:
        """Who had files open must be dead. Some of what was not synced is lost."""
        for file in list(self.open_files):
            file.let_go()
        survive = self.rng.choice((0, len(self._pending), self.rng.randint(0, len(self._pending))))
        for change in self._pending[:survive]:
            _apply(change, self._durable)
        self._pending.clear()
        kept = {path: node for path, node in self._durable.items() if self._reachable(path)}
        self.entries, self._durable = dict(kept), dict(kept)
        for node in dict.fromkeys(self._nodes()):
            node.lose_power(self.rng)

    def _reachable(self, path: str) -> bool:
        while path:
            path = _parent(path)
            if path not in self._durable:
                return False
        return True

    def process_died(self) -> None:
        """The kernel closes its files; what it wrote stays in the page cache."""
        for file in list(self.open_files):
            file.let_go()

    def wipe(self) -> None:
        """A new disk in the place of this one."""
        for file in list(self.open_files):
            file.let_go()
        self.entries, self._durable = {"": None}, {"": None}
        self._pending.clear()
        self.failed = False

    # --- Disk

    def _change(self, change: _Change) -> None:
        _apply(change, self.entries)
        self._pending.append(change)

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        direct: bool = False,
    ) -> DiskFile:
        self.enter("open", path)
        node = self.entries.get(path)
        if node is None:
            if not create or _parent(path) not in self.entries:
                raise FileNotFoundError(path)
            node = Node()
            self._change(_Change(None, path, node))
        elif create and exclusive:
            raise FileExistsError(path)
        return SimDiskFile(self, node, path, write=write)

    def rename(self, source: str, target: str) -> None:
        self.enter("rename", source)
        node = self.entries.get(source)
        if node is None or _parent(target) not in self.entries:
            raise FileNotFoundError(source)
        self._change(_Change(source, target, node))

    def unlink(self, path: str) -> None:
        self.enter("unlink", path)
        if self.entries.get(path) is None:
            raise FileNotFoundError(path)
        self._change(_Change(path, None, None))

    def make_directory(self, path: str) -> None:
        self.enter("make_directory", path)
        parts = path.split("/") if path else []
        for count in range(1, len(parts) + 1):
            above = "/".join(parts[:count])
            if above not in self.entries:
                self._change(_Change(None, above, None))

    def spread(self, path: str) -> None:
        pass

    def remove_directory(self, path: str) -> bool:
        self.enter("remove_directory", path)
        is_missing = path not in self.entries or self.entries[path] is not None
        if is_missing or any(p and _parent(p) == path for p in self.entries):
            return False
        self._change(_Change(path, None, None))
        return True

    def list(self, path: str) -> list[str]:
        self.enter("list", path)
        if path not in self.entries:
            raise FileNotFoundError(path)
        found = [p.rpartition("/")[2] for p in self.entries if p and _parent(p) == path]
        self.rng.shuffle(found)
        return found

    def exists(self, path: str) -> bool:
        return path in self.entries

    def sync_directory(self, path: str) -> None:
        """Changes of this directory are durable, with those before them of the same names."""
        self.enter("sync_directory", path)
        if path not in self.entries:
            raise FileNotFoundError(path)
        kept: list[_Change] = []
        wanted: set[str] = set()
        for change in reversed(self._pending):
            if change.touches(path) or not wanted.isdisjoint(change.paths):
                wanted.update(change.paths)
        for change in self._pending:
            if change.touches(path) or not wanted.isdisjoint(change.paths):
                _apply(change, self._durable)
            else:
                kept.append(change)
        self._pending = kept

    def _free_bytes(self) -> int:
        used = sum(len(node.data) for node in dict.fromkeys(self._nodes()))
        return max(0, self.capacity_bytes - self.reserved_bytes - used)

    def usage(self) -> DiskUsage:
        self.enter("usage", "")
        return DiskUsage(self.capacity_bytes, self._free_bytes(), self.volume)
