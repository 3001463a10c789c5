"""The hosts that other tests run clusters on: links that are cut, lossy and slow, and disks that
fill up and fail. Then a kvfs of several hosts with single-copy chains: what the network and kill -9
take away comes back, and nothing is wrong in between."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfs
from kvfs.cli.exits import ExitCode
from kvfs.mount import system
from kvfs_base.errors import DiskFull
from kvfs_base.types import KVLayout
from t5_cluster.hosts import METADATA_PORT, Hosts, missing
from t5_cluster.processes import DEADLINE_SECONDS, block, run, wait_until
from t5_cluster.slow_link import SlowLink

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def three() -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


# --- the harness


@contextlib.contextmanager
def mailboxes(hosts: Hosts) -> Iterator[dict[int, socket.socket]]:
    """A UDP socket on each host: a packet of UDP is one packet, sent once."""
    with contextlib.ExitStack() as stack:
        found = {}
        for host in hosts:
            with host.inside():
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((host.address, 9))
            sock.settimeout(DEADLINE_SECONDS)
            found[host.number] = sock
        yield found


def send(hosts: Hosts, boxes: dict[int, socket.socket], one: int, other: int, what: str) -> None:
    boxes[one].sendto(what.encode(), (hosts[other].address, 9))


def test_a_link_is_cut_both_ways_or_one_way_and_heals(three: Hosts) -> None:
    with mailboxes(three) as boxes:

        def said(one: int, other: int, what: str) -> None:
            """``what`` is the next thing that arrives, so nothing sent before is on its way."""
            send(three, boxes, one, other, what)
            assert boxes[other].recv(100) == what.encode()

        said(1, 2, "first")
        three.cut(1, 2)
        send(three, boxes, 1, 2, "lost")
        send(three, boxes, 2, 1, "lost")
        said(1, 3, "by the others unheard")
        said(3, 2, "from a third")
        three.heal()
        said(1, 2, "healed")
        said(2, 1, "healed")
        three.cut(1, 2, one_way=True)
        send(three, boxes, 1, 2, "lost")
        said(2, 1, "the other way")
        three.heal()
        said(1, 2, "healed again")
        three.isolate(2)
        for number in (1, 3):
            send(three, boxes, 2, number, "lost")
            send(three, boxes, number, 2, "lost")
        said(1, 3, "around it")
        three.heal()
        said(3, 2, "back")
        said(2, 1, "back")


def test_a_lossy_link_loses_some(three: Hosts) -> None:
    with mailboxes(three) as boxes:
        three.lose(1, 2, 50)
        for number in range(200):
            send(three, boxes, 1, 2, str(number))
        three.heal()
        send(three, boxes, 1, 2, "end")
        arrived = []
        while (what := boxes[2].recv(100).decode()) != "end":
            arrived.append(int(what))
        assert arrived == sorted(arrived)
        assert 20 < len(arrived) < 180  # of 200; either bound is missed once in 10^30 runs


def test_bytes_of_a_slow_link_come_late_and_connections_overtake_each_other(three: Hosts) -> None:
    """The first connection's bytes are kept back until those of the second are there."""
    overtaken = threading.Event()
    order = threading.Lock()
    drawn: list[float] = []

    def delay() -> float:
        with order:
            drawn.append(0.0)
            first = len(drawn) == 1
        if first:
            assert overtaken.wait(DEADLINE_SECONDS)
        return 0.0

    with contextlib.ExitStack() as stack:
        with three[2].inside():
            listener = stack.enter_context(socket.create_server((three[2].address, 5000)))
        three.slow(1, 2, SlowLink, delay)

        def dial() -> tuple[socket.socket, socket.socket]:
            with three[1].inside():
                near = socket.create_connection((three[2].address, 5000), DEADLINE_SECONDS)
            far, _ = listener.accept()
            far.settimeout(DEADLINE_SECONDS)
            return stack.enter_context(near), stack.enter_context(far)

        listener.settimeout(DEADLINE_SECONDS)
        (near, far), (near_2, far_2) = dial(), dial()
        near.sendall(b"sent first")
        wait_until(lambda: len(drawn) == 1, "the first bytes are kept back")
        near_2.sendall(b"sent second")
        assert far_2.recv(100) == b"sent second"
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(100)
        far.settimeout(DEADLINE_SECONDS)
        overtaken.set()
        assert far.recv(100) == b"sent first"
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
        three.heal()
        with contextlib.suppress(ConnectionResetError):
            assert near.recv(100) == b""


