"""Positions in a listing, without a kernel: names come and go between any two requests."""

from __future__ import annotations

import collections
import math
import random
from typing import Any

import pytest
import trio

from kvfs.mount import directory as module
from kvfs.mount import listings
from kvfs.mount.backend import Backend
from kvfs.mount.directory import Entry, OpenDirectory
from kvfs.mount.names import MISSING
from kvfs_base.errors import InvalidRequest
from kvfs_base.testing import memory_env
from kvfs_base.types import Attr
from kvfs_metadata.messages import DirectoryPage, Make, ReadDir, Revoked


class Names:
    """The part of a metadata service that a listing needs."""

    def __init__(self, names: list[bytes]) -> None:
        self.names = set(names)
        self.attrs = collections.defaultdict(lambda: Attr(len(self.attrs) + 2, 0o100644))
        self.requests: list[ReadDir] = []

    async def call(self, request: Any) -> DirectoryPage:
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        after = sorted(n for n in self.names if n > request.after)
        page = tuple((name, self.attrs[name]) for name in after[: request.limit])
        return DirectoryPage(page, len(after) > request.limit)


def backend_of(service: Names) -> Backend:
    env, _ = memory_env()
    chunks: Any = None
    return Backend(env, service, chunks)


def opened(names: list[bytes]) -> tuple[Names, OpenDirectory]:
    service = Names(names)
    return service, OpenDirectory(backend_of(service), 1)


def leased(names: list[bytes]) -> tuple[Names, Backend]:
    """All that the service answers is leased, and the directory was listed once."""
    service = Names(names)
    backend = backend_of(service)
    backend.names.revoked(Revoked(1), math.inf)
    assert trio.run(listing, OpenDirectory(backend, 1)) == names
    return service, backend


async def listing(directory: OpenDirectory, position: int = 0) -> list[bytes]:
    found = []
    while entries := await next_entries(directory, position):
        found += [name for name, _ in entries]
        position += len(entries)
    return found


async def next_entries(directory: OpenDirectory, position: int) -> list[Entry]:
    known = directory.read_now(position)
    return await directory.read(position) if known is None else known


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
            found += [name for name, _ in taken]
            position += len(taken)
        return found

    assert trio.run(kernel) == numbered(3000)


def test_it_learns_how_much_the_kernel_takes() -> None:
    service, directory = opened(numbered(3000))

    async def kernel() -> None:
        position = 0
        while entries := await directory.read(position):
            position += min(len(entries), 40)

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


def test_a_small_directory_is_leased_when_it_is_listed_again() -> None:
    service, backend = leased(numbered(1000))
    assert not any(request.keeps for request in service.requests)
    assert OpenDirectory(backend, 1).read_now(0) is None
    before = len(service.requests)
    for _ in range(3):
        assert trio.run(listing, OpenDirectory(backend, 1)) == numbered(1000)
    assert len(service.requests) == before + 1
    backend.names.revoked(Revoked(2, entries=((1, b""),)), math.inf)
    service.names.add(b"new")
    assert trio.run(listing, OpenDirectory(backend, 1)) == [*numbered(1000), b"new"]


def test_a_directory_of_several_pages_is_leased_as_a_whole() -> None:
    service, backend = leased(numbered(5000))
    before = len(service.requests)
    for _ in range(3):
        assert trio.run(listing, OpenDirectory(backend, 1)) == numbered(5000)
    assert [(r.after, r.keeps) for r in service.requests[before:]] == [
        (b"" if n == 0 else b"%06d" % (1024 * n - 1), True) for n in range(5)
    ]
    assert backend.names.entry(1, b"004999") == service.attrs[b"004999"].inode
    assert backend.names.entry(1, b"other") == MISSING


@pytest.mark.parametrize("page", range(1, 6))
def test_a_name_that_changes_between_two_pages(page: int) -> None:
    """What was fetched is of no one moment: none of it answers for a name."""
    service, backend = leased(numbered(5000))
    before = len(service.requests)

    async def call(request: ReadDir) -> DirectoryPage:
        reply = await Names.call(service, request)
        if len(service.requests) == before + page:
            backend.names.revoked(Revoked(2, entries=((1, b""),)), math.inf)
            service.names ^= {b"000000-new", b"004000"}
        return reply

    service.call = call  # type: ignore[method-assign]
    found = trio.run(listing, OpenDirectory(backend, 1))
    assert set(numbered(5000)) - set(found) <= {b"004000"}
    assert backend.names.listing(1) is None
    assert backend.names.entry(1, b"004000") is None
    assert trio.run(listing, OpenDirectory(backend, 1)) == sorted(service.names)
    assert backend.names.entry(1, b"004000") == MISSING


