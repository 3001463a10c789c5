"""Positions in a listing, without a kernel: names come and go between any two requests."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio

from kvfs.mount import directory as module
from kvfs.mount.backend import Backend
from kvfs.mount.directory import OpenDirectory
from kvfs_base.errors import InvalidRequest
from kvfs_base.testing import memory_env
from kvfs_base.types import Attr
from kvfs_metadata.messages import DirectoryPage, ReadDir


class Names:
    """The part of a metadata service that a listing needs."""

    def __init__(self, names: list[bytes]) -> None:
        self.names = set(names)
        self.requests: list[ReadDir] = []

    async def call(self, request: Any) -> DirectoryPage:
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        after = sorted(n for n in self.names if n > request.after)
        page = tuple((name, Attr(7, 0o100644)) for name in after[: request.limit])
        return DirectoryPage(page, len(after) > request.limit)


def opened(names: list[bytes]) -> tuple[Names, OpenDirectory]:
    service = Names(names)
    env, _ = memory_env()
    chunks: Any = None
    return service, OpenDirectory(Backend(env, service, chunks), 1)


async def listing(directory: OpenDirectory, position: int = 0) -> list[bytes]:
    found = []
    while entries := await directory.read(position):
        found += [e.name for e in entries]
        position = entries[-1].position
    return found


def numbered(count: int) -> list[bytes]:
    return [b"%06d" % n for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 5000])
def test_everything_once_and_in_order(count: int) -> None:
    _, directory = opened(numbered(count))
    assert trio.run(listing, directory) == numbered(count)
    assert trio.run(listing, directory) == numbered(count)  # rewinddir


def test_the_end_is_known_without_asking() -> None:
    service, directory = opened(numbered(5))
    trio.run(listing, directory)
    assert len(service.requests) == 1


def test_steps_back_are_exact() -> None:
    """The kernel takes part of what it was given and goes on from there."""
    _, directory = opened(numbered(3000))
    rng = random.Random(1)

    async def kernel() -> list[bytes]:
        found: list[bytes] = []
        position = 0
        while entries := await directory.read(position):
            taken = entries[: rng.randrange(1, len(entries) + 1)]
            found += [e.name for e in taken]
            position = taken[-1].position
        return found

    assert trio.run(kernel) == numbered(3000)


def test_it_learns_how_much_the_kernel_takes() -> None:
    service, directory = opened(numbered(3000))

    async def kernel() -> None:
        position = 0
        while entries := await directory.read(position):
            position = entries[: min(len(entries), 40)][-1].position

    trio.run(kernel)
    assert sum(r.limit for r in service.requests) < 1.3 * 3000


@pytest.mark.parametrize("recent", [4, 100, 4096])
def test_old_positions_stay_valid_while_names_change(
    recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DIRECTORY_RECENT_NAMES", recent)
    service, directory = opened(numbered(1500))

    async def scenario(position: int) -> list[bytes]:
        service.names = set(numbered(1500))
        await listing(directory)
        service.names -= {b"%06d" % n for n in range(0, 1500, 7)}
        service.names |= {b"%06d-new" % n for n in range(0, 1500, 50)}
        return await listing(directory, position)

    for position in (1, 255, 256, 257, 700, 1499):
        found = trio.run(scenario, position)
        assert len(set(found)) == len(found)
        stayed = [n for n in numbered(1500)[position:] if int(n) % 7]
        assert [n for n in found if b"new" not in n] == stayed


def test_positions_that_were_never_given_out() -> None:
    _, directory = opened(numbered(10))
    with pytest.raises(InvalidRequest):
        trio.run(directory.read, 11)
