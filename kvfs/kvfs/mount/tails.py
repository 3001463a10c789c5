"""Before what lies behind the end of a file is cut: docs/design/0009-tails.md.

A mount that was killed may have written there, and a living one may be writing there whose file is
not recorded to be longer yet. The metadata service knows who may write.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import trio

from kvfs.mount.backend import Backend
from kvfs.mount.limits import TAIL_POLL_SECONDS, TAIL_WAIT_SECONDS
from kvfs_base.errors import KvfsError, TailBusy
from kvfs_metadata.messages import BeginCut, EndCut, Tail

log = logging.getLogger(__name__)
T = TypeVar("T")


@contextlib.asynccontextmanager
async def asked_to_cut(backend: Backend, inode: int, *, wait: bool) -> AsyncIterator[Tail]:
    """For who may write to the file: whether he may cut now, and the recorded end. While somebody
    who may write there as well is not heard of that is not known; ``wait`` until it is, which
    takes half a minute if that mount was killed."""
    deadline = trio.current_time() + TAIL_WAIT_SECONDS
    tail: Tail = await backend.call(BeginCut(inode))
    while tail.is_open and wait and trio.current_time() < deadline:
        await trio.sleep(TAIL_POLL_SECONDS)
        tail = await backend.call(BeginCut(inode))
    try:
        yield tail
    finally:
        if tail.may_cut:
            with trio.CancelScope(shield=True):
                await _end(backend, inode)


async def _end(backend: Backend, inode: int) -> None:
    try:
        await backend.call(EndCut(inode))
    except KvfsError as exc:  # it is over at the last close at the latest
        log.info("inode %d: others wait to write to it: %s", inode, exc)


async def when_cut(act: Callable[[], Awaitable[T]]) -> T:
    """``act``, once nobody cuts what it wants to write to."""
    deadline = trio.current_time() + TAIL_WAIT_SECONDS
    while True:
        try:
            return await act()
        except TailBusy:
            if trio.current_time() >= deadline:
                raise
        await trio.sleep(TAIL_POLL_SECONDS)
