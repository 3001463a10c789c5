"""Ordinary files by their paths, as the metadata service lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvfs_base.errors import EntryNotFound, InodeStale
from kvfs_base.types import ROOT_INODE, Attr
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.cluster.administration import chunks_by_chain
from kvfs_metadata.messages import ReadDir


def files_on(client: BlockingMetadataClient, chains: set[int]) -> Iterator[tuple[str, int]]:
    """Path and number of chunks, holes included, of every file that has chunks on ``chains``."""
    for path, attr in every_file(client):
        assert attr.layout is not None
        by_chain = chunks_by_chain(attr.size, attr.layout)
        chunks = sum(count for chain, count in by_chain.items() if chain in chains)
        if chunks:
            yield path, chunks


def every_file(client: BlockingMetadataClient) -> Iterator[tuple[str, Attr]]:
    """Path and attributes of every ordinary file."""
    directories = [(ROOT_INODE, b"")]
    while directories:
        inode, path = directories.pop()
        for name, attr in _entries(client, inode):
            if attr.is_dir and not attr.is_namespace:
                directories.append((attr.inode, path + b"/" + name))
            elif attr.is_file and attr.layout is not None:
                text = os.fsdecode(path + b"/" + name)
                yield text.encode(errors="replace").decode(), attr


def _entries(client: BlockingMetadataClient, directory: int) -> Iterator[tuple[bytes, Attr]]:
    after, more = b"", True
    while more:
        try:
            page = client.call(ReadDir(directory, after))
        except (EntryNotFound, InodeStale):
            return  # removed meanwhile
        yield from page.entries
        more = page.more
        if page.entries:
            after = page.entries[-1][0]


__all__ = ["every_file", "files_on"]
