"""Servers that forget what was not synced: whoever syncs then is told, once and for good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base.errors import ConnectionLost, NoTarget, TargetFailed
from kvfs_base.types import Layout
from kvfs_datapath.client.files import StripedFile
from t2_services.chunk_cluster import Cluster, running, wait_until

LAYOUT = Layout(1000, (1, 2, 3, 2))


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Cluster]:
    with running("memory", "tcp", tmp_path) as cluster:
        yield cluster


def kill(cluster: Cluster, number: int) -> None:
    """Ends without a note that it ended well, as a process that is killed or loses its power."""
    server = cluster.servers.pop(number)
    server._targets._host_id = "a boot before"
    server.stop()


@pytest.mark.parametrize("between", ["", "another write", "a cut"])
def test_a_sync_fails_if_the_server_may_have_lost_what_was_written(
    remote: Cluster, between: str
) -> None:
    """The new process has nothing to sync, and would say that all is well."""
    file = StripedFile(remote.client(), 7, LAYOUT)
    other = StripedFile(remote.client(), 8, LAYOUT)
    file.write(0, b"x" * 3000)  # chunks 0 to 2, on targets 1 to 3
    other.write(1000, b"y" * 1000)
    kill(remote, 1)
    remote.start_server_again(1)
    if between == "another write":
        file.write(10, b"z")
    elif between == "a cut":
        file.truncate(3000, 500)
    for _ in range(3):  # it does not get well by being asked again
        with pytest.raises(TargetFailed):
            file.sync()
    file.write(0, b"x" * 3000)
    with pytest.raises(TargetFailed):
        file.sync()
    other.sync()  # nothing of it was there
    again = StripedFile(remote.client(), 7, LAYOUT)
    again.write(0, b"x" * 3000)
    again.sync()


def test_what_was_synced_before_is_not_lost(remote: Cluster) -> None:
    file = StripedFile(remote.client(), 7, LAYOUT)
    file.write(0, b"x" * 3000)
    file.sync()
    kill(remote, 1)
    remote.start_server_again(1)
    file.write(0, b"y")
    file.sync()


def test_a_server_that_ended_well_has_lost_nothing(remote: Cluster) -> None:
    """The machine was up all the time, and its kernel has the pages."""
    file = StripedFile(remote.client(), 7, LAYOUT)
    file.write(0, b"x" * 3000)
    remote.servers.pop(1).stop()
    remote.start_server_again(1)
    file.write(10, b"z")
    file.sync()


def test_a_disk_that_failed_does_not_end_well(remote: Cluster) -> None:
    file = StripedFile(remote.client(), 7, LAYOUT)
    file.write(0, b"x" * 1000)
    server = remote.servers.pop(1)
    (store,) = server._targets.stores
    store._failure = TargetFailed(detail="it was")
    server.stop()
    remote.start_server_again(1)
    with pytest.raises(TargetFailed):
        file.sync()


def test_a_sync_that_failed_for_now_forgets_nothing(remote: Cluster) -> None:
    file = StripedFile(remote.client(), 7, LAYOUT, retry_seconds=0)
    file.write(0, b"x" * 1000)
    kill(remote, 1)
    with pytest.raises((ConnectionLost, NoTarget)):
        file.sync()
    remote.start_server_again(1)
    wait_until(lambda: remote.metadata.report(1).healthy)

    def lost() -> bool:
        try:
            file.sync()
        except TargetFailed:
            return True
        except (ConnectionLost, NoTarget):
            return False
        raise AssertionError("nothing was lost?")

    wait_until(lost)
