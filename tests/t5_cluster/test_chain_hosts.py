"""Chains of two and three copies on hosts whose links, processes and disks fail, while a checker
writes and reads. Nothing that was acknowledged is lost, no byte is wrong at any time, service goes
on, and all copies come back.

KVFS_HOSTS_SECONDS: how long each fault lasts. If it is set every fault is tried with both numbers
of copies; `pytest -s` ends with a table."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from t5_cluster.chain_hosts import CLIENT, HEADER, SERVERS, ChainHosts, chain_hosts
from t5_cluster.hosts import CHUNKS_PORT, METADATA_PORT, Service, missing

REASON = missing()
LONG = os.environ.get("KVFS_HOSTS_SECONDS")
SECONDS = float(LONG or 5.5)
"""A little more than a lease: whoever is away is taken out of his chains."""
UNNOTICED_SECONDS = max(SECONDS, 9.5)
"""Less than a request waits for its answer (DATA_SECONDS), and more than anybody needs to notice
that none will come, on a busy machine."""
CUT_SECONDS = max(SECONDS, 10.0)
"""Who is there, but not for his neighbour, is noticed later."""
SEED = int(os.environ.get("KVFS_HOSTS_SEED", "1"))

pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(300 + 20 * SECONDS),
]

PIECE = 256 << 10

Scenario = Callable[[ChainHosts], tuple[Callable[[], None], Callable[[], dict[int, int]]]]
"""What breaks it, and what repairs it."""


def killed(place: int) -> Scenario:
    def plan(cluster: ChainHosts) -> tuple[Callable[[], None], Callable[[], dict[int, int]]]:
        victims: list[Service] = []
        versions: dict[int, int] = {}

        def kill() -> None:
            number = cluster.host_at(place)
            versions.update(cluster.versions_of(number))
            victims.append(cluster.servers[number])
            victims[0].kill()

        def restart() -> dict[int, int]:
            victims[0].restart()
            return versions

        return kill, restart

    return plan


def links(fault: Callable[[ChainHosts], object]) -> Scenario:
    return lambda cluster: (lambda: void(fault(cluster)), cluster.heal)


def void(_: object) -> None:
    return None


def lossy(cluster: ChainHosts) -> None:
    """A quarter of the packets between host 2 and all others."""
    for number in (1, 3, CLIENT):
        cluster.hosts.lose(2, number, 25)


def slow(cluster: ChainHosts) -> None:
    """50 to 200 ms, both ways, drawn anew for each piece; connections overtake each other."""
    for one in (*SERVERS, CLIENT):
        for other in SERVERS:
            if one != other:
                cluster.hosts.delay(one, other, 0.05, 0.15)
    # Connections from before do not pass the proxies: they break.
    for host in cluster.hosts:
        done = host.run("ss", "--kill", "state", "established", "dport", "=", f":{CHUNKS_PORT}")
        assert done.returncode == 0, done.stderr


def dead_disk(
    cluster: ChainHosts,
) -> tuple[Callable[[], None], Callable[[], dict[int, int]]]:
    """Host 2's disk answers EIO, until it is mended and the server started again."""
    host, server = cluster.hosts[2], cluster.servers[2]

    def repair() -> dict[int, int]:
        cluster.hosts.wait_for_states(host2="offline")
        versions = cluster.versions_of(2)
        server.kill()
        host.mend_disk()
        server.restart()
        return versions

    return host.fail_disk, repair


def full_disk(
    cluster: ChainHosts,
) -> tuple[Callable[[], None], Callable[[], dict[int, int]]]:
    """Somebody else's file takes what is free on host 3's disk."""
    disk = cluster.hosts[3].disk()
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            for start in itertools.count(step=PIECE):
                os.posix_fallocate(file.fileno(), start, PIECE)
        cluster.hosts.wait_for_states(host3="full")

    def repair() -> dict[int, int]:
        filler.unlink()
        cluster.hosts.wait_for_states(host3="serving")
        return {}

    return fill, repair


UNNOTICED = "client and host 2 cut"
"""By everybody else: nothing changes, so the client has to find other ways by itself."""

SCENARIOS: dict[str, tuple[tuple[int, ...], Scenario]] = {
    "kill -9 of a head": ((3,), killed(0)),
    "kill -9 of a middle": ((3,), killed(1)),
    "kill -9 of a tail": ((2, 3), killed(-1)),
    "hosts 2 and 3 cut": ((3,), links(lambda c: c.hosts.cut(2, 3))),
    "host 2 to 3 cut one way": ((2,), links(lambda c: c.hosts.cut(2, 3, one_way=True))),
    "host 3 cannot reach the metadata": (
        (3,),
        links(lambda c: c.hosts.shut(3, 1, METADATA_PORT)),
    ),
    UNNOTICED: ((2,), links(lambda c: c.hosts.cut(CLIENT, 2))),
    "25 % of host 2's packets lost": ((2,), links(lossy)),
    "50 to 200 ms between all": ((3,), links(slow)),
    "EIO on host 2": ((2,), dead_disk),
    "host 3's disk full": ((2,), full_disk),
}
CUTS = ("hosts 2 and 3 cut", "host 2 to 3 cut one way")
DISKS = ("EIO on host 2", "host 3's disk full")


def names(copies: int) -> list[str]:
    return [
        name
        for name, (usual, _) in SCENARIOS.items()
        if copies in usual or (LONG and name not in DISKS)
    ]


@pytest.fixture(scope="class")
def cluster(request: pytest.FixtureRequest) -> Iterator[ChainHosts]:
    """One ends before the next one begins: of a class, so that it does not matter to the other."""
    yield from chain_hosts(request.cls.COPIES, SEED)


def play(cluster: ChainHosts, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in DISKS and cluster.small_disk_reason:
        pytest.skip(cluster.small_disk_reason)
    fault, repair = SCENARIOS[name][1](cluster)
    seconds = {**dict.fromkeys(CUTS, CUT_SECONDS), UNNOTICED: UNNOTICED_SECONDS}.get(name, SECONDS)
    row = cluster.play(
        name,
        seconds,
        fault,
        repair,
        evicting=name == "host 3's disk full",
        going_on=("put", "get", "write", "read") if name == UNNOTICED else (),
    )
    with capsys.disabled():
        print(f"\n{row}")


def look(cluster: ChainHosts, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.wait_for_fsck()
    with capsys.disabled():
        print("\n" + "\n".join([HEADER, *map(str, cluster.rows)]))


class TestThreeCopies:
    COPIES = 3

    @pytest.mark.parametrize("name", names(COPIES))
    def test_a_fault(
        self, cluster: ChainHosts, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        play(cluster, name, capsys)

    def test_fsck_finds_nothing(
        self, cluster: ChainHosts, capsys: pytest.CaptureFixture[str]
    ) -> None:
        look(cluster, capsys)


class TestTwoCopies:
    COPIES = 2

    @pytest.mark.parametrize("name", names(COPIES))
    def test_a_fault(
        self, cluster: ChainHosts, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        play(cluster, name, capsys)

    def test_fsck_finds_nothing(
        self, cluster: ChainHosts, capsys: pytest.CaptureFixture[str]
    ) -> None:
        look(cluster, capsys)
