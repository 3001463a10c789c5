"""What one request costs inside the service, counted in calls of Python functions: CPU time in the
first place, and the same on every machine. The bounds leave room for a few more."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import trio

from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.rpc import Request
from kvfs_base.testing import memory_env
from kvfs_base.types import Address, Attr
from kvfs_metadata import messages as m
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.engines.memory_engine import MemoryEngine
from kvfs_metadata.service import MetadataService
from t2_services.metadata_rig import DIRECTORY, FILE, ROOT

MOUNT = 1
SESSION = b"a mount's session"[:16]
HEARTBEAT = Heartbeat("s", "h", None, None, (TargetReport("t", 10**9, 10**9, True, 0),))


class Counted:
    """A service with one client, which watches."""

    def __init__(self) -> None:
        env, self.clock = memory_env()
        config = MetadataConfig("unused", Address.unix("/meta"), None)
        self.service = MetadataService(env, config, MemoryEngine())
        self._number = 0

    async def ask(self, request: Request) -> Any:
        (answer,) = await self.service.handle(MOUNT, [request])
        assert not isinstance(answer, BaseException), answer
        return answer

    def once(self, request: Any) -> m.Once:
        self._number += 1
        return m.Once(b"c" * 16, 0, self._number, request)

    async def calls(self, request: Request) -> int:
        count = 0

        def listen(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(listen)
        try:
            await self.ask(request)
        finally:
            sys.setprofile(None)
        return count


async def costs() -> dict[str, int]:
    counted = Counted()
    once = counted.once
    counted.clock.advance(31)  # nobody comes back with open files any more
    await counted.ask(HEARTBEAT)
    await counted.ask(m.Attach(SESSION, (), 1, "mount"))
    await counted.ask(m.Watch(SESSION, 0))
    parent: Attr = await counted.ask(once(m.Make(ROOT, b"directory", DIRECTORY)))
    made: Attr = await counted.ask(once(m.Make(parent.inode, b"first", FILE, open=True)))
    requests: dict[str, Request] = {
        "create": once(m.Make(parent.inode, b"file", FILE, open=True)),
        "close": m.CloseInode(made.inode),
        "look-up": m.Lookup(parent.inode, b"first"),
        "open": m.OpenInode(made.inode),
        "rename": once(m.Rename(parent.inode, b"first", parent.inode, b"new")),
        "last close": m.CloseInode(made.inode),
        "unlink": once(m.Unlink(parent.inode, b"new")),
    }
    return {name: await counted.calls(request) for name, request in requests.items()}


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("create", 105),
        ("close", 56),
        ("look-up", 29),
        ("open", 58),
        ("rename", 86),
        ("last close", 56),
        ("unlink", 122),
    ],
)
def test_a_request_takes_few_calls(name: str, most: int) -> None:
    assert trio.run(costs)[name] <= most
