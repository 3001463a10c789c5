"""kvfs: a filesystem that is a KV cache for LLM inference.

``connect`` gives a Client of the node agent, ``block_keys`` names blocks, ``kvfs.aio`` is the same
API for trio. Importing this package imports neither trio nor numpy; the first ``connect`` does what
it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvfs.keys import block_keys
from kvfs_base.errors import (
    ArenaFull,
    CacheFull,
    CapacityError,
    ConnectionLost,
    DeadlineExceeded,
    DiskFull,
    EntryNotFound,
    IntegrityError,
    InvalidRequest,
    KvfsError,
    LayoutMismatch,
    LimitExceeded,
    NamespaceError,
    NoTarget,
    PrepareExpired,
    QuotaExceeded,
    ServiceError,
)
from kvfs_base.types import KVLayout

if TYPE_CHECKING:
    from kvfs import aio
    from kvfs.client import Blocks, Client, Namespace, connect

__all__ = [
    "ArenaFull",
    "Blocks",
    "CacheFull",
    "CapacityError",
    "Client",
    "ConnectionLost",
    "DeadlineExceeded",
    "DiskFull",
    "EntryNotFound",
    "IntegrityError",
    "InvalidRequest",
    "KVLayout",
    "KvfsError",
    "LayoutMismatch",
    "LimitExceeded",
    "Namespace",
    "NamespaceError",
    "NoTarget",
    "PrepareExpired",
    "QuotaExceeded",
    "ServiceError",
    "aio",
    "block_keys",
    "connect",
]

_LATE = {"Blocks", "Client", "Namespace", "connect"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module("kvfs.client"), name)
    if name == "aio":
        return importlib.import_module("kvfs.aio")
    raise AttributeError(f"module 'kvfs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