@pytest.mark.parametrize("is_named_anew", [False, True])
def test_what_changes_between_two_pages_is_told_as_it_is(is_named_anew: bool) -> None:
    """The kernel was told to drop it, and would take what comes now for newer than that."""
    service, backend = leased(numbered(5000))
    before = len(service.requests)
    name = b"000003"
    inode = service.attrs[name].inode

    async def call(request: ReadDir) -> DirectoryPage:
        reply = await Names.call(service, request)
        if len(service.requests) == before + 3:
            names = ((1, b""),) if is_named_anew else ()
            backend.names.revoked(Revoked(2, inodes=(inode,), entries=names), math.inf)
            service.attrs[name] = Attr(inode, 0o100600)
        return reply

    service.call = call  # type: ignore[method-assign]

    async def first() -> list[Entry]:
        return await OpenDirectory(backend, 1).read(0)

    assert dict(trio.run(first))[name].mode == 0o100600


def test_a_large_directory_is_not_leased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "MOUNT_LISTING_NAMES_MAX", 3000)
    monkeypatch.setattr(module, "MOUNT_LISTING_NAMES_MAX", 3000)
    service, backend = leased(numbered(3001))
    assert trio.run(listing, OpenDirectory(backend, 1)) == numbered(3001)
    assert not any(request.keeps for request in service.requests)


def test_one_that_has_become_large_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "MOUNT_LISTING_NAMES_MAX", 3000)
    monkeypatch.setattr(module, "MOUNT_LISTING_NAMES_MAX", 3000)
    service, backend = leased(numbered(2000))
    service.names = set(numbered(9000))
    for _ in range(2):
        assert trio.run(listing, OpenDirectory(backend, 1)) == numbered(9000)
    assert sum(request.keeps for request in service.requests) == 3
    assert backend.names.entry(1, b"other") is None


def test_a_listed_name_is_known_and_any_other_is_missing() -> None:
    service, backend = leased(numbered(10))
    trio.run(listing, OpenDirectory(backend, 1))
    assert backend.names.entry(1, b"000003") == service.attrs[b"000003"].inode
    assert backend.names.entry(1, b"other") == MISSING
    backend.names.revoked(Revoked(2, entries=((1, b""),)), math.inf)
    assert backend.names.entry(1, b"000003") is None
    assert backend.names.entry(1, b"other") is None


@pytest.mark.parametrize(
    ("count", "position"),
    [(1000, n) for n in (1, 255, 256, 257, 700, 999)] + [(9000, n) for n in (1, 300, 4904, 8999)],
)
def test_a_lease_that_ends_on_the_way(count: int, position: int) -> None:
    """Of names that were not given out yet the service knows which are left."""
    service, backend = leased(numbered(count))
    trio.run(listing, OpenDirectory(backend, 1))
    directory = OpenDirectory(backend, 1)
    assert directory.read_now(0) is not None
    backend.names.revoked(Revoked(2, entries=((1, b""),)), math.inf)
    service.names -= {b"%06d" % n for n in range(0, count, 7)}
    assert directory.read_now(position) is None
    left = [name for name in numbered(count)[position:] if int(name) % 7]
    assert trio.run(listing, directory, position) == left


def test_attributes_that_were_revoked_are_asked_for() -> None:
    service, backend = leased(numbered(600))
    trio.run(listing, OpenDirectory(backend, 1))
    directory = OpenDirectory(backend, 1)
    assert directory.read_now(0) is not None
    name = b"%06d" % 300
    backend.names.revoked(Revoked(2, inodes=(service.attrs[name].inode,)), math.inf)
    service.attrs[name] = Attr(service.attrs[name].inode, 0o100600)
    assert directory.read_now(256) is None

    async def rest() -> list[bytes]:
        entries = await directory.read(256)
        assert dict(entries)[name].mode == 0o100600
        return [n for n, _ in entries] + await listing(directory, 256 + len(entries))

    assert trio.run(rest) == numbered(600)[256:]


def test_an_answer_older_than_a_change_of_ours_is_not_kept() -> None:
    service, backend = leased(numbered(10))
    token = backend.names.token
    made = Make(1, b"made", 0o100644)
    backend.names.answered(made, service.attrs[b"made"], token)
    page = DirectoryPage(tuple((n, service.attrs[n]) for n in numbered(10)), more=False)
    backend.names.answered(ReadDir(1, keeps=True), page, token)
    assert backend.names.listing(1) is None
