"""A disk that loses power: what was not synced may be there afterwards, or not, or in part."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from kvfs_base.seams import DiskFile
from kvfs_base.testing import MemoryDisk, MemoryDiskFile, _MemoryInode

Attributes = dict[str, bytes]


class _PowerFile(MemoryDiskFile):
    def sync(self, *, attributes: bool = False) -> None:
        super().sync(attributes=attributes)
        assert isinstance(self._disk, PowerDisk)
        self._disk.lasts(self._inode, attributes)


def _bytes_of(inode: _MemoryInode) -> bytes:
    return os.pread(inode.fd, os.fstat(inode.fd).st_size, 0)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


class PowerDisk(MemoryDisk):
    """Bytes and attributes of a file last once it was synced, each by themselves; names last once a
    directory that they were changed in was synced. What else lasts is up to whoever cuts power."""

    def __init__(self) -> None:
        super().__init__()
        self._lasting: dict[_MemoryInode, tuple[bytes, Attributes]] = {}
        self._lasting_files: dict[str, _MemoryInode] = {}
        self._lasting_directories = {""}
        # (directories that it is a change of, files that appear, files and directories that go)
        self._changes: list[tuple[set[str], dict[str, _MemoryInode | None], list[str]]] = []

    # --- what is done to it

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        direct: bool = False,
    ) -> DiskFile:
        is_new = path not in self._files
        super().open(path, write=write, create=create, exclusive=exclusive).close()
        inode = self._files[path]
        if is_new:
            self._changes.append(({_parent(path)}, {path: inode}, []))
        return _PowerFile(self, inode, path, write=write)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        appears: dict[str, _MemoryInode | None] = {target: self._files[target]}
        self._changes.append(({_parent(source), _parent(target)}, appears, [source]))

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self._changes.append(({_parent(path)}, {}, [path]))

    def make_directory(self, path: str) -> None:
        before = set(self._directories)
        super().make_directory(path)
        for made in sorted(self._directories - before):
            self._changes.append(({_parent(made)}, {made: None}, []))

    def remove_directory(self, path: str) -> bool:
        removed = super().remove_directory(path)
        if removed:
            self._changes.append(({_parent(path)}, {}, [path]))
        return removed

    def sync_directory(self, path: str) -> None:
        super().sync_directory(path)
        due = [change for change in self._changes if path in change[0]]
        self._changes = [change for change in self._changes if path not in change[0]]
        for _, appears, goes in due:
            _carry_out(self._lasting_files, self._lasting_directories, appears, goes)

    def lasts(self, inode: _MemoryInode, attributes: bool) -> None:
        before = self._lasting.get(inode, (b"", {}))[1]
        self._lasting[inode] = (_bytes_of(inode), dict(inode.attributes) if attributes else before)

    def settle(self) -> None:
        """Everything that was done so far lasts."""
        for inode in self._files.values():
            self.lasts(inode, True)
        self._lasting_files = dict(self._files)
        self._lasting_directories = set(self._directories)
        self._changes.clear()

    # --- power

    def after_power_loss(self, rng: random.Random) -> MemoryDisk:
        """What a server finds. Of the names, so many of the changes that were not synced are there,
        in their order; of each file the old bytes, the new ones or some of both. Every fourth time
        all is there."""
        everything = not rng.randrange(4)
        kept = len(self._changes)
        if not everything:
            kept = rng.randint(0, kept)
        files, directories = dict(self._lasting_files), set(self._lasting_directories)
        for _, appears, goes in self._changes[:kept]:
            _carry_out(files, directories, appears, goes)
        found = MemoryDisk()
        for path in sorted(directories):
            if all(_ancestor in directories for _ancestor in _ancestors(path)):
                found.make_directory(path)
        copies: dict[_MemoryInode, _MemoryInode] = {}
        for path, inode in files.items():
            if _parent(path) not in found._directories:
                continue
            if inode not in copies:
                found.open(path, write=True, create=True).close()
                copies[inode] = found._files[path]
                self._fill(copies[inode], inode, None if everything else rng)
            found._files[path] = copies[inode]
        return found

    def _fill(self, copy: _MemoryInode, inode: _MemoryInode, rng: random.Random | None) -> None:
        data, attributes = _bytes_of(inode), inode.attributes
        if rng is not None:
            before, attributes_before = self._lasting.get(inode, (b"", {}))
            data = rng.choice([before, data, _torn(before, data, rng)])
            attributes = rng.choice([attributes_before, attributes])
        copy.attributes = dict(attributes)
        fd = os.open(f"/proc/self/fd/{copy.fd}", os.O_RDWR)
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        os.close(fd)


def _torn(before: bytes, now: bytes, rng: random.Random) -> bytes:
    """Pages of both, and as long as either."""
    size = rng.choice([len(before), len(now)])
    page = 4096
    pages = [
        rng.choice([before, now])[start : start + page].ljust(page, b"\0")
        for start in range(0, size, page)
    ]
    return b"".join(pages)[:size]


def _ancestors(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _carry_out(
    files: dict[str, _MemoryInode],
    directories: set[str],
    appears: dict[str, _MemoryInode | None],
    goes: Sequence[str],
) -> None:
    for path in goes:
        files.pop(path, None)
        directories.discard(path)
    for path, inode in appears.items():
        if inode is None:
            directories.add(path)
        else:
            files[path] = inode
