"""Types that cross rooms: identifiers, attributes, layouts, addresses."""

from __future__ import annotations

import ipaddress
import stat
from typing import Annotated, NamedTuple

import msgspec

from kvfs_base.errors import InvalidRequest, NotLoopback
from kvfs_base.limits import NAME_BYTES_MAX, STRIPE_MAX

ROOT_INODE = 1
"""Inode number of ``/``, as FUSE has it."""

KV_DIRECTORY = b"kv"
"""Namespaces live under ``/kv``: ``/kv/TENANT/MODEL``."""

U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, msgspec.Meta(ge=0, le=0x7FFF_FFFF_FFFF_FFFF)]
"""63 bits, in fact: msgspec checks bounds as signed numbers, and no counter here gets there."""
Name = Annotated[bytes, msgspec.Meta(min_length=1, max_length=NAME_BYTES_MAX)]
ShortText = Annotated[str, msgspec.Meta(max_length=1024)]


class ChunkId(NamedTuple):
    """Names a chunk everywhere. ``number`` counts the chunks of a
    file from 0. A block is chunk 0 of its own inode number, which is never used
    again: the inode number of a block is also its generation. ``chain`` names the chain whose copy
    is meant; it is 0 on chains of one copy, which keep their chunks in the target's own tree."""

    inode: int
    number: int
    chain: int = 0


class Layout(msgspec.Struct, array_like=True, frozen=True):
    """Where the bytes of a file are: chunk ``i`` is on chain ``chains[i % len(chains)]``.

    3FS stores a chain table version and a shuffle seed instead; an explicit list costs 2-5 bytes a
    chain, outlives every change of the table and needs no shared permutation to read.
    """

    chunk_bytes: U64
    chains: Annotated[tuple[U32, ...], msgspec.Meta(max_length=STRIPE_MAX)]

    def chain_of(self, index: int) -> int:
        return self.chains[index % len(self.chains)]


class Attr(msgspec.Struct, array_like=True):
    """Attributes of an inode; the metadata service is their only author.

    ``quota`` is the directory whose quota it counts for, 0 if there is none. ``born_ns`` is 0 where
    nobody wrote down when the inode was made. ``sparse`` is set once a write or truncate left a
    hole: only then may a missing chunk read as zeros, otherwise it is an error. ``crc32c`` and
    ``key`` are set for blocks only.
    """

    inode: U64
    mode: U32
    nlink: U32 = 1
    uid: U32 = 0
    gid: U32 = 0
    size: U64 = 0
    rdev: U32 = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    sparse: bool = False
    layout: Layout | None = None
    is_namespace: bool = False
    key: bytes = b""
    crc32c: U32 = 0
    quota: U64 = 0
    born_ns: int = 0

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_block(self) -> bool:
        return bool(self.key)


class Address(msgspec.Struct, array_like=True, frozen=True):
    """``unix:/path`` or ``tcp:host:port``."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def unix(cls, path: str) -> Address:
        return cls("unix", path=path)

    @classmethod
    def tcp(cls, host: str, port: int) -> Address:
        return cls("tcp", host=host, port=port)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises InvalidRequest for anything else than the two forms above."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest.startswith("/"):
            return cls.unix(rest)
        if kind == "tcp":
            host, _, port = rest.rpartition(":")
            if host and port.isdecimal() and 0 <= int(port) < 65536:
                return cls.tcp(host.strip("[]"), int(port))
        raise InvalidRequest(detail=f"not an address: {text!r} (unix:/path or tcp:host:port)")

    @classmethod
    def parse_list(cls, text: str) -> tuple[Address, ...]:
        """Addresses with commas between. Raises InvalidRequest."""
        return tuple(cls.parse(part) for part in text.split(","))

    @property
    def is_wildcard(self) -> bool:
        """Stands for all addresses of a machine: good to listen on, not to connect to."""
        try:
            return self.kind == "tcp" and ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return not self.host and self.kind == "tcp"

    def require_loopback(self) -> None:
        """Raises NotLoopback: without a secret no port is reachable from outside."""
        if self.kind == "unix" or self.host == "localhost":
            return
        try:
            if ipaddress.ip_address(self.host).is_loopback:
                return
        except ValueError:
            pass
        raise NotLoopback(
            detail=f"{self} is not on this machine, which takes a secret_file", address=str(self)
        )

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.kind == "unix" else f"tcp:{self.host}:{self.port}"


class KVLayout(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What the blocks of a namespace hold. Two writers that disagree about any field must not share
    a namespace, so opening one with another layout raises LayoutMismatch.

    ``block_tokens`` tokens a block; ``layers``, ``kv_heads``, ``head_dim`` and ``dtype`` describe
    the tensors (informative, zero where the engine's blocks are opaque); ``block_bytes`` is the
    exact size of a full block, or 0 where sizes vary; ``order`` names the axis order of a block,
    and ``model``, ``revision``, ``rank`` and ``adapter`` complete the identity.
    """

    block_tokens: int
    block_bytes: int = 0
    dtype: str = ""
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    order: str = ""
    model: str = ""
    revision: str = ""
    rank: str = ""
    adapter: str = ""


class BlockInfo(msgspec.Struct, array_like=True, frozen=True):
    """A committed block: where it is and how to check it."""

    inode: U64
    """Also the generation: a key that is removed and stored again gets another one."""
    size: U64
    crc32c: U32
    chain: U32