def test_a_delay_is_a_delay(three: Hosts) -> None:
    import time

    with contextlib.ExitStack() as stack:
        with three[2].inside():
            listener = stack.enter_context(socket.create_server((three[2].address, 5000)))
        three.delay(1, 2, 0.05, 0.05)
        with three[1].inside():
            near = stack.enter_context(socket.create_connection((three[2].address, 5000), 30))
        far = stack.enter_context(listener.accept()[0])
        began = time.monotonic()
        near.sendall(b"ping")
        assert far.recv(4) == b"ping"
        far.sendall(b"pong")
        assert near.recv(4) == b"pong"
        assert time.monotonic() - began >= 0.1


def test_everything_is_gone_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), Hosts(2) as hosts:
        disk = hosts[2].small_disk("disk", 8 << 20)
        hosts[1].start("metadata")
        hosts[2].start("chunks", directories=f"{disk}/target")
        mount = hosts[2].start("mount")
        pids = [service.pid for host in hosts for service in host.services]
        assert [system.mounted_at(str(hosts[2].directory / name)) for name in ("disk", "mnt")]
        hosts.cut(1, 2)
        mount.freeze()
        raise ZeroDivisionError
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not hosts.directory.exists()
    assert str(hosts.directory) not in Path("/proc/self/mountinfo").read_text()


