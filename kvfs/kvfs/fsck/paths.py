"""Names for what a check found: a person knows files by their paths."""

from __future__ import annotations

import os
from collections.abc import Iterable

from kvfs_base.types import ROOT_INODE
from kvfs_metadata import records
from kvfs_metadata.check.findings import record_problem
from kvfs_metadata.check.fsck import RecordReader, read_all, read_sound

DEPTH_MAX = 64
"""Directories above a file that are looked up for its path."""


class _Names:
    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._directories: dict[int, str | None] = {ROOT_INODE: ""}

    def get(self, key: bytes) -> bytes | None:
        for found, value in self._reader.range(key, key + b"\x00", 1):
            if found == key and record_problem(key, value) is None:
                return value
        return None

    def directory(self, inode: int, depth: int = 0) -> str | None:
        """The path of a directory, without a slash at its end; None if it has none."""
        if inode not in self._directories:
            self._directories[inode] = None  # until it is known: directories may lie in themselves
            value = self.get(records.inode_key(inode))
            if value is not None and depth < DEPTH_MAX:
                parent = records.decode_inode(value).parent
                above = self.directory(parent, depth + 1)
                name = self._name_in(parent, inode)
                if above is not None and name is not None:
                    self._directories[inode] = f"{above}/{_text(name)}"
        return self._directories[inode]

    def _name_in(self, parent: int, inode: int) -> bytes | None:
        value = records.u64(inode)
        for key, found in read_all(self._reader, records.entry_key(parent, b"")):
            if found == value:
                return key[12:]
        return None

    def block(self, inode: int) -> str | None:
        value = self.get(records.block_key(inode))
        if value is None:
            return None
        block = records.unpack_block(value)
        namespace = self.get(records.namespace_key(block.namespace))
        if namespace is None:
            return None
        return f"/kv/{records.decode_namespace(namespace).path}/{block.key.hex()}"


def paths_of(reader: RecordReader, inodes: Iterable[int]) -> dict[int, str]:
    """A path of each of ``inodes`` that has one. Reads all entries once."""
    names = _Names(reader)
    wanted = set(inodes) - {0, ROOT_INODE}
    paths = {inode: path for inode in wanted if (path := names.block(inode)) is not None}
    wanted -= paths.keys()
    if not wanted:
        return paths
    for key, value in read_sound(reader, records.ENTRY):
        inode = int.from_bytes(value, "big")
        if inode in wanted:
            above = names.directory(records.number_at(key))
            if above is not None:
                paths.setdefault(inode, f"{above}/{_text(key[12:])}")
    return paths


def _text(name: bytes) -> str:
    return os.fsdecode(name).encode(errors="backslashreplace").decode()


__all__ = ["paths_of"]
