"""What the node agent needs of the other roles: narrower than their clients, so that tests can
stand in for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from kvfs_base.errors import KvfsError
from kvfs_base.rpc import Request
from kvfs_datapath.client.chunk_client import ChunkRead, ChunkWrite


class MetadataCalls(Protocol):
    """A connection to the metadata service, used by one thread at a time."""

    def call(self, request: Request) -> Any:
        """The reply, or raises what the service raised."""

    def close(self) -> None: ...


class Chunks(Protocol):
    """All chunk servers, as one thread-safe object."""

    def read_chunks(self, reads: Sequence[ChunkRead]) -> list[KvfsError | None]:
        """Fills the views with verified bytes; one result a chunk."""

    def write_chunks(self, writes: Sequence[ChunkWrite]) -> list[KvfsError | None]:
        """Publishes whole chunks; one result a chunk."""

    def versions(self, chains: Iterable[int]) -> dict[int, int]:
        """The versions that chains have now, as far as they have several copies."""

    def statistics(self) -> dict[str, int]: ...

    def close(self) -> None: ...