# --- a kvfs of several hosts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """Metadata on host 1, chunk servers on 2 to 4, agent and mount on 4. Tests heal what they
    cut."""
    with Hosts(4) as hosts:
        hosts[1].start("metadata")
        for number in (2, 3, 4):
            hosts[number].start("chunks")
        hosts.wait_for_states(host2="serving", host3="serving", host4="serving")
        hosts[4].start("agent")
        hosts[4].start("mount", transport="auto")
        yield hosts


def put(client: kvfs.Client, numbers: range) -> None:
    keys, buffers = zip(*map(block, numbers), strict=True)
    layout = KVLayout(block_tokens=16)
    client.namespace("tenant/model", layout, create=True).put(keys, buffers)


def held(client: kvfs.Client, numbers: range) -> list[bool]:
    """Which of them are there. What is there has the right bytes."""
    keys, buffers = zip(*map(block, numbers), strict=True)
    with client.namespace("tenant/model").get(keys) as blocks:
        assert all(view is None or view == data for view, data in zip(blocks, buffers, strict=True))
        return [view is not None for view in blocks]


@contextlib.contextmanager
def agent_of(hosts: Hosts, name: str) -> Iterator[kvfs.Client]:
    """A fresh agent on host 4: its arena holds nothing, so that all it gives out comes from the
    chunk servers."""
    service = hosts[4].start("agent", name=name)
    with kvfs.connect(service.addresses[0]) as client:
        yield client
    service.stop()
    hosts[4].services.remove(service)


def test_only_who_has_the_secret_reaches_a_host(cluster: Hosts, tmp_path: Path) -> None:
    target = f"tcp:{cluster[1].address}:{METADATA_PORT}"
    assert cluster[3].kvfs("ls", target).stdout.split() >= [b"kv"]
    assert cluster[3].kvfs("ls", target, env=dict(os.environ)).returncode == ExitCode.USAGE
    other = tmp_path / "other"
    assert run("secret", other).returncode == ExitCode.OK
    done = cluster[3].kvfs("ls", target, f"--secret-file={other}")
    assert done.returncode == ExitCode.REFUSED
    assert b"another secret" in done.stderr


def test_blocks_of_hosts_that_are_cut_off_or_killed_come_back(cluster: Hosts) -> None:
    numbers = range(48)
    with agent_of(cluster, "writer") as client:
        put(client, numbers)
        assert all(held(client, numbers))
    cluster.isolate(2)
    killed = next(s for s in cluster[3].services if s.name == "chunks")
    killed.kill()
    cluster.wait_for_states(host2="offline", host3="offline", host4="serving")
    with agent_of(cluster, "reader") as client:
        there = held(client, numbers)
        assert any(there)  # what lies on host 4
        assert not all(there)
    cluster.heal()
    killed.restart()
    cluster.wait_for_states(host2="serving", host3="serving", host4="serving")
    with agent_of(cluster, "reader again") as client:
        # A block that could not be reached was a miss, and is none once its host is back.
        assert all(held(client, numbers))


def test_a_one_way_cut_takes_a_host_out_too(cluster: Hosts) -> None:
    """Its heartbeats get lost; everything that is said to it arrives."""
    cluster.cut(2, 1, one_way=True)
    cluster.wait_for_states(host2="offline", host3="serving")
    cluster.heal()
    cluster.wait_for_states(host2="serving")


def test_files_over_lossy_and_slow_links(cluster: Hosts) -> None:
    for number in (2, 3):
        cluster.lose(4, number, 2)
    cluster.delay(4, 2, 0.002, 0.01)
    cluster.delay(4, 1, 0.001, 0.002)
    data = os.urandom(3 << 20)
    path = cluster[4].directory / "mnt/lossy"
    path.write_bytes(data)
    assert path.read_bytes() == data
    cluster.heal()
    target = f"tcp:{cluster[1].address}:{METADATA_PORT}"
    assert cluster[3].kvfs("cat", target, "/lossy").stdout == data


def test_a_mount_goes_on_when_the_metadata_service_was_killed(cluster: Hosts) -> None:
    data = os.urandom(2 << 20)
    path = cluster[4].directory / "mnt/kept"
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
        service = cluster[1].services[0]
        service.kill()
        service.restart()
        file.write(b"more")
    assert path.read_bytes() == data + b"more"


# --- disks


def test_a_disk_that_is_full_and_one_that_died(three: Hosts) -> None:
    """What they cannot take is a clear error or goes elsewhere; what was acknowledged stays."""
    if not _stores_attributes(three[2].small_disk("probe", 1 << 20)):
        pytest.skip("tmpfs has no extended attributes in this kernel")
    small = three[2].small_disk("disk", 24 << 20)
    three[1].start("metadata")
    three[2].start("chunks", directories=f"{small}/target")
    three[3].start("chunks", failing=three[3].disk())
    three.wait_for_states(host2="serving", host3="serving")
    three[1].start("agent")
    acknowledged: list[range] = []
    with kvfs.connect(f"unix:{three[1].directory}/agent.sock") as client:
        for start in range(0, 4096, 64):
            try:
                put(client, range(start, start + 64))
                acknowledged.append(range(start, start + 64))
            except DiskFull:  # between two heartbeats
                break
            if three.targets()["host2"].state.value == "full":
                break
        else:
            pytest.fail("it never got full")
        three.wait_for_states(host2="full", host3="serving")
        put(client, range(4096, 4160))  # goes elsewhere
        acknowledged.append(range(4096, 4160))
        # Room is made on the full disk as on any: old blocks may be gone, the new ones are not.
        assert all(held(client, acknowledged[-1]))
        assert all(any(held(client, numbers)) for numbers in acknowledged)
    three[3].fail_disk()
    probe = three[1].start("agent", name="probe")
    with kvfs.connect(probe.addresses[0]) as client:
        there = [there for numbers in acknowledged for there in held(client, numbers)]
        assert any(there)
        assert not all(there)
    three.wait_for_states(host3="offline")


def _stores_attributes(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.kvfs", b"x")
    except OSError:
        return False
    return True
