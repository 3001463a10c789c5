"""The file system without a mount: paths, listings and whole files over the mount's Filesystem."""

from __future__ import annotations

import contextlib
import os
import platform
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import BinaryIO

import trio

from kvfs.mount.backend import Backend
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.requests import Caller
from kvfs_base.errors import (
    EntryNotFound,
    InodeStale,
    InvalidRequest,
    IsADirectory,
    KvfsError,
    NotADirectory,
    NotPermitted,
)
from kvfs_base.limits import MOUNT_IO_BYTES
from kvfs_base.seams import Env
from kvfs_base.types import ROOT_INODE, Address, Attr
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_metadata.client import ClusterView, MetadataClient

LINKS_FOLLOWED_MAX = 40
"""As Linux."""

SESSION_BYTES = 16


@contextlib.asynccontextmanager
async def open_tree(env: Env, metadata: Sequence[Address]) -> AsyncIterator[Tree]:
    """Raises ConnectionLost if no metadata service listens there."""
    name = f"a command on {platform.node()} (pid {os.getpid()})"
    session = os.urandom(SESSION_BYTES)
    async with MetadataClient(env, metadata, session=session, name=name) as client:
        cluster = ClusterView(env, metadata)
        chunks = ChunkClient(env, cluster)
        try:
            filesystem = Filesystem(Backend(env, client, chunks))
            yield Tree(filesystem)
            await filesystem.close()
        finally:
            chunks.close()
            cluster.close()


class Tree:
    """Paths are bytes with ``/`` between names, from the root whether or not they start with one.
    Errors name the path, not only its last part."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem

    async def resolve(self, path: bytes, *, follow: bool = True) -> Attr:
        """Attributes of what ``path`` names; symbolic links on the way are followed. Raises
        EntryNotFound, NotADirectory."""
        links = 0
        chain = [await self._filesystem.getattr(ROOT_INODE)]
        names = _names(path)[::-1]
        while names:
            name = names.pop()
            if name == b"..":
                chain = chain[:1] + chain[1:-1]  # above the root is the root
                continue
            if not chain[-1].is_dir:
                raise NotADirectory(name=path)
            try:
                attr = await self._filesystem.lookup(chain[-1].inode, name)
            except EntryNotFound as exc:
                raise EntryNotFound(name=path) from exc
            if stat.S_ISLNK(attr.mode) and (names or follow):
                links += 1
                if links > LINKS_FOLLOWED_MAX:
                    raise InvalidRequest(detail=f"too many symbolic links: {os.fsdecode(path)}")
                target = await self._filesystem.readlink(attr.inode)
                if target.startswith(b"/"):
                    chain = chain[:1]
                names += _names(target)[::-1]
                continue
            chain.append(attr)
        return chain[-1]

    async def parent_of(self, path: bytes) -> tuple[Attr, bytes]:
        """The directory that holds ``path``, and the last name."""
        names = _names(path)
        if not names or names[-1] == b"..":
            raise InvalidRequest(detail=f"not the path of a file: {os.fsdecode(path)}")
        parent = await self.resolve(b"/".join(names[:-1]))
        if not parent.is_dir:
            raise NotADirectory(name=path)
        return parent, names[-1]

    async def entries(self, directory: int) -> AsyncGenerator[tuple[bytes, Attr], None]:
        """In the order of the names' bytes."""
        handle = self._filesystem.opendir(directory)
        try:
            position = 0
            while page := await self._filesystem.readdir(handle, position):
                for name, attr in page:
                    yield name, attr
                position += len(page)
        finally:
            self._filesystem.releasedir(handle)

    async def read_link(self, inode: int) -> bytes:
        return await self._filesystem.readlink(inode)

    async def read_to(self, path: bytes, out: BinaryIO) -> None:
        """Copies a file or a block to ``out``. Damaged bytes raise, they are never written."""
        attr = await self.resolve(path)
        if attr.is_dir:
            raise IsADirectory(name=path)
        if not attr.is_file:
            raise NotPermitted(reason=f"not a file: {os.fsdecode(path)}")
        opened = await self._filesystem.open(attr.inode, os.O_RDONLY)
        try:
            offset = 0
            while data := await self._filesystem.read(opened.handle, offset, MOUNT_IO_BYTES):
                out.write(data)
                offset += len(data)
        finally:
            await self._filesystem.release(opened.handle)

    async def write_from(self, path: bytes, source: BinaryIO) -> None:
        """Makes or replaces a file, whole or not at all: the bytes go into a new file, which takes
        the name when they are all there."""
        parent, name = await self.parent_of(path)
        with contextlib.suppress(EntryNotFound):
            if (await self._filesystem.lookup(parent.inode, name)).is_dir:
                raise IsADirectory(name=path)
        caller = Caller(os.getuid(), os.getgid())
        umask = os.umask(0)
        os.umask(umask)
        temporary = b".kvfs-put-" + os.urandom(8).hex().encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        _, opened = await self._filesystem.create(
            parent.inode, temporary, 0o666 & ~umask, flags, caller
        )
        try:
            try:
                await self._fill(opened.handle, source)
            finally:
                with trio.CancelScope(shield=True):
                    await self._filesystem.release(opened.handle)
            await self._filesystem.rename(parent.inode, temporary, parent.inode, name)
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(KvfsError):
                await self._filesystem.unlink(parent.inode, temporary)
            raise

    async def _fill(self, handle: int, source: BinaryIO) -> None:
        offset = 0
        while data := source.read(MOUNT_IO_BYTES):
            offset += await self._filesystem.write(handle, offset, data)
        await self._filesystem.flush(handle)

    async def remove(self, path: bytes, *, recursive: bool = False) -> None:
        """Removes a file, a block, a link or an empty directory; with ``recursive`` what is in it
        first."""
        attr = await self.resolve(path, follow=False)
        parent, name = await self.parent_of(path)
        await self._remove(parent.inode, name, attr, recursive)

    async def _remove(self, parent: int, name: bytes, attr: Attr, recursive: bool) -> None:
        if not attr.is_dir:
            await self._filesystem.unlink(parent, name)
            return
        if recursive:
            async with contextlib.aclosing(self.entries(attr.inode)) as entries:
                async for child_name, child in entries:
                    try:
                        await self._remove(attr.inode, child_name, child, True)
                    except (EntryNotFound, InodeStale):
                        pass  # somebody else, or eviction, was faster
        await self._filesystem.rmdir(parent, name)


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]
